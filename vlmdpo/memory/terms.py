"""The memory of weights, reference, gradients and optimizer: arithmetic on parameter counts.

Activations, the framework's own memory and fragmentation are not in it, and no model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_8BIT_MOMENT_BYTES = 1  # bitsandbytes' optimizers; their few block constants are left out
_NF4_BYTES = 0.5  # per weight
_NF4_BLOCK = 64  # weights that share one quantization constant
_DOUBLE_QUANT_BLOCK = 256  # constants that share one of their own
# What a process takes on the GPU outside of PyTorch's allocator: 0.87 GB on an H100 (driver 580,
# torch 2.11), see docs/benchmarks/gpu.md.
CONTEXT_BYTES = 850 * 2**20


@dataclass(frozen=True)
class Component:
    """One line of the memory table.

    Attributes:
        formula: the calculation as text.
        why: the reason for the size, where it needs one.
        validated: whether the size was checked against a measurement.
    """

    name: str
    bytes: int
    formula: str
    why: str = ""
    validated: bool = True


def article_components(
    parameters: int, trainable: int, dtype: str, *, lora: bool
) -> list[Component]:
    """The article's N×P table, exactly: weights, reference, gradients, AdamW's two moments.

    With LoRA the base weights are counted without the adapter, as in the article. Everything is in
    `dtype`.
    """
    width = DTYPE_BYTES[dtype]
    grads = trainable if lora else parameters
    return [
        Component("Model to train", parameters * width, f"{parameters:,} × {width}"),
        Component("Reference model", parameters * width, f"{parameters:,} × {width}"),
        Component("Gradients", grads * width, f"{grads:,} × {width}"),
        Component("Optimizer states", 2 * grads * width, f"2 × {grads:,} × {width}"),
    ]


@dataclass(frozen=True)
class Shards:
    """How many GPUs weights, gradients and optimizer states are split over."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1

    @staticmethod
    def for_strategy(strategy: str, gpus: int) -> Shards:
        """ddp splits nothing, zero2 gradients and optimizer, fsdp2 and zero3 everything.

        See Rajbhandari et al. 2020, arXiv 1910.02054.
        """
        if strategy == "zero2":
            return Shards(1, gpus, gpus)
        return Shards(gpus, gpus, gpus) if strategy in ("fsdp2", "zero3") else Shards()


def allocated_components(
    parameters: int,
    adapter: int,
    dtype: str,
    *,
    lora: bool,
    cached: bool,
    optim: str,
    nf4_weights: int = 0,
    shards: Shards | None = None,
    goes_on: bool = False,
) -> list[Component]:
    """What vlmdpo allocates for weights, reference, gradients and optimizer, and why.

    Args:
        parameters: of the base model.
        adapter: parameters of the LoRA adapter, all of which train; 0 without.
        dtype: of the base weights.
        lora: whether an adapter trains.
        cached: whether reference log-probs are cached on disk.
        optim: the optimizer's name in transformers.
        nf4_weights: weights quantized to 4 bits, with double quantization.
        shards: how the parts are split over GPUs; None for not at all.
        goes_on: whether the adapter has been trained before, so that the reference has a copy.
    """
    split, width = shards or Shards(), DTYPE_BYTES[dtype]
    trainable, grad_width = (adapter, 4) if lora else (parameters, width)
    moment = _8BIT_MOMENT_BYTES if "8bit" in optim else grad_width
    sharded = split != Shards()

    def line(
        name: str,
        count: int,
        each: float,
        gpus: int,
        why: str = "",
        *,
        times: int = 1,
        checked: bool = True,
    ) -> Component:
        size = round(times * count * each) // gpus
        formula = (
            f"{times} × " * (times > 1) + f"{count:,} × {each:.4g}" + f" ÷ {gpus}" * (gpus > 1)
        )
        return Component(name, size, formula if count else "0", why, checked and not sharded)

    nf4_width = _NF4_BYTES + (1 + 4 / _DOUBLE_QUANT_BLOCK) / _NF4_BLOCK
    nf4_why = "4 bits, and an 8-bit constant per 64 weights"
    reference = 0 if lora or cached else parameters
    reference_why = (
        "same weights, with the copy of the adapter"
        if goes_on
        else "same weights, adapter off"
        if lora
        else "log-probs are cached on disk"
        if cached
        else "a second model"
    )
    states_why = "8-bit moments" if "8bit" in optim else "as wide as the gradients"
    lines = [
        line("Model to train", parameters - nf4_weights, width, split.weights),
        line(
            "Model to train, in nf4", nf4_weights, nf4_width, split.weights, nf4_why, checked=False
        ),
        line("Adapter", adapter if lora else 0, 4, split.weights, "float32, as PEFT creates it"),
        line("Copy of the adapter", adapter if goes_on else 0, 4, split.weights, "the reference's"),
        line("Reference model", reference, width, split.weights, reference_why),
        line("Gradients", trainable, grad_width, split.gradients, "of trained weights only"),
        line(
            "Optimizer states",
            trainable,
            moment,
            split.optimizer,
            states_why,
            times=2,
            checked="8bit" not in optim,
        ),
    ]
    return [c for c in lines if c.bytes or c.name == "Reference model"]


def rounded_article_table(
    parameters: int, trainable: int, dtype: str, *, lora: bool
) -> list[tuple[str, float, str]]:
    """The article's table with its rounding: (name, GB, calculation) per line.

    The article counts in whole billions (8.4 G is 8 G) and whole millions (55.3 M is 55 M), and
    rounds small terms to 0.1 GB. Models under a billion are counted in whole millions.
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
