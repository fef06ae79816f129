"""A student as the draft of its teacher: assisted generation of Transformers against plain decoding."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..data import DataSource, TokenRows, token_rows
from ..errors import DataError, UnsupportedModelError, checks_kinds
from ..generation.decoding import without_generation_defaults
from ..hardware import synchronize
from ..models import evaluating, load_tokenizer
from .limits import Limits, require_positive
from .loading import common_device, load_for_inference
from .means import mean_and_error
from .token_spaces import Readers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DraftTest:
    """How drafts are measured.

    Attributes:
        num_prompts: number of prompts.
        prompt_tokens: tokens of each, the beginning of a row.
        new_tokens: tokens that are generated after each.
        draft_tokens: tokens that the draft proposes at a time.
    """

    num_prompts: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 64
    draft_tokens: int = 5

    def __post_init__(self) -> None:
        require_positive(**asdict(self))

    def prompts(self, rows: TokenRows) -> list[tuple[int, ...]]:
        """The beginnings of the first rows that are long enough.

        Raises:
            DataError: if no row is.
        """
        found = [row[: self.prompt_tokens] for row in rows.rows if len(row) >= self.prompt_tokens]
        if not found:
            raise DataError(
                f"No row has the {self.prompt_tokens} tokens of a prompt for drafts. Lower prompt_tokens, or pass "
                "longer text."
            )
        return found[: self.num_prompts]


@checks_kinds
def measure_draft(
    teacher: PreTrainedModel | str | os.PathLike[str],
    draft: PreTrainedModel | str | os.PathLike[str],
    dataset: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    num_prompts: int = 16,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    draft_tokens: int = 5,
    text_field: str = "text",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Measure what `teacher.generate(assistant_model=draft)` gains over plain greedy decoding.

    The draft proposes `draft_tokens` tokens, the teacher checks them in one forward pass, keeps those that it would
    have chosen itself and adds one of its own (Leviathan et al. 2023, arXiv 2211.17192). The output is the teacher's.
    Generation goes past end-of-text tokens, so that every prompt gets `new_tokens` tokens. Both ways take turns,
    prompt by prompt, after one prompt that is not counted. Long because all arguments are explained.

    Args:
        teacher: the model whose text is generated, or the path or Hub id of one.
        draft: the model that proposes tokens, with the same vocabulary, or one that a plan has cut. Then `generate`
            also takes `tokenizer` and `assistant_tokenizer`, and translates the tokens.
        dataset: as in `token_rows`; the beginnings of its rows are the prompts.
        processing_class: tokenizer, or the path or Hub id of one; needed for text, and that of the teacher where the
            draft's vocabulary was cut.
        num_prompts: number of prompts.
        prompt_tokens: tokens of each.
        new_tokens: tokens that are generated after each.
        draft_tokens: tokens that the draft proposes at a time. To use the same in practice, set
            `draft.generation_config.num_assistant_tokens`, and `assistant_confidence_threshold` to 0.
        text_field: column that holds the text.
        dtype: dtype of models that are loaded here; by default the stored one, or float32 where the hardware is slow
            in that.
        device: device of models that are loaded here.
        show_progress: show a progress bar.

    Returns:
        Each as `value` and `stderr` over prompts: `acceptance`, the share of proposed tokens that the teacher keeps;
        `tokens_per_call`, new tokens per forward pass of the teacher (plain decoding: 1); `speed_up`, seconds of
        plain decoding / seconds with the draft; `identical_outputs`, the share of prompts with the same output, which
        rounding in half precision may change.

    Raises:
        MismatchError: if the vocabularies differ, or a context is too short.
        DataError: if no row is long enough, or a setting is out of range.
        UnsupportedModelError: if one of the models cannot take part in assisted generation.
    """
    test = DraftTest(num_prompts, prompt_tokens, new_tokens, draft_tokens)
    models = {"teacher": teacher, "draft": draft}
    limits = Limits.of(models, "teacher", maps_tokens=True)
    limits.timed_lengths(prompt_tokens, new_tokens)
    if isinstance(processing_class, str | os.PathLike):
        processing_class = load_tokenizer(processing_class)
    readers = Readers.of(limits.spaces, models, processing_class)
    limits.spaces.require_own(dataset)
    # Twice as many rows as prompts, because some may be too short.
    rows = token_rows(
        dataset,
        limits.spaces.tokenizer(processing_class, models),
        max_length=limits.row_length(None),
        num_rows=2 * num_prompts,
        packing=False,
        text_field=text_field,
    )
    limits.require_known(rows)
    device = common_device(models, device)
    loaded = {name: load_for_inference(model, dtype, device) for name, model in models.items()}
    with evaluating(loaded.values()):
        found = time_drafts(loaded, "teacher", rows, test, readers, show_progress)
    return found["draft"]


@torch.no_grad()
def time_drafts(
    models: Mapping[str, PreTrainedModel],
    teacher: str,
    rows: TokenRows,
    test: DraftTest,
    readers: Readers,
    show_progress: bool,
) -> dict[str, dict[str, Any]]:
    """Measure every other model as a draft of one; see `measure_draft`.

    Args:
        models: name → model, in evaluation mode.
        teacher: name of the model whose text is generated.
        rows: the beginnings of these rows are the prompts.
        test: how drafts are measured.
        readers: ids and tokenizers of the models.
        show_progress: show a progress bar.

    Returns:
        Name of every draft → metrics.
    """
    own = [readers.spaces.of_model(teacher, ids) for ids in test.prompts(rows)]
    prompts = [torch.tensor([ids], device=models[teacher].device) for ids in own]
    drafts = [name for name in models if name != teacher]
    plain: list[_Timed] = []
    assisted: dict[str, list[_Timed]] = {name: [] for name in drafts}
    names: list[str | None] = [None, *drafts]
    with tqdm(total=len(prompts) + 1, desc="Drafting", unit="prompt", disable=not show_progress) as bar:
        for turn, prompt in enumerate([prompts[0], *prompts]):  # the first turn warms up
            for name in names:
                draft = None if name is None else models[name]
                timed = _generate(models[teacher], draft, prompt, test, readers.translation(teacher, name))
                if turn:
                    (plain if name is None else assisted[name]).append(timed)
            names = names[1:] + names[:1]
            bar.update()
    return {name: _summary(plain, assisted[name]) for name in drafts}


@dataclass(frozen=True)
class _Timed:
    """One generation.

    Attributes:
        tokens: the new tokens.
        seconds: how long it took.
        proposed: tokens that the draft proposed.
        calls: forward passes of the teacher after which tokens were added.
    """

    tokens: list[int]
    seconds: float
    proposed: int
    calls: int


class _Steps:
    """A streamer that counts the tokens of every forward pass; `generate` also streams the prompt."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.counts.append(tokens.numel())

    def end(self) -> None:
        pass


def _generate(
    teacher: PreTrainedModel,
    draft: PreTrainedModel | None,
    prompt_1T: torch.Tensor,
    test: DraftTest,
    translation: Mapping[str, Any],
) -> _Timed:
    """Greedy continuation of one prompt, [1, T]; `translation` holds both tokenizers where they differ."""
    settings = GenerationConfig(
        max_new_tokens=test.new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,  # nothing is padded
        use_cache=True,
    )
    steps = _Steps()
    read: list[int] = []

    def count(_: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        read.append((args[0] if args else kwargs["input_ids"]).shape[1])

    hook = teacher.register_forward_pre_hook(count, with_kwargs=True)
    with without_generation_defaults(teacher), _proposing(draft, test.draft_tokens):
        synchronize(teacher.device)
        start = time.perf_counter()
        try:
            output: Any = teacher.generate(  # type: ignore[operator]
                input_ids=prompt_1T,
                attention_mask=torch.ones_like(prompt_1T),
                generation_config=settings,
                assistant_model=draft,
                streamer=steps,
                **translation,
            )
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{type(teacher).__name__} cannot check the tokens of a draft ({error}). Leave drafts out."
            ) from error
        finally:
            hook.remove()
        synchronize(teacher.device)
        seconds = time.perf_counter() - start
    counts = steps.counts[1:]
    # A draft proposes no more tokens than can be kept beside the one that the teacher adds.
    left = [test.new_tokens - sum(counts[:place]) for place in range(len(counts))]
    proposed = 0 if draft is None else sum(min(test.draft_tokens, rest - 1) for rest in left)
    if translation:  # the teacher reads what is proposed behind the prompt, or behind the token that it added itself
        proposed = sum(read) - prompt_1T.shape[1] - (len(read) - 1)
    return _Timed(output[0, prompt_1T.shape[1] :].tolist(), seconds, proposed, len(counts))


@contextlib.contextmanager
def _proposing(draft: PreTrainedModel | None, number: int) -> Iterator[None]:
    """Let a draft propose a fixed number of tokens, however sure it is of them."""
    if draft is None:
        yield
        return
    kept = draft.generation_config
    # Read by transformers.generation.candidate_generator from the draft's own settings, and nowhere else.
    draft.generation_config = GenerationConfig(
        num_assistant_tokens=number,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
        pad_token_id=0,
    )
    try:
        yield
    finally:
        draft.generation_config = kept


def _summary(plain: Sequence[_Timed], assisted: Sequence[_Timed]) -> dict[str, Any]:
    """Means over prompts with their standard errors."""

    def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
        value, stderr = mean_and_error(above, below)
        return {"value": value, "stderr": stderr}

    same = [float(one.tokens == other.tokens) for one, other in zip(plain, assisted, strict=True)]
    proposed = [one.proposed for one in assisted]
    return {
        "acceptance": ratio([len(one.tokens) - one.calls for one in assisted], proposed) if sum(proposed) else None,
        "tokens_per_call": ratio([len(one.tokens) for one in assisted], [one.calls for one in assisted]),
        "speed_up": ratio([one.seconds for one in plain], [one.seconds for one in assisted]),
        "identical_outputs": ratio(same, [1] * len(same)),
    }
