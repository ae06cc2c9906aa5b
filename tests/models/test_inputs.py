"""Inputs are told apart by shape and type."""

from types import SimpleNamespace

import torch

from tests.support.engines import pairs, trainer
from vlmdpo.models.inputs import (
    has_images,
    image_inputs,
    image_token_id,
    in_dtype,
    inputs_by_token,
    other_pixels,
)

IDS = torch.arange(8).view(2, 4)


def batch(**more):
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **more}


def test_inputs_by_token_have_the_shape_of_ids_and_whole_numbers():
    given = batch(
        some_types=torch.zeros(2, 4, dtype=torch.int32),
        seen=torch.zeros(2, 4, 1, 3, dtype=torch.bool),
        pixels=torch.zeros(2, 4, 3),
        grid=torch.ones(2, 3, dtype=torch.long),
        labels=IDS,
    )
    assert list(inputs_by_token(given, IDS)) == ["some_types", "seen"]
    assert list(image_inputs(given)) == ["pixels", "grid"]


def test_pixels_of_any_name_rank_and_container():
    for pixels in (torch.rand(5, 6), torch.rand(2, 5, 6), torch.rand(1, 2, 3, 4, 5)):
        changed = other_pixels(batch(images=pixels))["images"]
        assert changed.shape == pixels.shape
        assert not torch.equal(changed, pixels)
    parts = [torch.rand(3, 4, 4), torch.rand(3, 6, 2)]
    changed = other_pixels(batch(pixel_values_images=parts, grid=torch.ones(1, 3).long()))
    assert [part.shape for part in changed["pixel_values_images"]] == [part.shape for part in parts]
    assert all((new < 0).any() for new in changed["pixel_values_images"])
    assert changed["grid"].sum() == 3
    assert has_images(changed)
    assert not has_images(batch(inputs_embeds=torch.rand(2, 4, 8), row=[1, 2]))


def test_floating_inputs_take_the_model_s_type():
    given = batch(
        images=[torch.rand(2, 2)], ref_chosen_logps=torch.rand(2), pixels=torch.rand(3), row=[1]
    )
    cast = in_dtype(given, torch.bfloat16)
    assert cast["images"][0].dtype == cast["pixels"].dtype == torch.bfloat16
    assert cast["ref_chosen_logps"].dtype == torch.float32
    assert cast["input_ids"].dtype == torch.int64
    assert cast["row"] == [1]


def test_the_image_token_under_any_of_its_names():
    assert image_token_id(SimpleNamespace(image_token_id=3)) == 3
    assert image_token_id(SimpleNamespace(image_token_index=4)) == 4
    assert image_token_id(SimpleNamespace(image_token_id=None, image_token_index=0)) == 0
    assert image_token_id(SimpleNamespace()) is None


def test_training_gives_pixels_the_model_s_type(tmp_path):
    made = trainer("llava", "shared", pairs(1), tmp_path, bf16=True)
    batch = made._prepare_inputs(made.data_collator([dict(row) for row in made.train_dataset]))
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["tree_ids"].dtype == torch.int64
