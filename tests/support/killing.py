"""Run a command repeatedly from one process with imported libraries, killing some of the runs.

`main` takes prepare|train, KILL|TERM, SEED, ROUNDS, ARGUMENTS...

Prints the seconds that an undisturbed run takes, then for each round a line: how the run ended that
was sent the signal at a random point ("killed", "finished", or an exit code), and whether the run
after it, which is left alone, made the same bytes as the undisturbed one.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.support import fork_server
from vlmdpo import cli
from vlmdpo.data import sources
from vlmdpo.engine import lengths

KILLS = int(os.environ.get("VLMDPO_TEST_KILLS", "2"))  # random points a test tries; more find more
UNIT_ROWS = 8  # of prepare, so that a small set has several units


def rounds(command, kind, number, *arguments, timeout_s):
    """Run `main` in a process of its own: how each of its rounds ended. All must be the same."""
    out = fork_server.run(
        "tests.support.killing", command, kind, "1", str(number), *arguments, timeout_s=timeout_s
    )
    lines = [line.split() for line in out.splitlines()[1:]]
    assert len(lines) == number
    assert {line[1] for line in lines} == {"same"}, out
    return [line[0] for line in lines]


def contents(folder):
    """Every file below a folder with a hash of its bytes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [
        (str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    ]


def trained(folder):
    """What must be the same after a run: adapter, losses, samples, steps, and optimizer state."""
    adapter = (Path(folder) / "adapter_model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    samples = (Path(folder) / "samples.jsonl").read_text()
    report = json.loads((Path(folder) / "train_report.json").read_text())
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return (
        hashlib.sha256(adapter).hexdigest(),
        losses,
        samples,
        report["steps"],
        (last / "optimizer.pt").read_bytes(),
    )


def start(command, arguments):
    """Fork a process that runs the command and exits with its code; return its pid."""
    child = os.fork()
    if child == 0:
        sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os._exit(cli.run([command, "--output-dir", "out", *arguments]))
    return child


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(command, kind, seed, rounds, *arguments):
    lengths.load_token_counter("tiny", None, False)
    sources.UNIT_ROWS = UNIT_ROWS
    look = contents if command == "prepare" else trained
    chance = random.Random(int(seed))
    began = time.monotonic()
    assert finish(start(command, arguments)) == 0
    undisturbed = time.monotonic() - began
    wanted = look("out")
    print(f"{undisturbed:.2f}", flush=True)
    for _ in range(int(rounds)):
        shutil.rmtree("out")
        child = start(command, arguments)
        time.sleep(chance.uniform(0, undisturbed))
        os.kill(child, getattr(signal, f"SIG{kind}"))
        code = finish(child)
        how = {0: "finished", -signal.SIGKILL: "killed"}.get(code, str(code))
        whole = command == "prepare" and os.path.exists("out")
        same = (
            (not whole or look("out") == wanted)
            and finish(start(command, arguments)) == 0
            and look("out") == wanted
        )
        left = [name for name in os.listdir(".") if name.startswith(".out") and name != ".out.lock"]
        left += [path.name for path in Path("out").glob(".*")]
        print(how, "same" if same and not left else f"DIFFERENT {left}", flush=True)
