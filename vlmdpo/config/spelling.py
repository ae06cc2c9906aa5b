"""Spellings of a command line that Typer does not know."""

from __future__ import annotations

# The option of a command whose value may stand without its name: `vlmdpo runs FOLDER`.
_POSITIONAL = {"runs": "--folder"}


def as_typer(arguments: list[str]) -> list[str]:
    """The arguments as Typer takes them."""
    named = _POSITIONAL.get(arguments[0]) if len(arguments) > 1 else None
    if named is not None and not arguments[1].startswith("-"):
        arguments = [arguments[0], named, *arguments[1:]]
    return [_with_dashes(argument) for argument in arguments]


def _with_dashes(argument: str) -> str:
    """TRL spells options with underscores; both are taken: --learning_rate is --learning-rate."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value
