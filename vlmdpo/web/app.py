"""The page of `vlmdpo compare`, in gradio: ask, see both answers grow, vote. Knows nothing of where
models come from.

Whatever models, data or people say reaches the page escaped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is told to anybody

import gradio as gr

from vlmdpo.data.images import BadImage, open_file
from vlmdpo.engine.side_by_side import ROLES, Answer, AnswerScore, SideBySide
from vlmdpo.web import votes
from vlmdpo.web.examples import Example
from vlmdpo.web.word_diff import marked, plain

MAX_QUESTION = 2000  # characters
_FONT = ["system-ui", "sans-serif"]
THEME = gr.themes.Base(font=_FONT, font_mono=["ui-monospace", "monospace"], primary_hue="blue")
CSS = """
.pane { border: 1px solid var(--border-color-primary); border-radius: .6rem; padding: .8rem 1rem; min-height: 7rem; }
.pane h3 { margin: 0 0 .4rem; font-size: .95rem; } .pane .text { font-size: 1.05rem; overflow-wrap: anywhere; }
.pane .soft { color: var(--body-text-color-subdued); font-size: .88rem; } .figures { font-size: .88rem; }
.pane mark { border-radius: .2rem; padding: 0 .12rem; color: inherit; }
mark.only-base { background: #f6c9c5; } mark.only-tuned { background: #bfe6cd; }
.dark mark.only-base { background: #7a2a24; } .dark mark.only-tuned { background: #1d5a38; }
.figures table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; border: 0 !important; }
.figures th, .figures td { text-align: right; padding: .2rem .4rem !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.figures th:first-child, .figures td:first-child { text-align: left; }
.figures tr { border: 0 !important; } .figures p { margin: .4rem 0 0; }
@media (max-width: 30rem) { .figures table { font-size: .76rem; }
  .figures th, .figures td { padding: .2rem !important; } }
"""
_NOTHING = "<span class='soft'>Pick an example, or upload a picture, and ask.</span>"


def _pane(who: str, name: str, text: str) -> str:
    """A pane; `text` is HTML."""
    return f'<div class="pane" id="{who}"><h3>{who}: {plain(name)}</h3><div class="text">{text}</div></div>'


def _figures(judged: Sequence[AnswerScore], beta: float) -> str:
    """What both models think of both answers, as a table."""
    rows = "".join(
        f"<tr><td>{who}'s</td><td>{one.tokens}</td><td>{one.base_logp:.2f}</td><td>{one.tuned_logp:.2f}</td>"
        f"<td>{one.reward:+.3f}</td></tr>"
        for who, one in zip(ROLES, judged, strict=True)
    )
    margin = judged[1].reward - judged[0].reward
    return (
        '<div class="figures"><table><tr><th>Answer</th><th>tokens</th><th>log-prob by '
        "base</th><th>by tuned</th>"
        f"<th>reward</th></tr>{rows}</table><p>Reward margin, tuned's answer − base's: "
        f"<b>{margin:+.3f}</b>. "
        f"A reward is {beta:g} × (log-prob by tuned − by base), in nats.</p></div>"
    )


class Page:
    """The app, its models, and where votes go.

    Args:
        models: asked one question at a time.
        names: of base and tuned model, as shown.
        examples: to pick from.
        votes_file: that votes are appended to.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        models: SideBySide,
        names: tuple[str, str],
        examples: Sequence[Example],
        votes_file: Path,
        max_new_tokens: int,
    ) -> None:
        self.models, self.names, self.examples = models, names, examples
        self.votes_file, self.max_new_tokens = votes_file, max_new_tokens
        self.votes = 0
        self._counting = threading.Lock()

    def build(self) -> Any:
        """The gradio app, to be launched."""
        with gr.Blocks(title="vlmdpo compare", analytics_enabled=False) as app:
            gr.HTML(f"<h1>{plain(self.names[0])}, before and after</h1>")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    picture = gr.Image(
                        label="Picture",
                        type="filepath",
                        sources=["upload", "clipboard"],
                        height=260,
                    )
                    question = gr.Textbox(
                        label="Question", max_length=MAX_QUESTION, lines=2, elem_id="question"
                    )
                    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
                with gr.Column(scale=2, min_width=280):
                    with gr.Row():
                        panes = [
                            self._column(who, name)
                            for who, name in zip(ROLES, self.names, strict=True)
                        ]
                    figures = gr.HTML()
                    with gr.Row():
                        better = [
                            gr.Button(
                                f"{who} is better", interactive=False, elem_id=f"vote-{who.lower()}"
                            )
                            for who in ("Base", "Tuned")
                        ]
                    with gr.Accordion("Neither is right", open=False):
                        right = gr.Textbox(
                            label="What it should have said",
                            max_length=MAX_QUESTION,
                            elem_id="right",
                        )
                        neither = gr.Button(
                            "Prefer this to both answers", interactive=False, elem_id="vote-neither"
                        )
                    status = gr.Markdown(f"Votes go to `{self.votes_file}`.", elem_id="status")
            said = gr.State(None)
            voting = [*better, neither]
            if self.examples:
                self._examples(picture, question)
            asked: dict[str, Any] = {"fn": self.ask, "inputs": [picture, question]}
            shown = [*panes, figures, said, status, *voting]
            gr.on(
                [ask.click, question.submit],
                **asked,
                outputs=shown,
                concurrency_limit=1,
                api_visibility="private",
            )
            for button, who in zip(voting, (*ROLES, "neither"), strict=True):
                button.click(
                    self._voter(who),
                    inputs=[said, right],
                    outputs=[said, status, *voting],
                    api_visibility="private",
                )
        return app

    def _column(self, who: str, name: str) -> Any:
        """An empty pane, beside the other where there is room, else below it."""
        with gr.Column(min_width=230):
            return gr.HTML(_pane(who, name, _NOTHING))

    def _examples(self, picture: Any, question: Any) -> None:
        for source in dict.fromkeys(example.source for example in self.examples):
            chosen = [[str(e.picture), e.question] for e in self.examples if e.source == source]
            gr.Examples(
                chosen,
                [picture, question],
                label=f"Examples: {source}",
                examples_per_page=6,
                cache_examples=False,
            )

    def ask(self, picture: str | None, question: str | None) -> Iterator[tuple[Any, ...]]:
        """Both answers as they grow, then marked and judged. Outputs: panes, figures, what was
        said, status, buttons.
        """
        question = (question or "").strip()
        off = [gr.update(interactive=False)] * 3
        if not picture or not question:
            yield *self._panes(_NOTHING, _NOTHING), "", None, "Give a picture and a question.", *off
            return
        if len(question) > MAX_QUESTION:
            yield (
                *self._panes(_NOTHING, _NOTHING),
                "",
                None,
                f"A question may have {MAX_QUESTION:,} characters.",
                *off,
            )
            return
        try:
            opened = open_file(Path(picture))
        except BadImage as problem:
            yield (
                *self._panes(_NOTHING, _NOTHING),
                "",
                None,
                f"This picture cannot be used: {plain(str(problem))}",
                *off,
            )
            return
        base, tuned = Answer(), Answer()
        for base, tuned in self.models.stream(opened, question, self.max_new_tokens):
            yield *self._panes(plain(base.text), plain(tuned.text)), "", None, "…", *off
        judged = self.models.score(opened, question, (base, tuned))
        said = {"picture": picture, "question": question, "base": base.text, "tuned": tuned.text}
        alike = base.text == tuned.text
        status = (
            "Both say the same: only an answer of your own can be preferred to it."
            if alike
            else "Which is better?"
        )
        buttons = [gr.update(interactive=not alike)] * 2 + [gr.update(interactive=True)]
        yield (
            *self._panes(*marked(base.text, tuned.text)),
            _figures(judged, self.models.beta),
            said,
            status,
            *buttons,
        )

    def _panes(self, base: str, tuned: str) -> tuple[str, str]:
        return _pane("base", self.names[0], base), _pane("tuned", self.names[1], tuned)

    def _voter(self, who: str) -> Callable[[Any, str | None], tuple[Any, ...]]:
        def vote(said: Mapping[str, str] | None, right: str | None) -> tuple[Any, ...]:
            return self.vote(said, who, (right or "").strip())

        return vote

    def vote(self, said: Mapping[str, str] | None, who: str, right: str = "") -> tuple[Any, ...]:
        """Write one vote. Outputs: what was said (None once it is voted on), status, buttons."""
        as_before = [gr.update()] * 3
        if said is None:
            return None, "Ask first.", *as_before
        if who == "neither":
            pairs = [(right, said["tuned"])] + (
                [(right, said["base"])] if said["base"] != said["tuned"] else []
            )
            if not right or right in (said["base"], said["tuned"]):
                return said, "Write another answer than these two.", *as_before
        else:
            pairs = [(said[who], said["tuned" if who == "base" else "base"])]
        if not all(text for pair in pairs for text in pair):
            return (
                said,
                "An empty answer cannot be preferred, or preferred to; write what it should have "
                "said.",
                *as_before,
            )
        about = {"preferred": who, "base": self.names[0], "tuned": self.names[1]}
        try:
            for chosen, rejected in pairs:
                held = votes.append(
                    self.votes_file,
                    picture=Path(said["picture"]),
                    question=said["question"],
                    chosen=chosen,
                    rejected=rejected,
                    about=about,
                )
        except (OSError, BadImage) as problem:
            return said, f"Not written: {plain(str(problem))}", *as_before
        with self._counting:
            self.votes += len(pairs)
        off = [gr.update(interactive=False)] * 3
        return (
            None,
            f"Written: {held} preference{'s' if held > 1 else ''} in `{self.votes_file}`.",
            *off,
        )
