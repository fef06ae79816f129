"""Measures in a few seconds how fast this machine computes layers of a model, moves memory and writes to disk."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MinitronError, PlanError
from ..families import spec_for
from ..hardware import free_memory, has_fast_bf16, synchronize, training_device
from ..losses.heads import backbone_output
from ..models import count_parameters, empty_model
from ..publishing.markdown import byte_size
from ..scoring.activations import ActivationPass
from ..sizes.request import PrunerConfig
from ..sizes.student import student_config
from .costs import layer_flops

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Seconds that each measurement is repeated for, and bytes that are copied and written.
SECONDS, COPIED_BYTES, WRITTEN_BYTES = 0.2, 1 << 26, 1 << 25
#: Seconds after which a measurement ends in any case.
LONGEST = 3.0
#: Rows and inner width of the plain matrix product.
PRODUCT_ROWS, PRODUCT_WIDTH = 512, 1024
#: Equations that are solved to measure how fast that is.
SOLVED_WIDTH = 768
#: Bytes per parameter of a timed layer, its gradients and its copies; the share of the free memory that it may take;
#: the fewest tokens that are timed.
LAYER_BYTES, LARGEST_SHARE, LEAST_LENGTH = 12, 0.2, 256

#: What a model may raise that cannot be run with constants.
FAILURES = (MinitronError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True)
class Machine:
    """Speeds of this machine.

    Attributes:
        device: device that computes.
        dtype: dtype of training, and of models in memory.
        forward_flops: operations per second of forward passes through layers of the model, in `dtype`.
        scoring_flops: the same operations per second while activations are scored, which takes time besides.
        training_flops: operations per second of forward and backward passes.
        product_flops: operations per second of a plain matrix product in `dtype`.
        float32_flops: operations per second of a plain matrix product in float32.
        memory_traffic: bytes per second that are read and written.
        disk_traffic: bytes per second that reach the disk.
        memory: bytes that are free on the device.
        disk: bytes that are free in the run folder.
        notes: what could not be measured.
        solve_flops: operations per second of solving linear equations in float64, which a repair does; NaN: half of
            `float32_flops`.
    """

    device: str
    dtype: str
    forward_flops: float
    scoring_flops: float
    training_flops: float
    product_flops: float
    float32_flops: float
    memory_traffic: float
    disk_traffic: float
    memory: float
    disk: float
    notes: tuple[str, ...] = ()
    solve_flops: float = math.nan


def measure_machine(config: PretrainedConfig, folder: str | os.PathLike[str], *, length: int, rows: int) -> Machine:
    """Measure speeds with layers of a model's real shape, filled with constants.

    Args:
        config: the model's config.
        folder: run folder, or where it will be.
        length: tokens of a row in training.
        rows: rows of a pass.
    """
    device = training_device()
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    product = _product_rate(device, dtype)
    float32 = product if dtype is torch.float32 else _product_rate(device, torch.float32)
    notes: tuple[str, ...] = ()
    try:
        forward, scoring, training = _layer_rates(config, device, dtype, length, rows, product)
        if math.isnan(scoring):
            scoring = forward
            notes = (f"Scoring of {config.model_type} could not be timed; a plain forward pass was.",)
    except FAILURES as error:
        notes = (f"Layers of {config.model_type} could not be timed ({type(error).__name__}); plain products were.",)
        forward = scoring = training = product
    traffic, written, free = _copy_rate(device), *_disk(Path(folder))
    threads = torch.get_num_threads()
    processor = f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return Machine(
        name, str(dtype).removeprefix("torch."), forward, scoring, training, product, float32, traffic, written,
        free_memory(device), free, notes, _solution_rate(device),
    )  # fmt: skip


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call: the fastest of those that fit into `SECONDS`, but of four or more within `LONGEST`."""

    def once() -> float:
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start

    start = time.perf_counter()
    times = [once()]
    # The first call also sets things up, and others may use the machine too: the fastest of several counts.
    while time.perf_counter() - start < (SECONDS if len(times) > 3 else LONGEST) and len(times) < 20:
        times.append(once())
    return min(times)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    left = torch.full((PRODUCT_ROWS, PRODUCT_WIDTH), 0.01, dtype=dtype, device=device)
    right = torch.full((PRODUCT_WIDTH, 4 * PRODUCT_WIDTH), 0.01, dtype=dtype, device=device)
    return 8 * PRODUCT_ROWS * PRODUCT_WIDTH**2 / _timed(lambda: left @ right, device)


def _solution_rate(device: torch.device) -> float:
    """Operations per second of factors and solutions in float64, far fewer than those of products."""
    where = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    matrix = torch.eye(SOLVED_WIDTH, dtype=torch.float64, device=where)

    def solve() -> Any:
        return torch.linalg.lu_solve(*torch.linalg.lu_factor(matrix), matrix)

    return (2 / 3 + 2) * SOLVED_WIDTH**3 / _timed(solve, where)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _timed(lambda: target.copy_(source), device)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes per second that reach the disk of a folder, and its free bytes."""
    import shutil

    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    data = os.urandom(1 << 20)
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=there) as file:
        start = time.perf_counter()
        for _ in range(WRITTEN_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_BYTES / (time.perf_counter() - start), shutil.disk_usage(there).free
    return float("nan"), shutil.disk_usage(there).free


def _layer_rates(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, length: int, rows: int, product: float
) -> tuple[float, float, float]:
    """Operations per second of layers: forward, forward and scored (NaN if that fails), forward and backward."""
    small = student_config(config, PrunerConfig(num_hidden_layers=1, keep_first_layers=0, keep_last_layers=0))
    needed = LAYER_BYTES * count_parameters(small, embeddings=False)
    if needed > LARGEST_SHARE * free_memory(device):
        raise PlanError(f"A layer and its gradients take {byte_size(needed)}, too much for a measurement.")
    affordable = int(SECONDS * product / (12 * layer_flops(small, length)))  # tokens within the time of a measurement
    length = min(length, max(LEAST_LENGTH, affordable))
    rows = max(1, min(rows, affordable // length))
    flops = rows * length * layer_flops(small, length)
    model = constant_layers(small, device, dtype, trained=False)
    forward = flops / _timed(_passes(model, rows, length, dtype), device)
    try:
        scoring = flops / _timed(scored_pass(model, rows, length), device)
    except FAILURES:
        scoring = math.nan
    del model
    trained = constant_layers(small, device, torch.float32, trained=True)
    training = 3 * flops / _timed(_passes(trained, rows, length, dtype), device)
    return forward, scoring, training


def _passes(model: Any, rows: int, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """A forward pass, and a backward pass if the model is trained."""
    weight = next(parameter for parameter in model.parameters() if not parameter.is_meta)
    width = model.config.get_text_config().hidden_size
    x_BTH = torch.full((rows, length, width), 0.01, dtype=weight.dtype, device=weight.device)
    mixed = model.training and dtype is torch.bfloat16

    def run() -> None:
        autocast = torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=mixed)
        with torch.set_grad_enabled(model.training), autocast:
            states = backbone_output(model, inputs_embeds=x_BTH, use_cache=False).last_hidden_state
        if model.training:
            states.backward(torch.ones_like(states))

    return run


def scored_pass(model: Any, rows: int, length: int) -> Callable[[], None]:
    """A forward pass that is scored by `metric="activation"`."""
    observer = ActivationPass(spec_for(model.config), model, "mean")
    tokens = torch.zeros(rows, length, dtype=torch.long, device=model.get_input_embeddings().weight.device)

    def run() -> None:
        with torch.no_grad(), observer.hooks():
            observer.run({"input_ids": tokens})

    return run


def constant_layers(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, *, trained: bool) -> Any:
    """A model whose layers hold constants; its token embeddings are one number, and its head has no values."""
    model = empty_model(config)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in model.modules():
        if module is head and module is not embeddings:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = (1,) * parameter.ndim if module is embeddings else parameter.shape
            full = torch.full(shape, 0.01, dtype=dtype, device=device).expand(parameter.shape)
            setattr(module, name, nn.Parameter(full, requires_grad=trained and module is not embeddings))
        for name, buffer in list(module.named_buffers(recurse=False)):
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.full(buffer.shape, 1, dtype=kind, device=device))
    return model.train(trained)
