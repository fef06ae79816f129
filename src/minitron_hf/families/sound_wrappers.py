"""Rows of models that hold a language model and read sound beside text, and no images (see `wrappers`)."""

from __future__ import annotations

from .base import linear
from .wrapper import Wrapper
from .wrappers import DECODERS, OWN_WIDTH, PROJECTOR, SOUND, TWO_LINEAR

ROWS = (
    Wrapper(
        "nemo_speechlm",
        ("nemotron_h",),
        unpruned_prefixes=(SOUND, PROJECTOR, "model.word_timestamp_encoder.", "word_timestamp_head."),
        tensors=linear("model.multi_modal_projector", "hidden", "any"),
    ),
    Wrapper(
        "voxtral",
        DECODERS,
        unpruned_prefixes=(SOUND, PROJECTOR),
        tensors=TWO_LINEAR,
        width_fields=("hidden_size",),
    ),
    Wrapper(
        "qwen2_audio",
        DECODERS,
        unpruned_prefixes=(SOUND, PROJECTOR),
        tensors=linear(f"{PROJECTOR}linear", "hidden", "any"),
    ),
    *(
        Wrapper(
            name,
            ("granite", "llama", "qwen2", "qwen3"),
            unpruned_prefixes=("model.encoder.", "model.projector."),
            tensors=linear("model.projector.linear", "hidden", "any"),
        )
        for name in ("granite_speech", "granite_speech_plus")
    ),
    Wrapper(
        "qwen3_asr",
        ("qwen3", "qwen2"),
        unpruned_prefixes=(SOUND, PROJECTOR),
        tensors=OWN_WIDTH,
        width_fields=("audio_config.output_dim",),
    ),
    *(
        Wrapper(name, texts, unpruned_prefixes=(SOUND, PROJECTOR), refused={"hidden": reason})
        for name, texts, reason in (
            ("glmasr", ("llama", "qwen2", "qwen3"), "its projector has twice as many neurons as the hidden size"),
            ("fun_asr_nano", ("qwen3", "qwen2"), "its projector has layers in the hidden size of the language model"),
            (
                "moss_transcribe_diarize",
                ("qwen3", "qwen2"),
                "its projector ends with a norm over the hidden size",
            ),
        )
    ),
)
