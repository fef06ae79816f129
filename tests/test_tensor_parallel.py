"""Two gloo processes that share the tensors of teacher and student train like one. Also the script that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_hf.distillation.checks import refuse_launch, refuse_tensor_parallel
from minitron_hf.errors import UnsupportedModelError
from minitron_hf.losses.fused import distillation_loss
from minitron_hf.losses.heads import OutputHead, gathered_head
from minitron_hf.losses.signals import DenseSignal

CASES = {
    "whole": {},
    "top_k": {"top_k": 5, "divergence": "jsd", "temperature": 2.0, "ce_weight": 0.3, "gradient_accumulation_steps": 1},
}
#: Sizes that two processes can share; the vocabulary of 97 tokens is split unevenly.
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 44,
}


def loss_of_a_head(split) -> list[torch.Tensor]:
    """The loss of a head that `split` may spread over processes, and its gradients of states, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((13, 5), (31, 5), (31,), (13, 7), (31, 7))
    hidden, weight, bias, states, other = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    hidden.requires_grad_()
    weight, bias, other = (split(tensor) for tensor in (weight, bias, other))
    head, teacher = gathered_head(OutputHead(weight, bias)), gathered_head(OutputHead(other.detach()))
    labels = torch.arange(13)
    total = distillation_loss(hidden, head, DenseSignal(states, teacher), labels, ce_weight=0.3, chunk_size=4).total
    total.backward()
    found = [total.detach(), hidden.grad, weight.grad, bias.grad]
    return [one.full_tensor() if hasattr(one, "full_tensor") else one for one in found]


def trainer_of(folder: Path, case: str, models: Path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from minitron_hf.distillation.config import DistillationConfig
    from minitron_hf.distillation.trainer import DistillationTrainer
    from pocket import pocket_tokenizer, pocket_tokens

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    split = {"distributed_config": DistributedConfig(tp_size=processes)} if processes > 1 else {}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64, **split)
        for name in ("student", "teacher")
    )
    rows = Dataset.from_dict(
        {"input_ids": [pocket_tokens(n, seed=i).tolist() for i, n in enumerate((5, 17, 9, 30, 3, 12, 21))]}
    )
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            str(folder),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            max_length=64,
            activation_checkpointing=False,
            **{"gradient_accumulation_steps": 2, **CASES[case]},
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=pocket_tokenizer(),
    )


def train(folder: Path, case: str, models: Path) -> None:
    trainer = trainer_of(folder, case, models)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        names = ("loss", "kl", "ce", "divergence", "agreement", "grad_norm", "num_tokens")
        history = [{k: v for k, v in e.items() if k in names} for e in trainer.state.log_history if "grad_norm" in e]
        counted = {k: v for k, v in metrics.items() if k in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement")}
        (folder / "result.json").write_text(json.dumps({"history": history, "metrics": counted}))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from minitron_hf.recipe.launching import accelerate_config
    from pocket import pocket_model, pocket_tokenizer

    for name, seed, layers in (("student", 1, 2), ("teacher", 0, 3)):
        model = pocket_model("llama", dtype=torch.float64, seed=seed, num_hidden_layers=layers, **SIZES)
        model.save_pretrained(tmp_path / "models" / name)
        pocket_tokenizer().save_pretrained(tmp_path / "models" / name)
    command = [sys.executable, "-m", "minitron_hf.recipe.launching", "--config_file", str(accelerate_config("ddp"))]
    command += ["--num_processes", "2", __file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]
    for found, expected in zip(
        torch.load(tmp_path / "head.pt"), loss_of_a_head(lambda tensor: tensor.requires_grad_()), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for case in CASES:
        one, two = tmp_path / "one" / case, tmp_path / "two" / case
        train(one, case, tmp_path / "models")
        first, second = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
        assert second["history"] == [pytest.approx(entry, rel=1e-9) for entry in first["history"]]
        assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-9)
        weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-7, atol=1e-9)
        records = [json.loads((folder / "distillation.json").read_text()) for folder in (one, two)]
        assert records[0]["num_input_tokens_seen"] == records[1]["num_input_tokens_seen"]
    assert "distributed_config" not in (two / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(two)
    # The checkpoint in the middle is a stock student, and going on from it comes to the same end.
    middle = [
        AutoModelForCausalLM.from_pretrained(tmp_path / which / "whole" / "checkpoint-2").state_dict()
        for which in ("one", "two")
    ]
    ends = [load_file(tmp_path / "two" / name / "model.safetensors") for name in ("whole", "resumed")]
    for first, second in (middle, ends):
        assert first.keys() == second.keys()
        for name, weight in first.items():
            torch.testing.assert_close(second[name], weight, rtol=1e-7, atol=1e-9)
    start, end = middle[0]["lm_head.weight"], ends[0]["lm_head.weight"]
    assert not torch.allclose(start, end)
    # One process goes on from the checkpoint of two.
    alone = trainer_of(tmp_path / "alone", "whole", tmp_path / "models")
    alone.train(resume_from_checkpoint=str(tmp_path / "two" / "whole" / "checkpoint-2"))
    alone.save_model()
    for name, weight in load_file(tmp_path / "alone" / "model.safetensors").items():
        torch.testing.assert_close(weight, ends[0][name], rtol=1e-7, atol=1e-9)


def parallelism(**sizes):
    found = SimpleNamespace(**{f"{name}_enabled": sizes.get(name, 1) > 1 for name in ("cp", "sp", "tp")})
    return SimpleNamespace(cp_size=1, tp_size=sizes.get("tp", 1), **vars(found))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cp": 2}, "Context parallelism splits every row"),
        ({"sp": 2}, "Sequence parallelism splits every row"),
        ({"tp": 2}, "Tensor parallelism over 2 of 4 processes"),
    ],
)
def test_other_kinds_of_parallelism_are_refused_by_name(sizes, message):
    accelerator = SimpleNamespace(num_processes=4, parallelism_config=parallelism(**sizes))
    with pytest.raises(UnsupportedModelError, match=message):
        refuse_launch(accelerator)


def test_what_tensor_parallelism_does_not_go_with_is_refused_by_name():
    args = SimpleNamespace(
        teacher_correction=None,
        teacher_offload=False,
        hidden_loss="mse",
        embedding_loss=None,
        load_best_model_at_end=True,
        eval_tasks=["piqa"],
    )
    trainer = SimpleNamespace(args=args, model=torch.nn.Linear(1, 1), get_tp_size=lambda: 2)
    with pytest.raises(UnsupportedModelError, match=r"with hidden_loss, load_best_model_at_end, eval_tasks is not"):
        refuse_tensor_parallel(trainer)
    trainer.get_tp_size = lambda: 1
    refuse_tensor_parallel(trainer)


def do_all(folder: Path) -> None:
    """The processes' side."""
    from accelerate import ParallelismConfig
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    ParallelismConfig._validate_accelerator = lambda *_: (
        None
    )  # Accelerate splits over accelerators only; torch does not
    for case in CASES:
        train(folder / "two" / case, case, folder / "models")
    resumed = trainer_of(folder / "two" / "resumed", "whole", folder / "models")
    resumed.train(resume_from_checkpoint=str(folder / "two" / "whole" / "checkpoint-2"))
    resumed.save_model()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    found = loss_of_a_head(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]).detach().requires_grad_())
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "head.pt")


if __name__ == "__main__":
    do_all(Path(sys.argv[1]))
