"""vlmdpo: Direct Preference Optimization for vision-language models, from data to proof.

The public API; `docs/library.md` has a page on it. Everything is imported when it is first used, so
that `import vlmdpo` takes no time and loads no library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmdpo.api.asking import Asker, answer
    from vlmdpo.api.calls import estimate, evaluate, prepare
    from vlmdpo.config import EstimateMemoryConfig, EvalAmberConfig, EvalConfig, PrepareConfig
    from vlmdpo.errors import (
        ConfigError,
        DataError,
        EndpointError,
        Interrupted,
        MemoryBudgetError,
        MissingDependencyError,
        ModelError,
        Preempted,
        ProcessError,
        VlmDpoError,
    )
    from vlmdpo.training.trainer import PairTrainer

__version__ = "0.1.1"

__all__ = [
    "Asker",
    "ConfigError",
    "DataError",
    "EndpointError",
    "EstimateMemoryConfig",
    "EvalAmberConfig",
    "EvalConfig",
    "Interrupted",
    "MemoryBudgetError",
    "MissingDependencyError",
    "ModelError",
    "PairTrainer",
    "Preempted",
    "PrepareConfig",
    "ProcessError",
    "VlmDpoError",
    "answer",
    "estimate",
    "evaluate",
    "prepare",
]

_MODULES = {
    **dict.fromkeys(("Asker", "answer"), "vlmdpo.api.asking"),
    **dict.fromkeys(("estimate", "evaluate", "prepare"), "vlmdpo.api.calls"),
    **dict.fromkeys(
        ("EstimateMemoryConfig", "EvalAmberConfig", "EvalConfig", "PrepareConfig"), "vlmdpo.config"
    ),
    "PairTrainer": "vlmdpo.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vlmdpo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "vlmdpo.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
