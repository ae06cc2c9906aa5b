"""Items of the GPU check about speed: training steps, questions, and where a step's time goes.

Shapes of all of them are those of real use: photographs of 4:3, answers of 60 to 140 tokens.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _gpu_exactness import exactness, losses_and_gradients, matmul_tflops
from _gpu_models import (
    Duo,
    Machine,
    architecture,
    build,
    collate,
    collate_stock,
    optimizer_step,
    own_bytes,
    random_rows,
)
from _measure import counted_flops, interleaved, medians
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from vlmdpo.engine.batch import batch_tokens
from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import answer, is_near_tie
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.training import doctor


@dataclass(frozen=True)
class StepCase:
    """A model and a batch of pairs to train on."""

    model: str
    image: tuple[int, int]
    batch: int = 4
    prompt: int = 50
    answers: tuple[int, int] = (60, 140)

    def rows(self, machine: Machine, **more: Any) -> list[dict[str, Any]]:
        if machine.toy:
            return random_rows(2, (30, 24), 8, (4, 9), **more)
        return random_rows(self.batch, self.image, self.prompt, self.answers, **more)


IDEFICS2_490 = StepCase("idefics2-8b", (490, 368))
IDEFICS2_980 = StepCase("idefics2-8b", (980, 735))
LLAVA = StepCase("llava-1.5-7b", (640, 480))
_QUESTIONS, _IMAGES, _ANSWER_TOKENS = 14, 2, 8


def duo_of(machine: Machine, case: StepCase) -> Duo:
    """Stock TRL and ours on one model: LoRA r=16 on all linear layers, checkpointing, bf16."""
    name = f"duo {case.model}"

    def make() -> Duo:
        shape = architecture(machine, case.model)
        model = build(machine, shape.config, machine.dtype)
        return Duo(machine, shape, model, case.rows(machine))

    duo: Duo = machine.hold(name, make)
    return duo


def arms(
    machine: Machine, duo: Duo, rows: list[dict[str, Any]]
) -> dict[str, Callable[[], torch.Tensor]]:
    """A whole step of stock TRL, of ours in the first epoch, and of ours with a filled cache.

    Batches are collated beforehand: image processing is not measured here.
    """
    stock, ours = collate_stock(duo.stock.processing_class, rows), collate(duo.ours, rows)

    def with_cache(cache: ReferenceCache) -> torch.Tensor:
        duo.ours.reference_cache = cache
        return optimizer_step(duo.ours, ours)

    filled = ReferenceCache(machine.folder, "filled")
    keys = ours["answer_keys"]
    filled.put(keys, torch.full((len(keys),), -300.0))  # which values does not change the time
    return {
        "stock": lambda: optimizer_step(duo.stock, stock),
        "first": lambda: with_cache(ReferenceCache(machine.folder, "empty")),
        "cached": lambda: with_cache(filled),
    }


def step(machine: Machine, case: StepCase) -> dict[str, Any]:
    """Training steps of stock TRL beside ours: agreement, speed, use of the card, peak memory."""
    duo, rows = duo_of(machine, case), case.rows(machine)
    duo.align()
    found: dict[str, Any] = {"model": case.model, "image": list(case.image), "pairs": len(rows)}
    found["exactness"] = exactness(machine, duo, rows[0])
    found["agreement"] = losses_and_gradients(machine, duo, rows)
    found["tokens"] = _tokens(duo, rows)
    runs = arms(machine, duo, rows)
    # One step each makes the optimizers' states and compiles what is compiled.
    found["first_steps"] = {name: run().item() for name, run in runs.items()}
    found["peak_bytes"] = _peaks(machine, duo, runs)
    found["flops"] = {name: counted_flops(run) for name, run in runs.items()}
    found["forward_flops"] = _forward_flops(duo, rows)
    budget = min(45.0, machine.seconds_left() / 2)
    repeats = 1 if machine.toy else 7
    rounds = interleaved(runs, repeats, clock=machine.clock, budget_s=budget)
    found |= _speed(machine, rounds, found)
    same_prompt = arms(machine, duo, case.rows(machine, one_prompt=True))
    rounds = interleaved(same_prompt, 1 if machine.toy else 3, clock=machine.clock, budget_s=budget)
    seconds = medians(rounds)
    found["one_prompt_pairs_per_s"] = {name: len(rows) / s for name, s in seconds.items()}
    found["one_prompt_ratio"] = medians([_ratios(r) for r in rounds])
    exact, agreed = found["exactness"], found["agreement"]
    found["passed"] = exact["passed"] and agreed["passed"]
    return found


def _tokens(duo: Duo, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens of the language model's rows, without padding: stock's two a pair, and ours."""
    stock = int(collate_stock(duo.stock.processing_class, rows)["attention_mask"].sum())
    return {"stock": stock, "ours": batch_tokens(collate(duo.ours, rows))[1]}


def _peaks(
    machine: Machine, duo: Duo, runs: dict[str, Callable[[], torch.Tensor]]
) -> dict[str, dict[str, int]] | None:
    """Each arm's peak, as if the other's adapter and optimizer were not on the card."""
    if not machine.is_cuda:
        return None
    others = {"stock": duo.ours, "first": duo.stock, "cached": duo.stock}
    peaks = {}
    for name, run in runs.items():
        peak = machine.peak_of(run)
        assert peak is not None
        peaks[name] = {kind: size - own_bytes(others[name]) for kind, size in peak.items()}
    return peaks


def _forward_flops(duo: Duo, rows: list[dict[str, Any]]) -> dict[str, int]:
    """FLOPs of one forward pass without gradients, of stock's rows and of ours."""
    stock, ours = collate_stock(duo.stock.processing_class, rows), collate(duo.ours, rows)
    return {
        "stock": counted_flops(lambda: doctor.token_logps(duo.stock, stock)),
        "ours": counted_flops(lambda: doctor.token_logps(duo.ours, ours)),
    }


def _ratios(cost: dict[str, float]) -> dict[str, float]:
    return {
        "1 epoch": cost["stock"] / cost["first"],
        "3 epochs": 3 * cost["stock"] / (cost["first"] + 2 * cost["cached"]),
        "cached": cost["stock"] / cost["cached"],
    }


def _speed(
    machine: Machine, rounds: list[dict[str, float]], found: dict[str, Any]
) -> dict[str, Any]:
    """Rates of each arm, and what share of the card's arithmetic it used.

    Model FLOPs are those of the policy's forward pass, of the reference's, and of the backward
    pass through frozen weights, which is one more: no weight gradients, and no recomputation.
    Executed FLOPs are all that `torch.utils.flop_counter` saw in a step, recomputation included.
    """
    seconds = medians(rounds)
    limit = matmul_tflops(machine) * 1e12
    forward = found["forward_flops"]
    model_flops = {
        "stock": 3 * forward["stock"],
        "first": 3 * forward["ours"],
        "cached": 2 * forward["ours"],
    }
    ratios = medians([_ratios(r) for r in rounds])
    return {
        "rounds": len(rounds),
        "seconds": seconds,
        "spread": {n: [min(r[n] for r in rounds), max(r[n] for r in rounds)] for n in seconds},
        "ratio": ratios,
        "counted_ratio": _ratios(found["flops"]),
        "pairs_per_s": {name: found["pairs"] / s for name, s in seconds.items()},
        "stock_tokens_per_s": {n: found["tokens"]["stock"] / s for n, s in seconds.items()},
        "model_flops_per_s": {name: model_flops[name] / s for name, s in seconds.items()},
        "executed_flops_per_s": {name: found["flops"][name] / s for name, s in seconds.items()},
        "matmul_flops_per_s": limit,
    }


def letters_only(model: Any, processor: Any) -> None:
    """Make the head choose letters only, so that random weights give readable answers that do not
    end early and differ where token ids differ.
    """
    tokenizer = processor.tokenizer
    kept = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        rows = head[kept].clone()
        head.zero_()
        head[kept] = rows


def asking(machine: Machine) -> dict[str, Any]:
    """Questions per second: one `generate` a question, batches of `generate`, and ours."""
    shape = architecture(machine, LLAVA.model)

    def make() -> Any:
        return build(machine, shape.config, machine.dtype).requires_grad_(False)

    model, processor = machine.hold("asked model", make), shape.processor
    model.config.pad_token_id = model.generation_config.pad_token_id = (
        processor.tokenizer.pad_token_id
    )
    letters_only(model, processor)
    images = _images_with_questions(machine)
    runs = _ways(model, processor, images)
    answers = {way: run() for way, run in runs.items()}
    asked = [(image, q) for image, questions in images for q in questions]
    differing = {
        way: [
            n
            for n, (a, b) in enumerate(zip(texts, answers["one at a time"], strict=True))
            if a != b
        ]
        for way, texts in answers.items()
    }
    near_ties = {
        n: is_near_tie(model, processor, *asked[n], _ANSWER_TOKENS)
        for n in sorted(set().union(*differing.values()))
    }
    budget = min(60.0, machine.seconds_left() / 2)
    rounds = interleaved(runs, 1 if machine.toy else 3, clock=machine.clock, budget_s=budget)
    wrong = [n for n in differing["ours"] if not near_ties[n]]
    return {
        "model": LLAVA.model,
        "images": len(images),
        "questions": len(asked),
        "answer_tokens": _ANSWER_TOKENS,
        "distinct_answers": len(set(answers["one at a time"])),
        "rounds": len(rounds),
        "questions_per_s": {way: len(asked) / s for way, s in medians(rounds).items()},
        "ratio": medians([{w: r["one at a time"] / r[w] for w in runs} for r in rounds]),
        "differing": {way: len(numbers) for way, numbers in differing.items()},
        "near_ties": sum(near_ties.values()),
        "wrong": len(wrong),
        "passed": not wrong,
    }


def _images_with_questions(machine: Machine) -> list[tuple[Image.Image, list[str]]]:
    rng = np.random.default_rng(0)
    width, height = (32, 24) if machine.toy else (640, 480)
    images, questions = (1, 3) if machine.toy else (_IMAGES, _QUESTIONS)

    def question() -> str:
        return "".join(rng.choice(list("abcdefgh"), size=int(rng.integers(10, 16))))

    return [
        (
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)),
            [question() for _ in range(questions)],
        )
        for _ in range(images)
    ]


def _ways(
    model: Any, processor: Any, images: list[tuple[Image.Image, list[str]]]
) -> dict[str, Callable[[], list[str]]]:
    def one_at_a_time() -> list[str]:
        return [
            answer(model, processor, [image], [question], _ANSWER_TOKENS)[0]
            for image, questions in images
            for question in questions
        ]

    def batched() -> list[str]:
        return [
            text
            for image, questions in images
            for text in answer(
                model, processor, [image] * len(questions), questions, _ANSWER_TOKENS
            )
        ]

    def ours() -> list[str]:
        decoder = PromptTreeDecoder(model, processor, keep_features=True)
        assert not decoder.reason_not_shared, decoder.reason_not_shared
        answers: list[str] = []
        for image, questions in images:
            with decoder.open(image) as opened:
                answers += opened.answer(questions, _ANSWER_TOKENS)
        return answers

    return {"one at a time": one_at_a_time, "batched": batched, "ours": ours}


# By the names of CUDA's kernels; the first that fits counts.
_KERNEL_GROUPS = (
    ("attention", ("fmha", "flash", "attention", "sdpa")),
    ("optimizer and clipping", ("multi_tensor", "adam", "lpnorm")),
    ("copies, casts and indexing", ("memcpy", "memset", "copy", "index", "gather", "scatter")),
    (
        "matrix products",
        ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "convol", "aten::mm", "::addmm"),
    ),
    ("norms, softmax and elementwise", ("elementwise", "norm", "softmax", "reduce", "triton")),
)
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_WORK = ("cpu_op", "cuda_runtime", "cuda_driver")
_SYNCHRONIZING = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")


def profiled_step(machine: Machine) -> dict[str, Any]:
    """Where the time of one step goes, of stock TRL and of ours."""
    duo = duo_of(machine, LLAVA)
    runs = arms(machine, duo, LLAVA.rows(machine))
    for run in runs.values():
        run()
    names = ("first", "stock")
    return {"model": LLAVA.model, **{name: _profile(machine, runs[name]) for name in names}}


def _profile(machine: Machine, run: Callable[[], object]) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * machine.is_cuda
    machine.clock()
    with profile(activities=activities) as profiled:
        run()
        machine.clock()
    path = machine.folder / "trace.json"
    profiled.export_chrome_trace(str(path))
    text = path.read_bytes()
    text = gzip.decompress(text) if text[:2] == b"\x1f\x8b" else text
    events = [
        event
        for event in json.loads(text)["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in (*_HOST_WORK, *_DEVICE_WORK)
    ]
    path.unlink()
    # A CPU has no kernels: there the operators stand in, which contain each other.
    work = [e for e in events if e.get("cat") in (_DEVICE_WORK if machine.is_cuda else ("cpu_op",))]
    begin, end = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
    groups: Counter[str] = Counter()
    names: Counter[str] = Counter()
    counts = Counter(e["name"] for e in work)
    for event in work:
        groups[_group(event["name"])] += event["dur"] / 1e6
        names[event["name"]] += event["dur"] / 1e6
    busy = covered((e["ts"], e["ts"] + e["dur"]) for e in work) / 1e6
    return {
        "seconds": (end - begin) / 1e6,
        "busy_seconds": busy,
        "busy_share": busy * 1e6 / (end - begin),
        "kernels": len(work),
        "seconds_by_group": dict(groups.most_common()),
        "top": [
            {"name": name[:120], "seconds": seconds, "count": counts[name], "group": _group(name)}
            for name, seconds in names.most_common(25)
        ],
        "host_syncs": dict(
            Counter(
                e["name"]
                for e in events
                if "Synchronize" in e["name"]
                or e["name"] in _SYNCHRONIZING
                or "Memcpy DtoH" in e["name"]
            )
        ),
    }


def _group(kernel: str) -> str:
    name = kernel.lower()
    return next(
        (group for group, words in _KERNEL_GROUPS if any(word in name for word in words)),
        "the rest",
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
