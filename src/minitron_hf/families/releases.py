"""Which releases of Transformers read a checkpoint that this package writes, and under which config keys.

Measured with checkpoints of small random models, one or more of every family, written by Transformers 5.23: a release
counts if it and all later ones that were tried (4.57.6, the first of every 5.N up to 5.24) compute the same logits.
"""

from __future__ import annotations

#: First release → model types.
_FIRST_RELEASE = {
    "4.57": """
        arcee aria_text biogpt bitnet bloom codegen cohere cohere2 ctrl deepseek_v3 diffllama doge dots1 ernie4_5
        exaone4 falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode
        gpt_neo gpt_neox gpt_oss gptj granite helium hunyuan_v1_dense lfm2 llama llama4_text longcat_flash mamba
        minimax ministral mistral mixtral mpt nemotron olmo olmo2 olmoe opt persimmon phi phi3 qwen2 qwen3 qwen3_moe
        qwen3_next seed_oss smollm3 stablelm starcoder2 vaultgemma xglm
    """,
    "5.0": """
        afmoe cwm ernie4_5_moe glm4_moe_lite granitemoe granitemoeshared jais2 lfm2_moe minimax_m2 ministral3
        modernbert-decoder nanochat qwen2_moe solar_open
    """,
    "5.1": """
        apertus exaone_moe hunyuan_v1_moe phimoe youtu
    """,
    "5.2": """
        jamba qwen3_5_text
    """,
    "5.6": """
        hy_v3
    """,
    "5.7": """
        qwen3_5_moe_text
    """,
    "5.9": """
        hyperclovax
    """,
    "5.10": """
        cohere2_moe mellum
    """,
    "5.13": """
        deepseek_v2 granitemoehybrid laguna minicpm3 minimax_m3_vl_text olmo3
    """,
    "5.15": """
        bamba gemma4_text granite_swa granitemoe_swa nemotron_h olmo_hybrid
    """,
    "5.18": """
        axk2 deepseek_v32 glm_moe_dsa gpt_neox_japanese hy_v4
    """,
    "5.20": """
        axk1 kolibri1
    """,
    "5.21": """
        beam cohere_compass_text flint gemma3n_text
    """,
    "5.23": """
        granite_docling_text internlm3 iquestcoder lfm3 mamba2
    """,
}

#: Model type → first release.
FIRST_RELEASE = {name: release for release, names in _FIRST_RELEASE.items() for name in names.split()}

#: First release of model types whose `head_dim` an older class derives from the hidden size and the number of heads,
#: where it is what that class derives.
FIRST_RELEASE_OF_IMPLIED_HEAD_DIM = {
    "granitemoe": "4.57",
    "granitemoehybrid": "5.13",
    "granitemoeshared": "4.57",
    "jamba": "4.57",
    "phimoe": "5.1",
    "qwen2_moe": "4.57",
}

#: Model types of 4.57 with rotary positions; their configs get its keys.
_ROTARY_IN_4_57 = """
    apertus arcee aria_text bamba bitnet cohere cohere2 deepseek_v2 deepseek_v3 diffllama doge dots1 ernie4_5
    ernie4_5_moe exaone4 falcon falcon_h1 flex_olmo gemma gemma2 gemma3_text gemma3n_text glm glm4 glm4_moe gpt_neox
    gpt_neox_japanese gpt_oss granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe lfm2 llama llama4_text longcat_flash minimax ministral mistral mixtral modernbert-decoder nemotron
    olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3
    stablelm starcoder2 vaultgemma
"""
IN_4_57 = frozenset(_ROTARY_IN_4_57.split())

#: Key of `rope_parameters` → config key of version 4; `"*"` are those of most model types.
ROPE_KEYS = {
    "*": {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"},
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta"},
}

#: Config key of version 4 for the base of the layers with sliding attention.
LOCAL_ROPE_THETA = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert-decoder": "local_rope_theta",
}

#: Other config keys of version 4: model type → key of version 5 → key of version 4.
OLDER_KEYS = {"qwen3_moe": {"num_local_experts": "num_experts"}}

#: Names that version 4 has for kinds of layers: model type → name of version 5 → name of version 4.
OLDER_LAYER_TYPES = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}


def first_release(model_type: str, *, implied_head_dim: bool = False) -> str | None:
    """The first release of Transformers that is known to load a model type; None if it was not tried.

    Args:
        model_type: of the config, or of the language model inside it.
        implied_head_dim: whether all heads together are as wide as the hidden size.
    """
    first = FIRST_RELEASE.get(model_type)
    return FIRST_RELEASE_OF_IMPLIED_HEAD_DIM.get(model_type, first) if implied_head_dim else first
