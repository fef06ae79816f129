"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with `Linear` weights and one key and value head for all queries."""

from dataclasses import replace

from .base import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, POSITIONS, VOCAB, ArchSpec, layer_tables, linear, norm

SPEC = ArchSpec(
    model_type="gpt_bigcode",
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
        linear("attn.c_attn", "heads*head_dim+head_dim+head_dim", "hidden"),
        linear("attn.c_proj", "hidden", "heads*head_dim"),
        linear("mlp.c_fc", "ffn", "hidden"),
        linear("mlp.c_proj", "hidden", "ffn"),
        norm("ln_1", "ln_2"),
    ),
    taps={"ffn": "mlp.c_proj", "heads": "attn.c_proj"},
    layer_norms=("ln_1", "ln_2"),
    final_norm="transformer.ln_f",
    equal=(("heads*head_dim", "hidden"),),
)
