"""`vlmdpo infer --input`: a file of questions in, a file of answers out.

Answers are written as they come, and a stopped run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo import ui
from vlmdpo.commands import infer_engines
from vlmdpo.config import InferConfig
from vlmdpo.data import growing_jsonl
from vlmdpo.data.left_out import LeftOut
from vlmdpo.data.questions import Question, nothing_to_ask, read
from vlmdpo.data.reasons import BadImage, BadRow
from vlmdpo.errors import DataError

_PROMPT_OPTIONS = ("system", "chat_template_kwargs")
_SAMPLING_OPTIONS = ("temperature", "top_p", "num_return_sequences", "seed")
_Opened = tuple[Question, Image.Image]


def record(
    config: InferConfig, number: str | int, image: str, question: str, answers: Sequence[str]
) -> dict[str, Any]:
    """The answers to a question as a line of `--output`."""
    return {
        "id": number,
        "image": image,
        "question": question,
        "answer": answers[0],
        **({"answers": list(answers)} if len(answers) > 1 else {}),
        **_asked_how(config),
    }


def _asked_how(config: InferConfig) -> dict[str, Any]:
    """Which model answers, what its prompts hold besides the question, and how answers are drawn,
    where that was given.
    """
    options = [*_PROMPT_OPTIONS, *(_SAMPLING_OPTIONS if config.temperature else ())]
    given = {name: getattr(config, name) for name in options}
    return {
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
        **{name: value for name, value in given.items() if value is not None},
        **({"engine": config.engine} if config.engine != "plain" else {}),
    }


def answer_file(config: InferConfig) -> dict[str, Any]:
    """Answer a file of questions. Of several processes each takes every n-th batch, the same
    batches that one process would make, and writes a file of its own.
    """
    from vlmdpo.distributed.processes import join_process_group

    assert config.input is not None
    assert config.output is not None
    processes = join_process_group(config.device)
    if processes.index:
        ui.mute()
    source, output = config.input, config.output
    root = config.image_root or source.parent
    config = dataclasses.replace(config, device=processes.device, num_processes=1)
    questions, left_out = read(source, root, "--input")
    if processes.index == 0:
        _collect_parts(output)
        _answered_ids(config)  # also removes a line cut short, before the others read
    processes.barrier()
    answered = _answered_ids(config)
    unanswered = [question for question in questions if question.id not in answered]
    size = config.batch_size
    batches = [unanswered[start : start + size] for start in range(0, len(unanswered), size)]
    own_batches = batches[processes.index :: processes.count]
    processes.barrier()  # no process writes before all have read
    own_refused = LeftOut()
    if own_batches:
        path = output if processes.count == 1 else growing_jsonl.part(output, processes.index)
        _answer_batches(config, infer_engines.load(config), own_batches, path, own_refused)
    refused = LeftOut.joined(processes.gather(own_refused))
    left_out = LeftOut.joined([left_out, refused])
    if processes.index == 0:
        _collect_parts(output)
        growing_jsonl.sort(output, [question.id for question in questions])
    processes.barrier()
    processes.destroy()
    if len(refused) == len(questions):
        raise nothing_to_ask(source, root, left_out, "--input")
    return {
        "output": str(config.output),
        "questions": len(questions),
        "answered_now": len(unanswered) - len(refused),
        "answered_before": len(questions) - len(unanswered),
        "left_out": left_out.report(),
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
    }


def _collect_parts(output: Path) -> None:
    """Join what several processes wrote. Raises DataError."""
    try:
        growing_jsonl.collect(output)
    except OSError as problem:
        raise DataError(f"--output: cannot write '{output}': {problem.strerror}") from problem


def _answer_batches(
    config: InferConfig,
    engine: infer_engines.Engine,
    batches: list[list[Question]],
    path: Path,
    refused: LeftOut,
) -> None:
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What UTF-8 cannot hold is written as JSON writes it: \udc80.
            file = stack.enter_context(path.open("a", encoding="utf-8", errors="backslashreplace"))
        except OSError as problem:
            raise DataError(
                f"--output: cannot write '{config.output}': {problem.strerror}"
            ) from problem
        bar = stack.enter_context(ui.progress("answer", sum(map(len, batches))))
        for batch in batches:
            asked, inputs = _inputs(engine, batch, refused)
            if asked:
                answers = engine.answers(inputs, [question.id for question in asked])
                for question, texts in zip(asked, answers, strict=True):
                    line = record(config, question.id, question.image, question.text, texts)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()  # so that a kill loses at most one batch
            bar.advance(len(batch))


def _inputs(
    engine: infer_engines.Engine, batch: list[Question], refused: LeftOut
) -> tuple[list[Question], Any]:
    """The questions of a batch that can be asked, and the engine's inputs for them."""
    opened: list[_Opened] = []
    for question in batch:
        try:
            opened.append((question, question.open_image()))
        except BadImage as problem:
            refused.add(question.row, problem)
    try:
        return _of_opened(engine, opened)
    except BadRow:  # at least one of them; which, each tells alone
        return _of_opened(engine, [one for one in opened if _is_askable(engine, one, refused)])


def _of_opened(engine: infer_engines.Engine, opened: list[_Opened]) -> tuple[list[Question], Any]:
    questions = [question for question, _ in opened]
    if not questions:
        return [], None
    return questions, engine.inputs([image for _, image in opened], [q.text for q in questions])


def _is_askable(engine: infer_engines.Engine, one: _Opened, refused: LeftOut) -> bool:
    question, image = one
    try:
        engine.inputs([image], [question.text])
    except BadRow as problem:
        refused.add(question.row, problem)
        return False
    return True


def _answered_ids(config: InferConfig) -> set[str | int]:
    """Ids that an earlier run answered in `--output`. A line cut short by a kill is removed.

    Raises DataError for a file of other content, or with answers of another model or adapter.
    """
    assert config.output is not None
    if not config.output.exists():
        return set()
    try:
        text = config.output.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(f"--output: cannot read '{config.output}': {reason}") from problem
    complete = text[: text.rfind("\n") + 1]
    ids = set()
    asked_how = _asked_how(config)
    for number, line in enumerate(complete.split("\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            ids.add(entry["id"])
            there = {name: entry[name] for name in ("model", "adapter")} | {
                name: entry[name]
                for name in (*_PROMPT_OPTIONS, *_SAMPLING_OPTIONS, "engine")
                if name in entry
            }
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"--output: '{config.output}' line {number} was not written by vlmdpo infer; "
                "choose another file"
            ) from problem
        if there != asked_how:
            others = ", ".join(f"{name} {value}" for name, value in there.items())
            raise DataError(
                f"--output: '{config.output}' holds answers with {others}; choose another file"
            )
    if complete != text:
        config.output.write_text(complete, encoding="utf-8")
    return ids
