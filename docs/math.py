"""MkDocs hook: formulas, written as GitHub takes them ($$ ... $$ and $`...`$), become MathML, which
browsers draw unaided.
"""

import re

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = re.sub(
        r"^\$\$\n(.+?)\n\$\$$",
        lambda found: convert(found[1], display="block"),
        markdown,
        flags=re.S | re.M,
    )
    return re.sub(r"\$`([^`]+)`\$", lambda found: convert(found[1]), markdown)
