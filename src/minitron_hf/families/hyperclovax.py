"""HyperCLOVA X: Granite's layout and constant multipliers, and norms of what attention and MLP write."""

from .base import decoder
from .rules import LogitRules

SPEC = decoder(
    "hyperclovax",
    logits=LogitRules(multiplied_by="logits_scaling"),
    output_norms=("post_norm1", "post_norm2"),
    # The config insists on hidden_size % num_attention_heads == 0, though head_dim is a field of its own.
    multiples=(("hidden", "heads"),),
)
