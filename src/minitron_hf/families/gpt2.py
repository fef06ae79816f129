"""GPT-2: Conv1D (transposed) weights, fused q,k,v, learned positions, LayerNorm with biases."""

from .base import conv1d, gpt, layer_tables

SPEC = gpt(
    "gpt2",
    learned_positions=True,
    layer=layer_tables(
        conv1d("attn.c_attn", "hidden", "heads*head_dim+heads*head_dim+heads*head_dim"),
        conv1d("attn.c_proj", "heads*head_dim", "hidden"),
        conv1d("mlp.c_fc", "hidden", "ffn"),
        conv1d("mlp.c_proj", "ffn", "hidden"),
    ),
    attention_out="attn.c_proj",
    mlp_out="mlp.c_proj",
    refused_if=(
        (
            "scale_attn_by_inverse_layer_idx",
            True,
            "layers",
            "attention is scaled by the layer's index, which changes when layers are dropped",
        ),
    ),
)
