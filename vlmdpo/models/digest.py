"""Hashes that say whether two models, processors or files are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from vlmdpo.models.protocols import Module, Processor


def weights_digest(model: Module) -> str:
    """SHA-256 over names and bytes of every weight and buffer: reads all of them once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def processor_digest(processor: Processor) -> str:
    """SHA-256 over all that turns a row into ids and pixels.

    That is settings, chat template and tokenizer.
    """
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
        processor.chat_template,
        vocabulary,
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
