"""Rows for estimates: as long as asked, sharing image and prompt and nothing else."""

import pytest

from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.content_keys import content_keys
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.models.load import load_processor
from vlmdpo.tiny import random_models
from vlmdpo.training.synthetic_rows import Workload, synthetic_rows


@pytest.mark.parametrize("images", [1, 0])
def test_groups_share_image_and_prompt_and_no_answer(images):
    processor = random_models.make("llava")[1]
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    work = Workload((32, 32), images, 6, 5, 4, pairs_per_prompt=3)
    rows = list(synthetic_rows(processor, work, 7))
    prompts = [str(row["prompt"]) for row in rows]
    assert prompts == [prompts[at] for at in (0, 0, 0, 3, 3, 3, 6)]
    keys = content_keys(rows)
    assert len(set(keys["answer_keys"])) == 14
    assert len(set(keys["image_keys"])) == (3 if images else 1)
    lengths = {tuple(map(len, PairCollator(processor).render(row).values())) for row in rows}
    assert len(lengths) == 1


@pytest.mark.slow  # a real tokenizer
def test_texts_have_as_many_tokens_as_asked():
    processor = load_processor("tiny")
    rows = list(synthetic_rows(processor, Workload((32, 32), 1, 9, 20, 20, 8), 16))
    batch = PairCollator(processor, share=False)(rows)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 1
    assert len(set(content_keys(rows)["answer_keys"])) == 32
