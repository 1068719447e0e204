"""Circuits are values: checked on the way in, equal when they say the same, read back from files as they were."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from interp.circuit import Circuit, Edge, Ranking
from interp.errors import InputError
from interp.plots.circuit import _curve, _layout, _readers
from interp.sites import Site

MODEL = (4, 6, 3)
ROLES = {"input": "embed@S2", "duplicate": "L1H4.z@S2", "inhibition": ("L2H0.z@END", "L2H1.z@END"), "mover": "L3H5.z@END"}
EDGES = ["embed@S2 -> L1H4.q@S2", "L1H4.z@S2 -> L2H0.v@S2", "L2H0.z@END -> L3H5.q@END", "L3H5.z@END -> L3.resid_post@END"]
IOI = Circuit.of(MODEL, ROLES, EDGES)


def found(**more: object) -> Circuit:
    scores = {IOI.nodes[0]: 0.25, IOI.edges[1]: -3.0}
    return replace(IOI, scores=scores, prompts="9f" * 32, contexts=("b", "a", "b"), **more)


def test_needs_no_torch():
    code = "import sys, interp.circuit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_order_does_not_matter():
    turned = Circuit(MODEL, tuple(reversed(IOI.nodes)), tuple(reversed(IOI.edges)), dict(reversed(list(IOI.roles.items()))))
    assert turned == IOI and turned.digest == IOI.digest
    assert [str(n) for n in IOI.nodes] == ["embed@S2", "L1H4.z@S2", "L2H0.z@END", "L2H1.z@END", "L3H5.z@END"]
    assert found().contexts == ("a", "b") and found() != IOI and found().digest != IOI.digest


def test_text_of_nodes_and_edges_reads_back():
    for edge in IOI.edges:
        assert Edge.parse(str(edge)) == edge == Edge.parse(edge)
    for node in IOI.nodes:
        assert Site.parse(str(node)) == node
    assert str(IOI.logits) == "L3.resid_post@END" and IOI.edges[-1].receiver == IOI.logits


def test_heads_by_role_and_position():
    assert str(IOI.heads()) == "duplicate=L1H4@S2; inhibition=L2H0,L2H1@END; mover=L3H5@END"
    assert str(IOI.heads("inhibition")) == "inhibition=L2H0,L2H1@END"
    assert str(replace(IOI, roles={}).heads()) == "L1H4@S2; L2H0,L2H1,L3H5@END"
    with pytest.raises(InputError, match="no role named 'inhibiton'; nearest: inhibition"):
        IOI.heads("inhibiton")
    with pytest.raises(InputError, match="no attention heads with the role 'input'"):
        IOI.heads("input")


def test_sets():
    other = Circuit.of(
        MODEL, {"mover": ("L3H5.z@END", "L3H0.z@END")}, ["L3H5.z@END -> L3.resid_post@END", "L3H0.z@END -> L3.resid_post@END"]
    )
    both = IOI | other
    assert len(both.nodes) == 6 and len(both.edges) == 5 and str(both.heads("mover")) == "mover=L3H0,L3H5@END"
    assert (both & IOI) == IOI == (IOI & both) and (both - IOI) == (other - IOI)
    assert [str(n) for n in (both - IOI).nodes] == ["L3H0.z@END"] and [str(e.sender) for e in (both - IOI).edges] == ["L3H0.z@END"]
    assert (IOI - IOI).nodes == () == (IOI - IOI).edges
    kept = found() & IOI
    assert kept.scores == found().scores and kept.contexts == ("a", "b") and kept.prompts is None
    assert (found() | IOI).scores == {} and (found() | found()).prompts == found().prompts
    assert (found() - IOI).scores == {}
    with pytest.raises(InputError, match="is 'mover' in one circuit and 'backup' in the other"):
        _ = IOI | Circuit.of(MODEL, {"backup": "L3H5.z@END"})
    for op in (Circuit.__or__, Circuit.__and__, Circuit.__sub__):
        with pytest.raises(InputError, match="share no parts"):
            op(IOI, Circuit.of((4, 6, 6), ROLES, EDGES))


def test_another_shape_is_refused():
    shape = SimpleNamespace(n_layers=4, n_heads=6, n_kv_heads=3)
    assert IOI.check(shape) is IOI
    for change in ({"n_layers": 5}, {"n_heads": 12}, {"n_kv_heads": 6}):
        with pytest.raises(InputError, match="the circuit is of a model with"):
            IOI.check(SimpleNamespace(**{**vars(shape), **change}))


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        (["L4H0.z@END"], [], "not in a model of 4 layers"),
        (["L1H6.z@END"], [], "not in a model of 4 layers"),
        (["L1H4.z@S2", "L1H4.z@S2"], [], "twice"),
        (["L1H4.q@S2"], [], "L1H4.q@S2 is no node"),
        (["L1.z@S2"], [], "is no node"),
        (["L1.attn_out@S2"], [], "is no node"),
        ([], ["L1H4.z@S2 -> L2H3.v@S2"], "not in a model of 4 layers"),  # three key/value heads
        ([], ["L1H4.z@S2 -> L2H3.q@END"], "at two"),
        ([], ["L2H4.z@S2 -> L2H3.q@S2"], "before the sender writes"),
        ([], ["L2.mlp_out@S2 -> L2.resid_mid@S2"], "before the sender writes"),
        ([], ["L3H0.z@S2 -> L1.resid_mid@S2"], "before the sender writes"),
        ([], ["L1H4.z@S2 -> L2.q@S2"], "is no receiver"),
        ([], ["L1H4.z@S2 -> L2H1.z@S2"], "is no receiver"),
        ([], ["L1H4.z@END -> L2.resid_post@END"], "stands for the logits, at L3.resid_post@END"),
        ([], ["L1H4.z@S2 -> L3.resid_post@S2"], "stands for the logits"),
        ([], ["L1H4.z@S2"], "is not an edge"),
        ([], ["L1H4.z@S2 -> L2H0.v@S2 -> L3H0.v@S2"], "is not an edge"),
    ],
)
def test_what_is_no_circuit_is_refused(nodes, edges, message):
    with pytest.raises(InputError, match=message):
        Circuit(MODEL, tuple(Site.parse(n) for n in nodes), tuple(Edge.parse(e) for e in edges))


def test_edges_along_the_stream_are_taken():
    good = [
        "L2H4.z@S2 -> L2.resid_mid@S2",
        "L2.mlp_out@S2 -> L3H0.q@S2",
        "L1.mlp_out@S2 -> L2.resid_mid@S2",
        "embed@END -> L3.resid_post@END",
        "L3.mlp_out@END -> L3.resid_post@END",
    ]
    assert len(Circuit.of(MODEL, {}, good).edges) == 5


def test_odd_values_are_refused():
    node = IOI.nodes[0]
    for model in ((4, 6), (4, 6, 4), (0, 6, 3), (4, 6, True), ("4", 6, 3)):
        with pytest.raises(InputError, match="n_layers, n_heads, n_kv_heads"):
            replace(IOI, model=model)
    with pytest.raises(InputError, match="is not a name"):
        replace(IOI, roles={node: "name mover"})
    with pytest.raises(InputError, match="is no node of the circuit"):
        replace(IOI, roles={Site.parse("L0H0.z@END"): "mover"})
    for scores in ({node: float("nan")}, {node: float("inf")}, {Site.parse("L0H0.z@END"): 1.0}):
        with pytest.raises(InputError, match="is not a finite number"):
            replace(IOI, scores=scores)


def ranked() -> Circuit:
    """A circuit with a head that two stages chose, and scores of heads that none did."""
    heads = [n for n in IOI.nodes if n.component == "z"]
    scores = {Site("z", 1, 0, "END"): 0.25, **{n: -0.5 for n in heads}}
    return replace(IOI, rankings={"mover": Ranking(scores, tuple(heads)), "other": Ranking(scores, tuple(heads[:1]))})


def test_rankings_are_kept_but_not_through_set_operations():
    circuit = ranked()
    assert circuit != IOI and circuit.digest != IOI.digest and "rankings" not in IOI._body(), "files without rankings stay as they were"
    assert all(not made.rankings for made in (circuit | IOI, circuit & IOI, circuit - IOI))
    with pytest.raises(InputError, match="is chosen in the ranking of 'mover' but is no node of the circuit"):
        replace(IOI, rankings={"mover": Ranking({}, (Site.parse("L0H0.z@END"),))})
    with pytest.raises(InputError, match="is not in a model of"):
        replace(IOI, rankings={"mover": Ranking({Site.parse("L9H0.z@END"): 1.0})})
    with pytest.raises(InputError, match="not a finite number"):
        Ranking({Site.parse("L0H0.z@END"): float("nan")})
    with pytest.raises(InputError, match="a ranking is of heads"):
        Ranking({Site.parse("L0.mlp_out@END"): 1.0})


def test_files_read_back(tmp_path):
    odd = replace(found(), contexts=("Zoë \ud83d", "\n"))
    for i, circuit in enumerate((IOI, found(), IOI - IOI, replace(IOI, roles={}), odd, ranked())):
        again = Circuit.load(circuit.save(tmp_path / "new" / f"{i}.json"))
        assert again == circuit and again.digest == circuit.digest


def test_files_of_strangers(tmp_path):
    file = tmp_path / "circuit.json"

    def refused(content: str | bytes) -> str:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError) as error:
            Circuit.load(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
        return str(error.value)

    with pytest.raises(InputError, match="there is no circuit at"):
        Circuit.load(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="there is no circuit at"):
        Circuit.load(tmp_path)
    body = json.loads(found().save(file).read_text())
    assert "no JSON" in refused("{") and "no JSON" in refused(b"\xff\xfe") and "no JSON" in refused("[" * 100_000)
    assert "the file is a list" in refused("[]")
    assert "format is 2" in refused(json.dumps({**body, "format": 2}))
    assert "nodes of the file is nothing" in refused(json.dumps({k: v for k, v in body.items() if k != "nodes"}))
    assert "role of embed@S2 is int" in refused(json.dumps({**body, "nodes": [{"site": "embed@S2", "role": 3}]}))
    assert "is not a site" in refused(json.dumps({**body, "nodes": [{"site": "L1H4.z S2"}]}))
    assert "not a finite number" in refused(json.dumps(body).replace("0.25", "NaN"))
    refused(json.dumps(body).replace("0.25", "1" + "0" * 400))  # an integer that is no float
    refused(json.dumps({**body, "nodes": [{"site": f"L{'1' * 5000}H0.z@END"}]}))


def test_no_damage_to_a_file_raises_anything_else(tmp_path):
    """One entry somewhere replaced by something odd: an InputError, or a circuit."""
    file = tmp_path / "circuit.json"
    bodies = [json.loads(circuit.save(file).read_text()) for circuit in (found(), ranked())]
    draws = random.Random(0)
    odd = [None, True, -1, 0, 1e308, "", "x", "L0H0.z@END", [], ["x"], [[]], {}, {"site": "embed@S2"}, 10**400]

    def places(x: object) -> list[tuple[object, object]]:
        inner = list(x.items()) if isinstance(x, dict) else list(enumerate(x)) if isinstance(x, list) else []
        return [(x, key) for key, _ in inner] + [p for _, value in inner for p in places(value)]

    outcomes = set()
    for i in range(800):
        damaged = copy.deepcopy(bodies[i % 2])
        owner, key = draws.choice(places(damaged))
        owner[key] = draws.choice(odd)
        file.write_text(json.dumps(damaged))
        try:
            outcomes.add(type(Circuit.load(file)))
        except InputError as e:
            assert "\n" not in str(e)
            outcomes.add(InputError)
    assert outcomes == {Circuit, InputError}


# ------------------------------------------------------------------------------------------------------ drawing


def drawn(circuit: Circuit) -> dict[str, tuple[float, float]]:
    """What stands in a node -> where, of all nodes."""
    return {t: (x, y) for f in circuit.plot().data if f.mode == "markers+text" for t, x, y in zip(f.text, f.x, f.y, strict=True)}


def test_a_circuit_is_drawn_layer_by_layer_and_position_by_position():
    at = drawn(IOI)
    assert {k: y for k, (_, y) in at.items()} == {"embed": 0, "L1H4": 1, "L2H0": 2, "L2H1": 2, "L3H5": 3, "logits": 4}
    assert max(at[k][0] for k in ("embed", "L1H4")) < min(at[k][0] for k in ("L2H0", "L2H1", "L3H5", "logits")), "END stands at the right"
    figure = IOI.plot("Two names")
    assert list(figure.layout.xaxis.ticktext) == ["S2", "END"] and figure.layout.title.text == "Two names"
    assert list(figure.layout.yaxis.ticktext) == ["embed", "L1", "L2", "L3", "logits"]
    names = [f.name for f in figure.data if f.name]
    assert names == ["into q", "into v", "into the logits", "input", "duplicate", "inhibition", "mover", "only reads"]


def test_edges_lead_to_the_nodes_that_read():
    """Key/value head 0 is that of query heads 0 and 1; a query is read by its own head alone."""
    ends = {str(e): [str(n) for n in _readers(IOI, e)] for e in IOI.edges}
    assert ends == {
        "embed@S2 -> L1H4.q@S2": ["L1H4.z@S2"],
        "L1H4.z@S2 -> L2H0.v@S2": ["L2H0.z@END", "L2H1.z@END"],
        "L2H0.z@END -> L3H5.q@END": ["L3H5.z@END"],
        "L3H5.z@END -> L3.resid_post@END": ["L3.resid_post@END"],
    }
    loose = Circuit.of(MODEL, {}, ["embed -> L1H4.q", "embed -> L1H2.k", "embed -> L2.resid_mid", "embed -> L3.resid_post"])
    assert [[str(n) for n in _readers(loose, e)] for e in loose.edges] == [["L1H4.z"], ["L1H2.k"], ["L2.mlp_out"], ["L3.resid_post"]]
    assert set(drawn(loose)) == {"embed", "L1H4", "L1kv2", "MLP", "logits"}
    same = {"L1H4.z@S2": "duplicate", "L1H4.z@END": "mover"}
    both = Circuit.of(MODEL, {role: n for n, role in same.items()}, ["embed@S2 -> L1H4.q@S2", "embed@END -> L1H4.q@END"])
    read = {str(e.receiver): [str(n) for n in _readers(both, e)] for e in both.edges}
    assert read["L1H4.q@END"] == ["L1H4.z@END"]


@pytest.mark.parametrize("count", [1, 5, 26, 80, 200])
def test_names_do_not_overlap(count):
    """At the usual width of 900 pixels every two nodes are nearly a node apart."""
    draws = random.Random(count)
    heads = draws.sample([(i, h) for i in range(12) for h in range(40)], count)
    nodes = tuple(Site("z", i, h, draws.choice(("S2", "END", None))) for i, h in heads)
    figure = Circuit((12, 40, 40), nodes).plot()
    layout, size = _layout(nodes), figure.data[-1].marker.size
    wide, tall = 900 / (figure.layout.xaxis.range[1] - figure.layout.xaxis.range[0]), (figure.layout.height - 130) / len(layout.rows)
    places = [(x * wide, y * tall) for x, y in layout.at.values()]
    for i, (x, y) in enumerate(places):
        for u, v in places[:i]:
            assert (x - u) ** 2 + (y - v) ** 2 >= (0.9 * size) ** 2
    assert 14 <= size <= 36 and figure.data[-1].textfont.size >= 6


def test_width_follows_the_score_and_sign_and_texts_are_escaped():
    scores = dict(zip(IOI.edges, (4.0, -1.0, 2.0, 0.1), strict=True))
    figure = replace(IOI, scores=scores).plot("<b>a & b</b>")
    lines = [f for f in figure.data if f.mode == "lines" and f.x[0] is not None]
    assert [f.line.dash for f in lines] == ["solid" if f.legendgroup != "v" else "dot" for f in lines]
    widths = {f.legendgroup: f.line.width for f in lines}
    assert widths["resid_post"] == widths["v"] < max(widths.values()) and "negative score" in [f.name for f in figure.data]
    assert figure.layout.title.text == "&lt;b&gt;a &amp; b&lt;/b&gt;"
    told = [t for f in figure.data if f.customdata is not None for t in f.customdata]
    assert "L1H4.z@S2 -&gt; L2H0.v@S2<br>score: -1" in told and "L2H0.z@END<br>role: inhibition<br>edges from here: 1" in told


def test_curves_go_from_node_to_node():
    for start, end, bend in (((0.0, 0.0), (3.0, 1.0), 0.0), ((1.0, 0.0), (1.0, 4.0), 0.5), ((1.0, 0.0), (2.0, 4.0), -0.5)):
        way = _curve(start, end, bend)
        assert way[0] == start and way[-1] == pytest.approx(end)
        assert all(b[1] > a[1] for a, b in zip(way, way[1:], strict=False))
    assert max(x for x, _ in _curve((1.0, 0.0), (1.0, 4.0), 0.5)) == 1.5 and max(x for x, _ in _curve((1.0, 0.0), (1.0, 1.0), 0.0)) == 1


def test_an_empty_circuit_is_not_drawn():
    with pytest.raises(InputError, match="empty circuit"):
        (IOI - IOI).plot()


def test_an_edge_keeps_off_nodes_that_are_not_its_own():
    """One that ran through a node would look like two edges."""
    nodes = [f"L{i}H3.z@END" for i in range(4)]
    edges = ["L0H3.z@END -> L3.resid_post@END", "L0H3.z@END -> L3H3.q@END", "L0H3.z@END -> L1H3.q@END"]
    circuit = Circuit.of(MODEL, {"a": nodes}, edges)
    figure = circuit.plot()
    at = drawn(circuit)
    xaxis, yaxis = figure.layout.xaxis.range, figure.layout.yaxis.range
    across, up = 900 / (xaxis[1] - xaxis[0]), (figure.layout.height - 130) / (yaxis[1] - yaxis[0])
    lines = [(x, y) for f in figure.data if f.mode == "lines" and f.x[0] is not None for x, y in _pieces(f)]
    assert len(lines) == 3
    for xs, ys in lines:
        for name, (x0, y0) in at.items():
            if ys[0] < y0 < ys[-1]:
                assert min(math.hypot((x - x0) * across, (y - y0) * up) for x, y in zip(xs, ys, strict=True)) > 18, name


def _pieces(trace: Any) -> list[tuple[list[float], list[float]]]:
    """The lines of a trace."""
    found, xs, ys = [], [], []
    for x, y in zip(trace.x, trace.y, strict=True):
        if x is None:
            found.append((xs, ys))
            xs, ys = [], []
        else:
            xs.append(x)
            ys.append(y)
    return found
