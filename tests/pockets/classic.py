"""Decoders whose heads are as wide together as the residual stream, most of them from before 2023."""

from __future__ import annotations

from transformers import GPT2Config, GPTNeoXConfig

from .base import COUPLED, GROUPED_COUPLED, Pocket, coupled, grouped, kinds

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


FALCON_GROUPED = {
    "kv": True,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_kv_heads": 3,
    "num_hidden_layers": 5,
    "new_decoder_architecture": True,
}
FALCON_FULL = {"hidden_size": 4096, "num_attention_heads": 32}
FALCON_RW = {"bias": True, "parallel_attn": False, "multi_query": False}


def _falcon(**changes) -> Pocket:
    modules = ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h")
    sizes = {name: value for name, value in {**NEOX, "ffn_hidden_size": 52}.items() if name not in changes}
    return coupled("falcon", sizes, *modules, tuple_layers=True, **changes)


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
    "gpt_neo": coupled(
        "gpt_neo",
        {**NEOX, "num_layers": 4, "num_heads": 5},
        "transformer.h",
        "attn.attention.out_proj",
        "mlp.c_proj",
        tuple_layers=True,
        attention_types=[[["global", "local"], 1], [["local"], 2]],
        window_size=6,
    ),
    "codegen": coupled(
        "codegen",
        {**GPT2, "n_embd": 96, "n_head": 12, "n_layer": 5},
        "transformer.h",
        "attn.out_proj",
        "mlp.fc_out",
        num_norms=1,
        tuple_layers=True,
        rotary_dim=4,
        widths={
            "hidden": {"hidden_size": 64},
            "heads": {"num_attention_heads": 4},
            "everything": {
                "num_attention_heads": 4,
                "hidden_size": 32,
                "intermediate_size": 17,
                "num_hidden_layers": 3,
            },
        },
    ),
    "falcon": _falcon(num_norms=1, bias=True, published={"num_kv_heads": 71}),
    "falcon-40b": _falcon(
        **FALCON_GROUPED, published={"new_decoder_architecture": True, "num_kv_heads": 8, **FALCON_FULL}
    ),
    "falcon-11b": _falcon(
        **FALCON_GROUPED,
        num_norms=1,
        num_ln_in_parallel_attn=1,
        published={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 8, **FALCON_FULL},
    ),
    "falcon-rw": _falcon(
        **FALCON_RW, alibi=True, published={**FALCON_RW, "alibi": True, "hidden_size": 2048, "num_attention_heads": 32}
    ),
    "falcon-sequential": _falcon(**FALCON_RW),
    "bloom": coupled(
        "bloom",
        {**COUPLED, "hidden_size": 40, "n_layer": 4, "n_head": 5},
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        output_norms=("word_embeddings_layernorm",),
        tuple_layers=True,
    ),
    "mpt": coupled(
        "mpt",
        {**COUPLED, "d_model": 40, "n_layers": 4, "n_heads": 5, "max_seq_len": 64},
        "transformer.blocks",
        "attn.out_proj",
        "ffn.down_proj",
        tuple_layers=True,
    ),
    "persimmon": coupled("persimmon", NEOX, "model.layers", "self_attn.dense", "mlp.dense_4h_to_h"),
    "biogpt": coupled("biogpt", NEOX, "biogpt.layers", "self_attn.out_proj", "fc2", scaled_embeddings=True),
    "xglm": coupled(
        "xglm",
        {**COUPLED, "d_model": 40, "ffn_dim": 52, "num_layers": 4, "attention_heads": 5},
        "model.layers",
        "self_attn.out_proj",
        "fc2",
        max_position_embeddings=64,
    ),
    "ctrl": coupled("ctrl", {**GPT2, "dff": 52}, "transformer.h", "multi_head_attention.dense", "ffn.2"),
    "nanochat": grouped("nanochat", mlp_out="mlp.fc2", norm="rms0", attention_bias=True, final_logit_softcapping=3.0),
    "bitnet": coupled(
        "bitnet",
        GROUPED_COUPLED,
        kv=True,
        norm="rms",
        head_norms=("self_attn.attn_sub_norm",),
        mlp_norm="mlp.ffn_sub_norm",
        attention_bias=True,
    ),
    "doge": grouped(
        "doge",
        mlp_bias=True,
        attention_bias=True,
        keep_window_size=6,
        widths={
            "heads": {"num_attention_heads": 6},
            "hidden": {"hidden_size": 24},
            "everything": {
                "num_attention_heads": 3,
                "hidden_size": 24,
                "intermediate_size": 17,
                "num_hidden_layers": 3,
            },
        },
    ),
    "cohere_compass_text": grouped(
        "cohere_compass_text",
        norm="layer",
        num_norms=1,
        layer_types=kinds("ssfsf"),
        rope_parameters={"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        sliding_window=6,
        logit_scale=0.7,
        published={"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "modernbert-decoder": coupled(
        "modernbert-decoder",
        {**NEOX, "num_hidden_layers": 6},
        "model.layers",
        "attn.Wo",
        "mlp.Wo",
        extra_norms=1,
        output_norms=("lm_head.norm",),  # the first layer's sublayers read what the embeddings' norm makes
        widths={
            "single layers": {"layers_to_drop": [1, 3]},
            "hidden": {"hidden_size": 24},
            "heads": {"num_attention_heads": 2},
            "everything": {
                "num_attention_heads": 2,
                "hidden_size": 16,
                "intermediate_size": 17,
                "num_hidden_layers": 3,
            },
        },
        layer_types=kinds("fssfss"),
        local_attention=12,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        classifier_bias=True,
    ),
    "gpt_neox_japanese": coupled(
        "gpt_neox_japanese",
        NEOX,
        "gpt_neox_japanese.layers",
        "attention.dense",
        "mlp.dense_4h_to_h",
        tuple_layers=True,
        intermediate_multiple_size=3,
    ),
    "diffllama": grouped(
        "diffllama",
        num_key_value_heads=6,
        attention_bias=True,
        widths={"hidden": {"hidden_size": 24}, "everything": {"hidden_size": 24, "intermediate_size": 17}},
    ),
}
