"""What an option is: a dataclass field with its help, its place in `--help`, and its check."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

from vlmdpo.errors import ConfigError, nearest

# The headings of `--help`, in the order in which they are shown.
GROUPS = (
    *("Data", "Model", "Generation", "Training", "Adapter", "Loss", "Scoring"),
    *("Memory and speed", "Several processes", "Output", "Checks"),
)


def option(
    default: Any,
    text: str,
    *,
    default_text: str | None = None,
    also: str | None = None,
    group: str | None = None,
    common: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the value if none is given.
        text: the help line, with the unit where there is one.
        default_text: how the help states the default if the value alone does not say it (`None`).
        also: a second spelling, such as "-q".
        group: the heading in `--help` if it is not that of the field's class.
        common: whether `vlmdpo train --help` shows it; `--help-all` shows every option.
    """
    described = {"help": text, "default_text": default_text, "also": also}
    shown = {"group": group, "common": common}
    return dataclasses.field(default=default, metadata={**described, **shown})


# Options of one call rather than of what it makes: recipes and cache keys leave them out.
PER_CALL = ("json", "quiet", "yes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options. A command's config inherits from the groups it has, so its fields stay
    flat while a function can ask for just the group it reads.

    Subclasses set `group`, the heading of their options in `--help`, and check their own fields in
    `_check`, which raises ConfigError. Every group's check runs once when a config is made.
    """

    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for cls in reversed(type(self).__mro__):
            check = vars(cls).get("_check")
            if check is not None:
                check(self)

    def _check(self) -> None:
        """Raise ConfigError if this group's values are out of range or contradict each other."""


def group_of(config: type[Options], field: dataclasses.Field[Any]) -> str:
    """The heading under which `--help` shows a field: its own, or that of the class it is from."""
    if field.metadata["group"] is not None:
        return str(field.metadata["group"])
    return str(vars(_declaring_class(config, field))["group"])


def _declaring_class(config: type[Options], field: dataclasses.Field[Any]) -> type:
    return next(cls for cls in config.__mro__ if field.name in inspect.get_annotations(cls))


def ordered_fields(config: type[Options]) -> list[dataclasses.Field[Any]]:
    """The fields in the order of `--help`: by group, common ones first, inherited ones last."""

    def place(field: dataclasses.Field[Any]) -> tuple[int, bool, int]:
        group = GROUPS.index(group_of(config, field))
        declared_in = config.__mro__.index(_declaring_class(config, field))
        return group, not field.metadata["common"], declared_in

    return sorted(dataclasses.fields(config), key=place)


def flag_name(field: str) -> str:
    """A field's spelling on the command line: lora_r → --lora-r."""
    return "--" + field.replace("_", "-")


def set_key(setting: str) -> str:
    """The field that a `--set` names: "max-grad-norm=1" → max_grad_norm."""
    return setting.partition("=")[0].strip().replace("-", "_")


def require(condition: bool, config: object, name: str, wanted: str) -> None:
    """Raise ConfigError for the value of field `name` unless `condition` holds."""
    if not condition:
        value = getattr(config, name)
        raise ConfigError(f"{flag_name(name)}: {value!r} is out of range; give {wanted}")


def require_at_least(config: object, least: int, *names: str, unit: str = "") -> None:
    """Raise ConfigError if one of these fields is set and below `least`."""
    for name in names:
        value = getattr(config, name)
        wanted = f"{least} {unit} or more" if unit else f"{least} or more"
        require(value is None or value >= least, config, name, wanted)


def require_positive(config: object, *names: str) -> None:
    """Raise ConfigError if one of these fields is set and not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, config, name, "a number above 0")


def require_choice(value: str, choices: Iterable[str], name: str) -> None:
    """Raise ConfigError, with the nearest choice, unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(
            f"{flag_name(name)}: unknown value '{value}'.{nearest(value, choices)} "
            f"Choices: {', '.join(choices)}"
        )
