"""Texts that already hold a chat template or an end token, as some published data do.

The model's own template is put around them, so that both would be trained. What certainly is a
template is removed; what only looks like one is noted. This module knows nothing of models.
"""

from __future__ import annotations

import re

END_TOKENS = (
    *("</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<|end|>", "<|eot|>", "<|return|>"),
)
# How published templates begin a question and its answer.
_TURNS = (
    ("USER:", "ASSISTANT:"),
    ("Human:", "Assistant:"),
    ("User:", "Assistant:"),
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("<start_of_turn>user", "<start_of_turn>model"),
    ("<|start_header_id|>user<|end_header_id|>", "<|start_header_id|>assistant<|end_header_id|>"),
    ("<|user|>", "<|assistant|>"),
    ("[INST]", "[/INST]"),
)
# What stands before the question: begin tokens, Vicuna's and ChatML's usual system messages.
_PREAMBLE = re.compile(
    r"(?:\s|#|<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|A chat between an? .{0,300}?\."
    r"|The assistant gives .{0,300}?\.|<\|im_start\|>system\s+You are a helpful assistant\.?"
    r"<\|im_end\|>)*",
    re.DOTALL,
)
_LONGEST_PREAMBLE = 600  # characters
_MARKS = ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "[/INST]", "<|assistant|>")
_PLAIN_ENDS = ("ASSISTANT:", "Assistant:")


def without_end_tokens(answer: str) -> tuple[str, list[str]]:
    """An answer without the end tokens at its end, and the names of what was changed or noted."""
    text = answer.rstrip()
    while (end := next((one for one in END_TOKENS if text.endswith(one)), None)) is not None:
        if end == "</s>" and "<s>" in text:  # HTML for text that is struck out
            break
        text = text[: -len(end)].rstrip()
    return (text, ["end_token_removed"]) if len(text) < len(answer.rstrip()) else (answer, [])


def without_template(question: str) -> tuple[str, list[str]]:
    """A user's text without a template around it, and the names of what was changed or noted.

    It is removed where it is one question from its mark to that of the answer, behind nothing but
    a usual preamble.
    """
    text = question.rstrip()
    for asks, answers in _TURNS:
        if not text.endswith(answers) or text.count(asks) != 1 or text.count(answers) != 1:
            continue
        before, _, rest = text.partition(asks)
        asked, _ = without_end_tokens(rest[: -len(answers)].rstrip().removesuffix("###"))
        if len(before) <= _LONGEST_PREAMBLE and _PREAMBLE.fullmatch(before):
            return asked.strip(), ["template_removed"]
    return question, ["template_in_prompt"] if _looks_like_template(text) else []


def _looks_like_template(text: str) -> bool:
    first = text.find("USER:")
    is_vicuna = first >= 0 and text.find("ASSISTANT:", first) >= 0
    return is_vicuna or text.endswith(_PLAIN_ENDS) or any(mark in text for mark in _MARKS)
