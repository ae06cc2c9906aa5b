"""A model that is loaded once and asked many questions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from vlmdpo.config import InferConfig
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.models.option_layers import config_of

if TYPE_CHECKING:
    from PIL import Image

    from vlmdpo.engine.decode import PromptTreeDecoder
    from vlmdpo.models.protocols import Processor, VisionLanguageModel

# Fields of InferConfig that say how a model is loaded and prompted.
_LOADING = (
    *("revision", "trust_remote_code", "dtype", "attn_implementation", "device"),
    *("image_splitting", "system", "chat_template_kwargs"),
)


class Asker:
    """Answers questions about images: each image is encoded once for all questions about it, and
    what their prompts begin with is read once.

    Args:
        model: an alias ("tiny", "llava-1.5-7b"), Hub id or folder; or a loaded model. None for the
            base that the adapter names or, without one, "tiny".
        adapter: the folder of a trained adapter.
        processor: of a loaded model; None for a model by name.
        options: `dtype`, `device`, `revision`, `trust_remote_code`, `attn_implementation`,
            `image_splitting`, `system`, `chat_template_kwargs`: as of `vlmdpo infer`.

    Attributes:
        model, processor: what answers.

    Raises:
        ConfigError: an unknown option, or one that a loaded model cannot take.
        ModelError, MissingDependencyError: the model or adapter cannot be loaded.
    """

    def __init__(
        self,
        model: str | VisionLanguageModel | None = None,
        *,
        adapter: str | Path | None = None,
        processor: Processor | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            if name not in _LOADING:
                raise ConfigError(f"{name}: not an option of Asker; it has {', '.join(_LOADING)}")
        if model is None or isinstance(model, str):
            if processor is not None:
                raise ConfigError("processor: only of a loaded model; a name brings its own")
            self._load(model, adapter, options)
        elif processor is None or options or adapter is not None:
            raise ConfigError("a loaded model is asked as it is, with processor=... and no options")
        else:
            self.model: Any = model
            self.processor: Processor = processor
        self._decoder: PromptTreeDecoder | None = None

    def _load(self, model: str | None, adapter: str | Path | None, options: dict[str, Any]) -> None:
        from vlmdpo.models.configured import configured_model, configured_processor

        given = {**options, "model": model, "adapter": adapter}
        config = config_of(InferConfig, "infer", {n: v for n, v in given.items() if v is not None})
        self.model = configured_model(config, adapter=config.adapter)
        self.processor = configured_processor(config, adapter=config.adapter)

    @overload
    def ask(  # type: ignore[overload-overlap]  # a text is a sequence of texts
        self,
        image: Image.Image | str | Path,
        questions: str,
        *,
        max_new_tokens: int = ...,
        tuned: bool = ...,
        batch_size: int = ...,
    ) -> str: ...
    @overload
    def ask(
        self,
        image: Image.Image | str | Path,
        questions: Sequence[str],
        *,
        max_new_tokens: int = ...,
        tuned: bool = ...,
        batch_size: int = ...,
    ) -> list[str]: ...
    def ask(
        self,
        image: Image.Image | str | Path,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        tuned: bool = True,
        batch_size: int = 32,
    ) -> str | list[str]:
        """The greedy answer to each question about an image; a single one for a single question.

        Args:
            image: an image, or its file.
            max_new_tokens: longest answer.
            tuned: whether the adapter is on, if there is one.
            batch_size: questions per forward pass.

        Raises DataError for an image or a question that the model cannot take.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        if not asked:
            return []
        with self._adapter(tuned), _one_line(), self._tree().open(_opened(image)) as opened:
            answers = opened.answer(asked, max_new_tokens, batch_size=batch_size)
        return answers[0] if isinstance(questions, str) else answers

    def sample(
        self,
        image: Image.Image | str | Path,
        questions: Sequence[str],
        *,
        num_return_sequences: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 42,
        max_new_tokens: int = 128,
        tuned: bool = True,
    ) -> list[list[str]]:
        """Answers to each question that are drawn, `num_return_sequences` of them.

        They have the distribution of `generate`'s. Image and question are read once for all of
        them. The same seed draws the same answers to a question about an image, whatever is asked
        beside it; torch's own generators are left as they were.

        Args:
            temperature: above 0, what logits are divided by.
            top_p: tokens are drawn from the most likely ones that together have this probability.
            others: as of `ask`.

        Raises ConfigError for settings out of range, else as `ask`.
        """
        from vlmdpo.engine.sampling import Sampling

        if not temperature > 0 or not 0 < top_p <= 1 or num_return_sequences < 1:
            raise ConfigError(
                "sample needs a temperature above 0, a top_p above 0 and up to 1, and 1 or more "
                "num_return_sequences; ask gives greedy answers"
            )
        sampling = Sampling(temperature, top_p, num_return_sequences, seed)
        asked = list(questions)
        with self._adapter(tuned), _one_line(), self._tree().open(_opened(image)) as opened:
            drawn = opened.sample(asked, sampling, max_new_tokens)
        return [[sample.text for sample in samples] for samples in drawn]

    def _tree(self) -> PromptTreeDecoder:
        if self._decoder is None:
            from vlmdpo.benchmarks.ask import adapts_vision
            from vlmdpo.engine.decode import PromptTreeDecoder

            self._decoder = PromptTreeDecoder(
                self.model, self.processor, keep_features=not adapts_vision(self.model)
            )
        return self._decoder

    def _adapter(self, on: bool) -> contextlib.AbstractContextManager[Any]:
        if on or not hasattr(self.model, "disable_adapter"):
            return contextlib.nullcontext()
        off: contextlib.AbstractContextManager[Any] = self.model.disable_adapter()
        return off


def answer(
    model: str | VisionLanguageModel | None,
    image: Image.Image | str | Path,
    questions: Sequence[str],
    *,
    adapter: str | Path | None = None,
    processor: Processor | None = None,
    max_new_tokens: int = 128,
    **options: Any,
) -> list[str]:
    """The greedy answers of a model to questions about one image. To ask about several images, make
    an `Asker`, which loads the model once.

    Args and errors: of `Asker` and `Asker.ask`.
    """
    asker = Asker(model, adapter=adapter, processor=processor, **options)
    return asker.ask(image, list(questions), max_new_tokens=max_new_tokens)


def _opened(image: Image.Image | str | Path) -> Image.Image:
    """An upright RGB image. Raises DataError."""
    from vlmdpo.data.images import open_file, upright_rgb
    from vlmdpo.data.reasons import BadImage

    where = f"'{image}': " if isinstance(image, (str, Path)) else ""
    try:
        if isinstance(image, (str, Path)):
            return open_file(Path(image))
        return upright_rgb(image)
    except BadImage as problem:
        raise DataError(f"image: {where}{problem}") from problem


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Inside, a question that cannot be asked is a DataError."""
    from vlmdpo.data.reasons import BadRow

    try:
        yield
    except BadRow as problem:
        raise DataError(f"this question cannot be asked: {problem}") from problem
