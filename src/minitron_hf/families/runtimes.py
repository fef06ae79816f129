"""Sizes that other programs compute from the hidden size, for some model types, whatever the config says.

`head_dim` = hidden_size / num_attention_heads, or neurons of an MLP = 4 × hidden_size. Read in the sources of vLLM and
SGLang, for the families whose stock classes honour these fields: model types that a release has a class of its own
for, and whose class reads no such field. llama.cpp was run: `tools/llama_cpp.py` converts pocket models of all
families. A student of such a type runs there only if its sizes are the computed ones.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Relations of two sizes, as pairs of `ArchSpec.equal`. The second is of families whose heads fill the hidden size.
HEADS_FILL_HIDDEN = ("heads*head_dim", "hidden")
MLP_FOUR_TIMES_HIDDEN = ("ffn", "heads*4*head_dim")

_LLAMA_CPP = "llama.cpp of llama-cpp-python 0.3.36"

#: Relation → program and release → model types.
_RECOMPUTED: Mapping[tuple[str, str], Mapping[str, str]] = {
    HEADS_FILL_HIDDEN: {
        "vLLM 0.33.0": """
            granitemoe granitemoe_swa granitemoeshared lfm2 lfm2_moe olmo_hybrid qwen2 qwen2_moe
        """,
        "SGLang 0.5.23": """
            cohere cohere2 granitemoe granitemoe_swa granitemoeshared lfm2_moe mixtral olmo olmo2 phi qwen2_moe
            starcoder2
        """,
        _LLAMA_CPP: """
            cohere cohere2 glm granite granitemoe granitemoeshared nemotron olmo olmo2 olmo3 phi phi3 qwen2 starcoder2
        """,
    },
    MLP_FOUR_TIMES_HIDDEN: {_LLAMA_CPP: "falcon gpt2 gpt_bigcode"},
}


def recomputing_runtimes(model_type: str, relation: tuple[str, str] = HEADS_FILL_HIDDEN) -> list[str]:
    """Programs that compute one of a model type's sizes from its others.

    >>> recomputing_runtimes("qwen2_moe"), recomputing_runtimes("llama")
    (['vLLM 0.33.0', 'SGLang 0.5.23'], [])
    >>> recomputing_runtimes("gpt2", MLP_FOUR_TIMES_HIDDEN)
    ['llama.cpp of llama-cpp-python 0.3.36']
    """
    return [program for program, types in _RECOMPUTED[relation].items() if model_type in types.split()]
