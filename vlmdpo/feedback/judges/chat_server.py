"""Chat completions of an OpenAI-compatible server: retries, pauses, and what it cost."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from vlmdpo import ui
from vlmdpo.data.reasons import BadRow, shown
from vlmdpo.errors import EndpointError

KEY = "OPENAI_API_KEY"
_TRIES = 6
_LONGEST_PAUSE_S = 60.0
_TIMEOUT_S = 180.0
_LATER = (408, 409, 425, 429)  # and all of 500 and above
_STOPS = (401, 402, 403, 404, 405)  # no other request would fare better


@dataclass
class Spent:
    """What was asked of the server so far."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key on to whoever it points to."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_address(url: str) -> tuple[str, bool]:
    """(a server's address up to /v1, whether what is sent there can be read on the way).

    Raises EndpointError.
    """
    whole = url.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        address = urlsplit(whole)
        is_valid = bool(address.hostname) and address.port != 0  # raises ValueError for "80a"
    except ValueError:
        is_valid = False
    printable = whole.isascii() and whole.isprintable() and " " not in whole
    if (
        not (is_valid and printable)
        or address.scheme not in ("http", "https")
        or any((address.username, address.password, address.query, address.fragment))
    ):
        raise EndpointError(
            f"--judge-url: {shown(url)} is not an address, as in http://localhost:8000/v1"
        )
    local = address.hostname in ("localhost", "127.0.0.1", "::1")
    return whole, address.scheme == "http" and not local


def _key() -> str:
    """The key in the environment; "" without one. Raises EndpointError."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(f"{KEY} holds characters that no key has; set it again")
    return key


@dataclass
class ChatServer:
    """Chat completions of one server, with retries; from several threads at a time.

    Attributes:
        stopped: set where no reply is needed any more.
    """

    url: str
    sleep: Callable[[float], object] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    spent: Spent = field(default_factory=Spent)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _paused_until: float = 0.0  # a server that asks for a pause asks it of all threads

    def __post_init__(self) -> None:
        self.url, is_open = check_address(self.url)
        self._key = _key()
        if self._key and is_open:
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
            (self.sleep or self.stopped.wait)(max(0.0, self._paused_until - time.monotonic()))
            if self.stopped.is_set():
                raise EndpointError(f"--judge-url: '{self.url}' is not asked any more")
            try:
                return self._text(self._post(body))
            except urllib.error.HTTPError as problem:
                reason = self._refusal(problem)
            except (OSError, http.client.HTTPException) as problem:  # URLError is an OSError
                # An HTTPException is a reply that was cut short, or is not HTTP.
                why = str(getattr(problem, "reason", None) or problem) or type(problem).__name__
                reason = " ".join(why.split())
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
        address = f"{self.url}/chat/completions"
        request = urllib.request.Request(address, body, headers)
        self.count(requests=1)
        with self._opener.open(request, timeout=_TIMEOUT_S) as response:
            content = response.read()
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as problem:
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
        usage = answer.get("usage")
        self.count(**_tokens(usage if isinstance(usage, dict) else {}))
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(one.get("text", "")) for one in text if isinstance(one, dict))
        return str(text or "")

    def _refusal(self, problem: urllib.error.HTTPError) -> str:
        """Why another try is worth it. Raises EndpointError, or BadRow, where it is not."""
        try:
            with problem:  # which holds the connection
                detail = problem.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            detail = ""  # the connection broke; the code says enough
        reason = f"{problem.code} {problem.reason}: {' '.join(detail.split())[:200]}"
        if problem.code in _STOPS or 300 <= problem.code < 400:
            hint = f"; is {KEY} set and valid?" if problem.code in (401, 403) else ""
            raise EndpointError(f"--judge-url: '{self.url}' refuses: {reason}{hint}")
        if problem.code not in _LATER and problem.code < 500:
            raise BadRow("judge_refuses", reason)
        self._wait(min(_pause_s(problem.headers.get("Retry-After", "")), 2 * _LONGEST_PAUSE_S))
        return reason


def _pause_s(asked: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0.0 if neither."""
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # nan too


def _tokens(usage: Mapping[str, Any]) -> dict[str, int]:
    """The counts of a reply; 0 where the server gives none."""
    names = ("prompt_tokens", "completion_tokens")
    return {n: usage[n] if isinstance(usage.get(n), int) else 0 for n in names}
