"""What `vlmdpo estimate-memory` prints."""

from __future__ import annotations

import shlex
from typing import Any

from vlmdpo import ui
from vlmdpo.config import TrainConfig, flag_name
from vlmdpo.memory.fit import ERROR_BAND
from vlmdpo.memory.terms import CONTEXT_BYTES

_GIB = 2**30


def show(report: dict[str, Any]) -> None:
    """Print the counts, the article's table, what is allocated, the peak, and the verdict."""
    counts = report["parameters"]
    ui.result(f"{report['model']} ({report['hub_id']}): {counts['total']:,} parameters")
    ui.result("  " + ", ".join(f"{part} {count:,}" for part, count in counts["by_part"].items()))
    if report["lora_r"]:
        share = 100 * counts["trainable"] / counts["with_adapter"]
        where = {
            "all": "all linear layers",
            "language": "the language model",
            "connector": "connector and language model",
        }
        ui.result(
            f"  LoRA r={report['lora_r']} on {where[report['settings']['lora_scope']]} trains "
            f"{counts['trainable']:,} of "
            f"{counts['with_adapter']:,} ({share:.2f}%)"
        )
    _show_article(report)
    _show_allocated(report)
    if report["verdict"]:
        _show_verdict(report)
    if "plot" in report:
        ui.result(f"Plot: {report['plot']}")


def _show_article(report: dict[str, Any]) -> None:
    article = report["article"]
    rows = [
        [rounded["name"], rounded["formula"], f"{rounded['gb']:.1f}", *_gb_and_gib(exact["bytes"])]
        for rounded, exact in zip(article["components"], report["components"], strict=True)
    ]
    total = report["total_bytes"]
    ui.table(
        f"The article's table ({report['dtype']}), rounded as published and exact",
        ["Component", "Calculation", "GB", "exact GB", "exact GiB"],
        [*rows, ["Total", "", f"{article['total_gb']:.1f}", *_gb_and_gib(total)]],
        strong=[4],
        note="1 GB = 1e9 bytes, 1 GiB = 2**30 bytes. Without activations.",
        text=(0, 1),
    )


def _show_allocated(report: dict[str, Any]) -> None:
    lines = report["allocated"]["components"]
    rows = [
        [
            line["name"],
            line["formula"],
            *_gb_and_gib(line["bytes"]),
            line["why"] + ("" if line["validated"] else " *"),
        ]
        for line in lines
    ]
    rows.append(["Sum", "", *_gb_and_gib(report["allocated"]["total_bytes"]), ""])
    strong = [len(rows) - 1]
    peak = report["peak_bytes"]
    how = (
        f"by formula, within {report['error_per_cent']}%"
        if "error_per_cent" in report
        else "of a simulated step"
    )
    if peak is not None:
        rest = peak - report["allocated"]["total_bytes"]
        rows.append(
            [
                "Activations and buffers",
                _step_settings(report),
                *_gb_and_gib(rest),
                "at the peak",
            ]
        )
        rows.append(["Peak", "", *_gb_and_gib(peak), how])
        strong.append(len(rows) - 1)
        rows.append(["CUDA context and workspaces", "about", *_gb_and_gib(CONTEXT_BYTES), "*"])
    if report.get("fallback_reason"):
        ui.say(f"no shared prefix ({report['fallback_reason']}): {_engine(report)} engine")
    host = ui.human_bytes(report["loading"]["host_bytes"])
    if peak is None:
        ui.say(
            f"--fast has no formula for the activations of {report['model']}; leave it out to "
            "simulate a step"
        )
    elif "error_per_cent" in report and report["settings"]["dataset"]:
        ui.say("--fast counts each row alone; leave it out to count what rows of --dataset share")
    unvalidated = ", ".join(report["unvalidated"])
    note = f"* not validated: {unvalidated}. Loading first takes {host} of the host's memory."
    heads = ["Component", "Calculation", "GB", "GiB", "Why"]
    ui.table("What vlmdpo allocates", heads, rows, strong=strong, note=note, text=(0, 1, 4))


def _step_settings(report: dict[str, Any]) -> str:
    s = report["settings"]
    image = "x".join(str(edge) for edge in report["image"])
    batch, per_prompt = s["per_device_train_batch_size"], report["pairs_per_prompt"]
    shared = f", {per_prompt:g} pairs a prompt" if per_prompt > 1 else ""
    return f"batch {batch}{shared}, {s['images']} image {image}, {_engine(report)} engine"


def _engine(report: dict[str, Any]) -> str:
    """What ran the step, which may not be what was asked for."""
    return str(report.get("engine") or report["settings"]["engine"])


def _gb_and_gib(size: float) -> list[str]:
    return [f"{size / 1e9:.3f}", f"{size / _GIB:.3f}"]


def _show_verdict(report: dict[str, Any]) -> None:
    found, plan = report["gpu"], report.get("plan")
    needed, capacity = found["needed_bytes"] / _GIB, found["capacity_bytes"] / _GIB
    room = found["free_bytes"] / _GIB
    rest = f"{room:.1f} GiB to spare" if room >= 0 else f"{-room:.1f} GiB short"
    band = (
        f" (closer than the estimate's error of {100 * ERROR_BAND:.0f}%)"
        if report["verdict"] == "tight"
        else ""
    )
    ui.result(
        f"{found['name']}: {report['verdict']}{band}; needs {needed:.1f} of {capacity:.1f} GiB, "
        f"{rest}"
    )
    if plan and plan["per_device_train_batch_size"]:
        ui.result(
            f"Largest batch that fits: {_command(report, plan)}  "
            f"(effective batch {plan['effective_batch_size']}, peak "
            f"{plan['peak_bytes'] / _GIB:.1f} GiB)"
        )
    elif plan and plan["first"]:
        changed = {
            **report,
            **plan["first"]["change"],
            "settings": {**report["settings"], **plan["first"]["change"]},
        }
        one = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": plan["effective_batch_size"],
        }
        flags = " ".join(_flag(name, value) for name, value in plan["first"]["change"].items())
        ui.result(f"First try {flags}: {_command(changed, one)}")
        ui.result(f"  (a batch of 1 then needs {plan['first']['needed_bytes'] / _GIB:.1f} GiB)")
    elif plan:
        ui.result(
            "No setting makes it fit: use a smaller model, smaller images, or more GPUs "
            "(--num-gpus, --strategy)"
        )


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_name(name) if value else "--no-" + name.replace("_", "-")
    return f"{flag_name(name)} {value}"


def _command(report: dict[str, Any], plan: dict[str, Any]) -> str:
    """The training command with this plan, without options that have their default."""
    settings, default = report["settings"], TrainConfig()
    words = ["vlmdpo", "train", "--model", str(settings["model"])]
    if report["dtype"] != ("bfloat16" if settings["lora"] else "float32"):  # defaults on a GPU
        words += ["--dtype", report["dtype"]]
    for name in (
        "lora",
        "lora_r",
        "lora_scope",
        "gradient_checkpointing",
        "engine",
        "reference_cache",
        "optim",
    ):
        if settings[name] != getattr(default, name):
            words += _flag(name, settings[name]).split(" ", 1)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        words += [flag_name(name), str(plan[name])]
    return shlex.join(words)
