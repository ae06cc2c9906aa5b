"""Samples that grow as a tree have the distribution of `generate`'s."""

import pytest
import torch
from scipy.stats import chi2_contingency

from tests.engine.test_decode import QUESTIONS, made, one_by_one, picture
from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import model_inputs
from vlmdpo.engine.leaves import Leaf
from vlmdpo.engine.next_token import TokenChooser, warpers
from vlmdpo.engine.sampling import GREEDY, Sample, Sampling
from vlmdpo.engine.tree import GrowingTree, common_beginning
from vlmdpo.models.rendering import render_question, stop_token_ids
from vlmdpo.tiny import random_models

# Trees; M-RoPE; a sliding window; read in both directions and recurrent, which use `generate`.
FAMILIES = ["idefics2", "llava", "qwen2_5_vl", "gemma3", "paligemma", "qwen3_5"]
NEARLY_GREEDY = Sampling(1e-4, count=3)
DRAWN = Sampling(1.5, 0.95, 3, seed=4)


def decoder_of(family, **options):
    model, processor = made(family, **options)
    return PromptTreeDecoder(model, processor, keep_features=True)


def asked(decoder, questions, sampling, tokens=6, **options):
    with decoder.open(picture(0)) as opened:
        return opened.sample(questions, sampling, tokens, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_temperature_near_0_gives_greedy_answers(family):
    decoder = decoder_of(family)
    expected = one_by_one(decoder.model, decoder.processor, picture(0), QUESTIONS)
    found = asked(decoder, QUESTIONS, NEARLY_GREEDY)
    assert [[sample.text for sample in samples] for samples in found] == [
        [text] * 3 for text in expected
    ]
    greedy = asked(decoder, QUESTIONS, Sampling(count=3))
    assert [[sample.text for sample in samples] for samples in greedy] == [[t] for t in expected]


@pytest.mark.parametrize("family", ["idefics2", "qwen2_5_vl", "paligemma"])
def test_draws_depend_on_seed_image_question_and_number_alone(family):
    decoder = decoder_of(family)
    found = asked(decoder, QUESTIONS, DRAWN)
    assert len({sample.text for samples in found for sample in samples}) == 12
    assert asked(decoder, QUESTIONS[::-1], DRAWN, batch_size=5) == found[::-1]
    assert asked(decoder, QUESTIONS[1:2] * 2, DRAWN, batch_size=2) == [found[1]] * 2
    fewer = Sampling(1.5, 0.95, 2, seed=4)
    assert asked(decoder, QUESTIONS[:1], fewer) == [found[0][:2]]
    assert asked(decoder, QUESTIONS[:1], Sampling(1.5, 0.95, 3, seed=5))[0] != found[0]
    with decoder.open(picture(1)) as opened:
        assert opened.sample(QUESTIONS[:1], DRAWN, 6)[0] != found[0]


@pytest.mark.parametrize("family", ["idefics2", "paligemma"])
def test_a_sample_says_how_long_it_is_and_whether_it_ended(family):
    decoder = decoder_of(family)
    [[whole]] = asked(decoder, QUESTIONS[:1], GREEDY, 5)
    assert (whole.tokens, whole.finished) == (5, False)
    ids = _greedy_ids(decoder, QUESTIONS[0], 5)
    last = next(number for number in range(1, 5) if ids[number] not in ids[:number])
    decoder.end_tokens.add(ids[last])  # as the chat template's may be
    [[ended]] = asked(decoder, QUESTIONS[:1], GREEDY, 5)
    assert (ended.tokens, ended.finished) == (last, True)
    assert asked(decoder, QUESTIONS[:1], GREEDY, last + 1) == [[ended]], "the end just fits"
    [[cut]] = asked(decoder, QUESTIONS[:1], GREEDY, last)
    assert (cut.tokens, cut.finished) == (last, False)


def _greedy_ids(decoder, question, tokens):
    inputs = model_inputs(decoder.model, decoder.processor, [picture(0)], [question])
    sequences = decoder.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


def test_image_prompt_and_question_are_read_once():
    decoder = decoder_of("idefics2")
    read, encoded = [], []
    decoder.backbone.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True
    )
    decoder.backbone.vision_model.register_forward_hook(lambda *_: encoded.append(1))
    samples = asked(decoder, QUESTIONS, DRAWN, 4)
    prompts = [
        decoder.processor(
            text=[render_question(decoder.processor, question)],
            images=[[picture(0)]],
            add_special_tokens=False,
            return_tensors="pt",
        )["input_ids"][0].tolist()
        for question in QUESTIONS
    ]
    shared = common_beginning(prompts)
    grown = [sample.tokens + sample.finished - 1 for answers in samples for sample in answers]
    assert len(encoded) == 1
    assert sum(width for _, width in read) == (
        shared + sum(len(ids) - shared for ids in prompts) + sum(grown)
    )
    assert {rows for rows, _ in read} == {1}


# Distribution.


def plain_log_probs(decoder, question, answer_ids):
    """(A, V) log-probs of a plain forward pass over prompt and answer."""
    inputs = dict(model_inputs(decoder.model, decoder.processor, [picture(0)], [question]))
    answer = torch.tensor([answer_ids])
    ids = inputs["input_ids"]
    for name, value in inputs.items():
        if name != "input_ids" and value.shape == ids.shape:
            more = torch.ones_like(answer) if name == "attention_mask" else answer * 0
            inputs[name] = torch.cat([value, more], dim=1)
    inputs["input_ids"] = torch.cat([ids, answer], dim=1)
    with torch.inference_mode():
        logits = decoder.model(**inputs).logits[0]
    return logits[ids.shape[1] - 1 : -1].log_softmax(dim=-1)


def farthest(decoder, monkeypatch):
    """How far log-probs that the tree sees lie from those of plain forward passes, at most."""
    seen = {}

    def penalize(self, leaves, logits):
        for leaf, row in zip(leaves, logits, strict=True):
            seen.setdefault(id(leaf), (leaf, []))[1].append(row.log_softmax(dim=-1))
        return original(self, leaves, logits)

    original = TokenChooser.penalize
    with monkeypatch.context() as patched:
        patched.setattr(TokenChooser, "penalize", penalize)
        asked(decoder, QUESTIONS[:3], Sampling(1.0, count=3, seed=1), 8)
    assert len(seen) == 9
    questions = [question for question in QUESTIONS[:3] for _ in range(3)]
    return max(
        float((torch.stack(rows) - plain_log_probs(decoder, question, leaf.answer_ids)).abs().max())
        for question, (leaf, rows) in zip(questions, seen.values(), strict=True)
    )


def brothers(monkeypatch):
    """Plant a mistake: each answer sees those to the same question that stand before it."""
    original = GrowingTree.__init__

    def init(self, prefix, parents, device):
        original(self, prefix, parents, device)
        parent = torch.tensor([-1, *parents])
        brothers = (parent[:, None] == parent[None, :]) & (parent[:, None] > 0)
        self._sees_NN |= brothers.tril()

    monkeypatch.setattr(GrowingTree, "__init__", init)


def shifted(monkeypatch):
    """Plant a mistake: an answer's positions are one too large."""
    position = Leaf.position.fget
    monkeypatch.setattr(Leaf, "position", property(lambda leaf: position(leaf) + 1))


def windowed():
    model, processor = random_models.make("gemma3", seed=3, text={"sliding_window": 8})
    return PromptTreeDecoder(model.eval(), processor, keep_features=True)


@pytest.mark.parametrize("family", ["idefics2", "llava", "qwen2_5_vl", "gemma3 windowed"])
def test_a_sample_s_log_probs_are_those_of_a_plain_forward_pass(family, monkeypatch):
    decoder = windowed() if "windowed" in family else decoder_of(family)
    assert farthest(decoder, monkeypatch) < 1e-4
    for mistake in (brothers, shifted):
        with monkeypatch.context() as patched:
            mistake(patched)
            assert farthest(decoder, monkeypatch) > 1e-2, mistake.__doc__


def _p_value(ours, theirs):
    """Of the hypothesis that both come from one distribution; rare sequences count together."""
    cells = {}
    for side, sequences in enumerate((ours, theirs)):
        for sequence in sequences:
            cells.setdefault(sequence, [0, 0])[side] += 1
    common = [counts for counts in cells.values() if sum(counts) >= 10]
    rare = [counts for counts in cells.values() if sum(counts) < 10]
    table = [*common, [sum(side) for side in zip(*rare, strict=True)]] if rare else common
    assert len(table) > 8, "several sequences must be common for this to mean anything"
    return chi2_contingency([row for row in table if sum(row)]).pvalue


COUNT = 1000
# A few dozen sequences are common then; its scores lie farther apart.
TEMPERATURES = {"paligemma": 2.7}


def tree_sequences(decoder, sampling):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoder, "sample", tuple)  # of token ids
        return asked(decoder, QUESTIONS[:1], sampling, 2, batch_size=500)[0]


def generate_sequences(decoder, sampling):
    model, processor = decoder.model, decoder.processor
    inputs = model_inputs(model, processor, [picture(0)], QUESTIONS[:1])
    torch.manual_seed(0)
    sequences = model.generate(
        **inputs,
        max_new_tokens=2,
        eos_token_id=stop_token_ids(model, processor),
        **sampling.options(),
    )
    return [tuple(ids) for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist()]


@pytest.mark.parametrize("family", ["idefics2", "qwen2_5_vl", "paligemma"])
def test_frequencies_are_those_of_generate(family, monkeypatch):
    decoder, temperature = decoder_of(family), TEMPERATURES.get(family, 0.25)
    sampling = Sampling(temperature, 0.6, COUNT)
    theirs = generate_sequences(decoder, sampling)
    assert _p_value(tree_sequences(decoder, sampling), theirs) > 1e-3
    other = Sampling(1.15 * temperature, 0.6, COUNT)
    assert _p_value(tree_sequences(decoder, other), theirs) < 1e-6
    if not decoder.reason_not_shared:
        brothers(monkeypatch)
        assert _p_value(tree_sequences(decoder, sampling), theirs) < 1e-6


SETTINGS = [
    {},
    {"repetition_penalty": 1.6},
    {"top_k": 20, "top_p": 0.3, "temperature": 0.2},  # sampling has its own
    {"min_p": 0.05},
    {"typical_p": 0.6},
    {"epsilon_cutoff": 0.004},
    {"eta_cutoff": 0.006},
    {"top_h": 0.9},
    {"min_p": 0.01, "typical_p": 0.7, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sampling", [Sampling(0.7, 0.9), Sampling(1.0, 1.0)])
def test_scores_are_processed_as_generate_does(settings, sampling):
    decoder = decoder_of("idefics2")
    model = decoder.model
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    inputs = model_inputs(model, decoder.processor, [picture(0)], QUESTIONS[:1])
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, max_new_tokens=1, **sampling.options(), **options)
    chooser = TokenChooser(model.generation_config, sampling)
    with decoder.open(picture(0)) as opened:
        scores = chooser.penalize([Leaf(opened._prompt(QUESTIONS[0]))], out.logits[0])
    processed = warpers(model.generation_config, sampling)(torch.empty(0), scores)
    assert torch.equal(processed, out.scores[0])
    asked(decoder, QUESTIONS, sampling, 3)


def test_a_penalty_holds_for_samples_too():
    decoder = decoder_of("idefics2")
    decoder.model.generation_config.repetition_penalty = 1.7
    decoder = PromptTreeDecoder(decoder.model, decoder.processor, keep_features=True)
    expected = one_by_one(decoder.model, decoder.processor, picture(0), QUESTIONS, 10)
    found = asked(decoder, QUESTIONS, NEARLY_GREEDY, 10)
    assert [samples[0].text for samples in found] == expected


def test_settings_of_a_search_do_not_keep_from_drawing():
    decoder = decoder_of("idefics2")
    expected = asked(decoder, QUESTIONS, DRAWN)
    decoder.model.generation_config.num_beams = 2
    decoder = PromptTreeDecoder(decoder.model, decoder.processor, keep_features=True)
    assert "num_beams" in decoder.reason_not_shared
    assert asked(decoder, QUESTIONS, DRAWN) == expected, "also: `generate` and tree draw the same"


def test_nothing_asked():
    assert asked(decoder_of("idefics2"), [], DRAWN) == []
    assert Sample("a", 1, True) == Sample("a", 1, True)
