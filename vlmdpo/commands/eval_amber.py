"""`vlmdpo eval-amber`: both tasks of AMBER, scored as AMBER scores them, with the uncertainty it
leaves out.
"""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks import answers as kept
from vlmdpo.benchmarks.amber import nouns
from vlmdpo.benchmarks.amber import questions as qs
from vlmdpo.benchmarks.amber.published import beside_article
from vlmdpo.benchmarks.amber.scores import COVERS
from vlmdpo.benchmarks.amber.summary import Responses, summarize
from vlmdpo.benchmarks.stats import DRAWS
from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.config import PER_CALL, EvalAmberConfig, recipes
from vlmdpo.errors import DataError
from vlmdpo.models.registry import short_name
from vlmdpo.report import amber_page, model_card
from vlmdpo.report.amber_page import span
from vlmdpo.report.html import evenly

SCORES, PAGE, MARKDOWN = "scores.json", "report.html", "report.md"
_NAMED = 10  # missing pictures that are named on the screen; scores.json has all


def run(config: EvalAmberConfig) -> dict[str, Any]:
    """Ask and score, or score a response file. Raises ConfigError, DataError, ModelError,
    MissingDependencyError.
    """
    whole, folder = _benchmark(config)
    asked = _cut(config, whole)
    if config.answers is not None:
        given = _from_file(config.answers, whole)
        said = {"base": dict(given)}
        report = _report(config, asked, {"base": given}, said, {})
        if config.output_dir is not None:
            _check_free(config)
            _write(config, asked, report, said)
        return report
    if asked.descriptions and config.extractor == "official":
        _extractor(config, asked)  # fails now rather than after an hour of asking
    return _interview(config, whole, asked, folder)


def _benchmark(config: EvalAmberConfig) -> tuple[qs.Benchmark, Path | None]:
    """All of the data, and the folder of its pictures (None: drawn from the embedded set)."""
    if config.data is None:
        from vlmdpo.tiny import evaluation

        shipped = qs.load(evaluation.FOLDER, None)
        return dataclasses.replace(shipped, name="scenes", picture=evaluation.picture), None
    generative = config.task != "discriminative"
    whole = qs.load(config.data, config.images, generative=generative)
    if config.task == "generative" and not whole.descriptions:
        raise DataError(
            f"'{config.data}' holds no query/query_generative.json; give --task discriminative"
        )
    return whole, config.images or config.data / "image"


def _cut(config: EvalAmberConfig, whole: qs.Benchmark) -> qs.Benchmark:
    """What of the data is asked: its task, dimensions, and first so many."""
    covered = {dimension for name in config.dimension for dimension in COVERS[name.capitalize()]}
    questions = tuple(q for q in whole.questions if not covered or q.dimension in covered)[
        : config.limit
    ]
    descriptions = whole.descriptions[: config.limit]
    if config.task == "generative":
        questions = ()
    if config.task == "discriminative" or config.dimension:
        descriptions = ()
    is_amber = whole.is_amber and len(questions) == len(whole.questions)
    return dataclasses.replace(
        whole, questions=questions, descriptions=descriptions, is_amber=is_amber
    )


def _extractor(config: EvalAmberConfig, benchmark: qs.Benchmark) -> nouns.Extractor:
    assert benchmark.vocabulary is not None
    return nouns.make(config.extractor, benchmark.vocabulary.words)


def _from_file(path: Path, whole: qs.Benchmark) -> list[tuple[int, str]]:
    known = {one.id for one in whole.asked} | whole.other_ids
    responses = qs.read_responses(path)
    for number, _ in responses:
        if number not in known:
            raise DataError(
                f"'{path}': id {number} is no question of {whole.name}; is --data the right folder?"
            )
    return responses


def _interview(
    config: EvalAmberConfig, whole: qs.Benchmark, asked: qs.Benchmark, folder: Path | None
) -> dict[str, Any]:
    """Ask the model all that is not answered yet; every process returns the whole report, and the
    first writes it.
    """
    whose = config.adapter.resolve().name if config.adapter else short_name(config.model)
    config = dataclasses.replace(
        config, output_dir=config.output_dir or Path("outputs") / "amber" / f"{whole.name}-{whose}"
    )
    from vlmdpo.distributed.processes import join_process_group

    processes = join_process_group(config.device)
    if processes.index:
        ui.mute()
    missing = _missing(config, asked, folder)
    config = dataclasses.replace(config, device=processes.device)
    if processes.index == 0:
        _check_free(config)
        kept.check(_folder(config), _plain_identity(config, whole))
    processes.barrier()
    answers, facts = _ask_all(config, whole, asked, missing, processes)
    questions = {question.id for question in whole.questions}
    responses = {
        who: {
            n: (verdict(text) or text) if n in questions and not config.strict else text
            for n, text in said.items()
        }
        for who, said in answers.said.items()
    }
    mine: dict[str, Responses] = {who: sorted(responses[who].items()) for who in facts.pop("whos")}
    report = _report(config, asked, mine, answers.said, facts)
    processes.barrier()
    if processes.index == 0:
        answers.join(sorted({n for by_id in responses.values() for n in by_id}), responses)
        _write(config, asked, report, answers.said)
        _tell_adapter(config, report)
    processes.barrier()
    processes.destroy()
    return report


def _missing(config: EvalAmberConfig, asked: qs.Benchmark, folder: Path | None) -> list[str]:
    """Pictures that are not there, said before any model is loaded. Raises DataError for none, or
    with --strict any.
    """
    missing = qs.missing_pictures(asked, folder) if folder is not None else []
    if not missing:
        return []
    more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
    which = f"{len(missing):,} of {len(asked.pictures):,} pictures are missing: {', '.join(missing[:_NAMED])}{more}"
    if config.strict:
        raise DataError(f"'{folder}': {which}; --strict wants them all")
    ui.warn(f"'{folder}': {which}; what is asked of them stays unanswered")
    return missing


def _folder(config: EvalAmberConfig) -> Path:
    assert config.output_dir is not None
    return config.output_dir


def _check_free(config: EvalAmberConfig) -> None:
    if config.overwrite:
        kept.clear(_folder(config))
    else:
        kept.check(_folder(config))


def _plain_identity(config: EvalAmberConfig, whole: qs.Benchmark) -> dict[str, Any]:
    """What answers depend on, as far as it is known before the model is loaded."""
    return {
        "data": whole.name,
        "data_digest": whole.digest,
        "model": config.model,
        "revision": config.revision,
        "engine": "vllm" if config.engine == "vllm" else "transformers",
        "strict": config.strict,
        "image_splitting": config.image_splitting,
        "max_new_tokens": config.max_new_tokens,
        "max_description_tokens": config.max_description_tokens,
    }


def _ask_all(
    config: EvalAmberConfig,
    whole: qs.Benchmark,
    asked: qs.Benchmark,
    missing: list[str],
    processes: Any,
) -> tuple[kept.Answers, dict[str, Any]]:
    """What base and tuned model said, in their own words, and how it was found out."""
    from vlmdpo.benchmarks.amber.ask import Interview, Outcome

    model, processor, identity = _loaded(config, whole)
    whos = [
        who
        for who, wanted in (("base", config.base), ("tuned", config.adapter is not None))
        if wanted
    ]
    if processes.index == 0:
        answers = kept.Answers(_folder(config), identity)
    processes.barrier()
    if processes.index > 0:
        answers = kept.Answers(_folder(config), identity, processes.index)
    processes.barrier()  # no process writes before all have read
    start = Outcome(config.engine, bad_pictures=dict.fromkeys(missing, "missing"))
    interview = Interview(
        config, asked, model, processor, whos, answers, (processes.index, processes.count), start
    )
    try:
        outcomes = processes.gather(interview.run())
    finally:
        answers.close()
    processes.barrier()
    answers.read()
    reason = next((outcome.reason for outcome in outcomes if outcome.reason), "")
    bad = {name: why for outcome in outcomes for name, why in outcome.bad_pictures.items()}
    engine = "plain" if any(outcome.engine == "plain" for outcome in outcomes) else config.engine
    for who in whos:
        answers.of(who)  # there, even where nothing was answered
    facts = {
        "engine": engine,
        "fallback_reason": reason or None,
        "bad_pictures": bad,
        "identity": identity,
        "whos": whos,
    }
    return answers, facts


def _loaded(config: EvalAmberConfig, whole: qs.Benchmark) -> tuple[Any, Any, dict[str, Any]]:
    """Model (None for vLLM, which loads its own), processor, and all that the answers depend on."""
    from vlmdpo.models import digest, load

    origin: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.adapter is not None:
        load.check_adapter(config.adapter)
    processor = load.load_processor(config.model, image_splitting=config.image_splitting, **origin)
    identity = {
        **_plain_identity(config, whole),
        "processor": digest.processor_digest(processor)[:16],
    }
    trained = config.adapter / "adapter_model.safetensors" if config.adapter else None
    identity["adapter_digest"] = digest.file_digest(trained)[:16] if trained else None
    if config.engine == "vllm":
        return None, processor, {**identity, "dtype": config.dtype}
    how: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "attention": config.attn_implementation,
    }
    model = load.load_model(config.model, **how, **origin)
    identity |= {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": digest.weights_digest(model)[:16],
    }
    return (
        model if config.adapter is None else load.with_adapter(model, config.adapter),
        processor,
        identity,
    )


def _report(
    config: EvalAmberConfig,
    asked: qs.Benchmark,
    responses: dict[str, Responses],
    said: dict[str, dict[int, str]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    given = {number for by_id in responses.values() for number, _ in by_id}
    if not given.intersection(one.id for one in asked.asked):
        where = (
            f"'{config.answers}' answers" if config.answers is not None else "the model answered"
        )
        raise DataError(f"{where} none of the questions of {asked.name}")
    names = ("vlmdpo", "torch", "transformers", "peft")
    return {
        "data": asked.name,
        "is_amber": asked.is_amber,
        "model": config.model if config.answers is None else str(config.answers),
        "adapter": str(config.adapter) if config.adapter else None,
        **summarize(asked, responses, said, lambda: _extractor(config, asked)),
        "engine": None,
        "fallback_reason": None,
        "bad_pictures": {},
        **facts,
        "settings": recipes.plain(config, without=(*PER_CALL, "overwrite")),
        "bootstrap": {"draws": DRAWS, "seed": 0, "over": "pictures"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        **({"output_dir": str(config.output_dir)} if config.output_dir else {}),
    }


def _write(
    config: EvalAmberConfig,
    asked: qs.Benchmark,
    report: dict[str, Any],
    said: dict[str, dict[int, str]],
) -> None:
    """scores.json, report.md and report.html, each under a temporary name first."""
    folder = _folder(config)
    kept.make(folder)
    if config.answers is not None:
        kept.write_json(
            folder / kept.RUN, {"answers": str(config.answers), "data_digest": asked.digest}
        )
    kept.write_json(folder / SCORES, report)
    kept.write_text(folder / MARKDOWN, amber_page.markdown(report))
    kept.write_text(folder / PAGE, amber_page.page(report, asked, said))


def _tell_adapter(config: EvalAmberConfig, report: dict[str, Any]) -> None:
    """Put the scores on the card of the adapter that they are of; a folder that cannot be written
    is only warned of.
    """
    if config.adapter is None or config.limit is not None:
        return  # a part of the questions says too little for a card
    try:
        model_card.keep_amber(config.adapter, report)
    except OSError as problem:
        ui.warn(
            f"the scores are not on the adapter's card: cannot write '{config.adapter}': "
            f"{problem.strerror}"
        )


def show(report: dict[str, Any]) -> None:
    """Print the scores by dimension, base beside tuned, and what they are worth."""
    _show_questions(report)
    _show_descriptions(report)
    if report["comparison"]:
        show_comparison(report["comparison"])
    if report["is_amber"] and any("Discriminative" in table for table in report["scores"].values()):
        _show_article(report)
    if report["bad_pictures"]:
        ui.result(
            f"{len(report['bad_pictures'])} pictures could not be read; coverage "
            f"{100 * report['coverage']:.1f}%"
        )
    if "output_dir" in report:
        ui.result(f"Answers, scores and report: {report['output_dir']}/{PAGE}")


def _show_questions(report: dict[str, Any]) -> None:
    scores = {who: table for who, table in report["scores"].items() if "Discriminative" in table}
    if not scores:
        return
    head = ["", "n"] + [cell for who in scores for cell in (f"{who} acc", "prec", "recall", "F1")]
    names = [name for name in COVERS if any(name in table for table in scores.values())]
    rows = [
        [name, f"{report['questions'][name]:,}"]
        + [cell for who in scores for cell in _cells(scores[who].get(name))]
        for name in names
    ]
    note = 'Per cent; the positive class is "No".'
    ui.table(
        f"{report['data']}, discriminative ({report['model']})", head, rows, strong=[0], note=note
    )
    for who in scores:
        _show_facts(
            who,
            report["models"][who],
            sum(report["questions"][name] for name in COVERS if name == "Discriminative"),
        )
    always = report["always_no"]["Discriminative"]
    ui.result(f"for comparison, always No: accuracy {always['accuracy']}, F1 {always['f1']}")


def _show_facts(who: str, facts: dict[str, Any], asked: int) -> None:
    unread = ""
    if facts["unparsed"]:
        unread = (
            f"; {facts['unparsed']} answers are neither Yes nor No and count as wrong, such as "
            + ", ".join(repr(example["said"][:40]) for example in facts["unparsed_examples"][:2])
        )
    ui.result(
        f"{who}: said No to {100 * facts['said_no']:.1f}% of the questions, "
        f"answered {100 * facts['answered'] / asked:.1f}% of them{unread}"
    )
    if facts["unparsed_but_begin_so"]:
        ui.result(
            f"{facts['unparsed_but_begin_so']} of these begin with Yes or No; AMBER's own scorer "
            "counts only the exact words"
        )


def _cells(figures: dict[str, float] | None) -> list[str]:
    return [
        f"{figures[name]:.1f}" if figures else "-"
        for name in ("accuracy", "precision", "recall", "f1")
    ]


def _show_descriptions(report: dict[str, Any]) -> None:
    described = {
        who: table["Generative"] for who, table in report["scores"].items() if "Generative" in table
    }
    if not described:
        return
    extractor = next(iter(described.values()))["extractor"]
    compared = report.get("generative_comparison", {}).get("figures", {})
    rows = []
    for name, label in (
        ("chair", "CHAIR ↓"),
        ("cover", "Cover ↑"),
        ("hal", "Hal ↓"),
        ("cog", "Cog ↓"),
    ):
        row = [label]
        for who, figures in described.items():
            row += [f"{figures[name]:.1f}", span(report["intervals"][who]["Generative"][name])]
        if name in compared:
            row += [
                f"{compared[name]['delta']:+.1f}",
                span(compared[name]["ci95"], sign=True),
                compared[name]["verdict"],
            ]
        rows.append(row)
    head = (
        [""]
        + [cell for who in described for cell in (who, "95%")]
        + (["change", "95%", ""] if compared else [])
    )
    note = f"Per cent, of {report['descriptions']:,} descriptions; nouns found by the {extractor} extractor."
    if extractor == "lexicon":
        note += " Not comparable with published figures: those need --extractor official."
    title = f"{report['data']}, generative, {extractor} extractor ({report['model']})"
    ui.table(title, head, rows, note=note, text=(0, len(head) - 1) if compared else (0,))


def show_comparison(found: dict[str, Any]) -> None:
    """Print the difference with its interval, and whether it may be called one."""
    low, high = found["ci95"]
    sure = {
        "no difference shown": "the interval holds zero: no difference shown",
        "improvement": "the interval is clear of zero: an improvement",
        "decline": "the interval is clear of zero: a decline",
    }[found["verdict"]]
    ui.result(
        f"tuned − base: {found['delta_accuracy']:+.1f} points of accuracy, 95% interval "
        f"{low:+.1f} to {high:+.1f} ({sure}); "
        f"exact McNemar p = {found['mcnemar_p']:.2g} ({found['fixed']} answers fixed, "
        f"{found['broken']} broken)"
    )
    each = ", ".join(
        f"{name} {d['fixed']}/{d['broken']}" for name, d in found["dimensions"].items()
    )
    ui.result(f"fixed/broken by dimension: {each}")


def show_flips(found: dict[str, Any], count: int) -> None:
    """Print answers that changed, good and bad as they come: every so many-th, so that all parts of
    the list show.
    """
    flips = found["flips"]
    rows = [
        [f["question"], f["image"], f["truth"], f["base"], f["tuned"]] for f in evenly(flips, count)
    ]
    title = f"{len(rows)} of {len(flips)} answers that changed, evenly spaced, for better or worse"
    ui.table(title, ["Question", "Picture", "Truth", "Base", "Tuned"], rows)


def _show_article(report: dict[str, Any]) -> None:
    lines = beside_article(report)
    strong = [number for number, line in enumerate(lines) if line[-1]]
    rows = [[name, f"{accuracy:.1f}", f"{f1:.1f}"] for name, accuracy, f1, _ in lines]
    ui.table("Beside the article's table", ["Model", "Accuracy", "F1"], rows, strong=strong)
