"""The studies of laundry lists and of channels: chosen heads, edits, tables by hand, and a quick run of both."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import channel_tables  # noqa: E402
import laundry_list as study  # noqa: E402
import laundry_tables as tables  # noqa: E402

import interp  # noqa: E402
from interp.circuit import Circuit, Edge  # noqa: E402
from interp.metrics import Metric  # noqa: E402
from interp.models import HookedModel  # noqa: E402
from interp.models.channels import channel_edit  # noqa: E402
from interp.sites import Site  # noqa: E402
from interp.sweeps.channels import generator  # noqa: E402

channels: Any = import_module("channels")  # type checkers know another package of this name


@pytest.fixture(scope="module")
def base() -> HookedModel:
    return HookedModel.load("base")


@pytest.fixture(scope="module")
def lists(base):
    return study.lists(base, 12, 4, 0)


def test_lists_are_new(base, lists) -> None:
    more = study.lists(base, 12, 4, 0, without=lists.contexts[:5])
    assert len(set(lists.contexts)) == len(lists) and not set(more.contexts) & set(lists.contexts[:5])
    with pytest.raises(interp.InputError, match="fewer than four"):
        study.lists(base, 12, 4, 0, without=lists.contexts)


def test_answers_are_those_of_the_task(base, lists) -> None:
    task, cell = interp.task("laundry_list(length=4)"), study.answered(base, lists)
    assert torch.equal(cell.top, task.score(base, lists)) and torch.equal(cell.among, task.score(base, lists, among="options"))
    assert all(o in t for o, t in zip((base.token_text(a) for a in lists.answers), lists.clean.texts, strict=True))


def test_edits_scale_what_they_name(base) -> None:
    logits = base.logits([[5, 6, 7, 8]])

    def after(edit) -> torch.Tensor:
        with base.edited(edit):
            return base.logits([[5, 6, 7, 8]])

    every = [f"L2H1.{r}" for r in range(base.shape.d_head)]
    whole = after(study.of_heads(base, ["L2H1"])(2.0))
    assert not torch.allclose(whole, logits, atol=1e-3)
    torch.testing.assert_close(after(study.of_components(base, every)(2.0)), whole, atol=2e-4, rtol=0)
    # As many random directions as a head can write along are all that it writes.
    torch.testing.assert_close(after(study.of_directions(base, every, generator("x"))(2.0)), whole, atol=2e-4, rtol=0)
    for make in (study.of_heads(base, ["L2H1"]), study.of_directions(base, ["L2H1.0"], generator("x"))):
        torch.testing.assert_close(after(make(1.0)), logits, atol=2e-5, rtol=0)
    others = study.random_components(base, ["L2H1.3", "L2H1.4", "L1H0.0"], generator("y"))
    assert [o.partition(".")[0] for o in others] == ["L2H1", "L2H1", "L1H0"] and not {"L2H1.3", "L2H1.4", "L1H0.0"} & set(others)
    assert len(set(others)) == 3


def test_the_strongest_components_are_those_that_cost_most(base, lists) -> None:
    read = Metric.parse("logit_diff").reader(lists)
    plain = read(base.logits(lists.clean, at="END")).double().mean()
    lost = {}
    for r in range(base.shape.d_head):
        with base.edited(channel_edit(base, f"L3H1.{r}", delete=True, at="END")):
            lost[f"L3H1.{r}"] = float(plain - read(base.logits(lists.clean, at="END")).double().mean())
    assert study.strongest_components(base, lists, ["L3H1"], 2) == sorted(lost, key=lambda name: -lost[name])[:2]


def test_the_best_factor_stays_at_1_without_a_reason(base, lists) -> None:
    bench = study.Bench.__new__(study.Bench)
    bench.model = base
    right = {1.0: 4, 0.0: 4, 0.5: 3, 1.5: 4, 2.0: 6, 4.0: 6, 8.0: 0}
    now = [1.0]

    class Model:
        def edited(self, gain):
            class Now:
                def __enter__(self):
                    now[0] = gain

                def __exit__(self, *_):
                    now[0] = 1.0

            return Now()

    bench.model, bench.dev = Model(), []
    bench.right = lambda _: torch.arange(8) < right[now[0]]
    assert bench.best(lambda gain: gain) == 2.0  # the nearest of two
    right.update({2.0: 4, 4.0: 4})
    assert bench.best(lambda gain: gain) == 1.0


def hits(n: int, of: int) -> torch.Tensor:
    return torch.arange(of) < n


def test_tables_and_answer_of_lists_by_hand() -> None:
    plain, steered = hits(4, 10), hits(9, 10)
    assert tables.change(plain, steered).startswith("+50.0 [") and tables.difference(plain, steered) == pytest.approx(0.5)
    assert tables.share(hits(5, 10)).startswith("0.50 [0.24, 0.76]")
    cell = tables.Cell(hits(2, 4), hits(1, 4), torch.tensor([1, 1, 2, 2]), ("T1", "T1", "T2", "T3"))
    found = tables.Found(cells={(2, "shuffled"): cell})
    row = tables.accuracy_table(found).splitlines()[1].split()
    assert row[:4] == ["2,", "shuffled", "4", "0.50"] and row[-3:] == ["1.00", "0.00", "(2-2)"]

    found.heads = {"reader": "L1H0", "writer": "L2H1"}
    found.paid = {"L1H0": (0.9, 0.05), "L2H1": (0.1, 0.8)}
    found.direct = {"L1H0": torch.zeros(4), "L2H1": torch.full((4,), 2.0)}
    found.channels, found.selected = {"reader": ["L0H0.1"], "writer": ["L0H2.3"]}, {"reader": 0, "writer": 1}
    attention = torch.zeros(2, 3, 2, 4)
    attention[0, 0, 1] = attention[0, 1:, 0] = attention[1, :, 0] = 1.0
    choice = {name: lambda d: (plain, steered if d == 0 else plain) for name in tables.CHOICES}
    result = SimpleNamespace(attention=attention, dev=hits(2, 4), labels={"channel": ("L0H0.1@END",)}, **choice)
    found.steered = {("reader", 2, "1"): result}
    line = tables.steering_table(found).splitlines()[1]
    assert line.startswith("  2: L1H0 L0H0.1 ") and "2 of 2" in line and "1-1" in line and line.count("+50.0 [") == 3
    texts = (torch.full((5,), 2.0), torch.full((5,), 2.1))
    edit = tables.EditRow(
        "heads L2H1", 2.0, plain, steered, torch.tensor([7] * 10), texts, {"ioi": (hits(9, 10), hits(7, 10))}, {"other": [0.1, -0.1]}
    )
    found.edits = [edit]
    table = tables.edits_table(found)
    assert "times 2: +50.0 [" in table and "7: 0.40 to 0.90" in table and "plain texts +5.00 [+5.00, +5.00]; ioi -20.0 [" in table
    assert "other: -10.0 to +10.0 in 2 draws" in table and "L2H1" in tables.heads_table(found)
    lines = tables.verdict(found)
    assert "L2H1 writes most of it (2.00 [2.00, 2.00]) and looks at the second mentions (0.80)" in lines[1]
    assert lines[2].startswith("Steering queries at END: found; 3 of 3 choices") and "ioi most, by -20.0" in lines[3]


def test_pairs_of_a_circuit_share_keys_and_values() -> None:
    sender, edge = Site("z", 0, 1, "query_object"), Edge.parse("L0H1.z@query_object -> L3H1.v@query_object")
    movers = (Site("z", 3, 3, "END"), Site("z", 3, 5, "END"))
    circuit = Circuit((4, 6, 2), (sender, *movers), (edge,), scores={sender: 1.0, movers[0]: 0.1, movers[1]: -0.4})
    found = channels.from_circuit("t", circuit)
    # Key/value head 1 is that of heads 3 to 5, of which 5 matters most; movers of one layer are no pair.
    assert [(a.title, a.why) for a in found] == [("L0H1@query_object -> L3H5.v", "edge"), ("L0H1@query_object -> L3H5.k", "edge")]
    ends = Circuit((4, 6, 2), (Site("z", 0, 3, "END"), Site("z", 2, 3, "END")))
    assert [a.title for a in channels.from_circuit("t", ends)] == [f"L0H3@END -> L2H3.{kind}" for kind in "qkv"]


def test_a_line_is_what_edits_give(base) -> None:
    pairs: Any = interp.task("colored_objects").generate(base, n=6, seed=0)
    asked = channels.Asked("colored_objects", Site("z", 1, 5, "query_object"), Site("z", 3, 2), "v", "edge")
    composed = interp.composition(base, kind="v", draws=10)
    line = channels.measured_line(base, pairs, asked, composed, draws=2)
    read = Metric.parse("logit_diff").reader(pairs)
    plain = read(base.logits(pairs.clean, at="END"))
    best = line.order[0]
    top = composed.top(1).iloc[0]
    assert line.name(best) == "L1H5.0" and top.channel.startswith("L1H5.0 -> ")
    (also,) = channels.strongest(composed, ["ioi"])
    assert also.title == "L1H5@END -> L3H2.v"
    assert float(line.score[best]) == pytest.approx(top.score) and float(line.z[best]) == pytest.approx(top.z)
    later = channels.later_inputs(base, 1)
    assert len(later) == 2 * (6 + 2 + 2)
    for through, readers in enumerate(([Site("v", 3, 0)], later, None)):
        with base.edited(channel_edit(base, "L1H5.0", delete=True, at="query_object", receivers=readers)):
            lost = plain - read(base.logits(pairs.clean, at="END"))
        torch.testing.assert_close(line.effect[through, best], lost.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(line.intact, plain.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "written"), [("ioi", 3), ("induction", 1)])
def test_written_channels_are_found_and_others_carry_nothing(name, written) -> None:
    found = channels.by_hand(name, 8, draws=2, seed=0)
    right = [line for line in found if line.asked.why == "written"]
    assert len(right) == written and len(found) == 3 * written
    assert all(line.holds(0) and int(line.place[line.order[0]]) == 1 and float(line.z.max()) > 10 for line in right)
    assert all(float(line.effect[0].abs().max()) < 1e-4 for line in found if line.asked.why != "written")
    told = channel_tables.verdict(channel_tables.Measured(lines=found, written=[(name, x) for x in found]), "x")
    assert told[-1].startswith(f"In models written by hand {written} of {written} written channels")
    assert told[1].startswith("Deleted for that input of the receiver alone: found in ") and f"in {written} of {len(found)}" in told[1]


def test_an_effect_counts_only_beyond_noise_and_controls() -> None:
    asked = channels.Asked("t", Site("z", 0, 1, "END"), Site("z", 1, 0), "q", "edge")

    def line(best: torch.Tensor, random: float) -> channel_tables.Line:
        effect = torch.stack([best, 0.1 * best, 0.01 * best, 0.001 * best])[None].expand(3, -1, -1)
        score, place = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), torch.tensor([1, 2, 3, 4])
        drawn, whole = torch.full((3, 2, 20), random, dtype=torch.float64), effect.sum(1)
        units = ((0,), (1,), (2, 3), (4,))
        return channel_tables.Line(
            asked, units, score, score, place, 9, effect, whole, drawn, effect[0], "IO", torch.full((20,), 10.0, dtype=torch.float64), ""
        )

    clear = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    assert line(clear, 0.5).holds(0) and not line(clear, -1.2).holds(0) and not line(0.05 * clear, 0.01).holds(0)
    assert not line(clear - 1, 0.0).holds(0)
    found = line(clear, 0.5)
    assert found.name(2) == "L0H1.2-3" and found.best(0) == 0
    agreed = found.agreement(0)
    assert agreed is not None and float(agreed.value) == 1 and float(agreed.low) == 1
    table = channel_tables.table([found], "x").splitlines()
    assert table[1].startswith("t: L0H1@END -> L1H0.q (edge; logit difference 10.00)") and "+1.000 [" in table[2] and "1/9" in table[2]
    assert "+0.500 to +0.500" in table[5] and "its 3 other components" in table[6]


@pytest.mark.full
def test_quick_runs_write_pages(tmp_path, capsys) -> None:
    assert study.main(["--quick", "--n", "12", "--out", str(tmp_path)]) == 0
    told, page = capsys.readouterr().out, (tmp_path / "laundry_list.html").read_text(encoding="utf-8")
    for what in ("looks at the items most", "Editing weights, one factor for all prompts"):
        assert what in told and what in page, what
    assert channels.main(["--quick", "--n", "12", "--out", str(tmp_path)]) == 0
    told, page = capsys.readouterr().out, (tmp_path / "channels.html").read_text(encoding="utf-8")
    for what in ("Deleted for everybody", "In models written by hand"):
        assert what in told and what in page, what
    for run, few in ((study.main, "12"), (channels.main, "8")):
        with pytest.raises(SystemExit):
            run(["--n", "3"])
        assert f"--n is 3, expected {few} or more" in capsys.readouterr().err
