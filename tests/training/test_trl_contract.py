"""Every private interface in use is in the contracts, and in the installed libraries."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import vlmdpo
from vlmdpo.training.contract import Dependency, Kind, check, has_attribute, resolve
from vlmdpo.training.trl_contract import CONTRACT

ROOT = Path(vlmdpo.__file__).parent
LISTED = {dependency.name for dependency in CONTRACT}
WATCHED = {"accelerate", "datasets", "gradio", "peft", "torch", "transformers", "trl"}
# Documented attributes that objects of these libraries are given, as their manuals do.
DOCUMENTED = {
    *("chat_template", "do_image_splitting", "pad_token", "image_grid_pinpoints"),  # processors
    *("num_hidden_layers", "layer_types", "generation_config"),  # configurations
    *("should_save", "should_log", "should_training_stop"),  # TrainerControl
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size"),  # training arguments
    *("last_hidden_state", "base_model_name_or_path", "grad"),
    *("temperature", "max_tokens", "stop_token_ids"),  # vLLM's sampling settings
}
WITH_MODELS = {"benchmarks", "commands", "distributed", "engine", "memory", "models", "training"}
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text("utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}


def test_the_installed_libraries_have_every_listed_interface():
    assert not (problems := check(CONTRACT)), "\n".join(problems)
    assert len(CONTRACT) > 100


WRONG = [
    ("trl.DPOTrainer._gone(self)", Kind.OVERRIDDEN, "trl.DPOTrainer._gone is gone"),
    ("trl.no_module.function()", Kind.CALLED, "trl.no_module.function is gone"),
    (
        "trl.DPOTrainer._compute_loss(self, model, batch)",
        Kind.OVERRIDDEN,
        "_compute_loss takes (self, model, inputs, return_outputs), not (self, model, batch)",
    ),
    ("trl.trainer.utils.use_adapter(model, name)", Kind.CALLED, "not (model, name)"),
    ("trl.trainer.utils._use_triton()", Kind.PATCHED, "takes (device), not ()"),
    ("trl.DPOTrainer._no_such_metrics", Kind.ATTRIBUTE, "_no_such_metrics is never set"),
    ("trl.trainer.utils.add_fused_lm_head:_other(x)", Kind.CALLED, "no inner function _other"),
    ("trl.trainer.utils.add_fused_lm_head:_fused_forward(x)", Kind.CALLED, "not (x)"),
    ("accelerate.utils.launch:NO_SUCH_VARIABLE", Kind.ENVIRONMENT, "the text 'NO_SUCH_VARIABLE'"),
    ("peft.peft_model:no such words", Kind.MESSAGE, "no longer has the text 'no such words'"),
]


@pytest.mark.parametrize(("target", "kind", "words"), WRONG)
def test_a_change_in_a_new_release_is_explained(target, kind, words):
    wrong = Dependency(kind, target, ("training/trainer",), "it is needed for this", "that breaks")
    (problem,) = check([wrong])
    assert words in problem
    assert problem.startswith(f"{wrong.library} ")
    assert "vlmdpo/training/trainer.py relies on it: it is needed for this" in problem


def test_every_entry_is_used_in_the_module_it_names():
    for dependency in CONTRACT:
        for module in dependency.used_in:
            assert module in MODULES, f"{dependency.target}: there is no module {module}"
        texts = "".join((ROOT / f"{module}.py").read_text("utf-8") for module in dependency.used_in)
        words = {dependency.name, *((dependency.parameters or ()) if dependency.inner else ())}
        words |= {dependency.path.rpartition(".")[2]} if dependency.kind is Kind.CALLED else set()
        used = any(word in texts for word in words)
        assert used, f"{dependency.used_in} no longer uses {dependency.target}"
        assert dependency.why, dependency.target
        assert dependency.breaks, dependency.target


# What the code relies on, found in its syntax.


def _imports(tree):
    """Name in the module → what it stands for, dotted."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0]: a.asname or a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def _bases(module, tree, node):
    """The watched libraries' classes that a class of ours has among its bases, ours in between."""
    imports = _imports(tree)
    for base in node.bases:
        dotted = imports.get(ast.unparse(base).partition("[")[0], ast.unparse(base))
        ours = dotted.removeprefix("vlmdpo.").rpartition(".") if "vlmdpo." in dotted else None
        other = ours[0].replace(".", "/") if ours else module
        name = ours[2] if ours else dotted
        for inner in ast.walk(MODULES.get(other, tree)):
            if isinstance(inner, ast.ClassDef) and inner.name == name and inner is not node:
                yield from _bases(other, MODULES.get(other, tree), inner)
        if dotted.split(".")[0] in WATCHED:
            yield resolve(dotted.partition("[")[0])


def unlisted_overrides(module, tree):
    """Methods that replace a library's method without being in the contract."""
    for node in ast.walk(tree):
        for base in _bases(module, tree, node) if isinstance(node, ast.ClassDef) else ():
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or not hasattr(base, method.name):
                    continue
                if method.name in ("__init__", "__new__", "__len__", "__iter__"):
                    continue
                listed = any(
                    d.name == method.name and issubclass(base, resolve(d.path.rpartition(".")[0]))
                    for d in CONTRACT
                    if d.kind is Kind.OVERRIDDEN
                )
                if not listed:
                    yield f"{module}: {node.name}.{method.name} overrides {base.__name__}'s"


def _own_names(tree):
    """Attributes and methods that classes of a module define themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield part.name
                elif isinstance(part, ast.AnnAssign):
                    yield ast.unparse(part.target)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("self", "cls")
        ):
            yield node.attr


OWN = {name for tree in MODULES.values() for name in _own_names(tree)}


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def unlisted_private_names(module, tree):
    """Names with a leading underscore that are read or set on something that is not ours."""
    imports = _imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = ast.unparse(node.value)
            ours = owner in ("self", "cls", "super()") and node.attr in OWN
            if imports.get(owner) in sys.stdlib_module_names or node.attr in LISTED or ours:
                continue
            yield f"{module}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and node.module:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            private = [name for name in dotted if any(map(_is_private, name.split(".")))]
            for name in private if not node.module.startswith("vlmdpo") else ():
                if name.rpartition(".")[2] not in LISTED and name not in _paths():
                    yield f"{module}:{node.lineno}: {name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if _is_private(name) and name not in LISTED:
                yield f"{module}:{node.lineno}: {ast.unparse(node)}"


def _paths():
    """The listed targets and every module and class that they lie in."""
    for dependency in CONTRACT:
        parts = dependency.path.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def unlisted_replacements(module, tree):
    """Functions patched, and attributes set, on something that is not ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("mock.patch", "patch"):
            if node.args[0].value not in {dependency.path for dependency in CONTRACT}:
                yield f"{module}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("patch.object"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if name is not None and name not in LISTED:
                yield f"{module}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if ast.unparse(node.value) in ("self", "cls") or node.attr.startswith("__"):
                continue
            if node.attr not in LISTED | OWN | DOCUMENTED:
                yield f"{module}:{node.lineno}: {ast.unparse(node)}"


FOLDERS = {"XDG_CACHE_HOME"}  # a standard of freedesktop.org
THREADS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # documented by OpenMP and GCC


def unlisted_variables(module, tree):
    """Environment variables of other programs that are read or set."""
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            name = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            *("os.environ.get", "os.environ.setdefault", "os.environ.pop", "os.getenv"),
        ):
            name = node.args[0]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            name = node.left
        named = name.value if isinstance(name, ast.Constant) else "VLMDPO_"
        if not named.startswith("VLMDPO_") and named not in LISTED | THREADS | FOLDERS:
            yield f"{module}:{node.lineno}: {named}"


ALL = (
    unlisted_overrides,
    unlisted_private_names,
    unlisted_replacements,
    unlisted_variables,
)


@pytest.mark.parametrize("unlisted", ALL)
def test_every_private_interface_in_use_is_listed(unlisted):
    found = [
        problem
        for module, tree in MODULES.items()
        # Elsewhere objects of other libraries are made and filled in, never changed.
        if module.split("/")[0] in WITH_MODELS or unlisted is not unlisted_replacements
        for problem in unlisted(module, tree)
    ]
    assert not found, "add it to vlmdpo/training/trl_contract.py:\n" + "\n".join(found)


EXAMPLE = """
import os
from unittest import mock
from trl import DPOTrainer
from trl.trainer._utils import something
from transformers import TrainerCallback
from vlmdpo.training.trainer import PairTrainer

class Mine(DPOTrainer):
    def log(self, logs): ...
    def name_of_our_own(self): ...

class Further(PairTrainer):
    def predict(self): ...

def call(trainer):
    class Inner(TrainerCallback):
        def on_predict(self): ...
    trainer.model.forward_of_theirs = None
    del trainer.model.generate_of_theirs
    mock.patch("trl.trainer.utils._some_function")
    mock.patch.object(trainer, "predict")
    return trainer._unknown, getattr(trainer, "_other"), os.environ["ACCELERATE_NEW"]
"""


def test_an_unlisted_interface_is_found():
    tree = ast.parse(EXAMPLE)
    found = [{text.partition(": ")[2] for text in unlisted("x", tree)} for unlisted in ALL]
    assert found == [
        {
            "Mine.log overrides DPOTrainer's",
            "Further.predict overrides DPOTrainer's",
            "Inner.on_predict overrides TrainerCallback's",
        },
        {"trl.trainer._utils.something", "trainer._unknown", "getattr(trainer, '_other')"},
        {
            "mock.patch('trl.trainer.utils._some_function')",
            "mock.patch.object(trainer, 'predict')",
            "trainer.model.forward_of_theirs",
            "trainer.model.generate_of_theirs",
        },
        {"ACCELERATE_NEW"},
    ]


def test_an_attribute_is_found_in_a_base_class_or_in_what_init_sets():
    trl = importlib.import_module("trl")
    assert has_attribute(trl.DPOTrainer, "_metrics")  # set on self
    assert has_attribute(trl.DPOTrainer, "is_fsdp_enabled")  # by transformers' Trainer
    assert not has_attribute(trl.DPOTrainer, "_metrics_of_old")
