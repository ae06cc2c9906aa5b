"""One process that has the libraries of training imported, and forks a child for each request.

Importing them takes longer than most of what the children do. Every pytest process starts one
server, with the first request, and ends it with itself.

    python -m tests.support.fork_server

Reads a JSON object a line, {"module", "arguments", "folder", "environment"}: the child calls the
module's `main` there, with stdout and stderr in files of the folder. Prints its exit code.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
_STDOUT, _STDERR = "fork-server.out", "fork-server.err"


@functools.cache
def _server():
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.support.fork_server"],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT},
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    atexit.register(_stop, server)
    return server


def _stop(server):
    server.stdin.close()
    server.stdout.close()
    server.wait()


def run(module, *arguments, timeout_s):
    """Call `module.main(*arguments)` in a new process in this folder: its standard output.

    Fails with its standard error for another exit code than 0, and after `timeout_s` seconds.
    """
    server, folder = _server(), Path.cwd()
    request = {"module": module, "arguments": arguments, "folder": str(folder)}
    server.stdin.write(json.dumps({**request, "environment": dict(os.environ)}) + "\n")
    server.stdin.flush()
    if not select.select([server.stdout], [], [], timeout_s)[0]:
        os.killpg(server.pid, signal.SIGKILL)
        _server.cache_clear()
        raise TimeoutError(f"{module}: no answer in {timeout_s} s")
    code = server.stdout.readline().strip()
    assert code == "0", (code, (folder / _STDERR).read_text())
    return (folder / _STDOUT).read_text()


def _call(request):
    """In the child: call `main`, and exit."""
    code = 1
    try:
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for number, name in ((1, _STDOUT), (2, _STDERR)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        importlib.import_module(request["module"]).main(*request["arguments"])
        code = 0
    except BaseException:  # noqa: BLE001 - the child ends here, and its caller is told
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    gc.set_threshold(50_000)  # as `cli.main` does
    import matplotlib.figure
    import torch

    from tests.support.plots import blank_plot
    from vlmdpo.commands import prepare, train
    from vlmdpo.engine import generate, lengths, preview, reference_cache
    from vlmdpo.training import arguments, build, preflight, results, trainer

    assert all((prepare, train, generate, lengths, preview, reference_cache))
    assert all((arguments, build, preflight, results, trainer))
    matplotlib.figure.Figure.savefig = blank_plot
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    # In a child, and in a child's own child, the first operation replaces the lost pool. Two
    # threads that begin at once would take it from each other ("Invalid thread pool!").
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))
    gc.freeze()  # so that forked processes do not scan the libraries
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _call(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
