"""A teacher behind a server: the log-probabilities of the tokens of a text, over HTTP.

vLLM's `/v1/completions` gives the k most likely tokens at every position of the prompt (`prompt_logprobs`), by their
ids. Other servers lack this: OpenAI's own API and SGLang name tokens by their text, and TGI gives of a prompt only the
log-probability of each token that is in it.

Shapes: T tokens of a document, k most likely tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MismatchError, ServerError, did_you_mean

logger = logging.getLogger(__name__)

#: Environment variable with the key that the server wants, if it wants one.
API_KEY = "MINITRON_HF_SERVER_API_KEY"
#: Answers after which a request is sent again, and the seconds before each further try.
TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
#: Text that tells tokenizers apart.
PROBE = "The quick brown fox, 1234567890: naïve café, Größe λόγος 日本語 🙂\n\tdef f(x): return x ** 2  # Done!\n"

_START = "Start vLLM with --max-logprobs {top_k} or more, or lower top_k to {most}."
_ONLY_VLLM = (
    "A cache needs the most likely tokens at every position of a prompt, by their ids, which vLLM gives "
    "(prompt_logprobs). Serve the teacher with `vllm serve`, or cache it from its weights."
)


class _TemporaryError(Exception):
    """A request that may succeed if it is sent again."""


class _RefusedError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"it answered {status}{f': {said}' if said else ''}")
        self.status, self.said = status, said


@dataclass(frozen=True)
class TeacherServer:
    """A model that a vLLM server offers.

    Attributes:
        url: address of the server, without `/v1`.
        model: the server's name of the model.
        context: tokens of a prompt and its continuation, at most; None if the server does not say.
        api_key: key that the server wants; None: none.
        timeout: seconds to wait for an answer.
        stopped: set to end waiting for further tries.
    """

    url: str
    model: str = ""
    context: int | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    @classmethod
    def connect(
        cls, url: str, model: str | None = None, *, api_key: str | None = None, timeout: float = 600.0
    ) -> TeacherServer:
        """Find a model of a server.

        Args:
            url: address of the server, such as `http://localhost:8000`.
            model: the server's name of the model; None: the only one.
            api_key: key that the server wants; None: the one in `MINITRON_HF_SERVER_API_KEY`, if any.
            timeout: seconds to wait for an answer.

        Raises:
            ServerError: if there is no such server, or it cannot give what a cache needs.
            MismatchError: if it has no such model, or several and none is named.
        """
        base = plain_url(url)
        asked = cls(base, api_key=api_key or os.environ.get(API_KEY) or None, timeout=timeout)
        cards = asked._model_cards()
        names = [card["id"] for card in cards if not card.get("parent")]  # adapters have parents
        if model is None and len(names) != 1:
            raise MismatchError(f"The server {base} has the models {', '.join(names)}. Name one of them.")
        name = names[0] if model is None else model
        card = next((card for card in cards if card["id"] == name), None)
        if card is None:
            known = [card["id"] for card in cards]
            raise MismatchError(
                f"The server {base} has no model {name!r}, but {', '.join(known)}.{did_you_mean(name, known)}"
            )
        length = card.get("max_model_len")
        return cls(base, name, length if isinstance(length, int) else None, asked.api_key, timeout)

    def _model_cards(self) -> list[Mapping[str, Any]]:
        try:
            answer = self._send("/v1/models", None)
        except _TemporaryError as error:
            raise ServerError(
                f"The server {self.url} does not answer: {error}. Is it running, and is the address right?"
            ) from error
        except _RefusedError as error:
            self._refuse_tgi()
            raise self._refusal(error, top_k=0) from error
        cards = answer.get("data") if isinstance(answer, Mapping) else None
        found = [card for card in cards or () if isinstance(card, Mapping) and isinstance(card.get("id"), str)]
        if not any(card.get("owned_by") == "vllm" for card in found):
            self._refuse_tgi()
        if not found:
            raise ServerError(f"The server {self.url} names no model at /v1/models. {_ONLY_VLLM}")
        return found

    def _refuse_tgi(self) -> None:
        info: Any = None
        with contextlib.suppress(_TemporaryError, _RefusedError, ServerError):
            info = self._send("/info", None)
        if isinstance(info, Mapping) and info.get("router") == "text-generation-router":
            raise ServerError(
                f"The server {self.url} is Text Generation Inference. Of a prompt, TGI gives only the log-probability "
                "of each token that is in it (decoder_input_details); top_n_tokens are of generated tokens. "
                f"{_ONLY_VLLM}"
            )

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a server that splits text into other tokens than a tokenizer.

        Raises:
            MismatchError: if it does.
            ServerError: if it gives no log-probabilities of prompts.
        """
        ids = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        entries = self._prompt_logprobs(PROBE, 1)
        same = len(entries) == len(ids) and all(
            str(token) in entry for token, entry in zip(ids[1:], entries[1:], strict=True)
        )
        if not same:
            raise MismatchError(
                f"The model {self.model!r} of the server {self.url} splits text into other tokens than the tokenizer "
                "here, so its ids would mean something else. Name the teacher that the server serves, or serve that "
                "teacher."
            )

    def most_likely(self, tokens: Sequence[int], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The most likely tokens at the positions of a document that are followed by another one.

        Args:
            tokens: [T], ids of the document.
            top_k: k.

        Returns:
            Their ids and log-probabilities, [T - 1, k] each, the most likely one first.

        Raises:
            ServerError: if the server does not answer, or answers something else.
        """
        entries = self._prompt_logprobs(list(tokens), top_k)
        found = np.empty((len(tokens) - 1, top_k), dtype=np.int64)
        log_probs = np.empty(found.shape, dtype=np.float64)
        if len(entries) != len(tokens):
            raise ServerError(
                f"The server {self.url} gave log-probabilities of {len(entries)} tokens, {len(tokens)} were sent."
            )
        for place, (token, entry) in enumerate(zip(tokens[1:], entries[1:], strict=True)):
            if str(token) not in entry:
                raise ServerError(
                    f"The server {self.url} gave log-probabilities of another token than {token}, which was sent at "
                    f"position {place + 1}."
                )
            if len(entry) < top_k:
                raise ServerError(
                    f"The server {self.url} gave {len(entry)} log-probabilities of a token, and top_k={top_k}. "
                    + _START.format(top_k=top_k, most=len(entry) - 1)
                )
            try:
                found[place], log_probs[place] = _first(entry, top_k)
            except (KeyError, TypeError, ValueError) as error:
                raise ServerError(
                    f"The server {self.url} gave log-probabilities in an unknown form: {error!r}."
                ) from error
        return found, log_probs

    def _prompt_logprobs(self, prompt: str | list[int], top_k: int) -> list[Mapping[str, Mapping[str, Any]]]:
        """Of every token of the prompt, id → log-probability and rank; of the first one, nothing."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": 1,  # vLLM refuses 0
            "temperature": 0,
            "prompt_logprobs": top_k,
            "add_special_tokens": False,
        }
        answer = self._retried("/v1/completions", body, top_k)
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        entries = first.get("prompt_logprobs") if isinstance(first, Mapping) else None
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries[1:]):
            raise ServerError(f"The server {self.url} gave no log-probabilities of the prompt. {_ONLY_VLLM}")
        return entries

    # ---- HTTP ----

    def _retried(self, path: str, body: Any, top_k: int) -> Any:
        for wait in (*WAITS, None):
            try:
                return self._send(path, body)
            except _RefusedError as error:
                raise self._refusal(error, top_k) from error
            except _TemporaryError as error:
                if wait is None or self.stopped.is_set():
                    raise ServerError(
                        f"The server {self.url} failed {len(WAITS) + 1} times: {error}. What was cached is kept: "
                        "the same call goes on when the server answers again. If it was too slow, send it fewer "
                        "requests at a time (num_parallel), or allow more time (timeout)."
                    ) from error
                logger.info("The server %s failed: %s. Next try in %g s.", self.url, error, wait)
                self.stopped.wait(wait)
        raise AssertionError  # the last try returns or raises

    def _send(self, path: str, body: Any) -> Any:
        """The answer to one request, read from JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        if self.api_key is not None:  # not sent to where the server may redirect
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                refused = _RefusedError(error.code, _said(error))
            if error.code in TEMPORARY:
                raise _TemporaryError(str(refused)) from error
            raise refused from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ServerError(
                f"The server {self.url} answered {path} with something else than JSON. {_ONLY_VLLM}"
            ) from error
        except TimeoutError as error:
            raise _TemporaryError(f"no answer within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _TemporaryError(f"no answer within {self.timeout:g} s") from error
            raise _TemporaryError(str(reason) or type(reason).__name__) from error

    def _refusal(self, error: _RefusedError, top_k: int) -> ServerError:
        """What to do about an answer that another try would not change."""
        if error.status in (401, 403):
            return ServerError(f"The server {self.url} wants a key: {error}. Set {API_KEY}.")
        if most := re.search(r"max allowed: (\d+)", error.said):
            return ServerError(
                f"The server {self.url} gives at most {most[1]} log-probabilities of a token, and top_k={top_k}. "
                + _START.format(top_k=top_k, most=most[1])
            )
        if error.status == 404:
            return ServerError(f"{self.url} is not an OpenAI-compatible server: {error}. {_ONLY_VLLM}")
        return ServerError(f"The server {self.url} refused a request: {error}.")


def plain_url(url: str) -> str:
    """The address of a server without `/v1`.

    Raises:
        DataError: if it is no address.

    >>> plain_url("http://localhost:8000/v1/")
    'http://localhost:8000'
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # brackets without an end
        is_address = False
    if not is_address:
        raise DataError(f"server={url!r}: expected an address such as http://localhost:8000.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says in an answer that is no success, in one line."""
    text = error.read(4096).decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        answer = json.loads(text)
        said = answer.get("message") or answer.get("detail") or answer.get("error") or text
        text = str(said.get("message") or said) if isinstance(said, dict) else str(said)
    return " ".join(text.split())[:300].rstrip(".")


def _first(entry: Mapping[str, Mapping[str, Any]], top_k: int) -> tuple[list[int], list[float]]:
    """The k most likely tokens of a position. vLLM adds the token of the prompt, where it is not among them."""
    ranked = sorted(
        ((-float(value["logprob"]), int(value.get("rank") or 0), int(token)) for token, value in entry.items())
    )[:top_k]
    return [token for _, _, token in ranked], [-negative for negative, _, _ in ranked]
