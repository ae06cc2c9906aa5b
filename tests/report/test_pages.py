"""What pages show: curves told apart, long answers, settings that differ, histograms."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlmdpo.config import TrainConfig
from vlmdpo.report import html, prepare_page, run_page
from vlmdpo.report.amber_page import as_cell

LONG = "many words " * 60
ARABIC = "ما هذا؟"


def _page(**settings):
    lines = [
        {"step": n, "loss": 0.69 - 0.0009 * n, "rewards/accuracies": 0.5, "rewards/margins": 0.1}
        for n in range(1, 30)
    ]
    samples = [
        {
            **{"row": 3, "step": step, "question": ARABIC, "answer": LONG if step else "short"},
            **{"chosen": LONG, "rejected": "<b>"},
        }
        for step in (0, 1000)
    ]
    return run_page.page(
        title="t",
        steps=(29, 29),
        lines=lines,
        evaluations=lines[9::10],
        samples=samples,
        pictures={},
        settings=settings,
        findings=[],
    )


def test_long_answers_fade_and_every_text_has_its_own_direction():
    page = _page()
    assert len(re.findall(r'<details class="long"><summary dir="auto">many words', page)) == 2
    assert '<span dir="auto">short</span>' in page
    assert f'<div dir="auto"><b>{ARABIC}' in page
    assert "&lt;b&gt;" in page


def test_what_differs_from_the_defaults_comes_first():
    found = html.by_difference(
        {"lora_r": 32, "seed": 42, "set": ["a=b"], "resume": False, "split": "train", "extra": 1},
        TrainConfig,
    )
    assert found.changed == [("lora_r", 32, 16), ("set", ["a=b"], "none")]
    assert found.usual == [("seed", 42), ("resume", False), ("split", "train"), ("extra", 1)]
    page = _page(lora_r=32, seed=42)
    assert page.index("What differs from the defaults") < page.index("1 settings with their")


def test_outliers_do_not_crush_a_histogram():
    values = np.array([*range(80, 180), 9_000])
    assert prepare_page._top(values) < 200
    assert prepare_page._top(np.arange(100)) == 99, "without outliers it ends at the largest"
    sizes = prepare_page._sizes({300: 50, 310: 400, 340: 200, 400: 900, 5000: 1})
    assert len(sizes) == 3
    assert sizes[-1]["label"].endswith("-5000")
    assert sum(one["count"] for one in sizes) == 1551
    assert prepare_page._sizes({72: 5}) == [{"label": "72", "count": 5, "share": 100.0}]


def test_a_table_cell_is_escaped_once():
    assert as_cell("<a> & [b] | `c`\n") == "&#60;a&#62; &#38; \\[b\\] \\| \\`c\\`"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1100, 390])
def test_charts_in_a_browser(width, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium")
    Path("run.html").write_text(_page(), encoding="utf-8")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": width, "height": 900})
        view.goto((tmp_path / "run.html").as_uri())
        labels = view.evaluate(
            "[...document.querySelectorAll('.chart svg')].map(chart => "
            "[...chart.querySelectorAll('text[text-anchor=end]')].filter(t => +t.textContent || "
            "t.textContent === '0').length)"
        )
        assert min(labels) >= 3, "more than one label on every y axis"
        styles = view.evaluate(
            "[...document.querySelectorAll('.chart:first-child .swatch')].map("
            "one => getComputedStyle(one).borderTopStyle)"
        )
        assert styles == ["solid", "dotted"]
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        button = view.locator(".legend button").first
        assert button.get_attribute("title") == "hide this curve"
        button.click()
        assert view.locator(".legend button").first.get_attribute("aria-pressed") == "false"
        heights = view.evaluate(
            "[...document.querySelectorAll('.sample th:first-child')].map(t => t.scrollHeight)"
        )
        assert max(heights) < 45, "'Step' stays on one line"
        long = view.locator("details.long").first
        before = long.bounding_box()["height"]
        long.locator("summary").click()
        assert long.bounding_box()["height"] > before
        browser.close()
