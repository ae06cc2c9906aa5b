"""Estimates of `vlmdpo estimate-memory`, one after the other, in a process of its own.

Reads a JSON list of [name, options] from standard input, and writes a JSON line for each.
"""

from __future__ import annotations

import json
import sys

import torch

from vlmdpo.commands import estimate_memory
from vlmdpo.config import EstimateMemoryConfig
from vlmdpo.errors import VlmDpoError


def main() -> None:
    torch.set_num_threads(1)  # beside the benchmark
    for name, options in json.load(sys.stdin):
        try:
            report = estimate_memory.run(EstimateMemoryConfig(**options))
            line = {"name": name, "report": report}
        except (VlmDpoError, RuntimeError, ValueError, TypeError) as problem:
            line = {"name": name, "error": f"{type(problem).__name__}: {problem}"}
        print(json.dumps(line, default=str), flush=True)


if __name__ == "__main__":
    main()
