"""Forward hooks on the modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


class Hooks(ExitStack):
    """Forward hooks on modules of a model, by path; leaving the context removes them.

    Attributes:
        modules: path → module; a module that is shared has several paths.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def on_input(self, path: str, observe: Callable[[Tensor], None]) -> None:
        """Call a function with the input of a module, before its forward."""
        hook = self.modules[path].register_forward_pre_hook(
            lambda _, args, kwargs: observe(first_input(args, kwargs)), with_kwargs=True
        )
        self.callback(hook.remove)

    def on_output(self, path: str, observe: Callable[[Tensor], None]) -> None:
        """Call a function with the output of a module; of several, with the first."""
        hook = self.modules[path].register_forward_hook(
            lambda _, __, output: observe(output[0] if isinstance(output, tuple) else output)
        )
        self.callback(hook.remove)


@contextmanager
def replaced_forwards(replaced: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let modules call other functions meanwhile.

    Args:
        replaced: modules, and what each calls instead of its `forward`.
    """
    own = [(module, module.__dict__.get("forward")) for module, _ in replaced]
    try:
        for module, function in replaced:
            module.forward = function
        yield
    finally:
        for module, forward in own:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:  # Accelerate's, which fetches offloaded weights
                module.forward = forward


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module is called on: its first argument, positional or by keyword."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def with_first_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with another tensor to call it on."""
    if args:
        return (state, *args[1:]), dict(kwargs)
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: state}
