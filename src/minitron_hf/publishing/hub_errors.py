"""Turns errors of the Hub's client into messages that say what to do; repeats requests after temporary errors."""

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
#: HTTP status codes of temporary errors.
TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
#: Seconds to wait before repeated requests, unless the Hub gives a time; and the longest time that is accepted.
RETRY_WAITS, LONGEST_WAIT = (1.0, 2.0, 4.0, 8.0), 60.0

#: Errors of invalid answers: a missing field, or invalid JSON (also a `ValueError`).
_STRANGE_ANSWER = (KeyError, TypeError, AttributeError, IndexError)


@contextlib.contextmanager
def hub_errors(what: str, after_fault: str = "") -> Iterator[None]:
    """Turn errors of the Hub client into a `HubError` that says what to do. Other errors pass unchanged.

    Args:
        what: the failed action; the message begins with it.
        after_fault: what to do after a temporary error, such as a broken connection.
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
    """Call a function, and repeat it after temporary errors, with increasing waits.

    Args:
        call: an idempotent function.
        is_retriable: whether an error is temporary.
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
    """Whether the Hub answered with a temporary error. Then it did nothing."""
    response = getattr(_reason(error), "response", None)
    return getattr(response, "status_code", None) in TRANSIENT_STATUSES


def is_unanswered(error: BaseException) -> bool:
    """Whether there was no valid answer. Then the request may have been executed."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    reason = _reason(error)
    if getattr(reason, "response", None) is not None or isinstance(reason, OfflineModeIsEnabled):
        return False
    return isinstance(error, _STRANGE_ANSWER) or _is_bad_json(error) or _is_broken_connection(error, reason)


def _explain(error: Exception) -> Exception | str | None:
    """The meaning of an error of the client for the user; None for other errors."""
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
    """Seconds that the Hub asks to wait, within a limit."""
    headers = getattr(getattr(_reason(error), "response", None), "headers", None) or {}
    try:
        return min(max(float(headers["Retry-After"]), 0.0), LONGEST_WAIT)
    except (KeyError, ValueError):
        return otherwise


def _http_advice(error: Any) -> str:
    """Advice for an error answer of the Hub; `error` is an `HfHubHTTPError`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    message = (error.server_message or "").rstrip(".")
    said = f" The Hub says: {message}." if message else ""
    if isinstance(error, GatedRepoError):
        return (
            f"the repository is gated and this account has no access ({status}).{said} Ask for access on its page, "
            "then log in with the same account."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no such repository, or it is private and not visible with this token ({status}). Check the "
            "name, and that you are logged in with an account that sees it."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no such revision ({status}).{said} Check the name of the branch, tag or commit."
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
