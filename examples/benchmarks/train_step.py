"""One training step of stock TRL beside the shared engine, in turns in the same process.

    python examples/benchmarks/train_step.py [--quick] [--json] [--markdown FILE] [--plot FILE]
        [--cases llava ...]

Both take the same model and the same pairs. Models are small, with random weights, but in
proportion: image tokens, answer lengths, and the ratio of the vision tower's work to the language
model's are those of the real models, and are printed beside them. LoRA r=16 on the language model,
vision tower frozen, gradient checkpointing on in both. Batches are collated beforehand, so image
processing is not in the times. "1 epoch" computes the reference during the step; "3 epochs" reads
it from the cache after the first epoch. Both include its cost.

Rows come as data has them: one pair an image; two pairs of a prompt, with four answers (RLAIF-V);
five pairs of four answers (VLFeedback); three questions about an image.

Ratios are computed per round, since a busy machine drifts between rounds, and their median counts.
Beside those of wall time stand those of CPU time, which other processes disturb less; how busy the
machine was with them is printed. A case passes if loss and metrics agree to 1e-4, and the ratios of
wall time reach both their targets and 93% of the ratio of counted FLOPs. Each shape is printed, and
written to the files, when it is done; Ctrl-C keeps what there is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _threads  # noqa: F401 - before torch
import torch
from _cases import measure_each
from _measure import by_part, counted_flops, medians, timed, versions
from _train_shapes import QUICK, SHAPES, Shape, rows_of, trainer_of
from datasets import Dataset
from rich.console import Group
from rich.table import Table

from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.memory.measure import measure_peak_bytes
from vlmdpo.models.inputs import take_host_only
from vlmdpo.training import activation_checkpointing
from vlmdpo.training.trainer import PairTrainer

QUICK_ROUNDS = 3
WANTED_OF_COUNTED = 0.93
_CPU = torch.device("cpu")


def stepper(trainer: PairTrainer, *, clear_cache: bool = False) -> Any:
    """One training step on the whole batch: forward, reference, loss, backward.

    Args:
        clear_cache: empty the reference cache before each step.
    """
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    cache = trainer.reference_cache

    def run() -> float:
        if clear_cache:
            trainer.reference_cache = ReferenceCache(cache.path.parent.parent, cache.key)
        for parameter in trainer.model.parameters():
            parameter.grad = None
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.item()

    return run


def measured_share(trainer: PairTrainer) -> float:
    """The toy's forward FLOPs of vision over language model, one pair of stock rows at a time."""
    backbone = trainer.model.get_base_model().base_model
    vision = whole = 0
    for row in trainer.train_dataset:
        batch = trainer.data_collator([dict(row)])
        take_host_only(batch)
        batch.pop("completion_mask")
        kwargs = {
            k: batch[k]
            for k in ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
            if k in batch
        }
        with torch.no_grad():
            vision += counted_flops(lambda kwargs=kwargs: backbone.get_image_features(**kwargs))
            whole += counted_flops(lambda batch=batch: backbone(**batch, use_cache=False))
    return vision / (whole - vision)


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """One case: medians, ratios, counted FLOPs, peaks, agreement."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        probe = trainer_of(shape, rows_of(shape, 8), "shared", folder)
        batch = probe.data_collator([dict(probe.train_dataset[0])])
        rows = rows_of(shape, shape.prompt - batch["forest"].lengths[0] + 8)
        stock = trainer_of(shape, rows, "stock", folder)
        ours = trainer_of(shape, rows, "shared", folder, cached=True)
        forest = ours.data_collator([dict(row) for row in ours.train_dataset])["forest"]
        steps = {
            "stock": stepper(stock),
            "first": stepper(ours, clear_cache=True),
            "cached": stepper(ours),
        }
        losses = {step: run() for step, run in steps.items()}
        metrics = [{k: v[-1] for k, v in t._metrics["train"].items()} for t in (stock, ours)]
        flops = {step: counted_flops(run) for step, run in steps.items()}
        weights = {id(t): list(t.model.parameters()) for t in (stock, ours)}
        peaks = {
            name: measure_peak_bytes(steps[name], weights[id(t)], _CPU)
            for name, t in (("stock", stock), ("first", ours))
        }
        rounds = timed(steps, repeats)
        parts = {step: by_part(steps[step]) for step in ("stock", "cached")}
        at_equal = None
        if shape.at_equal_memory and repeats > QUICK_ROUNDS:
            at_equal = at_equal_memory(shape, rows, folder, steps["stock"], peaks, repeats)
        share = measured_share(stock)
    agreement = _agreement(losses, *metrics)
    tokens = forest.stock_tokens / (2 * shape.pairs)
    ratios = medians([_ratios(seconds) for seconds in rounds.wall])
    counted = _ratios(flops)
    case = {
        "name": shape.name,
        "pairs": shape.pairs,
        "tokens": {"stock": forest.stock_tokens, "run": forest.slots},
        "vision_share": {"toy": share, "real": shape.real_vision_share(tokens)},
        "pairs_per_s": {step: shape.pairs / s for step, s in medians(rounds.wall).items()},
        "ratio": ratios["3 epochs"],
        "ratios": ratios,
        "cpu_ratios": medians([_ratios(seconds) for seconds in rounds.cpu]),
        "others_busy": rounds.others,
        "counted": counted,
        "of_counted": {span: ratios[span] / counted[span] for span in ratios},
        "seconds_by_part": parts,
        "peak_bytes": peaks,
        "peak_ratio": peaks["first"] / peaks["stock"],
        "at_equal_memory": at_equal,
        "wanted": dict(zip(("1 epoch", "3 epochs"), shape.wanted or (0, 0), strict=True)),
        "agreement": agreement,
    }
    return {**case, "passed": _passed(shape, case)}


def _agreement(losses: dict[str, float], stock: dict[str, float], ours: dict[str, float]) -> float:
    """The largest difference of losses and metrics, relative where they are large."""
    differences = [abs(losses[step] - losses["stock"]) for step in ("first", "cached")]
    differences += [
        abs(ours[name] - value) / max(1.0, abs(value))
        for name, value in stock.items()
        if name != "num_tokens"
    ]
    return max(differences)


def _passed(shape: Shape, case: dict[str, Any]) -> bool:
    at_equal = case["at_equal_memory"]
    return bool(
        case["agreement"] < 1e-4
        and all(case["ratios"][span] >= least for span, least in case["wanted"].items())
        and min(case["of_counted"].values()) >= WANTED_OF_COUNTED
        and case["peak_ratio"] <= shape.wanted_peak
        and (at_equal is None or at_equal["3 epochs"] >= (shape.wanted_at_equal_memory or 0))
    )


def at_equal_memory(
    shape: Shape,
    rows: Dataset,
    folder: Path,
    stock: Callable[[], float],
    peaks: dict[str, int],
    repeats: int,
) -> dict[str, Any]:
    """Ratios where ours keeps the activations of as many layers as stock's memory has room for."""
    layers, free_peak = _free_layers(shape, rows, folder, peaks["stock"])
    kept = trainer_of(shape, rows, "shared", folder, cached=True)
    kept.checkpointed_layers = layers
    steps = {"stock": stock, "first": stepper(kept, clear_cache=True), "cached": stepper(kept)}
    return {
        **medians([_ratios(seconds) for seconds in timed(steps, repeats).wall]),
        "checkpointed_layers": layers,
        "layers": shape.text["num_hidden_layers"],
        "peak_bytes": free_peak,
    }


def _ratios(cost: dict[str, float]) -> dict[str, float]:
    return {
        "1 epoch": cost["stock"] / cost["first"],
        "3 epochs": 3 * cost["stock"] / (cost["first"] + 2 * cost["cached"]),
        "cached": cost["stock"] / cost["cached"],
    }


def _free_layers(shape: Shape, rows: Dataset, folder: Path, budget: int) -> tuple[int, int]:
    """The fewest language layers to checkpoint at a peak within `budget`, and that peak."""
    trainer = trainer_of(shape, rows, "shared", folder)
    weights = list(trainer.model.parameters())
    run = stepper(trainer)
    for layers in range(shape.text["num_hidden_layers"] + 1):
        activation_checkpointing.enable(trainer.model)
        trainer.checkpointed_layers = layers
        peak = measure_peak_bytes(run, weights, _CPU)
        if peak <= budget:
            break
    return layers, peak


def markdown(cases: list[dict[str, Any]], repeats: int) -> str:
    """The dated report."""
    lines = [
        "# One training step: stock TRL beside the shared engine",
        "",
        f"{datetime.date.today()}, {versions('torch', 'transformers', 'trl', 'peft')}, 2 CPU "
        "threads, float32, medians of",
        f"{repeats} interleaved rounds. Repeat with `python examples/benchmarks/train_step.py`, "
        "whose head says what is measured.",
        "",
        "| shape | pairs/s stock → ours (cached) | 1 epoch (CPU time) | 3 epochs (CPU time) | "
        "cache on disk | counted FLOPs 1 / 3 / disk | share of counted | peak, ours / stock | "
        "others busy | agreement |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in cases:
        speed, r, f, cpu = c["pairs_per_s"], c["ratios"], c["counted"], c["cpu_ratios"]
        part = min(c["of_counted"].values())
        lines.append(
            f"| {c['name']} | {speed['stock']:.2f} → {speed['first']:.2f} ({speed['cached']:.2f}) "
            f"| {r['1 epoch']:.2f}× ({cpu['1 epoch']:.2f}×) "
            f"| {r['3 epochs']:.2f}× ({cpu['3 epochs']:.2f}×) | {r['cached']:.2f}× "
            f"| {f['1 epoch']:.2f} / {f['3 epochs']:.2f} / {f['cached']:.2f} "
            f"| ≥ {100 * part:.0f}% | {c['peak_ratio']:.2f} | {_busy(c)} | {c['agreement']:.0e} |"
        )
    lines += ["", *_equal_memory_lines(cases), *_parts_lines(cases)]
    lines += [
        "",
        "Forward FLOPs of vision and connector over language model, in one stock row (toy / real), "
        "and tokens of a step (stock / ours):",
        "",
    ]
    lines += [
        f"- {c['name']}: {c['vision_share']['toy']:.3f} / {c['vision_share']['real']:.3f}, "
        f"{c['tokens']['stock']:,} / {c['tokens']['run']:,}"
        for c in cases
    ]
    return "\n".join(lines) + "\n"


def _equal_memory_lines(cases: list[dict[str, Any]]) -> list[str]:
    measured = [c for c in cases if c["at_equal_memory"] is not None]
    if not measured:
        return []
    lines = [
        "At equal peak memory, ours uses the memory that sharing frees to keep activations:",
        "",
        "| shape | layers checkpointed | peak, MB stock / ours | 1 epoch | 3 epochs | cache on "
        "disk |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in measured:
        e = c["at_equal_memory"]
        lines.append(
            f"| {c['name']} | {e['checkpointed_layers']} of {e['layers']} "
            f"| {c['peak_bytes']['stock'] / 1e6:.0f} / {e['peak_bytes'] / 1e6:.0f} "
            f"| {e['1 epoch']:.2f}× | {e['3 epochs']:.2f}× | {e['cached']:.2f}× |"
        )
    return [*lines, ""]


def _parts_lines(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Time of one profiled step by operator, in seconds, stock / ours with the cache (× is "
        "their ratio):",
        "",
        "| shape | matrix products | attention | the rest |",
        "| --- | --- | --- | --- |",
    ]
    for c in cases:
        stock, ours = c["seconds_by_part"]["stock"], c["seconds_by_part"]["cached"]
        cells = " | ".join(
            f"{stock[part]:.2f} / {ours[part]:.2f} ({stock[part] / ours[part]:.2f}×)"
            for part in stock
        )
        lines.append(f"| {c['name']} | {cells} |")
    return lines


def _busy(case: dict[str, Any]) -> str:
    """How busy the machine was with other processes."""
    return "?" if case["others_busy"] is None else f"{100 * case['others_busy']:.0f}%"


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Bars of the measured ratios, with the counted-FLOP limit as a mark on each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    spans = ("1 epoch", "3 epochs", "cached")
    for i, span in enumerate(spans):
        places = [n + (i - 1) * 0.27 for n in range(len(cases))]
        axes.bar(
            places,
            [c["ratios"][span] for c in cases],
            width=0.25,
            label=span if i < 2 else "cache on disk",
        )
        limits = [c["counted"][span] for c in cases]
        axes.scatter(
            places,
            limits,
            marker="_",
            s=500,
            color="black",
            label="counted FLOPs" if i == 0 else None,
            zorder=3,
        )
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xticks(range(len(cases)), [c["name"].replace(", ", "\n") for c in cases])
    axes.set_ylabel("× stock TRL, pairs/s")
    axes.set_title("Training step against stock TRL 1.16 (checkpointing on in both)")
    axes.legend(ncols=4, loc="upper center")
    axes.set_ylim(0, 1.25 * max(max(c["counted"].values()) for c in cases))
    figure.savefig(path, dpi=120)


def shown(case: dict[str, Any]) -> Group:
    """A table about one case, and a line below."""
    table = Table(title=case["name"], title_justify="left")
    for column in ("", "1 epoch", "3 epochs", "cache on disk"):
        table.add_column(column)
    for name, values in (
        ("wall time, stock ÷ ours", case["ratios"]),
        ("CPU time", case["cpu_ratios"]),
        ("counted FLOPs", case["counted"]),
        ("wanted", case["wanted"]),
    ):
        spans = ("1 epoch", "3 epochs", "cached")
        table.add_row(name, *(f"{values[s]:.2f}×" if values.get(s) else "" for s in spans))
    tokens, share = case["tokens"], case["vision_share"]
    return Group(
        table,
        f"{tokens['stock']:,} tokens in stock rows, {tokens['run']:,} run; peak "
        f"{case['peak_ratio']:.2f}; agreement {case['agreement']:.0e}; vision over language FLOPs "
        f"{share['toy']:.3f} (real {share['real']:.3f}); other processes took {_busy(case)} of the "
        f"machine; {'passed' if case['passed'] else 'NOT passed'}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", help="only shapes whose name contains one of these, in any case"
    )
    parser.add_argument("--quick", action="store_true", help="three shapes, three rounds")
    parser.add_argument("--repeats", type=int, help="measured rounds; 7, or 3 with --quick")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    repeats = options.repeats or (QUICK_ROUNDS if options.quick else 7)
    words = [word.lower() for word in options.cases or [""]]
    cases = measure_each(
        [
            partial(measure, shape, repeats)
            for shape in (QUICK if options.quick else SHAPES)
            if any(word in shape.name.lower() for word in words)
        ],
        show=shown,
        markdown=options.markdown,
        report=lambda done: markdown(done, repeats),
    )
    if options.plot and cases:
        plot(cases, options.plot)
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))
    if not all(case["passed"] for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
