"""Aliases of public models, and what is known about them without a download.

Standard library only, because every command imports it.
Parameter counts were taken on the meta device (weights tied to each other counted once) from each
model's own configuration; totals agree with the sizes published on the Hub, which also count some
buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo.errors import ModelError, nearest

PARTS = ("vision", "connector", "embed/head", "text")


@dataclass(frozen=True)
class ModelEntry:
    """One known model.

    Attributes:
        alias: its short name.
        hub_id: where it lies on the Hub.
        parameters: how many it has, each weight counted once.
        by_part: the same by PARTS.
        lora_per_rank: how many parameters one rank of LoRA on all linear layers has; rank r has r
            times as many.
        recipe: option values that a command starts from, by command.
    """

    alias: str
    hub_id: str
    parameters: int
    by_part: Mapping[str, int]
    lora_per_rank: int
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _entry(
    alias: str, hub_id: str, parts: tuple[int, int, int, int], lora_r16: int, **more: Any
) -> ModelEntry:
    by_part = dict(zip(PARTS, parts, strict=True))
    return ModelEntry(alias, hub_id, sum(parts), by_part, lora_r16 // 16, **more)


TINY_RECIPE: dict[str, dict[str, Any]] = {
    "train": {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 3e-4,
        # Without the anchor descriptions get short: Cover fell from 86.7 to 63.7.
        "loss_type": "sigmoid,sft",
        "logging_steps": 5,
    },
    "eval-amber": {"batch_size": 128},
}

_ENTRIES = (
    _entry("tiny", "tiny", (887680, 641920, 105472, 787584), 401408, recipe=TINY_RECIPE),
    _entry(
        "idefics2-8b",
        "HuggingFaceM4/idefics2-8b",
        (417792240, 743219200, 262168576, 6979588096),
        55348736,
    ),
    _entry(
        "llava-1.5-7b",
        "llava-hf/llava-1.5-7b-hf",
        (303507456, 20979712, 262668288, 6476271616),
        47267840,
    ),
    _entry(
        "llava-1.5-13b",
        "llava-hf/llava-1.5-13b-hf",
        (303507456, 31467520, 328335360, 12688184320),
        69926912,
    ),
    _entry(
        "llava-v1.6-mistral-7b",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        (303507456, 20983808, 262668288, 6979588096),
        49233920,
    ),
    _entry(
        "paligemma-3b-224",
        "google/paligemma-3b-pt-224",
        (412442352, 2361344, 526778368, 1981884416),
        28358144,
    ),
    _entry(
        "paligemma2-3b",
        "google/paligemma2-3b-pt-224",
        (412442352, 2656512, 592625664, 2024517888),
        29517312,
    ),
    _entry(
        "qwen2-vl-2b",
        "Qwen/Qwen2-VL-2B-Instruct",
        (631183360, 34087936, 233373696, 1310340608),
        29220864,
    ),
    _entry(
        "qwen2-vl-7b",
        "Qwen/Qwen2-VL-7B-Instruct",
        (631183360, 44575744, 1089994752, 6525621760),
        51159040,
    ),
    _entry(
        "qwen2.5-vl-3b",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        (631975680, 36708608, 311164928, 2774773760),
        41363456,
    ),
    _entry(
        "qwen2.5-vl-7b",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        (631975680, 44574464, 1089994752, 6525621760),
        51824640,
    ),
    _entry(
        "qwen3-vl-2b",
        "Qwen/Qwen3-VL-2B-Instruct",
        (306242560, 100714496, 311164928, 1409410048),
        24641536,
    ),
    _entry(
        "qwen3-vl-4b",
        "Qwen/Qwen3-VL-4B-Instruct",
        (306242560, 109105152, 388956160, 3633511936),
        40271872,
    ),
    _entry(
        "qwen3-vl-8b",
        "Qwen/Qwen3-VL-8B-Instruct",
        (415891440, 160496896, 1244659712, 6946075648),
        52493824,
    ),
    _entry(
        "qwen3-vl-30b-a3b",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        (415891440, 122739968, 622329856, 29909792768),
        22085120,
    ),
    _entry(
        "qwen3.5-4b",
        "Qwen/Qwen3.5-4B",
        (306242560, 27271680, 635699200, 3570052096),
        38993920,
    ),
    _entry(
        "qwen3.5-9b",
        "Qwen/Qwen3.5-9B",
        (415891440, 40119040, 2034237440, 6919565824),
        51265024,
    ),
    _entry(
        "qwen3.5-27b",
        "Qwen/Qwen3.5-27B",
        (415891440, 44838656, 2542796800, 24353201664),
        124730880,
    ),
    _entry(
        "qwen3.5-35b-a3b",
        "Qwen/Qwen3.5-35B-A3B",
        (415891440, 30679808, 1017118720, 33643491968),
        30431360,
    ),
    _entry(
        "gemma-4-e4b",
        "google/gemma-4-E4B-it",
        # The Hub's total of 7,996,156,490 also has 55,055,616 key and value weights of layers that
        # take them from another layer, which no class of transformers loads.
        (472189216, 5898240, 671088640, 6791924736),
        50499584,
    ),
    _entry(
        "gemma-4-26b-a4b",
        "google/gemma-4-26B-A4B-it",
        (569548080, 3244032, 738197504, 24494944256),
        29732096,
    ),
    _entry(
        "gemma-4-31b",
        "google/gemma-4-31B-it",
        (569548080, 6193152, 1409286144, 29288059136),
        133616896,
    ),
    _entry(
        "glm-4.6v-flash",
        "zai-org/GLM-4.6V-Flash",
        (707416576, 185081856, 1241513984, 8158765056),
        58607616,
    ),
    _entry(
        "smolvlm-256m",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        (86433024, 7077888, 56770560, 106203456),
        7744512,
    ),
    _entry(
        "smolvlm-500m",
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        (86433024, 11796480, 94617600, 314635200),
        11549696,
    ),
    _entry(
        "smolvlm-2.2b",
        "HuggingFaceTB/SmolVLM-Instruct",
        (412987248, 21233664, 201338880, 1610713088),
        26981888,
    ),
    _entry(
        "gemma-3-4b", "google/gemma-3-4b-it", (416866032, 2950272, 671252480, 3209010688), 38497792
    ),
)
ENTRIES: dict[str, ModelEntry] = {entry.alias: entry for entry in _ENTRIES}


def find(model: str) -> ModelEntry | None:
    """The entry of an alias or Hub id, or None."""
    if model in ENTRIES:
        return ENTRIES[model]
    return next((entry for entry in _ENTRIES if entry.hub_id.lower() == model.lower()), None)


def get(model: str) -> ModelEntry:
    """The entry of an alias or Hub id. Raises ModelError for others, naming the nearest alias."""
    entry = find(model)
    if entry is None:
        hint = nearest(model, ENTRIES) or f" Known: {', '.join(ENTRIES)}"
        raise ModelError(f"--model: no exact parameter counts for '{model}'.{hint}")
    return entry


def hub_id(model: str) -> str:
    """What to load for `--model`: the Hub id of an alias; anything else as it is, `~` expanded."""
    entry = find(model)
    if entry is not None:
        return entry.hub_id
    return str(Path(model).expanduser()) if model.startswith("~") else model


def is_same_name(one: str, other: str) -> bool:
    """Whether two names of `--model` are one model: by alias, Hub id or path."""
    names = (hub_id(one), hub_id(other))
    return names[0].lower() == names[1].lower() or (
        Path(names[0]).is_dir() and Path(names[0]).absolute() == Path(names[1]).absolute()
    )


def recipe(model: str, command: str) -> Mapping[str, Any]:
    """The option values that `command` starts from for this model; empty for most models."""
    entry = find(model)
    return entry.recipe.get(command, {}) if entry else {}


def short_name(model: str) -> str:
    """A name for folders: the alias, or the last part of a Hub id or path."""
    entry = find(model)
    return entry.alias if entry else Path(model).name
