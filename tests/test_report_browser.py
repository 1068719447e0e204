"""The page in a real browser: everything is drawn, text stays text, nothing is fetched, it fits a phone."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_results import NASTY, ToyPair, ToyPrompts, cells

from interp import plots
from interp.report import write_report

BINARY = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
]
PLOTS = "[...document.querySelectorAll('.plotly-graph-div')]"


class Page:
    """A tab of a headless browser, spoken to through the DevTools protocol."""

    def __init__(self, address: str) -> None:
        import websocket

        self._socket = websocket.create_connection(address, timeout=60)
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self.here = ""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self._socket.recv())).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def ask(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        end = time.monotonic() + 60
        while not (value := self.ask(script)):
            assert time.monotonic() < end, f"{script} stayed {value!r}; the browser says {self.complaints()}"
            time.sleep(0.05)
        return value

    def open(self, path: Path, width: int = 1400) -> None:
        """Show a page at a width; a page that is already open is only resized, as when a window is dragged."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        if path.as_uri() != self.here:
            self.here = path.as_uri()
            self.call("Page.navigate", url=self.here)
            self.wait("document.documentElement?.dataset.drawn !== undefined && document.readyState === 'complete'")
        self.wait(f"innerWidth == {width} && {PLOTS}.every(d => Math.abs(d.querySelector('svg.main-svg').clientWidth - d.clientWidth) < 2)")

    def shot(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=self.area())["data"]
        path.write_bytes(base64.b64decode(picture))

    def area(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def complaints(self) -> list[str]:
        self.ask("1")  # events come with answers
        kinds = {"Runtime.exceptionThrown", "Log.entryAdded"}
        found = [json.dumps(e["params"])[:400] for e in self.events if e["method"] in kinds]
        calls = [e["params"] for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        return found + [json.dumps(c["args"])[:400] for c in calls if c["type"] in ("error", "warning", "assert")]

    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if BINARY is None:
        message = "no chromium, chromium-browser or google-chrome is installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    home = tmp_path_factory.mktemp("browser")
    process = subprocess.Popen([BINARY, *FLAGS, f"--user-data-dir={home}", "about:blank"], stderr=subprocess.DEVNULL)
    page = None
    try:
        page = Page(_address(home, process))
        yield page
    finally:
        if page is not None:
            page.close()
        process.terminate()
        process.wait(20)


def _address(home: Path, process: subprocess.Popen[bytes]) -> str:
    import urllib.request

    port, end = home / "DevToolsActivePort", time.monotonic() + 60
    while not (port.exists() and len(port.read_text().split()) == 2):
        assert process.poll() is None and time.monotonic() < end, "the browser did not start"
        time.sleep(0.05)
    with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list", timeout=10) as tabs:
        return next(tab["webSocketDebuggerUrl"] for tab in json.load(tabs) if tab["type"] == "page")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = [cells(ToyPair(), ToyPrompts("d1", task="boxes(n_boxes=3)", seed=0)), cells(ToyPair(), ToyPrompts("d2"), words=("x", "y"))]
    return write_report(
        results,
        tmp_path_factory.mktemp("report") / "report.html",
        title="What changed <b>here</b>",
        verdict=[
            "Most of the change sits in the MLPs of layers 2 to 4 (<i>61 %</i> ± 3 of the squared norm).",
            "The tuned model knows boxes.",
        ],
        warnings=["Both models are at chance in <script>window.ran = 5</script> ioi."],
        plan=["activation_patching on ioi would take 12 minutes\ninterp run activation_patching --base=a --tuned=b --task=ioi"],
    )


@pytest.fixture
def page(browser: Page, report: Path) -> Page:
    browser.open(report)
    return browser


def test_nothing_is_fetched_and_nobody_complains(page: Page, report: Path) -> None:
    assert page.complaints() == []
    assert {url.split(":")[0] for url in page.requests()} <= {"file", "data", "blob", "about"}
    assert [url for url in page.requests() if url.startswith("file:")] == [report.as_uri()]


def test_the_check_of_complaints_sees_one(browser: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<html data-drawn="0"><img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>')
    before = len(browser.events)
    browser.open(bad)
    browser.wait("document.images[0].complete")
    assert browser.complaints()
    assert any(url.startswith("http:") for url in browser.requests())
    del browser.events[before:]


def test_every_figure_is_drawn(page: Page) -> None:
    counts = page.ask(f"{PLOTS}.map(d => d.querySelectorAll('svg.main-svg').length)")
    assert len(counts) == 8 and min(counts) >= 1
    sizes = page.ask(f"{PLOTS}.map(d => d.querySelector('svg.main-svg').clientWidth)")
    assert min(sizes) > 900
    assert page.ask("document.querySelectorAll('.bars .point path').length") == 16
    assert page.ask("document.querySelectorAll('.scatterlayer .points path').length") > 3 * len(NASTY)


def test_no_cell_is_lost_and_every_token_is_shown_as_it_is(page: Page) -> None:
    first = "document.querySelector('.plotly-graph-div')"
    grids = page.ask(f"{first}.calcdata.map(c => [c[0].z.length, c[0].z[0].length])")
    assert grids == [[4, len(NASTY)], [4, len(NASTY)]]
    shown = page.ask(f"{first}.calcdata.map(c => c[0].z.flat().filter(v => v !== undefined && !isNaN(v)).length)")
    assert sum(shown) == 4 * len(NASTY) and min(shown) > 0
    ticks = page.ask(f"[...{first}.querySelectorAll('.xtick text')].map(t => t.textContent)")
    expected = [_unescaped(plots.visible(t, 14)) for t in NASTY]
    assert ticks == expected
    rows = page.ask(f"[...{first}.querySelectorAll('.ytick text')].map(t => t.textContent)")
    assert rows == ["layer 0", "<b>layer 1</b>", "layer 0", "MLP & more"]
    assert page.ask("document.querySelector('figcaption').textContent") == "Title with <script>window.ran = 4</script>"
    spans = page.ask(f"[...document.querySelectorAll('.tokens span[title]')].slice(0, {len(NASTY)}).map(s => s.textContent)")
    assert spans == [_unescaped(plots.visible(t)) for t in NASTY]
    assert page.ask("document.querySelector('h1').textContent") == "What changed <b>here</b>"


def _unescaped(text: str) -> str:
    import html

    return html.unescape(text)


def test_no_text_became_a_script_or_an_element(page: Page) -> None:
    assert page.ask("typeof window.ran") == "undefined"
    assert page.ask("document.querySelectorAll('script:not([type])').length") == 2
    assert page.ask("document.querySelectorAll('main img, main b, main i').length") == 0


def test_hovering_shows_the_token(page: Page) -> None:
    values = cells(ToyPair(), ToyPrompts()).cells[1]
    for token in (0, 7, 10):
        under = abs(float(values[token])) < 0.2  # those cells are in the second, grey layer
        spot = json.dumps([{"xval": token, "yval": 1, "curveNumber": int(under)}])
        page.ask(f"Plotly.Fx.hover(document.querySelector('.plotly-graph-div'), {spot})")
        text = f"row 1: <b>layer 1</b>token {token}: {NASTY[token].replace(' ', '·')}value: {float(values[token]):.4g}"
        said = "[...document.querySelectorAll('.hoverlayer text')].map(t => t.textContent).join(' ').replace('−', '-')"
        page.wait(f"{said}.includes({json.dumps(text + (' (under the floor)' if under else ''))})")
    assert page.ask("typeof window.ran") == "undefined"


@pytest.mark.parametrize("width", [1400, 700, 360])
def test_it_fits(browser: Page, report: Path, tmp_path_factory: pytest.TempPathFactory, width: int) -> None:
    browser.open(report, width)
    browser.shot(tmp_path_factory.getbasetemp() / f"report-{width}.png")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    sizes = browser.ask(f"{PLOTS}.map(d => d.querySelector('svg.main-svg').clientWidth)")
    assert max(sizes) <= max(width, 560)  # narrower than that a figure scrolls inside its box
    browser.ask("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert browser.ask("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1400, 700])
def test_no_tick_text_lies_on_another(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width)
    overlaps = browser.ask(
        """[...document.querySelectorAll('.plotly-graph-div')].flatMap(d => ['.xtick text', '.ytick text'].map(kind => {
          const boxes = [...d.querySelectorAll(kind)].map(t => t.getBoundingClientRect());
          const turned = [...d.querySelectorAll(kind)].some(t => /rotate\\((?!0)/.test(t.getAttribute('transform') || ''));
          const along = kind == '.ytick text' ? 'top' : 'left';
          if (turned) return boxes.slice(1).filter((b, i) => Math.abs(b[along] - boxes[i][along]) < 9).length;
          return boxes.slice(1).filter((b, i) => !(b.left >= boxes[i].right - 1 || b.right <= boxes[i].left + 1
            || b.top >= boxes[i].bottom - 3 || b.bottom <= boxes[i].top + 3)).length;
        }))"""
    )
    assert sum(overlaps) == 0, overlaps


def test_hundreds_of_prompts(browser: Page, tmp_path: Path) -> None:
    words = tuple(f" word{i}" for i in range(400))
    result = cells(ToyPair(), ToyPrompts("d3"), words=words)
    assert result.cells.shape == (4, 400)
    path = write_report([result], tmp_path / "long.html")
    browser.open(path, 700)
    ticks = browser.ask("document.querySelector('.plotly-graph-div').querySelectorAll('.xtick text').length")
    assert 20 <= ticks <= 48
    shown = browser.ask(
        "document.querySelector('.plotly-graph-div').calcdata.flatMap(c => c[0].z.flat()).filter(v => v !== undefined).length"
    )
    assert shown == torch.tensor(result.cells.shape).prod()
    assert browser.ask("document.documentElement.scrollWidth") <= 700


def test_printing_fits_the_sheet_and_goes_back(page: Page) -> None:
    widths = f"{PLOTS}.map(d => d.querySelector('svg.main-svg').clientWidth)"
    before = page.ask(widths)
    page.ask("dispatchEvent(new Event('beforeprint'))")
    assert set(page.ask(widths)) == {680}
    page.ask("dispatchEvent(new Event('afterprint'))")
    page.wait(f"JSON.stringify({widths}) == '{json.dumps(before, separators=(',', ':'))}'")
    assert len(page.call("Page.printToPDF")["data"]) > 50_000
    assert page.complaints() == []
