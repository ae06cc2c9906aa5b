"""Models that cannot be trained are refused by what they are."""

import pytest
import transformers as tf

from vlmdpo.errors import MissingDependencyError, ModelError
from vlmdpo.models import load, supported


def _refused(config, folder):
    config.save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        load.check_is_vlm(str(folder))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["florence2", "blip-2", "udop"])
def test_encoder_decoders(kind, tmp_path):
    config = {
        "florence2": tf.Florence2Config,
        "blip-2": lambda: tf.Blip2Config(text_config={"model_type": "t5"}),
        "udop": tf.UdopConfig,
    }[kind]()
    assert f"is a {kind} model, an encoder-decoder" in _refused(config, tmp_path)


def test_a_model_without_an_image_text_to_text_class(tmp_path):
    message = _refused(tf.Phi4MultimodalConfig(), tmp_path)
    assert "has no image-text-to-text class in transformers" in message
    assert "-hf" in message


def test_code_of_its_own_for_another_class(tmp_path):
    config = tf.LlamaConfig(auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "has no image-text-to-text class" in _refused(config, tmp_path)


def test_a_language_model(tmp_path):
    assert "not a vision-language model; try one of" in _refused(tf.LlamaConfig(), tmp_path)


@pytest.mark.parametrize("text", ["llama", "t5"])
def test_instructblip_on_any_language_model(text, tmp_path):
    message = _refused(tf.InstructBlipConfig(text_config={"model_type": text}), tmp_path)
    assert "is an instructblip model, which vlmdpo does not train: its Q-Former reads" in message


@pytest.mark.parametrize(
    ("config", "kind"), [(tf.Gemma3nConfig, "gemma3n"), (tf.PerceptionLMConfig, "perception_lm")]
)
def test_a_tower_of_a_package_that_is_missing(config, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(supported.importlib.util, "find_spec", lambda name: None)
    config().save_pretrained(tmp_path)
    with pytest.raises(MissingDependencyError, match=f"is a {kind} model, whose vision tower is"):
        load.check_is_vlm(str(tmp_path))
