"""mDPO against the paper's equations on plain rows; what its batches share and cache."""

import math

import pytest
import torch
from PIL import Image
from torch.nn.functional import logsigmoid

from tests.support.engines import pairs, related_pairs, step, trainer
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.content_keys import image_key
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.training.mdpo import corrupt_image

pytestmark = pytest.mark.slow

BETA, COUNT = 0.5, 3


def _logps(made, example, image, answer):
    """log pi(answer | image, prompt) from one plain row of the unwrapped model."""
    row = {**example, "images": [image], "chosen": example[answer], "rejected": example[answer]}
    batch = PairCollator(made.processing_class, share=False)([row])
    ids, mask = batch["input_ids"][:1], batch["completion_mask"][:1]
    pixels = {
        name: batch[name]
        for name in ("pixel_values", "pixel_attention_mask", "image_grid_thw")
        if name in batch
    }
    types = {
        name: batch[name][:1] for name in ("token_type_ids", "mm_token_type_ids") if name in batch
    }
    logits = made.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **pixels, **types
    ).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logps * mask[:, 1:]).sum()


def _by_the_paper(made, rows):
    """(loss, gradients) of the three terms, with every answer in a separate row."""
    made.model.zero_grad()
    terms = []
    for example in rows:
        image = example["images"][0]
        other = corrupt_image(image, f"{made.args.seed}/{image_key([image])}/0")
        asked = ((image, "chosen"), (image, "rejected"), (other, "chosen"))
        policy = [_logps(made, example, *one) for one in asked]
        with torch.no_grad(), made.model.disable_adapter():
            reference = [_logps(made, example, *one) for one in asked]
        chosen, rejected, conditional = (
            BETA * (p - r) for p, r in zip(policy, reference, strict=True)
        )
        terms.append(
            -logsigmoid(chosen - rejected)
            - logsigmoid(chosen - conditional)
            - logsigmoid(chosen - 0.0)
        )
    loss = torch.stack(terms).mean()
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", ["idefics2", "llava", "qwen2_5_vl", "gemma3"])
def test_loss_and_gradients_equal_the_papers(family, tmp_path):
    rows = pairs(COUNT, seed=3)
    made = trainer(
        family,
        "shared",
        rows,
        tmp_path,
        mdpo=True,
        loss_type=["sigmoid"],
        loss_weights=[3.0],
        beta=BETA,
    )
    loss, metrics, gradients = step(made)
    made.shared_forwards[0].remove()  # plain rows from here on
    expected, wanted = _by_the_paper(made, [rows[i] for i in range(COUNT)])
    assert loss == pytest.approx(expected, rel=1e-5)
    largest = max(gradient.norm() for gradient in wanted.values())
    assert largest > 0
    for name, gradient in wanted.items():
        apart = (gradients.get(name, torch.zeros_like(gradient)) - gradient).norm()
        assert apart <= 2e-5 * max(gradient.norm(), 0.05 * largest), name
    assert 0 <= metrics["rewards/conditional_accuracies"] <= 1
    assert metrics["rewards/margins"] == pytest.approx(
        metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=1e-5
    )


def test_paligemma_shares_whole_prompts_only(tmp_path):
    """It reads prompts in both directions, so that two which differ have nothing in common."""
    rows = related_pairs((0, 0, 0, 1), (0, 1, 2, 3))
    made = trainer("paligemma", "shared", rows, tmp_path, mdpo=True, loss_weights=[3.0], beta=BETA)
    together = step(made)[1]
    alone = [step(made, rows=[row])[1] for row in range(2)]
    for name in ("logps/chosen", "rewards/margins", "rewards/conditional_margins"):
        mean = sum(metrics[name] for metrics in alone) / 2
        assert together[name] == pytest.approx(mean, rel=1e-5, abs=1e-5), name


def test_metrics_are_of_the_rows_own_answers(tmp_path):
    rows = pairs(COUNT, seed=4)
    plain = step(trainer("idefics2", "shared", rows, tmp_path, beta=BETA))[1]
    made = trainer("idefics2", "shared", rows, tmp_path, mdpo=True, loss_weights=[3.0], beta=BETA)
    conditional = step(made)[1]
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    ):
        assert conditional[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-4), name


def test_a_batch_runs_each_image_and_answer_once(tmp_path):
    rows = pairs(COUNT, seed=5)
    made = trainer("idefics2", "shared", rows, tmp_path, mdpo=True, loss_weights=[3.0])
    batch = made.data_collator([rows[i] for i in range(COUNT)])
    assert batch["pixel_values"].shape[0] == 2 * COUNT
    assert len(batch["input_ids"]) == 6 * COUNT
    forest = batch["forest"]
    assert len(forest.roots) == 2 * COUNT
    assert len(forest.answers) == 3 * COUNT, "a copy has no rejected answer"
    assert batch["row"] == [0, 1, 2]
    images, answers = batch["image_keys"], batch["answer_keys"]
    assert len(set(images)) == 2 * COUNT, "a copy has a key of its own pixels"
    chosen, others = answers[:COUNT], answers[3 * COUNT :]
    assert answers[: 3 * COUNT] == chosen * 3
    assert len({*chosen, *others[: 2 * COUNT]}) == 3 * COUNT
    assert others[2 * COUNT :] == [""] * COUNT, "the anchor has no rejected answer"
    assert made.data_collator.content_keys([rows[i] for i in range(COUNT)]) == {
        "image_keys": images,
        "answer_keys": answers,
    }


def test_cached_references_give_the_same_loss(tmp_path):
    rows = pairs(COUNT, seed=6)
    settings = {"mdpo": True, "loss_weights": [3.0]}
    without = step(trainer("llava", "shared", rows, tmp_path, **settings))[0]
    cache = ReferenceCache(tmp_path, "k")
    made = trainer("llava", "shared", rows, tmp_path, reference_cache=cache, **settings)
    assert step(made)[0] == pytest.approx(without, rel=1e-5)
    assert cache.num_known == 3 * COUNT, "two answers of each row and one of its copy"
    made.compute_ref_log_probs = lambda *_: pytest.fail("computed again")
    assert step(made)[0] == pytest.approx(without, rel=1e-5)
    assert step(made, rows=[2, 0])[0] == pytest.approx(
        step(trainer("llava", "shared", rows, tmp_path, **settings), rows=[2, 0])[0], rel=1e-5
    )


def test_a_copy_depends_on_the_picture_alone(tmp_path):
    rows = pairs(COUNT, seed=8)
    made = trainer("llava", "shared", rows, tmp_path, mdpo=True, loss_weights=[3.0])
    one = {**rows[0], "row": 7, "prompt": rows[1]["prompt"]}
    here, there = (made.data_collator([row])["image_keys"] for row in (rows[0], one))
    assert here == there
    other_seed = trainer(
        "llava", "shared", rows, tmp_path, mdpo=True, loss_weights=[3.0], seed=made.args.seed + 1
    )
    assert other_seed.data_collator([rows[0]])["image_keys"][1] != here[1]


def test_at_the_start_every_term_is_ln_2(tmp_path):
    rows = pairs(COUNT, seed=7)
    made = trainer("smolvlm", "shared", rows, tmp_path, mdpo=True, loss_weights=[3.0])
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert step(made)[0] == pytest.approx(3 * math.log(2), rel=1e-5)


def test_a_corrupted_image_is_a_small_crop_of_the_same_size_and_reproducible():
    ramp = (
        Image.linear_gradient("L").convert("RGB").resize((200, 120))
    )  # every level tells where it came from
    levels = set()
    for seed in map(str, range(50)):
        part = corrupt_image(ramp, seed)
        assert part.size == ramp.size
        assert part.tobytes() == corrupt_image(ramp, seed).tobytes()
        low, high = part.getextrema()[0]
        assert high - low <= 255 * 0.2**0.5 + 8  # a side of a fifth of the area, and rounding
        levels.add(low)
    assert len(levels) > 20
