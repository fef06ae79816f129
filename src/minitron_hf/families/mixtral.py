"""Mixtral: Mistral's attention, and in every layer experts instead of an MLP. `intermediate_size` is the experts'."""

from .base import EXPERT_HOOK_POINTS, EXPERTS_FFN, EXPERTS_MLP, GROUPED_ATTENTION, LOCAL_EXPERTS, decoder, layer_tables

SPEC = decoder(
    "mixtral",
    layer=layer_tables(GROUPED_ATTENTION, EXPERTS_MLP),
    mlp_axes=(LOCAL_EXPERTS, EXPERTS_FFN),
    mlp_hook_points=EXPERT_HOOK_POINTS,
    least=(("experts", "num_experts_per_tok"),),
)
