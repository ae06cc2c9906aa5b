"""The models of `vlmdpo make-pairs`: which one answers and which one judges, one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator
from typing import Any

from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.config import MakePairsConfig
from vlmdpo.distributed.processes import ProcessGroup
from vlmdpo.engine.sampling import Sampling
from vlmdpo.errors import ModelError
from vlmdpo.feedback.answerers import Answerer, TreeAnswerer, VllmAnswerer
from vlmdpo.feedback.judges.base import Judge
from vlmdpo.feedback.judges.chat_server import check_address
from vlmdpo.feedback.judges.claims import ClaimsJudge
from vlmdpo.feedback.judges.endpoint import EndpointJudge
from vlmdpo.feedback.judges.split import claims_of
from vlmdpo.feedback.judges.statements import Splitter, StatementsJudge
from vlmdpo.feedback.judges.truth import Truth, TruthJudge
from vlmdpo.models.configured import configured_model, configured_processor

_REPLIES = "judge-replies"  # of an endpoint, by content


class Models:
    """Loads what a run needs, when it needs it.

    Args:
        truth: what is known about the images, for `--judge truth`.
        split: how answers are split for this judge, if not by punctuation.

    Raises EndpointError for an address that is none.
    """

    def __init__(
        self,
        config: MakePairsConfig,
        truth: Truth | None,
        split: Splitter | None,
        processes: ProcessGroup,
    ) -> None:
        if config.judge == "endpoint":
            assert config.judge_url is not None
            check_address(config.judge_url)  # now, not when all answers are drawn
        self._config, self._truth, self._split = config, truth, split or claims_of
        self._processes = processes
        self._answerer: Answerer | None = None
        self._judge: Judge | None = None
        self.sampling = Sampling(config.temperature, config.top_p, config.samples, config.seed)

    def answerer(self) -> Answerer:
        """The model that answers. Raises ModelError, MissingDependencyError, DataError."""
        if self._answerer is None:
            self._check_judge_model()
            self._answerer = _load(self._config, self._processes)
        return self._answerer

    def judge(self) -> Judge:
        """Who judges; a model that only answered is freed first."""
        self._judge = self._judge or self._make_judge()
        return self._judge

    def judge_cost(self) -> dict[str, Any]:
        """What judging cost, over all processes; {} where it costs only time."""
        own = self._judge.report() if self._judge is not None else {}
        costs = self._processes.gather(own)
        names = dict.fromkeys(name for cost in costs for name in cost)
        return {name: sum(cost.get(name, 0) for cost in costs) for name in names}

    def _make_judge(self) -> Judge:
        config = self._config
        if config.judge == "truth":
            assert self._truth is not None
            return TruthJudge(self._truth)
        if config.judge == "endpoint":
            assert config.judge_url is not None
            assert config.judge_model is not None
            own = config.output_dir / f"{_REPLIES}-{self._processes.index}.jsonl"
            return EndpointJudge(
                config.judge_url,
                config.judge_model,
                own,
                requests=config.judge_requests,
                others=[one for one in config.output_dir.glob(f"{_REPLIES}-*") if one != own],
            )
        kind = ClaimsJudge if config.judge == "claims" else StatementsJudge
        return kind(
            self._judging_model(),
            with_log_odds=config.judge_score == "calibrated",
            split=self._split,
        )

    def _judging_model(self) -> Answerer:
        if self._config.judge_model is None:
            return self.answerer()
        self._free_answerer()
        with _named_judge_model():
            return _load(_judging(self._config, self._config.judge_model), None)

    def _check_judge_model(self) -> None:
        """Raise ModelError where there is no such judge: now, not when all answers are drawn."""
        from vlmdpo.models.load import load_processor

        name = self._config.judge_model
        if name is not None and self._config.judge in ("statements", "claims"):
            with _named_judge_model():
                load_processor(name, trust_remote_code=self._config.trust_remote_code)

    def _free_answerer(self) -> None:
        if self._answerer is not None:
            import torch

            self._answerer = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _judging(config: MakePairsConfig, name: str) -> MakePairsConfig:
    """The options that load the judge model."""
    return dataclasses.replace(
        config,
        model=name,
        adapter=None,
        revision=None,
        system=None,
        chat_template_kwargs=None,
    )


@contextlib.contextmanager
def _named_judge_model() -> Iterator[None]:
    """Errors of loading name the option that says which model."""
    try:
        yield
    except ModelError as problem:
        raise ModelError(str(problem).replace("--model:", "--judge-model:", 1)) from problem


def _load(config: MakePairsConfig, processes: ProcessGroup | None) -> Answerer:
    """A model to ask.

    Args:
        processes: those of a run whose answers come from this model: its identity is checked
            against that of earlier answers, and kept.
    """
    date = answer_files.prompt_date(config.output_dir)
    # Yes or no is read at an answer's start, so no reasoning may come first.
    processor = configured_processor(config, adapter=config.adapter, date=date, close_thinking=True)
    if config.engine == "vllm":
        from vlmdpo.engine.vllm import generator_for

        generator = generator_for(config, processor)
        if processes is not None:
            _keep_identity(config, processes, processor, None)
        generator.start()
        return VllmAnswerer(generator, tuned=config.adapter is not None)
    model = configured_model(config, adapter=config.adapter)
    if processes is not None:
        _keep_identity(config, processes, processor, model)
    return TreeAnswerer(model, processor, batch_size=config.batch_size)


def _keep_identity(
    config: MakePairsConfig, processes: ProcessGroup, processor: Any, model: Any
) -> None:
    """Raise DataError where earlier answers come from another model; else remember this one."""
    from vlmdpo.models import digest
    from vlmdpo.models.rendering import rendering_of

    known = {
        "processor": digest.processor_digest(processor)[:16],
        "prompt_date": rendering_of(processor).settings.date,
        "weights": digest.weights_digest(model)[:16] if model is not None else None,
        "dtype": str(model.dtype).removeprefix("torch.") if model is not None else config.dtype,
    }
    path = config.output_dir / answer_files.RUN
    found = json.loads(path.read_text(encoding="utf-8"))
    if "processor" in found:
        answer_files.check(config.output_dir, known)
    processes.barrier()  # no process writes before all have read
    if processes.index == 0:
        answer_files.write_json(path, {**found, **known})
    processes.barrier()
