"""Several checkpoints beside each other, and the page in parts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pairs import save_pair
from toy_results import EchoResult, ToyModel, ToyPrompts, echo

import interp
from interp.analyses import ANALYSES, GROUPS
from interp.columns import side_by_side
from interp.compare import PLAN
from interp.errors import InputError
from interp.report import write_report
from interp.request import GROUP_WORDS, Request
from interp.stats import Estimate, single, within
from interp.verdict import cautions


def told(tuned: str, numbers: dict[str, Any], *, fingerprint: str = "", base: str = "f0", task: str = "", analysis: str = "echo") -> Any:
    """Something with main numbers of a base and a tuned model."""
    models = [{"name": "start", "fingerprint": base}, {"name": tuned, "fingerprint": fingerprint or tuned}]
    meta = SimpleNamespace(models=models, inputs=[{"task": task}] if task else [], analysis=analysis)
    return SimpleNamespace(meta=meta, main_numbers=lambda: numbers)


def accuracy(base: float, tuned: float) -> dict[str, dict[str, Estimate]]:
    return {"accuracy on x": {"base": single(base, base - 0.1, base + 0.1), "tuned": single(tuned)}}


def test_a_column_for_each_checkpoint_in_the_order_given() -> None:
    found = side_by_side([told("b", accuracy(0.5, 0.75)), told("a", accuracy(0.5, 0.875)), told("c", {})])
    assert found is not None and found.names == ("start", "b", "a", "c")
    frame = found.to_frame()
    assert frame.columns.tolist() == ["what", "start", "b", "a", "c"]
    assert frame.iloc[0].tolist() == ["accuracy on x", "0.5 [0.4, 0.6]", "0.75", "0.875", ""]
    records = {r["checkpoint"]: r for r in found.records()}
    assert records["a"] == {"analysis": "echo", "what": "accuracy on x", "checkpoint": "a", "value": 0.875, "low": None, "high": None}
    (figure,) = found.figures().values()
    assert [t.y.tolist() for t in figure.data if t.name][0][:3] == [0.5, 0.75, 0.875] and list(figure.layout.xaxis.ticktext) == list(
        found.names
    )


def test_a_change_has_no_column_of_base_in_its_curve() -> None:
    change = {"KL, nats": {"tuned": single(0.25)}}
    found = side_by_side([told("b", change), told("a", change)])
    assert found is not None and found.to_frame()["start"].tolist() == [""]
    (figure,) = found.figures().values()
    assert list(figure.layout.xaxis.ticktext) == ["b", "a"]


def test_numbers_of_two_tasks_are_two_rows() -> None:
    share = {"share": {"tuned": single(0.5)}}
    found = side_by_side([told(name, share, task=task) for name in ("b", "a") for task in ("ioi", "boxes")])
    assert found is not None and [line.name for line in found.lines] == ["share on ioi", "share on boxes"]
    assert len(found.figures()) == 1, "one kind of number, one figure"
    lone = side_by_side([told("b", share, task="ioi"), told("a", share, task="boxes")])
    assert lone is not None and lone.lines == (), "each was measured of one checkpoint only"


def test_what_has_no_estimate_leaves_its_cell_empty() -> None:
    nothing = Estimate(*(torch.tensor(math.nan),) * 3, refused="too close")
    found = side_by_side([told("b", {"share": {"tuned": nothing}}), *(told(n, {"share": {"tuned": single(1.0)}}) for n in "ac")])
    assert found is not None and found.to_frame().iloc[0].tolist() == ["share", "", "", "1", "1"]


def test_nothing_beside_each_other() -> None:
    assert side_by_side([]) is None and side_by_side([told("b", accuracy(0.0, 1.0))]) is None
    assert side_by_side([told("b", accuracy(0.0, 1.0)), told("a", accuracy(0.0, 1.0), base="other")]) is None


def test_equal_names_stay_two_columns() -> None:
    found = side_by_side([told("b", accuracy(0.0, 0.25), fingerprint="1"), told("b", accuracy(0.0, 0.75), fingerprint="2")])
    assert found is not None and found.names == ("start", "b", "b (2)") and found.to_frame().iloc[0].tolist()[-2:] == ["0.25", "0.75"]


def test_intervals_of_one_number() -> None:
    assert (
        str(within(1.0, 0.25)) == "1 [0.5, 1.5]" and math.isnan(float(within(1.0, None).low)) and str(single(2.0, 1.0, 3.0)) == "2 [1, 3]"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_columns_are_the_numbers_of_the_results(folder, tmp_path) -> None:
    base, tuned = map(str, folder)
    names = ("weight_delta", "token_divergence", "task_accuracy")
    results: Any = interp.compare(base, [tuned, base], only=names, tasks="ioi", effort="quick", out=tmp_path)
    found = side_by_side(results)
    assert found is not None and found.checkpoints == ("tuned", "base (2)")
    values = {(r["what"], r["checkpoint"]): r["value"] for r in found.records()}
    delta, divergence, accuracies = (next(r for r in results if r.meta.analysis == n) for n in names)
    assert values["weight change, share of the norm", "tuned"] == delta.total > 0
    assert values["weight change, share of the norm", "base (2)"] == 0
    assert values["KL(tuned || base), nats per token on plain_text", "tuned"] == pytest.approx(float(divergence.kl.nanmean()), rel=1e-6)
    assert values["KL(tuned || base), nats per token on plain_text", "base (2)"] == 0
    assert values["accuracy on ioi", "base"] == float(accuracies.accuracy[0]) == values["accuracy on ioi", "base (2)"]
    assert values["accuracy on ioi", "tuned"] == float(accuracies.accuracy[1])
    page, numbers = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert numbers["columns"] == found.records() and "Side by side" in page
    order = [r["analysis"] for r in numbers["results"]]
    assert order == sorted(order, key=ANALYSES.index), "the same analysis of all checkpoints stands together"


# ---- parts of the page


def results_of(*names: str) -> list[EchoResult]:
    return [echo(ToyModel(name=name, fingerprint=name), ToyPrompts()) for name in names]


def test_parts_put_results_in_order_under_headings(tmp_path) -> None:
    given = results_of("one", "two")
    write_report(given, tmp_path / "r.html", parts={"<First>": ("nothing",), "Second & last": ("echo",)})
    page = (tmp_path / "r.html").read_text()
    assert page.count('<h2 class="part">') == 1 and '<h2 class="part">Second &amp; last</h2>' in page and "&lt;First" not in page
    assert "<h3>Second &amp; last</h3>" in page.partition("</nav>")[0]
    assert [r["meta"]["models"][0]["name"] for r in json.loads((tmp_path / "r.json").read_text())["results"]] == ["one", "two"]
    write_report(given, tmp_path / "r.html")
    assert 'class="part"' not in (tmp_path / "r.html").read_text()


def test_names_of_checkpoints_are_escaped(tmp_path) -> None:
    evil = "<script>alert(1)</script>"
    columns = side_by_side([told(f"{evil}{i}", accuracy(0.0, 0.5)) for i in range(2)])
    write_report(results_of("one"), tmp_path / "r.html", columns=columns)
    page = (tmp_path / "r.html").read_text()
    assert evil not in page and page.count("&lt;script&gt;alert") >= 4


def test_every_analysis_has_one_place() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert len(set(listed)) == len(listed) and tuple(listed) == ANALYSES
    files = {p.stem for p in (Path(interp.__file__).parent / "analyses").glob("*.py")} - {"__init__"}
    assert set(listed) == files
    assert {row.analysis for row in PLAN} <= set(listed)


def test_a_group_can_be_asked_for() -> None:
    plan = tuple(row.analysis for row in PLAN)
    for written in ("first_look", "First look", "first-look"):
        only = Request(base="base", tuned=("boxes-tuned",), only=(written, "tuco")).checked(plan).only
        assert only == (*(n for n in GROUPS["First look"] if n in plan), "tuco")
    assert all(re.fullmatch(r"[a-z_]+", word) for word in GROUP_WORDS)
    with pytest.raises(InputError, match="first_look"):
        Request(only=("first_loook",)).checked(plan)


def test_a_caution_about_every_pair_is_said_once() -> None:
    small = SimpleNamespace(kl=torch.zeros(3, 2), half=False, numerical_floor=-1.0)

    def result(tuned: str, warnings: tuple[str, ...]) -> list[Any]:
        models = [{"name": "start", "fingerprint": "f0"}, {"name": tuned, "fingerprint": tuned}]
        divergence = SimpleNamespace(**vars(small), meta=SimpleNamespace(models=models, analysis="token_divergence", inputs=[]))
        check = SimpleNamespace(warnings=warnings, items=[], meta=SimpleNamespace(models=models, analysis="pair_check", inputs=[]))
        return [check, divergence]

    told = cautions([*result("a", ("only this one",)), *result("b", ())])
    assert [line for line in told if "only this one" in line] == ["start -> a: only this one"]
    assert sum("Small samples" in line for line in told) == 1 and not any(line.startswith("start -> b: Small") for line in told)
