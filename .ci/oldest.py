"""The oldest versions that pyproject.toml promises, for `make test-oldest`.

Without options: prints them as pip's constraints. `--record` writes down that they passed;
`--is-recorded` succeeds if pyproject.toml and constraints.txt are still those that did.
"""

import hashlib
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / ".ci" / "oldest-passed"


def constraints() -> list[str]:
    """`name==version` for each lower bound of the package's own dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for requirement in project["dependencies"]:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)(,<[\d.]+)?", requirement)
        if match is None:
            raise SystemExit(f"pyproject.toml: '{requirement}' has no lower bound")
        found.append(f"{match[1]}=={match[2]}")
    return found


def digest() -> str:
    """Of the two files that say which versions may be installed."""
    contents = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def main() -> None:
    if "--record" in sys.argv:
        RECORD.write_text(digest() + "\n", encoding="utf-8")
    elif "--is-recorded" in sys.argv:
        recorded = RECORD.read_text(encoding="utf-8").strip() if RECORD.is_file() else ""
        sys.exit(0 if recorded == digest() else 1)
    else:
        print("\n".join(constraints()))


if __name__ == "__main__":
    main()
