"""`claims`: the judge model splits an answer into facts, each with a question, before it is asked.

It splits by the text alone, without the image, so that it cannot confirm what it has just read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmdpo.data.pairs import PLACEHOLDER
from vlmdpo.feedback.judges.base import Claim, Task
from vlmdpo.feedback.judges.statements import Claims, StatementsJudge, answers_in, can_be_asked

_CLAIMS_TOKENS = 512
SPLIT_PROMPT = """\
Below is an answer about an image that you cannot see. List every fact that the answer states about
the image. Write one line for each fact: the fact, then " => ", then a question that somebody who
sees the image can answer with yes or no, and whose answer is yes if the fact is true. Write nothing
else. A line may look like this:
A dog lies on the sofa. => Is there a dog lying on the sofa?

Question: {prompt}
Answer: {answer}"""
_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])?\s*(?P<fact>\S.*?)\s*=>\s*(?P<question>\S.*\?)\s*$")


class ClaimsJudge(StatementsJudge):
    """Asks the judge model first for the facts of an answer, then for a verdict on each."""

    name = "claims"

    def claims(self, tasks: Sequence[Task]) -> Claims:
        """The facts of each (prompt, answer), by the judge model; None where it gives none."""
        pairs = list(dict.fromkeys(pair for task in tasks for pair in answers_in(task)))
        texts = {
            pair: SPLIT_PROMPT.format(prompt=pair[0], answer=pair[1]).replace(PLACEHOLDER, " ")
            for pair in pairs
        }
        asked = [pair for pair in pairs if can_be_asked(texts[pair])]
        replies = self.answerer.complete([texts[pair] for pair in asked], _CLAIMS_TOKENS)
        found = {pair: read_claims(reply) for pair, reply in zip(asked, replies, strict=True)}
        return {pair: found.get(pair) for pair in pairs}


def read_claims(reply: str) -> list[Claim] | None:
    """The claims in a reply to SPLIT_PROMPT, each once; None if no line is of the asked form.

    The kind of a claim is how its question begins ("is there"), since models say yes to some kinds
    more readily than to others.
    """
    found = [match for line in reply.split("\n") if (match := _LINE.match(line))]
    claims = {
        match["question"]: Claim(
            match["fact"], match["question"], " ".join(match["question"].lower().split()[:2])
        )
        for match in found
    }
    return list(claims.values()) or None
