"""Runs a training step on tensors without values, and counts its operations and the bytes of its activations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..allocations import AllocationCounter
from ..compat import (
    FakeTensorMode,
    add_adapter,
    without_value_checks,
)
from ..errors import MinitronError, PlanError
from ..losses.heads import backbone_output, base_model_of
from ..models import auto_class, empty_model, first_line
from .checks import freeze_embeddings
from .fake_quantization import ROUNDINGS
from .fake_rounding import seem_rounded
from .gpu_data_sheets import DEVICES, Device

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Bytes of the optimizer's states per trained parameter.
OPTIMIZERS: Mapping[str, int] = {"adamw": 8, "adamw_8bit": 2}
#: Accelerate configuration → kinds of memory that it splits over the devices.
SHARDINGS: Mapping[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp2": ("student", "gradients", "optimizer", "teacher"),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("student", "gradients", "optimizer", "teacher"),
}


@dataclass(frozen=True)
class Setup:
    """How a student is to be distilled.

    Attributes:
        devices: number of devices.
        device: type of the devices.
        sharding: one of `SHARDINGS`.
        batch_size: B on each device, per pass.
        max_length: T.
        activation_checkpointing: whether activations within layers are computed anew in the backward pass.
        optimizer: one of `OPTIMIZERS`.
        lora_rank: of an adapter on all linear layers, trained instead of the weights; None trains all.
        cached_top_k: tokens per position of a teacher cache; None trains with the teacher itself.
        accumulates: whether a step has several passes, so that gradients exist before a pass; else each pass makes
            them anew, while its activations go (one device).
        fake_quantization: as in `DistillationConfig`; a pass keeps a rounded copy of every projection.
        freeze_embeddings: as in `DistillationConfig`.
    """

    devices: int = 1
    device: Device = DEVICES["h100"]
    sharding: str = "ddp"
    batch_size: int = 1
    max_length: int = 1024
    activation_checkpointing: bool = True
    optimizer: str = "adamw"
    lora_rank: int | None = None
    cached_top_k: int | None = None
    accumulates: bool = True
    fake_quantization: str | None = None
    freeze_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "batch_size", "max_length", "lora_rank", "cached_top_k"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1
            if value is not None and value < least:
                raise PlanError(f"{name}={value!r}: expected at least {least}.")
        words = {"sharding": SHARDINGS, "optimizer": OPTIMIZERS, "fake_quantization": (None, *ROUNDINGS)}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise PlanError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(str, known))}.")
        if not self.accumulates and self.devices > 1:
            raise PlanError("accumulates=False is estimated on one device.")
        if self.device.memory <= 0:
            raise PlanError(f"A device with {self.device.memory:g} bytes of memory holds nothing.")
        if self.device.type == "cpu" and (self.devices > 1 or self.sharding != "ddp"):
            raise PlanError("On a CPU, one process with sharding='ddp' is estimated.")
        if self.sharding.startswith("zero") and self.lora_rank is not None:
            raise PlanError("lora_rank: an adapter is estimated with ddp and fsdp2, not with DeepSpeed.")
        if self.fake_quantization and (self.lora_rank is not None or self.sharding != "ddp"):
            raise PlanError(
                "fake_quantization trains all weights, on one device or with ddp: no lora_rank, no sharding."
            )
        if self.freeze_embeddings and self.lora_rank is not None:
            raise PlanError("freeze_embeddings: an adapter leaves embeddings and head alone. Leave one out.")

    @property
    def trains_head(self) -> bool:
        """Whether the output head gets gradients."""
        return self.lora_rank is None and not self.freeze_embeddings

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in matrix products: bfloat16 on accelerators."""
        return 4 if self.device.type == "cpu" else 2

    @property
    def stored_bytes(self) -> int:
        """Bytes of a student's weight in a pass: float32 where all weights are trained under autocast."""
        return 4 if self.device.type == "cpu" or (self.sharding == "ddp" and self.lora_rank is None) else 2


@dataclass(frozen=True)
class Passes:
    """Bytes and operations of the passes on one device, as functions of the number of rows.

    Attributes:
        bytes_of: phase → for each moment (bytes without rows, bytes per row), without weights and their gradients.
        flops_per_row: FLOPs of all products outside the loss, including recomputed ones.
        student_bytes: bytes of the student's weights in a pass, with the adapter.
        parameters: number of the student's parameters, with the adapter.
        trained: number of trained parameters.
        teacher_bytes: bytes of the teacher's weights.
    """

    bytes_of: Mapping[str, list[tuple[int, int]]]
    flops_per_row: float
    student_bytes: int
    parameters: int
    trained: int
    teacher_bytes: int

    def peaks(self, batch_size: int) -> dict[str, int]:
        """Phase → peak bytes; `waiting` is what the student's forward pass keeps for the backward pass."""
        at = {
            name: [fixed + batch_size * per_row for fixed, per_row in moments]
            for name, moments in self.bytes_of.items()
        }
        return {"waiting": at[FORWARD][-1], **{name: max(moments) for name, moments in at.items()}}


# ---- Passes on fake tensors ----

TEACHER, FORWARD, LOSS, BACKWARD = "teacher's forward pass", "student's forward pass", "loss", "backward pass"


def run_on_fakes(teacher: PretrainedConfig, student: PretrainedConfig, setup: Setup) -> Passes:
    """Run the models' passes over rows without values, as the trainer does, and count bytes and operations.

    Raises:
        PlanError: if a model depends on values.
        UnsupportedModelError: if Transformers cannot build it.
    """
    for config in (teacher, student):
        empty_model(config)  # refuses a config that cannot be built, with the reason
    try:
        with without_value_checks(), FakeTensorMode(allow_non_fake_inputs=True):
            return _run_passes(teacher, student, setup)
    except MinitronError:
        raise
    except Exception as error:
        raise PlanError(
            f"A step of {student.model_type} cannot be run without values, so its memory is unknown "
            f"({first_line(error)}). Measure one step on a device instead."
        ) from error


def _run_passes(teacher: PretrainedConfig, student: PretrainedConfig, setup: Setup) -> Passes:
    dtype_of = {2: torch.bfloat16, 4: torch.float32}
    model = build_fake_model(student, dtype_of[setup.stored_bytes], setup.lora_rank).train()
    if setup.fake_quantization:
        seem_rounded(model, setup.fake_quantization)
    if setup.freeze_embeddings:
        freeze_embeddings(model)
    if setup.activation_checkpointing:
        checkpoint_activations(model, with_frozen_weights=bool(setup.lora_rank))
    frozen = None
    if setup.cached_top_k is None:
        frozen = build_fake_model(teacher, dtype_of[setup.compute_bytes]).eval().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained if setup.accumulates else ():
        parameter.grad = torch.empty_like(parameter)
    # Two and three rows: some operations make no copies of a single row.
    mixed = setup.device.type != "cpu"
    (two, flops_of_two), (three, flops_of_three) = (
        count_pass(model, frozen, rows, setup.max_length, mixed=mixed) for rows in (2, 3)
    )
    if any(len(two[name]) != len(three[name]) for name in two):
        raise PlanError(
            f"The operations of {student.model_type} depend on the batch, so its memory cannot be estimated."
        )
    return Passes(
        {name: [(3 * a - 2 * b, b - a) for a, b in zip(two[name], three[name], strict=True)] for name in two},
        flops_of_three - flops_of_two,
        _weight_bytes(model),
        model.num_parameters(),
        sum(parameter.numel() for parameter in trained),
        0 if frozen is None else _weight_bytes(frozen),
    )


def checkpoint_activations(model: Any, *, with_frozen_weights: bool) -> None:
    """Have a model compute the activations within its layers anew in the backward pass.

    Args:
        model: the model.
        with_frozen_weights: whether its embeddings are not trained, so that the graph has to begin at their output.
    """
    base = base_model_of(model)
    # Transformers 5 renamed it on the way.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    if with_frozen_weights:
        model.enable_input_require_grads()


def count_pass(
    model: Any, frozen: Any, batch_size: int, max_length: int, *, mixed: bool
) -> tuple[dict[str, list[int]], int]:
    """Phase → bytes whenever there is a new storage, and FLOPs, of a pass without the loss.

    Gradients that exist already are not counted; others are.

    Args:
        model: the student, in training mode.
        frozen: the teacher, or None.
        batch_size: rows.
        max_length: tokens of each.
        mixed: whether products are computed in bfloat16 (autocast).
    """
    tokens = torch.zeros(batch_size, max_length, dtype=torch.long)
    positions = torch.arange(tokens.numel()).reshape(tokens.shape)[:, :-1].reshape(-1)
    tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    if frozen is not None:
        tensors += [*frozen.parameters(), *frozen.buffers()]

    def states(network: Any) -> Tensor:
        output = backbone_output(base_model_of(network), input_ids=tokens, use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, positions)

    moments: dict[str, list[int]] = {}
    with AllocationCounter(tensor for tensor in tensors if tensor is not None) as counted:

        def end_of(phase: str) -> None:
            moments[phase], counted.moments = [*counted.moments, counted.live], []

        # As on an accelerator, though these tensors seem to be on a CPU.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            if frozen is not None:
                with torch.no_grad():
                    teacher_states = states(frozen)
                end_of(TEACHER)
            h_NH = states(model)
            end_of(FORWARD)
        if frozen is not None:
            del teacher_states
        gradient = torch.empty_like(h_NH)
        h_NH.backward(gradient)
        end_of(BACKWARD)
    return moments, counted.flops


def _weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def build_fake_model(config: PretrainedConfig, dtype: torch.dtype, lora_rank: int | None = None) -> Any:
    """A model, with an adapter if `lora_rank` is given, whose tensors report the CPU as their device."""
    with torch.device("meta"):
        # A copy, because building a model may write its attention implementation into the config.
        model: Any = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
        if lora_rank is not None:
            from peft import LoraConfig

            adapter = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = add_adapter(model, adapter, low_cpu_mem_usage=True)
    seeming: dict[int, Tensor] = {}
    kept = []  # so that no identity is given twice
    for module in model.modules():
        own = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*module.named_parameters(**own), *module.named_buffers(**own)]:
            if id(tensor) not in seeming:
                kept.append(tensor)
                new = torch.empty_like(tensor, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                seeming[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
            setattr(module, name, seeming[id(tensor)])
    return model
