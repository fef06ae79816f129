"""Phi (1, 1.5, 2): attention and MLP side by side after one LayerNorm, biases everywhere, the head included."""

from .base import EMBEDDINGS, decoder, layer_tables, linear, norm

SPEC = decoder(
    "phi",
    outer=layer_tables(EMBEDDINGS, norm("model.final_layernorm")),
    layer=layer_tables(
        linear("self_attn.q_proj", "heads*head_dim", "hidden"),
        linear("self_attn.k_proj", "kv*head_dim", "hidden"),
        linear("self_attn.v_proj", "kv*head_dim", "hidden"),
        linear("self_attn.dense", "hidden", "heads*head_dim"),
        linear("mlp.fc1", "ffn", "hidden"),
        linear("mlp.fc2", "hidden", "ffn"),
    ),
    norms=("input_layernorm",),
    final_norm="model.final_layernorm",
    attention_out="self_attn.dense",
    mlp_out="mlp.fc2",
)
