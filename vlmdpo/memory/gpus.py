"""The memory of common GPUs, and amounts such as "24GiB". Standard library only."""

from __future__ import annotations

import re

from vlmdpo.errors import ConfigError, nearest

_GIB = 2**30
# The total that `nvidia-smi` reports, in GiB: a little below the advertised size where the driver
# reserves some.
GPUS: dict[str, float] = {
    "t4": 15.0,
    "v100-16gb": 16.0,
    "v100-32gb": 32.0,
    "l4": 22.5,
    "a10": 22.5,
    "a10g": 22.5,
    "rtx-3090": 24.0,
    "rtx-4090": 24.0,
    "rtx-5090": 31.8,
    "a6000": 48.0,
    "l40s": 45.0,
    "a100-40gb": 40.0,
    "a100-80gb": 80.0,
    "h100": 79.6,
    "h200": 140.4,
    "b200": 178.4,
}
_UNITS = {"gib": _GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
_AMOUNT = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*(gib|gb|mib|mb)\s*$", re.IGNORECASE)


def capacity_bytes(gpu: str) -> int:
    """Bytes of a GPU given by name, or of an amount such as "24GiB". Raises ConfigError."""
    name = gpu.strip().lower().replace("_", "-").replace(" ", "-")
    if name in GPUS:
        return round(GPUS[name] * _GIB)
    amount = _AMOUNT.match(gpu)
    if amount and float(amount.group(1)) > 0:
        return round(float(amount.group(1)) * _UNITS[amount.group(2).lower()])
    hint = nearest(name, GPUS)
    raise ConfigError(
        f"--gpu: '{gpu}' is neither a known GPU nor an amount such as 24GiB.{hint} Known: "
        f"{', '.join(GPUS)}"
    )
