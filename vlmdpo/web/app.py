"""The page of `vlmdpo compare`, in gradio: ask, watch both answers grow, vote.

Text from models, data and people is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import; nothing is sent

import gradio as gr

from vlmdpo.web import panes
from vlmdpo.web.voting import MAX_QUESTION, Session, View, Voting
from vlmdpo.web.word_diff import plain

MAX_WAITING = 16  # questions and votes of all visitors; more are refused with a sentence
_FONT = ["system-ui", "sans-serif"]
THEME = gr.themes.Base(font=_FONT, font_mono=["ui-monospace", "monospace"], primary_hue="blue")
CSS = files("vlmdpo.web").joinpath("compare.css").read_text(encoding="utf-8")
_KEYS = files("vlmdpo.web").joinpath("compare.js").read_text(encoding="utf-8")
HEAD = f"<script>{_KEYS}</script>"
_HELP = "Keys: 1 or ← left, 2 or → right, t tie, s skip or next, u undo."


def _picture_field() -> Any:
    """An image field whose file is handed over as it is: `Voting` opens it, and says in words why
    one cannot be used. gradio would decode it twice, and show an error for what it cannot read.
    """
    field = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=260)
    # On the instance: of a subclass, gradio would write a .pyi file beside this module.
    field.preprocess = lambda payload: payload.path if payload is not None else None
    return field


class _Asked(NamedTuple):
    """The components that questions come from."""

    image: Any
    question: Any
    ask: Any
    token: Any
    session: Any


class Page:
    """The app around a `Voting`."""

    def __init__(self, voting: Voting) -> None:
        self.voting = voting
        self.examples = voting.examples

    def build(self) -> Any:
        """The gradio app, to be launched."""
        with gr.Blocks(title="vlmdpo compare", analytics_enabled=False) as app:
            gr.HTML(f"<h1 dir='auto'>{plain(self.voting.names[0])}, before and after</h1>")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    image = _picture_field()
                    question = gr.Textbox(
                        label="Question", max_length=MAX_QUESTION, lines=2, elem_id="question"
                    )
                    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
                with gr.Column(scale=2, min_width=280):
                    parts, correct = self._answer_column()
            # Sent back with every event: it shows that the sender has read this page.
            token = gr.Textbox(value=self.voting.token, visible="hidden")
            session = gr.State(Session())
            if self.examples:
                self._examples(image, question)
            self._connect(app, _Asked(image, question, ask, token, session), parts, correct)
        app.queue(max_size=MAX_WAITING)
        return app

    def _connect(self, app: Any, asked: _Asked, parts: dict[str, Any], correct: Any) -> None:
        """Tie the buttons to `Voting`."""
        voting, shown = self.voting, [asked.session, *parts.values()]
        own = [asked.token, asked.session]
        # The models answer one question at a time, and votes are written one after the other.
        models = {"concurrency_limit": 1, "concurrency_id": "models", "api_visibility": "private"}
        votes = {"concurrency_limit": 1, "concurrency_id": "votes", "api_visibility": "private"}

        def ask(token: str, session: Session, *what: Any) -> Iterator[list[Any]]:
            yield from map(_updates, voting.ask(token, session, *what))

        def ask_next(token: str, session: Session) -> Iterator[list[Any]]:
            for example, view in voting.ask_next(token, session):
                about = [str(example.image), example.question] if example else [gr.skip()] * 2
                yield [*about, *_updates(view)]

        gr.on(
            [asked.ask.click, asked.question.submit],
            ask,
            inputs=[*own, asked.image, asked.question],
            outputs=shown,
            **models,
        )
        parts["next"].click(
            ask_next, inputs=own, outputs=[asked.image, asked.question, *shown], **models
        )
        for choice in ("left", "tie", "right", "neither"):
            parts[f"vote_{choice}"].click(
                self._voter(choice), inputs=[*own, correct], outputs=shown, **votes
            )

        def undo(token: str, session: Session) -> list[Any]:
            view = voting.undo(token, session)
            again = view.session.exchange
            about = [gr.skip()] * 2 if again is None else [again.image, again.question]
            return [*about, *_updates(view)]

        parts["undo"].click(
            undo, inputs=own, outputs=[asked.image, asked.question, *shown], **votes
        )
        app.load(lambda: voting.progress(), outputs=[parts["progress"]], **votes)

    def _answer_column(self) -> tuple[dict[str, Any], Any]:
        """The components that `_updates` fills, in its order, and the correct answer's field."""
        parts: dict[str, Any] = {}
        with gr.Row():
            for side, html in zip(panes.SIDES, self.voting.empty_panes(), strict=True):
                parts[side] = self._column(html)
        parts["scores"] = gr.HTML()
        parts["status"] = gr.Markdown(self.voting.greeting(), elem_id="status")
        with gr.Row():
            parts["vote_left"] = _button("← Left", "vote-left")
            parts["vote_tie"] = _button("Tie", "vote-tie")
            parts["vote_right"] = _button("Right →", "vote-right")
        with gr.Row():
            parts["undo"] = _button("Undo", "undo")
            parts["next"] = gr.Button(
                "Skip", elem_id="next", min_width=90, visible=bool(self.examples)
            )
        with gr.Accordion("Neither is correct", open=False):
            correct = gr.Textbox(
                label="The correct answer", max_length=MAX_QUESTION, elem_id="correct"
            )
            parts["vote_neither"] = _button("Prefer this to both answers", "vote-neither")
        parts["progress"] = gr.Markdown(elem_id="progress")
        gr.Markdown(_HELP, elem_id="keys")
        return parts, correct

    def _column(self, html: str) -> Any:
        """An empty pane, beside the other if there is room, else below it."""
        with gr.Column(min_width=230):
            return gr.HTML(html)

    def _examples(self, image: Any, question: Any) -> None:
        for source in dict.fromkeys(example.source for example in self.examples):
            rows = [[str(e.image), e.question] for e in self.examples if e.source == source]
            gr.Examples(
                rows,
                [image, question],
                label=f"Examples: {source}",
                examples_per_page=6,
                cache_examples=False,
            )

    def _voter(self, choice: str) -> Callable[..., list[Any]]:
        def vote(token: str, session: Session, correct: str | None) -> list[Any]:
            return _updates(self.voting.vote(token, session, choice, (correct or "").strip()))

        return vote


def _button(label: str, elem_id: str) -> Any:
    return gr.Button(label, interactive=False, elem_id=elem_id, min_width=90)


def _updates(view: View) -> list[Any]:
    """A view as updates of the session and of the parts of the page, in their order."""

    def kept(value: Any) -> Any:
        return gr.skip() if value is None else value

    left, right = view.panes or (None, None)
    choose = gr.update(interactive=view.can_choose)
    voted = view.session.exchange is None and bool(view.session.cast)
    return [
        view.session,
        kept(left),
        kept(right),
        kept(view.scores),
        view.status,
        choose,
        choose,
        choose,
        gr.update(interactive=bool(view.session.cast)),
        gr.update(value="Next" if voted else "Skip"),
        gr.update(interactive=view.can_answer),
        kept(view.progress),
    ]
