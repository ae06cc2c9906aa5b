"""`vlmdpo rounds`: what is run in which order, what is kept, when it stops, and that it goes on."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

import vlmdpo as package
from tests.conftest import unfolded
from vlmdpo.commands import rounds
from vlmdpo.commands.rounds_stages import stage_config
from vlmdpo.config import STAGES, RoundsConfig, recipes
from vlmdpo.data import store
from vlmdpo.data.folder_lock import locked
from vlmdpo.errors import ConfigError, DataError, Interrupted
from vlmdpo.report import rounds_page
from vlmdpo.report.rounds_page import best_round, why_not_helpful

EXAMPLE = Path(package.__file__).parent.parent / "examples" / "recipes" / "on-policy-rounds.yaml"
OUT = Path("outputs/rounds")


def _figures(accuracy, hal, cover, chair=10.0, words=30.0):
    return {
        **{"accuracy": accuracy, "f1": accuracy, "hal": hal, "chair": chair},
        **{"cover": cover, "words": words},
    }


HELPS = [_figures(60, 40, 80), _figures(70, 30, 79), _figures(75, 25, 78), _figures(76, 20, 77.5)]
STOPS = [_figures(60, 40, 80), _figures(70, 30, 79), _figures(69, 31, 79), _figures(90, 5, 79)]


class Stages:
    """Stand-ins for the four commands, which write what their results are known by."""

    def __init__(self, figures, monkeypatch):
        self.figures, self.ran, self.fails = figures, [], {}
        for stage in STAGES:
            module = SimpleNamespace(run=lambda config, stage=stage: self.run(stage, config))
            monkeypatch.setitem(sys.modules, f"vlmdpo.commands.{stage}", module)

    def run(self, stage, config):
        number = int(config.output_dir.parent.name.removeprefix("round-"))
        self.ran.append((number, stage, config))
        if (number, stage) in self.fails:
            raise self.fails.pop((number, stage))
        config.output_dir.mkdir(parents=True, exist_ok=True)
        for name in {
            "make_pairs": ["pairs.jsonl"],
            "prepare": [store.MANIFEST],
            "train": ["adapter_config.json", "adapter_model.safetensors"],
            "eval_amber": ["scores.json"],
        }[stage]:
            (config.output_dir / name).write_text("{}")
        return getattr(self, f"_{stage}")(number)

    def _make_pairs(self, number):
        return {"pairs": 10 * number, "skipped": {"all equal": 2}, "judge": "statements"}

    def _prepare(self, number):
        return {"rows_out": 10 * number}

    def _train(self, number):
        return {"steps": 3, "loss": 0.6}

    def _eval_amber(self, number):
        role = "tuned" if number else "base"
        given = self.figures[number]
        scores = {
            "Discriminative": {name: given[name] for name in ("accuracy", "f1")},
            "Generative": {name: given[name] for name in ("hal", "chair", "cover")},
        }
        return {
            "scores": {role: scores},
            "models": {role: {"words_a_description": given["words"]}},
        }

    @property
    def order(self):
        return [(number, stage) for number, stage, _ in self.ran]


@pytest.fixture
def stages(monkeypatch):
    return Stages(HELPS, monkeypatch)


def test_each_round_goes_on_from_the_one_before(stages, vlmdpo):
    code, out, err = vlmdpo("rounds", "--rounds", "2", "--json")
    assert code == 0, err
    assert stages.order == [(0, "eval_amber"), *((n, s) for n in (1, 2) for s in STAGES)]
    configs = {(number, stage): config for number, stage, config in stages.ran}
    first, second = OUT / "round-1", OUT / "round-2"
    assert configs[0, "eval_amber"].adapter is None
    assert configs[1, "make_pairs"].adapter is configs[1, "train"].adapter is None
    assert configs[2, "make_pairs"].adapter == configs[2, "train"].adapter == first / "adapter"
    assert configs[2, "prepare"].dataset == str(second / "pairs" / "pairs.jsonl")
    assert configs[2, "train"].dataset == str(second / "data")
    assert configs[2, "eval_amber"].adapter == second / "adapter"
    assert not configs[2, "eval_amber"].base
    assert configs[2, "make_pairs"].seed == configs[1, "make_pairs"].seed + 1
    report = json.loads(out)
    assert [one["round"] for one in report["rounds"]] == [0, 1, 2]
    assert (report["best"], report["stopped"]) == (2, None)
    assert report["best_adapter"] == str(second / "adapter")
    assert report["rounds"][1]["stages"]["make_pairs"]["pairs"] == 10
    kept = json.loads((OUT / "rounds.json").read_text())
    assert kept["result"] == {"best": 2, "stopped": None}
    page = (OUT / "report.html").read_text()
    assert "skipped: all equal 2; judge: statements" in page
    assert "data:image/png;base64," in page


def test_a_killed_run_goes_on_in_the_middle_of_a_round(stages, vlmdpo):
    stages.fails[2, "train"] = Interrupted("stopped at step 3; continue with: vlmdpo train")
    code, _, err = vlmdpo("rounds", "--rounds", "2")
    assert code == 130
    assert "stopped in round 2 of 2: train; finished stages are kept, repeat the command" in err
    done = len(stages.ran)
    (OUT / "round-2" / "adapter").mkdir(parents=True)
    (OUT / "round-2" / "adapter" / "recipe.yaml").write_text("")
    code, _, err = vlmdpo("rounds", "--rounds", "2")
    assert code == 0, err
    assert stages.order[done:] == [(2, "train"), (2, "eval_amber")]
    assert stages.ran[done][2].resume, "training has begun"
    code, _, _ = vlmdpo("rounds", "--rounds", "3")
    assert stages.order[done + 2 :] == [(3, stage) for stage in STAGES], "more rounds go on"
    assert not stages.ran[-2][2].resume


def test_a_round_that_does_not_help_is_the_last(monkeypatch, vlmdpo):
    stages = Stages(STOPS, monkeypatch)
    code, out, err = vlmdpo("rounds", "--json")
    assert code == 0
    assert stages.order[-1] == (2, "eval_amber")
    report = json.loads(out)
    assert report["best"] == 1
    assert report["stopped"].startswith("no figure became better (Accuracy 70.0 → 69.0, Hal")
    assert "round 2 does not help" in err
    code, out, _ = vlmdpo("rounds", "--no-stop", "--json")
    assert stages.order[-1] == (3, "eval_amber")
    assert json.loads(out)["best"] == 3


def test_the_table_says_what_each_round_brought(stages, vlmdpo):
    code, out, _ = vlmdpo("rounds", "--rounds", "1")
    assert code == 0
    assert "1 (best)" in out
    assert "Best round: 1; its adapter: outputs/rounds/round-1/adapter" in unfolded(out)


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (_figures(61, 41, 80), None),
        (_figures(59, 39, 80), None),
        (_figures(60, 40, 80), "no figure became better"),
        (_figures(70, 10, 77), None),
        (_figures(70, 10, 76.9), "Cover is 76.9, more than 3 points below 80.0"),
        ({**_figures(61, 0, 0), "hal": None, "cover": None}, None),
    ],
)
def test_when_a_round_helps(now, says):
    scored = [_figures(60, 40, 80), now]
    found = why_not_helpful(scored, 1, 3.0)
    assert (found is None) == (says is None)
    assert says is None or says in found


def test_cover_is_compared_with_the_model_before_all_rounds():
    scored = [_figures(60, 40, 80), _figures(70, 30, 78), _figures(75, 20, 76)]
    assert why_not_helpful(scored, 1, 3.0) is None
    assert why_not_helpful(scored, 2, 3.0) is not None


def test_the_best_round():
    assert best_round(HELPS, None, 3.0) == 3
    assert best_round(HELPS[:1], None, 3.0) == 0
    worse = [HELPS[0], _figures(90, 50, 80)]
    assert best_round(worse, None, 3.0) == 0
    assert best_round(worse, "accuracy", 3.0) == 1
    silent = [HELPS[0], _figures(90, 1, 20)]
    assert best_round(silent, None, 3.0) == 0, "it says little"
    undescribed = [{**one, "hal": None, "cover": None} for one in worse]
    assert best_round(undescribed, None, 3.0) == 1
    with pytest.raises(ConfigError, match="--best-by hal: eval-amber asks nothing"):
        best_round(undescribed, "hal", 3.0)


# Bad input.


def test_a_figure_that_nothing_gives_is_said_before_the_first_round(monkeypatch, vlmdpo):
    undescribed = {**HELPS[0], **dict.fromkeys(("hal", "chair", "cover", "words"))}
    stages = Stages([undescribed], monkeypatch)
    code, _, err = vlmdpo("rounds", "--best-by", "chair")
    assert code == 2
    assert "--best-by chair: eval-amber asks nothing that gives it" in err
    assert stages.order == [(0, "eval_amber")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--train", "max_stepz=3"], "--train: unknown key 'max_stepz'. Did you mean 'max_steps'?"),
        (["--train", "max_steps"], "--train: cannot read 'max_steps'; give key=value"),
        (["--train", "max_steps=0"], "--train: --max-steps: 0 is out of range"),
        (["--train", "output_dir=x"], "--train: 'output_dir' is set by the rounds themselves"),
        (["--make-pairs", "model=x"], "give --model to vlmdpo rounds"),
        (["--make-pairs", "input=x"], "give --input to vlmdpo rounds"),
        (["--train", "recipe=artcile"], "Did you mean 'article'?"),
        (["--eval-amber", "limit=[1"], "--eval-amber: cannot read the value of 'limit=[1'"),
        (["--rounds", "0"], "--rounds: 0 is out of range"),
        (["--best-by", "cover"], "--best-by: unknown value 'cover'"),
        (["--mix-with", "scenes", "--output-dir", "a,b"], "--output-dir: 'a,b' has a comma"),
    ],
)
def test_settings_that_cannot_be_are_said_before_anything_runs(options, says, stages, vlmdpo):
    code, _, err = vlmdpo("rounds", *options)
    assert code == 2, err
    assert says in err
    assert not stages.ran
    assert not OUT.exists()


def test_rounds_of_another_recipe_are_not_continued(stages, vlmdpo):
    assert vlmdpo("rounds", "--rounds", "1")[0] == 0
    code, _, err = vlmdpo("rounds", "--rounds", "1", "--train", "beta=0.2")
    assert code == 3
    assert "holds rounds with other settings (train: [] → ['beta=0.2'])" in err
    ran = len(stages.ran)
    assert vlmdpo("rounds", "--rounds", "1", "--train", "beta=0.2", "--overwrite")[0] == 0
    assert len(stages.ran) == 2 * ran


def test_a_folder_that_holds_something_else(stages, vlmdpo):
    OUT.mkdir(parents=True)
    (OUT / "thesis.txt").write_text("mine")
    code, _, err = vlmdpo("rounds", "--overwrite")
    assert code == 3
    assert "holds something else" in err
    assert (OUT / "thesis.txt").read_text() == "mine"


def test_what_is_damaged_or_gone_is_named(stages, vlmdpo):
    assert vlmdpo("rounds", "--rounds", "1")[0] == 0
    weights = OUT / "round-1" / "adapter" / "adapter_model.safetensors"
    weights.unlink()
    code, _, err = vlmdpo("rounds", "--rounds", "1")
    assert (code, f"'{weights}' of a finished stage is gone" in err) == (3, True)
    (OUT / "rounds.json").write_text("{")
    code, _, err = vlmdpo("rounds", "--rounds", "1")
    assert (code, "rounds.json' is damaged" in err) == (3, True)


def test_one_at_a_time(stages):
    config = RoundsConfig(rounds=1)
    with (
        locked(config.output_dir, "running rounds in"),
        pytest.raises(DataError, match="another vlmdpo is running rounds in"),
    ):
        rounds.run(config)


def test_the_adapter_to_begin_with_is_looked_at_first(stages, vlmdpo):
    code, _, err = vlmdpo("rounds", "--adapter", "nothing")
    assert code == 4
    assert "holds no adapter_config.json" in err
    assert not stages.ran


# Settings of the stages.


def test_sections_of_a_recipe_and_flags_add_up():
    layers = {"train": {"max_steps": 5, "set": ["a=1"]}}, {"train": ("beta=0.3", "max_steps=7")}
    config = recipes.build(RoundsConfig, *layers, {"dtype": "float32", "mix_with": "scenes"})
    train = stage_config(config, "train", 1)
    assert (train.max_steps, train.beta, train.set, train.dtype) == (7, 0.3, ("a=1",), "float32")
    prepared = stage_config(config, "prepare", 1)
    assert prepared.dataset == f"{OUT}/round-1/pairs/pairs.jsonl,scenes"
    assert prepared.model == "tiny"


def test_the_embedded_models_recipe_holds_in_its_stages():
    train = stage_config(RoundsConfig(), "train", 1)
    assert train.gradient_checkpointing is False


def test_the_example_is_a_recipe_of_rounds():
    config = recipes.build(RoundsConfig, recipes.read_recipe(EXAMPLE))
    assert config.model == "llava-1.5-7b"
    train = stage_config(config, "train", 1)
    assert (train.loss_type, train.lora_r, train.num_train_epochs) == ("sigmoid,sft", 64, 1)
    assert stage_config(config, "make_pairs", 1).samples == 8
    assert stage_config(config, "eval_amber", 1).data == Path("AMBER/data")
    assert set(yaml.safe_load(EXAMPLE.read_text())) >= {"make-pairs", "prepare", "train"}


@pytest.mark.drawn
def test_the_picture_shows_the_figures(tmp_path):
    rounds_page.draw(HELPS, 2, tmp_path / "rounds.png")
    picture = Image.open(tmp_path / "rounds.png").convert("RGB")
    assert picture.width > 1000
    assert len(picture.getcolors(1 << 24)) > 50


@pytest.mark.slow
def test_two_rounds_of_the_embedded_model(vlmdpo):
    options = ["--rounds", "2", "--no-stop", "--mix-with", "scenes", "--prepare", "mix=1,0.01"]
    for setting in ("limit=6", "samples=6", "temperature=1"):
        options += ["--make-pairs", setting]
    for setting in ("max_steps=1", "lora_r=4", "sample_every=0"):
        options += ["--train", setting]
    options += ["--eval-amber", "limit=6", "--device", "cpu", "--json"]
    code, out, err = vlmdpo("rounds", *options)
    assert code == 0, err
    report = json.loads(out)
    assert [one["round"] for one in report["rounds"]] == [0, 1, 2]
    assert all(one["accuracy"] is not None and one["words"] for one in report["rounds"])
    second = json.loads((OUT / "round-2" / "adapter" / "train_report.json").read_text())
    assert [entry["adapter"] for entry in second["lineage"]] == [str(OUT / "round-1" / "adapter")]
    manifest = store.read_manifest(OUT / "round-2" / "data")
    assert all(source["rows_out"] for source in manifest["sources"])
    assert len(manifest["sources"]) == 2
    assert json.loads((OUT / "rounds.json").read_text())["settings"]["mix_with"] == "scenes"
    code, again, err = vlmdpo("rounds", *options)
    assert (code, json.loads(again)) == (0, report)
    assert "▸" not in err, "nothing is done twice"
