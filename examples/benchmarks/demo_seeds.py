"""The demo's gain over several training seeds: does it hold, or was it luck?

    python examples/benchmarks/demo_seeds.py --seeds 1 2 3 4 5 [--json]
        [--markdown docs/benchmarks/demo-seeds.md]

Each seed is one whole `vlmdpo demo`; only the initial adapter weights and the order of the data
differ. A case passes if the tuned model's accuracy on the held-out questions is at least five
points above the base model's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from vlmdpo import ui
from vlmdpo.commands import demo
from vlmdpo.config import DemoConfig

MIN_GAIN_POINTS = 5.0


def case(seed: int, folder: Path) -> dict:
    """One demo: scores of base and tuned, the interval, McNemar's p, how often each said No."""
    report = demo.run(DemoConfig(seed=seed, output_dir=folder / f"seed-{seed}"))["eval"]
    scores = {role: table["Discriminative"] for role, table in report["scores"].items()}
    comparison = report["comparison"]
    return {
        "name": f"seed {seed}",
        "base": scores["base"],
        "tuned": scores["tuned"],
        "said_no": {role: facts["said_no"] for role, facts in report["models"].items()},
        "always_no": report["always_no"]["accuracy"],
        **{key: comparison[key] for key in ("delta_accuracy", "ci95", "mcnemar_p")},
        "passed": comparison["delta_accuracy"] >= MIN_GAIN_POINTS,
    }


def markdown(cases: list[dict]) -> str:
    """The dated report."""
    names = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    lines = [
        "# The demo's gain over five training seeds",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, CPU. Repeat "
        "with:",
        "",
        "    python examples/benchmarks/demo_seeds.py --seeds "
        + " ".join(c["name"].split()[1] for c in cases),
        "",
        "| run | base acc. / F1 | tuned acc. / F1 | gain | 95% interval | McNemar p | said No: "
        "base → tuned |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in cases:
        low, high = c["ci95"]
        lines.append(
            f"| {c['name']} | {c['base']['accuracy']} / {c['base']['f1']} | "
            f"{c['tuned']['accuracy']} / {c['tuned']['f1']} "
            f"| {c['delta_accuracy']:+.1f} | {low:+.1f} to {high:+.1f} | {c['mcnemar_p']:.1g} "
            f"| {100 * c['said_no']['base']:.0f}% → {100 * c['said_no']['tuned']:.0f}% |"
        )
    passed = sum(c["passed"] for c in cases)
    lines += ["", f"{passed} of {len(cases)} gain at least {MIN_GAIN_POINTS:.0f} points. "]
    lines[-1] += f"Always answering No would score {cases[0]['always_no']} on the same questions."
    return "\n".join(lines) + "\n"


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
