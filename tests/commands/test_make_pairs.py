"""make-pairs: pairs of a model's own answers, from drawing to what prepare reads."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlmdpo import cli
from vlmdpo.data import growing_jsonl
from vlmdpo.data.folder_lock import locked
from vlmdpo.engine.sampling import Sample
from vlmdpo.feedback import work

FEW = ("make-pairs", "--limit", "6", "--samples", "6", "--temperature", "1", "--json")


def _report(vlmdpo, *options):
    code, out, err = vlmdpo(*FEW, *options)
    assert code == 0, err
    return json.loads(out)


def _pairs(report):
    return [json.loads(line) for line in growing_jsonl.complete_lines(Path(report["path"]))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder of one run on the embedded scenes, its report)."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        reports = []
        patch.setattr("vlmdpo.ui.json_result", reports.append)
        patch.setattr("matplotlib.figure.Figure.savefig", _blank)
        assert cli.run([*FEW, "--output-dir", str(folder)]) == 0
    return folder, reports[0]


def _blank(figure, file, **_):
    Image.new("RGB", (2, 2)).save(file, "PNG")


def test_the_embedded_model_makes_pairs_that_prepare_takes(made, vlmdpo):
    folder, report = made
    assert report["prompts"] == 6
    assert report["samples"] == 36
    pairs = _pairs(report)
    assert len(pairs) == report["pairs"] > 0
    assert report["judge"] == "statements"
    chosen, rejected = (report["mean_length"][side] for side in ("chosen", "rejected"))
    assert abs(chosen - rejected) <= 0.1 * max(chosen, rejected)
    assert 0 <= report["judge_agreement"] <= 1
    for pair in pairs:
        about = pair["provenance"]
        assert about["chosen"]["score"] > about["rejected"]["score"]
        assert pair["chosen"] != pair["rejected"]
        assert (folder / pair["image"]).is_file()
        assert about["model"] == "tiny"
        assert about["weights"]
    prepared = vlmdpo("prepare", "--dataset", report["path"], "--output-dir", "data", "--json")
    assert prepared[0] == 0, prepared[2]
    assert json.loads(prepared[1])["rows_out"] == report["pairs"]


def test_scores_are_the_judges_verdicts(made):
    folder, report = made
    (file,) = folder.glob("judged-statements-*.jsonl")
    judged = {entry["id"]: entry for entry in map(json.loads, file.read_text().splitlines())}
    for pair in _pairs(report):
        entry = judged[pair["id"].split("-")[0]]
        for side in ("chosen", "rejected"):
            found = entry["judgments"][entry["answers"].index(pair[side])]
            denied = sum(one["verdict"] == "no" for one in found["statements"])
            assert pair["provenance"][side]["score"] == -denied


def test_another_margin_or_judge_draws_nothing_again(made, tmp_path, vlmdpo, monkeypatch):
    shutil.copytree(made[0], tmp_path / "pairs")
    monkeypatch.setattr(work, "draw", None)
    same = _report(vlmdpo, "--output-dir", "pairs")
    assert {**same, "drawn_before": 0, "path": "", "output_dir": "", "settings": ""} == {
        **made[1],
        "path": "",
        "output_dir": "",
        "settings": "",
    }
    assert same["drawn_before"] == 6
    fewer = _report(vlmdpo, "--output-dir", "pairs", "--margin", "2")
    assert fewer["pairs"] < same["pairs"]
    true = _report(vlmdpo, "--output-dir", "pairs", "--judge", "truth")
    assert true["judge_agreement"] is None  # of the truth with itself
    assert not true["self_judged"]
    assert true["judge_model"] is None
    sure = _report(vlmdpo, "--output-dir", "pairs", "--judge-score", "calibrated")
    assert any(pair["provenance"]["chosen"]["score"] % 1 for pair in _pairs(sure))


def test_a_run_goes_on_where_it_was_stopped(made, tmp_path, vlmdpo):
    shutil.copytree(made[0], tmp_path / "pairs")
    samples = tmp_path / "pairs" / "samples.jsonl"
    lines = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(lines[:4]) + lines[4][:20])  # killed while it wrote
    (judged,) = (tmp_path / "pairs").glob("judged-*.jsonl")
    judged.write_text("".join(judged.read_text().splitlines(keepends=True)[:2]))
    report = _report(vlmdpo, "--output-dir", "pairs")
    assert report["drawn_before"] == 4
    assert samples.read_text() == "".join(lines)
    assert _pairs(report) == _pairs(made[1])


def test_other_settings_need_another_folder(made, tmp_path, vlmdpo):
    shutil.copytree(made[0], tmp_path / "pairs")
    code, _, err = vlmdpo(*FEW, "--output-dir", "pairs", "--seed", "7")
    assert (code, "seed: 42 there, 7 now" in err) == (3, True)
    assert "--overwrite" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    code, _, err = vlmdpo(*FEW, "--output-dir", "other", "--overwrite")
    assert (code, "holds something else" in err) == (3, True)
    assert (tmp_path / "other" / "file").exists()


def test_the_screen_and_the_page(made, tmp_path, vlmdpo):
    shutil.copytree(made[0], tmp_path / "pairs")
    code, out, err = vlmdpo(*FEW[:-1], "--output-dir", "pairs")
    assert code == 0, err
    assert re.search(r"^\d+ pairs from 36 answers to 6 prompts \(6 of them answered before\)", out)
    assert "the model judges itself" in out
    assert "Next: vlmdpo prepare --model tiny --dataset pairs/pairs.jsonl" in out
    page = (tmp_path / "pairs" / "report.html").read_text()
    assert "The model judges itself." in page
    assert page.count('class="asked"') == 6
    assert "http" not in page.replace("http-equiv", "")


def test_images_that_cannot_be_read_are_left_out(tmp_path, vlmdpo):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (72, 72), colour).save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"no image")
    code, out, err = vlmdpo(*FEW, "--input", photos, "--judge-model", "tiny", "--max-unread", "1")
    # What the embedded model says about plain squares cannot be judged: that alone is no failure.
    report = (
        json.loads(out)
        if code == 0
        else json.loads((tmp_path / "outputs" / "pairs" / "report.json").read_text())
    )
    assert (code, report["prompts"]) in ((0, 3), (3, 3)), err
    assert report["left_out"]["unreadable_image"]["count"] == 1


def test_an_image_that_has_gone_since_takes_its_pairs_along(tmp_path, vlmdpo, monkeypatch):
    monkeypatch.setattr("vlmdpo.engine.vllm.generator_for", _Vllm)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (72, 72), "red").save(photos / name)
    (tmp_path / "p.txt").write_text("Describe this image.\n")
    asked = ("--input", photos, "--prompts", "p.txt", "--engine", "vllm", "--output-dir", "pairs")
    assert _report(vlmdpo, *asked)["pairs"] == 2
    (photos / "b.png").write_bytes(b"gone")
    report = _report(vlmdpo, *asked)
    assert (report["pairs"], len(_pairs(report))) == (1, 1)
    assert report["left_out"]["changed_image"]["count"] == 1
    assert "image not found" in (tmp_path / "pairs" / "report.html").read_text()


def test_a_prompt_that_is_too_long_leaves_the_others_of_its_image(tmp_path, vlmdpo):
    Image.new("RGB", (72, 72), "red").save(tmp_path / "a.png")
    asked = ["Is there a red circle in this image?", "red " * 1500]
    lines = [json.dumps({"image": "a.png", "question": one}) for one in asked]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    _, _, err = vlmdpo(*FEW, "--input", "q.jsonl", "--output-dir", "pairs", "--max-unread", "1")
    report = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert report["prompts"] == 1, err
    assert report["left_out"]["over_length"]["count"] == 1
    assert "1 question left out: over_length: 1 (image 'a.png', 'red red" in err
    assert "the model reads 1,024" in " ".join(err.split())


def test_an_unknown_judge_model_is_refused_before_anything_is_drawn(tmp_path, vlmdpo):
    code, _, err = vlmdpo(*FEW, "--judge-model", "no/such", "--output-dir", "pairs")
    assert (code, "--judge-model: cannot find 'no/such'" in err) == (4, True)
    assert not (tmp_path / "pairs" / "samples.jsonl").exists()


def test_no_image_at_all(tmp_path, vlmdpo):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.png").write_bytes(b"no image")
    code, _, err = vlmdpo(*FEW, "--input", photos)
    assert (code, "no image can be asked about" in err, "unreadable_image" in err) == (
        3,
        True,
        True,
    )


def test_equal_answers_make_no_pairs(tmp_path, vlmdpo):
    code, _, err = vlmdpo(*FEW, "--temperature", "0.001", "--output-dir", "cold")
    assert code == 3
    assert "no pairs: of 6 prompts none has two answers" in err
    assert "prompts whose answers are all equal: 6" in err
    assert (tmp_path / "cold" / "report.html").is_file()


def test_a_judge_that_cannot_be_read_stops_the_run_and_keeps_the_answers(
    tmp_path, vlmdpo, monkeypatch
):
    monkeypatch.setattr(work, "_ENOUGH_VERDICTS", 1)
    monkeypatch.setattr("vlmdpo.feedback.judges.statements.verdict", lambda reply: None)
    code, _, err = vlmdpo(*FEW, "--output-dir", "pairs")
    assert code == 3
    assert "can be read neither as yes nor as no" in err
    # Not passed over by a run that finds everything judged.
    monkeypatch.setattr(work.Unread, "count", lambda *_: None)
    assert "no pairs" in vlmdpo(*FEW, "--output-dir", "pairs")[2]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "_ENOUGH_VERDICTS", 1)
    code, _, err = vlmdpo(*FEW, "--output-dir", "pairs")
    assert (code, "can be read neither as yes nor as no" in err) == (3, True)
    assert len(growing_jsonl.complete_lines(tmp_path / "pairs" / "samples.jsonl")) == 6
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--judge", "endpoint"], 2, "needs --judge-url"),
        (["--judge", "stars"], 2, "unknown value 'stars'"),
        (["--judge-url", "http://x/v1"], 2, "--judge-url is for --judge endpoint"),
        (["--judge", "truth", "--judge-model", "tiny"], 2, "asks no model"),
        (["--judge", "truth", "--input", "x"], 2, "needs --truth"),
        (["--judge", "truth", "--judge-score", "calibrated"], 2, "probabilities"),
        (["--samples", "1"], 2, "--samples: 1 is out of range"),
        (["--temperature", "0"], 2, "--temperature: 0.0 is out of range"),
        (["--margin", "0"], 2, "--margin"),
        (["--prompts", "p.txt"], 2, "--input FOLDER"),
        (["--input", "absent"], 3, "does not exist"),
        (["--model", "llava-1.5-7b"], 2, "--input is needed"),
        (["--truth", "absent", "--input", "x"], 3, "cannot read"),
        (["--truth", "absent"], 2, "--truth is for --input"),
        (["--adapter", "absent"], 4, "holds no adapter_config.json"),
    ],
)
def test_mistakes(options, code, says, vlmdpo):
    got, _, err = vlmdpo(*FEW, *options)
    assert (got, says in err) == (code, True), err


class _Vllm:
    """In place of the generator: says that a moon is there, and denies it."""

    def __init__(self, config, processor):
        self.processor, self.started = processor, False

    def start(self):
        self.started = True

    def sample(self, images, questions, max_new_tokens, sampling, *, tuned):
        assert self.started
        texts = ("The image shows one red moon.", "The image shows one red star.")
        drawn = [Sample(texts[number % 2], 7, True) for number in range(sampling.count)]
        return [drawn for _ in questions]

    def generate(self, images, questions, max_new_tokens, *, tuned):
        return ["No." if "moon" in question else "Yes." for question in questions]


def test_vllm_draws_and_judges(tmp_path, vlmdpo, monkeypatch):
    monkeypatch.setattr("vlmdpo.engine.vllm.generator_for", _Vllm)
    report = _report(vlmdpo, "--engine", "vllm", "--output-dir", "pairs")
    assert (report["pairs"], report["engine"]) == (6, "vllm")
    assert all(pair["rejected"].endswith("moon.") for pair in _pairs(report))
    assert all(pair["provenance"]["rejected"]["score"] == -3 for pair in _pairs(report))
    code, _, err = vlmdpo(*FEW, "--engine", "vllm", "--judge-model", "llava-1.5-7b")
    assert (code, "vllm serve" in err) == (2, True)


@pytest.mark.slow
def test_several_processes_write_what_one_writes(made, tmp_path, vlmdpo):
    code, _, err = vlmdpo(*FEW, "--output-dir", "pairs", "--num-processes", "2", "--device", "cpu")
    assert code == 0, err
    for name in ("samples.jsonl", "pairs.jsonl"):
        assert (tmp_path / "pairs" / name).read_text() == (made[0] / name).read_text()


def test_a_line_cut_inside_a_character_and_a_folder_in_use(made, tmp_path, vlmdpo):
    shutil.copytree(made[0], tmp_path / "pairs")
    samples = tmp_path / "pairs" / "samples.jsonl"
    content = samples.read_bytes()
    samples.write_bytes(content[: content.rfind(b"\n", 0, -1) + 1] + '{"é'.encode()[:-1])
    assert _report(vlmdpo, "--output-dir", "pairs")["drawn_before"] == 5
    assert samples.read_bytes() == content
    with locked(tmp_path / "pairs", "making pairs in"):
        code, _, err = vlmdpo(*FEW, "--output-dir", "pairs")
    assert (code, "another vlmdpo is making pairs in 'pairs'" in err) == (3, True)
