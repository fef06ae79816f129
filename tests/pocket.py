"""Pocket models: one tiny, random model per family and variant, for every test that asks something of all families.

Sizes are pairwise distinct, products included, so that a wrong axis cannot pass by coincidence. To test one more
family, add one entry to `POCKETS`.
"""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from minitron_hf.families import FIELD_OF_AXIS, PRUNER_FIELDS, spec_for

VOCAB = 97


@dataclass(frozen=True)
class Pocket:
    """A family's pocket config, and what the oracles need to know of its stock model, written down by hand.

    Attributes:
        config: the config.
        layers: path of the module list of decoder layers.
        attention_out: module inside a layer that writes the heads' outputs back to the residual stream.
        mlp_out: likewise for the MLP neurons; None where no layer has a plain MLP.
        experts: module inside a layer that holds stacked experts, with their `down_proj`.
        router: module inside a layer whose `weight` chooses among them.
        router_bias: tensor inside a layer that is added to the router's scores only to choose.
        expert_inputs: dimension of one expert's `down_proj` that its neurons are in.
        shared_out: module inside a layer that writes the neurons of shared experts back.
        kv: whether heads share keys and values in groups.
        coupled: whether hidden_size and heads only move together.
        norm: the norms over the residual stream: RMSNorm or LayerNorm, `1p` where the weight is stored minus one.
        num_norms: how many there are in a layer.
        output_norms: those of a layer that normalise what is written to the residual stream beside a norm that reads
            it; they do not score channels.
        head_norms: norms that span all query heads, and all key heads.
        scaled_embeddings: whether token embeddings are multiplied by √hidden_size.
        tuple_layers: whether a layer returns its attention weights too.
    """

    config: PretrainedConfig
    layers: str = "model.layers"
    attention_out: str = "self_attn.o_proj"
    mlp_out: str | None = "mlp.down_proj"
    experts: str | None = None
    router: str = "mlp.gate"
    router_bias: str | None = None
    expert_inputs: int = 1
    shared_out: str | None = None
    kv: bool = True
    coupled: bool = False
    norm: Literal["rms", "rms1p", "layer", "layer1p"] = "rms"
    num_norms: int = 2
    output_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    scaled_embeddings: bool = False
    tuple_layers: bool = False

    @property
    def rms(self) -> bool:
        """Whether the norms only divide by a root mean square, and subtract no mean."""
        return self.norm.startswith("rms")


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
GPT2 = dict(**COUPLED, n_embd=40, n_inner=52, n_layer=4, n_head=5, n_positions=64)
NEOX = dict(
    **COUPLED,
    hidden_size=40,
    intermediate_size=52,
    num_hidden_layers=4,
    num_attention_heads=5,
    max_position_embeddings=64,
    rotary_pct=0.5,
)
#: Six experts of 14 neurons, two to a token.
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
#: The same with grouped queries. kv*head_dim=24.
GROUPED_COUPLED = {
    **GROUPED,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "head_dim": 8,
}
#: Layers 0 and 1 see everything, 2 to 4 only the last six tokens.
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}


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


def _kinds(letters: str) -> list[str]:
    """`layer_types` from initials: `f`ull or `s`liding attention."""
    return [{"f": "full_attention", "s": "sliding_attention"}[letter] for letter in letters]


def _grouped(model_type: str, **changes) -> Pocket:
    """A family with grouped queries; changes are fields of the pocket or of its config."""
    known = {name: changes.pop(name) for name in Pocket.__dataclass_fields__ if name in changes}
    return Pocket(AutoConfig.for_model(model_type, **GROUPED, **changes), **known)


def _coupled(model_type: str, sizes: dict, *modules: str, **changes) -> Pocket:
    """A family whose heads are as wide together as the residual stream; modules as the first fields of `Pocket`."""
    known = {name: changes.pop(name) for name in Pocket.__dataclass_fields__ if name in changes}
    config = AutoConfig.for_model(model_type, **sizes, **changes)
    return Pocket(config, *modules, coupled=True, **{"kv": False, "norm": "layer", **known})


def _gpt2(**changes) -> Pocket:
    return Pocket(
        GPT2Config(**{**GPT2, **changes}),
        "transformer.h",
        "attn.c_proj",
        "mlp.c_proj",
        kv=False,
        coupled=True,
        norm="layer",
    )


def _neox(**changes) -> Pocket:
    config = GPTNeoXConfig(**{**NEOX, **changes})
    modules = ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h")
    return Pocket(config, *modules, kv=False, coupled=True, norm="layer")


POCKETS: dict[str, Pocket] = {
    "llama": Pocket(LlamaConfig(**GROUPED)),
    "llama-biases-tied": Pocket(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": Pocket(MistralConfig(**GROUPED, sliding_window=6)),
    "qwen2": Pocket(Qwen2Config(**GROUPED, **SLIDING)),
    "qwen2-tied": Pocket(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3": Pocket(Qwen3Config(**GROUPED, **SLIDING)),
    "qwen3-biases-tied": Pocket(Qwen3Config(**GROUPED, attention_bias=True, tie_word_embeddings=True)),
    "gpt2": _gpt2(),
    "gpt2-untied": _gpt2(n_inner=None, tie_word_embeddings=False),
    "gpt_neox": _neox(),
    "gpt_neox-sequential": _neox(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
    "phi3": Pocket(Phi3Config(**GROUPED, partial_rotary_factor=0.6)),
    "ministral": _grouped("ministral", layer_types=_kinds("sfsff"), sliding_window=6),
    "ministral3": _grouped("ministral3", rope_parameters=YARN),
    "gemma": _grouped("gemma", norm="rms1p", scaled_embeddings=True),
    "gemma2": _grouped("gemma2", sliding_window=6, query_pre_attn_scalar=7, final_logit_softcapping=3.0, **GEMMA),
    "gemma3_text": _grouped(
        "gemma3_text", layer_types=_kinds("ssfsf"), sliding_window=6, query_pre_attn_scalar=7, **GEMMA
    ),
    "olmo": _grouped("olmo", norm="layer", clip_qkv=0.8),
    "olmo2": _grouped("olmo2", head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "olmo3": _grouped(
        "olmo3", layer_types=_kinds("ssfsf"), sliding_window=6, head_norms=("self_attn.q_norm", "self_attn.k_norm")
    ),
    "smollm3": _grouped("smollm3", use_sliding_window=True, sliding_window=6, no_rope_layer_interval=2),
    "granite": _grouped(
        "granite", embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.4, attention_multiplier=0.2
    ),
    "cohere": _grouped("cohere", norm="layer", num_norms=1, use_qk_norm=True, logit_scale=0.7),
    "cohere2": _grouped(
        "cohere2", norm="layer", num_norms=1, layer_types=_kinds("ssfsf"), sliding_window=6, logit_scale=0.7
    ),
    "starcoder2": _grouped("starcoder2", mlp_out="mlp.c_proj", norm="layer", sliding_window=6),
    "arcee": _grouped("arcee"),
    "seed_oss": _grouped("seed_oss", attention_out_bias=True, mlp_bias=True),
    "ernie4_5": _grouped("ernie4_5", use_bias=True),
    "hunyuan_v1_dense": _grouped("hunyuan_v1_dense"),
    "nemotron": _grouped("nemotron", norm="layer1p", partial_rotary_factor=0.6),
    "glm": _grouped("glm", partial_rotary_factor=0.6),
    "glm4": _grouped(
        "glm4",
        num_norms=4,
        output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        partial_rotary_factor=0.6,
    ),
    "exaone4": _grouped("exaone4", layer_types=_kinds("ssfsf"), sliding_window=6),
    "phi": _grouped(
        "phi",
        attention_out="self_attn.dense",
        mlp_out="mlp.fc2",
        norm="layer",
        num_norms=1,
        partial_rotary_factor=0.6,
    ),
    "helium": _coupled("helium", GROUPED_COUPLED, kv=True, norm="rms", attention_bias=True),
    "stablelm": _coupled("stablelm", GROUPED_COUPLED, kv=True, use_qkv_bias=True),
    "opt": _coupled("opt", {**NEOX, "ffn_dim": 52}, "model.decoder.layers", "self_attn.out_proj", "fc2"),
    "gptj": _coupled(
        "gptj", GPT2, "transformer.h", "attn.out_proj", "mlp.fc_out", num_norms=1, tuple_layers=True, rotary_dim=4
    ),
    "gpt_bigcode": _coupled("gpt_bigcode", GPT2, "transformer.h", "attn.c_proj", "mlp.c_proj"),
    "falcon": _coupled(
        "falcon",
        {**NEOX, "ffn_hidden_size": 52},
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        num_norms=1,
        tuple_layers=True,
        bias=True,
    ),
    "mixtral": _grouped(
        "mixtral", mlp_out=None, experts="mlp.experts", num_local_experts=6, num_experts_per_tok=2, sliding_window=6
    ),
    "qwen2_moe": _grouped(
        "qwen2_moe",
        **EXPERTS,
        experts="mlp.experts",
        shared_out="mlp.shared_expert.down_proj",
        shared_expert_intermediate_size=22,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        **SLIDING,
    ),
}


def pocket_config(name: str, **changes) -> PretrainedConfig:
    """A copy of a pocket's config, with some fields changed."""
    config = POCKETS[name].config
    values = {**config.to_dict(), **changes}
    if "layer_types" not in changes and {"num_hidden_layers", "max_window_layers"} & set(changes):
        values.pop("layer_types", None)  # derived from these two
    copied = type(config)(**values)
    copied._attn_implementation = changes.get("attn_implementation", "eager")
    copied._experts_implementation = "eager"  # what else there is knows no float64
    return copied


def pocket_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> PreTrainedModel:
    """A pocket model in evaluation mode. No weight is left at 0 or 1, norms and biases included."""
    model = AutoModelForCausalLM.from_config(pocket_config(name, **changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                values = values * (2 / sum(parameter.shape)) ** 0.5
            elif path.endswith("weight"):
                values = 1 + 0.3 * values
            else:
                values = 0.3 * values
            parameter.copy_(values)
    return model.eval()


def cuttable(name: str) -> set[str]:
    """Names of the sizes of `PrunerConfig` that a pocket's family lets be cut."""
    config = POCKETS[name].config
    spec = spec_for(config)
    flags = {axis for field, value, axis, _ in spec.refused_if if getattr(config, field, None) == value}
    refused = {*spec.refused, *flags}
    return {field for field, axis in PRUNER_FIELDS.items() if axis in spec.axis} - {
        FIELD_OF_AXIS[axis] for axis in refused if axis in FIELD_OF_AXIS
    }


def residual_norms(model: nn.Module) -> list[str]:
    """Norms over the residual stream, with or without weights; those of queries and keys are of another width."""
    hidden = (model.config.hidden_size,)
    return [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and hidden
        in (getattr(getattr(module, "weight", None), "shape", None), getattr(module, "normalized_shape", None))
    ]


def pocket_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without the special ones, int64."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pocket_tokenizer(**changes) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that fits every pocket vocabulary; the special tokens come first."""
    characters = string.ascii_letters + string.digits + " .,;:!?'\"()-\n"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    assert len(vocabulary) < VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**tokens, **changes})


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Let `torch.float32` mean float64: the stock models compute norms, softmax and rotations in float32 otherwise."""
    names = ("float32", "float")
    kept = {name: getattr(torch, name) for name in names}, torch.Tensor.float
    for name in names:
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        for name, value in kept[0].items():
            setattr(torch, name, value)
        torch.Tensor.float = kept[1]


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits in float64 throughout, [batch, length, vocabulary]."""
    with float64_throughout():
        return model(tokens, use_cache=False, **kwargs).logits


def assert_same_function(one: nn.Module, other: nn.Module, tokens: torch.Tensor, tolerance: float = 1e-13) -> None:
    """Logits equal relative to the largest, and not trivially so."""
    left, right = logits(one, tokens), logits(other, tokens)
    assert left.dtype == torch.float64
    assert left.std() > 0.1
    assert ((left - right).abs().max() / right.abs().max()).item() < tolerance
