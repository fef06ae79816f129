"""SliceGPT (arXiv 2401.15024): every block of a Llama in its own principal axes, of which the first ones stay.

The blocks have different axes, so the residual path has to turn from one to the next: an adapter Qᵀ₋₁Q in front of
every sum, which no stock class has. The student is a module of this file, for measurements. The norms' weights are
folded into what reads them, so a tied head becomes a matrix of its own.

With full rotations Q and the first d columns kept, the student is the teacher whose residual stream is projected to d
directions before every block. Directions are found in order, on the stream of the blocks that are sliced already.

Legend of shape suffixes: H hidden width of the teacher, D of the student, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minitron_hf.data import TokenRows

from .peer_criteria import LayerWalk

#: The width is a multiple of this (`--round-interval` of the authors' script).
MULTIPLE = 8


class RootMeanSquare(nn.Module):
    """A norm without weights, which divides by the teacher's width: the channels that were sliced count as zero."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """The input over its root mean square, computed in float32."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)


class SlicedLayer(nn.Module):
    """A decoder layer with an adapter in front of both sums."""

    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.norm = RootMeanSquare(width, layer.input_layernorm.variance_epsilon)
        self.attention_adapter = self.mlp_adapter = nn.Parameter(torch.empty(0))

    def between(self, x: Tensor, **given: Any) -> Tensor:
        """The stream between attention and MLP."""
        return x @ self.attention_adapter + self.attention(hidden_states=self.norm(x), **given)[0]

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """The stream after the layer."""
        x = self.between(hidden_states, **given)
        return x @ self.mlp_adapter + self.mlp(self.norm(x))


def num_parameters(config: Any, width: int) -> int:
    """Parameters of the student, adapters and the head of its own included."""
    hidden, vocabulary, depth = config.hidden_size, config.vocab_size, config.num_hidden_layers
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention, mlp = 2 * (heads + groups) * size, 3 * config.intermediate_size
    # The last layer writes all channels, as in the authors' code: the head is not sliced.
    extra = (hidden - width) * (config.intermediate_size + width)
    return vocabulary * (width + hidden) + depth * (width * (attention + mlp) + 2 * width**2) + extra


def largest_width(teacher: Any, limit: int) -> int:
    """The largest width with at most so many parameters.

    Raises:
        ValueError: if there is none.
    """
    hidden = teacher.config.hidden_size
    widths = [width for width in range(MULTIPLE, hidden, MULTIPLE) if num_parameters(teacher.config, width) <= limit]
    if not widths:
        raise ValueError(f"SliceGPT: no width of {MULTIPLE} or more has {limit:,} parameters or fewer.")
    return max(widths)


def principal_axes(states: Iterable[Tensor]) -> Tensor:
    """The axes of some states by their energy, the largest first, float64 [H, H]."""
    total: Any = 0
    for x in states:
        flat = x.detach().flatten(0, -2).double()
        total = total + flat.T @ flat
    return torch.linalg.eigh(total)[1].flip(1)


def _set(linear: Any, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.to(linear.weight))
    linear.out_features, linear.in_features = weight.shape


@torch.no_grad()
def sliced(teacher: Any, rows: TokenRows, width: int) -> Any:
    """The student of a width: a copy of the teacher with sliced layers.

    Args:
        teacher: a Llama without biases; not changed.
        rows: that the principal axes are found on.
        width: channels of the residual stream that stay; all of them change nothing but rounding.

    Raises:
        ValueError: if it is no Llama, or has biases.
    """
    config = teacher.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"SliceGPT is written here for Llama without biases, not for {config.model_type}.")
    model = copy.deepcopy(teacher)
    model.config.tie_word_embeddings = False
    inner, hidden, dtype = model.model, config.hidden_size, model.dtype
    walk = LayerWalk(model, rows)
    head = (model.lm_head.weight.double() * inner.norm.weight.double()).clone()
    axes = principal_axes(walk.states)
    embedding = (inner.embed_tokens.weight.double() @ axes)[:, :width]
    inner.embed_tokens = nn.Embedding(*embedding.shape, _weight=embedding.to(dtype))
    inner.norm = RootMeanSquare(hidden, inner.norm.variance_epsilon)
    for index in range(len(inner.layers)):
        layer = inner.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        written = hidden if index == len(inner.layers) - 1 else width
        inner.layers[index] = new = SlicedLayer(layer, hidden)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            _set(linear, (linear.weight.double() * layer.input_layernorm.weight.double() @ axes)[:, :width])
        new.attention_adapter = nn.Parameter(axes.T[:width].to(dtype))
        states = [x @ axes[:, :width].to(dtype) for x in walk.states]
        between = [new.between(x, **given) for x, given in zip(states, walk.arguments)]
        middle = principal_axes(between)
        new.attention_adapter = nn.Parameter((axes.T[:width] @ middle[:, :width]).to(dtype))
        _set(attention.o_proj, (middle.T @ attention.o_proj.weight.double())[:width])
        for linear in (mlp.gate_proj, mlp.up_proj):
            _set(linear, (linear.weight.double() * layer.post_attention_layernorm.weight.double() @ middle)[:, :width])
        new.mlp_adapter = nn.Parameter(middle.T[:width].to(dtype))
        walk.layers, walk.states = inner.layers, states
        walk.states = walk.run(index)
        axes = principal_axes(walk.states)
        new.mlp_adapter = nn.Parameter((middle.T[:width] @ axes[:, :written]).to(dtype))
        _set(mlp.down_proj, (axes.T @ mlp.down_proj.weight.double())[:written])
    model.lm_head = nn.Linear(hidden, len(head), bias=False)
    _set(model.lm_head, head @ axes)
    return model.to(dtype).eval()
