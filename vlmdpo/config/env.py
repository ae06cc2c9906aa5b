"""Options of `vlmdpo env`."""

from __future__ import annotations

from dataclasses import dataclass

from vlmdpo.config.common import ScreenOptions


@dataclass(frozen=True, kw_only=True)
class EnvConfig(ScreenOptions):
    """`vlmdpo env`: what a bug report needs."""
