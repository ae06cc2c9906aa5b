"""`endpoint`: a model behind an OpenAI-compatible server with images lists an answer's statements.

Each answer is judged by a request of its own: the image, then the rubric, so that servers which
cache beginnings read an image once. Replies are kept by content, and none is paid for twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo.data import growing_jsonl
from vlmdpo.data.reasons import BadRow, shown
from vlmdpo.errors import DataError
from vlmdpo.feedback.judges.base import NO, UNCLEAR, YES, Judgment, Statement, Task
from vlmdpo.feedback.judges.chat_server import ChatServer

# --8<-- [start:rubric]
RUBRIC = """\
You are checking an answer about the image above. Split the answer into its single statements about
the image: things, how many there are, their properties, what they do, where they are. Judge each
statement by the image alone: "yes" if the image shows it, "no" if the image contradicts it or shows
nothing of the kind, "unclear" if the image does not allow a decision. How long or how well written
the answer is does not matter.

Question: {prompt}
Answer: {answer}

Reply with JSON and nothing else:
{{"statements": [{{"statement": "...", "verdict": "yes"}}]}}"""
# --8<-- [end:rubric]
_MAX_SIDE = 2048  # pixels; larger images are reduced, because servers charge for them or refuse
_MEDIA = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
_VERDICTS = (YES, NO, UNCLEAR)


class EndpointJudge:
    """Judges through a server.

    Args:
        url: its address, up to /v1.
        model: as the server names it.
        cache: JSONL of the replies so far, which grows.
        others: those of other processes, in this run or an earlier one, which are only read.
        requests: how many may run at the same time.
        sleep: what waits between tries, instead of a wait that ends with the run.

    Raises EndpointError from `judge` where the server cannot be reached, or refuses.
    """

    name = "endpoint"

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        *,
        requests: int,
        others: Iterable[Path] = (),
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._server = ChatServer(url, sleep)
        self._model, self._requests = model, requests
        self._replies = ReplyCache(cache, others)
        self.at_once = requests
        self._spent = self._server.spent

    def judge(self, tasks: Sequence[Task]) -> list[list[list[Judgment]]]:
        """See `Judge`."""
        jobs = [
            partial(self._judgment, task, prompt, answer)
            for task in tasks
            for prompt, answers in task.asked
            for answer in answers
        ]
        found = iter(_in_threads(jobs, self._requests, self._server.stopped))
        return [[[next(found) for _ in answers] for _, answers in task.asked] for task in tasks]

    def report(self) -> dict[str, Any]:
        """Requests, and tokens as the server counts them."""
        return vars(self._spent).copy()

    def _judgment(self, task: Task, prompt: str, answer: str) -> Judgment:
        key = self._key(task.data, prompt, answer)
        reply = self._replies.get(key)
        if reply is None:
            try:
                reply = self._server.reply(self._body(task, prompt, answer))
            except BadRow as problem:
                return Judgment(unread=str(problem))
            self._replies.put(key, reply)
        else:
            self._server.count(cached=1)
        return read_reply(reply)

    def _key(self, image: bytes, prompt: str, answer: str) -> str:
        digest = hashlib.sha256(image)
        digest.update(repr((self._model, RUBRIC, prompt, answer)).encode("utf-8", "replace"))
        return digest.hexdigest()

    def _body(self, task: Task, prompt: str, answer: str) -> bytes:
        text = RUBRIC.format(prompt=prompt, answer=answer)
        content = [
            {"type": "image_url", "image_url": {"url": _data_uri(task.data, task.image)}},
            {"type": "text", "text": text},
        ]
        messages = [{"role": "user", "content": content}]
        return json.dumps({"model": self._model, "messages": messages, "temperature": 0}).encode()


def _in_threads(
    jobs: Sequence[Callable[[], Judgment]], count: int, stopped: threading.Event
) -> list[Judgment]:
    """What each job returns. Where one fails, those that run may end, and no other runs.

    Not a ThreadPoolExecutor: Python waits for its threads when it exits, so Ctrl-C would wait for
    a slow server.
    """
    waiting = deque(enumerate(jobs))
    done: dict[int, Judgment] = {}
    failures: list[BaseException] = []
    stopped.clear()

    def work() -> None:
        while not stopped.is_set():
            try:
                number, job = waiting.popleft()
            except IndexError:
                return
            try:
                done[number] = job()
            except Exception as problem:  # noqa: BLE001 - raised again by the thread that waits
                failures.append(problem)
                stopped.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(count, len(jobs)))]
    for one in threads:
        one.start()
    try:
        for one in threads:
            one.join()
    except BaseException:  # Ctrl-C
        stopped.set()
        raise
    if failures:
        raise failures[0]
    return [done[number] for number in range(len(jobs))]


class ReplyCache:
    """Replies on disk by key, each written as it comes. Raises DataError."""

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        self._path, self._lock = path, threading.Lock()
        self._replies: dict[str, str] = {}
        for other in others:
            self._read(other)
        for_more = self._read(path)
        try:
            if path.is_file():
                growing_jsonl.rewrite(path, for_more)  # without a line that a kill cut short
        except OSError as problem:
            raise DataError(f"cannot write '{path}': {problem.strerror}") from problem

    def _read(self, path: Path) -> list[str]:
        """Know the replies of a file. Returns its lines."""
        try:
            lines = growing_jsonl.complete_lines(path) if path.is_file() else []
            for entry in map(json.loads, lines):
                self._replies[entry["key"]] = entry["reply"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise DataError(f"'{path}' is damaged ({problem}); remove it") from problem
        return lines

    def get(self, key: str) -> str | None:
        """The reply; None if there is none."""
        return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keep a reply."""
        line = json.dumps({"key": key, "reply": reply})
        try:
            with self._lock, self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as problem:
            raise DataError(f"cannot write '{self._path}': {problem.strerror}") from problem
        self._replies[key] = reply


def _data_uri(data: bytes, image: Image.Image) -> str:
    """The image as the server gets it: as it is, or reduced.

    Not with EXIF data: servers do not turn images by it, and it may say where a photo was taken.
    """
    from vlmdpo.data.images import open_bytes
    from vlmdpo.data.pixels import encode

    header = open_bytes(data)
    kind = header.format or ""
    if kind not in _MEDIA or "exif" in header.info or max(image.size) > _MAX_SIDE:
        smaller = image.copy()
        smaller.thumbnail((_MAX_SIDE, _MAX_SIDE))
        data, kind = encode(smaller, "JPEG"), "JPEG"
    return f"data:image/{_MEDIA[kind]};base64,{base64.b64encode(data).decode()}"


def read_reply(reply: str) -> Judgment:
    """A reply to RUBRIC; unread where it is of another form."""
    text = reply.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        found = json.loads(text)["statements"]
        read = [(str(one["statement"]), str(one["verdict"]).strip().lower()) for one in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Judgment(unread=f"the judge replied {shown(reply)}")
    return Judgment(
        tuple(
            Statement(text, verdict=given if given in _VERDICTS else None) for text, given in read
        )
    )
