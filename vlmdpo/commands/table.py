"""The commands of the program: options, module, and what the command line says about them."""

from __future__ import annotations

from typing import NamedTuple

from vlmdpo import config as cf


class Command(NamedTuple):
    """A command of the program."""

    config: type[cf.Options]
    module: str  # has run(config) and show(report)
    summary: str
    full_size: str  # the command line that does the same at full size, or ""
    less_memory: str = "close what else uses the memory"  # what to try where it runs out
    kept: str = ""  # what Ctrl-C leaves, so that the same command goes on


COMMANDS = {
    "prepare": Command(
        cf.PrepareConfig,
        "vlmdpo.commands.prepare",
        "Check preference pairs, bound their images, store them.",
        "vlmdpo prepare --model idefics2-8b --dataset rlaif-v",
        "use fewer --num-proc",
        "the rows that are done are kept",
    ),
    "estimate-memory": Command(
        cf.EstimateMemoryConfig,
        "vlmdpo.commands.estimate_memory",
        "Estimate the memory that training needs, before paying for it.",
        "vlmdpo estimate-memory --model idefics2-8b --dtype bfloat16 --lora",
    ),
    "train": Command(
        cf.TrainConfig,
        "vlmdpo.commands.train",
        "Train with Direct Preference Optimization (TRL and LoRA).",
        "vlmdpo train --model idefics2-8b --dataset rlaif-v",
        "use a smaller --per-device-train-batch-size, a lower --max-length or --quantization nf4; "
        "see: vlmdpo estimate-memory --gpu",
    ),
    "infer": Command(
        cf.InferConfig,
        "vlmdpo.commands.infer",
        "Answer questions about images, one or a file of them.",
        "vlmdpo infer --model idefics2-8b --adapter DIR --image FILE --question TEXT --compare",
        "use a smaller --batch-size, smaller images, or --dtype bfloat16",
        "the answers so far are kept",
    ),
    "eval": Command(
        cf.EvalConfig,
        "vlmdpo.commands.evaluate",
        "Score any benchmark, or your own questions, base beside tuned.",
        "vlmdpo eval --benchmark pope --data POPE --images val2014 --adapter DIR",
        "use a smaller --batch-size or --dtype bfloat16; finished answers are kept",
        "the answers so far are kept",
    ),
    "eval-amber": Command(
        cf.EvalAmberConfig,
        "vlmdpo.commands.eval_amber",
        "Score hallucination on AMBER, base beside tuned.",
        "vlmdpo eval-amber --model idefics2-8b --adapter DIR --data AMBER/data "
        "--images AMBER/image",
        "use a smaller --batch-size or --dtype bfloat16; finished answers are kept",
        "the answers so far are kept",
    ),
    "make-pairs": Command(
        cf.MakePairsConfig,
        "vlmdpo.commands.make_pairs",
        "Make preference pairs from a model's own answers, judged.",
        "vlmdpo make-pairs --model idefics2-8b --input IMAGES",
        "use a smaller --batch-size, fewer --samples, or --dtype bfloat16; what is done is kept",
        "the answers and verdicts so far are kept",
    ),
    "compare": Command(
        cf.CompareConfig,
        "vlmdpo.commands.compare",
        "Serve a page with base beside tuned; votes become data.",
        "vlmdpo compare --model idefics2-8b --adapter DIR",
        "use --dtype bfloat16, or close what else uses the memory",
    ),
    "rounds": Command(
        cf.RoundsConfig,
        "vlmdpo.commands.rounds",
        "Make pairs, train and evaluate, in rounds.",
        "vlmdpo rounds --model llava-1.5-7b --input images --config "
        "examples/recipes/on-policy-rounds.yaml",
        "set smaller batches for the stage: see its own --help",
        "finished stages are kept",
    ),
    "runs": Command(
        cf.RunsConfig,
        "vlmdpo.commands.runs",
        "Show the trainings under a folder side by side.",
        "",
    ),
    "export": Command(
        cf.ExportConfig,
        "vlmdpo.commands.export",
        "Merge an adapter into its base, or upload it.",
        "",
        "merge on the CPU with --device cpu, or use --dtype bfloat16",
    ),
    "env": Command(
        cf.EnvConfig,
        "vlmdpo.commands.env",
        "Show what a bug report needs: versions, GPUs, settings.",
        "",
    ),
    "demo": Command(
        cf.DemoConfig,
        "vlmdpo.commands.demo",
        "Run the five main commands offline, in some minutes.",
        "",
    ),
}
