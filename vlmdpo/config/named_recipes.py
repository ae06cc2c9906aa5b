"""Recipes by name, for `--recipe`: options of several commands, each under its command's name.

Where they come from: docs/recipes.md.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from vlmdpo.config.recipes import read_recipe
from vlmdpo.errors import ConfigError, nearest

NAMES = ("article", "on-policy", "anchored", "mdpo")
COMMANDS = ("prepare", "make-pairs", "train", "eval-amber")  # that take --recipe


def named_recipe(name: str, command: str) -> dict[str, Any]:
    """What a recipe says of a command's options.

    Raises ConfigError for an unknown name, or a recipe that says nothing of the command.
    """
    if name not in NAMES:
        hint = nearest(name, NAMES)
        file = " A file of your own is given with --config." if Path(name).is_file() else ""
        raise ConfigError(
            f"--recipe: unknown recipe '{name}'.{hint} Known: {', '.join(NAMES)}.{file}"
        )
    sections = read_recipe(
        Path(str(resources.files("vlmdpo.config").joinpath(f"named/{name}.yaml")))
    )
    section = sections.get(command.replace("-", "_"))
    if section is None:
        known = ", ".join(key.replace("_", "-") for key in sections)
        raise ConfigError(
            f"--recipe {name} says nothing of {command}, only of {known}; leave it out"
        )
    return dict(section)
