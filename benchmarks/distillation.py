"""Measures time and memory of a distillation step, relative to the computation that no implementation can avoid.

That computation is called the floor: the forward pass of the teacher's backbone, the forward and backward pass of the
student's backbone, and the four matrix products with the output heads (two for the logits, two for the gradients)
over chunks of tokens, without any loss. The arms are this package's losses and published losses of other libraries.
All arms get the same hidden states of the same tokens. First, their gradients are compared with a plain
implementation.

Time: rounds alternate between all arms. The result is the median over rounds of the ratio to the floor of the same
round. On a CPU these are CPU seconds, which other work on the machine changes little. Memory: the peak of head, loss
and their gradients, without the hidden states and one gradient of the weight, relative to one float32 [tokens,
vocabulary]. Each arm is measured in its own process. The run is added to the output file. Run from the repository
root, for example:

    python benchmarks/distillation.py --shape narrow --vocab 128256 --tokens 1024 --output results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_hf.distillation.intermediate import StatePair, distance, needed_states, state_pairs, student_distances
from minitron_hf.files import read_json, versions, write_json
from minitron_hf.losses.fused import distillation_loss
from minitron_hf.losses.heads import OutputHead, output_head
from minitron_hf.losses.signals import DenseSignal, TopKSignal, top_k_signal
from reporting import command, peak_memory

#: Student and teacher: layers, hidden size, intermediate size, heads. Widths as 8B → 4B (three quarters) or so.
SHAPES = {
    "narrow": ((4, 256, 704, 4), (6, 384, 1024, 6)),
    "wide": ((2, 2048, 5632, 16), (2, 2688, 7168, 21)),
}
FLOOR = "floor"
FLOOR_CHUNK = 256
TOP_K = 64


@dataclass(frozen=True)
class Inputs:
    """Inputs of a loss: hidden states of N tokens after the final norms, both heads, and next tokens."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    pairs: tuple[StatePair, ...] = ()
    states: tuple[Tensor, ...] = ()
    teacher_states: tuple[Tensor, ...] = ()
    projection: torch.nn.Linear | None = None
    cached: TopKSignal | None = None


@dataclass(frozen=True)
class Arm:
    """A loss, summed over the tokens; the plain loss that it must equal; and its other requirements.

    `copies` of one float32 [N, V] are what a loss of whole logits may take in a trainer, about.
    """

    loss: Callable[[Inputs], Tensor]
    plain: Callable[[Inputs], Tensor] | None
    states: bool = False
    cached: bool = False
    cuda_only: bool = False
    copies: float = 0.0


# ---- Plain losses, in the dtype of their inputs ----


def log_probabilities(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student, [N, V] each."""
    return (
        functional.linear(inputs.teacher_hidden, inputs.teacher_weight).log_softmax(-1),
        functional.linear(inputs.hidden, inputs.weight).log_softmax(-1),
    )


def plain_kl(inputs: Inputs) -> Tensor:
    log_p, log_q = log_probabilities(inputs)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def plain_reverse_kl(inputs: Inputs) -> Tensor:
    log_p, log_q = log_probabilities(inputs)
    return functional.kl_div(log_p, log_q, reduction="sum", log_target=True)


def plain_jsd(inputs: Inputs) -> Tensor:
    log_p, log_q = log_probabilities(inputs)
    mixture = ((log_p.exp() + log_q.exp()) / 2).log()
    return sum(functional.kl_div(mixture, x, reduction="sum", log_target=True) / 2 for x in (log_p, log_q))


def plain_top_k(inputs: Inputs) -> Tensor:
    signal = inputs.cached
    log_q = log_probabilities(inputs)[1].gather(1, signal.tokens)
    log_q = torch.cat([log_q, torch.log1p(-log_q.exp().sum(1, keepdim=True))], 1)
    log_p = torch.cat([signal.log_probs, signal.log_tail[:, None]], 1).to(log_q.dtype)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def plain_ce(inputs: Inputs) -> Tensor:
    return functional.cross_entropy(functional.linear(inputs.hidden, inputs.weight), inputs.labels, reduction="sum")


def plain_states(inputs: Inputs) -> Tensor:
    return sum(
        distance(inputs.projection(student), teacher, pair.distance).sum()
        for pair, student, teacher in zip(inputs.pairs, inputs.states, inputs.teacher_states, strict=True)
    )


# ---- The floor, this package, and others ----


class Products(torch.autograd.Function):
    """The four products with the heads, chunk by chunk; the student's logits are used in place of their gradient."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        """Returns a zero."""
        shape = (min(FLOOR_CHUNK, len(hidden)), len(weight))
        logits, teacher_logits = hidden.new_empty(shape), hidden.new_empty(shape)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), FLOOR_CHUNK):
            chunk = hidden[start : start + FLOOR_CHUNK]
            z = torch.mm(chunk, weight.t(), out=logits[: len(chunk)])
            torch.mm(teacher_hidden[start : start + FLOOR_CHUNK], teacher_weight.t(), out=teacher_logits[: len(z)])
            torch.mm(z, weight, out=grad_hidden[start : start + FLOOR_CHUNK])
            grad_weight.addmm_(z.t(), chunk)
        ctx.gradients = grad_hidden, grad_weight
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the logits' squares."""
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients, None, None)


def floor(inputs: Inputs) -> Tensor:
    return Products.apply(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight)


def ours(**options) -> Callable[[Inputs], Tensor]:
    """`distillation_loss`, and distances of states where there are any."""

    def loss(inputs: Inputs) -> Tensor:
        teacher = inputs.cached or DenseSignal(inputs.teacher_hidden, OutputHead(inputs.teacher_weight))
        total = distillation_loss(inputs.hidden, OutputHead(inputs.weight), teacher, inputs.labels, **options).total
        if inputs.pairs:
            everywhere = torch.arange(len(inputs.labels), device=inputs.labels.device)
            shown = {pair.student: state[None] for pair, state in zip(inputs.pairs, inputs.states, strict=True)}
            terms = student_distances(inputs.pairs, shown, inputs.teacher_states, everywhere, inputs.projection)
            total = total + sum(values.sum() for values in terms.values())
        return total

    return loss


def trl_chunked(beta: float) -> Callable[[Inputs], Tensor]:
    """The loss of TRL's `DistillationTrainer`."""

    def loss(inputs: Inputs) -> Tensor:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mask = torch.ones_like(inputs.labels)[None]
        student, teacher = inputs.hidden[None], inputs.teacher_hidden[None]
        return _chunked_divergence_loss(
            student, teacher, inputs.weight, inputs.teacher_weight, mask, beta, num_items_in_batch=1
        )[0]

    return loss


def trl_gkd(beta: float) -> Callable[[Inputs], Tensor]:
    """The loss of TRL's `GKDTrainer`, of whole logits."""

    def loss(inputs: Inputs) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        student = functional.linear(inputs.hidden, inputs.weight)[None]
        with torch.no_grad():
            teacher = functional.linear(inputs.teacher_hidden, inputs.teacher_weight)[None]
        return GKDTrainer.generalized_jsd_loss(student, teacher, inputs.labels[None], beta, num_items_in_batch=1)

    return loss


def liger_jsd(inputs: Inputs) -> Tensor:
    """Liger Kernel's fused linear Jensen-Shannon divergence; its mean over tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    return len(inputs.labels) * fused(
        inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
    )


ARMS = {
    FLOOR: Arm(floor, None),
    "KL": Arm(ours(), plain_kl),
    "KL + CE": Arm(ours(ce_weight=1.0), lambda i: plain_kl(i) + plain_ce(i)),
    "KL + states + embeddings": Arm(ours(), lambda i: plain_kl(i) + plain_states(i), states=True),
    "KL + CE + states + embeddings": Arm(
        ours(ce_weight=1.0), lambda i: plain_kl(i) + plain_ce(i) + plain_states(i), states=True
    ),
    "reverse KL": Arm(ours(divergence="reverse_kl"), plain_reverse_kl),
    "JSD": Arm(ours(divergence="jsd"), plain_jsd),
    f"KL from a cache of {TOP_K}": Arm(ours(), plain_top_k, cached=True),
    "plain torch KL": Arm(plain_kl, plain_kl, copies=7),
    "TRL chunked KL": Arm(trl_chunked(0.0), plain_kl),
    "TRL chunked JSD": Arm(trl_chunked(0.5), plain_jsd),
    "TRL GKD KL": Arm(trl_gkd(0.0), plain_kl, copies=9),
    "TRL GKD JSD": Arm(trl_gkd(0.5), plain_jsd, copies=17),
    "Liger JSD": Arm(liger_jsd, plain_jsd, cuda_only=True),
}


def main() -> None:
    """Check the arms of one setting, measure time and memory, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="all by default")
    parser.add_argument("--quick", action="store_true", help="three rounds of the floor, our KL and the plain one")
    parser.add_argument("--no-time", action="store_true", help="memory only")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-limit", type=float, default=16, help="GB; losses that need more are skipped")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="JSON file; the run is added to those in it")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokens % min(arguments.length, arguments.tokens):
        parser.error(f"--tokens {arguments.tokens}: expected a multiple of --length {arguments.length}")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(loss_bytes(arguments.memory_of, arguments)))
        return
    written = command(arguments, together=("arms",))
    if arguments.quick:
        arguments.rounds, arguments.arms = 3, [FLOOR, "KL", "plain torch KL"]
    arguments.arms = arguments.arms or list(ARMS)
    reasons = {name: reason for name in arguments.arms if (reason := why_not(name, arguments))}
    arms = [FLOOR, *(name for name in arguments.arms if name != FLOOR and name not in reasons)]
    found: dict[str, dict] = {name: {} for name in arms} | {name: {"skipped": why} for name, why in reasons.items()}
    if not arguments.no_time:
        for name, values in time_arms(arms, arguments).items():
            found[name] |= values
    if not arguments.no_memory:
        for name in arms[1:]:
            found[name]["copies"] = memory_of(name, arguments) / (4 * arguments.tokens * arguments.vocab)
    setting = {
        "command": written,
        "shape": dict(zip(("student", "teacher"), (layout(*sizes) for sizes in SHAPES[arguments.shape]))),
        "vocab_size": arguments.vocab,
        "tokens": arguments.tokens,
        "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "versions": versions(),
        "arms": found,
    }
    print(f"\n{arguments.shape}, vocabulary {arguments.vocab:,}, {arguments.tokens:,} tokens, {arguments.dtype}\n")
    print(table(found))
    if arguments.output:
        runs = read_json(arguments.output)["runs"] if arguments.output.is_file() else []
        others = [run for run in runs if (run["command"], run["device"]) != (setting["command"], setting["device"])]
        write_json(arguments.output, {"runs": [*others, setting]})


def why_not(name: str, arguments: argparse.Namespace) -> str | None:
    """The reason why an arm cannot run here, or None."""
    arm = ARMS[name]
    needed = arm.copies * 4 * arguments.tokens * arguments.vocab / 1e9
    if needed > arguments.memory_limit:
        return f"whole logits take about {needed:.0f} GB, more than --memory-limit {arguments.memory_limit:g}"
    if not arm.cuda_only:
        return None
    if arguments.device == "cpu":
        return "needs CUDA (Triton kernels)"
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return "liger-kernel is not installed"
    return None


def layout(layers: int, hidden: int, intermediate: int, heads: int) -> dict:
    """The sizes of a Llama."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


# ---- Time ----


@dataclass
class Setting:
    """Both models and a batch."""

    student: torch.nn.Module
    teacher: torch.nn.Module
    tokens: Tensor
    pairs: tuple[StatePair, ...]
    projection: torch.nn.Linear

    def inputs(self, arm: Arm, cached: TopKSignal | None = None) -> Inputs:
        """Forward passes of the backbones that an arm needs."""
        pairs = self.pairs if arm.states else ()
        # The last position of a row predicts nothing in training. Here it is given a label, so that shapes are round.
        labels = self.tokens.roll(-1, 1).flatten()
        weights = output_head(self.student).weight, output_head(self.teacher).weight
        if arm.cached:
            teacher_hidden = torch.empty(0, device=self.tokens.device)
            teacher_states: tuple[Tensor, ...] = ()
        else:
            with torch.no_grad():
                teacher_hidden, teacher_states = self.states_of(self.teacher, pairs, "teacher")
        hidden, states = self.states_of(self.student, pairs, "student")
        return Inputs(
            hidden,
            weights[0],
            teacher_hidden,
            weights[1],
            labels,
            pairs,
            states,
            teacher_states,
            self.projection,
            cached if arm.cached else None,
        )

    def states_of(self, model, pairs: tuple[StatePair, ...], whose) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states [N, H], and those of all pairs."""
        extra = {"output_hidden_states": needed_states(pairs, whose)} if pairs else {}
        output = model.base_model(input_ids=self.tokens, use_cache=False, **extra)
        chosen = tuple(output.hidden_states[getattr(pair, whose)].flatten(0, 1) for pair in pairs)
        return output.last_hidden_state.flatten(0, 1), chosen


def make_setting(arguments: argparse.Namespace) -> Setting:
    """Two random Llamas, with an entropy of the next token as in trained models, and random tokens."""
    torch.manual_seed(0)
    models = []
    for sizes in SHAPES[arguments.shape]:
        config = AutoConfig.for_model(
            "llama", vocab_size=arguments.vocab, max_position_embeddings=4096, **layout(*sizes)
        )
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
        with torch.no_grad():  # logits with a standard deviation of 3
            model.get_output_embeddings().weight.mul_(3 / (0.02 * config.hidden_size**0.5))
        models.append(model.to(arguments.device))
    student, teacher = models
    length = min(arguments.length, arguments.tokens)
    tokens = torch.randint(arguments.vocab, (arguments.tokens // length, length), device=arguments.device)
    depths = (model.config.num_hidden_layers for model in models)
    projection = torch.nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False)
    return Setting(
        student.train(),
        teacher.eval().requires_grad_(False),
        tokens,
        state_pairs("cosine", "cosine", None, *depths),
        projection.to(tokens.device, student.dtype),
    )


def time_arms(arms: list[str], arguments: argparse.Namespace) -> dict[str, dict]:
    """Seconds of each arm, and its median ratio to the floor of the same round."""
    setting = make_setting(arguments)
    with torch.no_grad():
        seen = setting.inputs(ARMS[FLOOR])
        cached = top_k_signal(DenseSignal(seen.teacher_hidden, OutputHead(seen.teacher_weight)), TOP_K)
    found = check(arms, setting)
    trained = [*setting.student.parameters(), setting.projection.weight]

    def step(arm: Arm) -> None:
        inputs = setting.inputs(arm, cached)
        (arm.loss(inputs) / len(inputs.labels)).backward()
        for parameter in trained:
            parameter.grad = None

    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(arguments.rounds + 1):
        for name in arms:
            synchronize(arguments)
            start, cpu_start = time.perf_counter(), time.process_time()
            step(ARMS[name])
            synchronize(arguments)
            if number:  # the first round warms up
                taken[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    which = 1 if arguments.device == "cpu" else 0
    for name, times in taken.items():
        seconds, cpu_seconds = zip(*times)
        ratios = [one[which] / other[which] for one, other in zip(times, taken[FLOOR])]
        found[name] |= {
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "seconds": statistics.median(seconds),
            "cpu_seconds": statistics.median(cpu_seconds),
            "rounds": times,
        }
    return found


def synchronize(arguments: argparse.Namespace) -> None:
    """Wait for the device."""
    if arguments.device != "cpu":
        torch.cuda.synchronize()


def check(arms: list[str], setting: Setting, num_tokens: int = 160) -> dict[str, dict]:
    """Largest relative error of a gradient against the plain loss in float64.

    Raises:
        AssertionError: if the error exceeds rounding: twice the error of the plain loss, both in float32.
    """
    found: dict[str, dict] = {name: {} for name in arms}
    plain: dict[Callable, tuple[list[Tensor], list[float]]] = {}
    for name in arms:
        arm = ARMS[name]
        if arm.plain is None:
            continue
        with torch.no_grad():
            inputs = part(setting.inputs(replace(arm, cached=False)), num_tokens)
            if arm.cached:
                dense = DenseSignal(inputs.teacher_hidden, OutputHead(inputs.teacher_weight))
                inputs = replace(inputs, cached=top_k_signal(dense, TOP_K))
        if arm.plain not in plain:
            exact = gradients(arm.plain, converted(inputs, torch.float64))
            plain[arm.plain] = exact, relative_errors(gradients(arm.plain, inputs), exact)
        exact, of_plain = plain[arm.plain]
        errors = relative_errors(gradients(arm.loss, inputs), exact)
        single = inputs.weight.dtype == torch.float32
        limits = [2 * error + 1e-5 if single else 5e-2 for error in of_plain]
        assert all(error < limit for error, limit in zip(errors, limits, strict=True)), (
            f"{name}: gradients differ from the plain loss in float64 by {errors}; expected less than {limits}"
        )
        found[name] = {"gradient_error": max(errors), "gradient_error_of_plain": max(of_plain)}
    return found


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Norms of the differences over norms."""
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


def part(inputs: Inputs, num_tokens: int) -> Inputs:
    """A part of the inputs: two chunks of tokens, and as much of the vocabulary as fits into memory in float64."""
    rows = min(len(inputs.weight), (1 << 27) // inputs.teacher_weight.shape[1])
    first = {name: getattr(inputs, name)[:num_tokens] for name in ("hidden", "teacher_hidden", "labels")}
    first["labels"] = first["labels"] % rows
    weights = {name: getattr(inputs, name)[:rows] for name in ("weight", "teacher_weight")}
    states = {name: tuple(s[:num_tokens] for s in getattr(inputs, name)) for name in ("states", "teacher_states")}
    return replace(inputs, **first, **weights, **states)


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same in another dtype."""
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    projection = torch.nn.Linear(*inputs.projection.weight.shape[::-1], bias=False, dtype=dtype)
    projection = projection.to(inputs.hidden.device)
    with torch.no_grad():
        projection.weight.copy_(inputs.projection.weight)
    states = {name: tuple(s.to(dtype) for s in getattr(inputs, name)) for name in ("states", "teacher_states")}
    return replace(inputs, **{n: getattr(inputs, n).to(dtype) for n in names}, **states, projection=projection)


def gradients(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> list[Tensor]:
    """Of the student's states, its head, and the map between widths."""
    hidden, weight, *states = (x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight, *inputs.states))
    inputs = replace(inputs, hidden=hidden, weight=weight, states=tuple(states))
    targets = [hidden, weight, *states, *([inputs.projection.weight] if states else [])]
    return list(torch.autograd.grad(loss(inputs), targets))


# ---- Memory ----


def memory_of(name: str, arguments: argparse.Namespace) -> int:
    """The result of `loss_bytes`, computed in a new process."""
    sizes = ("shape", "vocab", "tokens", "threads", "device", "dtype")
    given = [word for size in sizes for word in (f"--{size}", str(getattr(arguments, size)))]
    done = subprocess.run(
        [sys.executable, __file__, *given, "--memory-of", name], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def loss_bytes(name: str, arguments: argparse.Namespace) -> int:
    """Peak of one loss and its gradients, beyond its inputs and one gradient of the states and of the weight."""
    arm = ARMS[name]
    random_step(arm, arguments, 16, 4096)  # memory that libraries allocate once
    inputs = random_inputs(arm, arguments, arguments.tokens, arguments.vocab)
    kept = [inputs.hidden, inputs.weight, *inputs.states, *([inputs.projection.weight] if arm.states else [])]
    before = peak_bytes(arguments, reset=True)
    arm.loss(inputs).backward()
    return peak_bytes(arguments) - before - sum(tensor.nbytes for tensor in kept)


def random_step(arm: Arm, arguments: argparse.Namespace, tokens: int, vocab: int) -> None:
    """Forward and backward pass of a loss."""
    arm.loss(random_inputs(arm, arguments, tokens, vocab)).backward()


def random_inputs(arm: Arm, arguments: argparse.Namespace, tokens: int, vocab: int) -> Inputs:
    """Inputs of a loss without models."""
    (depth, width, *_), (teacher_depth, teacher_width, *_) = SHAPES[arguments.shape]
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}

    def normal(*shape: int, scale: float = 1.0, train: bool = False) -> Tensor:
        return torch.empty(shape, **options).normal_(0, scale).requires_grad_(train)

    pairs = state_pairs("cosine", "cosine", None, depth, teacher_depth) if arm.states else ()
    cached = None
    if arm.cached:
        ids = torch.arange(tokens * TOP_K, device=arguments.device).reshape(tokens, TOP_K) % vocab
        log_p = torch.full((tokens, TOP_K + 1), -1.0, device=arguments.device).log_softmax(-1)
        cached = TopKSignal(ids, log_p[:, :-1].contiguous(), log_p[:, -1].contiguous(), vocab)
    return Inputs(
        normal(tokens, width, train=True),
        normal(vocab, width, scale=3 / width**0.5, train=True),
        normal(tokens, teacher_width),
        normal(vocab, teacher_width, scale=3 / teacher_width**0.5),
        torch.randint(vocab, (tokens,), device=arguments.device),
        pairs,
        tuple(normal(tokens, width, train=True) for _ in pairs),
        tuple(normal(tokens, teacher_width) for _ in pairs),
        torch.nn.Linear(width, teacher_width, bias=False, **options),
        cached,
    )


def peak_bytes(arguments: argparse.Namespace, *, reset: bool = False) -> int:
    """Peak memory since the last reset."""
    if arguments.device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def table(found: dict[str, dict]) -> str:
    """Markdown."""
    lines = ["| loss | time × floor | rounds | CPU seconds | copies | gradient error |", "|---|---|---|---|---|---|"]
    for name, values in found.items():
        if "skipped" in values:
            lines.append(f"| {name} | skipped: {values['skipped']} | | | | |")
            continue
        low, high = values.get("ratio_range", (None, None))
        cells = [
            f"{values['ratio']:.3f}" if "ratio" in values else "",
            f"{low:.2f}-{high:.2f}" if low else "",
            f"{values['cpu_seconds']:.3f}" if "cpu_seconds" in values else "",
            f"{values['copies']:.3f}" if "copies" in values else "",
            f"{values['gradient_error']:.1e}" if "gradient_error" in values else "",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
