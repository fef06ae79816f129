"""`PrunerConfig`: the sizes that a user asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import HubError, PlanError, accept_old_names, did_you_mean
from ..families import PRUNER_FIELDS, VOCABULARY_FIELD
from ..formats import read_artefact, write_artefact
from ..names import local_path

PRUNER_CONFIG_NAME = "pruner_config.json"

#: Fields of earlier versions → their names now.
OLD_NAMES = {"uneven": "nonuniform_sizes"}

#: Values of `PrunerConfig.repair`.
SEQUENTIAL = "sequential"
REPAIRS = ("least_squares", "least_squares_all", SEQUENTIAL)
#: Values of `PrunerConfig.hidden_basis`.
HIDDEN_BASES = ("principal",)

#: Fields that limit the student's parameters instead of giving sizes.
TARGETS = ("target_parameters", "target_active_parameters")

#: By how much of a budget or a target a shape may be smaller (as in the search spaces of Muralidharan et al. 2024).
TOLERANCE = 0.05

#: A size: units to keep, a fraction of the teacher's, or None for no change.
Size = int | float | None


@accept_old_names(**OLD_NAMES)
@dataclass
class PrunerConfig:
    """The student's sizes, under the standard config names.

    Each size is an `int` (units to keep), a `float` in (0, 1] (fraction of the teacher's), or None (unchanged).

    Attributes:
        hidden_size: width of the residual stream; one choice of channels for the whole model.
        intermediate_size: MLP neurons, chosen in every layer.
        num_attention_heads: query heads, chosen in every layer; every kept KV head keeps the same number.
        num_key_value_heads: KV heads (query groups), chosen in every layer.
        num_experts: routed experts, chosen in every layer.
        moe_intermediate_size: neurons of every routed expert, chosen in each.
        shared_expert_intermediate_size: neurons of the shared experts, chosen in every layer.
        conv_dim: channels of short convolutions, chosen in every layer. The stock classes need as many as
            channels of the residual stream, so the two sizes are pruned together.
        mamba_num_heads: state-space heads, chosen in every layer.
        mamba_head_dim: channels of every state-space head, chosen in each.
        num_hidden_layers: layers to keep.
        vocab_size: tokens to keep, chosen by their counts in a corpus (`count_tokens`). The student has a tokenizer of
            its own (`prune_tokenizer`). Not measured yet on a real teacher.
        layers_to_drop: explicit layer indices to drop, instead of a choice by scores.
        contiguous: drop one contiguous block of layers, the least important one of its length. Dropping the 16
            individually least important layers of Llama-3.1-8B left WinoGrande at chance, a contiguous block did not
            (Sreenivas et al. 2024, depth pruning). Of SmolLM2-135M, a block is better where up to 6 of 30 layers go,
            and single layers where 8 or more go (`benchmarks/results/real/starts-before`).
        keep_first_layers: number of first layers that a choice by scores never drops. The first layer matters most,
            which block importance does not always see (`benchmarks/results/depth.json`).
        keep_last_layers: number of last layers that a choice by scores never drops: 1, as in Sreenivas et al. 2024. In
            `benchmarks/results/depth.json` dropping the last layer harms one of two models the least.
        norm_compensation: after the hidden size was pruned, multiply the norms' weights by √(teacher's / student's).
            The student's norms divide by the root mean square of the kept channels; the factor compensates for that,
            exactly for RMSNorm and approximately for LayerNorm. After distillation it was better on two real models
            and equal on the third (`benchmarks/results/*-norm-compensation.json`).
        hidden_basis: `"principal"`: rotate the residual stream to its principal axes before the hidden size is pruned,
            so that the directions with the least energy go instead of single channels (`principal_basis`, for models
            with RMSNorm). None: keep single channels. Closer to the teacher before retraining on a real model
            (`benchmarks/results/real/before`), and not measured yet after distillation.
        head_add_back: add the difference to a dropped head to each kept head (Muralidharan et al. 2024, §2.2). With K
            of L heads kept, and heads ranked by importance, head i gains its difference to head 2K - i + 1, in all
            projections into it and out of it. If KV heads are shared, this is done for query heads within their
            group. The weights are merged, so the student no longer equals the masked teacher. Off: after the same
            distillation it was worse than plain pruning in every case (`benchmarks/results/*-repair.json`).
        repair: `"least_squares"`: refit the projections that read pruned neurons, heads and experts on calibration
            data, so that the kept units reproduce the outputs of the teacher's layers (`repaired_weights`). The last
            projection before dropped layers also takes over the linear part of what these added. It was better than
            plain pruning in every case of neurons and heads (`benchmarks/results/*-repair.json`) and where several
            layers are dropped, before retraining (`benchmarks/results/real/layers`). It is off because it needs
            calibration data beside the scores; `recommend` switches it on. `"least_squares_all"`: also refit the
            projections that read norms of pruned channels. `"sequential"`: refit all projections that write to the
            residual stream layer by layer, on the student's own activations, so that errors do not add up; what else
            reads pruned units as with `"least_squares"`. It needs teacher and student in memory. Students of
            SmolLM2-135M start 5 to 19 % closer to the teacher than with `"least_squares"`, and after 246k tokens of
            distillation they are no closer (`benchmarks/results/real/starts`, three seeds).
        nonuniform_sizes: names of sizes that may differ from layer to layer at the same total. Layers whose scores
            are spread over more units get more units. This needs a stock config with a list of sizes per layer. None
            by default: not measured yet on a real teacher.
        model_type: another stock class for the student. It must hold exactly the same model, but without a limit on
            sizes that the teacher's class has. For example, a Llama without biases is a Mistral without a window.
            The error about such a size suggests the class.
        multiple_of: fractions of `hidden_size` and of numbers of neurons are rounded to the nearest multiple. None: 8,
            and more for large sizes of the teacher, because kernels and quantisers need it: 64 from 2,048, 128 from
            4,096, 256 from 8,192. Numbers of units are never rounded.
        portable: take only sizes that every runtime loads. For some model types, some compute `head_dim` as
            hidden_size / num_attention_heads, or the neurons of an MLP as 4 × hidden_size (`families/runtimes.py`);
            for these, the sizes are cut together.
        target_parameters: maximum number of parameters of the student, or a fraction (< 1) of the teacher's.
            `prune_model` and `plan_for_target` then choose the sizes that are not given, by measuring shapes. All
            parts of a vision-language model count, also those that are not cut.
        target_active_parameters: the same for the parameters that one token uses (`count_active_parameters`), for
            mixtures of experts. With both targets, the student meets both.
        tolerance: fraction of a target by which the student may be smaller; it is never larger. The published search
            spaces of Muralidharan et al. 2024 took 5 %.
    """

    hidden_size: Size = None
    intermediate_size: Size = None
    num_attention_heads: Size = None
    num_key_value_heads: Size = None
    num_experts: Size = None
    moe_intermediate_size: Size = None
    shared_expert_intermediate_size: Size = None
    conv_dim: Size = None
    mamba_num_heads: Size = None
    mamba_head_dim: Size = None
    num_hidden_layers: Size = None
    vocab_size: Size = None
    layers_to_drop: list[int] | None = None
    contiguous: bool = True
    keep_first_layers: int = 1
    keep_last_layers: int = 1
    norm_compensation: bool = True
    hidden_basis: str | None = None
    head_add_back: bool = False
    repair: str | None = None
    nonuniform_sizes: list[str] = field(default_factory=list)
    model_type: str | None = None
    multiple_of: int | None = None
    portable: bool = False
    target_parameters: Size = None
    target_active_parameters: Size = None
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name in (*PRUNER_FIELDS, VOCABULARY_FIELD):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PlanError(f"{name}={value!r}: expected a number of units, a fraction to keep, or None.")
            if isinstance(value, float) and not 0 < value <= 1:
                raise PlanError(
                    f"{name}={value}: a fraction to keep lies in (0, 1]. For a number of units, pass an int."
                )
            if isinstance(value, int) and value < 1:
                raise PlanError(f"{name}={value}: at least one unit must be kept.")
        if self.layers_to_drop is not None:
            layers = self.layers_to_drop
            if not isinstance(layers, list | tuple | range) or not all(
                isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers
            ):
                raise PlanError(f"layers_to_drop={layers!r}: expected a list of layer indices, counted from 0.")
            self.layers_to_drop = list(layers)
            if len(set(self.layers_to_drop)) != len(self.layers_to_drop):
                raise PlanError(f"layers_to_drop={self.layers_to_drop} names a layer twice.")
        if not isinstance(self.nonuniform_sizes, list | tuple) or any(
            name not in [*PRUNER_FIELDS] for name in self.nonuniform_sizes
        ):
            raise PlanError(
                f"nonuniform_sizes={self.nonuniform_sizes!r}: expected a list of sizes, such as ['intermediate_size']."
            )
        self.nonuniform_sizes = list(self.nonuniform_sizes)
        for name in ("contiguous", "norm_compensation", "head_add_back", "portable"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name}={getattr(self, name)!r}: expected true or false.")
        if self.repair not in (None, *REPAIRS):
            raise PlanError(f"repair={self.repair!r} is unknown. Expected {' or '.join(map(repr, REPAIRS))}, or None.")
        if self.hidden_basis not in (None, *HIDDEN_BASES):
            expected = " or ".join(map(repr, HIDDEN_BASES))
            raise PlanError(f"hidden_basis={self.hidden_basis!r} is unknown. Expected {expected}, or None.")
        if self.model_type is not None and not isinstance(self.model_type, str):
            raise PlanError(f"model_type={self.model_type!r}: expected the name of a family.")
        for name in ("keep_first_layers", "keep_last_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise PlanError(f"{name}={value!r}: expected a number of layers.")
        multiple = self.multiple_of
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
            raise PlanError(f"multiple_of={multiple!r}: expected a positive integer, or None.")
        for name, target in self.targets.items():
            if isinstance(target, bool) or not isinstance(target, int | float) or not target > 0 or target == 1:
                raise PlanError(f"{name}={target!r}: expected a number of parameters, or a fraction below 1.")
        allowed = self.tolerance
        if isinstance(allowed, bool) or not isinstance(allowed, int | float) or not 0 <= allowed < 1:
            raise PlanError(f"tolerance={allowed!r}: expected a fraction of the target, at least 0 and below 1.")

    @property
    def targets(self) -> dict[str, int | float]:
        """The targets that are given, by their names."""
        values = {name: getattr(self, name) for name in TARGETS}
        return {name: value for name, value in values.items() if value is not None}

    def targets_in_words(self) -> str:
        """The targets as they were given, for messages."""
        return ", ".join(f"{name}={target:,}" for name, target in self.targets.items())

    def without_targets(self) -> PrunerConfig:
        """The same without targets: only the sizes that are given."""
        nothing: dict[str, Any] = dict.fromkeys(TARGETS)
        return replace(self, **nothing)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrunerConfig:
        """The reverse of `to_dict`.

        Raises:
            PlanError: if a name is unknown.
        """
        names = [one.name for one in fields(cls)]
        if unknown := sorted(map(str, set(values) - {*names, *OLD_NAMES})):
            raise PlanError(
                f"PrunerConfig has no field {', '.join(unknown)}.{did_you_mean(unknown, names)} "
                f"Expected: {', '.join(names)}."
            )
        return cls(**values)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `pruner_config.json`."""
        path = Path(save_directory) / PRUNER_CONFIG_NAME
        write_artefact(path, self.to_dict())
        return path

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **kwargs: Any) -> PrunerConfig:
        """Read `pruner_config.json` from a folder or a Hub repository.

        Args:
            path_or_repo: folder, file or Hub id.
            **kwargs: passed to `hf_hub_download` (`revision`, `token`, …).

        Raises:
            HubError: if it is neither a folder with such a file nor a Hub repository with one.
        """
        path = local_path(path_or_repo)
        file = path / PRUNER_CONFIG_NAME if path is not None and path.is_dir() else path
        if file is not None and not file.is_file():
            raise HubError(f"The folder {str(path)!r} has no {PRUNER_CONFIG_NAME}. Write it with save_pretrained.")
        if file is None:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                file = Path(hf_hub_download(str(path_or_repo), PRUNER_CONFIG_NAME, **kwargs))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
                raise HubError(
                    f"No {PRUNER_CONFIG_NAME} in {str(path_or_repo)!r}, here or on the Hub: {error}"
                ) from error
        values = read_artefact(file, PRUNER_CONFIG_NAME)
        return cls.from_dict({name: value for name, value in values.items() if name != "format"})
