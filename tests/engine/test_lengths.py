"""Token counts equal the collator's for every family, while few images are processed."""

import dataclasses
import io

import pytest
from PIL import Image

from tests.support.images import encoded
from vlmdpo.data.images import EncodedImage
from vlmdpo.data.pairs import BadRow, PreferencePair, message
from vlmdpo.engine import lengths
from vlmdpo.engine.collate import PairCollator
from vlmdpo.models import families as known
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.tiny import random_models

SIZES = [(40, 30), (31, 64), (64, 64), (90, 20), (20, 70), (33, 33), (57, 41), (80, 25)]


def _processor(family):
    processor = random_models.make(family)[1]
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    return processor


def _pair(*sizes, question="What is it?"):
    pictures = [EncodedImage(encoded(size), size) for size in sizes]
    data = tuple(picture.data for picture in pictures)
    return PreferencePair(
        data,
        (message("user", question, len(sizes)),),
        message("assistant", "good"),
        message("assistant", "b"),
    ), pictures


def _made(processor, pair):
    row = {
        "images": [Image.open(io.BytesIO(data)) for data in pair.images],
        "prompt": list(pair.prompt),
    }
    batch = PairCollator(processor)([{**row, "chosen": [pair.chosen], "rejected": [pair.rejected]}])
    return batch["forest"].lengths


@pytest.mark.parametrize("family", random_models.available())
def test_counts_equal_the_collators(family):
    counter = lengths.TokenCounter(_processor(family))
    for sizes in [(size,) for size in SIZES]:
        pair, pictures = _pair(*sizes)
        counted = counter.count(pair, pictures)
        assert (counted.prompt, counted.chosen, counted.rejected) == _made(
            counter.processor, pair
        ), sizes
        assert counted.images > 0
    counter.collator.prompts = lambda *_: pytest.fail("a picture was processed")
    for side in range(20, 120, 7):
        pair, pictures = _pair((side, 50))
        assert counter.count(pair, pictures).prompt == _made(counter.processor, pair)[0]


@pytest.mark.parametrize(
    "family", ["idefics2", "idefics3", "llava", "llava_next", "gemma3", "qwen2_5_vl"]
)
def test_counts_depend_on_the_neighbors_of_an_image(family):
    """The same sizes may count differently."""
    counter = lengths.TokenCounter(_processor(family))
    place = message("user", "", 1)["content"][0]
    texts = [{"type": "text", "text": text} for text in ("One?", " two?", "\n")]
    orders = [
        [place, place, *texts],
        [place, texts[0], place, texts[1]],
        [texts[0], place, texts[2], place],
        [*texts, place, place],
    ]
    for sizes in ((SIZES[0], SIZES[3]), (SIZES[1], SIZES[2])):
        plain, pictures = _pair(*sizes)
        for order in orders:
            pair = dataclasses.replace(plain, prompt=({"role": "user", "content": order},))
            assert counter.count(pair, pictures).prompt == _made(counter.processor, pair)[0], order


def test_wrong_sizes_from_a_processor_are_not_used(monkeypatch):
    monkeypatch.setattr(lengths, "estimated_image_tokens", lambda processor, sizes: 7)
    counter = lengths.TokenCounter(_processor("qwen2_vl"))
    for size in SIZES:
        pair, pictures = _pair(size)
        assert counter.count(pair, pictures).prompt == _made(counter.processor, pair)[0]
    assert not counter._trusts_estimates


def test_a_row_without_images_and_one_that_the_processor_refuses():
    counter = lengths.TokenCounter(_processor("qwen2_vl"))
    pair, _ = _pair()
    assert counter.count(pair, []).images == 0
    pair, pictures = _pair((1000, 2))  # Qwen takes no side 200 times the other
    with pytest.raises(BadRow) as caught:
        counter.count(pair, pictures)
    assert caught.value.reason == "processor_refuses"
    pair, pictures = _pair(
        (30, 30), question=f"holds {known.reserved_tokens(counter.processor)[0]}"
    )
    with pytest.raises(BadRow) as caught:
        counter.count(pair, pictures)
    assert caught.value.reason == "placeholder_miscount"


def test_a_family_that_needs_an_image_refuses_a_row_without_one():
    counter = lengths.TokenCounter(_processor("paligemma"))
    bare, _ = _pair()
    for _ in range(2):
        with pytest.raises(BadRow) as caught:
            counter.count(bare, [])
        assert caught.value.reason in ("processor_refuses", "chat_template_refuses")
    pair, pictures = _pair((30, 30))
    assert counter.count(pair, pictures).images > 0


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0]['content'] + 1 }}", "concatenate"),  # not one of Jinja's own errors
        ("{{ nothing.at_all }}", "undefined"),
    ],
)
def test_a_template_that_fails_is_a_reason_whatever_it_raises(template, says):
    counter = lengths.TokenCounter(_processor("idefics2"))
    pair, pictures = _pair((30, 30))
    counter.count(pair, pictures)
    rendering = counter.processor._vlmdpo_rendering
    counter.processor._vlmdpo_rendering = dataclasses.replace(rendering, template=template)
    with pytest.raises(BadRow, match=says) as caught:
        counter.count(pair, pictures)
    assert caught.value.reason == "chat_template_refuses"


def test_special_tokens_that_a_text_writes_out_are_noted():
    counter = lengths.TokenCounter(_processor("idefics2"))
    end = counter.processor.tokenizer.eos_token
    assert counter.notes(_pair()[0]) == ()
    assert counter.notes(_pair(question=f"Why {end}?")[0]) == ("special_token_in_text",)


def test_images_are_not_decoded_to_be_counted(monkeypatch):
    """A damaged one would be dropped or not, by what was counted before it."""
    from PIL import ImageFile

    counter = lengths.TokenCounter(_processor("idefics2"))
    pair, pictures = _pair((30, 30))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert counter.count(pair, pictures).images > 0
