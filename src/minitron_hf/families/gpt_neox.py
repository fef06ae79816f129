"""GPT-NeoX (Pythia): q, k and v interleaved per head, parallel residual, LayerNorm with biases."""

from .base import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, ArchSpec, layer_tables, linear, norm

SPEC = ArchSpec(
    model_type="gpt_neox",
    axes=(LAYERS, HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB),
    layers_path="gpt_neox.layers",
    outer=layer_tables(
        {
            "gpt_neox.embed_in.weight": "vocab hidden",
            "lm_head.weight": "vocab hidden",
        },
        norm("gpt_neox.final_layer_norm"),
    ),
    layer=layer_tables(
        linear("attention.query_key_value", "heads*3*head_dim", "hidden"),
        linear("attention.dense", "hidden", "heads*head_dim"),
        linear("mlp.dense_h_to_4h", "ffn", "hidden"),
        linear("mlp.dense_4h_to_h", "hidden", "ffn"),
        norm("input_layernorm", "post_attention_layernorm"),
    ),
    taps={"ffn": "mlp.dense_4h_to_h", "heads": "attention.dense"},
    layer_norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="gpt_neox.final_layer_norm",
    equal=(("heads*head_dim", "hidden"),),
)
