"""Make the embedded training pairs: ask the embedded model, and rank its own answers by the scene's
truth.

For each question several answers are sampled. Where some are right and some wrong, the pair is one
of each, both in the model's own words. Where all are wrong, the right answer is written from the
scene. Where none is wrong there is nothing to learn, and no pair.
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

from vlmdpo.engine.generate import render_prompt
from vlmdpo.tiny import evaluation
from vlmdpo.tiny import scenes as sc

SAMPLES = 8
_QUESTIONS_PER_SCENE = 4
_DESCRIBE_SHARE = 0.08


@torch.inference_mode()
def sample(
    model: Any, processor: Any, pictures: list[Image.Image], questions: list[str], limit: int
) -> list[list[str]]:
    """SAMPLES answers to each question at temperature 1, each at most `limit` tokens."""
    inputs = processor(
        text=[render_prompt(processor, question) for question in questions],
        images=[[picture] for picture in pictures],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    made = model.generate(
        **inputs,
        max_new_tokens=limit,
        do_sample=True,
        temperature=1.0,
        num_return_sequences=SAMPLES,
    )
    texts = processor.batch_decode(
        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [
        [text.strip() for text in texts[i : i + SAMPLES]] for i in range(0, len(texts), SAMPLES)
    ]


def _ask(rng: random.Random) -> Iterator[tuple[sc.Scene, sc.Question | None]]:
    """Endless (scene, question), in AMBER's proportions of types, yes and no alike; None asks for a
    description.
    """
    shares = {}
    for (kind, truth), count in evaluation.QUOTA.items():
        shares[kind, truth] = float(count)
    # AMBER asks for no existing thing; a model tuned on absences alone would learn to deny
    # everything.
    shares[sc.EXISTENCE, "yes"] = shares[sc.EXISTENCE, "no"] = shares[sc.EXISTENCE, "no"] / 2
    groups, weights = list(shares), list(shares.values())
    while True:
        scene = sc.sample_scene(rng, "making")
        pools = sc.questions(scene, rng)
        for _ in range(_QUESTIONS_PER_SCENE):
            if rng.random() < _DESCRIBE_SHARE:
                yield scene, None
                continue
            group = rng.choices(groups, weights)[0]
            if pools.get(group):
                yield scene, pools[group].pop()


def _pair(
    scene: sc.Scene, question: sc.Question | None, answers: list[str], rng: random.Random
) -> dict[str, str] | None:
    if question is None:
        # Only descriptions in the form that can be judged are ranked; anything else cannot be told
        # right from wrong.
        judged = [
            (sc.description_errors(scene, text), text)
            for text in answers
            if sc.describe(sc.read_claims(text) or sc.truth_claims(scene)) == text
        ]
        # Only a faultless one is chosen: of two faulty ones the shorter would win, and shortness
        # would be learned.
        if not judged or min(judged)[0] > 0 or max(judged)[0] == 0:
            return None
        return {
            "question": sc.DESCRIBE,
            "chosen": min(judged)[1],
            "rejected": max(judged)[1],
            "origin": "sampled",
        }
    right = question.truth.capitalize()
    wrong = "No" if right == "Yes" else "Yes"
    if wrong not in answers:
        return None
    origin = "sampled" if right in answers else "truth"
    return {"question": question.text, "chosen": right, "rejected": wrong, "origin": origin}


def make_pairs(model: Any, processor: Any, wanted: int, seed: int) -> list[dict[str, Any]]:
    """`wanted` rows for `pairs.jsonl.gz`; scenes of the making half only."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    source = _ask(rng)
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
            for (scene, question), said in zip(asked, answers, strict=True):
                pair = _pair(scene, question, said, rng)
                if pair is not None:
                    rows.append({"scene": scene.spec(), **pair})
        print(f"pairs {len(rows)}/{wanted}", flush=True)
    rng.shuffle(rows)
    return rows[:wanted]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Store rows as gzipped JSON lines, the same bytes for the same rows."""
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
