"""The only package that prints: results and `--json` to stdout, everything else to stderr.

Every text from outside goes through `console.visible`.
"""

from vlmdpo.ui.console import (
    confirm,
    count,
    error,
    human_bytes,
    is_live,
    is_silent,
    is_terminal,
    json_result,
    mute,
    piece,
    raw,
    result,
    say,
    set_json_only,
    set_verbosity,
    step,
    unattended,
    visible,
    warn,
    warn_from_handler,
)
from vlmdpo.ui.live import Bar, Dashboard, Figure, dashboard, progress, sparkline
from vlmdpo.ui.tables import can_draw_images, columns, image, table, tokens

__all__ = [
    "Bar",
    "Dashboard",
    "Figure",
    "can_draw_images",
    "columns",
    "confirm",
    "count",
    "dashboard",
    "error",
    "human_bytes",
    "image",
    "is_live",
    "is_silent",
    "is_terminal",
    "json_result",
    "mute",
    "piece",
    "progress",
    "raw",
    "result",
    "say",
    "set_json_only",
    "set_verbosity",
    "sparkline",
    "step",
    "table",
    "tokens",
    "unattended",
    "visible",
    "warn",
    "warn_from_handler",
]
