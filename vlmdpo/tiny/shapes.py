"""How each shape of a scene is drawn. Knows nothing of scenes or questions."""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import ImageDraw

BACKGROUNDS = ("#ffffff", "#f3eee2", "#e6eef5", "#e9f2e4")
_INK = {
    "red": "#d62f2f",
    "green": "#2c9a3f",
    "blue": "#2b62d9",
    "yellow": "#f2c40f",
    "purple": "#8e3fb5",
    "black": "#222222",
}
_GREY = "#8a8f98"
RADIUS_PX = 7.5

Pen = ImageDraw.ImageDraw
Point = tuple[float, float]


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return (x - radius, y - radius, x + radius, y + radius)


def _polygon(x: float, y: float, radii: tuple[float, ...], turn_deg: float) -> list[Point]:
    """The corners of a polygon whose distances from the middle go round through `radii`."""
    step = 2 * math.pi / len(radii)
    turn = math.radians(turn_deg)
    return [
        (x + r * math.cos(turn + i * step), y + r * math.sin(turn + i * step))
        for i, r in enumerate(radii)
    ]


def _circle(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    pen.ellipse(_around(x, y, r), fill=ink)


def _square(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    pen.rectangle(_around(x, y, r * 0.88), fill=ink)


def _triangle(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    pen.polygon(_polygon(x, y + r * 0.15, (r * 1.15,) * 3, -90), fill=ink)


def _star(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    pen.polygon(_polygon(x, y, (r * 1.2, r * 0.5) * 5, -90), fill=ink)


def _moon(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    pen.ellipse(_around(x, y, r), fill=ink)
    pen.ellipse(_around(x + r * 0.55, y - r * 0.25, r * 0.82), fill=paper)


def _heart(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    for side in (-1, 1):
        pen.ellipse(_around(x + side * r * 0.48, y - r * 0.35, r * 0.55), fill=ink)
    pen.polygon(
        [(x - r * 0.98, y - r * 0.1), (x + r * 0.98, y - r * 0.1), (x, y + r * 1.05)], fill=ink
    )


def _ring(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    pen.ellipse(_around(x, y, r), fill=ink)
    pen.ellipse(_around(x, y, r * 0.55), fill=paper)


def _cross(pen: Pen, x: float, y: float, r: float, ink: str, paper: str) -> None:
    arm = r * 0.36
    pen.rectangle((x - r, y - arm, x + r, y + arm), fill=ink)
    pen.rectangle((x - arm, y - r, x + arm, y + r), fill=ink)


_SHAPES: dict[str, Callable[[Pen, float, float, float, str, str], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "moon": _moon,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
}


def _draw_action(pen: Pen, action: str, x: float, y: float, scale: int) -> None:
    reach = (RADIUS_PX + 2.2) * scale
    width = max(1, round(1.4 * scale))
    if action == "jump":  # a shadow on the ground below
        pen.ellipse((x - 6 * scale, y + 8 * scale, x + 6 * scale, y + 11 * scale), fill=_GREY)
    elif action == "spin":  # two arcs around
        for start in (200, 20):
            pen.arc(_around(x, y, reach), start, start + 100, fill=_GREY, width=width)
    elif action == "shine":  # eight short rays
        for i in range(8):
            dx, dy = math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)
            inner, outer = reach - 1.2 * scale, reach + 1.4 * scale
            pen.line(
                (x + dx * inner, y + dy * inner, x + dx * outer, y + dy * outer),
                fill="#e08a00",
                width=width,
            )
    elif action == "sleep":  # a letter z at the upper right
        left, top, size = x + 5 * scale, y - 11 * scale, 5.5 * scale
        corners = [(left, top), (left + size, top), (left, top + size), (left + size, top + size)]
        pen.line(corners, fill="#3c4048", width=width)


def draw_thing(
    pen: Pen, kind: str, colour: str, action: str, x: float, y: float, scale: int, background: str
) -> None:
    """Draw one thing.

    Args:
        x, y: its middle, in the pen's pixels.
        scale: the pen's pixels per pixel of the image.
    """
    rise = 1.5 * scale if action == "jump" else 0.0
    _SHAPES[kind](pen, x, y - rise, RADIUS_PX * scale, _INK[colour], background)
    if action:
        _draw_action(pen, action, x, y, scale)
