"""The memory of weights, reference, gradients and optimizer: pure arithmetic on counts of
parameters.

Says nothing of activations, the framework's own memory or fragmentation, and touches no model.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOMENT_BYTES = {"8bit": 1}  # bitsandbytes' 8-bit optimizers; its few block constants are left out
_NF4 = 0.5  # bytes a weight
_NF4_BLOCK = 64  # weights that share one constant
_DOUBLE_BLOCK = 256  # constants that share one of their own
CONTEXT_BYTES = (
    600 * 2**20
)  # CUDA's context and cuBLAS workspace on recent drivers; not measured here


@dataclass(frozen=True)
class Component:
    """One line of the table: its name, size in bytes, the calculation in words, why it is so, and
    whether it was checked.
    """

    name: str
    bytes: int
    formula: str
    why: str = ""
    validated: bool = True


def components(parameters: int, trainable: int, dtype: str, *, lora: bool) -> list[Component]:
    """The article's N×P table, exactly: weights, reference, gradients, AdamW's two moments.

    With LoRA the base weights are counted without the adapter, as the article counts them;
    everything is in `dtype`.
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
    """Over how many GPUs weights, gradients and optimizer states are split."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1

    @staticmethod
    def of(strategy: str, gpus: int) -> Shards:
        """ddp splits nothing, zero2 gradients and optimizer, fsdp and zero3 everything (Rajbhandari
        et al. 2020).
        """
        if strategy == "zero2":
            return Shards(1, gpus, gpus)
        return Shards(gpus, gpus, gpus) if strategy in ("fsdp2", "zero3") else Shards()


def allocated(
    parameters: int,
    adapter: int,
    dtype: str,
    *,
    lora: bool,
    cached: bool,
    optim: str,
    nf4_weights: int = 0,
    shards: Shards | None = None,
) -> list[Component]:
    """What vlmdpo allocates for weights, reference, gradients and optimizer, and why it is not the
    article's table.

    Args:
        parameters: of the base model.
        adapter: of the LoRA adapter, all of which trains; 0 without.
        dtype: of the base weights.
        lora, cached: whether an adapter trains, and whether reference log-probs are kept on disk.
        optim: transformers' name of the optimizer.
        nf4_weights: how many weights are quantized to 4 bits, with double quantization.
        shards: how the parts are split over GPUs.
    """
    split, width = shards or Shards(), DTYPE_BYTES[dtype]
    trainable, grad_width = (adapter, 4) if lora else (parameters, width)
    moment = _MOMENT_BYTES["8bit"] if "8bit" in optim else grad_width
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

    nf4_width = _NF4 + (1 + 4 / _DOUBLE_BLOCK) / _NF4_BLOCK
    nf4_why = "4 bits, and a constant for 64 in 8 bits"
    second = 0 if lora or cached else parameters
    reference_why = (
        "same weights, adapter off"
        if lora
        else "log-probs are on disk"
        if cached
        else "a second model"
    )
    states_why = "8-bit moments" if "8bit" in optim else "as wide as the gradients"
    lines = [
        line("Model to train", parameters - nf4_weights, width, split.weights),
        line(
            "Model to train, in nf4", nf4_weights, nf4_width, split.weights, nf4_why, checked=False
        ),
        line("Adapter", adapter if lora else 0, 4, split.weights, "float32, as PEFT keeps it"),
        line("Reference model", second, width, split.weights, reference_why),
        line("Gradients", trainable, grad_width, split.gradients, "only of what trains"),
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


def as_in_article(
    parameters: int, trainable: int, dtype: str, *, lora: bool
) -> list[tuple[str, float, str]]:
    """The same table with the article's rounding: (name, GB, calculation).

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
