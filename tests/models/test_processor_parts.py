"""Processors without the parts that do not load here."""

import pytest
import transformers as tf

from vlmdpo.errors import MissingDependencyError
from vlmdpo.models import load
from vlmdpo.models.load_errors import translate_load_errors
from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny import random_models


@pytest.mark.parametrize("family", ["gemma4", "minicpm_v", "glm4v", "llava_onevision"])
def test_parts_reach_the_class_by_name_whatever_their_order(family, tmp_path):
    model, processor = random_models.make(family)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load.load_processor(str(tmp_path))
    assert type(loaded).__name__ == type(processor).__name__
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.image_processor.to_dict().keys() >= {"image_mean"}
    if family == "gemma4":
        assert type(loaded.feature_extractor).__name__ == "Gemma4AudioFeatureExtractor"
        assert loaded.image_seq_length == processor.image_seq_length == 70
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (
        tmp_path / "processor_config.json"
    ).read_text()


def test_a_class_without_a_video_part_stays_as_it_is():
    assert without_video_processor(tf.LlavaProcessor) is tf.LlavaProcessor


@pytest.mark.parametrize(
    ("problem", "package"),
    [
        (
            OSError(
                "Could not load it. Missing optional dependencies: torchvision. Please install"
            ),
            "torchvision",
        ),
        (ImportError("\nX requires the Torchvision library but it was not found"), "torchvision"),
        (ImportError("Package `num2words` is required to run SmolVLM processor."), "num2words"),
        (ValueError("TimmWrapperModel requires the timm library but it was not found"), "timm"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(problem, package, tmp_path):
    with (
        pytest.raises(MissingDependencyError, match=f"needs {package}, not inst.*: pip ") as caught,
        translate_load_errors(str(tmp_path)),  # a folder that is there
    ):
        raise problem
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert "torchvision>=" in str(caught.value) or "[vision]" in str(caught.value)


def test_another_package_is_installed_by_its_own_name(tmp_path):
    with (
        pytest.raises(MissingDependencyError, match="pip install sentencepiece"),
        translate_load_errors(str(tmp_path)),
    ):
        raise ImportError("LlamaTokenizer requires the SentencePiece library but it was not found")
