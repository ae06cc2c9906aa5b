"""How many tokens a training computes, beside those that stock TRL would.

Tokens are counted without padding. "Stock" is what TRL's rows would hold: each prompt, images
included, with each of its answers. "Run" is what the engine computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tokens:
    """Tokens of stock rows, and tokens that run in their place."""

    stock: int
    run: int

    @property
    def words(self) -> str:
        """As in "60 tokens where stock rows hold 100 (40% fewer)"."""
        fewer = 100 * (1 - self.run / max(1, self.stock))
        saved = f" ({fewer:.0f}% fewer)" if self.run < self.stock else ""
        return f"{self.run:,} tokens where stock rows hold {self.stock:,}{saved}"


class TokenCount:
    """Counts the tokens of the batches that run in this process."""

    def __init__(self) -> None:
        self.stock = self.run = 0
        self._in_rows: Any = 0  # of engines that share nothing; on the device until it is read

    def add(self, batches: Iterable[dict[str, Any]]) -> None:
        """Count these batches, without waiting for the device."""
        from vlmdpo.engine.batch import batch_tokens

        for batch in batches:
            tokens = batch_tokens(batch)
            if tokens is None:
                self._in_rows = self._in_rows + batch["attention_mask"].sum()
            else:
                self.stock += tokens[0]
                self.run += tokens[1]

    def here(self) -> Tokens:
        """The tokens of this process."""
        in_rows = int(self._in_rows)
        return Tokens(self.stock + in_rows, self.run + in_rows)

    def total(self) -> Tokens:
        """The tokens of all processes, which must all call this."""
        from accelerate.utils import gather_object

        own = self.here()
        parts = gather_object([(own.stock, own.run)])
        return Tokens(*(sum(column) for column in zip(*parts, strict=True)))
