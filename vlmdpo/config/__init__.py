"""The options of each command: one frozen dataclass per command, with all defaults and checks.

`cli.py` makes the command line from these fields and a YAML recipe has the same keys, so there is
no second list of options to keep in step. Later layers win: the defaults here, the model's own
recipe (only the embedded model has one), a named one (`--recipe`), the `--config` file, the flags.
"""

from vlmdpo.config.common import ATTENTIONS, DTYPES, STRATEGIES, ProcessOptions
from vlmdpo.config.compare import CompareConfig
from vlmdpo.config.demo import DemoConfig
from vlmdpo.config.env import EnvConfig
from vlmdpo.config.estimate_memory import EstimateMemoryConfig
from vlmdpo.config.eval_amber import DIMENSIONS, EvalAmberConfig
from vlmdpo.config.evaluate import BENCHMARKS, EvalConfig
from vlmdpo.config.export import ExportConfig
from vlmdpo.config.infer import InferConfig
from vlmdpo.config.make_pairs import MakePairsConfig
from vlmdpo.config.options import (
    GROUPS,
    PER_CALL,
    Options,
    flag_name,
    group_of,
    ordered_fields,
    set_key,
)
from vlmdpo.config.prepare import PrepareConfig
from vlmdpo.config.rounds import STAGES, RoundsConfig
from vlmdpo.config.runs import RunsConfig
from vlmdpo.config.train import DEFAULT_RATES, USUAL_RATES, TrainConfig
from vlmdpo.config.train_output import TRACKERS, CheckOptions, TrainOutputOptions
from vlmdpo.config.training import (
    LOSS_PRESETS,
    LOSSES,
    DataOptions,
    LoraOptions,
    LossMix,
    LossOptions,
    RunOptions,
    SpeedOptions,
    TrainProcessOptions,
)

__all__ = [
    "ATTENTIONS",
    "BENCHMARKS",
    "DEFAULT_RATES",
    "DIMENSIONS",
    "DTYPES",
    "GROUPS",
    "LOSSES",
    "LOSS_PRESETS",
    "PER_CALL",
    "STAGES",
    "STRATEGIES",
    "TRACKERS",
    "USUAL_RATES",
    "CheckOptions",
    "CompareConfig",
    "DataOptions",
    "DemoConfig",
    "EnvConfig",
    "EstimateMemoryConfig",
    "EvalAmberConfig",
    "EvalConfig",
    "ExportConfig",
    "InferConfig",
    "LoraOptions",
    "LossMix",
    "LossOptions",
    "MakePairsConfig",
    "Options",
    "PrepareConfig",
    "ProcessOptions",
    "RoundsConfig",
    "RunOptions",
    "RunsConfig",
    "SpeedOptions",
    "TrainConfig",
    "TrainOutputOptions",
    "TrainProcessOptions",
    "flag_name",
    "group_of",
    "ordered_fields",
    "set_key",
]
