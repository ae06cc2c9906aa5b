"""`vlmdpo compare`: both answers, their scores, votes as data, and the page in a real browser."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from vlmdpo.commands import compare
from vlmdpo.engine.side_by_side import Answer, SideBySide
from vlmdpo.errors import DataError
from vlmdpo.tiny import evaluation
from vlmdpo.web import examples, panes
from vlmdpo.web.votes import VoteFile
from vlmdpo.web.voting import Session, Voting
from vlmdpo.web.word_diff import marked

pytestmark = pytest.mark.slow

QUESTION = "Is there a moon in this image?"
EVIL = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} <b>"


@pytest.fixture(scope="module")
def models():
    from vlmdpo.models.load import load_model, load_processor

    return SideBySide(
        load_model("tiny", adapter=compare.SHIPPED, device="cpu"), load_processor("tiny"), 0.1
    )


@pytest.fixture
def page(models):
    names = ("tiny", "tuned")
    return Voting(models, names, [], VoteFile(Path("votes/v.jsonl"), names), 32)


def _flips():
    return json.loads((compare.SHIPPED / compare.FLIPS).read_text())


def test_both_answers_grow_and_are_those_of_infer(models):
    from vlmdpo.engine.generate import answer

    flips = _flips()
    different = 0
    for flip in flips[:8]:
        picture, question = evaluation.draw_image(flip["image"]), flip["question"]
        steps = list(models.stream(picture, question, 16))
        assert models.in_one_batch, "both in one batch"
        base, tuned = steps[-1]
        assert [len(step[1].ids) for step in steps] == sorted(len(step[1].ids) for step in steps)
        assert tuned.text == answer(models.model, models.processor, [picture], [question], 16)[0]
        with models.model.disable_adapter():
            assert base.text == answer(models.model, models.processor, [picture], [question], 16)[0]
        different += base.text != tuned.text
        models.in_one_batch = False
        assert list(models.stream(picture, question, 16))[-1] == (base, tuned), (
            "one after the other they say the same"
        )
        models.in_one_batch = True
    assert different == 8, "the shipped flips are answers that changed"


def test_if_peft_cannot_mix_a_batch_the_answers_come_one_after_the_other(models, monkeypatch):
    picture = evaluation.draw_image(_flips()[0]["image"])
    both = list(models.stream(picture, QUESTION, 8))[-1]
    plain = models.model.generate

    def generate(*args, adapter_names=None, **kwargs):
        if adapter_names is not None:
            raise ValueError("Length of `adapter_names` should be the same as the number of inputs")
        return plain(*args, **kwargs)

    monkeypatch.setattr(models.model, "generate", generate)
    monkeypatch.setattr(models, "in_one_batch", True)
    steps = list(models.stream(picture, QUESTION, 8))
    assert not models.in_one_batch
    assert steps[-1] == both
    assert steps[0][1] == Answer(), "the base answers first"


def test_log_probs_are_those_of_training(models, vlmdpo):
    """The margin shown for a pair is the one that TRL logs for it."""
    import torch

    from vlmdpo.engine.collate import PairCollator

    picture = evaluation.draw_image("SCENE_1.png")
    said = list(models.stream(picture, QUESTION, 16))[-1]
    first, second = models.score(picture, QUESTION, said)
    assert first.reward == pytest.approx(0.1 * (first.tuned_logp - first.base_logp))
    assert second.tuned_logp > first.tuned_logp, (
        "each model finds its own greedy answer likelier here"
    )
    assert first.base_logp > second.base_logp
    turn = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]
    messages = {
        side: [{"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        for side, answer in zip(("chosen", "rejected"), said, strict=True)
    }
    row = {"images": [picture], "prompt": [{"role": "user", "content": turn}], **messages}
    batch = PairCollator(models.processor, share=False)([row])
    mask = batch["completion_mask"][:, 1:].bool()
    inputs = {k: v for k, v in batch.items() if k not in ("completion_mask", "image_copies")}
    inputs |= {
        name: value.repeat_interleave(2, 0)
        for name, value in inputs.items()
        if name.startswith("pixel")
    }
    with torch.inference_mode():
        logps = models.model(**inputs).logits[:, :-1].log_softmax(-1)
    sums = (logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * mask).sum(1).tolist()
    assert [first.tuned_logp, second.tuned_logp] == pytest.approx(sums, abs=1e-3)


def test_words_that_differ_are_marked_and_everything_is_escaped():
    base, tuned = marked("A red <b>cup</b> stands here.", "A blue <b>cup</b> stands here.")
    assert base == "A <mark>red</mark> &lt;b&gt;cup&lt;/b&gt; stands here."
    assert "<mark>blue</mark>" in tuned
    assert marked("same", "same") == ("same", "same")
    assert "<img" not in "".join(marked(EVIL, "no"))


def test_votes_are_data_that_prepare_accepts(page, vlmdpo, tmp_path):
    picture = tmp_path / "photo.jpg"
    Image.new("RGB", (90, 60), "red").save(picture)
    *_, view = page.ask(page.token, Session(), str(picture), f"<image> {QUESTION}")
    exchange = dataclasses.replace(view.session.exchange, base="Yes — über it.", tuned="No")
    session = Session(exchange)
    right = panes.SIDES[exchange.order.index("tuned")]
    assert page.vote(page.token, session, right).session.exchange is None
    page.vote(page.token, session, "neither", "There is none.")
    page.vote(page.token, Session(dataclasses.replace(exchange, tuned="Perhaps")), "tie")
    assert page.votes == 3
    code, out, err = vlmdpo(
        "prepare", "--dataset", "votes/v.jsonl", "--output-dir", "data", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["rows_out"] == 3


def test_examples_are_the_flips_first_then_rows_of_the_run(vlmdpo, tmp_path):
    assert (
        vlmdpo("prepare", "--limit", "60", "--test-size", "0.2", "--output-dir", "data", "--quiet")[
            0
        ]
        == 0
    )
    code, _, err = vlmdpo(
        "train",
        "--dataset",
        "data",
        "--output-dir",
        "outputs/mine",
        "--max-steps",
        "2",
        "--eval-steps",
        "0",
    )
    assert code == 0, err
    shutil.copy(
        compare.SHIPPED / "adapter_model.safetensors", "outputs/mine"
    )  # one that changes answers
    code, _, err = vlmdpo(
        "eval-amber",
        "--adapter",
        "outputs/mine",
        "--limit",
        "60",
        "--dimension",
        "existence",
        "--json",
    )
    assert code == 0, err
    config = compare.CompareConfig(adapter=Path("outputs/mine"))
    found = compare._examples(config, config.adapter, tmp_path)
    sources = list(dict.fromkeys(example.source for example in found))
    assert sources == ["changed in eval-amber", "test split of the run"]
    assert all(example.image.is_file() for example in found)
    assert compare._beta(config.adapter) == 0.1


def test_lines_of_an_example_file_that_cannot_be_asked_are_left_out(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("none")
    mine = tmp_path / "mine.jsonl"
    lines = (
        '{"image": "a.png", "question": "a\u2028b"}',
        '{"image": "../secret.png", "question": "?"}',
        '{"image": "text.png", "question": "?"}',
        '{"image": "a.png"}',
    )
    mine.write_text("\ufeff" + "".join(line + "\n" for line in lines))
    found, left_out = examples.from_file(mine, tmp_path)
    assert [example.question for example in found] == ["a\u2028b"]
    assert set(left_out.by_reason) == {
        "image_outside_root",
        "unreadable_image",
        "missing_question",
    }
    mine.write_text('{"image": "a.png"}\n')
    with pytest.raises(DataError, match=r"--examples: of 1 question of .* none can be asked"):
        examples.from_file(mine, tmp_path)


def test_wrong_settings_are_one_line_before_anything_is_loaded(vlmdpo, monkeypatch):
    code, _, err = vlmdpo("compare", "--model", "idefics2-8b")
    assert (code, "--adapter FOLDER is needed" in err) == (2, True)
    code, _, err = vlmdpo("compare", "--adapter", "nowhere")
    assert (code, "holds no adapter_config.json" in err) == (4, True)
    Path("taken").write_text("")
    code, _, err = vlmdpo("compare", "--votes", "taken/votes.jsonl")
    assert (code, "--votes: cannot write" in err) == (3, True)
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    code, _, err = vlmdpo("compare")
    assert (code, "pip install 'gradio>=" in err) == (6, True)


def _served(*more):
    command = [sys.executable, "-m", "vlmdpo", "compare", *more]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    line = server.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + server.communicate(timeout=60)[1]
    return server, found[0]


def test_in_a_browser_ask_compare_vote_and_find_the_file(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "mine.png")
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"image": "mine.png", "question": EVIL}) + "\n")
    server, url = _served(
        "--examples", mine, "--votes", tmp_path / "votes.jsonl", "--max-upload-mb", "1"
    )
    assert url.startswith("http://127.0.0.1:")
    try:
        with sync_api.sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            view = browser.new_page(viewport={"width": 390, "height": 844})
            elsewhere, dialogs = [], []
            view.on(
                "request",
                lambda r: (
                    None if r.url.startswith((url, "data:", "blob:")) else elsewhere.append(r.url)
                ),
            )
            view.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
            view.goto(url)
            view.locator(".gallery-item, tr.tr-body").first.click()
            assert view.locator("#vote-right").is_disabled()
            view.wait_for_function(
                "document.querySelector('#question textarea').value.startsWith('Is ')"
            )
            view.locator("#ask").click()
            view.wait_for_selector("#vote-right:not([disabled])", timeout=60000)
            said = {side: view.locator(f"#{side} .text").inner_text() for side in panes.SIDES}
            assert said["left"] != said["right"]
            assert view.locator("#right mark").count() >= 1
            assert "tuned" not in view.locator("#left").inner_text(), "blind until the vote"
            assert view.locator(".figures").count() == 0
            view.locator("h1").click()
            view.keyboard.press("2")
            view.get_by_text("Written: 1 preference").wait_for(timeout=30000)
            assert view.locator("#vote-right").is_disabled(), "one vote an answer"
            assert "Reward margin" in view.locator(".figures").inner_text()
            role = view.locator("#right h3").inner_text().partition(":")[0]
            view.keyboard.press("u")
            view.get_by_text("Taken back").wait_for(timeout=30000)
            view.locator("#vote-right").click()
            view.get_by_text("Written: 1 preference").wait_for(timeout=30000)
            assert view.evaluate("document.documentElement.scrollWidth") <= 390, (
                "nothing sticks out on a phone"
            )
            view.keyboard.press("n")  # asks the next example
            view.wait_for_selector("#vote-left:not([disabled])", timeout=60000)
            assert "Example 2 of" in view.locator("#progress").inner_text()
            # an upload, and a question that would like to be markup
            view.set_input_files("input[type=file]", tmp_path / "mine.png")
            view.locator("#question textarea").fill(EVIL)
            view.locator("#ask").click()
            view.get_by_text("Which is better?").or_(
                view.get_by_text("Both answers are the same")
            ).wait_for(timeout=60000)
            view.locator("tr.tr-body", has_text="onerror").click()
            view.wait_for_timeout(300)
            assert (elsewhere, dialogs) == ([], [])
            too_much = {
                "files": {"name": "a.png", "mimeType": "image/png", "buffer": b"0" * 2_000_000}
            }
            refused = view.context.request.post(f"{url}gradio_api/upload", multipart=too_much)
            assert refused.status == 413, "more than --max-upload-mb"
            browser.close()
        [line] = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
        assert (line["chosen"], line["rejected"]) == (said["right"], said["left"])
        assert line["preferred"] == role
        assert (tmp_path / line["image"]).is_file()
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 0, err
    assert "1 preferences written" in out
    assert "of 1 decided votes" in out
    assert "A second round: vlmdpo train --dataset" in out


def test_requests_uploads_and_output_are_kept_private():
    """Over HTTP: other hosts and pages, a full queue, uploads, stdout, and what is left behind."""
    httpx = pytest.importorskip("httpx").Client(timeout=60)
    server, url = _served("--votes", "votes.jsonl", "--allow-host", "proxy.example")
    try:
        assert httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"Host": "proxy.example"}).status_code == 200
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
        join = f"{url}gradio_api/queue/join"
        evil = httpx.post(join, json={}, headers={"Origin": "http://evil.example"})
        assert evil.status_code == 403
        # Another program's page on this machine.
        other = httpx.post(join, json={}, headers={"Origin": "http://127.0.0.1:9"})
        assert other.status_code == 403
        picture = _as_png(evaluation.draw_image("SCENE_1.png"))
        [path] = httpx.post(f"{url}gradio_api/upload", files={"files": picture}).json()
        folder = next(one for one in Path(path).parents if one.name.startswith("vlmdpo-compare-"))
        assert folder.parent == Path(tempfile.gettempdir())
        assert folder.stat().st_mode & 0o777 == 0o700
        config = httpx.get(f"{url}config").json()
        ask = next(one for one in config["dependencies"] if len(one["targets"]) == 2)
        token = next(
            one["props"]["value"]
            for one in config["components"]
            if one["props"].get("visible") == "hidden"
        )
        data = [token, None, {"path": path, "meta": {"_type": "gradio.FileData"}}, QUESTION]
        answers = [
            httpx.post(join, json={"data": data, "fn_index": ask["id"], "session_hash": f"s{n}"})
            for n in range(30)
        ]
        assert answers[0].status_code == 200
        assert answers[-1].status_code == 503
        assert "Queue is full" in answers[-1].text
    finally:
        httpx.close()
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 0, err[-2000:]
    assert out == "No votes.\n"
    assert not list(Path(compare.__file__).parent.parent.rglob("*.pyi")), "gradio writes no code"
    assert not folder.exists()


def _as_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ("a.png", buffer.getvalue(), "image/png")


@pytest.mark.parametrize("host", ["999.1.1.1", "192.0.2.1"], ids=["no address", "not ours"])
def test_an_address_that_cannot_be_served_on_is_an_error(host, vlmdpo):
    pytest.importorskip("gradio")
    code, _, err = vlmdpo("compare", "--host", host)
    assert code == 2, err
    assert f"cannot serve on {host}, port any: " in err
