"""Several processes of one run, as `accelerate launch` or `torchrun` start them. Knows nothing of
what they do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vlmdpo.errors import ConfigError

# What gloo and NCCL say when the other side is gone.
_LOST = (
    *(
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Socket Timeout",
        "recvValue failed",
    ),
    *("NCCL communicator was aborted", "remote process exited", "Timed out waiting"),
)


IN_PARTS = ("fsdp2", "zero3")  # strategies under which no process has all of the weights


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its number, how many there are, and the device that it
    should use.
    """

    index: int = 0
    count: int = 1
    device: str = "auto"

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in their order, for each of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object([value])
        return gathered

    def end(self) -> None:
        """Leave the group, so that no process is left waiting when the program ends."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def sharding() -> str:
    """How the launcher says that processes share the model: "" (each has it whole), "fsdp2",
    "zero2" or "zero3".

    Raises ConfigError for FSDP's first version, which cannot shard an adapter beside frozen weights
    of another dtype.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "the launcher asks for FSDP's version 1; set fsdp_version: 2 in accelerate's "
                "configuration"
            )
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return ""


def lost_peer(problem: BaseException) -> bool:
    """Whether an error only says that another process of the run has ended."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and any(words in str(problem) for words in _LOST)


def join_run(device: str) -> Processes:
    """The processes of this run; one, where nothing launched more. `device` is what the settings
    say.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=device)
    from accelerate import PartialState

    from vlmdpo.models.load import pick_device

    state = PartialState(cpu=pick_device(device).type == "cpu")
    own = str(state.device) if device in ("auto", "cuda") else device
    return Processes(state.process_index, state.num_processes, own)
