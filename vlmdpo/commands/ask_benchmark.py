"""What every evaluation does: ask a model and its adapter, keep the answers, share the work.

The command that evaluates says what is asked, and makes a report of the answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks.answers import AnswerStore
from vlmdpo.benchmarks.base import Benchmark, Id, Responses, everything_asked, image_names
from vlmdpo.config import EvalAmberConfig, EvalConfig
from vlmdpo.data.folder_lock import locked
from vlmdpo.errors import DataError
from vlmdpo.models.configured import configured_model, configured_processor
from vlmdpo.models.registry import short_name

if TYPE_CHECKING:
    from vlmdpo.distributed.processes import ProcessGroup

_NAMED_MISSING = 10  # missing images named on the screen; the report has all

Config = TypeVar("Config", bound=EvalAmberConfig)


@dataclass(frozen=True)
class Answers:
    """What was answered.

    Attributes:
        responses: by role ("base", "tuned"), (id, response) as the benchmark's scorer takes them.
        in_own_words: by role and id, what the model said.
        facts: how the answers were obtained, for the report; empty for a response file.
    """

    responses: Mapping[str, Responses]
    in_own_words: Mapping[str, Mapping[Id, str]]
    facts: Mapping[str, Any]


def asked_model(config: EvalAmberConfig) -> str:
    """The name of what is evaluated, for folders: the adapter's, or the model's."""
    return config.adapter.resolve().name if config.adapter else short_name(config.model)


def ask_and_report(
    config: Config,
    whole: Benchmark,
    asked: Benchmark,
    report_on: Callable[[Config, Answers], dict[str, Any]],
    write: Callable[[Config, dict[str, Any], Answers], None],
) -> dict[str, Any]:
    """Ask what is unanswered. Every process returns the whole report; the first writes it.

    Args:
        config: with the output folder.
        whole: the benchmark; `asked` may be a part of its questions.
        report_on, write: called with the config of this process.

    Raises DataError, ModelError.
    """
    from vlmdpo.distributed.processes import join_process_group

    processes = join_process_group(config.device)
    if processes.index:
        ui.mute()
    config = dataclasses.replace(config, device=processes.device)
    with contextlib.ExitStack() as stack:
        if processes.index == 0:
            stack.enter_context(locked(output_folder(config), "evaluating into"))
        return _ask_and_report(config, whole, asked, report_on, write, processes)


def _ask_and_report(
    config: Config,
    whole: Benchmark,
    asked: Benchmark,
    report_on: Callable[[Config, Answers], dict[str, Any]],
    write: Callable[[Config, dict[str, Any], Answers], None],
    processes: ProcessGroup,
) -> dict[str, Any]:
    """See `ask_and_report`."""
    missing = _missing_images(config, asked)
    if processes.index == 0:
        check_output(config)
        answer_files.check(output_folder(config), _identity_before_loading(config, whole))
    processes.barrier()
    store, facts, roles = _ask(config, whole, asked, missing, processes)
    responses = _as_responses(whole, store)
    order = _order_of(whole)
    answers = Answers(
        {role: sorted(responses[role].items(), key=lambda one: order(one[0])) for role in roles},
        store.by_role,
        facts,
    )
    report = report_on(config, answers)
    processes.barrier()
    if processes.index == 0:
        store.join(sorted({n for by_id in responses.values() for n in by_id}, key=order), responses)
        write(config, report, answers)
    processes.barrier()
    processes.destroy()
    return report


def _order_of(whole: Benchmark) -> Callable[[Id], Any]:
    """The key that sorts ids: numbers by themselves, texts in the order of the questions."""
    order = {one.id: i for i, one in enumerate(everything_asked(whole))}
    by_number = all(isinstance(number, int) for number in order)
    return lambda number: number if by_number else order.get(number, len(order))


def _as_responses(whole: Benchmark, store: AnswerStore) -> dict[str, dict[Id, str]]:
    """Answers as the benchmark's scorer takes them."""
    asked = {one.id: one for one in everything_asked(whole)}
    return {
        role: {
            number: whole.read(asked[number], text) if number in asked else text
            for number, text in answers.items()
        }
        for role, answers in store.by_role.items()
    }


def _missing_images(config: EvalAmberConfig, asked: Benchmark) -> list[str]:
    """Missing images, reported before any model is loaded.

    Raises DataError if all of them are missing, or any with `--strict`.
    """
    missing = asked.images.missing(image_names(asked))
    if not missing:
        return []
    named = ", ".join(missing[:_NAMED_MISSING])
    more = f" and {len(missing) - _NAMED_MISSING:,} more" if len(missing) > _NAMED_MISSING else ""
    which = f"{len(missing):,} of {len(image_names(asked)):,} images are missing: {named}{more}"
    if config.strict:
        raise DataError(f"{asked.images}: {which}; --strict requires all of them")
    ui.warn(f"{asked.images}: {which}; questions about them stay unanswered")
    return missing


def output_folder(config: EvalAmberConfig) -> Path:
    """The folder of answers, which every evaluation of a model has."""
    assert config.output_dir is not None
    return config.output_dir


def check_output(config: EvalAmberConfig) -> None:
    """Empty the output folder with `--overwrite`; else raise DataError if it cannot be used."""
    if config.overwrite:
        answer_files.clear(output_folder(config))
    else:
        answer_files.check(output_folder(config))


def _identity_before_loading(config: EvalAmberConfig, whole: Benchmark) -> dict[str, Any]:
    """What answers depend on, as far as it is known before the model is loaded."""
    return {
        "data": whole.title,
        "data_digest": whole.digest,
        "model": config.model,
        "revision": config.revision,
        "engine": "vllm" if config.engine == "vllm" else "transformers",
        "strict": config.strict,
        "image_splitting": config.image_splitting,
        "max_new_tokens": config.max_new_tokens,
        "max_description_tokens": config.max_description_tokens,
        # A file of one's own is known by its content: its path may be spelled otherwise.
        **(
            {"benchmark": config.kind, "suffix": config.suffix, "prompt": config.prompt}
            if isinstance(config, EvalConfig)
            else {}
        ),
    }


def _ask(
    config: EvalAmberConfig,
    whole: Benchmark,
    asked: Benchmark,
    missing: list[str],
    processes: ProcessGroup,
) -> tuple[AnswerStore, dict[str, Any], list[str]]:
    """(all answers, how they were obtained, the roles asked)."""
    from vlmdpo.benchmarks.ask import Asking, Outcome

    model, processor, identity = _load(config, whole)
    wanted = {"base": config.base, "tuned": config.adapter is not None}
    roles = [role for role, is_wanted in wanted.items() if is_wanted]
    folder = output_folder(config)
    if processes.index == 0:  # first, since it writes the identity that the others check
        store = AnswerStore(folder, identity)
    processes.barrier()
    if processes.index > 0:
        store = AnswerStore(folder, identity, processes.index)
    processes.barrier()  # no process writes before all have read
    outcome = Outcome(config.engine, bad_pictures=dict.fromkeys(missing, "missing"))
    share = (processes.index, processes.count)
    asking = Asking(config, asked, model, processor, roles, store, share, outcome)
    try:
        outcomes = processes.gather(asking.run())
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
        date=answer_files.prompt_date(output_folder(config)),
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
