"""Falcon-H1: attention and a state space side by side in every layer, then a gated MLP; constant multipliers."""

from .base import EMBEDDINGS, FFN, GROUPED_ATTENTION, decoder, layer_tables, linear, norm
from .rules import ConfigRules, LogitRules
from .state_space import SSM_AXES, SSM_GROUPS, ssm_hook_points, state_space

SPEC = decoder(
    "falcon_h1",
    logits=LogitRules(multiplied_by="lm_head_multiplier"),
    layer=layer_tables(
        GROUPED_ATTENTION,
        state_space("mamba"),
        linear("feed_forward.gate_proj", "ffn", "hidden"),
        linear("feed_forward.up_proj", "ffn", "hidden"),
        linear("feed_forward.down_proj", "hidden", "ffn"),
    ),
    mlp_axes=(FFN, *SSM_AXES),
    mlp_hook_points={"ffn": "feed_forward.down_proj", **ssm_hook_points("mamba")},
    norms=("input_layernorm", "pre_ff_layernorm"),
    outer=layer_tables(EMBEDDINGS, norm("model.final_layernorm")),
    final_norm="model.final_layernorm",
    groups=(("heads", "kv"), *SSM_GROUPS),
    gated_norms={"mamba.norm": "ssm_groups"},
    # Unless it is given, the stock class takes mamba_expand times the hidden size.
    config_rules=ConfigRules(derived_fields=(("mamba_d_ssm", "ssm_heads*ssm_dim"),)),
)
