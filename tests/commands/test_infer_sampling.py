"""infer: answers that are drawn, streamed to a terminal, or come from vLLM."""

import io
import json
import sys
import types
from pathlib import Path

import pytest

from vlmdpo.engine.sampling import GREEDY, Sampling
from vlmdpo.engine.streaming import TextStreamer
from vlmdpo.tiny import evaluation

ASK = ("infer", "--max-new-tokens", "12", "--json")
DRAW = (*ASK, "--temperature", "2", "--num-return-sequences", "3")


def _answers(vlmdpo, *arguments):
    code, out, err = vlmdpo(*arguments)
    assert code == 0, err
    return json.loads(out)


def test_draws_depend_on_the_seed_alone(vlmdpo):
    one, again, other = (_answers(vlmdpo, *DRAW, "--seed", seed) for seed in ("1", "1", "2"))
    assert len(one["answers"]) == 3
    assert len(set(one["answers"])) > 1
    assert one == again
    assert one["answers"] != other["answers"]
    assert one["answer"] == one["answers"][0]
    assert (one["temperature"], one["num_return_sequences"], one["seed"]) == (2.0, 3, 1)


def test_of_the_likeliest_token_alone_a_draw_is_greedy(vlmdpo):
    greedy = _answers(vlmdpo, *ASK)
    assert set(greedy) == {"id", "image", "question", "answer", "model", "adapter"}
    drawn = _answers(vlmdpo, *ASK, "--temperature", "1", "--top-p", "0.0001")
    assert drawn["answer"] == greedy["answer"]


def test_a_file_keeps_how_its_answers_were_drawn(vlmdpo, tmp_path):
    evaluation.draw_image("SCENE_1.png").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": text} for text in ("Describe this image.", "why")]
    Path("q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = (*DRAW, "--input", "q.jsonl", "--output", "a.jsonl")
    assert _answers(vlmdpo, *command)["answered_now"] == 2
    written = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [len(line["answers"]) for line in written] == [3, 3]
    assert [line["id"] for line in written] == [1, 2]
    assert _answers(vlmdpo, *command)["answered_before"] == 2
    code, _, err = vlmdpo(*command, "--seed", "9")
    assert code == 3
    assert "holds answers with model tiny" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-p", "0.9"], "--top-p is for answers that are drawn: give --temperature"),
        (["--num-return-sequences", "2"], "--num-return-sequences is for answers"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "1", "--top-p", "0"], "--top-p"),
        (["--engine", "shared"], "Choices: plain, vllm"),
    ],
)
def test_settings_that_contradict_each_other(options, says, vlmdpo):
    code, _, err = vlmdpo("infer", *options)
    assert code == 2
    assert says in err


def test_an_answer_appears_piece_by_piece_on_a_terminal(vlmdpo, monkeypatch):
    from vlmdpo import cli

    whole = _answers(vlmdpo, *ASK)["answer"]

    class Terminal(io.StringIO):
        def __init__(self):
            super().__init__()
            self.pieces = []

        def isatty(self):
            return True

        def write(self, text):
            self.pieces.append(text)
            return super().write(text)

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.run(["infer", "--max-new-tokens", "12"]) == 0
    assert screen.getvalue() == f"{whole}\n", "once, not again at the end"
    assert len([piece for piece in screen.pieces if piece.strip()]) > 2


def test_a_character_is_shown_when_it_is_whole():
    import torch

    texts = {1: " a", 2: " a �", 3: " a é", 4: " a é \n"}
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: texts[len(ids)])
    shown = []
    streamer = TextStreamer(types.SimpleNamespace(tokenizer=tokenizer), shown.append)
    streamer.put(torch.zeros(1, 5, dtype=torch.long))  # the prompt
    for _ in texts:
        streamer.put(torch.tensor([7]))
    streamer.end()
    assert "".join(shown) == "a é"
    assert "�" not in "".join(shown)


class _Generator:
    """Stands for VllmGenerator."""

    def __init__(self, model, processor, adapter, **options):
        self.asked = []
        _Generator.made = self

    def start(self):
        pass

    def answers_to(self, images, questions, max_new_tokens, sampling, *, tuned):
        self.asked.append((list(questions), max_new_tokens, sampling, tuned))
        return [[f"{question}!"] * sampling.count for question in questions]


def test_vllm_answers_one_question_and_a_file(vlmdpo, monkeypatch, tmp_path):
    monkeypatch.setattr("vlmdpo.engine.vllm.VllmGenerator", _Generator)
    one = _answers(vlmdpo, *ASK, "--engine", "vllm", "--question", "why")
    assert (one["answer"], one["engine"]) == ("why!", "vllm")
    assert _Generator.made.asked == [(["why"], 12, Sampling(seed=42), False)]
    evaluation.draw_image("SCENE_1.png").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": text} for text in ("one", "<image><image>", "two")]
    Path("q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = (*ASK, "--engine", "vllm", "--input", "q.jsonl", "--output", "a.jsonl")
    report = _answers(vlmdpo, *command)
    assert report["answered_now"] == 2
    assert list(report["left_out"]) == ["empty_prompt"]


def test_what_generate_is_given():
    assert GREEDY.options() == {"do_sample": False}
    drawn = Sampling(0.7, 0.9, 4, 3)
    assert drawn.options() == {
        **{"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        **{"num_beams": 1, "num_return_sequences": 4},
    }
    assert drawn.seed_of([1, "a"]) == drawn.seed_of([1, "a"]) != drawn.seed_of([2, "a"])
