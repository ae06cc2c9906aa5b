"""What only a GPU can show: exactness in bf16, speed, memory, and where a step's time goes.

    python examples/benchmarks/gpu.py [--minutes 12] [--output gpu.json] [--only NAME,...] [--json]
    python examples/benchmarks/gpu.py --page docs/benchmarks/gpu.md

Nothing is downloaded: architectures are of real size, with random weights made on the GPU, and
processors of the same families. Items run in order of worth. The output file is written after each
of them, and a run that is given the same file goes on where the last one ended: results stay, and
items that failed or could not run are tried again. An item that would take more time than is left
is left out.

- `environment`; `tiny-ATTENTION`: the engine's self-check, and loss and gradients beside stock
  TRL's, for a tiny model of every family. Beside each error stands the noise of stock TRL: the same
  rows with more padding.
- `step-MODEL`: whole training steps (forward, reference, backward, clipping, optimizer) of stock
  TRL and ours in turns, on the same weights and pairs; LoRA r=16, checkpointing, bf16. "first"
  computes the reference in the step, "cached" has it.
- `memory-SETTING`: the peak by `vlmdpo estimate-memory` beside that of PyTorch's allocator.
- `evaluation`: questions a second, one `generate` a question, in batches, and ours.
- `auto-batch`: a batch that runs out of memory, and is then computed in parts.
- `profile`: one step by kind of kernel, and how often the host waits for the GPU.

`--toy` runs everything with tiny models on the CPU, to try the script; what only CUDA counts is
then null. `--page` writes the results page from the JSON file beside it (same name, `.json`), and
says "not measured" where there is none.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _gpu_page import cases, markdown, show
from _gpu_run import Item, Results, run_items

if TYPE_CHECKING:
    from _gpu_memory import Forecasts
    from _gpu_models import Machine

_GRACE_S = 60  # an item that overruns the time by more is stopped, with what it was doing


def all_items(machine: Machine, forecasts: Forecasts | None) -> list[Item]:
    """The items in order of worth; `forecasts` may be None where none of them runs."""
    import _gpu_exactness as exact
    import _gpu_memory as memory
    import _gpu_speed as speed

    def measured(case: memory.MemoryCase) -> dict[str, Any]:
        assert forecasts is not None
        return memory.memory(machine, case, forecasts)

    return [
        Item("environment", 10, lambda: exact.environment(machine)),
        Item("tiny-sdpa", 60, lambda: exact.tiny(machine, "sdpa")),
        Item("step-idefics2-490", 90, lambda: speed.step(machine, speed.IDEFICS2_490), keeps=True),
        Item("step-idefics2-980", 90, lambda: speed.step(machine, speed.IDEFICS2_980)),
        Item("step-llava", 90, lambda: speed.step(machine, speed.LLAVA)),
        *(
            Item(case.name, 12, lambda case=case: measured(case))
            for case in memory.cases(toy=machine.toy)
        ),
        Item("evaluation", 50, lambda: speed.asking(machine)),
        Item("auto-batch", 40, lambda: memory.auto_batch(machine, speed.LLAVA.model)),
        Item("profile", 45, lambda: speed.profiled_step(machine)),
        Item("tiny-eager", 50, lambda: exact.tiny(machine, "eager")),
        Item("tiny-flash_attention_2", 50, lambda: exact.tiny(machine, "flash_attention_2")),
    ]


def run(options: argparse.Namespace) -> Results:
    """Run the items that are asked for and have no result yet."""
    import torch
    from _gpu_memory import Forecasts
    from _gpu_memory import cases as memory_cases
    from _gpu_models import Machine

    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --toy tries the script on a CPU with tiny models")
    if options.toy:
        torch.set_num_threads(1)
    device = torch.device("cpu" if options.toy else "cuda:0")
    results = Results(options.output, toy=options.toy)
    deadline = time.monotonic() + 60 * options.minutes
    faulthandler.dump_traceback_later(60 * options.minutes + _GRACE_S, exit=True)
    # Reference caches of a stopped run would stay behind in a folder of the data.
    with tempfile.TemporaryDirectory() as name:
        machine = Machine(device, options.toy, Path(name), deadline)
        names = {item.name for item in chosen(all_items(machine, None), options.only)}
        estimated = [
            case
            for case in memory_cases(toy=options.toy)
            if case.name in names and not results.is_done(case.name)
        ]
        forecasts = Forecasts(machine.folder, estimated, toy=options.toy)
        try:
            items = [item for item in all_items(machine, forecasts) if item.name in names]
            run_items(items, results, machine.seconds_left, machine.release)
        finally:
            forecasts.close()
            faulthandler.cancel_dump_traceback_later()
    return results


def chosen(items: list[Item], only: str | None) -> list[Item]:
    """The items named in `--only`, in their order; all without it."""
    if only is None:
        return items
    names = [name.strip() for name in only.split(",")]
    unknown = sorted(set(names) - {item.name for item in items})
    if unknown:
        raise SystemExit(f"--only: no item {', '.join(unknown)}; --list shows them")
    return [item for item in items if item.name in names]


def write_page(page: Path) -> None:
    """Write the results page from the JSON file beside it, if there is one."""
    data = page.with_suffix(".json")
    results = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else None
    page.write_text(markdown(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=12, help="time for all items together")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="the results")
    parser.add_argument("--only", help="comma-separated names of items")
    parser.add_argument("--list", action="store_true", help="print the items' names and stop")
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--page", type=Path, help="write the results page here and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.page:
        write_page(options.page)
        return
    # Both are read when libraries are imported: no download, and one GPU however many there are.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if options.list:
        import torch
        from _gpu_models import Machine

        machine = Machine(torch.device("cpu"), options.toy, Path(), 0.0)
        print("\n".join(item.name for item in all_items(machine, None)))
        return
    results = run(options)
    if options.json:
        print(json.dumps({"cases": cases(results.data), **results.data}, indent=2))
        return
    show(results.data)


if __name__ == "__main__":
    sys.exit(main())
