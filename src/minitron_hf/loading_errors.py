"""Turns errors of loading a model, config or tokenizer into one message with the next step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from .errors import DataError, HubError, MinitronError, NotEnoughMemoryError, UnsupportedModelError


def loading_error(what: str, name: str, error: Exception, revision: str | None = None) -> MinitronError:
    """The error to raise instead, with one message: what went wrong, and what to do next.

    Args:
        what: `"model"`, `"config"`, `"tokenizer"` or `"processor"`.
        name: folder or Hub id.
        error: of Transformers or the Hub.
        revision: branch, tag or commit that was asked for.
    """
    if isinstance(error, MinitronError):
        return error
    chain = list(_causes(error))
    start = f"Cannot load the {what} {name!r}" + ("" if revision is None else f" at revision {revision!r}")
    if any(
        isinstance(link, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(link)
        for link in chain
    ):
        return NotEnoughMemoryError(f"{start}: {first_line(error)} Free memory, or take a smaller model or dtype.")
    if not os.path.isdir(name) and (found := _hub_error(start, name, chain)) is not None:
        return found
    if "trust_remote_code" in str(error):
        return UnsupportedModelError(
            f"{start}: it needs code of its own. Read that code, then pass trust_remote_code=True."
        )
    if "instantiate the backend tokenizer" in str(error):  # Transformers goes on with a list of file formats
        return DataError(
            f"{start}: there are no tokenizer files. Expected tokenizer.json or the files of a slow tokenizer. Copy "
            "those of the model that it was made from, or save them with tokenizer.save_pretrained(folder)."
        )
    if what == "tokenizer":
        return DataError(
            f"{start}: {first_line(error)} Expected tokenizer.json or the files of a slow tokenizer; save it there."
        )
    if what == "processor":
        return DataError(
            f"{start}: {first_line(error)} Expected processor_config.json or preprocessor_config.json beside the "
            "files of a tokenizer; save it there."
        )
    if "Unrecognized configuration class" in str(error):
        return UnsupportedModelError(
            f"{start}: it is not a causal language model. Pass a decoder-only language model, such as a Llama or Qwen."
        )
    if "does not recognize this architecture" in str(error) or "Unrecognized model" in str(error):
        return UnsupportedModelError(
            f"{start}: this version of Transformers does not know its model_type. Update it, or pass another model."
        )
    return UnsupportedModelError(f"{start}: {first_line(error)}")


def _hub_error(start: str, name: str, chain: Sequence[BaseException]) -> HubError | None:
    """The error of a name that is no folder here, if the Hub is the cause.

    Args:
        start: beginning of the message.
        name: the name.
        chain: an error and its causes.
    """
    from huggingface_hub import constants, errors

    def raised(*types: type[BaseException]) -> bool:
        return any(isinstance(link, types) for link in chain)

    statuses = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}
    host = constants.ENDPOINT
    if raised(errors.GatedRepoError):
        return HubError(
            f"{start}: the repository is gated and this account has no access. "
            f"Accept its terms at {host}/{name}, then log in with `hf auth login` or set HF_TOKEN."
        )
    if raised(errors.RevisionNotFoundError):
        return HubError(
            f"{start}: the repository has no such branch, tag or commit. Choose one that {host}/{name}/tree/main "
            "lists, or leave the revision out for the newest commit."
        )
    if raised(errors.RepositoryNotFoundError):
        return HubError(
            f"{start}: there is no such folder here, and {host} has no such model or it is private. "
            "Check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN."
        )
    if statuses & {401, 403}:
        return HubError(f"{start}: {host} refused the token. Use `hf auth login`, or set a valid HF_TOKEN.")
    if raised(errors.HFValidationError) or "Repo id must" in str(chain[0]):
        return HubError(f"{start}: neither a folder nor a Hub id. Expected an existing folder or 'owner/name'.")
    if raised(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return HubError(
            f"{start}: there is no such folder here, HF_HUB_OFFLINE is set, and the files are not in the cache "
            f"({constants.HF_HUB_CACHE}). Pass a local folder, or unset HF_HUB_OFFLINE."
        )
    if raised(errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError):
        return HubError(
            f"{start}: there is no such folder here, {host} cannot be reached or does not answer, and the files are "
            f"not in the cache ({constants.HF_HUB_CACHE}). Check the connection, or pass a local folder. "
            f"({first_line(chain[-1])})"
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def first_line(error: BaseException) -> str:
    """The first paragraph of a library's error, as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A strict config's message names the validator first and the fault after it.
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines[0] if lines else type(error).__name__)
    return text if text.endswith((".", "!", "?")) else text + "."
