"""Rows of text and images: how a processor renders them, and what their images add to the inputs of a model.

The format is TRL's: `messages` (or `prompt` and `completion`, or a text) beside a column `images` or `image`. An image
stands in the text as tokens of its own, its placeholders, whose embeddings the model replaces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DataError, cut_short
from ..families import is_multimodal, text_config
from .tokens import start_tokens, text_tokenizer, with_end

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

#: Columns of a conversation or a prompt that go with its messages.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
#: Columns that hold a row's images, or its only one.
COLUMNS = ("images", "image")
#: Where a row stands in its dataset, in words, for messages of `ImageCollator`.
PLACE = "place"
#: Rows of a column of images that are looked at together.
SCANNED_ROWS = 256
#: What placeholders stand for.
KINDS = ("image", "video", "audio")
#: What is in the names of the inputs that hold images, videos and sound.
PIXELS = ("pixel_values", "flattened_patches", "input_features")
#: Inputs of every language model, and what only training and generation pass.
TEXT_INPUTS = frozenset(
    [
        "input_ids",
        "attention_mask",
        "position_ids",
        "inputs_embeds",
        "labels",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
    ]
)


def has_images(row: Any) -> bool:
    """Whether a row has a column of images that is not empty of a value.

    >>> has_images({"messages": [], "images": []}), has_images({"text": "Hi", "image": None}), has_images("Hi")
    (True, False, False)
    """
    return isinstance(row, Mapping) and any(row.get(name) is not None for name in COLUMNS)


def holds_images(data: Any) -> bool:
    """Whether a row of a dataset or a list has images, or the first row of other data.

    False of what can be read only once.
    """
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | Mapping) or iter(data) is data:
        return False
    if hasattr(data, "with_format") and hasattr(data, "__len__"):  # a dataset, whose images are not decoded for this
        rows: Any = data
        return any(_holds_values(rows, name) for name in COLUMNS if name in rows.column_names)
    if isinstance(data, list | tuple):
        return any(has_images(row) for row in data)
    return has_images(next(iter(data), None))


def _holds_values(rows: Any, name: str) -> bool:
    """Whether a column of a dataset is not empty in all rows."""
    parts = rows.select_columns([name]).with_format("arrow").iter(batch_size=SCANNED_ROWS)
    return any(part[name].null_count < len(part) for part in parts)


def refuse_image_parts(messages: Iterable[Any]) -> None:
    """Refuse messages with images where only their text would be read.

    Raises:
        DataError: if there is one.
    """
    if _image_parts(messages):
        raise DataError(
            "The messages hold parts of type 'image', and the row has no column of images. Put the images into a "
            "column 'images', a list for every row, in their order."
        )


def _image_parts(messages: Iterable[Any]) -> int:
    """Number of parts of messages that stand for an image in the column of images."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return sum(isinstance(part, Mapping) and part.get("type") == "image" and "image" not in part for part in parts)


def placeholder_ids(source: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand for images, videos and sound.

    Args:
        source: a processor, or the config of a model.
    """
    found: list[Any] = []
    for kind in KINDS:
        of_processor = getattr(source, f"{kind}_token_ids", None)
        found += of_processor or [getattr(source, f"{kind}_token_{name}", None) for name in ("id", "index")]
        if text_config(source) is source:  # of a flat config, those of the towers name them
            tower = getattr(source, "vision_config" if kind == "image" else f"{kind}_config", None)
            found.append(getattr(tower, f"{kind}_token_id", None))
    return tuple(sorted({int(one) for one in found if one is not None}))


def require_image_processor(processing_class: Any) -> None:
    """Refuse images without something that reads them.

    Raises:
        DataError: saying what to pass.
    """
    if getattr(processing_class, "image_processor", None) is None:
        given = "nothing" if processing_class is None else f"a {type(processing_class).__name__}"
        raise DataError(
            f"The data holds images, and processing_class is {given}, which reads text alone. Pass the model's "
            "processor (AutoProcessor.from_pretrained), or data without the columns 'images' and 'image'. The command "
            "line and recipes read the processor in the model's folder."
        )


def require_image_model(config: PretrainedConfig, role: str = "The model") -> None:
    """Refuse images for a model that reads text alone.

    Raises:
        DataError: naming the model.
    """
    if not is_multimodal(config):
        raise DataError(
            f"The data holds images, and {role[:1].lower()}{role[1:]} ({config.model_type}) reads text alone. Pass a "
            "vision-language model, or data without the columns 'images' and 'image'."
        )


def holds_pixels(inputs: Iterable[str]) -> bool:
    """Whether images or sound are among the inputs of these names."""
    return any(_holds_pixels(name) for name in inputs)


def _holds_pixels(name: str) -> bool:
    """Whether an input of this name holds images or sound."""
    return any(one in name for one in PIXELS)


def image_inputs(batch: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """What the images of a batch add to the inputs of a vision-language model, on its device and in its dtype.

    Args:
        batch: of a collator for images and text; other batches add nothing.
        model: a stock model; one that reads text alone takes nothing.

    Returns:
        Name → tensor: pixels with their sizes, and what says which token belongs to an image.

    Raises:
        DataError: if the batch has images that the model does not read.
    """
    if not is_multimodal(model.config):
        if holds_pixels(batch):
            require_image_model(model.config)
        return {}
    # The larger of the two forward passes may know older names of what the other takes.
    known = {name for one in (model, model.base_model) for name in inspect.signature(one.forward).parameters}
    known -= TEXT_INPUTS
    if unread := [name for name in batch if _holds_pixels(name) and name not in known]:
        raise DataError(
            f"A batch holds {', '.join(unread)}, which {type(model).__name__} does not take. Use the processor that "
            "belongs to this model."
        )
    added = {name: value for name, value in batch.items() if name in known and hasattr(value, "is_floating_point")}
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in added.items()
    }


@dataclass
class ImageCollator:
    """A collator of images and text that refuses bad rows by name, and counts no placeholder as a target.

    Attributes:
        collator: TRL's `DataCollatorForVisionLanguageModeling`, which cuts nothing itself.
        placeholders: tokens of images.
        max_length: longest row, in tokens; longer rows lose the end of their text. None: any length.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    placeholders: Sequence[int]
    max_length: int | None

    @classmethod
    def of(
        cls,
        processing_class: Any,
        row: Mapping[str, Any],
        max_length: int | None,
        text_field: str,
        *,
        assistant_only: bool,
    ) -> ImageCollator:
        """A collator of rows like this one, of which a prompt is not a target.

        Raises:
            DataError: with `assistant_only`, if the chat template does not mark the assistant's turns.
        """
        from ..compat import image_text_collator

        if assistant_only:
            require_assistant_marks(processing_class)
        collator = image_text_collator(
            processor=processing_class,
            completion_only_loss="completion" in row and "messages" not in row,
            dataset_text_field=text_field,
            assistant_only_loss=assistant_only,
        )
        return cls(collator, placeholder_ids(processing_class), max_length)

    @classmethod
    def around(cls, collator: Any, *sources: Any) -> ImageCollator:
        """The collator of a trainer, with placeholders that processors and configs name; it is not changed."""
        placeholders = sorted({one for source in sources for one in placeholder_ids(source)})
        return cls(replace(collator, max_length=None), placeholders, collator.max_length)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return self._batch(examples)
        except DataError as error:
            if len(examples) > 1:
                for example in examples:  # the first bad one says its own place
                    self([example])
            elif PLACE in examples[0]:
                raise DataError(f"{examples[0][PLACE]}: {error}") from error
            raise

    def _batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL's collator changes the rows.
        rows = [{name: value for name, value in example.items() if name != PLACE} for example in examples]
        text_field = getattr(self.collator, "dataset_text_field", "text")
        processor = self.collator.processor  # type: ignore[attr-defined] # of TRL
        start = str(text_tokenizer(processor).decode(start_tokens(processor)))
        for row in rows:
            _normalise(row, text_field)
            _add_special_tokens(row, text_field, processor, start)
        try:
            batch = dict(self.collator(rows))
        except Exception as error:  # processors and templates raise errors of any kind
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise DataError(
                f"The processor cannot read {_shown(rows)}: {said} Check the messages and their images."
            ) from error
        batch = self._cut(batch)
        batch["labels"] = batch["labels"].masked_fill(self._is_placeholder(batch["input_ids"]), -100)
        return batch

    def _cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut rows at the end, where only text may be lost: a part of an image is none."""
        ids = batch["input_ids"]
        if self.max_length is None or ids.shape[1] <= self.max_length:
            return batch
        lost = self._is_placeholder(ids[:, self.max_length :])
        if bool(lost.any()):
            longest = self.max_length + int(lost.any(0).nonzero().max()) + 1
            raise DataError(
                f"The images of a row end at token {longest}, and rows have at most {self.max_length} tokens. Set "
                f"max_length={longest} or more, or pass smaller or fewer images."
            )
        return {
            name: value[:, : self.max_length] if getattr(value, "shape", ())[:2] == ids.shape else value
            for name, value in batch.items()
        }

    def _is_placeholder(self, ids: Tensor) -> Tensor:
        import torch

        return torch.isin(ids, torch.tensor(self.placeholders, dtype=ids.dtype))


def read_row(data: Any, number: int) -> Any:
    """A row of a dataset with images, which are decoded now.

    Raises:
        DataError: if an image cannot be decoded.
    """
    try:
        return data[number]
    except (OSError, ValueError, SyntaxError) as error:  # of Pillow
        raise DataError(f"An image cannot be read: {(str(error).strip() or repr(error)).splitlines()[0]}.") from error


def _normalise(row: dict[str, Any], text_field: str) -> None:
    """Give a row the one column that TRL reads, and refuse images that do not fit its messages.

    Raises:
        DataError: if there are other images than the messages name, or they are not in TRL's format.
    """
    if "conversations" in row and not {"messages", "prompt", text_field} & set(row):
        raise DataError(
            "The row holds images and 'conversations' (ShareGPT's and LLaVA's format), which are read only without "
            "images. Write them as 'messages': a role and a content, such as {'role': 'user', 'content': "
            "[{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]}, where the text had '<image>'; then "
            "'role': 'assistant'."
        )
    if unread := [name for name in TEMPLATE_COLUMNS if row.get(name)]:
        raise DataError(
            f"{_shown([row])} has images and {unread[0]}, which TRL does not give to the chat template beside images. "
            "Leave the column out, or write its contents into a system message."
        )
    images = [row.pop("image")] if row.get("image") is not None else row.get("images")
    row.pop("image", None)
    images = row["images"] = [] if images is None else images
    if not isinstance(images, list | tuple) or any(image is None or isinstance(image, list) for image in images):
        raise DataError(
            f"The column 'images' of {_shown([row])} holds a {type(images).__name__}, expected a list of images."
        )
    messages = next((row[name] for name in ("messages", "prompt") if isinstance(row.get(name), list)), None)
    if messages is None:
        return
    structured = any(isinstance(message.get("content"), list) for message in messages if isinstance(message, Mapping))
    if structured and (parts := _image_parts(messages)) != len(images):
        raise DataError(
            f"There are {len(images)} image(s) and {parts} part(s) of type 'image' in the messages of "
            f"{_shown([row])}. Give as many of one as of the other."
        )


def _add_special_tokens(row: dict[str, Any], text_field: str, processing_class: Any, start: str) -> None:
    """Begin texts with the tokens that the tokenizer adds, and end completions, as in rows without images.

    Of rows with images, TRL's collator leaves both to the chat template, which texts do not have.
    """
    name = "prompt" if "prompt" in row else text_field
    if "messages" in row or not isinstance(row.get(name), str):
        return
    row[name] = row[name] if row[name].startswith(start) else start + row[name]
    if isinstance(row.get("completion"), str):
        row["completion"] = with_end(row["completion"], processing_class)


def _shown(rows: Sequence[Mapping[str, Any]]) -> str:
    text = {name: value for name, value in rows[0].items() if name not in COLUMNS}
    return f"the row {cut_short(str(text), 120)}"


def require_assistant_marks(processing_class: Any) -> None:
    """Refuse to count the assistant's turns alone where the template does not mark them.

    Raises:
        DataError: saying what to change.
    """
    template = getattr(processing_class, "chat_template", None) or text_tokenizer(processing_class).chat_template
    if "{% generation %}" not in str(template) and "{%- generation" not in str(template):
        raise DataError(
            "Of rows with images, the assistant's turns can be found only by {% generation %} marks in the chat "
            "template, and this one has none. Add them, pass prompts with completions, or count all tokens."
        )
