"""Which benchmarks there are. A new one is its file and a line here."""

from __future__ import annotations

import importlib

from vlmdpo.benchmarks.base import Benchmark
from vlmdpo.config import EvalAmberConfig

# The module whose `load(config)` makes each kind of benchmark that `--benchmark` may name.
MODULES = {
    "amber": "vlmdpo.benchmarks.amber.benchmark",
    "pope": "vlmdpo.benchmarks.pope",
    "repope": "vlmdpo.benchmarks.pope",
    "chair": "vlmdpo.benchmarks.chair.benchmark",
    "a file": "vlmdpo.benchmarks.own_questions",
}


def load(kind: str, config: EvalAmberConfig) -> Benchmark:
    """The benchmark of this kind, a key of MODULES, with the data that the config names.

    Raises DataError, MissingDependencyError.
    """
    benchmark: Benchmark = importlib.import_module(MODULES[kind]).load(config)
    return benchmark
