"""What the rows of a run have in common, and the tokens that computing it once saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmdpo import ui
from vlmdpo.data.groups import NO_IMAGES, RowGroups
from vlmdpo.data.pairs import TokenCounts
from vlmdpo.training.token_count import Tokens


@dataclass(frozen=True)
class Sharing:
    """What the training rows have in common.

    Attributes:
        images, prompts, answers: how many different ones there are. Several images of a row count
            as one, and equal answers to different prompts as different.
        is_grouped: whether rows of one image train together.
        epoch: tokens of the first epoch; None if the rows' tokens are not known beforehand.
    """

    pairs: int
    images: int
    prompts: int
    answers: int
    is_grouped: bool
    epoch: Tokens | None

    @property
    def sentence(self) -> str:
        """For the screen and for pages."""
        found = (
            f"{ui.count(self.pairs, 'pair')} {'has' if self.pairs == 1 else 'have'} "
            f"{ui.count(self.images, 'image')}, {ui.count(self.prompts, 'prompt')} and "
            f"{ui.count(self.answers, 'answer')}"
        )
        if self.epoch is None:
            return found
        grouped = ", with rows of one image grouped," if self.is_grouped else ""
        return f"{found}; the first epoch{grouped} computes {self.epoch.words}"


@dataclass(frozen=True)
class SharedRows:
    """Rows with what they share, to count tokens by.

    Words that different prompts begin with, besides images, count for each of them, though they too
    may be shared.

    Attributes:
        groups: of images and prompts.
        answers: numbers of chosen and rejected answer, equal for equal answers of a prompt.
        counts: tokens.
        share_images: whether different prompts can share their images.
        with_copies: whether each row's chosen answer is also computed with a corrupted copy of its
            images, as mDPO does; copies of the same images are the same.
    """

    groups: RowGroups
    answers: Sequence[tuple[int, int]]
    counts: Sequence[TokenCounts]
    share_images: bool = True
    with_copies: bool = False

    def tokens(self, order: Sequence[int], batch_size: int | None) -> Tokens:
        """Tokens of these rows in forward passes of `batch_size`; None if nothing is shared."""
        stock = sum(map(self._stock, order))
        if batch_size is None:
            return Tokens(stock, stock)
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        return Tokens(stock, sum(map(self.run_tokens, batches)))

    def _stock(self, row: int) -> int:
        counts = self.counts[row]
        tokens = 2 * counts.prompt + counts.chosen + counts.rejected
        return tokens + counts.prompt + counts.chosen if self.with_copies else tokens

    def run_tokens(self, rows: Sequence[int]) -> int:
        """Tokens that one forward pass runs: images, prompts and answers each once."""
        answers = {self.answers[row][0]: self.counts[row].chosen for row in rows}
        answers |= {self.answers[row][1]: self.counts[row].rejected for row in rows}
        tokens = self._prompts(rows) + sum(answers.values())
        if not self.with_copies:
            return tokens
        copies = [row for row in rows if self.groups.images[row] != NO_IMAGES]
        chosen = {self.answers[row][0]: self.counts[row].chosen for row in copies}
        return tokens + self._prompts(copies) + sum(chosen.values())

    def _prompts(self, rows: Sequence[int]) -> int:
        """Tokens of the prompts and images of one forward pass."""
        of_image = self.groups.images if self.share_images else self.groups.prompts
        images = {of_image[row]: self.counts[row].images for row in rows if self.counts[row].images}
        prompts = {
            self.groups.prompts[row]: self.counts[row].prompt - self.counts[row].images
            for row in rows
        }
        return sum(images.values()) + sum(prompts.values())
