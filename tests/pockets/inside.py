"""Decoders that Transformers has only inside larger models, here with a head around the stock decoder."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.cosmos3_edge.modeling_cosmos3_edge import Cosmos3EdgePreTrainedModel, Cosmos3EdgeTextModel
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)
from transformers.models.emu3.modeling_emu3 import Emu3PreTrainedModel, Emu3TextModel
from transformers.models.glm4v.modeling_glm4v import Glm4vPreTrainedModel, Glm4vTextModel
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoePreTrainedModel, Glm4vMoeTextModel
from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrPreTrainedModel, GlmOcrTextModel
from transformers.models.granite4_vision.modeling_granite4_vision import (
    Granite4VisionPreTrainedModel,
    Granite4VisionTextModel,
)
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLPreTrainedModel, HunYuanVLTextModel
from transformers.models.kosmos2_5.configuration_kosmos2_5 import Kosmos2_5TextConfig
from transformers.models.kosmos2_5.modeling_kosmos2_5 import Kosmos2_5TextForCausalLM
from transformers.models.molmo2.modeling_molmo2 import Molmo2PreTrainedModel, Molmo2TextModel
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRTextModel, PaddleOCRVLPreTrainedModel
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModel,
    Qwen2_5OmniThinkerTextModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel, Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLPreTrainedModel, Qwen2VLTextModel
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerTextModel,
    Qwen3OmniMoeThinkerTextPreTrainedModel,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel, Qwen3VLTextModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoePreTrainedModel, Qwen3VLMoeTextModel

from .base import COUPLED, EXPERTS, GROUPED_COUPLED, GROUPED_EXPERTS, SLIDING, Pocket, coupled, grouped


def with_head(parent: type, decoder: type) -> None:
    """Let `AutoModelForCausalLM` build a stock decoder with a head around it, as the larger model has it."""

    class WithHead(parent, GenerationMixin):  # type: ignore[misg, valid-type]
        config_class = decoder.config_class
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            outputs = self.model(input_ids=input_ids, **kwargs)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept]) / getattr(self.config, "logits_scaling", 1.0)
            loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
            return CausalLMOutputWithPast(
                loss=loss,
                logits=logits,
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

    WithHead.__name__ = WithHead.__qualname__ = decoder.__name__.replace("TextModel", "TextForCausalLM")
    AutoModelForCausalLM.register(decoder.config_class, WithHead, exist_ok=True)  # it is a class of Transformers


with_head(Qwen2VLPreTrainedModel, Qwen2VLTextModel)
with_head(Qwen2_5_VLPreTrainedModel, Qwen2_5_VLTextModel)
with_head(Qwen3VLPreTrainedModel, Qwen3VLTextModel)
with_head(Qwen3VLMoePreTrainedModel, Qwen3VLMoeTextModel)
with_head(Qwen3OmniMoeThinkerTextPreTrainedModel, Qwen3OmniMoeThinkerTextModel)
with_head(Qwen2_5OmniPreTrainedModel, Qwen2_5OmniThinkerTextModel)
with_head(Glm4vPreTrainedModel, Glm4vTextModel)
with_head(Glm4vMoePreTrainedModel, Glm4vMoeTextModel)
with_head(GlmOcrPreTrainedModel, GlmOcrTextModel)
with_head(PaddleOCRVLPreTrainedModel, PaddleOCRTextModel)
with_head(Granite4VisionPreTrainedModel, Granite4VisionTextModel)
if importlib.util.find_spec("transformers.models.granite_docling") is not None:  # new in Transformers 5.23
    from transformers.models.granite_docling.modeling_granite_docling import (
        GraniteDoclingTextModel,
        GraniteDoclingTextPreTrainedModel,
    )

    with_head(GraniteDoclingTextPreTrainedModel, GraniteDoclingTextModel)
with_head(HunYuanVLPreTrainedModel, HunYuanVLTextModel)
with_head(DeepseekOcr2TextPreTrainedModel, DeepseekOcr2TextModel)
with_head(Molmo2PreTrainedModel, Molmo2TextModel)
with_head(Cosmos3EdgePreTrainedModel, Cosmos3EdgeTextModel)
with_head(Emu3PreTrainedModel, Emu3TextModel)
AutoModelForCausalLM.register(Kosmos2_5TextConfig, Kosmos2_5TextForCausalLM, exist_ok=True)

#: Positions of time, height and width share the frequencies of a head: four of them in heads of eight, or five of ten.
SECTIONS_OF_8 = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
SECTIONS_OF_10 = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 1]}
#: Three frequencies, where half of a head of ten is rotated.
HALF_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1]}
#: The larger model says whether embeddings are tied; some of these configs do not.
UNTIED = {"tie_word_embeddings": False}
PLAIN_SQUARE = {key: value for key, value in GROUPED_COUPLED.items() if key != "head_dim"}
FOUR_NORMS = {"num_norms": 4, "output_norms": ("post_self_attn_layernorm", "post_mlp_layernorm")}
SQUARE = PLAIN_SQUARE | SLIDING
MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.4}
MULTIPLIERS |= {"attention_multiplier": 0.2}
#: Layers of Molmo 2 whose positions are stretched.
STRETCHED = {
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "rope_scaling_layers": [0, 2, 3],
    "additional_vocab_size": 7,
}
LISTED_EXPERTS = {name: value for name, value in GROUPED_EXPERTS.items() if name != "first_k_dense_replace"}
LISTED_EXPERTS |= {"topk_method": "group_limited_greedy", "router_bias": None, "n_routed_experts": 10}
SPARSE = {"experts": "mlp.experts", "mlp_only_layers": [1], "decoder_sparse_step": 1, **EXPERTS}

POCKETS: dict[str, Pocket] = {
    "qwen2_vl_text": coupled("qwen2_vl_text", SQUARE, kv=True, norm="rms", rope_parameters=SECTIONS_OF_8, **UNTIED),
    "qwen2_5_vl_text": coupled(
        "qwen2_5_vl_text", SQUARE, kv=True, norm="rms", rope_parameters=SECTIONS_OF_8, **UNTIED
    ),
    "qwen2_5_omni_text": coupled(
        "qwen2_5_omni_text", SQUARE, kv=True, norm="rms", rope_parameters=SECTIONS_OF_8, **UNTIED
    ),
    "glm4v_text": coupled(
        "glm4v_text", PLAIN_SQUARE, kv=True, norm="rms", rope_parameters=SECTIONS_OF_8, **FOUR_NORMS, **UNTIED
    ),
    "glm_ocr_text": grouped("glm_ocr_text", rope_parameters=HALF_SECTIONS, **FOUR_NORMS, **UNTIED),
    "glm4v_moe_text": grouped("glm4v_moe_text", rope_parameters=HALF_SECTIONS, **GROUPED_EXPERTS, **UNTIED),
    "paddleocr_vl_text": grouped("paddleocr_vl_text", rope_parameters=SECTIONS_OF_10, **UNTIED),
    "qwen3_vl_text": grouped("qwen3_vl_text", rope_parameters=SECTIONS_OF_10, **UNTIED),
    "qwen3_vl_moe_text": grouped("qwen3_vl_moe_text", rope_parameters=SECTIONS_OF_10, **UNTIED, **SPARSE),
    "granite4_vision_text": grouped("granite4_vision_text", **MULTIPLIERS, **UNTIED),
    "granite_docling_text": grouped("granite_docling_text", **MULTIPLIERS, **UNTIED),
    "hunyuan_vl_text": grouped(
        "hunyuan_vl_text", rope_parameters=SECTIONS_OF_10, published={"head_dim": 128}, **UNTIED
    ),
    "deepseek_ocr2_text": coupled(
        "deepseek_ocr2_text",
        PLAIN_SQUARE,
        kv=True,
        norm="rms",
        mlp_layer_types=["dense", "sparse", "dense", "sparse", "sparse"],
        published={"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6},
        **LISTED_EXPERTS,
        **UNTIED,
    ),
    "cosmos3_edge_text": grouped(
        "cosmos3_edge_text", mlp_out="mlp.fc2", hidden_step=12, rope_parameters=SECTIONS_OF_10, **UNTIED
    ),
    "emu3_text_model": grouped("emu3_text_model"),
    "kosmos_2_5_text_model": coupled(
        "kosmos_2_5_text_model",
        {**COUPLED, "embed_dim": 40, "attention_heads": 5, "layers": 4, "ffn_dim": 52, "max_position_embeddings": 64},
        "model.layers",
        "self_attn.out_proj",
        "ffn.fc2",
        mlp_norm="ffn.ffn_layernorm",
        tie_word_embeddings=False,
    ),
    "molmo2_text": grouped("molmo2_text", **STRETCHED, **UNTIED),
    "molmo2_text-olmo": grouped(
        "molmo2_text",
        qk_norm_type="olmo",
        norm_after=True,
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        **STRETCHED,
        **UNTIED,
    ),
    "qwen3_omni_moe_text": grouped("qwen3_omni_moe_text", rope_parameters=SECTIONS_OF_10, **UNTIED, **SPARSE),
}
