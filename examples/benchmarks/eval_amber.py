"""Questions and descriptions: asked one at a time, batched, and as `vlmdpo eval` asks them.

    python examples/benchmarks/eval_amber.py [--json] [--markdown FILE] [--cases llava ...]

All ways use the same model and images, in the same process. Image processing is included. A case
passes if all ways give the same answers, and ours reaches its required speed-up.

Questions, three tokens per answer ("No", ".", end): "one at a time" is the article's loop,
processor and `generate` for each question. "Batched" is `generate` on left-padded batches of an
image's questions. "Ours" encodes each image and the common beginning of its prompts once. AMBER has
fourteen questions per image on average. POPE has eighteen in its three splits, of which 10.25 on
average differ: all splits ask about the same three objects that are there, and share some of those
that are not. Ours asks equal questions about an image once.

Descriptions, of images in sizes that COCO has: "batched" takes images as they come, and ours, as
`vlmdpo eval` does, sorted by size, so that batches need less padding. It must be as fast as
batched. Where all images have equally many tokens, as with LLaVA, both do the same work, and 3% are
left for noise.

Models are small, with random weights. Image tokens, prompt tokens, and the ratio of the vision
tower's work to the language model's are those of the real models, and are printed (a letter is a
token here, so questions and chat templates are short). This ratio decides what is possible: at
640×480, Idefics2's tower sees 1,530 patches; at its full 980 pixels, 3,640.

Ratios are of CPU time on one thread; the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _threads  # noqa: F401 - before torch
import numpy as np
import torch
from _cases import measure_each
from _measure import counted_flops, interleaved, medians, versions
from _train_shapes import IDEFICS2, LLAVA, QWEN, Shape
from _train_shapes import _share as real_share
from _train_shapes import _tower as tower
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlmdpo import ui
from vlmdpo.benchmarks.answers import AnswerStore
from vlmdpo.benchmarks.ask import Asking, Outcome
from vlmdpo.benchmarks.base import Question
from vlmdpo.benchmarks.image_folder import DrawnImages
from vlmdpo.config import EvalAmberConfig
from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import answer
from vlmdpo.models.rendering import render_question
from vlmdpo.tiny import random_models

TOKENS = 3
DESCRIPTION_TOKENS = 32
BATCH = 4  # descriptions
AMBER_QUESTIONS = 14
POPE_DISTINCT = (10, 11, 10, 10)  # of the 18 questions about an image, in turns
COCO_SIZES = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (640, 640), (640, 360))
ONE_AT_A_TIME, BATCHED, OURS = "one at a time", "batched", "ours"

Ways = dict[str, Callable[[], list[str]]]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        ways: (model, processor, shape, images) → each way of asking the same.
        prompt: tokens of a real prompt.
        wanted: the required speed-up of ours over the way `over`; None: only the answers must
            agree.
    """

    shape: Shape
    ways: Callable[[Any, Any, Shape, int], Ways]
    prompt: int
    wanted: float | None
    over: str = ONE_AT_A_TIME


# As many tokens as real templates have around image and question.
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}u:<image>{% else %}{{ part['text'] }}{% endif %}{% endfor "
    "%}{% endfor %}~ai:"
)
_WITH_TEMPLATE = ("llava", "idefics2")  # which write an image as <image>


def random_image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """An image of this width and height."""
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def questions_of(
    shape: Shape, images: int, texts: Callable[..., list[str]] | None = None
) -> list[tuple[Image.Image, list[str]]]:
    """Random images, each with its questions of 8 to 10 letters."""
    rng = np.random.default_rng(0)

    def question() -> str:
        return "".join(rng.choice(list("abcdefgh"), size=int(rng.integers(8, 11))))

    return [
        (random_image(rng, shape.image), (texts or amber_questions)(question, number))
        for number in range(images)
    ]


def amber_questions(question: Callable[[], str], _: int) -> list[str]:
    """As many as AMBER has about an image."""
    return [question() for _ in range(AMBER_QUESTIONS)]


def pope_questions(question: Callable[[], str], number: int) -> list[str]:
    """POPE's three splits: each asks for the same three objects that are there, and for three that
    are not, of which another split may ask as well.
    """
    there = [question() for _ in range(3)]
    absent = [question() for _ in range(POPE_DISTINCT[number % len(POPE_DISTINCT)] - 3)]
    absent += absent[: 9 - len(absent)]
    return [text for i in range(9) for text in (there[i % 3], absent[i])]


def toy(shape: Shape) -> tuple[Any, Any]:
    """The small model and its processor."""
    model, processor = random_models.make(
        shape.family,
        text=shape.text,
        vision=shape.vision,
        image_size=shape.image_size,
        **shape.more,
    )
    if shape.family in _WITH_TEMPLATE:
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
        for name in ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
        if name in inputs
    }
    vision = counted_flops(lambda: model.base_model.get_image_features(**pixels))
    whole = counted_flops(lambda: model.base_model(**inputs, use_cache=False))
    return inputs["input_ids"].shape[1], vision / (whole - vision)


def question_ways(
    model: Any,
    processor: Any,
    shape: Shape,
    images: int,
    texts: Callable[..., list[str]] = amber_questions,
) -> Ways:
    """The three ways of asking about each image on its own."""
    everything = questions_of(shape, images, texts)

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
            for t in answer(model, processor, [p] * len(questions), questions, TOKENS)
        ]

    def ours() -> list[str]:
        decoder = PromptTreeDecoder(model, processor, keep_features=True)
        assert not decoder.reason_not_shared
        answers = []
        for image, questions in everything:
            distinct = list(dict.fromkeys(questions))
            with decoder.open(image) as opened:
                by_text = dict(zip(distinct, opened.answer(distinct, TOKENS), strict=True))
            answers += [by_text[text] for text in questions]
        return answers

    return {ONE_AT_A_TIME: one_at_a_time, BATCHED: batched, OURS: ours}


def description_ways(model: Any, processor: Any, shape: Shape, images: int) -> Ways:
    """The three ways of asking one question about each of `images` × BATCH images."""
    rng = np.random.default_rng(0)
    scale = shape.image[0] / COCO_SIZES[0][0]
    sizes = rng.choice(COCO_SIZES, size=images * BATCH)
    pictures = [random_image(rng, (round(w * scale), round(h * scale))) for w, h in sizes]
    text = "abcdefgh"

    def in_batches(size: int) -> list[str]:
        return [
            t
            for start in range(0, len(pictures), size)
            for some in [pictures[start : start + size]]
            for t in answer(model, processor, some, [text] * len(some), DESCRIPTION_TOKENS)
        ]

    def ours() -> list[str]:
        asked = tuple(Question(n, str(n), text) for n in range(len(pictures)))
        images = DrawnImages(lambda name: pictures[int(name)])
        benchmark = SimpleNamespace(
            questions=(), descriptions=asked, images=images, is_settled=lambda answer: False
        )
        config = EvalAmberConfig(batch_size=BATCH, max_description_tokens=DESCRIPTION_TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            store = AnswerStore(Path(folder), {})
            outcome = Outcome(config.engine)
            asking = Asking(config, benchmark, model, processor, ["base"], store, (0, 1), outcome)
            assert not asking.run().reason
            store.close()
        return [store.of("base")[one.id] for one in asked]

    return {ONE_AT_A_TIME: partial(in_batches, 1), BATCHED: partial(in_batches, BATCH), OURS: ours}


pope_ways = partial(question_ways, texts=pope_questions)
CASES = (
    Case(replace(LLAVA, name="LLaVA-1.5-7B, 576 image tokens"), question_ways, 592, 9.0),
    Case(
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
        question_ways,
        80,
        10.0,
    ),
    Case(
        replace(IDEFICS2, name="Idefics2-8B, 64 image tokens, 640×480", vision=tower(64, 3, 200)),
        question_ways,
        80,
        None,
    ),
    Case(replace(LLAVA, name="POPE, LLaVA-1.5-7B, 576 image tokens"), pope_ways, 592, 10.0),
    Case(
        replace(LLAVA, name="descriptions, LLaVA-1.5-7B, 576 image tokens"),
        *(description_ways, 592, 0.97, BATCHED),
    ),
    Case(
        replace(
            QWEN,
            name="descriptions, Qwen2.5-VL-7B, 640×480 and other sizes",
            image=(368, 276),
            real_vision_share=real_share(1564, 0.632e9, 4, 1280, 6.53e9, extra=2 * 0.045e9 * 391),
        ),
        *(description_ways, 410, 1.0, BATCHED),
    ),
)


def measure(case: Case, images: int, repeats: int) -> dict[str, Any]:
    """One case: medians, ratios over the way it is compared with, counted FLOPs, agreement."""
    shape, over = case.shape, case.over
    model, processor = toy(shape)
    tokens, share = measured_share(model, processor, shape)
    runs = case.ways(model, processor, shape, images)
    answers = {way: run() for way, run in runs.items()}
    differ = sum(len(set(texts)) > 1 for texts in zip(*answers.values(), strict=True))
    flops = {way: counted_flops(run) for way, run in runs.items()}
    rounds = interleaved(runs, repeats, clock=time.process_time)
    ratios = medians([{way: spent[over] / spent[way] for way in runs} for spent in rounds])
    count = len(answers[OURS])
    return {
        "name": shape.name,
        "questions": count,
        "questions_per_cpu_s": {way: count / seconds for way, seconds in medians(rounds).items()},
        "over": over,
        "ratio": ratios[OURS],
        "ratios": ratios,
        "counted": {way: flops[over] / flops[way] for way in runs},
        "agreement": differ,
        "vision_share": {"toy": share, "real": shape.real_vision_share(case.prompt)},
        "prompt_tokens": {"toy": tokens, "real": case.prompt},
        "distinct_answers": len(set(answers[OURS])),
        "wanted": case.wanted,
        "passed": differ == 0 and ratios[OURS] >= (case.wanted or 0),
    }


COLUMNS = (
    *("model's proportions", "a CPU second: one at a time / batched / ours", "over"),
    *("one at a time", "batched", "ours", "counted FLOPs, ours", "answers that differ", "passed"),
)


def _row(case: dict[str, Any]) -> list[str]:
    wanted = case["wanted"]
    return [
        case["name"],
        " / ".join(f"{value:.1f}" for value in case["questions_per_cpu_s"].values()),
        case["over"],
        *(f"{case['ratios'][way]:.2f}×" for way in (ONE_AT_A_TIME, BATCHED)),
        f"{case['ratio']:.2f}×" + (f" (must be {wanted:g})" if wanted else ""),
        f"{case['counted'][OURS]:.2f}×",
        f"{case['agreement']} of {case['questions']}",
        "yes" if case["passed"] else "NO",
    ]


def markdown(cases: list[dict[str, Any]], repeats: int) -> str:
    """The dated report."""
    lines = [
        "# Questions and descriptions: one at a time, batched, and as `vlmdpo eval` asks",
        "",
        f"{datetime.date.today()}, {versions('torch', 'transformers')}, 1 CPU thread, float32, "
        "CPU time, medians of",
        f"{repeats} interleaved rounds. Repeat with `python examples/benchmarks/eval_amber.py`, "
        "whose head says what is measured.",
        "Each way's ratio is over the way named in the third column.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(_row(case)) + " |" for case in cases),
    ]
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


def quick_cases() -> list[Case]:
    """The first of each kind."""
    kinds = {case.ways: case for case in reversed(CASES)}
    return [case for case in CASES if kinds[case.ways] is case]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", help="only those whose name contains one of these, in any case"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one of each kind, one image, 2 rounds"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        help=f"images per round, and {BATCH} times as many to describe; 3, or 1 with --quick",
    )
    parser.add_argument("--repeats", type=int, help="measured rounds; 5, or 2 with --quick")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ui.set_verbosity(quiet=True, yes=True)  # no bars of the descriptions in between
    words = [word.lower() for word in options.cases or [""]]
    wanted = [
        case
        for case in (quick_cases() if options.quick else CASES)
        if any(word in case.shape.name.lower() for word in words)
    ]
    pictures = options.pictures or (1 if options.quick else 3)
    repeats = options.repeats or (2 if options.quick else 5)
    cases = measure_each(
        [partial(measure, case, pictures, repeats) for case in wanted],
        show=lambda case: f"{case['name']}: {case['ratio']:.2f}×",
        markdown=options.markdown,
        report=lambda done: markdown(done, repeats),
    )
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))
        return
    table = Table(*COLUMNS, title="the CPU time of one way ÷ that of each")
    for case in cases:
        table.add_row(*_row(case))
    Console(width=190).print(table)
    for c in cases:
        share, tokens = c["vision_share"], c["prompt_tokens"]
        print(
            f"{c['name']}: vision over language {share['toy']:.3f} (real {share['real']:.3f}), "
            f"prompt {tokens}"
        )


if __name__ == "__main__":
    main()
