"""BioGPT: OPT's layout with scaled embeddings; learned positions of which the first two are never used."""

from .base import HEAD_DIM, HEADS, POSITIONS, SQUARE, attention, decoder, layer_tables, linear, norm
from .rules import StreamRules

SPEC = decoder(
    "biogpt",
    attention_axes=(HEADS, HEAD_DIM, POSITIONS),
    layers_path="biogpt.layers",
    outer=layer_tables(
        {
            "biogpt.embed_tokens.weight": "vocab hidden",
            "biogpt.embed_positions.weight": "2+positions hidden",
            "output_projection.weight": "vocab hidden",
        },
        norm("biogpt.layer_norm"),
    ),
    layer=layer_tables(
        attention("self_attn", "out_proj"), linear("fc1", "ffn", "hidden"), linear("fc2", "hidden", "ffn")
    ),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="biogpt.layer_norm",
    attention_out="self_attn.out_proj",
    mlp_out="fc2",
    equal=SQUARE,
    stream=StreamRules(
        scaled_embeddings=True,
        stream_writers=(
            "biogpt.embed_positions.weight",
            "self_attn.out_proj.weight",
            "self_attn.out_proj.bias",
            "fc2.weight",
            "fc2.bias",
        ),
    ),
    refused_if=(("scale_embedding", False, "hidden", "the table assumes scaled embeddings"),),
)
