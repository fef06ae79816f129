"""The tokens of a tokenizer that stay whatever the corpus: of the model, added ones, and those of chat templates."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .pieces import Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A conversation that brings out the roles of a chat template; some templates take no system message.
CONVERSATION = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
)
#: A tag that Transformers adds to the language of templates.
GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


def required_tokens(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> set[int]:
    """Token ids that always stay, without the tokens that they are merged from.

    Args:
        tokenizer: the tokenizer.
        pieces: its model.

    Raises:
        UnsupportedModelError: if no set of tokens is enough for every text.
    """
    known = tokenizer.get_vocab()
    tokens = pieces.required() | set(tokenizer.get_added_vocab())
    ids = {known[token] for token in tokens if token in known}
    return ids | {index for index in tokenizer.all_special_ids if index is not None} | template_tokens(tokenizer)


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids of what the chat templates write themselves: of their literal texts, and of short conversations."""
    templates = tokenizer.chat_template
    if not templates:
        return set()
    templates = list(templates.values()) if isinstance(templates, dict) else [templates]
    texts = [text for template in templates for text in _literals(template)]
    ids = {index for text in texts for index in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]}
    for template in templates:
        for messages in (CONVERSATION, CONVERSATION[1:]):
            ids |= set(_rendered(tokenizer, template, messages))
    return ids


def _literals(template: str) -> list[str]:
    """The texts in a template, outside of its tags and inside of them."""
    from jinja2 import Environment, nodes
    from jinja2.exceptions import TemplateError

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        tree = environment.parse(GENERATION_TAG.sub("", template))
    except TemplateError:  # written for other extensions: the rendered conversations have to do
        return []
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return [text for text in texts if text]


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, messages: Any) -> list[int]:
    """A conversation in a template; nothing where the template takes no such conversation."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:  # whatever a template raises
        return []
    return ids
