"""The smallest data that nltk's own tokenizer, tagger and lemmatizer work with."""

import contextlib
import gc
import json
import warnings

import pytest

_POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


def write(folder, *, tags, lemmas, exceptions=()):
    """nltk's data folder with these words.

    Args:
        tags: by word, its tag; all others are nouns.
        lemmas: by "noun", "verb", "adj" or "adv", what WordNet knows.
        exceptions: by the same, {form: lemma}.
    """
    punkt = folder / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("st\n" if name == "abbrev_types.txt" else "")
    name = "averaged_perceptron_tagger_eng"
    tagger = folder / "taggers" / name
    tagger.mkdir(parents=True)
    parts = {
        "weights": {"bias": {"NN": 1.0}},
        "tagdict": tags,
        "classes": sorted({"NN", *tags.values()}),
    }
    for part, content in parts.items():
        (tagger / f"{name}.{part}.json").write_text(json.dumps(content))
    wordnet = folder / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    for name in ("cntlist.rev", "index.sense"):
        (wordnet / name).write_text("")
    (wordnet / "lexnames").write_text("00\tadj.all\t3\n")
    for part, letter in _POS.items():
        known = "".join(f"{word} {letter} 1 0 1 0 00000001\n" for word in lemmas.get(part, ()))
        (wordnet / f"index.{part}").write_text(known)
        (wordnet / f"data.{part}").write_text("  1 WordNet 3.0 Copyright\n")
        odd = dict(exceptions).get(part, {})
        (wordnet / f"{part}.exc").write_text("".join(f"{f} {w}\n" for f, w in odd.items()))
    return folder


@contextlib.contextmanager
def used(folder):
    """Let nltk find only this folder, and forget what it has loaded."""
    import nltk
    from nltk.corpus import CorpusReader, LazyCorpusLoader, WordNetCorpusReader

    omw = LazyCorpusLoader("omw-1.4", CorpusReader, r".*/wn-data-.*\.tab", encoding="utf8")
    wordnet = LazyCorpusLoader("wordnet", WordNetCorpusReader, omw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # nltk never closes WordNet's files
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nltk.data, "path", [str(folder)])
            patch.setattr(nltk.corpus, "wordnet", wordnet)
            _forget_tokenizer(nltk)
            yield
        _forget_tokenizer(nltk)
        del wordnet
        gc.collect()


def _forget_tokenizer(nltk):
    kept = getattr(nltk.tokenize, "_get_punkt_tokenizer", None)
    if kept is not None:  # not before nltk 3.9.2
        kept.cache_clear()
