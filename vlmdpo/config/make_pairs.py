"""Options of `vlmdpo make-pairs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import OutputOptions, ProcessOptions, RuntimeOptions
from vlmdpo.config.infer import ENGINES
from vlmdpo.config.options import option, require, require_at_least, require_choice
from vlmdpo.errors import ConfigError

JUDGES = ("statements", "claims", "endpoint", "truth")
SCORES = ("denied", "calibrated")
DEFAULT_MARGINS = {"denied": 1.0, "calibrated": 0.5}


@dataclass(frozen=True, kw_only=True)
class MakePairsConfig(RuntimeOptions, ProcessOptions, OutputOptions):
    """`vlmdpo make-pairs`: answers drawn from a model, judged, and paired best against worst."""

    input: Path | None = option(
        None,
        "Images and prompts: a JSONL with image and question on each line, a folder of images, or "
        "a folder written by vlmdpo prepare",
        default_text="embedded scenes",
        group="Data",
    )
    prompts: Path | None = option(
        None,
        "Prompts for a folder of images: a text file with one on each line, or a JSONL with "
        "question",
        default_text="built-in requests for a description",
        group="Data",
    )
    prompts_per_image: int | None = option(
        None,
        "How many of the prompts each image of a folder gets, picked by --seed",
        default_text="all of --prompts, or one of the built-in ones",
        group="Data",
    )
    image_root: Path | None = option(
        None,
        "Folder that image paths in --input start from",
        default_text="the folder of --input",
        group="Data",
    )
    limit: int | None = option(
        None,
        "Use only this many images, the first ones",
        default_text="all of --input, 100 embedded scenes",
        group="Data",
    )
    adapter: Path | None = option(
        None,
        "Folder of a trained adapter",
        default_text="the base model alone",
        group="Model",
    )
    samples: int = option(8, "Answers drawn for each prompt", group="Generation")
    temperature: float = option(0.7, "What logits are divided by", group="Generation")
    top_p: float = option(
        1.0,
        "Draw from the likeliest tokens that together have this probability",
        group="Generation",
    )
    max_new_tokens: int = option(
        256,
        "Longest answer, in tokens; answers cut there are never put into a pair",
        group="Generation",
    )
    seed: int = option(42, "Seed of the draws", group="Generation")
    judge: str = option(
        "statements",
        f"Who scores the answers: {', '.join(JUDGES)}; docs/commands/make-pairs.md explains each",
        group="Scoring",
    )
    judge_model: str | None = option(
        None,
        "Model that judges: alias, Hub id or folder; for --judge endpoint, the server's name of it",
        default_text="the model that answers, with its adapter",
        group="Scoring",
    )
    judge_url: str | None = option(
        None,
        "Address of an OpenAI-compatible server for --judge endpoint, as in "
        "http://localhost:8000/v1; its key is read from OPENAI_API_KEY",
        default_text="none",
        group="Scoring",
    )
    judge_requests: int = option(8, "Requests to --judge-url at the same time", group="Scoring")
    judge_score: str = option(
        "denied",
        "What counts against an answer: denied statements, or calibrated: how strongly each is "
        "denied, compared with statements of the same kind",
        group="Scoring",
    )
    max_unread: float = option(
        0.2,
        "Stop where more than this share of the verdicts can be read neither as yes nor as no",
        group="Scoring",
    )
    truth: Path | None = option(
        None,
        "Folder with annotations in AMBER's layout, for --judge truth, or to measure how often "
        "another judge agrees with them",
        default_text="none; embedded scenes bring theirs",
        group="Scoring",
    )
    pairs_per_prompt: int = option(2, "Pairs made of a prompt's answers at most", group="Scoring")
    margin: float | None = option(
        None,
        "Smallest difference in score between chosen and rejected",
        default_text="1 denied statement, or 0.5 with --judge-score calibrated",
        group="Scoring",
    )
    max_length_gap: float = option(
        0.1,
        "How far the mean lengths of chosen and rejected answers may be apart, as a share of the "
        "longer one; pairs that stand out are replaced or left out, and counted",
        group="Scoring",
    )
    engine: str = option(
        "plain",
        "plain (all answers about an image grow in one tree) or vllm (an extra, for GPUs)",
        group="Memory and speed",
    )
    batch_size: int = option(32, "Answers or statements per forward pass", group="Memory and speed")
    output_dir: Path = option(
        Path("outputs/pairs"),
        "Folder for pairs.jsonl, its images and report.html; continues where an earlier run "
        "stopped",
        group="Output",
    )
    overwrite: bool = option(False, "Draw and judge again what the folder holds", group="Output")

    def _check(self) -> None:
        require_at_least(self, 1, "prompts_per_image", "limit", "judge_requests", "batch_size")
        require_at_least(self, 1, "pairs_per_prompt")
        require_at_least(self, 2, "samples", unit="answers")
        require_at_least(self, 1, "max_new_tokens", unit="token")
        require(0 < self.temperature < float("inf"), self, "temperature", "a number above 0")
        require(0 < self.top_p <= 1, self, "top_p", "a number above 0, up to 1")
        require(0 <= self.max_unread <= 1, self, "max_unread", "a share from 0 to 1")
        require(0 <= self.max_length_gap <= 1, self, "max_length_gap", "a share from 0 to 1")
        require(self.margin is None or self.margin > 0, self, "margin", "a number above 0")
        require_choice(self.engine, ENGINES, "engine")
        require_choice(self.judge, JUDGES, "judge")
        require_choice(self.judge_score, SCORES, "judge_score")
        self._check_judge()
        if self.input is None and (self.prompts or self.prompts_per_image):
            raise ConfigError("--prompts and --prompts-per-image are for --input FOLDER of images")
        if self.input is None and self.truth is not None:
            raise ConfigError("--truth is for --input: the embedded scenes bring their own truth")
        if self.num_processes > 1 and self.engine == "vllm":
            raise ConfigError("--num-processes: vLLM starts its own processes; leave it out")

    def _check_judge(self) -> None:
        if self.judge == "endpoint" and (self.judge_url is None or self.judge_model is None):
            raise ConfigError(
                "--judge endpoint needs --judge-url ADDRESS and --judge-model NAME, as the server "
                "names it"
            )
        if self.judge != "endpoint" and self.judge_url is not None:
            raise ConfigError("--judge-url is for --judge endpoint")
        if self.engine == "vllm" and self.judge_model and self.judge != "endpoint":
            raise ConfigError(
                "--judge-model: --engine vllm judges with the model that answers; serve the other "
                "one (vllm serve), and use --judge endpoint"
            )
        if self.judge == "truth" and self.judge_model is not None:
            raise ConfigError("--judge-model: --judge truth asks no model; leave one of them out")
        if self.judge == "truth" and self.truth is None and self.input is not None:
            raise ConfigError("--judge truth needs --truth FOLDER with AMBER's annotations")
        if self.judge_score == "calibrated" and (
            self.judge not in ("statements", "claims") or self.engine == "vllm"
        ):
            raise ConfigError(
                "--judge-score calibrated needs the judge's probabilities: --judge statements or "
                "claims, without --engine vllm"
            )

    @property
    def least_difference(self) -> float:
        """`--margin`, or the default for the score."""
        return self.margin if self.margin is not None else DEFAULT_MARGINS[self.judge_score]
