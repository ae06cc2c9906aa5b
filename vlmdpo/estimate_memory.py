"""`vlmdpo estimate-memory`: how much memory DPO's weights, reference, gradients and optimizer take.

Reads the registry's exact counts: no network, no torch.
"""

from __future__ import annotations

from typing import Any

from vlmdpo import ui
from vlmdpo.config import EstimateMemoryConfig
from vlmdpo.memory.terms import as_in_article, components
from vlmdpo.models import registry


def run(config: EstimateMemoryConfig) -> dict[str, Any]:
    """The report: counts, components in bytes, and the article's rounded table beside them."""
    entry = registry.entry(config.model)
    adapter = entry.lora_per_rank * config.lora_r if config.lora else 0
    trainable = adapter if config.lora else entry.parameters
    lines = components(entry.parameters, trainable, config.dtype, lora=config.lora)
    article = as_in_article(entry.parameters, trainable, config.dtype, lora=config.lora)
    return {
        "model": entry.alias,
        "hub_id": entry.hub_id,
        "dtype": config.dtype,
        "lora_r": config.lora_r if config.lora else None,
        "parameters": {
            "total": entry.parameters,
            "trainable": trainable,
            "with_adapter": entry.parameters + adapter,
            "by_part": dict(entry.by_part),
        },
        "components": [{"name": c.name, "bytes": c.bytes, "formula": c.formula} for c in lines],
        "total_bytes": sum(c.bytes for c in lines),
        "article": {
            "components": [{"name": name, "gb": gb, "formula": text} for name, gb, text in article],
            "total_gb": round(sum(gb for _, gb, _ in article), 1),
        },
        "peak_bytes": None,  # activations are not simulated yet
        "verdict": None,
    }


def show(report: dict[str, Any]) -> None:
    """Print the article's table, then the exact one."""
    counts = report["parameters"]
    ui.result(f"{report['model']} ({report['hub_id']}): {counts['total']:,} parameters")
    ui.result("  " + ", ".join(f"{part} {count:,}" for part, count in counts["by_part"].items()))
    if report["lora_r"]:
        share = 100 * counts["trainable"] / counts["with_adapter"]
        ui.result(
            f"  LoRA r={report['lora_r']} on all linear layers trains {counts['trainable']:,} of "
            f"{counts['with_adapter']:,} ({share:.2f}%)"
        )
    article = report["article"]
    rows = [[line["name"], line["formula"], f"{line['gb']:.1f}"] for line in article["components"]]
    ui.table(
        "Rounded, as in the article",
        ["Component", "Calculation", "GB"],
        [*rows, ["Total", "", f"{article['total_gb']:.1f}"]],
        strong=[4],
    )
    exact = [
        [line["name"], line["formula"], f"{line['bytes'] / 1e9:.3f}", f"{line['bytes'] / 2**30:.3f}"]
        for line in report["components"]
    ]
    total = report["total_bytes"]
    ui.table(
        f"Exact ({report['dtype']})",
        ["Component", "Calculation", "GB", "GiB"],
        [*exact, ["Total", "", f"{total / 1e9:.3f}", f"{total / 2**30:.3f}"]],
        strong=[4],
        note="1 GB = 1e9 bytes, 1 GiB = 2**30 bytes. Activations come on top.",
    )
    if report["lora_r"]:
        ui.say(
            "With LoRA, train needs no second copy of the weights for the reference: it is the same model with the adapter off."
        )
