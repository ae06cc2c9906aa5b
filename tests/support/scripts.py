"""Run a script as `python SCRIPT ARGUMENTS...` does, forked from `tests.support.fork_server`."""

import runpy
import sys
from pathlib import Path

from tests.support import fork_server


def run(script, *arguments, timeout_s):
    """The script's standard output. Fails as `fork_server.run` does."""
    words = [str(script), *map(str, arguments)]
    return fork_server.run("tests.support.scripts", *words, timeout_s=timeout_s)


def main(script, *arguments):
    """In the child: what an interpreter does with a script."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
