"""Gemma 4 without towers, the language model: Gemma 4's layout without embeddings for every layer."""

from .base import GATED_MLP, GROUPED_ATTENTION, HEAD_NORMS, decoder, layer_tables
from .rules import CAPPED_LOGITS, ConfigRules, LayerRules, StreamRules

SPEC = decoder(
    "gemma4_unified_text",
    logits=CAPPED_LOGITS,
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, HEAD_NORMS, {"layer_scalar": "1"}),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    stream=StreamRules(
        scaled_embeddings=True,
        stream_writers=("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
    ),
    layer_lists=("layer_types",),
    layer_rules=LayerRules(
        trailing_layers=("num_kv_shared_layers",), fixed_layers=(("kv_sharing_modes", "store"),), fixed_ends=(-1,)
    ),
    config_rules=ConfigRules(size_multipliers=(("ffn", "use_double_wide_mlp", "kv_sharing_modes", "reuse", 2),)),
    refused={"kv": "layers with full attention have another number of KV heads"},
)
