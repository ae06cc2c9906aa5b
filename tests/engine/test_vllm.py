"""What vLLM is given. A fake one, which records it, computes with transformers."""

import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from tests.models.test_rendering import add_bos
from vlmdpo.engine import vllm as engine
from vlmdpo.engine.decode import PromptTreeDecoder
from vlmdpo.engine.generate import answer, answer_texts
from vlmdpo.engine.sampling import GREEDY, Sampling
from vlmdpo.errors import MemoryBudgetError, MissingDependencyError, ModelError
from vlmdpo.models.load import load_model, load_processor
from vlmdpo.models.rendering import render_question
from vlmdpo.tiny import evaluation, random_models

IMAGE = Image.new("RGB", (64, 48), "navy")
SETTINGS = {"revision": None, "dtype": "auto", "trust_remote_code": False}


class FakeLLM:
    """vLLM's class: keeps what it is made with and asked, and answers with the embedded model."""

    made: ClassVar[list[dict]]
    asked: ClassVar[list[dict]]
    wrong = False  # whether its answers differ from the model's
    fails = ""

    def __init__(self, **options):
        if self.fails:
            raise ValueError(self.fails)
        self.made.append(options)

    def get_default_sampling_params(self):
        return types.SimpleNamespace(
            temperature=0.7, max_tokens=16, repetition_penalty=1.05, stop_token_ids=None
        )

    def generate(self, prompts, settings, *, lora_request, use_tqdm):
        self.asked.append({"settings": settings, "lora": lora_request, "prompts": prompts})
        model, processor = self.parts
        if lora_request:
            model = load_model("tiny", device="cpu", adapter=Path(lora_request[2]))
        for prompt, own in zip(prompts, settings, strict=True):
            images = [[one] for one in prompt.get("multi_modal_data", {}).values()]
            inputs = processor(
                text=[processor.tokenizer.decode(prompt["prompt_token_ids"])],
                images=images or None,
                add_special_tokens=False,
                return_tensors="pt",
            )
            rows = model.generate(**inputs, max_new_tokens=own.max_tokens, do_sample=False)
            ids = rows[0, inputs["input_ids"].shape[1] :].tolist()
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            completion = types.SimpleNamespace(
                text="Wrong." if self.wrong else text,
                token_ids=ids,
                finish_reason="stop" if ids[-1] in own.stop_token_ids else "length",
            )
            yield types.SimpleNamespace(outputs=[completion] * getattr(own, "n", 1))


@pytest.fixture
def fake(monkeypatch, tiny_model_parts):
    llm = type("LLM", (FakeLLM,), {"made": [], "asked": [], "parts": tiny_model_parts})
    request = types.SimpleNamespace(LoRARequest=lambda *parts: parts)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=llm))
    monkeypatch.setitem(sys.modules, "vllm.lora", types.SimpleNamespace(request=request))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return llm


def adapter_on(folder, target):
    torch.manual_seed(0)
    model = get_peft_model(load_model("tiny", device="cpu"), LoraConfig(r=4, target_modules=target))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.06)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_it_gets_token_ids_our_image_settings_and_the_models_own_sampling(fake, tmp_path):
    adapter = adapter_on(tmp_path / "adapter", r".*text_model.*(q|v)_proj")
    processor = load_processor("tiny")
    generator = engine.VllmGenerator("tiny", processor, adapter, **SETTINGS)
    assert fake.made == []  # nothing takes memory before it is started
    generator.start()
    [options] = fake.made
    assert options["mm_processor_kwargs"] == {"do_image_splitting": False}
    assert options["max_lora_rank"] == 8
    questions = ["Is there a moon in this image?", "Describe this image."]
    for tuned, model in (
        (False, fake.parts[0]),
        (True, load_model("tiny", device="cpu", adapter=adapter)),
    ):
        answers = generator.generate([IMAGE] * 2, questions, 6, tuned=tuned)
        assert answers == answer(model, processor, [IMAGE] * 2, questions, 6)
    asked = fake.asked[0]
    prompt = asked["prompts"][1]
    ids = processor.tokenizer(
        render_question(processor, questions[1]), add_special_tokens=False
    ).input_ids
    assert prompt == {"prompt_token_ids": ids, "multi_modal_data": {"image": IMAGE}}
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert ids.count(image_token) == 1
    settings = asked["settings"][1]
    assert (settings.temperature, settings.max_tokens) == (0.0, 6)
    assert settings.repetition_penalty == 1.05
    assert settings.stop_token_ids == [processor.tokenizer.eos_token_id]
    assert [one["lora"] is not None for one in fake.asked] == [False, True]


def test_texts_are_completed_without_an_image(fake):
    processor = load_processor("tiny")
    generator = engine.VllmGenerator("tiny", processor, None, **SETTINGS)
    generator.start()
    texts = ["Is there a moon in this image?", "Split this."]
    completed = generator.complete(texts, 5, tuned=False)
    assert completed == answer_texts(fake.parts[0], processor, texts, 5)
    assert all("multi_modal_data" not in prompt for prompt in fake.asked[0]["prompts"])
    assert fake.asked[0]["settings"][0].temperature == 0


def test_samples_have_lengths_ends_and_seeds_of_their_own(fake):
    processor = load_processor("tiny")
    generator = engine.VllmGenerator("tiny", processor, None, **SETTINGS)
    generator.start()
    questions = ["Is there a moon in this image?", "Describe this image."]
    other = Image.new("RGB", (64, 48), "white")
    sampling = Sampling(0.7, 0.9, 3, seed=5)
    samples = generator.sample([IMAGE, IMAGE], questions, 5, sampling, tuned=False)
    [settings] = [one["settings"] for one in fake.asked]
    assert [(one.temperature, one.top_p, one.top_k, one.n) for one in settings] == [
        (0.7, 0.9, -1, 3)
    ] * 2
    model = fake.parts[0]
    decoder = PromptTreeDecoder(model, processor, keep_features=True)
    with decoder.open(IMAGE) as opened:
        expected = opened.sample(questions, GREEDY, 5)
    assert samples == [[sample] * 3 for [sample] in expected]
    assert {sample.finished for [sample, *_] in samples} == {True, False}
    # Whatever is asked beside it; not for another image, question or seed.
    generator.sample([other, IMAGE], questions[::-1], 5, sampling, tuned=False)
    generator.sample([IMAGE], questions[:1], 5, Sampling(0.7, 0.9, 3, seed=6), tuned=False)
    [first, second], [third, again], [fourth] = (
        [one.seed for one in call["settings"]] for call in fake.asked
    )
    assert again == first
    assert len({first, second, third, fourth}) == 4


def test_prompts_begin_with_bos_once(fake, tmp_path):
    model, processor = random_models.make("llava")
    add_bos(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    generator = engine.VllmGenerator(str(tmp_path), load_processor(str(tmp_path)), None, **SETTINGS)
    generator.start()
    fake.generate = lambda self, prompts, *a, **k: fake.asked.append(prompts) or []
    generator.generate([IMAGE], ["why"], 4, tuned=False)
    [[prompt]] = fake.asked
    bos = processor.tokenizer.bos_token_id
    assert prompt["prompt_token_ids"][0] == bos
    assert prompt["prompt_token_ids"].count(bos) == 1


@pytest.mark.parametrize(
    "target", [r".*(q|v)_proj", r".*connector.*_proj", r".*vision_model.*fc1"], ids=str
)
def test_adapters_that_it_would_ignore_in_part_are_refused(target, fake, tmp_path):
    adapter = adapter_on(tmp_path / "adapter", target)
    with pytest.raises(ModelError, match="outside the language model") as refused:
        engine.VllmGenerator("tiny", load_processor("tiny"), adapter, **SETTINGS)
    assert str(refused.value).endswith(f"vlmdpo export --adapter {adapter} --merge")


def test_a_processor_that_rewrites_prompts_is_refused(fake):
    _, processor = random_models.make("paligemma")
    with pytest.raises(ModelError, match="leave --engine out"):
        engine.VllmGenerator("tiny", processor, None, **SETTINGS)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Free memory on device is less than desired GPU memory utilization", MemoryBudgetError),
        ("Model architectures ['X'] are not supported for now.\nMore.", ModelError),
    ],
)
def test_a_start_that_fails_says_why(message, error, fake):
    fake.fails = message
    generator = engine.VllmGenerator("tiny", load_processor("tiny"), None, **SETTINGS)
    with pytest.raises(error, match="leave --engine out"):
        generator.start()


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        engine.VllmGenerator("tiny", load_processor("tiny"), None, **SETTINGS)


@pytest.fixture
def some_questions(tmp_path):
    """A command that asks vLLM four questions of the embedded set."""
    tiny = ["--output-dir", tmp_path / "out", "--max-new-tokens", 4]
    arguments = [*tiny, "--task", "discriminative", "--limit", 4]
    return ["eval-amber", "--json", "--engine", "vllm", *arguments]


def test_evaluation_compares_it_with_the_plain_engine(fake, some_questions, vlmdpo):
    code, out, err = vlmdpo(*some_questions, "--verify", 3)
    assert code == 0, err
    assert "vLLM and the plain engine agree on 3 answers" in err
    assert json.loads(out)["engine"] == "vllm"
    assert len(fake.asked[0]["prompts"]) == 3
    fake.wrong = True
    code, _, err = vlmdpo(*some_questions, "--verify", 3, "--overwrite")
    assert code == 4
    assert "is answered 'Wrong.' by vLLM and" in err


def test_an_evaluation_asks_vllm_the_same_question_once(fake, tmp_path, vlmdpo):
    evaluation.draw_image("SCENE_1.png").save(tmp_path / "1.png")
    row = {"image": "1.png", "question": "Is there a moon?", "answer": "no"}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    asked = ["eval", "--json", "--benchmark", tmp_path / "own.jsonl", "--engine", "vllm"]
    code, out, err = vlmdpo(*asked, "--verify", 0, "--max-new-tokens", 4)
    assert code == 0, err
    assert [len(one["prompts"]) for one in fake.asked] == [1]
    assert json.loads(out)["models"]["base"]["answered"] == 3
