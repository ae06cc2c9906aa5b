"""Prompts of models whose tokenizer adds BOS begin with one, wherever they are rendered."""

import pytest
import transformers
from PIL import Image
from tokenizers import processors
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.support.engines import pairs
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.generate import model_inputs, render_prompt
from vlmdpo.engine.lengths import row_lengths
from vlmdpo.models.chat_template import save_processor
from vlmdpo.models.digest import processor_digest
from vlmdpo.models.load import load_processor
from vlmdpo.tiny import random_models

IMAGE = Image.new("RGB", (40, 40), "red")


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
    expected = own(text=[render_prompt(own, "why")], images=[[IMAGE]], return_tensors="pt")
    model, _ = random_models.make("llava")
    inputs = model_inputs(model, processor, [IMAGE], ["why"])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert count_bos(processor, expected["input_ids"]) == [1]


def test_training_and_its_stock_rows_begin_with_bos_once(folder):
    processor, rows = load_processor(str(folder)), list(pairs(2))
    stock = DataCollatorForVisionPreference(processor)([dict(row) for row in rows])
    assert count_bos(processor, stock["input_ids"]) == [1] * 4
    collator = PairCollator(processor)
    prompts = collator.process_prompts(
        [collator.render(row)["prompt"] for row in rows], [row["images"] for row in rows]
    )
    assert count_bos(processor, prompts["input_ids"]) == [1, 1]
    assert all("<s>" not in collator.render(row)["chosen"] for row in rows)
    lengths = row_lengths(processor, pairs(2))
    mask = stock["attention_mask"].sum(1).tolist()
    assert [length.prompt + length.chosen for length in lengths] == mask[:2]


def test_it_is_added_once_however_often_the_processor_is_loaded_and_saved(folder, tmp_path):
    shipped = transformers.AutoProcessor.from_pretrained(folder).chat_template
    processor = load_processor(str(folder))
    assert processor.chat_template.endswith(shipped)
    assert processor.chat_template != shipped
    processor.save_pretrained(folder)  # as the trainer does beside its checkpoints
    again = load_processor(str(folder))
    assert again.chat_template == processor.chat_template
    save_processor(again, tmp_path / "out")
    saved = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert saved.chat_template == shipped  # so that asking it the usual way adds one, not two
    assert again.chat_template == processor.chat_template
    assert processor_digest(again) == processor_digest(processor) != processor_digest(saved)


@pytest.mark.parametrize("name", ["renders it", "adds none", "paligemma"])
def test_other_templates_stay_as_they_are(name, tmp_path):
    _, processor = random_models.make("paligemma" if name == "paligemma" else "llava")
    if name != "adds none":
        add_bos(processor)
    if name == "renders it":
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    shipped = processor.chat_template
    model_folder = tmp_path / "model"
    random_models.make("paligemma" if name == "paligemma" else "llava")[0].save_pretrained(
        model_folder
    )
    processor.save_pretrained(model_folder)
    loaded = load_processor(str(model_folder))
    assert shipped is None or loaded.chat_template == shipped
    assert "bos_token" not in loaded.chat_template or name == "renders it"
