"""GPT-OSS: a sink for every query head; experts with biases, their weights transposed, gate and up interleaved."""

from .base import EXPERT_HOOK_POINTS, EXPERTS_FFN, GROUPED_ATTENTION, LOCAL_EXPERTS, decoder, layer_tables, linear

SPEC = decoder(
    "gpt_oss",
    layer=layer_tables(
        GROUPED_ATTENTION,
        {
            "self_attn.sinks": "heads",
            "mlp.experts.gate_up_proj": "experts hidden moe_ffn*2",
            "mlp.experts.gate_up_proj_bias": "experts moe_ffn*2",
            "mlp.experts.down_proj": "experts moe_ffn hidden",
            "mlp.experts.down_proj_bias": "experts hidden",
        },
        linear("mlp.router", "experts", "hidden"),
    ),
    mlp_axes=(LOCAL_EXPERTS, EXPERTS_FFN),
    mlp_hook_points=EXPERT_HOOK_POINTS,
    layer_lists=("layer_types",),
    least=(("experts", "num_experts_per_tok"),),
)
