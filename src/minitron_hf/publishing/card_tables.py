"""The tables of a model card, from the artefacts of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..evaluation.means import with_error
from ..sizes.compared import TITLES, compared_counts
from . import markdown as md
from .card_metadata import METRICS

#: Metrics in the table of rounds and at the head of a report.
ROUND_METRICS = ("loss", "kl_divergence", "top1_agreement")

#: Titles of the counts of parameters in tables.
COUNT_TITLES = {
    key: f"Parameters {title}" if title.startswith("without") else title.capitalize() for key, title in TITLES.items()
}
#: Titles of the axes in tables. Other axes are shown under their own names.
AXIS_TITLES = {
    "layers": "Layers",
    "hidden": "Hidden size",
    "ffn": "MLP width",
    "heads": "Attention heads",
    "kv": "Key-value heads",
    "head_dim": "Head dimension",
    "vocab": "Vocabulary",
}


def _round_table(run: Mapping[str, Any]) -> list[list[str]] | None:
    """One row per round: sizes, parameters, tokens of distillation, and quality."""
    if not run["rounds"]:
        return None
    models = (run["evaluation"] or {}).get("models") or {}
    rounds = [*run["rounds"], {"pruning_plan": run["pruning_plan"], "distillation": run["distillation"] or {}}]
    rows = [["Round", "Pruned sizes", "Parameters", "Tokens", *(METRICS[key][0] for key in ROUND_METRICS)]]

    def measured(name: str) -> list[str]:
        found = (models.get(name) or {}).get("metrics") or {}
        return [md.measured(found.get(key), *METRICS[key][2:]) for key in ROUND_METRICS]

    first = rounds[0]["pruning_plan"]["teacher"]
    rows.append(["Teacher", "", md.count(first["num_parameters"]), "", *measured("teacher")])
    for number, one in enumerate(rounds, 1):
        plan = one["pruning_plan"]
        cut = [
            f"{AXIS_TITLES.get(axis, axis)} {_size(both['teacher'])} → {_size(both['student'])}"
            for axis, both in plan["sizes"].items()
            if both["student"] < both["teacher"]
        ]
        tokens = one["distillation"].get("num_input_tokens_seen")
        name = "student" if number == len(rounds) else f"round_{number}"
        parameters = md.count(plan["student"]["num_parameters"])
        rows.append([str(number), ", ".join(cut), parameters, md.count(tokens) if tokens else "–", *measured(name)])
    return rows


def _depth_table(plan: Mapping[str, Any], most: int = 12) -> list[list[str]] | None:
    """Alternatives to the dropped layers, with the depth metric of the model without them."""
    scores = plan.get("scores") or {}
    gone = list(plan.get("layers_dropped") or [])
    rivals = [tried for tried in scores.get("layers") or [] if len(tried["dropped"]) == len(gone)]
    if not gone or not rivals:
        return None
    settings = scores["settings"]
    rows = [["none", f"{settings['depth_baseline']:.4g}"]]
    for tried in rivals[:most]:
        mark = "**" if sorted(tried["dropped"]) == gone else ""
        rows.append([f"{mark}{', '.join(map(str, tried['dropped']))}{mark}", f"{tried['score']:.4g}"])
    return [["layers dropped", str(settings["depth_metric"]).replace("_", " ")], *rows]


def _search_table(candidates: Sequence[Mapping[str, Any]], most: int = 12) -> list[list[str]] | None:
    """The compared shapes, best first."""
    if not candidates:
        return None
    retrained = any(one.get("rounds") for one in candidates)
    scored = any(one.get("scores") for one in candidates)
    header = [
        "shape",
        "parameters",
        *(["score"] if scored else []),
        "KL, pruned",
        *(["KL, distilled", "tokens"] if retrained else []),
        "behind the best",
    ]
    rows = [header]
    for one in candidates[:most]:
        last = (one.get("rounds") or [None])[-1]
        distilled = [with_error(last["kl"], last["stderr"]), md.count(last["num_tokens"])] if last else ["–", "–"]
        rows.append(
            [
                one["name"],
                md.count(one["num_parameters"]),
                *([f"{one['scores'][-1]:.4g}" if one.get("scores") else "–"] if scored else []),
                with_error(**one["proxy"]) if one["proxy"] else "–",
                *(distilled if retrained else []),
                # A difference before retraining must not be read as one after retraining.
                with_error(**one["behind"]) if one["behind"] and (last or not retrained) else "–",
            ]
        )
    return rows


def _cost_table(costs: Mapping[str, Any]) -> list[list[str]] | None:
    """What every stage took, beside the estimate from before the run."""
    if not costs["stages"]:
        return None
    estimate = costs["estimate"] or {"stages": []}
    expected = {one["stage"]: one for one in estimate["stages"]}
    rows = [["Stage", "Time", "Estimated", "Peak memory", "Estimated", "Written"]]
    for one in costs["stages"]:
        before = expected.get(one["stage"], {})
        times = [md.duration(each.get("seconds")) for each in (one, before)]
        memory = [_bytes_or_dash(one["peak_memory_bytes"]), _bytes_or_dash(before.get("memory"))]
        rows.append([one["stage"], *times, *memory, _bytes_or_dash(one["bytes_written"])])
    total = sum(one["seconds"] or 0 for one in costs["stages"])
    return [*rows, ["all", md.duration(total), "", "", "", ""]]


def _bytes_or_dash(value: float | None) -> str:
    return md.byte_size(value) if value else "–"


def _architecture_table(plan: Mapping[str, Any]) -> list[list[str]]:
    teacher, student = plan["teacher"], plan["student"]

    def row(title: str, before: Any, after: Any) -> list[str]:
        ratio = (
            f"{100 * after / before:.1f} %" if isinstance(before, int) and isinstance(after, int) and before else ""
        )
        return [title, _size(before), _size(after), ratio]

    rows = [row(AXIS_TITLES.get(axis, axis), size["teacher"], size["student"]) for axis, size in plan["sizes"].items()]
    for axis, key in (("head_dim", "head_dim"), ("vocab", "vocab_size")):
        before, after = teacher["config"].get(key), student["config"].get(key)
        if axis not in plan["sizes"] and (before is not None or after is not None):
            rows.append(row(AXIS_TITLES[axis], before, after))
    for key, both in compared_counts({"teacher": teacher, "student": student}).items():
        rows.append(row(COUNT_TITLES[key], both["teacher"], both["student"]))
    return [["", "Teacher", "Student", "Kept"], *rows]


def _size(value: Any) -> str:
    """One size, or the sizes of all layers: `768`, `512–768`."""
    if value is None:
        return "–"
    if isinstance(value, list):
        low, high = min(value), max(value)
        return md.count(low) if low == high else f"{md.count(low)}–{md.count(high)}"
    return md.count(value)


def measurement_table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Rows of every number that at least one model has; the teacher's and the student's columns come first."""
    models = evaluation["models"]
    names = _model_order(models)
    reference = models.get(evaluation.get("reference")) or {}
    rows: list[list[str]] = [["", *map(_model_title, names)]]

    def add(title: str, cells: list[str]) -> None:
        if any(cell != "–" for cell in cells):
            rows.append([title, *cells])

    for key, (title, _, factor, unit) in METRICS.items():
        add(title, [md.measured(models[name]["metrics"].get(key), factor, unit) for name in names])
    for title, key, shown in (
        *((COUNT_TITLES[key], key, md.count) for key in compared_counts(models)),
        ("Checkpoint size", "checkpoint_bytes", md.byte_size),
        ("KV cache per token", "kv_cache_bytes_per_token", md.byte_size),
        ("Peak memory", "peak_memory_bytes", md.byte_size),
    ):
        add(title, [_with_ratio(models[name].get(key), reference.get(key), shown) for name in names])
    for title, key in (
        ("Prefill, tokens/s", "prefill_tokens_per_second"),
        ("Decode, tokens/s", "decode_tokens_per_second"),
    ):
        speeds = [models[name].get(key) or {} for name in names]
        base = (reference.get(key) or {}).get("median")
        # Evaluations by older versions have no quartiles.
        title += ": median [quartiles]" if any("quartiles" in speed for speed in speeds) else ""
        add(title, [_with_ratio(speed.get("median"), base, md.rate, speed.get("quartiles")) for speed in speeds])
    return rows


def headline(
    plan: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None, average: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    """The first numbers of a report: title, the student's value, and how it compares with the teacher's.

    Args:
        plan: the plan from the teacher to the student.
        evaluation: `evaluation.json`.
        average: the entry `average` of `benchmarks.json`.
    """
    tiles = []
    if plan:
        before, after = (plan[model]["num_parameters"] for model in ("teacher", "student"))
        tiles.append(("Parameters", md.short_count(after), f"{after / before:.1%} of {md.short_count(before)}"))
    models = (evaluation or {}).get("models") or {}
    student, teacher = models.get("student") or {}, models.get((evaluation or {}).get("reference")) or {}
    for key in ROUND_METRICS:
        title, _, factor, unit = METRICS[key]
        if found := (student.get("metrics") or {}).get(key):
            base = (teacher.get("metrics") or {}).get(key) if key == "loss" else None  # the others compare with it
            compared = f"teacher {md.measured(base, factor, unit)}" if base else ""
            tiles.append((title, md.measured(found, factor, unit), compared))
    if speed := (student.get("decode_tokens_per_second") or {}).get("median"):
        base = (teacher.get("decode_tokens_per_second") or {}).get("median")
        tiles.append(("Decode, tokens/s", md.rate(speed), f"{speed / base:.2f}× the teacher" if base else ""))
    if size := student.get("checkpoint_bytes"):
        base = teacher.get("checkpoint_bytes")
        tiles.append(("Checkpoint size", md.byte_size(size), f"teacher {md.byte_size(base)}" if base else ""))
    if share := ((average or {}).get("student") or {}).get("share"):
        tiles.append(("Benchmarks", md.measured(share, 100, " %"), "of the teacher's average"))
    return tiles


def speed_table(evaluation: Mapping[str, Any]) -> list[list[str]] | None:
    """Speeds and bytes of every workload, a column per model; None where one workload alone was timed."""
    models = {name: model["speeds"] for name, model in evaluation["models"].items() if model.get("speeds")}
    if not models:
        return None
    names = _model_order(models)
    reference = models.get(evaluation.get("reference") or "")
    rows = [["Prompts", "Tokens of each", "", *map(_model_title, names)]]
    for place, load in enumerate(models[names[0]]):
        which = [md.count(load["batch_size"]), md.count(load["prompt_tokens"])]
        base = {} if reference is None else reference[place]
        for title, key in (("prefill, tokens/s", "prefill"), ("decode, tokens/s", "decode")):
            speeds = [models[name][place][f"{key}_tokens_per_second"] or {} for name in names]
            median = (base.get(f"{key}_tokens_per_second") or {}).get("median")
            cells = [_with_ratio(one.get("median"), median, md.rate, one.get("quartiles")) for one in speeds]
            rows.append([*which, title, *cells])
        for title, key in (("KV cache", "kv_cache_bytes"), ("peak memory", "peak_memory_bytes")):
            sizes = [models[name][place][key] for name in names]
            cells = [_with_ratio(size, base.get(key), md.byte_size) for size in sizes]
            rows += [[*which, title, *cells]] if {*cells} != {"–"} else []
    return rows


#: Rows of the table on drafts: key → title, factor and unit.
DRAFT_METRICS: Mapping[str, tuple[str, float, str]] = {
    "acceptance": ("Proposed tokens that the teacher keeps", 100.0, " %"),
    "tokens_per_call": ("New tokens per forward pass of the teacher", 1.0, ""),
    "speed_up": ("Times as fast as plain decoding", 1.0, ""),
    "identical_outputs": ("Outputs equal to plain decoding", 100.0, " %"),
}


def draft_table(evaluation: Mapping[str, Any]) -> list[list[str]] | None:
    """The models as drafts of the teacher, a column per model."""
    return _metric_table(
        {name: model["draft"] for name, model in evaluation["models"].items() if model.get("draft")}, DRAFT_METRICS
    )


def _metric_table(
    models: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, tuple[str, float, str]]
) -> list[list[str]] | None:
    """A row per metric and a column per model; None without models."""
    if not models:
        return None
    names = _model_order(models)
    rows = [
        [title, *(md.measured(models[name].get(key), factor, unit) for name in names)]
        for key, (title, factor, unit) in metrics.items()
    ]
    return [["", *map(_model_title, names)], *(row for row in rows if {*row[1:]} != {"–"})]


#: Rows of the table on chat: key → title, factor and unit.
CHAT_METRICS: Mapping[str, tuple[str, float, str]] = {
    "perplexity": ("Perplexity of the teacher's answers, per token", 1.0, ""),
    "kl_divergence": ("KL(teacher ‖ model) on the teacher's answers, nats per token", 1.0, ""),
    "top1_agreement": ("Top-1 agreement on the teacher's answers", 100.0, " %"),
    "stopping": ("Own answers that end within the limit", 100.0, " %"),
    "format": ("Own answers that keep the template's turns", 100.0, " %"),
    "answer_tokens": ("Tokens of an own answer", 1.0, ""),
}


def _chat_table(evaluation: Mapping[str, Any]) -> list[list[str]] | None:
    """The check of the chat ability, a column per model."""
    return _metric_table(
        {name: model["chat"] for name, model in evaluation["models"].items() if model.get("chat")}, CHAT_METRICS
    )


def _corpus_table(distillation: Mapping[str, Any] | None) -> list[list[str]] | None:
    """The parts of the training corpus and their shares; None if it is one corpus."""
    parts = _training_parts(distillation)
    if len(parts) < 2:
        return None
    rows = [
        [
            md.code(part["name"] or "corpus") if "generated_by" not in part else "text that the teacher wrote",
            "–" if part["num_rows"] is None else md.count(part["num_rows"]),
            f"{part['probability']:.1%}",
            "–" if part["token_share"] is None else f"{part['token_share']:.0%}",
        ]
        for part in parts
    ]
    return [["Training corpus", "Rows", "Share of rows drawn", _share_of_tokens(parts)], *rows]


def _share_of_tokens(parts: Sequence[Mapping[str, Any]]) -> str:
    """The title of the column, with what the shares are estimated from if it is not some of all documents."""
    looked_at = {part["measured_first_documents"] for part in parts if "measured_first_documents" in part}
    return f"Share of tokens (first {max(looked_at)} documents)" if looked_at else "Share of tokens"


def _written_by_teacher(distillation: Mapping[str, Any] | None) -> str | None:
    """How much of the training text the teacher wrote; None if none of it."""
    parts = _training_parts(distillation)
    written = [part for part in parts if "generated_by" in part]
    if not written:
        return None
    if len(written) == len(parts):
        return "The teacher wrote all of the training text."
    share = sum(part["probability"] for part in written)
    tokens = [part["token_share"] for part in written]
    about = "" if None in tokens else f" (about {sum(tokens):.0%} of the tokens)"
    return f"The teacher wrote {share:.0%} of the training rows{about}."


def _training_parts(distillation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    data = ((distillation or {}).get("data") or {}).get("train") or {}
    parts: list[dict[str, Any]] = data.get("parts") or []
    return parts


def _position_table(evaluation: Mapping[str, Any]) -> list[list[str]] | None:
    """Loss and KL by position in the row: of the reference and the student."""
    models = {name: model["positions"] for name, model in evaluation["models"].items() if model.get("positions")}
    names = [name for name in _model_order(models) if name in (evaluation.get("reference"), "teacher", "student")]
    if not names:
        return None
    columns = [(name, key) for name in names for key in ("loss", "kl_divergence") if key in models[name][0]]
    titles = [f"{_model_title(name)}, {'loss' if key == 'loss' else 'KL'}" for name, key in columns]
    rows = [
        [
            f"{part['begin']:,}–{part['end'] - 1:,}",
            md.count(part["num_tokens"]),
            *(md.measured(models[name][number].get(key)) for name, key in columns),
        ]
        for number, part in enumerate(models[names[0]])
    ]
    return [["Positions", "Tokens", *titles], *rows]


def _with_ratio(
    value: float | None,
    reference: float | None,
    shown: Callable[[Any], str],
    quartiles: Sequence[float] | None = None,
) -> str:
    """A value with its spread, and its ratio to the reference's."""
    if value is None:
        return "–"
    spread = f" [{'–'.join(map(shown, quartiles))}]" if quartiles else ""
    ratio = f" ({value / reference:.2f}×)" if reference and value != reference else ""
    return shown(value) + spread + ratio


def _model_order(names: Iterable[str]) -> list[str]:
    """The teacher and the student first, then the others as they come."""
    return sorted(names, key=lambda name: {"teacher": 0, "student": 1}.get(name, 2))


def _model_title(name: str) -> str:
    """`random_init` → `Random init`."""
    return name.replace("_", " ").capitalize()
