"""--dry-run: every recipe in examples/ resolves offline, with steps and a verdict on memory."""

import json
from pathlib import Path

import pytest
import yaml

import vlmdpo as package

RECIPES = [
    path
    for path in sorted(
        (Path(package.__file__).parent.parent / "examples" / "recipes").glob("*.yaml")
    )
    if path.stem != "on-policy-rounds"  # of `vlmdpo rounds`: see tests/commands/test_rounds.py
]
GPUS = {"qlora-24gib": "24GiB", "qwen2.5-vl-3b-full-fsdp": "8xa100-80gb"}


def _plan(vlmdpo, *arguments):
    code, out, err = vlmdpo("train", "--dry-run", "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


def test_there_are_recipes():
    assert {"idefics2-8b-rlaif-v", "llava-1.5-7b-rlaif-v", "paligemma-3b-rlaif-v", *GPUS} <= {
        path.stem for path in RECIPES
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_offline(recipe, vlmdpo, tmp_path):
    found = _plan(vlmdpo, "--config", recipe, "--gpu", GPUS.get(recipe.stem, "a100-80gb"))
    asked = yaml.safe_load(recipe.read_text())
    assert found["hub_id"].count("/") == 1
    assert found["rows"] == 83_132
    assert found["steps"] == 1_299
    assert found["effective_batch"] == 64
    assert found["learning_rate"] == asked["learning_rate"]
    assert found["memory"]["verdict"] == "fits"
    assert found["memory"]["peak_bytes"] > 1e9
    assert not list(tmp_path.iterdir())


def test_the_screen_shows_the_plan(vlmdpo):
    code, out, _ = vlmdpo(
        "train", "--config", RECIPES[0], "--dry-run", "--split", "train[:1%]", "--loss", "mpo"
    )
    assert code == 0
    assert "idefics2-8b (HuggingFaceM4/idefics2-8b), 8,402,768,112 parameters" in out
    assert "831 rows (published, before checks)" in out
    assert "sigmoid, bco_pair, sft, weights 0.8, 0.2, 1" in out
    assert "Steps     13, 64 pairs each" in out
    assert "--gpu h100 gives a verdict" in out


def test_the_plan_says_in_which_order_rows_train(vlmdpo):
    assert vlmdpo("prepare", "--limit", "60", "--output-dir", "data")[0] == 0
    plan = _plan(vlmdpo, "--dataset", "data", "--group-by-length")
    images, prompts = plan["distinct"]["images"], plan["distinct"]["prompts"]
    assert plan["order"] == (
        f"random, by length; rows of one image together ({images} images, {prompts} prompts)"
    )
    assert _plan(vlmdpo, "--dataset", "data", "--no-group-by-image")["order"] == "random"
    assert _plan(vlmdpo, "--dataset", "data", "--engine", "stock")["order"] == "random"
    assert _plan(vlmdpo)["order"].endswith("rows of one image together, if the data has such rows")
    assert vlmdpo("prepare", "--limit", "2", "--output-dir", "two")[0] == 0
    assert _plan(vlmdpo, "--dataset", "two")["order"] == (
        "random; no rows together (2 images, 2 prompts)"
    )


def test_local_data_is_counted(vlmdpo):
    assert vlmdpo("prepare", "--limit", "40", "--output-dir", "data")[0] == 0
    assert (_plan(vlmdpo, "--dataset", "data")["rows"], _plan(vlmdpo)["rows"]) == (40, 2000)
    Path("rows.jsonl").write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n' * 7)
    assert _plan(vlmdpo, "--dataset", "rows.jsonl", "--num-train-epochs", "3")["rows"] == 7
    unknown = _plan(vlmdpo, "--dataset", "somebody/pairs", "--model", "somebody/vlm")
    assert (unknown["rows"], unknown["steps"], unknown["memory"]) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "idefics2-8c"], 4, "Did you mean 'idefics2-8b'?"),
        (["--model", "./nowhere"], 4, "folder './nowhere' does not exist"),
        (["--set", "max_grad=1"], 2, "DPOConfig has no field 'max_grad'"),
        (["--config", "absent.yaml"], 2, "cannot read 'absent.yaml'"),
    ],
)
def test_refusals(arguments, code, says, vlmdpo):
    got, _, err = vlmdpo("train", "--dry-run", *arguments)
    assert got == code
    assert says in err.strip().splitlines()[-1]


def test_a_gpu_is_named_for_a_dry_run_only(vlmdpo):
    code, _, err = vlmdpo("train", "--gpu", "h100")
    assert code == 2
    assert "--gpu needs --dry-run" in err


def test_processes_count_as_gpus_and_keep_their_strategy(vlmdpo):
    settings = [
        "--model",
        "idefics2-8b",
        "--dataset",
        "rlaif-v",
        "--num-processes",
        "16",
        "--strategy",
        "fsdp2",
    ]
    code, out, err = vlmdpo("train", "--dry-run", *settings, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["gpus"], plan["effective_batch"]) == (16, 2 * 32 * 16)
    assert "--num-gpus 16" in plan["estimate"]
    assert "--strategy fsdp2" in plan["estimate"]
