"""The page as a file: what is in it, that all of it is escaped, that all numbers are beside it."""

from __future__ import annotations

import html
import html.parser
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from toy_results import NASTY, CellsResult, EchoResult, ToyModel, ToyPair, ToyPrompts, cells, echo, echo_fields

from interp import plots
from interp.errors import InputError
from interp.report import write_report
from interp.results import Result, analysis


class Words(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(
        [
            cells(ToyPair(), ToyPrompts(task="ioi", seed=0)),
            echo(ToyModel(), ToyPrompts(), metric=lambda x: x),
            echo(ToyModel(), ToyPrompts()),
        ],
        tmp_path_factory.mktemp("r") / "new" / "a page.html",
        title="A <b>title</b>",
        verdict=["It changed <i>much</i>."],
        warnings=["At chance & more."],
        plan=["activation_patching was left out\ninterp run activation_patching --base='a b'"],
    )


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    text = written.read_text(encoding="utf-8")
    library = max(re.findall(r"<script>(.*?)</script>", text, re.DOTALL), key=len)
    assert len(library) > 10**6
    return text.replace(library, "")


def test_the_order_of_the_page(page: str) -> None:
    places = [
        page.index(s)
        for s in ("<h1>", "It changed", "At chance", "Contents", 'id="result-0"', 'id="result-1"', "was left out", "All numbers")
    ]
    assert places == sorted(places)
    links = [a["href"] for tag, a in Words(page).tags if tag == "a"]
    assert links == ["#result-0", "#result-1", "#result-2", "#left-out", "a%20page.json"]


def test_the_strongest_cells_stand_open_above_the_folded_table(page: str) -> None:
    first, second, _ = page.split('<section class="result"')[1:]
    table = first[first.index("<h3>Strongest</h3>") : first.index("<details>")]
    assert Words(table).text.count("0.25") == 1 and NASTY[0] not in table
    assert "Strongest" not in second


def test_each_result_has_its_parts(page: str) -> None:
    sections = page.split('<section class="result"')[1:]
    assert len(sections) == 3
    for section, figures in zip(sections, (4, 1, 1), strict=True):
        words = Words(section)
        classes = [a.get("class") for _, a in words.tags]
        assert classes.count("plotly-graph-div") == figures and "summary" in classes and "provenance" in classes
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[2:5] == ["Cells", "Echo: toy, ToyPrompts d1", "Echo: toy, ToyPrompts d1"]
    assert "interp run cells --base=models/base --tuned=models/tuned --dtype=float32 --task=ioi" in html.unescape(sections[0])
    assert "does not repeat the result: the setting metric is a function of the user&#39;s" in sections[1]
    assert "the tuned model has 2 more tokens" in sections[0]
    assert "<details><summary>Table (80 rows)</summary>" in sections[0] and "<details><summary>Table" not in sections[1]


def test_everything_is_escaped_and_nothing_is_fetched(page: str) -> None:
    words = Words(page)
    assert {tag for tag, _ in words.tags} <= set(
        re.findall(
            r"\w+",
            "html head meta title style body main h1 h2 h3 p section nav ol ul li a figure figcaption div script span wbr br "
            "details summary pre table thead tbody tr th td code footer",
        )
    )
    assert [a for tag, a in words.tags if tag == "script"].count({}) == 2
    for _, attributes in words.tags:
        assert not {"src", "onerror", "onload", "onclick"} & set(attributes)
    assert "http://" not in page and "https://" not in page
    text = "".join(words.text)
    for token in NASTY[:-1]:
        assert plots.visible(token) in page, token
    assert "A <b>title</b>" in text and "It changed <i>much</i>." in text


def test_the_figures_are_inert_json(page: str) -> None:
    specs = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert len(specs) == 6
    for spec in specs:
        assert "<" not in spec and set(json.loads(spec)) >= {"data", "layout"}
    first = json.loads(specs[0])
    assert len(first["layout"]["xaxis"]["ticktext"]) == len(NASTY) and first["layout"]["xaxis"]["tickvals"] == list(range(len(NASTY)))
    assert first["layout"]["xaxis"]["ticktext"][0] == "&lt;b&gt;bold&lt;/b&gt;"


def test_all_numbers_lie_beside_it(written: Path) -> None:
    data = json.loads(written.with_suffix(".json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["verdict"] == ["It changed <i>much</i>."] and data["warnings"] and data["plan"]
    first, second, _ = data["results"]
    expected = cells(ToyPair(), ToyPrompts()).cells
    assert first["table"]["columns"] == ["row", "row_label", "token", "token_label", "cells"]
    assert torch.equal(torch.tensor([r[-1] for r in first["table"]["rows"]]).view(expected.shape), expected)
    assert first["fields"]["cells"] == {"shape": [4, len(NASTY)]} and first["fields"]["labels"]["token"] == list(NASTY)
    assert second["fields"]["scale"] == 1.0 and second["meta"]["analysis"] == "echo" and len(second["identity"]) == 64
    assert [p.name for p in written.parent.iterdir() if p.name.startswith(".")] == []


def test_numbers_that_are_not_there(tmp_path: Path) -> None:
    @analysis()
    def echo(model: ToyModel) -> EchoResult:
        return EchoResult(**echo_fields(value=torch.full((4, 3, 2), torch.nan)))

    path = write_report([echo(ToyModel())], tmp_path / "r.html")
    assert '<td class="number">–</td>' in path.read_text()
    assert json.loads(path.with_suffix(".json").read_text())["results"][0]["table"]["rows"][0][2] is None


def test_a_page_of_nothing(tmp_path: Path) -> None:
    page = write_report([], tmp_path / "r.html", verdict=["Nothing ran."]).read_text()
    assert "Nothing ran." in page and "<h2>Contents" not in page


def test_long_tables_are_cut_on_the_page_only(tmp_path: Path) -> None:
    path = write_report([cells(ToyPair(), ToyPrompts(), words=tuple("w" * 300))], tmp_path / "r.html")
    text = path.read_text()
    assert text.count("<tr><td") == 200 + 1 and "The first 200 of 1,200 rows; all of them are in r.json." in text
    assert len(json.loads(path.with_suffix(".json").read_text())["results"][0]["table"]["rows"]) == 1200


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    for path in (tmp_path / "file" / "r.html", tmp_path / "folder.html"):
        with pytest.raises(InputError, match=f"cannot write {path.with_suffix('') if path.parent.is_file() else path}"):
            write_report([], path)
    with pytest.raises(InputError, match="needs another ending than .json"):
        write_report([], tmp_path / "r.json")
    with pytest.raises(InputError, match="a EchoResult was built by hand"):
        write_report([EchoResult(**echo_fields())], tmp_path / "r.html")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.html"]


def test_a_stranger_can_put_anything_into_the_notes(tmp_path: Path) -> None:
    result = cells(ToyPair(), ToyPrompts())
    result.meta.notes.update({key: {"<b>": ["<script>window.ran = 9</script>"]} for key in result.meta.notes})
    text = write_report([result], tmp_path / "r.html").read_text()
    assert "<script>window.ran = 9" not in text and "&lt;script&gt;window.ran = 9" in text
    result.meta.notes.clear()
    assert write_report([result], tmp_path / "r.html").exists()


def test_a_foreign_figure_keeps_its_title(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    @dataclass(frozen=True, eq=False)
    class RawResult(Result):
        x: Float[Tensor, " step"]

        def summary(self) -> str:
            return "raw"

        def figures(self) -> dict[str, Any]:
            return {"Raw": go.Figure(go.Bar(y=[1]), layout=dict(title="<img src=x>&amp; so<br>on")), "None": go.Figure()}

    @analysis()
    def raw(model: ToyModel) -> RawResult:
        return RawResult(torch.ones(2))

    text = write_report([raw(ToyModel())], tmp_path / "r.html").read_text()
    assert "<figcaption>&lt;img src=x&gt;&amp; so on</figcaption>" in text


# ---- figures and text


def test_escape_leaves_no_markup() -> None:
    assert plots.escape("<b>&lt;\"'$x$") == "&lt;b&gt;&amp;lt;&#34;&#39;&#36;x&#36;"
    assert plots.escape("a\u202eb\x00\ud800\U000e0001é🙂") == "a\\u202eb\\u0000\\ud800\\U000e0001é🙂"
    assert plots.visible(" a\nb\t") == "·a↵b⇥" and plots.visible("") == "∅" and plots.visible("abcdef", 4) == "abc…"
    assert plots.label("a b\n<", 40) == "a b↵&lt;"
    assert plots.wrap("one two <b> three", 8) == "one two<br>&lt;b&gt;<br>three"


def test_colours_keep_their_meaning() -> None:
    figure = plots.lines({"mine": [1, 2], "tuned": [1, 2], "base": [2, 3]})
    assert [t.line.color for t in figure.data] == [plots.OTHERS[0], plots.TUNED, plots.BASE]
    assert len({t.line.dash for t in figure.data[1:]}) == 2 and len({t.marker.symbol for t in figure.data}) == 3
    assert plots.shade(0, -1, 1, True) == "#ffffff" and plots.shade(-5, -1, 1, True) == plots.DIFFERENCE[0][1].lower()
    assert plots.shade(1, 0, 1, False) == plots.MAGNITUDE[-1][1].lower() and plots.shade(0.1, 0, 1, False) == "#e4f4cc"


def test_a_difference_is_centred_and_the_floor_is_grey() -> None:
    figure = plots.heatmap([[1.0, -3.0, 0.05], [np.nan, 0.0, 2.0]], floor=0.1)
    live, grey = figure.data
    assert (live.zmin, live.zmax) == (-3, 3)
    assert np.array_equal(np.isnan(live.z), [[False, False, True], [True, True, False]])
    assert np.array_equal(np.isnan(grey.z), [[True, True, False], [True, False, True]])
    assert {c[1] for c in grey.colorscale} == {plots.FLOOR} and "0.05 (under the floor)" in grey.customdata[0][2]
    assert "no value" in figure.layout.annotations[0].text
    masked = plots.heatmap(torch.tensor([[1.0, 2.0]]), floor=torch.tensor([[True, False]]))
    assert np.array_equal(np.isnan(masked.data[0].z), [[True, False]])
    assert (masked.data[0].zmin, masked.data[0].zmax) == (0, 2)
    assert len(plots.heatmap([[1, 2]]).data) == 1


def test_equal_labels_are_different_places() -> None:
    figure = plots.heatmap(torch.eye(3), ["a", "a", "a"], ["x", "x", "y"], tokens="x")
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2] == list(figure.layout.yaxis.tickvals)
    assert list(figure.layout.xaxis.ticktext) == ["a", "a", "a"] and figure.data[0].x is None
    assert list(figure.layout.yaxis.range) == [2.5, -0.5]
    bars = plots.bars(["a", "a"], {"base": [1, 2]})
    assert list(bars.data[0].x) == [0, 1]
    assert len(plots.token_axis(["t"] * 400, limit=48)["tickvals"]) == 45


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: plots.heatmap(torch.ones(3)), r"needs values \[row, column\], but they have the shape \[3\]"),
        (lambda: plots.heatmap(torch.ones(2, 3), ["a"]), r"the axis x of a heatmap of \[2, 3\] cells needs 3 labels, but it has 1"),
        (lambda: plots.heatmap(torch.ones(2, 3), floor=np.array([True])), r"must have the shape \[2, 3\] of the values, but it has \[1\]"),
        (lambda: plots.bars(["a"], {"base": [1, 2]}), "the series 'base' has 2 values for 1 labels"),
        (lambda: plots.coloured_tokens(["a"], [1, 2]), r"1 tokens need one value each, but the values have the shape \[2\]"),
    ],
)
def test_shapes_that_do_not_fit(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_bars_under_the_floor_keep_the_legend() -> None:
    figure = plots.bars(["a", "b"], {"base": [0.01, 1.0], "tuned": [1.0, 1.0]}, floor=0.1, intervals={"base": ([0, 0.5], [0.02, 1.5])})
    legend, drawn, tuned = figure.data
    assert legend.marker.color == plots.BASE and legend.showlegend is None and drawn.showlegend is False
    assert drawn.marker.color == (plots.FLOOR, plots.BASE) and drawn.offsetgroup == legend.offsetgroup != tuned.offsetgroup
    assert np.allclose(drawn.error_y.array, [0.01, 0.5]) and np.allclose(drawn.error_y.arrayminus, [0.01, 0.5])
    assert figure.layout.showlegend


def test_bands_stop_where_values_are_missing() -> None:
    low = torch.tensor([0.0, 1.0, torch.nan, 3.0, 4.0])
    figure = plots.lines({"base": low + 1}, bands={"base": (low, low + 2)})
    bands = [t for t in figure.data if t.fill == "toself"]
    assert [list(b.x) for b in bands] == [[0, 1, 1, 0], [3, 4, 4, 3]] and list(bands[0].y) == [2, 3, 1, 0]


def test_coloured_tokens() -> None:
    text = plots.coloured_tokens([" <b>", "\n", "x", "y"], [2.0, -1.0, 0.01, float("nan")], floor=0.1, unit="nats")
    words = Words(text)
    spans = [a for tag, a in words.tags if tag == "span" and "title" in a]
    assert [a["title"] for a in spans] == ["0: ·<b>\n2 nats", "1: ↵\n-1 nats", "2: x\n0.01 nats (under the floor)", "3: y"]
    assert plots.DIFFERENCE[-1][1].lower() in str(spans[0]["style"]) and plots.FLOOR in str(spans[2]["style"])
    assert "background" not in str(spans[3]["style"])
    assert text.count("<br>") == 1 and "<b>" not in text.replace('title="0: ·<b>', "")
    assert isinstance(cells(ToyPair(), ToyPrompts()), CellsResult)


def test_labels_of_bars_are_whole_and_whole_numbers_have_whole_ticks() -> None:
    roles = ["circuit (11)", "position_detector (3)", "position_transmitter (2)", "value_fetcher (6)"]
    standing: Any = plots.bars(roles, {"heads": [1, 2, 3, 4]}, horizontal=False)
    assert list(standing.layout.xaxis.ticktext) == roles and standing.layout.xaxis.tickangle == 90
    assert standing.layout.height > plots.bars(["a"], {"heads": [1]}).layout.height
    rows = [f"position_transmitter position, of {a} in {b}" for a in ("base", "boxes-tuned") for b in ("base", "boxes-tuned")]
    lying: Any = plots.bars(rows, {"ours": [1, 2, 3, 4]}, horizontal=True)
    assert [text.replace("<br>", " ") for text in lying.layout.yaxis.ticktext] == rows and len(set(lying.layout.yaxis.ticktext)) == 4
    assert plots.lines({"a": [1, 2, 3, 4]}).layout.xaxis.dtick == 1
    assert plots.lines({"a": [1, 2]}, [0.5, 1.0]).layout.xaxis.dtick is None
    assert plots.lines({"a": list(range(90))}).layout.xaxis.dtick is None
