"""How answers are chosen: the likeliest token at each step, or drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Settings of `generate`.

    Attributes:
        temperature: 0 for greedy answers; else what logits are divided by.
        top_p: tokens are drawn from the likeliest that together have this probability.
        count: answers to each question.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    count: int = 1
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        if self.is_greedy:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,  # transformers' default of 50 would cut what --top-p keeps
            "num_beams": 1,  # a draw is no search
            "num_return_sequences": self.count,
        }

    @property
    def answers(self) -> int:
        """Answers to each question: greedy ones would all be the same."""
        return 1 if self.is_greedy else self.count

    def seed_of(self, asked: Sequence[object]) -> int:
        """The seed of draws: the same in every process, and another for whatever else is asked."""
        text = repr((self.seed, list(asked)))
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big")


GREEDY = Sampling()


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        text: stripped of special tokens and white space.
        tokens: its length, without its end token.
        finished: whether it ended by itself, rather than at the limit of new tokens.
    """

    text: str
    tokens: int
    finished: bool
