"""infer: one answer, files of questions, batches, and resuming."""

import json

import pytest
from PIL import Image

from vlmdpo.engine.generate import answer
from vlmdpo.tiny import evaluation


@pytest.fixture
def question_file(tmp_path):
    folder = tmp_path / "q"
    folder.mkdir()
    lines = []
    for number in range(1, 6):
        name = f"SCENE_{number}.png"
        evaluation.draw_image(name).save(folder / name)
        lines.append(
            {
                "id": f"q{number}",
                "image": name,
                "question": "Is there a star in this image?"
                if number % 2
                else "Describe this image.",
            }
        )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_without_options_it_describes_an_embedded_scene(vlmdpo):
    code, out, err = vlmdpo("infer")
    assert code == 0
    assert out.strip()
    assert "SCENE_1.png of the embedded set" in err


def test_one_image_one_question(tmp_path, vlmdpo):
    evaluation.draw_image("SCENE_3.png").save(tmp_path / "my picture.png")
    code, out, _ = vlmdpo(
        "infer",
        "--image",
        "my picture.png",
        "--question",
        "Is there a moon in this image?",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["answer"] in ("Yes", "No")


def test_batches_give_the_answers_of_single_questions(tiny_model_parts):
    model, processor = tiny_model_parts
    pictures = [evaluation.draw_image(f"SCENE_{number}.png") for number in range(1, 7)]
    questions = [
        "Describe this image.",
        "Is there a ring in this image?",
        "Is the star red in this image?",
    ] * 2
    together = answer(model, processor, pictures, questions, 40)
    alone = [
        answer(model, processor, [p], [q], 40)[0] for p, q in zip(pictures, questions, strict=True)
    ]
    assert together == alone
    assert together[1] in ("Yes", "No")


def test_file_of_questions_is_answered_in_order_and_resumed(question_file, tmp_path, vlmdpo):
    arguments = [
        "infer",
        "--input",
        question_file,
        "--output",
        tmp_path / "a.jsonl",
        "--batch-size",
        "2",
        "--json",
    ]
    code, out, err = vlmdpo(*arguments)
    assert code == 0, err
    assert json.loads(out)["answered_now"] == 5
    whole = (tmp_path / "a.jsonl").read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == [f"q{number}" for number in range(1, 6)]
    assert set(lines[0]) == {"id", "image", "question", "answer", "model", "adapter"}
    # A kill in the middle of the fourth line: three answers stay, the cut one is asked again.
    cut = "".join(line + "\n" for line in whole.splitlines()[:3]) + whole.splitlines()[3][:20]
    (tmp_path / "a.jsonl").write_text(cut)
    code, out, _ = vlmdpo(*arguments)
    assert (code, json.loads(out)["answered_now"]) == (0, 2)
    assert (tmp_path / "a.jsonl").read_text() == whole
    code, out, _ = vlmdpo(*arguments)
    assert (code, json.loads(out)["answered_now"]) == (0, 0)


def test_answers_of_another_model_are_not_mixed(question_file, tmp_path, vlmdpo):
    other = {
        "id": "q1",
        "image": "a",
        "question": "b",
        "answer": "c",
        "model": "idefics2-8b",
        "adapter": None,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(other) + "\n")
    code, _, err = vlmdpo("infer", "--input", question_file, "--output", tmp_path / "a.jsonl")
    assert code == 3
    assert "holds answers with model idefics2-8b" in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            '{"id": 1, "image": "absent.png", "question": "q"}',
            "missing_image: 1 (line 1): 'absent.png' was not found",
        ),
        ('{"id": 1, "image": "../x.png", "question": "q"}', "points outside"),
        ('{"id": 1, "question": "q"}', "must hold image and question; found id, question"),
        ("{", "bad_json: 1 (line 1)"),
        ("", "contains no questions"),
    ],
)
def test_bad_question_files(line, says, tmp_path, vlmdpo):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    code, _, err = vlmdpo("infer", "--input", "q.jsonl", "--output", "a.jsonl")
    assert code == 3
    assert says in err


def test_bad_images_and_adapters(tmp_path, vlmdpo):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (300, 300)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    for name, says in (
        ("absent.png", "cannot read"),
        ("text.png", "no picture: begins with"),
        ("cut.png", "cut.png"),
    ):
        code, _, err = vlmdpo("infer", "--image", name)
        assert code == 3
        assert says in err
    code, _, err = vlmdpo("infer", "--adapter", "absent")
    assert code == 4
    assert "holds no adapter_config.json" in err
    code, _, err = vlmdpo("infer", "--model", "idefics2-8b")
    assert code == 2
    assert "--image FILE is needed" in err
