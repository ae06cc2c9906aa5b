"""Rules of the code's layout."""

import ast
from pathlib import Path

import vlmdpo

ROOT = Path(vlmdpo.__file__).parent
# Each folder (or module of the root) may import only from itself and from those before it.
ORDER = (
    *("errors", "config", "ui", "data", "models", "distributed", "engine", "benchmarks"),
    *(
        "feedback",
        "tiny",
        "memory",
        "hub",
        "report",
        "training",
        "web",
        "commands",
        "api",
        "cli",
        "__main__",
    ),
)
AT_THE_ROOT = {"__init__", "__main__", "cli", "errors", "hub"}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
# Everything else stays importable without torch, so that `vlmdpo --help` answers at once.
MAY_BE_HEAVY = {
    *("models/adapters", "models/attention", "models/chat_template", "models/devices"),
    "models/download",
    *("models/experts", "models/inputs", "models/processor_parts", "models/supported"),
    *("models/weights", "models/families", "models/load", "models/load_errors", "models/digest"),
    *(
        "engine/batch_context",
        "engine/batch",
        "engine/causality",
        "engine/collate",
        "engine/decode",
        "engine/devices",
        "engine/feature_cache",
        "engine/forward",
        "engine/generate",
    ),
    *("engine/lengths", "engine/packed_attention", "engine/plant", "engine/reference_cache"),
    *("engine/processing", "engine/side_by_side", "engine/stock_collator"),
    *("engine/leaves", "engine/next_token", "engine/padded_rows", "engine/yes_no"),
    *("engine/streaming", "engine/trl_rows"),
    *("engine/tree", "engine/tree_attention", "engine/tree_layout"),
    *("tiny/architecture", "tiny/build", "tiny/lessons"),
    *("tiny/random_models", "tiny/random_tokenizer"),
    *(f"tiny/families/{path.stem}" for path in (ROOT / "tiny" / "families").glob("[a-z]*.py")),
    "tiny/sample_pairs",
    *("memory/architecture", "memory/cuda_autocast", "memory/fake_tensors", "memory/measure"),
    *("training/activation_checkpointing", "training/arguments", "training/auto_batch"),
    *(
        "training/continued",
        "training/finite_check",
        "training/drop_in",
        "training/engine_checks",
        "training/image_grouping",
        "training/rounding",
    ),
    *("training/doctor", "training/length_grouping", "training/make_trainer", "training/mdpo"),
    *(
        "training/monitor",
        "training/prefill",
        "training/preflight",
        "training/set_fields",
        "training/keep_best",
    ),
    *(
        "training/samples",
        "training/sharding",
        "training/simulate",
        "training/synthetic_rows",
        "training/run_trainer",
        "training/trainer",
    ),
}


def _files():
    return [
        (path, path.relative_to(ROOT).with_suffix("").as_posix())
        for path in sorted(ROOT.rglob("*.py"))
    ]


def _imports(tree):
    """Every module that `tree` imports, at the top or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = ROOT.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def _graph():
    graph = {}
    for path, name in _files():
        inner = (module.split(".") for module in _imports(ast.parse(path.read_text("utf-8"))))
        parts = (module[1:] for module in inner if module[0] == "vlmdpo" and len(module) > 1)
        graph[name.removesuffix("/__init__")] = {"/".join(part) for part in parts}
    return graph


def test_each_folder_imports_only_from_those_before_it():
    checked = 0
    for name, imported in _graph().items():
        folder = name.split("/")[0]
        for module in imported:
            other = module.split("/")[0]
            if folder != "__init__" and other != "__version__":
                assert ORDER.index(other) <= ORDER.index(folder), f"{name} imports {module}"
                checked += 1
    assert checked > 200


def test_no_circular_imports():
    graph = _graph()
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    assert len(done) >= len(graph) > 100


def test_the_root_holds_only_what_every_folder_shares():
    assert {path.stem for path in ROOT.glob("*.py")} == AT_THE_ROOT


def _reached_from(start):
    graph, reached, new = _graph(), set(), [start]
    while new:
        name = new.pop()
        reached.add(name)
        new += graph.get(name, set()) - reached
    return reached


def test_the_process_that_starts_the_others_loads_no_models():
    """Importing transformers takes it longer than everything else that it does."""
    reached = _reached_from("distributed/launch")
    assert "models/devices" in reached
    assert "models/load" not in reached


def test_a_trl_script_keeps_the_messages_of_other_libraries():
    """Loading models for the commands silences transformers and huggingface_hub."""
    reached = _reached_from("training/trainer")
    assert "engine/trl_rows" in reached
    assert "models/load" not in reached


def test_heavy_packages_are_imported_at_module_level_only_in_listed_modules():
    for path, name in _files():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for module in _imports(ast.Module([node], [])):
                    heavy = module.split(".")[0] in HEAVY
                    assert not heavy or name in MAY_BE_HEAVY, f"{name} imports {module}"


def test_the_list_of_heavy_modules_is_not_out_of_date():
    assert {name for _, name in _files()} >= MAY_BE_HEAVY


def test_files_stay_readable():
    for path, name in _files():
        assert len(path.read_text("utf-8").splitlines()) <= 400, name


def test_only_ui_prints():
    for path, name in _files():
        # These are for those who rebuild the embedded model.
        if name in ("tiny/build", "tiny/lessons", "tiny/sample_pairs"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not is_print, name
