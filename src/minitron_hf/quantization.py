"""Quantises the weights of a finished checkpoint, and saves it so that stock Transformers loads it.

Only weights are quantised; activations keep their dtype. Head, embeddings and norms stay as they are, and so do
projections that are not `nn.Linear`, such as GPT-2's and stacked experts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import DataError, MissingDependencyError, UnsupportedModelError, did_you_mean, shortened
from .file_digests import weights_digest
from .files import refuse_own_folder, replacing_folder, require_free
from .formats import QUANTIZATION_NAME, write_artefact
from .hardware import as_device, default_device
from .models import auto_class, cut_plan_files, empty_model, load_config, load_processor, load_tokenizer, stored_dtype
from .saving import save_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

#: Weights of int4 that share a scale, from the fewest scales to the most.
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Method:
    """A way to quantise weights.

    Attributes:
        help: in one line.
        package: that it needs, and the extra of this package that brings it, if one does.
        config: device, group size and modules to leave out → configuration of Transformers.
        has_groups: whether weights share a scale in groups.
    """

    help: str
    package: tuple[str, str | None]
    config: Callable[[torch.device, int, list[str]], Any]
    has_groups: bool = False


def _int8(device: torch.device, group_size: int, skipped: list[str]) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


def _int4(device: torch.device, group_size: int, skipped: list[str]) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    if device.type == "cuda":
        made: Any = Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d")
    else:  # torchao 0.18 packs four bits on accelerators alone
        made = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size))  # type: ignore[attr-defined]
    return TorchAoConfig(made, modules_to_not_convert=skipped)


def _bitsandbytes(**arguments: Any) -> Callable[[torch.device, int, list[str]], Any]:
    def make(device: torch.device, group_size: int, skipped: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**arguments, llm_int8_skip_modules=skipped or None)

    return make


@dataclass(frozen=True)
class _Targets:
    """What a method quantises of a model.

    Attributes:
        group_size: inputs that share a scale; 0 without groups.
        projections: paths of the linear projections that are quantised.
        undivided: paths of those that are not, because the size of groups does not divide their inputs.
        head: path of the output head, which is never quantised.
    """

    group_size: int
    projections: frozenset[str]
    undivided: list[str]
    head: list[str]

    @property
    def left_out(self) -> list[str]:
        """The modules to leave out. Such a list replaces the default of Transformers, which has the head."""
        return [*self.head, *self.undivided]


#: Name → method.
METHODS: Mapping[str, Method] = {
    "int8": Method("8 bits, a scale for every output (torchao)", ("torchao", "quantize"), _int8),
    "int4": Method(
        "4 bits, a scale for every group of inputs (torchao); made without CUDA, each weight takes a byte; made with "
        "CUDA, it needs CUDA",
        ("torchao", "quantize"),
        _int4,
        True,
    ),
    "bnb_int8": Method("LLM.int8() of bitsandbytes", ("bitsandbytes", None), _bitsandbytes(load_in_8bit=True)),
    "bnb_nf4": Method(
        "4-bit normal floats of bitsandbytes",
        ("bitsandbytes", None),
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    ),
}


def quantize_checkpoint(
    model: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    method: str = "int8",
    *,
    group_size: int | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a quantised copy of a checkpoint: the Auto class of the checkpoint loads it.

    Loading it needs the package of the method, too. Without a CUDA device, int4 holds its four bits in a byte each:
    the values are those of packed weights, the files are as large as those of int8.

    Args:
        model: folder or Hub id.
        output_dir: folder to write; the tokenizer or processor goes there, too.
        method: one of `METHODS`.
        group_size: inputs of a projection that share a scale (int4): 128, 64 or 32. By default the largest that
            divides the inputs of all projections; those that none divides are not quantised.
        revision: branch, tag or commit on the Hub.
        device: where to quantise; default CUDA if available.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        DataError: if the method or the group size is unknown.
        MissingDependencyError: naming the package that the method needs.
        UnsupportedModelError: if the model is quantised already, or has no projection that can be.
        OutputError: if the folder is not empty, or the model's own.
    """
    checked = require_method(method)
    refuse_own_folder(output_dir, model=model)
    config = load_config(model, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{os.fspath(model)} is quantised already. Give the checkpoint that it was made from."
        )
    targets = _targets(config, method, group_size)
    require_free(output_dir, overwrite=overwrite, model=model)
    if undivided := targets.undivided:
        logger.warning(
            "%s: %d of %d projections are not quantised, because their inputs are no multiple of %d: %s.",
            method, len(undivided), len(undivided) + len(targets.projections), targets.group_size,
            shortened(sorted(undivided)),
        )  # fmt: skip
    where = default_device() if device is None else as_device(device)
    quantization = checked.config(where, targets.group_size, targets.left_out)
    made = _quantised(model, config, method, quantization, where, revision)
    with replacing_folder(Path(output_dir)) as temporary:
        save_model(made, temporary, _processing_class(model, config, revision))
        # The plan says which of the teacher's tokens the copy of a student with a cut vocabulary has.
        for path in cut_plan_files(model, revision=revision) or ():
            shutil.copyfile(path, temporary / path.name)
        write_artefact(temporary / QUANTIZATION_NAME, {"method": method, "source_weights": weights_digest(model)})
    return Path(output_dir)


def _processing_class(model: str | os.PathLike[str], config: PretrainedConfig, revision: str | None) -> Any:
    """The processor of a model that reads images or sound, if it can be loaded; else the tokenizer."""
    from transformers import AutoModelForCausalLM

    if auto_class(config) is not AutoModelForCausalLM:
        with contextlib.suppress(DataError):
            return load_processor(model, revision=revision)
    return load_tokenizer(model, revision=revision)


def quantised_name(method: str) -> str:
    """Name of the student's quantised copy in an evaluation."""
    return f"student_{method}"


def require_quantizable(config: PretrainedConfig, method: str) -> None:
    """Refuse a model that a method cannot quantise, from its config alone.

    Raises:
        MinitronError: see `quantize_checkpoint`.
    """
    require_method(method)
    quantised_projections(config, method)


def quantised_projections(config: PretrainedConfig, method: str) -> tuple[int, frozenset[str]]:
    """Inputs that share a scale (0 without groups), and the paths of the projections that a method quantises.

    The package of the method is not needed.

    Raises:
        UnsupportedModelError: see `quantize_checkpoint`.
    """
    targets = _targets(config, method, None)
    return targets.group_size, targets.projections


def require_method(name: str) -> Method:
    """The method of a name.

    Raises:
        DataError: if there is none.
        MissingDependencyError: if its package is not installed.
    """
    if name not in METHODS:
        raise DataError(
            f"There is no method {name!r}.{did_you_mean(name, METHODS)} Expected one of {', '.join(METHODS)}."
        )
    package, extra = METHODS[name].package
    if importlib.util.find_spec(package) is None:
        command = package if extra is None else f"'minitron-hf[{extra}]'"
        raise MissingDependencyError(f"{name}: the package {package} is not installed. Run pip install {command}.")
    return METHODS[name]


def _targets(config: PretrainedConfig, method: str, given: int | None) -> _Targets:
    """What a method quantises, in groups of `given` inputs or of the largest size that divides them."""
    if given is not None and not METHODS[method].has_groups:
        raise DataError(f"group_size={given}: only int4 has groups. Leave it out.")
    if given is not None and given not in GROUP_SIZES:
        raise DataError(f"group_size={given}: expected one of {', '.join(map(str, GROUP_SIZES))}.")
    model = empty_model(config)
    head = model.get_output_embeddings()
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    widths = {path: module.in_features for path, module in linear.items() if module is not head}
    if not widths:
        raise UnsupportedModelError(
            f"None of the projections of this {type(model).__name__} is an nn.Linear, and no others are quantised."
        )
    heads = [path for path, module in model.named_modules() if module is head]
    if not METHODS[method].has_groups:
        return _Targets(0, frozenset(widths), [], heads)
    sizes = GROUP_SIZES if given is None else (given,)
    size = next((one for one in sizes if not any(width % one for width in widths.values())), sizes[-1])
    undivided = [path for path, width in widths.items() if width % size]
    if len(undivided) == len(widths):
        raise UnsupportedModelError(
            f"Groups of {size} divide the inputs of none of the projections. Take int8, or prune to multiples of 32."
        )
    return _Targets(size, frozenset(widths) - set(undivided), undivided, heads)


def _quantised(
    model: str | os.PathLike[str],
    config: PretrainedConfig,
    method: str,
    quantization: Any,
    device: torch.device,
    revision: str | None,
) -> Any:
    """The model, quantised while it is loaded."""
    packs = METHODS[method].has_groups and device.type == "cuda"  # torchao packs four bits for bfloat16 alone
    made = auto_class(config).from_pretrained(
        os.fspath(model),
        revision=revision,
        dtype=torch.bfloat16 if packs else stored_dtype(config) or torch.float32,  # also of what is not quantised
        quantization_config=quantization,
        device_map={"": device},
    )
    return made.eval()
