"""Arguments: defaults that fit the machine, and refusals of what cannot work."""

from __future__ import annotations

import warnings

import pytest
from transformers import HfArgumentParser

from minitron_hf import hardware
from minitron_hf.distillation.config import DistillationConfig


def test_defaults_fit_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = DistillationConfig(str(tmp_path), use_cpu=True)
        assert (args.bf16, args.activation_checkpointing, args.dataloader_pin_memory) == (False, False, False)
        assert DistillationConfig(str(tmp_path), use_cpu=True, bf16=True).bf16  # an explicit value wins
        assert DistillationConfig(str(tmp_path), use_cpu=True, activation_checkpointing=True).activation_checkpointing
        monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: True)
        assert DistillationConfig(str(tmp_path), use_cpu=True).bf16
        assert not DistillationConfig(str(tmp_path), use_cpu=True, bf16=False).bf16
    assert args.output_dir == str(tmp_path)


def test_arguments_parse_from_the_command_line(tmp_path):
    (args,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(
        [
            *("--output_dir", str(tmp_path), "--temperature", "2", "--ce_weight", "0.5", "--use_cpu", "True"),
            *("--teacher_model_init_kwargs", '{"dtype": "float32"}'),
        ]
    )
    assert (args.temperature, args.ce_weight, args.teacher_model_init_kwargs) == (2.0, 0.5, {"dtype": "float32"})
    for name in ("temperature", "kd_weight", "ce_weight", "loss_chunk_size", "teacher_model_init_kwargs"):
        assert DistillationConfig.__dataclass_fields__[name].metadata["help"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"kd_weight": -1}, "kd_weight=-1"),
        ({"kd_weight": 0}, "ce_weight=0"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hub_strategy='checkpoint'"),
        (
            {
                "teacher_correction": "concurrent",
                "teacher_original_learning_rate": 1e-3,
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "steps",
            },
            "no schedule that follows evaluations",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(str(tmp_path), **arguments)
