"""`vlmdpo eval-amber`: AMBER's yes/no questions, scored as AMBER scores them, with the uncertainty it leaves out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.amber import questions as qs
from vlmdpo.amber.scores import COVERS, score
from vlmdpo.amber.stats import compare
from vlmdpo.amber.verdict import verdict
from vlmdpo.config import EvalAmberConfig
from vlmdpo.errors import DataError
from vlmdpo.models.registry import short_name

SCORES = "scores.json"
# Accuracy and F1 on AMBER's discriminative task, from the article "Preference Optimization for Vision Language
# Models with TRL" (2024).
ARTICLE = (
    ("GPT-4o", 88.8, 91.6),
    ("Idefics2+DPO", 85.9, 89.4),
    ("Idefics2", 85.8, 89.1),
    ("GPT-4v", 83.4, 87.4),
    ("MiniGemini", 82.6, 87.6),
    ("LLaVA-NeXT", 81.4, 85.4),
    ("QWEN-VL", 81.9, 86.4),
    ("LURE", 73.5, 77.7),
    ("OPERA", 75.2, 78.3),
    ("Less-is-more", 72.4, 75.8),
    ("VCD", 71.8, 74.9),
)
Responses = list[tuple[int, str]]


def run(config: EvalAmberConfig) -> dict[str, Any]:
    """Ask and score, or score a response file. Raises DataError, ModelError."""
    benchmark = _benchmark(config)
    if config.answers is not None:
        report = _report(config, benchmark, {"base": _from_file(config.answers, benchmark)})
        if config.output_dir is not None:
            _save(config.output_dir, {SCORES: report})
        return report
    folder = config.output_dir or Path("outputs") / "amber" / f"{benchmark.name}-{short_name(config.model)}"
    _check_output(folder)
    if benchmark.picture is not None and config.data is not None:
        qs.need_pictures(benchmark.questions, config.images or config.data / "image")
    said = _ask_all(config, benchmark)
    responses = {who: [(number, verdict(text) or text) for number, text in texts] for who, texts in said.items()}
    report = {**_report(config, benchmark, responses), "output_dir": str(folder)}
    files: dict[str, Any] = {
        f"answers_{who}.json": [
            {"id": number, "response": response, "said": text}
            for (number, response), (_, text) in zip(responses[who], texts, strict=True)
        ]
        for who, texts in said.items()
    }
    _save(folder, {**files, SCORES: report})
    return report


def _benchmark(config: EvalAmberConfig) -> qs.Benchmark:
    if config.data is not None:
        benchmark = qs.load(config.data, config.images)
    else:
        from vlmdpo.tiny import evaluation

        shipped = qs.load(evaluation.FOLDER, None)
        benchmark = qs.Benchmark("scenes", shipped.questions, evaluation.picture, False, shipped.generative_ids)
    if config.limit is None or config.limit >= len(benchmark.questions):
        return benchmark
    some = benchmark.questions[: config.limit]
    return qs.Benchmark(benchmark.name, some, benchmark.picture, False, benchmark.generative_ids)


def _from_file(path: Path, benchmark: qs.Benchmark) -> Responses:
    known = {question.id for question in benchmark.questions}
    responses = []
    for number, response in qs.read_responses(path):
        if number in known:
            responses.append((number, response))
        elif number not in benchmark.generative_ids:
            raise DataError(f"'{path}': id {number} is no question of {benchmark.name}; is --data the right folder?")
    if not responses:
        raise DataError(f"'{path}' answers none of the questions of {benchmark.name}")
    return responses


def _ask_all(config: EvalAmberConfig, benchmark: qs.Benchmark) -> dict[str, Responses]:
    """What base and tuned model said, in their own words, to every question."""
    from vlmdpo.models import load

    origin: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    model = load.load_model(config.model, dtype=config.dtype, device=config.device, adapter=config.adapter, **origin)
    processor = load.load_processor(config.model, image_splitting=config.image_splitting, **origin)
    said = {}
    if config.base:
        with model.disable_adapter() if config.adapter else contextlib.nullcontext():
            said["base"] = _ask(config, benchmark, model, processor, "base")
    if config.adapter:
        said["tuned"] = _ask(config, benchmark, model, processor, "tuned")
    return said


def _ask(config: EvalAmberConfig, benchmark: qs.Benchmark, model: Any, processor: Any, who: str) -> Responses:
    from vlmdpo.models.generate import answer

    said: Responses = []
    with ui.progress(f"ask {who}", len(benchmark.questions)) as bar:
        for start in range(0, len(benchmark.questions), config.batch_size):
            batch = benchmark.questions[start : start + config.batch_size]
            pictures = [benchmark.picture(question.image) for question in batch]
            texts = answer(model, processor, pictures, [question.text for question in batch], config.max_new_tokens)
            said += [(question.id, text) for question, text in zip(batch, texts, strict=True)]
            bar.advance(len(batch))
    return said


def _report(config: EvalAmberConfig, benchmark: qs.Benchmark, responses: dict[str, Responses]) -> dict[str, Any]:
    by_id = {question.id: question for question in benchmark.questions}
    models = {who: _facts(by_id, given) for who, given in responses.items()}
    report: dict[str, Any] = {
        "data": benchmark.name,
        "is_amber": benchmark.is_amber,
        "model": config.model if config.answers is None else str(config.answers),
        "adapter": str(config.adapter) if config.adapter else None,
        "questions": {name: sum(q.dimension in dims for q in benchmark.questions) for name, dims in COVERS.items()},
        "scores": {who: score(by_id, given) for who, given in responses.items()},
        "coverage": min(facts["coverage"] for facts in models.values()),
        "unparsed": sum(facts["unparsed"] for facts in models.values()),
        "models": models,
        "always_no": score(by_id, [(number, "No") for number in by_id])["Discriminative"],
        "comparison": None,
    }
    if len(responses) == 2:
        report["comparison"] = _comparison(by_id, dict(responses["base"]), dict(responses["tuned"]))
    return report


def _facts(by_id: dict[int, qs.Question], given: Responses) -> dict[str, Any]:
    read = [response for _, response in given if response in ("Yes", "No")]
    return {
        "coverage": len({number for number, _ in given}) / len(by_id),
        "unparsed": len(given) - len(read),
        "said_no": read.count("No") / len(given),
    }


def _comparison(by_id: dict[int, qs.Question], base: dict[int, str], tuned: dict[int, str]) -> dict[str, Any]:
    right = [[said[q.id].lower() == q.truth for q in by_id.values()] for said in (base, tuned)]
    found = compare(right[0], right[1], [q.image for q in by_id.values()])
    changed = [q for q, before, after in zip(by_id.values(), *right, strict=True) if before != after]
    return {
        "delta_accuracy": found.delta_accuracy,
        "ci95": list(found.ci95),
        "mcnemar_p": found.mcnemar_p,
        "fixed": found.fixed,
        "broken": found.broken,
        "flips": [
            {"id": q.id, "image": q.image, "question": q.text, "truth": q.truth, "base": base[q.id], "tuned": tuned[q.id]}
            for q in changed
        ],
    }


def _check_output(folder: Path) -> None:
    if folder.is_file():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SCORES).is_file():
        raise DataError(f"--output-dir: '{folder}' holds something else; give an empty or new folder")


def _save(folder: Path, files: dict[str, Any]) -> None:
    """Write each file under a temporary name, then rename it: a reader never sees half of one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            part = folder / f".{name}.partial"
            part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            part.rename(folder / name)
    except OSError as problem:
        raise DataError(f"--output-dir: cannot write '{folder}': {problem.strerror or problem}") from problem


def show(report: dict[str, Any]) -> None:
    """Print the scores by dimension, base beside tuned, and what they are worth."""
    scores = report["scores"]
    head = ["", "n"] + [cell for who in scores for cell in (f"{who} acc", "prec", "recall", "F1")]
    names = [name for name in COVERS if any(name in table for table in scores.values())]
    rows = [
        [name, f"{report['questions'][name]:,}"] + [cell for who in scores for cell in _cells(scores[who].get(name))]
        for name in names
    ]
    ui.table(
        f"{report['data']}, discriminative ({report['model']})",
        head,
        rows,
        strong=[0],
        note='Per cent; the positive class is "No".',
    )
    for who, facts in report["models"].items():
        unread = f"; {facts['unparsed']} answers are neither Yes nor No and count as wrong" if facts["unparsed"] else ""
        no, coverage = 100 * facts["said_no"], 100 * facts["coverage"]
        ui.result(f"{who}: said No to {no:.1f}% of the questions, answered {coverage:.1f}% of them{unread}")
    always = report["always_no"]
    ui.result(f"for comparison, always No: accuracy {always['accuracy']}, F1 {always['f1']}")
    if report["comparison"]:
        show_comparison(report["comparison"])
    if report["is_amber"]:
        _show_article(report)
    if "output_dir" in report:
        ui.result(f"Answers and scores: {report['output_dir']}")


def _cells(figures: dict[str, float] | None) -> list[str]:
    return [f"{figures[name]:.1f}" if figures else "-" for name in ("accuracy", "precision", "recall", "f1")]


def show_comparison(found: dict[str, Any]) -> None:
    """Print the difference with its interval, and whether it may be called one."""
    low, high = found["ci95"]
    sure = "the interval holds zero: no difference shown" if low <= 0 <= high else "the interval is clear of zero"
    ui.result(
        f"tuned − base: {found['delta_accuracy']:+.1f} points of accuracy, 95% interval {low:+.1f} to {high:+.1f} ({sure}); "
        f"exact McNemar p = {found['mcnemar_p']:.2g} ({found['fixed']} answers fixed, {found['broken']} broken)"
    )


def show_flips(found: dict[str, Any], count: int) -> None:
    """Print answers that changed, good and bad as they come: every so many-th, so that all parts of the list show."""
    flips = found["flips"]
    picked = [flips[i * len(flips) // count] for i in range(count)] if len(flips) > count else flips
    rows = [[f["question"], f["image"], f["truth"], f["base"], f["tuned"]] for f in picked]
    title = f"{len(rows)} of {len(flips)} answers that changed, evenly spaced, for better or worse"
    ui.table(title, ["Question", "Picture", "Truth", "Base", "Tuned"], rows)


def _show_article(report: dict[str, Any]) -> None:
    ours = [
        (f"{report['model']} ({who}), here", table["Discriminative"]["accuracy"], table["Discriminative"]["f1"])
        for who, table in report["scores"].items()
    ]
    lines = sorted([*ARTICLE, *ours], key=lambda line: -line[1])
    strong = [number for number, line in enumerate(lines) if line in ours]
    rows = [[name, f"{accuracy:.1f}", f"{f1:.1f}"] for name, accuracy, f1 in lines]
    ui.table("Beside the article's table", ["Model", "Accuracy", "F1"], rows, strong=strong)
