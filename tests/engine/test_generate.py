"""Answers to prompts, many at a time."""

import pytest

from tests.engine.test_decode import made
from vlmdpo.data.reasons import BadRow
from vlmdpo.engine.generate import answer_texts
from vlmdpo.errors import ModelError
from vlmdpo.models.rendering import render_question, stop_token_ids

PROMPTS = ["Split this into claims: a red circle and a blue square.", "why", "What is a cat?"]


@pytest.mark.parametrize("family", ["idefics2", "qwen2_5_vl"])
def test_prompts_without_an_image(family):
    model, processor = made(family)
    expected = []
    for prompt in PROMPTS:
        text = render_question(processor, prompt, images=0)
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=stop_token_ids(model, processor),
        )
        answer = processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(answer.strip())
    assert len(set(expected)) > 1
    assert answer_texts(model, processor, PROMPTS, 6) == expected
    assert answer_texts(model, processor, PROMPTS, 6, batch_size=2) == expected
    assert answer_texts(model, processor, [], 6) == []
    with pytest.raises(BadRow):
        answer_texts(model, processor, ["what is on <image>?"], 6)


def test_a_model_that_wants_an_image():
    model, processor = made("paligemma")
    with pytest.raises(ModelError, match="needs another model"):
        answer_texts(model, processor, PROMPTS, 6)
