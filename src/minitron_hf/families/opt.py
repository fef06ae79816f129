"""OPT: separate q, k and v, learned positions of which the first two are never used, biases everywhere.

Only the layout with a norm before attention and MLP, and embeddings as wide as the rest: all sizes but 350M.
"""

from dataclasses import replace

from .base import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, POSITIONS, VOCAB, ArchSpec, layer_tables, linear, norm

SPEC = ArchSpec(
    model_type="opt",
    axes=(
        LAYERS,
        replace(HIDDEN, fields=("hidden_size", "word_embed_proj_dim")),
        replace(FFN, fields=("ffn_dim",)),
        HEADS,
        HEAD_DIM,
        VOCAB,
        POSITIONS,
    ),
    layers_path="model.decoder.layers",
    outer=layer_tables(
        {
            "model.decoder.embed_tokens.weight": "vocab hidden",
            "model.decoder.embed_positions.weight": "2+positions hidden",
            "lm_head.weight": "vocab hidden",
        },
        norm("model.decoder.final_layer_norm"),
    ),
    layer=layer_tables(
        linear("self_attn.q_proj", "heads*head_dim", "hidden"),
        linear("self_attn.k_proj", "heads*head_dim", "hidden"),
        linear("self_attn.v_proj", "heads*head_dim", "hidden"),
        linear("self_attn.out_proj", "hidden", "heads*head_dim"),
        linear("fc1", "ffn", "hidden"),
        linear("fc2", "hidden", "ffn"),
        norm("self_attn_layer_norm", "final_layer_norm"),
    ),
    taps={"ffn": "fc2", "heads": "self_attn.out_proj"},
    layer_norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="model.decoder.final_layer_norm",
    equal=(("heads*head_dim", "hidden"),),
)
