"""The parts that family tables are made of: standard axes, attention, MLP and expert layouts, whole decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import accept_old_names
from .axes import Axis, Rounding
from .spec import ArchSpec

# The standard axes. `PRUNER_FIELDS` gives the names under which users ask for their sizes.
LAYERS = Axis("layers", ("num_hidden_layers",))
HIDDEN = Axis("hidden", ("hidden_size",))
FFN = Axis("ffn", ("intermediate_size",), per_layer=True)
HEADS = Axis("heads", ("num_attention_heads",), per_layer=True)
KV = Axis("kv", ("num_key_value_heads",), implied="heads", per_layer=True)
HEAD_DIM = Axis("head_dim", ("head_dim",), implied="hidden/heads", prunable=False)
VOCAB = Axis("vocab", ("vocab_size",), prunable=False)
POSITIONS = Axis("positions", ("max_position_embeddings",), prunable=False)
EXPERTS = Axis("experts", ("num_experts",), per_layer=True)
MOE_FFN = Axis("moe_ffn", ("moe_intermediate_size",), per_layer=True, within="experts")
SHARED_FFN = Axis("shared_ffn", ("shared_expert_intermediate_size",), per_layer=True)
#: The same in families without any other MLP, where `intermediate_size` is the width of the experts.
LOCAL_EXPERTS = Axis("experts", ("num_local_experts",), per_layer=True)
EXPERTS_FFN = Axis("moe_ffn", ("intermediate_size",), per_layer=True, within="experts")
#: Experts whose router first chooses among groups of them; without a number of groups they are one group.
ROUTED_EXPERTS = Axis("experts", ("n_routed_experts",), per_layer=True)
ROUTER_GROUPS = Axis("router_groups", ("n_group",), implied="1", prunable=False)
#: Shared experts stored as one MLP, whose width is a multiple of the width of a routed expert.
SHARED_EXPERTS = Axis("shared_experts", ("n_shared_experts",), prunable=False)
SHARED_EXPERTS_FFN = Axis("shared_ffn", implied="shared_experts*moe_ffn", per_layer=True)


def layer_tables(*parts: Mapping[str, str]) -> dict[str, str]:
    """Compose the parameter table of a layer from parts; a name that two parts claim is a mistake in the table."""
    table: dict[str, str] = {}
    for part in parts:
        if clash := table.keys() & part.keys():
            raise ValueError(f"claimed twice: {sorted(clash)}")
        table.update(part)
    return table


def move_module(table: Mapping[str, str], module: str, to: str) -> dict[str, str]:
    """Rename a module in a table."""
    assert all(name.startswith(f"{module}.") for name in table)
    return {to + name.removeprefix(module): dimensions for name, dimensions in table.items()}


def linear(name: str, rows: str, columns: str) -> dict[str, str]:
    """A `torch.nn.Linear`: weight [out, in], and a bias where the config has one."""
    return {f"{name}.weight": f"{rows} {columns}", f"{name}.bias": rows}


def conv1d(name: str, columns: str, rows: str) -> dict[str, str]:
    """A Transformers `Conv1D`: weight [in, out], the transpose of `Linear`, and a bias."""
    return {f"{name}.weight": f"{columns} {rows}", f"{name}.bias": rows}


def stacked_experts(module: str = "mlp", router: str = "gate") -> dict[str, str]:
    """Stacked experts of a module, gate and up concatenated, and the router that chooses among them."""
    return {
        f"{module}.experts.gate_up_proj": "experts moe_ffn+moe_ffn hidden",
        f"{module}.experts.down_proj": "experts hidden moe_ffn",
        **linear(f"{module}.{router}", "experts", "hidden"),
    }


def norm(*names: str, width: str = "hidden") -> dict[str, str]:
    """Norms of one width, with a bias where the class has one."""
    return {f"{name}.{part}": width for name in names for part in ("weight", "bias")}


def attention(path: str, out: str) -> dict[str, str]:
    """Separate q, k and v projections of equally many heads, and the output projection."""
    return layer_tables(
        *(linear(f"{path}.{name}", "heads*head_dim", "hidden") for name in ("q_proj", "k_proj", "v_proj")),
        linear(f"{path}.{out}", "hidden", "heads*head_dim"),
    )


#: Heads that are as wide together as the residual stream: the stock code knows only one width for both.
SQUARE = (("heads*head_dim", "hidden"),)
_WITH_THE_HEADS = "all heads together are as wide as the residual stream, and "
#: Refusals for ALiBi, whose attention biases follow from the index of a head.
ALIBI = {
    "heads": "the attention biases of ALiBi follow from a head's index and the number of heads",
    "hidden": _WITH_THE_HEADS + "the attention biases of ALiBi follow from a head's index and the number of heads",
}
#: Refusals for sinusoidal positions, which follow from the index of a channel.
SINUSOIDAL = {
    "hidden": "the stock classes compute sinusoidal positions from a channel's index and the number of channels",
    "heads": _WITH_THE_HEADS + "its channels hold sinusoidal positions",
}
#: Neurons that no config field counts.
FOURFOLD_FFN = replace(FFN, fields=(), implied="4*hidden")
FOURFOLD = {"ffn": "the stock classes fix the number of neurons at four times the hidden size"}
#: Separate q, k, v and output projections with grouped queries.
GROUPED_ATTENTION = layer_tables(
    linear("self_attn.q_proj", "heads*head_dim", "hidden"),
    linear("self_attn.k_proj", "kv*head_dim", "hidden"),
    linear("self_attn.v_proj", "kv*head_dim", "hidden"),
    linear("self_attn.o_proj", "hidden", "heads*head_dim"),
)
#: Axes of latent attention. Queries, keys and values come from low ranks, and heads have no groups. A key has a
#: rotated part, common to all heads, and another one. `head_dim` is the width of a head's value and output.
LATENT_AXES = (
    replace(HEADS, fields=("num_attention_heads", "num_key_value_heads")),
    replace(HEAD_DIM, fields=("v_head_dim",), implied=None),
    Axis("nope_dim", ("qk_nope_head_dim",), prunable=False),
    Axis("rope_dim", ("qk_rope_head_dim",), prunable=False),
    Axis("qk_dim", implied="nope_dim+rope_dim", prunable=False),
    Axis("kv_dim", implied="nope_dim+head_dim", prunable=False),
    Axis("q_rank", ("q_lora_rank",), implied="0", prunable=False),
    Axis("kv_rank", ("kv_lora_rank",), prunable=False),
)
#: The keys and values of latent attention, and its output projection.
LATENT_KEYS = layer_tables(
    linear("self_attn.kv_a_proj_with_mqa", "kv_rank+rope_dim", "hidden"),
    norm("self_attn.kv_a_layernorm", width="kv_rank"),
    linear("self_attn.kv_b_proj", "heads*kv_dim", "kv_rank"),
    linear("self_attn.o_proj", "hidden", "heads*head_dim"),
)
#: Latent attention with compressed queries.
COMPRESSED_ATTENTION = layer_tables(
    linear("self_attn.q_a_proj", "q_rank", "hidden"),
    norm("self_attn.q_a_layernorm", width="q_rank"),
    linear("self_attn.q_b_proj", "heads*qk_dim", "q_rank"),
    LATENT_KEYS,
)
#: Latent attention whose queries are compressed unless `q_lora_rank` is None.
LATENT_ATTENTION = layer_tables(linear("self_attn.q_proj", "heads*qk_dim", "hidden"), COMPRESSED_ATTENTION)
#: The indexer of sparse latent attention, which chooses the tokens that all heads of a layer see.
INDEXER = layer_tables(
    linear("self_attn.indexer.wq_b", "index_heads*index_dim", "q_rank"),
    linear("self_attn.indexer.wk", "index_dim", "hidden"),
    norm("self_attn.indexer.k_norm", width="index_dim"),
    linear("self_attn.indexer.weights_proj", "index_heads", "hidden"),
)
INDEXER_AXES = (
    Axis("index_heads", ("index_n_heads",), prunable=False),
    Axis("index_dim", ("index_head_dim",), prunable=False),
)
#: Queries with a gate of the same width beside them, head by head: its sigmoid multiplies the output of attention.
GATED_QUERIES = layer_tables(
    linear("self_attn.q_proj", "heads*2*head_dim", "hidden"),
    linear("self_attn.k_proj", "kv*head_dim", "hidden"),
    linear("self_attn.v_proj", "kv*head_dim", "hidden"),
    linear("self_attn.o_proj", "hidden", "heads*head_dim"),
)
#: Axes of linear attention by the gated delta rule; none of them is cut.
DELTA_AXES = (
    Axis("linear_keys", ("linear_num_key_heads",), prunable=False),
    Axis("linear_values", ("linear_num_value_heads",), prunable=False),
    Axis("linear_key_dim", ("linear_key_head_dim",), prunable=False),
    Axis("linear_value_dim", ("linear_value_head_dim",), prunable=False),
    Axis("linear_kernel", ("linear_conv_kernel_dim",), prunable=False),
)
#: Queries, keys and values of all its heads, one after another.
DELTA_QKV = "linear_keys*linear_key_dim+linear_keys*linear_key_dim+linear_values*linear_value_dim"
#: Its convolution and decay, wherever its projections come from.
DELTA_RULE = {
    "linear_attn.conv1d.weight": f"{DELTA_QKV} 1 linear_kernel",
    "linear_attn.dt_bias": "linear_values",
    "linear_attn.A_log": "linear_values",
}
#: Its projections in Qwen 3.5.
QWEN_DELTA = layer_tables(
    DELTA_RULE,
    linear("linear_attn.in_proj_qkv", DELTA_QKV, "hidden"),
    linear("linear_attn.in_proj_z", "linear_values*linear_value_dim", "hidden"),
    linear("linear_attn.in_proj_b", "linear_values", "hidden"),
    linear("linear_attn.in_proj_a", "linear_values", "hidden"),
    linear("linear_attn.out_proj", "hidden", "linear_values*linear_value_dim"),
    norm("linear_attn.norm", width="linear_value_dim"),
)
#: A student with layers of linear attention keeps a layer of full attention, too.
NEEDS_FULL_ATTENTION = (("layer_types", ("full_attention",)),)
#: Short convolutions, as wide as the residual stream, with channels of their own: two gates and the gated input.
CONV_DIM = Axis("conv_dim", implied="hidden", per_layer=True)
CONV_KERNEL = Axis("conv_kernel", ("conv_L_cache",), prunable=False)
SHORT_CONVOLUTION = layer_tables(
    linear("conv.in_proj", "conv_dim+conv_dim+conv_dim", "hidden"),
    {"conv.conv.weight": "conv_dim 1 conv_kernel", "conv.conv.bias": "conv_dim"},
    linear("conv.out_proj", "hidden", "conv_dim"),
)
#: Gate, up and down projections.
GATED_MLP = layer_tables(
    linear("mlp.gate_proj", "ffn", "hidden"),
    linear("mlp.up_proj", "ffn", "hidden"),
    linear("mlp.down_proj", "hidden", "ffn"),
)
#: Gate and up in one projection, then down.
FUSED_GATED_MLP = layer_tables(
    linear("mlp.gate_up_proj", "ffn+ffn", "hidden"),
    linear("mlp.down_proj", "hidden", "ffn"),
)
#: Up and down projections.
PLAIN_MLP = layer_tables(linear("mlp.up_proj", "ffn", "hidden"), linear("mlp.down_proj", "hidden", "ffn"))
#: Stacked experts, gate and up concatenated, and the router that chooses among them.
EXPERTS_MLP = stacked_experts()
#: Shared experts beside them, and the bias that balances their load: it decides which experts are chosen, only.
SHARED_EXPERTS_MLP = layer_tables(
    linear("mlp.shared_experts.gate_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_experts.up_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_experts.down_proj", "hidden", "shared_ffn"),
)
ROUTER_BIAS = {"mlp.gate.e_score_correction_bias": "experts"}
#: One shared expert of a size of its own; and the same with a gate that scales its output.
SHARED_EXPERT_MLP = layer_tables(
    linear("mlp.shared_expert.gate_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_expert.up_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_expert.down_proj", "hidden", "shared_ffn"),
)
GATED_SHARED_EXPERT = layer_tables(SHARED_EXPERT_MLP, linear("mlp.shared_expert_gate", "1", "hidden"))
#: Where stacked experts are observed.
EXPERT_HOOK_POINTS = {"experts": "mlp.experts", "moe_ffn": "mlp.experts"}
#: Groups are scored by their two best experts, and `topk_group` of them are chosen.
GROUPED_EXPERTS_LEAST: tuple[tuple[str, str], ...] = (
    ("experts", "num_experts_per_tok"),
    ("experts", "num_experts_per_tok*n_group/topk_group"),
    ("experts", "2*n_group"),
)
#: Leading layers with an MLP, then experts that are chosen within groups, beside shared ones that are as wide.
GROUPED_EXPERTS: Mapping[str, Any] = {
    "mlp_axes": (FFN, ROUTED_EXPERTS, ROUTER_GROUPS, MOE_FFN, SHARED_EXPERTS, SHARED_EXPERTS_FFN),
    "mlp_hook_points": {"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    "groups": (("heads", "kv"), ("experts", "router_groups")),
    "equal": (("shared_experts*moe_ffn", "shared_ffn"),),
    "least": GROUPED_EXPERTS_LEAST,
    "leading_layers": ("first_k_dense_replace",),
}
#: The same beside latent attention.
LATENT_EXPERTS: Mapping[str, Any] = {
    **GROUPED_EXPERTS,
    "groups": (("experts", "router_groups"),),
    "attention_axes": LATENT_AXES,
}
#: The same where the config lists which layers have experts.
LISTED_LATENT_EXPERTS: Mapping[str, Any] = {
    **LATENT_EXPERTS,
    "leading_layers": (),
    "layer_lists": ("mlp_layer_types",),
}
#: One norm for every query head, one for every key head.
HEAD_NORMS = norm("self_attn.q_norm", "self_attn.k_norm", width="head_dim")
#: One norm over all query heads together, one over all key heads.
WIDE_HEAD_NORMS = layer_tables(
    norm("self_attn.q_norm", width="heads*head_dim"), norm("self_attn.k_norm", width="kv*head_dim")
)


#: Embeddings and head of the models that keep everything under `model.`.
EMBEDDINGS = {"model.embed_tokens.weight": "vocab hidden", **linear("lm_head", "vocab", "hidden")}
#: Attention and MLP of LFM2, and the names of norms and needed kinds of layers that its successors share.
LFM_ATTENTION = layer_tables(
    linear("self_attn.q_proj", "heads*head_dim", "hidden"),
    linear("self_attn.k_proj", "kv*head_dim", "hidden"),
    linear("self_attn.v_proj", "kv*head_dim", "hidden"),
    linear("self_attn.out_proj", "hidden", "heads*head_dim"),
    norm("self_attn.q_layernorm", "self_attn.k_layernorm", width="head_dim"),
)
LFM_MLP = layer_tables(
    linear("feed_forward.w1", "ffn", "hidden"),
    linear("feed_forward.w3", "ffn", "hidden"),
    linear("feed_forward.w2", "hidden", "ffn"),
)
#: Neurons of LFM2: its class takes two thirds of the config's number, scaled and rounded.
LFM_FFN = replace(
    FFN, rounding=Rounding("block_auto_adjust_ff_dim", (2, 3), "block_ffn_dim_multiplier", "block_multiple_of")
)
LFM_LAYOUT: Mapping[str, Any] = {
    "outer": layer_tables(EMBEDDINGS, norm("model.embedding_norm")),
    "norms": ("operator_norm", "ffn_norm"),
    "final_norm": "model.embedding_norm",
    "equal": (("conv_dim", "hidden"),),
    "layer_lists": ("layer_types",),
    "needed_kinds": (("layer_types", ("full_attention", "sliding_attention")),),
}
#: Norms before attention and MLP.
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


#: Axes under the names that GPT-2's config gives them.
GPT_AXES = (
    replace(LAYERS, fields=("n_layer",)),
    replace(HIDDEN, fields=("n_embd",)),
    replace(FFN, fields=("n_inner",), implied="4*hidden"),
    replace(HEADS, fields=("n_head",)),
    HEAD_DIM,
    VOCAB,
)
GPT_POSITIONS = replace(POSITIONS, fields=("n_positions",))
#: Embeddings, last norm and head of the models that keep everything under `transformer.`.
GPT_OUTER = layer_tables(
    {"transformer.wte.weight": "vocab hidden"}, linear("lm_head", "vocab", "hidden"), norm("transformer.ln_f")
)
GPT_POSITION_EMBEDDINGS = {"transformer.wpe.weight": "positions hidden"}


#: Llama's layout without biases is Mistral's without a window, and that config takes any hidden size.
AS_MISTRAL = (("mistral", {"attention_bias": False, "mlp_bias": False}, {"sliding_window": None}),)


@accept_old_names(
    mlp_taps="mlp_hook_points", taps="hook_points", sisters="equivalent_classes", opaque="unpruned_prefixes"
)
def decoder(
    model_type: str,
    *,
    layer: Mapping[str, str] | None = None,
    norms: tuple[str, ...] = PRE_NORMS,
    output_norms: tuple[str, ...] = (),
    attention_out: str = "self_attn.o_proj",
    mlp_out: str = "mlp.down_proj",
    attention_axes: tuple[Axis, ...] = (HEADS, KV, HEAD_DIM),
    mlp_axes: tuple[Axis, ...] = (FFN,),
    mlp_hook_points: Mapping[str, str] | None = None,
    **changes: Any,
) -> ArchSpec:
    """The layout that most decoders share: grouped attention, gated MLP, everything under `model.`.

    Args:
        model_type: the config's `model_type`.
        layer: attention and MLP of one layer, without the norms over the hidden size (default: separate projections).
        norms: those norms, where their outputs score the hidden axis.
        output_norms: norms of what attention and MLP write, in layers that also have norms of what they read.
        attention_out: the projection that writes the heads back to the residual stream.
        mlp_out: likewise for the neurons.
        attention_axes: axes of attention; the heads, and the KV heads where they are an axis, are observed at
            `attention_out`.
        mlp_axes: axes of the MLP.
        mlp_hook_points: where they are observed (default: the neurons at `mlp_out`).
        **changes: any other field of `ArchSpec`.
    """
    fields: dict[str, Any] = {
        "axes": (LAYERS, HIDDEN, *mlp_axes, *attention_axes, VOCAB),
        "layers_path": "model.layers",
        "outer": layer_tables(EMBEDDINGS, norm("model.norm")),
        "layer": layer_tables(layer or layer_tables(GROUPED_ATTENTION, GATED_MLP), norm(*norms, *output_norms)),
        "hook_points": {
            **({"ffn": mlp_out} if mlp_hook_points is None else mlp_hook_points),
            **{axis.name: attention_out for axis in attention_axes if axis.name in ("heads", "kv")},
        },
        "layer_norms": norms,
        "final_norm": "model.norm",
        "groups": (("heads", "kv"),) if any(axis.name == "kv" for axis in attention_axes) else (),
    }
    return ArchSpec(model_type=model_type, **{**fields, **changes})


def gpt(model_type: str, *, learned_positions: bool = False, **changes: Any) -> ArchSpec:
    """GPT-2's layout: a `decoder` under `transformer.`, its heads as wide together as the residual stream.

    Args:
        model_type: the config's `model_type`.
        learned_positions: whether positions have embeddings.
        **changes: whatever else `decoder` is told.
    """
    fields: dict[str, Any] = {
        "axes": (*GPT_AXES, GPT_POSITIONS) if learned_positions else GPT_AXES,
        "layers_path": "transformer.h",
        "outer": layer_tables(GPT_OUTER, GPT_POSITION_EMBEDDINGS) if learned_positions else GPT_OUTER,
        "norms": ("ln_1", "ln_2"),
        "final_norm": "transformer.ln_f",
        "attention_axes": (HEADS, HEAD_DIM),
        "equal": SQUARE,
    }
    return decoder(model_type, **{**fields, **changes})
