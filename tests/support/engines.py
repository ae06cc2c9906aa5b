"""Shared by the engine's tests: random pairs and one step of each engine, on tiny models."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOConfig

from vlmdpo.data.pairs import message
from vlmdpo.data.store import pair_features
from vlmdpo.engine.collate import PairCollator
from vlmdpo.models.experts import router_layers
from vlmdpo.models.families import fallback_chat_template, linear_layers
from vlmdpo.models.inputs import in_dtype
from vlmdpo.tiny import random_models
from vlmdpo.training.run_trainer import RunTrainer

# Two questions about one picture, one of them with three answers in two pairs; another picture;
# rows without one, of which two have the same prompt.
RELATED = [(0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 2, 3), (None, 2, 4, 5), (0, 0, 2, 1), (None, 2, 4, 6)]
WITH_PICTURES = [row for row in RELATED if row[0] is not None]
RANKING = [(0, 0, better, worse) for better in range(4) for worse in range(better + 1, 4)]


def pairs(count, *, images=(1,), seed=0, answer=14):
    """`count` rows of random pixels and letters; row i has `images[i % len(images)]` images."""
    rng = np.random.default_rng(seed)

    def text(longest):
        return (
            "".join(rng.choice(list("abcdefgh "), size=int(rng.integers(3, longest)))).strip()
            or "a"
        )

    def picture():
        size = tuple(int(side) for side in rng.integers(20, 50, 2))
        return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))

    rows = [
        {
            "images": [picture() for _ in range(images[i % len(images)])],
            "prompt": [message("user", "q" + text(12), images[i % len(images)])],
            "chosen": [message("assistant", "c" + text(answer))],
            "rejected": [message("assistant", "r" + text(answer))],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows, features=pair_features()).add_column("row", range(count))


def related_pairs(*rows, pictures=1, answer=14, seed=0):
    """Rows that share: each is (picture, question, chosen, rejected), all of them numbers.

    Equal numbers mean the same picture, question or answer; a picture of None means none.
    """
    rng = np.random.default_rng(seed)
    letters = list("abcdefgh ")
    texts = {}

    def text(kind, number):
        if (kind, number) not in texts:
            size = int(rng.integers(3, answer))
            texts[kind, number] = kind + str(number) + "".join(rng.choice(letters, size=size))
        return texts[kind, number].strip()

    images = {
        number: [
            Image.fromarray(rng.integers(0, 255, (*rng.integers(20, 50, 2), 3), dtype=np.uint8))
            for _ in range(pictures)
        ]
        for number in sorted({row[0] for row in rows} - {None})
    }
    made = [
        {
            "images": images.get(picture, []),
            "prompt": [message("user", text("q", question), len(images.get(picture, [])))],
            "chosen": [message("assistant", text("c", chosen))],
            "rejected": [message("assistant", text("c", rejected))],
        }
        for picture, question, chosen, rejected in rows
    ]
    return Dataset.from_list(made, features=pair_features()).add_column("row", range(len(made)))


def trainer(
    family,
    engine,
    rows,
    folder,
    *,
    lora="all-linear",
    bf16=False,
    reference_cache=None,
    build=None,
    mdpo=False,
    gpu=None,
    **settings,
):
    """A RunTrainer on a tiny model whose adapter is not zero: policy and reference differ.

    With a `PretendedGpu` it is on that device; bf16 then computes under autocast too.
    """
    model, processor = random_models.make(family, **(build or {}))
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    if bf16:
        model.to(torch.bfloat16)
    if gpu is not None:
        gpu.place(model)
    settings = {
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": False,
        "beta": 0.5,
        **settings,
    }
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        settings.setdefault("router_aux_loss_coef", 0.0)  # with it, pairs cannot share a row
    args = DPOConfig(
        output_dir=str(folder),
        max_length=None,
        report_to="none",
        use_cpu=gpu is None,
        bf16=bf16 and gpu is not None,
        **settings,
    )
    if lora == "all-linear" and router_layers(model):
        lora = linear_layers(model, "all")
    config = LoraConfig(r=4, target_modules=lora) if lora else None
    made = RunTrainer(
        engine=engine,
        model=model,
        processing_class=processor,
        args=args,
        train_dataset=rows,
        peft_config=config,
        reference_cache=reference_cache,
        mdpo=mdpo,
    )
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    made.model.train()
    return made


def step(made, rows=None, batch=None):
    """(loss, TRL's metrics, gradients by name) of one batch."""
    examples = [
        made.train_dataset[i]
        for i in (rows if rows is not None else range(len(made.train_dataset)))
    ]
    made.model.zero_grad()
    inputs = batch if batch is not None else made.data_collator(examples)
    loss = made.compute_loss(made.model, in_dtype(inputs, made.model.dtype))
    loss.backward()
    metrics = {name: values[-1] for name, values in made._metrics["train"].items()}
    gradients = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    return loss.item(), metrics, gradients


def assert_same(expected, found, tolerance=1e-5):
    """Loss, every metric and every gradient agree to `tolerance`, relative to float32's resolution.

    Metrics that are small differences of log-probs are compared relative to the log-probs,
    gradients relative to the largest one of their kind.
    """
    loss, metrics, gradients = expected
    assert found[0] == pytest.approx(loss, rel=tolerance)
    assert found[1].keys() == metrics.keys()
    scale = max(1.0, abs(metrics["logps/chosen"]), abs(metrics["logps/rejected"]))
    for name, value in metrics.items():
        size = scale if name.startswith(("rewards/", "logps/")) else max(abs(value), 1e-3)
        assert abs(found[1][name] - value) <= tolerance * size, (name, found[1][name], value)
    assert found[2].keys() >= {name for name, g in gradients.items() if g.abs().max() > 1e-9}
    largest = max(g.norm() for g in gradients.values())
    for name, gradient in gradients.items():
        other = found[2].get(name, torch.zeros_like(gradient))
        apart, size = (other - gradient).norm(), gradient.norm()
        assert apart <= tolerance * max(size, 0.05 * largest), (name, apart / size, size / largest)


def stock_step(family, rows, folder, **more):
    """One step of stock TRL; for PaliGemma, on which TRL's collator fails, on corrected rows."""
    made = trainer(family, "stock", rows, folder, **more)
    if not family.startswith("paligemma"):
        return step(made)
    collator = PairCollator(made.processing_class)
    return step(made, batch=collator.stock_rows([dict(row) for row in made.train_dataset]))
