"""The processes of one run, as `accelerate launch` or `torchrun` start them.

Knows nothing of what they do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from vlmdpo.errors import ConfigError

T = TypeVar("T")

# How gloo and NCCL report that another process is gone.
_LOST_PEER_MESSAGES = (
    *(
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Socket Timeout",
        "recvValue failed",
    ),
    *("NCCL communicator was aborted", "remote process exited", "Timed out waiting"),
)


# While the first process downloads a model or prepares data, the others wait for it. NCCL would
# give up after 10 minutes, and gloo after 30.
WAIT_FOR_PEERS = timedelta(hours=3)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of the run.

    Attributes:
        index: its number, from 0.
        count: how many there are.
        device: the one that it should use.
    """

    index: int = 0
    count: int = 1
    device: str = "auto"

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; every process gets them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered

    def destroy(self) -> None:
        """Leave the group, so that no process waits for this one when the program ends."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def launched_strategy() -> str:
    """How processes share the model: "fsdp2", "zero2", "zero3", or "" if each has all of it.

    Read from the environment, because accelerate has no state yet. Raises ConfigError for FSDP's
    version 1, which cannot shard an adapter beside frozen weights of another dtype.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "the launcher asks for FSDP version 1; set fsdp_version: 2 in accelerate's "
                "configuration"
            )
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return ""


def is_lost_peer(problem: BaseException) -> bool:
    """Whether an error only says that another process of the run has ended."""
    is_distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return is_distributed and any(words in str(problem) for words in _LOST_PEER_MESSAGES)


def join_process_group(device: str) -> ProcessGroup:
    """The process group of this run: of one process if nothing launched more.

    Args:
        device: `--device`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup(device=device)
    from accelerate import PartialState

    from vlmdpo.models.devices import pick_device

    state = PartialState(cpu=pick_device(device).type == "cpu", timeout=WAIT_FOR_PEERS)
    own_device = str(state.device) if device in ("auto", "cuda") else device
    return ProcessGroup(state.process_index, state.num_processes, own_device)
