"""Make the adapter that ships with the embedded model.

It is the result of `vlmdpo train` without options, in bfloat16, with some of the answers that it
changed. Run it again after a change to the embedded model or data:

    python examples/embedded_adapter.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlmdpo.commands import compare, eval_amber, train
from vlmdpo.config import EvalAmberConfig, TrainConfig, recipes
from vlmdpo.models.registry import recipe
from vlmdpo.report.html import evenly

_FLIPS = 24


def main(folder: Path = compare.SHIPPED) -> None:
    """Train, evaluate, and write the three files of the shipped adapter."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "adapter"
        train.run(recipes.build(TrainConfig, recipe("tiny", "train"), {"output_dir": out}))
        layer = {"adapter": out, "output_dir": Path(name) / "amber", "task": "discriminative"}
        report = eval_amber.run(recipes.build(EvalAmberConfig, recipe("tiny", "eval-amber"), layer))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: weight.to(torch.bfloat16)
            for name, weight in load_file(out / "adapter_model.safetensors").items()
        }
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(out / "adapter_config.json", folder / "adapter_config.json")
    kept = [
        {name: flip[name] for name in ("image", "question")}
        for flip in evenly(report["comparison"]["flips"], _FLIPS)
    ]
    (folder / compare.FLIPS).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
