"""Text forms of places in a model: every value reads back as itself, and nothing else is taken for one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from interp.errors import InputError
from interp.sites import ACTIVATIONS, COMPONENTS, HEAD_WEIGHTS, PER_HEAD, WEIGHTS, HeadGroup, Heads, Site, parse_sites

GLOBAL = ("embed", "W_E", "W_pos", "W_U", "b_U", "ln_final", "b_ln_final")
POSITIONS = (None, "END", "S1+1", "subject_end", "_x", "a-b", 0, 7, -1, -12)


def random_site(draws: random.Random) -> Site:
    if draws.random() < 0.15:
        return Site("svd", draws.randrange(40), draws.randrange(30), draws.choice(POSITIONS), draws.randrange(12))
    component = draws.choice(COMPONENTS)
    layer = None if component in GLOBAL else draws.choice([0, 1, 9, 10, 103])
    head = draws.choice([None, 0, 5, 31]) if component in (*PER_HEAD, *HEAD_WEIGHTS) else None
    return Site(component, layer, head, None if component in WEIGHTS else draws.choice(POSITIONS))


def test_sites_read_back_as_themselves():
    draws = random.Random(0)
    seen = {}
    for _ in range(3000):
        site = random_site(draws)
        text = str(site)
        assert Site.parse(text) == site == Site.parse(f"  {text} ") and Site.parse(site) is site
        assert hash(Site.parse(text)) == hash(site)
        assert seen.setdefault(text, site) == site, "two sites have one text"
    assert len(set(seen.values())) == len(seen) > 500


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("L3.resid_post", Site("resid_post", 3)),
        ("L9H6.z@END", Site("z", 9, 6, "END")),
        ("L9H6.z@-2", Site("z", 9, 6, -2)),
        ("L0.pattern@4", Site("pattern", 0, None, 4)),
        ("L2.W_in", Site("W_in", 2)),
        ("L2H1.W_O", Site("W_O", 2, 1)),
        ("W_U", Site("W_U")),
        ("embed@0", Site("embed", None, None, 0)),
        ("L8H10.1", Site("svd", 8, 10, None, 1)),
        ("L8H10.1@END", Site("svd", 8, 10, "END", 1)),
    ],
)
def test_the_forms_of_a_site(text, site):
    assert Site.parse(text) == site and str(site) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a site"),
        ("resid_post", "resid_post needs a layer, as in L0.resid_post"),
        ("L3", "is not a site"),
        ("L3.", "is not a site"),
        ("L3..z", "is not a site"),
        ("L-1.z", "is not a site"),
        ("L3H-1.z", "is not a site"),
        ("3.resid_post", "is not a site"),
        ("L3.resid_pst", "unknown component 'resid_pst'; known: resid_pre"),
        ("L3H1.resid_post", "resid_post has no heads; a head fits q, k, v, z, pattern, result, W_Q"),
        ("L3H1.mlp_post", "mlp_post has no heads"),
        ("L3.W_U", "W_U takes no layer"),
        ("L3.embed", "embed takes no layer"),
        ("W_Q", "W_Q needs a layer, as in L0.W_Q"),
        ("L3.W_in@END", "W_in is a weight and has no position"),
        ("L3.4", "an SVD component needs a layer and a head, as in L8H10.1"),
        ("L3H2.svd", "'svd', and only such a site"),
        ("L3.z@", "is not a site"),
        ("L3.z@1.5", "position '1.5' is neither a name such as END nor an integer"),
        ("L3.z@END@END", "position 'END@END' is neither"),
        ("L3.z,L4.z", "is not a site"),
    ],
)
def test_what_is_no_site(text, message):
    with pytest.raises(InputError, match=message) as error:
        Site.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Site("z", -1), "layer -1 of a site is negative; layers count from 0"),
        (lambda: Site("z", 1, -1), "head -1 of a site is negative"),
        (lambda: Site("svd", 1, 1, None, -3), "rank -3 of a site is negative"),
        (lambda: Site("z", 1, 2, None, 3), "the component 'svd', and only such a site"),
        (lambda: Site("z", 1, 2, "two words"), "position 'two words' is neither"),
        (lambda: Site("z", 1, 2, "END; L1H1"), "is neither a name such as END nor an integer"),
    ],
)
def test_sites_that_no_text_could_name_are_refused(make, message):
    """A negative head would pass every range check and pick the last head."""
    with pytest.raises(InputError, match=message):
        make()


def test_a_position_in_digits_is_a_number():
    assert Site("z", 1, 2, "4") == Site("z", 1, 2, 4) == Site("z", np.int64(1), 2, "04")
    assert Site("z", 1).at("-1").position == -1 and Site("z", 1, 0, 3).at(None) == Site("z", 1, 0)


def test_kinds_of_components():
    assert all(Site(c, None if c in GLOBAL else 0).is_weight == (c in WEIGHTS) for c in COMPONENTS)
    assert {c for c in ACTIVATIONS if Site(c, None if c == "embed" else 0).per_head} == {"q", "k", "v", "z", "pattern", "result"}
    assert not set(ACTIVATIONS) & set(WEIGHTS)


def test_one_site_or_several():
    assert parse_sites("L0.z") == parse_sites(Site("z", 0)) == parse_sites(["L0.z"]) == [Site("z", 0)]
    assert parse_sites(("L0.z", Site("W_U"))) == [Site("z", 0), Site("W_U")] and parse_sites([]) == []


def test_heads_read_back_as_themselves():
    draws = random.Random(1)
    for _ in range(500):
        groups = []
        for _ in range(draws.randrange(1, 4)):
            heads = tuple({(draws.randrange(12), draws.randrange(12)) for _ in range(draws.randrange(1, 5))})
            groups.append(HeadGroup(heads, draws.choice(POSITIONS), draws.choice([None, "movers", "S_inhibition2"])))
        heads = Heads(tuple(groups))
        assert Heads.parse(str(heads)) == heads and Heads.parse(heads) is heads
        assert len(heads) == len(groups) == len(list(heads))
        assert [(s.layer, s.head, s.position) for s in heads.sites("q")] == [(a, b, g.position) for g in groups for a, b in g.heads]


def test_the_forms_of_heads():
    heads = Heads.parse("movers=L9H6, L9H9@END ;L7H3@S2;  L0H1")
    assert heads == Heads((HeadGroup(((9, 6), (9, 9)), "END", "movers"), HeadGroup(((7, 3),), "S2"), HeadGroup(((0, 1),))))
    assert str(heads) == "movers=L9H6,L9H9@END; L7H3@S2; L0H1"
    assert heads.sites() == [Site("z", 9, 6, "END"), Site("z", 9, 9, "END"), Site("z", 7, 3, "S2"), Site("z", 0, 1)]
    assert Heads.of([(1, 2)], "END", "a") == Heads.parse("a=L1H2@END")
    assert HeadGroup(((1, 2),), "3") == HeadGroup(((1, 2),), 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heads.parse(""), "'' names no heads; write L9H6,L9H9@END; L7H3@S2"),
        (lambda: Heads.parse("L9H6;"), "'' names no heads"),
        (lambda: Heads.parse("L9"), "'L9' names no heads"),
        (lambda: Heads.parse("L9H6.z"), "'L9H6.z' names no heads"),
        (lambda: Heads.parse("L9H6,L9H6"), "a head appears twice in L9H6,L9H6"),
        (lambda: Heads.parse("1st=L9H6"), "'1st' is not a name for a group of heads"),
        (lambda: Heads.parse("L9H6@END,L9H9"), "position 'END,L9H9' is neither"),
        (lambda: Heads(()), "no heads were given"),
        (lambda: Heads.of([]), "a group of heads needs at least one head"),
        (lambda: Heads.of([(1, -2)]), "negative layer or head"),
        (lambda: Heads.of([(1, 2)], "two words"), "position 'two words' is neither"),
        (lambda: Heads.of([(1, 2)], name="two words"), "'two words' is not a name"),
    ],
)
def test_what_names_no_heads(make, message):
    with pytest.raises(InputError, match=message):
        make()
