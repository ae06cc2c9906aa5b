"""Eight samples of a description: as one tree, and by `generate(num_return_sequences=8)`.

    python examples/benchmarks/sampling.py [--quick] [--json] [--markdown FILE] [--cases llava ...]

"generate" is transformers' own: it reads the prompt, its image tokens among them, once for each
sample (5.23 encodes the image once for all of them). "Tree" is ours: image and prompt are read
once, and all samples grow in one row behind them. Both process the image anew. Models are small,
with random weights, in the proportions of real ones (see `eval_amber.py`). What a tree can save is
the prompt: with answers of 80 tokens, nearly nine tenths of what LLaVA reads and half of what
Idefics2 does.

No answer ends before its last token, so that all do the same work. A case passes if at a
temperature near 0 all samples of both ways are the greedy answer, all have as many tokens as they
should, and the tree reaches its required speed-up by wall clock.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _threads  # noqa: F401 - before torch
import torch
from _cases import measure_each
from _measure import counted_flops, medians, timed, versions
from _train_shapes import Shape
from eval_amber import CASES as ASKED
from eval_amber import measured_share, questions_of, toy
from rich.console import Console
from rich.table import Table

from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import model_inputs
from vlmdpo.engine.sampling import Sampling

SAMPLES = 8
_NEVER = -100  # an end token that no model gives
_NEARLY_GREEDY = 1e-6
_WANTED = (2.5, 1.0)  # speed-ups of LLaVA's and Idefics2's proportions
CASES = tuple(
    (case.shape, case.prompt, wanted) for case, wanted in zip(ASKED[:2], _WANTED, strict=True)
)


def ways(model: Any, processor: Any, shape: Shape, tokens: int) -> dict[str, Callable[..., Any]]:
    """Both ways of sampling: each takes `Sampling` and gives the samples' token ids."""
    [(image, [question, *_])] = questions_of(shape, 1)

    def generate(sampling: Sampling) -> list[list[int]]:
        inputs = model_inputs(model, processor, [image], [question])
        torch.manual_seed(sampling.seed)
        sequences = model.generate(
            **inputs, max_new_tokens=tokens, eos_token_id=_NEVER, **sampling.options()
        )
        return sequences[:, inputs["input_ids"].shape[1] :].tolist()

    def tree(sampling: Sampling) -> list[list[int]]:
        decoder = PromptTreeDecoder(model, processor, keep_features=True)
        assert not decoder.reason_not_shared, decoder.reason_not_shared
        decoder.end_tokens = {_NEVER}
        ids: list[list[int]] = []
        decoder.sample = lambda answer: ids.append(list(answer))  # type: ignore[method-assign]
        with decoder.open(image) as opened:
            opened.sample([question], sampling, tokens)
        return ids

    return {"generate": generate, "tree": tree}


def differing(runs: dict[str, Callable[..., Any]], tokens: int) -> int:
    """Samples that are not the greedy answer, though their temperature is near 0."""
    [greedy] = runs["generate"](Sampling())
    assert len(greedy) == tokens
    near = Sampling(_NEARLY_GREEDY, count=SAMPLES)
    return sum(ids != greedy for run in runs.values() for ids in run(near))


def measure(shape: Shape, prompt: int, wanted: float, tokens: int, repeats: int) -> dict[str, Any]:
    """One case: medians, ratios, counted FLOPs, agreement."""
    model, processor = toy(shape)
    prompt_tokens, share = measured_share(model, processor, shape)
    runs = ways(model, processor, shape, tokens)
    differ = differing(runs, tokens)
    drawn = Sampling(0.7, 1.0, SAMPLES, seed=1)
    calls = {name: partial(run, drawn) for name, run in runs.items()}
    samples = {name: call() for name, call in calls.items()}
    lengths = {len(ids) for found in samples.values() for ids in found}
    flops = {name: counted_flops(call) for name, call in calls.items()}
    rounds = timed(calls, repeats)
    ratio, cpu_ratio = _ratio(rounds.wall), _ratio(rounds.cpu)
    return {
        "name": shape.name,
        "samples": SAMPLES,
        "tokens": tokens,
        "seconds": medians(rounds.wall),
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "counted": flops["generate"] / flops["tree"],
        "others_busy": rounds.others,
        "agreement": differ,
        "distinct": len({tuple(ids) for ids in samples["tree"]}),
        "vision_share": {"toy": share, "real": shape.real_vision_share(prompt)},
        "prompt_tokens": {"toy": prompt_tokens, "real": prompt},
        "wanted": wanted,
        "passed": differ == 0 and lengths == {tokens} and ratio >= wanted,
    }


def _ratio(seconds: list[dict[str, float]]) -> float:
    return statistics.median(one["generate"] / one["tree"] for one in seconds)


COLUMNS = (
    *("model's proportions", "seconds: generate / tree", "ratio", "ratio of CPU time"),
    *("counted FLOPs", "others busy", "samples that differ", "passed"),
)


def _row(case: dict[str, Any]) -> list[str]:
    busy = case["others_busy"]
    return [
        case["name"],
        " / ".join(f"{value:.2f}" for value in case["seconds"].values()),
        f"{case['ratio']:.2f}×",
        f"{case['cpu_ratio']:.2f}×",
        f"{case['counted']:.2f}×",
        "?" if busy is None else f"{100 * busy:.0f}%",
        f"{case['agreement']} of {2 * case['samples']}",
        "yes" if case["passed"] else "NO",
    ]


def markdown(cases: list[dict[str, Any]], repeats: int) -> str:
    """The dated report."""
    lines = [
        "# Eight samples of a description: as one tree, and by `generate`",
        "",
        f"{datetime.date.today()}, {versions('torch', 'transformers')}, 1 CPU thread, float32, "
        f"medians of {repeats} interleaved",
        f"rounds, {cases[0]['tokens']} tokens a sample. Repeat with "
        "`python examples/benchmarks/sampling.py`, whose head says what is measured.",
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
    parser.add_argument("--cases", nargs="+", help="only shapes whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="one shape, two rounds, short answers")
    parser.add_argument("--tokens", type=int, help="of each sample; 80, or 20 with --quick")
    parser.add_argument("--repeats", type=int, help="measured rounds; 5, or 2 with --quick")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = [word.lower() for word in options.cases or [""]]
    chosen = [case for case in CASES if any(word in case[0].name.lower() for word in words)]
    tokens = options.tokens or (20 if options.quick else 80)
    repeats = options.repeats or (2 if options.quick else 5)
    cases = measure_each(
        [
            partial(measure, *case, tokens, repeats)
            for case in chosen[: 1 if options.quick else None]
        ],
        show=lambda case: f"{case['name']}: {case['ratio']:.2f}×",
        markdown=options.markdown,
        report=lambda done: markdown(done, repeats),
    )
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))
    else:
        table = Table(*COLUMNS, title=f"generate ÷ tree, {SAMPLES} samples")
        for case in cases:
            table.add_row(*_row(case))
        Console(width=150).print(table)
    if not all(case["passed"] for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
