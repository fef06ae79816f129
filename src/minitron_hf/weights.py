"""Reads, replaces and fingerprints the tensors of a model, wherever Accelerate keeps them."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .compat import offload_hooks
from .errors import UnsupportedModelError, shortened
from .families.tensors import is_quantised, own_parameters

#: Values of a parameter that `model_digest` reads, at most.
DIGEST_SAMPLES = 1024


def narrowed(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Computed values of a weight in its stored dtype.

    Args:
        values: in a dtype that is as wide or wider.
        dtype: of the weight.
        name: of the weight, for messages.

    Raises:
        UnsupportedModelError: if finite values exceed the range of the dtype, as those of float16 may.
    """
    found = values.to(dtype)
    if dtype != torch.float16 or type(values) not in (torch.Tensor, torch.nn.Parameter):
        return found  # a tensor whose values are not read yet is checked when it is written
    if not bool((found.isfinite() | ~values.isfinite()).all()):
        raise UnsupportedModelError(
            f"{name}: a value of {float(values.abs().max()):.4g} exceeds the range of float16, "
            f"{torch.finfo(dtype).max:,.0f}. Save the teacher in bfloat16 or float32 and prune that. If the repair "
            "refitted this weight, more calibration text or a larger ridge may help, too."
        )
    return found


def require_complete(model: PreTrainedModel, name: str, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not fit its config: Transformers fills gaps at random and drops surplus tensors.

    Args:
        model: what was loaded.
        name: folder or Hub id of the checkpoint.
        report: Transformers' loading report.

    Raises:
        UnsupportedModelError: naming tensors that are missing, of another shape, or of layers beyond the config's.
    """
    if absent := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"The checkpoint {name!r} lacks {len(absent)} of the parameters of {type(model).__name__}: "
            f"{shortened(absent)}. Expected a complete causal language model, its head included; "
            "check that the whole checkpoint was copied, and that it is not a base model or an adapter."
        )
    if wrong := sorted(report["mismatched_keys"], key=str):
        lines = [f"{key} is {tuple(found)}, expected {tuple(expected)}" for key, found, expected in wrong]
        raise UnsupportedModelError(
            f"The weights of {name!r} do not fit its config.json: {shortened(lines, '; ')}. "
            "Save model and config together with save_pretrained."
        )
    if beyond := sorted(key for key in report["unexpected_keys"] if _is_beyond(model, key)):
        raise UnsupportedModelError(
            f"The checkpoint {name!r} holds more layers than its config.json says: {shortened(beyond)}. "
            "The model would lack them. Correct the config, or save model and config together with save_pretrained."
        )


#: Config fields with a number of layers that predict further tokens, stored after the others and in no stock model.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


def _is_beyond(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to an entry of a module list after the model's last one."""
    modules = dict(model.named_modules())
    config = model.config.get_text_config()
    further = max(getattr(config, name, None) or 0 for name in FURTHER_LAYERS)
    for found in re.finditer(r"\.(\d+)\.", key):
        path = key[: found.start()]
        # A checkpoint of a base model has names without the model's prefix.
        entries = modules.get(path, modules.get(f"{model.base_model_prefix}.{path}"))
        if isinstance(entries, torch.nn.ModuleList) and int(found[1]) >= len(entries) + further:
            return True
    return False


def model_digest(model: PreTrainedModel) -> str:
    """Fingerprint of a model's weights: SHA-256 over name, shape and a sample of every parameter, sorted by name.

    At most `DIGEST_SAMPLES` values per parameter are read, so that an 8-billion-parameter model takes a moment. They
    are compared in float32: a float16 or bfloat16 checkpoint has the same digest after it is loaded in float32.
    It detects other weights, not a change of single values.

    Returns:
        `"sha256:<hex>"`.

    Raises:
        UnsupportedModelError: if a parameter has no values (meta device).
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(own_parameters(model), key=lambda item: item[0]):
        # An odd stride, so that the sample does not stay in one column of a matrix whose width divides it.
        stride = -(-parameter.numel() // DIGEST_SAMPLES) | 1
        values = plain_tensor(tensor_values(model, name).detach())
        sample = values.reshape(-1)[::stride].to(device="cpu", dtype=torch.float32)
        sha.update(f"{name} {tuple(parameter.shape)}\n".encode())
        sha.update(sample.contiguous().numpy().tobytes())
    return f"sha256:{sha.hexdigest()}"


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor that torchao has quantised, which few operations know; any other tensor itself."""
    quantised: Any = tensor
    return quantised.dequantize() if type(tensor).__module__.startswith("torchao.") else tensor


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor as it is kept: of one that torchao has quantised, of its parts."""
    if not type(tensor).__module__.startswith("torchao."):
        return tensor.numel() * tensor.element_size()
    quantised: Any = tensor
    return sum(stored_bytes(getattr(tensor, name)) for name in quantised.__tensor_flatten__()[0])


def without_gguf_remains(model: Any) -> Any:
    """A model that was read from a GGUF file and dequantised, without the traces of GGUF in it.

    Transformers 5.23 does not save models that are marked as read from GGUF. The given object is not changed; the
    other one shares its weights.
    """
    if not getattr(model, "is_quantized", False) or is_quantised(model):
        return model
    plain = copy.copy(model)
    plain.config = copy.deepcopy(model.config)
    del plain.config.quantization_config
    plain.is_quantized, plain.hf_quantizer = False, None
    return plain


def on_meta(model: PreTrainedModel) -> bool:
    """Whether some of the weights have no values: they are on the meta device, and not because they are offloaded."""
    parameters = model.named_parameters()
    return any(parameter.is_meta and _offloaded(model, name) is None for name, parameter in parameters)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for a model's inputs; the CPU where its embeddings are offloaded, and Accelerate moves them on."""
    device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """A few token ids, [1, 8], for passes that try how the modules of a model depend on each other."""
    return torch.arange(8, device=input_device(model))[None]


def put_on_one_device(model: torch.nn.Module, device: torch.device) -> None:
    """Put a model made of the tensors of another one, which `device_map` has spread, on one device.

    Accelerate's hooks move activations between the devices of that one, and the new model has none.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        model.to(device)


def tensor_values(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A parameter or saved buffer with its values, wherever they are.

    `device_map="auto"` leaves what does not fit on the meta device and fetches it from main memory or disk for every
    forward pass (Accelerate's offloading). Here it is fetched by itself, onto the CPU, and not kept.

    Raises:
        UnsupportedModelError: if it has no values (meta device).
    """
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), leaf)
    if not tensor.is_meta:
        return tensor
    weights = _offloaded(model, name)
    if weights is None:
        raise UnsupportedModelError(
            f"The parameter {name!r} has no values (it is on the meta device). Load the weights onto a device."
        )
    return weights[0][weights[1]]


def set_tensor(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or saved buffer, whatever its shape."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in dict(module.named_buffers(recurse=False)):
        setattr(module, leaf, tensor.contiguous())
    else:
        requires_grad = module.get_parameter(leaf).requires_grad
        setattr(module, leaf, torch.nn.Parameter(tensor.contiguous(), requires_grad=requires_grad))


def _offloaded(model: PreTrainedModel, name: str) -> tuple[Mapping[str, torch.Tensor], str] | None:
    """Where Accelerate keeps an offloaded tensor: a mapping, and the key in it."""
    path, _, leaf = name.rpartition(".")
    while True:
        for hook in offload_hooks(model.get_submodule(path)):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map, leaf
        if not path:
            return None
        # A hook may hold the tensors of all modules below its own.
        path, _, module = path.rpartition(".")
        leaf = f"{module}.{leaf}"
