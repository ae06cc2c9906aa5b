"""What reaches a terminal: no control character of a text that comes from outside."""

import io
import json
import re
import sys

import pytest

from vlmdpo import cli, ui
from vlmdpo.ui import console, live, tables

# Clears the screen, sets the title (OSC), goes back (CR, BS), C1's CSI, DEL, and half a character.
EVIL = "a\x1b[2Jb\x1b]0;title\x07c\rd\x08e\x9b31mf\x7fg\ud83dh[bold]i"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# rich's own: colours, line clearing, cursor movement of live displays.
_OWN = re.compile(r"\x1b\[[0-9;?]*[mKAhl]|\r")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def screen(request, monkeypatch):
    """A function that makes stdout and stderr one stream, which pytest would undo before a test."""

    def start():
        ui.set_json_only(False)
        ui.set_verbosity(quiet=False, yes=False)
        stream = Terminal() if request.param else io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm-256color")
        return stream

    return start


def _bar():
    with ui.progress(EVIL, 2, unit=EVIL) as bar:
        bar.advance(1, EVIL)


def _dashboard():
    with ui.dashboard(EVIL, 2) as board:
        board.figures([ui.Figure(EVIL, EVIL, (1.0, 2.0))])
        board.step(1, 1.0, 2.0)


SHOWN = {
    "say": lambda: ui.say(EVIL),
    "step": lambda: ui.step(EVIL),
    "warn": lambda: ui.warn(EVIL),
    "warn_from_handler": lambda: ui.warn_from_handler(EVIL),
    "error": lambda: ui.error(f"{EVIL} see: vlmdpo {EVIL}"),
    "result": lambda: ui.result(EVIL),
    "piece": lambda: ui.piece(EVIL),
    "raw": lambda: ui.raw(EVIL),
    "table": lambda: ui.table(EVIL, [EVIL, "n"], [[EVIL, EVIL]], note=EVIL, strong=[0]),
    "columns": lambda: ui.columns(EVIL, (EVIL, EVIL), (EVIL, EVIL)),
    "tokens": lambda: ui.tokens(EVIL, [EVIL, EVIL], EVIL, counted=True),
    "progress": _bar,
    "dashboard": _dashboard,
}


@pytest.mark.parametrize("how", SHOWN)
def test_control_characters_are_written_out(how, screen):
    stream = screen()
    SHOWN[how]()
    text = stream.getvalue()
    assert "a\\x1b" in text or "a\\\\x1b" in text or how == "piece"
    assert not CONTROL.search(_OWN.sub("", text)), repr(text)


def test_a_count_is_in_the_singular_or_plural():
    assert ui.count(1, "row") == "1 row"
    assert ui.count(0, "row") == "0 rows"
    assert ui.count(2_000, "process", "processes") == "2,000 processes"


def test_every_function_that_prints_is_among_them():
    shows_no_text = {
        *("Bar", "Dashboard", "Figure", "can_draw_images", "human_bytes", "image", "is_live"),
        "count",
        *("is_silent", "is_terminal", "mute", "set_json_only", "set_verbosity", "sparkline"),
        *("visible", "confirm", "json_result", "unattended"),
    }
    assert set(ui.__all__) == set(SHOWN) | shows_no_text


def test_json_stays_json_and_holds_no_control_characters(screen):
    stream = screen()
    ui.json_result({"answer": EVIL})
    text = stream.getvalue()
    assert not CONTROL.search(text.replace("\n", ""))
    assert json.loads(text) == {"answer": EVIL}


def test_a_question_to_the_user_is_written_out(screen, monkeypatch):
    stream = screen()
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert not ui.confirm(EVIL)
    assert not CONTROL.search(stream.getvalue())


def test_usage_errors_and_file_names_are_written_out(screen):
    stream = screen()
    assert cli.run(["prepare", "--dataset", EVIL]) != 0
    assert cli.run([EVIL]) == 2
    assert cli.run(["infer", "--image", EVIL]) in (2, 3)
    assert not CONTROL.search(_OWN.sub("", stream.getvalue()))


def test_tabs_lines_and_brackets_stay():
    assert ui.visible("a\tb\nc\r\nd é 漢 [x]") == "a\tb\nc\nd é 漢 [x]"


def test_all_text_goes_through_the_console_module():
    """rich's own `escape` keeps control characters; only `console.escape` is used."""
    for module in (live, tables):
        assert module.escape is console.escape
