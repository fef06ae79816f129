"""Gemma 3n, text only: AltUp's four residual streams, LAuReL, embeddings for every layer, shared keys and values."""

from .axes import Axis
from .base import (
    EMBEDDINGS,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_DIM,
    HEAD_NORMS,
    HEADS,
    HIDDEN,
    KV,
    LAYERS,
    VOCAB,
    decoder,
    layer_tables,
    linear,
    norm,
)
from .rules import CAPPED_LOGITS, LayerRules, StreamRules

SPEC = decoder(
    "gemma3n_text",
    logits=CAPPED_LOGITS,
    axes=(
        LAYERS,
        HIDDEN,
        FFN,
        HEADS,
        KV,
        HEAD_DIM,
        VOCAB,
        Axis("layer_inputs", ("hidden_size_per_layer_input",), prunable=False),
        Axis("layer_vocab", ("vocab_size_per_layer_input",), prunable=False),
        Axis("streams", ("altup_num_inputs",), prunable=False),
        Axis("rank", ("laurel_rank",), prunable=False),
    ),
    outer=layer_tables(
        EMBEDDINGS,
        norm("model.norm"),
        {
            "model.embed_tokens_per_layer.weight": "layer_vocab layers*layer_inputs",
            "model.per_layer_model_projection.weight": "layers*layer_inputs hidden",
            "model.per_layer_projection_norm.weight": "layer_inputs",
        },
        linear("model.altup_projections.0", "hidden", "hidden"),
        linear("model.altup_projections.1", "hidden", "hidden"),
        linear("model.altup_projections.2", "hidden", "hidden"),
        linear("model.altup_unembed_projections.0", "hidden", "hidden"),
        linear("model.altup_unembed_projections.1", "hidden", "hidden"),
        linear("model.altup_unembed_projections.2", "hidden", "hidden"),
    ),
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        HEAD_NORMS,
        linear("laurel.linear_left", "rank", "hidden"),
        linear("laurel.linear_right", "hidden", "rank"),
        linear("altup.correction_coefs", "streams", "streams"),
        linear("altup.prediction_coefs", "streams*streams", "streams"),
        linear("altup.modality_router", "streams", "hidden"),
        {"altup.correct_output_scale": "hidden"},
        norm("altup.router_norm"),
        linear("per_layer_input_gate", "layer_inputs", "hidden"),
        linear("per_layer_projection", "hidden", "layer_inputs"),
    ),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    output_norms=(
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "laurel.post_laurel_norm",
        "post_per_layer_input_norm",
    ),
    stream=StreamRules(stacked_states=True),
    # The config insists on hidden_size % num_attention_heads == 0, though head_dim is a field of its own.
    multiples=(("hidden", "heads"),),
    layer_lists=("layer_types", "intermediate_size", "activation_sparsity_pattern"),
    layer_rules=LayerRules(trailing_layers=("num_kv_shared_layers",), fixed_layers=(("kv_sharing_modes", "store"),)),
    refused={
        "hidden": "AltUp mixes whole residual streams, and LAuReL adds a normalised output to one of them",
        "kv": "its last layers read the keys and values of earlier layers, so all would have to keep the same groups",
    },
)
