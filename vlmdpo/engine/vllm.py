"""Greedy answers through vLLM, for GPU machines that have it: it batches and shares prefixes by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo.engine.generate import render_prompt
from vlmdpo.errors import MissingDependencyError, ModelError, install_command
from vlmdpo.models.load import pretrained_source
from vlmdpo.models.protocols import Processor


class VllmGenerator:
    """One model in vLLM, with or without its adapter. Raises MissingDependencyError, ModelError."""

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
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as problem:
            raise MissingDependencyError(
                f"--engine vllm needs vLLM and a GPU: {install_command(extra='vllm')}; or leave "
                "--engine out"
            ) from problem
        self._vllm, self.processor = vllm, processor
        self._lora = LoRARequest("tuned", 1, str(adapter)) if adapter else None
        lora_options: dict[str, Any] = (
            {"enable_lora": True, "max_lora_rank": _supported_rank(adapter)} if adapter else {}
        )
        try:
            self._engine = vllm.LLM(
                model=pretrained_source(model),
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                limit_mm_per_prompt={"image": 1},
                enable_prefix_caching=True,
                seed=0,
                **lora_options,
            )
        except (ValueError, RuntimeError, OSError) as problem:
            raise ModelError(
                f"--engine vllm cannot run '{model}': {str(problem).splitlines()[0]}"
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
        prompts = [
            {
                "prompt": render_prompt(self.processor, question),
                "multi_modal_data": {"image": image},
            }
            for image, question in zip(images, questions, strict=True)
        ]
        settings = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        outputs = self._engine.generate(
            prompts, settings, lora_request=self._lora if tuned else None, use_tqdm=False
        )
        return [output.outputs[0].text.strip() for output in outputs]


def _supported_rank(adapter: Path) -> int:
    """The adapter's rank, rounded up to one that vLLM has kernels for."""
    from peft import PeftConfig

    rank = int(getattr(PeftConfig.from_pretrained(str(adapter)), "r", 16))
    supported = (8, 16, 32, 64, 128, 256, 320, 512, rank)
    return next(other for other in supported if other >= rank)
