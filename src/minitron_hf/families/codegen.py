"""CodeGen: GPT-J with q, v and k fused in four parts, each of them for a quarter of the heads."""

from .axes import Axis
from .base import GPT_AXES, gpt, layer_tables, linear

SPEC = gpt(
    "codegen",
    axes=(*GPT_AXES, Axis("parts", implied="4", prunable=False)),
    layer=layer_tables(
        linear("attn.qkv_proj", "parts*(heads/parts*head_dim+heads/parts*head_dim+heads/parts*head_dim)", "hidden"),
        linear("attn.out_proj", "hidden", "heads*head_dim"),
        linear("mlp.fc_in", "ffn", "hidden"),
        linear("mlp.fc_out", "hidden", "ffn"),
    ),
    norms=("ln_1",),
    attention_out="attn.out_proj",
    mlp_out="mlp.fc_out",
    groups=(("heads", "parts"),),
)
