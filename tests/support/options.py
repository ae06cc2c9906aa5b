"""The tables of options in docs/commands, made from the command line itself:

python -m tests.support.options --write
"""

import argparse
import re
from pathlib import Path

import typer

import vlmdpo
from vlmdpo import cli

DOCS = Path(vlmdpo.__file__).parent.parent / "docs" / "commands"
BEGIN, END = (
    "<!-- options: made by python -m tests.support.options --write -->",
    "<!-- end of options -->",
)


def table(command: str) -> str:
    """Every option of a command: its spellings, its default, what it means."""
    lines = ["| Option | Default | Meaning |", "|---|---|---|"]
    for parameter in typer.main.get_command(cli.app).commands[command].params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if "--help" in names:
            continue
        text, default = re.fullmatch(
            r"(.*)\. \[default: (.*)\]", parameter.help, re.DOTALL
        ).groups()
        spelled = ", ".join(
            f"`{name}`"
            for name in sorted(names, key=lambda name: (name.startswith("--no-"), -len(name)))
        )
        lines.append(f"| {spelled} | {_cell(default)} | {_cell(text)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def put(command: str, page: str) -> str:
    """The page with its table as it should be."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(command)}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/commands")
    if parser.parse_args().write:
        for command in cli.COMMANDS:
            page = DOCS / f"{command}.md"
            page.write_text(put(command, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
