"""A.X-K2: DeepSeek-V3.2 whose heads' outputs are gated, by a projection fused with that of the queries.

The norms that attention and experts read are gated too, through a low rank.
"""

from .axes import Axis
from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    INDEXER,
    INDEXER_AXES,
    LATENT_AXES,
    LATENT_KEYS,
    LISTED_LATENT_EXPERTS,
    PRE_NORMS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
    linear,
    norm,
)

SPEC = decoder(
    "axk2",
    layer=layer_tables(
        linear("self_attn.q_a_proj", "q_rank", "hidden"),
        norm("self_attn.q_a_layernorm", width="q_rank"),
        linear("self_attn.q_gate_proj", "heads*query_gate_dim", "q_rank+q_rank"),
        LATENT_KEYS,
        INDEXER,
        GATED_MLP,
        EXPERTS_MLP,
        SHARED_EXPERTS_MLP,
        ROUTER_BIAS,
        norm("input_layernorm.norm", "post_attention_layernorm.norm"),
        linear("input_layernorm.mlp.fc1", "norm_rank", "hidden"),
        linear("input_layernorm.mlp.fc2", "hidden", "norm_rank"),
        linear("post_attention_layernorm.mlp.fc1", "norm_rank", "hidden"),
        linear("post_attention_layernorm.mlp.fc2", "hidden", "norm_rank"),
        norm("post_attention_layernorm"),
    ),
    norms=(),
    layer_norms=PRE_NORMS,
    **{
        **LISTED_LATENT_EXPERTS,
        "attention_axes": (
            *LATENT_AXES,
            Axis("query_gate_dim", implied="qk_dim+head_dim", prunable=False),
            *INDEXER_AXES,
            Axis("norm_rank", ("gated_norm_rank",), prunable=False),
        ),
        "layer_lists": ("layer_types", "mlp_layer_types"),
    },
)
