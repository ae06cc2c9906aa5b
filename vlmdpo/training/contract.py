"""What a library does not promise and vlmdpo relies on, as data, and the check that it is there.

The list itself is in `trl_contract`. Imports the libraries only when `check` is called.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Any, Protocol

from packaging.version import Version


class Kind(StrEnum):
    """How a target is used, which decides what `check` asks of it."""

    OVERRIDDEN = "overridden method"  # has exactly these parameters
    PATCHED = "replaced function"  # on a module, a class or one object; exactly these parameters
    CALLED = "called function"  # takes at least these parameters
    ATTRIBUTE = "attribute"  # set by the class or one of its bases
    CLASS = "class"
    ENVIRONMENT = "environment variable"  # the module names it
    MESSAGE = "message"  # the module has a text that contains it


@dataclass(frozen=True)
class Dependency:
    """One thing that a library does not promise and vlmdpo relies on.

    Attributes:
        target: dotted name, with parameters, inner function or text; see `trl_contract`.
        used_in: the modules of vlmdpo that rely on it, as "training/trainer".
        why: what it is used for.
        breaks: what would go wrong without it.
        since: the release of the library that brought it; earlier ones do without. "" for none.
    """

    kind: Kind
    target: str
    used_in: tuple[str, ...]
    why: str
    breaks: str
    since: str = ""

    @property
    def library(self) -> str:
        """The package that the target belongs to."""
        return self.target.split(".")[0]

    @property
    def path(self) -> str:
        """The dotted name alone."""
        return self.target.partition("(")[0].partition(":")[0]

    @property
    def inner(self) -> str:
        """The function inside another one, or the text that a module holds; "" for neither."""
        text = self.target.partition(":")[2]
        is_text = self.kind in (Kind.ENVIRONMENT, Kind.MESSAGE)
        return text if is_text else text.partition("(")[0]

    @property
    def name(self) -> str:
        """What code that uses the target has to spell."""
        return self.inner or self.path.rpartition(".")[2]

    @property
    def parameters(self) -> tuple[str, ...] | None:
        """The expected parameters, as `inspect` names them; None where any will do."""
        if self.kind in (Kind.ENVIRONMENT, Kind.MESSAGE) or "(" not in self.target:
            return None
        inside = self.target.partition("(")[2].removesuffix(")")
        return tuple(part.strip() for part in inside.split(",") if part.strip())


class Group(Protocol):
    """Makes dependencies of one kind."""

    def __call__(
        self, used_in: str, *targets: str, why: str, breaks: str, since: str = ""
    ) -> tuple[Dependency, ...]: ...


def _group(kind: Kind) -> Group:
    def dependencies(
        used_in: str, *targets: str, why: str, breaks: str, since: str = ""
    ) -> tuple[Dependency, ...]:
        """Targets that the same modules (separated by spaces) use for the same reason."""
        modules = tuple(used_in.split())
        return tuple(Dependency(kind, target, modules, why, breaks, since) for target in targets)

    return dependencies


overridden, patched, called = map(_group, (Kind.OVERRIDDEN, Kind.PATCHED, Kind.CALLED))
attributes, classes = map(_group, (Kind.ATTRIBUTE, Kind.CLASS))
environment, messages = map(_group, (Kind.ENVIRONMENT, Kind.MESSAGE))


def check(dependencies: Iterable[Dependency]) -> list[str]:
    """What the installed libraries no longer have, one message each; empty where all holds.

    A library that is not installed is passed over: those that vlmdpo needs always are.
    """
    problems = []
    for dependency in dependencies:
        if importlib.util.find_spec(dependency.library) is None:
            continue
        installed = Version(version(dependency.library))
        if dependency.since and installed < Version(dependency.since):
            continue
        problem = _problem(dependency)
        if problem:
            modules = ", ".join(f"vlmdpo/{module}.py" for module in dependency.used_in)
            problems.append(
                f"{dependency.library} {version(dependency.library)}: {problem}. {modules} relies "
                f"on it: {dependency.why}. Without it breaks: {dependency.breaks}."
            )
    return problems


def _problem(dependency: Dependency) -> str:
    """Why this target is not there as expected; "" where it is."""
    path, name = dependency.path, dependency.name
    is_attribute = dependency.kind is Kind.ATTRIBUTE
    try:
        found = resolve(path.rpartition(".")[0] if is_attribute else path)
    except (ImportError, AttributeError) as problem:
        return f"{path} is gone ({problem})"
    if dependency.kind in (Kind.ENVIRONMENT, Kind.MESSAGE):
        held = any(name in text for text in _texts(found))
        return "" if held else f"{path} no longer has the text {name!r}"
    if is_attribute:
        return "" if has_attribute(found, name) else f"{path} is never set"
    if dependency.inner:
        codes = {c.co_name: c for c in found.__code__.co_consts if isinstance(c, types.CodeType)}
        if dependency.inner not in codes:
            return f"{path} has no inner function {dependency.inner}"
        code = codes[dependency.inner]
        actual = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return _differing(dependency, actual, takes_any=False)
    if dependency.parameters is None:
        return ""
    signature = inspect.signature(found)
    any_name = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    return _differing(dependency, tuple(signature.parameters), takes_any=any_name)


def _differing(dependency: Dependency, actual: tuple[str, ...], *, takes_any: bool) -> str:
    """How a function's parameters are not the expected ones; "" where they fit."""
    expected = dependency.parameters or ()
    if dependency.kind in (Kind.OVERRIDDEN, Kind.PATCHED):
        fits = actual == expected
    else:
        fits = takes_any or set(expected) <= set(actual)
    return (
        ""
        if fits
        else f"{dependency.path} takes ({', '.join(actual)}), not ({', '.join(expected)})"
    )


def resolve(path: str) -> Any:
    """The object of a dotted name. Raises ImportError or AttributeError where there is none."""
    parts = path.split(".")
    found = importlib.import_module(parts[0])
    for position, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            if not isinstance(found, types.ModuleType):
                raise
            found = importlib.import_module(".".join(parts[:position]))
    return found


def has_attribute(owner: type, name: str) -> bool:
    """Whether instances have this attribute: in a class's body, or set on `self` in its methods."""
    for kind in owner.__mro__[:-1]:
        if name in vars(kind) or name in vars(kind).get("__annotations__", {}):
            return True
        try:
            source = textwrap.dedent(inspect.getsource(kind))
        except (OSError, TypeError):  # a class without Python source
            continue
        if any(
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and node.attr == name
            and ast.unparse(node.value) == "self"
            for node in ast.walk(ast.parse(source))
        ):
            return True
    return False


def _texts(module: types.ModuleType) -> Iterator[str]:
    """Every text in a module's source: of an f-string, the parts between its values."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
