"""A judge behind an OpenAI-compatible server: what is sent, what is read, and what fails."""

import base64
import email.utils
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vlmdpo.errors import DataError, EndpointError
from vlmdpo.feedback.judges.base import NO, UNCLEAR, YES, Task
from vlmdpo.feedback.judges.endpoint import EndpointJudge, read_reply


def _reply(*verdicts):
    """A reply of the asked form."""
    return json.dumps({"statements": [{"statement": "s", "verdict": one} for one in verdicts]})


RIGHT = _reply("Yes", "no")


class _Server(ThreadingHTTPServer):
    """Answers with the next of `replies`, (status, body, headers), or else with the last."""

    daemon_threads = True

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies, self.requests, self.lock = list(replies), [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            replies = self.server.replies
            status, text, headers = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        """Not on stderr."""


def _completion(text=RIGHT):
    answer = {"choices": [{"message": {"content": text}}]}
    return 200, json.dumps(answer | {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}), {}


@pytest.fixture
def serve():
    servers = []

    def start(*replies):
        server = _Server(*replies)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _task(*answers, size=(8, 6), kind="PNG"):
    buffer = io.BytesIO()
    image = Image.new("RGB", size, "red")
    image.save(buffer, kind)
    return Task("a.png", buffer.getvalue(), image, (("What?", answers),))


def _judge(server, tmp_path, waits=None, **more):
    waits = [] if waits is None else waits
    return EndpointJudge(
        server.url, "m", tmp_path / "replies.jsonl", requests=2, sleep=waits.append, **more
    )


def test_statements_and_cost_and_nothing_is_paid_for_twice(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(_completion())
    judge = _judge(server, tmp_path)
    [[[first, second]]] = judge.judge([_task("A dog.", "A cat.")])
    assert [one.verdict for one in first.statements] == [YES, NO]
    assert first.denied == second.denied == 1
    assert judge.report() == {
        "requests": 2,
        "cached": 0,
        "prompt_tokens": 14,
        "completion_tokens": 6,
    }
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    image, text = body["messages"][0]["content"]
    sent = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert sent == _task("A dog.").data
    assert "Question: What?" in text["text"]
    assert (body["model"], body["temperature"]) == ("m", 0)

    again = _judge(server, tmp_path)
    again.judge([_task("A dog.", "A cat.")])
    assert again.report()["requests"] == 0
    assert len(server.requests) == 2
    assert b"secret" not in (tmp_path / "replies.jsonl").read_bytes()


def test_large_images_and_unusual_formats_are_sent_as_small_jpegs(serve, tmp_path):
    server = serve(_completion())
    _judge(server, tmp_path).judge([_task("a", size=(5000, 50)), _task("a", kind="TIFF")])
    for _, _, body in server.requests:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,")
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            assert max(image.size) <= 2048


def test_a_busy_server_is_asked_again_after_the_pause_it_asks_for(serve, tmp_path):
    busy = (429, "slow down", {"Retry-After": "9"})
    server = serve(busy, (503, "", {}), _completion())
    waits = []
    judge = EndpointJudge(server.url, "m", tmp_path / "r.jsonl", requests=1, sleep=waits.append)
    [[[found]]] = judge.judge([_task("A dog.")])
    assert found.denied == 1
    assert len(server.requests) == 3
    assert max(waits) > 8


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((401, "no key", {}), "refuses: 401.*is OPENAI_API_KEY set and valid"),
        ((404, "no model", {}), "refuses: 404"),
        ((302, "", {"Location": "http://example.com"}), "refuses: 302"),
        ((500, "", {}), "did not answer in 6 tries: 500.*is kept"),
        ((200, "<html>", {}), "did not answer with JSON.*OpenAI-compatible"),
        ((200, "[" * 100_000, {}), "did not answer with JSON"),
        ((200, "cut", {"Content-Length": "99"}), "did not answer in 6 tries: IncompleteRead"),
        ((200, "{}", {}), "answered without choices.*OpenAI-compatible"),
    ],
)
def test_a_server_that_refuses_ends_the_run_and_keeps_what_is_judged(serve, tmp_path, reply, says):
    server = serve(_completion(), reply)
    judge = EndpointJudge(server.url, "m", tmp_path / "r.jsonl", requests=1, sleep=lambda _: None)
    with pytest.raises(EndpointError, match=says):
        judge.judge([_task("first", "second", "third")])
    assert EndpointError.exit_code == 8
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_a_server_that_is_not_there(tmp_path):
    judge = EndpointJudge(
        "http://127.0.0.1:9/v1", "m", tmp_path / "r.jsonl", requests=1, sleep=lambda _: None
    )
    with pytest.raises(EndpointError, match=r"did not answer in 6 tries: .*refused"):
        judge.judge([_task("A dog.")])
    with pytest.raises(EndpointError, match="is not an address"):
        EndpointJudge("localhost:8000", "m", tmp_path / "r.jsonl", requests=1)


def test_one_refused_request_leaves_one_answer_unread(serve, tmp_path):
    server = serve((400, "this image is not allowed", {}), _completion())
    judge = EndpointJudge(server.url, "m", tmp_path / "r.jsonl", requests=1, sleep=lambda _: None)
    [[[refused, judged]]] = judge.judge([_task("first", "second")])
    assert "this image is not allowed" in refused.unread
    assert judged.denied == 1


def test_replies_of_another_form_are_unread_and_never_guessed():
    assert read_reply(f"```json\n{RIGHT}\n```").denied == 1
    assert read_reply('{"statements": []}').unread == ""
    for nonsense in ("No.", "", "[]", '{"statements": [{"verdict": "no"}]}', '{"statements": 3}'):
        found = read_reply(nonsense)
        assert found.unread_verdicts == 1, nonsense
        assert "the judge replied" in found.unread
    found = read_reply(_reply("unclear", "maybe"))
    assert [one.verdict for one in found.statements] == [UNCLEAR, None]


def test_a_damaged_file_of_replies_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"key": 1}\n')
    with pytest.raises(DataError, match=r"r\.jsonl' is damaged"):
        EndpointJudge("http://localhost/v1", "m", path, requests=1)
    path.write_text('{"key": "k", "reply": "x"}\n{"key": "cut')  # by a kill
    EndpointJudge("http://localhost/v1", "m", path, requests=1)
    assert path.read_text() == '{"key": "k", "reply": "x"}\n'


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://localhost:80a/v1",
        "http://local host/v1",
        "http://localhost/v\xfc",
        "http://[::1/v1",
        "http://name:secret@localhost/v1",
        "http://localhost/v1?version=1",
    ],
)
def test_what_is_no_address(url, tmp_path):
    with pytest.raises(EndpointError, match="is not an address"):
        EndpointJudge(url, "m", tmp_path / "r.jsonl", requests=1)


def test_an_address_may_be_that_of_the_requests(serve, tmp_path):
    server = serve(_completion())
    server.url = f" {server.url}/chat/completions/"
    _judge(server, tmp_path).judge([_task("A dog.")])
    assert server.requests[0][0] == "/v1/chat/completions"


def test_a_key_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "\u2192")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds characters"):
        EndpointJudge("http://localhost/v1", "m", tmp_path / "r.jsonl", requests=1)


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        (lambda: email.utils.formatdate(time.time() + 50, usegmt=True), 40, 50),
        (lambda: "1.5", 1, 1.5),
        (lambda: "Wed, 21 Oct 2015 07:28:00 GMT", 0, 1),
        (lambda: "9" * 400, 119, 120),
        (lambda: "\xb2", 0, 1),
        (lambda: "nan", 0, 1),
        (lambda: "-5", 0, 1),
    ],
)
def test_pauses_as_servers_ask_for_them(serve, tmp_path, asked, least, most):
    waits = []
    server = serve((429, "", {"Retry-After": asked()}), _completion())
    [[[found]]] = _judge(server, tmp_path, waits).judge([_task("A dog.")])
    assert found.denied == 1
    assert least <= max(waits) <= most


@pytest.mark.parametrize("usage", ["abc", {"prompt_tokens": "many"}, [3], None])
def test_costs_of_another_form_count_nothing(serve, tmp_path, usage):
    parts = [{"type": "text", "text": RIGHT}]
    answer = {"choices": [{"message": {"content": parts}}], "usage": usage}
    judge = _judge(serve((200, json.dumps(answer), {})), tmp_path)
    [[[found]]] = judge.judge([_task("A dog.")])
    assert found.denied == 1
    assert judge.report()["prompt_tokens"] == 0


def test_images_are_sent_without_exif_and_upright(serve, tmp_path):
    server = serve(_completion())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG", exif=exif)
    upright = Image.new("RGB", (6, 8))
    task = Task("a.jpg", buffer.getvalue(), upright, (("What?", ("a",)),))
    _judge(server, tmp_path).judge([task])
    url = server.requests[0][2]["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert image.size == (6, 8)
        assert not image.getexif()


def test_replies_of_other_processes_are_not_paid_for_again(serve, tmp_path):
    server = serve(_completion())
    _judge(server, tmp_path).judge([_task("A dog.")])
    earlier = [tmp_path / "replies.jsonl"]
    judge = EndpointJudge(server.url, "m", tmp_path / "1.jsonl", requests=1, others=earlier)
    judge.judge([_task("A dog.")])
    assert (judge.report()["requests"], judge.report()["cached"]) == (0, 1)


def test_a_failure_ends_the_pauses_of_other_requests(serve, tmp_path):
    server = serve((429, "", {"Retry-After": "100"}), (401, "no", {}))
    judge = EndpointJudge(server.url, "m", tmp_path / "r.jsonl", requests=1)
    failure = threading.Timer(0.3, judge._server.stopped.set)
    failure.start()
    started = time.monotonic()
    with pytest.raises(EndpointError, match="not asked any more"):
        judge.judge([_task("A dog.")])
    assert time.monotonic() - started < 10
    failure.join()


def test_ctrl_c_waits_for_no_reply(serve, tmp_path, monkeypatch):
    server = serve((429, "", {"Retry-After": "100"}))
    judge = EndpointJudge(server.url, "m", tmp_path / "r.jsonl", requests=1)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge.judge([_task("A dog.")])
    assert judge._server.stopped.is_set()
