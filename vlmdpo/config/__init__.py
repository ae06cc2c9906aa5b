"""What each command can be told: one frozen dataclass a command, the only home of defaults and
range checks.

The command line is made from these fields (`cli.py`), and a YAML recipe has the same keys, so there
is no second list of options to keep in step. Layers, weakest first: the default here, the model's
own recipe (only the embedded model has one), the recipe file, the flags.
"""

from vlmdpo.config.estimate_memory import EstimateMemoryConfig
from vlmdpo.config.inference import (
    DIMENSIONS,
    CompareConfig,
    DemoConfig,
    EnvConfig,
    EvalAmberConfig,
    ExportConfig,
    InferConfig,
)
from vlmdpo.config.options import ATTENTIONS, DTYPES, OF_ONE_CALL, STRATEGIES, flag_name
from vlmdpo.config.prepare import PrepareConfig
from vlmdpo.config.train import LOSSES, PRESETS, RATES, SANE_RATES, TRACKERS, TrainConfig

__all__ = [
    "ATTENTIONS",
    "DIMENSIONS",
    "DTYPES",
    "LOSSES",
    "OF_ONE_CALL",
    "PRESETS",
    "RATES",
    "SANE_RATES",
    "STRATEGIES",
    "TRACKERS",
    "CompareConfig",
    "DemoConfig",
    "EnvConfig",
    "EstimateMemoryConfig",
    "EvalAmberConfig",
    "ExportConfig",
    "InferConfig",
    "PrepareConfig",
    "TrainConfig",
    "flag_name",
]
