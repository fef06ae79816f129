"""Mixtral: Mistral's attention, and in every layer experts instead of an MLP. `intermediate_size` is the experts'."""

from .base import EXPERT_TAPS, EXPERTS_MLP, GROUPED_ATTENTION, Axis, decoder, layer_tables

SPEC = decoder(
    "mixtral",
    layer=layer_tables(GROUPED_ATTENTION, EXPERTS_MLP),
    mlp_axes=(
        Axis("experts", ("num_local_experts",), per_layer=True),
        Axis("moe_ffn", ("intermediate_size",), per_layer=True, within="experts"),
    ),
    mlp_taps=EXPERT_TAPS,
    least=(("experts", "num_experts_per_tok"),),
)
