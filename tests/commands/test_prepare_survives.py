"""prepare in real processes if things go wrong: kills, interrupts, full disks, two at once."""

import contextlib
import json
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import unfolded
from tests.support.images import noise
from tests.support.killing import KILLS, contents, rounds
from vlmdpo.data import store
from vlmdpo.data.folder_lock import locked

pytestmark = pytest.mark.slow

_PATIENCE_S = 300  # machines can be slow


def _data(folder, rows, size=(200, 150)):
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(noise(size, seed=i))
    lines = [
        {"image": f"{i % 4}.jpg", "question": f"q{i}", "chosen": "a", "rejected": "b"}
        for i in range(rows)
    ]
    lines[3]["chosen"] = ""  # a row to drop
    lines[9]["question"] = "q1"  # and a copy of one in another unit
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


def _command(*arguments):
    return [sys.executable, "-m", "vlmdpo", "prepare", "--output-dir", "out", *map(str, arguments)]


def test_killed_at_any_point_the_next_call_finishes_with_the_same_bytes(tmp_path):
    number = 2 * KILLS
    data = ["--dataset", _data(tmp_path / "d", 60), "--num-proc", "1", "--test-size", "0.3"]
    ends = rounds("prepare", "KILL", number, *data, timeout_s=_PATIENCE_S)
    assert ends.count("killed") >= number // 2


def test_any_number_of_processes_makes_the_same_bytes(tmp_path, vlmdpo, monkeypatch):
    monkeypatch.setattr("vlmdpo.data.sources.UNIT_ROWS", 8)
    data = _data(tmp_path / "d", 60)
    for name, number in (("one", 1), ("two", 2), ("many", 5)):
        assert (
            vlmdpo("prepare", "--dataset", data, "--num-proc", number, "--output-dir", name)[0] == 0
        )
    code, _, err = vlmdpo(
        "prepare", "--dataset", data, "--num-proc", 2, "--output-dir", "failed", "--on-bad", "fail"
    )
    assert code == 3
    assert "row 3 (counted from 0): empty_chosen" in err.splitlines()[-1]
    monkeypatch.setattr(
        multiprocessing, "get_all_start_methods", lambda: ["spawn"]
    )  # as on Windows
    assert vlmdpo("prepare", "--dataset", data, "--num-proc", 2, "--output-dir", "spawned")[0] == 0
    assert contents("one") == contents("two") == contents("many") == contents("spawned")
    assert store.read_manifest(Path("one"))["dropped"] == {"duplicate": 1, "empty_chosen": 1}


def _at_work(running, others):
    """The processes that write units, once the first one (or with `others` another) does."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end and running.poll() is None:
        writing = {int(path.suffix[1:]) for path in Path(".").glob(".out.partial/units/*.arrow.*")}
        if writing - {running.pid} or (writing and not others):
            return [psutil.Process(pid) for pid in writing - {running.pid}]
        time.sleep(0.05)
    pytest.fail(f"no unit was begun: {running.communicate()}")


@contextlib.contextmanager
def _busy(place, others=True):
    """A run whose two processes work for some seconds, and its other processes."""
    data = _data(place / "d", 900, size=(3000, 2000))
    running = subprocess.Popen(
        _command("--dataset", data, "--num-proc", 2),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield data, running, _at_work(running, others)
    finally:
        running.kill()
        running.communicate()


def test_workers_of_a_killed_parent_end_and_the_next_run_continues(tmp_path, vlmdpo):
    with _busy(tmp_path) as (data, running, workers):
        assert len(workers) == 1
        running.kill()
        _, alive = psutil.wait_procs(workers, timeout=_PATIENCE_S)
        assert not alive
    assert not Path("out").exists()
    code, _, err = vlmdpo("prepare", "--dataset", data, "--num-proc", 2, "--output-dir", "out")
    assert code == 0, err
    assert "continuing where an earlier call stopped" in err
    assert store.read_manifest(Path("out"))["rows_out"] == 898


def test_a_dead_process_is_an_error_not_a_hang(tmp_path):
    with _busy(tmp_path) as (_, running, workers):
        workers[0].kill()
        _, err = running.communicate(timeout=_PATIENCE_S)
    assert running.returncode == 3
    assert (
        "one of --num-proc 2 processes died, probably out of memory; finished work is kept"
        in unfolded(err)
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("others", [False, True], ids=["while_others_load", "while_others_work"])
def test_ctrl_c_stops_at_once_and_keeps_finished_work(tmp_path, others):
    with _busy(tmp_path, others) as (_, running, _workers):
        children = psutil.Process(running.pid).children(recursive=True)
        # A terminal tells the whole group.
        for process in (*children, running):
            process.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=_PATIENCE_S)
        assert running.returncode == 130, err
        assert "Traceback" not in err
        _, alive = psutil.wait_procs(children, timeout=_PATIENCE_S)
        assert not alive
    assert Path(".out.partial").is_dir()


def test_a_full_disk_is_reported_and_leaves_nothing_that_looks_complete(tmp_path, vlmdpo):
    data = _data(tmp_path / "d", 60)

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = _command("--dataset", data, "--num-proc", 1)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_PATIENCE_S, preexec_fn=little_room
    )
    assert done.returncode == 3, done.stderr
    said = unfolded(done.stderr).strip().splitlines()[-1]
    assert re.search(
        r"error: cannot write .*File too large \(.* free\); .* the same command continues from",
        said,
    )
    assert not Path("out").exists()
    code, _, err = vlmdpo("prepare", "--dataset", data, "--num-proc", 1, "--output-dir", "out")
    assert code == 0, err
    assert store.read_manifest(Path("out"))["rows_out"] == 58


def test_the_second_of_two_runs_waits_and_finds_the_data_prepared(tmp_path):
    data = _data(tmp_path / "d", 20)
    with locked(Path("out"), "preparing"):
        running = subprocess.Popen(
            _command("--dataset", data), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = ""
        while "waiting: another vlmdpo is preparing 'out'" not in said:
            line = running.stderr.readline()
            assert line, said
            said += line
        assert not Path("out").exists()
    _, err = running.communicate(timeout=_PATIENCE_S)
    assert running.returncode == 0, err
    assert store.read_manifest(Path("out"))["rows_out"] == 18


def test_another_dataset_is_not_mixed_with_leftovers_of_an_earlier_run(tmp_path, vlmdpo):
    data = _data(tmp_path / "d", 20)
    Path(".out.partial/units").mkdir(parents=True)
    Path(".out.partial/key").write_text("another")
    Path(".out.partial/units/000000.json").write_text('{"bytes": 4}')
    Path(".out.partial/units/000000.arrow").write_text("junk")
    code, _, err = vlmdpo("prepare", "--dataset", data, "--output-dir", "out")
    assert code == 0
    assert "going on" not in err
    assert store.read_manifest(Path("out"))["rows_out"] == 18
    assert not Path(".out.partial").exists()
