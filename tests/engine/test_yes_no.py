"""How far answers lean to Yes, in one forward pass for all questions of an image."""

import types

import pytest
import torch

from tests.engine.test_decode import QUESTIONS, made, picture
from vlmdpo.benchmarks import verdict as read
from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.engine import yes_no
from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import model_inputs
from vlmdpo.engine.leaves import Leaf, Prompt
from vlmdpo.engine.yes_no import YesNoReader, YesNoTokens, yes_no_tokens
from vlmdpo.errors import ModelError
from vlmdpo.tiny import evaluation
from vlmdpo.tiny.random_tokenizer import make_tokenizer


def plain_log_odds(model, processor, question, yes, no):
    inputs = model_inputs(model, processor, [picture(0)], [question])
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1].double()
    return float(logits[yes].logsumexp(0) - logits[no].logsumexp(0))


@pytest.mark.parametrize("family", ["idefics2", "qwen2_5_vl", "paligemma"])
def test_log_odds_are_those_of_a_plain_forward_pass(family):
    model, processor = made(family)
    yes, no = (  # a token is a letter
        processor.tokenizer(letters, add_special_tokens=False)["input_ids"]
        for letters in ("yY", "nN")
    )
    expected = [plain_log_odds(model, processor, question, yes, no) for question in QUESTIONS]
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    with decoder.open(picture(0)) as opened:
        found = opened.log_odds(QUESTIONS)
        assert found == pytest.approx(expected, abs=1e-4)
        assert opened.log_odds(QUESTIONS, batch_size=2) == pytest.approx(expected, abs=1e-4)
        assert opened.log_odds([]) == []
    assert len(set(found)) == len(found)


def test_they_agree_with_verdicts(tiny_model_parts):
    model, processor = tiny_model_parts
    tokens = yes_no_tokens(processor.tokenizer)
    texts = {
        name: {processor.tokenizer.decode([token]) for token in ids}
        for name, ids in (("Yes", tokens.yes), ("No", tokens.no))
    }
    assert all(verdict(text) == name for name, found in texts.items() for text in found)
    questions = [f"Is there a {thing} in this image?" for thing in ("moon", "circle", "star")]
    questions += [f"Is the {thing} red in this image?" for thing in ("moon", "circle", "star")]
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    passes = []
    decoder.base.lm_head.register_forward_hook(lambda *_: passes.append(1))
    with decoder.open(evaluation.draw_image("SCENE_1.png")) as opened:
        log_odds = opened.log_odds(questions)
        assert len(passes) == 1
        answers = opened.answer(questions, 3)
    assert [verdict(answer) for answer in answers] == [
        "Yes" if odds > 0 else "No" for odds in log_odds
    ]
    assert len({verdict(answer) for answer in answers}) == 2


def test_both_readers_skip_the_same_marks():
    assert yes_no.MARKS == read.MARKS


def test_an_answer_that_begins_with_a_blank_is_read_behind_it():
    leaves = [Leaf(Prompt([1], torch.zeros(1, 1), {})) for _ in range(2)]
    reader = YesNoReader(
        types.SimpleNamespace(repetition_penalty=None, min_p=None, typical_p=None),
        YesNoTokens(yes=[1, 2], no=[3], blank=frozenset({0})),
    )
    assert reader.choose(leaves, torch.tensor([[9.0, 1, 1, 1], [0, 0, 0, 5.0]])) == [0, 3]
    assert reader.choose(leaves, torch.tensor([[0.0, 5, 5, 2], [5, 9, 9, 1.0]])) == [1, 1]
    two = torch.tensor(2.0).log()
    assert reader.log_odds(leaves[0]) == pytest.approx(float(3 + two))
    assert reader.log_odds(leaves[1]) == pytest.approx(float(two - 5))


class Vocabulary(list):
    """A tokenizer of these tokens."""

    unk_token_id = 0

    def batch_decode(self, ids, **_):
        return [self[number] for [number] in ids]

    def __call__(self, text, **_):
        return {"input_ids": [self.index(c) if c in self else 0 for c in text]}


def test_which_tokens_are_words():
    words = Vocabulary(
        ["<unk>", " Yes", "yes", '"Yes', "Yesterday", "No", "no.", "Not", " ", '\n"']
    )
    found = yes_no_tokens(words)
    assert (found.yes, found.no) == ([1, 2, 3], [5, 6])
    assert found.blank == {8, 9}


def test_tokenizers_that_split_the_words():
    letters = make_tokenizer()
    found = yes_no_tokens(letters)
    assert {letters.decode([token]) for token in found.yes} == {"y", "Y"}
    assert {letters.decode([token]) for token in found.no} == {"n", "N"}
    with pytest.raises(ModelError, match="has no tokens for Yes and No"):
        yes_no_tokens(Vocabulary(["<unk>", "a", "b"]))
