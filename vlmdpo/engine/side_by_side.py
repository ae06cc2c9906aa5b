"""One question to a base model and the same model with its adapter: answers as they grow, and what
each thinks of both.

Where PEFT can, both answers are made in one batch, of which one row has no adapter; else one after
the other.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vlmdpo.engine.generate import model_inputs
from vlmdpo.models.families import TOKEN_TYPE_KEYS, answer_token_type

ROLES = ("base", "tuned")
_BOTH = ["__base__", "default"]  # PEFT's names, of the rows of a mixed batch


@dataclass(frozen=True)
class Answer:
    """What one of the two models says so far: its token ids, and the same as text."""

    ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class AnswerScore:
    """An answer under both models: log-probs summed over its `tokens`, and `reward`, beta times
    tuned minus base.
    """

    tokens: int
    base_logp: float
    tuned_logp: float
    reward: float


class _Tokens(BaseStreamer):
    """Hands on each step's tokens, (B,), and None at the end; the first call holds the prompt."""

    def __init__(self) -> None:
        self.steps: queue.Queue[Tensor | BaseException | None] = queue.Queue()
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self.steps.put(value.reshape(-1).cpu())
        self._seen_prompt = True

    def end(self) -> None:
        self.steps.put(None)


class _Stop(StoppingCriteria):
    def __init__(self) -> None:
        self.wanted = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.wanted.is_set(), device=input_ids.device)


@contextlib.contextmanager
def _no_hooks_left(model: Any) -> Iterator[None]:
    """Takes off the hooks that PEFT leaves on its layers where a mixed batch fails on the way."""
    before = {module: set(module._forward_pre_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, keys in before.items():
            for key in set(module._forward_pre_hooks) - keys:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


class SideBySide:
    """Asks both models; one question at a time.

    Args:
        model: a PEFT model.
        processor: its processor.
        beta: of the rewards.
    """

    def __init__(self, model: Any, processor: Any, beta: float) -> None:
        self.model, self.processor, self.beta = model, processor, beta
        self.at_once = True  # until PEFT refuses
        self._one_at_a_time = threading.Lock()

    def stream(
        self, picture: Image.Image, question: str, max_new_tokens: int
    ) -> Iterator[tuple[Answer, Answer]]:
        """Both answers, greedy, again and again as they grow. The last pair is whole."""
        with self._one_at_a_time:
            if self.at_once:
                try:
                    with _no_hooks_left(self.model):
                        for said in self._steps(
                            picture, question, max_new_tokens, count=2, adapter_names=_BOTH
                        ):
                            yield said[0], said[1]
                    return
                except (
                    ValueError
                ) as problem:  # a tower that folds the batch, DoRA, layers PEFT cannot mix
                    if "adapter_names" not in str(problem):
                        raise
                    self.at_once = False
            base = Answer()
            with self.model.disable_adapter():
                for said in self._steps(picture, question, max_new_tokens, count=1):
                    base = said[0]
                    yield base, Answer()
            for said in self._steps(picture, question, max_new_tokens, count=1):
                yield base, said[0]

    def _steps(
        self, picture: Image.Image, question: str, max_new_tokens: int, *, count: int, **how: Any
    ) -> Iterator[list[Answer]]:
        """The answers of `count` equal rows, step by step. Raises what generation raises."""
        inputs = model_inputs(self.model, self.processor, [picture] * count, [question] * count)
        tokens, stop = _Tokens(), _Stop()

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        streamer=tokens,
                        stopping_criteria=StoppingCriteriaList([stop]),
                        **how,
                    )
            except BaseException as problem:  # noqa: BLE001 - raised again where it is waited for
                tokens.steps.put(problem)

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        ids: list[list[int]] = [[] for _ in range(count)]
        open_ = [True] * count
        try:
            while (step := tokens.steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                for row, token in enumerate(step.tolist()):
                    if open_[row]:
                        ids[row].append(token)
                        open_[row] = token not in self._ends()
                yield [self._answer(one) for one in ids]
        finally:
            stop.wanted.set()  # whoever listened may have gone
            worker.join()

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _answer(self, ids: list[int]) -> Answer:
        return Answer(
            tuple(ids), self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        )

    @torch.inference_mode()
    def judge(
        self, picture: Image.Image, question: str, answers: tuple[Answer, Answer]
    ) -> tuple[AnswerScore, AnswerScore]:
        """What both models think of each answer, its end token included where it has one."""
        with self._one_at_a_time:
            tuned = [self._logp(picture, question, answer.ids) for answer in answers]
            with self.model.disable_adapter():
                base = [self._logp(picture, question, answer.ids) for answer in answers]
        first, second = (
            AnswerScore(len(answer.ids), b, t, self.beta * (t - b))
            for answer, b, t in zip(answers, base, tuned, strict=True)
        )
        return first, second

    def _logp(self, picture: Image.Image, question: str, ids: tuple[int, ...]) -> float:
        """The log-prob of these tokens after the prompt, summed, in nats."""
        if not ids:
            return 0.0
        inputs = dict(model_inputs(self.model, self.processor, [picture], [question]))
        inputs.pop("labels", None)
        answer = torch.tensor([ids], device=self.model.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones_like(answer)], dim=1
        )
        for name in TOKEN_TYPE_KEYS:
            if name in inputs:
                kind = torch.full_like(answer, answer_token_type(self.processor, name))
                inputs[name] = torch.cat([inputs[name], kind], dim=1)
        logits = self.model(**inputs).logits[0, -len(ids) - 1 : -1].float()
        return float(logits.log_softmax(-1).gather(-1, answer[0, :, None]).sum())
