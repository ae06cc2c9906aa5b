"""`vlmdpo infer`: ask a model, or base and tuned side by side, or a whole file of questions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo import ui
from vlmdpo.config import InferConfig
from vlmdpo.data.images import BadImage, inside, open_file
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.models.configured import configured_model, configured_processor

_DEFAULT_QUESTION = "Describe this image."
_PROMPT_OPTIONS = ("system", "chat_template_kwargs")
_NAMED_MISSING = 5  # missing images named in the error


@dataclass(frozen=True)
class _Question:
    """One line of a question file."""

    id: str | int
    image: str
    text: str
    path: Path


def run(config: InferConfig) -> dict[str, Any]:
    """Answer one question, or a file of them. Raises ConfigError, DataError, ModelError."""
    return _answer_one(config) if config.input is None else _answer_file(config)


def _record(
    config: InferConfig, number: str | int, image: str, question: str, answer: str
) -> dict[str, Any]:
    """An answer as a line of `--output`."""
    return {
        "id": number,
        "image": image,
        "question": question,
        "answer": answer,
        **_asked_how(config),
    }


def _asked_how(config: InferConfig) -> dict[str, Any]:
    """Which model answers, and what its prompts hold besides the question where that was given."""
    given = {name: getattr(config, name) for name in _PROMPT_OPTIONS}
    return {
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
        **{name: value for name, value in given.items() if value is not None},
    }


def _answer_one(config: InferConfig) -> dict[str, Any]:
    name, image = _image(config)
    question = config.question or _DEFAULT_QUESTION
    model = configured_model(config, adapter=config.adapter)
    processor = configured_processor(config, adapter=config.adapter)
    from vlmdpo.engine.generate import answer

    tokens = config.max_new_tokens
    tuned = answer(model, processor, [image], [question], tokens)[0]
    report = _record(config, 0, name, question, tuned)
    if config.compare:
        with model.disable_adapter():
            report["base_answer"] = answer(model, processor, [image], [question], tokens)[0]
    return report


def _image(config: InferConfig) -> tuple[str, Image.Image]:
    """(name, image) of `--image`, or of a scene of the embedded set."""
    if config.image is not None:
        try:
            return str(config.image), open_file(config.image)
        except BadImage as problem:
            raise DataError(f"--image: '{config.image}': {problem}") from problem
    if config.model != "tiny":
        raise ConfigError("--image FILE is needed: only the embedded model has an image of its own")
    from vlmdpo.tiny import evaluation

    name = evaluation.first_image_name()
    ui.say(f"no --image: asking about {name} of the embedded set")
    return name, evaluation.draw_image(name)


def _answer_file(config: InferConfig) -> dict[str, Any]:
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
    config = dataclasses.replace(config, device=processes.device, num_processes=1)
    questions = _read_questions(source, config.image_root or source.parent)
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
    if own_batches:
        model = configured_model(config, adapter=config.adapter)
        processor = configured_processor(config, adapter=config.adapter)
        path = output if processes.count == 1 else _part(output, processes.index)
        _answer_batches(config, model, processor, own_batches, path)
    processes.barrier()
    if processes.index == 0:
        _collect_parts(output)
        _sort_answers(output, questions)
    processes.barrier()
    processes.destroy()
    return {
        "output": str(config.output),
        "questions": len(questions),
        "answered_now": len(unanswered),
        "answered_before": len(questions) - len(unanswered),
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
    }


def _part(output: Path, process: int) -> Path:
    """Where one of several processes writes its answers until all are done."""
    return output.with_name(f".{output.name}.part-{process}")


def _collect_parts(output: Path) -> None:
    """Append the complete lines of all processes' files to `output`, and remove those files."""
    try:
        for part in sorted(output.parent.glob(f".{output.name}.part-*")):
            text = part.read_text(encoding="utf-8")
            with output.open("a", encoding="utf-8") as file:
                file.write(text[: text.rfind("\n") + 1])
            part.unlink()
    except OSError as problem:
        raise DataError(f"--output: cannot write '{output}': {problem.strerror}") from problem


def _sort_answers(output: Path, questions: list[_Question]) -> None:
    """Put the answers into the order of the questions, as one process would have written them."""
    if not output.exists():
        return
    text = output.read_text(encoding="utf-8")
    by_id = {json.loads(line)["id"]: line for line in text.split("\n")[:-1]}
    in_order = [by_id.pop(question.id) for question in questions if question.id in by_id]
    ordered = "".join(line + "\n" for line in [*by_id.values(), *in_order])
    if ordered != text:
        part = output.with_name(f".{output.name}.partial")
        part.write_text(ordered, encoding="utf-8")
        part.replace(output)


def _answer_batches(
    config: InferConfig, model: Any, processor: Any, batches: list[list[_Question]], path: Path
) -> None:
    from vlmdpo.engine.generate import answer

    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a", encoding="utf-8"))
        except OSError as problem:
            raise DataError(
                f"--output: cannot write '{config.output}': {problem.strerror}"
            ) from problem
        bar = stack.enter_context(ui.progress("answer", sum(map(len, batches))))
        for batch in batches:
            images = [_open_image(question) for question in batch]
            texts = [question.text for question in batch]
            answers = answer(model, processor, images, texts, config.max_new_tokens)
            for question, text in zip(batch, answers, strict=True):
                record = _record(config, question.id, question.image, question.text, text)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()  # so that a kill loses at most one batch
            bar.advance(len(batch))


def _open_image(question: _Question) -> Image.Image:
    try:
        return open_file(question.path)
    except BadImage as problem:
        raise DataError(f"question {question.id!r}: '{question.path}': {problem}") from problem


def _read_questions(path: Path, root: Path) -> list[_Question]:
    """The questions of `--input`. Raises DataError, naming the line, before any model is loaded."""
    questions: list[_Question] = []
    for number, line in enumerate(_read_text(path, "--input").splitlines(), start=1):
        if line.strip():
            questions.append(_parse_question(line, f"--input: '{path}' line {number}", root))
    missing = [question.image for question in questions if not question.path.is_file()]
    if missing:
        named = ", ".join(missing[:_NAMED_MISSING])
        raise DataError(f"'{root}': {len(missing)} images are missing: {named}; see --image-root")
    if len({question.id for question in questions}) < len(questions):
        raise DataError(f"--input: '{path}' has an id twice; ids tell which answers are done")
    if not questions:
        raise DataError(f"--input: '{path}' contains no questions")
    return questions


def _parse_question(line: str, where: str, root: Path) -> _Question:
    try:
        entry = json.loads(line)
    except ValueError as problem:
        raise DataError(f"{where} is not valid JSON: {problem}") from problem
    keys = ("id", "image", "question")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), (str, int)) for k in keys):
        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{where} must hold id, image and question; found {found}")
    image = str(entry["image"])
    try:
        return _Question(entry["id"], image, str(entry["question"]), inside(root, image))
    except BadImage as problem:
        raise DataError(f"{where}: {problem}") from problem


def _read_text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"{flag}: cannot read '{path}': {getattr(problem, 'strerror', None) or problem}"
        ) from problem


def _answered_ids(config: InferConfig) -> set[str | int]:
    """Ids that an earlier run answered in `--output`. A line cut short by a kill is removed.

    Raises DataError for a file of other content, or with answers of another model or adapter.
    """
    assert config.output is not None
    if not config.output.exists():
        return set()
    text = _read_text(config.output, "--output")
    complete = text[: text.rfind("\n") + 1]
    ids = set()
    asked_how = _asked_how(config)
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            entry = json.loads(line)
            ids.add(entry["id"])
            there = {name: entry[name] for name in ("model", "adapter")} | {
                name: entry[name] for name in _PROMPT_OPTIONS if name in entry
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


def show(report: dict[str, Any]) -> None:
    """Print the answer, both answers, or where the file of answers is."""
    if "output" in report:
        found = report["answered_before"]
        before = f", {found} found from before" if found else ""
        ui.result(f"{report['answered_now']} answers written{before}: {report['output']}")
    elif "base_answer" in report:
        title = f"{report['image']}: {report['question']}"
        ui.columns(
            title,
            (f"base: {report['model']}", report["base_answer"]),
            (f"tuned: {report['adapter']}", report["answer"]),
        )
    else:
        ui.result(report["answer"])
