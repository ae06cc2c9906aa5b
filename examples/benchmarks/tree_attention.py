"""Attention over a tree, node by node, beside one call with a mask over all of it, in turns.

    python examples/benchmarks/tree_attention.py [--json] [--markdown FILE]

Forward and backward of one layer's attention, on the CPU, of random queries, keys and values. The
call with a mask is PyTorch's own attention given the (T, T) mask that says who sees whom. A case
passes if outputs and gradients agree to 1e-5 and node by node is not slower.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import medians, timed, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers.masking_utils import causal_mask_function

from vlmdpo.engine.tree import ROOT, Forest, ancestry
from vlmdpo.engine.tree_layout import TreeLayout

HEADS, HEAD_SIZE = 8, 64


def forest_of(prompt: int, answers: int, answer: int, trees: int = 1) -> Forest:
    """Trees of one prompt each, with equally long answers."""
    parents: list[int] = []
    lengths: list[int] = []
    roots: list[int] = []
    for _ in range(trees):
        roots.append(len(parents))
        parents += [ROOT, *[roots[-1]] * answers]
        lengths += [prompt, *[answer] * answers]
    leaves = [node for node, parent in enumerate(parents) if parent != ROOT]
    return Forest(tuple(parents), tuple(lengths), tuple(roots), tuple(leaves))


CASES = {
    "one pair, prompt of 600": forest_of(600, 2, 80),
    "two pairs, prompt of 600": forest_of(600, 4, 80),
    "eight answers, prompt of 600": forest_of(600, 8, 80),
    "four answers, prompt of 1,330": forest_of(1330, 4, 80),
    "eight trees of one pair, prompt of 94": forest_of(94, 2, 80, trees=8),
}


def node_by_node(forest: Forest) -> Callable[..., Tensor]:
    """Attention as the engine runs it."""
    mask = TreeLayout(forest, torch.device("cpu")).mask(causal_mask_function, torch.device("cpu"))

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        is_causal = mask is None and q.shape[2] > 1
        return attend(q, k, v, mask, is_causal=is_causal).transpose(1, 2), None

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mask.attend(attention, False, nn.Identity(), query, key, value)[0]

    return run


def one_call(forest: Forest) -> Callable[..., Tensor]:
    """One call with the mask of the whole row."""
    nodes = torch.repeat_interleave(torch.arange(len(forest.lengths)), torch.tensor(forest.lengths))
    index = torch.arange(forest.slots)
    sees = ancestry(forest.parents)[nodes[:, None], nodes[None, :]]
    mask = (sees & (index[None, :] <= index[:, None]))[None, None]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, mask).transpose(1, 2)

    return run


def measure(name: str, forest: Forest, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 1, HEADS, forest.slots, HEAD_SIZE, generator=generator).unbind(0)
    for tensor in inputs:
        tensor.requires_grad_(True)
    weights = torch.randn(1, forest.slots, HEADS, HEAD_SIZE, generator=generator)
    runs = {"node by node": node_by_node(forest), "one call": one_call(forest)}

    def step(run: Callable[..., Tensor]) -> list[Tensor]:
        output = run(*inputs)
        gradients = torch.autograd.grad((output * weights).sum(), inputs)
        return [output.detach(), *gradients]

    ours, other = step(runs["node by node"]), step(runs["one call"])
    agreement = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, other, strict=True))
    rounds = timed({name: lambda run=run: step(run) for name, run in runs.items()}, repeats)
    wall, cpu = medians(rounds.wall), medians(rounds.cpu)
    ratio = wall["one call"] / wall["node by node"]
    return {
        "name": name,
        "slots": forest.slots,
        "milliseconds": {run: 1e3 * seconds for run, seconds in wall.items()},
        "ratio": ratio,
        "cpu_ratio": cpu["one call"] / cpu["node by node"],
        "others_busy": rounds.others,
        "agreement": agreement,
        "passed": agreement < 1e-5 and ratio >= 1,
    }


def _row(case: dict[str, Any]) -> list[str]:
    ms, busy = case["milliseconds"], case["others_busy"]
    return [
        case["name"],
        f"{case['slots']:,}",
        f"{ms['one call']:.1f}",
        f"{ms['node by node']:.1f}",
        f"{case['ratio']:.2f}×",
        f"{case['cpu_ratio']:.2f}×",
        "?" if busy is None else f"{100 * busy:.0f}%",
        f"{case['agreement']:.0e}",
        "yes" if case["passed"] else "NO",
    ]


COLUMNS = (
    *("tree", "slots", "one call, ms", "node by node, ms", "ratio", "ratio of CPU time"),
    *("others busy", "agreement", "passed"),
)


def markdown(cases: list[dict[str, Any]], repeats: int) -> str:
    """The dated report."""
    lines = [
        "# Attention over a tree: node by node beside one call with a mask",
        "",
        f"{datetime.date.today()}, {versions('torch')}, 2 CPU threads, float32, {HEADS} heads of "
        f"{HEAD_SIZE}, medians of {repeats} interleaved rounds of forward and backward.",
        "Repeat with `python examples/benchmarks/tree_attention.py`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(_row(case)) + " |" for case in cases),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="measured rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    cases = [measure(name, forest, options.repeats) for name, forest in CASES.items()]
    if options.markdown:
        options.markdown.write_text(markdown(cases, options.repeats), encoding="utf-8")
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))
    else:
        table = Table(*COLUMNS, title="one call ÷ node by node")
        for case in cases:
            table.add_row(*_row(case))
        Console(width=140).print(table)
    if not all(case["passed"] for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
