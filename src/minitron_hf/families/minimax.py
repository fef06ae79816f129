"""MiniMax: softmax attention in some layers, lightning attention, with saved decays, in others; experts."""

from dataclasses import replace

from .axes import Axis
from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS_MLP,
    GROUPED_ATTENTION,
    HEAD_DIM,
    HEADS,
    KV,
    decoder,
    layer_tables,
    linear,
    norm,
)
from .rules import StreamRules

LIGHTNING = (
    "layers of lightning attention normalise all their heads together, without KV groups, "
    "but need as many heads as the other layers"
)
SPEC = decoder(
    "minimax",
    layer=layer_tables(
        GROUPED_ATTENTION,
        linear("self_attn.qkv_proj", "heads*3*head_dim", "hidden"),
        linear("self_attn.output_gate", "heads*head_dim", "hidden"),
        linear("self_attn.out_proj", "hidden", "heads*head_dim"),
        norm("self_attn.norm", width="heads*head_dim"),
        {
            "self_attn.slope_rate": "heads 1 1",
            "self_attn.query_decay": "heads block 1",
            "self_attn.key_decay": "heads block 1",
            "self_attn.diagonal_decay": "1 heads block block",
        },
        EXPERTS_MLP,
    ),
    attention_axes=(
        replace(HEADS, prunable=False),
        replace(KV, prunable=False),
        HEAD_DIM,
        Axis("block", ("block_size",), prunable=False),
    ),
    mlp_axes=(
        Axis("experts", ("num_local_experts",), per_layer=True),
        Axis("moe_ffn", ("intermediate_size",), per_layer=True, within="experts"),
    ),
    hook_points=EXPERT_HOOK_POINTS,
    groups=(),
    layer_lists=("layer_types",),
    least=(("experts", "num_experts_per_tok"),),
    refused={"heads": LIGHTNING, "kv": LIGHTNING},
    stream=StreamRules(fixed_basis="the outputs of its norms are added to it, weights of single channels included"),
)
