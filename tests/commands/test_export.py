"""Export: a merged model gives the same answers, cards are complete, uploads need a request."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from vlmdpo.commands import prepare, train
from vlmdpo.config import PrepareConfig, TrainConfig
from vlmdpo.tiny import evaluation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run's folder, made once."""
    folder = tmp_path_factory.mktemp("trained")
    data = prepare.run(PrepareConfig(limit=64, output_dir=folder / "data"))
    settings = {
        "max_steps": 4,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
    }
    train.run(
        TrainConfig(
            dataset=data["path"],
            output_dir=folder / "run",
            gradient_checkpointing=False,
            **settings,
        )
    )
    return folder / "run"


@pytest.fixture
def adapter(trained):
    """A copy of the short run in the test's own folder."""
    return Path(shutil.copytree(trained, "run"))


def test_a_merged_model_answers_as_base_and_adapter(adapter, vlmdpo):
    code, out, err = vlmdpo("export", "--adapter", adapter, "--merge", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["model"], report["output_dir"]) == ("tiny", "run-merged")
    assert report["agreement"]["same_answers"] == report["agreement"]["of"] == 4
    assert report["agreement"]["logits_apart"] < 1e-4
    assert not list(Path("run-merged").glob("adapter*")), "it stands alone"
    assert not list(Path("run-merged").glob("*.bin"))
    Path("q.jsonl").write_text(
        "".join(
            json.dumps({"id": i, "image": "x.png", "question": q}) + "\n"
            for i, q in enumerate(["Describe this image.", "Is it?"])
        )
    )
    from vlmdpo.tiny import evaluation

    evaluation.draw_image(evaluation.first_image_name()).save("x.png")
    answers = {}
    for name, who in (("both", ["--adapter", "run"]), ("merged", ["--model", "./run-merged"])):
        assert vlmdpo("infer", "--input", "q.jsonl", "--output", f"{name}.jsonl", *who)[0] == 0
        answers[name] = [
            json.loads(line)["answer"] for line in Path(f"{name}.jsonl").read_text().splitlines()
        ]
    assert answers["both"] == answers["merged"]
    code, _, err = vlmdpo("export", "--adapter", adapter, "--merge")
    assert code == 3
    assert "'run-merged' holds a model; add --overwrite" in err
    assert (
        vlmdpo("export", "--adapter", adapter, "--merge", "--overwrite", "--dtype", "bfloat16")[0]
        == 0
    )


def test_a_wrong_merge_is_noticed_and_leaves_nothing(adapter, vlmdpo, monkeypatch):
    from peft import LoraModel

    merge = LoraModel.merge_and_unload

    def wrong(self, **how):
        made = merge(self, **how)
        next(made.model.text_model.layers[0].parameters()).data.mul_(3)
        return made

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    code, _, err = vlmdpo("export", "--adapter", adapter, "--merge")
    assert code == 4
    assert "the merged model differs from base and adapter by" in err
    assert not Path("run-merged").exists()
    assert not list(Path().glob(".run-merged*"))


@pytest.fixture
def few_questions(tmp_path, monkeypatch):
    """The embedded questions about four of its images, as if there were no more."""
    folder = tmp_path / "embedded"
    shutil.copytree(evaluation.FOLDER, folder)
    images = {f"SCENE_{number}.png" for number in range(1, 5)}
    for path in (folder / "query").iterdir():
        kept = [query for query in json.loads(path.read_text()) if query["image"] in images]
        path.write_text(json.dumps(kept))
    monkeypatch.setattr(evaluation, "FOLDER", folder)


def test_the_card_has_data_settings_versions_and_amber(adapter, few_questions, vlmdpo):
    card = (adapter / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "peft"
    assert "Not evaluated on AMBER yet" in card
    assert "![Learning curves](learning_curves.png)" in card
    assert "| learning_rate | 0.003 |" in card
    assert "transformers 5." in card
    assert (
        vlmdpo("eval-amber", "--adapter", adapter, "--limit", "4", "--output-dir", "part")[0] == 0
    )
    assert "Not evaluated on AMBER yet" in (adapter / "README.md").read_text(), (
        "a part of the questions is no score"
    )
    code, _, err = vlmdpo(
        "eval-amber", "--adapter", adapter, "--task", "discriminative", "--output-dir", "amber"
    )
    assert code == 0, err
    card = (adapter / "README.md").read_text()
    scores = json.loads(Path("amber/scores.json").read_text())["scores"]
    row = " | ".join(
        f"{scores[who]['Discriminative'][figure]}"
        for who in ("base", "tuned")
        for figure in ("accuracy", "f1")
    )
    assert f"| Discriminative | {row} |" in card
    assert "Questions in AMBER's form (scenes), not AMBER's own" in card
    assert "points of accuracy, 95% interval" in card
    own = {
        **{"title": "own", "rule": "ours", "scores": {"base": {"all": {"accuracy": 0.5}}}},
        **{"intervals": {}, "comparison": None, "coverage": 1.0, "notes": []},
        "figures": {"accuracy": {"unit": "share", "more_is_better": True}},
    }
    (adapter / "evaluations.json").write_text(json.dumps({"own": own}))
    assert vlmdpo("export", "--adapter", adapter, "--merge")[0] == 0
    merged = Path("run-merged/README.md").read_text()
    assert "| all | accuracy ↑ | 50.0 (-) |" in merged
    assert "A standalone model" in merged
    assert f"| Discriminative | {row} |" in merged


def test_nothing_is_uploaded_unless_asked_and_then_no_checkpoint(adapter, vlmdpo, monkeypatch):
    import huggingface_hub

    sent = {}

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            sent["repo"] = (repo, private)

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns):
            from huggingface_hub.utils import filter_repo_objects

            names = [
                str(path.relative_to(folder_path))
                for path in Path(folder_path).rglob("*")
                if path.is_file()
            ]
            sent["files"] = set(
                filter_repo_objects(
                    names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
                )
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (adapter / "checkpoint-4").mkdir(exist_ok=True)
    (adapter / "checkpoint-4" / "model.safetensors").write_bytes(b"x")
    (adapter / "evaluations.json").write_text("{}")
    code, out, err = vlmdpo("export", "--adapter", adapter, "--push-to-hub", "me/tuned")
    assert code == 0, err
    assert "https://huggingface.co/me/tuned" in out
    assert sent["repo"] == ("me/tuned", True)
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
    } <= sent["files"]
    kept_here = (".bin", ".jsonl", "_report.json", "evaluations.json", ".yaml")
    assert not any("checkpoint" in name or name.endswith(kept_here) for name in sent["files"])
    assert str(Path.cwd()) not in (adapter / "README.md").read_text()


def test_hostile_names_stay_text_on_the_card(adapter):
    from vlmdpo.report import model_card

    report = json.loads((adapter / "train_report.json").read_text())
    (adapter / "train_report.json").write_text(
        json.dumps({**report, "dataset": "<script>alert(1)</script>|`x`"})
    )
    recipe = yaml.safe_load((adapter / "recipe.yaml").read_text())
    (adapter / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dataset": "<script>|"}))
    card = model_card.text(adapter, merged=False)
    assert "<script>" not in card


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--merge"], 2, "--adapter FOLDER is needed"),
        (["--adapter", "nowhere"], 2, "nothing to do: give --merge"),
        (["--adapter", "nowhere", "--merge"], 4, "'nowhere' holds no adapter_config.json"),
        (
            ["--adapter", "nowhere", "--push-to-hub", "a/b", "--output-dir", "x"],
            2,
            "--output-dir is for --merge",
        ),
    ],
)
def test_refusals(arguments, code, says, vlmdpo):
    got, _, err = vlmdpo("export", *arguments)
    assert got == code
    assert says in err.strip().splitlines()[-1]


def test_an_adapter_of_another_base_is_refused(adapter, vlmdpo):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {f"{name}.other": tensor for name, tensor in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    code, _, err = vlmdpo("export", "--adapter", adapter, "--merge")
    assert code == 4
    assert "was trained on another model" in err
