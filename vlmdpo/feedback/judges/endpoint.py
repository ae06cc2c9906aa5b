"""`endpoint`: a model behind an OpenAI-compatible server with images lists an answer's statements.

Each answer is judged by a request of its own: the image, then the rubric, so that servers which
cache beginnings read an image once. Replies are kept by content, and none is paid for twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from vlmdpo import ui
from vlmdpo.data import growing_jsonl
from vlmdpo.data.reasons import BadRow, shown
from vlmdpo.errors import DataError, EndpointError
from vlmdpo.feedback.judges.base import NO, UNCLEAR, YES, Judgment, Statement, Task

KEY = "OPENAI_API_KEY"
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
_TRIES = 6
_LONGEST_PAUSE_S = 60.0
_TIMEOUT_S = 180.0
_MAX_SIDE = 2048  # pixels; larger images are reduced, because servers charge for them or refuse
_MEDIA = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
_VERDICTS = (YES, NO, UNCLEAR)
_LATER = (408, 409, 425, 429)  # and all of 500 and above
_STOPS = (401, 402, 403, 404, 405)  # no other request would fare better


@dataclass
class Spent:
    """What was asked of the server so far."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointJudge:
    """Judges through a server.

    Args:
        url: its address, up to /v1.
        model: as the server names it.
        cache: JSONL of the replies so far.
        requests: how many may run at the same time.
        sleep: what waits between tries.

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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._server = _Server(url, sleep)
        self._model, self._requests = model, requests
        self._replies = ReplyCache(cache)
        self.at_once = requests
        self._spent = self._server.spent

    def judge(self, tasks: Sequence[Task]) -> list[list[list[Judgment]]]:
        """See `Judge`."""
        with ThreadPoolExecutor(self._requests) as pool:
            futures = [
                [
                    [pool.submit(self._judgment, task, prompt, answer) for answer in answers]
                    for prompt, answers in task.asked
                ]
                for task in tasks
            ]
            try:
                return [[[one.result() for one in row] for row in rows] for rows in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

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


class ReplyCache:
    """Replies on disk by key, each written as it comes. Raises DataError."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._replies: dict[str, str] = {}
        try:
            if path.is_file():
                lines = growing_jsonl.complete_lines(path)
                growing_jsonl.rewrite(path, lines)  # without a line that a kill cut short
                for line in lines:
                    entry = json.loads(line)
                    self._replies[entry["key"]] = entry["reply"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise DataError(f"'{path}' is damaged ({problem}); remove it") from problem

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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key on to whoever it points to."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class _Server:
    """Chat completions of one server, with retries; from several threads at a time."""

    url: str
    sleep: Callable[[float], None]
    spent: Spent = field(default_factory=Spent)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _paused_until: float = 0.0  # a server that asks for a pause asks it of all threads

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise EndpointError(
                f"--judge-url: '{self.url}' is not an address, as in http://localhost:8000/v1"
            )
        self._key = os.environ.get(KEY, "")
        local = address.hostname in ("localhost", "127.0.0.1", "::1")
        if self._key and address.scheme == "http" and not local:
            ui.warn(f"--judge-url: {KEY} and all images are sent to '{self.url}' unencrypted")
        self._opener = urllib.request.build_opener(_NoRedirects)

    def count(self, **more: int) -> None:
        """Add to what was spent."""
        with self._lock:
            for name, value in more.items():
                setattr(self.spent, name, getattr(self.spent, name) + value)

    def reply(self, body: bytes) -> str:
        """The text of a reply. Raises EndpointError; BadRow for a request that is refused."""
        reason = ""
        for tried in range(_TRIES):
            if tried:
                self._wait(min(2.0 ** (tried - 1), _LONGEST_PAUSE_S))
            self.sleep(max(0.0, self._paused_until - time.monotonic()))
            try:
                return self._text(self._post(body))
            except urllib.error.HTTPError as problem:
                reason = self._refusal(problem)
            except (OSError, TimeoutError) as problem:  # URLError is an OSError
                reason = str(getattr(problem, "reason", None) or problem)
        raise EndpointError(
            f"--judge-url: '{self.url}' did not answer in {_TRIES} tries: {reason}; what is judged "
            "is kept: run the command again when the server is up"
        )

    def _wait(self, seconds: float) -> None:
        with self._lock:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, body, headers)
        self.count(requests=1)
        with self._opener.open(request, timeout=_TIMEOUT_S) as response:
            content = response.read()
        try:
            return json.loads(content)
        except ValueError as problem:
            raise EndpointError(
                f"--judge-url: '{address}' did not answer with JSON but with "
                f"{shown(content)}; is it an OpenAI-compatible server?"
            ) from problem

    def _text(self, answer: Any) -> str:
        """The reply's text, and what it cost."""
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as problem:
            raise EndpointError(
                f"--judge-url: '{self.url}' answered without choices and a message: "
                f"{shown(answer)}; is it an OpenAI-compatible server?"
            ) from problem
        usage = answer.get("usage") or {}
        self.count(
            **{name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        )
        return str(text or "")

    def _refusal(self, problem: urllib.error.HTTPError) -> str:
        """Why another try is worth it. Raises EndpointError, or BadRow, where it is not."""
        with problem:  # which holds the connection
            detail = problem.read(2000).decode("utf-8", "replace")
        reason = f"{problem.code} {problem.reason}: {' '.join(detail.split())[:200]}"
        if problem.code in _STOPS or 300 <= problem.code < 400:
            hint = f"; is {KEY} set and valid?" if problem.code in (401, 403) else ""
            raise EndpointError(f"--judge-url: '{self.url}' refuses: {reason}{hint}")
        if problem.code not in _LATER and problem.code < 500:
            raise BadRow("judge_refuses", reason)
        asked = problem.headers.get("Retry-After", "")
        if asked.isdigit():
            self._wait(min(float(asked), 2 * _LONGEST_PAUSE_S))
        return reason


def _data_uri(data: bytes, image: Image.Image) -> str:
    """The image as the server gets it: as it is, or reduced."""
    from vlmdpo.data.images import open_bytes
    from vlmdpo.data.pixels import encode

    kind = open_bytes(data).format or ""
    if kind not in _MEDIA or max(image.size) > _MAX_SIDE:
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
