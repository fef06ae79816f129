"""GPT-J: attention and MLP side by side after one LayerNorm; biases in the MLP and the head."""

from dataclasses import replace

from .base import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, ArchSpec, layer_tables, linear, norm

SPEC = ArchSpec(
    model_type="gptj",
    axes=(
        replace(LAYERS, fields=("n_layer",)),
        replace(HIDDEN, fields=("n_embd",)),
        replace(FFN, fields=("n_inner",), implied="4*hidden"),
        replace(HEADS, fields=("n_head",)),
        HEAD_DIM,
        VOCAB,
    ),
    layers_path="transformer.h",
    outer=layer_tables(
        {"transformer.wte.weight": "vocab hidden"},
        linear("lm_head", "vocab", "hidden"),
        norm("transformer.ln_f"),
    ),
    layer=layer_tables(
        linear("attn.q_proj", "heads*head_dim", "hidden"),
        linear("attn.k_proj", "heads*head_dim", "hidden"),
        linear("attn.v_proj", "heads*head_dim", "hidden"),
        linear("attn.out_proj", "hidden", "heads*head_dim"),
        linear("mlp.fc_in", "ffn", "hidden"),
        linear("mlp.fc_out", "hidden", "ffn"),
        norm("ln_1"),
    ),
    taps={"ffn": "mlp.fc_out", "heads": "attn.out_proj"},
    layer_norms=("ln_1",),
    final_norm="transformer.ln_f",
    equal=(("heads*head_dim", "hidden"),),
)
