"""Overlap of circuits: counts by hand, chance against brute force and against drawn circuits, cut-offs, and what is refused."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from interp import organisms, store
from interp.analyses.circuit_overlap import _hypergeometric, _measured, _quantile, _sum_of, circuit_overlap
from interp.circuit import Circuit, Ranking
from interp.errors import InputError
from interp.sites import Site
from interp.stages import Stage, Stages

MODEL = (3, 5, 5)
A = Circuit.of(
    MODEL,
    {"mover": ("L2H0.z@END", "L2H1.z@END", "L1H4.z@END"), "inhibition": ("L1H0.z@END", "L1H1.z@END"), "previous": "L0H3.z@S1+1"},
    ["L1H0.z@END -> L2H0.q@END", "L1H1.z@END -> L2H0.q@END", "L2H0.z@END -> L2.resid_post@END"],
)
B = Circuit.of(
    MODEL,
    {"mover": ("L2H1.z@query", "L2H3.z@query"), "inhibition": ("L1H0.z@query", "L0H2.z@query", "L1H1.z@query"), "gatherer": "L0H3.z@query"},
    ["L1H0.z@END -> L2H0.q@END", "L2H1.z@END -> L2.resid_post@END"],
)


def scored(circuit: Circuit, seed: int = 0) -> Circuit:
    draws = random.Random(seed)
    return replace(circuit, scores={n: draws.uniform(-1, 1) for n in circuit.nodes})


def every_head(sizes: Sequence[int], role: str, scores: dict[tuple[int, int], float], position: str = "END") -> Circuit:
    """All heads as nodes of one role."""
    nodes = {Site("z", i, h, position): scores.get((i, h), 0.0) for i in range(sizes[0]) for h in range(sizes[1])}
    return Circuit((sizes[0], sizes[1], sizes[1]), tuple(nodes), roles=dict.fromkeys(nodes, role), scores=nodes)


def joined(*circuits: Circuit) -> Circuit:
    """Stages side by side, told apart by their positions, with all scores."""
    roles, scores = {}, {}
    for c in circuits:
        roles, scores = {**roles, **c.roles}, {**scores, **c.scores}
    return Circuit(circuits[0].model, tuple(roles), roles=roles, scores=scores)


def test_counts_by_hand() -> None:
    frame = circuit_overlap(A, B, cutoffs=()).to_frame().set_index("stage")
    assert frame.loc["mover", ["size_a", "size_b", "shared"]].tolist() == [3, 2, 1]  # L2H1, wherever it stands
    assert frame.loc["inhibition", ["size_a", "size_b", "shared"]].tolist() == [2, 3, 2]
    assert frame.loc["previous", ["size_a", "size_b", "shared"]].tolist() == [1, 0, 0]
    assert frame.loc["gatherer", ["size_a", "size_b", "shared"]].tolist() == [0, 1, 0]
    assert frame.loc["all stages", ["size_a", "size_b", "shared"]].tolist() == [6, 6, 3]
    assert frame.loc["whatever the stage", ["size_a", "size_b", "shared"]].tolist() == [6, 6, 4]  # L0H3 has another job in b
    assert frame.loc["all stages", "jaccard"] == pytest.approx(3 / 9) and frame.loc["mover", "share_of_b"] == 0.5
    assert frame.loc["mover", "chance"] == pytest.approx(3 * 2 / 15) and frame.loc["all stages", "chance"] == pytest.approx(6 / 15 + 6 / 15)
    r = circuit_overlap(A, B, cutoffs=())
    assert r.edges == (1, 3, 2) and r.one_sided == {"a": ("previous",), "b": ("gatherer",)} and r.heads == 15
    assert r.summary().startswith("3 (stage, head) entries are in both circuits: 50% of the 6 in a, 50% of the 6 in b, Jaccard 0.33 (")
    assert "1 edge shared of 3 in a and 2 in b" in r.summary() and "only b has gatherer" in r.summary()


def test_chance_of_one_stage_is_that_of_all_pairs_of_sets() -> None:
    """Every set of b's size, gone through, within the model and within layers."""
    heads = [(i, h) for i in range(2) for h in range(3)]
    a, b = {(0, 0), (0, 2), (1, 1)}, {(0, 0), (1, 1)}
    anywhere = [len(a & set(some)) for some in itertools.combinations(heads, len(b))]
    by_layer = [len(a & {(0, x), (1, y)}) for x in range(3) for y in range(3)]  # b has one head in each layer
    found = _measured([a], [b], (2, 3))
    for name, counts in (("", anywhere), ("layer_", by_layer)):
        assert found[f"{name}chance"] == pytest.approx(sum(counts) / len(counts))
        assert found[f"{name}p"] == pytest.approx(sum(c >= 2 for c in counts) / len(counts))
        ordered = sorted(counts)
        assert found[f"{name}low"] == ordered[math.ceil(0.025 * len(counts)) - 1] if name else True
        assert found["chance_high" if not name else "layer_high"] == ordered[math.ceil(0.975 * len(counts)) - 1]


def test_chance_of_a_sum_is_that_of_drawn_circuits() -> None:
    """The slow twin: circuits drawn stage by stage, p with the + 1 rule, within the Monte Carlo error of 20000 draws."""
    layers, heads, n = 4, 6, 20000
    pool = [(i, h) for i in range(layers) for h in range(heads)]
    pick = random.Random(1)
    a = [set(pick.sample(pool, k)) for k in (5, 8, 3)]
    b = [set(pick.sample(pool, k)) for k in (6, 4, 3)]
    found = _measured(a, b, (layers, heads))
    shared = int(found["shared"])

    def drawn(within_layers: bool) -> list[int]:
        counts = []
        for _ in range(n):
            total = 0
            for x, y in zip(a, b, strict=True):
                if within_layers:
                    some = {(i, h) for i in range(layers) for h in pick.sample(range(heads), sum(j == i for j, _ in y))}
                else:
                    some = set(pick.sample(pool, len(y)))
                total += len(x & some)
            counts.append(total)
        return counts

    for within, name in ((False, ""), (True, "layer_")):
        counts = sorted(drawn(within))
        p = (1 + sum(c >= shared for c in counts)) / (n + 1)
        assert found[f"{name}p"] == pytest.approx(p, abs=5 * math.sqrt(0.25 / n))
        assert found[f"{name}chance"] == pytest.approx(sum(counts) / n, abs=0.05)
        assert abs(found["layer_high" if within else "chance_high"] - counts[int(0.975 * n)]) <= 1
        assert abs(found["layer_low" if within else "chance_low"] - counts[int(0.025 * n)]) <= 1


def test_probabilities_sum_to_one() -> None:
    assert sum(_hypergeometric(1024, 40, 103)) == pytest.approx(1, abs=1e-12)
    assert sum(_sum_of(_hypergeometric(384, 8, 8) for _ in range(4))) == pytest.approx(1, abs=1e-12)
    assert _sum_of([]) == [1.0] and _hypergeometric(5, 5, 2) == [0, 0, 1] and _quantile([0.5, 0.5], 0.5) == 0


def test_a_circuit_and_itself_and_its_rest() -> None:
    same = circuit_overlap(A, A, cutoffs=())
    assert same.jaccard.eq(1).all() and same.p[same.main] < 1e-4 and set(same.one_sided.values()) == {()}
    nothing = circuit_overlap(A, Circuit.of(MODEL, {"mover": "L0H0.z@END"}), cutoffs=())
    assert nothing.shared[nothing.main] == 0 and float(nothing.p[nothing.main]) == pytest.approx(1)


def test_the_published_arithmetic() -> None:
    """Four stages of GPT-2 medium, the top 2 %: 8 heads each of 384, and 25 of 32 shared is 78 %."""
    pick, pool = random.Random(3), [(i, h) for i in range(24) for h in range(16)]
    sides: tuple[list[Circuit], list[Circuit]] = ([], [])
    for stage, kept in enumerate((8, 7, 5, 5)):
        heads = pick.sample(pool, 16)
        tops = heads[:8], heads[:kept] + heads[8 : 16 - kept]
        for side, top in zip(sides, tops, strict=True):
            sign = -1 if stage % 2 else 1  # the size of a score counts, not its sign
            side.append(every_head((24, 16), f"stage{stage}", {h: sign * pick.uniform(1, 2) for h in top}, f"P{stage}"))
    r = circuit_overlap(joined(*sides[0]), joined(*sides[1]))
    row = r.to_frame()[lambda f: (f.stage == "all stages") & (f.cutoff == 0.02)].iloc[0]
    assert (row.size_a, row.size_b, row.shared) == (32, 32, 25) and row.share_of_a == pytest.approx(0.78, abs=0.002)
    assert row.chance == pytest.approx(32 * 8 / 384) and row.p < 1e-20 and r.notes == ()
    assert "By cut-off" in r.figures()
    # with every head a node, the circuits as they are share everything, which is no news
    assert r.shared[r.cutoffs.index(None)] == 384 and r.labels["row"][r.main] == "all stages, top 2 %"
    assert r.summary().startswith("25 (stage, head) entries, of the top 2 % of heads per stage, are in both circuits: 78% of the 32 in a")


def test_cut_offs_above_what_is_kept_are_left_out_and_said() -> None:
    r = circuit_overlap(scored(A), scored(B, 1), cutoffs=(0.05, 0.1, 0.2))  # 1, 2 and 3 heads of 15
    cut = {(s, c) for s, c in zip(r.stages, r.cutoffs, strict=True) if c is not None}
    assert cut == {(s, c) for c in (0.05, 0.1) for s in ("mover", "inhibition", "all stages")}
    assert r.notes == (
        "the top 20 % needs 3 scored heads per stage, but a has 2 for inhibition; b has 2 for mover",
        "cut-offs rank the nodes of a and b, of which each has one role",
    )
    bare = circuit_overlap(A, scored(B), cutoffs=(0.05,))
    assert bare.notes == ("no cut-offs, since a has no scores of heads",) and all(c is None for c in bare.cutoffs)


def searched(seed: int, unreached: int = 0) -> tuple[Circuit, dict[str, dict[tuple[int, int], float]], dict[str, set[tuple[int, int]]]]:
    """Two stages at END that score every head, and choose those above 0.3; a node has the role in which it has the larger score."""
    draws, heads = random.Random(seed), [(i, h) for i in range(MODEL[0]) for h in range(MODEL[1])]
    scores = {"mover": {h: draws.uniform(-1, 1) for h in heads}}
    scores["inhibition"] = {h: draws.uniform(-1, 1) for h in heads[: len(heads) - unreached]}
    chosen = {role: {h for h, x in of.items() if abs(x) > 0.3} for role, of in scores.items()}

    def site(head: tuple[int, int]) -> Site:
        return Site("z", *head, "END")

    roles, kept = {}, {}
    for head in {*chosen["mover"], *chosen["inhibition"]}:
        role = max((r for r in scores if head in chosen[r]), key=lambda r: abs(scores[r][head]))
        roles[site(head)], kept[site(head)] = role, scores[role][head]
    rankings = {r: Ranking({site(h): x for h, x in scores[r].items()}, tuple(map(site, chosen[r]))) for r in scores}
    return Circuit(MODEL, tuple(roles), roles=roles, scores=kept, rankings=rankings), scores, chosen


def test_cut_offs_of_searches_rank_every_head_in_every_stage() -> None:
    """The slow twin takes the strongest of all heads by hand; a head that another stage names first is not lost to the second."""
    (a, scores_a, chosen_a), (b, scores_b, chosen_b) = searched(1), searched(2)
    r = circuit_overlap(a, b, cutoffs=(0.1, 0.2, 0.5))
    frame = r.to_frame().set_index(["stage", "cutoff"])
    for cutoff in (0.1, 0.2, 0.5):
        k, total = math.ceil(cutoff * 15), 0
        for role in ("mover", "inhibition"):
            tops = [set(sorted(s[role], key=lambda h, of=s[role]: -abs(of[h]))[:k]) for s in (scores_a, scores_b)]
            assert frame.loc[(role, cutoff), ["size_a", "size_b", "shared"]].tolist() == [k, k, len(tops[0] & tops[1])]
            total += len(tops[0] & tops[1])
        assert frame.loc[("all stages", cutoff), "shared"] == total
    assert r.notes == ()
    whole = {s: i for i, (s, c) in enumerate(zip(r.stages, r.cutoffs, strict=True)) if c is None}
    for role in ("mover", "inhibition"):
        both = len(chosen_a[role] & chosen_b[role])
        assert [int(x[whole[role]]) for x in (r.size_a, r.size_b, r.shared)] == [len(chosen_a[role]), len(chosen_b[role]), both]
    assert int(r.size_a[whole["all stages"]]) == sum(map(len, chosen_a.values())) > len(a.nodes), "heads of two stages count twice"
    assert int(r.size_a[whole["whatever the stage"]]) == len(a.nodes)
    i = next(i for i, e in enumerate(r.entries) if e[0] == "mover")
    head = tuple(int(x) for x in r.entries[i][1][1:].split("H"))
    assert r.scores[i].tolist() == [scores_a["mover"][head], scores_b["mover"][head]]
    # without the rankings heads are missing from the second stage, and the result says so
    bare = circuit_overlap(replace(a, rankings={}), replace(b, rankings={}), cutoffs=(0.1,))
    assert bare.notes == ("cut-offs rank the nodes of a and b, of which each has one role",)
    assert sum(float(x) for x in bare.size_a[:2]) == len(a.nodes)


def telling(a: Circuit, sends: dict[str, tuple[str, str]], names: dict[str, str] | None = None) -> Circuit:
    """The same circuit of a search that says what its stages send to, with other names of its roles."""
    named = names or {}
    rankings = {named.get(r, r): replace(k, sends=sends[r][0], sign=sends[r][1]) for r, k in a.rankings.items()}
    return replace(a, rankings=rankings, roles={n: named.get(r, r) for n, r in a.roles.items()})


WAYS = {"mover": ("logits", "supports"), "inhibition": ("logits.q", "supports")}


def test_stages_are_matched_by_what_they_send_to() -> None:
    """Another name of the same stage changes nothing but the name; the same name of another stage is another row."""
    (a, *_), (b, *_) = searched(1), searched(2)
    want = circuit_overlap(a, b, cutoffs=(0.1, 0.2)).to_frame()
    other = telling(b, WAYS, {"inhibition": "gatherer"})
    found = circuit_overlap(telling(a, WAYS), other, cutoffs=(0.1, 0.2))
    frame = found.to_frame()
    assert frame.stage.tolist() == [{"inhibition": "inhibition / gatherer"}.get(s, s) for s in want.stage]
    assert frame.drop(columns="stage").equals(want.drop(columns="stage")) and found.one_sided == {"a": (), "b": ()}
    assert not found.scores.isnan().any(), "of an entry in one circuit alone the other has a score, too"
    by_name = circuit_overlap(a, telling(b, dict.fromkeys(WAYS, ("", "")), {"inhibition": "gatherer"}), cutoffs=())
    assert by_name.one_sided == {"a": ("inhibition",), "b": ("gatherer",)}, "without it roles are all there is"
    deeper = telling(b, WAYS | {"inhibition": ("logits.q.v", "supports")})
    apart = circuit_overlap(telling(a, WAYS), deeper, cutoffs=(0.1,))
    assert apart.one_sided == {"a": ("inhibition (logits.q supports)",), "b": ("inhibition (logits.q.v supports)",)}
    assert [s for s, c in zip(apart.stages, apart.cutoffs, strict=True) if c] == ["mover"]


@pytest.mark.parametrize("told", [True, False])
def test_heads_for_and_against_are_one_sweep(told: bool) -> None:
    """Both roles have the scores of the same sweep, which a cut-off counts once; as they are, both stand for themselves."""

    def swept(seed: int) -> tuple[Circuit, dict[tuple[int, int], float]]:
        draws = random.Random(seed)
        scores = {(i, h): draws.uniform(-1, 1) for i in range(3) for h in range(5)}
        sites = {Site("z", *head, "END"): x for head, x in scores.items()}
        chosen = {"mover": [s for s, x in sites.items() if x > 0.5], "negative_mover": [s for s, x in sites.items() if x < -0.5]}
        ways = {"mover": ("logits", "supports"), "negative_mover": ("logits", "opposes")}
        rankings = {r: Ranking(sites, tuple(some), *(ways[r] if told else ())) for r, some in chosen.items()}
        roles = {s: r for r, some in chosen.items() for s in some}
        return Circuit(MODEL, tuple(roles), roles=roles, scores={s: sites[s] for s in roles}, rankings=rankings), scores

    (a, x), (b, y) = swept(1), swept(2)
    frame = circuit_overlap(a, b, cutoffs=(0.2,)).to_frame()
    assert frame.stage.tolist() == ["mover", "negative_mover", "all stages", "whatever the stage", "mover, negative_mover"]
    tops = [set(sorted(of, key=lambda h, of=of: -abs(of[h]))[:3]) for of in (x, y)]
    assert frame.iloc[-1][["size_a", "size_b", "shared"]].tolist() == [3, 3, len(tops[0] & tops[1])]
    assert frame.iloc[0].shared == sum(x[h] > 0.5 and y[h] > 0.5 for h in x)


def test_what_the_stages_that_ship_send_to() -> None:
    ioi, colored, boxes = (Stages.parse(name) for name in ("ioi", "colored_objects", "boxes"))
    assert ioi.sends("mover") == ("logits", "supports") and ioi.sends("negative_mover") == ("logits", "opposes")
    assert ioi.sends("inhibition") == colored.sends("gatherer") == boxes.sends("position_transmitter") == ("logits.q", "supports")
    assert ioi.sends("duplicate") == colored.sends("duplicate") == ("logits.q.v", "supports")
    assert ioi.sends("previous")[0] == "logits.q.v.k" and colored.sends("lookup")[0] == "logits.v"
    rows = [("mover", "logits", "supports"), ("negative", "logits", "opposes"), ("x", "negative.q", "supports"), ("x", "mover.q", "both")]
    rows += [("y", "x.k, mover.v", "supports")]
    own = Stages(tuple(Stage(role, receivers, sign=sign) for role, receivers, sign in rows))
    assert own.sends("x") == ("logits-.q, logits.q", "both") and own.sends("y")[0] == "(logits-.q, logits.q)+-.k, logits.v"


def test_a_circuit_keeps_what_its_stages_send_to(tmp_path) -> None:
    a = telling(searched(1)[0], WAYS)
    assert Circuit.load(a.save(tmp_path / "a.json")) == a != searched(1)[0]
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text().replace('"logits.q"', "3"))
    with pytest.raises(InputError, match="sends of the ranking inhibition is int, expected str"):
        Circuit.load(tmp_path / "b.json")


def test_results_stand_for_their_circuits() -> None:
    class Found:
        def circuit(self, side: str | None = None) -> Circuit:
            return A if side is None else B

    r = circuit_overlap(Found(), B, cutoffs=0.1)  # type: ignore[arg-type]
    want = circuit_overlap(A, B, cutoffs=(0.1,))
    assert r.to_frame().equals(want.to_frame()) and r.identity == want.identity


def test_heads_that_cannot_send_are_not_ranked() -> None:
    a, b = searched(1, unreached=5)[0], searched(2, unreached=5)[0]
    r = circuit_overlap(a, b, cutoffs=(0.8,))
    assert r.notes == ("the top 80 % needs 12 scored heads per stage, but a has 10 for inhibition; b has 10 for inhibition",)
    assert [s for s, c in zip(r.stages, r.cutoffs, strict=True) if c] == ["mover"]


def test_the_strongest_are_taken_by_size() -> None:
    scores = {(0, 0): -5.0, (1, 1): 4.0, (2, 2): 0.1}
    a, b = every_head((3, 5), "mover", scores), every_head((3, 5), "mover", {(0, 0): 1.0, (2, 2): -3.0})
    frame = circuit_overlap(a, b, cutoffs=(0.1,)).to_frame()  # 2 of 15
    assert frame[frame.cutoff == 0.1][["size_a", "size_b", "shared"]].to_numpy().tolist() == [[2, 2, 1]]
    table = circuit_overlap(a, b, cutoffs=()).strongest(3)
    assert table.site.tolist() == ["L0H0", "L2H2", "L1H1"] and table.score_a.tolist() == [-5.0, 0.1, 4.0]


def test_of_a_head_at_two_positions_the_larger_score_counts_once() -> None:
    nodes = {Site("z", 1, 1, "S2"): -2.0, Site("z", 1, 1, "END"): 0.5, Site("z", 0, 0, "END"): 1.0}
    c = Circuit(MODEL, tuple(nodes), roles=dict.fromkeys(nodes, "mover"), scores=nodes)
    r = circuit_overlap(c, c, cutoffs=(1 / 15,))
    assert r.size_a.tolist() == [2, 1] and r.scores[:, 0].tolist() == [1.0, -2.0]


def test_circuits_without_roles_are_compared_by_their_heads() -> None:
    bare = replace(A, roles={})
    r = circuit_overlap(bare, B, cutoffs=())
    assert r.stages[r.main] == "whatever the stage" and int(r.shared[r.main]) == 4
    assert "4 heads, whatever their stage, are in both" in r.summary() and "only a has no role" in r.summary()
    one = circuit_overlap(bare, replace(B, roles={}), cutoffs=())
    assert one.stages == ("no role",) and int(one.shared[0]) == 4


def test_planted_circuits_share_the_planted_heads() -> None:
    """One model, two tasks: the previous-token head serves both, the heads that read the answer do not."""
    precedes, follows = (c for _, c in organisms.hand_built("shared_head").parts)
    r = circuit_overlap(precedes, follows, cutoffs=())
    both = [e[:2] for e in r.entries if e[2] == "both"]
    assert both == [("previous", "L0H4")] and r.one_sided == {"a": ("behind",), "b": ("before",)}
    assert r.nodes == (3, 3, 3) and r.edges[0] == 2  # the embeddings, and the edges from them to that head


def test_random_circuits_share_what_chance_says() -> None:
    """No discovery where there is nothing: p under 0.05 in at most 5 % of pairs of random circuits (300 pairs, 4 s.e.)."""
    pick, pool, low = random.Random(5), [(i, h) for i in range(6) for h in range(8)], [0, 0]
    for _ in range(300):
        a, b = ([set(pick.sample(pool, k)) for k in (4, 6)] for _ in range(2))
        found = _measured(a, b, (6, 8))
        low[0] += found["p"] <= 0.05
        low[1] += found["layer_p"] <= 0.05
    assert all(count <= 15 + 4 * math.sqrt(300 * 0.05 * 0.95) for count in low) and low[0] > 0


def test_a_result_is_a_result(tmp_path) -> None:
    r = circuit_overlap(scored(A), scored(B, 1), cutoffs=(0.05, 0.1))
    again = store.load(store.save(r, tmp_path))
    assert again.summary() == r.summary() and again.to_frame().equals(r.to_frame()) and again.identity == r.identity
    assert list(r.figures()) == ["By stage", "By cut-off"] and r.plot().layout.title.text
    with pytest.raises(InputError, match="per must be left out"):
        r.to_frame("prompt")


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"circuit a is of a model with .* \(3, 5, 5\), circuit b of one with \(4, 5, 5\)"):
        circuit_overlap(A, Circuit.of((4, 5, 5), {"mover": "L0H0.z@END"}))
    for empty in (A - A, Circuit.of(MODEL, {"input": "embed@END"})):
        with pytest.raises(InputError, match="circuit b has no attention heads"):
            circuit_overlap(A, empty)
    for bad in (0.0, -0.1, 1.5, math.nan, "0.1", True):
        with pytest.raises(InputError, match="a cut-off is a share of all heads"):
            circuit_overlap(A, B, cutoffs=(0.1, bad))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the circuit a of circuit_overlap is a str, expected a Circuit, or a result .*; Circuit.load"):
        circuit_overlap("circuit.json", B)  # type: ignore[arg-type]


def test_cut_off_one_takes_all_heads() -> None:
    a = every_head((3, 5), "mover", {})
    r = circuit_overlap(a, a, cutoffs=(1.0,))
    assert r.shared.tolist() == [15, 15] and torch.allclose(r.p, torch.ones(2, dtype=torch.float64))
