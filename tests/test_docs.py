"""The documentation is true: its commands run, and its tables and messages are the program's.

A command is first parsed exactly as it is shown. Then it runs on the embedded model: `_small`
replaces what needs full size or another machine (a large model, the Hub, eight GPUs), and nothing
else.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlmdpo as package
from tests.support import coco, options, pope_data
from vlmdpo import cli, config
from vlmdpo.commands import compare
from vlmdpo.errors import nearest
from vlmdpo.models import option_layers
from vlmdpo.tiny import evaluation

ROOT = Path(package.__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
# Options that need full size, with the values that replace theirs; [] removes the option.
_REPLACED = {"--model": ["tiny"], "--dtype": ["float32"], "--push-to-hub": []}
# Options that are left out with their value.
_NOT_HERE = {
    "--num-processes",
    "--num-machines",
    "--machine-rank",
    "--main-process-ip",
    "--strategy",
    "--gpu",
    "--quantization",
}
# An adapter and its evaluation, in which answers changed; no command shown replaces them.
_UNCHANGED = {"--adapter": "outputs/compared", "--amber": "outputs/compared-amber"}
_SMALLER = {
    "prepare": ["--limit", "40"],
    "train": ["--max-steps", "2"],
    "eval-amber": ["--limit", "3", "--max-description-tokens", "8"],
    "estimate-memory": ["--fast"],
    "infer": ["--max-new-tokens", "8"],
    "rounds": [
        *("--model", "tiny", "--dtype", "float32", "--rounds", "1", "--overwrite"),
        *("--make-pairs", "limit=4", "--make-pairs", "samples=6", "--make-pairs", "temperature=1"),
        *("--prepare", "test_size=0", "--train", "max_steps=1", "--train", "keep_best=false"),
        *("--eval-amber", "limit=3", "--eval-amber", "max_description_tokens=8"),
    ],
    "make-pairs": ["--limit", "4", "--samples", "6", "--temperature", "1", "--overwrite"],
}


def _blocks(text):
    """Lines of code, indented or in fences, without their prompt; other lines are empty."""
    fenced, found = False, []
    for line in text.split("\n"):
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(line.strip().removeprefix("$ "))
        else:
            found.append("")
    return found


def shown():
    """(page and line, words) of every command in a code block or between backticks."""
    commands = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = _blocks(text)
        for number, line in enumerate(lines):
            if not line.startswith("vlmdpo "):
                continue
            while line.endswith("\\"):
                number += 1
                line = line[:-1] + lines[number]
            commands.append(
                (f"{page.relative_to(ROOT)}:{number + 1}", shlex.split(line, comments=True)[1:])
            )
        for found in re.finditer(r"`vlmdpo ([a-z][a-z-]+(?: [^`\n]+)?)`", text):
            place = f"{page.relative_to(ROOT)}:{text[: found.start()].count(chr(10)) + 1}"
            commands.append((place, shlex.split(found[1])))
    return [(place, words) for place, words in commands if words]


SHOWN = shown()


def _small(words):
    """The same command at a size that runs here."""
    command, rest = words[0], iter(words[1:])
    plain = (command == "train" and "--dry-run" in words) or command == "estimate-memory"
    made = []
    for word in rest:
        if word in _REPLACED and not plain:
            next(rest)
            made += [word, *_REPLACED[word]] if _REPLACED[word] else []
        elif word == "--dataset" and (value := next(rest)):
            made += [word, "scenes" if value == "rlaif-v" and not plain else value]
        elif word in _UNCHANGED and command == "compare" and "--amber" in words:
            next(rest)  # other commands train and evaluate there too
            made += [word, _UNCHANGED[word]]
        elif word in _NOT_HERE and not plain:
            next(rest)
        else:
            made.append(word)
    if command == "train" and "--dry-run" not in words:
        made += [*_SMALLER["train"], *(["--model", "tiny"] if "--config" in words else [])]
        made += [] if "--resume" in words else ["--overwrite"]
    elif command == "prepare":
        made += [*_SMALLER["prepare"], "--overwrite"]
    elif command == "export":
        made += ["--overwrite", *([] if "--merge" in made else ["--merge"])]
    elif command == "estimate-memory" and "--dataset" in words:
        made += ["--fast"]
    elif command == "eval":
        few = ["--limit", "3", "--max-description-tokens", "8"]
        made += [*([] if "--answers" in words else few), "--overwrite"]
    elif command == "eval-amber":
        made += [*([] if "--answers" in words else _SMALLER[command]), "--overwrite"]
    elif command == "make-pairs":
        # The embedded model describes only what is asked in its own words.
        made += [*_SMALLER[command], *(["--prompts", "prompts.txt"] if "photos/" in words else [])]
    else:
        made += _SMALLER.get(command, [])
    if command == "rounds" and "photos/" in words:  # likewise
        made += ["--make-pairs", "prompts=prompts.txt"]
    return (command, *made)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the documentation uses: images, preferences, AMBER's data, runs."""
    folder = tmp_path_factory.mktemp("docs")
    evaluation.draw_image("SCENE_1.png").save(folder / "photo.jpg")
    shutil.copytree(evaluation.FOLDER, folder / "AMBER" / "data")
    (folder / "AMBER" / "image").mkdir()
    for number in range(1, evaluation.SCENES + 1):
        evaluation.draw_image(f"SCENE_{number}.png").save(
            folder / "AMBER" / "image" / f"SCENE_{number}.png"
        )
    answers = [{"id": number, "response": "No"} for number in range(101, 120)]
    (folder / "answers.json").write_text(json.dumps(answers))
    asked = ("Is there a moon?", "Describe this image.")
    answer = {"answer": "yes", "choices": ["yes", "a moon"]}
    lines = [
        {"id": n, "image": "photo.jpg", "question": one, **answer} for n, one in enumerate(asked)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    _write_benchmarks(folder)
    (folder / "photos").symlink_to(folder / "AMBER" / "image")
    (folder / "prompts.txt").write_text("Describe this image.\n")
    (folder / "examples").symlink_to(ROOT / "examples")
    subprocess.run(
        [sys.executable, "examples/own_images/make_sample.py", "my", "--pictures", "20"],
        cwd=folder,
        check=True,
        timeout=120,
    )
    runpy.run_path(str(ROOT / "examples" / "own_questions" / "make_sample.py"))["main"](
        folder / "mine"
    )
    vote = {"question": "Is there a moon?", "chosen": "No", "rejected": "Yes"}
    for file in (
        folder / "my" / "images" / "votes.jsonl",
        folder / "outputs" / "votes" / "preferences.jsonl",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{number:04d}.png" for number in range(1, 21)]
        file.write_text("".join(json.dumps({**vote, "image": name}) + "\n" for name in names))
        for name in names if file.parent != folder / "my" / "images" else ():
            shutil.copy(folder / "my" / "images" / name, file.parent)
    return folder


def _write_benchmarks(folder):
    """POPE, RePOPE and COCO, about the same two images."""
    coco.write(folder / "coco" / "annotations", {1: (["dog"], ["A dog."]), 2: (["cat"], [])})
    pictures = coco.draw_images(folder / "coco" / "val2014", [1, 2])
    (folder / "captions.jsonl").write_text('{"image_id": 1, "caption": "A cat."}')
    for name in ("annotations", "val2014"):
        (folder / name).symlink_to(folder / "coco" / name)
    images = sorted(path.name for path in pictures.iterdir())
    for name in ("pope", "repope"):
        pope_data.write(folder / name.upper(), images, name=name)
    pope_data.answers(folder / "popular.jsonl", ["yes"] * 6 * len(images))


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(compare, "_serve", lambda config, page: "http://127.0.0.1:7860/")
    # A server that denies none to two statements, whatever they are.
    verdict = {"statement": "one", "verdict": "no"}
    monkeypatch.setattr(
        "vlmdpo.feedback.judges.chat_server.ChatServer.reply",
        lambda server, body: json.dumps({"statements": [verdict] * (sum(body) % 3)}),
    )
    return place


@pytest.fixture(scope="module")
def runs(place):
    """The runs that commands start from: one of each name that the documentation uses."""
    here = os.getcwd()
    os.chdir(place)
    try:
        source = [
            "--dataset",
            "my/preferences.csv",
            "--image-root",
            "my/images",
            "--test-size",
            "0.2",
        ]
        assert cli.run(["prepare", *source, "--output-dir", "outputs/data/mine", "-q"]) == 0
        first = "outputs/tiny-scenes-dpo"
        steps = ["--max-steps", "2", "--eval-steps", "0", "-q"]
        assert (
            cli.run(["train", "--dataset", "outputs/data/mine", "--output-dir", first, *steps]) == 0
        )
        for name in ("outputs/idefics2-8b-rlaif-v-dpo", "outputs/mine", "outputs/run", "DIR"):
            shutil.copytree(first, name)
        # Two steps change no answer, and `compare` shows those that changed.
        adapter, evaluated = _UNCHANGED["--adapter"], _UNCHANGED["--amber"]
        shutil.copytree(first, adapter)
        shutil.copy(compare.SHIPPED / "adapter_model.safetensors", adapter)
        few = ["--dimension", "existence", "--limit", "40", "-q", "--output-dir", evaluated]
        assert cli.run(["eval-amber", "--adapter", adapter, *few]) == 0
    finally:
        os.chdir(here)


def _read(words, monkeypatch):
    """The settings that the command line makes of a command, without running it."""
    read = []
    # What an adapter names is read when the command runs, below.
    monkeypatch.setattr(option_layers, "base_layer", lambda given: {})
    monkeypatch.setattr(cli, "_run", lambda name, module, settings, hint: read.append(settings))
    code = cli.run(list(words))
    return code, read


@pytest.mark.parametrize(
    ("where", "words"), SHOWN, ids=[f"{where} {words[0]}" for where, words in SHOWN]
)
def test_every_command_shown_is_accepted(where, words, there, monkeypatch, capfd):
    if words[0] not in cli.COMMANDS:
        assert words in (["--install-completion"], ["--help"]), (
            f"{where}: {nearest(words[0], cli.COMMANDS)}"
        )
        return
    if "N" in words:
        words = ["3" if word == "N" else word for word in words]
    code, read = _read(words, monkeypatch)
    err = capfd.readouterr().err
    if code == 2 and re.search(
        r"is needed|nothing to do", err
    ):  # `vlmdpo export --merge` in a sentence: a part of a command
        assert "/" not in " ".join(words)
        return
    assert (code, len(read)) == (0, 1), f"{where}: {err}"
    assert isinstance(read[0], cli.COMMANDS[words[0]][0])


_TO_RUN = {}
for _where, _words in SHOWN:
    _said = ["3" if word == "N" else word for word in _words]
    # `make demo` is a stage of CI; lmms-eval is not there.
    if _said[0] in cli.COMMANDS and _said[0] != "demo" and "lmms:" not in " ".join(_said):
        _TO_RUN.setdefault(_small(_said), _where)


@pytest.mark.slow
@pytest.mark.parametrize(
    "small", list(_TO_RUN), ids=[f"{where} {small[0]}" for small, where in _TO_RUN.items()]
)
def test_every_command_shown_runs(small, there, runs, vlmdpo):
    code, out, err = vlmdpo(*small)
    if code == 2 and re.search(r"is needed|nothing to do", err):  # see above
        assert len(small) <= 6
        return
    assert code == 0, f"{' '.join(small)}\n{err}"
    assert out.strip()


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_each_command_has_a_page_with_an_up_to_date_table(command):
    page = (options.DOCS / f"{command}.md").read_text(encoding="utf-8")
    assert page == options.put(command, page), "run: python -m tests.support.options --write"
    for field in cli.dataclasses.fields(cli.COMMANDS[command][0]):
        assert f"`{config.flag_name(field.name)}`" in page


def _headings():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### (.+)$", text, re.M)


@pytest.mark.parametrize("heading", _headings())
def test_troubleshooting_quotes_messages_of_the_program(heading):
    if heading == "No such option":  # Typer's own
        return
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(package.__file__).parent.rglob("*.py")
    )
    sources = re.sub(r'"\n\s+f?"', "", sources)  # texts that are written over several lines
    assert heading in sources


@pytest.mark.slow
def test_the_site_builds_and_a_dead_link_fails(tmp_path):
    pytest.importorskip("mkdocs")

    def build(root):
        command = [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            ".mkdocs.yml",
            "-d",
            tmp_path / "site",
        ]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)

    done = build(ROOT)
    assert done.returncode == 0, done.stderr
    pages = {
        path.relative_to(tmp_path / "site").as_posix()
        for path in (tmp_path / "site").rglob("*.html")
    }
    assert {f"commands/{command}.html" for command in cli.COMMANDS} <= pages
    assert "<math" in (tmp_path / "site" / "method.html").read_text()
    for name in ("own-images", "own-questions"):
        assert "make_sample.py" in (tmp_path / "site" / f"{name}.html").read_text()
    for name in ("docs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    shutil.copy(ROOT / ".mkdocs.yml", tmp_path / "copy")
    page = tmp_path / "copy" / "docs" / "index.md"
    page.write_text(page.read_text() + "\n[gone](nowhere.md)\n")
    assert build(tmp_path / "copy").returncode != 0


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "docs/pitfalls.md"])
def test_modules_that_the_documentation_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.py)`", text))
    modules = set(re.findall(r"`((?:benchmarks|data|engine|training|report)(?:\.\w+)+)`", text))
    assert files
    for file in files:
        assert (ROOT / file).is_file() or (ROOT / "vlmdpo" / file).is_file(), file
    for module in modules - {"report.md", "report.html"}:
        assert (ROOT / "vlmdpo" / module.replace(".", "/")).with_suffix(".py").is_file(), module
