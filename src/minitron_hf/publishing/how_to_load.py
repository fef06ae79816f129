"""How Transformers loads a published model: the Auto classes of its folder, and its task on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import MinitronError
from ..files import read_json

#: Auto class → task on the Hub.
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "audio-text-to-text",  # `models.auto_class` takes it for models of sound alone
}

#: Either file makes a folder that of a processor.
PROCESSOR_NAMES = ("processor_config.json", "preprocessor_config.json")


def how_to_load(folder: Path) -> dict[str, str | bool]:
    """What cards say about loading a model.

    Args:
        folder: of the model. Without a config that Transformers reads, the model counts as one of text.

    Returns:
        `task`: on the Hub; `auto_class`: of the model; `reader`: Auto class of the processor or tokenizer;
        `asks_about_image`: whether a chat template reads images.
    """
    name = _auto_class_name(folder)
    has_processor = name != "AutoModelForCausalLM" and any((folder / one).is_file() for one in PROCESSOR_NAMES)
    return {
        "task": TASKS[name],
        "auto_class": name,
        "reader": "AutoProcessor" if has_processor else "AutoTokenizer",
        "asks_about_image": has_processor
        and name == "AutoModelForImageTextToText"
        and any(folder.glob("chat_template*")),
    }


def _auto_class_name(folder: Path) -> str:
    from ..models import auto_class, load_config

    path = folder / "config.json"
    # Without a model type, Transformers guesses one from the folder's name.
    if path.is_file() and "model_type" in read_json(path):
        try:
            return str(auto_class(load_config(folder)).__name__)
        except MinitronError:
            pass
    return "AutoModelForCausalLM"
