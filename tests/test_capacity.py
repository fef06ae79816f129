"""Memory and speed on paper against what is measured: PyTorch's allocator, the kernel, known counts, and laws."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from minitron_hf.cli.app import main
from minitron_hf.distillation.capacity import estimate_capacity, step_flops
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.fake_quantization import fake_quantize
from minitron_hf.distillation.fake_runs import SHARDINGS, Setup, run_on_fakes
from minitron_hf.distillation.gpu_data_sheets import DEVICES, Device
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import PlanError
from minitron_hf.losses.fused import distillation_loss, next_token_positions
from minitron_hf.losses.heads import base_model_of, output_head
from minitron_hf.losses.signals import DenseSignal, top_k_signal
from minitron_hf.models import count_parameters
from pocket import pocket_tokenizer
from test_quantization import needs_torchao

CPU = Device(1e12, type="cpu")
#: What the issue allows between the estimate and the measured peak.
TOLERANCE = 0.05

DENSE = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}
EXPERTS = {**DENSE, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
PAIRS = {
    "dense": (
        LlamaConfig(**DENSE, hidden_size=256, intermediate_size=1024),
        LlamaConfig(**DENSE, hidden_size=192, intermediate_size=512, head_dim=32),
    ),
    "experts": (
        Qwen3MoeConfig(**EXPERTS, hidden_size=256, moe_intermediate_size=256),
        Qwen3MoeConfig(**EXPERTS, hidden_size=192, moe_intermediate_size=128),
    ),
}
#: For laws, which hold at any size.
SMALL = [
    LlamaConfig(num_hidden_layers=1, num_attention_heads=2, vocab_size=8192, hidden_size=width, intermediate_size=64)
    for width in (64, 32)
]


def comes_and_goes(capacity) -> int:
    """Bytes that a pass adds to what is there before it."""
    return capacity.parts["activations"] + capacity.parts["loss chunks"]


def student_of(config, setup):
    """A student that is ready to train, after an earlier pass if it accumulates gradients."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if setup.fake_quantization:
        fake_quantize(model, setup.fake_quantization, is_split=False)
    if setup.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    if setup.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=setup.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    if setup.activation_checkpointing:
        base = base_model_of(model)
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if setup.lora_rank:
            model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad and setup.accumulates:
            parameter.grad = torch.zeros_like(parameter)
    return model.train()


def said_by(teacher, tokens, top_k=None):
    """What the teacher says, or what a cache of it holds."""
    positions, _ = next_token_positions(tokens)
    with torch.no_grad():
        signal = DenseSignal(states_of(teacher, tokens, positions), output_head(teacher))
        return top_k_signal(signal, top_k) if top_k else signal


def states_of(model, tokens, positions):
    output = base_model_of(model).base_model(input_ids=tokens, use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, positions)


def one_pass(teacher, student, tokens, cached=None) -> None:
    """Forward, loss and backward, as the trainer does."""
    positions, targets = next_token_positions(tokens)
    signal = cached or said_by(teacher, tokens)
    total = distillation_loss(states_of(student, tokens, positions), output_head(student), signal, targets).total
    del signal
    total.backward()


def allocated(run) -> int:
    """The most bytes that PyTorch's allocator had given out while a function ran, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    live = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("pair", "changes"),
    [
        ("dense", {"activation_checkpointing": False}),
        ("dense", {}),
        ("dense", {"batch_size": 1}),
        ("dense", {"batch_size": 1, "max_length": 1024, "activation_checkpointing": False}),
        ("dense", {"accumulates": False, "activation_checkpointing": False}),
        ("dense", {"accumulates": False}),
        ("dense", {"lora_rank": 8, "activation_checkpointing": False}),
        ("dense", {"lora_rank": 8}),
        ("dense", {"cached_top_k": 16, "activation_checkpointing": False}),
        ("dense", {"freeze_embeddings": True, "activation_checkpointing": False}),
        ("dense", {"freeze_embeddings": True, "accumulates": False}),
        ("experts", {"activation_checkpointing": False}),
        ("experts", {}),
        *(
            pytest.param("dense", {"fake_quantization": method, **checkpointing}, marks=needs_torchao)
            for method, checkpointing in (("int8", {}), ("int4", {"activation_checkpointing": False}))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{key}={value[key]}" for key in value) or "plain",
)
def test_a_pass_allocates_what_is_estimated(pair, changes):
    """Real tensors of a real pass, counted by PyTorch's allocator."""
    teacher_config, student_config = PAIRS[pair]
    setup = Setup(**{"device": CPU, "batch_size": 4, "max_length": 256, **changes})
    estimated = comes_and_goes(estimate_capacity(teacher_config, student_config, setup))
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=torch.float32).eval().requires_grad_(False)
    student = student_of(student_config, setup)
    tokens = torch.randint(0, student_config.vocab_size, (setup.batch_size, setup.max_length))
    cached = said_by(teacher, tokens, setup.cached_top_k) if setup.cached_top_k else None
    measured = allocated(lambda: one_pass(teacher, student, tokens, cached))
    assert estimated == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 4])
def test_rounded_weights_wait_for_the_backward_pass(rows):
    """Two numbers per weight, its rounded value and its level before clipping, and scales; whatever the rows."""
    teacher, student = PAIRS["dense"]
    setup = Setup(device=CPU, batch_size=rows, max_length=64, activation_checkpointing=False)
    plain, rounded = (
        run_on_fakes(teacher, student, replace(setup, fake_quantization=method)).peaks(rows)["waiting"]
        for method in (None, "int4")
    )
    model = AutoModelForCausalLM.from_config(student)
    weights = [module.weight for path, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    numbers = sum(weight.numel() for weight in weights)
    assert rounded - plain == pytest.approx(2 * 4 * numbers + 3 * 4 * numbers // 64, rel=0.01)  # groups of 64


def test_training_allocates_what_is_estimated(tmp_path):
    """The trainer itself: AdamW's states and gradients come to be while it runs; the weights are there before."""
    teacher_config, student_config = PAIRS["dense"]
    setup = Setup(device=CPU, batch_size=4, max_length=256)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, student_config.vocab_size, (16, 256), generator=generator).tolist()
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_config(student_config, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_config(teacher_config, dtype=torch.float32),
        args=DistillationConfig(
            str(tmp_path),
            per_device_train_batch_size=setup.batch_size,
            gradient_accumulation_steps=2,
            max_steps=2,
            max_length=setup.max_length,
            activation_checkpointing=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=pocket_tokenizer(),
    )
    measured = allocated(trainer.train)
    capacity = estimate_capacity(teacher_config, student_config, setup)
    assert capacity.parts["optimizer"] == 8 * count_parameters(student_config)
    here = capacity.peak - capacity.parts["student"] - capacity.parts["teacher"]
    assert here == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.slow
def test_a_process_takes_what_is_estimated():
    """What the kernel says of a fresh process, from its state before there are models to the peak of a second step."""
    found = subprocess.run([sys.executable, __file__, "step"], capture_output=True, text=True, check=True, timeout=300)
    estimated, measured = json.loads(found.stdout.splitlines()[-1])
    assert estimated == pytest.approx(measured, rel=TOLERANCE)


def a_step_in_this_process() -> None:
    """Print the estimate and the growth of this process's memory, in bytes."""
    shape = {**DENSE, "num_hidden_layers": 8, "vocab_size": 16384}
    teacher_config = LlamaConfig(**shape, hidden_size=768, intermediate_size=2048)
    student_config = LlamaConfig(**shape, hidden_size=512, intermediate_size=1536)
    setup = Setup(device=CPU, batch_size=2, max_length=512, activation_checkpointing=False)
    estimated = estimate_capacity(teacher_config, student_config, setup).peak

    def resident(name: str) -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024

    torch.manual_seed(0)
    tokens = torch.randint(0, shape["vocab_size"], (setup.batch_size, setup.max_length))
    tiny = LlamaConfig(**DENSE, hidden_size=32, intermediate_size=64)
    warm = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32)
    one_pass(warm.eval(), student_of(tiny, setup), tokens % DENSE["vocab_size"])  # libraries load what they need
    before = resident("VmRSS")
    teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=torch.float32).eval().requires_grad_(False)
    student = student_of(student_config, setup)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    for _ in range(2):
        one_pass(teacher, student, tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        Path("/proc/self/clear_refs").write_text("5")
    one_pass(teacher, student, tokens)
    print(json.dumps([estimated, resident("VmHWM") - before]))


@pytest.mark.slow
def test_two_processes_hold_what_is_estimated():
    """Local bytes of weights, gradients, optimizer and teacher under FSDP2, over gloo."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "sharded"]
    found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=300)
    measured = json.loads(found.stdout.splitlines()[-1])
    capacity = estimate_capacity(*PAIRS["dense"], Setup(devices=2, sharding="fsdp2"))
    for name, size in measured.items():
        assert capacity.parts[name] == pytest.approx(size, rel=0.02), name


def what_this_process_holds() -> None:
    """Print the bytes that one of several processes holds after a step under FSDP2."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    teacher, student = (
        AutoModelForCausalLM.from_config(config, dtype=dtype)
        for config, dtype in zip(PAIRS["dense"], (torch.bfloat16, torch.float32), strict=True)
    )
    for model in (teacher, student):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()

    def local(tensors) -> int:
        found = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in found)

    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    held = {
        "student": local(student.parameters()),
        "gradients": local(parameter.grad for parameter in student.parameters()),
        "optimizer": local(states),
        "teacher": local(teacher.parameters()),
    }
    if torch.distributed.get_rank() == 0:
        print(json.dumps(held))
    destroy_process_group()


def test_flops_are_six_and_two_per_weight_and_token():
    """Of a model whose attention is next to nothing: forward and twice as much backward; the teacher forward only."""
    configs = [
        LlamaConfig(
            num_hidden_layers=2, hidden_size=width, num_attention_heads=8, intermediate_size=4 * width, vocab_size=4096
        )
        for width in (1024, 512)
    ]
    setup = Setup(batch_size=2, max_length=64, activation_checkpointing=False)
    teacher, student = (  # embeddings are looked up, not multiplied
        count_parameters(config) - config.vocab_size * config.hidden_size for config in configs
    )
    tokens = setup.batch_size * setup.max_length

    def flops(setup):
        return step_flops(*configs, setup, run_on_fakes(*configs, setup))

    assert flops(setup) == pytest.approx((6 * student + 2 * teacher) * tokens, rel=0.03)
    cached = replace(setup, cached_top_k=8)
    assert flops(cached) == pytest.approx(6 * student * tokens, rel=0.03)
    head = configs[1].vocab_size * configs[1].hidden_size
    # One more forward pass of the layers, but for their last products, which no gradient needs.
    last = configs[1].num_hidden_layers * configs[1].intermediate_size * configs[1].hidden_size
    again = replace(cached, activation_checkpointing=True)
    assert flops(again) == pytest.approx((8 * student - 2 * (head + last)) * tokens, rel=0.03)


def test_speed_is_flops_over_time():
    teacher, student = SMALL
    slow, fast = (estimate_capacity(teacher, student, Setup(device=DEVICES[name])) for name in ("a100", "h100"))
    assert fast.tokens_per_second / slow.tokens_per_second == pytest.approx(989 / 312)
    assert fast.limited_by == "products"
    starved = Setup(device=replace(DEVICES["h100"], bandwidth=1e6), devices=2)
    assert estimate_capacity(teacher, student, starved).limited_by == "communication"
    unknown = estimate_capacity(teacher, student, Setup(device=Device(24e9)))
    assert unknown.tokens_per_second is None
    assert not any("FLOP" in words for words in unknown.assumptions)


def test_the_parts_are_the_peak_and_shares_follow_the_devices():
    teacher, student = SMALL
    two, four = (
        estimate_capacity(teacher, student, Setup(devices=n, sharding="fsdp2", max_length=64)) for n in (2, 4)
    )
    assert two.peak == sum(two.parts.values())
    for name in SHARDINGS["fsdp2"]:
        assert two.parts[name] == pytest.approx(2 * four.parts[name], abs=2)
    for name in ("activations", "loss chunks", "gathered layers"):
        assert two.parts[name] == four.parts[name]
    alone = [estimate_capacity(teacher, student, Setup(sharding=name, max_length=64)) for name in ("ddp", "fsdp2")]
    for name in ("student", "gradients", "optimizer", "teacher"):
        assert alone[0].parts[name] == alone[1].parts[name] == pytest.approx(2 * two.parts[name], abs=2)
    zero = [estimate_capacity(teacher, student, Setup(sharding=name, max_length=64)) for name in ("zero2", "zero3")]
    assert zero[0].parts == zero[1].parts


def test_the_largest_batch_fits_and_one_more_does_not():
    teacher, student = SMALL
    setup = Setup(device=Device(1e9), max_length=512)
    largest = estimate_capacity(teacher, student, setup).largest_batch
    assert largest > 2
    assert estimate_capacity(teacher, student, replace(setup, batch_size=largest)).fits
    assert not estimate_capacity(teacher, student, replace(setup, batch_size=largest + 1)).fits
    assert estimate_capacity(teacher, student, replace(setup, device=Device(1e7))).largest_batch == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": 0}, "devices=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"sharding": "fsdp"}, "ddp, fsdp2, zero2, zero3"),
        ({"optimizer": "sgd"}, "adamw, adamw_8bit"),
        ({"device": Device(0)}, "holds nothing"),
        ({"device": CPU, "devices": 2}, "On a CPU"),
        ({"sharding": "zero3", "lora_rank": 4}, "not with DeepSpeed"),
        ({"fake_quantization": "nf4"}, "fake_quantization='nf4': expected one of None, int8, int4"),
        ({"fake_quantization": "int8", "lora_rank": 4}, "no lora_rank"),
        ({"fake_quantization": "int8", "sharding": "fsdp2"}, "no sharding"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(PlanError, match=words):
        Setup(**changes)


def test_rows_are_no_longer_than_the_context():
    """Training lowers `max_length` to the shorter context: so does the estimate, and it says so."""
    models = [replace_config(config, max_position_embeddings=length) for config, length in zip(SMALL, (96, 48))]
    long, exact = (estimate_capacity(*models, Setup(max_length=length, device=CPU)) for length in (1024, 48))
    assert (long.parts, long.max_length, long.largest_batch) == (exact.parts, 48, exact.largest_batch)
    assert {*long.assumptions} - {*exact.assumptions} == {
        "rows have at most 48 tokens, the shorter context of the two models"
    }


def replace_config(config: LlamaConfig, **changes) -> LlamaConfig:
    return LlamaConfig(**{**config.to_dict(), **changes})


def test_other_vocabularies_are_refused():
    with pytest.raises(PlanError, match="8192 tokens and the student 100"):
        estimate_capacity(PAIRS["dense"][0], LlamaConfig(**{**DENSE, "vocab_size": 100}))


@pytest.mark.slow
def test_the_guide_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "guides" / "will-it-fit.md").read_text(encoding="utf-8")
    command, printed = re.search(r"```bash\n(.*?)```.*?```text\n(.*?)```", page, re.DOTALL).groups()
    arguments = command.replace("\\\n", " ").split()
    published = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(**published, **heads, max_position_embeddings=131072, dtype="bfloat16").save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minitron-hf", arguments[1], str(tmp_path), *arguments[3:]])
    main()
    assert capsys.readouterr().out.split() == printed.split()


def test_the_command_line_says_whether_it_fits(tmp_path, monkeypatch, capsys):
    PAIRS["dense"][0].save_pretrained(tmp_path)

    def minitron(*arguments, command="fit", sizes=("--hidden-size", "192")) -> int:
        monkeypatch.setattr(sys, "argv", ["minitron-hf", command, str(tmp_path), *sizes, *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    fsdp2 = ("--device", "h100", "--devices", "8", "--sharding", "fsdp2")
    assert minitron(*fsdp2) == 0
    said = capsys.readouterr().out
    for words in (
        "each of 8 × h100, fsdp2, 1 × 1,024",
        "optimizer",
        "loss chunks",
        "It fits",
        "tokens/s",
        "40% of the",
    ):
        assert words in said
    assert minitron("--device", "24GB") == 0
    assert "tokens/s" not in capsys.readouterr().out
    for wrong, words in (("--device=gpu", "a size such as 24GB"), ("--sharding=fsdp", "fsdp2")):
        assert minitron("--device", "h100", wrong) == 2
        assert words in capsys.readouterr().err
    assert minitron("--devices", "2") == 2
    assert "--device" in capsys.readouterr().err
    assert minitron("--student", str(tmp_path), *fsdp2, sizes=()) == 0
    assert minitron("--student", str(tmp_path), "--device", "24GB") == 2
    assert "exclude each other" in capsys.readouterr().err
    # The options of `plan` that this command replaces are taken for one release.
    assert minitron(*fsdp2, command="plan") == 0
    said_before = capsys.readouterr()
    assert said_before.out == said
    assert "plan --device is deprecated" in said_before.err
    assert minitron("--devices", "2", command="plan") == 2
    assert "minitron-hf fit" in capsys.readouterr().err


if __name__ == "__main__":
    {"step": a_step_in_this_process, "sharded": what_this_process_holds}[sys.argv[1]]()
