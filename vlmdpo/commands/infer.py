"""`vlmdpo infer`: ask a model, or the base and the tuned model side by side, or a whole file of
questions.
"""

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

_DESCRIBE = "Describe this image."


@dataclass(frozen=True)
class _Task:
    """One line of a question file."""

    id: str | int
    image: str
    question: str
    path: Path


def run(config: InferConfig) -> dict[str, Any]:
    """Answer one question, or a file of them. Raises ConfigError, DataError, ModelError."""
    return _one(config) if config.input is None else _many(config)


def _load(config: InferConfig) -> tuple[Any, Any]:
    from vlmdpo.models import load

    origin: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    how: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "attention": config.attn_implementation,
    }
    model = load.load_model(config.model, adapter=config.adapter, **how, **origin)
    return model, load.load_processor(
        config.model, image_splitting=config.image_splitting, **origin
    )


def _record(
    config: InferConfig, number: str | int, image: str, question: str, answer: str
) -> dict[str, Any]:
    adapter = str(config.adapter) if config.adapter else None
    return {
        "id": number,
        "image": image,
        "question": question,
        "answer": answer,
        "model": config.model,
        "adapter": adapter,
    }


def _one(config: InferConfig) -> dict[str, Any]:
    name, picture = _picture(config)
    question = config.question or _DESCRIBE
    model, processor = _load(config)
    from vlmdpo.engine.generate import answer

    tuned = answer(model, processor, [picture], [question], config.max_new_tokens)[0]
    report = _record(config, 0, name, question, tuned)
    if config.compare:
        with model.disable_adapter():
            report["base_answer"] = answer(
                model, processor, [picture], [question], config.max_new_tokens
            )[0]
    return report


def _picture(config: InferConfig) -> tuple[str, Image.Image]:
    if config.image is not None:
        try:
            return str(config.image), open_file(config.image)
        except BadImage as problem:
            raise DataError(f"--image: '{config.image}': {problem}") from problem
    if config.model != "tiny":
        raise ConfigError("--image FILE is needed: which picture shall the model look at?")
    from vlmdpo.tiny import evaluation

    name = evaluation.first_picture()
    ui.say(f"no --image: asking about {name} of the embedded set")
    return name, evaluation.picture(name)


def _many(config: InferConfig) -> dict[str, Any]:
    """Each process answers every so many-th batch, the same batches that one process would make,
    into a file of its own.
    """
    from vlmdpo.distributed.processes import join_process_group

    assert config.input is not None
    assert config.output is not None
    processes = join_process_group(config.device)
    if processes.index:
        ui.mute()
    source, output = config.input, config.output
    config = dataclasses.replace(config, device=processes.device, num_processes=1)
    tasks = _read_tasks(source, config.image_root or source.parent)
    if processes.index == 0:
        _collect(output)
        _finished(config)
    processes.barrier()
    done = _finished(config)
    left = [task for task in tasks if task.id not in done]
    batches = [
        left[start : start + config.batch_size] for start in range(0, len(left), config.batch_size)
    ]
    mine = batches[processes.index :: processes.count]
    processes.barrier()  # no process writes before all have read
    if mine:
        model, processor = _load(config)
        path = output if processes.count == 1 else _part(output, processes.index)
        _answer_all(config, model, processor, mine, path)
    processes.barrier()
    if processes.index == 0:
        _collect(output)
        _in_order(output, tasks)
    processes.barrier()
    processes.destroy()
    return {
        "output": str(config.output),
        "questions": len(tasks),
        "answered_now": len(left),
        "answered_before": len(tasks) - len(left),
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
    }


def _part(output: Path, process: int) -> Path:
    """Where one of several processes writes its answers until all are done."""
    return output.with_name(f".{output.name}.part-{process}")


def _collect(output: Path) -> None:
    """Put what several processes have answered, whole lines only, behind what the file holds, and
    remove their own files.
    """
    parts = sorted(output.parent.glob(f".{output.name}.part-*"))
    try:
        for part in parts:
            text = part.read_text(encoding="utf-8")
            with output.open("a", encoding="utf-8") as file:
                file.write(text[: text.rfind("\n") + 1])
            part.unlink()
    except OSError as problem:
        raise DataError(f"--output: cannot write '{output}': {problem.strerror}") from problem


def _in_order(output: Path, tasks: list[_Task]) -> None:
    """The answers in the order of the questions, each once, as one process writes them."""
    if not output.exists():
        return
    by_id = {
        json.loads(line)["id"]: line for line in output.read_text(encoding="utf-8").split("\n")[:-1]
    }
    wanted = [by_id.pop(task.id) for task in tasks if task.id in by_id]
    text = "".join(line + "\n" for line in [*by_id.values(), *wanted])
    if text != output.read_text(encoding="utf-8"):
        part = output.with_name(f".{output.name}.partial")
        part.write_text(text, encoding="utf-8")
        part.replace(output)


def _answer_all(
    config: InferConfig, model: Any, processor: Any, batches: list[list[_Task]], path: Path
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
            pictures = [_open_task(task) for task in batch]
            texts = answer(
                model, processor, pictures, [task.question for task in batch], config.max_new_tokens
            )
            for task, text in zip(batch, texts, strict=True):
                file.write(
                    json.dumps(
                        _record(config, task.id, task.image, task.question, text),
                        ensure_ascii=False,
                    )
                    + "\n"
                )
            file.flush()  # a stop loses at most the batch in hand
            bar.advance(len(batch))


def _open_task(task: _Task) -> Image.Image:
    try:
        return open_file(task.path)
    except BadImage as problem:
        raise DataError(f"question {task.id!r}: '{task.path}': {problem}") from problem


def _read_tasks(path: Path, root: Path) -> list[_Task]:
    tasks: list[_Task] = []
    missing = []
    for number, line in enumerate(_read_text(path, "--input").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"--input: '{path}' line {number}"
        try:
            entry = json.loads(line)
        except ValueError as problem:
            raise DataError(f"{where} is no valid JSON: {problem}") from problem
        wanted = ("id", "image", "question")
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), (str, int)) for key in wanted
        ):
            found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(f"{where} must hold id, image and question; found {found}")
        try:
            file = inside(root, str(entry["image"]))
        except BadImage as problem:
            raise DataError(f"{where}: {problem}") from problem
        if not file.is_file():
            missing.append(str(entry["image"]))
        tasks.append(_Task(entry["id"], str(entry["image"]), str(entry["question"]), file))
    if missing:
        raise DataError(
            f"'{root}': {len(missing)} pictures are missing: {', '.join(missing[:5])}; see "
            "--image-root"
        )
    if len({task.id for task in tasks}) < len(tasks):
        raise DataError(f"--input: '{path}' uses an id twice; ids tell which answers are done")
    if not tasks:
        raise DataError(f"--input: '{path}' holds no question")
    return tasks


def _read_text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"{flag}: cannot read '{path}': {getattr(problem, 'strerror', None) or problem}"
        ) from problem


def _finished(config: InferConfig) -> set[str | int]:
    """Ids answered by an earlier run into the same file; a line cut short by a kill is removed and
    asked again.
    """
    assert config.output is not None
    if not config.output.exists():
        return set()
    text = _read_text(config.output, "--output")
    whole = text[: text.rfind("\n") + 1]
    ids = set()
    adapter = str(config.adapter) if config.adapter else None
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            ids.add(entry["id"])
            same = (entry["model"], entry["adapter"]) == (config.model, adapter)
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"--output: '{config.output}' line {number} is no answer of ours; give another file"
            ) from problem
        if not same:
            raise DataError(
                f"--output: '{config.output}' holds answers of {entry['model']} with adapter "
                f"{entry['adapter']}; "
                "give another file"
            )
    if whole != text:
        config.output.write_text(whole, encoding="utf-8")
    return ids


def show(report: dict[str, Any]) -> None:
    """Print the answer, both answers, or where the file of answers is."""
    if "output" in report:
        before = f", {report['answered_before']} from before" if report["answered_before"] else ""
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
