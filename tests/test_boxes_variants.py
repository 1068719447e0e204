"""The boxes told in other ways: what is said, what the positions name, and what stays as in ``boxes``."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from small_tokenizers import FITTING, Reader, tokenizer

from interp.errors import InputError
from interp.models import HookedModel
from interp.prompts import PromptPairs
from interp.tasks import task
from interp.tasks.boxes_variants import AFTER, BEFORE, Kind

KINDS = get_args(Kind)


def literal(kind: str, text: str) -> tuple[list[tuple[str, str]], str]:
    """(object, label) of every segment and the letter asked for, read off the text by a pattern of its own; what was added is dropped."""
    if kind == "text_before":
        assert text.startswith(BEFORE)
        text = text.removeprefix(BEFORE)
    if kind == "text_after":
        assert text.count(AFTER) == 1
        text = text.replace(AFTER, "")
    listed, query = text.split(". ")
    asked = re.fullmatch(r"Box ([A-Z]) contains the", query)
    assert asked and listed[0].isupper() and text.count(". ") == 1
    parts = re.split(r" (?=the )", listed) if kind == "no_commas" else re.split(r", (?=the |[Tt]he |Box )", listed)
    found, extra = [], 0
    for part in parts:
        plain = re.fullmatch(r"[Tt]he (\w+) is in Box ([A-Z])", part)
        other = {
            "words_between": r"[Tt]he (\w+) is still there in the big Box ([A-Z])",
            "comma_after_object": r"[Tt]he (\w+), is in Box ([A-Z])",
            "not_in_target": r"[Tt]he (\w+) is not in Box ([A-Z])",
        }.get(kind)
        if kind == "boxes_before_target" and re.fullmatch(r"Box [A-Z]", part):
            extra += 1
            continue
        turned = re.fullmatch(r"Box ([A-Z]) contains the (\w+)", part) if kind == "reordered_target" else None
        told = re.fullmatch(other, part) if other else None
        if kind in ("words_between", "comma_after_object"):
            assert told
        match = told or plain
        assert turned or match, part
        pair = (turned[2], turned[1]) if turned else (match[1], match[2])  # type: ignore[index]
        if kind in ("not_in_target", "reordered_target"):
            assert bool(told or turned) == (pair[1] == asked[1])
        found.append(pair)
    assert extra == (3 if kind == "boxes_before_target" else 0)
    return found[kind == "segment_before" : len(found) - (kind == "segment_after")], asked[1]


@pytest.mark.parametrize("n_boxes", [3, 7, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_of_each(kind: Any, n_boxes: int) -> None:
    plain = task("boxes", n_boxes=n_boxes, corrupt="position").examples(100, 4)
    for i, e in enumerate(task("boxes_variants", kind=kind, n_boxes=n_boxes).examples(100, 4)):
        assert e.text == plain[i].text and e.answer == plain[i].answer and e.distractor == plain[i].distractor
        was = plain[i].corrupt
        assert e.corrupt is not None and was is not None
        pairs, asked = literal(kind, e.corrupt.text)
        assert literal("plain", was.text) == (pairs, asked) and len(pairs) == n_boxes
        assert e.corrupt.answer == f" {dict((x, o) for o, x in pairs)[asked]}" == was.answer
        segment = [x for _, x in pairs].index(asked)
        own, _ = literal("plain", e.text)
        assert e.distractor == f" {own[segment][0]}" and e.corrupt.tags == {"segment": str(segment + 1), "kind": kind}
        names = [w for text in (e.text, e.corrupt.text) for w in re.findall(r"(?:the|The) (\w+),? is", text)]
        assert len(set(names)) == len(names) and e.context == plain[i].context
        for span, word in ((f"object{k}", o) for k, (o, _) in enumerate(pairs, 1)):
            assert e.corrupt.text[slice(*e.corrupt.spans[span][0])] == word


@pytest.mark.parametrize("told", ["clean", "both"])
def test_the_other_side_can_be_told_so(told: Any) -> None:
    for kind in KINDS:
        for e in task("boxes_variants", kind=kind, told=told).examples(20, 1):
            assert e.corrupt is not None
            own, asked = literal(kind, e.text)
            assert e.answer == f" {dict((x, o) for o, x in own)[asked]}" and e.tags["kind"] == kind
            literal(kind if told == "both" else "plain", e.corrupt.text)


def test_following_the_next_segment() -> None:
    same = task("boxes_variants(n_boxes=3)").examples(60)
    other = task("boxes_variants(n_boxes=3, follows=next)").examples(60)
    for a, b in zip(same, other, strict=True):
        assert a.corrupt is not None and b.corrupt is not None and a.text == b.text and a.corrupt.text == b.corrupt.text
        at, asked, step = a.options.index(a.distractor or ""), a.options.index(a.answer), 1
        step = 2 if (at + 1) % 3 == asked else 1
        assert b.distractor == a.options[(at + step) % 3] != b.answer


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("kind", KINDS)
def test_positions_decode_to_their_words(kind: Any, name: str) -> None:
    reader = Reader(tokenizer(name))
    given = task("boxes_variants", kind=kind, told="both", n_boxes=4).generate(reader, 8, seed=2)
    assert isinstance(given, PromptPairs) and given.answers is not None
    decoded(given, reader, kind)


def decoded(given: PromptPairs, reader: Any, kind: str) -> None:
    for side in (given.clean, given.corrupt):
        for row, text in enumerate(side.texts):
            pairs, asked = literal(kind, text)

            def words(place: str, row: int = row, side: Any = side) -> list[str]:
                return [reader.tokenizer.decode([side.ids[row][t]]).strip() for t in side.positions[place][row]]

            for k, (thing, letter) in enumerate(pairs, 1):
                assert words(f"object{k}") == [thing] and words(f"label{k}") == [letter]
            assert words("objects") == [o for o, _ in pairs] and words("labels") == [x for _, x in pairs]
            assert words("query_label") == words("previous_query_label") == [asked]
            assert words("target") == [o for o, x in pairs if x == asked] and words("END") == ["the"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_models_know_every_word(kind: Any) -> None:
    """Only "Box" at the beginning of a text is two tokens: it never stood there when they were trained."""
    model = HookedModel.load("base")
    given = task("boxes_variants", kind=kind, told="both").generate(model, 20, seed=2)
    assert isinstance(given, PromptPairs)
    decoded(given, model, kind)
    for text, ids in zip(given.clean.texts, given.clean.ids, strict=True):
        assert len(ids) == len(re.findall(r"\w+|[.,]", text)) + text.startswith("Box")


def test_bad_options() -> None:
    for text, said in (("kind=upside_down", "kind"), ("n_boxes=2", "3 to 10"), ("n_boxes=11", "3 to 10"), ("told=none", "told")):
        with pytest.raises(InputError, match=said):
            task(f"boxes_variants({text})")
