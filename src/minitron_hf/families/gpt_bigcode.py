"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with `Linear` weights and one key and value head for all queries."""

from .base import gpt, layer_tables, linear

SPEC = gpt(
    "gpt_bigcode",
    learned_positions=True,
    layer=layer_tables(
        linear("attn.c_attn", "heads*head_dim+head_dim+head_dim", "hidden"),
        linear("attn.c_proj", "hidden", "heads*head_dim"),
        linear("mlp.c_fc", "ffn", "hidden"),
        linear("mlp.c_proj", "hidden", "ffn"),
    ),
    attention_out="attn.c_proj",
    mlp_out="mlp.c_proj",
)
