"""Errors of the Hub's client as messages that say what to do; repeats requests after faults that pass."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import HubError, MinitronError, OutputError

logger = logging.getLogger(__name__)

T = TypeVar("T")

NO_TOKEN = (
    "Log in with `hf auth login`, or set HF_TOKEN or pass token= with a token that has write access "
    "(https://huggingface.co/settings/tokens)."
)
#: Answers of a server that may be another one a little later.
TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
#: Seconds to wait before a request is repeated, unless the Hub says for how long; and how long it may make us wait.
RETRY_WAITS, LONGEST_WAIT = (1.0, 2.0, 4.0, 8.0), 60.0

#: What an answer is not that cannot be understood: it lacks a field, or is no JSON (a `ValueError`, too).
_STRANGE_ANSWER = (KeyError, TypeError, AttributeError, IndexError)


@contextlib.contextmanager
def hub_errors(what: str, after_fault: str = "") -> Iterator[None]:
    """Turn what the Hub client raises into a `HubError` that says what to do; everything else passes.

    Args:
        what: what could not be done; begins the message.
        after_fault: what to do after a fault that may pass, such as a broken connection.
    """
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        told = _explain(error)
        if told is None:
            raise
        if isinstance(told, OutputError):
            raise OutputError(f"{what}: {told}") from error
        advice = f" {after_fault}" if after_fault and (is_transient(error) or is_unanswered(error)) else ""
        raise HubError(f"{what}: {told}{advice}") from error


def with_retries(call: Callable[[], T], *, is_retriable: Callable[[BaseException], bool]) -> T:
    """Call, and call again after a fault that may pass, with growing waits.

    Args:
        call: something that may be done twice with the same effect.
        is_retriable: whether an error is such a fault.
    """
    for wait in RETRY_WAITS:
        try:
            return call()
        except Exception as error:
            if isinstance(error, MinitronError) or not is_retriable(error):
                raise
            seconds = _wait_seconds(error, wait)
            logger.warning("%s Trying again in %g s.", _explain(error), seconds)
            time.sleep(seconds)
    return call()


def is_transient(error: BaseException) -> bool:
    """Whether the Hub answered that it cannot do it now: it did nothing."""
    response = getattr(_reason(error), "response", None)
    return getattr(response, "status_code", None) in TRANSIENT_STATUSES


def is_unanswered(error: BaseException) -> bool:
    """Whether there was no answer, or none that can be understood: it may have been done."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    reason = _reason(error)
    if getattr(reason, "response", None) is not None or isinstance(reason, OfflineModeIsEnabled):
        return False
    return isinstance(error, _STRANGE_ANSWER) or _is_bad_json(error) or _is_broken_connection(error, reason)


def _explain(error: Exception) -> Exception | str | None:
    """What an error of the client means for the user; None for errors of other origin."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    reason = _reason(error)
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no access token. {NO_TOKEN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off. Unset HF_HUB_OFFLINE."
    if isinstance(reason, HfHubHTTPError):
        return _http_advice(reason)
    if isinstance(reason, OSError) and reason.filename is not None:
        return OutputError(
            f"{reason.filename} cannot be read ({reason.strerror}). Run the stage that writes it again."
        )
    if isinstance(error, _STRANGE_ANSWER) or _is_bad_json(error):
        return (
            f"the Hub's answer cannot be understood ({type(error).__name__}: {error}). Check HF_ENDPOINT and any "
            "proxy on the way."
        )
    if _is_broken_connection(error, reason):
        text = f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__
        return f"the connection failed ({text})."
    return str(error) if isinstance(error, ValueError) else None


def _reason(error: BaseException) -> BaseException:
    """Workers wrap the error of an upload: the reason is the first HTTP error down the chain, or else its end."""
    from huggingface_hub.errors import HfHubHTTPError

    reason = error
    while not isinstance(reason, HfHubHTTPError) and reason.__cause__ is not None:
        reason = reason.__cause__
    return reason


def _is_bad_json(error: BaseException) -> bool:
    return type(error).__name__ == "JSONDecodeError"  # of whichever JSON library the client uses


def _is_broken_connection(error: BaseException, reason: BaseException) -> bool:
    from ..compat import connection_error

    local_file = isinstance(reason, OSError) and reason.filename is not None
    return not local_file and isinstance(error, OSError | RuntimeError | connection_error())


def _wait_seconds(error: BaseException, otherwise: float) -> float:
    """Seconds that the Hub asks to wait, as far as it is to be believed."""
    headers = getattr(getattr(_reason(error), "response", None), "headers", None) or {}
    try:
        return min(max(float(headers["Retry-After"]), 0.0), LONGEST_WAIT)
    except (KeyError, ValueError):
        return otherwise


def _http_advice(error: Any) -> str:
    """What a refusal of the Hub means for the user; `error` is an `HfHubHTTPError`."""
    status = error.response.status_code
    message = (error.server_message or "").rstrip(".")
    said = f" The Hub says: {message}." if message else ""
    if status == 401:
        return f"the Hub does not accept the access token (401).{said} {NO_TOKEN}"
    if status == 403:
        return f"the access token may not do this (403).{said} Use a token with write access to this owner."
    if status == 404:
        return f"not found, or private and not visible with this token (404).{said} Check the name and the revision."
    if status == 429:
        return f"too many requests in a short time (429).{said} Wait some minutes."
    if status in TRANSIENT_STATUSES:
        return f"the Hub has a fault or is overloaded ({status}).{said} Wait a little (https://status.huggingface.co)."
    return f"the Hub answered {status}.{said or ' ' + str(error)}"
