"""What a model and a processor are, as a hash of all that they hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch


def weights_digest(model: Any) -> str:
    """SHA-256 over names and bytes of every weight and buffer: reads all of them once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def processor_digest(processor: Any) -> str:
    """SHA-256 over all that turns a row into ids and pixels: settings, chat template, tokenizer."""
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
