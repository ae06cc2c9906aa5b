"""From plain values to a config: defaults, recipe file and flags in layers, each key checked."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlmdpo.config import STAGES, Options, flag_name, ordered_fields
from vlmdpo.errors import ConfigError, nearest

# Of a recipe, which is a page of options and values.
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1_000_000, 10_000, 20
Config = TypeVar("Config")


def field_types(cls: type) -> dict[str, Any]:
    """The resolved type of every field."""
    return typing.get_type_hints(cls)


def build(cls: type[Config], *layers: Mapping[str, Any]) -> Config:
    """A config from layers of plain values, later ones winning.

    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    types_of = field_types(cls)
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in types_of:
                raise ConfigError(f"unknown key '{key}'.{nearest(key, types_of)}")
            coerced = _coerce(types_of[key], value, key)
            # A stage's settings add up over the layers, later ones winning one by one.
            values[key] = values.get(key, ()) + coerced if key in STAGES else coerced
    return cls(**values)


def plain(config: Options, *, without: Collection[str] = ()) -> dict[str, Any]:
    """A config as plain values for a recipe, JSON file or report; `build` reads them back."""
    values = {
        field.name: getattr(config, field.name)
        for field in ordered_fields(type(config))
        if field.name not in without
    }
    return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain_value(one) for one in value] if isinstance(value, tuple) else value


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe; dashes in keys are read as underscores."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        _check_yaml_size(text, path)
        loaded = yaml.safe_load(text)
    except RecursionError as problem:
        raise ConfigError(f"--config: '{path}' is nested too deeply for a recipe") from problem
    except OSError as problem:
        raise ConfigError(f"--config: cannot read '{path}': {problem.strerror}") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise ConfigError(f"--config: '{path}' is not valid YAML: {reason}") from problem
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(
            f"--config: '{path}' must hold 'option: value' lines, as in 'learning_rate: 5.0e-5'"
        )
    return {key.replace("-", "_"): value for key, value in loaded.items()}


def _check_yaml_size(text: str, path: Path) -> None:
    """Raise ConfigError for YAML that is more than a recipe, once its aliases are written out.

    Each alias of a bomb holds several of the one before: a page of text is then 10⁹ values.
    """
    import yaml

    sizes: dict[int, int] = {}  # values below each node, by id

    def size(node: Any, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ConfigError(f"--config: '{path}' is nested too deeply for a recipe")
        if id(node) not in sizes:
            parts = node.value if isinstance(node.value, list) else []
            flat = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(size(one, depth + 1) for one in flat)
        return sizes[id(node)]

    if len(text) > _MAX_BYTES:
        raise ConfigError(f"--config: '{path}' has {len(text):,} characters; a recipe has a page")
    composed = yaml.compose(text, Loader=yaml.SafeLoader)
    if composed is not None and size(composed, 0) > _MAX_VALUES:
        raise ConfigError(f"--config: the aliases of '{path}' stand for too many values")
    if isinstance(composed, yaml.MappingNode):
        keys = [key.value for key, _ in composed.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConfigError(f"--config: '{path}' has the key {str(twice)[:80]!r} twice")


def _coerce(wanted: Any, value: Any, key: str) -> Any:
    """`value` as the field's type. Raises ConfigError, naming the key, if it cannot be.

    YAML reads 5e-5 as text; here it is a number.
    """
    options = (
        typing.get_args(wanted)
        if typing.get_origin(wanted) in (types.UnionType, typing.Union)
        else (wanted,)
    )
    if value is None and type(None) in options:
        return None
    kind = next(t for t in options if t is not type(None))
    if typing.get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if key in STAGES and isinstance(value, dict):  # a section of a recipe
            items = [f"{name}={json.dumps(one)}" for name, one in value.items()]
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(Path(item) if Path in typing.get_args(kind) else item for item in items)
    elif kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is str and isinstance(value, str):
        return value
    elif key == "chat_template_kwargs" and isinstance(value, dict):  # a recipe need not quote it
        return json.dumps(value)
    elif kind in (int, float) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
            if not math.isfinite(number):
                raise ConfigError(f"{flag_name(key)}: '{value}' is not a finite number")
            if kind is float or number == int(number):
                return kind(number)
        except (ValueError, OverflowError) as problem:
            raise ConfigError(f"{flag_name(key)}: '{value}' is not a number") from problem
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    wanted = kinds.get(kind, getattr(kind, "__name__", str(kind)))
    raise ConfigError(f"{flag_name(key)}: give {wanted}, not {value!r}")
