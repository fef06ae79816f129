"""Model types whose heads other programs size as hidden_size / num_attention_heads, whatever `head_dim` says.

Read in the sources of the releases that are named, for the families whose stock classes honour `head_dim`: model types
that a release has a class of its own for, and whose class reads no `head_dim`; of llama.cpp, whose converter computes
the rotated dimensions without it. A student of such a type runs there only if hidden_size = num_attention_heads ×
head_dim.
"""

from __future__ import annotations

#: Program and release → model types.
_RECOMPUTED = {
    "vLLM 0.33.0": """
        granitemoe granitemoe_swa granitemoeshared lfm2 lfm2_moe olmo_hybrid qwen2 qwen2_moe
    """,
    "SGLang 0.5.23": """
        cohere cohere2 granitemoe granitemoe_swa granitemoeshared lfm2_moe mixtral olmo olmo2 phi qwen2_moe starcoder2
    """,
    "llama.cpp of llama-cpp-python 0.3.36": "cohere2 phi phi3",
}


def recomputing_runtimes(model_type: str) -> list[str]:
    """Programs that compute a model type's `head_dim` from its other sizes.

    >>> recomputing_runtimes("qwen2"), recomputing_runtimes("qwen2_moe"), recomputing_runtimes("llama")
    (['vLLM 0.33.0'], ['vLLM 0.33.0', 'SGLang 0.5.23'], [])
    """
    return [program for program, types in _RECOMPUTED.items() if model_type in types.split()]
