"""Two gloo processes train and measure like one. This file is also the script that the processes run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 3
#: 7 rows in batches of 2 x 2: the second process gets one row twice, which must not count twice.
EVAL_LENGTHS = (9, 4, 23, 6, 13, 5, 31)


CASES: dict[str, dict] = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None, "activation_checkpointing": True},
    "states": {"hidden_loss": "cosine", "embedding_loss": "mse"},
    "correction": {"teacher_correction": "concurrent", "teacher_original_learning_rate": 5e-2},
}


def run(folder: Path) -> None:
    for case, options in CASES.items():
        (folder / case).mkdir(parents=True, exist_ok=True)
        train(folder / case, options)


def train(folder: Path, options: dict) -> None:
    import torch
    from datasets import Dataset

    from minitron_hf.distillation_config import DistillationConfig
    from minitron_hf.trainer import DistillationTrainer
    from pocket import pocket_model, pocket_tokenizer, pocket_tokens

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    # Of another width where states are compared, so that there is a map between them.
    width = {"hidden_size": 24} if "hidden_loss" in options else {}
    student = pocket_model("llama", dtype=torch.float64, seed=1, num_hidden_layers=2, **width)
    teacher = pocket_model("llama", dtype=torch.float64)
    torch.manual_seed(0)

    def rows(lengths, seed):
        return Dataset.from_dict(
            {"input_ids": [pocket_tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]}
        )

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            str(folder),
            per_device_train_batch_size=4 // processes,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            max_steps=STEPS,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **{"max_length": 64, "activation_checkpointing": False, **options},
        ),
        train_dataset=rows([3 + 7 * i % 29 for i in range(40)], 0),
        eval_dataset=rows(EVAL_LENGTHS, 100),
        processing_class=pocket_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_student(folder / "student")
    if rank == 0:
        checksum = {name: value.double().norm().item() for name, value in student.state_dict().items()}
        history = [
            {k: v for k, v in e.items() if k in ("loss", "kl", "ce", "agreement", "grad_norm", "hidden", "alpha")}
            for e in trainer.state.log_history[:STEPS]
        ]
        counted = {k: v for k, v in metrics.items() if k in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement")}
        tokens = trainer.state.num_input_tokens_seen
        result = {"history": history, "metrics": counted, "weights": checksum, "tokens": tokens}
        (folder / "result.json").write_text(json.dumps(result))


def test_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(one)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, __file__, str(two)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    for case in CASES:
        first = json.loads((one / case / "result.json").read_text())
        second = json.loads((two / case / "result.json").read_text())
        assert second["tokens"] == first["tokens"] > 0
        # The models compute their norms in float32, so the batching shows in the last digits.
        assert second["history"] == [pytest.approx(entry, rel=1e-6) for entry in first["history"]]
        assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-6)
        assert second["weights"] == pytest.approx(first["weights"], rel=1e-6)
        assert json.loads((two / case / "distillation.json").read_text())["num_processes"] == 2
        assert (two / case / "student" / "model.safetensors").is_file()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
