"""`vlmdpo infer`: ask a model, or base and tuned side by side, or a whole file of questions."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vlmdpo import ui
from vlmdpo.commands import infer_engines
from vlmdpo.commands.infer_file import answer_file, record
from vlmdpo.config import InferConfig
from vlmdpo.data.images import open_file
from vlmdpo.data.left_out import in_words
from vlmdpo.data.reasons import BadImage, BadRow
from vlmdpo.errors import ConfigError, DataError

_DEFAULT_QUESTION = "Describe this image."


def run(config: InferConfig) -> dict[str, Any]:
    """Answer one question, or a file of them. Raises ConfigError, DataError, ModelError."""
    return _answer_one(config) if config.input is None else answer_file(config)


def _answer_one(config: InferConfig) -> dict[str, Any]:
    name, image = _image(config)
    question = config.question or _DEFAULT_QUESTION
    engine = infer_engines.load(config)
    try:
        inputs = engine.inputs([image], [question])
    except BadRow as problem:
        raise DataError(f"this question cannot be asked: {problem}") from problem
    streams = ui.is_live() and config.engine == "plain" and not config.compare
    streams = streams and config.num_return_sequences == 1
    [answers] = engine.answers(inputs, [name, question], show=ui.piece if streams else None)
    report = record(config, 0, name, question, answers)
    if streams:
        ui.result()
        report["shown"] = True
    if config.compare:
        [base] = engine.answers(inputs, [name, question], tuned=False)
        report["base_answer"] = base[0]
        if len(base) > 1:
            report["base_answers"] = base
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


def show(report: dict[str, Any]) -> None:
    """Print the answer, both answers, or where the file of answers is."""
    if "output" in report:
        _show_file(report)
    elif "base_answer" in report:
        title = f"{report['image']}: {report['question']}"
        ui.columns(
            title,
            (f"base: {report['model']}", _all(report, "base_answer")),
            (f"tuned: {report['adapter']}", _all(report, "answer")),
        )
    elif "shown" not in report:
        ui.result(_all(report, "answer"))


def _all(report: dict[str, Any], name: str) -> str:
    """The answer, or the answers with a line between them."""
    return "\n---\n".join(report.get(f"{name}s", [report[name]]))


def _show_file(report: dict[str, Any]) -> None:
    found = report["answered_before"]
    before = f", {found} found from before" if found else ""
    ui.result(f"{ui.count(report['answered_now'], 'answer')} written{before}: {report['output']}")
    left_out = report["left_out"]
    if left_out:
        count = sum(found["count"] for found in left_out.values())
        ui.warn(f"{ui.count(count, 'line')} of the file could not be asked: {in_words(left_out)}")
