"""NanoChat: Llama's attention with norms on every query and key head, plain MLP; no norm has weights."""

from .base import EMBEDDINGS, GROUPED_ATTENTION, PRE_NORMS, decoder, layer_tables, linear
from .rules import CAPPED_LOGITS

SPEC = decoder(
    "nanochat",
    logits=CAPPED_LOGITS,
    outer=EMBEDDINGS,
    layer=layer_tables(GROUPED_ATTENTION, linear("mlp.fc1", "ffn", "hidden"), linear("mlp.fc2", "hidden", "ffn")),
    norms=(),
    layer_norms=PRE_NORMS,
    mlp_out="mlp.fc2",
)
