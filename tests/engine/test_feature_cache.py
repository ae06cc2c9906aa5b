"""Frozen vision towers run once per batch, without gradient, or are read from disk."""

import json

import pytest
import torch

from tests.support.engines import assert_same, pairs, step, trainer
from vlmdpo.data import store
from vlmdpo.engine.content_keys import image_key
from vlmdpo.engine.feature_cache import FeatureCache
from vlmdpo.errors import ModelError
from vlmdpo.tiny import random_models

pytestmark = pytest.mark.slow

REFUSED = ("ovis2",)  # its features hold embeddings besides, which do not belong to a row
IN_ROWS = ("idefics3", "llava_next", "qwen3_vl")  # features are repeated in several ways
LANGUAGE = r".*(language_model|text_model).*(q_proj|v_proj|out_proj|down_proj)"


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        (f, e)
        for f in sorted(set(random_models.available()) - set(REFUSED))
        for e in ("shared", "rows")
        if e == ("rows" if f in (*random_models.RECURRENT, *IN_ROWS) else "shared")
    ],
)
def test_features_from_disk_give_the_same_step(family, engine, tmp_path):
    images = (1,) if family.startswith("paligemma") else (2, 0, 1)
    rows = pairs(3, images=images)
    cache = FeatureCache(tmp_path, "k")
    made = trainer(family, engine, rows, tmp_path, lora=LANGUAGE)
    expected = step(made)
    made.feature_cache = cache
    made.use_engine(engine)
    first = step(made)
    assert cache.num_known == sum(images[i % len(images)] > 0 for i in range(3))
    made.use_engine(engine)
    made.shared_forwards[0]._get_image_features = None  # the tower cannot be asked any more
    again = step(made, rows=[2, 0, 1])
    turned = step(trainer(family, engine, rows, tmp_path, lora=LANGUAGE), rows=[2, 0, 1])
    for found, wanted in ((first, expected), (again, turned)):
        found[1].pop("num_tokens"), wanted[1].pop("num_tokens")
        assert_same(wanted, found)


@pytest.mark.parametrize("engine", ["shared", "rows"])
def test_rows_with_the_same_image_keep_its_features_once(engine, tmp_path):
    rows = pairs(3)
    one_image = rows.map(lambda row: {"images": rows[0]["images"]}, features=rows.features)
    made = trainer("llava", engine, one_image, tmp_path, lora=LANGUAGE)
    expected = step(made)[0]
    made.feature_cache = FeatureCache(tmp_path, "k")
    for _ in range(2):  # kept, and read
        made.use_engine(engine)
        assert step(made)[0] == pytest.approx(expected, rel=1e-6)
        assert made.feature_cache.num_known == 1


def test_features_that_would_lose_a_part_are_refused(tmp_path):
    made = trainer("ovis2", "rows", pairs(1), tmp_path, lora=LANGUAGE)
    made.feature_cache = FeatureCache(tmp_path, "k")
    made.use_engine("rows")
    with pytest.raises(ModelError, match=r"--feature-cache: .* visual_indicator_features"):
        step(made)


def test_a_damaged_file_is_reported_and_rebuilt(tmp_path, capfd):
    rows = pairs(2)
    cache = FeatureCache(tmp_path, "k")
    made = trainer("llava", "shared", rows, tmp_path, lora=LANGUAGE)
    made.feature_cache = cache
    made.use_engine("shared")
    loss = step(made)[0]
    file = next(cache.path.rglob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    assert step(made)[0] == loss
    assert "is not used and will be made anew" in " ".join(capfd.readouterr().err.split())
    assert file.read_bytes() == whole


@pytest.mark.parametrize("family", ["idefics2", "llava", "gemma3"])
def test_with_a_trained_connector_the_frozen_tower_still_runs_once(family, tmp_path):
    rows = pairs(2)
    parts = "connector|projector|language_model|text_model"
    layers = "gate_proj|down_proj|linear_1|q_proj"
    names = rf".*({parts}).*({layers}|v_proj)"
    more = {"lora": names, "gradient_checkpointing": True}
    expected = step(trainer(family, "stock", rows, tmp_path, **more))
    made = trainer(family, "shared", rows, tmp_path, **more)
    made.model.gradient_checkpointing_enable({"use_reentrant": False})
    tower = made.model.get_base_model().model.get_encoder("image")
    runs = []
    patches = next(module for module in tower.modules() if isinstance(module, torch.nn.Conv2d))
    patches.register_forward_hook(lambda module, inputs, output: runs.append(module))
    assert_same(expected, step(made))
    assert len(runs) == 1


def test_no_gradient_reaches_the_pixels(tmp_path):
    rows = pairs(2)
    names = r".*(merger.mlp.0|language_model.*q_proj)"
    asked = {}
    for engine in ("stock", "shared"):
        made = trainer(
            "qwen2_5_vl",
            engine,
            rows,
            tmp_path,
            gradient_checkpointing=True,
            lora=names,
            max_steps=2,
        )
        blocks = made.model.get_base_model().model.visual.blocks
        seen = asked[engine] = []
        blocks[-1].register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output.requires_grad)
        )
        made.train()
    assert any(asked["stock"]), "the hooks that stock has are what this is about"
    assert asked["shared"]
    assert not any(asked["shared"])


def test_the_command_states_the_size_and_reuses_the_features(tmp_path, vlmdpo):
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    prepare.run(PrepareConfig(limit=16, output_dir=tmp_path / "few"))
    settings = [
        "--dataset",
        "few",
        "--lora-scope",
        "language",
        "--feature-cache",
        "--num-train-epochs",
        "1",
        "--json",
    ]
    losses = []
    keys = {image_key(row["images"]) for row in store.load(tmp_path / "few")}
    wanted = f"found; up to {len(keys)} are wanted, which take about"
    for run, said in (("a", f"image features: 0 {wanted}"), ("b", f"{len(keys)} {wanted}")):
        code, out, err = vlmdpo("train", *settings, "--output-dir", run)
        assert code == 0, err
        assert said in " ".join(err.split())
        losses.append(json.loads(out)["loss"])
        files = (tmp_path / "few" / "image-features").rglob("*.safetensors")
        assert {file.stem for file in files} == keys, "rows with the same picture share a file"
    assert losses[0] == losses[1]
    code, _, err = vlmdpo("train", "--dataset", "few", "--feature-cache", "--output-dir", "c")
    assert code == 2
    assert "--lora-scope language" in err


def test_folders_of_earlier_versions_are_named(tmp_path, capfd):
    (tmp_path / "image-features" / "0123456789abcdef" / "00003").mkdir(parents=True)
    assert FeatureCache(tmp_path, "k").num_known == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "of an earlier version are not used, because they are by row; delete them from" in said
    assert said.endswith("0123456789abcdef")


def test_a_full_disk_is_reported_before_training(tmp_path, vlmdpo, monkeypatch):
    import shutil

    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    prepare.run(PrepareConfig(limit=8, output_dir=tmp_path / "few"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = vlmdpo(
        "train",
        "--dataset",
        "few",
        "--lora-scope",
        "language",
        "--feature-cache",
        "--output-dir",
        "c",
    )
    assert code == 3
    assert "free at 'few'" in " ".join(err.split())
