"""What DPO costs on 8, 64 and 512 GPUs, on paper: memory, bytes sent, and time per step.

    python examples/scaling.py            # print the tables of docs/scaling.md
    python examples/scaling.py --write    # write them into that page

docs/scaling.md has every formula with its source. The time comes from a small simulation that goes
through one optimizer step layer by layer with two resources, the GPU's arithmetic and its link. A
collective may overlap with the layer before it; a layer waits for its own. Nothing here was
measured: the constants below are from data sheets, or assumed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

PEAK_FLOPS = 989e12  # H100 SXM, bfloat16 without sparsity: NVIDIA's data sheet
SHARE_OF_PEAK = 0.4  # assumed, for arithmetic only
NVLINK_BYTES_S = 450e9  # per GPU and direction, 4th generation: NVIDIA's data sheet
NETWORK_BYTES_S = 50e9  # per GPU and direction: one 400 Gb/s port each, as in a DGX H100
SHARE_OF_LINK = 0.8  # assumed: the share of a link that collectives reach
HOP_S = 5e-6  # assumed: latency of one hop on a ring
GPUS_PER_NODE, GPU_BYTES = 8, 80e9
TOKENS = 1_570  # of a pair in one row: prompt with image 1,330, two answers of 120
# Bytes per parameter: AdamW's two float32 moments; a gradient or a master copy; a weight.
ADAMW, FLOAT32, BFLOAT16 = 8, 4, 2
COUNTS = (8, 64, 512)
BEGIN, END = "<!-- tables: python examples/scaling.py --write -->\n", "<!-- end of tables -->\n"


@dataclass(frozen=True)
class Model:
    """A model's sizes.

    Attributes:
        parameters: of the whole model.
        adapter: parameters of a LoRA adapter (r=16, all linear layers).
        layers: of the language model.
    """

    name: str
    parameters: float
    adapter: float
    layers: int


def _qwen_72b() -> Model:
    hidden, inner, kv, layers, vocabulary = 8192, 29568, 1024, 80, 152064  # its public config.json
    shapes = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    text = layers * sum(a * b for a, b in shapes) + 2 * vocabulary * hidden
    return Model(
        "Qwen2.5-VL-72B", text + 0.68e9, layers * sum(16 * (a + b) for a, b in shapes), layers
    )


MODELS = (Model("Idefics2-8B", 8_402_768_112, 55_348_736, 32), _qwen_72b())


@dataclass(frozen=True)
class Plan:
    """A run, with one pair per GPU and pass, and at least 64 per step.

    Attributes:
        strategy: "ddp", "zero2" or "fsdp2".
        full: train every weight, not an adapter.
    """

    model: Model
    gpus: int
    strategy: str
    full: bool

    @property
    def trained(self) -> float:
        """Parameters that train."""
        return self.model.parameters if self.full else self.model.adapter

    @property
    def accumulation(self) -> int:
        """Passes per optimizer step: 64 pairs as in the article, or one per GPU if that is more."""
        return max(1, 64 // self.gpus)

    @property
    def state_bytes(self) -> float:
        """Weights, gradients and optimizer state on each GPU, without activations."""
        # Weights that train are float32: as they are, or with DeepSpeed as a copy of bfloat16 ones.
        has_copy = self.full and self.strategy == "zero2"
        is_float32 = self.full and not has_copy
        weights = self.model.parameters * (FLOAT32 if is_float32 else BFLOAT16)
        weights += 0 if self.full else self.trained * FLOAT32
        gradients = self.trained * FLOAT32
        moments = self.trained * (ADAMW + (FLOAT32 if has_copy else 0))
        if self.strategy == "ddp":
            return weights + gradients + moments
        if self.strategy == "zero2":
            return weights + (gradients + moments) / self.gpus
        return (weights + gradients + moments) / self.gpus

    @property
    def link_bytes_s(self) -> float:
        """Speed of the slowest link on the ring."""
        return SHARE_OF_LINK * (NVLINK_BYTES_S if self.gpus <= GPUS_PER_NODE else NETWORK_BYTES_S)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each GPU sends per optimizer step.

        On a ring, each gather or scatter sends (N-1)/N of the data.
        """
        part = (self.gpus - 1) / self.gpus
        gradients = self.trained * FLOAT32
        if self.strategy == "ddp":
            return 2 * part * gradients
        if self.strategy == "zero2":
            return part * (gradients + self.trained * BFLOAT16)
        gathers = 2 * self.accumulation * self.model.parameters * BFLOAT16
        return part * (gathers + gradients)

    def collective_s(self, size: float) -> float:
        """Time of one gather or scatter of `size` bytes on a ring.

        It sends (N-1)/N of the bytes. Within a node there are N-1 hops; across nodes, those of a
        ring of nodes and of a ring within each node.
        """
        hops = (
            self.gpus - 1
            if self.gpus <= GPUS_PER_NODE
            else self.gpus // GPUS_PER_NODE - 1 + GPUS_PER_NODE - 1
        )
        return hops * HOP_S + (self.gpus - 1) / self.gpus * size / self.link_bytes_s


def flops_per_pair(plan: Plan) -> float:
    """Forward 2PT, recomputing 2PT, backward 2PT for activations, and 2PT for weights that train.

    The gradients of an adapter are neglected.
    """
    return (8 if plan.full else 6) * plan.model.parameters * TOKENS


def step_s(plan: Plan) -> tuple[float, float]:
    """(seconds of an optimizer step, seconds of its arithmetic alone), simulated layer by layer."""
    layers = plan.model.layers
    arithmetic = flops_per_pair(plan) / (PEAK_FLOPS * SHARE_OF_PEAK)
    forward = arithmetic * 2 / (8 if plan.full else 6) / layers
    backward = arithmetic / layers - forward
    gathers = plan.strategy == "fsdp2"
    gather = plan.collective_s(plan.model.parameters * BFLOAT16 / layers) if gathers else 0.0
    copies = 2 if plan.strategy == "ddp" else 1
    scatter = copies * plan.collective_s(plan.trained * FLOAT32 / layers)
    busy = link = 0.0  # times until which arithmetic and link are busy
    for step in range(plan.accumulation):
        last = step == plan.accumulation - 1
        for cost in (forward, backward):
            for _ in range(layers):
                began = busy
                link = max(link, began - cost) + gather  # requested while the layer before runs
                busy = max(began, link if gathers else began) + cost
                if last and cost == backward:
                    link = max(link, busy) + scatter
    if plan.strategy == "zero2":
        link = max(link, busy) + plan.collective_s(plan.trained * BFLOAT16)
    return max(busy, link), plan.accumulation * arithmetic


def verdict(plan: Plan) -> str:
    """The first bottleneck of the run, or "does not fit"."""
    if plan.state_bytes > 0.9 * GPU_BYTES:
        return "does not fit"
    seconds, alone = step_s(plan)
    if seconds > 1.15 * alone:
        return "the network" if plan.gpus > GPUS_PER_NODE else "NVLink"
    return "the batch" if plan.gpus > 64 else "arithmetic"


def tables() -> str:
    """Both tables as Markdown."""
    text = ""
    for full in (False, True):
        text += f"\n### {'Full fine-tuning' if full else 'LoRA, r=16, all linear layers'}\n\n"
        text += "| model | GPUs | strategy | state per GPU, GB | sent per GPU and step, GB "
        text += "| step, s | efficiency | first bottleneck |\n"
        text += "|---|---:|---|---:|---:|---:|---:|---|\n"
        for model in MODELS:
            for gpus in COUNTS:
                for strategy in ("ddp", "zero2", "fsdp2"):
                    plan = Plan(model, gpus, strategy, full)
                    fits = plan.state_bytes <= 0.9 * GPU_BYTES
                    seconds, alone = step_s(plan)
                    timed = f"{seconds:.2f} | {100 * alone / seconds:.0f}%" if fits else "- | -"
                    text += (
                        f"| {model.name} | {gpus} | {strategy} | {plan.state_bytes / 1e9:.1f} | "
                        f"{plan.sent_bytes / 1e9:.2f} "
                        f"| {timed} | {verdict(plan)} |\n"
                    )
    return text + "\n"


def with_tables(page: str) -> str:
    """The page with new tables."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables() + END + after


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    page = Path(__file__).parent.parent / "docs" / "scaling.md"
    if parser.parse_args().write:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
