"""`--attn-implementation`, by part and family. FlashAttention is pretended to be installed."""

import pytest
import torch
import transformers

from tests.conftest import unfolded
from vlmdpo.engine.packed_attention import use_packed_attention
from vlmdpo.models import attention, load
from vlmdpo.models.families import text_configs
from vlmdpo.tiny import random_models

FLASH = "flash_attention_2"
GPU = torch.device("cuda")


@pytest.fixture
def flash_installed(monkeypatch):
    monkeypatch.setitem(attention._FLASH, FLASH, lambda: True)
    monkeypatch.setattr(
        transformers.PreTrainedModel, "_flash_attn_import_error", lambda *a, **k: None
    )


def used(name, asked, device=GPU, dtype=torch.bfloat16):
    """(of the vision towers, of the language model) after asking for an attention."""
    model, _ = random_models.make(name)
    attention.use_attention(model, asked, device, dtype)
    towers = {config._attn_implementation for _, _, (config,) in attention._vision_parts(model)}
    return towers, {config._attn_implementation for config in text_configs(model.base_model)}


SOME = ("idefics2", "llava", "paligemma", "paligemma2", "gemma3", "qwen2_5_vl")


def test_auto_is_flash_attention_in_vision_towers_only(flash_installed, capfd):
    for name in SOME:
        own = {"eager"} if name == "paligemma2" else {"sdpa"}
        assert used(name, "auto") == ({FLASH}, own), name
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)], ids=str
)
def test_auto_is_the_models_own_where_flash_attention_cannot_run(
    device, dtype, flash_installed, capfd
):
    assert used("llava", "auto", torch.device(device), dtype) == ({"sdpa"}, {"sdpa"})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "asked", "language", "reason"),
    [
        ("llava", FLASH, FLASH, None),
        ("paligemma", FLASH, "sdpa", "prompt or image tokens see those that follow them"),
        ("gemma3", FLASH, "sdpa", "prompt or image tokens see those that follow them"),
        ("paligemma2", FLASH, "eager", "its attention logits are soft-capped"),
        ("paligemma2", "sdpa", "eager", "Gemma2Model does not support it"),
        ("paligemma2", "eager", "eager", None),
    ],
)
def test_what_a_language_model_cannot_have_is_left_and_told(
    name, asked, language, reason, flash_installed, capfd
):
    assert used(name, asked) == ({asked}, {language})
    err = unfolded(capfd.readouterr().err)
    assert err.count("warning") == bool(reason)
    if reason:
        assert f"{asked}: the language model keeps {language}, because" in err
        assert reason in err


def test_flash_attention_without_a_gpu_or_in_float32_is_told(flash_installed, capfd):
    assert used("llava", FLASH, torch.device("cpu")) == ({"sdpa"}, {"sdpa"})
    assert "needs a GPU, and this run is on cpu" in unfolded(capfd.readouterr().err)
    assert used("llava", FLASH, GPU, torch.float32) == ({"sdpa"}, {"sdpa"})
    assert "half precision only; see --dtype" in unfolded(capfd.readouterr().err)


def test_flash_attention_would_lose_the_mask_of_the_families_that_keep_their_own():
    """Why there is such a rule; a release that changes it makes the rule unnecessary."""
    from transformers.masking_utils import create_causal_mask

    config = random_models.make("gemma3")[0].config.get_text_config()
    masks = []
    for name in ("sdpa", FLASH):
        config._attn_implementation = name
        masks.append(
            create_causal_mask(
                config=config,
                inputs_embeds=torch.zeros(1, 4, 32),
                attention_mask=torch.ones(1, 4, dtype=torch.long),
                past_key_values=None,
                block_sequence_ids=torch.tensor([[0, 0, 0, -1]]),
            )
        )
    assert masks[0][0, 0, 0].tolist() == [True, True, True, False]
    assert masks[1] is None


@pytest.mark.parametrize(("name", "packed"), [("paligemma2", "eager"), ("llava", "sdpa")])
def test_packed_attention_soft_caps_where_the_model_does(name, packed):
    model, _ = random_models.make(name)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "paligemma2":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    expected = model(**inputs).logits
    for config in text_configs(model.base_model):
        config._attn_implementation = FLASH
    use_packed_attention(model.base_model)
    assert {config._attn_implementation for config in text_configs(model.base_model)} == {
        f"vlmdpo_packed_{packed}"
    }
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert attention.describe_attention(model) == (
        "eager (vision tower: sdpa)" if packed == "eager" else "sdpa"
    )


def test_a_loaded_model_has_the_attention_that_was_asked_for():
    assert attention.describe_attention(load.load_model("tiny", device="cpu")) == "sdpa"
    eager = load.load_model("tiny", device="cpu", attention="eager")
    assert attention.describe_attention(eager) == "eager"
