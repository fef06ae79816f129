"""GPT-J: attention and MLP side by side after one LayerNorm; biases in the MLP and the head."""

from .base import attention, gpt, layer_tables, linear

SPEC = gpt(
    "gptj",
    layer=layer_tables(
        attention("attn", "out_proj"),
        linear("mlp.fc_in", "ffn", "hidden"),
        linear("mlp.fc_out", "hidden", "ffn"),
    ),
    norms=("ln_1",),
    attention_out="attn.out_proj",
    mlp_out="mlp.fc_out",
)
