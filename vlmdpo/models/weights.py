"""Does a model have the weights that its files promise? Asked of every model that is loaded.

transformers fills what a file lacks with random values, and only logs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmdpo import ui
from vlmdpo.errors import ModelError

_NAMED = 3  # weights that a message names
# Weights that published checkpoints hold beside the model, and that its class leaves out on
# purpose: buffers of older versions, heads that predict several tokens at once, the pooling head of
# a vision tower, and the parts that hear or speak.
_LEFT_OUT = re.compile(
    r"(inv_freq|position_ids|num_batches_tracked|masked_bias)$"
    r"|(^|\.)(mtp|nextn|eagle)\w*\."
    r"|vision\w*(\.\w+)*\.(head|post_layernorm|pooler)\."
    r"|(^|\.)(audio\w*|embed_audio|talker|token2wav|tts)\."
)
Mismatch = tuple[str, Iterable[int], Iterable[int]]  # name, shape in the file, shape in the model


def check_complete(loaded: Mapping[str, Any], model: str) -> None:
    """Raise ModelError unless the files held just the weights that the model has.

    Args:
        loaded: `from_pretrained`'s loading info. Tied weights, and what a class declares as not
            saved, are not in it.
        model: as `--model` names it.
    """
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"--model: the files of '{model}' lack {_count(missing)} that its config.json promises "
            f"({_named(missing)}), which would be random; get a complete copy"
        )
    mismatched: list[Mismatch] = sorted(loaded["mismatched_keys"], key=lambda one: one[0])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise ModelError(
            f"--model: the files of '{model}' do not fit its config.json in {_count(mismatched)}: "
            f"{name} is {_shape(found)} in the file and {_shape(wanted)} by the configuration; get "
            "both from the same revision"
        )
    unexpected = sorted(name for name in loaded["unexpected_keys"] if not _LEFT_OUT.search(name))
    if unexpected:
        raise ModelError(
            f"--model: the files of '{model}' hold {_count(unexpected)} that its config.json has "
            f"no place for ({_named(unexpected)}); get both from the same revision, or upgrade "
            "transformers"
        )


def non_finite(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the weights that hold NaN or infinity; weights in integers hold neither."""
    finite = []
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel() and weight.element_size() > 1:
            # Needs no copy of the weight, as `isfinite` does.
            least, most = torch.aminmax(weight.detach())
            finite.append((name, least.isfinite() & most.isfinite()))
    return [name for name, flag in finite if not flag]  # read last, because a GPU is waited for


def check_finite(weights: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise ModelError for weights that hold NaN or infinity.

    Args:
        what: what they belong to, and its option, as in "--model: 'tiny'".
    """
    bad = non_finite(weights)
    if bad:
        raise ModelError(
            f"{what} holds NaN or infinity in {_count(bad)} ({_named(bad)}), so every answer would "
            "be noise; get the files again, or take an earlier checkpoint"
        )


def _count(names: list[Any]) -> str:
    return ui.count(len(names), "weight")


def _named(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes)) or "a number"
