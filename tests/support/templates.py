"""Chat templates of the kinds that are published, each in the words of a small family's tokenizer.

`IMAGE` is replaced by what stands for an image in a family's prompts.
"""

import re

_PARTS = (
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
_TURNS = "{% for message in messages %}"
_END = "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


def _turn(content: str, end: str = "{{ eos_token + '\\n' }}") -> str:
    return "{{ message['role'] + ': ' }}" + content + end


PARTS = _TURNS + _turn(_PARTS) + _END
# Content is a text wherever it holds no image: the answers' lists would be spelled out.
PLAIN_ANSWERS = (
    _TURNS
    + "{% if message['role'] == 'user' %}"
    + _turn(_PARTS)
    + "{% else %}"
    + _turn("{{ message['content'] }}")
    + "{% endif %}"
    + _END
)
# Content is always a text, and an image a mark in it.
PLAIN = _TURNS + _turn("{{ message['content'] | trim }}") + _END
# Concatenation raises TypeError for a list.
CONCATENATED = (
    _TURNS + "{{ message['role'] + ': ' + message['content'] + eos_token + '\\n' }}" + _END
)
NO_END = _TURNS + _turn(_PARTS, "{{ ' ' }}") + _END
# The generation prompt opens what a finished answer has no room for.
EXTRA_IN_PROMPT = (
    _TURNS
    + _turn(_PARTS)
    + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: <channel>final\\n' }}{% endif %}"
)
# A header stands before finished answers that the generation prompt leaves to the model.
HEADER_IN_ANSWER = (
    _TURNS
    + "{% if message['role'] == 'assistant' %}"
    + _turn("{{ '<think>\\n\\n</think>\\n\\n' }}" + _PARTS)
    + "{% else %}"
    + _turn(_PARTS)
    + "{% endif %}"
    + _END
)
LINE_BREAK = _TURNS + _turn(_PARTS) + _END.replace("'assistant: '", "'assistant:'")
THINKING = (
    _TURNS
    + _turn(_PARTS)
    + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}"
    + "{% if enable_thinking is defined and enable_thinking is false %}"
    + "{{ '<think>\\n\\n</think>\\n\\n' }}{% else %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)
ALWAYS_THINKS = (
    _TURNS
    + _turn(_PARTS)
    + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: <think>\\n' }}{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\\n' }}" + PARTS
OWN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ 'system: You are helpful.' + eos_token + '\\n' }}"
    "{% endif %}" + PARTS
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + PARTS
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    + PARTS
)
STRIPPED = PARTS.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
DROPS_IMAGES = PARTS.replace("IMAGE", "")

KINDS = {
    "parts": PARTS,
    "plain answers": PLAIN_ANSWERS,
    "plain": PLAIN,
    "concatenated": CONCATENATED,
    "no end": NO_END,
    "extra in prompt": EXTRA_IN_PROMPT,
    "header in answer": HEADER_IN_ANSWER,
    "line break": LINE_BREAK,
    "thinking": THINKING,
    "always thinks": ALWAYS_THINKS,
    "dated": DATED,
    "own system": OWN_SYSTEM,
    "no system": NO_SYSTEM,
    "stripped": STRIPPED,
}


def of_family(kind: str, own: str | None) -> str:
    """A template of this kind for a small family whose own one is `own`."""
    place = re.search(r"== 'image' %}{{ '(.*?)' }}", own or "{% if x == 'image' %}{{ '<image>' }}")
    assert place is not None
    return KINDS[kind].replace("IMAGE", place.group(1))
