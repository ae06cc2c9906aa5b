"""The folder of `vlmdpo rounds`: what is done, kept so that a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmdpo.commands.rounds_stages import folder_of, missing_result
from vlmdpo.config import PER_CALL, RoundsConfig, recipes
from vlmdpo.errors import DataError

STATE = "rounds.json"
# Options that say how many rounds there are and how they are judged, not what is in one.
_NOT_OF_A_ROUND = ("rounds", "stop", "max_cover_loss", "best_by", "output_dir", "overwrite")


class RoundsFolder:
    """What the rounds have done so far.

    Attributes:
        path: the folder.
        settings: those that a round depends on, as plain values.
        rounds: by round, from 0, what was kept of each finished stage.
    """

    def __init__(self, config: RoundsConfig) -> None:
        self.path, self._overwrite = config.output_dir, config.overwrite
        self.settings = recipes.plain(config, without=(*PER_CALL, *_NOT_OF_A_ROUND))
        self.rounds: list[dict[str, Any]] = []

    def open(self) -> None:
        """Read what is done, or begin. Raises DataError for a folder of something else, or of
        rounds with other settings.
        """
        if self.path.is_file():
            raise DataError(f"--output-dir: '{self.path}' is a file")
        is_begun = (self.path / STATE).is_file()
        if self.path.is_dir() and any(self.path.iterdir()) and not is_begun:
            raise DataError(
                f"--output-dir: '{self.path}' holds something else; choose an empty or new folder"
            )
        with self.writing():
            if is_begun and self._overwrite:
                shutil.rmtree(self.path)
                is_begun = False
            self.path.mkdir(parents=True, exist_ok=True)
        if is_begun:
            self._read()
        else:
            self._save()

    def _read(self) -> None:
        path = self.path / STATE
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            settings, self.rounds = dict(held["settings"]), [dict(one) for one in held["rounds"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
            raise DataError(
                f"'{path}' is damaged ({problem}); restore it, or begin again with --overwrite"
            ) from problem
        names = [
            n for n in {**settings, **self.settings} if settings.get(n) != self.settings.get(n)
        ]
        if names:
            differ = ", ".join(f"{n}: {settings.get(n)} → {self.settings.get(n)}" for n in names)
            raise DataError(
                f"--output-dir: '{self.path}' holds rounds with other settings ({differ}); give "
                "those, choose another folder, or begin again with --overwrite"
            )
        for number, stages in enumerate(self.rounds):
            for stage in stages:
                gone = missing_result(self.path, number, stage)
                if gone is not None:
                    raise DataError(
                        f"'{gone}' of a finished stage is gone; restore it, or begin again with "
                        "--overwrite"
                    )

    def is_done(self, number: int, stage: str) -> bool:
        """Whether a stage of a round is finished."""
        return number < len(self.rounds) and stage in self.rounds[number]

    def keep(self, number: int, stage: str, outcome: dict[str, Any]) -> None:
        """Write down that a stage is finished, and what came of it."""
        while len(self.rounds) <= number:
            self.rounds.append({})
        self.rounds[number][stage] = outcome
        self._save()

    def figures(self) -> list[dict[str, Any]]:
        """The figures of each round that was evaluated, from round 0."""
        scored = [stages.get("eval_amber") for stages in self.rounds]
        return [one["figures"] for one in scored if one is not None]

    def adapter(self, number: int) -> Path:
        """The adapter that a round has made."""
        return folder_of(self.path, number, "train")

    def _save(self, **more: Any) -> None:
        held = {"settings": self.settings, "rounds": self.rounds, **more}
        with self.writing():
            self.write_text(STATE, json.dumps(held, indent=2, ensure_ascii=False) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        """Write down the result of all rounds."""
        self._save(result=result)

    def write_text(self, name: str, text: str) -> None:
        """Write a file, which is there as a whole or not at all."""
        part = self.path / f".{name}.partial"
        part.write_text(text, encoding="utf-8")
        part.replace(self.path / name)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, what cannot be written is a DataError."""
        try:
            yield
        except OSError as problem:
            raise DataError(
                f"--output-dir: cannot write '{self.path}': {problem.strerror or problem}"
            ) from problem
