"""The article's `dataset.map(format)` beside `vlmdpo prepare`: same JPEGs, two processes each.

    python examples/benchmarks/prepare.py [--json] [--markdown FILE] [--rows 1500] [--rounds 3]

The images resemble photos (noise at five scales, so that they compress like photos): JPEGs of
quality 90, 640 to 4000 pixels on the longer side, geometrically spaced, in seven camera formats,
portrait and landscape. The bytes of every row differ. All are in one Parquet file with RLAIF-V's
columns. There are three limits on the longer side: 490 (half of Idefics2's limit, as in the
article: every image is reduced), 1792 (half of Qwen2-VL's: a third are reduced), and none (half of
any limit beyond 4000).

Each run is a separate process, in turns (A B A B). The time counts from when libraries are imported
and the processor is loaded until the data is written, including the start of the workers; the
median of the rounds counts. Ours does more in that time: it checks each row, finds duplicates,
counts tokens, and writes a report. Both must give the same rows, texts and image sizes, and images
that differ by less than 3 of 255 levels on average.

A last case runs ours on 1,000 and on 20,000 small images and compares the peak memory of all its
processes.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _cases import measure_each
from _measure import versions
from PIL import Image
from rich.console import Console
from rich.table import Table

BOUNDS = (("all reduced to 490 px", 490), ("limit of 1792 px", 1792), ("none reduced", 4000))
MIN_RATIO = 5.0
MAX_BYTES = 1.05  # of the source's bytes, if nothing is reduced
MAX_MEMORY_RATIO = 1.25  # peak memory at 20,000 rows over that at 1,000
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
    """One image for each longer side, in the camera formats in turn."""
    rng = np.random.default_rng(0)
    made = []
    for number, side in enumerate(sides):
        across, down = _FORMATS[number % len(_FORMATS)]
        scale = side / max(across, down)
        made.append(photo(rng, round(across * scale), round(down * scale)))
    return made


def write_rows(path: Path, images: list[bytes], rows: int) -> int:
    """Write a Parquet file with RLAIF-V's columns; return the bytes of its images.

    It has 100 rows per row group, as files on the Hub do.
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
                image = images[row * 7 % len(images)]
                mark = str(row).encode()  # a JPEG comment: the same pixels, other bytes
                image = (
                    image[:2] + b"\xff\xfe" + (len(mark) + 2).to_bytes(2, "big") + mark + image[2:]
                )
                answers = {"chosen": f"{_ANSWER}{row}", "rejected": f"{_ANSWER[50:]}{row}"}
                held.append(
                    {
                        "image": {"bytes": image, "path": None},
                        "question": f"What is in picture {row}?",
                        **answers,
                    }
                )
                size += len(image)
            writer.write_table(pyarrow.Table.from_pylist(held, schema=schema))
    return size


def article(source: Path, out: Path, side: int) -> dict[str, Any]:
    """The article's preprocessing: `map` with two processes, then the cast to decoded images."""
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
    """One run in a separate process, with the peak memory of all its processes in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, __file__, "--run", way, str(source), str(out), str(side)]
    started = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    while running.poll() is None:
        peak = max(peak, _own_memory(running.pid))
        time.sleep(0.1)
    stdout, stderr = running.communicate()
    if running.returncode:
        raise SystemExit(stderr)
    return {
        **json.loads(stdout.splitlines()[-1]),
        "whole_s": time.perf_counter() - started,
        "peak_bytes": peak,
    }


def _own_memory(pid: int) -> int:
    """Memory that a process and its children do not share: resident, less shared or file-mapped."""
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - memory.shared
    return total


def agreement(theirs: Path, mine: Path, rows: int) -> tuple[float, bool]:
    """Mean difference in levels over some rows, and whether rows, texts and sizes are the same."""
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
        rendered = (one["prompt"], one["chosen"], one["rejected"])
        same = same and all(text in whole for text, whole in zip(texts, rendered, strict=True))
        images = [
            np.asarray(row["images"][0].convert("RGB"), dtype=np.int16) for row in (one, other)
        ]
        same = same and images[0].shape == images[1].shape
        if same:
            differences.append(float(np.abs(images[0] - images[1]).mean()))
    return statistics.mean(differences or [255.0]), same


def make_source(place: Path, rows: int) -> tuple[Path, int]:
    """A Parquet file of photos of many sizes, and the bytes that its images hold."""
    source = place / "photos.parquet"
    sides = [round(640 * (4000 / 640) ** (i / 27)) for i in range(28)]
    return source, write_rows(source, photos(sides), rows)


def speed_case(
    place: Path, source: Path, held: int, rows: int, rounds: int, name: str, side: int
) -> dict[str, Any]:
    """A case of one size limit: rates of both, bytes written, whether the results agree."""
    ways: dict[str, list[dict[str, Any]]] = {"article": [], "ours": []}
    for _ in range(rounds):
        for way, runs in ways.items():
            runs.append(measured(way, source, place / way, side))
    seconds = {way: statistics.median(run["seconds"] for run in runs) for way, runs in ways.items()}
    ratios = [
        theirs["seconds"] / mine["seconds"]
        for theirs, mine in zip(ways["article"], ways["ours"], strict=True)
    ]
    difference, same = agreement(place / "article" / "made", place / "ours" / "made", rows)
    written = {way: runs[0]["bytes"] / held for way, runs in ways.items()}
    small = side < 4000 or written["ours"] <= MAX_BYTES
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "agreement": difference,
        "passed": same and difference < 3 and small and statistics.median(ratios) >= MIN_RATIO,
        "same_rows_texts_and_sizes": same,
        "rows_per_s": {way: rows / value for way, value in seconds.items()},
        "whole_s": {
            way: statistics.median(run["whole_s"] for run in runs) for way, runs in ways.items()
        },
        "written": written,
        "rows": rows,
    }


def memory_case(place: Path) -> dict[str, Any]:
    """Ours on 1,000 and on 20,000 images of 640 pixels: peak memory."""
    images = photos([640] * 7)
    peaks = {}
    for rows in (1_000, 20_000):
        source = place / f"small-{rows}.parquet"
        write_rows(source, images, rows)
        peaks[rows] = measured("ours", source, place / "ours", 490)["peak_bytes"]
    ratio = peaks[20_000] / peaks[1_000]
    return {
        "name": "memory, 20,000 rows over 1,000",
        "ratio": ratio,
        "agreement": None,
        "passed": ratio <= MAX_MEMORY_RATIO,
        "peaks": peaks,
    }


def markdown(all_cases: list[dict[str, Any]]) -> str:
    """The dated report."""
    cases = [case for case in all_cases if "rows_per_s" in case]
    rows = "".join(
        f"| {case['name']} | {case['rows_per_s']['article']:.0f} | "
        f"{case['rows_per_s']['ours']:.0f} | **{case['ratio']:.1f}×** "
        f"| {case['whole_s']['article']:.0f} s | {case['whole_s']['ours']:.0f} s "
        f"| {case['written']['article']:.2f} | {case['written']['ours']:.2f} | "
        f"{case['agreement']:.2f} |\n"
        for case in cases
    )
    memory = "".join(
        f"Peak memory of all our processes: {case['peaks'][1_000] / 1e6:.0f} MB at 1,000 rows, "
        f"{case['peaks'][20_000] / 1e6:.0f} MB at 20,000 ({case['ratio']:.2f}×).\n"
        for case in all_cases[len(cases) :]
    )
    return (
        "# Preparing data: the article's `map` beside `vlmdpo prepare`\n\n"
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, "
        f"{versions('datasets', 'pillow', 'pyarrow', 'torch', 'transformers')}.\n"
        f"{cases[0]['rows']:,} rows, two processes each. "
        "Repeat with `python examples/benchmarks/prepare.py`, whose head says what is measured.\n\n"
        "| | article, rows/s | ours, rows/s | ratio | whole process, article | ours "
        "| bytes written / source, article | ours | mean difference in levels |\n"
        f"|---|---:|---:|---:|---:|---:|---:|---:|---:|\n{rows}\n{memory}"
    )


def main() -> None:
    """Run all cases and print them as a table, or as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--quick", action="store_true", help="300 rows, one round")
    parser.add_argument("--rows", type=int, help="1,500, or 300 with --quick")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --quick")
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
    rows = given.rows or (300 if given.quick else 1_500)
    rounds = given.rounds or (1 if given.quick else 3)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source, held = make_source(place, rows)
        measured_cases = [
            partial(speed_case, place, source, held, rows, rounds, *bound) for bound in BOUNDS
        ]
        all_cases = measure_each(
            measured_cases if given.quick else [*measured_cases, partial(memory_case, place)],
            show=lambda case: f"{case['name']}: {case['ratio']:.2f}×",
            markdown=given.markdown,
            report=markdown,
        )
    if given.json:
        print(json.dumps({"cases": all_cases}, indent=2))
        return
    cases = [case for case in all_cases if "rows_per_s" in case]
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
    for case in all_cases[len(cases) :]:
        table.add_row(case["name"], f"{case['ratio']:.2f}", "", "", "", str(case["passed"]))
    Console().print(table)


if __name__ == "__main__":
    main()
