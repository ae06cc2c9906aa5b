"""The tokenizer and chat template of the small random models: a token is a byte of text."""

from __future__ import annotations

import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# "IMAGE" is replaced by what stands for an image in a family's prompts.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% "
    "endfor %}{{ eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_tokenizer(*special: str, **named: str) -> tf.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges.

    Args:
        special: its special tokens, after <s>, </s> and <pad>.
        named: those of them that are attributes too, by attribute.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<pad>", *special]
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={
            **named,
            **{
                f"special_{i}": name for i, name in enumerate(special) if name not in named.values()
            },
        },
    )


def token_ids(tokenizer: tf.PreTrainedTokenizerFast, *names: str) -> list[int]:
    """The ids of these special tokens."""
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(names))
    return ids
