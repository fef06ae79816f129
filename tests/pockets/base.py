"""What a pocket model is, and sizes that the families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers
from packaging.version import Version
from transformers import AutoConfig, PretrainedConfig

from minitron_hf.families.releases import first_release

VOCAB = 97


def stock_config(model_type: str, **fields: Any) -> Any:
    """The stock config; None where the installed Transformers is older than the family, which then has no pocket."""
    first = first_release(model_type)
    if first is not None and Version(transformers.__version__) < Version(first):
        return None
    return AutoConfig.for_model(model_type, **fields)


@dataclass(frozen=True)
class Pocket:
    """A family's pocket config, and what the oracles need to know of its stock model, written down by hand.

    Attributes:
        config: the config.
        layers: path of the module list of decoder layers.
        attention_out: module inside a layer that writes the heads' outputs back to the residual stream; None where no
            layer has attention.
        mlp_out: likewise for the MLP neurons; None where no layer has a plain MLP.
        mlp_reader: another module inside a layer that reads those neurons.
        experts: module inside a layer that holds stacked experts, with their `down_proj`.
        router: module inside a layer whose `weight` chooses among them.
        router_bias: tensor inside a layer that is added to the router's scores only to choose.
        expert_inputs: dimension of one expert's `down_proj` that its neurons are in.
        shared_out: module inside a layer that writes the neurons of shared experts back.
        experts_coupled: whether experts are as wide as the MLPs of other layers.
        shared_coupled: whether shared experts are as wide as so many routed ones.
        ssm_out: module inside a layer that writes the channels of state-space heads back.
        ssm_norm: the gated norm before it.
        ssm_heads: how many state-space heads there are; 0 where every channel is one.
        ssm_groups: how many groups of them are normed by themselves.
        ssm_gate_first: whether that norm comes after the gate.
        ssm_reader: another module inside a layer that reads their channels.
        ssm_coupled: whether hidden_size and state-space heads only move together.
        conv_out: module inside a layer that writes the channels of a convolution back.
        kv: whether heads share keys and values in groups.
        coupled: whether hidden_size and heads only move together.
        hidden_step: what a smaller hidden_size has to be a multiple of.
        norm: the norms over the residual stream: RMSNorm or LayerNorm, `1p` where the weight is stored minus one,
            `0` where there is none.
        num_norms: how many there are in a layer.
        extra_norms: how many there are beside those and the last one.
        output_norms: those that normalise what is written to the residual stream where others read it; they do not
            score channels.
        head_norms: norms that span all query heads, and all key heads.
        mlp_norm: a norm that spans all neurons.
        scaled_embeddings: whether token embeddings are multiplied by √hidden_size.
        variants: changes of the config that have tensors of their own, which need no oracles of their own.
        depths: cuts of layers to ask for, where those that fit the other families do not.
        widths: cuts of heads and hidden size to ask for, where those that fit the other families do not.
        published: what the config class needs beside its defaults to be built at full size, or to be of this layout.
        tuple_layers: whether a layer returns its attention weights too.
    """

    config: PretrainedConfig
    layers: str = "model.layers"
    attention_out: str | None = "self_attn.o_proj"
    mlp_out: str | None = "mlp.down_proj"
    mlp_reader: str | None = None
    experts: str | None = None
    router: str = "mlp.gate"
    router_bias: str | None = None
    expert_inputs: int = 1
    shared_out: str | None = None
    experts_coupled: bool = False
    shared_coupled: bool = False
    ssm_out: str | None = None
    ssm_norm: str | None = None
    ssm_heads: int = 0
    ssm_groups: int = 1
    ssm_gate_first: bool = True
    ssm_reader: str | None = None
    ssm_coupled: bool = False
    conv_out: str | None = None
    kv: bool = True
    coupled: bool = False
    hidden_step: int = 1
    norm: Literal["rms", "rms1p", "rms0", "layer", "layer1p"] = "rms"
    num_norms: int = 2
    extra_norms: int = 0
    output_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    mlp_norm: str | None = None
    scaled_embeddings: bool = False
    tuple_layers: bool = False
    variants: tuple[Mapping[str, Any], ...] = ()
    depths: Mapping[str, Mapping[str, Any]] | None = None
    widths: Mapping[str, Mapping[str, int]] | None = None
    published: Mapping[str, Any] = field(default_factory=dict)

    @property
    def writers(self) -> dict[str, str | None]:
        """Axis → module whose input is its units, for axes without any further structure."""
        return {"ffn": self.mlp_out, "shared_ffn": self.shared_out, "conv_dim": self.conv_out}

    @property
    def rms(self) -> bool:
        """Whether the norms only divide by a root mean square, subtract no mean, and have weights."""
        return self.norm in ("rms", "rms1p")


#: Shared by the families with grouped queries. heads*head_dim=120, kv*head_dim=30, 2*ffn=104, qkv=180.
GROUPED = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
#: The families whose heads are as wide together as the residual stream: 5 heads of 8 dimensions.
COUPLED = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
#: Six experts of 14 neurons, two to a token.
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
#: Six experts in two groups, of which one is chosen; four shared experts (together 56 neurons) and a leading MLP.
GROUPED_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 14,
    "n_shared_experts": 4,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 1.7,
    "mlp_out": "mlp.down_proj",
    "experts": "mlp.experts",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "shared_out": "mlp.shared_experts.down_proj",
    "shared_coupled": True,
}
#: The same with grouped queries. kv*head_dim=24.
GROUPED_COUPLED = {
    **GROUPED,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "head_dim": 8,
}
#: Layers 0 and 1 see everything, 2 to 4 only the last six tokens.
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}


#: The same by one factor for every second rotated dimension: six of eight.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 4.0],
}

#: A context of 16 tokens stretched to 64; queries are scaled by position too.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
}
GEMMA = {
    "norm": "rms1p",
    "num_norms": 4,
    "output_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "scaled_embeddings": True,
}


def kinds(letters: str) -> list[str]:
    """`layer_types` from initials: `f`ull, `s`liding or `l`inear attention, or `c`onvolution."""
    names = {"f": "full_attention", "s": "sliding_attention", "l": "linear_attention", "c": "conv"}
    return [names[letter] for letter in letters]


def grouped(model_type: str, **changes) -> Pocket:
    """A family with grouped queries; changes are fields of the pocket or of its config."""
    known = {name: changes.pop(name) for name in Pocket.__dataclass_fields__ if name in changes}
    return Pocket(stock_config(model_type, **{**GROUPED, **changes}), **known)


def coupled(model_type: str, sizes: dict, *modules: str, **changes) -> Pocket:
    """A family whose heads are as wide together as the residual stream; modules as the first fields of `Pocket`."""
    known = {name: changes.pop(name) for name in Pocket.__dataclass_fields__ if name in changes}
    config = stock_config(model_type, **sizes, **changes)
    return Pocket(config, *modules, coupled=True, **{"kv": False, "norm": "layer", **known})
