"""How far a model leans to Yes: the log-odds of its answer's first token.

A token says Yes or No if that word, in any case, is all it holds besides white space, quotes and
the like (" Yes", "no", "**No"). Where a tokenizer has no such token, the first piece of the word
counts ("Y"), which other words may begin with too. An answer's first token is the first one that
is not blank: some models begin with a line break or a quote.

Shapes: K active answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from vlmdpo.engine.leaves import Leaf
from vlmdpo.engine.next_token import TokenChooser
from vlmdpo.engine.sampling import GREEDY
from vlmdpo.errors import ModelError

# What may stand around an answer's first word: the marks of `benchmarks.verdict`, held to them by a
# test.
MARKS = " \t\r\n\"'`*_([“”‘’«»-–—•"
_BEHIND = ".,:;!)]"
MOST_BLANKS = 4  # tokens before the first word, after which an answer has none


@dataclass(frozen=True)
class YesNoTokens:
    """Token ids of one tokenizer.

    Attributes:
        yes, no: those that an answer Yes or No begins with.
        blank: those that hold no more than white space and quotes.
    """

    yes: list[int]
    no: list[int]
    blank: frozenset[int]


def is_blank(text: str) -> bool:
    """Whether a text has not begun a word."""
    return not text.strip(MARKS)


def yes_no_tokens(tokenizer: PreTrainedTokenizerBase) -> YesNoTokens:
    """Look through a tokenizer's vocabulary. Raises ModelError where it cannot spell both words."""
    ids = [[number] for number in range(len(tokenizer))]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    blank = frozenset(number for number, text in enumerate(texts) if is_blank(text))
    words = [text.lstrip(MARKS).rstrip(MARKS + _BEHIND).casefold() for text in texts]
    yes, no = (
        [number for number, own in enumerate(words) if own == word]
        or _first_pieces(tokenizer, word, blank)
        for word in ("yes", "no")
    )
    if not yes or not no or set(yes) & set(no):
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokens for Yes and No, so their odds cannot be read"
        )
    return YesNoTokens(yes, no, blank)


def _first_pieces(
    tokenizer: PreTrainedTokenizerBase, word: str, blank: frozenset[int]
) -> list[int]:
    """The first token that is not blank, of each spelling of a word."""
    found = set()
    for spelling in (word, word.capitalize(), word.upper()):
        for text in (spelling, f" {spelling}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found |= set([token for token in ids if token not in blank][:1])
    return sorted(found - {tokenizer.unk_token_id})


class YesNoReader(TokenChooser):
    """Chooses greedily, and keeps the log-odds of Yes against No at each answer's first word."""

    def __init__(self, config: GenerationConfig, tokens: YesNoTokens) -> None:
        super().__init__(config, GREEDY)
        self._tokens = tokens
        self._log_odds: dict[int, float] = {}
        self._settled: set[int] = set()

    @property
    def is_plain_greedy(self) -> bool:
        return False  # `generate` alone would not read the scores

    def choose(self, leaves: Sequence[Leaf], scores_KV: Tensor) -> list[int]:
        yes, no = (
            scores_KV[:, torch.tensor(ids, device=scores_KV.device)].logsumexp(dim=-1)
            for ids in (self._tokens.yes, self._tokens.no)
        )
        tokens = super().choose(leaves, scores_KV)
        for leaf, token, log_odds in zip(leaves, tokens, (yes - no).tolist(), strict=True):
            if id(leaf) not in self._settled:
                self._log_odds[id(leaf)] = log_odds
                if token not in self._tokens.blank:
                    self._settled.add(id(leaf))
        return tokens

    def log_odds(self, leaf: Leaf) -> float:
        """Of Yes against No, natural logarithm."""
        return self._log_odds[id(leaf)]
