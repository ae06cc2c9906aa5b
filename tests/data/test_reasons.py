"""Reasons: every one is documented; libraries' errors become reasons, our own do not."""

import ast
import re
import sys
from pathlib import Path

import pytest

import vlmdpo
from vlmdpo.data import reasons
from vlmdpo.data.reasons import BadImage, BadRow, UnreadableRow, foreign, shown
from vlmdpo.errors import DataError

ROOT = Path(vlmdpo.__file__).parent
PAGE = (ROOT.parent / "docs" / "data.md").read_text("utf-8")
_NAME = re.compile(r"`([a-z0-9]+(?:_[a-z0-9]+)*)`")
_RAISED = {"BadRow": 0, "BadImage": 0, "UnreadableRow": 0, "CannotRender": 0, "foreign": 1}


def _constants(tree):
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


FEEDBACK = set((ROOT / "feedback").rglob("*.py"))  # whose reasons the page of make-pairs has


def _reasons_in(paths):
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(getattr(node, "func", None), "id", "")
            if name in _RAISED and len(node.args) > _RAISED[name]:
                found |= _constants(node.args[_RAISED[name]])
    return found - {"empty_", "video_url", "malformed_exif", "reason"}


def _table():
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.partition("| reason | meaning |")[2], re.M)
    return {name for row in rows for name in _NAME.findall(row)}


def test_the_table_of_reasons_is_that_of_the_code():
    # Those that no exception tells: `assemble` finds them when all rows are known.
    at_the_end = {"duplicate", "swapped_copy", "earlier_vote"}
    assert at_the_end <= _constants(ast.parse((ROOT / "data" / "assemble.py").read_text("utf-8")))
    # A file of questions has reasons of its own, for `infer` and `compare`.
    code = _reasons_in({*ROOT.rglob("*.py")} - {ROOT / "data" / "questions.py"} - FEEDBACK)
    assert _table() == code | {"empty_chosen", "empty_rejected"} | at_the_end


def test_the_reasons_of_make_pairs_are_on_its_page():
    page = (ROOT.parent / "docs" / "commands" / "make-pairs.md").read_text("utf-8")
    own = _reasons_in(FEEDBACK)
    assert len(own) > 4
    assert own <= set(_NAME.findall(page))


@pytest.mark.parametrize("module", ["data/images", "data/templates", "data/work", "engine/lengths"])
def test_what_is_noted_is_documented(module):
    tree = ast.parse((ROOT / module).with_suffix(".py").read_text("utf-8"))
    ends = "rgb|white|frame|pictures|removed|text|rotated|prompt|image|trimmed|resized"
    notes = {text for text in _constants(tree) if re.fullmatch(rf"[a-z0-9_]+_({ends})", text)}
    documented = set(_NAME.findall(PAGE.partition("## What it checks")[2].partition("\n## ")[0]))
    assert notes - {"to_rgb", "upright_rgb"} <= documented


def test_errors_of_libraries_are_reasons_and_ours_are_not():
    def of_a_library():
        re.compile("(")

    with pytest.raises(BadRow, match="about: missing"), foreign(BadRow, "x", "about: "):
        of_a_library()
    with pytest.raises(BadImage), foreign(BadImage, "x"):
        raise RecursionError
    for passes, raised in ((DataError, DataError("x")), (BadImage, BadImage("y", "z"))):
        with pytest.raises(passes), foreign(BadRow, "x"):
            raise raised
    with pytest.raises(MemoryError), foreign(BadRow, "x"):
        raise MemoryError

    def in_the_package(text):
        exec(compile("raise TypeError('a bug')", str(ROOT / "data" / "x.py"), "exec"))

    with pytest.raises(TypeError, match="a bug"), foreign(BadRow, "x"):
        in_the_package("")


def test_messages_are_short_in_one_line_and_without_addresses():
    assert shown("a\nb\x1b[2J") == repr("a\nb\x1b[2J")
    for cell in ("x" * 9000, b"x" * 9000, ["x" * 9000] * 9000, {"k": "x" * 9000}, 10**50):
        assert len(shown(cell)) <= reasons.SHOWN + 10
    problem = BadRow(
        "x", f"cannot identify {sys.stdin!r} <_io.BytesIO object at 0x7f{'a' * 10}>\n" * 99
    )
    assert len(str(problem)) <= 400
    assert "0x" not in str(problem)
    assert "\n" not in str(problem)


def test_an_unreadable_row_survives_the_way_to_another_process():
    import pickle

    row = pickle.loads(pickle.dumps(UnreadableRow("bad_json", "why")))  # noqa: S301 - our own bytes
    assert (type(row), str(row.problem()), row.problem().reason) == (
        UnreadableRow,
        "why",
        "bad_json",
    )
