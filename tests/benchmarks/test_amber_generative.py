"""AMBER's generative scores against a second implementation, and the two noun extractors."""

import json
import random
import sys
import types

import pytest

from vlmdpo.benchmarks.amber import generative as gen
from vlmdpo.benchmarks.amber import nouns, questions
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


def test_the_official_extractor_says_how_to_get_it(monkeypatch, vlmdpo):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nltk>=.*' 'spacy>="):
        nouns.make("official", {"dog"})
    code, out, err = vlmdpo("eval-amber", "--extractor", "official")
    assert (code, out) == (6, "")
    assert "python -m spacy download en_core_web_lg" in err


class Doc:
    """What spaCy gives, as far as it is used: similarity by a given vector."""

    def __init__(self, vector):
        self.vector = vector

    def similarity(self, other):
        return sum(a * b for a, b in zip(self.vector, other.vector, strict=True))


def test_similarity_is_computed_once_for_each_pair_and_read_from_a_table():
    vectors = {"sea": (1.0, 0.0), "ocean": (0.9, 0.436), "lake": (0.6, 0.8), "dog": (0.0, 1.0)}
    asked = []

    class Pipeline:
        def make_doc(self, word):
            asked.append(word)
            return Doc(vectors[word])

    table = nouns.similar_words(Pipeline(), vectors)
    assert sorted(asked) == sorted(vectors), "each word is looked up once"
    assert table["sea"] == {"sea", "ocean"}
    assert table["lake"] == {"lake", "ocean"}  # 0.9 * 0.6 + 0.436 * 0.8 = 0.889
    assert table["dog"] == {"dog"}  # 0.8 itself is not above 0.8


def test_the_official_extractor_is_nltk_and_spacy(monkeypatch):
    nltk = types.ModuleType("nltk")
    nltk.data = types.SimpleNamespace(find=lambda path: path)
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [
        (word, "NNS" if word.endswith("s") else "NN" if word == "dog" else "VB") for word in words
    ]
    stem = types.ModuleType("nltk.stem")
    stem.WordNetLemmatizer = lambda: types.SimpleNamespace(
        lemmatize=lambda word: word.removesuffix("s")
    )
    spacy = types.ModuleType("spacy")
    spacy.load = lambda name: types.SimpleNamespace(
        make_doc=lambda word: Doc((float(name == "en_core_web_lg"),))
    )
    for name, module in (("nltk", nltk), ("nltk.stem", stem), ("spacy", spacy)):
        monkeypatch.setitem(sys.modules, name, module)
    extractor = nouns.make("official", {"dog", "cat", "run"})
    assert extractor.nouns("dog cats run boats") == [
        "dog",
        "cat",
    ]  # a verb is no noun, and boat is not in the vocabulary
    assert extractor.similar("dog") == {"dog", "cat", "run"}
    assert extractor.name == "official"


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
