"""The lesson with many questions behind one image teaches the same as one question alone."""

import random

import pytest
import torch

from vlmdpo.models.rendering import render_question
from vlmdpo.tiny import architecture, lessons
from vlmdpo.tiny import scenes as sc

pytestmark = pytest.mark.slow


def test_packed_questions_give_the_logits_they_would_have_alone():
    torch.manual_seed(0)
    processor = architecture.make_processor()
    model = architecture.make_model(processor).eval()
    model.set_attn_implementation("eager")
    lesson = lessons.Lesson(steps=1, learning_rate=1e-3, images_per_step=2, questions_per_image=3)
    batches = lessons.BatchMaker(processor, lesson, random.Random(3))
    batch = batches.batch()
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    prefix = len(batches.prefix)
    checked = 0
    for row in range(2):
        ids, positions = batch["input_ids"][row], batch["position_ids"][row]
        starts = [i for i in range(prefix, len(ids)) if positions[i] == prefix]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            one = ids[start:end]
            one = one[one != processor.tokenizer.pad_token_id]
            alone = torch.cat([ids[:prefix], one])[None]
            with torch.no_grad():
                expected = model(
                    input_ids=alone, pixel_values=batch["pixel_values"][row : row + 1]
                ).logits
            torch.testing.assert_close(
                packed[row, start : start + len(one)], expected[0, prefix:], atol=2e-5, rtol=1e-4
            )
            checked += 1
    assert checked == 8  # two images, three questions and one description each


def test_lessons_use_the_tokens_of_the_chat_template():
    processor = architecture.make_processor()
    batches = lessons.BatchMaker(processor, lessons.ANSWERING, random.Random(0))
    question, answer = "Is there a star in this image?", "No"
    asked, answered = batches._turn(question, answer)
    picture = sc.draw(sc.sample_scene(random.Random(0), "train"))
    prompt = processor(
        text=render_question(processor, question), images=[picture], add_special_tokens=False
    )["input_ids"][0]
    assert batches.prefix + asked == prompt
    whole = processor.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        tokenize=False,
    )
    assert whole.endswith(processor.tokenizer.decode(asked[-5:] + answered))
