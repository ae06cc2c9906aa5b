"""AMBER's yes/no questions asked in three ways: one at a time, batched, and shared.

    python examples/benchmarks/eval_amber.py [--json] [--markdown FILE] [--cases llava ...]

All three use the same model and images, in the same process: fourteen questions per image, as AMBER
has on average, and three tokens per answer ("No", ".", end). "One at a time" is the article's loop:
processor and `generate` for each question. "Batched" is `generate` on left-padded batches of 14.
"Ours" is what `vlmdpo eval-amber` does: each image and the common beginning of its prompts once.
Image processing is included in all three. Models are small, with random weights. Image tokens,
prompt tokens, and the ratio of the vision tower's work to the language model's are those of the
real models, and are printed (a letter is a token here, so questions and chat templates are short).
This ratio decides what is possible: at 640×480, Idefics2's tower sees 1,530 patches; at its full
980 pixels, 3,640.

Ratios are of CPU time on one thread; the median over the rounds counts. A case passes if all three
ways give the same answers, and ours reaches its required speed-up over one at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _threads  # noqa: F401 - before torch
import numpy as np
import torch
from _cases import measure_each
from _measure import counted_flops, interleaved, medians, versions
from _train_shapes import IDEFICS2, LLAVA, Shape
from _train_shapes import _share as real_share
from _train_shapes import _tower as tower
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import answer
from vlmdpo.models.rendering import render_question
from vlmdpo.tiny import random_models

QUESTIONS, TOKENS = 14, 3
# (shape, tokens of a real prompt, required speed-up of ours; None: only the answers must agree)
CASES = (
    (replace(LLAVA, name="LLaVA-1.5-7B, 576 image tokens"), 592, 9.0),
    (
        replace(
            IDEFICS2,
            name="Idefics2-8B, 64 image tokens, 980×735",
            image_size=560,
            image=(560, 416),
            vision=tower(60, 2, 200),
            real_vision_share=real_share(
                3640, 0.413e9, 27, 1152, 6.98e9, extra=2 * 0.092e9 * 3640 + 1.1e11
            ),
        ),
        80,
        10.0,
    ),
    (
        replace(IDEFICS2, name="Idefics2-8B, 64 image tokens, 640×480", vision=tower(64, 3, 200)),
        80,
        None,
    ),
)
# As many tokens as real templates have around image and question.
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}u:<image>{% else %}{{ part['text'] }}{% endif %}{% endfor "
    "%}{% endfor %}~ai:"
)


def questions_of(shape: Shape, images: int) -> list[tuple[Image.Image, list[str]]]:
    """Random images, each with its questions of 8 to 10 letters."""
    rng = np.random.default_rng(0)

    def question() -> str:
        return "".join(rng.choice(list("abcdefgh"), size=int(rng.integers(8, 11))))

    def image() -> Image.Image:
        return Image.fromarray(
            rng.integers(0, 255, (shape.image[1], shape.image[0], 3), dtype=np.uint8)
        )

    return [(image(), [question() for _ in range(QUESTIONS)]) for _ in range(images)]


def toy(shape: Shape) -> tuple[Any, Any]:
    """The small model and its processor."""
    model, processor = random_models.make(
        shape.family,
        text=shape.text,
        vision=shape.vision,
        image_size=shape.image_size,
        **shape.more,
    )
    processor.chat_template = _TEMPLATE
    model.eval().requires_grad_(False)  # FlopCounterMode hooks into gradients; none are needed
    return model, processor


def measured_share(model: Any, processor: Any, shape: Shape) -> tuple[int, float]:
    """Tokens of a prompt, and vision FLOPs over the language model's on it."""
    [(image, questions)] = questions_of(shape, 1)
    text = render_question(processor, questions[0])
    inputs = dict(
        processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
    )
    pixels = {
        name: inputs[name]
        for name in ("pixel_values", "pixel_attention_mask", "image_sizes")
        if name in inputs
    }
    vision = counted_flops(lambda: model.base_model.get_image_features(**pixels))
    whole = counted_flops(lambda: model.base_model(**inputs, use_cache=False))
    return inputs["input_ids"].shape[1], vision / (whole - vision)


def ways(
    model: Any, processor: Any, shape: Shape, images: int
) -> dict[str, Callable[[], list[str]]]:
    """The three ways of asking the same model the same questions."""
    everything = questions_of(shape, images)

    def one_at_a_time() -> list[str]:
        return [
            answer(model, processor, [p], [q], TOKENS)[0]
            for p, questions in everything
            for q in questions
        ]

    def batched() -> list[str]:
        return [
            t
            for p, questions in everything
            for t in answer(model, processor, [p] * QUESTIONS, questions, TOKENS)
        ]

    def ours() -> list[str]:
        decoder = PromptTreeDecoder(model, processor, keep_features=True)
        assert not decoder.reason_not_shared
        answers = []
        for image, questions in everything:
            with decoder.open(image) as opened:
                answers += opened.answer(questions, TOKENS)
        return answers

    return {"one at a time": one_at_a_time, "batched": batched, "ours": ours}


def measure(
    shape: Shape, prompt: int, required: float | None, images: int, repeats: int
) -> dict[str, Any]:
    """One case: medians, ratios, counted FLOPs, agreement."""
    model, processor = toy(shape)
    tokens, share = measured_share(model, processor, shape)
    runs = ways(model, processor, shape, images)
    answers = {way: run() for way, run in runs.items()}
    differ = sum(len(set(texts)) > 1 for texts in zip(*answers.values(), strict=True))
    flops = {way: counted_flops(run) for way, run in runs.items()}
    rounds = interleaved(runs, repeats, clock=time.process_time)
    ratios = medians(
        [{way: spent["one at a time"] / spent[way] for way in runs} for spent in rounds]
    )
    count = images * QUESTIONS
    return {
        "name": shape.name,
        "questions": count,
        "questions_per_cpu_s": {way: count / seconds for way, seconds in medians(rounds).items()},
        "ratio": ratios["ours"],
        "ratios": ratios,
        "counted": {way: flops["one at a time"] / flops[way] for way in runs},
        "agreement": differ,
        "vision_share": {"toy": share, "real": shape.real_vision_share(prompt)},
        "prompt_tokens": {"toy": tokens, "real": prompt},
        "distinct_answers": len(set(answers["ours"])),
        "wanted": required,
        "passed": differ == 0 and ratios["ours"] >= (required or 0),
    }


def markdown(cases: list[dict[str, Any]], repeats: int) -> str:
    """The dated report."""
    lines = [
        "# AMBER's yes/no questions: one at a time, batched, and shared",
        "",
        f"{datetime.date.today()}, {versions('torch', 'transformers')}, 1 CPU thread, float32, "
        "CPU time, medians of",
        f"{repeats} interleaved rounds. Repeat with `python examples/benchmarks/eval_amber.py`, "
        "whose head says what is measured.",
        "",
        "| model's proportions | questions/CPU s: one at a time / batched / ours | batched | ours "
        "| counted FLOPs, ours "
        "| answers that differ |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in cases:
        speed = " / ".join(f"{value:.1f}" for value in c["questions_per_cpu_s"].values())
        lines.append(
            f"| {c['name']} | {speed} | {c['ratios']['batched']:.2f}× | {c['ratio']:.2f}× | "
            f"{c['counted']['ours']:.2f}× "
            f"| {c['agreement']} of {c['questions']} |"
        )
    lines += [
        "",
        "FLOPs of vision over language model on one prompt, and its tokens (toy / real):",
        "",
    ]
    for c in cases:
        share, tokens = c["vision_share"], c["prompt_tokens"]
        lines.append(
            f"- {c['name']}: {share['toy']:.3f} / {share['real']:.3f}; {tokens['toy']} / "
            f"{tokens['real']} tokens"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", help="only shapes whose name contains one of these, in any case"
    )
    parser.add_argument("--quick", action="store_true", help="one shape, two rounds of one image")
    parser.add_argument("--pictures", type=int, help="images per round; 3, or 1 with --quick")
    parser.add_argument("--repeats", type=int, help="measured rounds; 5, or 2 with --quick")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [
        c
        for c in (CASES[:1] if options.quick else CASES)
        if not options.cases or any(word.lower() in c[0].name.lower() for word in options.cases)
    ]
    pictures = options.pictures or (1 if options.quick else 3)
    repeats = options.repeats or (2 if options.quick else 5)
    cases = measure_each(
        [partial(measure, *case, pictures, repeats) for case in wanted],
        show=lambda case: f"{case['name']}: {case['ratio']:.2f}×",
        markdown=options.markdown,
        report=lambda done: markdown(done, repeats),
    )
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))
        return
    table = Table(title="one at a time ÷ each way, CPU time")
    for column in ("shape", "batched", "ours", "counted FLOPs", "answers that differ", "passed"):
        table.add_column(column)
    for c in cases:
        table.add_row(
            c["name"],
            f"{c['ratios']['batched']:.2f}×",
            f"{c['ratio']:.2f}×" + (f" (must be {c['wanted']:.0f})" if c["wanted"] else ""),
            f"{c['counted']['ours']:.2f}×",
            f"{c['agreement']} of {c['questions']} ({c['distinct_answers']} distinct)",
            "yes" if c["passed"] else "NO",
        )
    Console(width=150).print(table)
    for c in cases:
        share, tokens = c["vision_share"], c["prompt_tokens"]
        print(
            f"{c['name']}: vision over language {share['toy']:.3f} (real {share['real']:.3f}), "
            f"prompt {tokens}"
        )


if __name__ == "__main__":
    main()
