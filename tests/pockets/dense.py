"""Decoders with grouped queries and an MLP."""

from __future__ import annotations

from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from .base import GEMMA, GROUPED, GROUPED_COUPLED, LONGROPE, SLIDING, YARN, Pocket, grouped, kinds

POCKETS: dict[str, Pocket] = {
    "llama": Pocket(LlamaConfig(**GROUPED)),
    "llama-biases-tied": Pocket(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": Pocket(MistralConfig(**GROUPED, sliding_window=6)),
    "qwen2": Pocket(Qwen2Config(**GROUPED, **SLIDING)),
    "qwen2-tied": Pocket(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3": Pocket(Qwen3Config(**GROUPED, **SLIDING)),
    "qwen3-biases-tied": Pocket(Qwen3Config(**GROUPED, attention_bias=True, tie_word_embeddings=True)),
    "phi3": Pocket(Phi3Config(**GROUPED, partial_rotary_factor=0.6)),
    "phi3-longrope": Pocket(
        Phi3Config(
            **{name: value for name, value in GROUPED_COUPLED.items() if name != "head_dim"},
            partial_rotary_factor=LONGROPE["partial_rotary_factor"],
            original_max_position_embeddings=16,
            rope_parameters=LONGROPE,
        ),
        coupled=True,
    ),
    "ministral": grouped("ministral", published={"head_dim": 128}, layer_types=kinds("sfsff"), sliding_window=6),
    "ministral3": grouped("ministral3", rope_parameters=YARN),
    "gemma": grouped("gemma", norm="rms1p", scaled_embeddings=True),
    "gemma2": grouped("gemma2", sliding_window=6, query_pre_attn_scalar=7, final_logit_softcapping=3.0, **GEMMA),
    "gemma3_text": grouped(
        "gemma3_text", layer_types=kinds("ssfsf"), sliding_window=6, query_pre_attn_scalar=7, **GEMMA
    ),
    "olmo": grouped("olmo", norm="layer", clip_qkv=0.8),
    "olmo2": grouped("olmo2", head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "olmo3": grouped(
        "olmo3", layer_types=kinds("ssfsf"), sliding_window=6, head_norms=("self_attn.q_norm", "self_attn.k_norm")
    ),
    "smollm3": grouped("smollm3", use_sliding_window=True, sliding_window=6, no_rope_layer_interval=2),
    "granite": grouped(
        "granite", embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.4, attention_multiplier=0.2
    ),
    "cohere": grouped("cohere", norm="layer", num_norms=1, use_qk_norm=True, logit_scale=0.7),
    "cohere2": grouped(
        "cohere2", norm="layer", num_norms=1, layer_types=kinds("ssfsf"), sliding_window=6, logit_scale=0.7
    ),
    "starcoder2": grouped("starcoder2", mlp_out="mlp.c_proj", norm="layer", sliding_window=6),
    "arcee": grouped("arcee"),
    "seed_oss": grouped("seed_oss", attention_out_bias=True, mlp_bias=True),
    "ernie4_5": grouped("ernie4_5", use_bias=True),
    "hunyuan_v1_dense": grouped("hunyuan_v1_dense", published={"head_dim": 128}),
    "nemotron": grouped("nemotron", published={"num_key_value_heads": 8}, norm="layer1p", partial_rotary_factor=0.6),
    "glm": grouped("glm", partial_rotary_factor=0.6),
    "glm4": grouped(
        "glm4",
        num_norms=4,
        output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        partial_rotary_factor=0.6,
    ),
    "exaone4": grouped("exaone4", layer_types=kinds("ssfsf"), sliding_window=6),
    "phi": grouped(
        "phi",
        attention_out="self_attn.dense",
        mlp_out="mlp.fc2",
        norm="layer",
        num_norms=1,
        partial_rotary_factor=0.6,
    ),
    "vaultgemma": grouped(
        "vaultgemma",
        norm="rms1p",
        scaled_embeddings=True,
        layer_types=kinds("sfsff"),
        sliding_window=6,
        query_pre_attn_scalar=7,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
        attention_bias=True,
    ),
    "cwm": grouped("cwm", layer_types=kinds("fssfs"), sliding_window=6, mlp_bias=True),
    "hyperclovax": grouped(
        "hyperclovax",
        num_norms=4,
        output_norms=("post_norm1", "post_norm2"),
        embedding_multiplier=3.0,
        logits_scaling=0.5,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        attention_bias=True,
        mlp_bias=True,
    ),
    "hyperclovax-pre-norms": grouped("hyperclovax", use_post_norm=False),
    "jais2": grouped("jais2", norm="layer"),
    "internlm3": grouped("internlm3", attention_bias=True, mlp_bias=True),
    "iquestcoder": grouped("iquestcoder"),
    "granite_swa": grouped(
        "granite_swa",
        layer_types=kinds("fssfs"),
        sliding_window=6,
        layer_rope_theta=[0, 10000.0, 500.0, 500.0, 0],
        embedding_multiplier=3.0,
        logits_scaling=0.5,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
    ),
    "apertus": grouped("apertus", attention_bias=True),
}
