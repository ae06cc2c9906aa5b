"""What a run's curves say, in words: what was seen, what it means, and what to try. Arithmetic on
logged metrics, no more.

Each rule looks at where the run began and at the mean of its last quarter. Rewards are TRL's: beta
times how much more likely an answer is under the policy than under the reference, in nats, so 0 is
"as before", whatever the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LEAST_LINES = 4  # logged lines below which curves say nothing
_STILL = (
    0.2  # nats by which an answer's log-prob has hardly moved; its reward by beta times as much
)
_CHANCE = (0.4, 0.6)
_RISEN = 0.1  # of where it began or was lowest: a loss that has risen

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One thing that the curves show.

    Attributes:
        name: what machines know it by.
        level: "good", "look" (it may be well) or "bad".
        title, seen, means: in words; `seen` has the numbers.
        tries: what to try, the likeliest first.
    """

    name: str
    level: str
    title: str
    seen: str
    means: str
    tries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run's logged lines, boiled down.

    Attributes:
        starts: the loss at step 0, where it is known.
        still: a reward that has hardly moved.
        learning_rate: the peak.
    """

    steps: int
    starts: float | None
    loss: float
    accuracy: float
    margin: float
    chosen: float
    rejected: float
    still: float
    learning_rate: float
    evaluations: Lines
    lines: Lines


def diagnose(
    lines: Lines, evaluations: Lines = (), *, learning_rate: float, beta: float = 0.1
) -> list[Finding]:
    """What the curves show, gravest first; one "good" or "too early" finding where nothing else is.

    Args:
        lines: logged metrics, each with "step", "loss" and TRL's "rewards/...".
        evaluations: the same on rows that do not train, by the same names.
        learning_rate: the peak, to name the next one to try.
        beta: of the rewards, to tell how far the log-probs behind them have moved.
    """
    if len(lines) < _LEAST_LINES:
        seen = f"{len(lines)} logged lines; {_LEAST_LINES} are the least that curves are read from."
        return [
            Finding(
                "too_early",
                "look",
                "Too early to say",
                seen,
                "Let it go on, or log oftener.",
                ("--logging-steps 1",),
            )
        ]
    run = _boiled(lines, evaluations, learning_rate, beta)
    rules = (
        _diverged,
        _overfits,
        _not_moving,
        _accuracy_at_chance,
        _both_fall,
        _only_rejected_falls,
        _nothing_left,
    )
    found = [finding for rule in rules if (finding := rule(run)) is not None]
    bad = {finding.name for finding in found}
    if "diverged" in bad:  # all else follows from it
        found = [finding for finding in found if finding.name in ("diverged", "overfits")]
    return sorted(found, key=lambda finding: finding.level != "bad") or [_well(run)]


def _boiled(lines: Lines, evaluations: Lines, learning_rate: float, beta: float) -> Run:
    last = lines[-max(1, len(lines) // 4) :]

    def mean(name: str) -> float:
        return float(sum(line.get(name, 0.0) for line in last) / len(last))

    return Run(
        steps=int(lines[-1]["step"]),
        starts=float(lines[0]["loss"])
        if lines[0]["step"] == 1
        else None,  # the first step is taken from the reference itself
        loss=mean("loss"),
        accuracy=mean("rewards/accuracies"),
        margin=mean("rewards/margins"),
        chosen=mean("rewards/chosen"),
        rejected=mean("rewards/rejected"),
        still=_STILL * beta,
        learning_rate=learning_rate,
        evaluations=evaluations,
        lines=lines,
    )


def _moved(run: Run) -> bool:
    return max(abs(run.chosen), abs(run.rejected), abs(run.margin)) >= run.still


def _diverged(run: Run) -> Finding | None:
    if run.starts is None or run.loss <= run.starts * (1 + _RISEN):
        return None
    return Finding(
        "diverged",
        "bad",
        "The loss rose above where it began",
        f"loss {run.starts:.3f} at step 1, {run.loss:.3f} over the last quarter; reward accuracy "
        f"{run.accuracy:.2f}.",
        "Each step moves the model further than the gradient can be trusted: it unlearns.",
        (
            f"--learning-rate {run.learning_rate / 10:.0e}",
            "--warmup-steps 0.1, so that the first steps are small",
            "--set max_grad_norm=0.5",
        ),
    )


def _overfits(run: Run) -> Finding | None:
    losses = [(float(line["loss"]), int(line["step"])) for line in run.evaluations]
    if len(losses) < 3:
        return None
    least, step = min(losses)
    last = losses[-1][0]
    trained_then = min(run.lines, key=lambda line: abs(int(line["step"]) - step))["loss"]
    if step == losses[-1][1] or last <= least * (1 + _RISEN) or run.loss >= trained_then:
        return None
    return Finding(
        "overfits",
        "bad",
        "It overfits: rows that do not train get worse",
        f"eval loss {least:.3f} at step {step}, {last:.3f} at step {losses[-1][1]}, while the "
        "training loss fell from "
        f"{trained_then:.3f} to {run.loss:.3f}.",
        f"Since about step {step} it has learnt these rows by heart.",
        (
            f"--max-steps {step}, or the checkpoint nearest to it",
            "more pairs, or fewer epochs",
            "--lora-r 8, --lora-dropout 0.1, or a larger --beta",
        ),
    )


def _not_moving(run: Run) -> Finding | None:
    if _moved(run):
        return None
    at = f"{run.loss:.4f}" + (
        f" (it began at {run.starts:.4f}{_ln2(run.starts)})" if run.starts is not None else ""
    )
    return Finding(
        "not_moving",
        "bad",
        f"Nothing has been learnt in {run.steps} steps",
        f"loss {at}; rewards: chosen {run.chosen:+.4f}, rejected {run.rejected:+.4f}.",
        "The model still is the reference: its weights hardly move.",
        (
            f"--learning-rate {run.learning_rate * 10:.0e}",
            "more steps, or a schedule without a long warm-up",
            "--lora-scope all, where the adapter may be too far from what decides",
        ),
    )


def _ln2(loss: float) -> str:
    return ", ln 2" if abs(loss - 0.6931) < 0.0005 else ""


def _accuracy_at_chance(run: Run) -> Finding | None:
    if not _moved(run) or not _CHANCE[0] <= run.accuracy <= _CHANCE[1]:
        return None
    return Finding(
        "accuracy_at_chance",
        "bad",
        "Reward accuracy stays at chance",
        f"accuracy {run.accuracy:.2f} over the last quarter, though rewards have moved (chosen "
        f"{run.chosen:+.3f}, rejected "
        f"{run.rejected:+.3f}).",
        "What moves the rewards does not tell chosen from rejected: labels may be noise, or the "
        "pictures not matter.",
        (
            "look at some pairs: the report.html of vlmdpo prepare, or --show N",
            "vlmdpo train --doctor, which says whether the picture matters",
            "--loss robust --label-smoothing 0.2, where labels are known to be noisy",
        ),
    )


def _both_fall(run: Run) -> Finding | None:
    if run.margin < run.still or run.chosen >= -max(run.still, 0.2 * run.margin):
        return None
    return Finding(
        "both_fall",
        "bad",
        "Both answers become less likely",
        f"rewards: chosen {run.chosen:+.3f}, rejected {run.rejected:+.3f}; the margin is "
        f"{run.margin:+.3f}.",
        "The loss only asks for a difference, and it comes by making both answers unlikely; what "
        "becomes likelier instead is "
        "neither of them. Read the samples.",
        (
            "--loss mpo, or --loss sigmoid,sft --loss-weights 1,0.2: they hold on to the chosen "
            "answer",
            f"--learning-rate {run.learning_rate / 3:.0e}, or fewer steps",
            "--loss mdpo, whose anchor keeps the chosen answer's reward above zero",
        ),
    )


def _only_rejected_falls(run: Run) -> Finding | None:
    if (
        run.margin < 2 * run.still
        or not -max(run.still, 0.2 * run.margin) <= run.chosen <= 0.1 * run.margin
    ):
        return None
    return Finding(
        "only_rejected_falls",
        "look",
        "The margin grows only because rejected falls",
        f"rewards: chosen {run.chosen:+.3f}, rejected {run.rejected:+.3f}: "
        f"{-run.rejected / run.margin:.0%} of the margin.",
        "It learns what not to say. That is well where chosen answers were likely anyway; else it "
        "has not learnt them.",
        (
            "read the samples: are the new answers the chosen ones?",
            "--loss mpo, or --loss apo_zero, which raise the chosen answer",
        ),
    )


def _nothing_left(run: Run) -> Finding | None:
    half = run.lines[len(run.lines) // 2 :]
    if run.evaluations or any(
        line.get("rewards/accuracies", 0.0) < 0.99 or line["loss"] > 0.1 for line in half
    ):
        return None
    return Finding(
        "nothing_left",
        "look",
        "Every pair has been told apart for half of the run",
        f"accuracy {run.accuracy:.2f}, loss {run.loss:.3f}, margin {run.margin:+.2f} over the "
        "last quarter.",
        "There is nothing left to learn from these pairs; whether others profit, only rows that "
        "do not train can say.",
        ("vlmdpo prepare --test-size 0.05, and train on that", "fewer epochs, or harder pairs"),
    )


def _well(run: Run) -> Finding:
    held = (
        f" Eval accuracy {run.evaluations[-1]['rewards/accuracies']:.2f}."
        if run.evaluations
        else ""
    )
    return Finding(
        "learning",
        "good",
        "It learns, and nothing looks wrong",
        f"over the last quarter accuracy {run.accuracy:.2f}, margin {run.margin:+.3f} (chosen "
        f"{run.chosen:+.3f}, rejected "
        f"{run.rejected:+.3f}).{held}",
        "Curves cannot say whether it hallucinates less.",
        ("vlmdpo eval-amber",),
    )
