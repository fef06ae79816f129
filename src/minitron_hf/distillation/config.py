"""`DistillationConfig`: the arguments of distillation, with defaults that fit the machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from ..errors import DataError, expected_instead
from ..hardware import has_fast_bf16, training_device
from ..losses.divergences import OF_LOGITS, require_divergence
from .fake_quantization import require_fake_quantization
from .intermediate import Distance

#: Logged values of which less is better: what `metric_for_best_model` names, with or without `eval_` or a dataset.
#: The last ones are metrics of lm-evaluation-harness, behind the name of a task.
SMALLER_IS_BETTER = (
    "loss", "divergence", "kl", "ce", "hidden", "embedding", "perplexity", "bits_per_byte", "brier_score",
)  # fmt: skip


@dataclass
class DistillationConfig(SFTConfig):
    """Arguments of `DistillationTrainer`: those of `trl.SFTConfig`, the ones below, and defaults that fit the machine.

    Loss of a token: `kd_weight * T² * divergence + ce_weight * cross-entropy + α * (hidden + embedding)`, by default
    KL(teacher ‖ student) alone; see `losses.distillation_loss` and `intermediate.IntermediateLosses`. In
    Muralidharan et al. 2024, the divergence alone was best if few layers are dropped, and all three terms if a quarter
    or more are dropped.

    By default `bf16` is on only if the hardware computes it, and `activation_checkpointing` and
    `dataloader_pin_memory` only with an accelerator. TRL turns all three on everywhere, which makes training on a CPU
    without bfloat16 units 50 to 100 times slower.

    With `hub_strategy="every_save"`, other processes wait for each upload, and abort after `ddp_timeout` (1,800 s).
    Raise it for uploads that take longer, or use `"end"`.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012 (as in the base class)

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence between the two distributions: 'forward_kl', KL(teacher || student), best of five in "
            "Muralidharan et al. 2024, table 15; 'reverse_kl', 'jsd' or 'tv'; or distance between the logits: "
            "'mse' or 'cosine'."
        },
    )
    jsd_beta: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the teacher in the mixture of the Jensen-Shannon divergence. 0.5 is its "
            "symmetric form; not measured yet on a real teacher."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature T of both distributions in the divergence, which is multiplied by T² (TRL does not): "
            "gradients keep their size when T changes. 1 was the best of 0.1, 0.5, 1 and 3 (Muralidharan et al. 2024, "
            "practice 5)."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Number of the teacher's most likely tokens that training compares, with all others together as "
            "one more outcome, as from a teacher cache with this top_k. If not set, the whole distributions. "
            "Evaluation compares the whole distributions in any case. k of 100 or less made students worse in "
            "Muralidharan et al. 2024, §3."
        },
    )
    kd_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the divergence KL(teacher || student), times temperature squared. Alone by default: "
            "Muralidharan et al. 2024, practice 5."
        },
    )
    ce_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy with the true tokens. 0 was better than 1 in Muralidharan et al. "
            "2024, table 15; here KL was lower, bits per byte higher (benchmarks/results/stories260K-losses.json). On "
            "a teacher of 135M the logits alone ended closer than cross-entropy alone "
            "(docs/explanation/real-teachers.md)."
        },
    )
    hidden_loss: str | None = field(
        default=None,
        metadata={
            "help": "Distance between hidden states of student and teacher: 'cosine', the best in Muralidharan et al. "
            "2024, table 17, or 'mse'. If not set, they are not compared: the logits alone are as good while less "
            "than a quarter of the layers go (the same, practices 6 and 7)."
        },
    )
    hidden_layers: list[list[int]] | str | None = field(
        default=None,
        metadata={
            "help": "Pairs [layer of the teacher, layer of the student] whose outputs are compared, counted from 0, "
            "or from the end if negative. On a command line as JSON. If not set, [[-3, -3]]: two before the last "
            "(Muralidharan et al. 2024, table 17)."
        },
    )
    embedding_loss: str | None = field(
        default=None,
        metadata={
            "help": "Distance between the embeddings' outputs: 'cosine' or 'mse'. If not set, not compared, as for "
            "hidden_loss (Muralidharan et al. 2024, practices 6 and 7)."
        },
    )
    intermediate_weight: str = field(
        default="dynamic",
        metadata={
            "help": "Weight of hidden_loss and embedding_loss: a number, or 'dynamic' for the ratio of the weighted "
            "divergence to them in the step before (Muralidharan et al. 2024, §3)."
        },
    )
    teacher_correction: str | None = field(
        default=None,
        metadata={
            "help": "'concurrent': the teacher is trained on the corpus, by cross-entropy, while the student learns "
            "from it. `correct_teacher` does so beforehand. If not set, the teacher does not change: "
            "whether few tokens of it pay is not known (Sreenivas et al. 2024, §2.1)."
        },
    )
    teacher_original_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The peak learning rate that the teacher was trained with, needed by teacher_correction; a fifth "
            "of it is used (Sreenivas et al. 2024, §3)."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose logits are in memory at one time. If not set, chosen from the vocabulary size."
        },
    )
    max_eval_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows of each held-out dataset that are evaluated, at equal distances in it. If not set, all. "
            "Recipes and `minitron-hf distill` take 64, because training evaluates several times; `minitron-hf "
            "evaluate` and the stage `evaluate` measure all rows once."
        },
    )
    eval_tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-evaluation-harness, or presets such as 'small', that are measured at every "
            "evaluation and logged as `eval_TASK_METRIC` (needs the extra `eval`)."
        },
    )
    eval_task_limit: int | None = field(
        default=50, metadata={"help": "Documents of each of `eval_tasks`. If not set, all."}
    )
    eval_task_data: str | None = field(
        default=None,
        metadata={"help": "Folder with documents of `eval_tasks`, `TASK.jsonl`, to read instead of the Hub."},
    )
    eval_include_path: str | None = field(
        default=None, metadata={"help": "Folder with further task files for `eval_tasks`."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the teacher (`revision`, "
            "`dtype`, `quantization_config`, ...), used when the teacher is given as a path or Hub id. By default the "
            "dtype is the checkpoint's, or float32 on hardware that is slow in it."
        },
    )
    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the teacher's layers in main memory and fetch each one when it is computed. "
            "For one device or DDP; FSDP2 and ZeRO-3 split the teacher instead."
        },
    )
    upcast_student: bool = field(
        default=True,
        metadata={
            "help": "Train a half-precision student in float32 weights (small updates are lost in half precision). "
            "`save_student(dtype=...)` writes it in half precision again."
        },
    )
    fake_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Quantisation-aware distillation: 'int8' or 'int4' rounds the weights of the student's "
            "projections in every forward pass as `minitron-hf quantize` will, and trains the weights behind them "
            "(needs the extra `quantize`). The saved student is not quantised. It did not pay where it was measured "
            "(benchmarks/results/ts-llama-0.9m-quantization-aware.json)."
        },
    )

    freeze_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Leave token embeddings and output head as they were pruned: no gradients and no optimizer states "
            "for them. Of 94.5M parameters of a student of SmolLM2-135M, 28M are in them; on text of another domain "
            "than the corpus it ended 1.3 % closer to the teacher, and on text like the corpus it needed 0.5 % more "
            "bits per byte (benchmarks/results/real/starts)."
        },
    )

    # Defaults of the base classes that are changed.
    learning_rate: float = field(
        default=1e-4,
        metadata={
            "help": "The initial learning rate for AdamW. 1e-4 is the peak of Sreenivas et al. 2024, §3, for teachers "
            "of 8B and 12B parameters. 3e-4 was better for a teacher of 135M and 262 thousand tokens "
            "(docs/explanation/real-teachers.md)."
        },
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "The scheduler type to use: cosine as in Sreenivas et al. 2024, §3."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Whether to use bf16 mixed precision. If not set, only where the hardware computes in it."},
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Deprecated name of `activation_checkpointing`."}
    )
    if "activation_checkpointing" not in SFTConfig.__dataclass_fields__:  # Transformers before 5.23
        activation_checkpointing: bool | None = field(
            default=None, metadata={"help": "Whether to compute activations anew in the backward pass."}
        )
    dataloader_pin_memory: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Whether to pin memory in data loaders. If not set, only with an accelerator."},
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={"help": "Whether and how to count the tokens seen: 'all', 'non_padding' or 'no'."},
    )
    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Not supported: the teacher's distribution is the only supervision of a mixture of experts."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.hidden_layers, str):
            self.hidden_layers = _parsed_layers(self.hidden_layers)
        self._require_types()
        for name in ("chat_template_path", "eval_task_data", "eval_include_path"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, os.path.expanduser(path))
        # The base class prefers greater values of a metric, unless its name ends with "loss".
        best = f"_{self.metric_for_best_model}"
        if self.greater_is_better is None and best.endswith(tuple(f"_{name}" for name in SMALLER_IS_BETTER)):
            self.greater_is_better = False
        self._fill_in_machine_defaults()
        super().__post_init__()
        self._require_loss()
        self._require_intermediate_losses()
        self._require_correction()
        require_fake_quantization(self.fake_quantization)
        if self.freeze_embeddings and self.embedding_loss:
            raise DataError(
                "embedding_loss compares embeddings, which freeze_embeddings does not train. Leave one out."
            )
        self._refuse_unsupported()

    def _require_types(self) -> None:
        """Refuse values of other types in the fields that the base classes lack: any text counts as true."""
        own = (
            DistillationConfig.__annotations__.keys() - SFTConfig.__dataclass_fields__.keys() - {"intermediate_weight"}
        )
        for name in sorted(own):
            value = getattr(self, name)
            if expected := expected_instead(value, str(DistillationConfig.__annotations__[name])):
                raise DataError(f"{name}={value!r}: expected {expected}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(f"{name}={value!r}: expected a finite number.")

    def _fill_in_machine_defaults(self) -> None:
        device = training_device(self.use_cpu)
        on_cpu = device.type == "cpu"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bf16(device)
        if self.bf16 and on_cpu:
            self.use_cpu = True  # the base class refuses bf16 on a machine without accelerator unless told so
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = not on_cpu
        name = checkpointing_field()
        if name == "gradient_checkpointing" and self.activation_checkpointing is not None:
            self.gradient_checkpointing = self.activation_checkpointing
        if self.gradient_checkpointing is None and getattr(self, name) is None:
            by_fsdp = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"
            setattr(self, name, not on_cpu and not by_fsdp)

    def _require_loss(self) -> None:
        if not self.temperature > 0:
            raise DataError(f"temperature={self.temperature}: expected a number above 0.")
        if self.kd_weight < 0 or self.ce_weight < 0 or self.kd_weight + self.ce_weight == 0:
            raise DataError(
                f"kd_weight={self.kd_weight}, ce_weight={self.ce_weight}: expected numbers of at least 0, one above."
            )
        require_divergence(self.divergence, self.jsd_beta, self.temperature)
        self._require_top_k()
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise DataError(f"loss_chunk_size={self.loss_chunk_size}: expected at least 1 token, or None.")
        if self.max_eval_rows is not None and self.max_eval_rows < 1:
            raise DataError(f"max_eval_rows={self.max_eval_rows}: expected at least 1 row, or None for all.")
        if self.eval_task_limit is not None and self.eval_task_limit < 1:
            raise DataError(f"eval_task_limit={self.eval_task_limit}: expected at least 1 document, or None for all.")

    def _require_top_k(self) -> None:
        if self.top_k is None:
            return
        if self.top_k < 1:
            raise DataError(f"top_k={self.top_k}: expected at least 1 token, or None for the whole vocabulary.")
        if self.divergence in OF_LOGITS:
            raise DataError(
                f"top_k={self.top_k}: divergence={self.divergence!r} compares logits, and top_k keeps probabilities. "
                "Use another divergence, or leave out top_k."
            )

    def _require_correction(self) -> None:
        if self.teacher_correction not in (None, "concurrent"):
            raise DataError(f"teacher_correction={self.teacher_correction!r}: expected 'concurrent' or None.")
        rate = self.teacher_original_learning_rate
        if self.teacher_correction and not (isinstance(rate, int | float) and rate > 0):
            raise DataError(
                f"teacher_original_learning_rate={rate!r}: teacher_correction needs the peak learning rate that the "
                "teacher was trained with, a number above 0."
            )
        if self.teacher_correction and self.teacher_offload:
            raise DataError(
                "teacher_offload: a teacher that is trained (teacher_correction) must be on the device. Leave one out."
            )
        if self.teacher_correction and self.lr_scheduler_type == "reduce_lr_on_plateau":
            raise DataError(
                "teacher_correction: the teacher is not evaluated, so it has no schedule that follows evaluations. "
                "Set another lr_scheduler_type."
            )
        if self.teacher_correction and self.fp16:
            raise DataError(
                "teacher_correction does not work in float16, whose gradients need a scaler. Set fp16=False."
            )

    def _refuse_unsupported(self) -> None:
        """Refuse arguments that would have no effect, or would replace the forward pass that computes the loss."""
        if self.loss_type != "nll":
            raise DataError(f"loss_type={self.loss_type!r}: distillation has its own loss; leave loss_type as 'nll'.")
        if self.label_smoothing_factor:
            raise DataError("label_smoothing_factor: the teacher's distribution is the target; leave it at 0.")
        if self.use_liger_kernel:
            raise DataError(
                "use_liger_kernel: Liger replaces the forward pass that computes this loss. Its layer kernels are "
                'available as model_init_kwargs={"use_kernels": True}; the loss is fused already.'
            )
        if self.router_aux_loss_coef != 0:
            raise DataError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: not supported in distillation; leave it at 0.0."
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise DataError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value!r} would upload optimizer states; expected 'end' "
                "or 'every_save'."
            )

    def to_dict(self) -> dict[str, Any]:
        """The arguments as JSON values. Dict arguments are copied, because the base class changes them."""
        kept = {name: getattr(self, name) for name in self._VALID_DICT_FIELDS}
        for name, value in kept.items():
            if isinstance(value, dict):
                setattr(self, name, {key: _json_value(part) for key, part in value.items()})
        try:
            return super().to_dict()
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def _require_intermediate_losses(self) -> None:
        for name in ("hidden_loss", "embedding_loss"):
            if getattr(self, name) not in (None, *get_args(Distance)):
                raise DataError(
                    f"{name}={getattr(self, name)!r}: expected {' or '.join(get_args(Distance))}, or None."
                )
        if self.hidden_layers is not None:
            pairs = self.hidden_layers
            if not _are_pairs(pairs):
                raise DataError(
                    f"hidden_layers={pairs}: expected a list of pairs [layer of the teacher, layer of the student]."
                )
            if self.hidden_loss is None:
                raise DataError("hidden_layers has no effect without hidden_loss. Set hidden_loss='cosine' or 'mse'.")
        weight: Any = self.intermediate_weight
        with contextlib.suppress(TypeError, ValueError):
            weight = float(weight)
        if weight != "dynamic" and not (isinstance(weight, float) and weight >= 0):
            raise DataError(
                f"intermediate_weight={self.intermediate_weight!r}: expected 'dynamic' or a number of at least 0."
            )
        if weight == "dynamic" and self.kd_weight == 0 and (self.hidden_loss or self.embedding_loss):
            raise DataError(
                "intermediate_weight='dynamic' is relative to the divergence, whose weight is 0 (kd_weight=0). "
                "Set intermediate_weight to a number."
            )


def _json_value(value: Any) -> Any:
    """A keyword argument of `from_pretrained` as a JSON value: quantisation configs as dicts, dtypes by name."""
    if hasattr(value, "to_dict"):
        return {name: _json_value(part) for name, part in value.to_dict().items()}
    if isinstance(value, Mapping):
        return {name: _json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(part) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value).removeprefix("torch.")


def _are_pairs(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(pair, list | tuple) and [type(layer) for layer in pair] == [int, int] for pair in value)


def _parsed_layers(text: str) -> Any:
    """Parse `hidden_layers` from a command line. Text that is not JSON stays text, which a later check refuses."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def checkpointing_field() -> str:
    """Name of the field for activation checkpointing; Transformers 5.23 renamed it, and the old name warns."""
    renamed = "activation_checkpointing" in {field.name for field in fields(SFTConfig)}
    return "activation_checkpointing" if renamed else "gradient_checkpointing"
