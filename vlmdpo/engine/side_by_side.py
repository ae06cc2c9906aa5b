"""One question to a base model and the same model with its adapter: both answers as they grow, and
what each model thinks of both.

Where PEFT can, both answers are generated in one batch, of which one row has no adapter; else one
after the other.

Shapes: B rows of a generation batch, A tokens of an answer, V vocabulary.
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
from vlmdpo.models.families import answer_token_type
from vlmdpo.models.inputs import inputs_by_token
from vlmdpo.models.protocols import AdaptedModel, Module, Processor
from vlmdpo.models.rendering import stop_token_ids

ROLES = ("base", "tuned")
_ADAPTER_OF_ROW = ["__base__", "default"]  # PEFT's names, for the rows of a mixed batch


@dataclass(frozen=True)
class Answer:
    """An answer so far: its token ids, and the same as text."""

    ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class AnswerScore:
    """What both models think of one answer.

    Attributes:
        tokens: its length, the end token included where it has one.
        base_logp, tuned_logp: its log-prob under each model, summed over its tokens, in nats.
        reward: beta times tuned minus base.
    """

    tokens: int
    base_logp: float
    tuned_logp: float
    reward: float


class _TokenStreamer(BaseStreamer):
    """Puts each step's tokens (B,) into a queue, and None at the end."""

    def __init__(self) -> None:
        self.steps: queue.Queue[Tensor | BaseException | None] = queue.Queue()
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        # `generate` puts the prompt first.
        if self._seen_prompt:
            self.steps.put(value.reshape(-1).cpu())
        self._seen_prompt = True

    def end(self) -> None:
        self.steps.put(None)


class _StopOnRequest(StoppingCriteria):
    """Ends generation once `requested` or `closed` is set, from another thread."""

    def __init__(self, closed: threading.Event) -> None:
        self.requested, self.closed = threading.Event(), closed

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        ends = self.requested.is_set() or self.closed.is_set()
        return torch.full((len(input_ids),), ends, device=input_ids.device)


@contextlib.contextmanager
def _removing_new_hooks(model: Module) -> Iterator[None]:
    """At the end, remove the hooks added inside.

    PEFT leaves some on its layers where a mixed batch fails halfway.
    """
    before = {module: set(module._forward_pre_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, keys in before.items():
            for key in set(module._forward_pre_hooks) - keys:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


class SideBySide:
    """Asks both models, one question at a time.

    Args:
        model: a PEFT model.
        processor: its processor.
        beta: of the rewards.
    """

    def __init__(self, model: AdaptedModel, processor: Processor, beta: float) -> None:
        self.model, self.processor, self.beta = model, processor, beta
        self.in_one_batch = True  # until PEFT refuses
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def is_closed(self) -> bool:
        """Whether nothing is answered any more."""
        return self._closed.is_set()

    def close(self) -> None:
        """End what is being generated, and wait for it: a program that ends while one of its
        threads computes is aborted.
        """
        self._closed.set()
        with self._lock:
            pass

    def stream(
        self, image: Image.Image, question: str, max_new_tokens: int
    ) -> Iterator[tuple[Answer, Answer]]:
        """Both greedy answers, again and again as they grow. The last pair is complete, unless the
        object was closed.
        """
        with self._lock:
            if self.is_closed:
                return
            if self.in_one_batch:
                try:
                    with _removing_new_hooks(self.model):
                        for base, tuned in self._generate(
                            image, question, max_new_tokens, rows=2, adapter_names=_ADAPTER_OF_ROW
                        ):
                            yield base, tuned
                    return
                except ValueError as problem:
                    # A tower that folds its batch, DoRA, or other layers that PEFT cannot mix.
                    if "adapter_names" not in str(problem):
                        raise
                    self.in_one_batch = False
            base = Answer()
            with self.model.disable_adapter():
                for (base,) in self._generate(image, question, max_new_tokens, rows=1):
                    yield base, Answer()
            for (tuned,) in self._generate(image, question, max_new_tokens, rows=1):
                yield base, tuned

    def _generate(
        self, image: Image.Image, question: str, max_new_tokens: int, *, rows: int, **options: Any
    ) -> Iterator[list[Answer]]:
        """The answers of `rows` equal rows, step by step. Raises what generation raises."""
        inputs = model_inputs(self.model, self.processor, [image] * rows, [question] * rows)
        streamer, stop = _TokenStreamer(), _StopOnRequest(self._closed)

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        eos_token_id=sorted(self._end_tokens()),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stop]),
                        **options,
                    )
            except BaseException as problem:  # noqa: BLE001 - raised again where it is waited for
                streamer.steps.put(problem)

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        ids: list[list[int]] = [[] for _ in range(rows)]
        unfinished = set(range(rows))
        end_tokens = self._end_tokens()
        try:
            while (step := streamer.steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                for row, token in enumerate(step.tolist()):
                    if row in unfinished:
                        ids[row].append(token)
                        if token in end_tokens:
                            unfinished.remove(row)
                yield [self._answer(row_ids) for row_ids in ids]
        finally:
            stop.requested.set()  # the caller may have gone before the end
            worker.join()

    def _end_tokens(self) -> set[int]:
        return set(stop_token_ids(self.model, self.processor))

    def _answer(self, ids: list[int]) -> Answer:
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(tuple(ids), text.strip())

    @torch.inference_mode()
    def score(
        self, image: Image.Image, question: str, answers: tuple[Answer, Answer]
    ) -> tuple[AnswerScore, AnswerScore]:
        """What both models think of each answer, its end token included where it has one."""
        with self._lock:
            tuned = [self._logp(image, question, answer.ids) for answer in answers]
            with self.model.disable_adapter():
                base = [self._logp(image, question, answer.ids) for answer in answers]
        first, second = (
            AnswerScore(len(answer.ids), b, t, self.beta * (t - b))
            for answer, b, t in zip(answers, base, tuned, strict=True)
        )
        return first, second

    def _logp(self, image: Image.Image, question: str, ids: tuple[int, ...]) -> float:
        """The log-prob of these tokens after the prompt, summed, in nats."""
        if not ids:
            return 0.0
        inputs = dict(model_inputs(self.model, self.processor, [image], [question]))
        inputs.pop("labels", None)
        by_token = inputs_by_token(inputs, inputs["input_ids"])
        ids_1A = torch.tensor([ids], device=self.model.device)
        mask_1A = torch.ones_like(ids_1A)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids_1A], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask_1A], dim=1)
        for name, types_1P in by_token.items():
            last = answer_token_type(self.processor, name, types_1P[:, -1:])
            types_1A = last.repeat_interleave(len(ids), dim=1)
            inputs[name] = torch.cat([types_1P, types_1A], dim=1)
        logits_AV = self.model(**inputs).logits[0, -len(ids) - 1 : -1].float()
        return float(logits_AV.log_softmax(-1).gather(-1, ids_1A[0, :, None]).sum())
