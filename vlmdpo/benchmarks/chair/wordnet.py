"""OPERA's scorer, from which most articles on vision-language models have their figures."""

from __future__ import annotations

from vlmdpo.benchmarks import nltk_data
from vlmdpo.benchmarks.chair import words
from vlmdpo.benchmarks.chair.mentions import Scorer

# WordNet's part of speech for the first letter of a tag; others count as nouns.
_PARTS = {"J": "a", "V": "v", "N": "n", "R": "r"}


def make() -> Scorer:
    """The scorer "wordnet". Raises MissingDependencyError where nltk's data cannot be used."""
    tools = nltk_data.load("--scorer wordnet", instead="--scorer pattern")

    def lemmas(caption: str) -> list[str]:
        tagged = tools.tag(tools.tokenize(caption.lower()))
        return [tools.lemma(word, _PARTS.get(tag[:1], "n")) for word, tag in tagged]

    return Scorer(
        "wordnet",
        "OPERA's rules: nltk's part of speech, and WordNet's lemma for it "
        f"(nltk {tools.facts['nltk']}, WordNet {tools.facts['WordNet']})",
        lemmas,
        words.load(),
        tools.facts,
    )
