"""Pocket models: one tiny, random model per family and variant, for every test that asks something of all families.

The configs are in the folder `pockets`. Their sizes are pairwise distinct, products included, so that a wrong axis
cannot pass by coincidence.
"""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from minitron_hf.families import FIELD_OF_AXIS, PRUNER_FIELDS, named_tensors, spec_for
from pockets import POCKETS, VOCAB, Pocket

__all__ = ["POCKETS", "VOCAB", "Pocket"]


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
    if dtype is torch.float64:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # some are pinned to float32
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, parameter in named_tensors(model).items():
            if path not in parameters and parameter.ndim != 1:
                continue  # a saved number, such as a temperature, or tables that belong together, such as decays
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


def residual_norms(name: str, model: nn.Module) -> list[str]:
    """Norms over the residual stream, with or without weights; those of queries and keys may be as wide."""
    hidden = (model.config.hidden_size,)

    def width(path: str, module: nn.Module) -> tuple[int, ...] | None:
        if (weight := getattr(module, "weight", None)) is not None:
            return tuple(weight.shape)
        if any(module.children()):  # what it is made of is asked instead
            return None
        return getattr(module, "normalized_shape", None if path.endswith(("q_norm", "k_norm", "v_norm")) else hidden)

    return [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(one in path for one in POCKETS[name].head_norms)
        and width(path, module) == hidden
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


def starting_tokenizer(start: str = "<s>", end: str = "", **changes) -> PreTrainedTokenizerFast:
    """The pocket tokenizer, which adds special tokens in front of every text, and behind it."""
    tokenizer = pocket_tokenizer(**changes)
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*start.split(), *end.split()}]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}".strip(), special_tokens=added
    )
    return tokenizer


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Let `torch.float32` mean float64: the stock models compute norms, softmax and rotations in float32 otherwise."""
    names = ("float32", "float")
    kept = {name: getattr(torch, name) for name in names}, torch.Tensor.float
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for name in names:
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        for name, value in kept[0].items():
            setattr(torch, name, value)
        torch.Tensor.float = kept[1]
        torch.set_default_dtype(default)


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits in float64 throughout, [batch, length, vocabulary]."""
    with float64_throughout():
        return model(tokens, use_cache=False, **kwargs).logits


def assert_same_function(one: nn.Module, other: nn.Module, tokens: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Logits equal relative to the largest, and not trivially so."""
    left, right = logits(one, tokens), logits(other, tokens)
    assert left.dtype == torch.float64
    assert left.std() > 0.1
    assert ((left - right).abs().max() / right.abs().max()).item() < tolerance
