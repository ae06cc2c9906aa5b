"""One training step of stock TRL beside the pair engine, in turns in the same process.

    python examples/benchmarks/train_step.py [--json] [--markdown FILE] [--plot FILE]
        [--cases llava ...]

Both take the same model and the same pairs. Models are small, with random weights, but in
proportion: image tokens, answer lengths, and the ratio of the vision tower's work to the language
model's are those of the real models, and are printed beside them. LoRA r=16 on the language model,
vision tower frozen, gradient checkpointing on in both. Batches are collated beforehand, so image
processing, which the engine halves, is not in the times. "1 epoch" computes the reference during
the step; "3 epochs" reads it from the cache after the first epoch. Both include its cost.

Ratios are computed per round, since a busy machine drifts between rounds, and their median counts.
A case passes if loss and metrics agree to 1e-4, and the ratios reach both their targets and 95% of
the ratio of counted FLOPs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import by_part, counted_flops, interleaved, medians, versions
from datasets import Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlmdpo.config import TrainConfig
from vlmdpo.data.pairs import Message, message
from vlmdpo.data.store import pair_features
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.memory.measure import measure_peak_bytes
from vlmdpo.models.inputs import take_host_only
from vlmdpo.tiny import random_models
from vlmdpo.training import activation_checkpointing
from vlmdpo.training.arguments import dpo_config, lora_config
from vlmdpo.training.make_trainer import make_trainer
from vlmdpo.training.trainer import PairTrainer


@dataclass(frozen=True)
class Shape:
    """One family at one size: the toy model, the image in pixels, token counts, and the targets.

    Attributes:
        real_vision_share: the real model's vision and connector FLOPs over its language model's, by
            the tokens of a stock row.
        wanted: required ratios over 1 and 3 epochs; None: only 95% of the counted ones.
        wanted_peak: the largest allowed share of stock TRL's peak memory.
    """

    name: str
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    image_size: int
    image: tuple[int, int]
    prompt: int
    real_vision_share: Callable[[float], float]
    wanted: tuple[float, float] | None
    wanted_at_equal_memory: float | None = None
    wanted_peak: float = 1.0
    answers: tuple[int, int] = (80, 80)
    more: dict[str, Any] = field(default_factory=dict)
    pairs: int = 2


def _share(
    patches: int, tower: float, layers: int, width: int, lm: float, extra: float = 0.0
) -> Callable[[float], float]:
    """Vision over language FLOPs of one row, by its tokens.

    2 × parameters × tokens, and 4 × tokens² × width × layers for attention.
    """
    vision = 2 * tower * patches + 4 * patches**2 * width * layers + extra
    return lambda tokens: vision / (2 * lm * tokens + 4 * tokens**2 * 4096 * 32)


_CPU = torch.device("cpu")
_LM = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.05,
}
_GQA = {**_LM, "num_key_value_heads": 1}
# Wider and less deep: otherwise attention would take a far larger share at 600 tokens than it does
# at 4,096 dimensions.
_WIDE = {
    **_LM,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def _tower(width: int, layers: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": 2,
    }


IDEFICS2 = Shape(
    name="Idefics2-8B, 640×480",
    family="idefics2",
    text={
        **_GQA,
        "num_hidden_layers": 16,
    },  # deep, so that the connector's share is as small as in the real model
    vision=_tower(72, 3, 200),
    image_size=368,
    image=(368, 272),
    prompt=94,
    real_vision_share=_share(1530, 0.413e9, 27, 1152, 6.98e9, extra=2 * 0.092e9 * 1530 + 1.1e11),
    wanted=(2.1, 2.4),
    wanted_at_equal_memory=3.0,
    more={"latents": 64, "perceiver": {"resampler_head_dim": 32}},
    pairs=8,
)
LLAVA = Shape(
    name="LLaVA-1.5-7B, 600-token prompt",
    family="llava",
    text=_WIDE,
    vision=_tower(112, 3, 256),
    image_size=192,
    image=(192, 192),
    prompt=600,
    real_vision_share=_share(577, 0.303e9, 24, 1024, 6.48e9),
    wanted=(1.75, 2.1),
    wanted_at_equal_memory=2.5,
    wanted_peak=0.65,
)
QWEN = Shape(
    name="Qwen2.5-VL-7B, 1 megapixel",
    family="qwen2_5_vl",
    text=_GQA,
    vision={
        "hidden_size": 80,
        "depth": 3,
        "intermediate_size": 384,
        "num_heads": 2,
        "fullatt_block_indexes": [2],
    },
    image_size=576,
    image=(576, 576),
    prompt=1330,
    real_vision_share=_share(5180, 0.632e9, 4, 1280, 6.53e9, extra=2 * 0.045e9 * 1295),
    wanted=(2.2, 2.6),
    wanted_at_equal_memory=3.0,
    pairs=1,
)
MIXED = (20, 250)
SHAPES = (
    IDEFICS2,
    LLAVA,
    QWEN,
    replace(
        IDEFICS2,
        name="Idefics2-8B, answers of 20–250",
        answers=MIXED,
        wanted=(2.0, 2.4),
        wanted_at_equal_memory=None,
        pairs=8,
    ),
    replace(
        LLAVA,
        name="LLaVA-1.5-7B, answers of 20–250",
        answers=MIXED,
        wanted=None,
        wanted_at_equal_memory=None,
        wanted_peak=1.0,
        pairs=4,
    ),
)


def rows_of(shape: Shape, prompt_letters: int) -> Dataset:
    """Random images and letters; a letter is a token."""
    rng = np.random.default_rng(0)
    shortest, longest = shape.answers

    def letters(count: int) -> str:
        return "".join(rng.choice(list("abcdefgh"), size=count))

    def answer() -> list[Message]:
        # The chat template closes an answer with two more tokens.
        return [message("assistant", letters(int(rng.integers(shortest, longest + 1)) - 2))]

    rows = [
        {
            "images": [
                Image.fromarray(
                    rng.integers(0, 255, (shape.image[1], shape.image[0], 3), dtype=np.uint8)
                )
            ],
            "prompt": [message("user", letters(prompt_letters), 1)],
            "chosen": answer(),
            "rejected": answer(),
        }
        for _ in range(shape.pairs)
    ]
    return Dataset.from_list(rows, features=pair_features())


def trainer_of(
    shape: Shape, rows: Dataset, engine: str, folder: Path, *, cached: bool = False
) -> PairTrainer:
    """Stock TRL's trainer or ours on the same toy model, with an adapter that is not zero."""
    model, processor = random_models.make(
        shape.family,
        text=shape.text,
        vision=shape.vision,
        image_size=shape.image_size,
        **shape.more,
    )
    settings = TrainConfig(
        engine=engine, lora_scope="language", per_device_train_batch_size=shape.pairs, device="cpu"
    )
    args = dpo_config(settings, folder, torch.device("cpu"))
    cache = ReferenceCache(folder, f"{engine}-{shape.pairs}") if cached else None
    trainer = make_trainer(
        engine=engine,
        model=model,
        reference_model=None,
        processor=processor,
        train_dataset=rows,
        args=args,
        lora_config=lora_config(settings, model),
        reference_cache=cache,
    )
    activation_checkpointing.enable(trainer.model)
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    trainer.model.train()
    return trainer


def stepper(trainer: PairTrainer, *, clear_cache: bool = False) -> Any:
    """One training step on the whole batch: forward, reference, loss, backward.

    Args:
        clear_cache: empty the reference cache before each step.
    """
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])

    def run() -> float:
        if clear_cache:
            trainer.reference_cache = ReferenceCache(Path(trainer.args.output_dir), "empty")
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
        fixed = probe.data_collator([dict(probe.train_dataset[0])])["pairs"][0][0]
        rows = rows_of(shape, shape.prompt - fixed + 8)
        stock = trainer_of(shape, rows, "stock", folder)
        ours = trainer_of(shape, rows, "shared", folder, cached=True)
        lengths = ours.data_collator([dict(row) for row in ours.train_dataset])["pairs"]
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
        rounds = interleaved(steps, repeats)
        parts = {step: by_part(steps[step]) for step in ("stock", "cached")}
        layers, free_peak = _free_layers(shape, rows, folder, peaks["stock"])
        kept = trainer_of(shape, rows, "shared", folder, cached=True)
        kept.checkpointed_layers = layers
        free = {
            "stock": steps["stock"],
            "first": stepper(kept, clear_cache=True),
            "cached": stepper(kept),
        }
        at_equal = medians([_ratios(seconds) for seconds in interleaved(free, repeats)])
    agreement = max(
        abs(losses["first"] - losses["stock"]),
        abs(losses["cached"] - losses["stock"]),
        *(
            abs(metrics[1][k] - v) / max(1.0, abs(v))
            for k, v in metrics[0].items()
            if k != "num_tokens"
        ),
    )
    wanted = dict(zip(("1 epoch", "3 epochs"), shape.wanted or (0, 0), strict=True))
    tokens = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths) / (
        2 * len(lengths)
    )
    ratios, counted = medians([_ratios(seconds) for seconds in rounds]), _ratios(flops)
    return {
        "name": shape.name,
        "lengths": lengths,
        "vision_share": {"toy": measured_share(stock), "real": shape.real_vision_share(tokens)},
        "pairs_per_s": {step: shape.pairs / value for step, value in medians(rounds).items()},
        "ratio": ratios["3 epochs"],
        "ratios": ratios,
        "counted": counted,
        "of_counted": {span: ratios[span] / counted[span] for span in ratios},
        "seconds_by_part": parts,
        "peak_bytes": {**peaks, "fewer layers": free_peak},
        "peak_ratio": peaks["first"] / peaks["stock"],
        "at_equal_memory": {
            **at_equal,
            "checkpointed_layers": layers,
            "layers": shape.text["num_hidden_layers"],
        },
        "wanted": wanted,
        "agreement": agreement,
        "passed": agreement < 1e-4
        and all(ratios[span] >= least for span, least in wanted.items())
        and all(ratios[span] >= 0.95 * counted[span] for span in ratios)
        and peaks["first"] <= shape.wanted_peak * peaks["stock"]
        and at_equal["3 epochs"] >= (shape.wanted_at_equal_memory or 0),
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
        "# One training step: stock TRL beside the pair engine",
        "",
        f"{datetime.date.today()}, {versions('torch', 'transformers', 'trl', 'peft')}, 2 CPU "
        "threads, float32, medians of",
        f"{repeats} interleaved rounds. Repeat with `python examples/benchmarks/train_step.py`, "
        "whose head says what is measured.",
        "",
        "| shape | pairs/s stock → ours (cached) | 1 epoch | 3 epochs | cache on disk | counted "
        "FLOPs 1 / 3 / disk "
        "| share of counted | peak, ours / stock | agreement |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in cases:
        speed, r, f = c["pairs_per_s"], c["ratios"], c["counted"]
        part = min(c["of_counted"].values())
        lines.append(
            f"| {c['name']} | {speed['stock']:.2f} → {speed['first']:.2f} ({speed['cached']:.2f}) "
            f"| {r['1 epoch']:.2f}× "
            f"| {r['3 epochs']:.2f}× | {r['cached']:.2f}× | {f['1 epoch']:.2f} / "
            f"{f['3 epochs']:.2f} / {f['cached']:.2f} "
            f"| ≥ {100 * part:.0f}% | {c['peak_ratio']:.2f} | {c['agreement']:.0e} |"
        )
    lines += [
        "",
        "At equal peak memory, ours uses the memory that sharing frees to keep activations:",
        "",
        "| shape | layers checkpointed | peak, MB stock / ours | 1 epoch | 3 epochs | cache on "
        "disk |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in cases:
        e, (stock, ours) = (
            c["at_equal_memory"],
            (c["peak_bytes"][name] / 1e6 for name in ("stock", "fewer layers")),
        )
        lines.append(
            f"| {c['name']} | {e['checkpointed_layers']} of {e['layers']} | {stock:.0f} / "
            f"{ours:.0f} "
            f"| {e['1 epoch']:.2f}× | {e['3 epochs']:.2f}× | {e['cached']:.2f}× |"
        )
    lines += [
        "",
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
    lines += [
        "",
        "Forward FLOPs of vision and connector over language model, in one stock row (toy / real):",
        "",
    ]
    lines += [
        f"- {c['name']}: {c['vision_share']['toy']:.3f} / {c['vision_share']['real']:.3f}"
        for c in cases
    ]
    return "\n".join(lines) + "\n"


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", help="only shapes whose name contains one of these, in any case"
    )
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    wanted = [
        s
        for s in SHAPES
        if not options.cases or any(word.lower() in s.name.lower() for word in options.cases)
    ]
    cases = [measure(shape, options.repeats) for shape in wanted]
    if options.markdown:
        options.markdown.write_text(markdown(cases, options.repeats), encoding="utf-8")
    if options.plot:
        plot(cases, options.plot)
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))
        return
    table = Table(title="stock TRL ÷ ours, and the counted-FLOP limit")
    for column in (
        "shape",
        "1 epoch",
        "3 epochs",
        "cache on disk",
        "peak",
        "equal memory, 3 epochs",
        "agreement",
        "passed",
    ):
        table.add_column(column)
    for c in cases:
        table.add_row(
            c["name"],
            *(
                f"{c['ratios'][s]:.2f}× of {c['counted'][s]:.2f}"
                for s in ("1 epoch", "3 epochs", "cached")
            ),
            f"{c['peak_ratio']:.2f}",
            f"{c['at_equal_memory']['3 epochs']:.2f}× "
            f"({c['at_equal_memory']['checkpointed_layers']} layers)",
            f"{c['agreement']:.0e}",
            "yes" if c["passed"] else "NO",
        )
    Console(width=150).print(table)
    for c in cases:
        share = c["vision_share"]
        print(
            f"{c['name']}: vision over language FLOPs {share['toy']:.3f} (real "
            f"{share['real']:.3f}); lengths {c['lengths']}"
        )


if __name__ == "__main__":
    main()
