"""The pairs as `vlmdpo prepare` reads them: pairs.jsonl, and the images it names.

Each line has the provenance of its pair: how the answers were drawn, who judged them, and what the
judge said.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdpo.data import growing_jsonl
from vlmdpo.data.images import open_bytes
from vlmdpo.data.left_out import LeftOut
from vlmdpo.data.reasons import BadRow, shown
from vlmdpo.errors import DataError
from vlmdpo.feedback.pictures import Picture, digest_of
from vlmdpo.feedback.select import Pair, Scored

PAIRS, IMAGES = "pairs.jsonl", "images"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}  # others by their own names


def write_images(
    folder: Path,
    pictures: Sequence[Picture],
    digests: Mapping[str, str],
    pairs: Iterable[Pair],
    left_out: LeftOut,
) -> dict[str, str]:
    """Store the images that pairs are about. Returns their paths from the folder, by prompt.

    Args:
        digests: of the images as they were asked about, by prompt.
        left_out: gets the images that can no longer be read, or have changed.

    Raises DataError where the folder cannot be written.
    """
    paired = {pair.key for pair in pairs}
    stored: dict[str, str] = {}
    with _writing(folder):
        (folder / IMAGES).mkdir(exist_ok=True)
        for picture in pictures:
            keys = paired.intersection(map(picture.id_of, picture.prompts))
            if not keys:
                continue
            try:
                data = picture.read_again(digests[min(keys)])
                stored |= dict.fromkeys(keys, _write_image(folder, data))
            except BadRow as problem:
                left_out.add(f"image {shown(picture.name)}", problem)
    return stored


def write(
    folder: Path,
    pictures: Sequence[Picture],
    images: Mapping[str, str],
    scored: Mapping[str, Scored],
    pairs: Iterable[Pair],
    origin: Mapping[str, Any],
) -> None:
    """Write the pairs, in the order of pictures and prompts.

    Args:
        images: of `write_images`.
        scored: the answers by the key of their prompt.
        origin: what holds for all pairs: the model, how answers were drawn, the judge.

    Raises DataError where the folder cannot be written.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.key, []).append(pair)
    lines = [
        _line(images[key], prompt, scored[key], pair, origin)
        for picture in pictures
        for prompt in picture.prompts
        if (key := picture.id_of(prompt)) in by_prompt
        for pair in by_prompt[key]
    ]
    with _writing(folder):
        if lines:
            growing_jsonl.rewrite(folder / PAIRS, lines)
        else:
            (folder / PAIRS).unlink(missing_ok=True)  # of an earlier selection


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DataError(f"--output-dir: cannot write '{folder}': {problem.strerror}") from problem


def _write_image(folder: Path, data: bytes) -> str:
    """Store an image under the digest of its bytes. Returns its path from the folder."""
    kind = open_bytes(data).format or "img"
    name = f"{digest_of(data)}.{_SUFFIXES.get(kind, kind.lower())}"
    path = folder / IMAGES / name
    if not path.exists():
        temporary = path.with_name(f".{name}.partial")
        temporary.write_bytes(data)
        temporary.replace(path)
    return f"{IMAGES}/{name}"


def _line(image: str, prompt: str, answers: Scored, pair: Pair, origin: Mapping[str, Any]) -> str:
    def of(number: int) -> dict[str, Any]:
        return {"sample": number, "score": answers.scores[number]}

    entry = {
        "id": f"{pair.key}-{pair.chosen}-{pair.rejected}",
        "image": image,
        "question": prompt,
        "chosen": answers.samples[pair.chosen].text,
        "rejected": answers.samples[pair.rejected].text,
        "provenance": {**origin, "chosen": of(pair.chosen), "rejected": of(pair.rejected)},
    }
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
