"""ModernBERT's decoder (Ettin): gate and up fused, sliding attention by layer, a norm that the first layer lacks.

The embeddings have a norm, too, and the head is a projection with a norm before the tied embeddings.
"""

from dataclasses import replace

from .base import HEAD_DIM, HEADS, SQUARE, decoder, layer_tables, linear, norm
from .rules import LayerRules, LogitRules

SPEC = decoder(
    "modernbert-decoder",
    logits=LogitRules(transformed_by="lm_head"),
    outer=layer_tables(
        {"model.embeddings.tok_embeddings.weight": "vocab hidden"},
        linear("decoder", "vocab", "hidden"),
        linear("lm_head.dense", "hidden", "hidden"),
        norm("model.embeddings.norm", "model.final_norm", "lm_head.norm"),
    ),
    layer=layer_tables(
        linear("attn.q_proj", "heads*head_dim", "hidden"),
        linear("attn.k_proj", "heads*head_dim", "hidden"),
        linear("attn.v_proj", "heads*head_dim", "hidden"),
        linear("attn.Wo", "hidden", "heads*head_dim"),
        linear("mlp.Wi", "ffn+ffn", "hidden"),
        linear("mlp.Wo", "hidden", "ffn"),
    ),
    norms=("attn_norm", "mlp_norm"),
    final_norm="model.final_norm",
    attention_axes=(HEADS, replace(HEAD_DIM, fields=())),
    attention_out="attn.Wo",
    mlp_out="mlp.Wo",
    equal=SQUARE,
    layer_lists=("layer_types",),
    layer_rules=LayerRules(fixed_ends=(0,)),
)
