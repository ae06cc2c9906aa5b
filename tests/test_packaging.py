"""Wheel and sdist contain every file and build alike; install commands in messages work."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import vlmdpo as package
from vlmdpo.errors import install_command

pytestmark = pytest.mark.slow

ROOT = Path(package.__file__).parent.parent
_NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs")


def _tracked():
    """Files of the tree as git lists them, or None outside a checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if listed.returncode:  # git refuses a checkout that belongs to another user
        return None
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _copy_of_the_tree(folder):
    """A copy to build in, without build artifacts, since other tests use the tree meanwhile."""
    tracked = _tracked()
    if tracked is None:
        shutil.copytree(ROOT, folder, ignore=_NOT_SOURCE)
        shutil.copy(ROOT / ".mkdocs.yml", folder)
    else:
        for name in tracked:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def _build(source, output, *what):
    """Build offline, with the installed setuptools."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, *what, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Package would be ignored" not in done.stdout + done.stderr


def _members(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(files of the package, of the sdist, of the sdist's wheel, of the tree's wheel)."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = _copy_of_the_tree(folder / "tree")
    files = {
        path.relative_to(tree).as_posix() for path in (tree / "vlmdpo").rglob("*") if path.is_file()
    }
    leftover = (
        tree / "vlmdpo" / "tiny" / "__pycache__" / "scenes.cpython-311.pyc"
    )  # what running from the tree leaves
    leftover.parent.mkdir()
    leftover.write_bytes(b"")
    _build(tree, folder / "dist")
    _build(tree, folder / "direct", "--wheel")
    with tarfile.open(*(folder / "dist").glob("*.tar.gz")) as opened:
        sdist = {member.name.split("/", 1)[1] for member in opened.getmembers() if member.isfile()}
    (from_sdist,), (from_tree,) = (folder / "dist").glob("*.whl"), (folder / "direct").glob("*.whl")
    return files, sdist, _members(from_sdist), _members(from_tree)


def test_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    files, _, _, wheel = built
    assert "vlmdpo/py.typed" in files
    assert {name for name in wheel if ".dist-info/" not in name} == files
    assert all(wheel[name] == (ROOT / name).read_bytes() for name in files)


def test_sdist_holds_every_file_of_the_package(built):
    files, sdist, _, _ = built
    assert files <= sdist
    assert {"README.md", "LICENSE", "pyproject.toml"} <= sdist
    assert "vlmdpo/benchmarks/chair/LICENSE.txt" in sdist
    assert not [name for name in sdist if "__pycache__" in name]


def test_wheel_holds_the_licence_of_chairs_words_among_its_own(built):
    _, _, _, wheel = built
    licences = {name.split("/licenses/")[1] for name in wheel if "/licenses/" in name}
    assert licences == {"LICENSE", "vlmdpo/benchmarks/chair/LICENSE.txt"}


def test_the_citation_and_the_changelog_name_this_version():
    version = package.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_sdist_and_tree_build_the_same_wheel(built):
    _, _, from_sdist, from_tree = built
    assert from_sdist == from_tree


def _metadata(monkeypatch, lines):
    def requires(name):
        if lines is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return lines

    monkeypatch.setattr(importlib.metadata, "requires", requires)


def test_install_command_names_an_extras_own_requirements(monkeypatch):
    lines = [
        "torch>=2.6",
        "gradio>=6.0; extra == 'web'",
        'nltk[all]>=3.9; extra == "amber"',
        "spacy; extra == 'amber'",
    ]
    _metadata(monkeypatch, lines)
    assert install_command(extra="web") == "pip install 'gradio>=6.0'"
    assert install_command(extra="amber") == "pip install 'nltk[all]>=3.9' spacy"
    assert (
        install_command("flash-attn", "--no-build-isolation")
        == "pip install flash-attn --no-build-isolation"
    )


@pytest.mark.parametrize(
    "lines", [None, ["torch>=2.6"]], ids=["not installed", "of a version without the extra"]
)
def test_install_command_without_metadata_names_the_source_tree(lines, monkeypatch):
    _metadata(monkeypatch, lines)
    assert install_command(extra="web") in (
        f"pip install '{ROOT}[web]'",
        f"pip install {ROOT}[web]",
    )


def test_extras_of_the_installed_package_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for extra in ("amber", "deepspeed", "qlora", "vllm", "web"):
        assert all(requirement in install_command(extra=extra) for requirement in extras[extra])


def test_nothing_tells_users_to_install_vlmdpo_from_an_index():
    told = [
        *(ROOT / "vlmdpo").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.*"),
    ]
    told = [
        path
        for path in [*told, ROOT / "README.md"]
        if path.suffix in (".py", ".md", ".yaml", ".sbatch")
    ]
    assert len(told) > 100
    for path in told:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install (-\S+ )*['\"]?vlmdpo\b", text), path
