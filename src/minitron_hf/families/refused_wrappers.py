"""Models that hold a language model beside others and cannot be pruned, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

#: Wrapper → its language model, which no table describes, and what is unlike the layouts that the tables know.
_UNLIKE: Mapping[str, tuple[str, str]] = {
    "chameleon": ("chameleon", "its forward pass overwrites the logits of image tokens, which the loss does not know"),
    "diffusion_gemma": ("diffusion_gemma_text", "it fills in blocks of tokens, and predicts no next token"),
    "dots3_note": ("dots3_note_text", "sizes of latent attention differ from layer to layer, with a gate per head"),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe_text", "every layer has two sets of experts, for text and for images"),
    "git": ("git", "BERT's layout, with norms after the sums; an image in front of the text has logits of its own"),
    "glm5_next": (
        "glm5_next_text",
        "it mixes several residual streams, beside linear attention and attention to pooled keys",
    ),
    "inkling2": ("inkling2_text", "convolutions over keys, values and the residual stream"),
    "inkling_mm_model": ("inkling_text", "convolutions over keys, values and the residual stream"),
    "kyutai_speech_to_text": ("kyutai_speech_to_text", "every position holds a token of text and several of sound"),
    "mistral_large4": ("mistral_large4_text", "layers may share latent keys, and only some rotate a part of them"),
    "muse_glimmer": ("muse_glimmer_text", "norms without weights over the embeddings, and gated attention"),
    "muse_spark": ("muse_spark_text", "norms without weights over the embeddings, and gated attention with experts"),
    "qwen4_exp": ("qwen4_exp_text", "embeddings of hashed n-grams, and several gated residual streams"),
    "step3p7": ("step3p5", "numbers of heads and limits of activations differ from layer to layer"),
    "unlimited_ocr": ("unlimited_ocr_text", "its attention depends on where a prompt ends"),
}
#: Wrapper → its language model, which no table describes.
WITHOUT_TABLE = {name: text for name, (text, _) in _UNLIKE.items()}
_ENCODER = "its decoder reads an encoder by cross-attention"
#: Wrapper → why it cannot be pruned.
REFUSED: Mapping[str, str] = {
    **{name: f"no table describes its language model: {why}" for name, (_, why) in _UNLIKE.items()},
    **dict.fromkeys(
        (
            "blip", "evolla", "florence2", "idefics", "mllama", "pix2struct", "pp_formulanet", "t5gemma2", "udop",
            "vision-encoder-decoder",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo", "kosmos-2"), "its forward pass takes no text without an image"
    ),
    "shieldgemma2": "it is a classifier, and Transformers does not load what it saves of its language model",
    "pi0": "it predicts actions, not tokens",
    "voxtral_realtime": "its forward pass takes no text without sound",
    "vibevoice_asr": "it adds random noise to the sound in every forward pass, so that students cannot be compared",
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), "it holds several models; its thinker is a model of its own"),
}  # fmt: skip
