"""Quality of models on text, with standard errors: loss, perplexity, bits per byte, agreement with a reference.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..data import TokenRows, padded_batches
from ..data.images import image_inputs
from ..errors import DataError, MismatchError, OutputError, UnsupportedModelError
from ..hardware import sum_dtype
from ..scoring.logits import run_backbone
from .means import mean_and_error as mean_and_error
from .positions import PositionSums, by_position

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The `evaluate` metrics of this package; `load_metric` loads them.
METRICS = ("causal_lm_loss", "kl_divergence", "token_agreement")

#: Logits converted to float32 at a time (64 MiB).
CHUNK_ELEMENTS = 1 << 24


# Per-token values and their mean


def token_log_probabilities(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token under the logits that predict it.

    Args:
        logits_TV: [T, V], any floating dtype; computed in float32 (float64 stays), a chunk of tokens at a time.
        tokens_T: int [T]; `tokens_T[t]` is predicted by `logits_TV[t]`.

    Returns:
        Log-probabilities in nats, float64 [T], on the CPU.
    """
    found = [
        _log_softmax(logits).gather(-1, tokens.to(logits.device).unsqueeze(-1)).squeeze(-1).cpu().double()
        for logits, tokens in zip(*_chunks(logits_TV, tokens_T))
    ]
    return torch.cat(found)


def token_divergences(
    logits_TV: torch.Tensor, reference_logits_TV: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(reference ‖ model) of each token's prediction, Σ_v p_ref (ln p_ref − ln p), at temperature 1.

    Args:
        logits_TV: [T, V], any floating dtype; computed in float32 (float64 stays), a chunk of tokens at a time.
        reference_logits_TV: [T, V], or more tokens than the model has.
        kept: int64 [V], the reference's ids of the model's tokens. Their distributions are compared, weighted by the
            reference's probability of all of them, as in distillation (`losses.dropped`).

    Returns:
        Divergences in nats, float64 [T], on the CPU.

    Raises:
        MismatchError: if the vocabularies differ.
    """
    if logits_TV.shape[-1] != (reference_logits_TV.shape[-1] if kept is None else len(kept)):
        raise MismatchError(
            f"The model predicts {logits_TV.shape[-1]} tokens and the reference {reference_logits_TV.shape[-1]}. "
            "A divergence needs one vocabulary."
        )
    found = []
    for logits, reference in zip(*_chunks(logits_TV, reference_logits_TV)):
        log_q, log_p = _log_softmax(logits), _log_softmax(reference.to(logits.device))
        share: torch.Tensor | float = 1.0
        if kept is not None:
            log_p = log_p[:, kept.to(log_p.device)]
            log_share = log_p.logsumexp(-1, keepdim=True)
            log_p, share = log_p - log_share, log_share[:, 0].exp().cpu().double()
        p = log_p.exp()
        # An outcome of probability 0 adds nothing, also where both logarithms are −∞.
        terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
        found.append(terms.sum(-1, dtype=sum_dtype(terms.device)).cpu().double() * share)
    return torch.cat(found)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _chunks(logits: torch.Tensor, other: torch.Tensor) -> tuple[Iterable[torch.Tensor], Iterable[torch.Tensor]]:
    size = max(1, CHUNK_ELEMENTS // max(one.shape[-1] for one in (logits, other) if one.ndim > 1))
    return logits.split(size), other.split(size)


def load_metric(name: str, **kwargs: Any) -> Any:
    """Load a metric of this package with the `evaluate` library, from its script on disk, without a network.

    `causal_lm_loss` (predictions: logits [T, V] per document, references: the tokens [T] they predict) gives loss,
    perplexity and, with `compute(num_bytes=…)`, bits per byte. `kl_divergence` (predictions and references: logits
    [T, V] per document) gives KL(references ‖ predictions). `token_agreement` (predictions and references: token ids
    [T] per document) gives the share of equal tokens. All of them stream through `add_batch`, and report the standard
    error over documents beside the value.

    Args:
        name: one of `METRICS`.
        **kwargs: passed on to `evaluate.load`. Values are kept in memory unless `keep_in_memory=False` is given, as
            distributed evaluation needs it: `evaluate`'s cache files are locked, one instance at a time.

    Raises:
        DataError: if there is no such metric.
        OutputError: if `evaluate` cannot write its cache of module scripts.
    """
    if name not in METRICS:
        raise DataError(f"There is no metric {name!r}. Expected one of {', '.join(METRICS)}.")
    import evaluate

    script = Path(__file__).parent / "metrics" / name / f"{name}.py"
    try:
        return evaluate.load(str(script), **{"keep_in_memory": True, **kwargs})
    except PermissionError as error:
        raise OutputError(
            f"The evaluate library cannot write its cache ({error.filename}). Set HF_HOME to a writable folder."
        ) from error


# All models, side by side


def measure_quality(
    models: Mapping[str, PreTrainedModel],
    rows: TokenRows,
    reference: str | None,
    batch_size: int,
    show_progress: bool,
    own_ids: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure every model in one pass over the rows, longest rows first, which needs the least padding.

    Args:
        models: name → model.
        rows: token rows.
        reference: name of the model that the others are compared with.
        batch_size: rows at a time.
        show_progress: show a progress bar.
        own_ids: name → the model's own id of every token of the rows, for models with more tokens.

    Returns:
        Name → metrics; those by position under `positions`.
    """
    own_ids = own_ids or {}
    names = sorted(models, key=lambda name: name != reference)
    measured = {name: _Quality(is_compared=reference not in (None, name)) for name in names}
    ordered = rows.select(sorted(range(len(rows)), key=lambda index: len(rows.rows[index]), reverse=True))
    with tqdm(total=rows.num_predicted, desc="Evaluating", unit="token", disable=not show_progress) as bar:
        for index, batch in enumerate(padded_batches(ordered, batch_size)):
            first = index * batch_size
            places = [torch.tensor(ordered.predicted(first + i)) for i in range(len(batch["input_ids"]))]
            targets = [ids[place] for ids, place in zip(batch["input_ids"], places)]
            by_row = {name: _logits_by_row(models[name], batch, places, own_ids.get(name)) for name in names}
            for target, place in zip(targets, places):
                reference_TV = None
                for name in names:  # the reference comes first
                    logits_TV = next(by_row[name])
                    own = own_ids.get(name)
                    # The reference's ids of the model's tokens, where the reference alone has more.
                    kept = own_ids.get(reference) if own is None and reference is not None else None
                    target_own = target if own is None else own[target]
                    measured[name].add(logits_TV, target_own, place, reference_TV, kept)
                    if name == reference:
                        reference_TV = logits_TV
                    del logits_TV  # before the next model's
            bar.update(sum(map(len, places)))
    found = {}
    for name in models:
        found[name] = measured[name].result(rows.num_bytes)
        loss = found[name]["loss"]["value"]
        if not math.isfinite(loss):
            raise UnsupportedModelError(
                f"The model {name!r} gives a loss of {loss}: its logits are not finite in "
                f"{models[name].dtype}. Load it in a wider dtype (dtype='float32'), or check its weights."
            )
    return found


def _logits_by_row(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    places: Sequence[torch.Tensor],
    own_ids: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Logits that predict the given places of every row, [n, V] of one row at a time.

    Causal attention never reaches the padding on the right, so neither a mask nor positions are needed. A mask does
    harm: with a sliding window, padding far to the right attends to nothing, and becomes NaN in some dtypes.
    """
    ids = batch["input_ids"] if own_ids is None else own_ids[batch["input_ids"]]
    inputs = {"input_ids": ids.to(model.device), **image_inputs(batch, model)}
    positions = [place - 1 for place in places]  # each position predicts the token after it
    with torch.no_grad():
        try:
            output = run_backbone(model, inputs)
        except UnsupportedModelError:  # of an unknown family
            if len(inputs) > 1:  # images of several rows are one tensor
                raise
            output = None
    for row, position in enumerate(positions):
        with torch.no_grad():  # not around the yield, where it would reach the caller
            if output is not None:
                logits_TV = output.logits(row, position)
            else:
                whole_TV = model(input_ids=inputs["input_ids"][row : row + 1], use_cache=False).logits[0]
                logits_TV = whole_TV[position.to(whole_TV.device)]
                del whole_TV
        yield logits_TV
        del logits_TV  # before the next row's


class _Quality:
    """Metrics of one model over the rows that were added.

    Args:
        is_compared: whether there is a reference that the model is compared with.
    """

    def __init__(self, *, is_compared: bool) -> None:
        self.is_compared = is_compared
        self.loss = load_metric("causal_lm_loss")
        self.divergence, self.agreement = load_metric("kl_divergence"), load_metric("token_agreement")
        self.by_position = {"loss": PositionSums(), "kl_divergence": PositionSums()}

    def add(
        self,
        logits_TV: torch.Tensor,
        tokens_T: torch.Tensor,
        places_T: torch.Tensor,
        reference_TV: torch.Tensor | None,
        kept: torch.Tensor | None = None,
    ) -> None:
        """Add a row.

        Args:
            logits_TV: logits of the row's predictions, [T, V].
            tokens_T: the tokens that they predict, int64 [T].
            places_T: positions of these tokens in the row, int64 [T].
            reference_TV: the reference's logits, [T, V]; None without a comparison.
            kept: see `token_divergences`.
        """
        positions = places_T.tolist()
        log_probabilities_T = token_log_probabilities(logits_TV, tokens_T)
        self.loss.add_values([log_probabilities_T.numpy()])
        self.by_position["loss"].add(positions, -log_probabilities_T)
        if self.is_compared and reference_TV is not None:
            divergences_T = token_divergences(logits_TV, reference_TV, kept)
            self.divergence.add_values([divergences_T.numpy()])
            self.by_position["kl_divergence"].add(positions, divergences_T)
            best = logits_TV.argmax(-1).cpu()
            best = best if kept is None else kept[best]
            self.agreement.add_batch(predictions=[best.tolist()], references=[reference_TV.argmax(-1).tolist()])

    def result(self, num_bytes: int | None) -> dict[str, Any]:
        """Metric → value and standard error; None where there is none.

        Args:
            num_bytes: UTF-8 bytes of the text that was predicted, if they are known.
        """

        def entry(result: Mapping[str, Any], key: str) -> dict[str, Any] | None:
            return None if result[key] is None else {"value": result[key], "stderr": result[f"{key}_stderr"]}

        loss = self.loss.compute(num_bytes=num_bytes)
        found: dict[str, Any] = {key: entry(loss, key) for key in ("loss", "perplexity", "bits_per_byte")}
        found["kl_divergence"] = found["top1_agreement"] = None
        if self.is_compared:
            found["kl_divergence"] = entry(self.divergence.compute(), "kl_divergence")
            found["top1_agreement"] = entry(self.agreement.compute(), "token_agreement")
        return {**found, "positions": by_position(**self.by_position)}
