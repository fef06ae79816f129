"""`PruningPlan`: the kept units and layers of every axis, as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PretrainedConfig

from ..compat import CONFIG_NAME_KEY
from ..errors import MismatchError, OutputError
from ..families import VOCABULARY, families, wrapped_families
from ..files import digest, json_values, replacing_file, versions
from ..formats import FORMATS, PLAIN_FORMATS, number_of, read_artefact, write_artefact
from ..formats import INDICES_NAME as INDICES_NAME
from ..formats import PLAN_NAME as PLAN_NAME
from ..sizes.request import PrunerConfig
from ..vocabulary.ids import names_ids

#: What the names of arrays of partners begin with, beside the kept units, which go by their axis.
PARTNERS = "partners."
#: Names of the basis of the residual stream, and of the ids of an earlier cut of the vocabulary, in the same file.
BASIS, EARLIER_TOKENS = "hidden_basis", "earlier_tokens"


@dataclass(frozen=True)
class PruningPlan:
    """The kept units and layers of a student. A plan is complete, checked, and independent of weights.

    Attributes:
        model_type: model type of the family.
        teacher: `name_or_path`, `revision`, `digest` of the weights (None if planned from a config without scores),
            parameter counts, `config`.
        student: parameter counts, `config`.
        sizes: axis → {"teacher": size, "student": size}.
        layers_kept: teacher indices of the student's layers.
        kept: axis → int64 teacher indices of the kept units, ascending: `[units]` for axes of the whole model,
            `[kept layers, units]` for axes of each layer, `[kept layers, kept outer units, units]` for axes within
            another. Axes that are not pruned are absent. The entries of a layer without units of an axis are
            arbitrary. The entries of a layer that keeps fewer units than others end with -1.
        partners: axis → for each kept unit, the dropped unit whose difference is added to it (head add-back), in the
            shape of `kept`; -1 for none. Empty without `head_add_back`.
        scales: tensor pattern → factor on the kept values (of a norm weight together with the family's offset): the
            compensation of a hidden cut.
        basis: orthogonal matrix [H, H], float32, if the residual stream is rotated before the cut: channel c of the
            rotated stream is the sum of the teacher's channels, weighted by column c; None: it is not.
        pruner_config: the request.
        repair: method that refits output projections to the kept units; None: no repair. The plan does not hold the
            data.
        selection: metric that ranked the units; None if no units were ranked.
        scores: digest, settings and data digest of the scores used, or None.
        vocabulary: where the vocabulary is cut: digests of both tokenizers, the share of the corpus that the kept
            tokens make up, and the tokens per byte of both (`VocabularyCut.facts`).
        earlier_tokens: int64 [V], where an earlier round has cut the vocabulary, whose `vocabulary` this plan has: the
            id that the teacher of that round has of every token; None: no earlier round has.
        candidates: shapes that were compared for a target, best first: `name`, `request`, `num_parameters`,
            `proxy` (KL before retraining) and `behind` (difference to the best shape), with standard errors.
        notes: decisions that the user should know.
        versions: versions of the libraries that made the plan.
    """

    model_type: str
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, int]]
    layers_kept: tuple[int, ...]
    kept: Mapping[str, np.ndarray]
    pruner_config: Mapping[str, Any]
    partners: Mapping[str, np.ndarray] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    basis: np.ndarray | None = None
    repair: str | None = None
    selection: str | None = None
    scores: Mapping[str, Any] | None = None
    vocabulary: Mapping[str, Any] | None = None
    earlier_tokens: np.ndarray | None = None
    candidates: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def layers_dropped(self) -> tuple[int, ...]:
        """Teacher indices of the dropped layers."""
        return tuple(sorted(set(range(self.sizes["layers"]["teacher"])) - set(self.layers_kept)))

    def kept_in(self, layer: int | None) -> dict[str, np.ndarray]:
        """Kept units of every pruned axis in one teacher layer (None: outside the layers)."""
        position = None if layer is None else self.layers_kept.index(layer)
        kept = {
            axis: units if units.ndim == 1 else _drop_padding(units[position])
            for axis, units in self.kept.items()
            if units.ndim == 1 or position is not None
        }
        if layer is None and self.layers_dropped:
            kept["layers"] = np.array(self.layers_kept, dtype=np.int64)
        return kept

    def partners_in(self, layer: int | None) -> dict[str, np.ndarray]:
        """Like `kept_in`, but with each unit replaced by its partner, if any; empty if no unit has a partner."""
        if layer is None or not self.partners:
            return {}
        position, kept = self.layers_kept.index(layer), self.kept_in(layer)
        for axis, rows in self.partners.items():
            partners = rows[position][: len(kept[axis])]
            kept[axis] = np.where(partners < 0, kept[axis], partners)
        return kept

    @property
    def new_ids(self) -> dict[int, int] | None:
        """Token id → its new id in the student, where the vocabulary is cut; None where it is not."""
        if VOCABULARY not in self.kept:
            return None
        return {int(old): new for new, old in enumerate(self.kept[VOCABULARY])}

    @property
    def teacher_tokens(self) -> np.ndarray | None:
        """The (first) teacher's id of every token of the student, int64 [V]; None where all tokens stay."""
        return self.kept.get(VOCABULARY, self.earlier_tokens)

    def after_cut(self, earlier: PruningPlan) -> PruningPlan:
        """This plan of a later round, with the cut of the vocabulary in an earlier one."""
        return replace(self, vocabulary=earlier.vocabulary, earlier_tokens=earlier.teacher_tokens)

    def with_notes(self, *notes: str) -> PruningPlan:
        """The plan with further notes, without those that it has from an earlier call."""
        return replace(self, notes=(*self.notes, *(note for note in notes if note not in self.notes)))

    def with_whole_vocabulary(self) -> PruningPlan:
        """The same plan without its cut of the vocabulary: for comparisons on the teacher's tokens."""
        if VOCABULARY not in self.kept:
            return self
        inner = self.teacher["config"].get("text_config")
        spec = wrapped_families()[self.model_type, inner["model_type"]] if inner else families()[self.model_type]
        sizes, fields = self.sizes[VOCABULARY], spec.axis[VOCABULARY].fields

        def restored(config: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
            own = {name: teacher[name] for name in config if names_ids(name) or name in fields}
            text = config.get("text_config")
            return {**config, **own, **({"text_config": restored(text, teacher["text_config"])} if text else {})}

        return replace(
            self,
            kept={axis: units for axis, units in self.kept.items() if axis != VOCABULARY},
            sizes={**self.sizes, VOCABULARY: {**sizes, "student": sizes["teacher"]}},
            student={**self.student, "config": restored(self.student["config"], self.teacher["config"])},
            vocabulary=None,
        )

    def build_student_config(self, teacher: PretrainedConfig | None = None) -> PretrainedConfig:
        """The student's config as an object of the stock class.

        Args:
            teacher: the teacher's config, needed for model types with remote code; its class is used for the student.
        """
        from transformers import AutoConfig

        values = config_values(self.student["config"])
        model_type = values.pop("model_type")
        if teacher is not None and teacher.model_type == model_type:
            return type(teacher)(**values)
        return AutoConfig.for_model(model_type, **values)

    def to_dict(self) -> dict[str, Any]:
        """All fields except the indices of units, JSON-ready."""
        return {
            # An older version would take the tokens of an earlier round for kept units.
            "format": number_of(PLAN_NAME, is_plain=self.earlier_tokens is None),
            "versions": dict(self.versions),
            "model_type": self.model_type,
            "teacher": dict(self.teacher),
            "student": dict(self.student),
            "sizes": {axis: dict(sizes) for axis, sizes in self.sizes.items()},
            "layers_kept": list(self.layers_kept),
            "layers_dropped": list(self.layers_dropped),
            "pruner_config": dict(self.pruner_config),
            "scales": dict(self.scales),
            "repair": self.repair,
            "selection": self.selection,
            "scores": None if self.scores is None else dict(self.scores),
            **({} if self.vocabulary is None else {"vocabulary": dict(self.vocabulary)}),
            **({"candidates": [dict(one) for one in self.candidates]} if self.candidates else {}),
            "notes": list(self.notes),
        }

    @property
    def digest(self) -> str:
        """Digest of the teacher, the kept units and layers, and the repair."""
        return digest(
            self.teacher.get("digest"),
            self.student["config"],
            list(self.layers_kept),
            {axis: units.tolist() for axis, units in self.kept.items()},
            dict(self.scales),
            *([{axis: units.tolist() for axis, units in self.partners.items()}] if self.partners else []),
            *([{"repair": self.repair}] if self.repair else []),
            *([{"basis": digest(self.basis.tobytes())}] if self.basis is not None else []),
            *([{EARLIER_TOKENS: self.earlier_tokens.tolist()}] if self.earlier_tokens is not None else []),
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, with_request: bool = False) -> Path:
        """Write `pruning_plan.json`, and the kept indices, partners and basis in `pruning_plan.safetensors`.

        Args:
            save_directory: folder.
            with_request: write the sizes that were asked for as `pruner_config.json`, too. `pruning_plan.json` comes
                last in any case.
        """
        folder = Path(save_directory)
        whole = {BASIS: self.basis, EARLIER_TOKENS: self.earlier_tokens}
        with replacing_file(folder / INDICES_NAME) as temporary:
            save_file(
                {
                    **{axis: np.ascontiguousarray(units) for axis, units in self.kept.items()},
                    **{PARTNERS + axis: np.ascontiguousarray(units) for axis, units in self.partners.items()},
                    **{name: np.ascontiguousarray(array) for name, array in whole.items() if array is not None},
                },
                temporary,
                # One entry: safetensors writes several in any order.
                metadata={"minitron_hf": digest(self.digest, json_values(self.to_dict()))},
            )
        if with_request:
            PrunerConfig.from_dict(self.pruner_config).save_pretrained(folder)
        write_artefact(folder / PLAN_NAME, self.to_dict())
        return folder / PLAN_NAME

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan that `save_pretrained` wrote, from its folder or one of its two files there.

        Raises:
            OutputError: if there is none.
            MismatchError: if it is damaged or of another format.
        """
        folder = Path(folder)
        if folder.name in (PLAN_NAME, INDICES_NAME) and not folder.is_dir():
            folder = folder.parent
        elif folder.is_file():
            raise OutputError(
                f"{folder} is not a pruning plan. Expected a folder with {PLAN_NAME} and {INDICES_NAME}, as "
                "`minitron-hf plan` and `prune` write it, or one of these two files."
            )
        values = read_artefact(folder / PLAN_NAME)
        if "scales" not in values:
            raise MismatchError(f"{folder / PLAN_NAME} was written by an earlier version. Plan again.")
        try:
            with safe_open(folder / INDICES_NAME, "np") as stored:
                indices = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
                basis, earlier_tokens = indices.pop(BASIS, None), indices.pop(EARLIER_TOKENS, None)
                written_with = (stored.metadata() or {})["minitron_hf"]
            plan = cls(
                model_type=values["model_type"],
                teacher=values["teacher"],
                student=values["student"],
                sizes=values["sizes"],
                layers_kept=tuple(values["layers_kept"]),
                kept={axis: units for axis, units in indices.items() if not axis.startswith(PARTNERS)},
                partners={
                    name.removeprefix(PARTNERS): units for name, units in indices.items() if name.startswith(PARTNERS)
                },
                pruner_config=values["pruner_config"],
                scales=values["scales"],
                basis=basis,
                repair=values.get("repair"),  # unknown to plans of earlier versions
                selection=values["selection"],
                scores=values["scores"],
                vocabulary=values.get("vocabulary"),
                earlier_tokens=earlier_tokens,
                candidates=tuple(values.get("candidates", ())),
                notes=tuple(values["notes"]),
                versions=values["versions"],
            )
            # Sizes and notes say what the indices do. Plans of earlier versions vouch for the indices alone.
            known = [{**values, "format": number} for number in (FORMATS[PLAN_NAME], PLAIN_FORMATS[PLAN_NAME])]
            if written_with not in (plan.digest, *(digest(plan.digest, one) for one in known)):
                raise ValueError(f"{INDICES_NAME} was written with another {PLAN_NAME}")
            return plan
        except Exception as error:
            raise MismatchError(f"The pruning plan in {folder} is damaged ({error!r}). Plan again.") from error


def _drop_padding(units: np.ndarray) -> np.ndarray:
    """A row of `_pad_rows` without its padding."""
    return units[units >= 0] if units.ndim == 1 else units


def _config_to_dict(config: PretrainedConfig) -> dict[str, Any]:
    """A config as JSON values, the way `config.json` holds it; without the path that it was loaded from."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop(CONFIG_NAME_KEY, None)
    return values


def config_values(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a config class, from the JSON values of a plan: `config.json` tags infinite floats.

    >>> config_values({"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    {'time_step_limit': [0.0, inf]}
    """
    values: dict[str, Any] = json.loads(
        json.dumps(dict(plain)), object_hook=lambda value: float(value["__float__"]) if "__float__" in value else value
    )
    return values
