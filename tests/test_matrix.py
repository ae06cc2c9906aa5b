"""The table in docs/models.md: each row is made again and compared."""

import pytest
import torch
import transformers as tf

from tests.support import matrix
from tests.support.matrix import DOCS, FAMILIES, Family, examine, row
from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny import random_models, random_tokenizer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.small)
def test_each_row_of_the_table_matches_what_happens(family):
    made = row(family, examine(family))
    assert made in DOCS.read_text(encoding="utf-8").splitlines(), (
        f"python -m tests.support.matrix --write; it is now: {made}"
    )


def test_every_family_has_one_row():
    table = DOCS.read_text(encoding="utf-8").partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    assert table.count("\n| ") == len(FAMILIES) + 1
    assert {family.small for family in FAMILIES} == set(random_models.FAMILIES)


def _llava_onevision(text, vision, image_size):
    """A family that vlmdpo has never heard of, added as docs/models.md describes."""
    tok = random_tokenizer.make_tokenizer(
        "<image>", "<video>", image_token="<image>", video_token="<video>"
    )
    config = tf.LlavaOnevisionConfig(
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        video_token_id=tok.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[image_size, 2 * image_size], [2 * image_size, image_size]],
        tie_word_embeddings=False,
        text_config={**random_models.text_sizes(tok, model_type="qwen2"), **text},
        vision_config={
            **random_models.VISION_SIZES,
            "model_type": "siglip_vision_model",
            "patch_size": 8,
            "image_size": image_size,
            "vision_use_head": False,
            **vision,
        },
    )
    images = tf.LlavaOnevisionImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    told = {"num_image_tokens": (image_size // 8) ** 2, "vision_feature_select_strategy": "full"}
    processor = without_video_processor(tf.LlavaOnevisionProcessor)
    return config, processor(
        images, tok, chat_template=random_tokenizer.TEMPLATE.replace("IMAGE", "<image>"), **told
    )


def test_an_unknown_family_works_after_adding_one_entry(monkeypatch):
    monkeypatch.setitem(random_models.FAMILIES, "llava_onevision", _llava_onevision)
    torch.manual_seed(0)
    found = examine(
        Family("LLaVA-OneVision", "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision")
    )
    assert [name for name, said in found.items() if said != "yes"] == [
        "compare, in one batch"
    ]  # its images are split into tiles
