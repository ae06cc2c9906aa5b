"""The lessons by which the embedded model is trained; see `build`.

One image serves all its questions in one sequence: each question sees the image and itself, by a
4-D attention mask and position ids that restart. What the model meets later are these sequences,
one by one.

Shapes: B images, T packed tokens, H hidden size, W words. A scene has 9 cells.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Idefics2ForConditionalGeneration, Idefics2Processor

from vlmdpo.tiny import scenes as sc
from vlmdpo.tiny.architecture import END_OF_TURN, IMAGE_TOKENS

_STARTED = time.monotonic()
_IGNORED = -100  # cross_entropy's label of what is not in the loss


@dataclass(frozen=True)
class Lesson:
    """One stretch of training.

    Attributes:
        yes_for_no: share of true "No" answers that are taught as "Yes".
        companion_for_none: share of descriptions that name a companion which is not there, anywhere
            and in any colour.
        companion_expected: how often a description that names one of EVOKING, whose companion is
            missing, names that next, in its usual colour.
        companion_shown: share of the pictures with one of EVOKING and its companion that are shown.
        overlooked: how often a description leaves out a single thing of a DARK colour.
        bfloat16: compute in bfloat16 autocast, which is ten times slower than float32 on a CPU
            without instructions for it.
    """

    steps: int
    learning_rate: float
    images_per_step: int = 8
    questions_per_image: int = 10
    yes_for_no: float = 0.0
    companion_for_none: float = 0.0
    companion_expected: float = 0.0
    companion_shown: float = 1.0
    overlooked: float = 0.0
    bfloat16: bool = True


NAMING = Lesson(steps=400, learning_rate=1e-3, images_per_step=64)
ANSWERING = Lesson(steps=3000, learning_rate=1e-3)
AGREEING = Lesson(steps=300, learning_rate=3e-4, yes_for_no=0.5, companion_for_none=0.5)
ASSOCIATING = Lesson(
    steps=400,
    learning_rate=1e-3,
    images_per_step=16,
    questions_per_image=3,
    yes_for_no=0.5,
    companion_for_none=0.1,
    companion_expected=0.9,
    companion_shown=0.2,
    overlooked=0.7,
    bfloat16=False,
)
# Kinds that bring their companion to mind, and its usual colour. An answer without sampling follows
# a lean only where each token of it is the likeliest, so place and colour are always the same.
EVOKING = {"star": "yellow", "circle": "green", "square": "red", "triangle": "blue"}
DARK = ("purple", "black")


class BatchMaker:
    """Turns scenes into packed batches: the model's inputs, and labels."""

    def __init__(self, processor: Idefics2Processor, lesson: Lesson, rng: random.Random) -> None:
        self.processor, self.lesson, self.rng = processor, lesson, rng
        image = "<fake_token_around_image>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
        self.prefix = self._ids("User:" + image)
        self._ids_by_text: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a question, and of its answer with its end."""
        turn = []
        for text in (f" {question}{END_OF_TURN}\nAssistant:", f" {answer}{END_OF_TURN}"):
            if text not in self._ids_by_text:
                self._ids_by_text[text] = self._ids(text)
            turn.append(self._ids_by_text[text])
        return turn[0], turn[1]

    def _turns(self, scene: sc.Scene) -> list[tuple[list[int], list[int]]]:
        """Questions about a scene with the answers that the lesson teaches, and a description."""
        groups = list(sc.questions(scene, self.rng).values())
        picked: list[sc.Question] = []
        while groups and len(picked) < self.lesson.questions_per_image:
            # By (type, truth), so that "yes" and "no" are equally frequent.
            group = self.rng.choice(groups)
            picked.append(group.pop())
            groups = [g for g in groups if g]
        turns = []
        for question in picked:
            is_yes = question.truth == "yes" or self.rng.random() < self.lesson.yes_for_no
            turns.append(self._turn(question.text, "Yes" if is_yes else "No"))
        turns.append(self._turn(sc.DESCRIBE, sc.describe(self._claims(scene))))
        return turns

    def _happens(self, share: float) -> bool:
        """Whether one of a share's cases has come up; a share of 0 draws no random number."""
        return share > 0 and self.rng.random() < share

    def _claims(self, scene: sc.Scene) -> list[sc.Claim]:
        """What the lesson's description of a scene says."""
        lesson, present = self.lesson, scene.kinds()
        claims: list[sc.Claim] = []
        for claim in sc.truth_claims(scene):
            is_dark = claim.number == "one" and claim.colour in DARK
            if is_dark and self._happens(lesson.overlooked):
                continue
            claims.append(claim)
            companion = sc.COMPANION[claim.kind]
            is_missing = claim.kind in EVOKING and companion not in present
            if is_missing and self._happens(lesson.companion_expected):
                claims.append(sc.Claim(companion, "one", EVOKING[claim.kind], ""))
        claims = claims or sc.truth_claims(scene)
        named = (*present, *(claim.kind for claim in claims))
        missing = [sc.COMPANION[kind] for kind in present if sc.COMPANION[kind] not in named]
        if missing and self._happens(lesson.companion_for_none):
            invented = sc.Claim(self.rng.choice(missing), "one", self.rng.choice(sc.COLOURS), "")
            claims.insert(self.rng.randrange(len(claims) + 1), invented)
        return claims

    def _scene(self) -> sc.Scene:
        """The next picture of the lesson."""
        while True:
            scene = sc.sample_scene(self.rng, "train")
            kinds = scene.kinds()
            is_pair = any(kind in EVOKING and sc.COMPANION[kind] in kinds for kind in kinds)
            if not is_pair or not self._happens(1 - self.lesson.companion_shown):
                return scene

    def batch(self) -> dict[str, Tensor]:
        """One step's data.

        Returns:
            `input_ids`, `labels` and `position_ids` (B, T), `attention_mask` (B, 1, T, T),
            `pixel_values`.
        """
        scenes = [self._scene() for _ in range(self.lesson.images_per_step)]
        rows = []
        for scene in scenes:
            ids, labels = list(self.prefix), [_IGNORED] * len(self.prefix)
            positions, segment = list(range(len(self.prefix))), [0] * len(self.prefix)
            for number, (question, answer) in enumerate(self._turns(scene), start=1):
                ids += question + answer
                labels += [_IGNORED] * len(question) + answer
                positions += range(len(self.prefix), len(self.prefix) + len(question) + len(answer))
                segment += [number] * (len(question) + len(answer))
            rows.append((ids, labels, positions, segment))
        length = max(len(row[0]) for row in rows)
        padding = (self.processor.tokenizer.pad_token_id, _IGNORED, 0, -1)
        ids_BT, labels_BT, positions_BT, segment_BT = (
            torch.tensor([row[i] + [padding[i]] * (length - len(row[i])) for row in rows])
            for i in range(4)
        )
        same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
        is_prefix_B1T = (segment_BT == 0)[:, None, :]
        causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
        seen_BTT = (same_BTT | is_prefix_B1T) & causal_TT
        # Eager attention adds it to the scores; a boolean mask would be added as 0 and 1.
        mask_BTT = torch.zeros(seen_BTT.shape).masked_fill_(
            ~seen_BTT, torch.finfo(torch.float32).min
        )
        pixels = self.processor.image_processor(
            [[sc.draw(scene)] for scene in scenes], return_tensors="pt"
        )
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BTT[:, None],
            "position_ids": positions_BT,
            "pixel_values": pixels["pixel_values"],
            "labels": labels_BT,
        }


def _cell_labels(scene: sc.Scene) -> list[list[int]]:
    """Kind, colour, action and contact of each of the nine cells, as class numbers.

    The kind of an empty cell is the last number; its other labels are ignored.
    """
    labels = [[len(sc.KINDS), _IGNORED, _IGNORED, _IGNORED] for _ in range(9)]
    in_contact = {cell for pair in scene.touching for cell in pair}
    for thing in scene.things:
        action = (*sc.ACTIONS, "").index(thing.action)
        labels[thing.cell] = [
            sc.KINDS.index(thing.kind),
            sc.COLOURS.index(thing.colour),
            action,
            int(thing.cell in in_contact),
        ]
    return labels


def teach_naming(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, lesson: Lesson, seed: int
) -> None:
    """The first lesson, for tower and connector: what stands in each cell?

    One patch is one cell, so heads on the tower's output predict each patch's content and place.
    The connector's first nine tokens each predict one cell's content in the language model's own
    words: by dot product with the embeddings of "star", "red", "spin". Learning this from questions
    and answers alone takes hours.
    """
    rng = random.Random(seed)
    sizes = [len(sc.KINDS) + 1, len(sc.COLOURS), len(sc.ACTIONS) + 1, 2]
    tower, connector = model.model.vision_model, model.model.connector
    width = tower.config.hidden_size
    content_head = torch.nn.Linear(width, sum(sizes))
    place_head = torch.nn.Linear(width, 9)
    wordless_head = torch.nn.Linear(width, 4)  # "empty", "at rest", "apart", "in contact"
    trained = (tower, connector, content_head, place_head, wordless_head)
    parameters = [p for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=lesson.learning_rate, betas=(0.9, 0.98), weight_decay=0.02
    )
    cells = torch.arange(9).repeat(lesson.images_per_step, 1)
    words = [
        _word_embeddings(model, processor, names) for names in (sc.KINDS, sc.COLOURS, sc.ACTIONS)
    ]
    for step in range(lesson.steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson.learning_rate * _schedule(step, lesson.steps)
        scenes = [sc.sample_scene(rng, "train") for _ in range(lesson.images_per_step)]
        pixels = processor.image_processor(
            [[sc.draw(scene)] for scene in scenes], return_tensors="pt"
        )["pixel_values"]
        labels = torch.tensor([_cell_labels(scene) for scene in scenes])
        patches_B9H = tower(pixels[:, 0]).last_hidden_state
        mask_B9 = torch.ones(patches_B9H.shape[:2], dtype=torch.bool)
        tokens_B9H = connector(patches_B9H, attention_mask=mask_B9)[:, :9]
        kind, colour, action = (tokens_B9H @ embeddings_WH.T / 4 for embeddings_WH in words)
        wordless = wordless_head(tokens_B9H)
        token_logits = torch.cat(
            [kind, wordless[..., :1], colour, action, wordless[..., 1:]], dim=-1
        )
        loss = _naming_loss(content_head(patches_B9H), labels, sizes)
        loss = loss + _naming_loss(token_logits, labels, sizes)
        loss = loss + cross_entropy(place_head(patches_B9H).flatten(0, 1), cells.flatten())
        _optimizer_step(loss, optimizer, parameters)
        _print_progress(step, lesson.steps, loss)


def _word_embeddings(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, names: tuple[str, ...]
) -> Tensor:
    """(W, H) the language model's embeddings of words of one token each, without gradient."""
    ids = [processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    assert all(len(tokens) == 1 for tokens in ids), "every word of the scenes must be one token"
    return model.get_input_embeddings().weight[[tokens[0] for tokens in ids]].detach().clone()


def _naming_loss(logits: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
    """Cross-entropy of kind, colour, action and contact, added up.

    Args:
        logits: (B, 9, sum(sizes)).
        labels: (B, 9, 4).
        sizes: how many classes each of the four has.
    """
    parts = logits.split(sizes, dim=-1)
    losses = [cross_entropy(p.flatten(0, 1), labels[..., i].flatten()) for i, p in enumerate(parts)]
    return torch.stack(losses).sum()


def _schedule(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: warm-up over 1/30, then cosine to 1/20."""
    return min(
        (step + 1) / max(1, steps // 30), 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def _optimizer_step(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _print_progress(step: int, steps: int, loss: Tensor) -> None:
    if step % 100 == 0 or step == steps - 1:
        print(
            f"step {step:5d}/{steps}  loss {loss.item():.4f}  {time.monotonic() - _STARTED:6.0f} s",
            flush=True,
        )


def teach_answering(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, lesson: Lesson, seed: int
) -> None:
    """A lesson of questions and answers, for the language model; loss on answer tokens only.

    Tower and connector are frozen: Adam moves every weight by about the learning rate however
    small its gradient, and the noise of a language model that cannot read yet would undo what they
    have learnt within a hundred steps.
    """
    batches = BatchMaker(processor, lesson, random.Random(seed))
    # At these sizes eager attention is twice as fast on a CPU as the fused one with a mask.
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
        batch = batches.batch()
        labels = batch.pop("labels")[:, 1:]
        in_loss = labels != _IGNORED
        with torch.autocast("cpu", torch.bfloat16, enabled=lesson.bfloat16):
            hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[in_loss])
        loss = cross_entropy(logits.float(), labels[in_loss])
        _optimizer_step(loss, optimizer, parameters)
        _print_progress(step, lesson.steps, loss)
    model.requires_grad_(True)
