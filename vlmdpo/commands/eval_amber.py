"""`vlmdpo eval-amber`: both tasks of AMBER, scored as AMBER scores them, with their uncertainty."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks.amber import nouns, questions
from vlmdpo.benchmarks.amber.questions import Benchmark
from vlmdpo.benchmarks.amber.scores import COVERS
from vlmdpo.benchmarks.amber.summary import Responses, summarize
from vlmdpo.benchmarks.answers import AnswerStore
from vlmdpo.benchmarks.sampling import SEED, stratified
from vlmdpo.benchmarks.stats import DRAWS
from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.commands.eval_amber_screen import PAGE, show
from vlmdpo.config import PER_CALL, EvalAmberConfig, recipes
from vlmdpo.errors import DataError
from vlmdpo.models.configured import configured_model, configured_processor
from vlmdpo.models.registry import short_name
from vlmdpo.report import amber_page, model_card

if TYPE_CHECKING:
    from vlmdpo.distributed.processes import ProcessGroup

__all__ = ["run", "show"]

SCORES, MARKDOWN = "scores.json", "report.md"
_NAMED_MISSING = 10  # missing images named on the screen; scores.json has all


def run(config: EvalAmberConfig) -> dict[str, Any]:
    """Ask and score, or score a response file.

    Raises ConfigError, DataError, ModelError, MissingDependencyError.
    """
    whole, image_folder = _benchmark(config)
    asked = _select(config, whole)
    if config.answers is not None:
        return _score_file(config, config.answers, whole, asked)
    if asked.descriptions and config.extractor == "official":
        _extractor(config, asked)  # fails now rather than after an hour of asking
    return _ask_and_score(config, whole, asked, image_folder)


def _benchmark(config: EvalAmberConfig) -> tuple[Benchmark, Path | None]:
    """All of the data, and the folder of its images (None for the embedded set, which is drawn)."""
    if config.data is None:
        from vlmdpo.tiny import evaluation

        embedded = questions.load(evaluation.FOLDER, None)
        return dataclasses.replace(embedded, name="scenes", open_image=evaluation.draw_image), None
    generative = config.task != "discriminative"
    whole = questions.load(config.data, config.images, generative=generative)
    if config.task == "generative" and not whole.descriptions:
        raise DataError(
            f"'{config.data}' has no query/query_generative.json; use --task discriminative"
        )
    return whole, config.images or config.data / "image"


def _select(config: EvalAmberConfig, whole: Benchmark) -> Benchmark:
    """The part that is asked, by `--task`, `--dimension` and `--limit`."""
    dimensions = {d for name in config.dimension for d in COVERS[name.capitalize()]}
    wanted = [q for q in whole.questions if not dimensions or q.dimension in dimensions]
    selected = tuple(stratified(wanted, config.limit, lambda q: (q.dimension, q.truth)))
    descriptions = tuple(stratified(whole.descriptions, config.limit, lambda _: None))
    if config.task == "generative":
        selected = ()
    if config.task == "discriminative" or config.dimension:
        descriptions = ()
    is_amber = whole.is_amber and len(selected) == len(whole.questions)
    return dataclasses.replace(
        whole, questions=selected, descriptions=descriptions, is_amber=is_amber
    )


def _extractor(config: EvalAmberConfig, benchmark: Benchmark) -> nouns.Extractor:
    assert benchmark.vocabulary is not None
    return nouns.make(config.extractor, benchmark.vocabulary.words)


def _score_file(
    config: EvalAmberConfig, path: Path, whole: Benchmark, asked: Benchmark
) -> dict[str, Any]:
    """Score `--answers` as it stands."""
    responses = questions.read_responses(path)
    identity = {"answers": str(path), "data_digest": asked.digest}
    if config.output_dir is not None:
        _check_output(config)
        answer_files.check(config.output_dir, identity)
    known = {one.id for one in whole.asked} | whole.other_ids
    for number, _ in responses:
        if number not in known:
            raise DataError(
                f"'{path}': there is no question {number} in {whole.name}; is --data the right "
                "folder?"
            )
    answers = {"base": dict(responses)}
    report = _report(config, whole, asked, {"base": responses}, answers, {})
    if config.output_dir is not None:
        answer_files.create(config.output_dir)
        answer_files.write_json(config.output_dir / answer_files.RUN, identity)
        _write(config, asked, report, answers)
    return report


def _ask_and_score(
    config: EvalAmberConfig, whole: Benchmark, asked: Benchmark, image_folder: Path | None
) -> dict[str, Any]:
    """Ask what is unanswered. Every process returns the whole report; the first writes it."""
    from vlmdpo.distributed.processes import join_process_group

    model_name = config.adapter.resolve().name if config.adapter else short_name(config.model)
    default_folder = Path("outputs") / "amber" / f"{whole.name}-{model_name}"
    processes = join_process_group(config.device)
    if processes.index:
        ui.mute()
    config = dataclasses.replace(
        config, output_dir=config.output_dir or default_folder, device=processes.device
    )
    missing = _missing_images(config, asked, image_folder)
    if processes.index == 0:
        _check_output(config)
        answer_files.check(_output_folder(config), _identity_before_loading(config, whole))
    processes.barrier()
    store, facts, roles = _ask(config, whole, asked, missing, processes)
    responses = _as_responses(config, whole, store)
    scored: dict[str, Responses] = {role: sorted(responses[role].items()) for role in roles}
    report = _report(config, whole, asked, scored, store.by_role, facts)
    processes.barrier()
    if processes.index == 0:
        store.join(sorted({n for by_id in responses.values() for n in by_id}), responses)
        _write(config, asked, report, store.by_role)
        _update_model_card(config, report)
    processes.barrier()
    processes.destroy()
    return report


def _as_responses(
    config: EvalAmberConfig, whole: Benchmark, store: AnswerStore
) -> dict[str, dict[int, str]]:
    """Answers as AMBER's scorer takes them: read as Yes or No if they can be, unless `--strict`."""
    yes_no_ids = {question.id for question in whole.questions}
    return {
        role: {
            n: (verdict(text) or text) if n in yes_no_ids and not config.strict else text
            for n, text in answers.items()
        }
        for role, answers in store.by_role.items()
    }


def _missing_images(config: EvalAmberConfig, asked: Benchmark, folder: Path | None) -> list[str]:
    """Missing images, reported before any model is loaded.

    Raises DataError if all of them are missing, or any with `--strict`.
    """
    missing = questions.missing_images(asked, folder) if folder is not None else []
    if not missing:
        return []
    named = ", ".join(missing[:_NAMED_MISSING])
    more = f" and {len(missing) - _NAMED_MISSING:,} more" if len(missing) > _NAMED_MISSING else ""
    which = f"{len(missing):,} of {len(asked.image_names):,} images are missing: {named}{more}"
    if config.strict:
        raise DataError(f"'{folder}': {which}; --strict requires all of them")
    ui.warn(f"'{folder}': {which}; questions about them stay unanswered")
    return missing


def _output_folder(config: EvalAmberConfig) -> Path:
    assert config.output_dir is not None
    return config.output_dir


def _check_output(config: EvalAmberConfig) -> None:
    """Empty the output folder with `--overwrite`; else raise DataError if it cannot be used."""
    if config.overwrite:
        answer_files.clear(_output_folder(config))
    else:
        answer_files.check(_output_folder(config))


def _identity_before_loading(config: EvalAmberConfig, whole: Benchmark) -> dict[str, Any]:
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


def _ask(
    config: EvalAmberConfig,
    whole: Benchmark,
    asked: Benchmark,
    missing: list[str],
    processes: ProcessGroup,
) -> tuple[AnswerStore, dict[str, Any], list[str]]:
    """(all answers, how they were obtained, the roles asked)."""
    from vlmdpo.benchmarks.amber.runner import AmberRunner, Outcome

    model, processor, identity = _load(config, whole)
    wanted = {"base": config.base, "tuned": config.adapter is not None}
    roles = [role for role, is_wanted in wanted.items() if is_wanted]
    folder = _output_folder(config)
    if processes.index == 0:  # first, since it writes the identity that the others check
        store = AnswerStore(folder, identity)
    processes.barrier()
    if processes.index > 0:
        store = AnswerStore(folder, identity, processes.index)
    processes.barrier()  # no process writes before all have read
    outcome = Outcome(config.engine, bad_pictures=dict.fromkeys(missing, "missing"))
    share = (processes.index, processes.count)
    runner = AmberRunner(config, asked, model, processor, roles, store, share, outcome)
    try:
        outcomes = processes.gather(runner.run())
    finally:
        store.close()
    processes.barrier()
    store.read()
    for role in roles:
        store.of(role)  # has an entry even if nothing was answered
    fell_back = any(outcome.engine == "plain" for outcome in outcomes)
    facts = {
        "engine": "plain" if fell_back else config.engine,
        "fallback_reason": next((o.reason for o in outcomes if o.reason), None),
        "bad_pictures": {name: why for o in outcomes for name, why in o.bad_pictures.items()},
        "bad_questions": {n: why for o in outcomes for n, why in o.bad_questions.items()},
        "identity": identity,
    }
    return store, facts, roles


def _load(config: EvalAmberConfig, whole: Benchmark) -> tuple[Any, Any, dict[str, Any]]:
    """(model, processor, identity of the run); vLLM loads its own model, so it is None there."""
    from vlmdpo.models import digest, load
    from vlmdpo.models.adapter_files import check_adapter
    from vlmdpo.models.rendering import rendering_of

    if config.adapter is not None:
        check_adapter(config.adapter, config.model, config.revision)
    # Yes or No is read at an answer's start, so no reasoning may come first.
    processor = configured_processor(
        config,
        adapter=config.adapter,
        date=answer_files.prompt_date(_output_folder(config)),
        close_thinking=True,
    )
    trained = config.adapter / "adapter_model.safetensors" if config.adapter else None
    identity = {
        **_identity_before_loading(config, whole),
        "processor": digest.processor_digest(processor)[:16],
        "prompt_date": rendering_of(processor).settings.date,
        "adapter_digest": digest.file_digest(trained)[:16] if trained else None,
    }
    if config.engine == "vllm":
        return None, processor, {**identity, "dtype": config.dtype}
    model = configured_model(config)
    identity |= {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": digest.weights_digest(model)[:16],
    }
    if config.adapter is not None:
        model = load.load_adapter(model, config.adapter)
    return model, processor, identity


def _report(
    config: EvalAmberConfig,
    whole: Benchmark,
    asked: Benchmark,
    responses: dict[str, Responses],
    answers: dict[str, dict[int, str]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    answered = {number for by_id in responses.values() for number, _ in by_id}
    if not answered.intersection(one.id for one in asked.asked):
        who = f"'{config.answers}' answers" if config.answers is not None else "the model answered"
        raise DataError(f"{who} none of the questions of {asked.name}")
    names = ("vlmdpo", "torch", "transformers", "peft")
    return {
        "data": asked.name,
        "is_amber": asked.is_amber,
        "part": _part(config, whole, asked),
        "model": config.model if config.answers is None else str(config.answers),
        "adapter": str(config.adapter) if config.adapter else None,
        **summarize(asked, responses, answers, lambda: _extractor(config, asked)),
        "engine": None,
        "fallback_reason": None,
        "bad_pictures": {},
        "bad_questions": {},
        **facts,
        "settings": recipes.plain(config, without=(*PER_CALL, "overwrite")),
        "bootstrap": {"draws": DRAWS, "seed": 0, "over": "pictures"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        **({"output_dir": str(config.output_dir)} if config.output_dir else {}),
    }


def _part(config: EvalAmberConfig, whole: Benchmark, asked: Benchmark) -> dict[str, int] | None:
    """How much of the data `--limit` left, or None if it left all."""
    everything = _select(dataclasses.replace(config, limit=None), whole)
    if len(asked.asked) == len(everything.asked):
        return None
    return {
        "questions": len(asked.questions),
        "of_questions": len(everything.questions),
        "descriptions": len(asked.descriptions),
        "of_descriptions": len(everything.descriptions),
        "seed": SEED,
    }


def _write(
    config: EvalAmberConfig,
    asked: Benchmark,
    report: dict[str, Any],
    answers: dict[str, dict[int, str]],
) -> None:
    """scores.json, report.md and report.html."""
    folder = _output_folder(config)
    answer_files.write_json(folder / SCORES, report)
    answer_files.write_text(folder / MARKDOWN, amber_page.markdown(report))
    answer_files.write_text(folder / PAGE, amber_page.page(report, asked, answers))


def _update_model_card(config: EvalAmberConfig, report: dict[str, Any]) -> None:
    """Put the scores on the adapter's card. A folder that cannot be written gets a warning."""
    if config.adapter is None or config.limit is not None:
        return  # a part of the questions says too little for a card
    try:
        model_card.keep_amber(config.adapter, report)
    except OSError as problem:
        ui.warn(
            f"the scores are not on the adapter's card: cannot write '{config.adapter}': "
            f"{problem.strerror}"
        )
