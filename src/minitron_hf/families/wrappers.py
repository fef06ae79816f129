"""Models that hold a language model beside others: a row each. The language model is described by its family's table.

Images and sound become inputs of the language model through projectors, whose tensors are named here with their axes
like all others. Models that read sound alone have a file of their own (`sound_wrappers`). Types without a row are
refused, with their reason (`refused_wrappers`).
"""

from __future__ import annotations

from .base import layer_tables, linear
from .rules import CAPPED_LOGITS, COHERE_LOGITS, GRANITE_LOGITS, LogitRules
from .wrapper import Wrapper

#: Language models that are tested in wrappers that take any.
DECODERS = (
    "llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "phi", "phi3", "granite",
    "cohere2", "olmo2", "gpt_oss",
)  # fmt: skip
#: What most wrappers call the parts beside the language model.
TOWER, VISION, PROJECTOR = "model.vision_tower.", "model.vision_model.", "model.multi_modal_projector."
SOUND = "model.audio_tower."
#: A projector of two projections, with as many neurons between them as the hidden size.
TWO_LINEAR = layer_tables(
    linear(f"{PROJECTOR}linear_1", "projector", "any"), linear(f"{PROJECTOR}linear_2", "hidden", "projector")
)
#: The same with a size of its own between them.
OWN_WIDTH = linear(f"{PROJECTOR}linear_2", "hidden", "any")
#: What ends a row of image tokens.
NEWLINE = {"model.image_newline": "hidden"}
#: A merger in the vision tower, whose output width is a field of its config.
MERGER = linear("model.visual.merger.linear_fc2", "hidden", "any")
DEEP_MERGERS = layer_tables(MERGER, linear("model.visual.deepstack_merger_list.*.linear_fc2", "hidden", "any"))
MERGER_WIDTH = ("vision_config.out_hidden_size",)
TWO_PARTS = (TOWER, PROJECTOR)
PHI4_IMAGE = "model.embed_tokens_extend.image_embed.img_projection"
PHI4_SOUND = "model.embed_tokens_extend.audio_embed"
_GLM_MERGER = "its merger computes in the hidden size of the language model"
_WITH_HEADS = "all heads together are as wide as the residual stream, and "

ROWS = (
    *(
        Wrapper(name, DECODERS, unpruned_prefixes=TWO_PARTS, tensors=TWO_LINEAR)
        for name in ("internvl", "llava", "qianfan_ocr", "vipllava")
    ),
    Wrapper("mistral3", (*DECODERS, "mistral4"), unpruned_prefixes=TWO_PARTS, tensors=TWO_LINEAR),
    *(  # their towers are built by the package timm
        Wrapper(name, texts, unpruned_prefixes=TWO_PARTS, tensors=TWO_LINEAR)
        for name, texts in {"fast_vlm": ("qwen2",), "perception_lm": ("llama",)}.items()
    ),
    Wrapper(
        "video_llava",
        DECODERS,
        unpruned_prefixes=("model.image_tower.", "model.video_tower.", PROJECTOR),
        tensors=TWO_LINEAR,
    ),
    *(
        Wrapper(name, DECODERS, unpruned_prefixes=(*TWO_PARTS, *NEWLINE), tensors=layer_tables(TWO_LINEAR, NEWLINE))
        for name in ("llava_next", "llava_next_video", "llava_onevision")
    ),
    *(
        Wrapper(
            name,
            DECODERS,
            prefix="model.text_model.",
            unpruned_prefixes=(VISION, "model.connector."),
            tensors=linear("model.connector.modality_projection.proj", "hidden", "any"),
        )
        for name in ("idefics3", "smolvlm")
    ),
    *(
        Wrapper(name, texts, unpruned_prefixes=TWO_PARTS, tensors=OWN_WIDTH)
        for name, texts in {
            "aya_vision": ("cohere2", "cohere"),
            "cohere2_vision": ("cohere2", "cohere"),
            "lfm2_vl": ("lfm2", "lfm2_moe"),
            "lfm3_vl": ("lfm3",),
        }.items()
    ),
    Wrapper(
        "idefics2",
        ("mistral",),
        prefix="model.text_model.",
        unpruned_prefixes=(VISION, "model.connector."),
        refused={
            "hidden": "its perceiver computes in the hidden size of the language model",
            "ffn": "its projector has as many neurons as the language model's MLPs",
        },
    ),
    Wrapper(
        "llama4",
        ("llama4_text",),
        prefix="language_model.",
        has_whole_model=True,
        unpruned_prefixes=("vision_model.", "multi_modal_projector."),
        tensors=linear("multi_modal_projector.linear_1", "hidden", "any"),
    ),
    Wrapper(
        "nemotron_h_omni",
        ("nemotron_h",),
        prefix="language_model.",
        has_whole_model=True,
        unpruned_prefixes=("vision_model.", "multi_modal_projector.", "sound_encoder.", "sound_projection."),
        tensors=linear("multi_modal_projector.linear_2", "hidden", "any"),
    ),
    Wrapper(
        "kimi_k25",
        ("deepseek_v3",),
        unpruned_prefixes=(TOWER, "model.mm_projector."),
        tensors=linear("model.mm_projector.out_proj", "hidden", "any"),
    ),
    Wrapper(
        "lighton_ocr",
        ("qwen3", "qwen2", "mistral"),
        unpruned_prefixes=("model.vision_encoder.", "model.vision_projection."),
        tensors=layer_tables(
            linear("model.vision_projection.linear_1", "projector", "any"),
            linear("model.vision_projection.linear_2", "hidden", "projector"),
        ),
    ),
    Wrapper(
        "aria",
        ("aria_text",),
        unpruned_prefixes=TWO_PARTS,
        tensors=layer_tables(
            linear(f"{PROJECTOR}feed_forward.linear_in", "projector", "any"),
            linear(f"{PROJECTOR}feed_forward.linear_out", "hidden", "projector"),
        ),
    ),
    Wrapper(
        "deepseek_vl",
        DECODERS,
        unpruned_prefixes=(VISION, "model.aligner."),
        tensors=layer_tables(
            linear("model.aligner.linear1", "projector", "any"), linear("model.aligner.linear2", "hidden", "projector")
        ),
    ),
    Wrapper(
        "deepseek_vl_hybrid",
        DECODERS,
        unpruned_prefixes=(VISION, "model.aligner.", "model.high_res_vision_"),
        refused={"hidden": "its two vision towers share the neurons of the projector, half and half"},
    ),
    Wrapper(
        "janus",
        ("llama",),
        unpruned_prefixes=(VISION, "model.aligner.", "model.vqmodel.", "model.generation_"),
        refused={"hidden": "its image generator reads the residual stream, too"},
    ),
    *(
        Wrapper(
            name,
            ("qwen2",),
            unpruned_prefixes=TWO_PARTS,
            tensors=layer_tables(
                {f"{PROJECTOR}conv_upsampler2.weight": "projector any any any"},
                linear(f"{PROJECTOR}multimodal_projector", "hidden", "projector"),
            ),
        )
        for name in ("got_ocr2", "pp_chart2table")
    ),
    Wrapper(
        "ovis2",
        ("qwen2", "qwen3"),
        unpruned_prefixes=(TOWER, "model.visual_embeddings_table."),
        tensors={"model.visual_embeddings_table.weight": "any hidden"},
        width_fields=("hidden_size",),
    ),
    Wrapper(
        "video_llama_3",
        ("qwen2", "qwen3"),
        unpruned_prefixes=(VISION, "model.projector."),
        tensors=layer_tables(
            linear("model.projector.readout.0", "projector", "any"),
            linear("model.projector.readout.2", "hidden", "projector"),
        ),
    ),
    Wrapper(
        "hyperclovax_vision_v2",
        ("hyperclovax",),
        unpruned_prefixes=(VISION, "model.projector."),
        tensors=linear("model.projector", "hidden", "any"),
        logits=LogitRules(multiplied_by="logits_scaling"),
    ),
    Wrapper(
        "fuyu",
        ("persimmon",),
        unpruned_prefixes=("model.vision_embed_tokens.",),
        tensors=linear("model.vision_embed_tokens", "hidden", "any"),
    ),
    *(
        Wrapper(
            name,
            ("qwen3_5_text",),
            unpruned_prefixes=(TOWER, "model.merger."),
            tensors=linear("model.merger.mlp.0.linear_2", "hidden", "any"),
        )
        for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
    ),
    Wrapper(
        "minimax_m3_vl",
        ("minimax_m3_vl_text",),
        unpruned_prefixes=TWO_PARTS,
        refused={"hidden": "its projector merges patches of the hidden size, whose number is another config field"},
    ),
    Wrapper(
        "qwen2_vl",
        ("qwen2_vl_text",),
        unpruned_prefixes=("model.visual.",),
        tensors=linear("model.visual.merger.mlp.2", "hidden", "any"),
        width_fields=("vision_config.hidden_size",),
    ),
    *(
        Wrapper(
            name,
            (text,),
            unpruned_prefixes=("model.visual.",),
            tensors=linear("model.visual.merger.mlp.2", "hidden", "any"),
            width_fields=MERGER_WIDTH,
        )
        for name, text in {"exaone4_5": "exaone4", "qwen2_5_vl": "qwen2_5_vl_text"}.items()
    ),
    *(
        Wrapper(
            name,
            (text,),
            unpruned_prefixes=("model.visual.",),
            tensors=DEEP_MERGERS,
            width_fields=MERGER_WIDTH,
            deep_inputs="vision_config.deepstack_visual_indexes",
        )
        for name, text in {
            "cosmos3_omni": "qwen3_vl_text",
            "qwen3_vl": "qwen3_vl_text",
            "qwen3_vl_moe": "qwen3_vl_moe_text",
        }.items()
    ),
    Wrapper(
        "qwen3_omni_moe_thinker",
        ("qwen3_omni_moe_text",),
        unpruned_prefixes=("model.visual.", "model.audio_tower."),
        tensors=layer_tables(
            linear("model.visual.merger.mlp.2", "hidden", "any"),
            linear("model.visual.merger_list.*.mlp.2", "hidden", "any"),
            linear("model.audio_tower.proj2", "hidden", "any"),
        ),
        width_fields=(*MERGER_WIDTH, "audio_config.output_dim"),
        deep_inputs="vision_config.deepstack_visual_indexes",
    ),
    Wrapper(
        "qwen2_5_omni_thinker",
        ("qwen2_5_omni_text",),
        unpruned_prefixes=("model.visual.", "model.audio_tower."),
        tensors=layer_tables(
            linear("model.visual.merger.mlp.2", "hidden", "any"),
            linear("model.audio_tower.proj", "hidden", "any"),
            {"model.audio_tower.audio_bos_eos_token.weight": "any hidden"},
        ),
        width_fields=(*MERGER_WIDTH, "audio_config.output_dim"),
    ),
    *(
        Wrapper(
            name,
            ("glm4v_text",),
            unpruned_prefixes=("model.visual.",),
            refused={"hidden": _GLM_MERGER, **dict.fromkeys(("heads", "kv"), f"{_WITH_HEADS}{_GLM_MERGER}")},
        )
        for name in ("glm46v", "glm4v", "glmga")
    ),
    *(
        Wrapper(name, (text,), unpruned_prefixes=("model.visual.",), refused={"hidden": _GLM_MERGER})
        for name, text in {"glm4v_moe": "glm4v_moe_text", "glm_ocr": "glm_ocr_text"}.items()
    ),
    Wrapper(
        "cosmos3_edge",
        ("cosmos3_edge_text",),
        unpruned_prefixes=("model.visual.", "model.projector."),
        tensors=linear("model.projector.linear_fc2", "hidden", "any"),
    ),
    # Its images are tokens of the vocabulary, so that nothing else knows the hidden size.
    Wrapper("emu3", ("emu3_text_model",), prefix="model.text_model.", unpruned_prefixes=("model.vqmodel.",)),
    Wrapper(
        "kosmos-2.5",
        ("kosmos_2_5_text_model",),
        prefix="text_model.",
        has_whole_model=True,
        unpruned_prefixes=("vision_model.", "image_to_text_projection."),
    ),
    Wrapper(
        "paddleocr_vl",
        ("paddleocr_vl_text",),
        unpruned_prefixes=("model.visual.", "model.projector."),
        tensors=linear("model.projector.linear_2", "hidden", "any"),
    ),
    Wrapper(
        "granite4_vision",
        ("granite4_vision_text",),
        unpruned_prefixes=(TOWER, "model.layerwise_projectors.", "model.spatial_projectors.", *NEWLINE),
        tensors=layer_tables(
            linear("model.layerwise_projectors.*.out_linear", "hidden", "any"),
            linear("model.spatial_projectors.*.out_linear", "hidden", "any"),
            NEWLINE,
        ),
        logits=GRANITE_LOGITS,
        image_layers=("deepstack_layer_map", "spatial_target_layers"),
    ),
    Wrapper(
        "granite_docling",
        ("granite_docling_text",),
        prefix="model.text_model.",
        unpruned_prefixes=(VISION, "model.density_router."),
        refused={"hidden": "its connector has norms over the hidden size"},
        logits=GRANITE_LOGITS,
        deep_inputs="vision_config.deepstack_visual_indexes",
    ),
    Wrapper(
        "hunyuan_vl",
        ("hunyuan_vl_text",),
        unpruned_prefixes=(TOWER,),
        refused={"hidden": "its patch merger ends with a norm over the hidden size"},
    ),
    Wrapper(
        "deepseek_ocr2",
        ("deepseek_ocr2_text",),
        unpruned_prefixes=(*TWO_PARTS, "model.view_separator"),
        tensors=layer_tables(
            linear("model.multi_modal_projector", "hidden", "any"), {"model.view_separator": "hidden"}
        ),
    ),
    Wrapper(
        "molmo2",
        ("molmo2_text",),
        unpruned_prefixes=TWO_PARTS,
        tensors=linear(f"{PROJECTOR}image_projector.down_proj", "hidden", "any"),
        width_fields=("adapter_config.text_hidden_size",),
    ),
    Wrapper(
        "phi4_multimodal",
        ("phi3",),
        prefix="model.",
        is_flat=True,
        unpruned_prefixes=("model.embed_tokens_extend.",),
        tensors=layer_tables(  # three projectors, which lose the same neurons
            linear(f"{PHI4_IMAGE}_up", "projector", "any"),
            linear(f"{PHI4_IMAGE}_down", "hidden", "projector"),
            *(linear(f"{PHI4_SOUND}.up_proj_for_{kind}", "projector", "any") for kind in ("speech", "vision_speech")),
            *(
                linear(f"{PHI4_SOUND}.down_proj_for_{kind}", "hidden", "projector")
                for kind in ("speech", "vision_speech")
            ),
        ),
    ),
    Wrapper(
        "cohere_compass",
        ("cohere_compass_text",),
        unpruned_prefixes=("model.visual.",),
        tensors=DEEP_MERGERS,
        width_fields=MERGER_WIDTH,
        logits=COHERE_LOGITS,
        deep_inputs="vision_config.deepstack_visual_indexes",
    ),
    Wrapper(
        "paligemma",
        ("gemma", "gemma2"),
        unpruned_prefixes=TWO_PARTS,
        tensors=linear(f"{PROJECTOR}linear", "hidden", "any"),
        width_fields=("projection_dim", "vision_config.projection_dim", "hidden_size"),
        logits=CAPPED_LOGITS,
    ),
    Wrapper(
        "gemma3",
        ("gemma3_text",),
        unpruned_prefixes=TWO_PARTS,
        tensors={f"{PROJECTOR}mm_input_projection_weight": "any hidden"},
    ),
    Wrapper(
        "gemma3n",
        ("gemma3n_text",),
        unpruned_prefixes=(TOWER, SOUND, "model.embed_vision.", "model.embed_audio."),
        logits=CAPPED_LOGITS,
    ),
    Wrapper(
        "gemma4",
        ("gemma4_text",),
        unpruned_prefixes=(TOWER, SOUND, "model.embed_vision.", "model.embed_audio."),
        tensors={
            "model.embed_vision.embedding_projection.weight": "hidden any",
            "model.embed_audio.embedding_projection.weight": "hidden any",
        },
        logits=CAPPED_LOGITS,
    ),
    Wrapper(
        "gemma4_unified",
        ("gemma4_unified_text",),
        unpruned_prefixes=("model.embed_vision.", "model.embed_audio."),
        tensors={
            "model.embed_vision.multimodal_embedder.embedding_projection.weight": "hidden any",
            "model.embed_audio.embedding_projection.weight": "hidden any",
        },
        logits=CAPPED_LOGITS,
    ),
    Wrapper(
        "qwen3_5", ("qwen3_5_text",), unpruned_prefixes=("model.visual.",), tensors=MERGER, width_fields=MERGER_WIDTH
    ),
    Wrapper(
        "qwen3_5_moe",
        ("qwen3_5_moe_text",),
        unpruned_prefixes=("model.visual.",),
        tensors=MERGER,
        width_fields=MERGER_WIDTH,
    ),
)
