"""The memory of weights, reference, gradients and optimizer: pure arithmetic on counts of parameters.

Says nothing of activations, the framework's own memory or fragmentation, and touches no model.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Component:
    """One line of the table: its name, size in bytes, and the calculation in words."""

    name: str
    bytes: int
    formula: str


def components(parameters: int, trainable: int, dtype: str, *, lora: bool) -> list[Component]:
    """The article's N×P table, exactly: weights, reference, gradients, AdamW's two moments.

    With LoRA the base weights are counted without the adapter, as the article counts them; everything is in `dtype`.
    """
    width = DTYPE_BYTES[dtype]
    grads = trainable if lora else parameters
    return [
        Component("Model to train", parameters * width, f"{parameters:,} × {width}"),
        Component("Reference model", parameters * width, f"{parameters:,} × {width}"),
        Component("Gradients", grads * width, f"{grads:,} × {width}"),
        Component("Optimizer states", 2 * grads * width, f"2 × {grads:,} × {width}"),
    ]


def as_in_article(parameters: int, trainable: int, dtype: str, *, lora: bool) -> list[tuple[str, float, str]]:
    """The same table with the article's rounding: (name, GB, calculation).

    The article counts in whole billions (8.4 G is 8 G) and whole millions (55.3 M is 55 M), and rounds small terms
    to 0.1 GB. Models under a billion are counted in whole millions.
    """
    width = DTYPE_BYTES[dtype]
    model, model_text = _rounded(parameters)
    grads, grads_text = _rounded(trainable) if lora else (model, model_text)
    lines = [
        ("Model to train", model * width, f"{model_text} × {width}"),
        ("Reference model", model * width, f"{model_text} × {width}"),
        ("Gradients", grads * width, f"{grads_text} × {width}"),
        ("Optimizer states", 2 * grads * width, f"2 × {grads_text} × {width}"),
    ]
    return [(name, round(size / 1e9, 1), text) for name, size, text in lines]


def _rounded(count: int) -> tuple[int, str]:
    if count >= 1_000_000_000:
        return round(count / 1e9) * 1_000_000_000, f"{round(count / 1e9)} G"
    return round(count / 1e6) * 1_000_000, f"{round(count / 1e6)} M"
