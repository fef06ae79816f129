"""MiniCPM3: latent attention and a gated MLP; residual branches and logits are scaled by depth and width."""

from .base import GATED_MLP, LATENT_ATTENTION, LATENT_AXES, decoder, layer_tables
from .rules import GRANITE_LOGITS, ConfigRules

SPEC = decoder(
    "minicpm3",
    logits=GRANITE_LOGITS,
    layer=layer_tables(LATENT_ATTENTION, GATED_MLP),
    attention_axes=LATENT_AXES,
    multiples=(("hidden", "heads"),),
    # Branches are scaled by scale_depth/√num_hidden_layers, what the head reads by dim_model_base/hidden_size.
    config_rules=ConfigRules(scaled_fields=(("scale_depth", "layers", 0.5), ("dim_model_base", "hidden", 1.0))),
)
