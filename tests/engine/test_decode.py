"""Shared decoding gives the answers of one-by-one greedy `generate`, for every family."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from vlmdpo.benchmarks.ask import adapts_vision
from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import answer
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.tiny import random_models

QUESTIONS = [
    "Is there a cat?",
    "Is the cat black in this image?",
    "Is there direct contact between the cat and the mat?",
    "a",
]
UNSHARED = {
    "paligemma": "read in both directions",
    "paligemma2": "read in both directions",
    "qwen3_5": "linear_attention",
    "qwen3_5_moe": "linear_attention",
    "minicpm_v": "linear_attention",
    "lfm2_vl": "conv",
}
# Seeds of models that do not give the same answer to everything.
SEEDS = {"minicpm_v": 1, "qwen3_5_moe": 1}


def picture(seed, size=(40, 28)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    )


def made(family, lora=None):
    model, processor = random_models.make(family, seed=SEEDS.get(family, 3))
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    if family.startswith(
        "paligemma"
    ):  # tied to random embeddings, its head would say the last token again and again
        head = model.get_output_embeddings()
        torch.manual_seed(4)
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=lora))
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), processor


def one_by_one(model, processor, image, questions, tokens=6):
    return [answer(model, processor, [image], [question], tokens)[0] for question in questions]


@pytest.mark.parametrize("family", sorted(random_models.available()))
def test_answers_are_those_of_one_by_one_generate(family):
    model, processor = made(family)
    expected = {seed: one_by_one(model, processor, picture(seed), QUESTIONS) for seed in (0, 1)}
    assert len({text for texts in expected.values() for text in texts}) > 2, (
        "answers must differ for this to mean anything"
    )
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    assert (
        (UNSHARED[family] in decoder.reason_not_shared)
        if family in UNSHARED
        else not decoder.reason_not_shared
    )
    for seed in (0, 1):
        with decoder.open(picture(seed)) as opened:
            assert opened.answer(QUESTIONS, 6) == expected[seed]
            assert opened.answer(QUESTIONS[:2], 6) == expected[seed][:2], "a second call"
            assert opened.answer(QUESTIONS, 6, batch_size=2) == expected[seed], "in smaller batches"
    assert one_by_one(model, processor, picture(1), QUESTIONS[:1]) == expected[1][:1], (
        "the model is itself again"
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma"])
def test_an_image_is_encoded_once_for_all_its_questions(family):
    model, processor = made(family)
    towers = [
        module
        for name, module in model.named_modules()
        if name.endswith(("vision_tower", "visual"))
    ]
    runs = []
    towers[0].register_forward_hook(lambda *inputs: runs.append(1))
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    with decoder.open(picture(0)) as opened:
        opened.answer(QUESTIONS, 4, batch_size=2)
        opened.answer(QUESTIONS, 4)
    assert len(runs) == 1
    with decoder.open(picture(1)) as opened:
        opened.answer(QUESTIONS, 4)
    assert len(runs) == 2


@pytest.mark.parametrize("where", ["language", "everywhere"])
@pytest.mark.parametrize("family", ["idefics2", "qwen2_vl", "gemma3"])
def test_base_and_adapter_share_no_keys_and_values(family, where):
    target = (
        r".*(language_model|text_model).*(q_proj|v_proj|down_proj)"
        if where == "language"
        else "all-linear"
    )
    model, processor = made(family, lora=target)
    assert adapts_vision(model) == (where == "everywhere")
    with model.disable_adapter():
        base = one_by_one(model, processor, picture(0), QUESTIONS)
    tuned = one_by_one(model, processor, picture(0), QUESTIONS)
    assert base != tuned
    decoder = PromptTreeDecoder(model, processor, keep_features=not adapts_vision(model))
    with decoder.open(picture(0)) as opened:
        for _ in range(2):
            with model.disable_adapter():
                assert opened.answer(QUESTIONS, 6) == base
            assert opened.answer(QUESTIONS, 6) == tuned


def test_a_sliding_window_shorter_than_the_prompt():
    model, processor = random_models.make("gemma3", seed=3, text={"sliding_window": 8})
    model.eval()
    expected = one_by_one(model, processor, picture(0), QUESTIONS)
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    with decoder.open(picture(0)) as opened:
        assert opened.answer(QUESTIONS, 6) == expected


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_a_settled_answer_ends_early_and_others_continue(family):
    model, processor = made(family)
    whole = one_by_one(model, processor, picture(0), QUESTIONS, 8)
    first = whole[0][:2]
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    with decoder.open(picture(0)) as opened:
        said = opened.answer(QUESTIONS, 8, stop_when=lambda text: text.startswith(first))
    assert len(said[0]) < len(whole[0])
    for cut, text in zip(said, whole, strict=True):
        assert text.startswith(cut.rstrip("\ufffd"))  # a character of several tokens may be cut
        assert cut == text or cut.startswith(first)


def test_a_repetition_penalty_is_kept():
    model, processor = made("llava")
    model.generation_config.repetition_penalty = 1.7
    expected = one_by_one(model, processor, picture(0), QUESTIONS, 10)
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    assert not decoder.reason_not_shared
    with decoder.open(picture(0)) as opened:
        assert opened.answer(QUESTIONS, 10) == expected


def test_settings_that_change_greedy_answers_use_generate():
    model, processor = made("llava")
    model.generation_config.no_repeat_ngram_size = 2
    expected = one_by_one(model, processor, picture(0), QUESTIONS, 10)
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    assert "no_repeat_ngram_size" in decoder.reason_not_shared
    with decoder.open(picture(0)) as opened:
        assert opened.answer(QUESTIONS, 10) == expected
