"""OLMo Hybrid: layers of OLMo 3 among layers of the gated delta rule, which normalise what they read instead."""

from .base import (
    DELTA_AXES,
    DELTA_RULE,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_DIM,
    HEADS,
    KV,
    WIDE_HEAD_NORMS,
    decoder,
    layer_tables,
    linear,
    norm,
)

SPEC = decoder(
    "olmo_hybrid",
    layer=layer_tables(
        GROUPED_ATTENTION,
        WIDE_HEAD_NORMS,
        DELTA_RULE,
        linear("linear_attn.q_proj", "linear_keys*linear_key_dim", "hidden"),
        linear("linear_attn.k_proj", "linear_keys*linear_key_dim", "hidden"),
        linear("linear_attn.v_proj", "linear_values*linear_value_dim", "hidden"),
        linear("linear_attn.g_proj", "linear_values*linear_value_dim", "hidden"),
        linear("linear_attn.a_proj", "linear_values", "hidden"),
        linear("linear_attn.b_proj", "linear_values", "hidden"),
        linear("linear_attn.o_proj", "hidden", "linear_values*linear_value_dim"),
        norm("linear_attn.o_norm", width="linear_value_dim"),
        GATED_MLP,
    ),
    attention_axes=(HEADS, KV, HEAD_DIM, *DELTA_AXES),
    norms=("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    layer_lists=("layer_types",),
    # The config insists on layers of both kinds.
    needed_kinds=(("layer_types", ("full_attention",)), ("layer_types", ("linear_attention",))),
)
