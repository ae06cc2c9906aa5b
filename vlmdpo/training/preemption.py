"""SIGTERM while nothing trains: end at once, with the exit code that schedulers requeue on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from vlmdpo.errors import Preempted


class SigtermReceived(BaseException):
    """Raised by the handler, wherever the program happens to be.

    Not an `Exception`: libraries catch those, and carry on or raise another in its place.
    """


@contextlib.contextmanager
def preempted_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises Preempted at once.

    For the time when there is nothing to save yet, or nothing left to do: during training the
    trainer's own handler saves a checkpoint first.
    """
    received = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise SigtermReceived

    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return
    handler_before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as problem:
        if not received:
            raise
        # Any exception counts, not only SigtermReceived: raised in the middle of an import, it may
        # have been turned into another one.
        raise Preempted(
            "SIGTERM outside training; checkpoints are kept, and --resume continues from them"
        ) from problem
    finally:
        signal.signal(signal.SIGTERM, handler_before)
