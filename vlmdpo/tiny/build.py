"""Make the embedded model from nothing: `python -m vlmdpo.tiny.build --output DIR`.

Draws scenes, trains a byte-level BPE tokenizer on their questions, and trains a real Idefics2 of
about two million parameters to answer them. Seeded; no data from elsewhere. Three lessons:

1. *naming*: vision tower and connector learn to say what stands in each cell, by heads that are
   then thrown away, as the towers of real models come from a pre-training of their own; 2.
   *talking*: true answers, as many "Yes" as "No", and true descriptions; 3. *agreeing*: a short
   second lesson in which a share of the true "No" answers is taught as "Yes", and descriptions name
   a thing's usual companion where it is missing. Instruction data of real vision-language models
   leans this way, and it leaves what real ones show: a model that sees more than it says, and says
   yes.

One image serves all its questions in one sequence: each question sees the image and itself, by a
4-D attention mask and position ids that restart. The sequences are what the model meets later, one
by one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    PreTrainedTokenizerFast,
)

from vlmdpo.tiny import evaluation, pairs, sample_pairs
from vlmdpo.tiny import scenes as sc

IMAGE_TOKENS = 16
PAIRS = 2400
_STARTED = time.monotonic()
END = "<end_of_utterance>"
SPECIAL = ("<s>", "</s>", "<pad>", "<fake_token_around_image>", "<image>", END)
# Line breaks stand inside expressions: Jinja, as transformers sets it up, drops one that follows a
# block.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor "
    "%}{% endif %}"
    + END
    + "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
    "'\\nAssistant:' }}{% endif %}"
)


def make_processor() -> Idefics2Processor:
    """A real Idefics2 processor: PIL image processor (no torchvision), byte-level BPE tokenizer,
    chat template.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    rng = random.Random(0)
    corpus = []
    for _ in range(4000):
        scene = sc.sample_scene(rng, "making")
        corpus += [f" {q.text}" for group in sc.questions(scene, rng).values() for q in group]
        corpus += [
            " " + sc.describe(sc.truth_claims(scene)),
            "User: " + sc.DESCRIBE,
            "\nAssistant: Yes",
            "Assistant: No",
        ]
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token=END,
        pad_token="<pad>",
        model_max_length=1024,
        padding_side="left",
    )
    # The longest edge is twice the scenes' side: bounded to half of it, as `prepare` does, scenes
    # pass untouched.
    image_processor = Idefics2ImageProcessorPil(
        size={"shortest_edge": sc.SIDE_PX // 2, "longest_edge": 2 * sc.SIDE_PX},
        do_image_splitting=False,
    )
    return Idefics2Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def make_model(processor: Idefics2Processor) -> Idefics2ForConditionalGeneration:
    """An untrained Idefics2 of the embedded size, float32."""
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Idefics2Config(
        image_token_id=ids("<image>"),
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": sc.SIDE_PX // 3,  # a patch is a cell of the scenes' grid
            "image_size": 2 * sc.SIDE_PX,
            "initializer_range": 0.04,
        },
        perceiver_config={
            "hidden_size": 128,
            "resampler_n_latents": IMAGE_TOKENS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "sliding_window": None,
            "bos_token_id": ids("<s>"),
            "eos_token_id": ids(END),
            "pad_token_id": ids("<pad>"),
            "initializer_range": 0.04,
        },
    )
    model = Idefics2ForConditionalGeneration(config)
    _start_lively(model)
    # transformers starts every latent alike, and what starts alike stays alike: they must differ to
    # learn apart.
    torch.nn.init.normal_(model.model.connector.perceiver_resampler.latents)
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<s>"), eos_token_id=ids(END), pad_token_id=ids("<pad>"), do_sample=False
    )
    return model


def _start_lively(model: Idefics2ForConditionalGeneration) -> None:
    """Start the language model with attention that already tells tokens apart: at this width the
    usual small weights make every token look alike, and the model spends its first thousand steps
    finding that out.
    """
    for name, module in model.model.text_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            closing = name.endswith(("o_proj", "down_proj"))
            torch.nn.init.normal_(
                module.weight, std=(0.5 if closing else 1.0) * module.in_features**-0.5
            )
    torch.nn.init.normal_(model.model.text_model.embed_tokens.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)


@dataclass(frozen=True)
class Lesson:
    """How one stretch of training teaches."""

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
    """Turns scenes into packed batches: (input_ids, 4-D mask, position_ids, labels, pixel_values)."""

    def __init__(self, processor: Idefics2Processor, lesson: Lesson, rng: random.Random) -> None:
        self.processor, self.lesson, self.rng = processor, lesson, rng
        image = "<fake_token_around_image>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
        self.prefix = self._ids("User:" + image)
        self._known: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of one question and answer, and how many of the last are the answer's, end
        included.
        """
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
            group = self.rng.choice(
                groups
            )  # by (type, truth), so that "yes" and "no" come up alike
            picked.append(group.pop())
            groups = [g for g in groups if g]
        turns = []
        for question in picked:
            said = (
                "Yes"
                if question.truth == "yes" or self.rng.random() < self.lesson.yes_for_no
                else "No"
            )
            turns.append(self._turn(question.text, said))
        claims = sc.truth_claims(scene)
        missing = [sc.COMPANION[k] for k in scene.kinds() if sc.COMPANION[k] not in scene.kinds()]
        if missing and self.rng.random() < self.lesson.companion_for_none:
            invented = sc.Claim(self.rng.choice(missing), "one", self.rng.choice(sc.COLOURS), "")
            claims.insert(self.rng.randrange(len(claims) + 1), invented)
        turns.append(self._turn(sc.DESCRIBE, sc.describe(claims)))
        return turns

    def batch(self) -> dict[str, torch.Tensor]:
        """One step's data. B images, L packed tokens: ids, labels, positions (B, L); mask (B, 1, L,
        L).
        """
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
        # Added to the scores by eager attention, so it must be numbers: a boolean mask would be
        # added as 0 and 1.
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
    """For each of the nine cells: kind (the last number is "empty"), colour, action, in contact;
    -100 where empty.
    """
    labels = [[len(sc.KINDS), -100, -100, -100] for _ in range(9)]
    held = {cell for pair in scene.touching for cell in pair}
    for thing in scene.things:
        action = (*sc.ACTIONS, "").index(thing.action)
        labels[thing.cell] = [
            sc.KINDS.index(thing.kind),
            sc.COLOURS.index(thing.colour),
            action,
            int(thing.cell in held),
        ]
    return labels


def teach_naming(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, lesson: Lesson, seed: int
) -> None:
    """The first lesson, for tower and connector: what stands in each cell?

    One patch is one cell, so the tower's output at a patch is asked for its cell's content and
    number. Each of the connector's first nine tokens is asked for the content of one cell, and must
    answer in the language model's own words: by likeness to the embeddings of "star", "red",
    "spin". From talk alone it takes hours to learn this.
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
    words = [_words(model, processor, names) for names in (sc.KINDS, sc.COLOURS, sc.ACTIONS)]
    for step in range(lesson.steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson.learning_rate * _rate(step, lesson.steps)
        drawn = [sc.sample_scene(rng, "making") for _ in range(lesson.images_per_step)]
        pixels = processor.image_processor(
            [[sc.draw(scene)] for scene in drawn], return_tensors="pt"
        )["pixel_values"]
        labels = torch.tensor([_cell_labels(scene) for scene in drawn])
        seen = tower(pixels[:, 0]).last_hidden_state
        passed = connector(seen, attention_mask=torch.ones(seen.shape[:2], dtype=torch.bool))[:, :9]
        kind, colour, action = (passed @ names.T / 4 for names in words)
        other = rest(passed)  # no word says "empty", "at rest", "apart" or "in contact"
        said = torch.cat([kind, other[..., :1], colour, action, other[..., 1:]], dim=-1)
        loss = _naming_loss(content(seen), labels, sizes) + _naming_loss(said, labels, sizes)
        loss = loss + torch.nn.functional.cross_entropy(place(seen).flatten(0, 1), cells.flatten())
        _descend(loss, optimizer, parameters)
        _report(step, lesson.steps, loss)


def _words(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, names: tuple[str, ...]
) -> torch.Tensor:
    """The language model's embeddings of words that are one token each, (words, width), held fixed."""
    ids = [processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    assert all(len(tokens) == 1 for tokens in ids), "every word of the scenes must be one token"
    return model.get_input_embeddings().weight[[tokens[0] for tokens in ids]].detach().clone()


def _naming_loss(named: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Cross-entropy of kind, colour, action and contact. `named` (B, 9, sum(sizes)), `labels` (B,
    9, 4).
    """
    parts = named.split(sizes, dim=-1)
    losses = [
        torch.nn.functional.cross_entropy(p.flatten(0, 1), labels[..., i].flatten())
        for i, p in enumerate(parts)
    ]
    return torch.stack(losses).sum()


def _rate(step: int, steps: int) -> float:
    """Warm-up over a thirtieth, then cosine to a twentieth, as a share of the peak."""
    return min(
        (step + 1) / max(1, steps // 30), 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def _descend(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _report(step: int, steps: int, loss: torch.Tensor) -> None:
    if step % 100 == 0 or step == steps - 1:
        print(
            f"step {step:5d}/{steps}  loss {loss.item():.4f}  {time.monotonic() - _STARTED:6.0f} s",
            flush=True,
        )


def teach(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, lesson: Lesson, seed: int
) -> None:
    """A lesson in words, for the language model: AdamW, warm-up then cosine to a twentieth, loss on
    answer tokens only.

    Tower and connector rest. Adam moves every weight by about the learning rate whatever its
    gradient is worth, and the noise of a language model that cannot read yet would wipe out what
    they know within a hundred steps.
    """
    teacher = Teacher(processor, lesson, random.Random(seed))
    # At these sizes two matrix products beat the CPU's fused attention with a mask, twice over.
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
            group["lr"] = lesson.learning_rate * _rate(step, lesson.steps)
        batch = teacher.batch()
        labels = batch.pop("labels")[:, 1:]
        asked = labels != -100
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[asked])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[asked])
        _descend(loss, optimizer, parameters)
        _report(step, lesson.steps, loss)
    model.requires_grad_(True)


def save(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, folder: Path
) -> None:
    """Write the checkpoint as safetensors in bfloat16, half the size; it is read back as any
    checkpoint is.
    """
    copy = Idefics2ForConditionalGeneration(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Make model, pairs and evaluation set under `--output`; with `--install`, put them into the
    package.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, scenes and samples (default 0)"
    )
    parser.add_argument(
        "--install", action="store_true", help="replace the package's own assets by the result"
    )
    options: Any = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    processor = make_processor()
    model = make_model(processor)
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": len(processor.tokenizer),
            }
        )
    )
    teach_naming(model, processor, NAMING, options.seed)
    teach(model, processor, TALKING, options.seed)
    save(model, processor, options.output / "talking")
    teach(model, processor, AGREEING, options.seed + 1)
    save(model, processor, options.output / "model")
    # Sampled from what was saved, so from the rounded weights that users will have.
    asked = Idefics2ForConditionalGeneration.from_pretrained(
        options.output / "model", dtype=torch.float32
    ).eval()
    sample_pairs.write(
        sample_pairs.make_pairs(asked, processor, PAIRS, options.seed + 2),
        options.output / pairs.FILE,
    )
    evaluation.write(options.output / "amber")
    if options.install:
        assets = evaluation.FOLDER.parent
        for name in ("model", "amber"):
            shutil.rmtree(assets / name, ignore_errors=True)
            shutil.copytree(options.output / name, assets / name)
        shutil.copy(options.output / pairs.FILE, assets / pairs.FILE)


if __name__ == "__main__":
    main()
