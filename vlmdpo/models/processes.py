"""Several processes of one run, as `accelerate launch` or `torchrun` start them. Knows nothing of what they do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its number, how many there are, and the device that it should use."""

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


def join_run(device: str) -> Processes:
    """The processes of this run; one, where nothing launched more. `device` is what the settings say."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=device)
    from accelerate import PartialState

    from vlmdpo.models.load import pick_device

    state = PartialState(cpu=pick_device(device).type == "cpu")
    own = str(state.device) if device in ("auto", "cuda") else device
    return Processes(state.process_index, state.num_processes, own)
