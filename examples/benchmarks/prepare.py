"""The article's `dataset.map(format)` beside `vlmdpo prepare`: the same JPEGs, two processes each.

    python examples/benchmarks/prepare.py [--json] [--markdown FILE] [--rows 1500] [--rounds 3]

The pictures are photo-like (noise at five scales, so that they compress as photographs do), JPEG at
quality 90, 640 to 4000 pixels on the longer side, evenly spaced by ratio, in seven camera formats,
upright and across; every row's bytes differ. They lie in one Parquet file with RLAIF-V's columns.
Three bounds on the longer side: 490 (half of Idefics2's limit, as in the article: every picture is
reduced), 1792 (half of Qwen2-VL's: a third are), none (half of any limit beyond 4000).

Each run is a process of its own, in turns A B A B; a rate counts from libraries imported and
processor loaded to data written, starting the workers included, and the median of the rounds
counts. Ours does more in that time: it checks each row, finds copies, counts tokens, draws a
report. Both must have the same rows, texts and picture sizes, and pictures that differ by less than
3 of 255 levels on average where both reduced them.

A last case runs ours on 1,000 and on 20,000 small pictures and compares the memory of all its
processes at their peak.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _measure import versions
from PIL import Image
from rich.console import Console
from rich.table import Table

BOUNDS = (("all reduced to 490 px", 490), ("bound 1792 px", 1792), ("none reduced", 4000))
WANTED = 5.0
MOST_BYTES = 1.05  # of the source's, where nothing is reduced
FLAT = 1.25  # peak memory at 20,000 rows over that at 1,000
_FORMATS = ((4, 3), (3, 2), (16, 9), (1, 1), (3, 4), (2, 3), (9, 16))
_ANSWER = (
    "The picture shows a street with several people walking beside parked cars and a bicycle. " * 4
)


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with as much detail at each scale as photographs have."""
    pixels = np.full((height, width, 3), 128, np.float32)
    for scale, strength in ((4, 60), (16, 40), (64, 25), (256, 14), (1024, 8)):
        shape = (max(2, height * scale // 4096 + 2), max(2, width * scale // 4096 + 2))
        for channel in range(3):
            noise = Image.fromarray(rng.normal(0, strength, shape).astype(np.float32))
            pixels[..., channel] += np.asarray(
                noise.resize((width, height), Image.Resampling.BICUBIC)
            )
    pixels += rng.normal(0, 3, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photos(sides: list[int]) -> list[bytes]:
    """One picture for each longer side, in the camera formats by turns."""
    rng = np.random.default_rng(0)
    made = []
    for number, side in enumerate(sides):
        across, down = _FORMATS[number % len(_FORMATS)]
        scale = side / max(across, down)
        made.append(photo(rng, round(across * scale), round(down * scale)))
    return made


def write_rows(path: Path, pictures: list[bytes], rows: int) -> int:
    """A Parquet file of RLAIF-V's columns, 100 rows a row group as the Hub has them. Returns the
    bytes of its pictures.
    """
    import pyarrow
    import pyarrow.parquet as pq
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    texts = {name: Value("string") for name in ("question", "chosen", "rejected")}
    schema = Features({"image": ImageFeature(), **texts}).arrow_schema
    size = 0
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100):
            held = []
            for row in range(start, min(rows, start + 100)):
                picture = pictures[row * 7 % len(pictures)]
                mark = str(row).encode()  # a comment in the file: the same pixels, other bytes
                picture = (
                    picture[:2]
                    + b"\xff\xfe"
                    + (len(mark) + 2).to_bytes(2, "big")
                    + mark
                    + picture[2:]
                )
                answers = {"chosen": f"{_ANSWER}{row}", "rejected": f"{_ANSWER[50:]}{row}"}
                held.append(
                    {
                        "image": {"bytes": picture, "path": None},
                        "question": f"What is in picture {row}?",
                        **answers,
                    }
                )
                size += len(picture)
            writer.write_table(pyarrow.Table.from_pylist(held, schema=schema))
    return size


def article(source: Path, out: Path, side: int) -> dict[str, Any]:
    """The article's preprocessing: `map` with two processes, then the cast that makes the pictures
    decoded.
    """
    from datasets import features, load_dataset

    from vlmdpo.models.load import load_processor

    processor = load_processor("tiny")
    dataset = load_dataset(
        "parquet", data_files=str(source), split="train", cache_dir=str(out / "source")
    )

    def render(role: str, parts: list[dict[str, str]]) -> str:
        return str(
            processor.apply_chat_template([{"role": role, "content": parts}], tokenize=False)
        )

    def shape(example: dict[str, Any]) -> dict[str, Any]:
        example["image"].thumbnail((side, side))
        return {
            "images": [example["image"]],
            "prompt": render(
                "user", [{"type": "image"}, {"type": "text", "text": example["question"]}]
            ),
            "chosen": render("assistant", [{"type": "text", "text": example["chosen"]}]),
            "rejected": render("assistant", [{"type": "text", "text": example["rejected"]}]),
        }

    started = time.perf_counter()
    made = dataset.map(shape, remove_columns=dataset.column_names, num_proc=2)
    kinds = made.features
    kinds["images"] = features.List(features.Image(decode=True))
    made = made.cast(kinds)
    seconds = time.perf_counter() - started
    made.save_to_disk(str(out / "made"))
    return {
        "seconds": seconds,
        "bytes": sum(Path(file["filename"]).stat().st_size for file in made.cache_files),
    }


def ours(source: Path, out: Path, side: int) -> dict[str, Any]:
    """`vlmdpo prepare` with two processes."""
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig
    from vlmdpo.data import work
    from vlmdpo.engine.lengths import load_token_counter

    work.start_forkserver(
        2, ["vlmdpo.engine.lengths"]
    )  # as the command does, before its own imports
    load_token_counter("tiny", None, False)  # libraries imported, processor loaded
    started = time.perf_counter()
    settings: dict[str, Any] = {
        "dataset": str(source),
        "output_dir": out / "made",
        "max_image_side": side,
        "num_proc": 2,
    }
    report = prepare.run(PrepareConfig(**settings))
    return {"seconds": time.perf_counter() - started, "bytes": report["bytes"]}


def measured(way: str, source: Path, out: Path, side: int) -> dict[str, Any]:
    """One run in a process of its own, with the peak of all its processes' own memory in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, __file__, "--run", way, str(source), str(out), str(side)]
    started = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    while running.poll() is None:
        peak = max(peak, _own_memory(running.pid))
        time.sleep(0.1)
    said, error = running.communicate()
    if running.returncode:
        raise SystemExit(error)
    return {
        **json.loads(said.splitlines()[-1]),
        "whole_s": time.perf_counter() - started,
        "peak_bytes": peak,
    }


def _own_memory(pid: int) -> int:
    """What a process and its children hold for themselves: resident, less what is shared or mapped
    from files.
    """
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - memory.shared
    return total


def agreement(theirs: Path, mine: Path, rows: int) -> tuple[float, bool]:
    """Mean difference of the pictures' levels over some rows, and whether rows, texts and picture
    sizes are the same.
    """
    from datasets import load_from_disk

    from vlmdpo.data import store

    first, second = load_from_disk(str(theirs)), store.load(mine)
    same, differences = len(first) == len(second) == rows, []
    for row in range(0, rows, max(1, rows // 50)):
        one, other = first[row], second[row]
        texts = [
            other["prompt"][0]["content"][-1]["text"],
            *(other[side][0]["content"][0]["text"] for side in ("chosen", "rejected")),
        ]
        said = (one["prompt"], one["chosen"], one["rejected"])
        same = same and all(text in whole for text, whole in zip(texts, said, strict=True))
        pictures = [
            np.asarray(row["images"][0].convert("RGB"), dtype=np.int16) for row in (one, other)
        ]
        same = same and pictures[0].shape == pictures[1].shape
        if same:
            differences.append(float(np.abs(pictures[0] - pictures[1]).mean()))
    return statistics.mean(differences or [255.0]), same


def speed_cases(place: Path, rows: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A case for each bound: rates of both, bytes written, and whether the results agree."""
    source = place / "photos.parquet"
    held = write_rows(
        source, photos([round(640 * (4000 / 640) ** (i / 27)) for i in range(28)]), rows
    )
    for name, side in BOUNDS:
        ways: dict[str, list[dict[str, Any]]] = {"article": [], "ours": []}
        for _ in range(rounds):
            for way, runs in ways.items():
                runs.append(measured(way, source, place / way, side))
        seconds = {
            way: statistics.median(run["seconds"] for run in runs) for way, runs in ways.items()
        }
        ratios = [
            theirs["seconds"] / mine["seconds"]
            for theirs, mine in zip(ways["article"], ways["ours"], strict=True)
        ]
        difference, same = agreement(place / "article" / "made", place / "ours" / "made", rows)
        written = {way: runs[0]["bytes"] / held for way, runs in ways.items()}
        small = side < 4000 or written["ours"] <= MOST_BYTES
        yield {
            "name": name,
            "ratio": statistics.median(ratios),
            "agreement": difference,
            "passed": same and difference < 3 and small and statistics.median(ratios) >= WANTED,
            "same_rows_texts_and_sizes": same,
            "rows_per_s": {way: rows / value for way, value in seconds.items()},
            "whole_s": {
                way: statistics.median(run["whole_s"] for run in runs) for way, runs in ways.items()
            },
            "written": written,
            "rows": rows,
        }


def memory_case(place: Path) -> dict[str, Any]:
    """Ours on 1,000 and on 20,000 pictures of 640 pixels: peak memory."""
    pictures = photos([640] * 7)
    peaks = {}
    for rows in (1_000, 20_000):
        source = place / f"small-{rows}.parquet"
        write_rows(source, pictures, rows)
        peaks[rows] = measured("ours", source, place / "ours", 490)["peak_bytes"]
    ratio = peaks[20_000] / peaks[1_000]
    return {
        "name": "memory, 20,000 rows over 1,000",
        "ratio": ratio,
        "agreement": None,
        "passed": ratio <= FLAT,
        "peaks": peaks,
    }


def markdown(cases: list[dict[str, Any]], memory: dict[str, Any]) -> str:
    """The dated report."""
    rows = "".join(
        f"| {case['name']} | {case['rows_per_s']['article']:.0f} | "
        f"{case['rows_per_s']['ours']:.0f} | **{case['ratio']:.1f}×** "
        f"| {case['whole_s']['article']:.0f} s | {case['whole_s']['ours']:.0f} s "
        f"| {case['written']['article']:.2f} | {case['written']['ours']:.2f} | "
        f"{case['agreement']:.2f} |\n"
        for case in cases
    )
    peaks = memory["peaks"]
    return (
        "# Preparing data: the article's `map` beside `vlmdpo "
        f"prepare`\n\n{datetime.date.today()}, {os.cpu_count()} CPU "
        "cores, "
        f"{versions('datasets', 'pillow', 'pyarrow', 'torch', 'transformers')}.\n"
        f"{cases[0]['rows']:,} rows, two "
        "processes each. "
        "Repeat: `python examples/benchmarks/prepare.py`, whose head says what is measured.\n\n"
        "| | article, rows/s | ours, rows/s | ratio | whole process, article | ours | bytes "
        "written / source, article | ours "
        f"| mean difference of levels |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n{rows}\n"
        f"Peak memory of all processes of ours: {peaks[1_000] / 1e6:.0f} MB at 1,000 rows, "
        f"{peaks[20_000] / 1e6:.0f} MB at "
        f"20,000 ({memory['ratio']:.2f}×).\n"
    )


def main() -> None:
    """Run all cases and print them as a table, or as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--rows", type=int, default=1_500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--run", nargs=4, help=argparse.SUPPRESS
    )  # one run, in the process that is measured
    given = parser.parse_args()
    if given.run:
        way, source, out, side = given.run
        print(
            json.dumps({"article": article, "ours": ours}[way](Path(source), Path(out), int(side)))
        )
        return
    with tempfile.TemporaryDirectory() as name:
        cases = list(speed_cases(Path(name), given.rows, given.rounds))
        memory = memory_case(Path(name))
    if given.markdown:
        given.markdown.write_text(markdown(cases, memory), encoding="utf-8")
    if given.json:
        print(json.dumps({"cases": [*cases, memory]}, indent=2))
        return
    table = Table(title="vlmdpo prepare beside dataset.map")
    for column in ("Case", "Ratio", "Article rows/s", "Ours rows/s", "Written/source", "Passed"):
        table.add_column(column)
    for case in cases:
        rates, wrote = (
            case["rows_per_s"],
            f"{case['written']['article']:.2f} / {case['written']['ours']:.2f}",
        )
        table.add_row(
            case["name"],
            f"{case['ratio']:.2f}",
            f"{rates['article']:.0f}",
            f"{rates['ours']:.0f}",
            wrote,
            str(case["passed"]),
        )
    table.add_row(memory["name"], f"{memory['ratio']:.2f}", "", "", "", str(memory["passed"]))
    Console().print(table)


if __name__ == "__main__":
    main()
