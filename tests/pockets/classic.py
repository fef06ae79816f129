"""Decoders whose heads are as wide together as the residual stream, most of them from before 2023."""

from __future__ import annotations

from transformers import GPT2Config, GPTNeoXConfig

from .base import COUPLED, GROUPED_COUPLED, Pocket, coupled

GPT2 = dict(**COUPLED, n_embd=40, n_inner=52, n_layer=4, n_head=5, n_positions=64)
NEOX = dict(
    **COUPLED,
    hidden_size=40,
    intermediate_size=52,
    num_hidden_layers=4,
    num_attention_heads=5,
    max_position_embeddings=64,
    rotary_pct=0.5,
)


def _gpt2(**changes) -> Pocket:
    return Pocket(
        GPT2Config(**{**GPT2, **changes}),
        "transformer.h",
        "attn.c_proj",
        "mlp.c_proj",
        kv=False,
        coupled=True,
        norm="layer",
    )


def _neox(**changes) -> Pocket:
    config = GPTNeoXConfig(**{**NEOX, **changes})
    modules = ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h")
    return Pocket(config, *modules, kv=False, coupled=True, norm="layer")


POCKETS: dict[str, Pocket] = {
    "gpt2": _gpt2(),
    "gpt2-untied": _gpt2(n_inner=None, tie_word_embeddings=False),
    "gpt_neox": _neox(),
    "gpt_neox-sequential": _neox(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
    "helium": coupled("helium", GROUPED_COUPLED, kv=True, norm="rms", attention_bias=True),
    "stablelm": coupled("stablelm", GROUPED_COUPLED, kv=True, use_qkv_bias=True),
    "opt": coupled("opt", {**NEOX, "ffn_dim": 52}, "model.decoder.layers", "self_attn.out_proj", "fc2"),
    "gptj": coupled(
        "gptj", GPT2, "transformer.h", "attn.out_proj", "mlp.fc_out", num_norms=1, tuple_layers=True, rotary_dim=4
    ),
    "gpt_bigcode": coupled("gpt_bigcode", GPT2, "transformer.h", "attn.c_proj", "mlp.c_proj"),
    "falcon": coupled(
        "falcon",
        {**NEOX, "ffn_hidden_size": 52},
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        num_norms=1,
        tuple_layers=True,
        bias=True,
    ),
}
