"""The GPU check's results as a page, as a table, and as the cases that all benchmarks report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_HEAD = """# The GPU check

What only a GPU can show, measured by `python examples/benchmarks/gpu.py`, whose head says how.
Architectures are of real size with random weights; nothing is downloaded.
"""
_NOT_MEASURED = """
**Not measured.** No GPU was at hand: no speed, peak or agreement in these pages was seen on one.
To measure:

    python examples/benchmarks/gpu.py --output docs/benchmarks/gpu.json
    python examples/benchmarks/gpu.py --page docs/benchmarks/gpu.md
"""
_ARMS = {"stock": "stock TRL", "first": "ours, first epoch", "cached": "ours, reference cached"}
Rows = list[list[str]]


def _done(data: dict[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """The results of the items whose names begin so."""
    return {
        name: entry["result"]
        for name, entry in data["items"].items()
        if name.startswith(prefix) and entry["status"] == "done"
    }


def cases(data: dict[str, Any]) -> list[dict[str, Any]]:
    """[{name, ratio, agreement, passed}] of all that was compared.

    `ratio` is of speeds (ours over stock's) or memory (estimated over measured). `agreement` is an
    error: nats per token, of a loss, or of a gradient; of memory, the ratio less one; of answers,
    how many are wrong.
    """
    found = []

    def add(name: str, ratio: float | None, agreement: float | None, passed: bool | None) -> None:
        found.append({"name": name, "ratio": ratio, "agreement": agreement, "passed": passed})

    for name, result in _done(data, "tiny-").items():
        for family, one in result["families"].items():
            if "unsupported" not in one:
                add(f"{name} {family}", None, one.get("error"), bool(one.get("passed")))
    for name, result in _done(data, "step-").items():
        add(name, result["ratio"]["1 epoch"], result["agreement"]["loss_error"], result["passed"])
    for name, result in _done(data, "memory-").items():
        ratio = result["ratio"]
        add(name, ratio, None if ratio is None else ratio - 1, result["passed"])
    for name, result in _done(data, "evaluation").items():
        add(name, result["ratio"]["ours"], result["wrong"], result["passed"])
    for name, result in _done(data, "auto-batch").items():
        apart = result["gradient_difference"]["whole and after running out"]
        add(name, None, apart, result["passed"])
    return found


def markdown(data: dict[str, Any] | None) -> str:
    """The page; without results it says that nothing was measured."""
    if data is None:
        return _HEAD + _NOT_MEASURED
    sections = [
        *_environment(data),
        *(f"- {note}" for note in data.get("notes", [])),
        *_tiny(data),
        *_steps(data),
        *_memory(data),
        *_evaluation(data),
        *_auto_batch(data),
        *_profile(data),
        *_missing(data),
    ]
    if data["toy"]:
        sections.insert(0, "**A toy run on a CPU: its figures say nothing about a GPU.**")
    return _HEAD + "\n" + "\n\n".join(sections) + "\n"


def _table(columns: list[str], rows: Rows) -> str:
    """A table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _gb(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e9:.2f}"


def _yes(passed: bool | None) -> str:
    return {None: "–", True: "yes", False: "**no**"}[passed]


def _environment(data: dict[str, Any]) -> list[str]:
    sections = []
    for found in _done(data, "environment").values():
        packages = ", ".join(
            f"{name} {version}" for name, version in found["versions"].items() if version
        )
        absent = ", ".join(name for name, version in found["versions"].items() if not version)
        memory = f", {_gb(found['total_bytes'])} GB" if found["total_bytes"] else ""
        sheet = found["datasheet_tflops"]
        sections.append(
            f"{found['device']}{memory}, driver {found['driver'] or '–'}, CUDA "
            f"{found['cuda'] or '–'}, Python {found['python']}, {packages}. Not installed: "
            f"{absent or 'none'}.\n"
            f"A plain bf16 matrix product of 8192³ reaches {found['matmul_tflops']:.0f} TFLOP/s"
            + (f"; the data sheet says {sheet}." if sheet else ".")
        )
    return sections


def _tiny(data: dict[str, Any]) -> list[str]:
    sections = []
    for result in _done(data, "tiny-").values():
        rows: Rows = []
        for family, one in result["families"].items():
            if "self_check" not in one:
                why = "not supported" if "unsupported" in one else "**failed**"
                rows.append([family, why, *["–"] * 6])
                continue
            agreed, exact = one["agreement"], one.get("error_from_float32")
            rows.append(
                [
                    family,
                    _yes(one["self_check"]["passed"]),
                    f"{one['error']:.1e}",
                    f"{max(one['noise'].values()):.1e}",
                    f"{exact['ours']:.1e} / {exact['stock']:.1e}" if exact else "–",
                    f"{agreed['loss_error']:.1e} / {agreed['loss_noise']:.1e}",
                    f"{agreed['gradient_error']:.1e} / {agreed['gradient_noise']:.1e}",
                    _yes(one["passed"]),
                ]
            )
        sections += [
            f"## Exactness, tiny models, {result['attention']}",
            "Log-probs in nats per token. Noise: stock rows with more padding or one more "
            "rounding, against stock rows.",
            _table(
                [
                    *("family", "self-check", "ours − stock", "noise"),
                    "from float32, ours / stock",
                    *("loss, error / noise", "gradient, error / noise", "passed"),
                ],
                rows,
            ),
        ]
    return sections


def _steps(data: dict[str, Any]) -> list[str]:
    results = _done(data, "step-")
    if not results:
        return []
    speed: Rows = []
    agreement: Rows = []
    for result in results.values():
        width, height = result["image"]
        setting = f"{result['model']}, {width}×{height}, {result['pairs']} pairs"
        peaks = result["peak_bytes"] or {}
        for arm, label in _ARMS.items():
            limit = result["matmul_flops_per_s"]
            ratio = {"stock": 1.0, "first": result["ratio"]["1 epoch"]}
            counted = {"stock": 1.0, "first": result["counted_ratio"]["1 epoch"]}
            speed.append(
                [
                    f"{setting}: {label}",
                    f"{result['pairs_per_s'][arm]:.2f}",
                    f"{ratio.get(arm, result['ratio']['cached']):.2f}×",
                    f"{counted.get(arm, result['counted_ratio']['cached']):.2f}×",
                    f"{result['one_prompt_pairs_per_s'][arm]:.2f}",
                    f"{result['stock_tokens_per_s'][arm]:,.0f}",
                    f"{result['model_flops_per_s'][arm] / 1e12:.0f} "
                    f"({100 * result['model_flops_per_s'][arm] / limit:.0f}%)",
                    f"{result['executed_flops_per_s'][arm] / 1e12:.0f} "
                    f"({100 * result['executed_flops_per_s'][arm] / limit:.0f}%)",
                    _gb(peaks[arm]["allocated"]) if peaks else "–",
                ]
            )
        exact, agreed = result["exactness"], result["agreement"]
        agreement.append(
            [
                setting,
                _yes(exact["self_check"]["passed"]),
                f"{exact['error']:.1e} / {max(exact['noise'].values()):.1e}",
                f"{agreed['loss_error']:.1e} / {agreed['loss_noise']:.1e}",
                f"{agreed['gradient_error']:.1e} / {agreed['gradient_noise']:.1e}",
                _yes(result["passed"]),
            ]
        )
    checks = [
        f"- {result['model']} at {result['image'][0]} px: "
        f"{result['exactness']['self_check']['seen']}"
        for result in results.values()
    ]
    return [
        "## Training steps",
        "LoRA r=16 on all linear layers, gradient checkpointing, bf16; medians of interleaved "
        "rounds. Tokens are those\nof stock TRL's rows, whoever computed them. Model TFLOP/s "
        "count each forward pass once and the backward pass once more\n(frozen weights have no "
        "gradients), without recomputation; executed ones all that PyTorch's counter saw. In "
        "brackets,\ntheir share of what a plain matrix product reaches in the same minute.",
        _table(
            [
                *("setting", "pairs/s", "ratio", "counted FLOPs", "pairs/s, one prompt"),
                *("tokens/s", "model TFLOP/s", "executed TFLOP/s", "peak, GB"),
            ],
            speed,
        ),
        "Agreement, beside the noise of stock rows with more padding or one more rounding:",
        _table(
            [
                *("setting", "self-check", "log-probs, error / noise", "loss, error / noise"),
                *("gradient, error / noise", "passed"),
            ],
            agreement,
        ),
        "The self-check's own words:\n\n" + "\n".join(checks),
    ]


def _memory(data: dict[str, Any]) -> list[str]:
    results = _done(data, "memory-")
    if not results:
        return []
    rows: Rows = []
    for name, result in results.items():
        peak = result["peak_bytes"] or {}
        ratio = result["ratio"]
        rows.append(
            [
                f"{name.removeprefix('memory-')}, {result['options']['image_size']}",
                _gb(result.get("estimated_bytes")),
                _gb(peak.get("allocated")),
                "–" if ratio is None else f"{100 * (ratio - 1):+.1f}%",
                _gb(peak.get("reserved")),
                _gb(result.get("outside_allocator_bytes")),
            ]
        )
    return [
        "## Memory",
        "Peak of the second optimizer step in GB, by `vlmdpo estimate-memory` and by PyTorch's "
        "allocator. Reserved: what it took\nfrom the driver, with fragmentation. Outside: context "
        "and libraries.",
        _table(
            ["setting", "estimated", "allocated", "difference", "reserved", "outside"],
            rows,
        ),
    ]


def _evaluation(data: dict[str, Any]) -> list[str]:
    sections = []
    for result in _done(data, "evaluation").values():
        rows = [
            [
                way,
                f"{result['questions_per_s'][way]:.1f}",
                f"{result['ratio'][way]:.2f}×",
                str(result["differing"][way]),
            ]
            for way in result["questions_per_s"]
        ]
        sections += [
            "## Questions",
            f"{result['model']}, {result['questions']} questions about {result['images']} images, "
            f"answers of {result['answer_tokens']} tokens, image\nprocessing included. Of the "
            "answers that differ from those of one `generate` a question, "
            f"{result['near_ties']} are near ties; wrong: {result['wrong']}.",
            _table(["way", "questions/s", "ratio", "answers that differ"], rows),
        ]
    return sections


def _auto_batch(data: dict[str, Any]) -> list[str]:
    sections = []
    for result in _done(data, "auto-batch").values():
        apart, losses = result["gradient_difference"], result["loss"]
        how = (
            f"{_gb(result['ballast_bytes'])} GB were taken away first"
            if result["real"]
            else "pretended, on a CPU"
        )
        sections += [
            "## Running out of memory",
            f"{result['model']}, a batch of {result['rows']} pairs with `--auto-batch-size` "
            f"({how}): computed in {result['parts']} parts.\nLoss {losses['whole']:.4f} in one "
            f"piece with enough memory, {losses['after running out']:.4f} after running out; "
            "gradients differ by\n"
            f"{apart['whole and after running out']:.1e}, and by "
            f"{apart['whole and two halves']:.1e} between one piece and two halves with enough "
            f"memory. Memory is free again: {_yes(result['freed'])}.",
        ]
    return sections


def _profile(data: dict[str, Any]) -> list[str]:
    sections = []
    for result in _done(data, "profile").values():
        arms = {arm: result[arm] for arm in ("stock", "first")}
        groups = sorted(
            {group for arm in arms.values() for group in arm["seconds_by_group"]},
            key=lambda group: -arms["first"]["seconds_by_group"].get(group, 0),
        )
        rows = [
            [group, *(f"{a['seconds_by_group'].get(group, 0):.3f}" for a in arms.values())]
            for group in groups
        ]
        rows += [
            ["no kernel runs", *(f"{a['seconds'] - a['busy_seconds']:.3f}" for a in arms.values())],
            ["the whole step", *(f"{a['seconds']:.3f}" for a in arms.values())],
        ]
        syncs = sorted({name for arm in arms.values() for name in arm["host_syncs"]})
        rows += [
            [f"{name}, count", *(str(a["host_syncs"].get(name, 0)) for a in arms.values())]
            for name in syncs
        ]
        top = [
            [
                f"`{kernel['name'][:70].replace('|', '/')}`",
                kernel["group"],
                f"{kernel['seconds']:.3f}",
                str(kernel["count"]),
            ]
            for kernel in arms["first"]["top"][:12]
        ]
        sections += [
            "## One step, by kernel",
            f"{result['model']}, seconds; the profiler slows the host down.",
            _table(["kind of kernel", *(_ARMS[arm] for arm in arms)], rows),
            "Ours, the kernels that take most:",
            _table(["kernel", "kind", "seconds", "count"], top),
        ]
    return sections


def _missing(data: dict[str, Any]) -> list[str]:
    others = [
        f"- {name}: {entry['status']}, {entry['error']}"
        for name, entry in data["items"].items()
        if entry["status"] != "done"
    ]
    return ["## Without a result", "\n".join(others)] if others else []


def headline(name: str, result: dict[str, Any]) -> str:
    """An item's result in a few words."""
    if name == "environment":
        return f"{result['device']}, matrix products {result['matmul_tflops']:.0f} TFLOP/s"
    if name.startswith("tiny-"):
        families = result["families"].values()
        passed = sum(bool(one.get("passed")) for one in families)
        unsupported = sum("unsupported" in one for one in families)
        return f"{passed} of {len(families)} families agree, {unsupported} not supported"
    if name.startswith("step-"):
        ratio, speed = result["ratio"], result["pairs_per_s"]
        return (
            f"{speed['stock']:.2f} → {speed['first']:.2f} pairs/s ({ratio['1 epoch']:.2f}×, cached "
            f"{ratio['cached']:.2f}×), loss error {result['agreement']['loss_error']:.1e}"
        )
    if name.startswith("memory-"):
        peak = (result["peak_bytes"] or {}).get("allocated")
        estimated = result.get("estimated_bytes")
        return f"estimated {_gb(estimated)} GB, measured {_gb(peak)} GB"
    if name == "evaluation":
        return f"{result['ratio']['ours']:.1f}× one at a time, {result['wrong']} wrong answers"
    if name == "auto-batch":
        return f"{result['parts']} parts, memory free again: {_yes(result['freed'])}"
    return f"kernels busy {100 * result['first']['busy_share']:.0f}% of a step of ours"


def show(data: dict[str, Any]) -> None:
    """Print a table of all results."""
    table = Table(title="the GPU check" + (", toy run on the CPU" if data["toy"] else ""))
    for column in ("item", "seconds", "result"):
        table.add_column(column)
    for name, entry in data["items"].items():
        done = entry["status"] == "done"
        text = headline(name, entry["result"]) if done else f"{entry['status']}: {entry['error']}"
        table.add_row(name, f"{entry['seconds']:.1f}", text)
    console = Console(width=150)
    console.print(table)
    failed = [name for name, entry in data["items"].items() if entry["status"] == "failed"]
    failed += [case["name"] for case in cases(data) if case["passed"] is False]
    console.print(f"not passed: {', '.join(failed)}" if failed else "all comparisons passed")
