"""The page of `vlmdpo compare`, in gradio: ask, watch both answers grow, vote.

Text from models, data and people is escaped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import; nothing is sent

import gradio as gr

from vlmdpo import ui
from vlmdpo.data.images import BadImage, open_file
from vlmdpo.engine.side_by_side import ROLES, Answer, AnswerScore, SideBySide
from vlmdpo.errors import is_out_of_memory, out_of_memory_reason
from vlmdpo.web import votes
from vlmdpo.web.examples import Example
from vlmdpo.web.word_diff import marked, plain

MAX_QUESTION = 2000  # characters
_FONT = ["system-ui", "sans-serif"]
THEME = gr.themes.Base(font=_FONT, font_mono=["ui-monospace", "monospace"], primary_hue="blue")
CSS = files("vlmdpo.web").joinpath("compare.css").read_text(encoding="utf-8")
_EMPTY = "<span class='soft'>Pick an example, or upload an image, and ask.</span>"
_SAME_ANSWERS = "Both answers are the same: only an answer of your own can be preferred to it."
_NO_MEMORY = "There is too little memory for this question: try a smaller image."
_EMPTY_ANSWER = "An empty answer can be neither preferred nor rejected; write the correct one."


def _pane(role: str, name: str, text: str) -> str:
    """A pane; `text` is HTML."""
    heading = f"<h3>{role}: {plain(name)}</h3>"
    return f'<div class="pane" id="{role}">{heading}<div class="text">{text}</div></div>'


def _score_table(scores: Sequence[AnswerScore], beta: float) -> str:
    """Log-probs and rewards of both answers, as an HTML table."""
    rows = "".join(
        f"<tr><td>{role}'s</td><td>{one.tokens}</td><td>{one.base_logp:.2f}</td>"
        f"<td>{one.tuned_logp:.2f}</td><td>{one.reward:+.3f}</td></tr>"
        for role, one in zip(ROLES, scores, strict=True)
    )
    margin = scores[1].reward - scores[0].reward
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
        models: base and tuned model, asked one question at a time.
        names: their names, as shown.
        examples: questions to pick from.
        votes_file: the file that votes are appended to.
        max_new_tokens: longest answer.
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
        self._votes_lock = threading.Lock()

    def build(self) -> Any:
        """The gradio app, to be launched."""
        with gr.Blocks(title="vlmdpo compare", analytics_enabled=False) as app:
            gr.HTML(f"<h1>{plain(self.names[0])}, before and after</h1>")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    image = gr.Image(
                        label="Image",
                        type="filepath",
                        sources=["upload", "clipboard"],
                        height=260,
                    )
                    question = gr.Textbox(
                        label="Question", max_length=MAX_QUESTION, lines=2, elem_id="question"
                    )
                    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
                with gr.Column(scale=2, min_width=280):
                    panes, scores, voting, correct, status = self._answer_column()
            exchange = gr.State(None)  # the image, question and answers to vote on
            if self.examples:
                self._examples(image, question)
            asking: dict[str, Any] = {"fn": self.ask, "inputs": [image, question]}
            outputs = [*panes, scores, exchange, status, *voting]
            gr.on(
                [ask.click, question.submit],
                **asking,
                outputs=outputs,
                concurrency_limit=1,
                api_visibility="private",
            )
            for button, preferred in zip(voting, (*ROLES, "neither"), strict=True):
                button.click(
                    self._voter(preferred),
                    inputs=[exchange, correct],
                    outputs=[exchange, status, *voting],
                    api_visibility="private",
                )
        return app

    def _answer_column(self) -> tuple[list[Any], Any, list[Any], Any, Any]:
        """Panes, score table, vote buttons, field of the correct answer, and status line."""
        with gr.Row():
            panes = [self._column(role, name) for role, name in zip(ROLES, self.names, strict=True)]
        scores = gr.HTML()
        with gr.Row():
            better = [
                gr.Button(
                    f"{role} is better",
                    interactive=False,
                    elem_id=f"vote-{role.lower()}",
                )
                for role in ("Base", "Tuned")
            ]
        with gr.Accordion("Neither is correct", open=False):
            correct = gr.Textbox(
                label="The correct answer",
                max_length=MAX_QUESTION,
                elem_id="right",
            )
            neither = gr.Button(
                "Prefer this to both answers", interactive=False, elem_id="vote-neither"
            )
        status = gr.Markdown(f"Votes go to `{self.votes_file}`.", elem_id="status")
        return panes, scores, [*better, neither], correct, status

    def _column(self, role: str, name: str) -> Any:
        """An empty pane, beside the other if there is room, else below it."""
        with gr.Column(min_width=230):
            return gr.HTML(_pane(role, name, _EMPTY))

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

    def ask(self, image: str | None, question: str | None) -> Iterator[tuple[Any, ...]]:
        """Both answers as they grow, then with marks and scores.

        Yields panes, score table, exchange to vote on, status, and buttons. A question that does
        not fit into memory is refused, and the page goes on.
        """
        off = [gr.update(interactive=False)] * 3
        try:
            yield from self._answer(image, (question or "").strip(), off)
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            ui.warn(f"a question did not fit into memory: {out_of_memory_reason(problem)}")
            yield *self._panes(_EMPTY, _EMPTY), "", None, _NO_MEMORY, *off

    def _answer(
        self, image: str | None, question: str, off: Sequence[Any]
    ) -> Iterator[tuple[Any, ...]]:
        opened, refusal = self._checked(image, question)
        if opened is None:
            yield *self._panes(_EMPTY, _EMPTY), "", None, refusal, *off
            return
        base, tuned = Answer(), Answer()
        for base, tuned in self.models.stream(opened, question, self.max_new_tokens):
            yield *self._panes(plain(base.text), plain(tuned.text)), "", None, "…", *off
        scores = self.models.score(opened, question, (base, tuned))
        is_same = base.text == tuned.text
        yield (
            *self._panes(*marked(base.text, tuned.text)),
            _score_table(scores, self.models.beta),
            {"image": image, "question": question, "base": base.text, "tuned": tuned.text},
            _SAME_ANSWERS if is_same else "Which is better?",
            *[gr.update(interactive=not is_same)] * 2,
            gr.update(interactive=True),
        )

    def _checked(self, image: str | None, question: str) -> tuple[Any, str]:
        """(opened image, ""), or (None, why it cannot be asked)."""
        if not image or not question:
            return None, "Choose an image and type a question."
        if len(question) > MAX_QUESTION:
            return None, f"A question may have up to {MAX_QUESTION:,} characters."
        try:
            return open_file(Path(image)), ""
        except BadImage as problem:
            return None, f"This image cannot be used: {plain(str(problem))}"

    def _panes(self, base: str, tuned: str) -> tuple[str, str]:
        return _pane("base", self.names[0], base), _pane("tuned", self.names[1], tuned)

    def _voter(self, preferred: str) -> Callable[[Any, str | None], tuple[Any, ...]]:
        def vote(exchange: Mapping[str, str] | None, correct: str | None) -> tuple[Any, ...]:
            return self.vote(exchange, preferred, (correct or "").strip())

        return vote

    def vote(
        self, exchange: Mapping[str, str] | None, preferred: str, correct: str = ""
    ) -> tuple[Any, ...]:
        """Write one vote. Returns the exchange (None once it is voted on), status, and buttons.

        Args:
            preferred: "base", "tuned" or "neither".
            correct: the user's own answer, for "neither".
        """
        unchanged = [gr.update()] * 3
        if exchange is None:
            return None, "Ask first.", *unchanged
        base, tuned = exchange["base"], exchange["tuned"]
        if preferred == "neither":
            if not correct or correct in (base, tuned):
                return exchange, "Write an answer that differs from these two.", *unchanged
            pairs = [(correct, rejected) for rejected in dict.fromkeys((tuned, base))]
        else:
            pairs = [(base, tuned) if preferred == "base" else (tuned, base)]
        if not all(text for pair in pairs for text in pair):
            return exchange, _EMPTY_ANSWER, *unchanged
        about = {"preferred": preferred, "base": self.names[0], "tuned": self.names[1]}
        try:
            for chosen, rejected in pairs:
                lines = votes.append(
                    self.votes_file,
                    image=Path(exchange["image"]),
                    question=exchange["question"],
                    chosen=chosen,
                    rejected=rejected,
                    about=about,
                )
        except (OSError, BadImage) as problem:
            return exchange, f"Not written: {plain(str(problem))}", *unchanged
        with self._votes_lock:
            self.votes += len(pairs)
        written = f"Written: {lines} preference{'s' if lines > 1 else ''} in `{self.votes_file}`."
        return None, written, *[gr.update(interactive=False)] * 3
