"""CWM: Llama's layout without biases; every fourth layer sees everything, the others a window."""

from .base import decoder

# CwmConfig inherits LlamaConfig's rule that hidden_size is a multiple of num_attention_heads.
SPEC = decoder(
    "cwm",
    multiples=(("hidden", "heads"),),
    layer_lists=("layer_types",),
    # The same classes without biases, and without that rule.
    equivalent_classes=(("ministral", {"attention_bias": False, "mlp_bias": False}, {}),),
)
