"""Molmo 2's language model: Qwen3's layout, or norms over all heads as in OLMo 2; embeddings of further tokens."""

from dataclasses import replace

from .axes import Axis
from .base import (
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    PRE_NORMS,
    WIDE_HEAD_NORMS,
    decoder,
    layer_tables,
    linear,
    norm,
)
from .rules import LayerRules

_HEAD_BY_HEAD = decoder(
    "molmo2_text",
    outer=layer_tables(
        {"model.embed_tokens.weight": "vocab+further_vocab hidden"},
        linear("lm_head", "vocab", "hidden"),
        norm("model.norm"),
    ),
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, HEAD_NORMS),
    mlp_axes=(FFN, Axis("further_vocab", ("additional_vocab_size",), prunable=False)),
    layer_rules=LayerRules(layer_indices=("rope_scaling_layers",)),
    refused={"vocab": "it has embeddings of further tokens, which it never predicts, behind those of its vocabulary"},
)
SPEC = replace(
    _HEAD_BY_HEAD,
    variants=(
        (
            "qk_norm_type",
            "olmo",
            replace(
                _HEAD_BY_HEAD,
                layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, WIDE_HEAD_NORMS, norm(*PRE_NORMS)),
            ),
        ),
    ),
)
