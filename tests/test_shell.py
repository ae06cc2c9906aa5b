"""Conventions of a shell: pipes, colors, quiet, questions, completion, short errors."""

import io
import json
import os
import shlex
import subprocess
import sys

import pytest

from vlmdpo import cli, ui

pytestmark = pytest.mark.slow

_LONG = "a/rather/long/folder/name/" * 5


def _ran(*arguments, **settings):
    command = [sys.executable, "-m", "vlmdpo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})


@pytest.mark.parametrize(
    "wrong",
    [
        ("tarin",),
        ("train", "--learning-rat", "1"),
        ("train", "--loss", "sigmod"),
        ("train", "--freeze", "vision", "--no-lora", "--strategy", "fsdp2"),
        ("train", "--dataset", "nowhere-to-be-found", "--output-dir", "x"),
        ("train", "--config", _LONG),
        ("train", "--set", "max_grad_nrom=1"),
        ("infer", "--image", _LONG + "photo.jpg"),
        ("eval-amber", "--answers", "none.json", "--adapter", "x"),
        ("estimate-memory", "--model", "gpt2-but-not-there"),
        ("compare", "--model", "idefics2-8b"),
        ("export",),
    ],
    ids=lambda wrong: " ".join(wrong)[:40],
)
def test_an_error_fits_80_columns_and_says_where_and_what_next(wrong, capfd):
    code = cli.run([*wrong])
    out, err = capfd.readouterr()
    assert code in (2, 3, 4)
    assert out == ""
    lines = err.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    first, more = lines[at], lines[at + 1 :]
    for line in (first, *more):
        assert len(line) <= 80 or len(line.split()) <= 2 or "vlmdpo " in line, (
            "only a path or a command is longer"
        )
    assert all(line.startswith("       ") for line in more)


def test_a_command_at_the_end_of_an_error_can_be_copied(capfd):
    ui.error(
        f"stopped at step 3 of 10; continue with: vlmdpo train --config {_LONG}recipe.yaml --resume"
    )
    err = capfd.readouterr().err
    assert err.splitlines()[-1].strip() == f"vlmdpo train --config {_LONG}recipe.yaml --resume"


def test_results_go_to_stdout_and_messages_to_stderr_which_quiet_silences(vlmdpo):
    code, out, err = vlmdpo("prepare", "--limit", "8", "--output-dir", "data")
    assert code == 0
    assert "Prepared:" in out
    assert "format RLAIF-V" in err
    code, again, err = vlmdpo(
        "prepare", "--limit", "8", "--output-dir", "data", "--overwrite", "-q"
    )
    assert (code, err) == (0, "")
    assert "Prepared:" in again
    code, out, err = vlmdpo(
        "train", "--dataset", "data", "--max-steps", "1", "--output-dir", "out", "--quiet", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["steps"] == 1


def test_quiet_keeps_warnings_and_errors(vlmdpo):
    ui.set_verbosity(quiet=True, yes=False)
    ui.say("talk")
    ui.warn("careful")
    code, _, err = vlmdpo("train", "--loss", "sigmod", "--quiet")
    ui.set_verbosity(quiet=False, yes=False)
    assert code == 2
    assert "warning: careful" in err
    assert "error: " in err
    assert "talk" not in err


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("\n", 3), ("no\n", 3), ("", 3)])
def test_on_a_terminal_it_asks_before_it_replaces(vlmdpo, monkeypatch, typed, code):
    assert vlmdpo("prepare", "--limit", "8", "--output-dir", "data", "-q")[0] == 0
    monkeypatch.setattr(sys, "stdin", _Terminal(typed))
    monkeypatch.setattr(sys, "stderr", _Terminal())
    assert cli.run(["prepare", "--limit", "9", "--output-dir", "data"]) == code
    assert (
        "'data' holds data prepared with other settings. Replace it? [y/N]" in sys.stderr.getvalue()
    )


def test_yes_answers_and_without_a_terminal_nothing_is_asked(vlmdpo):
    assert vlmdpo("prepare", "--limit", "8", "--output-dir", "data")[0] == 0
    code, _, err = vlmdpo("prepare", "--limit", "9", "--output-dir", "data")
    assert code == 3
    assert "add --overwrite" in err
    assert vlmdpo("prepare", "--limit", "9", "--output-dir", "data", "--yes")[0] == 0
    for more in ([], ["--overwrite"], ["-y"]):
        code, _, err = vlmdpo(
            "train", "--dataset", "data", "--max-steps", "1", "--output-dir", "out", *more
        )
        assert code == 0, err
    assert vlmdpo("train", "--dataset", "data", "--max-steps", "1", "--output-dir", "out")[0] == 3


def test_uploads_and_shares_are_asked_for_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", _Terminal("n\n"))
    monkeypatch.setattr(sys, "stderr", _Terminal())
    from vlmdpo import hub

    assert hub.model("anything", "me/mine", private=False) is None
    assert "Upload 'anything' to me/mine (public)? [y/N]" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stdin", _Terminal("n\n"))
    assert cli.run(["compare", "--share"]) == 2


def test_no_color_is_respected_and_colors_need_a_terminal():
    plain = _ran("train", "--loss", "sigmod")
    assert "\x1b" not in plain.stderr
    forced = _ran("train", "--loss", "sigmod", FORCE_COLOR="1")
    assert "\x1b[1;31m" in forced.stderr
    refused = _ran("train", "--loss", "sigmod", FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b[1;31m" not in refused.stderr
    assert "31m" not in refused.stderr


def test_a_reader_that_closes_the_pipe_early_is_fine():
    program = f"{shlex.quote(sys.executable)} -m vlmdpo estimate-memory --fast --json"
    command = f"{program} | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("{")
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_gives_no_traceback():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vlmdpo import cli, ui\ndef broken(_): raise BrokenPipeError\n"
            "ui.json_result = broken\n"
            "raise SystemExit(cli.run(['env', '--json']))",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 141
    assert done.stderr == ""


def test_tab_completes_commands_options_and_values():
    def completed(line):
        words = line.split(" ")
        found = _ran(
            _VLMDPO_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
        )
        return found.stdout.split()

    assert completed("vlmdpo est") == ["estimate-memory"]
    assert "--per-device-train-batch-size" in completed("vlmdpo train --per")
    assert completed("vlmdpo train --model idef") == ["idefics2-8b"]
    assert completed("vlmdpo estimate-memory --gpu rtx-4") == ["rtx-4090"]


def test_env_says_what_a_bug_report_needs(vlmdpo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    code, out, _ = vlmdpo("env")
    assert code == 0
    for name in (
        "vlmdpo: ",
        "torch: ",
        "transformers: ",
        "trl: ",
        "python: ",
        "GPUs: ",
        "memory: ",
        "HF_HUB_OFFLINE=1",
    ):
        assert name in out
    assert "secret" not in out
    report = json.loads(vlmdpo("env", "--json")[1])
    assert report["versions"]["trl"]
    assert "secret" not in json.dumps(report)
