"""Does grouping rows by image change what is learnt? Trainings with and without it, over seeds.

    python examples/benchmarks/grouping_seeds.py --seeds 1 2 3 4 5 [--json]
        [--markdown docs/benchmarks/grouping-seeds.md]

Each seed is two trainings on the embedded pairs, which have two and a half rows for each image: one
with --group-by-image and one without. Nothing else differs, so neither do the adapter's first
weights. Both are judged by the reward accuracy on a test split, which shares no image with what is
trained on, and by yes/no questions about held-out scenes. A figure passes if the mean difference is
under one point, or if the 95% interval of its mean over the seeds includes zero.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from vlmdpo import config as cf
from vlmdpo import ui
from vlmdpo.commands import eval_amber, prepare, train
from vlmdpo.config import recipes
from vlmdpo.models.registry import recipe

ORDERS = {"random": False, "grouped": True}
FIGURES = {
    "reward_accuracy": "reward accuracy, test split",
    "yes_no_accuracy": "yes/no accuracy, held-out scenes",
    "loss": "loss × 100, test split",
}
MAX_POINTS = 1.0
# Student's t at 97.5%, by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def train_and_judge(data: Path, seed: int, order: str, folder: Path) -> dict:
    """One training: its figures in points, and the tokens that ran."""
    layer = {
        "dataset": str(data),
        "output_dir": folder / "adapter",
        "seed": seed,
        "group_by_image": ORDERS[order],
        "eval_steps": 0.5,
        "sample_every": 0,
    }
    trained = train.run(recipes.build(cf.TrainConfig, recipe("tiny", "train"), layer))
    layer = {"adapter": folder / "adapter", "output_dir": folder / "amber"}
    judged = eval_amber.run(recipes.build(cf.EvalAmberConfig, recipe("tiny", "eval-amber"), layer))
    return {
        "seed": seed,
        "order": order,
        "reward_accuracy": 100 * trained["eval"]["rewards/accuracies"],
        "yes_no_accuracy": judged["scores"]["tuned"]["Discriminative"]["accuracy"],
        "loss": 100 * trained["eval"]["loss"],
        "tokens": trained["tokens"],
    }


def cases(runs: list[dict]) -> list[dict]:
    """For each figure: its means, the mean difference over seeds with its interval, the verdict."""
    found = []
    for figure, name in FIGURES.items():
        by_order = {
            order: [run[figure] for run in runs if run["order"] == order] for order in ORDERS
        }
        pairs = zip(by_order["grouped"], by_order["random"], strict=False)
        apart = [grouped - random for grouped, random in pairs]
        mean, margin = statistics.mean(apart), 0.0
        if len(apart) > 1:
            margin = _T.get(len(apart) - 1, 1.96) * statistics.stdev(apart) / len(apart) ** 0.5
        found.append(
            {
                "name": name,
                **{order: statistics.mean(values) for order, values in by_order.items()},
                "difference": mean,
                "ci95": [mean - margin, mean + margin] if len(apart) > 1 else None,
                "passed": abs(mean) < MAX_POINTS or abs(mean) <= margin,
            }
        )
    return found


def markdown(runs: list[dict]) -> str:
    """The dated report."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    seeds = list(dict.fromkeys(str(run["seed"]) for run in runs))
    lines = [
        f"# Grouping rows by image, over {len(seeds)} training seeds",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, CPU. Repeat "
        "with:",
        "",
        f"    python examples/benchmarks/grouping_seeds.py --seeds {' '.join(seeds)}",
        "",
        "| seed | order | reward accuracy | yes/no accuracy | loss × 100 |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {run['seed']} | {run['order']} | {run['reward_accuracy']:.1f} "
        f"| {run['yes_no_accuracy']:.1f} | {run['loss']:.1f} |"
        for run in runs
    ]
    lines += [
        "",
        "| figure | random | grouped | difference | 95% interval | within noise |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases(runs):
        interval = "{:+.2f} to {:+.2f}".format(*case["ci95"]) if case["ci95"] else "one seed"
        lines.append(
            f"| {case['name']} | {case['random']:.1f} | {case['grouped']:.1f} "
            f"| {case['difference']:+.2f} | {interval} "
            f"| {'yes' if case['passed'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--limit", type=int, help="use this many pairs, to try the script")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    ui.set_verbosity(quiet=True, yes=True)
    ui.set_json_only(True)  # the commands' own results are not this script's
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        prepare.run(cf.PrepareConfig(output_dir=data, test_size=0.1, limit=options.limit))
        for seed in options.seeds:
            for order in ORDERS:
                folder = Path(name) / f"{order}-{seed}"
                runs.append(train_and_judge(data, seed, order, folder))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)  # as it is done
                # A run that is stopped keeps what it has.
                if options.markdown and order == "grouped":
                    options.markdown.write_text(markdown(runs), encoding="utf-8")
    print(json.dumps({"cases": cases(runs), "runs": runs}) if options.json else markdown(runs))


if __name__ == "__main__":
    main()
