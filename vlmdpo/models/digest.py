"""Hashes that say whether two models, processors or files are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vlmdpo.models.protocols import Module, Processor
from vlmdpo.models.rendering import rendering_of

_WORDS = 2**22  # words of 8 bytes hashed at a time: enough to keep a GPU busy
# Odd 64-bit constants of splitmix64 and of xxHash, as signed numbers.
_STEP, _MIX_1, _MIX_2, _SEED = (
    value - 2**64
    for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xC2B2AE3D27D4EB4F)
)


def weights_digest(model: Module) -> str:
    """A hash over names and bytes of every weight and buffer, computed where the weights are.

    Copying 17 GB from a GPU to hash them would take half a minute. On a GPU it is another hash than
    on a CPU, of 128 bits; what was computed on one is not for the other anyway.
    """
    return tensors_digest(sorted(model.state_dict().items()))


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """The same over any tensors, each with a name, in the order given."""
    digest = hashlib.sha256()
    sums = []
    for name, tensor in named:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)};".encode())
        if _is_in_memory(tensor):
            plain = tensor.detach().contiguous().flatten().view(torch.uint8)
            digest.update(plain.numpy().data if plain.numel() else b"")
        else:
            sums.append(_checksum(tensor.detach()))
    # All at once: each copy from a GPU waits for it.
    digest.update(torch.stack([one.cpu() for one in sums]).numpy().tobytes() if sums else b"")
    return digest.hexdigest()


def _is_in_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _checksum(tensor: Tensor) -> Tensor:
    """(2,) int64: two sums over the words of a tensor's bytes, each mixed with its place.

    Integers wrap around, so the order of summation does not matter, nor does the device.
    """
    data = tensor.contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 8 * 8
    tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
    tail[: data.numel() - whole] = data[whole:]
    total = _sums(tail.view(torch.int64), -1)
    if whole:
        # A view in a larger file may begin anywhere; words must begin at multiples of their size.
        body = data[:whole]
        aligned = body if body.data_ptr() % 8 == 0 else body.clone()
        for number, words in enumerate(aligned.view(torch.int64).split(_WORDS)):
            total += _sums(words, number * _WORDS)
    return total


def _sums(words: Tensor, start: int) -> Tensor:
    """(2,) the sums of splitmix64's mix of each word and its place, for two seeds."""
    place = torch.arange(start, start + len(words), device=words.device).mul_(_STEP)
    return torch.stack([_mixed(words ^ (place + seed)).sum() for seed in (0, _SEED)])


def _mixed(words: Tensor) -> Tensor:
    """splitmix64's finalizer, in place: every bit of a word changes half of the result's."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)  # the shift is arithmetic
        words *= factor
    words ^= (words >> 31) & (2**33 - 1)
    return words


def processor_digest(processor: Processor, *, dated: bool = True) -> str:
    """SHA-256 over all that turns a row into ids and pixels.

    That is settings, tokenizer, and how the chat template renders a conversation.

    Args:
        dated: whether the date counts that a template writes into prompts.
    """
    rendering = rendering_of(processor)
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    settings = [
        processor.to_dict(),
        processor.image_processor.to_dict(),
        rendering.template if dated else rendering.shipped,
        rendering.sentinel if dated else rendering.undated_sentinel,
        vocabulary,
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
