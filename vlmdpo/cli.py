"""The command line: options → config → command → screen. `--help` imports nothing heavy.

Options are made from the fields of the config dataclasses, so that name, type, default and help
are written once.
"""

from __future__ import annotations

import _thread
import dataclasses
import gc
import importlib
import inspect
import os
import shlex
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from vlmdpo import __version__, ui
from vlmdpo import config as cf
from vlmdpo.commands.table import COMMANDS
from vlmdpo.config import named_recipes, recipes, spelling
from vlmdpo.config.make_pairs import JUDGES
from vlmdpo.distributed import launch, processes
from vlmdpo.errors import (
    Interrupted,
    MemoryBudgetError,
    PeerLost,
    Preempted,
    VlmDpoError,
    is_out_of_memory,
    nearest,
    out_of_memory_reason,
)
from vlmdpo.memory.gpus import GPUS
from vlmdpo.models import registry
from vlmdpo.models.option_layers import config_of

# Switches that are off by default and need no --no- form.
_ONE_WAY = {
    *("json", "quiet", "yes", "overwrite", "resume", "compare", "doctor", "streaming", "merge"),
    *("dry_run", "share", "open", "data_of_another_model"),
}
_EVALUATIONS = ("eval", "eval-amber")
_AGAIN_S = 0.05  # until an interrupt that was dropped is raised again
# Options whose values are known, for the shell's completion.
_VALUES: dict[str, Iterable[str]] = {
    "model": registry.ENTRIES,
    "recipe": named_recipes.NAMES,
    "benchmark": cf.BENCHMARKS,
    "dataset": ("scenes", "rlaif-v"),
    "dtype": cf.DTYPES,
    "attn_implementation": cf.ATTENTIONS,
    "strategy": cf.STRATEGIES,
    "loss_type": (*cf.LOSSES, *cf.LOSS_PRESETS),
    "report_to": cf.TRACKERS,
    "dimension": cf.DIMENSIONS,
    "gpu": GPUS,
    "judge": JUDGES,
}
_GENERAL = "General"  # the heading of --config and --help
_HELP_ALL = "vlmdpo.help_all"  # set in the context's meta by --help-all

app = typer.Typer(
    name="vlmdpo",
    help="Direct Preference Optimization for vision-language models: prepare, estimate-memory, "
    "train, infer, eval-amber. Without a model and data, every command runs offline on the "
    "embedded model 'tiny'; try: vlmdpo demo",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut long option names at 80 columns; plain help never does
)


class GroupedCommand(TyperCommand):
    """A command whose help lists options under headings; some commands show only common ones.

    Overrides Typer's plain listing, which has one heading for all options. Each option brings its
    heading as `rich_help_panel`, and whether it is common in `common_options`.
    """

    common_options: typing.ClassVar[frozenset[str]] = frozenset()

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options under the headings of `config.GROUPS`, in that order."""
        shows_all = not self.common_options or ctx.meta.get(_HELP_ALL, False)
        records: dict[str, list[tuple[str, str]]] = {name: [] for name in (*cf.GROUPS, _GENERAL)}
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "rich_help_panel", None) or _GENERAL
            record = parameter.get_help_record(ctx)
            if record and (
                shows_all or heading == _GENERAL or parameter.name in self.common_options
            ):
                records[heading].append(record)
        for heading, lines in records.items():
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)


def _print_version(wanted: bool) -> None:
    if wanted:
        ui.raw(f"vlmdpo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and stop.",
        callback=_print_version,
        is_eager=True,
    ),
) -> None:
    """Options of the program itself; alone, it prints its help."""
    if ctx.invoked_subcommand is None:
        ui.raw(ctx.get_help())


def _completion(name: str) -> Callable[[str], list[str]] | None:
    """What completes an option's value on the shell's Tab, where its values are known."""
    values = _VALUES.get(name)
    return (
        None
        if values is None
        else lambda incomplete: [value for value in values if value.startswith(incomplete)]
    )


def _parameter(
    config: type[cf.Options], field: dataclasses.Field[Any], kind: Any
) -> inspect.Parameter:
    """One option, in the form in which Typer reads it from a signature. Unset ones are None."""
    meta = field.metadata
    flags = [cf.flag_name(field.name), *([meta["also"]] if meta["also"] else [])]
    default = field.default
    if kind is bool or kind == bool | None:
        flags = flags if field.name in _ONE_WAY else [f"{flags[0]}/--no-{flags[0][2:]}"]
        shown = meta["default_text"] or ("on" if default else "off")
    else:
        shown = meta["default_text"] or str(default)
    if typing.get_origin(kind) is tuple:
        annotation: Any = list[str] | None
    else:
        annotation = kind if isinstance(kind, types.UnionType) else kind | None
    declared = typer.Option(
        None,
        *flags,
        help=f"{meta['help']}. [default: {shown}]",
        show_default=False,
        autocompletion=_completion(field.name),
        rich_help_panel=cf.group_of(config, field),
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=declared, annotation=annotation
    )


def _print_all_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        ctx.meta[_HELP_ALL] = True
        ui.raw(ctx.get_help())
        raise typer.Exit


def _general_parameters(command: str) -> list[inspect.Parameter]:
    """`--config`; `--recipe` where a recipe may say something of the command; and `--help-all`
    where `--help` shows only the common options.
    """
    config = typer.Option(
        None,
        "--config",
        help="YAML recipe with the same keys as the options; flags override it. [default: none]",
        show_default=False,
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("config", keyword, default=config, annotation=Path | None)]
    if command in named_recipes.COMMANDS:
        recipe = typer.Option(
            None,
            "--recipe",
            help=f"Settings by name: {', '.join(named_recipes.NAMES)}; see docs/recipes.md. "
            "--config and flags override them. [default: none]",
            show_default=False,
            autocompletion=_completion("recipe"),
        )
        parameters.append(
            inspect.Parameter("recipe", keyword, default=recipe, annotation=str | None)
        )
    if _common_options(COMMANDS[command].config):
        help_all = typer.Option(
            False,
            "--help-all",
            help="Show every option and exit.",
            callback=_print_all_help,
            is_eager=True,
            show_default=False,
        )
        parameters.append(inspect.Parameter("help_all", keyword, default=help_all, annotation=bool))
    return parameters


def _command(name: str) -> Callable[..., None]:
    """The function behind a command: merge the layers, run, show."""
    cls, module, help_text, full_size = COMMANDS[name][:4]

    def call(**parsed: Any) -> None:
        recipe_file = parsed.pop("config")
        parsed.pop("help_all", None)
        flags = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in parsed.items()
            if value not in (None, [])
        }
        recipe = recipes.read_recipe(recipe_file) if recipe_file else {}
        settings: Any = config_of(cls, name, recipe, flags)
        _run(name, module, settings, _hint(full_size, {**recipe, **flags}))

    kinds = recipes.field_types(cls)
    parameters = [
        *(_parameter(cls, field, kinds[field.name]) for field in cf.ordered_fields(cls)),
        *_general_parameters(name),
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = help_text + (f"\n\nFull size: {full_size}" if full_size else "")
    return call


def _common_options(config: type[cf.Options]) -> frozenset[str]:
    """The options that `--help` shows: those marked, for `train`; for the others, all ("none")."""
    if config is not cf.TrainConfig:
        return frozenset()
    return frozenset(f.name for f in dataclasses.fields(config) if f.metadata["common"])


def _hint(full_size: str, given: Mapping[str, Any]) -> str:
    """One line for a bare call: what it works on, and the full-size command."""
    if not full_size or any(
        given.get(key) for key in ("model", "dataset", "answers", "data", "adapter", "recipe")
    ):
        return ""
    return f"using the embedded model 'tiny' (and data 'scenes'); full size: {full_size}"


def _run(name: str, module: str, settings: Any, hint: str) -> None:
    ui.set_json_only(settings.json or launch.is_worker())
    ui.set_verbosity(quiet=settings.quiet, yes=getattr(settings, "yes", False))
    if launch.is_worker():
        launch.start_worker()
    if hint:
        ui.say(hint)
    # Say nothing that a user cannot act on: the libraries' advice to those who write code against
    # them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|datasets|accelerate|torch)\b")
    command = importlib.import_module(module)
    if hasattr(settings, "num_processes") and launch.is_launcher(settings):
        report = launch.run(name, settings)
    else:
        report = command.run(settings)
    if launch.is_worker():
        launch.send_report(report)
    elif settings.json:
        ui.json_result(report)
    elif not getattr(settings, "machine_rank", 0):  # the others have the same to say
        command.show(report)


for _name, _entry in COMMANDS.items():
    _common = {"common_options": _common_options(_entry.config)}
    app.command(_name, cls=type("GroupedCommand", (GroupedCommand,), _common))(_command(_name))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; every error is one clear line on stderr."""
    try:
        code = app(spelling.as_typer(arguments), standalone_mode=False, prog_name="vlmdpo")
        sys.stdout.flush()  # here, where a reader that is gone is known how to handle
        # Typer turns Ctrl-C into this code. Of several processes the one that started them says so.
        if code == Interrupted.exit_code and not launch.is_worker():
            ui.warn(_interrupted(arguments))
        return code if isinstance(code, int) else 0
    except VlmDpoError as problem:
        return _fail(problem)
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (RuntimeError, MemoryError, OSError) as problem:
        if isinstance(problem, RuntimeError) and processes.is_lost_peer(problem):
            return _fail(PeerLost("another process of the run ended"))
        if is_out_of_memory(problem):
            reason, advice = out_of_memory_reason(problem), COMMANDS[arguments[0]].less_memory
            return _fail(MemoryBudgetError(f"out of memory: {reason}; {advice}"))
        raise
    except TyperException as problem:
        ui.error(_usage_error(problem.format_message(), arguments))
        return 2
    except typer.Abort:
        return Interrupted.exit_code


def _interrupted(arguments: list[str]) -> str:
    """What Ctrl-C leaves, and the command that goes on from there."""
    name = next((one for one in arguments if one in COMMANDS), "")
    writes = name != "infer" or any(one.startswith("--input") for one in arguments)
    if not name or not COMMANDS[name].kept or not writes:
        return "interrupted"
    # Of an evaluation, --overwrite would remove the answers.
    again = [one for one in arguments if one != "--overwrite" or name not in _EVALUATIONS]
    return f"interrupted: {COMMANDS[name].kept}; continue with: {shlex.join(['vlmdpo', *again])}"


def _fail(problem: VlmDpoError) -> int:
    """Say why the command ends, and return its exit code."""
    if launch.is_worker():
        launch.send_error(problem)
    else:
        (ui.warn if isinstance(problem, (Interrupted, Preempted)) else ui.error)(str(problem))
    return problem.exit_code


def _usage_error(message: str, arguments: list[str]) -> str:
    """A usage error as one line that ends in the next step."""
    named = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    known = named or not arguments or "Did you mean" in message
    hint = "" if known else nearest(arguments[0], COMMANDS)
    stop = "" if message.rstrip(".").endswith("?") else "."
    command = " ".join(["vlmdpo", *([named] if named else []), "--help"])
    return f"{message.rstrip('.')}{stop}{hint} See: {command}"


def main() -> None:
    """The console script."""
    # Importing torch, transformers and TRL makes millions of objects that stay. Python's default
    # of 700 searches them so often for garbage that commands begin two seconds later.
    gc.set_threshold(50_000)
    # PyTorch's threads meet some thousand times in a step. By default one that waits keeps its core
    # busy for milliseconds, and where another process wants that core, the thread that is waited
    # for does not get it: on 2 cores beside one busy process, small attention calls take four to
    # six times as long. 2,000 turns are some microseconds; alone on the machine it makes no
    # difference.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    sys.unraisablehook = _keep_interrupts
    sys.exit(run(sys.argv[1:]))


_unraisable = sys.unraisablehook


def _keep_interrupts(unraisable: Any) -> None:
    """Ctrl-C that arrives while Python runs a `__del__` or a callback of the garbage collector: it
    would be printed and dropped there, and the command would go on as if nobody had pressed it.
    Raise it again a moment later, in the main thread.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        timer = threading.Timer(_AGAIN_S, _thread.interrupt_main)
        timer.daemon = True  # a command that ends first does not wait for it
        timer.start()
    else:
        _unraisable(unraisable)
