"""Models that cannot be trained are refused by what they are."""

import pytest
import transformers as tf

from vlmdpo.errors import ModelError
from vlmdpo.models import load


def _refused(config, folder):
    config.save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        load.check_is_vlm(str(folder))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["florence2", "instructblip", "udop"])
def test_encoder_decoders(kind, tmp_path):
    config = {
        "florence2": tf.Florence2Config,
        "instructblip": lambda: tf.InstructBlipConfig(text_config={"model_type": "t5"}),
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
