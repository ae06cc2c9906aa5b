"""`vlmdpo export`: merge an adapter into its base, check the answers, upload if asked."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmdpo import ui
from vlmdpo.config import ExportConfig
from vlmdpo.errors import DataError, ModelError
from vlmdpo.models.adapter_files import check_adapter
from vlmdpo.models.configured import configured_model, configured_processor
from vlmdpo.models.registry import short_name

if TYPE_CHECKING:
    import torch

_QUESTIONS = (
    "Describe this image.",
    "Is there a moon in this image?",
    "What colour is it?",
    "How many are there?",
)
# Largest difference of logits, relative to their norm, that rounding explains.
_TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 0.05, "torch.float16": 0.01}


class _Responses(NamedTuple):
    """What a model makes of `_QUESTIONS` about one image."""

    logits: list[torch.Tensor]  # (V,) of each answer's first token
    answers: list[str]
    dtype: str


def run(config: ExportConfig) -> dict[str, Any]:
    """Merge, check, save, and upload if asked. Returns the report.

    Raises:
        DataError: an output folder that holds something else, a full disk, an upload that fails.
        ModelError: no adapter, a base it was not trained on, or a merged model that differs.
    """
    assert config.adapter is not None
    check_adapter(config.adapter, config.model, config.revision)
    report: dict[str, Any] = {
        "adapter": str(config.adapter),
        "model": config.model,
        "output_dir": None,
        "agreement": None,
    }
    folder = config.adapter
    if config.merge:
        folder = config.output_dir or config.adapter.with_name(f"{config.adapter.name}-merged")
        report |= {
            "output_dir": str(folder),
            "agreement": _merge(config, config.adapter, folder),
        }
    if config.push_to_hub:
        from vlmdpo import hub

        report["url"] = hub.model(folder, config.push_to_hub, private=config.private)
    return report


def _merge(config: ExportConfig, adapter: Path, folder: Path) -> dict[str, Any]:
    """Write base and adapter as one model to `folder`, which appears once it is complete and
    checked.
    """
    from vlmdpo.models.rendering import save_settings
    from vlmdpo.report import model_card

    _check_output(folder, config.overwrite)
    processor = configured_processor(config, adapter=adapter)
    with_adapter = configured_model(config, adapter=adapter)
    before = _respond(with_adapter, processor)
    merged = with_adapter.merge_and_unload()
    part = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        merged.save_pretrained(part, safe_serialization=True)
        processor.save_pretrained(part)
        save_settings(processor, part)
        del with_adapter, merged
        saved = dataclasses.replace(
            config, model=str(part.absolute()), revision=None, trust_remote_code=False
        )
        agreement = _agreement(before, _respond(configured_model(saved), processor))
        figures = (model_card.AMBER, model_card.EVALUATIONS, "learning_curves.png")
        for name in (model_card.REPORT, model_card.RECIPE, *figures):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, part / name)
        if (part / model_card.REPORT).is_file():
            model_card.write(part, merged=True)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except OSError as problem:
        raise DataError(f"cannot write '{folder}': {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return agreement


def _check_output(folder: Path, overwrite: bool) -> None:
    """Raise DataError for an output folder that may not be replaced."""
    if folder.is_file():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "config.json").is_file():
            raise DataError(
                f"--output-dir: '{folder}' holds something else; choose an empty or new folder"
            )
        if not overwrite and not ui.confirm(f"'{folder}' holds a model. Replace it?"):
            raise DataError(
                f"--output-dir: '{folder}' holds a model; add --overwrite or choose another folder"
            )


def _respond(model: Any, processor: Any) -> _Responses:
    """Ask the questions about a made-up image."""
    import torch
    from PIL import Image

    from vlmdpo.engine.generate import answer, model_inputs

    image = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    logits = []
    with torch.no_grad():
        for question in _QUESTIONS:
            logits.append(
                model(**model_inputs(model, processor, [image], [question]))
                .logits[0, -1]
                .float()
                .cpu()
            )
    answers = answer(model, processor, [image] * len(_QUESTIONS), list(_QUESTIONS), 12)
    return _Responses(logits, answers, str(next(model.parameters()).dtype))


def _agreement(before: _Responses, after: _Responses) -> dict[str, Any]:
    """How much the merged model differs from base and adapter.

    Raises ModelError if rounding does not explain it.
    """
    pairs = zip(after.logits, before.logits, strict=True)
    apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    same = sum(a == b for a, b in zip(after.answers, before.answers, strict=True))
    if not apart <= _TOLERANCE[after.dtype]:  # also for NaN
        raise ModelError(
            f"the merged model differs from base and adapter by {100 * apart:.2g}% of its logits; "
            "merge in another --dtype"
        )
    return {
        "logits_apart": apart,
        "same_answers": same,
        "of": len(_QUESTIONS),
        "dtype": after.dtype.removeprefix("torch."),
    }


def show(report: dict[str, Any]) -> None:
    """Print where the model is and how exactly it agrees."""
    if report["agreement"]:
        found = report["agreement"]
        ui.result(
            f"Merged {short_name(report['model'])} and {report['adapter']} into "
            f"{report['output_dir']} ({found['dtype']})"
        )
        ui.result(
            f"  reloaded, it gives {found['same_answers']} of {found['of']} identical answers; "
            f"logits differ by {found['logits_apart']:.1e} of their norm"
        )
        ui.result(
            f"  use it like any model: vlmdpo infer --model {report['output_dir']} --image FILE "
            "--question TEXT"
        )
    if report.get("url"):
        ui.result(f"Uploaded: {report['url']}")
