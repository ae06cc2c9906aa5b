"""The demo's gain over several training seeds: does it hold, or was it luck?

    python examples/benchmarks/demo_seeds.py --seeds 1 2 3 4 5 [--json]
        [--markdown docs/benchmarks/demo-seeds.md]

Each seed is one whole `vlmdpo demo`; only the initial adapter weights and the order of the data
differ. A case passes if the tuned model, on the held-out scenes, answers at least eight points more
of the questions rightly than the base model, has at most half of its Hal and at most three points
less Cover, and gives at most three answers in a thousand that are neither yes nor no.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from vlmdpo import ui
from vlmdpo.commands import demo
from vlmdpo.config import DemoConfig

MIN_GAIN_POINTS = 8.0
MAX_HAL_SHARE = 0.5  # of the base's
MAX_COVER_LOSS_POINTS = 3.0
MAX_UNREAD_PER_THOUSAND = 3.0
FIGURES = ("hal", "chair", "cover")


def case(seed: int, folder: Path) -> dict:
    """One demo: scores of base and tuned, their intervals, unread answers, and seconds."""
    started = time.monotonic()
    report = demo.run(DemoConfig(seed=seed, output_dir=folder / f"seed-{seed}"))["eval"]
    seconds = time.monotonic() - started
    roles = report["scores"]
    questions = report["questions"]["Discriminative"]
    unread = {
        role: 1000 * facts["unparsed"] / questions for role, facts in report["models"].items()
    }
    comparison = report["comparison"]
    found = {
        "name": f"seed {seed}",
        **{role: scores["Discriminative"] for role, scores in roles.items()},
        **{
            name: {role: scores["Generative"][name] for role, scores in roles.items()}
            for name in FIGURES
        },
        "unread_per_thousand": unread,
        "said_no": {role: facts["said_no"] for role, facts in report["models"].items()},
        "always_no": report["always_no"]["Discriminative"]["accuracy"],
        **{key: comparison[key] for key in ("delta_accuracy", "ci95", "mcnemar_p")},
        "seconds": round(seconds),
    }
    return {**found, "passed": passes(found)}


def passes(found: dict) -> bool:
    """Whether a case meets every limit of the module's docstring."""
    hal, cover = found["hal"], found["cover"]
    return (
        found["delta_accuracy"] >= MIN_GAIN_POINTS
        and hal["tuned"] <= MAX_HAL_SHARE * hal["base"]
        and cover["tuned"] >= cover["base"] - MAX_COVER_LOSS_POINTS
        and found["unread_per_thousand"]["tuned"] <= MAX_UNREAD_PER_THOUSAND
    )


def markdown(cases: list[dict]) -> str:
    """The dated report."""
    names = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    seeds = " ".join(c["name"].split()[1] for c in cases)
    lines = [
        f"# The demo's gain over {len(cases)} training seeds",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, CPU. Repeat "
        "with:",
        "",
        f"    python examples/benchmarks/demo_seeds.py --seeds {seeds}",
        "",
        "| run | base acc. / F1 | tuned acc. / F1 | gain | 95% interval | McNemar p | said No: "
        "base → tuned | neither, per thousand |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_answers_row, cases),
        "",
        "Descriptions of 100 scenes, base → tuned:",
        "",
        "| run | Hal ↓ | CHAIR ↓ | Cover ↑ | seconds | passed |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(_descriptions_row, cases),
        "",
        f"{sum(c['passed'] for c in cases)} of {len(cases)} pass: they gain at least "
        f"{MIN_GAIN_POINTS:.0f} points, at least halve Hal, lose at most "
        f"{MAX_COVER_LOSS_POINTS:.0f} points of Cover, and at most {MAX_UNREAD_PER_THOUSAND:.0f} "
        "answers in a thousand are neither Yes nor No. Always answering No would score "
        f"{cases[0]['always_no']} on the same questions. Seconds are of the whole demo.",
    ]
    return "\n".join(lines) + "\n"


def _answers_row(c: dict) -> str:
    low, high = c["ci95"]
    return (
        f"| {c['name']} | {c['base']['accuracy']} / {c['base']['f1']} | "
        f"{c['tuned']['accuracy']} / {c['tuned']['f1']} "
        f"| {c['delta_accuracy']:+.1f} | {low:+.1f} to {high:+.1f} | {c['mcnemar_p']:.1g} "
        f"| {100 * c['said_no']['base']:.0f}% → {100 * c['said_no']['tuned']:.0f}% "
        f"| {c['unread_per_thousand']['tuned']:.1f} |"
    )


def _descriptions_row(c: dict) -> str:
    figures = " | ".join(f"{c[name]['base']} → {c[name]['tuned']}" for name in FIGURES)
    return f"| {c['name']} | {figures} | {c['seconds']} | {'yes' if c['passed'] else 'no'} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    ui.set_verbosity(quiet=True, yes=True)
    ui.set_json_only(True)  # the commands' own results are not this script's
    with tempfile.TemporaryDirectory() as folder:
        cases = [case(seed, Path(folder)) for seed in options.seeds]
    if options.markdown:
        options.markdown.write_text(markdown(cases), encoding="utf-8")
    print(json.dumps({"cases": cases}, indent=2) if options.json else markdown(cases))


if __name__ == "__main__":
    main()
