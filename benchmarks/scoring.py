"""Compares the time of scoring with a plain forward pass, and the perplexity sweep over layers with a naive sweep.

Rounds alternate between the compared functions, so that a slow phase of the machine affects all of them. The result
is the median over rounds. Run from the repository root, for example:

    python benchmarks/scoring.py --output benchmarks/results/scoring.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_hf import PrunerConfig, apply_plan, make_plan
from minitron_hf.data import TokenRows, padded_batches
from minitron_hf.families import spec_for
from minitron_hf.files import versions, write_json
from minitron_hf.scoring.activations import ActivationPass
from minitron_hf.scoring.depth import DepthPass
from minitron_hf.scoring.gradients import GradientPass
from minitron_hf.scoring.metrics import METRICS
from reporting import command

#: A common shape at two sizes: one wide enough that matrices dominate, one as deep as an 8-billion-parameter model.
SHAPES = {
    "wide": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 6, "vocab_size": 8192},
    "deep": {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 32, "vocab_size": 1024},
}


def main() -> None:
    """Time everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--only", choices=("pass", "depth"), help="only one of the two comparisons")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results: dict = {
        "command": command(arguments),
        "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "versions": versions(),
    }
    if arguments.only != "depth":
        results["pass"] = compare_passes(arguments)
    if arguments.only != "pass":
        results["depth"] = compare_sweeps(arguments)
    for name, part in results.items():
        if isinstance(part, dict) and "seconds" in part:
            print(f"\n{name}: {part['tokens']:,} tokens, {part['num_parameters']:,} parameters")
            for what, seconds in part["seconds"].items():
                print(f"  {what:28} {seconds['median']:8.3f} s   {seconds['ratio']:.3f} ×")
    if arguments.output:
        write_json(arguments.output, results)


def model_of(shape: str, arguments: argparse.Namespace):
    """A random Llama of a shape, and a batch for it."""
    config = AutoConfig.for_model(
        "llama", num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096, **SHAPES[shape]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).to(arguments.device).eval()
    rows = torch.randint(3, config.vocab_size, (arguments.rows, arguments.length)).tolist()
    [batch] = padded_batches(TokenRows(tuple(map(tuple, rows)), None), arguments.rows)
    return model, {name: tensor.to(arguments.device) for name, tensor in batch.items()}


def compare_passes(arguments: argparse.Namespace) -> dict:
    """Time one scoring pass (all width axes and block importance) and one plain forward pass without the head."""
    model, batch = model_of("wide", arguments)
    spec = spec_for(model.config)

    def watched(*metrics: str) -> Callable[[], None]:
        def run() -> None:
            pass_ = ActivationPass(spec, model, "mean", metrics)
            with torch.no_grad(), pass_.hooks():
                pass_.run(batch)

        return run

    def plain() -> None:
        with torch.no_grad():
            model.base_model(input_ids=batch["input_ids"], use_cache=False)

    def taylor() -> None:
        pass_ = GradientPass(spec, model, METRICS["taylor"])
        with torch.no_grad(), pass_.hooks():
            pass_.run(batch)

    timed = {
        "forward without the head": plain,
        "activation": watched("activation"),
        "all activation metrics": watched("activation", "pre_activation", "contribution"),
        "taylor": taylor,
    }
    pass_ = ActivationPass(spec, model, "mean")
    with torch.no_grad(), pass_.hooks():
        pass_.run(batch)
    accumulators = sum(sums.nbytes for sums in pass_.sums.values()) + pass_.similarity.nbytes
    return {**describe(model, batch), "accumulator_bytes": accumulators, "seconds": rounds(timed, arguments)}


def compare_sweeps(arguments: argparse.Namespace) -> dict:
    """Time the perplexity without each layer: with reused prefixes, and with one student per layer."""
    model, batch = model_of("deep", arguments)
    spec = spec_for(model.config)
    depth = model.config.num_hidden_layers
    students = [apply_plan(model, make_plan(model, PrunerConfig(layers_to_drop=[layer]))) for layer in range(depth)]

    def scores(a_model, candidates) -> list[float]:
        pass_ = DepthPass(spec, a_model, "perplexity", candidates)
        with torch.no_grad():
            pass_.run(batch)
        return pass_.scores()

    def naive() -> None:
        with torch.no_grad():
            for student in students:
                logits = student(input_ids=batch["input_ids"], use_cache=False).logits
                found.append(
                    float(
                        torch.nn.functional.cross_entropy(
                            logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
                        ).exp()
                    )
                )

    found: list[float] = []
    naive()
    reused = scores(model, [(layer,) for layer in range(depth)])
    torch.testing.assert_close(torch.tensor(reused), torch.tensor(found), rtol=1e-3, atol=0)
    timed = {
        "a student for every layer": naive,
        "prefixes reused": lambda: scores(model, [(layer,) for layer in range(depth)]),
    }
    return {**describe(model, batch), "seconds": rounds(timed, arguments)}


def describe(model, batch) -> dict:
    """Description of a measurement."""
    return {
        "num_parameters": model.num_parameters(),
        "tokens": batch["input_ids"].numel(),
        "num_hidden_layers": model.config.num_hidden_layers,
    }


def rounds(timed: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> dict:
    """Median seconds of each function, and its median ratio to the first function of the same round."""
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(arguments.rounds + 1):
        for name, run in timed.items():
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - start)
    first = next(iter(taken.values()))
    return {
        name: {
            "median": statistics.median(seconds),
            "ratio": statistics.median(one / other for one, other in zip(seconds, first)),
            "rounds": seconds,
        }
        for name, seconds in taken.items()
    }


if __name__ == "__main__":
    main()
