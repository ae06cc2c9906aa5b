"""Batches of pairs: inputs by token, pictures that a processor cannot batch, and stock's rows."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.support.engines import pairs, trainer
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.content_keys import content_keys
from vlmdpo.engine.processing import BatchingProcessor, merge_prompts
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.engine.tree_layout import TreeLayout
from vlmdpo.errors import ModelError
from vlmdpo.models.inputs import take_host_only
from vlmdpo.tiny import random_models
from vlmdpo.training import doctor, engine_checks


class Adding:
    """A processor that adds inputs to what another one makes of a text."""

    def __init__(self, processor, add):
        self.processor, self.add = processor, add

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **given):
        inputs = self.processor(**given)
        return BatchFeature({**inputs, **self.add(inputs["input_ids"])})


def collate(add, *, share=True, rows=2):
    processor = Adding(random_models.make("llava")[1], add)
    examples = [dict(row) for row in pairs(rows)]
    return PairCollator(processor, share=share)(examples), processor


@pytest.mark.parametrize("share", [True, False])
def test_inputs_by_token_are_extended_with_what_text_has(share):
    batch, _ = collate(lambda ids: {"kinds": torch.where(ids == 1, 2, 5)}, share=share)
    kinds = batch["kinds"]
    assert kinds.shape == (batch["tree_ids"] if share else batch["input_ids"]).shape
    if share:
        assert kinds.unique().tolist() == [5]
    else:
        answers = batch["completion_mask"].bool()
        assert (kinds[answers] == 5).all()
        assert (kinds[batch["attention_mask"] == 0] == 0).all()


def test_a_shape_that_is_like_the_ids_by_chance_is_not_by_token():
    sizes = [0]

    def patches(ids):
        sizes[0] = sizes[0] or ids.shape[1]  # as many as tokens, the first time
        return {"patch_positions": torch.ones(len(ids), sizes[0], 2, dtype=torch.long)}

    batch, _ = collate(patches)
    assert batch["patch_positions"].shape == (2, sizes[0], 2)


def test_several_values_for_each_token_are_extended_too():
    batch, _ = collate(lambda ids: {"seen": (ids[..., None, None] > 1).repeat(1, 1, 1, 4)})
    assert batch["seen"].shape == (*batch["tree_ids"].shape, 1, 4)
    layout = TreeLayout(batch["forest"], torch.device("cpu"))
    rows_BS = layout.slots_to_rows(batch["seen"])
    assert rows_BS.shape == (*layout.row_mask.shape, 1, 4)
    assert torch.equal(rows_BS[:, -1, 0, 0], layout.row_mask[:, -1])


def test_what_numbers_tokens_is_refused_in_one_line():
    with pytest.raises(ModelError, match="'seen' numbers the prompt's tokens") as caught:
        collate(lambda ids: {"seen": torch.arange(ids.shape[1]).expand_as(ids)})
    assert "\n" not in str(caught.value)


def test_token_types_reach_a_model_that_makes_masks_of_them(tmp_path):
    # Gemma 4's large models see a picture's tokens in both directions.
    made = trainer("gemma4_moe", "shared", pairs(1), tmp_path)
    given = []
    backbone = made.shared_forwards[0]
    plain = backbone._backbone_forward
    backbone._backbone_forward = lambda **inputs: given.append(inputs) or plain(**inputs)
    batch = made.data_collator([dict(row) for row in made.train_dataset])
    doctor.token_logps(made, batch)
    types_BS = given[0]["mm_token_type_ids"]
    prompt, *answers = batch["forest"].lengths
    assert types_BS.shape == (1, prompt + max(answers))
    assert types_BS[:, :prompt].any()
    assert not types_BS[:, prompt:].any()


class Stacking:
    """A processor that stacks tiles, (images, tiles, 2), which fails for unlike numbers of them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *, text, images=None, padding_side="left", **options):
        given = self.tokenizer(
            text,
            return_tensors="pt",
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
        )
        if images is not None:
            tiles = [np.full((i.width // 10, 2), i.width) for its in images for i in its]
            given["pixels"] = torch.tensor(np.stack(tiles)).float()
            given["flat"] = torch.arange(sum(map(len, tiles)))
        return given


def test_pictures_of_unlike_tile_counts_are_taken_one_by_one():
    tokenizer = random_models.make("llava")[1].tokenizer
    processor = BatchingProcessor(Stacking(tokenizer))
    images = [[Image.new("RGB", (width, 10))] for width in (20, 40)]
    batch = processor(text=["a", "a longer one"], images=images, padding_side="left")
    assert batch["pixels"].shape == (2, 4, 2)
    assert batch["pixels"][0, :, 0].tolist() == [20, 20, 0, 0]
    assert batch["flat"].tolist() == [0, 1, 0, 1, 2, 3]
    together = Stacking(tokenizer)(text=["a", "a longer one"])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], together[name])
    with pytest.raises(ValueError, match="all input arrays must have the same shape"):
        processor(text=["a"], images=[[image for its in images for image in its]])


def test_pictures_that_fit_no_batch_are_refused_in_one_line():
    tokenizer = random_models.make("llava")[1].tokenizer
    ids = torch.ones(1, 3, dtype=torch.long)
    alone = [{"input_ids": ids, "pixels": torch.rand(1, 3, side, 4)} for side in (4, 6)]
    with pytest.raises(ModelError, match="'pixels' has the shapes"):
        merge_prompts(alone, tokenizer, "left")
    lists = [{"input_ids": ids, "pixels": [torch.rand(3, side, 4)]} for side in (4, 6)]
    assert [part.shape[1] for part in merge_prompts(lists, tokenizer, "left")["pixels"]] == [4, 6]


def test_a_collator_can_be_sent_to_another_process():
    collator = PairCollator(random_models.make("llava")[1])
    example = dict(pairs(1)[0])
    there = pickle.loads(pickle.dumps(collator))  # noqa: S301
    assert torch.equal(there([example])["tree_ids"], collator([example])["tree_ids"])


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_stock_batches_are_trl_s_own_where_it_renders_alike(family):
    # A regression guard: what engines are compared with stays TRL's untouched collator.
    processor = random_models.make(family)[1]
    rows = pairs(2)
    untouched = [{name: row[name] for name in row if name != "row"} for row in rows]
    expected = dict(DataCollatorForVisionPreference(processor)(untouched))
    found = StockCollator(processor)([dict(row) for row in rows])
    assert take_host_only(found) == ([0, 1], *content_keys(list(rows)).values())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_stock_rows_have_the_texts_that_we_render(monkeypatch):
    def render(self, example):
        return {"prompt": "<image>q:", "chosen": "yes!", "rejected": "no"}

    monkeypatch.setattr(PairCollator, "render", render)
    processor = random_models.make("llava")[1]
    rows = StockCollator(processor)([dict(pairs(1)[0])])
    answers = [rows["input_ids"][i][rows["completion_mask"][i].bool()] for i in (0, 1)]
    assert [processor.tokenizer.decode(answer) for answer in answers] == ["yes!", "no"]


def test_the_self_check_s_rows_are_of_our_ids_where_trl_tokenizes_otherwise():
    processor = random_models.make("llava")[1]
    example = dict(pairs(1)[0])
    plain = engine_checks.stock_batch(processor, example)
    # Without images it puts a token of its own before each text, as no tokenizer would.
    tokens = {"input_ids": 7, "attention_mask": 1}

    class Prefixing(Adding):
        def __call__(self, **given):
            inputs = self.processor(**given)
            if given.get("images") is None:
                for name, value in tokens.items():
                    first = torch.full((len(inputs[name]), 1), value)
                    inputs[name] = torch.cat([first, inputs[name]], dim=1)
            return inputs

    own = engine_checks.stock_batch(Prefixing(processor, None), example)
    for name in ("input_ids", "attention_mask", "completion_mask", "pixel_values"):
        assert torch.equal(own[name], plain[name]), name
