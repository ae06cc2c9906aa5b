"""The three lessons that make the embedded model: naming, talking, agreeing. See `build`.

Shapes: B images, L packed tokens of an image and all its questions, W words.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import torch
from transformers import Idefics2ForConditionalGeneration, Idefics2Processor

from vlmdpo.tiny import scenes as sc

IMAGE_TOKENS = 16
END = "<end_of_utterance>"
_STARTED = time.monotonic()


@dataclass(frozen=True)
class Lesson:
    """One stage of training."""

    steps: int
    learning_rate: float
    images_per_step: int = 8
    questions_per_image: int = 10
    yes_for_no: float = 0.0  # share of true "No" answers taught as "Yes"
    companion_for_none: float = 0.0  # share of descriptions that name a missing companion


NAMING = Lesson(steps=400, learning_rate=1e-3, images_per_step=64)
TALKING = Lesson(steps=3000, learning_rate=1e-3)
AGREEING = Lesson(steps=300, learning_rate=3e-4, yes_for_no=0.5, companion_for_none=0.5)


class Teacher:
    """Turns scenes into packed batches."""

    def __init__(self, processor: Idefics2Processor, lesson: Lesson, rng: random.Random) -> None:
        self.processor, self.lesson, self.rng = processor, lesson, rng
        image = "<fake_token_around_image>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
        self.prefix = self._ids("User:" + image)
        self._known: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of one question, and of its answer with its end token."""
        known = []
        for text in (f" {question}{END}\nAssistant:", f" {answer}{END}"):
            if text not in self._known:
                self._known[text] = self._ids(text)
            known.append(self._known[text])
        return known[0], known[1]

    def _turns(self, scene: sc.Scene) -> list[tuple[list[int], list[int]]]:
        groups = list(sc.questions(scene, self.rng).values())
        picked: list[sc.Question] = []
        while groups and len(picked) < self.lesson.questions_per_image:
            group = self.rng.choice(groups)  # by (type, truth), so that "yes" and "no" balance
            picked.append(group.pop())
            groups = [g for g in groups if g]
        turns = []
        for question in picked:
            says_yes = question.truth == "yes" or self.rng.random() < self.lesson.yes_for_no
            turns.append(self._turn(question.text, "Yes" if says_yes else "No"))
        claims = sc.truth_claims(scene)
        missing = [sc.COMPANION[k] for k in scene.kinds() if sc.COMPANION[k] not in scene.kinds()]
        if missing and self.rng.random() < self.lesson.companion_for_none:
            invented = sc.Claim(self.rng.choice(missing), "one", self.rng.choice(sc.COLOURS), "")
            claims.insert(self.rng.randrange(len(claims) + 1), invented)
        turns.append(self._turn(sc.DESCRIBE, sc.describe(claims)))
        return turns

    def batch(self) -> dict[str, torch.Tensor]:
        """One step's data: ids, labels and positions (B, L), mask (B, 1, L, L), and pixels."""
        drawn = [sc.sample_scene(self.rng, "making") for _ in range(self.lesson.images_per_step)]
        rows = []
        for scene in drawn:
            ids, labels = list(self.prefix), [-100] * len(self.prefix)
            positions, segment = list(range(len(self.prefix))), [0] * len(self.prefix)
            for number, (question, answer) in enumerate(self._turns(scene), start=1):
                ids += question + answer
                labels += [-100] * len(question) + answer
                positions += range(len(self.prefix), len(self.prefix) + len(question) + len(answer))
                segment += [number] * (len(question) + len(answer))
            rows.append((ids, labels, positions, segment))
        length = max(len(row[0]) for row in rows)
        fill = (self.processor.tokenizer.pad_token_id, -100, 0, -1)
        ids_t, labels_t, positions_t, segment_t = (
            torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows])
            for i in range(4)
        )
        same = segment_t[:, :, None] == segment_t[:, None, :]
        seen = (same | (segment_t == 0)[:, None, :]) & torch.ones(
            length, length, dtype=torch.bool
        ).tril()
        # Eager attention adds the mask to the scores; a boolean one would be added as 0 and 1.
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
        pixels = self.processor.image_processor(
            [[sc.draw(scene)] for scene in drawn], return_tensors="pt"
        )
        return {
            "input_ids": ids_t,
            "attention_mask": mask[:, None],
            "position_ids": positions_t,
            "pixel_values": pixels["pixel_values"],
            "labels": labels_t,
        }


def _cell_labels(scene: sc.Scene) -> list[list[int]]:
    """For each of the nine cells: kind (the last number means "empty"), colour, action, in contact;
    -100 for what an empty cell lacks.
    """
    labels = [[len(sc.KINDS), -100, -100, -100] for _ in range(9)]
    touching = {cell for pair in scene.touching for cell in pair}
    for thing in scene.things:
        action = (*sc.ACTIONS, "").index(thing.action)
        labels[thing.cell] = [
            sc.KINDS.index(thing.kind),
            sc.COLOURS.index(thing.colour),
            action,
            int(thing.cell in touching),
        ]
    return labels


def teach_naming(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, lesson: Lesson, seed: int
) -> None:
    """The first lesson, for vision tower and connector: what is in each cell?

    A patch is a cell, so the tower's output at a patch must give its cell's content and number.
    Each of the connector's first nine tokens must give the content of one cell, by its similarity
    to the language model's embeddings of "star", "red", "spin". Learning this from questions and
    answers alone takes hours.
    """
    rng = random.Random(seed)
    sizes = [len(sc.KINDS) + 1, len(sc.COLOURS), len(sc.ACTIONS) + 1, 2]
    tower, connector = model.model.vision_model, model.model.connector
    width = tower.config.hidden_size
    content, place, rest = (
        torch.nn.Linear(width, sum(sizes)),
        torch.nn.Linear(width, 9),
        torch.nn.Linear(width, 4),
    )
    parameters = [
        p for module in (tower, connector, content, place, rest) for p in module.parameters()
    ]
    optimizer = torch.optim.AdamW(
        parameters, lr=lesson.learning_rate, betas=(0.9, 0.98), weight_decay=0.02
    )
    cells = torch.arange(9).repeat(lesson.images_per_step, 1)
    word_embeddings = [
        _word_embeddings(model, processor, names) for names in (sc.KINDS, sc.COLOURS, sc.ACTIONS)
    ]
    for step in range(lesson.steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson.learning_rate * _schedule(step, lesson.steps)
        drawn = [sc.sample_scene(rng, "making") for _ in range(lesson.images_per_step)]
        pixels = processor.image_processor(
            [[sc.draw(scene)] for scene in drawn], return_tensors="pt"
        )["pixel_values"]
        labels = torch.tensor([_cell_labels(scene) for scene in drawn])
        seen = tower(pixels[:, 0]).last_hidden_state
        passed = connector(seen, attention_mask=torch.ones(seen.shape[:2], dtype=torch.bool))[:, :9]
        kind, colour, action = (passed @ names.T / 4 for names in word_embeddings)
        other = rest(passed)  # there is no word for "empty", "at rest", "apart", "in contact"
        named = torch.cat([kind, other[..., :1], colour, action, other[..., 1:]], dim=-1)
        loss = _naming_loss(content(seen), labels, sizes) + _naming_loss(named, labels, sizes)
        loss = loss + torch.nn.functional.cross_entropy(place(seen).flatten(0, 1), cells.flatten())
        _optimizer_step(loss, optimizer, parameters)
        _print_progress(step, lesson.steps, loss)


def _word_embeddings(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, names: tuple[str, ...]
) -> torch.Tensor:
    """(W, width) embeddings of words that are one token each, detached."""
    ids = [processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    assert all(len(tokens) == 1 for tokens in ids), "every word of the scenes must be one token"
    return model.get_input_embeddings().weight[[tokens[0] for tokens in ids]].detach().clone()


def _naming_loss(named: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Cross-entropy of kind, colour, action and contact.

    Shapes: `named` (B, 9, sum(sizes)), `labels` (B, 9, 4).
    """
    parts = named.split(sizes, dim=-1)
    losses = [
        torch.nn.functional.cross_entropy(p.flatten(0, 1), labels[..., i].flatten())
        for i, p in enumerate(parts)
    ]
    return torch.stack(losses).sum()


def _schedule(step: int, steps: int) -> float:
    """A share of the peak rate: warm-up over 1/30 of the steps, then cosine to 1/20."""
    return min(
        (step + 1) / max(1, steps // 30), 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def _optimizer_step(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _print_progress(step: int, steps: int, loss: torch.Tensor) -> None:
    if step % 100 == 0 or step == steps - 1:
        print(
            f"step {step:5d}/{steps}  loss {loss.item():.4f}  {time.monotonic() - _STARTED:6.0f} s",
            flush=True,
        )


def teach(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, lesson: Lesson, seed: int
) -> None:
    """A lesson for the language model, with the loss on answer tokens only.

    Vision tower and connector are frozen. Adam moves every weight by about the learning rate,
    however small its gradient, and the noise of a language model that cannot read yet would destroy
    what they know within a hundred steps.
    """
    teacher = Teacher(processor, lesson, random.Random(seed))
    # At these sizes, eager attention is twice as fast as the CPU's fused one with a mask.
    model.set_attn_implementation("eager")
    for module in (model.model.vision_model, model.model.connector):
        module.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=lesson.learning_rate, betas=(0.9, 0.98), weight_decay=0.02
    )
    model.train()
    for step in range(lesson.steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson.learning_rate * _schedule(step, lesson.steps)
        batch = teacher.batch()
        labels = batch.pop("labels")[:, 1:]
        is_answer = labels != -100
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[is_answer])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[is_answer])
        _optimizer_step(loss, optimizer, parameters)
        _print_progress(step, lesson.steps, loss)
    model.requires_grad_(True)
