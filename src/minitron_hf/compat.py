"""The one place for private and version-dependent names of other libraries.

A release may move or rename such a name without notice, so the rest of the package calls the functions of this file.
A method or attribute that one of our classes inherits, and overrides or uses on itself, cannot be wrapped; `INHERITED`
lists those. `tests/test_compat.py` finds private names elsewhere, and names those that the installed libraries lack.
Long because every such name stands in this one file, beside its reason.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from unittest import mock

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode  # torch 2.13: no public path
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # documented, without a public path
from torch.utils._pytree import tree_leaves as tree_leaves  # torch 2.13: no public path
from torch.utils._pytree import tree_map as tree_map

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class ForeignName(NamedTuple):
    """A private or version-dependent name of another library.

    Attributes:
        path: module, class where there is one, and the name.
        read_in: library and version whose source was read.
        why: what the name is needed for.
    """

    path: str
    read_in: str
    why: str


#: Names that our subclasses override, or use on themselves.
INHERITED: tuple[ForeignName, ...] = tuple(
    ForeignName(f"{owner}.{name}", read_in, why)
    for owner, read_in, names in (
        ("trl.SFTConfig", "trl 1.16", {"_VALID_DICT_FIELDS": "arguments that a command line gives as JSON"}),
        (
            "trl.SFTTrainer",
            "trl 1.16",
            {
                "_tag_names": "tags of the published model",
                "_name": "name of the method",
                "_paper": "paper of the method",
                "_prepare_dataset": "adds start tokens; leaves the rows of a teacher cache as they are",
                "_set_signature_columns_if_needed": "keeps the columns of a teacher cache",
                "_signature_columns": "names of the columns that are kept",
                "_save_checkpoint": "writes our manifest last, and no model card",
                "_metrics": "metrics since the last log, to resume exactly",
                "_total_train_tokens": "number of tokens seen, to resume exactly",
            },
        ),
        (
            "transformers.Trainer",
            "transformers 5.23",
            {
                "model_accepts_loss_kwargs": "counts the tokens of an optimizer step, by which the loss is divided",
                "loss_is_scaled_for_ga": "keeps the loss from being divided by the accumulation steps as well",
                "_loss_shifts_labels": "keeps the first label of a row, which is never a target, out of that count",
                "_prepare_inputs": "moves a batch to the device",
                "_get_output_dir": "parent folder of the checkpoints",
                "_load_from_checkpoint": "also loads our own state and renamed tensors, split over processes",
                "_load_best_model": "also loads tensors that are stored under other names",
                "_issue_warnings_after_load": "says nothing of tensors that are loaded after it",
                "_save_optimizer_and_scheduler": "gathers tensors that are split over processes",
                "_load_optimizer_and_scheduler": "loads our own state after DeepSpeed has loaded the model",
                "_push_from_checkpoint": "pushes the student instead of the whole output folder",
                "_tr_loss": "loss since the last log, to resume exactly",
                "_total_loss_scalar": "loss before the last log, to resume exactly",
                "_globalstep_last_logged": "step of the last log, to resume exactly",
                "save_model._internal_call": "tells whether the training loop calls it, or the user",
            },
        ),
    )
    for name, why in names.items()
)

#: Names that the functions below use; `uses` fills it in.
WRAPPED: list[ForeignName] = []


def uses(read_in: str, *paths: str) -> Callable[[Decorated], Decorated]:
    """Enter the names that a function uses into `WRAPPED`.

    Args:
        read_in: library and version whose source was read.
        *paths: as in `ForeignName`.
    """

    def entered(function: Decorated) -> Decorated:
        WRAPPED.extend(ForeignName(path, read_in, f"{function.__name__}()") for path in paths)
        return function

    return entered


# ---- Transformers: configs ----

#: Key under which older `config.json` files hold the name that the config was loaded by (transformers 5.23).
CONFIG_NAME_KEY = "_name_or_path"


@uses("transformers 5.23", "transformers.PretrainedConfig._commit_hash")
def commit_hash(config: Any) -> str | None:
    """Commit of the Hub repository that a config was loaded from; None where it is not known."""
    return getattr(config, "_commit_hash", None)


@uses("transformers 5.23", "transformers.PretrainedConfig._commit_hash")
def set_commit_hash(config: Any, commit: str | None) -> None:
    """Note the commit that a config was loaded from. Transformers leaves this attribute out of `config.json`."""
    config._commit_hash = commit


def note_commit(config: Any, repo_id: str, revision: str | None, filename: str, cache_dir: Any = None) -> None:
    """Note the commit of a config that was just loaded from the Hub: the name of its snapshot in the cache.

    Transformers before 5.23 did so itself.
    """
    if commit_hash(config) is None:
        found = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
        set_commit_hash(config, Path(found).parent.name if isinstance(found, str) else None)


@uses("transformers 5.23", "transformers.PretrainedConfig._attn_implementation")
def attention_implementation(config: Any) -> str | None:
    """Name of the attention function that a model with this config uses; the public argument can only be written."""
    return getattr(config, "_attn_implementation", None)


@uses(
    "transformers 5.23",
    "transformers.PretrainedConfig._attn_implementation",
    "transformers.PretrainedConfig._experts_implementation",
)
def use_same_kernels(config: Any, source: Any) -> None:
    """Have a config choose the same functions for attention and experts as another config of its class does."""
    config._attn_implementation = source._attn_implementation
    config._experts_implementation = source._experts_implementation
    # Both are set on the configs inside, too, whose models may know others.
    for name in config.sub_configs:
        inner, theirs = getattr(config, name, None), getattr(source, name, None)
        if inner is not None and theirs is not None:
            use_same_kernels(inner, theirs)


@contextlib.contextmanager
@uses(
    "transformers 5.23",
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
    "transformers.PretrainedConfig._experts_implementation",
)
def experts_computed_by(function: Callable[..., Tensor], configs: Iterable[Any]) -> Iterator[None]:
    """Compute stacked experts by another function, which takes module, states, expert indices and weights.

    Args:
        function: replaces the function that the configs choose.
        configs: those of the modules of experts.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = f"minitron_hf_{id(function)}"
    with contextlib.ExitStack() as stack:
        stack.callback(ALL_EXPERTS_FUNCTIONS.pop, name)
        ALL_EXPERTS_FUNCTIONS[name] = function
        for config in configs:
            stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = name
        yield


@uses("transformers 5.23", "transformers.integrations.moe._apply_gate")
def gate_function(experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The function that a module of stacked experts applies to [gate, up]; None for `act_fn(gate) * up`."""
    return getattr(experts, "_apply_gate", None)


# ---- Transformers: models ----


@uses("transformers 5.23", "transformers.PreTrainedModel._from_config")
def build_from_config(model_class: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Build a model of a given class; the public `from_config` belongs to the Auto classes, which choose the class."""
    return model_class._from_config(config, dtype=dtype)


@uses("transformers 5.23", "transformers.initialization.no_init_weights")
def no_init_weights() -> contextlib.AbstractContextManager[None]:
    """Leave new weights uninitialised, because all of them are replaced."""
    from transformers import initialization

    return initialization.no_init_weights()


@uses("tqdm 4.70", "tqdm.std.tqdm._instances")
def open_bars() -> Iterable[Any]:
    """The progress bars that are not closed."""
    from tqdm.std import tqdm

    return list(tqdm._instances)


@uses("transformers 5.23", "transformers.AutoModelForImageTextToText._model_mapping")
def has_image_text_class(config: PretrainedConfig) -> bool:
    """Whether Transformers has a class of `AutoModelForImageTextToText` for this config."""
    from transformers import AutoModelForImageTextToText

    return type(config) in AutoModelForImageTextToText._model_mapping


@uses("transformers 5.23", "transformers.AutoModelForMultimodalLM._model_mapping")
def sound_text_class(config: PretrainedConfig) -> Any:
    """`AutoModelForMultimodalLM`, where it has a class for this config; else None."""
    import transformers

    found = getattr(transformers, "AutoModelForMultimodalLM", None)  # not in Transformers 4.57
    return found if found is not None and type(config) in found._model_mapping else None


@uses("transformers 5.23", "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
def decoder_types() -> Iterable[str]:
    """Model types that have a causal language model in Transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@uses("transformers 5.23", "transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
def image_text_types() -> Iterable[str]:
    """Model types that turn images or sound, and text, into text."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", ())  # not in Transformers 4.57


@uses("transformers 5.23", "transformers.PreTrainedModel._no_split_modules")
def layer_class_names(model: Any) -> Iterable[str]:
    """Names of the classes of a model's layers."""
    return model._no_split_modules or ()


@uses("transformers 5.23", "transformers.PreTrainedModel._keys_to_ignore_on_save")
def names_not_saved(model: Any) -> list[str]:
    """Names of tensors that `save_pretrained` leaves out."""
    return list(model._keys_to_ignore_on_save or ())


@uses("transformers 5.23", "transformers.PreTrainedModel._keys_to_ignore_on_save")
def set_names_not_saved(model: Any, names: Sequence[str] | None) -> None:
    """Have `save_pretrained` leave tensors of one model out; None: those of its class."""
    if names is None:
        del model._keys_to_ignore_on_save
    else:
        model._keys_to_ignore_on_save = list(names)


@uses(
    "transformers 5.23",
    "transformers.PreTrainedModel._keep_in_fp32_modules",
    "transformers.PreTrainedModel._keep_in_fp32_modules_strict",
)
def is_kept_in_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether `from_pretrained` loads a tensor in float32 although a dtype is asked for."""
    patterns = [
        *((model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()),
        *((model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else ()),
    ]
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


@uses(
    "transformers 5.23",
    "transformers.core_model_loading.revert_weight_conversion",
    "transformers.modeling_utils.remove_tied_weights_from_state_dict",
)
def as_stored(model: Any, tensors: Mapping[str, Any], meta: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors under the names and in the layout of the family's checkpoints, tied ones once.

    Args:
        model: the model that the tensors belong to.
        tensors: its state dict.
        meta: for every name a tensor that tells by its storage which tensors are tied.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    once = remove_tied_weights_from_state_dict(dict(meta), model)
    return revert_weight_conversion(model, {name: tensors[name] for name in once})


@uses("transformers 5.23", "transformers.GenerationConfig.from_pretrained._from_model_config")
def generation_config_inside(folder: Path) -> GenerationConfig:
    """The generation settings in a folder's `config.json`, marked as read from there, as `from_pretrained` does it."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


@contextlib.contextmanager
@uses("transformers 5.23", "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref")
def without_deepspeed_config() -> Iterator[None]:
    """Have Transformers build whole models under DeepSpeed ZeRO-3, where it would split them over the processes."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


@contextlib.contextmanager
@uses(
    "transformers 5.23",
    "transformers.integrations.moe._can_use_grouped_mm",
    "transformers.masking_utils.find_packed_sequence_indices",
)
def without_value_checks() -> Iterator[None]:
    """Answer what Transformers asks of values, or of the kind of a tensor, as it is answered for rows on a device.

    Tensors without values cannot answer whether a row holds several documents. PyTorch's own product of groups has
    shapes in bfloat16 alone; Transformers' replacement has the same shapes in every dtype.
    """
    from transformers import masking_utils
    from transformers.integrations import moe

    def no(*_: Any) -> None:  # a mock of its own would keep the tensors that it is called with
        return None

    packed = mock.patch.object(masking_utils, "find_packed_sequence_indices", no)
    grouped = mock.patch.object(moe, "_can_use_grouped_mm", no)
    with packed, grouped:
        yield


@uses(
    "transformers 5.23",
    "torch.ops.transformers.grouped_mm_fallback",
    "torch.ops.transformers.grouped_mm_fallback_backward",
)
def grouped_products() -> tuple[Any, ...]:
    """Transformers' operators for the product of groups and for its backward pass, whose operations are counted."""
    from transformers.integrations import moe  # noqa: F401 (registers them)

    operators = torch.ops.transformers
    # The oldest supported releases register no operator for the backward pass.
    names = ("grouped_mm_fallback", "grouped_mm_fallback_backward")
    return tuple(getattr(operators, name) for name in names if hasattr(operators, name))


@functools.cache
@uses("transformers 5.23", "transformers.models.auto.auto_factory")
def loading_arguments() -> frozenset[str]:
    """Keyword arguments of `from_pretrained`. It takes most of them out of `**kwargs`: its source lists them."""
    from transformers import PreTrainedModel
    from transformers.models.auto import auto_factory

    source = inspect.getsource(PreTrainedModel.from_pretrained) + inspect.getsource(auto_factory)
    popped = re.findall(r"kwargs\.pop\(\"(\w+)\"", source)
    named = inspect.signature(PreTrainedModel.from_pretrained).parameters
    return frozenset({*popped, *named}) - {"cls", "pretrained_model_name_or_path", "model_args", "kwargs"}


# ---- Transformers and TRL: trainers ----


@uses("transformers 5.23", "transformers.Trainer._prepare_inputs")
def on_device(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the device of a trainer, as its training loop moves it."""
    return trainer._prepare_inputs(dict(batch))


@uses("accelerate 1.15", "accelerate.data_loader.BatchSamplerShard", "accelerate.data_loader.SkipBatchSampler")
def rows_in_last_batch(state: Any) -> int:
    """Number of rows of the data in the last batch of all processes; below 1 where it is full, or not known.

    Accelerate does not know it in the epoch that a resumed run begins in, of which the first batches are skipped.

    Args:
        state: `gradient_state` of the accelerator, within an epoch.
    """
    from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

    if state.remainder != -1:
        return state.remainder
    loader = state.active_dataloader
    sampler = loader.sampler if isinstance(loader.sampler, torch.utils.data.BatchSampler) else loader.batch_sampler
    while isinstance(sampler, SkipBatchSampler):
        sampler = sampler.batch_sampler
    if not isinstance(sampler, BatchSamplerShard) or sampler.drop_last or not sampler.batch_size:
        return -1
    parts = 1 if sampler.split_batches else sampler.num_processes
    return len(loader.dataset) % (sampler.batch_size * parts)


@uses("transformers 5.23", "transformers.TrainingArguments._n_gpu")
def on_one_device(args: Any) -> Any:
    """Arguments of a trainer, which uses one device in each process, however many GPUs a single one sees."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


@uses("trl 1.16", "trl.SFTTrainer._is_vision_dataset")
def trains_on_images(trainer: Any) -> bool:
    """Whether the training data of a trainer has images."""
    return trainer._is_vision_dataset


@uses("trl 1.16", "trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling")
def image_text_collator(**kwargs: Any) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
    """The collator of images and text of TRL's supervised trainer, which has no name at the top of the package."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    return DataCollatorForVisionLanguageModeling(**kwargs)


@uses("trl 1.16", "trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling")
def collates_images(collator: Any) -> bool:
    """Whether a collator is TRL's for images and text."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    return isinstance(collator, DataCollatorForVisionLanguageModeling)


@uses("trl 1.16", "trl.data_utils.get_dataset_column_names")
def column_names(dataset: Any) -> list[str]:
    """Columns of a dataset, streams included, whose columns may have to be read from the first row."""
    from trl.data_utils import get_dataset_column_names

    return get_dataset_column_names(dataset)


@uses(
    "transformers 5.23",
    "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK",
    "transformers.integrations.integration_utils.get_available_reporting_integrations",
)
def experiment_trackers() -> tuple[list[str], list[str]]:
    """Names that `report_to` accepts, and those among them whose package is installed."""
    from transformers.integrations import integration_utils

    return (
        list(integration_utils.INTEGRATION_TO_CALLBACK),
        list(integration_utils.get_available_reporting_integrations()),
    )


# ---- Several processes: TRL, Accelerate, DeepSpeed ----


@uses("trl 1.16", "trl.chat_template_utils.get_training_chat_template")
def has_training_template(tokenizer: Any) -> bool:
    """Whether a chat template marks the assistant's tokens, or TRL knows a version of it that does."""
    from trl.chat_template_utils import get_training_chat_template

    if tokenizer.chat_template is None:
        return False
    try:
        get_training_chat_template(tokenizer)
    except ValueError:  # of a template that TRL does not know
        return False
    return True


@uses("trl 1.16", "trl.chat_template_utils.get_training_chat_template")
def training_template(tokenizer: Any) -> str | None:
    """The chat template with which TRL finds the assistant's tokens; None: the tokenizer's own."""
    from trl.chat_template_utils import get_training_chat_template

    template: str | None = get_training_chat_template(tokenizer)
    return template


@uses("trl 1.16", "trl.trainer.utils.maybe_gather_lm_head_ctx")
def gathered_parameters(*parameters: Any) -> contextlib.AbstractContextManager[None]:
    """Gather parameters for direct access under DeepSpeed ZeRO-3; elsewhere do nothing."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


@uses("trl 1.16", "trl.models.utils.prepare_deepspeed")
def prepare_deepspeed(model: Any, accelerator: Any) -> Any:
    """Split a frozen model over the processes with DeepSpeed."""
    from trl.models import utils

    return utils.prepare_deepspeed(model, accelerator)


@uses("accelerate 1.15", "accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy")
def fsdp2_wrap_policy(plugin: Any, model: nn.Module) -> Callable[[nn.Module], bool] | None:
    """Tells which modules of a model Accelerate would shard one by one."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    return fsdp2_prepare_auto_wrap_policy(plugin, model)


@uses("accelerate 1.15", "accelerate.data_loader.DataLoaderStateMixin")
def is_prepared_loader(loader: Any) -> bool:
    """Whether `Accelerator.prepare` made this DataLoader."""
    from accelerate.data_loader import DataLoaderStateMixin

    return isinstance(loader, DataLoaderStateMixin)


@uses(
    "accelerate 1.15",
    "accelerate.commands.launch.launch_command",
    "accelerate.commands.launch.launch_command_parser",
)
def launch_processes(arguments: Sequence[str], signals: str) -> None:
    """Run `accelerate launch` in this process, so that its errors can be told in one message.

    Args:
        arguments: of the command.
        signals: names of signals that end all processes, separated by commas.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    parsed = launch_command_parser().parse_args(list(arguments))
    parsed.signals_to_handle = signals
    launch_command(parsed)


@uses("accelerate 1.15", "accelerate.Accelerator._original_forward")
def forward_before_autocast(model: Any) -> Any:
    """The forward method that `Accelerator.prepare` has put under autocast; None where it has not."""
    return getattr(model, "__dict__", {}).get("_original_forward")


@uses("accelerate 1.15", "accelerate.Accelerator._original_forward")
def forget_autocast(model: Any) -> None:
    """Drop the note that `Accelerator.prepare` has put a model's forward method under autocast."""
    model.__dict__.pop("_original_forward", None)


@uses("accelerate 1.15", "accelerate.Accelerator._is_accelerate_prepared", "accelerate.Accelerator._original_forward")
def forget_preparation(model: Any) -> None:
    """Let `Accelerator.prepare` wrap a model that it has prepared before, for evaluation alone or for another trainer.

    It would return the model as it is, without DDP. The forward method is the one before autocast again.
    """
    model.__dict__.pop("_is_accelerate_prepared", None)
    if (original := forward_before_autocast(model)) is not None:
        model.forward = original
        forget_autocast(model)


@uses("accelerate 1.15", "accelerate.hooks._hf_hook")
def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks by which Accelerate keeps the weights of a module elsewhere."""
    attached = getattr(module, "_hf_hook", None)
    return tuple(getattr(attached, "hooks", (attached,)))


# ---- PEFT ----


@uses("peft 0.21", "peft.tuners.tuners_utils.check_target_module_exists")
def is_target_module(peft_config: Any, name: str) -> bool:
    """Whether an adapter would be put on the module of this name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(peft_config, name))


@uses("peft 0.21", "peft.utils.integrations.dequantize_module_weight")
def dequantised_weight(module: nn.Module) -> Tensor:
    """The weight of a module, dequantised where it is quantised."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


@contextlib.contextmanager
@uses("transformers 5.23", "transformers.PreTrainedModel.is_gradient_checkpointing")
def without_checkpointing_warning() -> Iterator[None]:
    """Hide that an attribute of models is deprecated, which PEFT 0.21 reads of every model that gets an adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def add_adapter(model: Any, peft_config: Any, **kwargs: Any) -> Any:
    """`peft.get_peft_model` without a warning that no caller can act on, see `without_checkpointing_warning`."""
    from peft import get_peft_model

    with without_checkpointing_warning():
        return get_peft_model(model, peft_config, **kwargs)


@uses("transformers 5.23", "transformers.PreTrainedModel._hf_peft_config_loaded")
def has_injected_adapter(model: Any) -> bool:
    """Whether Transformers put an adapter into the layers of a model, which is then no `PeftModel`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


# ---- datasets and huggingface_hub ----


@uses("datasets 5.2", "datasets.Dataset._fingerprint")
def dataset_fingerprint(dataset: Any) -> str | None:
    """Fingerprint of a dataset, which follows from its source and all that was done to it; None for other data."""
    return getattr(dataset, "_fingerprint", None)


@uses("datasets 5.2", *(f"datasets.Dataset.{name}" for name in ("_data_files", "_fingerprint", "_format_type")))
def dataset_state(files: Iterable[str], fingerprint: str) -> dict[str, Any]:
    """What `state.json` of a saved dataset holds, for Arrow files that `datasets` has not written itself."""
    return {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": "numpy",
        "_output_all_columns": False,
        "_split": None,
    }


@uses("huggingface_hub 2.4", "huggingface_hub.errors.HfHubHTTPError")
def connection_error() -> type[Exception]:
    """The class of the Hub client's connection errors and time-outs.

    It is the first base of the client's HTTP errors; its module depends on the version (httpx, httpx2).
    """
    from huggingface_hub.errors import HfHubHTTPError

    base: Any = HfHubHTTPError.__bases__[0]
    return base


# ---- torch ----

#: Operators without a public name (torch 2.13): a cast or move, a view of a contiguous result, and attention on a CPU.
CAST = torch.ops.aten._to_copy.default
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@uses("torch 2.13", "torch._ops.OpOverload._schema")
def is_in_place(operator: Any) -> bool:
    """Whether an operator changes one of its arguments."""
    return operator._schema.is_mutable


@uses("torch 2.13", "torch._ops.OpOverload._overloadpacket")
def operator_of(overload: Any) -> Any:
    """The operator that an overload belongs to, the key of PyTorch's table of operations."""
    return overload._overloadpacket


@uses("torch 2.13", "torch.Tensor._make_wrapper_subclass")
def wrapper_tensor(tensor_class: Any, like: Tensor, device: torch.device) -> Any:
    """A tensor of a subclass without memory of its own, with the shape, strides and dtype of another tensor."""
    return torch.Tensor._make_wrapper_subclass(
        tensor_class,
        like.shape,
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        device=device,
    )


@uses("torch 2.13", "torch.UntypedStorage._cdata")
def storage_id(tensor: Tensor) -> int:
    """Identity of a tensor's storage; on the meta device all data pointers are zero."""
    return tensor.untyped_storage()._cdata


@uses("torch 2.13", "torch.nn.Module._apply")
def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of a module by a function of it, tied ones once."""
    module._apply(function)
