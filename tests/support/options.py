"""The tables of options in docs/commands, made from the command line itself.

python -m tests.support.options --write
"""

import argparse
import re
from pathlib import Path

import typer

import vlmdpo
from vlmdpo import cli, config

DOCS = Path(vlmdpo.__file__).parent.parent / "docs" / "commands"
BEGIN, END = (
    "<!-- options: made by python -m tests.support.options --write -->",
    "<!-- end of options -->",
)


def tables(command: str) -> str:
    """Every option of a command under the headings of its `--help`: spellings, default, meaning."""
    rows: dict[str, list[str]] = {}
    for parameter in typer.main.get_command(cli.app).commands[command].params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if {"--help", "--help-all"} & set(names):
            continue
        pattern = r"(.*)\. \[default: (.*)\]"
        text, default = re.fullmatch(pattern, parameter.help, re.DOTALL).groups()
        by_form = sorted(names, key=lambda name: (name.startswith("--no-"), -len(name)))
        spelled = ", ".join(f"`{name}`" for name in by_form)
        heading = parameter.rich_help_panel or "General"
        rows.setdefault(heading, []).append(f"| {spelled} | {_cell(default)} | {_cell(text)} |")
    head = "| Option | Default | Meaning |\n|---|---|---|"
    return "\n\n".join(
        "\n".join([f"### {heading}\n", head, *rows[heading]])
        for heading in (*config.GROUPS, "General")
        if heading in rows
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def put(command: str, page: str) -> str:
    """The page with its tables up to date."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(command)}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/commands")
    if parser.parse_args().write:
        for command in cli.COMMANDS:
            page = DOCS / f"{command}.md"
            page.write_text(put(command, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
