"""The parts of tables of state-space models (Mamba, Mamba-2)."""

from __future__ import annotations

from .axes import Axis
from .base import FFN, HIDDEN, LAYERS, VOCAB, layer_tables, linear, norm
from .spec import ArchSpec

#: State-space heads belong to groups, which have one B and C and, in a gated norm, a mean square of their own.
SSM_GROUPS: tuple[tuple[str, str], ...] = (("ssm_heads", "ssm_groups"),)


def ssm_axes(heads: str, head_dim: str, groups: str, state: str, kernel: str) -> tuple[Axis, ...]:
    """Axes of a state-space layer, from the config fields that hold their sizes."""
    return (
        Axis("ssm_heads", (heads,), per_layer=True),
        Axis("ssm_dim", (head_dim,), per_layer=True, within="ssm_heads"),
        Axis("ssm_groups", (groups,), prunable=False),
        Axis("ssm_state", (state,), prunable=False),
        Axis("ssm_kernel", (kernel,), prunable=False),
    )


#: The names of these fields in most hybrid models.
SSM_AXES = ssm_axes("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")


#: For stock configs in which the state-space heads are together `expand` times as wide as the residual stream.
SSM_EXPAND = Axis("ssm_expand", ("mamba_expand",), prunable=False)
SSM_WIDTH: tuple[tuple[str, str], ...] = (("ssm_heads*ssm_dim", "ssm_expand*hidden"),)
SSM_DIM_FOLLOWS = {"ssm_dim": "the stock config ties it to the hidden size, which the number of heads follows"}


def state_space(path: str) -> dict[str, str]:
    """The tensors of a state-space layer of several heads (Mamba-2): z, then x, B and C, which are convolved, then dt.

    Args:
        path: module inside a layer.
    """
    inner = "ssm_heads*ssm_dim"
    convolved = f"{inner}+ssm_groups*ssm_state+ssm_groups*ssm_state"
    return layer_tables(
        linear(f"{path}.in_proj", f"{inner}+{convolved}+ssm_heads", "hidden"),
        {f"{path}.conv1d.weight": f"{convolved} 1 ssm_kernel", f"{path}.conv1d.bias": convolved},
        {f"{path}.{name}": "ssm_heads" for name in ("dt_bias", "A_log", "D")},
        {f"{path}.norm.weight": inner},
        linear(f"{path}.out_proj", "hidden", inner),
    )


def ssm_hook_points(path: str) -> dict[str, str]:
    """Hook points of the heads of a state-space layer and of their channels."""
    return dict.fromkeys(("ssm_heads", "ssm_dim"), f"{path}.out_proj")


#: Embeddings, head and last norm of the purely recurrent models.
RECURRENT_OUTER = layer_tables(
    {"backbone.embeddings.weight": "vocab hidden"}, linear("lm_head", "vocab", "hidden"), norm("backbone.norm_f")
)


def mamba(model_type: str) -> ArchSpec:
    """A model of state-space layers whose channels have states of their own (Mamba-1).

    Args:
        model_type: the config's `model_type`.
    """
    return ArchSpec(
        model_type=model_type,
        axes=(
            LAYERS,
            HIDDEN,
            FFN,
            Axis("ssm_state", ("state_size",), prunable=False),
            Axis("ssm_kernel", ("conv_kernel",), prunable=False),
            Axis("dt_rank", ("time_step_rank",), prunable=False),
            VOCAB,
        ),
        layers_path="backbone.layers",
        outer=RECURRENT_OUTER,
        layer=layer_tables(norm("norm"), channel_state_space("mixer", "ffn")),
        hook_points={"ffn": "mixer.out_proj"},
        readers=(("ffn", "mixer.x_proj"),),
        layer_norms=("norm",),
        final_norm="backbone.norm_f",
    )


def channel_state_space(path: str, channels: str) -> dict[str, str]:
    """The tensors of a state-space layer whose channels have states of their own: x and z, then dt, B and C from x.

    Args:
        path: module inside a layer.
        channels: their axis.
    """
    return layer_tables(
        linear(f"{path}.in_proj", f"{channels}+{channels}", "hidden"),
        {f"{path}.conv1d.weight": f"{channels} 1 ssm_kernel", f"{path}.conv1d.bias": channels},
        {f"{path}.x_proj.weight": f"dt_rank+ssm_state+ssm_state {channels}"},
        linear(f"{path}.dt_proj", channels, "dt_rank"),
        {f"{path}.A_log": f"{channels} ssm_state", f"{path}.D": channels},
        linear(f"{path}.out_proj", "hidden", channels),
    )
