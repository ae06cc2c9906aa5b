"""Rules of the house that no other test would notice breaking."""

import ast
from pathlib import Path

import vlmdpo

ROOT = Path(vlmdpo.__file__).parent
# Each room may import only from rooms above it; commands share the last but two.
ORDER = ("errors", "config", "recipes", "ui", "data", "models", "tiny", "memory", "dpo", "amber", "report", "web")
COMMANDS = (
    "prepare",
    "estimate_memory",
    "train",
    "infer",
    "eval_amber",
    "export",
    "demo",
    "compare",
    "foreseen",
    "launch",
    "results",
)
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
MAY_BE_HEAVY = {
    *(
        "models/families",
        "models/load",
        "models/asking",
        "models/digest",
        "models/generate",
        "models/packing",
        "models/side_by_side",
        "tiny/build",
        "tiny/families",
        "tiny/sample",
        "memory/living",
    ),
    *("memory/architecture", "memory/shadow", "dpo/autobatch", "dpo/foresight"),
    *("dpo/arguments", "dpo/attention", "dpo/batch", "dpo/checkpointing", "dpo/conditional", "dpo/doctor", "dpo/features"),
    *(
        "dpo/forward",
        "dpo/lengths",
        "dpo/order",
        "dpo/reference",
        "dpo/samples",
        "dpo/sharding",
        "dpo/stock",
        "dpo/trainer",
        "dpo/watch",
    ),
}


def _files():
    return [(path, path.relative_to(ROOT).with_suffix("").as_posix()) for path in sorted(ROOT.rglob("*.py"))]


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "vlmdpo":
                yield from ((f"vlmdpo.{alias.name}", node) for alias in node.names)
            else:
                yield node.module, node


def _rank(room):
    return ORDER.index(room) if room in ORDER else len(ORDER)


def test_rooms_import_only_from_rooms_above_them():
    checked = 0
    for path, name in _files():
        room = name.split("/")[0]
        for module, _ in _imports(ast.parse(path.read_text())):
            parts = module.split(".")
            if parts[0] == "vlmdpo" and len(parts) > 1 and parts[1] != "__version__" and room in ORDER:
                assert _rank(parts[1]) <= _rank(room), f"{name} imports {module}"
                checked += 1
    assert checked > 20


def test_heavy_packages_are_imported_at_module_level_only_where_the_plan_says():
    for path, name in _files():
        for node in ast.parse(path.read_text()).body:
            for module, _ in _imports(ast.Module([node], [])) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                assert module.split(".")[0] not in HEAVY or name in MAY_BE_HEAVY, f"{name} imports {module}"


def test_files_stay_readable():
    for path, name in _files():
        assert len(path.read_text().splitlines()) <= 400, name


def test_only_ui_prints():
    for path, name in _files():
        if name in ("ui", "tiny/build", "tiny/sample"):  # the last two are scripts for those who make the model anew
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), name
