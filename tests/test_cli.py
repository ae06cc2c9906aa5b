"""The command line: fast help, options in step with configs, layers, one clear line per mistake."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from vlmdpo import __version__, cli, config
from vlmdpo.config import recipes
from vlmdpo.errors import ConfigError

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "scipy")


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom vlmdpo import cli\n"
        f"assert cli.run({[*([command] if command else []), '--help']!r}) == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: vlmdpo" in done.stdout


def test_estimate_memory_imports_no_torch():
    code = (
        "import sys\nfrom vlmdpo import cli\n"
        "assert cli.run(['estimate-memory', '--model', 'idefics2-8b', '--fast', '--json']) == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "idefics2-8b"


def _help_all(command):
    return "--help-all" if command == "train" else "--help"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_field_is_an_option_with_its_default(command, vlmdpo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    code, out, _ = vlmdpo(command, _help_all(command))
    assert code == 0
    out = re.split(r"^\w[\w ]*:$", out, maxsplit=1, flags=re.MULTILINE)[1]
    fields = dataclasses.fields(cli.COMMANDS[command].config)
    assert fields
    for field in fields:
        lines = [
            line
            for line in out.splitlines()
            if re.match(rf"  (-\w, )?{config.flag_name(field.name)}[ ,]", line)
        ]
        assert len(lines) == 1, field.name
        text = out[out.index(lines[0]) :].split("\n  --")[0]
        assert "[default: " in " ".join(text.split()) + " ", field.name


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_has_plain_headings_in_one_order_within_80_columns(command, vlmdpo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = vlmdpo(command, _help_all(command))
    headings = re.findall(r"^(\w[\w ]*):$", out, re.MULTILINE)
    order = [*config.GROUPS, "General"]
    assert headings == sorted(headings, key=order.index)
    assert headings[-1] == "General"
    assert len(headings) > 1
    assert max(map(len, out.splitlines())) <= 80


def test_help_of_train_shows_those_that_matter_and_help_all_the_rest(vlmdpo):
    def options(flag):
        _, out, _ = vlmdpo("train", flag)
        return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", out, re.MULTILINE))

    general = {"--config", "--recipe", "--help-all", "--help"}
    common, every = options("--help") - general, options("--help-all") - general
    assert len(common) == 21
    assert common < every
    assert len(every) == len(dataclasses.fields(config.TrainConfig))
    assert {"--model", "--dataset", "--learning-rate", "--lora-r", "--output-dir"} <= common


def test_checks_of_all_groups_run_wherever_the_group_is_inherited():
    for bad, flag in [
        ({"max_length": 1}, "--max-length"),
        ({"dtype": "float13"}, "--dtype"),
        ({"max_steps": 0}, "--max-steps"),
        ({"lora_r": 0}, "--lora-r"),
        ({"beta": 0.0}, "--beta"),
        ({"engine": "turbo"}, "--engine"),
        ({"machine_rank": 3}, "--machine-rank"),
        ({"save_steps": 0.0}, "--save-steps"),
        ({"gpu": "h100"}, "--gpu"),
    ]:
        with pytest.raises(ConfigError, match=flag):
            config.TrainConfig(**bad)


def test_module_and_console_script_are_one_program():
    done = subprocess.run(
        [sys.executable, "-m", "vlmdpo", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"vlmdpo {__version__}")


def test_layers_flags_over_recipe_over_model_over_default(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cli, "_run", lambda name, module, settings, hint: seen.append((settings, hint))
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("beta: 0.3\nlearning-rate: 5e-4\nlora_r: 4\n")
    assert (
        cli.run(["train", "--config", str(recipe), "--lora_r", "8", "--set", "max_grad_norm=0.5"])
        == 0
    )
    assert cli.run(["train", "--model", "idefics2-8b"]) == 0
    assert cli.run(["eval", "--benchmark", "mine.jsonl"]) == 0
    (tiny, hint), (full, no_hint), (_, not_scenes) = seen
    assert (tiny.beta, tiny.learning_rate, tiny.lora_r, tiny.set) == (
        0.3,
        5e-4,
        8,
        ("max_grad_norm=0.5",),
    )
    assert tiny.per_device_train_batch_size == 16  # the embedded model's own recipe
    assert (
        full.per_device_train_batch_size,
        full.gradient_accumulation_steps,
        full.peak_learning_rate,
    ) == (2, 32, 5e-5)
    assert "vlmdpo train --model idefics2-8b" in hint
    assert no_hint == not_scenes == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["trian"], 2, "Did you mean 'train'?"),
        (["train", "--beta-x", "1"], 2, "No such option: --beta-x"),
        (["train", "--beta", "much"], 2, "--beta"),
        (
            ["train", "--per-device-train-batch-size", "0"],
            2,
            "--per-device-train-batch-size: 0 is out of range",
        ),
        (
            ["train", "--per-device-train-batch-size", "-4"],
            2,
            "--per-device-train-batch-size: -4 is out of range",
        ),
        (["train", "--dtype", "float13"], 2, "--dtype: unknown value 'float13'"),
        (["train", "--loss-type", "sigmoit"], 2, "Did you mean 'sigmoid'?"),
        (["train", "--resume", "--overwrite"], 2, "--resume"),
        (["estimate-memory", "--model", "idefics2-8bb"], 4, "Did you mean 'idefics2-8b'?"),
        (["estimate-memory", "--config", "absent.yaml"], 2, "cannot read 'absent.yaml'"),
        (["infer", "--compare"], 2, "--compare needs --adapter"),
        (["infer", "--input", "q.jsonl"], 2, "--input and --output go together"),
        (["eval-amber", "--no-base"], 2, "--no-base"),
    ],
)
def test_mistakes_get_one_line_and_their_exit_code(arguments, code, says, vlmdpo):
    got, out, err = vlmdpo(*arguments)
    assert got == code
    assert out == ""
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert says in lines[-1]
    assert len([line for line in lines if "error" in line]) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        ("lora_r: 2.5", "--lora-r: give a whole number, not 2.5"),
        ("lora: maybe", "--lora: give true or false, not 'maybe'"),
        ("- a\n- b", "option: value"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nlora_r: 8\nseed: 2", "has the key 'seed' twice"),
    ],
)
def test_bad_recipes_name_the_key(text, says, tmp_path, vlmdpo):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    code, _, err = vlmdpo("train", "--config", recipe)
    assert code == 2
    assert says in err


def test_configs_are_frozen_and_build_from_plain_values():
    built = recipes.build(config.TrainConfig, {"learning_rate": "5e-6", "set": ["a=1"]})
    assert built.learning_rate == 5e-6
    assert built.set == ("a=1",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.beta = 1.0
    with pytest.raises(ConfigError, match="not a number"):
        recipes.build(config.TrainConfig, {"beta": "much"})


def test_alone_it_prints_its_help(vlmdpo):
    code, out, err = vlmdpo()
    assert (code, err) == (0, "")
    assert out.startswith("Usage: vlmdpo [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prepare", "--limit", "8"], "rows that are done are kept; continue with: vlmdpo prepare"),
        (["eval-amber", "--overwrite", "--limit", "8"], "with: vlmdpo eval-amber --limit 8"),
        (["infer", "--input", "q", "--output", "o"], "answers so far are kept; continue with:"),
        (["infer"], "warning: interrupted\n"),
        (["env"], "warning: interrupted\n"),
    ],
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(arguments, says, vlmdpo, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    module = cli.COMMANDS[arguments[0]].module
    monkeypatch.setattr(f"{module}.run", interrupted)
    code, _, err = vlmdpo(*arguments)
    assert code == 130
    assert says in err


def test_ctrl_c_that_python_drops_is_raised_again(monkeypatch):
    """Python prints and drops an exception of a `__del__`, Ctrl-C among them."""

    class Busy:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", cli._keep_interrupts)
    busy = [Busy()]
    busy.clear()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(10)


def test_a_reader_that_is_gone_gives_141_from_every_kind_of_output(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Gone())
    for arguments in ([], ["env"], ["env", "--json"], ["estimate-memory", "--fast"]):
        assert cli.run(arguments) == 141, arguments


def test_a_command_searches_rarely_for_garbage_while_it_imports(monkeypatch, capfd):
    """Python's default would cost every command that loads a model two seconds."""
    set_to = []
    monkeypatch.setattr("gc.set_threshold", set_to.append)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # so that it is restored
    monkeypatch.setattr(sys, "argv", ["vlmdpo", "--version"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert set_to == [50_000]
    assert __version__ in capfd.readouterr().out


@pytest.mark.parametrize(("policy", "turns"), [(None, "2000"), ("ACTIVE", None)])
def test_threads_that_wait_leave_their_core_to_others(policy, turns, monkeypatch, capfd):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "1")  # so that it is put back
        monkeypatch.delenv(name)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # so that it is restored
    monkeypatch.setattr(sys, "argv", ["vlmdpo", "--version"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert os.environ.get("GOMP_SPINCOUNT") == turns
