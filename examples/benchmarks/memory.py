"""Estimated memory beside measured: the simulated step, and PyTorch's allocator in a real run.

    python examples/benchmarks/memory.py [--json] [--markdown FILE] [--cases llava ...]

Each case trains a small real model for two optimizer steps on the CPU, through the trainer's own
`train()`, while the profiler records every allocation and release of PyTorch's allocator; the
highest total above what was allocated before is the measured peak. The estimator gets the
architecture, the settings and the rows' lengths, nothing of the run. A case passes if the two
differ by less than 0.5%. What only a GPU has (context, workspaces, fragmentation) is not measured.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _threads  # noqa: F401 - before torch
import torch
from _cases import measure_each
from _measure import versions
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText

from vlmdpo.config import TrainConfig
from vlmdpo.data.groups import row_groups
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.memory.architecture import Architecture
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.tiny import random_models
from vlmdpo.training.arguments import dpo_config, lora_config
from vlmdpo.training.make_trainer import make_trainer
from vlmdpo.training.prefill import fill_reference_cache
from vlmdpo.training.simulate import simulate
from vlmdpo.training.synthetic_rows import Workload, synthetic_rows
from vlmdpo.training.trainer import PairTrainer

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
}
MAX_DIFFERENCE = 0.005
STEPS = 2  # the first makes the optimizer's states, the second peaks beside them


@dataclass(frozen=True)
class Case:
    """One setting."""

    family: str
    engine: str = "shared"
    lora: bool = True
    checkpointing: bool = False
    batch: int = 2
    accumulation: int = 1
    answers: tuple[int, int] = (60, 40)
    cached: bool = True
    dtype: str = "float32"
    bf16: bool = False
    pairs_per_prompt: int = 1

    @property
    def name(self) -> str:
        how = [
            self.family,
            self.engine,
            "LoRA" if self.lora else "full",
            f"batch {self.batch} × {self.accumulation}",
        ]
        how += (
            ["checkpointing"] * self.checkpointing
            + ["bf16 autocast"] * self.bf16
            + ["no cache"] * (not self.cached)
            + [f"{self.pairs_per_prompt} pairs a prompt"] * (self.pairs_per_prompt > 1)
        )
        return ", ".join(how)


CASES = (
    Case("llava"),
    Case("llava", engine="stock"),
    Case("llava", checkpointing=True, batch=4),
    Case("llava", engine="stock", checkpointing=True, batch=4),
    Case("llava", lora=False),
    Case("llava", lora=False, engine="stock", cached=False),
    Case("llava", lora=False, checkpointing=True, accumulation=2),
    Case("llava", bf16=True, dtype="bfloat16"),
    Case("idefics2", batch=4),
    Case("idefics2", engine="stock", checkpointing=True),
    Case("idefics2", lora=False, batch=1, accumulation=2),
    Case("qwen2_5_vl"),
    Case("qwen2_5_vl", engine="stock", checkpointing=True),
    Case("qwen3_vl", batch=3),
    Case("gemma3", checkpointing=True),
    Case("paligemma", batch=1),
    Case("smolvlm", lora=False),
    Case("llava_next", answers=(20, 90)),
    Case("llava", batch=8, pairs_per_prompt=4),
    Case("qwen2_5_vl", batch=6, pairs_per_prompt=2, checkpointing=True),
)


def architecture(case: Case) -> Architecture:
    """A small model of the family, wide enough that its tensors are more than its bookkeeping."""
    kinds = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2}
        if case.family == "gemma3"
        else {}
    )
    more = {"projection_dim": TEXT["hidden_size"]} if case.family == "paligemma" else {}
    config, processor = random_models.FAMILIES[case.family]({**TEXT, **kinds}, {}, 64, **more)
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    return Architecture(config, processor)


def settings(case: Case) -> TrainConfig:
    return TrainConfig(
        engine=case.engine,
        lora=case.lora,
        gradient_checkpointing=case.checkpointing,
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulation,
        reference_cache=case.cached,
        max_steps=STEPS,
        save_steps=1000,
        bf16=case.bf16,
        device="cpu",
    )


def workload(case: Case) -> Workload:
    return Workload((64, 48), 1, 60, *case.answers, case.pairs_per_prompt)


def real_trainer(case: Case, folder: Path) -> PairTrainer:
    """The trainer of a real run: real weights, real rows."""
    shape, config = architecture(case), settings(case)
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = AutoModelForImageTextToText.from_config(shape.config, dtype=dtype)
    rows = synthetic_rows(shape.processor, workload(case), STEPS * case.batch * case.accumulation)
    references = ReferenceCache(folder, "k") if case.cached else None
    trainer = make_trainer(
        engine=case.engine,
        model=model,
        reference_model=None
        if case.lora or case.cached
        else AutoModelForImageTextToText.from_config(shape.config, dtype=dtype),
        processor=shape.processor,
        train_dataset=rows,
        args=dpo_config(config, folder, torch.device("cpu")),
        lora_config=lora_config(config, model),
        reference_cache=references,
    )
    if case.pairs_per_prompt > 1:
        trainer.row_groups = row_groups(rows)
    if references is not None and not case.lora:
        fill_reference_cache(trainer)
    return trainer


def measured_peak(trainer: PairTrainer) -> int:
    """Peak bytes that the allocator reports during `train()`, above those allocated before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.train()
    found: list[tuple[int, int, int]] = []

    def walk(events: Any) -> None:
        for event in events:
            kind, fields = event.typed
            if kind.name == "Allocation":
                found.append((event.start_time_ns, fields.alloc_size, fields.total_allocated))
            walk(event.children)

    walk(profiled.profiler.kineto_results.experimental_event_tree())
    found.sort()
    before = found[0][2] - found[0][1]
    return max(total for _, _, total in found) - before


def measure(case: Case) -> dict[str, Any]:
    """One case: estimated and measured peak above the weights, and their difference."""
    shape = architecture(case)
    rows = synthetic_rows(shape.processor, workload(case), case.batch)
    estimate = simulate(shape, settings(case), rows, dtype=getattr(torch, case.dtype))
    with tempfile.TemporaryDirectory() as name:
        measured = measured_peak(real_trainer(case, Path(name)))
    predicted = estimate.peak - estimate.static
    ratio = (estimate.static + predicted) / (estimate.static + measured)
    return {
        "name": case.name,
        "weights_bytes": estimate.static,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "ratio": ratio,
        "agreement": predicted / measured - 1,
        "passed": abs(predicted / measured - 1) < MAX_DIFFERENCE,
    }


def markdown(cases: list[dict[str, Any]]) -> str:
    """The dated report."""
    lines = [
        "# Estimated memory beside measured, on the CPU",
        "",
        f"{datetime.date.today()}, {versions('torch', 'transformers', 'trl', 'peft')}. Peak of "
        "tensors above the weights,",
        "in MB. Repeat with `python examples/benchmarks/memory.py`, whose head says what is "
        "measured.",
        "",
        "| setting | estimated | measured | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    for c in cases:
        predicted, measured = c["predicted_bytes"] / 1e6, c["measured_bytes"] / 1e6
        difference = 100 * c["agreement"]
        lines.append(f"| {c['name']} | {predicted:.2f} | {measured:.2f} | {difference:+.3f}% |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", help="only settings whose name contains one of these, in any case"
    )
    parser.add_argument("--quick", action="store_true", help="the first four settings")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    wanted = [
        c
        for c in (CASES[:4] if options.quick else CASES)
        if not options.cases or any(word.lower() in c.name.lower() for word in options.cases)
    ]
    cases = measure_each(
        [partial(measure, case) for case in wanted],
        show=lambda case: f"{case['name']}: {100 * case['agreement']:+.3f}%",
        markdown=options.markdown,
        report=markdown,
    )
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))
        return
    table = Table(title="peak of tensors above the weights, MB")
    for column in ("setting", "estimated", "measured", "difference", "passed"):
        table.add_column(column)
    for c in cases:
        numbers = (f"{c[name] / 1e6:.2f}" for name in ("predicted_bytes", "measured_bytes"))
        table.add_row(
            c["name"], *numbers, f"{100 * c['agreement']:+.3f}%", "yes" if c["passed"] else "NO"
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
