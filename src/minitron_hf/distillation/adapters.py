"""Adapters (PEFT) of a student: their base model on disk, merging, and the files beside them."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn

from ..compat import add_adapter, commit_hash, dequantised_weight
from ..errors import MinitronError, OutputError, UnsupportedModelError
from ..families.tensors import is_quantised
from ..files import replacing_folder
from ..losses.heads import base_model_of
from ..models import architecture_digest, empty_model, load_config
from .checks import refuse_wrapped_head
from .record import RECORD_NAME

#: Folder beside the checkpoints that holds the base model of their adapters.
BASE_NAME = "base_model"

#: Files of an adapter, and of a whole model. A loader that finds both puts the adapter on top of the model.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def source_name(model: Any) -> str | None:
    """Folder or Hub id that holds the weights of a model; None for a model that exists in memory only.

    A model that was pruned in this process, or whose config differs from the one in its folder, is not stored there:
    an adapter that names that folder would be loaded on top of another model.
    """
    config = getattr(model, "config", None)
    if config is None:
        return os.fspath(model)
    base = base_model_of(model)
    name = config.name_or_path or None
    if name is None or getattr(base, "pruning_plan", None) is not None:
        return None
    with contextlib.suppress(MinitronError):
        stored = load_config(name, revision=commit_hash(config))
        return name if architecture_digest(stored) == architecture_digest(base.config) else None
    return None


def save_base_model(student: Any, output_dir: str | os.PathLike[str], *, writes: bool) -> None:
    """Save the base model of an adapter before training, so that the adapter's checkpoints can name it.

    PEFT records where a base model was loaded from (`base_model_name_or_path`). A pruned model in memory has
    no such place.

    Args:
        student: the model, before the adapter is added.
        output_dir: the output folder of the run; the base goes into `base_model/` there.
        writes: whether this process writes files.

    Raises:
        OutputError: if the folder cannot be written.
        UnsupportedModelError: if the adapter is on the model already, which may have changed its weights.
    """
    if is_peft_model(student):
        raise UnsupportedModelError(
            "The student is an adapter (a PeftModel) on a model that exists in memory only, so its checkpoints "
            "could not be loaded. Pass the model itself and peft_config= to the trainer, which stores it; or call "
            "save_pretrained(folder) before the adapter is added, and put it on from_pretrained(folder)."
        )
    folder = Path(output_dir).resolve() / BASE_NAME
    if writes:
        with replacing_folder(folder) as temporary:
            student.save_pretrained(temporary)
    student.config.name_or_path = student.name_or_path = str(folder)


def with_adapters(model: Any, state_dict: Mapping[str, Tensor], config: Any) -> Any:
    """Build a `PeftModel` again from weights that were gathered.

    Args:
        model: the trained model, whose weights are not read.
        state_dict: all weights, by the names of `model`.
        config: of the base model.

    Returns:
        A `PeftModel` of plain weights.
    """
    whole: Any = empty_model(config)
    names = [model.active_adapter, *(name for name in model.peft_config if name != model.active_adapter)]
    whole = add_adapter(whole, copy.deepcopy(model.peft_config[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        whole.add_adapter(name, copy.deepcopy(model.peft_config[name]))
    whole.load_state_dict(state_dict, assign=True)
    return whole


def merged_copy(model: Any) -> Any:
    """A copy of a `PeftModel` with its adapter merged; the base model is dequantised first, if it is quantised.

    The adapter was trained on top of the quantised weights, so it is merged into their dequantised values, and the
    student computes the same as in training. It is as large as an unquantised model.
    """
    base = base_model_of(model)
    if not is_quantised(base):
        return copy.deepcopy(model).merge_and_unload()
    config = copy.deepcopy(base.config)
    del config.quantization_config
    active = model.active_adapter
    whole = add_adapter(empty_model(config), copy.deepcopy(model.peft_config[active]), adapter_name=active)
    state_dict = {}
    for name in whole.state_dict():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = dequantised_weight(module) if leaf == "weight" else getattr(module, leaf)
        state_dict[name] = tensor.detach().clone()
    whole.load_state_dict(state_dict, assign=True)
    return whole.merge_and_unload()


def adapter_type(teacher: Any) -> dict[str, str]:
    """Entry of a record for a teacher with an adapter; empty for other teachers."""
    if teacher is None or not is_peft_model(teacher):
        return {}
    return {"adapter": str(teacher.peft_config[teacher.active_adapter].peft_type.value)}


def disable_peft_card(model: Any) -> None:
    """Keep PEFT from replacing the run's model card by its own, which holds paths of this machine."""
    if is_peft_model(model):
        model.create_or_update_model_card = _no_card


def _no_card(output_dir: str) -> None:
    return None


def remove_replaced_model(folder: str | os.PathLike[str], *, adapter: bool) -> None:
    """Remove a merged student before its adapter is saved into the same folder, and the reverse.

    Raises:
        OutputError: if the folder holds a model or an adapter without the record of a distillation.
    """
    folder = Path(folder)
    patterns = MODEL_FILES if adapter else ADAPTER_FILES
    found = sorted(path for path in folder.glob("*") if any(fnmatch(path.name, pattern) for pattern in patterns))
    if found and not (folder / RECORD_NAME).is_file():
        raise OutputError(
            f"{folder} holds {', '.join(path.name for path in found)} of another model. A loader that finds an "
            "adapter and a model in one folder puts the adapter on top of the model. Choose another folder."
        )
    for path in found:
        path.unlink()


def refuse_unmergeable(config: Any, peft_config: Any) -> None:
    """Refuse an adapter that the loss would not see, or that could not be merged, before it is added to the student.

    It is added to an empty copy. Errors of PEFT are left to the attempt with the student itself.

    Raises:
        UnsupportedModelError: see `refuse_wrapped_head` and `refuse_split_tie`.
    """
    trial = copy.deepcopy(peft_config)
    if hasattr(trial, "init_lora_weights"):
        trial.init_lora_weights = False  # some are computed from the weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            student = base_model_of(add_adapter(empty_model(config), trial))
    except Exception:
        return
    refuse_wrapped_head(student)
    refuse_split_tie(student)


def refuse_split_tie(student: Any) -> None:
    """Refuse an adapter that trains the token embedding apart from the output head, where the model ties them.

    A stock model with `tie_word_embeddings` has one matrix for both, so a merged adapter would change the head too.

    Raises:
        UnsupportedModelError: naming what to do.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    # Transformers ties by the config of the whole model; that of a language model inside may lack the field.
    if not getattr(student.config, "tie_word_embeddings", False):
        return
    head = student.get_output_embeddings()
    wrapped = [module for module in student.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    ends = [module for module in wrapped if module is head or isinstance(_wrapped_module(module), nn.Embedding)]
    trained_as_one = len(ends) == 2 and all(
        isinstance(module, ModulesToSaveWrapper) and module.weight is head.weight for module in ends
    )
    if ends and not trained_as_one:
        raise UnsupportedModelError(
            "The adapter trains the token embedding or the output head, which are one matrix in this model "
            "(tie_word_embeddings): merged, the adapter would change both. Take both out of target_modules, "
            "modules_to_save and trainable_token_indices, or train the whole matrix: "
            "LoraConfig(modules_to_save=[the embedding], ensure_weight_tying=True)."
        )


def _wrapped_module(module: Any) -> Any:
    """The module that an adapter's layer wraps."""
    return getattr(module, "base_layer", None) or getattr(module, "original_module", None)
