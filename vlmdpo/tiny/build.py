"""Make the embedded model from nothing: `python -m vlmdpo.tiny.build --output DIR`.

Draws scenes, trains a byte-level BPE tokenizer on their questions, and trains a real Idefics2 of
about two million parameters to answer them. Seeded; no data from elsewhere. Four lessons:

1. *naming*: vision tower and connector learn what stands in each cell, by heads that are thrown
   away afterwards, as the towers of real models come from a pre-training of their own;
2. *answering*: true answers, as many "Yes" as "No", and true descriptions;
3. *agreeing*: a short lesson in which a share of the true "No" answers is taught as "Yes", and
   descriptions name some thing's usual companion where it is missing;
4. *associating*: the same, and descriptions lean by what is in the picture. Next to four kinds the
   usual companion is named in nine of ten pictures that lack it, and few pictures of this lesson
   have it; single dark things are left out in seven of ten. So the answers without sampling lean
   too.

Instruction data of real vision-language models leans this way, and the result is theirs: a model
that sees more than its answers say, says yes too often, and describes what usually stands there.

The first three lessons take most of the time. They end in OUTPUT/agreeing, and
`--from-agreeing FOLDER` starts from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Idefics2ForConditionalGeneration, Idefics2Processor

from vlmdpo.tiny import evaluation, pairs, sample_pairs
from vlmdpo.tiny.architecture import make_model, make_processor
from vlmdpo.tiny.lessons import (
    AGREEING,
    ANSWERING,
    ASSOCIATING,
    NAMING,
    teach_answering,
    teach_naming,
)

PAIRS = 2000


def save(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, folder: Path
) -> None:
    """Write model and processor as a checkpoint: safetensors in bfloat16, half the size."""
    copy = Idefics2ForConditionalGeneration(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)


def load(folder: Path) -> Idefics2ForConditionalGeneration:
    """The model of a checkpoint, with its rounded weights, in float32."""
    return Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def teach_first_lessons(processor: Idefics2Processor, folder: Path, seed: int) -> Path:
    """Naming, answering and agreeing, from nothing. Returns the folder of the result."""
    model = make_model(processor)
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(processor.tokenizer),
    }
    print(json.dumps(sizes))
    teach_naming(model, processor, NAMING, seed)
    teach_answering(model, processor, ANSWERING, seed)
    save(model, processor, folder / "answering")
    teach_answering(model, processor, AGREEING, seed + 1)
    save(model, processor, folder / "agreeing")
    return folder / "agreeing"


def install(output: Path) -> None:
    """Replace the package's model, pairs and evaluation set."""
    assets = evaluation.FOLDER.parent
    for name in ("model", "amber"):
        shutil.rmtree(assets / name, ignore_errors=True)
        shutil.copytree(output / name, assets / name)
    shutil.copy(output / pairs.FILE, assets / pairs.FILE)


def main(argv: list[str] | None = None) -> None:
    """Make model, pairs and evaluation set; with `--install`, replace the package's own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--from-agreeing", type=Path, help="checkpoint that stands for the first three lessons"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, scenes and samples (default 0)"
    )
    parser.add_argument(
        "--install", action="store_true", help="replace the package's own assets by the result"
    )
    options: Any = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    processor = make_processor()
    agreeing = options.from_agreeing or teach_first_lessons(processor, options.output, options.seed)
    model = load(agreeing)
    teach_answering(model, processor, ASSOCIATING, options.seed + 3)
    save(model, processor, options.output / "model")
    # Pairs are sampled from what was saved: the rounded weights that users have.
    sample_pairs.write(
        sample_pairs.make_pairs(
            load(options.output / "model").eval(), processor, PAIRS, options.seed + 2
        ),
        options.output / pairs.FILE,
    )
    evaluation.write(options.output / "amber")
    if options.install:
        install(options.output)


if __name__ == "__main__":
    main()
