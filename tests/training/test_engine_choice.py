"""Whatever goes wrong with an engine is a reason for a simpler one, and said in one line."""

from types import SimpleNamespace

import pytest
import torch

from tests.support import untrainable
from tests.support.engines import assert_same, pairs, step, trainer
from vlmdpo.engine.forward import SharedForward
from vlmdpo.errors import ConfigError, DataError, MemoryBudgetError, ModelError
from vlmdpo.tiny import random_models
from vlmdpo.training import engine_checks
from vlmdpo.training.engine_choice import choose_engine, verify_engine

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def verified(family, folder, engine="shared", **more):
    """(the setup, after the self-check) of a tiny model."""
    rows = pairs(1)
    setup = SimpleNamespace(
        trainer=trainer(family, engine, rows, folder, **more),
        related_examples=lambda: [dict(row) for row in rows],
        fallback_reason=None,
    )
    verify_engine(setup)
    return setup


def test_a_model_that_no_engine_of_ours_can_wrap_is_left_to_trl():
    model, _ = random_models.make("llava")
    attention = model.config.get_text_config()._attn_implementation
    del_name = type(model.model).get_image_features
    try:
        del type(model.model).get_image_features
        engine, reason = choose_engine("shared", model)
    finally:
        type(model.model).get_image_features = del_name
    assert engine == "stock"
    assert reason == "AttributeError: 'LlavaModel' object has no attribute 'get_image_features'"
    assert model.config.get_text_config()._attn_implementation == attention


def test_an_attention_that_cannot_be_switched_leaves_rows(monkeypatch):
    def refuse(backbone):
        raise ValueError("attention is built in\nand more")

    monkeypatch.setattr("vlmdpo.engine.packed_attention.use_packed_attention", refuse)
    model, _ = random_models.make("llava")
    assert choose_engine("shared", model) == ("rows", "ValueError: attention is built in")
    assert choose_engine("stock", model) == ("stock", None)


def test_sharing_depends_on_the_router_loss_that_trl_uses():
    model, _ = random_models.make("llava")
    text = model.config.get_text_config()
    text.output_router_logits, text.router_aux_loss_coef = False, 0.001
    assert choose_engine("shared", model)[0] == "rows"
    assert choose_engine("shared", model, router_loss=0.0) == ("shared", None)
    text.router_aux_loss_coef = 0.0
    assert choose_engine("shared", model)[0] == "shared"
    assert choose_engine("shared", model, router_loss=0.1)[0] == "rows"


def failing(problem):
    def fail(self, *args, **kwargs):
        raise problem

    return fail


def test_an_exception_in_the_shared_forward_leaves_rows(tmp_path, monkeypatch, capfd):
    problem = KeyError("position_embeddings")
    monkeypatch.setattr(SharedForward, "_packed_forward", failing(problem))
    setup = verified("llava", tmp_path)
    assert setup.trainer.engine == "rows"
    assert setup.fallback_reason == "KeyError: 'position_embeddings'"
    words = " ".join(capfd.readouterr().err.split())
    assert "falling back to a simpler engine" in words
    assert "Traceback" not in words
    assert step(setup.trainer)[0] > 0


def test_an_exception_in_both_leaves_trl(tmp_path, monkeypatch):
    monkeypatch.setattr(SharedForward, "_packed_forward", failing(AttributeError("no gate")))
    monkeypatch.setattr(SharedForward, "_row_positions", failing(RuntimeError("no positions")))
    setup = verified("llava", tmp_path)
    assert setup.trainer.engine == "stock"
    assert setup.fallback_reason == "AttributeError: no gate; RuntimeError: no positions"
    assert setup.trainer.model.get_base_model().model.forward.__name__ == "forward"


@pytest.mark.parametrize(
    ("problem", "raised"),
    [
        (OUT_OF_MEMORY, MemoryBudgetError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (DataError("row 3: broken"), DataError),
    ],
    ids=["memory", "ctrl-c", "data"],
)
def test_what_is_no_reason_to_fall_back(problem, raised, tmp_path, monkeypatch):
    monkeypatch.setattr(SharedForward, "_packed_forward", failing(problem))
    with pytest.raises(raised):
        verified("llava", tmp_path)


def test_mdpo_names_the_reason(tmp_path, monkeypatch):
    refused = failing(RuntimeError("no such layer"))
    monkeypatch.setattr(engine_checks, "check_shared_forward", refused)
    with pytest.raises(ConfigError, match=r"--loss mdpo needs the shared engine.*no such layer"):
        verified("llava", tmp_path, mdpo=True)


@pytest.mark.parametrize(
    ("family", "name"), [("mllama", "cross_attention_mask"), ("ernie", "moe_mm_token_type_ids")]
)
def test_a_family_that_trl_cannot_train(family, name, tmp_path, monkeypatch):
    monkeypatch.setitem(random_models.FAMILIES, family, getattr(untrainable, family))
    model, _ = random_models.make(family)
    engine, _ = choose_engine("shared", model, router_loss=0.0)
    with pytest.raises(ModelError, match=f"TRL cannot train this family: .*{name}") as caught:
        verified(family, tmp_path, engine)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_plain_trl_is_tried_before_the_run(tmp_path):
    # PaliGemma's processor takes no text without images, and TRL gives it answers alone.
    with pytest.raises(ModelError, match=r"TRL cannot train this family: ValueError: .*images"):
        verified("paligemma", tmp_path, "stock")


@pytest.mark.parametrize(("coefficient", "engine"), [(0.0, "shared"), (0.1, "rows")])
def test_a_mixture_of_experts_equals_stock_trl(coefficient, engine, tmp_path):
    rows, more = pairs(2), {"router_aux_loss_coef": coefficient}
    model, _ = random_models.make("qwen3_vl_moe")
    assert choose_engine("shared", model, router_loss=coefficient)[0] == engine
    expected = step(trainer("qwen3_vl_moe", "stock", rows, tmp_path, **more))
    assert ("aux_loss" in expected[1]) == bool(coefficient)
    assert_same(expected, step(trainer("qwen3_vl_moe", engine, rows, tmp_path, **more)))
