"""What matters: activations of a few calibration rows → `ImportanceScores` for every width axis and every layer.

One forward pass without the output head gives all of them (P1 §2.2, arXiv 2407.14679). Legend of shape suffixes:
B rows of a batch, T tokens of a row, U units of an axis, H hidden, L layers.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from .artifacts import digest, public_name, replacing_file, versions
from .axes import dimension_axes, product_shape
from .data import DataSource, TokenRows, padded_batches, position_ids, token_rows
from .errors import DataError, MismatchError
from .families import ArchSpec, spec_for
from .models import architecture_digest, evaluating, model_digest, on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reduction = Literal["mean", "l2", "var"]
Metric = Literal["activation", "random"]
SCORES_NAME = "scores.safetensors"

#: Tokens whose pairwise layer similarities are computed at a time: bounds the memory of `[tokens, L+1, H]`.
_SIMILARITY_CHUNK = 256


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of one model: the higher, the more a unit or layer matters.

    Attributes:
        axes: axis → float32 scores: `[units]` for axes chosen once for the whole model (hidden), `[layers, units]`
            for axes chosen in every layer (ffn, heads, kv).
        blocks: float32 [L, L]; entry (i, j ≥ i) is the block importance of layers i..j together,
            1 − E[cos(input of layer i, output of layer j)] (P1 §2.2); NaN below the diagonal.
        settings: how the scores were made.
        digests: of `model` (weights), `architecture`, `tokenizer` and `data`.
        versions: of the libraries that made them.
    """

    axes: Mapping[str, Tensor]
    blocks: Tensor
    settings: Mapping[str, Any]
    digests: Mapping[str, str | None]
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def layers(self) -> Tensor:
        """Block importance of every single layer, float32 [L]."""
        return self.blocks.diagonal()

    @property
    def digest(self) -> str:
        """Digest of the scores themselves."""
        tensors = {**self.axes, "blocks": self.blocks}
        return digest(*(part for name in sorted(tensors) for part in (name, tensors[name].numpy().tobytes())))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `scores.safetensors` (settings, digests and versions in its header)."""
        header = {"format": 1, "settings": self.settings, "digests": self.digests, "versions": self.versions}
        path = Path(save_directory) / SCORES_NAME
        tensors = {name: tensor.contiguous() for name, tensor in {**self.axes, "blocks": self.blocks}.items()}
        with replacing_file(path) as temporary:
            save_file(tensors, temporary, metadata={"minitron_hf": json.dumps(header, sort_keys=True)})
        return path

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ImportanceScores:
        """Read scores from a file, or from the folder that holds `scores.safetensors`.

        Raises:
            MismatchError: if there is no such file, or it was not written by this package.
        """
        path = Path(path)
        file = path / SCORES_NAME if path.is_dir() else path
        if not file.is_file():
            raise MismatchError(f"No importance scores at {file}. Make them with estimate_importance(…) first.")
        try:
            with safe_open(file, "pt") as stored:
                header = json.loads((stored.metadata() or {})["minitron_hf"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
            if header["format"] != 1:
                raise ValueError(f"format {header['format']!r}, expected 1")
            blocks = tensors.pop("blocks")
            return cls(tensors, blocks, header["settings"], header["digests"], header["versions"])
        except Exception as error:
            raise MismatchError(
                f"{file} does not hold importance scores of minitron-hf: {error!r}. Make them with "
                "estimate_importance(…)."
            ) from error

    def require_model(self, model_or_config: PreTrainedModel | PretrainedConfig) -> None:
        """Refuse to be used with another model than the one that was scored.

        A config, or a model on the meta device, can only be compared by architecture; `apply_plan` compares weights.

        Raises:
            MismatchError: if the architecture or the weights differ.
        """
        if isinstance(model_or_config, PretrainedConfig):
            model, config = None, model_or_config
        else:
            model, config = model_or_config, model_or_config.config
        if architecture_digest(config) != self.digests["architecture"]:
            raise MismatchError(
                "These importance scores were made for a model of another architecture "
                f"({self.settings.get('model')}). Score this model with estimate_importance(…)."
            )
        if model is not None and not on_meta(model):
            require_weights(model, self.digests["model"], "These importance scores")


def require_weights(model: PreTrainedModel, expected: str | None, what: str) -> None:
    """Refuse a model whose weights are not the ones an artefact was made from.

    Raises:
        MismatchError: if the digests differ.
    """
    if expected is not None and model_digest(model) != expected:
        raise MismatchError(
            f"{what} were made for other weights than those of this {type(model).__name__} "
            f"({model.config._name_or_path or 'in memory'}). Make them again for this model."
        )


def estimate_importance(
    model: PreTrainedModel,
    data: DataSource | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    metric: Metric = "activation",
    batch_reduction: Reduction = "l2",
    sequence_reduction: Reduction = "mean",
    num_samples: int = 1024,
    max_length: int | None = None,
    packing: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    show_progress: bool = True,
) -> ImportanceScores:
    """Score every width axis and every contiguous block of layers in one forward pass over calibration rows.

    Per token, a unit's activation is: for a head ‖its output before the output projection‖₂; for a KV group ‖its
    contribution to the attention output‖₂; for an MLP neuron its value at the input of the down projection (P1 takes
    it before the nonlinearity; this is NVIDIA Model-Optimizer's choice, and the default here); for a hidden channel
    its value in the output of a norm, where the reduced scores of all norms are summed. Activations are reduced over
    the tokens of a row, then over rows (P1 Table 13: batch L2 with sequence mean is best or second). Padding tokens
    never count, so the scores do not depend on batch size, padding side or the order of batches.

    Args:
        model: teacher; not changed.
        data: calibration texts, token rows, or a dataset (see `token_rows`), or a `DataLoader` of batches, each a
            mapping with `input_ids` and `attention_mask` tensors [B, T], all of which are used. Not needed by
            `metric="random"`.
        processing_class: tokenizer, needed for texts.
        metric: `"activation"`, or `"random"`, the control that every result should be shown beside.
        batch_reduction: reduction over rows: `"l2"`, `"mean"` (of absolute values) or `"var"`.
        sequence_reduction: reduction over the tokens of a row, likewise.
        num_samples: rows to use (P1, P2: 1,024).
        max_length: tokens in a row; default 512, or the model's positions where they are fewer.
        packing: join texts into full rows instead of one text a row.
        batch_size: rows at a time. Memory grows with `batch_size × max_length × (layers + 1) × hidden_size`.
        seed: of `metric="random"`.
        show_progress: show a progress bar.

    Returns:
        The scores, with digests of model, tokenizer and data.

    Raises:
        UnsupportedModelError: if the family is unknown or the model is not what its table says.
        DataError: if there is no calibration text, too little of it, or no tokenizer for it.
    """
    for name, value, allowed in (
        ("metric", metric, Metric),
        ("batch_reduction", batch_reduction, Reduction),
        ("sequence_reduction", sequence_reduction, Reduction),
    ):
        if value not in get_args(allowed):
            raise DataError(f"{name}={value!r} is unknown. Expected one of {', '.join(get_args(allowed))}.")
    spec = spec_for(model.config)
    spec.check(model)
    settings: dict[str, Any] = {"model": public_name(model.config._name_or_path), "metric": metric}
    digests: dict[str, str | None] = {
        "model": model_digest(model),
        "architecture": architecture_digest(model.config),
        "tokenizer": None if processing_class is None else tokenizer_digest(processing_class),
        "data": None,
    }
    if metric == "random":
        axes, blocks = _random_scores(spec, model.config, seed)
        return ImportanceScores(axes, blocks, {**settings, "seed": seed}, digests)

    batches, num_batches, made_here = _calibration_batches(
        model, data, processing_class, num_samples, max_length, packing, batch_size
    )
    pass_ = _ScoringPass(spec, model, sequence_reduction)
    device = next(model.get_input_embeddings().parameters()).device
    with (
        evaluating([model]),
        torch.no_grad(),
        pass_.hooks(),
        tqdm(total=num_batches, desc="Scoring", disable=not show_progress) as bar,
    ):
        for batch in batches:
            pass_.run({name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch})
            bar.update()
    if not pass_.num_tokens:
        raise DataError(
            "The calibration batches hold no tokens. Pass a list of texts, or a DataLoader that is not empty."
        )
    digests["data"] = TokenRows(tuple(pass_.rows), None).digest
    settings |= {
        "batch_reduction": batch_reduction,
        "sequence_reduction": sequence_reduction,
        "num_rows": pass_.num_rows,
        "num_tokens": pass_.num_tokens,
        "max_length": max(map(len, pass_.rows)),
        "packing": packing if made_here else None,
    }
    return ImportanceScores(pass_.axis_scores(batch_reduction), pass_.block_scores(), settings, digests)


def tokenizer_digest(processing_class: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return digest(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))


def default_max_length(config: PretrainedConfig, limit: int = 512) -> int:
    """Row length for calibration and measurement: `limit`, or the model's positions where they are fewer."""
    return min(limit, getattr(config, "max_position_embeddings", None) or limit)


def _calibration_batches(
    model: PreTrainedModel,
    data: DataSource | None,
    processing_class: PreTrainedTokenizerBase | None,
    num_samples: int,
    max_length: int | None,
    packing: bool,
    batch_size: int,
) -> tuple[Iterable[Mapping[str, Tensor]], int | None, bool]:
    """Batches, their number where it is known, and whether they were packed (or not) here."""
    if data is None:
        raise DataError("estimate_importance needs calibration data. Pass a list of texts or a dataset.")
    if isinstance(data, torch.utils.data.DataLoader):
        return data, None if isinstance(data.dataset, torch.utils.data.IterableDataset) else len(data), False
    max_length = max_length or default_max_length(model.config)
    rows = token_rows(data, processing_class, max_length=max_length, num_rows=num_samples, packing=packing)
    if rows.num_tokens < max_length and packing and not isinstance(data, TokenRows):
        raise DataError(
            f"The calibration text holds only {rows.num_tokens} tokens, less than one row of {max_length}. "
            f"Pass more text (the papers use 1,024 rows), or a smaller max_length."
        )
    _require_vocabulary(max(max(row) for row in rows.rows), model.config)
    return padded_batches(rows, batch_size), -(-len(rows) // batch_size), not isinstance(data, TokenRows)


def _require_vocabulary(largest: int, config: PretrainedConfig) -> None:
    if largest >= config.vocab_size:
        raise DataError(
            f"The calibration rows hold token id {largest}, but the model's vocabulary has {config.vocab_size} "
            "entries. Use the tokenizer that belongs to this model."
        )


class _ScoringPass:
    """Accumulators of one pass, and the hooks that feed them. Sums are kept in float64 on the CPU."""

    def __init__(self, spec: ArchSpec, model: PreTrainedModel, sequence_reduction: Reduction) -> None:
        self.spec = spec
        self.model = model
        self.sizes = spec.sizes(model.config)
        self.sequence_reduction = sequence_reduction
        self.rows: list[tuple[int, ...]] = []  # what was seen, without padding
        self.layer_inputs: list[Tensor] = []
        self.mask_BT: Tensor | None = None
        self.shape_BT: tuple[int, ...] = ()
        # (axis, source) → [sum of |s|, sum of s, sum of s²] over rows, each [U]; source is a layer or norm index.
        self.sums: dict[tuple[str, int], list[Tensor]] = {}
        self.similarity = torch.zeros(self.sizes["layers"] + 1, self.sizes["layers"] + 1, dtype=torch.float64)
        # The signature, not __code__: Transformers wraps `forward` in decorators.
        self.takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters

    def run(self, batch: Mapping[str, Tensor]) -> None:
        mask_BT = batch.get("attention_mask")
        if mask_BT is None:
            mask_BT = torch.ones_like(batch["input_ids"])
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch["input_ids"], mask_BT)]
        _require_vocabulary(max(map(max, filter(None, rows)), default=0), self.model.config)
        padded = not bool(mask_BT.all())
        self.mask_BT = mask_BT.bool() if padded else None
        self.shape_BT = mask_BT.shape
        inputs = {"input_ids": batch["input_ids"]}
        if padded:
            # A padding token added to the tokenizer alone lies beyond the model's vocabulary.
            inputs["input_ids"] = batch["input_ids"].masked_fill(~mask_BT.bool(), 0)
            # Causal attention never looks right, so padding there needs no mask; and with one, padding tokens that a
            # sliding window leaves with nothing to see turn NaN and spoil the keys of the others.
            if bool((mask_BT.diff(dim=1) > 0).any()):
                inputs["attention_mask"] = mask_BT
                if self.takes_positions:
                    inputs["position_ids"] = position_ids(mask_BT)
        self.layer_inputs.clear()
        self.model.base_model(**inputs, use_cache=False)  # without the head: no logits are needed
        self._add_similarities(mask_BT.bool())
        self.rows += [row for row in rows if row]

    @property
    def num_rows(self) -> int:
        """Rows with at least one token."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens seen, without padding."""
        return sum(map(len, self.rows))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe the taps, norms and layers that the family's table names, for the duration of the context."""
        spec, model = self.spec, self.model
        num_layers = self.sizes["layers"]
        with ExitStack() as stack:

            def before(path: str, observe: Callable[[Tensor], None]) -> None:
                module = model.get_submodule(path)
                hook = module.register_forward_pre_hook(
                    lambda _, args, kwargs: observe(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
                stack.callback(hook.remove)

            def after(path: str, observe: Callable[[Tensor], None]) -> None:
                hook = model.get_submodule(path).register_forward_hook(
                    lambda _, __, output: observe(output[0] if isinstance(output, tuple) else output)
                )
                stack.callback(hook.remove)

            for layer in range(num_layers):
                for axis, module in spec.taps.items():
                    path = spec.layer_parameter(layer, module)
                    before(path, self._unit_observer(axis, module, layer))
                for index, module in enumerate(spec.layer_norms):
                    source = layer * len(spec.layer_norms) + index
                    after(spec.layer_parameter(layer, module), self._observer("hidden", source))
                before(f"{spec.layers_path}.{layer}", self.layer_inputs.append)
            after(spec.final_norm, self._observer("hidden", num_layers * len(spec.layer_norms)))
            after(f"{spec.layers_path}.{num_layers - 1}", self.layer_inputs.append)
            yield

    def _observer(self, axis: str, source: int) -> Callable[[Tensor], None]:
        return lambda x_BTU: self._add(axis, source, x_BTU)

    def _unit_observer(self, axis: str, module: str, layer: int) -> Callable[[Tensor], None]:
        """Activations at the input of a projection → one value per unit and token."""
        spec = self.spec
        pattern = f"{module}.weight"
        tapped = {outer: inner for inner, outer in spec.groups}.get(axis, axis)
        [position] = [i for i, dim in enumerate(spec.dimensions[pattern]) if tapped in dimension_axes(dim)]
        [product] = spec.dimensions[pattern][position]
        shape = product_shape(product, self.sizes)
        if axis in product:
            dims = tuple(-len(shape) + i for i, factor in enumerate(product) if factor != axis)

            def observe(x_BTD: Tensor) -> None:
                x = x_BTD.unflatten(-1, shape)
                self._add(axis, layer, torch.linalg.vector_norm(x, dim=dims, dtype=wide(x)) if dims else x_BTD)

            return observe
        # The outer axis of a group (KV heads over query heads): the norm of what the whole group contributes to the
        # module's output, ‖W_g x_g‖² = x_gᵀ(W_gᵀW_g)x_g, which needs no [tokens, H] output per group.
        num_groups = self.sizes[axis]
        gram: Tensor | None = None

        def observe_group(x_BTD: Tensor) -> None:
            nonlocal gram
            if gram is None:
                weight = self.model.get_parameter(spec.layer_parameter(layer, pattern)).to(wide(x_BTD))
                weight_gDH = (weight.T if position == 1 else weight).unflatten(0, (num_groups, -1))
                gram = weight_gDH @ weight_gDH.transpose(1, 2)
            x_BTgD = x_BTD.to(gram.dtype).unflatten(-1, (num_groups, -1))
            squared_BTg = (torch.einsum("btgd,gde->btge", x_BTgD, gram) * x_BTgD).sum(-1)
            self._add(axis, layer, squared_BTg.clamp(min=0).sqrt())

        return observe_group

    def _add(self, axis: str, source: int, x_BTU: Tensor) -> None:
        x_BTU = x_BTU.reshape(*self.shape_BT, -1)  # OPT flattens rows and tokens before its MLP
        reduced_BU = reduce_sequence(x_BTU, self.mask_BT, self.sequence_reduction).double().cpu()
        sums = self.sums.setdefault((axis, source), [torch.zeros(x_BTU.shape[-1], dtype=torch.float64)] * 3)
        terms = (reduced_BU.abs().sum(0), reduced_BU.sum(0), reduced_BU.square().sum(0))
        self.sums[axis, source] = [total + term for total, term in zip(sums, terms)]

    def _add_similarities(self, mask_BT: Tensor) -> None:
        """Cosines between the inputs of all layers (and the last output), summed over unmasked tokens."""
        states = [x_BTH[mask_BT.to(x_BTH.device)] for x_BTH in self.layer_inputs]
        self.layer_inputs.clear()
        for start in range(0, len(states[0]), _SIMILARITY_CHUNK):
            chunk = [x_NH[start : start + _SIMILARITY_CHUNK].to(states[0].device, wide(x_NH)) for x_NH in states]
            unit_NLH = torch.nn.functional.normalize(torch.stack(chunk, dim=1), dim=-1)
            self.similarity += (unit_NLH @ unit_NLH.transpose(1, 2)).sum(0).double().cpu()

    def axis_scores(self, batch_reduction: Reduction) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for axis in {axis: None for axis, _ in self.sums}:
            sources = sorted(source for name, source in self.sums if name == axis)
            stacked = torch.stack([reduce_rows(self.sums[axis, s], self.num_rows, batch_reduction) for s in sources])
            scores[axis] = (stacked if self.spec.axis[axis].per_layer else stacked.sum(0)).float()
        return scores

    def block_scores(self) -> Tensor:
        # similarity[i, j] compares the input of layer i with the input of layer j, so a block i..j ends at j + 1.
        blocks = (1 - self.similarity / self.num_tokens)[:-1, 1:].float()
        return blocks.masked_fill(torch.ones_like(blocks, dtype=torch.bool).tril(-1), torch.nan)


def wide(x: Tensor) -> torch.dtype:
    """Dtype to reduce in: float32, or float64 for float64 values."""
    return torch.promote_types(x.dtype, torch.float32)


def reduce_sequence(x_BTU: Tensor, mask_BT: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce activations over the unmasked tokens of each row, in float32 (float64 for float64 input) → [B, U]."""
    dtype = wide(x_BTU)
    if mask_BT is not None:
        # Filled, not multiplied: attention over nothing but padding may hold NaN.
        x_BTU = x_BTU.masked_fill(~mask_BT.to(x_BTU.device)[..., None], 0)
        count_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1).to(x_BTU.device)
    else:
        count_B1 = torch.full((1, 1), x_BTU.shape[1], device=x_BTU.device)
    if reduction == "l2":
        return torch.linalg.vector_norm(x_BTU, dim=1, dtype=dtype)
    if reduction == "mean":
        return torch.linalg.vector_norm(x_BTU, ord=1, dim=1, dtype=dtype) / count_B1
    mean_BU = x_BTU.sum(1, dtype=dtype) / count_B1
    deviation = x_BTU.to(dtype) - mean_BU[:, None]
    if mask_BT is not None:
        deviation = deviation.masked_fill(~mask_BT.to(x_BTU.device)[..., None], 0)
    return deviation.square().sum(1) / count_B1


def reduce_rows(sums: list[Tensor], num_rows: int, reduction: Reduction) -> Tensor:
    """Reduce over rows from the sums of |s|, s and s² → [U]."""
    absolute, plain, squared = sums
    if reduction == "l2":
        return squared.sqrt()
    if reduction == "mean":
        return absolute / num_rows
    return (squared / num_rows - (plain / num_rows).square()).clamp(min=0)


def _random_scores(spec: ArchSpec, config: PretrainedConfig, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = spec.sizes(config)
    axes = {
        axis.name: torch.rand(spec.units(axis.name, sizes), generator=generator)
        for axis in spec.axes
        if axis.prunable and axis.name != "layers"
    }
    blocks = torch.rand(sizes["layers"], sizes["layers"], generator=generator)
    return axes, blocks.masked_fill(torch.ones_like(blocks, dtype=torch.bool).tril(-1), torch.nan)
