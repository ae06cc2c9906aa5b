"""Answers through vLLM, for GPU machines that have it: it batches and shares prefixes by
itself.

vLLM has no part in training here, so whatever it could do otherwise is settled in the call: it gets
token ids, the settings of our image processor, and only adapters that it applies as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo import ui
from vlmdpo.config import EvalAmberConfig, InferConfig, MakePairsConfig
from vlmdpo.engine.content_keys import image_key
from vlmdpo.engine.sampling import GREEDY, Sample, Sampling
from vlmdpo.errors import (
    MemoryBudgetError,
    MissingDependencyError,
    ModelError,
    install_command,
    is_out_of_memory,
)
from vlmdpo.models.adapter_files import check_adapter
from vlmdpo.models.families import inserts_image_tokens, parameters_by_part
from vlmdpo.models.load import meta_model, pretrained_source
from vlmdpo.models.protocols import Processor
from vlmdpo.models.rendering import render_question, rendering_of

# How vLLM says at its start that the GPU's memory does not suffice.
_TOO_LITTLE_MEMORY = ("less than desired GPU memory", "No available memory for the cache blocks")


class VllmGenerator:
    """One model in vLLM, with or without its adapter: `start` it, then `generate`.

    Raises MissingDependencyError, and ModelError for what vLLM would compute otherwise than the
    other engines without a word.
    """

    def __init__(
        self,
        model: str,
        processor: Processor,
        adapter: Path | None,
        *,
        revision: str | None,
        dtype: str,
        trust_remote_code: bool,
    ) -> None:
        self._vllm, lora_request = _import_vllm()
        _check_model_and_adapter(model, processor, adapter, revision, trust_remote_code)
        self.model, self.processor = model, processor
        self._lora = lora_request("tuned", 1, str(adapter)) if adapter else None
        self._options: dict[str, Any] = {
            "model": pretrained_source(model),
            "revision": revision,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "limit_mm_per_prompt": {"image": 1},
            "mm_processor_kwargs": _image_settings(processor),
            "enable_prefix_caching": True,
            "seed": 0,
        }
        if adapter:
            self._options |= {"enable_lora": True, "max_lora_rank": _supported_rank(adapter)}

    def start(self) -> None:
        """Load the model. vLLM takes most of the GPU's memory from here on.

        Raises ModelError, MemoryBudgetError.
        """
        try:
            self._engine = self._vllm.LLM(**self._options)
        except (ValueError, RuntimeError, OSError) as problem:
            reason = str(problem).splitlines()[0]
            if is_out_of_memory(problem) or any(text in reason for text in _TOO_LITTLE_MEMORY):
                raise MemoryBudgetError(
                    f"--engine vllm: '{self.model}' does not fit the GPU: {reason}; close what "
                    "else uses it, or leave --engine out"
                ) from problem
            raise ModelError(
                f"--engine vllm cannot run '{self.model}': {reason}; leave --engine out"
            ) from problem

    def generate(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        tuned: bool,
    ) -> list[str]:
        """The greedy answers, stripped, one for each image and question.

        Args:
            tuned: whether the adapter is on.
        """
        answers = self.answers_to(images, questions, max_new_tokens, GREEDY, tuned=tuned)
        return [texts[0] for texts in answers]

    def answers_to(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        tuned: bool,
    ) -> list[list[str]]:
        """The answers, stripped, to each image and question. For `tuned` see `generate`."""
        samples = self.sample(images, questions, max_new_tokens, sampling, tuned=tuned)
        return [[sample.text for sample in answers] for answers in samples]

    def sample(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        tuned: bool,
    ) -> list[list[Sample]]:
        """The answers to each image and question; one where nothing is drawn.

        Draws are seeded by the seed, the image's pixels and the question, whatever is asked beside
        it. For `tuned` see `generate`.
        """
        prompts = [
            # One image token stands for the image; vLLM puts in the others.
            {
                "prompt_token_ids": self._ids(render_question(self.processor, question)),
                "multi_modal_data": {"image": image},
            }
            for image, question in zip(images, questions, strict=True)
        ]
        settings = [
            self._settings([image], question, max_new_tokens, sampling)
            for image, question in zip(images, questions, strict=True)
        ]
        outputs = self._engine.generate(
            prompts, settings, lora_request=self._lora if tuned else None, use_tqdm=False
        )
        return [[_sample(answer) for answer in output.outputs] for output in outputs]

    def complete(self, texts: Sequence[str], max_new_tokens: int, *, tuned: bool) -> list[str]:
        """The greedy answers, stripped, to prompts without an image. For `tuned` see `generate`."""
        prompts = [
            {"prompt_token_ids": self._ids(render_question(self.processor, text, images=0))}
            for text in texts
        ]
        settings = [self._settings((), text, max_new_tokens, GREEDY) for text in texts]
        outputs = self._engine.generate(
            prompts, settings, lora_request=self._lora if tuned else None, use_tqdm=False
        )
        return [_sample(output.outputs[0]).text for output in outputs]

    def _ids(self, rendered: str) -> list[int]:
        """Ids, because vLLM would add special tokens to a text."""
        ids: list[int] = self.processor.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def _settings(
        self,
        images: Sequence[Image.Image],
        question: str,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Any:
        """vLLM's `SamplingParams` of one question."""
        # The model's own, for its repetition penalty; `transformers` applies it too.
        settings = self._engine.get_default_sampling_params()
        asked = {"temperature": sampling.temperature, "max_tokens": max_new_tokens}
        if not sampling.is_greedy:
            asked |= {"top_p": sampling.top_p, "top_k": -1, "n": sampling.count}
            asked |= {"seed": sampling.seed_of((image_key(images), question))}
        for name, value in asked.items():
            setattr(settings, name, value)
        end = rendering_of(self.processor).end_token_id
        settings.stop_token_ids = [*(settings.stop_token_ids or []), end]
        return settings


def _sample(answer: Any) -> Sample:
    """Of vLLM's `CompletionOutput`, whose ids include the end token."""
    finished = answer.finish_reason == "stop"
    return Sample(answer.text.strip(), len(answer.token_ids) - finished, finished)


def generator_for(
    config: InferConfig | EvalAmberConfig | MakePairsConfig, processor: Processor
) -> VllmGenerator:
    """The generator of a command's model and adapter. Raises as `VllmGenerator` does."""
    return VllmGenerator(
        config.model,
        processor,
        config.adapter,
        dtype=config.dtype,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def _import_vllm() -> tuple[Any, Any]:
    try:
        import vllm
        from vllm.lora.request import LoRARequest
    except ImportError as problem:
        raise MissingDependencyError(
            f"--engine vllm needs vLLM and a GPU: {install_command(extra='vllm')}; or leave "
            "--engine out"
        ) from problem
    return vllm, LoRARequest


def _check_model_and_adapter(
    model: str,
    processor: Processor,
    adapter: Path | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Raise ModelError for what vLLM would compute differently without a word."""
    if inserts_image_tokens(processor):
        raise ModelError(
            f"--engine vllm: the processor of '{model}' rewrites its prompts, which vLLM does "
            "otherwise; leave --engine out"
        )
    if adapter is None:
        return
    check_adapter(adapter, model, revision)
    skeleton = meta_model(model, revision=revision, trust_remote_code=trust_remote_code)
    outside = {
        name.rpartition(".")[0]
        for part, name, _ in parameters_by_part(skeleton)
        if part in ("vision", "connector")
    }
    ignored = sorted(_adapted_modules(adapter) & outside)
    if ignored:
        raise ModelError(
            f"--engine vllm would ignore the adapter's {ui.count(len(ignored), 'layer')} outside "
            "the "
            f"language model, as '{ignored[0]}'; merge it first, and evaluate the merged model: "
            f"vlmdpo export --adapter {adapter} --merge"
        )


def _adapted_modules(adapter: Path) -> set[str]:
    """Names of the modules that an adapter on disk changes, as the model names them."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = [str(name).removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118
    # "layers.0.q_proj.lora_A.weight", or the whole weight of a module that is trained as it is.
    return {name.partition(".lora_")[0].removesuffix(".weight") for name in names}


def _image_settings(processor: Processor) -> dict[str, Any]:
    """What differs here from the image processor that vLLM loads for itself."""
    splitting = getattr(processor.image_processor, "do_image_splitting", None)
    return {} if splitting is None else {"do_image_splitting": splitting}


def _supported_rank(adapter: Path) -> int:
    """The adapter's rank, rounded up to one that vLLM has kernels for."""
    from peft import PeftConfig

    rank = int(getattr(PeftConfig.from_pretrained(str(adapter)), "r", 16))
    supported = (8, 16, 32, 64, 128, 256, 320, 512, rank)
    return next(other for other in supported if other >= rank)
