"""Continuations of the same prompts by several models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data import tokenize
from ..data.tokens import text_tokenizer
from ..errors import checks_kinds
from ..generation.decoding import without_generation_defaults
from ..models import evaluating, load_tokenizer
from .loading import common_device, load_for_inference
from .token_spaces import own_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checks_kinds
def generate_samples(
    models: Mapping[str, PreTrainedModel | str | os.PathLike[str]],
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 60,
    do_sample: bool = False,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> list[dict[str, Any]]:
    """Let every model continue every prompt: the content of `samples.json`.

    Args:
        models: name → model, or the path or Hub id of one.
        processing_class: tokenizer of the models; where the vocabulary of a student was cut, the teacher's.
        prompts: texts to continue; each begins as documents do in training (see `data.tokenize`).
        max_new_tokens: longest continuation, in tokens.
        do_sample: sample from the models (temperature 1) instead of taking the most probable token.
        seed: seed of the sampling, the same for every model and prompt. The caller's random state is not changed.
        dtype: dtype of models that are loaded here; by default the stored one, or float32 where the hardware is slow
            in that.
        device: device of models that are loaded here.

    Returns:
        One mapping per prompt: `{"prompt": …, "completions": {name: text}}`, completions without the prompt.

    Raises:
        MismatchError: if the vocabulary of a student was cut, and the tokenizer of another model is not known.
    """
    from transformers import GenerationConfig

    if isinstance(processing_class, str | os.PathLike):
        processing_class = load_tokenizer(processing_class)
    tokenizers = own_tokenizers(models, text_tokenizer(processing_class))
    device = common_device(models, device)
    samples: list[dict[str, Any]] = [{"prompt": prompt, "completions": {}} for prompt in prompts]
    for name, model_or_path in models.items():
        model = load_for_inference(model_or_path, dtype, device)
        tokenizer = tokenizers[name]
        end = model.generation_config.eos_token_id if model.generation_config is not None else None
        end = tokenizer.eos_token_id if end is None else end
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = end[0] if isinstance(end, list) else end
        # Not the model's own generation_config.json: its temperature or penalties would differ between the models.
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=do_sample, eos_token_id=end, pad_token_id=pad, use_cache=True
        )
        with evaluating([model]), without_generation_defaults(model), torch.random.fork_rng(), torch.no_grad():
            for sample, ids in zip(samples, tokenize(prompts, tokenizer)):
                torch.manual_seed(seed)
                input_ids = torch.tensor([ids], device=model.device)
                output: Any = model.generate(  # type: ignore[operator]
                    input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings
                )
                sample["completions"][name] = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return samples
