"""AMBER's generative scores against a second implementation, and the two noun extractors."""

import json
import random
import sys
import types
import warnings

import pytest

from tests.support import nltk_data
from vlmdpo.benchmarks.amber import generative as gen
from vlmdpo.benchmarks.amber import nouns, questions, vectors
from vlmdpo.benchmarks.amber.questions import Description, Vocabulary
from vlmdpo.errors import MissingDependencyError
from vlmdpo.tiny import evaluation


def as_amber_counts(named, truth, hallu, association, safe, alike):
    """The scorer's procedure written like the original: flat lists, searched from the left."""

    def flat(words):
        numbered = [
            (synonym, number) for number, word in enumerate(words) for synonym in association[word]
        ]
        return [word for word, _ in numbered] + list(words), [
            number for _, number in numbered
        ] + list(range(len(words)))

    truth_words, truth_at = flat(truth)
    hallu_words, hallu_at = flat(hallu)
    covered, cogs, bad = [0] * len(truth), [0] * len(hallu), []
    for noun in named:
        if noun in safe:
            continue
        if noun in truth_words:
            covered[truth_at[truth_words.index(noun)]] = 1
            continue
        if noun in hallu_words:
            cogs[hallu_at[hallu_words.index(noun)]] = 1
        for place, word in enumerate(hallu_words):
            if alike(noun, word):
                cogs[hallu_at[place]] = 1
                break
        for place, word in enumerate(truth_words):
            if alike(noun, word):
                covered[truth_at[place]] = 1
                break
        else:
            bad.append(noun)
    return gen.Counts(len(named), tuple(bad), sum(covered), len(truth), sum(cogs), len(hallu))


def random_case(rng, vocabulary, words):
    entries = sorted(vocabulary.association)
    truth = tuple(
        rng.choices(entries, k=rng.randrange(0, 8))
    )  # with repetition: AMBER's lists have some
    hallu = tuple(rng.choices(entries, k=rng.randrange(0, 6)))
    named = rng.choices([*words, *truth, *hallu], k=rng.randrange(0, 14))
    return named, Description(1, "a", "?", truth, hallu)


def check_random_cases(vocabulary, cases=400):
    rng = random.Random(0)
    words = sorted(vocabulary.words)
    pairs = {frozenset(rng.sample(words, 2)) for _ in range(3 * len(words))}

    def alike(one, other):
        return one == other or frozenset((one, other)) in pairs

    table = {word: frozenset(other for other in words if alike(word, other)) for word in words}
    extractor = nouns.Extractor("test", str.split, table.__getitem__)
    seen = set()
    for _ in range(cases):
        named, asked = random_case(rng, vocabulary, words)
        expected = as_amber_counts(
            named, asked.truth, asked.hallu, vocabulary.association, vocabulary.safe, alike
        )
        assert gen.count(named, asked, vocabulary, extractor) == expected, (named, asked)
        seen.add(expected)
    assert len(seen) > cases / 3


VOCABULARY = Vocabulary(
    {
        "tree": ("bush",),
        "forest": ("tree", "bush"),
        "sofa": ("couch", "chair"),
        "dog": (),
        "cat": (),
        "sky": (),
        "orange": (),
    },
    frozenset({"orange"}),
)


def test_counts_follow_ambers_procedure():
    check_random_cases(VOCABULARY)


def test_counts_follow_ambers_procedure_on_its_own_vocabulary(amber_data):
    vocabulary = questions.read(amber_data).vocabulary
    assert (len(vocabulary.association), len(vocabulary.words), len(vocabulary.safe)) == (
        340,
        418,
        9,
    )
    check_random_cases(vocabulary)


@pytest.mark.parametrize(
    ("named", "truth", "hallu", "expected"),
    [
        (["dog", "dog"], ("dog", "sky"), (), (2, (), 1, 2, 0, 0)),
        (
            ["couch"],
            ("sofa",),
            (),
            (1, (), 1, 1, 0, 0),
        ),  # through the list of words for the same thing
        (
            ["bush"],
            ("tree", "forest"),
            (),
            (1, (), 1, 2, 0, 0),
        ),  # the first entry it stands for, not the best
        (
            ["tree"],
            ("tree", "forest"),
            (),
            (1, (), 1, 2, 0, 0),
        ),  # synonyms come first: it marks the forest
        (["cat"], ("dog",), ("cat",), (1, ("cat",), 0, 1, 1, 1)),
        (
            ["cat"],
            ("dog",),
            (),
            (1, ("cat",), 0, 1, 0, 0),
        ),  # neither there nor expected: hallucinated all the same
        (
            ["orange"],
            (),
            (),
            (1, (), 0, 0, 0, 0),
        ),  # a safe word counts as a noun and is never wrong
        ([], ("dog",), ("cat",), (0, (), 0, 1, 0, 1)),
    ],
)
def test_counts_by_hand(named, truth, hallu, expected):
    extractor = nouns.Extractor("test", str.split, lambda word: frozenset((word,)))
    assert gen.count(
        named, Description(1, "a", "?", truth, hallu), VOCABULARY, extractor
    ) == gen.Counts(*expected)


def test_figures_are_rounded_as_amber_prints_them():
    counts = [
        gen.Counts(3, ("cat",), 2, 3, 1, 4),
        gen.Counts(4, (), 1, 3, 0, 2),
        gen.Counts(0, (), 0, 0, 0, 0),
    ]
    assert gen.figures(counts) == {
        "chair": 14.3,
        "cover": 50.0,
        "hal": 33.4,
        "cog": 16.7,
    }  # 100 - 2 / 3.001 %, not 33.3
    assert gen.figures([gen.Counts(0, (), 0, 0, 0, 0)]) == {
        "chair": 0.0,
        "cover": 0.0,
        "hal": 0.1,
        "cog": 0.0,
    }


def test_the_lexicon_finds_nouns_by_their_lemma():
    extractor = nouns.make("lexicon", {"dog", "person", "people", "tree", "leaf", "Sky"})
    found = extractor.nouns("Two DOGS, a tree's leaves; people under the sky. Doggerel!")
    assert found == ["dog", "tree", "leaf", "people", "Sky"]
    assert extractor.similar("dog") == {"dog"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A dog can be seen; one can also clearly see a can.", ["dog", "can"]),
        ("Can you see the can of cola? A bird can fly.", ["can", "cola", "bird"]),
        ("A trash can near the door, a can opener, cans.", ["can", "door", "can", "opener", "can"]),
        ("He leaves the house. The train leaves the city.", ["house", "train"]),
        ("Leaves on the ground, and green leaves. The sky.", ["leave", "ground", "leave", "sky"]),
        ("Trees line the street; a man watches the sea.", ["tree", "street", "man", "sea"]),
        ("They drink juice. A watch, two watches.", ["juice", "watch", "watch"]),
        ("With boats the people ... feeding ducks the bread", ["boat", "people", "duck", "bread"]),
    ],
)
def test_the_lexicon_leaves_out_plain_verbs(text, found):
    vocabulary = (
        "dog can cola bird door opener house train leave ground sky tree line street man watch sea "
        "drink juice boat people duck bread"
    )
    assert nouns.make("lexicon", vocabulary.split()).nouns(text) == found


class Doc:
    """What spaCy gives, as far as it is used: similarity by a given vector."""

    def __init__(self, vector):
        self.vector = vector

    def similarity(self, other):
        if not any(self.vector) or not any(other.vector):
            warnings.warn("[W008] Evaluating Doc.similarity based on empty vectors.", stacklevel=2)
            return 0.0
        return sum(a * b for a, b in zip(self.vector, other.vector, strict=True))


class Pipeline:
    """A stand-in for spaCy's en_core_web_lg, whose vectors are these; all others are empty."""

    def __init__(self, vectors, rows=342_918, name="core_web_lg", width=300):
        self.vectors, self.asked = vectors, []
        self.meta = {"lang": "en", "name": name, "version": "3.8.0"}
        table = types.SimpleNamespace(shape=(rows, width), n_keys=684_830)
        self.vocab = types.SimpleNamespace(vectors=table)

    def make_doc(self, word):
        self.asked.append(word)
        return Doc(self.vectors.get(word, (0.0, 0.0)))


def with_spacy(monkeypatch, load):
    spacy = types.ModuleType("spacy")
    spacy.load = load
    monkeypatch.setitem(sys.modules, "spacy", spacy)


def refuse(problem):
    def load(_):
        raise problem

    return load


def test_similarity_is_computed_once_for_each_pair_and_read_from_a_table():
    pipeline = Pipeline(
        {"sea": (1.0, 0.0), "ocean": (0.9, 0.436), "lake": (0.6, 0.8), "dog": (0.0, 1.0)}
    )
    words = [*pipeline.vectors, "doghole"]  # which has no vector
    table = vectors.similar_words(pipeline, words)
    assert sorted(pipeline.asked) == sorted(words), "each word is looked up once"
    assert table["sea"] == {"sea", "ocean"}
    assert table["lake"] == {"lake", "ocean"}  # 0.9 * 0.6 + 0.436 * 0.8 = 0.889
    assert table["dog"] == {"dog"}  # 0.8 itself is not above 0.8
    assert table["doghole"] == set()


def test_spacy_is_said_to_be_missing_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(MissingDependencyError, match=r"imported .*: pip install .*'spacy>="):
        vectors.load()


@pytest.mark.parametrize(
    "problem",
    [OSError("[E050] Can't find model"), ValueError("numpy.dtype size changed"), KeyError("x")],
    ids=lambda problem: type(problem).__name__,
)
def test_a_model_that_cannot_be_loaded_is_one_line(problem, monkeypatch):
    with_spacy(monkeypatch, refuse(problem))
    with pytest.raises(MissingDependencyError) as caught:
        vectors.load()
    assert "python -m spacy download en_core_web_lg; or use --extractor lexicon" in str(
        caught.value
    )


@pytest.mark.parametrize("problem", ["ValueError('numpy.dtype size changed')", "SystemError('x')"])
def test_a_spacy_that_cannot_be_imported_is_one_line(problem, tmp_path, monkeypatch):
    (tmp_path / "spacy.py").write_text(f"raise {problem}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "spacy", raising=False)
    with pytest.raises(MissingDependencyError, match=r"cannot be imported \((Value|System)Error"):
        vectors.load()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 20_000}, "en_core_web_lg 3.8.0 with 20,000 vectors of 300 numbers"),
        ({"name": "core_web_md"}, "en_core_web_md 3.8.0 with 342,918 vectors"),
        ({"width": 96}, "342,918 vectors of 96 numbers"),
        ({"rows": 0, "width": 0}, "0 vectors of 0 numbers"),
    ],
    ids=str,
)
def test_another_model_by_that_name_is_refused(changes, said, monkeypatch):
    """A folder of that name in the working directory is loaded as readily."""
    with_spacy(monkeypatch, lambda _: Pipeline({}, **changes))
    with pytest.raises(MissingDependencyError, match=said):
        vectors.load()


@pytest.fixture
def official(tmp_path, monkeypatch):
    """nltk with data of a few words, and a stand-in for spaCy."""
    folder = nltk_data.write(
        tmp_path / "nltk_data",
        tags={"run": "VB", "dog": "NN", "cats": "NNS", "boats": "NNS"},
        lemmas={"noun": ["dog", "cat", "boat", "run"]},
    )
    with_spacy(monkeypatch, lambda _: Pipeline({"dog": (1.0, 0.0), "cat": (1.0, 0.0)}))
    with nltk_data.used(folder):
        yield folder


def test_the_official_extractor_is_nltk_and_spacy(official):
    extractor = nouns.make("official", {"dog", "cat", "run"})
    # A verb is not a noun, and boat is not in the vocabulary.
    assert extractor.nouns("dog cats run boats") == ["dog", "cat"]
    assert extractor.similar("dog") == {"dog", "cat"}
    assert extractor.name == "official"
    assert extractor.facts == {
        **{"name": "en_core_web_lg", "version": "3.8.0"},
        **{"keys": 684_830, "vectors": 342_918, "width": 300},
    }


def test_the_report_names_the_model_of_the_official_extractor(official, tmp_path, vlmdpo):
    described = questions.read(evaluation.FOLDER).descriptions[0]
    (tmp_path / "a.json").write_text(json.dumps([{"id": described.id, "response": "A dog."}]))
    code, out, _ = vlmdpo(
        *("eval-amber", "--extractor", "official", "--answers", tmp_path / "a.json", "--json")
    )
    assert code == 0
    report = json.loads(out)
    assert report["scores"]["base"]["Generative"]["extractor"] == "official"
    assert report["extractor_model"]["vectors"] == 342_918


def test_nothing_is_asked_where_the_extractor_cannot_work(official, vlmdpo, monkeypatch):
    (official / "corpora" / "wordnet" / "index.noun").unlink()
    monkeypatch.setattr(
        "vlmdpo.commands.eval_amber.ask_and_report", lambda *_: pytest.fail("it asked")
    )
    code, out, err = vlmdpo("eval-amber", "--extractor", "official")
    assert (code, out) == (6, "")
    assert "--extractor official needs nltk's data 'wordnet'" in err
    assert "--extractor lexicon" in err
    assert "Traceback" not in err


def test_embedded_descriptions_are_scored_by_their_scenes(tmp_path, vlmdpo):
    benchmark = questions.read(evaluation.FOLDER)
    responses = [
        {
            "id": d.id,
            "response": "There is "
            + " and ".join(f"a {word}" for word in (*d.truth, *d.hallu))
            + ".",
        }
        for d in benchmark.descriptions
    ]
    (tmp_path / "a.json").write_text(json.dumps(responses))
    code, out, _ = vlmdpo("eval-amber", "--answers", tmp_path / "a.json", "--json")
    assert code == 0
    report = json.loads(out)
    with_hallu = sum(bool(d.hallu) for d in benchmark.descriptions)
    named = sum(len(d.truth) + len(d.hallu) for d in benchmark.descriptions)
    figures = report["scores"]["base"]["Generative"]
    assert figures["extractor"] == "lexicon"
    assert (figures["cover"], figures["cog"]) == (100.0, 100.0)
    assert figures["hal"] == pytest.approx(with_hallu, abs=0.11)
    assert figures["chair"] == pytest.approx(
        100 * sum(len(d.hallu) for d in benchmark.descriptions) / named, abs=0.06
    )
    assert report["coverage"] == 1.0
    assert "Discriminative" not in report["scores"]["base"]
