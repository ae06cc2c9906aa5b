"""Options of `vlmdpo eval`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.eval_amber import EvalAmberConfig
from vlmdpo.config.options import flag_name, option, require_at_least, require_choice
from vlmdpo.errors import ConfigError, nearest

BENCHMARKS = ("amber", "pope", "repope", "chair")
LMMS = "lmms:"  # before the tasks of lmms-eval
SPLITS = ("random", "popular", "adversarial")
SCORERS = ("pattern", "wordnet")
_FILES = {
    "pope": "the folder of coco_pope_random.json, coco_pope_popular.json and "
    "coco_pope_adversarial.json",
    "repope": "the folder of RePOPE's label files, coco_repope_random.json and so on",
    "chair": "COCO's annotation folder, with instances and captions of train2014 and val2014",
}
# Options that only some benchmarks know.
_ONLY = {
    **dict.fromkeys(("task", "dimension", "extractor", "strict"), ("amber",)),
    "data": ("amber", "pope", "repope", "chair"),
    "split": ("pope", "repope"),
    **dict.fromkeys(("scorer", "sample", "seed", "ids", "prompt"), ("chair",)),
    "suffix": ("pope", "repope", "a file"),
    "lmms_args": ("lmms",),
}


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EvalAmberConfig):
    """`vlmdpo eval`: a benchmark, or questions of your own, base beside tuned."""

    benchmark: str = option(
        "amber",
        f"{', '.join(BENCHMARKS)}, a JSONL file of your own questions, or {LMMS}TASK[,TASK] for "
        "tasks of lmms-eval (an extra)",
        group="Data",
    )
    data: Path | None = option(
        None,
        "The benchmark's own files: AMBER's data folder, POPE's or RePOPE's question files, COCO's "
        "annotation folder",
        default_text="the embedded set, for amber",
        group="Data",
    )
    images: Path | None = option(
        None,
        "Folder of the images",
        default_text="DATA/image for amber, the folder of a file of your own, DATA for others",
        group="Data",
    )
    answers: Path | None = option(
        None,
        "Score this response file, in the benchmark's own form, and load no model",
        default_text="ask the model",
        group="Data",
    )
    split: tuple[str, ...] = option(
        (),
        f"POPE's split ({', '.join(SPLITS)}); repeatable",
        default_text="all three, and their mean",
        group="Data",
    )
    sample: int = option(
        500, "CHAIR: describe this many of COCO's val2014 images, drawn by --seed", group="Data"
    )
    seed: int = option(0, "CHAIR: seed of --sample", group="Data")
    ids: Path | None = option(
        None,
        "CHAIR: describe the images with these ids (one per line, or a JSON list)",
        default_text="those that --sample draws",
        group="Data",
    )
    prompt: str = option(
        "Please describe this image in detail.", "CHAIR: the prompt for captions", group="Data"
    )
    suffix: str = option(
        "",
        "Text added to each question, with a space; figures are then not of the published protocol",
        default_text="none",
        group="Data",
    )
    limit: int | None = option(
        None,
        "Ask only this many questions (descriptions), drawn at random (always the same ones) in "
        "the data's shares of groups and answers",
        default_text="all",
        group="Data",
    )
    max_new_tokens: int = option(
        0,
        "Longest answer to a question, in tokens",
        default_text="64, or 8 for amber",
        group="Generation",
    )
    max_description_tokens: int = option(
        0,
        "Longest description, in tokens",
        default_text="512, or 256 for amber",
        group="Generation",
    )
    scorer: str = option(
        "pattern",
        "How CHAIR finds objects: pattern (the original's rules) or wordnet (OPERA's; needs nltk's "
        "data). Their figures are not comparable",
        group="Scoring",
    )
    lmms_args: str = option(
        "",
        "lmms: more arguments of lmms-eval's command line",
        default_text="none",
        group="Scoring",
    )
    include: tuple[Path, ...] = option(
        (),
        "Another folder of results (of eval or eval-amber) to show on the same page; repeatable",
        default_text="the other results in the output folder",
        group="Output",
    )
    output_dir: Path | None = option(
        None,
        "Folder for one model's evaluations: a folder per benchmark, and one page for all",
        default_text="outputs/eval/<model>, or none with --answers",
        group="Output",
    )

    def __post_init__(self) -> None:
        is_amber = self.benchmark == "amber"
        for name, amber, others in (
            ("max_new_tokens", 8, 64),
            ("max_description_tokens", 256, 512),
        ):
            if getattr(self, name) == 0:  # not given
                object.__setattr__(self, name, amber if is_amber else others)
        super().__post_init__()

    @property
    def kind(self) -> str:
        """What kind of benchmark is named: one of BENCHMARKS, "lmms", or "a file" of one's own."""
        if self.benchmark in BENCHMARKS:
            return self.benchmark
        return "lmms" if self.benchmark.startswith(LMMS) else "a file"

    def _check(self) -> None:
        require_at_least(self, 1, "sample")
        require_choice(self.scorer, SCORERS, "scorer")
        if not self.prompt.strip():
            raise ConfigError("--prompt is empty; say what the model is asked for")
        for name in self.split:
            require_choice(name, SPLITS, "split")
        self._check_kind()
        for field in dataclasses.fields(self):
            kinds = _ONLY.get(field.name)
            if kinds and self.kind not in kinds and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{flag_name(field.name)} is for --benchmark {' or '.join(kinds)}, not "
                    f"{self.benchmark}"
                )

    def _check_kind(self) -> None:
        if self.kind == "a file" and not Path(self.benchmark).suffix:
            raise ConfigError(
                f"--benchmark: there is no benchmark '{self.benchmark}'."
                f"{nearest(self.benchmark, BENCHMARKS)} Choose {', '.join(BENCHMARKS)}, "
                f"{LMMS}TASK, or name a JSONL file of questions"
            )
        if self.kind in ("pope", "repope", "chair") and self.data is None:
            raise ConfigError(f"--benchmark {self.kind} needs --data DIR: {_FILES[self.kind]}")
        if self.kind in ("pope", "repope") and self.answers is not None and len(self.split) != 1:
            raise ConfigError(
                f"--answers holds the answers to one split of {self.kind}; name it with --split"
            )
        if self.kind == "lmms" and self.answers is not None:
            raise ConfigError("--answers: lmms-eval scores its own answers; leave it out")
        if self.kind == "lmms" and self.num_processes > 1:
            raise ConfigError("--num-processes: lmms-eval runs as one process; leave it out")
