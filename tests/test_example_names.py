"""The examples use names that exist: their long runs are not part of the tests."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import vlmdpo

EXAMPLES = Path(vlmdpo.__file__).parent.parent / "examples"


def _unknown(path):
    """What a script takes from vlmdpo that is not there."""
    tree, modules = ast.parse(path.read_text("utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vlmdpo":
            home = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(home, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        yield f"{node.module}.{alias.name}"
                        continue
                if isinstance(getattr(home, alias.name), ModuleType):
                    modules[alias.asname or alias.name] = getattr(home, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and not hasattr(module, node.attr):
                yield f"{module.__name__}.{node.attr}"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.stem)
def test_every_name_of_vlmdpo_exists(path):
    assert not list(_unknown(path))


def test_a_name_that_is_gone_is_found(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from vlmdpo import ui\nfrom vlmdpo.data import gone\nui.set_quiet(True)\n")
    assert list(_unknown(script)) == ["vlmdpo.data.gone", "vlmdpo.ui.set_quiet"]
