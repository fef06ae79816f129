"""Two gloo processes train and measure like one: DDP, FSDP2, ZeRO. This file is also the script that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from minitron_hf.recipe.launching import accelerate_config

STEPS = 3
#: 7 rows in batches of 2 x 2: the second process gets one row twice, which must not count twice.
EVAL_LENGTHS = (9, 4, 23, 6, 13, 5, 31)


CASES: dict[str, dict] = {
    "padded": {},
    "at_once": {"gradient_accumulation_steps": 1, "tied": True},
    "padding_free": {
        "padding_free": True,
        "max_length": None,
        "activation_checkpointing": True,
        "freeze_embeddings": True,
    },
    "states": {"hidden_loss": "cosine", "embedding_loss": "mse"},
    "adapter": {"lora": True, "hidden_loss": "mse"},
    # The second step has 5 of 8 rows; which ones Accelerate adds to them must not matter.
    "end_of_epoch": {"rows": 13, "hidden_loss": "mse"},
    "correction": {"teacher_correction": "concurrent", "teacher_original_learning_rate": 5e-2},
}
#: What is logged, and has to be equal.
LOGGED = ("loss", "kl", "ce", "agreement", "grad_norm", "hidden", "alpha")


def environment_of(config: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes about a packaged configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    given = ["--config_file", str(accelerate_config(config)), "--num_processes", "2", "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def shard_on_cpus(config: str, **changes: str) -> None:
    """Have Accelerate shard as a configuration says, which it does on accelerators only; torch does on CPUs too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    os.environ.update(environment_of(config) | changes)
    if config.startswith("zero"):
        del os.environ["ACCELERATE_USE_CPU"]  # with which Accelerate leaves DeepSpeed out
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
        return
    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState.__init__ = init


def train(
    folder: Path, case: str, *, stop: bool = False, resume: bool = False, evaluate_first: bool = False, **changes
) -> None:
    """Train into a folder; `stop` after the first checkpoint, or `resume` from it; evaluate a stream before."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from minitron_hf.distillation.config import DistillationConfig
    from minitron_hf.distillation.trainer import DistillationTrainer
    from pocket import pocket_model, pocket_tokenizer, pocket_tokens

    unset_hf_deepspeed_config()  # else the models after a ZeRO-3 run would be split while they are being filled
    options = {"gradient_accumulation_steps": 2, **CASES[case], **changes}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Of another width where states are compared, so that there is a map between them.
    config = {"hidden_size": 24} if "hidden_loss" in options else {}
    config |= {"tie_word_embeddings": True} if options.pop("tied", False) else {}
    dtype = getattr(torch, options.pop("dtype", "float64"))
    student = pocket_model("llama", dtype=dtype, seed=1, num_hidden_layers=2, **config)
    teacher = pocket_model("llama", dtype=dtype)
    torch.manual_seed(0)
    lora, num_rows = options.pop("lora", False), options.pop("rows", 40)

    def rows(lengths, seed):
        return Dataset.from_dict(
            {"input_ids": [pocket_tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]}
        )

    held = {}

    def bytes_of(tensors):
        here = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in here)

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = stop

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            weights = list(model.parameters())
            states = (value for each in optimizer.state.values() for value in each.values())
            held["student"] = bytes_of(
                [*weights, *(one.grad for one in weights if one.grad is not None), *(s for s in states if s.ndim)]
            )
            held["teacher"] = bytes_of(teacher.parameters())
            held["trained"] = sum(weight.numel() for weight in weights if weight.requires_grad)
            held["frozen"] = sum(weight.numel() for weight in weights if not weight.requires_grad)

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            str(folder),
            per_device_train_batch_size=8 // options["gradient_accumulation_steps"] // processes,
            per_device_eval_batch_size=2,
            max_steps=STEPS,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="steps" if stop else "no",
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,
            **{"max_length": 64, "activation_checkpointing": False, "bf16": False, **options},
        ),
        train_dataset=rows([3 + 7 * i % 29 for i in range(num_rows)], 0),
        eval_dataset=rows(EVAL_LENGTHS, 100),
        processing_class=pocket_tokenizer(),
        peft_config=LoraConfig(r=2, lora_alpha=16, target_modules="all-linear") if lora else None,
        callbacks=[Watch()],
    )
    if evaluate_first:
        rows_of_stream = trainer.eval_dataset.to_iterable_dataset(num_shards=2)  # of 4 and 3 rows
        before = trainer.evaluate(), trainer.evaluate(rows_of_stream)
        assert before[1]["eval_kl"] == pytest.approx(before[0]["eval_kl"], rel=1e-9)
        trainer.eval_dataset = rows_of_stream
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    if stop:
        return
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_student(folder / "student")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # else it may be saved by the first process alone
        assert (folder / "student" / "distillation.json").is_file()  # written last, and found by every process
    if trainer.is_world_process_zero():
        history = [{k: v for k, v in e.items() if k in LOGGED} for e in trainer.state.log_history if "grad_norm" in e]
        counted = {k: v for k, v in metrics.items() if k in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement")}
        tokens = trainer.state.num_input_tokens_seen
        result = {"history": history, "metrics": counted, "tokens": tokens, "held": held}
        (folder / "result.json").write_text(json.dumps(result))


def correct(folder: Path) -> None:
    """Correct a teacher; it is there for every process."""
    from datasets import Dataset

    from minitron_hf.distillation.correction import correct_teacher
    from pocket import pocket_model, pocket_tokenizer, pocket_tokens

    rows = Dataset.from_dict({"input_ids": [pocket_tokens(20, seed=i).tolist() for i in range(12)]})
    settings = {"original_learning_rate": 1e-3, "num_tokens": 64, "max_length": 16, "use_cpu": True, "bf16": False}
    correct_teacher(pocket_model("llama"), rows, folder, processing_class=pocket_tokenizer(), **settings)
    assert (folder / "config.json").is_file()


def in_processes(number: int, folder: Path, tasks: list[dict]) -> None:
    """Do tasks in processes that the package's `accelerate launch` starts."""
    folder.mkdir(exist_ok=True)
    (folder / "tasks.json").write_text(json.dumps(tasks))
    command = [sys.executable, "-m", "minitron_hf.recipe.launching", "--config_file", str(accelerate_config("ddp"))]
    command += ["--num_processes", str(number), __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]


def do_tasks(folder: Path) -> None:
    """The processes' side."""
    kind = "ddp"
    for task in json.loads((folder / "tasks.json").read_text()):
        wanted, changes = task.pop("kind", "ddp"), task.pop("environment", {})
        if wanted != kind:
            shard_on_cpus(kind := wanted, **changes)
        if task.get("case") == "correct":
            correct(folder / task["folder"])
            continue
        train(folder / task.pop("folder"), **task)


def same(found: Path, expected: Path, rel: float = 1e-6) -> None:
    """Two folders hold the same losses and the same student."""
    import torch
    from safetensors.torch import load_file

    first, second = (json.loads((folder / "result.json").read_text()) for folder in (expected, found))
    # Those added at the end of an epoch are seen, though not learnt from.
    assert second["tokens"] >= first["tokens"] > 0
    assert second["tokens"] == first["tokens"] or found.name.endswith("end_of_epoch")
    # The models compute their norms in float32, so the batching shows in the last digits.
    assert second["history"] == [pytest.approx(entry, rel=rel) for entry in first["history"]], found
    assert second["metrics"] == pytest.approx(first["metrics"], rel=rel)
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (expected, found)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=100 * rel, atol=10 * rel, msg=f"{found} {name}")


def references(folder: Path, cases=CASES, **changes) -> Path:
    for case in cases:
        train(folder / case, case, **changes)
    return folder


def test_two_processes_equal_one(tmp_path):
    cases = ("padding_free", "states")
    one, two = references(tmp_path / "one", cases), tmp_path / "two"
    train(two / "states_from_one", "states", stop=True)
    equal_one(one, two, cases, [
        {"folder": "evaluated_first", "case": "states", "evaluate_first": True},
        {"folder": "corrected", "case": "correct"},
        {"folder": "states_from_one", "case": "states", "resume": True},
        {"folder": "states_to_one", "case": "states", "stop": True},
        {"folder": "fsdp2_resumed", "case": "states", "kind": "fsdp2", "stop": True},
        {"folder": "fsdp2_resumed", "case": "states", "kind": "fsdp2", "resume": True},
    ])  # fmt: skip
    train(two / "states_to_one", "states", resume=True)
    for other in ("evaluated_first", "states_from_one", "states_to_one", "fsdp2_resumed"):
        same(two / other, one / "states")


@pytest.mark.slow
def test_other_cases_in_two_processes_equal_one(tmp_path):
    from pocket import pocket_model

    cases, two = ("padded", "at_once", "adapter", "end_of_epoch", "correction"), tmp_path / "two"
    equal_one(references(tmp_path / "one", cases), two, cases)

    # The README's bytes per parameter, which are of float32 and bf16. An odd number of rows is not split in halves.
    teacher = pocket_model("llama").num_parameters()
    for kind, processes in (("ddp", 1), ("fsdp2", 2)):
        for case in ("padded", "adapter"):
            held = json.loads((two / f"{kind}_{case}" / "result.json").read_text())["held"]
            bytes_of_student = 4 * 8 * held["trained"] + 8 * held["frozen"]
            assert (held["frozen"] > 0) == (case == "adapter")
            assert held["student"] == pytest.approx(bytes_of_student / processes, rel=0.03 * (processes - 1))
            assert held["teacher"] == pytest.approx(8 * teacher / processes, rel=0.03 * (processes - 1))


def equal_one(one: Path, two: Path, cases: Sequence[str], others: Sequence[dict] = ()) -> None:
    """Train in two processes, by DDP and by FSDP2, and compare with one process."""
    sharded = [case for case in cases if case != "correction"]
    tasks = [{"folder": f"ddp_{case}", "case": case} for case in cases]
    tasks += [task for task in others if "kind" not in task]  # before FSDP2, after which a process does no DDP
    tasks += [{"folder": f"fsdp2_{case}", "case": case, "kind": "fsdp2", "eval_on_start": True} for case in sharded]
    in_processes(2, two, tasks + [task for task in others if "kind" in task])
    for case in cases:
        same(two / f"ddp_{case}", one / case)
        assert json.loads((two / f"ddp_{case}" / "distillation.json").read_text())["num_processes"] == 2
    for case in sharded:
        same(two / f"fsdp2_{case}", one / case)
        # `save_model` writes the same: the shards of each process alone would be no model.
        saved = [two / f"fsdp2_{case}" / name / "model.safetensors" for name in (".", "student")]
        assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.slow
def test_sharded_checkpoints_are_resumed_on_any_number_of_processes(tmp_path):
    """Sharded and full state dicts, with an adapter and without; and what else a configuration may say."""
    one, folder = references(tmp_path / "one", ("states", "adapter", "padded")), tmp_path / "sharded"
    stopped, resumed = [], []
    for format in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        for case in ("states", "adapter"):
            task = {"case": case, "kind": "fsdp2", "environment": {"FSDP_STATE_DICT_TYPE": format}}
            stopped += [{**task, "folder": f"{format}_{case}_{number}", "stop": True} for number in (1, 2)]
            resumed += [{**task, "folder": f"{format}_{case}_{number}", "resume": True} for number in (1, 2)]
    for tasks in (stopped, resumed):
        for number in (1, 2):
            others = 3 - number if tasks is resumed else number
            for format in ("SHARDED", "FULL"):
                mine = [task for task in tasks if task["folder"].endswith(str(others)) and format in task["folder"]]
                in_processes(number, folder, mine)
    for task in resumed:
        same(folder / task["folder"], one / task["case"])

    loading = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    in_processes(2, folder, [{"folder": "own", "case": "padded", "kind": "fsdp2", "environment": loading}])
    same(folder / "own", one / "padded")
    in_processes(2, folder, [{"folder": "half", "case": "padded", "kind": "fsdp2", "bf16": True}])
    # Against float64, as everything above: rounded, but not wrong. A top-1 token may be another one.
    found, wanted = (
        json.loads((path / "result.json").read_text())["history"] for path in (folder / "half", one / "padded")
    )
    for entry in (*found, *wanted):
        del entry["agreement"]
    assert found == [pytest.approx(entry, rel=1e-2) for entry in wanted]


@pytest.mark.slow
def test_compiled_layers_equal_plain_ones_in_two_processes(tmp_path):
    """DDP and FSDP2, with activation checkpointing and with an adapter; from a checkpoint of plain layers, too."""
    cases, folder = ("padding_free", "adapter", "states"), tmp_path / "compiled"
    one = references(tmp_path / "one", cases)
    tasks = [
        {"folder": f"{kind}_{case}", "case": case, "kind": kind, "torch_compile_backend": "aot_eager"}
        for kind in ("ddp", "fsdp2")
        for case in cases
    ]
    resumed = {"folder": "resumed", "case": "states", "kind": "fsdp2"}
    tasks += [{**resumed, "stop": True}, {**resumed, "resume": True, "torch_compile_backend": "aot_eager"}]
    in_processes(2, folder, tasks)
    for task in tasks:
        same(folder / task["folder"], one / task["case"])


@pytest.mark.slow
def test_deepspeed_equals_one_process(tmp_path):
    """ZeRO-2 and ZeRO-3 in float32, as DeepSpeed knows no float64; what they save is a stock student."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'minitron-hf[deepspeed]'")
    from transformers import AutoModelForCausalLM

    cases = [case for case in CASES if case != "correction"]
    one, folder = references(tmp_path / "one", cases, dtype="float32"), tmp_path / "zero"
    for kind in ("zero2", "zero3"):
        tasks = [{"folder": f"{kind}_{case}", "case": case, "kind": kind, "dtype": "float32"} for case in cases]
        resumed = {**tasks[cases.index("states")], "folder": f"{kind}_resumed"}
        in_processes(2, folder, [*tasks, {**resumed, "stop": True}, {**resumed, "resume": True}])
        for case, name in (*zip(cases, cases, strict=True), ("states", "resumed")):
            same(folder / f"{kind}_{name}", one / case, rel=1e-5)
            saved = folder / f"{kind}_{name}" / "student"
            _, problems = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
            assert not any(problems.values()), problems


if __name__ == "__main__":
    do_tasks(Path(sys.argv[1]))
