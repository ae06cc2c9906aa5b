"""A prompt that is asked is the prompt that is trained, whatever kind of template a model ships."""

import dataclasses
import json

import pytest
import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import processors

from tests.support import matrix, templates
from tests.support.engines import pairs
from vlmdpo.data.pairs import message, text_of
from vlmdpo.engine.collate import PairCollator, render_example
from vlmdpo.engine.generate import model_inputs
from vlmdpo.engine.lengths import row_lengths
from vlmdpo.errors import ConfigError, DataError, ModelError
from vlmdpo.models import rendering
from vlmdpo.models.chat_template import PromptSettings, add_missing_template
from vlmdpo.models.digest import processor_digest
from vlmdpo.models.load import load_processor
from vlmdpo.models.rendering import render_answer, render_prompt, render_question, set_rendering
from vlmdpo.tiny import random_models

IMAGE = Image.new("RGB", (40, 40), "red")
ROW = {
    "images": [IMAGE],
    "prompt": [message("user", "why", 1)],
    "chosen": [message("assistant", "good one")],
    "rejected": [message("assistant", "bad")],
}
QUESTION = "user: <image>why</s>\n"
# What each kind of template makes of ROW: its prompt and its chosen answer.
RENDERED = {
    "parts": (QUESTION + "assistant: ", "good one</s>\n"),
    "plain answers": (QUESTION + "assistant: ", "good one</s>\n"),
    "plain": ("user: <image>\nwhy</s>\nassistant: ", "good one</s>\n"),
    "concatenated": ("user: <image>\nwhy</s>\nassistant: ", "good one</s>\n"),
    "no end": ("user: <image>why assistant: ", "good one</s>"),
    "extra in prompt": (QUESTION + "assistant: <channel>final\n", "good one</s>\n"),
    "header in answer": (QUESTION + "assistant: ", "good one</s>\n"),
    "line break": (QUESTION + "assistant:", " good one</s>\n"),
    "thinking": (QUESTION + "assistant: <think>\n\n</think>\n\n", "good one</s>\n"),
    "always thinks": (QUESTION + "assistant: <think>\n\n</think>\n\n", "good one</s>\n"),
    "dated": ("Today is 05 Mar 2026.\n" + QUESTION + "assistant: ", "good one</s>\n"),
    "own system": ("system: You are helpful.</s>\n" + QUESTION + "assistant: ", "good one</s>\n"),
    "no system": (QUESTION + "assistant: ", "good one</s>\n"),
    "stripped": (QUESTION + "assistant: ", "good one</s>\n"),
}


def with_template(template, family="llava", **settings):
    """A small family's processor with this template, and what was found about it."""
    _, processor = random_models.FAMILIES[family]({}, {}, 32)
    processor.chat_template = template.replace("IMAGE", "<image>")
    return processor, set_rendering(processor, PromptSettings(**settings), "x")


@pytest.mark.parametrize("kind", templates.KINDS)
def test_the_prompt_asked_is_the_prompt_trained(kind):
    processor, found = with_template(templates.KINDS[kind], date="2026-03-05")
    prompt, chosen = RENDERED[kind]
    trained = render_example(processor, ROW)
    assert (trained["prompt"], trained["chosen"]) == (prompt, chosen)
    assert render_question(processor, "why") == prompt
    batch = PairCollator(processor)([dict(ROW)])
    asked = processor(text=[prompt], images=[[IMAGE]], add_special_tokens=False)["input_ids"][0]
    length = batch["forest"].lengths[0]
    assert batch["tree_ids"][0, :length].tolist() == list(asked)
    answer_ids = batch["input_ids"][0, 1:][batch["completion_mask"][0, 1:] == 1]
    assert processor.tokenizer.decode(answer_ids) == chosen
    assert found.end_token_id in answer_ids.tolist()


@pytest.mark.parametrize("kind", ["plain", "plain answers", "concatenated"])
def test_no_list_of_parts_reaches_a_prompt(kind):
    processor, found = with_template(templates.KINDS[kind])
    turns = [
        *ROW["prompt"],
        message("assistant", "because"),
        message("user", "really", 0),
    ]
    text = render_prompt(processor, turns)
    assert "'type'" not in text
    assert text.index("why") < text.index("because") < text.index("really")
    assert "assistant" in found.plain_roles
    assert ("user" in found.plain_roles) == (kind != "plain answers")


def test_an_end_token_that_the_template_leaves_out_is_added_and_said(capsys):
    _, found = with_template(templates.NO_END)
    assert found.notes == (
        "the chat template of 'x' gives answers no end; they end in the tokenizer's </s>",
    )
    _, found = with_template(templates.PARTS)
    assert found.notes == ()


def test_spaces_around_an_answer_are_the_templates_business():
    stripped, _ = with_template(templates.STRIPPED)
    kept, _ = with_template(templates.PARTS)
    assert render_answer(stripped, " good ") == "good</s>\n"
    assert render_answer(kept, " good ") == " good </s>\n"


def test_reasoning_is_off_unless_it_is_asked_for():
    off, found = with_template(templates.THINKING)
    assert found.warnings == ()
    on, warned = with_template(templates.THINKING, template_kwargs={"enable_thinking": True})
    assert render_question(on, "why").endswith("assistant: <think>\n")
    assert "ends prompts in an open <think>" in warned.warnings[0]
    closed, _ = with_template(
        templates.THINKING, template_kwargs={"enable_thinking": True}, close_thinking=True
    )
    assert render_question(closed, "why") == render_question(off, "why")
    assert processor_digest(on) != processor_digest(off)


def test_a_prompt_that_always_opens_reasoning_is_closed_with_a_warning():
    _, found = with_template(templates.ALWAYS_THINKS)
    assert "it is closed at once" in found.warnings[0]


def test_unknown_variables_of_a_template_are_named():
    with pytest.raises(
        ConfigError, match=r"no variable 'enable_thinkin'\. Did you mean 'enable_th"
    ):
        with_template(templates.THINKING, template_kwargs={"enable_thinkin": True})
    with pytest.raises(ConfigError, match="It reads none"):
        with_template(templates.PARTS, template_kwargs={"enable_thinking": True})


def test_a_system_message_is_added_where_the_data_has_none():
    processor, _ = with_template(templates.OWN_SYSTEM, system="Be brief.")
    assert render_question(processor, "why").startswith("system: Be brief.</s>\nuser: ")
    own = [message("system", "Be long."), *ROW["prompt"]]
    assert render_prompt(processor, own).startswith("system: Be long.</s>\nuser: ")
    first, _ = with_template(templates.SYSTEM_FIRST, system="Be brief.")
    assert render_question(first, "why").startswith("system: Be brief.</s>\nuser: ")


def test_a_template_that_takes_no_system_message():
    processor, found = with_template(templates.NO_SYSTEM)
    assert found.refuses == {"system messages": "System role not supported"}
    row = {**ROW, "prompt": [message("system", "Be brief."), *ROW["prompt"]], "row": 7}
    with pytest.raises(rendering.CannotRender, match="takes no system messages: System role not"):
        render_prompt(processor, row["prompt"])
    with pytest.raises(
        DataError, match=r"row 7 \(counted from 0\): the chat template takes no system"
    ):
        PairCollator(processor)([row])
    with pytest.raises(
        DataError, match=r"row 0 \(counted from 0\): the chat template takes no system"
    ):
        row_lengths(processor, Dataset.from_list([row]))
    with pytest.raises(ConfigError, match=r"--system: .* takes none: System role not supported"):
        with_template(templates.NO_SYSTEM, system="Be brief.")


def test_a_template_of_one_turn_serves_rows_of_one_turn():
    one_turn = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
    processor, found = with_template(one_turn + templates.PARTS)
    assert found.refuses == {"earlier turns": "one turn"}
    assert render_question(processor, "why") == RENDERED["parts"][0]
    drops = templates.PARTS.replace("in messages %}", "in messages[-1:] %}")
    turns = [*ROW["prompt"], message("assistant", "because"), message("user", "really")]
    last_turn_only = "{% if messages | length == 3 %}" + drops + "{% else %}"
    processor, _ = with_template(last_turn_only + templates.PARTS + "{% endif %}")
    with pytest.raises(rendering.CannotRender, match="takes no earlier turns: it leaves out"):
        render_prompt(processor, turns)


def test_templates_that_cannot_be_used_are_refused_in_one_line():
    refused = {
        templates.SYSTEM_FIRST: "give one with --system TEXT",
        templates.DROPS_IMAGES: "it leaves out images: there is no <image>",
        "{% for": "it is not valid Jinja",
        "{{ messages[0].content + 1 }}": "can only concatenate",
        "{{ messages | tojson }}": "it spells a message out as a Python list",
        "<image>{% for m in messages if m.role == 'user' %}{{ m.content[-1].text }}{% endfor %}": (
            "it leaves out what the assistant says"
        ),
    }
    for template, reason in refused.items():
        with pytest.raises(ModelError) as caught:
            with_template(template)
        assert reason in str(caught.value)
        assert "the chat template of 'x' cannot render" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_several_templates_without_a_default_are_refused():
    _, processor = random_models.FAMILIES["llava"]({}, {}, 32)
    processor.chat_template = {"rag": templates.PARTS, "tools": templates.PARTS}
    with pytest.raises(ModelError, match="ships the chat templates rag, tools, none of which"):
        set_rendering(processor, PromptSettings(), "x")


def test_a_date_stands_still_and_is_part_of_every_cache_key():
    one, found = with_template(templates.DATED, date="2026-03-05")
    assert render_question(one, "why").startswith("Today is 05 Mar 2026.")
    other, _ = with_template(templates.DATED, date="2026-03-06")
    assert processor_digest(one) != processor_digest(other)
    assert processor_digest(one, dated=False) == processor_digest(other, dated=False)
    today, found = with_template(templates.DATED)
    assert found.settings.date is not None
    assert rendering.rendering_of(today).settings.date == found.settings.date
    _, undated = with_template(templates.PARTS)
    assert undated.settings.date is None


def test_settings_are_kept_beside_the_weights(tmp_path):
    processor, found = with_template(
        templates.DATED, system="Be brief.", date="2026-03-05", close_thinking=True
    )
    rendering.save_settings(processor, tmp_path)
    read = rendering.read_settings(tmp_path)
    assert read == dataclasses.replace(found.settings, close_thinking=False)
    assert rendering.read_settings(tmp_path / "elsewhere") is None
    (tmp_path / rendering.RENDERING).write_text(json.dumps({"date": "yesterday"}))
    with pytest.raises(ModelError, match="is damaged"):
        rendering.read_settings(tmp_path)


def test_a_place_for_every_image():
    processor, found = with_template(templates.PARTS)
    assert (found.image_place, found.places_per_image) == ("<image>", 1)
    only_first = templates.PARTS.replace("{{ 'IMAGE' }}", "{{ 'IMAGE' if loop.first }}")
    processor, _ = with_template(only_first)
    with pytest.raises(rendering.CannotRender, match="1 of 2 image placeholders") as caught:
        render_question(processor, "why", images=2)
    assert caught.value.reason == "placeholder_miscount"


def test_another_template_is_probed_anew():
    processor, _ = with_template(templates.PARTS)
    assert render_question(processor, "why").endswith("</s>\nassistant: ")
    processor.chat_template = templates.PLAIN
    assert render_question(processor, "why") == RENDERED["plain"][0]


def add_bos(processor):
    """Let the tokenizer add BOS, as LLaMA's and Mistral's do."""
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )


@pytest.fixture
def folder(tmp_path):
    """A LLaVA on disk whose tokenizer adds BOS, and whose chat template does not."""
    model, processor = random_models.make("llava")
    add_bos(processor)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def count_bos(processor, ids):
    return [list(row).count(processor.tokenizer.bos_token_id) for row in ids]


def test_a_prompt_is_what_the_model_itself_would_make_of_it(folder):
    own = transformers.AutoProcessor.from_pretrained(folder)
    processor = load_processor(str(folder))
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "why"}],
    }
    text = own.apply_chat_template([turn], add_generation_prompt=True)
    expected = own(text=[text], images=[[IMAGE]], return_tensors="pt")
    model, _ = random_models.make("llava")
    inputs = model_inputs(model, processor, [IMAGE], ["why"])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert count_bos(processor, expected["input_ids"]) == [1]


def test_training_begins_with_bos_once(folder):
    processor, rows = load_processor(str(folder)), list(pairs(2))
    batch = PairCollator(processor, share=False)(rows)
    assert count_bos(processor, batch["input_ids"]) == [1] * 4
    assert all("<s>" not in render_answer(processor, text_of(row["chosen"][0])) for row in rows)
    lengths = row_lengths(processor, pairs(2))
    stock = batch["attention_mask"].sum(1).tolist()
    assert [length.prompt + length.chosen for length in lengths] == stock[:2]


def test_the_template_is_saved_as_it_was_shipped(folder):
    shipped = transformers.AutoProcessor.from_pretrained(folder).chat_template
    processor = load_processor(str(folder))
    assert processor.chat_template == shipped
    processor.save_pretrained(folder)
    again = load_processor(str(folder))
    assert again.chat_template == shipped
    assert render_question(again, "why").startswith("<s>user: ")
    assert processor_digest(again) == processor_digest(processor)
    assert "vlmdpo" not in (folder / "processor_config.json").read_text()


@pytest.mark.parametrize("name", ["renders it", "adds none", "paligemma"])
def test_bos_is_not_added_where_it_comes_anyway(name):
    _, processor = random_models.make("paligemma" if name == "paligemma" else "llava")
    if name != "adds none":
        add_bos(processor)
    if name == "renders it":
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    add_missing_template(processor)
    assert rendering.rendering_of(processor).bos == ""


@pytest.mark.parametrize("family", matrix.FAMILIES, ids=lambda family: family.small)
def test_every_family_with_every_kind_of_template(family):
    """Whatever a processor makes of a prompt, it makes the same of it in training and in asking."""
    if family.missing:
        pytest.skip(f"needs {', '.join(family.missing)}")
    _, processor = random_models.FAMILIES[family.small]({}, {}, 32)
    own = processor.chat_template
    for kind in templates.KINDS:
        processor.chat_template = templates.of_family(kind, own)
        found = set_rendering(processor, PromptSettings(date="2026-03-05"), family.name)
        batch = PairCollator(processor)([dict(ROW)])
        asked = processor(
            text=[render_question(processor, "why")],
            images=[[IMAGE]],
            add_special_tokens=False,
            return_tensors="pt",
        )["input_ids"][0]
        assert batch["tree_ids"][0, : batch["forest"].lengths[0]].tolist() == asked.tolist(), kind
        for ids, in_loss, text in zip(
            batch["input_ids"], batch["completion_mask"], ("good one", "bad"), strict=True
        ):
            answer = ids[in_loss == 1].tolist()
            assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == text
            assert found.end_token_id in answer, kind
