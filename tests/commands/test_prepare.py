"""prepare on the command line: embedded pairs, files, reuse, splits, lengths, refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import Image, List, load_from_disk

from tests.support.images import encoded, noise
from vlmdpo.data import store
from vlmdpo.errors import DataError

pytestmark = pytest.mark.slow


def _rows(folder, rows):
    """A JSONL with RLAIF-V's columns beside one image."""
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(encoded((300, 200)))
    path = folder / "rows.jsonl"
    row = {"image": "x.png", "question": "What?", "chosen": "a", "rejected": "b"}
    path.write_text("".join(json.dumps({**row, **changes}) + "\n" for changes in rows))
    return path


def _questions(folder):
    return [row["prompt"][-1]["content"][-1]["text"] for row in load_from_disk(str(folder))]


def test_without_options_it_prepares_the_scenes_and_reuses_them(vlmdpo):
    code, out, err = vlmdpo("prepare", "--json")
    assert code == 0
    first = json.loads(out)
    assert (first["rows_in"], first["rows_out"], first["dropped"]) == (2000, 2000, {})
    assert (first["reused"], first["max_image_side"], first["splits"]) == (
        False,
        72,
        {"train": 2000},
    )
    assert first["distinct"] == {
        "images": 528,
        "prompts": 1726,
        "pairs_per_prompt": pytest.approx(2000 / 1726),
    }
    assert "full size: vlmdpo prepare --model idefics2-8b --dataset rlaif-v" in err
    assert "format RLAIF-V (image, question, chosen, rejected)" in err
    dataset = load_from_disk(first["path"])
    assert dataset.features["images"] == List(Image(mode="RGB"))
    assert dataset[0]["images"][0].size == (72, 72)
    assert set(first["versions"]) >= {"vlmdpo", "datasets", "transformers"}
    code, out, _ = vlmdpo("prepare")
    assert code == 0
    assert "Found prepared" in out
    assert "2,000 pairs: 528 images, 1,726 prompts, 1.2 pairs a prompt" in out
    assert "User:<fake_token_around_image><image>×16<fake_token_around_image> Is the" in out
    assert re.search(r"chosen +No│<end_of_utterance>\n +2 tokens, all in the loss", out)


def test_bad_rows_are_dropped_counted_and_named(tmp_path, vlmdpo):
    rows = [
        {},
        {"chosen": ""},
        {"rejected": "a"},
        {"image": "absent.png"},
        {"image": "../x.png"},
        {"question": "kept?"},
        {},
    ]
    rows += [
        {"chosen": "b", "rejected": "a"},
        {"question": "holds <fake_token_around_image>"},
        {"question": "<image><image>?"},
    ]
    rows += [{"image": None, "question": "no picture?"}]
    code, out, err = vlmdpo(
        "prepare", "--dataset", _rows(tmp_path / "d", rows), "--output-dir", "out", "--json"
    )
    assert code == 0
    report = json.loads(out)
    assert (report["rows_in"], report["rows_out"]) == (11, 3)
    assert report["dropped"] == {
        **{"duplicate": 1, "empty_chosen": 1, "identical_answers": 1, "image_outside_root": 1},
        **{"missing_image": 1, "placeholder_miscount": 2, "swapped_copy": 1},
    }
    assert report["dropped_examples"]["empty_chosen"] == ["row 1: chosen is empty"]
    assert report["dropped_examples"]["duplicate"] == ["row 6: as row 0"]
    assert report["changed"] == {"no_image": 1, "resized": 2}
    assert [len(images) for images in load_from_disk("out")["images"]] == [1, 1, 0]
    assert load_from_disk("out")[1]["images"][0].size == (72, 48)
    code, out, err = vlmdpo(
        "prepare", "--dataset", tmp_path / "d" / "rows.jsonl", "--output-dir", "out"
    )
    assert re.search(r"identical_answers +1 +row 2: chosen and rejected are both 'a'", out)
    assert "Rows are counted from 0, lines of a file from 1." in out
    assert "73% of the rows were dropped, most for placeholder_miscount" in err


def test_what_train_reads_is_what_was_prepared(tmp_path, vlmdpo):
    """Rows of several turns and images, and of none, reach the collator unchanged."""
    from vlmdpo.engine.collate import PairCollator
    from vlmdpo.engine.stock_collator import StockCollator
    from vlmdpo.models.load import load_processor

    turns = [
        {"from": "human", "value": "<image>One?"},
        {"from": "gpt", "value": "Yes"},
        {"from": "human", "value": "Two? <image>"},
    ]
    rows = [
        {"conversations": turns, "images": ["x.png", "x.png"]},
        {"conversations": [{"from": "human", "value": "Bare?"}], "images": []},
    ]
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "x.png").write_bytes(encoded((30, 20)))
    answers = {
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    (folder / "rows.json").write_text(json.dumps([{**row, **answers} for row in rows]))
    code, _, err = vlmdpo(
        "prepare", "--dataset", folder / "rows.json", "--output-dir", "out", "--json"
    )
    assert code == 0
    assert "format LLaMA-Factory sharegpt ranking (images, conversations, chosen, rejected)" in err
    processor = load_processor("tiny")
    prepared = store.load(tmp_path / "out")
    batches = [PairCollator(processor)([dict(row)]) for row in prepared]
    stock = StockCollator(processor=processor)([dict(row) for row in prepared])
    lengths = [
        [row[name] for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens")]
        for row in prepared
    ]
    assert lengths == [list(batch["forest"].lengths) for batch in batches]
    assert stock["attention_mask"].sum(1).tolist() == [
        p + a for i in (1, 2) for p, a in ((row[0], row[i]) for row in lengths)
    ]
    text = processor.tokenizer.decode(batches[0]["tree_ids"][0])
    assert (
        "One?<end_of_utterance>\nAssistant: Yes<end_of_utterance>\nUser: "
        "Two?<fake_token_around_image>" in text
    )
    assert batches[0]["pixel_values"].shape[:2] == (1, 2)


def test_on_bad_fail_names_the_row(tmp_path, vlmdpo):
    for rows, says in (
        ([{}, {"rejected": "a"}], "row 1 (counted from 0): identical_answers"),
        ([{}, {}], "row 1 (counted from 0): duplicate: as row 0"),
    ):
        code, _, err = vlmdpo(
            "prepare",
            "--dataset",
            _rows(tmp_path / "d", rows),
            "--on-bad",
            "fail",
            "--output-dir",
            "out",
        )
        assert code == 3
        assert says in err
        assert not (tmp_path / "out").exists()


def test_what_was_prepared_is_said_before_an_error_about_its_rows(tmp_path, vlmdpo, monkeypatch):
    base = ["prepare", "--dataset", _rows(tmp_path / "d", [{}]), "--output-dir", "out"]
    code, out, err = vlmdpo(*base, "--show", "99")
    assert code == 3
    assert "Prepared: 1 of 1 pair" in out
    assert "1 pair: 1 image, 1 prompt, 1.0 pairs a prompt" in out
    assert "Tokens per row" in out
    assert "--show: there is no row 99; 'out' has 1 row to train on, counted from 0" in err

    def refused(*arguments, **options):
        raise DataError("no token")

    monkeypatch.setattr("vlmdpo.hub.dataset", refused)
    code, out, err = vlmdpo(*base, "--push-to-hub", "someone/pairs", "--yes")
    assert code == 3
    assert "Found prepared: 1 of 1 pair" in out
    assert "no token" in err


def test_options_that_change_the_result_change_the_folder(tmp_path, vlmdpo):
    path = _rows(tmp_path / "d", [{"question": f"q{i}"} for i in range(8)])
    paths = set()
    changes = [
        "",
        "--limit 3",
        "--split train[:50%]",
        "--max-image-side 10",
        "--max-length 999",
        "--shuffle",
    ]
    for more in [*changes, "--shuffle --seed 1", "--map chosen=rejected,rejected=chosen"]:
        code, out, _ = vlmdpo("prepare", "--dataset", path, "--json", *more.split())
        assert code == 0
        paths.add(json.loads(out)["path"])
    assert len(paths) == 8


def test_another_format_is_mapped(tmp_path, vlmdpo):
    (tmp_path / "x.png").write_bytes(encoded())
    row = {"photo": "x.png", "prompt": "What?", "answers": ["a", "b"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = vlmdpo("prepare", "--dataset", "rows.jsonl")
    assert code == 3
    assert (
        "no known preference format in columns photo, prompt, answers; say which is which, as in "
        "--map" in err
    )
    mapping = [
        "--map",
        "image=photo,question=prompt",
        "--map",
        "chosen=answers.0,rejected=answers.1",
    ]
    code, out, err = vlmdpo("prepare", "--dataset", "rows.jsonl", *mapping, "--json")
    assert code == 0
    assert json.loads(out)["schema"] == "mapped (photo, prompt, answers.0, answers.1)"
    assert json.loads(out)["rows_out"] == 1


def test_a_test_split_shares_no_image(tmp_path, vlmdpo):
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.png").write_bytes(encoded((10 + i, 8)))
    rows = [
        {
            "images": [f"{i % 12}.png"] + ([f"{(i + 1) % 12}.png"] if i in (0, 5) else []),
            "question": f"q{i}",
        }
        for i in range(60)
    ]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({**row, "chosen": "a", "rejected": "b"}) + "\n" for row in rows)
    )
    base = [
        "prepare",
        "--dataset",
        folder / "rows.jsonl",
        "--test-size",
        "0.2",
        "--json",
        "--output-dir",
    ]
    code, out, _ = vlmdpo(*base, "one")
    assert code == 0
    splits = json.loads(out)["splits"]
    assert sum(splits.values()) == 60
    assert splits["test"] >= 12
    shown = {}
    for split in ("train", "test"):
        assert len(store.load(tmp_path / "one", split)) == splits[split]
        shown[split] = {
            picture.size for row in store.load(tmp_path / "one", split) for picture in row["images"]
        }
    assert not shown["train"] & shown["test"]
    assert len(load_from_disk("one")["train"]) == splits["train"]
    vlmdpo(*base, "two", "--seed", "7")
    assert _questions("one/test") != _questions("two/test")
    code, _, err = vlmdpo(*base[:-3], "1000", "--output-dir", "three")
    assert code == 3
    assert "leave nothing to train on" in err


def test_shuffling_keeps_every_row_and_repeats_itself(tmp_path, vlmdpo, monkeypatch):
    monkeypatch.setattr("vlmdpo.data.sources.UNIT_ROWS", 7)
    path = _rows(tmp_path / "d", [{"question": f"q{i}"} for i in range(40)])
    for name in ("a", "b"):
        assert vlmdpo("prepare", "--dataset", path, "--shuffle", "--output-dir", name)[0] == 0
    assert _questions("a") == _questions("b") != [f"q{i}" for i in range(40)]
    assert sorted(_questions("a")) == sorted(f"q{i}" for i in range(40))
    assert [row["source_row"] for row in load_from_disk("a")] == [
        int(question[1:]) for question in _questions("a")
    ]


def test_long_rows_are_dropped_or_trimmed_but_images_never(tmp_path, vlmdpo):
    long = "A red circle is on the left. " * 3 + "Beside it there is a very blue square. " * 4
    rows = [{}, {"question": "long?", "chosen": long}, {"question": "What is it? " * 30}]
    base = [
        "prepare",
        "--dataset",
        _rows(tmp_path / "d", rows),
        "--max-length",
        "80",
        "--json",
        "--output-dir",
    ]
    code, out, _ = vlmdpo(*base, "dropped")
    report = json.loads(out)
    assert (code, report["rows_out"], report["dropped"]) == (0, 1, {"over_length": 2})
    assert re.fullmatch(
        r"row 1: \d+ tokens, 18 of them images, over 80",
        report["dropped_examples"]["over_length"][0],
    )
    code, out, _ = vlmdpo(*base, "trimmed", "--over-length", "trim")
    report = json.loads(out)
    assert (report["rows_out"], report["changed"]["answers_trimmed"], report["dropped"]) == (
        2,
        1,
        {"over_length": 1},
    )
    row = load_from_disk("trimmed")[1]
    said = row["chosen"][0]["content"][0]["text"]
    assert long.startswith(said)
    assert said.endswith(".")
    assert row["image_tokens"] == 18
    assert 40 < row["prompt_tokens"] + row["chosen_tokens"] <= 80


def test_lengths_are_kept_shown_and_used(tmp_path, vlmdpo, monkeypatch):
    rows = [{"question": "Why? " * i, "chosen": "yes " * i, "rejected": "no"} for i in range(1, 9)]
    _, out, _ = vlmdpo(
        "prepare", "--dataset", _rows(tmp_path / "d", rows), "--output-dir", "out", "--json"
    )
    report = json.loads(out)
    dataset = load_from_disk("out")
    assert report["lengths"]["prompt_tokens"]["max"] == max(dataset["prompt_tokens"])
    assert (
        report["lengths"]["longest_tokens"]["max"]
        == dataset[7]["prompt_tokens"] + dataset[7]["chosen_tokens"]
    )
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    from vlmdpo.engine import lengths
    from vlmdpo.models.load import load_processor

    counted = lengths.row_lengths(load_processor("tiny"), dataset)
    monkeypatch.setattr(lengths, "TokenCounter", lambda processor: pytest.fail("counted again"))
    assert (
        lengths.row_lengths(load_processor("tiny"), dataset, store.read_manifest(tmp_path / "out"))
        == counted
    )


def test_a_template_that_refuses_a_row_is_named(tmp_path, vlmdpo):
    from vlmdpo.models.load import load_processor

    processor = load_processor("tiny")
    processor.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
        + processor.chat_template
    )
    processor.save_pretrained("model")
    from vlmdpo.models.load import pretrained_source

    shutil.copy(f"{pretrained_source('tiny')}/config.json", "model")
    turns = [{"from": who, "value": "Hm?"} for who in ("human", "gpt", "human")]
    answers = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    rows = [{"conversations": turns, **answers}, {"conversations": turns[:1], **answers}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, out, _ = vlmdpo("prepare", "--dataset", "rows.json", "--model", "./model", "--json")
    assert code == 0
    assert json.loads(out)["dropped_examples"] == {
        "chat_template_refuses": ["row 0: the chat template takes no earlier turns: one turn only"]
    }


def test_the_report_page_escapes_texts_of_the_data(tmp_path, vlmdpo):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    rows = [
        {"question": hostile},
        {"question": hostile + "?", "chosen": "a" + hostile},
        {"image": hostile},
    ]
    assert (
        vlmdpo("prepare", "--dataset", _rows(tmp_path / "d", rows), "--output-dir", "out")[0] == 0
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<img") == 1 + 2  # the histogram and two samples
    assert "<b>1</b>different images" in page
    assert "<b>2</b>different prompts, 1.0 pairs each" in page
    assert "missing_image" in page


def test_the_image_is_drawn_if_the_terminal_can(tmp_path, vlmdpo, monkeypatch):
    from rich.console import Console

    from vlmdpo.ui import tables

    path = _rows(tmp_path / "d", [{}])
    (tmp_path / "d" / "x.png").write_bytes(noise((60, 40), kind="PNG"))
    _, out, _ = vlmdpo("prepare", "--dataset", path)
    assert "▀" not in out
    monkeypatch.setattr(
        tables, "out", lambda: Console(force_terminal=True, color_system="truecolor", width=120)
    )
    _, out, _ = vlmdpo("prepare", "--dataset", path)
    assert out.count("▀") == 48 * 16
    assert len(set(re.findall(r"38;2;\d+;\d+;\d+", out))) > 50


def test_nothing_is_uploaded_unless_asked_and_then_with_a_card(tmp_path, vlmdpo, monkeypatch):
    import datasets
    import huggingface_hub

    sent = []
    monkeypatch.setattr(
        datasets.Dataset,
        "push_to_hub",
        lambda self, repo, **more: sent.append((repo, len(self), more)),
    )

    class Card:
        text = ""

        @classmethod
        def load(cls, repo):
            return cls()

        def push_to_hub(self, repo):
            sent.append((repo, self.text))

    monkeypatch.setattr(huggingface_hub, "DatasetCard", Card)
    path = _rows(tmp_path / "d", [{"question": f"q{i}"} for i in range(4)] + [{"chosen": ""}])
    assert vlmdpo("prepare", "--dataset", path, "--output-dir", "out")[0] == 0
    assert sent == []
    assert (
        vlmdpo("prepare", "--dataset", path, "--output-dir", "out", "--push-to-hub", "me/pairs")[0]
        == 0
    )
    assert sent[0] == ("me/pairs", 4, {"split": "train", "private": True})
    assert "# pairs" in sent[1][1]
    assert "| empty_chosen | 1 |" in sent[1][1]
    assert str(tmp_path) not in sent[1][1]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, _, err = vlmdpo(
        "prepare", "--dataset", path, "--output-dir", "out", "--push-to-hub", "me/pairs"
    )
    assert code == 3  # tests are offline
    assert "the result is in 'out'" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--dataset", "rlaif-w"], 3, "Did you mean 'rlaif-v'?"),
        (["--dataset", "nobody/nothing"], 3, "nobody/nothing"),
        (["--dataset", "absent.parquet"], 3, "no file or folder 'absent.parquet'"),
        (["--model", "nobody/nothing"], 4, "cannot find 'nobody/nothing'"),
        (["--model", "idefics2-8c"], 4, "Did you mean 'idefics2-8b'?"),
        (["--show", "999999"], 3, "--show: there is no row 999999"),
        (["--split", "test"], 3, "the embedded pairs have no split 'test'"),
        (["--subset", "a"], 3, "--subset is for datasets on the Hub, and 'scenes' is local"),
        (["--streaming"], 3, "--streaming is for datasets on the Hub"),
        (["--output-dir", "taken"], 3, "holds something else"),
        (["--output-dir", "file"], 3, "'file' is a file"),
        (["--output-dir", "file/below"], 3, "cannot write 'file/below'"),
        (["--map", "question"], 2, "cannot read 'question'"),
        (["--map", "quest=x"], 2, "Did you mean 'question'?"),
        (["--test-size", "1.5"], 2, "a share below 1, or a whole number"),
        (["--num-proc", "0"], 2, "give 1 or more"),
        (["--streaming", "--split", "train[:5]"], 2, "use --limit instead"),
        (["--over-length", "cut"], 2, "Choices: drop, trim"),
    ],
)
def test_refusals(arguments, code, says, tmp_path, vlmdpo):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    got, _, err = vlmdpo("prepare", "--limit", "4", *arguments)
    assert got == code
    assert says in err.strip().splitlines()[-1]
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_data_without_a_usable_row_is_an_error(tmp_path, vlmdpo):
    code, _, err = vlmdpo(
        "prepare", "--dataset", _rows(tmp_path / "d", [{"chosen": ""}, {"image": "gone.png"}])
    )
    assert code == 3
    assert (
        "of 2 rows none is usable: empty_chosen 1 (row 0: chosen is empty), missing_image 1" in err
    )


def test_the_report_can_be_left_out_and_made_later(vlmdpo):
    assert vlmdpo("prepare", "--limit", "20", "--test-size", "0.2", "--output-dir", "a")[0] == 0
    code, out, _ = vlmdpo(
        "prepare", "--limit", "20", "--test-size", "0.2", "--output-dir", "b", "--no-report"
    )
    assert code == 0
    assert "report" not in out
    assert not Path("b/report.html").exists()
    code, out, _ = vlmdpo(
        "prepare", "--limit", "20", "--test-size", "0.2", "--output-dir", "b", "--report"
    )
    assert code == 0
    assert "report: b/report.html" in out
    assert Path("b/report.html").read_bytes() == Path("a/report.html").read_bytes()
