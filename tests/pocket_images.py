"""A tiny processor of images and text, and conversations with random images."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import Gemma3Processor, PreTrainedModel
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from pocket import pocket_tokenizer
from test_wrappers import CONFIGS, filled

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<boi>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "</s>{% endfor %}"
)
#: Tokens of one image.
IMAGE_LENGTH = 4


def pocket_processor(template: str = TEMPLATE) -> Gemma3Processor:
    """A processor of 16 x 16 pixels, each image in four tokens; it fits `pocket_image_model`."""
    tokens = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    tokenizer = pocket_tokenizer(chat_template=template, extra_special_tokens=tokens)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=IMAGE_LENGTH)


def pocket_image_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A Gemma 3 with a vision tower, whose image token is the processor's."""
    config = copy.deepcopy(CONFIGS["gemma3"])
    config.image_token_index = pocket_processor().tokenizer.image_token_id
    return filled(config, dtype)


def images(number: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(number)]


def image_rows(number: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of different lengths about one image each."""
    return [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {index}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat" + " and a dog" * (index % 3)}]},
            ],
            "images": [image],
        }
        for index, image in enumerate(images(number, seed))
    ]


def image_dataset(number: int = 6, seed: int = 0) -> Dataset:
    return Dataset.from_list(image_rows(number, seed))
