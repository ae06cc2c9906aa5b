"""`vlmdpo export`: an adapter merged into its base as a standalone model, checked to answer the
same; uploads if asked.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import ExportConfig
from vlmdpo.errors import DataError, ModelError
from vlmdpo.models.registry import short_name

_QUESTIONS = (
    "Describe this image.",
    "Is there a moon in this image?",
    "What colour is it?",
    "How many are there?",
)
_SAME = {
    "torch.float32": 1e-4,
    "torch.bfloat16": 0.05,
    "torch.float16": 0.01,
}  # of logits, by what rounding makes of them


def run(config: ExportConfig) -> dict[str, Any]:
    """Merge, check, save, and upload where asked. Returns the report.

    Raises:
        DataError: an output folder that holds something else, a full disk, an upload that fails.
        ModelError: no adapter, another base than it was trained on, or a merged model that answers
            otherwise.
    """
    assert config.adapter is not None
    named = base_of_adapter(config.adapter)
    model = config.model if config.model != "tiny" else named
    report: dict[str, Any] = {
        "adapter": str(config.adapter),
        "model": model,
        "output_dir": None,
        "agreement": None,
    }
    folder = config.adapter
    if config.merge:
        folder = config.output_dir or config.adapter.with_name(f"{config.adapter.name}-merged")
        report |= {
            "output_dir": str(folder),
            "agreement": _merge(config, config.adapter, model, folder),
        }
    if config.push_to_hub:
        from vlmdpo import hub

        report["url"] = hub.model(folder, config.push_to_hub, private=config.private)
    return report


def base_of_adapter(adapter: Path) -> str:
    """The base model that an adapter names. Raises ModelError where the folder holds none."""
    from vlmdpo.models.load import check_adapter

    check_adapter(adapter)
    named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not isinstance(named, str) or not named:
        raise ModelError(f"--adapter: '{adapter}' names no base model; give it with --model")
    return named


def _merge(config: ExportConfig, adapter: Path, model: str, folder: Path) -> dict[str, Any]:
    """Write base and adapter as one model to `folder`, which appears once it is whole and was
    checked.
    """
    from vlmdpo.models import load
    from vlmdpo.report import model_card

    _usable(folder, config.overwrite)
    origin: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    processor = load.load_processor(model, **origin)
    how: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "attention": config.attn_implementation,
    }
    apart = load.load_model(model, adapter=adapter, **how, **origin)
    before = _said(apart, processor)
    merged = apart.merge_and_unload()
    part = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        merged.save_pretrained(part, safe_serialization=True)
        processor.save_pretrained(part)
        del apart, merged
        agreement = _agreement(
            before, _said(load.load_model(str(part.absolute()), **how), processor)
        )
        kept = (model_card.REPORT, model_card.RECIPE, model_card.AMBER, "learning_curves.png")
        for name in kept:
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


def _usable(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "config.json").is_file():
            raise DataError(
                f"--output-dir: '{folder}' holds something else; give an empty or new folder"
            )
        if not overwrite and not ui.confirm(f"'{folder}' holds a model. Replace it?"):
            raise DataError(
                f"--output-dir: '{folder}' holds a model; add --overwrite or give another folder"
            )


def _said(model: Any, processor: Any) -> tuple[list[Any], list[str], str]:
    """What a model makes of some questions to one picture: the first answer token's logits (V,),
    the answers, its type.
    """
    import torch
    from PIL import Image

    from vlmdpo.engine.generate import answer, model_inputs

    picture = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    logits = []
    with torch.no_grad():
        for question in _QUESTIONS:
            logits.append(
                model(**model_inputs(model, processor, [picture], [question]))
                .logits[0, -1]
                .float()
                .cpu()
            )
    answers = answer(model, processor, [picture] * len(_QUESTIONS), list(_QUESTIONS), 12)
    return logits, answers, str(next(model.parameters()).dtype)


def _agreement(
    before: tuple[list[Any], list[str], str], after: tuple[list[Any], list[str], str]
) -> dict[str, Any]:
    """How far the merged model is from base and adapter. Raises ModelError where that is more than
    rounding.
    """
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(after[0], before[0], strict=True))
    same = sum(a == b for a, b in zip(after[1], before[1], strict=True))
    if not apart <= _SAME[after[2]]:
        raise ModelError(
            f"the merged model differs from base and adapter by {100 * apart:.2g}% of its logits; "
            "merge in another --dtype"
        )
    return {
        "logits_apart": apart,
        "same_answers": same,
        "of": len(_QUESTIONS),
        "dtype": after[2].removeprefix("torch."),
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
            f"  reloaded, it gives {found['same_answers']} of {found['of']} answers alike; logits "
            "apart by "
            f"{found['logits_apart']:.1e} of their size"
        )
        ui.result(
            f"  use it as any model: vlmdpo infer --model {report['output_dir']} --image FILE "
            "--question TEXT"
        )
    if report.get("url"):
        ui.result(f"Uploaded: {report['url']}")
