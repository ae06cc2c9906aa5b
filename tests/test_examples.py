"""The examples run as they are."""

import importlib.util
from pathlib import Path

import pytest

import vlmdpo

pytestmark = pytest.mark.slow

EXAMPLES = Path(vlmdpo.__file__).parent.parent / "examples"


def test_the_library_example_trains_and_answers(tmp_path):
    found = importlib.util.spec_from_file_location("library", EXAMPLES / "library.py")
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    base, tuned = example.main(tmp_path / "library", steps=3)
    assert base == "Yes", "the embedded model sees a moon that is not there"
    assert tuned
    assert (tmp_path / "library" / "adapter" / "README.md").is_file()
