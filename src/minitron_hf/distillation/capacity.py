"""Memory per device and tokens per second of distillation, estimated from two configs.

The models' passes are run on fake tensors, which have shapes and no values: every allocation and every product is
counted, whatever the architecture. At a given length the bytes at each moment are linear in the number of rows, so two
passes give them for any batch. Bytes between passes, sharding, and the chunks of the loss are computed by formulas
(ZeRO: arXiv 1910.02054 §3).

Legend: B rows, T tokens of a row, N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..data.context import row_limit
from ..errors import PlanError, checks_kinds
from ..families import spec_for
from ..losses.chunks import default_chunk_size
from ..models import count_parameters, empty_model
from .fake_runs import BACKWARD, LOSS, OPTIMIZERS, SHARDINGS, Passes, Setup, run_on_fakes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Assumed fraction of the memory for the driver, workspaces of libraries and fragmentation.
RESERVE = 0.08
#: Assumed fraction of the device's FLOP/s that is reached; large dense models reach 0.35 to 0.5.
UTILISATION = 0.4


@dataclass(frozen=True)
class Capacity:
    """Memory and speed of a setup, per device.

    Attributes:
        parts: kind of memory → bytes at the moment of peak memory.
        worst_moment: the phase with the peak memory.
        max_length: tokens of a row, at most the context of both models.
        memory: usable bytes: the device's memory without `RESERVE`.
        largest_batch: the largest B that fits; 0 if none does.
        tokens_per_second: estimate for all devices together; communication overlaps with computation, and the slower
            one counts. None if the device's speed is unknown.
        limited_by: the slower one: `products` or `communication`.
        assumptions: assumptions of the estimate, in words.
    """

    parts: Mapping[str, int]
    worst_moment: str
    max_length: int
    memory: float
    largest_batch: int
    tokens_per_second: float | None
    limited_by: str | None
    assumptions: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the usable memory."""
        return self.peak <= self.memory


@checks_kinds
def estimate_capacity(
    teacher_config: PretrainedConfig,
    student_config: PretrainedConfig,
    setup: Setup | None = None,
    *,
    cuts_vocabulary: bool = False,
) -> Capacity:
    """Estimate memory and speed of distilling a student from a teacher, from their configs alone.

    Args:
        teacher_config: the teacher's config.
        student_config: the student's config.
        setup: devices and settings of the distillation; default: one H100.
        cuts_vocabulary: whether a plan with `vocab_size` leaves the student fewer of the teacher's tokens.

    Raises:
        PlanError: if a model cannot be run on tensors without values, or the two have different vocabularies.
        UnsupportedModelError: if a family is unknown, or Transformers cannot build a model.
    """
    setup = setup or Setup()
    sizes = [config.get_text_config().vocab_size for config in (teacher_config, student_config)]
    if sizes[0] < sizes[1] or (sizes[0] != sizes[1] and not cuts_vocabulary):
        raise PlanError(f"The teacher has {sizes[0]} tokens and the student {sizes[1]}: expected the same vocabulary.")
    length, lowered = row_limit(setup.max_length, teacher=teacher_config, student=student_config)
    setup = replace(setup, max_length=length or setup.max_length)
    passes = run_on_fakes(teacher_config, student_config, setup)
    resident = resident_bytes(teacher_config, student_config, setup, passes)
    memory = setup.device.memory * (1 - RESERVE)

    def at(batch_size: int) -> tuple[dict[str, int], str]:
        loss = loss_bytes(teacher_config, student_config, setup, batch_size * (setup.max_length - 1))
        peaks = passes.peaks(batch_size)
        waiting = peaks.pop("waiting")
        peaks[LOSS] = waiting + loss
        if not setup.accumulates and setup.trains_head:  # the loss has made the gradient of the head
            peaks[BACKWARD] += 4 * sizes[1] * student_config.get_text_config().hidden_size
        worst = max(peaks, key=peaks.__getitem__)
        chunks = loss if worst == LOSS else 0
        return {**resident, "activations": peaks[worst] - chunks, "loss chunks": chunks}, worst

    def fits(batch_size: int) -> bool:
        return sum(at(batch_size)[0].values()) <= memory

    parts, worst = at(setup.batch_size)
    speed, limit = _speed(teacher_config, student_config, setup, passes)
    assumptions = [
        f"{RESERVE:.0%} of the memory is left for the driver and fragmentation",
        "gradients of an earlier pass exist already, as with gradient accumulation"
        if setup.accumulates
        else "a step has one pass, so the gradients of all weights come while activations go",
        "rows are full, and attention does not store its weights",
        *(["token embeddings and output head are not trained"] if setup.freeze_embeddings else []),
        *([] if lowered is None else [f"rows have at most {length:,} tokens, the shorter context of the two models"]),
    ]
    if speed is not None:
        assumptions += [
            f"{UTILISATION:.0%} of the device's peak FLOP/s is reached: an estimate, no measurement",
            "all devices are in one machine; every pass communicates while it computes",
        ]
    return Capacity(parts, worst, setup.max_length, memory, _largest(fits), speed, limit, tuple(assumptions))


def _largest(fits: Any) -> int:
    """The largest number that fits, by bisection; 0 if none does."""
    low, high = 0, 1
    while high < 1 << 20 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- Arithmetic ----


def resident_bytes(
    teacher: PretrainedConfig, student: PretrainedConfig, setup: Setup, passes: Passes
) -> dict[str, int]:
    """Kind of memory → bytes on each device that stay between passes, including buffers of the sharding."""
    trained = passes.trained
    weights = passes.student_bytes if setup.lora_rank else 4 * passes.parameters
    whole = {
        "student": weights,
        "gradients": 4 * trained if setup.accumulates else 0,
        "optimizer": OPTIMIZERS[setup.optimizer] * trained,
        "teacher": passes.teacher_bytes,
    }
    if setup.sharding.startswith("zero"):  # bfloat16 weights and gradients; float32 copies with the optimizer
        whole |= {
            "student": 2 * passes.parameters,
            "gradients": 2 * trained,
            "optimizer": whole["optimizer"] + 4 * trained,
        }
    split = SHARDINGS[setup.sharding]
    parts = {name: -(-size // setup.devices) if name in split else size for name, size in whole.items()}
    if setup.devices == 1:
        return parts
    if setup.sharding == "ddp":
        parts["DDP's buckets"] = whole["gradients"]
    if "student" in split:
        layer, outer = _largest_layer(student)
        teacher_layer, teacher_outer = (0, 0) if setup.cached_top_k else _largest_layer(teacher)
        # This layer and the next one, and the gradient of this one; embeddings and heads stay for all of a pass.
        parts["gathered layers"] = 2 * (max(3 * layer, 2 * teacher_layer) + outer + teacher_outer)
    return parts


def loss_bytes(teacher: PretrainedConfig, student: PretrainedConfig, setup: Setup, num_tokens: int) -> int:
    """Bytes that `distillation_loss` adds to the states of N tokens, both heads and the gradients included."""
    device = torch.device(setup.device.type)
    vocab_size, width = student.get_text_config().vocab_size, student.get_text_config().hidden_size
    # A teacher with more tokens has logits of all of them, and of those that the student has.
    whole = teacher.get_text_config().vocab_size
    of_teacher = 0 if setup.cached_top_k else whole + (vocab_size if whole > vocab_size else 0)
    compute, stored = setup.compute_bytes, setup.stored_bytes
    dtype = torch.float32 if compute == 4 else torch.bfloat16
    num_chunks = -(-num_tokens // default_chunk_size(num_tokens, max(vocab_size, whole), device, dtype))
    logits = -(-num_tokens // num_chunks) * (vocab_size + of_teacher) * compute
    block = max(1, (torch.get_num_threads() << 17 if device.type == "cpu" else 1 << 23) // max(vocab_size, whole))
    softmaxes = min(block, num_tokens) * (4 * vocab_size + (whole if whole > vocab_size else 0)) * 4
    states = num_tokens * width * stored
    head = 4 * vocab_size * width if setup.trains_head else 0  # its gradient, summed in float32
    if setup.trains_head and compute != 4:
        head += compute * vocab_size * width  # one chunk's product
    if compute != stored:
        states += num_tokens * width * compute
        head += compute * vocab_size * width
    return logits + softmaxes + states + head


def _speed(
    teacher: PretrainedConfig, student: PretrainedConfig, setup: Setup, passes: Passes
) -> tuple[float | None, str | None]:
    """Tokens per second of all devices, and what limits them."""
    if setup.device.flops is None:
        return None, None
    seconds = {"products": step_flops(teacher, student, setup, passes) / (setup.device.flops * UTILISATION)}
    if setup.devices > 1 and setup.device.bandwidth is not None:
        seconds["communication"] = communicated_bytes(teacher, student, setup, passes) / setup.device.bandwidth
    limit = max(seconds, key=seconds.__getitem__)
    return setup.devices * setup.batch_size * setup.max_length / seconds[limit], limit


def step_flops(teacher: PretrainedConfig, student: PretrainedConfig, setup: Setup, passes: Passes) -> float:
    """FLOPs of one device's pass over B rows, the heads included: their logits, and the student's gradients."""
    vocab_size = student.get_text_config().vocab_size
    products = (3 if setup.trains_head else 2) * student.get_text_config().hidden_size * vocab_size
    text = teacher.get_text_config()
    products += 0 if setup.cached_top_k else text.hidden_size * text.vocab_size
    return setup.batch_size * (passes.flops_per_row + 2 * (setup.max_length - 1) * products)


def communicated_bytes(teacher: PretrainedConfig, student: PretrainedConfig, setup: Setup, passes: Passes) -> float:
    """Bytes that each device receives in one pass for reduced gradients and gathered weights, with ring algorithms."""
    share = (setup.devices - 1) / setup.devices
    if setup.sharding == "ddp":  # gradients reduced and handed on
        return share * 2 * 4 * passes.trained
    if setup.sharding == "zero2":  # gradients reduced, new weights gathered
        return share * 2 * 2 * passes.trained
    gathered = 2 * 2 * count_parameters(student) + (0 if setup.cached_top_k else 2 * count_parameters(teacher))
    return share * (gathered + (4 if setup.sharding == "fsdp2" else 2) * passes.trained)


def _largest_layer(config: PretrainedConfig) -> tuple[int, int]:
    """Parameters of the largest layer, and of everything outside the layers."""
    model = empty_model(config)
    layers = model.get_submodule(spec_for(config).layers_path)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers.children()]
    return max(sizes), count_parameters(model) - sum(sizes)
