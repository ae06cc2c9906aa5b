"""Make the embedded training pairs: sample the embedded model's answers, and rank them by the
scene's truth.

For each question several answers are sampled. Where some are right and some wrong, the pair is one
of each, both sampled. Where all are wrong, the right answer is written from the scene. Where none
is wrong there is nothing to learn, and no pair.

A description without errors makes up to two pairs: against the worst of those that are longer, and
against the worst of the others. So no description is chosen for being short. The scenes that the
model always gets wrong are those with the most things; without them, long descriptions would hardly
be chosen.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmdpo.models.protocols import Processor, VisionLanguageModel
from vlmdpo.models.rendering import render_question
from vlmdpo.tiny import evaluation
from vlmdpo.tiny import scenes as sc

SAMPLES = 8
_QUESTIONS_PER_SCENE = 4


@torch.inference_mode()
def sample(
    model: VisionLanguageModel,
    processor: Processor,
    images: list[Image.Image],
    questions: list[str],
    max_new_tokens: int,
) -> list[list[str]]:
    """SAMPLES answers to each question, at temperature 1."""
    inputs = processor(
        text=[render_question(processor, question) for question in questions],
        images=[[image] for image in images],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    sequences = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        num_return_sequences=SAMPLES,
    )
    texts = processor.batch_decode(
        sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [
        [text.strip() for text in texts[i : i + SAMPLES]] for i in range(0, len(texts), SAMPLES)
    ]


def _sample_questions(rng: random.Random) -> Iterator[tuple[sc.Scene, sc.Question | None]]:
    """Endless (scene, question), in AMBER's proportions of types, with as many "yes" as "no".

    None in place of a question asks for a description, once for each scene.
    """
    shares = {}
    for (kind, truth), count in evaluation.QUOTAS.items():
        shares[kind, truth] = float(count)
    # AMBER never asks about the existence of what is there; a model tuned on absences alone would
    # learn to deny everything.
    shares[sc.EXISTENCE, "yes"] = shares[sc.EXISTENCE, "no"] = shares[sc.EXISTENCE, "no"] / 2
    groups, weights = list(shares), list(shares.values())
    while True:
        scene = sc.sample_scene(rng, "train")
        pools = sc.questions(scene, rng)
        yield scene, None
        for _ in range(_QUESTIONS_PER_SCENE):
            group = rng.choices(groups, weights)[0]
            if pools.get(group):
                yield scene, pools[group].pop()


def _question_pairs(question: sc.Question, answers: list[str]) -> list[dict[str, str]]:
    """The pair of a question's answers, if any of them is wrong."""
    right = question.truth.capitalize()
    wrong = "No" if right == "Yes" else "Yes"
    if wrong not in answers:
        return []
    origin = "sampled" if right in answers else "truth"
    return [{"question": question.text, "chosen": right, "rejected": wrong, "origin": origin}]


def _description_pairs(scene: sc.Scene, answers: list[str]) -> list[dict[str, str]]:
    """Up to two pairs of a scene's descriptions: see the module's docstring."""
    # Only descriptions worded as `describe` words them are ranked: others cannot be scored.
    scored = {
        text: sc.description_errors(scene, text)
        for text in answers
        if sc.describe(sc.read_claims(text) or sc.truth_claims(scene)) == text
    }
    right = sorted(text for text, errors in scored.items() if not errors)
    chosen = right[0] if right else sc.describe(sc.truth_claims(scene))
    pairs = []
    for is_longer in (True, False):
        wrong = [
            (errors, text)
            for text, errors in scored.items()
            if errors and (len(text.split()) > len(chosen.split())) == is_longer
        ]
        if wrong:
            rejected = max(wrong)[1]
            pairs.append({"question": sc.DESCRIBE, "chosen": chosen, "rejected": rejected})
    return [{**pair, "origin": "sampled" if right else "truth"} for pair in pairs]


def make_pairs(
    model: VisionLanguageModel, processor: Processor, wanted: int, seed: int
) -> list[dict[str, Any]]:
    """`wanted` rows for `pairs.jsonl.gz`, of scenes of the train split only."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    source = _sample_questions(rng)
    rows: list[dict[str, Any]] = []
    while len(rows) < wanted:
        batch = [next(source) for _ in range(96)]
        for described in (False, True):
            asked = [
                (scene, question) for scene, question in batch if (question is None) == described
            ]
            if not asked:
                continue
            texts = [sc.DESCRIBE if question is None else question.text for _, question in asked]
            answers = sample(
                model,
                processor,
                [sc.draw(scene) for scene, _ in asked],
                texts,
                64 if described else 4,
            )
            for (scene, question), samples in zip(asked, answers, strict=True):
                pairs = (
                    _description_pairs(scene, samples)
                    if question is None
                    else _question_pairs(question, samples)
                )
                rows += [{"scene": scene.spec(), **pair} for pair in pairs]
        print(f"pairs {len(rows)}/{wanted}", flush=True)
    rng.shuffle(rows)
    return rows[:wanted]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Store rows as gzipped JSON lines, the same bytes for the same rows."""
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
