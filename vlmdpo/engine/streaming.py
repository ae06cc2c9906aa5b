"""One answer as text while it is generated.

Shapes: B rows (one), S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from vlmdpo.models.protocols import Processor

_INCOMPLETE = "�"  # what a tokenizer makes of the first bytes of a character


class TextStreamer(BaseStreamer):
    """Hands each new piece of an answer to `show`, special tokens left out."""

    def __init__(self, processor: Processor, show: Callable[[str], None]) -> None:
        self._processor, self._show = processor, show
        self._seen_prompt = False
        self._ids: list[int] = []
        self._shown = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, S), then each step's token (1,)."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self._ids += value.reshape(-1).tolist()
        text = self._processor.tokenizer.decode(self._ids, skip_special_tokens=True).lstrip()
        # White space waits for what follows it, since answers are stripped.
        text = text.rstrip()
        if not text.endswith(_INCOMPLETE):
            self._show_up_to(text)

    def end(self) -> None:
        """Show what was held back."""
        text = self._processor.tokenizer.decode(self._ids, skip_special_tokens=True).strip()
        self._show_up_to(text)

    def _show_up_to(self, text: str) -> None:
        if text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text
