"""Run `vlmdpo prepare` again and again from one process that has its libraries imported, killing some of the runs.

    python -m tests.killing SEED ROUNDS UNIT_ROWS ARGUMENTS...

Prints the seconds that an undisturbed run takes, then for each round a line: "killed" or "finished", and whether the run
after it, which is left alone, made the same bytes as the undisturbed one.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot

from vlmdpo import cli
from vlmdpo.data import sources
from vlmdpo.dpo import lengths, preview


def contents(folder):
    """Every file below a folder with a hash of its bytes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def start(arguments):
    """A forked process that runs the command line and ends with its exit code. Returns its number."""
    child = os.fork()
    if child == 0:
        sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os._exit(cli.run(["prepare", "--output-dir", "out", *arguments]))
    return child


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(seed, rounds, unit_rows, *arguments):
    assert all((matplotlib.pyplot, lengths, preview))  # imported, so that the forked ones need not
    lengths.counter_of("tiny", None, False)
    sources.UNIT_ROWS = int(unit_rows)
    chance = random.Random(int(seed))
    began = time.monotonic()
    assert finish(start(arguments)) == 0
    undisturbed = time.monotonic() - began
    wanted = contents("out")
    print(f"{undisturbed:.2f}", flush=True)
    for _ in range(int(rounds)):
        shutil.rmtree("out")
        child = start(arguments)
        time.sleep(chance.uniform(0, undisturbed))
        os.kill(child, signal.SIGKILL)
        how = "killed" if finish(child) == -signal.SIGKILL else "finished"
        whole = os.path.exists("out")
        same = (not whole or contents("out") == wanted) and finish(start(arguments)) == 0 and contents("out") == wanted
        left = [name for name in os.listdir(".") if name.startswith(".out") and name != ".out.lock"]
        print(how, "same" if same and not left else f"DIFFERENT {left}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
