"""The pair engine: loss, metrics and gradients of stock TRL on every family."""

import pytest

from tests.support.engines import (
    RANKING,
    RELATED,
    WITH_PICTURES,
    assert_same,
    pairs,
    related_pairs,
    step,
    stock_step,
    trainer,
)
from vlmdpo.config import LOSSES
from vlmdpo.engine.forward import check_pairs_shareable
from vlmdpo.engine.lengths import row_lengths
from vlmdpo.engine.packed_attention import CannotShare
from vlmdpo.tiny import random_models

AVAILABLE = random_models.available()
RECURRENT = [name for name in AVAILABLE if name in random_models.RECURRENT]
ALL = sorted(set(AVAILABLE) - set(RECURRENT))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ALL)
def test_the_shared_engine_equals_stock_trl(family, checkpointing, tmp_path):
    # PaliGemma's processor takes no prompt without a picture.
    related = WITH_PICTURES if family.startswith("paligemma") else RELATED
    rows = related_pairs(*related)
    expected = stock_step(family, rows, tmp_path, gradient_checkpointing=checkpointing)
    made = trainer(family, "shared", rows, tmp_path, gradient_checkpointing=checkpointing)
    forest = made.data_collator(list(made.train_dataset))["forest"]
    # PaliGemma reads prompts in both directions, so that only equal ones can be one.
    assert len(forest.roots) == 3
    answers = {(*row[:2], answer) for row in related for answer in row[2:]}
    assert len(forest.answers) == len(answers)
    assert_same(expected, step(made))


@pytest.mark.parametrize("family", [*ALL, *RECURRENT])
def test_the_rows_engine_equals_stock_trl(family, tmp_path):
    rows = pairs(1 if family.startswith("paligemma") else 3, seed=1)
    assert_same(stock_step(family, rows, tmp_path), step(trainer(family, "rows", rows, tmp_path)))


@pytest.mark.parametrize("family", [name for name in ALL if not name.startswith("paligemma")])
@pytest.mark.parametrize("images", [(1, 0, 2), (0,)], ids=["some-none", "none"])
def test_any_number_of_images(family, images, tmp_path):
    rows = pairs(3, images=images, seed=2)
    assert_same(
        step(trainer(family, "stock", rows, tmp_path)),
        step(trainer(family, "shared", rows, tmp_path)),
    )


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_layers_cannot_share_and_give_the_reason(family):
    model, _ = random_models.make(family)
    with pytest.raises(CannotShare, match=r"(linear_attention|conv) carry state"):
        check_pairs_shareable(model)


def test_a_batch_of_paligemma_pairs_is_the_sum_of_its_pairs(tmp_path):
    rows = pairs(3, seed=3)
    together = step(trainer("paligemma", "shared", rows, tmp_path))
    made = trainer("paligemma", "shared", rows, tmp_path)
    alone = [step(made, rows=[i])[0] for i in range(3)]
    assert together[0] == pytest.approx(sum(alone) / 3, rel=1e-5)


@pytest.mark.parametrize(
    "rows",
    [pairs(3, seed=4, answer=40), related_pairs(*RANKING, (0, 1, 4, 5), answer=40)],
    ids=["apart", "one tree"],
)
def test_sliding_windows_shorter_than_the_row(rows, tmp_path):
    build = {"text": {"sliding_window": 8}}
    for family in ("gemma3", "idefics2"):
        expected = step(trainer(family, "stock", rows, tmp_path, build=build))
        assert_same(expected, step(trainer(family, "shared", rows, tmp_path, build=build)))
        wide = step(
            trainer(family, "shared", rows, tmp_path, build={"text": {"sliding_window": 4096}})
        )
        assert abs(wide[0] - expected[0]) > 1e-4, (
            "the window must matter for this test to mean anything"
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions(attention, tmp_path):
    rows = pairs(2, seed=5)
    expected = step(trainer("llava", "stock", rows, tmp_path))
    made = trainer("llava", "stock", rows, tmp_path)
    made.model.get_base_model().set_attn_implementation(attention)
    made.use_engine("shared")
    assert_same(expected, step(made))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "sigmoid"])
def test_every_loss_of_trl(loss, tmp_path):
    rows = pairs(3, seed=6)
    more = {"loss_type": [loss], "label_smoothing": 0.1}
    assert_same(
        step(trainer("llava", "stock", rows, tmp_path, **more)),
        step(trainer("llava", "shared", rows, tmp_path, **more)),
    )


@pytest.mark.parametrize("more", [{"ld_alpha": 0.5}, {"use_weighting": True}], ids=str)
def test_trl_options_that_look_at_tokens(more, tmp_path):
    rows = pairs(3, seed=7)
    assert_same(
        step(trainer("llava", "stock", rows, tmp_path, **more)),
        step(trainer("llava", "shared", rows, tmp_path, **more)),
    )


@pytest.mark.parametrize(
    "rows",
    [pairs(8, seed=8), related_pairs(*RANKING, (0, 1, 4, 5), (0, 1, 4, 6))],
    ids=["apart", "one tree"],
)
def test_one_batch_of_eight_equals_eight_of_one(rows, tmp_path):
    whole = step(trainer("idefics2", "shared", rows, tmp_path))
    made = trainer("idefics2", "shared", rows, tmp_path)
    summed = {}
    for i in range(8):
        for name, gradient in step(made, rows=[i])[2].items():
            summed[name] = summed.get(name, 0) + gradient / 8
    for name, gradient in whole[2].items():
        assert (summed[name] - gradient).norm() <= 1e-5 * max(
            gradient.norm(), 0.05 * max(g.norm() for g in whole[2].values())
        )


def test_a_frozen_vision_tower_runs_once_per_batch_without_gradient(tmp_path):
    rows = pairs(2, seed=9)
    language = r".*(language_model|text_model).*(q_proj|v_proj|down_proj)"
    expected = step(trainer("llava", "stock", rows, tmp_path, lora=language))
    made = trainer("llava", "shared", rows, tmp_path, lora=language)
    runs = []
    tower = made.model.get_base_model().model.vision_tower
    tower.register_forward_hook(
        lambda module, inputs, output: runs.append(output.last_hidden_state)
    )
    assert_same(expected, step(made))
    assert len(runs) == 1
    assert not runs[0].requires_grad
    assert runs[0].shape[0] == 2


def test_full_fine_tuning_has_the_same_gradients(tmp_path):
    rows = pairs(2, seed=10)
    results = []
    for engine in ("stock", "shared"):
        model, _ = random_models.make("qwen2_5_vl", seed=1)
        made = trainer("qwen2_5_vl", "stock", rows, tmp_path)
        made.model = made.model.unload()
        made.ref_model = model
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        for parameter in made.model.parameters():
            parameter.requires_grad_(True)
        made.use_engine(engine)
        results.append(step(made))
    assert_same(*results)


def test_rows_grouped_by_length_need_less_padding(tmp_path):
    rows = pairs(120, images=(0,), seed=12, answer=60)
    made = trainer("llava", "rows", rows, tmp_path, per_device_train_batch_size=4)
    lengths = [length.longest for length in row_lengths(made.processing_class, rows)]
    assert max(lengths) > 2 * min(lengths)

    def padding():
        order = list(made._get_train_sampler())
        assert sorted(order) == list(range(120)), "every row once"
        batches = [[lengths[row] for row in order[i : i + 4]] for i in range(0, 120, 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    random = padding()
    made.row_lengths = lengths
    assert padding() < random / 4
