"""eval-amber as a user runs it: both tasks, kept answers, resuming, bad images, the page."""

import json
import os
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlmdpo.benchmarks import ask
from vlmdpo.engine import generate
from vlmdpo.engine.decode import OpenedImage
from vlmdpo.tiny import evaluation

pytestmark = pytest.mark.slow

PICTURES = 4


@pytest.fixture
def small(tmp_path):
    """An AMBER folder with the first images of the embedded set, as files."""
    folder = tmp_path / "small"
    shutil.copytree(evaluation.FOLDER, folder)
    names = [f"SCENE_{number}.png" for number in range(1, PICTURES + 1)]
    (folder / "image").mkdir()
    for name in names:
        evaluation.draw_image(name).save(folder / "image" / name)
    for file in ("query_discriminative.json", "query_generative.json"):
        path = folder / "query" / file
        path.write_text(
            json.dumps([q for q in json.loads(path.read_text()) if q["image"] in names])
        )
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """An adapter for the embedded model that changes some of its answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from vlmdpo.models.load import load_model

    torch.manual_seed(0)
    model = get_peft_model(
        load_model("tiny", device="cpu"),
        LoraConfig(r=4, target_modules=r".*text_model.*(q|v)_proj"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.06)
    folder = tmp_path_factory.mktemp("adapter") / "nudged"
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def run(vlmdpo, *arguments, code=0):
    got, out, err = vlmdpo("eval-amber", "--json", *arguments)
    assert got == code, err
    return (json.loads(out) if code == 0 else None), " ".join(err.split())


def answers(folder, who="base"):
    return {
        entry["id"]: entry for entry in json.loads((folder / f"answers_{who}.json").read_text())
    }


def test_both_tasks_base_beside_tuned(small, adapter, tmp_path, vlmdpo):
    report, _ = run(vlmdpo, "--data", small, "--adapter", adapter, "--output-dir", tmp_path / "out")
    asked = sum(report["questions"][name] for name in ("Existence", "Attribute", "Relation"))
    assert report["coverage"] == 1.0
    assert (
        len(answers(tmp_path / "out"))
        == len(answers(tmp_path / "out", "tuned"))
        == asked + PICTURES
    )
    for who in ("base", "tuned"):
        assert set(report["scores"][who]["Generative"]) == {
            "chair",
            "cover",
            "hal",
            "cog",
            "extractor",
        }
        low, high = report["intervals"][who]["Discriminative"]["accuracy"]
        assert low <= report["scores"][who]["Discriminative"]["accuracy"] + 0.1
        assert high >= report["scores"][who]["Discriminative"]["accuracy"] - 0.1
    found = report["comparison"]
    assert found["fixed"] + found["broken"] == len(found["flips"]) > 0
    assert found["fixed"] == sum(f["fixed"] for f in found["flips"])
    assert found["fixed"] == sum(
        found["dimensions"][name]["fixed"] for name in ("Existence", "Attribute", "Relation")
    )
    low, high = found["ci95"]
    assert (found["verdict"] == "no difference shown") == (low <= 0 <= high)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(
            "answers_base.json",
            "answers_tuned.json",
            "report.html",
            "report.md",
            "run.json",
            "scores.json",
        )
    ]


def test_shared_answers_are_the_plain_ones(small, tmp_path, vlmdpo):
    run(vlmdpo, "--data", small, "--output-dir", tmp_path / "a")
    run(
        vlmdpo,
        "--data",
        small,
        "--output-dir",
        tmp_path / "b",
        "--engine",
        "plain",
        "--batch-size",
        "3",
    )
    shared, plain = answers(tmp_path / "a"), answers(tmp_path / "b")
    assert {n: e["response"] for n, e in shared.items()} == {
        n: e["response"] for n, e in plain.items()
    }
    assert all(plain[n]["said"].startswith(e["said"]) for n, e in shared.items())


def test_a_wrong_shared_answer_is_noticed_and_plain_generate_is_used(
    small, tmp_path, vlmdpo, monkeypatch
):
    plain, _ = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "a", "--engine", "plain")
    monkeypatch.setattr(
        OpenedImage, "answer", lambda self, questions, *rest, **more: ["Perhaps"] * len(questions)
    )
    report, said = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "b")
    assert report["engine"] == "plain"
    assert (
        "is answered 'Perhaps' by the shared engine and 'Yes' by the plain one; continuing with "
        "the plain engine" in said
    )
    assert report["scores"] == plain["scores"]


def test_answered_questions_are_not_asked_again_and_more_can_be_asked(
    small, tmp_path, vlmdpo, monkeypatch
):
    out = ["--data", small, "--output-dir", tmp_path / "out"]
    first, _ = run(vlmdpo, *out, "--dimension", "existence", "--dimension", "state")
    assert set(first["scores"]["base"]) == {"Discriminative", "Existence", "Attribute", "State"}
    assert first["coverage"] == 1.0
    known = len(answers(tmp_path / "out"))
    asked = []
    real, describe = OpenedImage.answer, generate.answer
    monkeypatch.setattr(
        OpenedImage,
        "answer",
        lambda s, texts, *r, **k: asked.extend(texts) or real(s, texts, *r, **k),
    )
    monkeypatch.setattr(
        generate,
        "answer",
        lambda m, p, pictures, *r: asked.extend(pictures) or describe(m, p, pictures, *r),
    )
    run(vlmdpo, *out, "--verify", "0")
    assert len(asked) == len(answers(tmp_path / "out")) - known > 0
    asked.clear()
    again, _ = run(vlmdpo, *out, "--limit", "3")
    assert asked == []
    assert again["questions"]["Discriminative"] == 3
    assert len(answers(tmp_path / "out")) > known, "a smaller question loses no answers"


def test_answers_of_another_run_are_overwritten_only_when_asked(small, adapter, tmp_path, vlmdpo):
    out = ["--output-dir", tmp_path / "out", "--limit", "2"]
    run(vlmdpo, "--data", small, *out)
    before = (tmp_path / "out" / "answers_base.json").read_text()
    for more, says in (
        (["--data", small, "--adapter", adapter], "another run (adapter digest: None there"),
        (["--data", small, "--max-new-tokens", "5"], "max new tokens: 8 there, 5 now"),
        (["--data", small, "--dtype", "bfloat16"], "dtype: float32 there, bfloat16 now"),
        ([], "(data: small there, scenes now)"),
    ):
        _, said = run(vlmdpo, *out, *more, code=3)
        assert says in said
        assert (tmp_path / "out" / "answers_base.json").read_text() == before
    run(vlmdpo, "--data", small, *out, "--max-new-tokens", "5", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    _, said = run(vlmdpo, "--output-dir", tmp_path / "mine", "--overwrite", code=3)
    assert "holds something else" in said
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_scoring_a_file_does_not_replace_another_runs_scores(small, tmp_path, vlmdpo):
    out = tmp_path / "out"
    run(vlmdpo, "--data", small, "--output-dir", out, "--limit", "2")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps([{"id": n, "response": "No"} for n in answers(out)]))
    scored = ["--data", small, "--answers", mine, "--output-dir", out]
    _, said = run(vlmdpo, *scored, code=3)
    assert "holds answers of another run" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(vlmdpo, *scored, "--overwrite")[0]["scores"]["base"]
    assert run(vlmdpo, *scored)[0]["scores"]["base"], "the same file can be scored again"
    _, said = run(vlmdpo, "--data", small, "--output-dir", out, code=3)
    assert "another run" in said


def test_a_part_is_drawn_by_kind_and_truth_and_says_so(tmp_path, vlmdpo):
    whole = json.loads((evaluation.FOLDER / "annotations.json").read_text())
    everything = tmp_path / "all.json"
    everything.write_text(json.dumps([{"id": one["id"], "response": "No"} for one in whole]))
    out = tmp_path / "out"
    code, said, _ = vlmdpo(
        "eval-amber", "--answers", everything, "--limit", "100", "--output-dir", out
    )
    assert code == 0
    sentence = (
        "A part only: 100 of 1,414 yes/no questions and 100 of 100 descriptions, drawn by kind "
        "and truth (seed 0)."
    )
    assert sentence in " ".join(said.split())
    assert sentence in (out / "report.html").read_text()
    assert sentence in (out / "report.md").read_text()
    report = json.loads((out / "scores.json").read_text())
    assert report["part"]["questions"] == 100
    # Of 1,414 questions 938 are to be answered No, 490 are of existence.
    assert abs(report["scores"]["base"]["Discriminative"]["accuracy"] - 66.3) < 3
    assert abs(report["questions"]["Existence"] - 34.7) <= 1


def test_answers_to_a_part_are_said_to_be_a_part(tmp_path, vlmdpo):
    one = tmp_path / "one.json"
    one.write_text(json.dumps([{"id": 1, "response": "A circle."}]))
    code, out, err = vlmdpo("eval-amber", "--answers", one)
    assert code == 0
    assert "of 1 of 100 descriptions" in " ".join(out.split())
    assert "answers cover 1.0% of what was asked" in err


def test_a_damaged_answer_file_is_named(small, tmp_path, vlmdpo):
    run(vlmdpo, "--data", small, "--output-dir", tmp_path / "out", "--limit", "2")
    (tmp_path / "out" / "answers_base.json").write_text('[{"id": 1}]')
    _, said = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "out", "--limit", "2", code=3)
    assert "answers_base.json' is damaged" in said


def test_a_killed_run_continues_without_loss(small, tmp_path, vlmdpo):
    whole = tmp_path / "whole"
    run(vlmdpo, "--data", small, "--output-dir", whole)
    out = tmp_path / "out"
    slow = (
        "import time\nfrom vlmdpo.benchmarks.answers import AnswerStore\nput = AnswerStore.put\n"
        "def slowly(self, *a):\n    put(self, *a)\n    print('kept', flush=True)\n    "
        "time.sleep(60)\n"
        "AnswerStore.put = slowly\nfrom vlmdpo import cli\n"
        f"cli.run(['eval-amber', '--data', {str(small)!r}, '--output-dir', {str(out)!r}])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip() == "kept"
        process.send_signal(signal.SIGKILL)
    partial = out / "partial" / "0.jsonl"
    kept = partial.read_text()
    assert kept
    partial.write_text(
        kept + '{"who": "base", "id": 10'
    )  # what a kill in the middle of a line leaves
    report, _ = run(vlmdpo, "--data", small, "--output-dir", out)
    assert report["coverage"] == 1.0
    assert (out / "answers_base.json").read_bytes() == (whole / "answers_base.json").read_bytes()
    assert not (out / "partial").exists()


def test_a_run_killed_as_it_starts_is_recognized(small, tmp_path, vlmdpo):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json.partial").write_text('{"data"')
    run(vlmdpo, "--data", small, "--output-dir", out, "--limit", "2")
    shutil.rmtree(out / "partial", ignore_errors=True)
    (out / "partial").mkdir()
    (out / "partial" / "0.jsonl").write_text('{"id": 3, "said": "Yes"}\n')
    _, said = run(vlmdpo, "--data", small, "--output-dir", out, "--limit", "2", code=3)
    assert "0.jsonl' is damaged" in said


def test_bad_images_are_listed_and_the_run_continues(small, tmp_path, vlmdpo):
    (small / "image" / "SCENE_2.png").write_bytes(b"no picture")
    (small / "image" / "SCENE_3.png").unlink()
    report, said = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "out")
    assert "1 of 4 images are missing: SCENE_3.png" in said
    assert "SCENE_2.png' cannot be read" in said
    assert set(report["bad_pictures"]) == {"SCENE_2.png", "SCENE_3.png"}
    assert 0.3 < report["coverage"] < 0.7
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 images could not be read" in page
    evaluation.draw_image("SCENE_2.png").save(small / "image" / "SCENE_2.png")
    again, _ = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "out")
    assert again["coverage"] > report["coverage"], "what is there now is asked now"


def test_strict_stops_at_bad_images_and_accepts_only_exact_words(
    small, tmp_path, vlmdpo, monkeypatch
):
    monkeypatch.setattr(
        OpenedImage, "answer", lambda self, questions, *rest, **more: ["No."] * len(questions)
    )
    report, _ = run(
        vlmdpo,
        "--data",
        small,
        "--output-dir",
        tmp_path / "a",
        "--task",
        "discriminative",
        "--verify",
        "0",
    )
    assert report["unparsed"] == 0
    report, _ = run(
        vlmdpo,
        "--data",
        small,
        "--output-dir",
        tmp_path / "b",
        "--task",
        "discriminative",
        "--verify",
        "0",
        "--strict",
    )
    assert report["unparsed"] > 10
    assert report["models"]["base"]["unparsed_examples"][0]["said"] == "No."
    (small / "image" / "SCENE_2.png").write_bytes(b"no picture")
    _, said = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "c", "--strict", code=3)
    assert "SCENE_2.png' cannot be read" in said
    (small / "image" / "SCENE_2.png").unlink()
    _, said = run(
        vlmdpo,
        "--data",
        small,
        "--output-dir",
        tmp_path / "d",
        "--strict",
        "--model",
        "nobody/none",
        code=3,
    )
    assert "SCENE_2.png; --strict requires all of them" in said


def test_tasks_and_missing_packages(small, tmp_path, vlmdpo):
    report, _ = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "a", "--task", "generative")
    assert set(report["scores"]["base"]) == {"Generative"}
    (small / "query" / "query_generative.json").unlink()
    report, _ = run(vlmdpo, "--data", small, "--output-dir", tmp_path / "b", "--task", "all")
    assert "Generative" not in report["scores"]["base"]
    _, said = run(
        vlmdpo, "--data", small, "--output-dir", tmp_path / "c", "--task", "generative", code=3
    )
    assert "has no query/query_generative.json; use --task discriminative" in said
    _, said = run(
        vlmdpo, "--data", small, "--output-dir", tmp_path / "d", "--engine", "vllm", code=6
    )
    assert "pip install 'vllm>=" in said
    _, said = run(vlmdpo, "--dimension", "existance", code=2)
    assert "Did you mean 'existence'?" in said


def test_two_processes_write_the_file_of_one(small, adapter, tmp_path, vlmdpo):
    settings = ["--data", small, "--adapter", adapter, "--json"]
    alone, _ = run(vlmdpo, *settings[:-1], "--output-dir", tmp_path / "one")
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "vlmdpo",
    ]
    command = [
        sys.executable,
        *launch,
        "eval-amber",
        *map(str, settings),
        "--output-dir",
        str(tmp_path / "two"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["scores"] == alone["scores"]
    for who in ("base", "tuned"):
        name = f"answers_{who}.json"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=alert(1)> | "
    "[x](http://evil.example) `"
)


class Page(HTMLParser):
    """What a page would load or run."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [
            value
            for name, value in attributes
            if name in ("src", "href", "srcset") or name.startswith("on")
        ]


@pytest.fixture
def hostile_report(small, adapter, tmp_path, vlmdpo, monkeypatch):
    """A report whose questions and answers try to break out of the page."""
    path = small / "query" / "query_discriminative.json"
    path.write_text(json.dumps([{**q, "query": HOSTILE} for q in json.loads(path.read_text())]))
    turns = iter(["Yes " + HOSTILE, "No " + HOSTILE] * 500)
    monkeypatch.setattr(
        OpenedImage,
        "answer",
        lambda self, questions, *rest, **more: [next(turns) for _ in questions],
    )
    out = tmp_path / "out"
    run(
        vlmdpo,
        "--data",
        small,
        "--adapter",
        adapter,
        "--output-dir",
        out,
        "--verify",
        "0",
        "--task",
        "discriminative",
    )
    return out


def test_every_text_is_escaped_and_nothing_external_is_loaded(hostile_report):
    text = (hostile_report / "report.html").read_text()
    assert "document.title" in text, "the hostile text must be there for this test to mean anything"
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "form"}
    assert page.loads
    assert all(value.startswith("data:image/") for value in page.loads)
    markdown = (hostile_report / "report.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_a_browser_shows_the_page(width, hostile_report, tmp_path):
    picture = tmp_path / "page.png"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},1600",
    ]
    page = (hostile_report / "report.html").as_uri()
    options = {"capture_output": True, "text": True, "timeout": 300, "check": True}
    dom = subprocess.run([*command, "--dump-dom", page], **options).stdout
    assert "<title>AMBER: tiny on small</title>" in dom, "nothing ran that changes the title"
    assert dom.count('<div class="flip ') > 3
    subprocess.run([*command, f"--screenshot={picture}", page], **options)
    with Image.open(picture) as shown:
        assert shown.width == width
        assert len(shown.convert("RGB").getcolors(1 << 24)) > 100


def test_the_real_amber_stands_beside_the_article_in_the_report(amber_data, tmp_path, vlmdpo):
    golden = amber_data / "golden" / "rand1_acc86.json"
    report, _ = run(
        vlmdpo, "--data", amber_data, "--answers", golden, "--output-dir", tmp_path / "out"
    )
    low, high = report["intervals"]["base"]["Discriminative"]["accuracy"]
    assert low < 86.1 < high
    assert 0.5 < high - low < 2.5
    page = (tmp_path / "out" / "report.html").read_text()
    for name in ("GPT-4o", "Idefics2+DPO", "Less-is-more", "VCD"):
        assert f"<td>{name}</td>" in page
    assert "image not available" in page
    again, _ = run(
        vlmdpo, "--data", amber_data, "--answers", golden, "--output-dir", tmp_path / "out"
    )
    assert again["scores"] == report["scores"]


def test_an_adapter_of_another_model_is_refused(small, adapter, tmp_path, vlmdpo):
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(adapter, tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["nowhere"]})
    )
    _, said = run(
        vlmdpo,
        "--data",
        small,
        "--adapter",
        tmp_path / "other",
        "--output-dir",
        tmp_path / "out",
        code=4,
    )
    assert "does not fit the model" in said


def test_an_adapter_on_the_vision_tower_is_noticed(adapter, tiny_model_parts):
    from vlmdpo.models.load import load_adapter, load_model

    assert not ask.adapts_vision(tiny_model_parts[0])
    assert not ask.adapts_vision(load_adapter(load_model("tiny", device="cpu"), adapter))
