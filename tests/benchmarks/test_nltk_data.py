"""nltk's data: tried on a word before use, and what is wrong is said in one line."""

import shutil
import sys
from pathlib import Path

import nltk
import pytest

from tests.support import nltk_data as tiny
from vlmdpo.benchmarks import nltk_data
from vlmdpo.errors import MissingDependencyError

TAGGER = "averaged_perceptron_tagger_eng"


@pytest.fixture
def data(tmp_path):
    folder = tiny.write(
        tmp_path / "nltk_data",
        tags={"running": "VBG", "two": "CD"},
        lemmas={"noun": ["dog", "bus"], "verb": ["run"]},
        exceptions={"verb": {"running": "run"}},
    )
    with tiny.used(folder):
        yield folder


def load():
    return nltk_data.load("--scorer wordnet", instead="--scorer pattern")


def test_nltks_own_tools_work_with_the_data(data):
    tools = load()
    assert tools.tokenize("Dogs near St. Paul. A bus.") == [
        *("Dogs", "near", "St.", "Paul", ".", "A", "bus", ".")
    ]
    assert tools.tag(["running", "dogs"]) == [("running", "VBG"), ("dogs", "NN")]
    assert [tools.lemma("dogs", "n"), tools.lemma("running", "v")] == ["dog", "run"]
    assert tools.facts == {"nltk": nltk.__version__, "WordNet": "3.0"}


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        ("tokenizers", "punkt_tab"),
        ("taggers", "averaged_perceptron_tagger_eng"),
        ("corpora", "wordnet"),
    ],
)
def test_missing_data_are_named_with_the_command_that_gets_them(data, remove, named):
    shutil.rmtree(data / remove)
    with pytest.raises(MissingDependencyError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith(f"--scorer wordnet needs nltk's data '{named}', which is not")
    assert message.endswith(
        "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet; or use "
        "--scorer pattern"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    ("damaged", "content", "named"),
    [
        ("corpora/wordnet/index.noun", "dog n what\n", "wordnet"),
        (f"taggers/{TAGGER}/{TAGGER}.weights.json", '{"bias', TAGGER),
        (f"taggers/{TAGGER}/{TAGGER}.tagdict.json", "[1]", TAGGER),
        ("tokenizers/punkt_tab/english/ortho_context.tab", "a\n", "punkt_tab"),
    ],
)
def test_damaged_data_are_named(data, damaged, content, named):
    (data / damaged).write_text(content)
    with pytest.raises(MissingDependencyError, match=f"'{named}', which cannot be used"):
        load()


def test_a_part_of_the_data_is_not_enough(data):
    (data / "corpora" / "wordnet" / "noun.exc").unlink()
    (data / "corpora" / "wordnet" / "index.verb").unlink()
    with pytest.raises(MissingDependencyError, match="'wordnet', which cannot be used"):
        load()


def test_a_truncated_zip_is_named(data):
    """nltk reads the data out of the zip file that it downloads."""
    wordnet = data / "corpora" / "wordnet"
    zipped = Path(shutil.make_archive(str(wordnet), "zip", wordnet.parent, "wordnet"))
    shutil.rmtree(wordnet)
    whole = zipped.read_bytes()
    zipped.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MissingDependencyError, match="'wordnet', which cannot be used"):
        load()
    zipped.write_bytes(whole)
    assert load().lemma("dogs", "n") == "dog"


def test_an_nltk_that_cannot_be_imported_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(MissingDependencyError, match=r"nltk, which cannot be imported .*install"):
        load()
