"""The figures of `vlmdpo rounds` over its rounds: whether one helps, which is best, a picture and a
page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdpo.errors import ConfigError
from vlmdpo.report import html as pages

PAGE, PICTURE = "report.html", "rounds.png"
# Figure → its heading, and 1 if more is better, -1 if less is, 0 if neither.
FIGURES = {
    "accuracy": ("Accuracy", 1),
    "f1": ("F1", 1),
    "hal": ("Hal", -1),
    "chair": ("CHAIR", -1),
    "cover": ("Cover", 1),
    "words": ("Words", 0),
}
_PANELS = (
    ("Accuracy of yes/no answers", ("accuracy", "f1")),
    ("Hallucination in descriptions (less is better)", ("hal", "chair")),
    ("Cover", ("cover",)),
    ("Words of a description", ("words",)),
)
_COLOURS = ("tab:blue", "tab:red")

Scored = Sequence[Mapping[str, float | None]]


def figures_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of an evaluation of one model; None for those that were not asked for."""
    role = "tuned" if "tuned" in report["scores"] else "base"
    scores = report["scores"][role]
    overall, texts = scores.get("Discriminative", {}), scores.get("Generative", {})
    return {
        **{name: overall.get(name) for name in ("accuracy", "f1")},
        **{name: texts.get(name) for name in ("hal", "chair", "cover")},
        "words": report["models"][role]["words_a_description"],
    }


def _cover_fell(scored: Scored, number: int, max_loss: float) -> bool:
    first, now = scored[0].get("cover"), scored[number].get("cover")
    # The figures have one decimal, which floats hold only nearly.
    return first is not None and now is not None and round(first - now, 6) > max_loss


def why_not_helpful(scored: Scored, number: int, max_cover_loss: float) -> str | None:
    """Why a round does not help; None if it does: if accuracy rose or Hal fell in it, and Cover is
    not more than `max_cover_loss` points below that of round 0.
    """
    before, now = scored[number - 1], scored[number]
    if _cover_fell(scored, number, max_cover_loss):
        return (
            f"Cover is {now['cover']:.1f}, more than {max_cover_loss:g} points below "
            f"{scored[0]['cover']:.1f}"
        )
    judged = []
    for name in ("accuracy", "hal"):
        earlier, later = before.get(name), now.get(name)
        if earlier is None or later is None:
            continue
        heading, sign = FIGURES[name]
        if sign * (later - earlier) > 0:
            return None
        judged.append(f"{heading} {earlier:.1f} → {later:.1f}")
    return f"no figure became better ({', '.join(judged)})"


def best_round(scored: Scored, by: str | None, max_cover_loss: float) -> int:
    """The round with the best figure, of equal ones the first; 0 if none beats the model before.

    Rounds that lost too much Cover are left out.

    Args:
        by: a figure; None for Hal, or accuracy where nothing was described.

    Raises ConfigError for a figure that was not asked for.
    """
    name = by or ("hal" if scored[0].get("hal") is not None else "accuracy")
    sign = FIGURES[name][1]
    values = [one.get(name) for one in scored]
    if any(value is None for value in values):
        raise ConfigError(
            f"--best-by {name}: eval-amber asks nothing that gives it; see its --task"
        )
    kept = [n for n in range(len(scored)) if not _cover_fell(scored, n, max_cover_loss)]
    return max(kept, key=lambda n: sign * float(values[n] or 0))


def draw(scored: Scored, best: int, path: Path) -> None:
    """Write a PNG: the figures over the rounds, the best round marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.93, bottom=0.075, wspace=0.17, hspace=0.18)
    for axes, (title, names) in zip(grid.flat, _PANELS, strict=True):
        for name, colour in zip(names, _COLOURS, strict=False):
            points = [(n, one[name]) for n, one in enumerate(scored) if one.get(name) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="o", color=colour, label=FIGURES[name][0]
                )
        axes.axvline(best, color="0.6", linewidth=1, linestyle="--", label=f"best: round {best}")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        axes.set_xticks(range(len(scored)))
    for axes in grid[1]:
        axes.set_xlabel("round (0: before the first)")
    part = path.with_name(f".{path.name}.partial")
    figure.savefig(part, dpi=130, format="png")
    pyplot.close(figure)
    part.replace(path)


def _in_words(value: object) -> str:
    """A figure or several by name, as the page writes them."""
    if isinstance(value, Mapping):
        parts = (f"{str(name).replace('_', ' ')} {_in_words(one)}" for name, one in value.items())
        return ", ".join(parts)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(
    *,
    title: str,
    scored: Scored,
    best: int,
    stages: Sequence[Mapping[str, Mapping[str, Any]]],
    reasons: Mapping[int, str | None],
    picture: Path,
    settings: Mapping[str, Any],
) -> str:
    """The page as HTML, with the picture in it; all text is escaped.

    Args:
        stages: by round, what was kept of each stage.
        reasons: of each round, why it did not help; None if it did.
    """
    names = [name for name in FIGURES if any(one.get(name) is not None for one in scored)]
    return (
        pages.environment({"in_words": _in_words})
        .get_template("rounds.html")
        .render(
            title=title,
            headings={name: FIGURES[name][0] for name in names},
            scored=scored,
            best=best,
            stages=stages,
            reasons=reasons,
            picture=pages.uri(picture.read_bytes(), "png"),
            settings={
                name: value for name, value in settings.items() if value not in (None, [], "")
            },
        )
    )
