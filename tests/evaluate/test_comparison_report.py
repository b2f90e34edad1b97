"""The page of a comparison: what a parser finds in it, and, where Chromium is there, what a reader sees."""

import base64
import functools
import importlib.util
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from seerattention.evaluate.comparison import Comparison
from seerattention.evaluate.comparison_report import build_comparison_report, curves
from seerattention.evaluate.comparison_tables import costs_table, summary_table
from seerattention.evaluate.map_viewer import map_viewer

from .comparison_folder import BLOCKS, DENSITIES, LENGTHS, METHODS, MODEL, write_folder

HISTORY = {
    "loss": [1.0, 0.5], "loss_per_layer": {"layers.0": [1.0, 0.5]}, "recall": {"layers.0": [0.1, 0.6]},
    "recall_steps": [0, 2], "recall_density": 0.1,
}  # fmt: skip
COSTS = [
    {
        "selector": "gates",
        "length": 8192,
        "median_s": 1e-4,
        "density": 0.1,
        "implementation": "Triton",
        "decides": "rows",
    }
]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison.read(write_folder(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    report = build_comparison_report(comparison, histories={"gates": HISTORY}, costs=COSTS, figures=folder / "figures")
    return report.save(folder / "index.html")


class Page(HTMLParser):
    """Tags with their attributes, headings, tables, and whether what is opened is closed."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page.read_text())


def test_the_page_is_whole_and_loads_nothing(parsed, page):
    headings = [text for tag, text in parsed.texts if tag == "h2"]
    assert headings == [
        "How it was compared", "At 2K tokens", "At 4K tokens", "Density of layers and heads",
        "True map, scores, selected blocks", "Learning curves", "Costs of selection", "Where the numbers come from",
    ]  # fmt: skip
    for _, attributes in parsed.tags:
        for name in ("src", "href", "data", "action", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", page.read_text())
    assert all(image["alt"] for image in parsed.all("img"))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags
    assert not parsed.all("b")  # names are text, whatever is in them
    assert any(MODEL in text for tag, text in parsed.texts if tag == "h1")


def test_tables_say_what_was_found(parsed, comparison):
    names = ["dense", *(f"{name}, {rule} rule {d:g}" for name, (rule, *_) in METHODS.items() for d in DENSITIES)]
    rows = [row for row in parsed.rows if row[0] in names]
    assert len(rows) == 2 * len(LENGTHS) * len(names)
    by_name = {row[0]: row for row in rows if len(row) == 11}
    assert by_name["dense"][1:4] == ["1.00", "100 %", ""]
    assert by_name["gates, own rule 0.1"][1:3] == ["0.10", "90 %"]
    assert by_name["<xattention>, project rule 0.3"][2] == "50 %"
    assert re.fullmatch(r"-50\.0 \[-70\.\d, -30\.\d\]", by_name["<xattention>, project rule 0.3"][3])
    assert by_name["oracle, own rule 0.3"][3] == "+0.0 [+0.0, +0.0]"
    assert by_name["gates, own rule 0.1"][6] == "+1.0 % [+1.0, +1.0]"
    assert by_name["gates, own rule 0.1"][7:] == ["100.0 ms", "2.00x", "1.00 GiB", "row by row"]
    caption = summary_table(comparison, LENGTHS[0]).caption
    assert "out of reach for: oracle, own rule 0.1; oracle, own rule 0.3" in caption
    assert "smaller floors than the rule's defaults, to reach the density: <xattention>" in caption
    assert costs_table(COSTS).rows == [["gates", "8K", "0.1 ms", "0.10", "Triton", "rows"]]


def test_oracles_win_no_headline(comparison):
    best = comparison.winners(LENGTHS[0])
    assert {target: entry.contender["label"] for target, entry in best.items()} == dict.fromkeys(DENSITIES, "gates")


def test_curves_are_kept_as_pictures(page, comparison):
    names = {path.name for path in (page.parent / "figures").iterdir()}
    kinds = ("score-density", "perplexity-density", "score-prefill", "perplexity-prefill")
    assert names >= {f"{kind}-{rule}-{n}.png" for kind in kinds for rule in ("own", "project") for n in LENGTHS}
    assert "learning-gates.png" in names
    assert sum(name.startswith("heads-") for name in names) == len(METHODS)
    figure = {name: figure for name, figure, _ in curves(comparison, LENGTHS[0])}["score-density-own"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["dense"].get_ydata()[0] == 100
    containers = {c.get_label(): c.lines[0].get_xydata().tolist() for c in figure.axes[0].containers}
    np.testing.assert_allclose(containers["gates"], [[0.1, 90.0], [0.3, 90.0]], rtol=1e-6)


def test_maps_hold_the_true_shares(comparison):
    entry = next(e for e in comparison.at(LENGTHS[0]) if e.maps is not None and e.maps.prediction is not None)
    parsed = Page(map_viewer([entry.maps]))
    data = json.loads(next(text for tag, text in parsed.texts if tag == "script"))
    (shown,) = data
    assert (shown["layers"], shown["heads"], shown["blocks"]) == ([0, 3], [0, 1, 2], BLOCKS)
    target, _, selected = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))).convert("RGB"))
        for p in shown["pictures"]
    )
    assert target.shape == (2 * BLOCKS, 3 * BLOCKS, 3)
    maps, palette = entry.maps, (255 * colormaps["viridis"](np.linspace(0, 1, 254))[:, :3]).round()
    for layer, head, row, column in ((0, 0, 5, 3), (1, 2, 20, 20), (1, 0, 23, 0)):
        pixel = layer * BLOCKS + row, head * BLOCKS + column
        expected = palette[round(int(maps.target[layer, head, row, column]) * 253 / 255)]
        assert np.abs(target[pixel] - expected).max() <= 1
        kept = maps.selected[layer, head, row, column]
        assert np.array_equal(selected[pixel], target[pixel] if kept else [226, 229, 233])
    assert target[0, 5].tolist() == [255, 255, 255]  # the future
    with pytest.raises(ValueError, match="no maps"):
        map_viewer([])


# ---- in a browser ------------------------------------------------------------------------------------------------


@functools.cache
def browser_or_reason():
    """What starts Chromium, or why it cannot be started here."""
    if importlib.util.find_spec("playwright") is None:
        return None, "playwright is not installed: pip install playwright && playwright install chromium"
    from playwright.sync_api import Error, sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        with sync_playwright() as started:
            started.chromium.launch(executable_path=found, args=["--no-sandbox"]).close()
    except Error as error:
        return None, f"Chromium does not start: {str(error).splitlines()[0]}"
    return found or "playwright's own", ""


@pytest.fixture
def browser():
    found, reason = browser_or_reason()
    if found is None:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    path = None if found == "playwright's own" else found
    with sync_playwright() as started:
        made = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_a_reader_sees_it(browser, page, width):
    errors, asked = [], []
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.querySelector('#maps').dataset.shown === '0,0,0'")
    assert errors == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    # Nothing is wider than the screen but what scrolls by itself, and no text is smaller than can be read.
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 150)")
    sizes = tab.evaluate(
        "[...document.querySelectorAll('p, td, th, figcaption, label, dd')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    assert tab.evaluate(
        "[...document.querySelectorAll('canvas')].every(c => c.clientWidth >= 140 && c.clientWidth <= innerWidth)"
    )


def test_the_sliders_choose_maps(browser, page, comparison):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(page.as_uri())
    shown = "document.querySelector('#maps').dataset.shown"
    pixels = (
        "[...document.querySelectorAll('#maps canvas')]"
        ".map(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
    )
    tab.wait_for_function(f"{shown} === '0,0,0'")
    first = tab.evaluate(pixels)
    assert len(first[0]) == 4 * BLOCKS**2
    tab.get_by_label("layer", exact=True).fill("1")
    tab.wait_for_function(f"{shown} === '0,1,0'")
    second = tab.evaluate(pixels)
    assert first[0] != second[0]
    assert tab.locator("[data-layer]").inner_text() == "layer 3"
    tab.get_by_label("head", exact=True).press("ArrowRight")
    tab.wait_for_function(f"{shown} === '0,1,1'")
    assert tab.evaluate(pixels)[0] != second[0]
    assert tab.locator("[data-head]").inner_text() == "head 1"
    settings = tab.locator("#maps option").all_inner_texts()
    oracle = next(i for i, name in enumerate(settings) if name.startswith("oracle"))
    tab.get_by_label("setting", exact=True).select_option(str(oracle))
    tab.wait_for_function(f"{shown} === '{oracle},1,1'")
    scores = tab.evaluate(pixels)[1]
    assert not any(scores)  # it has none: the picture is empty
    # What is drawn is what was measured.
    maps = next(e.maps for e in comparison.at(LENGTHS[0]) if e.name == settings[oracle])
    drawn = np.array(tab.evaluate(pixels)[2]).reshape(BLOCKS, BLOCKS, 4)[..., :3]
    skipped = (drawn == [226, 229, 233]).all(-1)
    past = np.tril(np.ones((BLOCKS, BLOCKS), bool))
    assert np.array_equal(skipped, ~maps.selected[1, 1] & past)
