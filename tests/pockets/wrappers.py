"""One tiny config per model that holds a language model beside others, and the images that go into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import is_timm_available

from .base import GROUPED, VOCAB

#: Makes inputs from a random generator.
Make = Callable[[torch.Generator], Mapping[str, Tensor]]
#: The token in whose place the images stand.
IMAGE_TOKEN = 95
#: Rows of a batch, with one image each.
ROWS = 2
VISION = {
    "hidden_size": 20,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
#: Those whose vision tower is built by timm, which need it.
WITH_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
#: What fits most language models.
WIDTHS = (
    {"num_attention_heads": 6},
    {"intermediate_size": 31},
    {"num_key_value_heads": 2, "num_attention_heads": 4},
    {"layers_to_drop": [1, 3]},
    {"hidden_size": 24},
    {"hidden_size": 24, "intermediate_size": 17, "num_attention_heads": 6, "num_hidden_layers": 3},
)
#: What fits mixtures of experts without another MLP.
EXPERTS = (
    {"num_attention_heads": 6},
    {"moe_intermediate_size": 9, "num_experts": 4},
    {"layers_to_drop": [1, 3]},
    {"hidden_size": 24},
    {"hidden_size": 24, "num_experts": 4, "num_attention_heads": 6, "num_hidden_layers": 3},
)
#: The same where experts are chosen in groups, and shared ones are as wide as so many of them.
ROUTED = (
    {"num_attention_heads": 6},
    {"intermediate_size": 31},
    {"num_experts": 4},
    {"layers_to_drop": [1, 3]},
    {"num_experts": 4, "num_attention_heads": 6, "num_hidden_layers": 4},
)
#: What fits latent attention, which has no groups of heads.
LATENT = tuple(request for request in WIDTHS if "num_key_value_heads" not in request)
#: What fits heads that are as wide together as the residual stream.
LIKE_HEADS = (
    {"num_attention_heads": 3},
    {"intermediate_size": 31},
    {"layers_to_drop": [1, 3]},
    {"hidden_size": 24},
    {"hidden_size": 24, "intermediate_size": 17, "num_hidden_layers": 3},
)
#: What fits where neither heads nor the residual stream are cut.
NEURONS = (
    {"intermediate_size": 31},
    {"layers_to_drop": [1, 3]},
    {"intermediate_size": 17, "num_hidden_layers": 3},
)
#: What fits five heads of eight dimensions.
SQUARE = (
    {"num_attention_heads": 3},
    {"intermediate_size": 31},
    {"layers_to_drop": [1, 3]},
    {"hidden_size": 24},
    {"hidden_size": 24, "intermediate_size": 17, "num_hidden_layers": 3},
)


@dataclass(frozen=True)
class WrapperPocket:
    """A wrapper's pocket config around a pocket language model.

    Attributes:
        config: the config.
        num_tokens: tokens of one image.
        image: makes the inputs of `ROWS` images from a random generator.
        reads_neurons: weights of the projector that read its neurons, in their last dimension.
        token_kinds: further inputs with a number for every token: this one where images stand, else 0.
        widths: what to ask for; the last one names several sizes.
        is_exact: whether a cut of the hidden size leaves what the projector computes as it was; False where its norm
            shares the eps of the language model's norms.
    """

    config: PretrainedConfig
    num_tokens: int
    image: Make
    is_exact: bool = True
    reads_neurons: tuple[str, ...] = ()
    token_kinds: Mapping[str, int] = field(default_factory=dict)
    widths: tuple[Mapping[str, Any], ...] = WIDTHS


def pixels(*shape: int, **others: Any) -> Make:
    """Pixels of some shape for `ROWS` images, and further inputs."""

    def make(generator: torch.Generator) -> Mapping[str, Tensor]:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return {"pixel_values": values, **{name: torch.as_tensor(value) for name, value in others.items()}}

    return make


def renamed(make: Make, **names: str) -> Make:
    """The same inputs under other names."""
    return lambda generator: {names.get(name, name): value for name, value in make(generator).items()}


def doubled(make: Make, **names: str) -> Make:
    """The same inputs, some of them under a second name, too."""

    def both(generator: torch.Generator) -> Mapping[str, Tensor]:
        given = make(generator)
        return {**given, **{other: given[name] for name, other in names.items()}}

    return both


IMAGES = pixels(ROWS, 3, 16, 16)
SIZES = [[16, 16]] * ROWS
#: Four patches of Qwen's towers become one token; a frame counts twice.
PATCHES = pixels(ROWS * 16, 3 * 2 * 4 * 4, image_grid_thw=[[1, 4, 4]] * ROWS)
MERGED = {
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 36,
    "num_position_embeddings": 16,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 96,
    "vision_start_token_id": 93,
    "vision_end_token_id": 94,
}
INDEX, ID = {"image_token_index": IMAGE_TOKEN}, {"image_token_id": IMAGE_TOKEN}


#: The towers of Phi-4-multimodal; what they give is less wide than the language model.
PHI4 = {
    "vision_config": {
        "hidden_size": 20,
        "intermediate_size": 22,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "crop_size": 16,
        "patch_size": 4,
        "image_token_id": 95,
    },
    "audio_config": {
        "hidden_size": 20,
        "intermediate_size": 22,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "input_size": 16,
        "ext_pw_out_channel": 20,
        "depthwise_separable_out_channel": 20,
        "nemo_conv_channels": 6,
        "audio_token_id": 94,
    },
}


def wrapper_config(text: PretrainedConfig, model_type: str, tower: str, vision: Mapping[str, Any], fields: Any) -> Any:
    """A wrapper's config around a language model's."""
    own = {"model_type": tower, **VISION, **vision}
    return AutoConfig.for_model(
        model_type, text_config=copy.deepcopy(text.to_dict()), vision_config=own, **copy.deepcopy(fields)
    )


def sound_pockets(texts: Mapping[str, PretrainedConfig]) -> dict[str, WrapperPocket]:
    """Those that read sound alone; the arguments are those of `wrapper_pockets`."""
    pockets: dict[str, WrapperPocket] = {}
    known = {one.name for one in fields(WrapperPocket)}

    def add(
        model_type: str,
        text: str,
        num_tokens: int,
        given: Make,
        **own: Any,
    ) -> None:
        pocket = {name: own.pop(name) for name in known & own.keys()}
        config = AutoConfig.for_model(model_type, text_config=copy.deepcopy(texts[text].to_dict()), **own)
        pockets[model_type] = WrapperPocket(config, num_tokens, given, **pocket)

    def spectra(*shape: int, **others: Any) -> Make:
        return renamed(pixels(*shape, **others), pixel_values="input_features")

    whisper = {
        "d_model": 20,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 40,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    tower = {**VISION, "intermediate_size": 80, "num_mel_bins": 8, "max_source_positions": 16}
    tower = {name: value for name, value in tower.items() if name not in ("image_size", "patch_size")}
    token = {"audio_token_id": IMAGE_TOKEN}
    all_valid = torch.ones(ROWS, 32, dtype=torch.long)
    second = "model.multi_modal_projector.linear_2.weight"
    add("voxtral", "llama", 4, spectra(ROWS, 8, 32), audio_config=tower, reads_neurons=(second,), **token)
    heard = spectra(ROWS, 8, 32, feature_attention_mask=all_valid)
    add("qwen2_audio", "qwen2", 8, heard, audio_config=whisper, audio_token_index=IMAGE_TOKEN)
    conformer = {
        "input_dim": 8,
        "num_layers": 2,
        "hidden_dim": 20,
        "num_heads": 2,
        "output_dim": 6,
        "context_size": 6,
        "max_pos_emb": 8,
        "conv_kernel_size": 3,
    }
    former = {
        "model_type": "blip_2_qformer",
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 22,
    }
    windows = {"window_size": 6, "downsample_rate": 3, "has_lora_adapter": False, "audio_token_index": IMAGE_TOKEN}
    for name, layers in (("granite_speech", None), ("granite_speech_plus", [0])):
        encoder = conformer if layers is None else {**conformer, "cat_hidden_layers": layers}
        width = 20 if layers is None else 40
        projector = {**former, "encoder_hidden_size": width}
        add(name, "granite", 4, spectra(ROWS, 12, 8), encoder_config=encoder, projector_config=projector, **windows)
    masked = spectra(ROWS, 8, 32, input_features_mask=all_valid)
    add("glmasr", "llama", 4, masked, audio_config=tower, **token)
    add("moss_transcribe_diarize", "qwen3", 4, masked, audio_config={**tower, "intermediate_size": 40}, **token)
    windowed = {**{key: value for key, value in whisper.items() if key != "max_source_positions"}, "n_window": 50}
    windowed |= {"n_window_infer": 100, "output_dim": 36, "downsample_hidden_size": 6}
    window = spectra(ROWS, 8, 100, input_features_mask=torch.ones(ROWS, 100, dtype=torch.long))
    add("qwen3_asr", "qwen3", 13, window, audio_config=windowed, **token)
    stacked = {**tower, "intermediate_size": 22, "num_mel_bins": 4, "num_stacked_frames": 2}
    stacked |= {"num_timestamp_prediction_layers": 1, "fsmn_kernel_size": 3, "max_position_embeddings": 33}
    stacked = {key: value for key, value in stacked.items() if key != "max_source_positions"}
    adaptor = {"hidden_size": 36, "num_attention_heads": 2, "intermediate_size": 9, "num_hidden_layers": 1}
    frames = spectra(ROWS, 5, 8, input_features_mask=torch.ones(ROWS, 5, dtype=torch.long))
    adaptor |= {"projector_hidden_size": 26}
    add("fun_asr_nano", "qwen3", 5, frames, audio_config=stacked, adaptor_config=adaptor, **token)
    listener = {"hidden_size": 20, "intermediate_size": 22, "num_hidden_layers": 1, "num_attention_heads": 2}
    speakers = {"num_speakers": 2, "speaker_cache_length": 4}
    diarization = {
        "model_type": "nemotron3_diarization",
        "audio_config": {**listener, "num_mel_bins": 8},
        "head_config": {"hidden_size": 6, "audio_hidden_size": 20, "num_speakers": 2},
        "streaming_config": speakers,
    }
    heard = spectra(ROWS, 32, 8, input_features_mask=all_valid)
    tower = {"asr_config": {**listener, "num_mel_bins": 8}, "diarization_config": diarization}
    timing = {**listener, "vocab_size": 9, "blank_token_id": 8}
    add("nemo_speechlm", "nemotron_h", 4, heard, audio_config=tower, word_timestamp_config=timing, **token)
    return pockets


def wrapper_pockets(texts: Mapping[str, PretrainedConfig]) -> dict[str, WrapperPocket]:
    """All of them.

    Args:
        texts: pocket configs of language models.
    """
    pockets: dict[str, WrapperPocket] = {}
    known = {one.name for one in fields(WrapperPocket)}

    def add(
        model_type: str,
        text: str,
        tower: str,
        num_tokens: int = 16,
        image: Make = IMAGES,
        *,
        vision: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        """A wrapper of a type around a language model; changes are fields of the pocket or of its config."""
        own = {name: changes.pop(name) for name in known & changes.keys()}
        config = wrapper_config(texts[text], model_type, tower, vision or {}, changes)
        pockets[model_type] = WrapperPocket(config, num_tokens, image, **own)

    second = "model.multi_modal_projector.linear_2.weight"
    no_head = {"vision_use_head": False}
    sized = pixels(ROWS, 3, 16, 16, image_sizes=SIZES)
    # A whole image and one tile, whose rows end with a newline.
    tiles = pixels(ROWS, 2, 3, 16, 16, image_sizes=SIZES)
    pinpoints = {"image_grid_pinpoints": [[16, 16]], "reads_neurons": (second,)}
    add("llava", "llama", "clip_vision_model", reads_neurons=(second,), **INDEX)
    add("llava_next", "mistral", "clip_vision_model", 36, tiles, **INDEX, **pinpoints)
    add("llava_onevision", "qwen2", "siglip_vision_model", 36, tiles, vision=no_head, **INDEX, **pinpoints)
    add("vipllava", "llama", "clip_vision_model", vision_feature_layers=[-2, -1], reads_neurons=(second,), **INDEX)
    squares = {"image_size": [16, 16], "patch_size": [4, 4]}
    add("internvl", "qwen3", "internvl_vision", 4, vision=squares, reads_neurons=(second,), **ID)
    eps = {"is_exact": False, "reads_neurons": (second,)}
    add("mistral3", "mistral", "pixtral", 4, sized, vision={"head_dim": 10}, **eps, **INDEX)
    projected = {"projection_dim": 36, "hidden_size": 36, "vocab_size": VOCAB, "token_kinds": {"token_type_ids": 0}}
    tower = {**no_head, "projection_dim": 36}
    add("paligemma", "gemma", "siglip_vision_model", vision=tower, **projected, **INDEX)
    gemma3 = {"token_kinds": {"token_type_ids": 1}, "mm_tokens_per_image": 4}
    add("gemma3", "gemma3_text", "siglip_vision_model", 4, vision=no_head, **gemma3, **INDEX)
    gemma4 = {"head_dim": 12, "num_key_value_heads": 2, "position_embedding_size": 16}
    add("gemma4", "gemma4_text", "gemma4_vision", 0, vision=gemma4, **ID)
    qwen = {"token_kinds": {"mm_token_type_ids": 1}, "vision": MERGED, **QWEN_TOKENS}
    add("qwen3_5", "qwen3_5_text", "qwen3_5_vision", 4, PATCHES, **qwen)
    add("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_moe_vision", 4, PATCHES, widths=EXPERTS, **qwen)
    add("qianfan_ocr", "qwen3", "qianfan_ocr_vision", 4, vision=squares, reads_neurons=(second,), **ID)
    whole = {"vision_feature_select_strategy": "full", "reads_neurons": (second,)}
    stills = renamed(IMAGES, pixel_values="pixel_values_images")
    add("video_llava", "llama", "clip_vision_model", 17, stills, **whole, **INDEX)
    add("llava_next_video", "llama", "clip_vision_model", 36, tiles, **INDEX, **pinpoints)
    one_tile = pixels(ROWS, 1, 3, 16, 16)
    add("idefics3", "llama", "idefics3_vision", 4, one_tile, scale_factor=2, **ID)
    add("smolvlm", "llama", "smolvlm_vision", 4, one_tile, scale_factor=2, **ID)
    resampler = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 6}
    perceiver = {"num_key_value_heads": 1, "hidden_size": 36, **resampler}
    add("idefics2", "mistral", "idefics2_vision", 3, one_tile, perceiver_config=perceiver, **ID)
    merged = {"downsample_factor": 2, "alignment_intermediate_size": 26}
    add("aya_vision", "cohere2", "siglip_vision_model", 4, vision=no_head, **merged, **INDEX)
    add("cohere2_vision", "cohere2", "siglip_vision_model", 4, vision=no_head, **merged, **ID)
    packed = pixels(
        ROWS,
        16,
        3 * 4 * 4,
        spatial_shapes=[[4, 4]] * ROWS,
        pixel_attention_mask=torch.ones(ROWS, 16, dtype=torch.long),
    )
    narrow = {"projector_hidden_size": 26}
    add("lfm2_vl", "lfm2", "siglip2_vision_model", 4, packed, vision={**no_head, "num_patches": 16}, **narrow, **ID)
    lfm3 = {"hidden_size": 24, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    add("lfm3_vl", "lfm3", "lfm3_vl_vision", 4, PATCHES, vision=lfm3, **narrow, **QWEN_TOKENS)
    llama4 = {
        "vision_output_dim": 26,
        "projector_input_dim": 26,
        "projector_output_dim": 26,
        "intermediate_size": 96,
        "hidden_size": 24,
    }
    add("llama4", "llama4_text", "llama4_vision_model", 4, vision=llama4, **INDEX)
    radio = {"max_img_size": 16, "video_temporal_patch_size": 2, "mlp_ratio": 1.5}
    flat = pixels(ROWS * 16, 3 * 4 * 4, image_grid_hw=[[4, 4]] * ROWS)
    add("nemotron_h_omni", "nemotron_h", "radio", 4, flat, vision=radio, vision_hidden_size=20, **narrow, **ID)
    grid = pixels(ROWS * 16, 3, 4, 4, image_grid_thw=[[1, 4, 4]] * ROWS)
    kimi = {"hidden_size": 24, "pos_emb_height": 4, "pos_emb_width": 4}
    add(
        "kimi_k25",
        "deepseek_v3",
        "kimi_k25_vision",
        4,
        grid,
        vision=kimi,
        projection_hidden_size=24,
        widths=LATENT,
        **QWEN_TOKENS,
    )
    vision = {"reads_neurons": ("model.vision_projection.linear_2.weight",), "is_exact": False}
    add("lighton_ocr", "qwen3", "pixtral", 4, sized, vision={"head_dim": 10}, **vision, **ID)
    aria = {"projector_patch_to_query_dict": {16: 3}, "vision_feature_layer": -1}
    feed = "model.multi_modal_projector.feed_forward.linear_out.weight"
    add("aria", "aria_text", "idefics3_vision", 3, reads_neurons=(feed,), widths=EXPERTS, **aria, **INDEX)
    add(
        "deepseek_vl",
        "llama",
        "siglip_vision_model",
        vision=no_head,
        reads_neurons=("model.aligner.linear2.weight",),
        **ID,
    )
    sam = {
        "num_hidden_layers": 2,
        "hidden_size": 20,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "output_channels": 6,
        "mlp_dim": 22,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 3,
    }
    pair = doubled(IMAGES, pixel_values="high_res_pixel_values")
    add(
        "deepseek_vl_hybrid",
        "llama",
        "siglip_vision_model",
        16,
        pair,
        vision=no_head,
        high_res_vision_config=sam,
        **ID,
    )
    codes = {
        "embed_dim": 4,
        "num_embeddings": 10,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
    }
    codes |= {"num_res_blocks": 1, "projection_dim": 36, "image_token_embed_dim": 36, "num_hidden_layers": 1}
    add("janus", "llama", "janus_vision_model", vision={"projection_dim": 36}, vq_config=codes, **ID)
    got = {"mlp_dim": 22, "output_channels": 6, "window_size": 2, "global_attn_indexes": [1], "image_size": 64}
    reads = {"reads_neurons": ("model.multi_modal_projector.multimodal_projector.weight",)}
    large = pixels(ROWS, 3, 64, 64)
    add("got_ocr2", "qwen2", "got_ocr2_vision", 16, large, vision=got, **reads, **INDEX)
    add("pp_chart2table", "qwen2", "got_ocr2_vision", 16, large, vision=got, **reads, **INDEX)
    ovis = {"hidden_stride": 2, "vocab_size": 40, "num_visual_indicator_tokens": 5}
    add("ovis2", "qwen2", "ovis2_vision", 4, vision=ovis, hidden_size=36, **ID)
    frames = pixels(ROWS * 16, 3 * 4 * 4, image_grid_thw=[[1, 4, 4]] * ROWS, image_merge_sizes=[2] * ROWS)
    reads = {"reads_neurons": ("model.projector.readout.2.weight",)}
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": 96}
    add("video_llama_3", "qwen2", "video_llama_3_vision", 4, frames, vision={"hidden_size": 24}, **reads, **tokens)
    add("hyperclovax_vision_v2", "hyperclovax", "qwen2_5_vl_vision", 4, PATCHES, vision=MERGED, **tokens)
    kinds = {"mm_token_type_ids": 1}
    for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"):
        strip = pixels(1, 3, 4, ROWS * 64, target_sizes=[[4, 4]] * ROWS)
        add(
            name,
            "qwen3_5_text",
            f"{name}_vision",
            4,
            strip,
            downsample_mode="4x",
            token_kinds=kinds if name == "minicpmv4_7" else {},
            **ID,
        )
    add("minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3_vl_vision", 4, PATCHES, projector_hidden_size=26, **INDEX)
    add("exaone4_5", "exaone4", "exaone4_5_vision", 4, PATCHES, vision={**MERGED, "num_key_value_heads": 1}, **tokens)
    frames = {"token_kinds": {"mm_token_type_ids": 1}, **QWEN_TOKENS}
    qwen2 = {"depth": 2, "embed_dim": 24, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 1}
    add("qwen2_vl", "qwen2_vl_text", "qwen2_vl_vision", 4, PATCHES, vision=qwen2, widths=LIKE_HEADS, **frames)
    wide = {**MERGED, "out_hidden_size": 48, "fullatt_block_indexes": [1], "window_size": 8}
    add("qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_vl_vision", 4, PATCHES, vision=wide, widths=LIKE_HEADS, **frames)
    deep = {**MERGED, "deepstack_visual_indexes": [0]}
    add("cohere_compass", "cohere_compass_text", "cohere_compass_vision", 4, PATCHES, **{**qwen, "vision": deep})
    for name, text in (("qwen3_vl", "qwen3_vl_text"), ("qwen3_vl_moe", "qwen3_vl_moe_text")):
        add(name, text, f"{name}_vision", 4, PATCHES, vision=deep, **frames)
    add("cosmos3_omni", "qwen3_vl_text", "qwen3_vl_vision", 4, PATCHES, vision=deep, **frames)
    sound = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 22, "d_model": 20, "output_dim": 36}
    sound |= {"num_mel_bins": 16, "downsample_hidden_size": 6}
    thinker = {"audio_config": sound, "audio_token_id": 92, "audio_start_token_id": 91, **frames}
    add(
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_vision_encoder",
        4,
        PATCHES,
        vision=deep,
        **thinker,
    )
    omni = {"audio_config": {**sound, "output_dim": 48}, "audio_token_index": 92, **frames}
    add(
        "qwen2_5_omni_thinker",
        "qwen2_5_omni_text",
        "qwen2_5_omni_vision_encoder",
        4,
        PATCHES,
        vision=wide,
        **omni,
        widths=LIKE_HEADS,
    )
    edge = {"hidden_size": 24, "num_patches": 16}
    flat = pixels(ROWS * 16, 3 * 4 * 4, image_grid_thw=[[1, 4, 4]] * ROWS)
    add("cosmos3_edge", "cosmos3_edge_text", "cosmos3_edge_vision", 4, flat, vision=edge, **narrow, **frames)
    # Every second row and column of the image is one of ten codes, which are tokens; an end of line follows each row.
    codes = {"codebook_size": 10, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
    codes |= {"attn_resolutions": [1], "hidden_size": 64}
    words = {f"<|visual token {code:06d}|>": 40 + code for code in range(10)}
    words |= {"<image>": IMAGE_TOKEN, "<|extra_200|>": 50}
    small = pixels(ROWS, 3, 8, 8, image_sizes=[[8, 8]] * ROWS)
    add("emu3", "emu3_text_model", "", 20, small, vq_config=codes, vocabulary_map=words)
    merger = {key: value for key, value in MERGED.items() if key != "num_position_embeddings"}
    glm = {**merger, "image_size": 16, "patch_size": 4, "intermediate_size": 26}
    square = {**glm, "out_hidden_size": 48}
    for name in ("glm4v", "glm46v", "glmga"):
        add(name, "glm4v_text", "glm4v_vision", 4, PATCHES, vision=square, widths=NEURONS, **frames)
    add("glm_ocr", "glm_ocr_text", "glm_ocr_vision", 4, PATCHES, vision=glm, **frames)
    add("glm4v_moe", "glm4v_moe_text", "glm4v_moe_vision", 4, PATCHES, vision=glm, **frames, widths=ROUTED)
    square = pixels(ROWS * 16, 3, 4, 4, image_grid_thw=[[1, 4, 4]] * ROWS)
    add(
        "paddleocr_vl",
        "paddleocr_vl_text",
        "paddleocr_vl_vision",
        4,
        square,
        vision={"hidden_size": 24, "spatial_merge_size": 2},
        **frames,
    )
    # Layers of vision and of language, and four shifted views; the pocket's language model has few layers.
    shown = {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0] * 4, "image_grid_pinpoints": [[16, 16]]}
    shown |= {"qformer_config": {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 22}}
    wide = {"hidden_size": 64}
    add(
        "granite4_vision",
        "granite4_vision_text",
        "clip_vision_model",
        10,
        tiles,
        vision=wide,
        **shown,
        downsample_rate="1/2",
        **INDEX,
    )
    shuffled = {"out_hidden_size": 36, "scale_factor": 2, "deepstack_visual_indexes": [0]}
    page = pixels(ROWS, 1, 3, 16, 16, pixel_attention_mask=torch.ones(ROWS, 1, dtype=torch.bool))
    add("granite_docling", "granite_docling_text", "granite_docling_vision", 4, page, vision=shuffled, **ID)
    conv = {"max_image_size": 16, "spatial_merge_size": 2, "text_hidden_size": 36}
    rows = pixels(ROWS * 16, 3 * 4 * 4, image_grid_thw=[[1, 4, 4]] * ROWS)
    marks = {"im_start_id": 91, "im_end_id": 92, "im_newline_id": 93, "tie_word_embeddings": False}
    add("hunyuan_vl", "hunyuan_vl_text", "hunyuan_vl_vision", 8, rows, vision=conv, token_kinds=kinds, **marks, **ID)
    encoder = {"hidden_size": 24, "intermediate_size": 22, "num_hidden_layers": 1, "num_attention_heads": 2}
    ocr = {"sam_config": {**sam, "image_size": 64, "downsample_channels": [8, 24]}}
    ocr |= {"encoder_config": {**encoder, "num_key_value_heads": 1}}
    add("deepseek_ocr2", "deepseek_ocr2_text", "deepseek_ocr2_vision", 145, large, vision=ocr, widths=LIKE_HEADS, **ID)
    adapter = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 10}
    crops = {"image_token_pooling": torch.arange(ROWS * 16).view(-1, 4), "image_grids": [[2, 2, 0, 0]] * ROWS}
    crops = pixels(ROWS, 16, 3 * 4 * 4, image_num_crops=[1] * ROWS, **crops)
    molmo = {**{name: adapter[name] for name in adapter if name != "hidden_size"}, "image_size": [16, 16]}
    adapter |= {"intermediate_size": 26, "text_hidden_size": 36, "vision_feature_layer": [1, 0]}
    add(
        "molmo2",
        "molmo2_text",
        "molmo2_vision",
        4,
        crops,
        vision=molmo,
        adapter_config=adapter,
        token_kinds=kinds,
        image_patch_id=IMAGE_TOKEN,
    )
    plain = {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 20, "output_proj_dims": 20}
    places = [[[0, 0], [1, 0], [0, 1], [1, 1]]] * ROWS
    squares = pixels(ROWS, 4, 3 * 4 * 4, image_position_ids=places)
    others = {"audio_config": {"audio_embed_dim": 12}, "video_token_id": 96, "audio_token_id": 94}
    vision = {"vision": {**plain, "mm_posemb_size": 8}, "token_kinds": kinds}
    add("gemma4_unified", "gemma4_unified_text", "gemma4_unified_vision", 4, squares, **vision, **others, **ID)
    if is_timm_available():
        grown = {"architecture": "test_convnext", "hidden_size": 64}
        add("fast_vlm", "qwen2", "timm_wrapper", 4, large, vision=grown, reads_neurons=(second,), **INDEX)
        patched = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": [32, 32], "global_pool": ""}
        patched = {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": patched}
        one = pixels(ROWS, 1, 3, 32, 32)
        add("perception_lm", "llama", "timm_wrapper", 4, one, vision=patched, reads_neurons=(second,), **ID)
        heard = {"hidden_size": 16, "input_feat_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1}
        heard |= {"sscp_conv_channel_size": [4, 4], "vocab_size": 1, "vocab_offset": 96}
        seen = {**grown, "vocab_size": 1, "vocab_offset": 95}
        several = {"audio_config": heard, "audio_token_id": 96, "vision_soft_tokens_per_image": 4}
        add("gemma3n", "gemma3n_text", "gemma3n_vision", 4, large, vision=seen, **several, **ID)
    pockets |= sound_pockets(texts)

    def placed(generator: torch.Generator) -> Mapping[str, Tensor]:
        """Patches of rows and columns, which stand in front of their pixels."""
        places = torch.tensor([[row, column] for row in range(4) for column in range(4)]).expand(ROWS, -1, -1)
        values = torch.randn(ROWS, 16, 3 * 4 * 4, generator=generator, dtype=torch.float64)
        return {"flattened_patches": torch.cat([places.to(values), values], dim=-1)}

    where = {"token_kinds": {"image_embeds_position_mask": 1}, "latent_query_num": 3, "tie_word_embeddings": False}
    kosmos = {"patch_embed_hidden_size": 48, "head_dim": 10, "max_num_patches": 16}
    text = "kosmos_2_5_text_model"
    add("kosmos-2.5", text, "kosmos_2_5_vision_model", 3, placed, vision=kosmos, widths=NEURONS, **where)
    # A whole image and one crop, whose rows end with a separator, and a separator between them.
    crops = {"image_sizes": SIZES, "image_attention_mask": torch.ones(ROWS, 2, 4, 4, dtype=torch.bool)}
    crops = renamed(pixels(ROWS, 2, 3, 16, 16, **crops), pixel_values="image_pixel_values")
    down = ("model.embed_tokens_extend.image_embed.img_projection_down.weight",)
    pockets["phi4_multimodal"] = WrapperPocket(
        AutoConfig.for_model("phi4_multimodal", **GROUPED, **PHI4), 13, crops, reads_neurons=down
    )
    patches = pixels(ROWS, 16, 3 * 4 * 4)
    add("fuyu", "persimmon", "", 16, patches, vision=None, patch_size=4, widths=SQUARE, hidden_size=40, **ID)
    return pockets
