"""What lmms-eval writes, read: figures with its own standard errors, and two models compared.

lmms-eval leaves `<date>_results.json`, and for each task `<date>_samples_<task>.jsonl` with what
every document scored. Its figures are never computed again here. Ours is beside them: where a
figure is the mean of its documents' scores, tuned is compared with base document by document.

This module knows neither a model nor a command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from vlmdpo.benchmarks import files
from vlmdpo.benchmarks.stats import DRAWS, Bootstrap, Interval
from vlmdpo.benchmarks.summary import judge
from vlmdpo.errors import DataError

_Z95 = 1.959963984540054
_MAX_COUNTS = 20_000_000  # draws times images held at once: 160 MB
# Where a document says which image it is about.
_IMAGE_KEYS = ("image_id", "image", "image_path", "image_name", "image_source", "img_id")


@dataclass(frozen=True)
class TaskFigure:
    """One figure of one task, as lmms-eval gives it.

    Attributes:
        more_is_better: None where lmms-eval does not say.
        scores: by document, what the figure is the mean of; empty where it is not such a mean.
        scale: the figure is this many times the mean: 1, or 100 for per cent.
    """

    value: float
    stderr: float | None
    more_is_better: bool | None
    scores: Mapping[int, float] = field(default_factory=dict)
    scale: int = 1

    @property
    def ci95(self) -> Interval | None:
        """The 95% interval of lmms-eval's own standard error."""
        if self.stderr is None:
            return None
        return self.value - _Z95 * self.stderr, self.value + _Z95 * self.stderr


@dataclass(frozen=True)
class Document:
    """What one document asked, and what the model answered."""

    question: str
    truth: str
    answer: str
    image: str


@dataclass(frozen=True)
class TaskResult:
    """One model's result in one task, or in a group of tasks (which has no documents)."""

    figures: Mapping[str, TaskFigure]
    documents: Mapping[int, Document]
    asked: int  # documents
    of: int  # documents that the task has
    unnumbered: Sequence[str] = ()  # figures that are not numbers


def results_file(folder: Path) -> Path | None:
    """The newest results file below a folder that lmms-eval wrote to; None without one."""
    found = sorted(folder.rglob("*_results.json"), key=lambda path: path.name)
    return found[-1] if found else None


def read(folder: Path) -> dict[str, TaskResult]:
    """The results below a folder that lmms-eval wrote to, by task.

    Raises DataError if there are none, or they are in another form.
    """
    path = results_file(folder)
    if path is None:
        raise DataError(f"'{folder}' holds no results of lmms-eval")
    results = files.read_json(path)
    try:
        return {
            name: _read_task(name, entry, results, path)
            for name, entry in _entries(results).items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise DataError(
            f"'{path}' is not in the form of lmms-eval's results: {type(problem).__name__} "
            f"{problem}"
        ) from problem


def _entries(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of each task, and those of groups that have any."""
    entries = {**results["results"], **results.get("groups", {})}
    return {name: entry for name, entry in entries.items() if any("," in key for key in entry)}


def _read_task(
    name: str, entry: Mapping[str, Any], results: Mapping[str, Any], path: Path
) -> TaskResult:
    config = results["configs"].get(name) or {}
    documents, lines = _read_samples(path, name, config)
    counts = results["n-samples"].get(name) or {}
    better = results.get("higher_is_better", {}).get(name) or {}
    figures, unnumbered = {}, []
    for key, value in entry.items():
        metric, _, filtered = key.rpartition(",")
        if not metric or "_stderr" in metric:
            continue
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        if not _is_number(value):
            unnumbered.append(shown)
            continue
        scores = _scores(lines, metric, config.get("score_key") or "score")
        scale = _scale(float(value), scores)
        figures[shown] = TaskFigure(
            float(value),
            _stderr(entry, metric, filtered, scale),
            better.get(metric),
            scores if scale else {},
            scale or 1,
        )
    asked = int(counts.get("effective", len(documents)))
    return TaskResult(figures, documents, asked, int(counts.get("original", asked)), unnumbered)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_samples(
    results: Path, task: str, config: Mapping[str, Any]
) -> tuple[dict[int, Document], dict[int, dict[str, Any]]]:
    """(documents, their lines) by number; none where samples were not logged.

    A task with several filters logs each document once for each; which is which is not said, so
    such documents are not read.
    """
    date = results.name.removesuffix("_results.json")
    path = results.with_name(f"{date}_samples_{task}.jsonl")
    if not path.is_file():
        return {}, {}
    lines: dict[int, dict[str, Any]] = {}
    for number, line in files.json_lines(path):
        files.require(line, {"doc_id": int}, f"'{path}' line {number}")
        if line["doc_id"] in lines:
            return {}, {}
        lines[line["doc_id"]] = line
    cluster = config.get("cluster_key")
    documents = {
        number: Document(
            str(line.get("input", "")),
            str(line.get("target", "")),
            _text(line.get("filtered_resps", "")),
            _image(number, line, cluster),
        )
        for number, line in lines.items()
    }
    return documents, lines


def _text(answer: Any) -> str:
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _image(number: int, line: Mapping[str, Any], cluster: str | None) -> str:
    """The image that a document names, or the key by which its task groups documents; else one of
    its own.
    """
    keys = (cluster, *_IMAGE_KEYS) if cluster else _IMAGE_KEYS
    for place in (line, *(value for value in line.values() if isinstance(value, dict))):
        for key in keys:
            if isinstance(place.get(key), (str, int)):
                return str(place[key])
    return f"document {number}"


def _scores(
    lines: Mapping[int, Mapping[str, Any]], metric: str, score_key: str
) -> dict[int, float]:
    """What each document scored; empty unless every one has a number."""
    scores = {}
    for number, line in lines.items():
        value = line.get(metric)
        if isinstance(value, dict):
            value = value.get(score_key)
        if not isinstance(value, bool) and not _is_number(value):
            return {}
        scores[number] = float(value)
    return scores


def _scale(value: float, scores: Mapping[int, float]) -> int | None:
    """How many times the mean of the scores a figure is; None where it is not their mean.

    Precision, or a sum over pairs of questions, is not: its documents' scores say nothing of how
    certain it is.
    """
    if not scores:
        return None
    mean = math.fsum(scores.values()) / len(scores)
    return next((k for k in (1, 100) if math.isclose(value, k * mean, rel_tol=1e-6)), None)


def _stderr(
    entry: Mapping[str, Any], metric: str, filtered: str, scale: int | None
) -> float | None:
    """lmms-eval's standard error, clustered where it gives that; None where it has none.

    It also gives standard errors of the mean of scores for figures that are not such a mean: those
    are not used.
    """
    clustered = entry.get(f"{metric}_stderr_clustered,{filtered}")
    if scale and _is_number(clustered):
        return scale * float(clustered)
    own = entry.get(f"{metric}_stderr,{filtered}")
    if _is_number(own):
        return float(own)
    plain = entry.get(f"{metric}_stderr_clt,{filtered}")
    return scale * float(plain) if scale and _is_number(plain) else None


def compare(
    base: Mapping[str, TaskResult], tuned: Mapping[str, TaskResult]
) -> dict[str, Any] | None:
    """Tuned against base, document by document; None where no figure can be compared so.

    Returns `n`, the documents; `figures` {task: {figure: {delta, ci95, verdict, n, and for scores
    of 0 and 1 mcnemar_p, fixed, broken}}}, in the figures' own units; and `flips`, the documents
    whose score of 0 or 1 changed, by each task's first such figure.

    Raises DataError if the documents are not the same.
    """
    figures: dict[str, dict[str, Any]] = {}
    flips: list[dict[str, Any]] = []
    for task in base:
        if task not in tuned:
            continue
        _check_same_documents(task, base[task], tuned[task])
        flipped = False
        for name, before in base[task].figures.items():
            after = tuned[task].figures.get(name)
            if after is None or not _are_paired(before, after):
                continue
            images = [base[task].documents[number].image for number in before.scores]
            figures.setdefault(task, {})[name] = _difference(before, after, images)
            if not flipped and _is_right_or_wrong(before) and _is_right_or_wrong(after):
                flipped = True
                flips += _flips(task, base[task], tuned[task], before, after)
    if not figures:
        return None
    compared = sum(max(one["n"] for one in names.values()) for names in figures.values())
    return {"n": compared, "figures": figures, "flips": flips}


def _are_paired(before: TaskFigure, after: TaskFigure) -> bool:
    # A figure of 0 is any multiple of the mean; its partner says which.
    has_same_scale = before.scale == after.scale or 0 in (before.value, after.value)
    return bool(before.scores) and before.scores.keys() == after.scores.keys() and has_same_scale


def _check_same_documents(task: str, base: TaskResult, tuned: TaskResult) -> None:
    for number, one in base.documents.items():
        other = tuned.documents.get(number)
        if other is not None and (one.truth, one.question) != (other.truth, other.question):
            raise DataError(
                f"lmms-eval asked base and tuned different documents: {task}, document {number}; "
                "the task's data changed between the runs, so ask again with --overwrite"
            )


def _is_right_or_wrong(figure: TaskFigure) -> bool:
    return all(score in (0, 1) for score in figure.scores.values())


def _better(figure: TaskFigure) -> int:
    return -1 if figure.more_is_better is False else 1


def _difference(before: TaskFigure, after: TaskFigure, images: Sequence[str]) -> dict[str, Any]:
    scale = max(before.scale, after.scale)
    changes = [after.scores[number] - score for number, score in before.scores.items()]
    interval = _interval_of_mean([scale * change for change in changes], images)
    found: dict[str, Any] = {
        "delta": after.value - before.value,
        "ci95": interval,
        "verdict": judge(interval, more_is_better=before.more_is_better),
        "n": len(changes),
    }
    if _is_right_or_wrong(before) and _is_right_or_wrong(after):
        better = _better(before)
        fixed, broken = (sum(change == sign * better for change in changes) for sign in (1, -1))
        found |= {"mcnemar_p": _mcnemar(fixed, broken), "fixed": fixed, "broken": broken}
    return found


def _interval_of_mean(values: Sequence[float], images: Sequence[str]) -> Interval | None:
    """The 95% bootstrap interval over images of a mean; in blocks, since tasks may be large."""
    import numpy as np

    if len(set(images)) == 1:
        return None
    ones = [1.0] * len(values)
    block = max(1, min(DRAWS, _MAX_COUNTS // len(set(images))))
    drawn = []
    for start in range(0, DRAWS, block):
        draws = Bootstrap(images, draws=min(block, DRAWS - start), seed=start)
        drawn.append(draws.sums(values) / draws.sums(ones))
    return Bootstrap.interval(np.concatenate(drawn))


def _mcnemar(fixed: int, broken: int) -> float:
    """The p-value of McNemar's exact test."""
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def _flips(
    task: str, base: TaskResult, tuned: TaskResult, before: TaskFigure, after: TaskFigure
) -> Iterator[dict[str, Any]]:
    for number, score in before.scores.items():
        if score == after.scores[number]:
            continue
        asked = base.documents[number]
        yield {
            "id": f"{task}/{number}",
            "image": "",  # lmms-eval keeps none
            "question": asked.question,
            "truth": asked.truth,
            "group": task,
            "base": asked.answer,
            "tuned": tuned.documents[number].answer,
            "fixed": after.scores[number] - score == _better(before),
        }
