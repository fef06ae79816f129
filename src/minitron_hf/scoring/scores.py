"""`ImportanceScores`: scores of units, channels and layers, and their file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import MinitronError, MismatchError, UnsupportedModelError
from ..families import ArchSpec, named_tensors
from ..files import digest, replacing_file, versions
from ..formats import FORMATS, migrate
from ..models import architecture_digest
from ..weights import model_digest, on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Name of a registered metric, see `minitron_hf.scoring.metrics`.
Metric = str
SCORES_NAME = "scores.safetensors"


def require_finite(spec: ArchSpec, model: PreTrainedModel, axes: Mapping[str, Tensor]) -> None:
    """Refuse scores that are NaN or infinite, from which a plan would keep arbitrary units.

    Args:
        spec: the family's table.
        model: the model that was scored.
        axes: as in `ImportanceScores`; NaN where a layer has no such unit is allowed.

    Raises:
        UnsupportedModelError: naming the axis.
    """
    names, sizes = named_tensors(model), spec.layer_sizes(model.config)
    for axis, values in axes.items():
        if spec.axis[axis].per_layer:
            own = [
                values[layer][tuple(map(slice, spec.own_units(axis, sizes[layer])))]
                for layer in spec.layers_with(axis, names)
            ]
        else:
            own = [values]
        if not all(each.isfinite().all() for each in own):
            raise UnsupportedModelError(
                f"Importance scores of {axis!r} are not finite: the model computes NaN or infinities. Check its "
                "weights, or score it in a wider dtype (dtype='float32')."
            )


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of one model: a higher score means a more important unit or layer.

    Attributes:
        axes: axis → float32 scores: `[units]` for axes chosen once for the whole model (hidden), `[layers, units]`
            for axes chosen in every layer (ffn, heads, kv), `[layers, outer, units]` for axes chosen inside every
            unit of another (the neurons of every expert). NaN in the rows of layers that have no such units.
        blocks: float32 [L, L]; entry (i, j ≥ i) is the importance of layers i..j together. By default it is their
            block importance, 1 − E[cos(input of layer i, output of layer j)] (arXiv 2407.14679 §2.2); otherwise the
            value of `settings["depth_metric"]` without them. NaN below the diagonal, and where it was not measured.
        settings: how the scores were made: metric, reductions, rows.
        digests: digests of `model` (weights), `architecture`, `tokenizer` and `data`.
        versions: versions of the libraries that made them.
        removals: float32 [N, L], where layers were removed one after another: row n holds the value of the model
            without the n layers removed before and each other layer; NaN for layers that are removed or protected. The
            layer with the smallest value of a row is removed.
        covariance: float32 [2, H, H], the mean over tokens of x xᵀ, where x is the input of a norm divided by its root
            mean square: over all norms, and of the last norm alone. None where it was not asked for
            (`hidden_covariance`).
    """

    axes: Mapping[str, Tensor]
    blocks: Tensor
    settings: Mapping[str, Any]
    digests: Mapping[str, str | None]
    versions: Mapping[str, str] = field(default_factory=versions)
    removals: Tensor | None = None
    covariance: Tensor | None = None

    @property
    def layers(self) -> Tensor:
        """Importance of every single layer, float32 [L]."""
        return self.blocks.diagonal()

    @property
    def removed_layers(self) -> list[int]:
        """The layers that were removed one after another, in order."""
        return [] if self.removals is None else [index_of_smallest(row) for row in self.removals.tolist()]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a file of scores, by name."""
        optional = {"removals": self.removals, "covariance": self.covariance}
        return {
            **self.axes,
            "blocks": self.blocks,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
        }

    @property
    def digest(self) -> str:
        """Digest of the scores themselves."""
        tensors = self.tensors
        return digest(*(part for name in sorted(tensors) for part in (name, tensors[name].numpy().tobytes())))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `scores.safetensors` (settings, digests and versions in its header)."""
        header = {
            "format": FORMATS[SCORES_NAME],
            "settings": self.settings,
            "digests": self.digests,
            "versions": self.versions,
            "content": self.digest,
        }
        path = Path(save_directory) / SCORES_NAME
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
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
            header = migrate(header, file, SCORES_NAME)
            blocks, *optional = (tensors.pop(name, None) for name in ("blocks", "removals", "covariance"))
            scores = cls(tensors, blocks, header["settings"], header["digests"], header["versions"], *optional)
            if header.get("content", scores.digest) != scores.digest:
                raise ValueError("its tensors are not those that were written")
            return scores
        except MinitronError:
            raise
        except Exception as error:
            raise MismatchError(
                f"{file} does not hold importance scores of minitron-hf: {error!r}. Make them with "
                "estimate_importance(…)."
            ) from error

    def require_model(self, model_or_config: PreTrainedModel | PretrainedConfig) -> None:
        """Refuse another model than the one that was scored.

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
                "These importance scores belong to a model of another architecture "
                f"({self.settings.get('model')}). Score this model with estimate_importance(…)."
            )
        if model is not None and not on_meta(model):
            require_weights(model, self.digests["model"], "These importance scores")


def require_weights(model: PreTrainedModel, expected: str | None, what: str) -> None:
    """Refuse a model whose weights differ from those that an artefact was made from.

    Args:
        model: the model.
        expected: digest of the weights that the artefact was made from; None skips the check.
        what: the artefact, as the subject of the message.

    Raises:
        MismatchError: if the digests differ.
    """
    if expected is not None and model_digest(model) != expected:
        raise MismatchError(
            f"{what} were made for other weights than this {type(model).__name__} has "
            f"({model.config.name_or_path or 'in memory'}). Make them again for this model."
        )


def index_of_smallest(values: Sequence[float]) -> int:
    """Index of the smallest value; NaN is ignored, ties go to the lower index."""
    return min((index for index, value in enumerate(values) if not math.isnan(value)), key=lambda i: values[i])
