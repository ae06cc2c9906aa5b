"""The table in docs/models.md: every family through every command.

    python -m tests.support.matrix --write    # after a change that changes the table

Each family is a small model with random weights and a real processor. `tests/test_matrix.py`
compares the table with what happens, row by row.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import vlmdpo
from tests.support import templates
from tests.support.plots import blank_plot
from vlmdpo.commands import estimate_memory, eval_amber, export, infer, prepare, train
from vlmdpo.config import (
    EstimateMemoryConfig,
    EvalAmberConfig,
    ExportConfig,
    InferConfig,
    PrepareConfig,
    TrainConfig,
)
from vlmdpo.data.images import open_file
from vlmdpo.engine.generate import answer
from vlmdpo.engine.side_by_side import SideBySide
from vlmdpo.models.load import load_model, load_processor
from vlmdpo.tiny import random_models

DOCS = Path(vlmdpo.__file__).parent.parent / "docs" / "models.md"
BEGIN, END = (
    "<!-- matrix: made by python -m tests.support.matrix --write -->",
    "<!-- end of matrix -->",
)
COLUMNS = (
    "prepare",
    "estimate-memory",
    "LoRA",
    "full",
    "one tree per image",
    "infer",
    "eval-amber, shared",
    "compare, in one batch",
    "reload",
    "merge",
)


@dataclass(frozen=True)
class Family:
    """A row of the table: a name, an example checkpoint, and the small family for it.

    Attributes:
        template: the kind of chat template, of `templates.KINDS`, that such models are published
            with; None for the small model's own.
        set: of `train --set`.
        packages: what its processor or model needs besides vlmdpo's own dependencies.
    """

    name: str
    checkpoint: str
    small: str
    template: str | None = None
    set: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Those of `packages` that are not installed here."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


# Experts' own balancing loss counts whole rows; without it a pair can be one.
_NO_ROUTER_LOSS = ("router_aux_loss_coef=0",)
_TORCHVISION = ("torchvision",)
_TIMM = ("timm", "torchvision")


FAMILIES = (
    Family("Idefics2", "HuggingFaceM4/idefics2-8b", "idefics2", "line break"),
    Family("Idefics3", "HuggingFaceM4/Idefics3-8B-Llama3", "idefics3", "line break"),
    Family("SmolVLM, SmolVLM2", "HuggingFaceTB/SmolVLM-Instruct", "smolvlm", "line break"),
    Family("LLaVA-1.5", "llava-hf/llava-1.5-7b-hf", "llava", "no end"),
    Family("LLaVA-NeXT", "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", "plain answers"),
    Family(
        "LLaVA-OneVision",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava_onevision",
        "own system",
    ),
    Family("PaliGemma", "google/paligemma-3b-pt-224", "paligemma"),
    Family("PaliGemma 2", "google/paligemma2-3b-pt-224", "paligemma2"),
    Family("Gemma 3", "google/gemma-3-4b-it", "gemma3", "stripped"),
    Family("Gemma 3n", "google/gemma-3n-E2B-it", "gemma3n", "stripped", packages=_TIMM),
    Family("Gemma 4", "google/gemma-4-E2B-it", "gemma4", "extra in prompt"),
    Family("Gemma 4, experts", "google/gemma-4-26B-A4B-it", "gemma4_moe", "extra in prompt"),
    Family("InternVL3", "OpenGVLab/InternVL3-8B-hf", "internvl", "own system"),
    Family("Qwen2-VL", "Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", "own system"),
    Family("Qwen2.5-VL", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", "own system"),
    Family("Qwen3-VL", "Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl"),
    Family(
        "Qwen3-VL, experts", "Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe", set=_NO_ROUTER_LOSS
    ),
    Family("Qwen3.5", "Qwen/Qwen3.5-4B", "qwen3_5", "thinking"),
    Family(
        "Qwen3.5, experts", "Qwen/Qwen3.5-35B-A3B", "qwen3_5_moe", "thinking", set=_NO_ROUTER_LOSS
    ),
    Family("GLM-4.1V", "zai-org/GLM-4.1V-9B-Thinking", "glm4v", "always thinks"),
    Family("GLM-4.6V", "zai-org/GLM-4.6V-Flash", "glm46v", "header in answer"),
    Family("Aya Vision", "CohereLabs/aya-vision-8b", "aya_vision", "plain answers"),
    Family("Ovis2", "thisisiron/Ovis2-2B-hf", "ovis2", "concatenated"),
    Family("DeepSeek-VL", "deepseek-community/deepseek-vl-1.3b-chat", "deepseek_vl", "plain"),
    Family("MiniCPM-V 4.6", "openbmb/MiniCPM-V-4.6", "minicpm_v", "thinking"),
    Family(
        "Pixtral",
        "mistral-community/pixtral-12b",
        "pixtral",
        "plain answers",
        packages=_TORCHVISION,
    ),
    Family(
        "Mistral 3",
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral3",
        "dated",
        packages=_TORCHVISION,
    ),
    Family("LFM2-VL", "LiquidAI/LFM2-VL-1.6B", "lfm2_vl", packages=_TORCHVISION),
    Family("Kimi K2.5", "moonshotai/Kimi-K2.5", "kimi_k25", "no system", packages=_TORCHVISION),
)


NOT_TRAINED = ("llama4",)  # TRL cannot train it: docs/models.md


def examine(family: Family) -> dict[str, str]:
    """{column: "yes" or the reason why not} of a family. Works in the current folder."""
    model, processor = random_models.make(family.small, seed=3)
    if family.template is not None:
        processor.chat_template = templates.of_family(family.template, processor.chat_template)
    model.save_pretrained("model")
    processor.save_pretrained("model")
    _rows(Path("rows.jsonl"))
    base = {"model": "./model"}
    with _without_what_no_family_changes():
        found = {
            **_before_training(base),
            **_training(base, family.set),
            **_asking(base),
        }
        # `train` compared what it saved with the live model, and raises an error if they differ.
        found["reload"] = _yes(
            isinstance(load_processor("./full").chat_template, str)
            and Path("lora/adapter_model.safetensors").is_file()
        )
        merged = export.run(ExportConfig(adapter=Path("lora"), merge=True, **base))["agreement"]
    found["merge"] = _yes(merged["same_answers"] == merged["of"])
    return found


@contextlib.contextmanager
def _without_what_no_family_changes():
    """Inside, plots are blank, and objects that imports left are not collected again."""
    is_frozen = gc.get_freeze_count() > 0  # by tests.conftest
    if not is_frozen:
        gc.freeze()
    try:
        with mock.patch("matplotlib.figure.Figure.savefig", blank_plot):
            yield
    finally:
        if not is_frozen:
            gc.unfreeze()


def _before_training(base: dict[str, str]) -> dict[str, str]:
    prepared = prepare.run(PrepareConfig(dataset="rows.jsonl", output_dir=Path("data"), **base))
    # Without an adapter there are half as many operations to simulate, of the same model.
    settings = {"per_device_train_batch_size": 2, "gradient_checkpointing": False, "lora": False}
    estimate = estimate_memory.run(EstimateMemoryConfig(dataset="data", **settings, **base))
    return {
        "prepare": _yes(
            prepared["rows_out"] == 6 and prepared["lengths"]["image_tokens"]["max"] > 0
        ),
        "estimate-memory": _yes(estimate["peak_bytes"] > estimate["allocated"]["total_bytes"]),
    }


def _training(base: dict[str, str], set_: tuple[str, ...]) -> dict[str, str]:
    settings = {
        "dataset": "data",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "sample_every": 0,  # `_asking` asks the tuned model
        "set": set_,
    }
    tuned = train.run(TrainConfig(output_dir=Path("lora"), **settings, **base))
    whole = train.run(TrainConfig(output_dir=Path("full"), lora=False, **settings, **base))
    return {
        "LoRA": _yes(tuned["steps"] == 2 and _learnt("lora")),
        "full": _yes(whole["steps"] == 2 and _learnt("full")),
        "one tree per image": _yes(tuned["engine"] == "shared", tuned["fallback_reason"]),
    }


def _asking(base: dict[str, str]) -> dict[str, str]:
    tuned = {"adapter": Path("lora"), **base}
    Image.new("RGB", (40, 30), "red").save("x.png")
    said = infer.run(InferConfig(image=Path("x.png"), question="What?", max_new_tokens=4, **tuned))
    few = {"limit": 2, "verify": 2, "batch_size": 4}
    few |= {"max_new_tokens": 3, "max_description_tokens": 3}
    asked = eval_amber.run(EvalAmberConfig(output_dir=Path("amber"), **few, **tuned))
    shared = asked["engine"] == "shared" and not asked["fallback_reason"]
    return {
        "infer": _yes(isinstance(said["answer"], str)),
        "eval-amber, shared": _yes(shared, asked["fallback_reason"]),
        "compare, in one batch": _side_by_side("x.png", said["answer"]),
    }


def _side_by_side(image: str, tuned_answer: str) -> str:
    """Whether base and tuned answer in one batch; either way the answers equal those of `infer`."""
    model = load_model("./model", adapter=Path("lora"))
    models = SideBySide(model, load_processor("./model"), 0.1)
    opened = open_file(Path(image))
    said = list(models.stream(opened, "What?", 4))[-1]
    with model.disable_adapter():
        base_answer = answer(model, models.processor, [opened], ["What?"], 4)[0]
    assert (said[0].text, said[1].text) == (base_answer, tuned_answer)
    judged = models.score(opened, "What?", said)
    assert all(
        np.isfinite([one.base_logp, one.tuned_logp]).all() and one.tuned_logp < 0 for one in judged
    )
    return _yes(
        models.in_one_batch, "PEFT cannot mix the batch, so the answers come one after the other"
    )


def _rows(path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        size = (int(rng.integers(24, 60)), int(rng.integers(24, 60)))
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(f"{i}.png")
        lines.append(
            {
                "image": f"{i}.png",
                "question": f"What is {i}?",
                "chosen": "good " * (i + 1),
                "rejected": "bad",
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _learnt(folder: str) -> bool:
    """Whether the loss of a run starts at ln 2 and then moves."""
    losses = [
        json.loads(line)["loss"]
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ]
    return abs(losses[0] - 0.6931) < 1e-3 and abs(losses[1] - losses[0]) > 1e-5


def _yes(holds: bool, reason: str | None = None) -> str:
    return "yes" if holds else f"no: {reason or 'it does not hold'}"


def row(family: Family, found: dict[str, str]) -> str:
    """A family's line of the table, with a reason for each `no`."""
    marks = [
        found[column]
        if found[column] == "yes"
        else f"no ({reasons(found).index(found[column]) + 1})"
        for column in COLUMNS
    ]
    notes = "; ".join(_numbered(found)) or "-"
    return f"| {family.name} | `{family.checkpoint}` | {' | '.join(marks)} | {notes} |"


def reasons(found: dict[str, str]) -> list[str]:
    """The reasons of all columns that say no, without duplicates."""
    return list(dict.fromkeys(cell for cell in found.values() if cell != "yes"))


def _numbered(found: dict[str, str]) -> list[str]:
    return [
        f"({number}) {said.removeprefix('no: ')}"
        for number, said in enumerate(reasons(found), start=1)
    ]


def table() -> str:
    """All rows, each family examined in its own folder; rows of families that need a package that
    is not installed here stay as they are.
    """
    head = ["Family", "Example checkpoint", *COLUMNS, "Reason"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    before = DOCS.read_text(encoding="utf-8").splitlines()
    here = os.getcwd()
    for family in FAMILIES:
        if family.missing:
            lines += [line for line in before if line.startswith(f"| {family.name} |")]
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            os.chdir(folder)
            try:
                lines.append(row(family, examine(family)))
            finally:
                os.chdir(here)
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    given = parser.parse_args()
    made = table()
    if given.write:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(
            f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
