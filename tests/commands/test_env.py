"""`vlmdpo env` says how the running package was installed, where, and from which commit."""

import json
import shutil
import subprocess

import pytest

from vlmdpo import __version__
from vlmdpo.commands import env

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in which Python finds installed distributions first."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def installed(site, direct_url=None):
    """Write the metadata that pip writes; `direct_url` is PEP 610's record of the origin."""
    metadata = site / "vlmdpo-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: vlmdpo\nVersion: 9.9\n")
    (metadata / "RECORD").write_text("vlmdpo/__init__.py,,\n")
    if direct_url is not None:
        (metadata / "direct_url.json").write_text(json.dumps(direct_url))


def running_from(folder, monkeypatch):
    """Make the package in `folder` the running one."""
    monkeypatch.setattr(env, "__file__", str(folder / "vlmdpo" / "commands" / "env.py"))


def checkout(folder):
    """A repository with one commit. Returns the commit's name."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    (folder / "vlmdpo").mkdir(parents=True)
    (folder / "vlmdpo" / "__init__.py").write_text("")

    def git(*arguments):
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        command = ["git", "-C", folder, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    return git("rev-parse", "HEAD")


def reported(vlmdpo):
    """(`install` in the JSON, the line in the list)."""
    report = json.loads(vlmdpo("env", "--json")[1])
    assert report["versions"]["vlmdpo"] == __version__  # of the package that runs, not of metadata
    lines = vlmdpo("env")[1].splitlines()
    return report["install"], next(line for line in lines if line.startswith("- installed: "))


@pytest.mark.parametrize(
    ("direct_url", "commit"),
    [
        (None, None),
        ({"url": "file:///elsewhere", "dir_info": {}}, None),
        ({"url": "file:///vlmdpo-9.9-py3-none-any.whl", "archive_info": {}}, None),
        ({"url": "https://x.org/r", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}, COMMIT),
    ],
    ids=["index", "folder", "file", "git"],
)
def test_a_wheel_has_the_commit_that_pip_built_it_from(
    direct_url, commit, site, monkeypatch, vlmdpo
):
    installed(site, direct_url)
    running_from(site, monkeypatch)
    where = str(site / "vlmdpo")
    install, line = reported(vlmdpo)
    assert install == {"how": "wheel", "where": where, "commit": commit, "dirty": None}
    assert line == f"- installed: wheel, {where}, commit {commit or 'unknown'}"


def test_an_editable_install_has_its_checkouts_commit(site, tmp_path, monkeypatch, vlmdpo):
    source = tmp_path / "a folder with spaces and ü"
    head = checkout(source)
    installed(site, {"url": source.as_uri(), "dir_info": {"editable": True}})
    running_from(source, monkeypatch)
    expected = {"how": "editable", "where": str(source), "commit": head, "dirty": False}
    assert reported(vlmdpo) == (expected, f"- installed: editable, {source}, commit {head}")
    (source / "vlmdpo" / "__init__.py").write_text("changed = True\n")
    install, line = reported(vlmdpo)
    assert install == {**expected, "dirty": True}
    assert line.endswith(f"commit {head} (with uncommitted changes)")


def test_a_source_tree_is_not_mistaken_for_another_installation(
    site, tmp_path, monkeypatch, vlmdpo
):
    installed(site)
    source = tmp_path / "source"
    head = checkout(source)
    running_from(source, monkeypatch)
    expected = {"how": "source tree", "where": str(source), "commit": head, "dirty": False}
    assert reported(vlmdpo)[0] == expected
    shutil.rmtree(source / ".git")
    assert reported(vlmdpo)[0] == {**expected, "commit": None, "dirty": None}
    checkout(tmp_path / "other")  # a repository around the tree is another project's
    (tmp_path / "other" / "source").mkdir()
    running_from(tmp_path / "other" / "source", monkeypatch)
    assert reported(vlmdpo)[0]["commit"] is None


def test_without_git_the_commit_is_unknown(site, tmp_path, monkeypatch, vlmdpo):
    source = tmp_path / "source"
    checkout(source)
    running_from(source, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reported(vlmdpo)[0]["commit"] is None
