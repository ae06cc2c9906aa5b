"""What is asked of which image: a file of questions, a folder of images, or prepared data.

This module knows nothing of models.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import MakePairsConfig
from vlmdpo.data import json_rows, questions, store
from vlmdpo.data.archives import IMAGE_SUFFIXES
from vlmdpo.data.groups import IMAGE_DIGEST
from vlmdpo.data.image_cells import inside, read_file
from vlmdpo.data.left_out import LeftOut, in_words
from vlmdpo.data.pairs import question_message, text_of
from vlmdpo.data.reasons import BadImage, BadRow, shown
from vlmdpo.data.sources import as_stored
from vlmdpo.errors import DataError

DESCRIPTION_PROMPTS = (
    "Describe this image.",
    "Describe this image in detail.",
    "What do you see in this picture?",
    "Please give a detailed description of this picture.",
    "What is happening in this image?",
    "Tell me everything that can be seen in this photo.",
    "Write a few sentences about what this picture shows.",
    "Name what is in this image, and say where it is.",
)


@dataclass(frozen=True)
class Picture:
    """One image and the prompts about it.

    Attributes:
        name: what messages and files call the image.
        prompts: each once.
        read: its encoded bytes; raises BadImage.
    """

    name: str
    prompts: tuple[str, ...]
    read: Callable[[], bytes]

    def id_of(self, prompt: str) -> str:
        """What files and draws know a prompt about this image by."""
        return hashlib.sha256(f"{self.name}\n{prompt}".encode("utf-8", "replace")).hexdigest()[:16]

    def read_again(self, digest: str) -> bytes:
        """The bytes whose `digest_of` is known. Raises BadImage, also where they have changed."""
        data = self.read()
        if digest_of(data) != digest:
            raise BadImage(
                "changed_image",
                "it has changed since its answers were drawn; --overwrite draws anew",
            )
        return data


def digest_of(data: bytes) -> str:
    """What an encoded image is known by."""
    return hashlib.sha256(data).hexdigest()[:16]


def read_pictures(config: MakePairsConfig) -> tuple[list[Picture], LeftOut]:
    """(the images with prompts that `--input` names, what of it cannot be asked).

    Raises DataError where there is nothing to ask.
    """
    source = config.input
    assert source is not None
    if source.is_file():
        _refuse_prompts(config, f"'{source}' has a prompt on each line")
        asked, left_out = questions.read(source, config.image_root or source.parent, "--input")
        pictures = _by_image(asked)
    elif not source.is_dir():
        raise DataError(
            f"--input: '{source}' does not exist; give a JSONL of questions, a folder of images, "
            "or a folder written by vlmdpo prepare"
        )
    elif store.read_manifest(source) is not None:
        _refuse_prompts(config, f"'{source}' is prepared data, which has prompts")
        pictures, left_out = _prepared(source)
    else:
        pictures, left_out = _folder(source, config), LeftOut()
    return pictures[: config.limit], left_out


def prompts_digest(config: MakePairsConfig) -> str:
    """A hash of the prompts that images of a folder get."""
    prompts = repr((_folder_prompts(config), config.prompts_per_image))
    return hashlib.sha256(prompts.encode("utf-8", "replace")).hexdigest()[:16]


def _refuse_prompts(config: MakePairsConfig, why: str) -> None:
    if config.prompts or config.prompts_per_image:
        raise DataError(f"--prompts is for a folder of images, and {why}; leave it out")


def _by_image(asked: Iterable[questions.Question]) -> list[Picture]:
    grouped: dict[str, dict[str, Path]] = {}
    for question in asked:
        grouped.setdefault(question.image, {})[question.text] = question.path
    return [
        Picture(name, tuple(texts), partial(read_file, next(iter(texts.values())), shown(name)))
        for name, texts in grouped.items()
    ]


def _folder(folder: Path, config: MakePairsConfig) -> list[Picture]:
    """The images in a folder and those below it, in the order of their names.

    Not those of `--output-dir`, which may lie among them.
    """
    own = folder / os.path.relpath(config.output_dir.resolve(), folder.resolve())
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and own not in path.parents
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not names:
        raise DataError(
            f"--input: '{folder}' contains no images ({', '.join(IMAGE_SUFFIXES[:4])} ...) and was "
            "not written by vlmdpo prepare"
        )
    prompts = _folder_prompts(config)
    count = config.prompts_per_image or (len(prompts) if config.prompts else 1)
    if count > len(prompts):
        raise DataError(f"--prompts-per-image {count}: there are only {len(prompts)} prompts")

    def picked(name: str) -> tuple[str, ...]:
        # As bytes: names of other systems hold what UTF-8 cannot.
        rng = random.Random(f"{config.seed} {name}".encode("utf-8", "surrogateescape"))
        return tuple(prompts) if count == len(prompts) else tuple(rng.sample(prompts, count))

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: read_file(inside(folder, name), shown(name))

    return [Picture(name, picked(name), reader(name)) for name in names]


def _folder_prompts(config: MakePairsConfig) -> Sequence[str]:
    return DESCRIPTION_PROMPTS if config.prompts is None else read_prompts(config.prompts)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once: a line of text each, or a JSON object with `question`.

    Raises DataError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(f"--prompts: cannot read '{path}': {reason}") from problem
    if text.lstrip().startswith("["):
        raise DataError(
            f"--prompts: '{path}' begins as a JSON list; give one prompt on each line, as text or "
            'as {"question": "..."}'
        )
    prompts: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            prompt = _prompt(line.strip(), f"--prompts: '{path}' line {number}")
            prompts.setdefault(prompt)
    if not prompts:
        raise DataError(f"--prompts: '{path}' contains no prompts")
    return list(prompts)


def _prompt(line: str, where: str) -> str:
    prompt: Any = line
    if line.startswith("{"):
        try:
            entry = json_rows.parse(line)
        except (BadRow, ValueError) as problem:
            raise DataError(f"{where} is not valid JSON: {problem}") from problem
        prompt = entry.get("question")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: a JSON line must hold a text named question")
    try:
        question_message(prompt)
    except BadRow as problem:
        raise DataError(f"{where} cannot be asked: {problem}") from problem
    return str(prompt)


def _prepared(folder: Path) -> tuple[list[Picture], LeftOut]:
    """The images and prompts of prepared data. Only one question about one image is asked."""
    dataset = store.load(folder)
    columns = dataset.select_columns([IMAGE_DIGEST, "prompt", "source_row"])
    prompts: dict[str, dict[str, None]] = {}
    first_rows: dict[str, int] = {}
    left_out = LeftOut()
    for row, entry in enumerate(as_stored(columns)):
        try:
            prompt = _only_question(entry["prompt"])
        except BadRow as problem:
            left_out.add(f"row {row} (counted from 0)", problem)
            continue
        image = entry[IMAGE_DIGEST]
        first_rows.setdefault(image, row)
        prompts.setdefault(image, {}).setdefault(prompt)
    if not prompts:
        reasons = in_words(left_out.report())
        raise DataError(
            f"--input: of {ui.count(len(dataset), 'row')} of '{folder}' none can be asked: "
            f"{reasons}"
        )

    def reader(row: int) -> Callable[[], bytes]:
        return lambda: next(_images(dataset, row))

    pictures = [
        Picture(f"{image[:16]}", tuple(texts), reader(first_rows[image]))
        for image, texts in prompts.items()
    ]
    return pictures, left_out


def _images(dataset: Any, row: int) -> Iterator[bytes]:
    for entry in as_stored(dataset.select([row])):
        for image in entry["images"]:
            yield image["bytes"]


def _only_question(prompt: Sequence[Any]) -> str:
    """The text of a prompt that is one question about one image. Raises BadRow."""
    images = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if images != 1:
        raise BadRow("not_one_image", f"the prompt has {ui.count(images, 'image')}, not one")
    if len(prompt) != 1:
        raise BadRow(
            "not_one_turn", f"the prompt has {len(prompt)} turns; only a single question is asked"
        )
    parts = prompt[0]["content"]
    texts = [str(part["text"]) for part in parts if part["type"] == "text"]
    leads = parts[0]["type"] == "image"
    return "\n".join(texts) if leads else text_of(prompt[0])
