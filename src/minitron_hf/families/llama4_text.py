"""Llama 4, text only: layers that rotate see a chunk, others all; each holds an MLP, or experts and a shared one."""

from .axes import Axis
from .base import GROUPED_ATTENTION, decoder, layer_tables, linear
from .rules import LayerRules

SPEC = decoder(
    "llama4_text",
    layer=layer_tables(
        GROUPED_ATTENTION,
        linear("feed_forward.gate_proj", "ffn", "hidden"),
        linear("feed_forward.up_proj", "ffn", "hidden"),
        linear("feed_forward.down_proj", "hidden", "ffn"),
        {
            "feed_forward.experts.gate_up_proj": "experts hidden moe_ffn+moe_ffn",
            "feed_forward.experts.down_proj": "experts moe_ffn hidden",
        },
        linear("feed_forward.router", "experts", "hidden"),
        linear("feed_forward.shared_expert.gate_proj", "shared_ffn", "hidden"),
        linear("feed_forward.shared_expert.up_proj", "shared_ffn", "hidden"),
        linear("feed_forward.shared_expert.down_proj", "hidden", "shared_ffn"),
    ),
    mlp_axes=(
        Axis("ffn", ("intermediate_size_mlp",), per_layer=True),
        Axis("experts", ("num_local_experts",), per_layer=True),
        Axis("moe_ffn", ("intermediate_size",), per_layer=True, within="experts"),
        Axis("shared_ffn", implied="moe_ffn", per_layer=True),
    ),
    mlp_hook_points={
        "ffn": "feed_forward.down_proj",
        "experts": "feed_forward.experts",
        "moe_ffn": "feed_forward.experts",
        "shared_ffn": "feed_forward.shared_expert.down_proj",
    },
    equal=(("moe_ffn", "shared_ffn"),),
    layer_lists=("layer_types", "no_rope_layers"),
    layer_rules=LayerRules(layer_indices=("moe_layers",)),
    bare_norms=True,
    least=(("experts", "num_experts_per_tok"),),
)
