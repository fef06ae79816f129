"""GPT-2: Conv1D (transposed) weights, fused q,k,v, learned positions, LayerNorm with biases."""

from dataclasses import replace

from .base import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, POSITIONS, VOCAB, ArchSpec, conv1d, layer_tables, norm

SPEC = ArchSpec(
    model_type="gpt2",
    axes=(
        replace(LAYERS, fields=("n_layer",)),
        replace(HIDDEN, fields=("n_embd",)),
        replace(FFN, fields=("n_inner",), implied="4*hidden"),
        replace(HEADS, fields=("n_head",)),
        HEAD_DIM,
        VOCAB,
        replace(POSITIONS, fields=("n_positions",)),
    ),
    layers_path="transformer.h",
    outer=layer_tables(
        {
            "transformer.wte.weight": "vocab hidden",
            "transformer.wpe.weight": "positions hidden",
            "lm_head.weight": "vocab hidden",
        },
        norm("transformer.ln_f"),
    ),
    layer=layer_tables(
        conv1d("attn.c_attn", "hidden", "heads*head_dim+heads*head_dim+heads*head_dim"),
        conv1d("attn.c_proj", "heads*head_dim", "hidden"),
        conv1d("mlp.c_fc", "hidden", "ffn"),
        conv1d("mlp.c_proj", "ffn", "hidden"),
        norm("ln_1", "ln_2"),
    ),
    taps={"ffn": "mlp.c_proj", "heads": "attn.c_proj"},
    layer_norms=("ln_1", "ln_2"),
    final_norm="transformer.ln_f",
    equal=(("heads*head_dim", "hidden"),),
    refused_if=(
        (
            "scale_attn_by_inverse_layer_idx",
            True,
            "layers",
            "attention is scaled by the layer's index, which changes when layers are dropped",
        ),
    ),
)
