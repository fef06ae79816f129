"""Measures the memory that activation checkpointing, an offloaded teacher and a quantised teacher save.

Activations: bytes that are stored for the backward pass, per token and layer of a student with the shape of Llama 3.1
8B, float32 weights and bf16 autocast. They are counted on fake tensors, which have shapes and no values. The
difference between two lengths is used, so that memory that does not grow with the tokens cancels out.

Teacher: bytes per parameter of its weights that stay on the device. With its layers in main memory
(`offload_layers`), they are counted on a model without values. Quantised teachers are small models of random weights,
loaded with each installed library as in a recipe. Run from the repository root; it takes a minute:

    python benchmarks/memory.py --output results.json
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron_hf import load_model
from minitron_hf.files import versions, write_json
from minitron_hf.models import empty_model
from reporting import command

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {**SHAPE, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 1, "vocab_size": 512}
#: As in `teacher_model_init_kwargs` of a recipe.
QUANTISATIONS = {
    "int8": ("bitsandbytes", {"load_in_8bit": True}),
    "nf4": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "int8 (torchao)": ("torchao", None),
}


def main() -> None:
    """Count everything, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    results = {
        "command": command(arguments),
        "versions": versions() | {name: version_of(name) for name in ("bitsandbytes", "torchao")},
        "shape": SHAPE,
        "activation_bytes_per_token_and_layer": {
            name: activation_bytes(checkpointed) for name, checkpointed in (("plain", False), ("checkpointed", True))
        },
        "teacher": offloaded(),
        "teacher_bytes_per_parameter_of_layers": {"bfloat16": 2.0, **quantised()},
    }
    at_hand, total = results["teacher"]["parameters_at_hand"], results["teacher"]["num_parameters"]
    results["teacher_gigabytes"] = {"offloaded": 2 * at_hand / 1e9} | {
        name: (2 * at_hand + size * (total - at_hand)) / 1e9
        for name, size in results["teacher_bytes_per_parameter_of_layers"].items()
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    if arguments.output:
        write_json(arguments.output, results)


def activation_bytes(checkpointed: bool) -> float:
    """Bytes per token and layer that are stored for the backward pass, with and without activation checkpointing."""
    saved = {
        (layers, tokens): saved_bytes(layers, tokens, checkpointed) for layers in (2, 4) for tokens in (1024, 2048)
    }
    per_token = {layers: (saved[layers, 2048] - saved[layers, 1024]) / 1024 for layers in (2, 4)}
    return (per_token[4] - per_token[2]) / 2


def saved_bytes(layers: int, tokens: int, checkpointed: bool) -> int:
    """Bytes of all distinct storages that autograd keeps."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers, "use_cache": False})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros((1, tokens), dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = model.model(ids)
        weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        assert output.last_hidden_state.requires_grad
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


def offloaded() -> dict[str, int]:
    """Parameters that stay on the device with offloaded layers, and the largest number that is fetched at once."""
    model = empty_model(LlamaConfig(**SHAPE))
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    counts = [sum(weight.numel() for weight in module.parameters()) for module in (model, *layers)]
    return {
        "num_parameters": counts[0],
        "parameters_at_hand": counts[0] - sum(counts[1:]),
        "parameters_fetched_at_once": max(weight.numel() for layer in layers for weight in layer.parameters()),
    }


def quantised() -> dict[str, float]:
    """Bytes per parameter of the linear maps of a layer, scales included."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=torch.bfloat16).save_pretrained(folder)
        plain = load_model(folder)
        counts = {name: weight.numel() for name, weight in plain.named_parameters() if "_proj" in name}
        for name, (library, values) in QUANTISATIONS.items():
            if importlib.util.find_spec(library) is None:
                print(f"{name}: {library} is not installed")
                continue
            model = load_model(folder, dtype=torch.bfloat16, quantization_config=values or torchao_int8())
            sizes = {key: sum(map(bytes_of, parts_of(model, key))) for key in counts}
            found[name] = sum(sizes.values()) / sum(counts.values())
    return found


def torchao_int8():
    """The configuration of TorchAO's weight-only int8."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def parts_of(model: torch.nn.Module, name: str) -> list[torch.Tensor]:
    """The tensors inside a quantised weight: values and scales."""
    weight = model.get_parameter(name)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return [weight.data, *(value for value in vars(state).values() if isinstance(value, torch.Tensor))]
    if getattr(weight, "SCB", None) is not None:
        return [weight.data, weight.SCB]
    return [weight.data]


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of all tensors inside a TorchAO tensor."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def version_of(library: str) -> str | None:
    """The installed version, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
