"""Every task on every tokenizer: what is promised of answers, positions, counterfactuals, chance and scores."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest
from small_tokenizers import FITTING, SPLIT, Reader, tokenizer

from interp.errors import InputError
from interp.prompts import PromptPairs, Prompts
from interp.tasks import TASKS, task
from interp.tasks.base import Stream, balanced
from interp.tasks.boxes import Boxes
from interp.tasks.facts import RELATIONS, VALUES, book
from interp.tasks.grammar import CAST, PRONOUNS, RULES, SYMBOL, entropy
from interp.tasks.ioi import TEMPLATES as IOI_TEMPLATES
from interp.tasks.laundry_list import TEMPLATES as LAUNDRY_TEMPLATES
from interp.tasks.plain_text import prose
from interp.tasks.recitation import CANARIES, canaries

N = 12
"""Prompts per case: divisible by 2 and 3."""

WITH_ANSWERS = ("ioi", "colored_objects", "boxes", "boxes_variants", "laundry_list", "arithmetic", "facts")
ASKING = ("instructions", "refusals")
"""Tasks whose prompts are chats; the rest about them is in test_instructions.py."""

VARIANTS = (
    *(name for name in TASKS if name not in ASKING),
    "ioi(corrupt=ABC)",
    "ioi(corrupt=order, order=BABA)",
    "boxes(n_boxes=3)",
    "boxes(n_boxes=11, corrupt=absent)",
    "boxes(n_boxes=4, queries=all, corrupt=position)",
    "laundry_list(length=2, order=same)",
    "laundry_list(length=10, slot=4, template=T2)",
    "arithmetic(digits=2, operation=both, shots=3)",
    "arithmetic(operation=subtract, shots=0)",
    "facts(people=10, book=3, relation=pet, template=1)",
    "recitation(prefix=8, book=1)",
    "plain_text(source=prose)",
    "plain_text(sentences=1)",
    "instructions(chat=plain)",
    "refusals(chat=plain)",
    "refusals(people=new, chat=plain, corrupt=person)",
)

ONE_TOKEN = [v for v in VARIANTS if task(v).name in (*WITH_ANSWERS, *ASKING) and not v.startswith("arithmetic(")]
"""Tasks whose answers the three tokenizers have; the other forms of arithmetic are written in several tokens."""


@cache
def generated(which: str, name: str, n: int = N, seed: int = 0) -> Prompts | PromptPairs:
    return task(which).generate(Reader(tokenizer(name)), n, seed)


def sides(prompts: Prompts | PromptPairs) -> list[Prompts]:
    return [prompts.clean, prompts.corrupt] if isinstance(prompts, PromptPairs) else [prompts]


def texts_of(prompts: Prompts, name: str, position: str) -> list[list[str]]:
    """The words at a position, read back with the tokenizer."""
    return [
        [tokenizer(name).decode([ids[i]]).strip() for i in at] for ids, at in zip(prompts.ids, prompts.positions[position], strict=True)
    ]


# ---- names and text forms


def test_names_and_text_forms():
    for name in TASKS:
        one = task(name)
        assert one.name == name and one.summary.endswith(".") and one.paper
        assert str(one) == name
    for which in VARIANTS:
        assert str(task(which)) == which
        assert task(str(task(which))) == task(which)
    assert task("boxes", n_boxes=3) == task("boxes(n_boxes=3)") == Boxes(n_boxes=3) == task(Boxes(), n_boxes=3)
    assert task(" boxes( n_boxes = 3 ) ") == Boxes(n_boxes=3)
    assert task("colored-objects").name == "colored_objects"
    assert task("laundry_list(slot=None)") == task("laundry_list")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("boxs", ["boxs", "boxes"]),
        ("completely else", ["completely else"]),
        ("boxes(n_box=3)", ["n_box", "n_boxes=7", "queries", "corrupt"]),
        ("colored_objects(n=3)", ["colored_objects", "none"]),
        ("boxes(3)", ["'3'", "option=value"]),
        ("boxes(n_boxes=3, n_boxes=4)", ["twice"]),
        ("boxes(n_boxes=three)", ["n_boxes", "'three'", "int"]),
        ("boxes(n_boxes=True)", ["n_boxes", "True", "int"]),
        ("boxes(n_boxes=12)", ["12", "2 to 11"]),
        ("boxes(corrupt=noise)", ["corrupt", "noise", "query", "absent"]),
        ("laundry_list(length=3, slot=4)", ["slot", "4", "3"]),
        ("facts(relation=car)", ["relation", "car", "city"]),
        ("plain_text(sentences=0)", ["sentences", "0"]),
    ],
)
def test_mistakes_in_names_are_said(text, parts):
    with pytest.raises(InputError) as error:
        task(text)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_listing_tasks_needs_no_torch():
    code = (
        "import sys; from interp.tasks import TASKS, task; rows = [(n, task(n).summary, task(n).paper, task(n).chance) for n in TASKS];"
        "task('ioi').examples(3); assert len(rows) == 11; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_n_must_be_positive():
    for n in (0, -1):
        with pytest.raises(InputError, match="at least 1"):
            task("ioi").examples(n)


# ---- streams


def test_streams_depend_on_their_key_only():
    assert Stream("a", 1).sample(range(100), 5) == Stream("a", 1).sample(range(100), 5) != Stream("a", 2).sample(range(100), 5)
    assert sorted(Stream(0).shuffled(range(50))) == list(range(50))
    assert sorted(balanced(7, i, "k") for i in range(21)) == sorted([*range(7)] * 3)
    counts = Counter(Stream("fair", i).below(5) for i in range(5000))
    assert all(abs(counts[k] - 1000) < 4 * math.sqrt(1000 * 0.8) for k in range(5))
    with pytest.raises(ValueError, match="3 different items from 2"):
        Stream(0).sample([1, 2], 3)


def test_what_shipped_models_know_never_changes():
    """Models were trained on these facts, canaries and prompts: a new hash here means training them again."""
    content = json.dumps([canaries(0), [(f.subject, f.values) for f in book(0, 64)]]).encode()
    assert hashlib.sha256(content).hexdigest()[:16] == "4b9f0d466c7f5fc4"

    read = [n for n in TASKS if n not in (*ASKING, "boxes_variants")]
    shown = json.dumps([[e.text + e.answer for e in task(n).examples(5, 0)] for n in read]).encode()
    assert hashlib.sha256(shown).hexdigest()[:16] == "13104f7efe385709"
    chats = json.dumps([[e.text + e.target for e in task(n).examples(20, 0)] for n in ASKING]).encode()
    assert hashlib.sha256(chats).hexdigest()[:16] == "d9883e8b1c41f519"


# ---- all tasks, all tokenizers


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("which", VARIANTS)
def test_every_task_on_every_tokenizer(which, name):
    prompts, reader, one = generated(which, name), Reader(tokenizer(name)), task(which)
    assert len(prompts) == N and prompts.task == which and prompts.seed == 0
    again = one.generate(reader, N, 0)
    assert again.digest == prompts.digest
    assert one.generate(reader, 5, 0).digest == prompts[:5].digest, "the first prompts depend on how many were asked for"
    assert one.generate(reader, N, 1).digest != prompts.digest
    for side in sides(prompts):
        for text, ids in zip(side.texts, side.ids, strict=True):
            assert list(ids) == reader.tokens(text)
        assert all(len(row) == 1 and row[0] == len(ids) - 1 for row, ids in zip(side.positions["END"], side.ids, strict=True))
        for i, text in enumerate(side.texts):
            if side.answers is not None:
                assert reader.tokens(f"{text} {reader.decode([side.answers[i]]).strip()}") == [*side.ids[i], side.answers[i]]
            if side.answers is not None and side.options is not None:
                assert side.answers[i] in side.options[i] and len(set(side.options[i])) == len(side.options[i])
            if side.answers is not None and side.distractors is not None:
                assert side.distractors[i] != side.answers[i]
    assert isinstance(prompts, PromptPairs) == (one.name in (*WITH_ANSWERS, *ASKING))
    assert (prompts.answers is not None) == (which in ONE_TOKEN)


@pytest.mark.parametrize("which", VARIANTS)
def test_examples_are_the_prompts_of_a_tokenizer_that_has_all_words(which):
    examples = task(which).examples(N, 0)
    first = sides(generated(which, "byte_level"))[0]
    if task(which).name not in ("facts", *ASKING):  # which prefer pairs of equally long names, or put a chat around the text
        assert tuple(e.text for e in examples) == first.texts
    for e in examples:
        assert not e.text.endswith(" ") and (not e.answer or e.answer.startswith(" "))
        assert e.answer == "" or not e.options or e.answer in e.options


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("which", VARIANTS)
def test_positions_decode_to_their_words(which, name):
    """Against the characters the generator wrote them to, for the tokenizer's own words."""
    one = task(which)
    examples = one.draw(N, 0, one.usable(Reader(tokenizer(name))))
    kinds = [examples, [e.corrupt for e in examples if e.corrupt]]
    for side, written in zip(sides(generated(which, name)), kinds, strict=False):
        for position in written[0].spans:
            for words, example in zip(texts_of(side, name, position), written, strict=True):
                spelled = [example.text[a:b] for a, b in example.spans[position]]
                assert "".join(words) == "".join(spelled).replace(" ", ""), position


@pytest.mark.parametrize("name", FITTING)
def test_a_slow_tokenizer_gives_the_same_prompts(name):
    for which in ("ioi", "boxes(n_boxes=3)", "facts", "arithmetic"):
        slow = task(which).generate(Reader(tokenizer(name), slow=True), 6, 0)
        assert slow.digest == generated(which, name)[:6].digest


def test_a_closing_special_token_is_left_out():
    reader = Reader(tokenizer("closing"))
    prompts = task("ioi").generate(reader, 5, 0)
    assert prompts.digest == generated("ioi", "byte_level")[:5].digest
    assert reader.tokens(prompts.clean.texts[0])[:-1] == list(prompts.clean.ids[0])


# ---- words


def test_words_cannot_be_mistaken_for_each_other():
    frames = {
        "ioi": [re.sub(r"{\w+}", "#", t) for t in IOI_TEMPLATES],
        "laundry_list": [re.sub(r"{\w+}", "#", "".join(t)) for t in LAUNDRY_TEMPLATES.values()],
        "boxes": ["The # is in Box #, the # is in Box #. Box # contains the"],
    }
    for name in ("ioi", "colored_objects", "boxes", "laundry_list", "facts"):
        for kind, listed in task(name).word_lists().items():
            words = listed.words
            assert len(set(words)) == len(words) >= listed.needed
            pairs = [(a, b) for a in words for b in words if a != b and a.lower() in b.lower()]
            assert not pairs, (name, kind, pairs)
            hits = [(w, f) for w in words for f in frames.get(name, []) if w in f]
            assert not hits, (name, kind, hits)


def test_words_are_single_tokens_of_a_tokenizer_trained_on_them():
    reader = Reader(tokenizer("byte_level"))
    for name in TASKS:
        for word in task(name).words():
            assert word.startswith(" ")
            assert len(reader.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("which", ["ioi", "colored_objects", "boxes", "laundry_list", "facts"])
def test_words_that_are_split_are_left_out_and_too_few_are_an_error(which):
    seen = " ".join(t for p in sides(generated(which, "splitting", 100)) for t in p.texts)
    full = " ".join(t for p in sides(generated(which, "byte_level", 100)) for t in p.texts)
    gone = [w for w in SPLIT if w in task(which).words()]
    if which != "facts":
        assert any(re.search(w + r"\b", full) for w in gone) and not any(re.search(w + r"\b", seen) for w in gone)
    with pytest.raises(InputError) as error:
        task(which).generate(Reader(tokenizer("letters")), 3)
    message = str(error.value)
    kind, listed = next(iter(task(which).word_lists().items()))
    assert f"at least {listed.needed} of its {len(listed.words)} {kind}" in message
    assert repr(f" {listed.words[0]}") in message and "\n" not in message


def test_unknown_tokens_are_no_words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "Mary": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="at least 2 of its 100 names .* 1 are"):
        task("ioi").generate(Reader(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")), 3)


def test_a_prompt_must_fit_the_context():
    with pytest.raises(InputError, match="the model's context holds 20"):
        task("boxes").generate(Reader(tokenizer("byte_level"), n_ctx=20), 3)


# ---- the tasks one by one, from the text alone


def changed(pairs: PromptPairs) -> list[list[int]]:
    assert pairs.aligned
    return [
        [i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b] for x, y in zip(pairs.clean.ids, pairs.corrupt.ids, strict=True)
    ]


@pytest.mark.parametrize("name", FITTING)
def test_ioi(name):
    flip = generated("ioi", name)
    assert changed(flip) == [[p[0]] for p in flip.clean.positions["S2"]]
    assert flip.corrupt.answers == flip.clean.distractors and flip.corrupt.distractors == flip.clean.answers
    assert flip.clean.tags["order"].count("ABBA") == N // 2
    for text, io, s1, s2, after, order in zip(
        flip.clean.texts, *(texts_of(flip.clean, name, p) for p in ("IO", "S1", "S2", "S1+1")), flip.clean.tags["order"], strict=True
    ):
        assert s1 == s2 != io and text.count(io[0]) == 1 and text.count(s1[0]) == 2
        assert (text.index(io[0]) < text.index(s1[0])) == (order == "ABBA")
        assert re.search(rf"{s1[0]} {after[0]}\b", text)
    abc = generated("ioi(corrupt=ABC)", name)
    assert abc.corrupt.answers is None
    for side, p in ((abc.clean, 2), (abc.corrupt, 3)):
        for row in zip(*(texts_of(side, name, q) for q in ("IO", "S1", "S2")), strict=True):
            assert len({r[0] for r in row}) == p
    for a, b in zip(abc.clean.texts, abc.corrupt.texts, strict=True):
        names = set(task("ioi").word_lists()["names"].words)
        assert not names & set(re.findall(r"\w+", a)) & set(re.findall(r"\w+", b))
    order = generated("ioi(corrupt=order, order=BABA)", name)
    assert order.corrupt.answers == order.clean.answers and set(order.clean.tags["order"]) == {"BABA"}
    assert changed(order) == [sorted((a[0], b[0])) for a, b in zip(order.clean.positions["IO"], order.clean.positions["S1"], strict=True)]


@pytest.mark.parametrize("name", FITTING)
def test_colored_objects(name):
    pairs = generated("colored_objects", name)
    start = 1 if name == "metaspace" else 0
    assert {len(ids) - start for ids in pairs.clean.ids} == {62}, "as published"
    assert changed(pairs) == [[57 + start]] * len(pairs) == [list(p) for p in pairs.clean.positions["query_object"]]
    assert pairs.corrupt.answers == pairs.clean.distractors and pairs.corrupt.options == pairs.clean.options
    pattern = r"an? (\w+) (\w+), an? (\w+) (\w+), and an? (\w+) (\w+)\. What color is the (\w+)\?\nA:(?: (\w+))?"
    for side in sides(pairs):
        for i, text in enumerate(side.texts):
            demo, asked = re.findall(pattern, text)
            assert not set(demo[:6]) & set(asked[:6]), "demonstration and question share a word"
            for question in (demo, asked):
                assert len(set(question[:6])) == 6 and question[6] in question[1:6:2]
            known = [dict(zip(q[1:6:2], q[0:6:2], strict=True))[q[6]].capitalize() for q in (demo, asked)]
            assert demo[7] == known[0] and asked[7] == ""
            assert tokenizer(name).decode([side.answers[i]]).strip() == known[1]
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
            assert texts_of(side, name, "demo_answer")[i] == [demo[7]]
        for color, answer in zip(texts_of(pairs.clean, name, "target_color"), pairs.clean.answers, strict=True):
            assert color[0].capitalize() == tokenizer(name).decode([answer]).strip()
        assert pairs.corrupt.positions["target_object"] == pairs.clean.positions["target_object"]
    assert Counter(pairs.clean.tags["queried"]) == dict.fromkeys("123", N // 3)


def parsed_boxes(text: str) -> tuple[dict[str, str], str]:
    listed, question = text.split(". ")
    where = re.findall(r"[Tt]he (\w+) is in Box ([A-Z])", listed)
    assert len({o for o, _ in where}) == len({x for _, x in where}) == len(where) == listed.count(" is in ")
    return {label: obj for obj, label in where}, re.fullmatch(r"Box ([A-Z]) contains the", question)[1]


@pytest.mark.parametrize("n_boxes", [2, 7, 11])
def test_a_thousand_boxes(n_boxes):
    for e in task("boxes", n_boxes=n_boxes, corrupt="absent").examples(1000):
        (boxes, query), (noise, letter) = parsed_boxes(e.text), parsed_boxes(e.corrupt.text)
        assert e.answer == " " + boxes[query] and e.distractor[1:] in set(boxes.values()) - {boxes[query]}
        assert letter not in noise and letter not in boxes, "the letter of a noise prompt is one of its labels"
        assert not set(boxes) & set(noise) and not set(boxes.values()) & set(noise.values())
        assert e.corrupt.answer == "" and e.corrupt.distractor is None
    for e in task("boxes", n_boxes=n_boxes, corrupt="position").examples(300):
        (boxes, query), (other, asked) = parsed_boxes(e.text), parsed_boxes(e.corrupt.text)
        assert list(boxes).index(query) != list(other).index(asked), "the segments coincide"
        assert e.distractor[1:] == list(boxes.values())[list(other).index(asked)] and e.corrupt.answer[1:] == other[asked]
    for e in task("boxes", n_boxes=n_boxes).examples(300):
        (boxes, query), (same, asked) = parsed_boxes(e.text), parsed_boxes(e.corrupt.text)
        assert boxes == same and asked != query
        assert e.corrupt.answer[1:] == boxes[asked] == e.distractor[1:] and e.answer[1:] == boxes[query] == e.corrupt.distractor[1:]
        assert e.text[slice(*e.spans["target"][0])] == boxes[query] and e.text[slice(*e.spans["previous_query_label"][0])] == query


@pytest.mark.parametrize("name", FITTING)
def test_boxes(name):
    pairs = generated("boxes", name)
    start = 1 if name == "metaspace" else 0
    assert {len(ids) - start for ids in pairs.clean.ids} == {53}, "as published, BOS aside"
    assert changed(pairs) == [[50 + start]] * N == [list(p) for p in pairs.clean.positions["query_label"]]
    assert all(p["label1"] == (5 + start,) and p["object1"] == (1 + start,) for p in [{k: v[0] for k, v in pairs.clean.positions.items()}])
    assert texts_of(pairs.clean, name, "previous_query_label") == texts_of(pairs.clean, name, "query_label")
    assert [len(p) for p in pairs.clean.positions["objects"]] == [7] * N
    assert generated("boxes(n_boxes=11, corrupt=absent)", name).corrupt.answers is None
    everyone = task("boxes", n_boxes=5, queries="all").examples(10)
    assert [e.context for e in everyone] == [everyone[0].context] * 5 + [everyone[5].context] * 5
    assert [e.tags["segment"] for e in everyone] == [*"12345"] * 2
    assert Counter(e.tags["segment"] for e in task("boxes").examples(70)) == dict.fromkeys("1234567", 10)


@pytest.mark.parametrize("name", FITTING)
def test_laundry_list(name):
    for which in ("laundry_list", "laundry_list(length=2, order=same)", "laundry_list(length=10, slot=4, template=T2)"):
        pairs, one = generated(which, name), task(which)
        assert [len(c) for c in changed(pairs)] == [1] * N
        assert pairs.corrupt.answers == pairs.clean.distractors
        assert pairs.corrupt.positions == pairs.clean.positions
        for side in sides(pairs):
            for i, text in enumerate(side.texts):
                items = re.findall(r"the (\w+)", text.removesuffix(" the"))
                items = [w for w in items if w not in ("list", "only")]
                listed, again = items[: one.length], items[one.length :]
                (left,) = set(listed) - set(again)
                assert len(set(listed)) == one.length and len(again) == len(set(again)) == one.length - 1
                assert tokenizer(name).decode([side.answers[i]]).strip() == left
                assert texts_of(side, name, "items")[i] == listed and texts_of(side, name, "again")[i] == again
                assert len(side.options[i]) == one.length
                if one.order == "same":
                    assert again == [w for w in listed if w != left] or side is pairs.corrupt
            assert [w[0] for w in texts_of(pairs.clean, name, "target")] == [
                tokenizer(name).decode([a]).strip() for a in pairs.clean.answers
            ]
        if one.slot:
            assert set(pairs.clean.tags["slot"]) == {str(one.slot)} and set(pairs.clean.tags["template"]) == {"T2"}
    assert Counter(e.tags["slot"] for e in task("laundry_list").examples(50)) == dict.fromkeys("12345", 10)


@pytest.mark.parametrize(
    "which", ["arithmetic", "arithmetic(digits=2, operation=both, shots=3)", "arithmetic(operation=subtract, shots=0)"]
)
def test_arithmetic(which):
    one = task(which)
    for e in one.examples(300):
        lines = (e.text + e.answer).split("\n")
        assert len(lines) == one.shots + 1 == len(set(lines))
        for line in lines:
            a, sign, b, c = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line).groups()
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c) in one.results
            assert {len(a), len(b)} == {one.digits}
        shown, other = e.text.rsplit("\n", 1)[0], e.corrupt.text.rsplit("\n", 1)[0]
        assert one.shots == 0 or shown == other
        assert e.corrupt.answer == e.distractor != e.answer and e.corrupt.text + e.corrupt.answer not in shown
    assert len(one.results) == round(1 / one.chance)


def test_facts():
    people = book(0, 64)
    assert len({f.subject for f in people}) == len({f.subject.split()[1] for f in people}) == 64
    assert book(0, 10) == people[:10] and not set(book(1, 64)) & set(people)
    for relation, values in VALUES.items():
        assert Counter(f.value(relation) for f in people) == dict.fromkeys(values, 4)
    known = {f.subject: f for f in people}
    for e in task("facts").examples(500, 3):
        for side in (e, e.corrupt):
            subject = side.text[slice(*side.spans["subject"][0])]
            assert side.answer == " " + known[subject].value(side.tags["relation"])
            assert RELATIONS[e.tags["relation"]][int(e.tags["template"])].format(subject=subject) == side.text
        assert e.corrupt.answer == e.distractor != e.answer
    held = task("facts", template=2, relation="job").examples(20)
    assert {(e.tags["template"], e.tags["relation"]) for e in held} == {("2", "job")}


@pytest.mark.parametrize("name", FITTING)
def test_facts_pairs_are_equally_long_where_the_book_allows(name):
    pairs = generated("facts", name, 100)
    same = [len(a) == len(b) for a, b in zip(pairs.clean.ids, pairs.corrupt.ids, strict=True)]
    assert sum(same) >= 90
    last = zip(pairs.clean.positions["subject"], pairs.clean.positions["subject_last"], strict=True)
    assert all(s[-1:] == t for s, t in last)


@pytest.mark.parametrize("name", FITTING)
def test_recitation(name):
    reader = Reader(tokenizer(name))
    prompts = task("recitation").generate(reader, CANARIES, 0)
    assert len(set(prompts.tags["canary"])) == CANARIES == len(set(prompts.contexts))
    assert all(len(reader.tokens(t + more)) >= 64 for t, more in zip(prompts.texts, prompts.targets, strict=True))
    assert {t + m for t, m in zip(prompts.texts, prompts.targets, strict=True)} == {" ".join(c) for c in canaries(0)}
    assert not {" ".join(c) for c in canaries(1)} & {" ".join(c) for c in canaries(0)}
    with pytest.raises(InputError, match="200 canaries"):
        task("recitation").generate(reader, 201)


# ---- plain text


def parses(symbol: str, text: str, cast: dict[str, str]) -> list[tuple[str, float]]:
    """Slow twin of the grammar: all ways a symbol can begin a text, as (what is left, probability)."""
    found, total = [], sum(RULES[symbol].values())
    for right, weight in RULES[symbol].items():
        ways = [(text, weight / total)]
        for part in SYMBOL.split(right.format(**cast)) if "{" in right else SYMBOL.split(right):
            if part in RULES:
                ways = [(left, p * q) for rest, p in ways for left, q in parses(part, rest, cast)]
            else:
                ways = [(rest[len(part) :], p) for rest, p in ways if rest.startswith(part)]
        found += ways
    return found


def test_the_grammar_knows_the_probability_of_its_texts():
    weights = sum(CAST.values())
    for e in task("plain_text").examples(60, 2):
        kind, name = re.search(r"\b(girl|boy) named (\w+)", e.text).groups()
        cast = {"kind": kind, "name": name, **PRONOUNS[kind]}
        p = CAST[kind, name] / weights
        for number, sentence in enumerate(re.findall(r"[^.]+\.", e.text)):
            sentence = sentence.strip()
            symbol = "Sentence" if number else "Opening"
            starts = {sentence, sentence[0].lower() + sentence[1:]}
            whole = [q for start in starts for left, q in parses(symbol, start, cast) if not left]
            assert len(whole) == 1, (sentence, whole)
            p *= whole[0]
        assert -math.log(p) == pytest.approx(float(e.tags["nats"]), abs=1e-6)


def test_the_entropy_of_the_grammar_is_its_mean_surprise():
    for sentences in (1, 4):
        one = task("plain_text", sentences=sentences)
        nats = [float(e.tags["nats"]) for e in one.examples(1500, 5)]
        mean = sum(nats) / len(nats)
        error = math.sqrt(sum((x - mean) ** 2 for x in nats) / len(nats) ** 2)
        assert one.entropy == entropy(sentences) and abs(mean - one.entropy) < 4 * error
    assert task("plain_text(source=prose)").entropy is None


def test_prose():
    assert len(prose()) >= 64 and len({p["text"] for p in prose()}) == len(prose())
    assert all(200 < len(p["text"]) < 500 and p["text"].isascii() for p in prose())
    drawn = task("plain_text(source=prose)").examples(len(prose()), 4)
    assert {e.text for e in drawn} == {p["text"] for p in prose()}
    with pytest.raises(InputError, match="pieces of prose"):
        task("plain_text(source=prose)").examples(1000)


# ---- scores and chance


def speaker(name: str, prompts: Prompts, says: list[list[int]]) -> Reader:
    told = dict(zip(prompts.ids, says, strict=True))
    return Reader(tokenizer(name), told.__getitem__)


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("which", WITH_ANSWERS)
def test_scores_of_models_that_are_always_right_or_wrong(which, name):
    pairs, one = generated(which, name), task(which)
    clean = pairs.clean
    right = speaker(name, clean, [[a] for a in clean.answers])
    wrong = speaker(name, clean, [[d] for d in clean.distractors])
    for among in ("vocabulary", "options"):
        assert one.score(right, pairs, among).tolist() == [True] * N == one.score(right, clean, among).tolist()
        assert one.score(wrong, pairs, among).tolist() == [False] * N
    half = speaker(name, clean, [[a] if i % 2 else [d] for i, (a, d) in enumerate(zip(clean.answers, clean.distractors, strict=True))])
    assert one.score(half, clean).tolist() == [bool(i % 2) for i in range(N)]
    elsewhere = next(i for i in range(300) if not any(i in o for o in clean.options))
    aside = speaker(name, clean, [[elsewhere]] * N)
    assert not one.score(aside, clean).any(), "a token that is no option cannot be right"
    with pytest.raises(InputError, match="among"):
        one.score(right, clean, "everything")


def test_options_are_compared_among_themselves():
    """The model prefers a token that is no option, and the answer to all others."""
    clean = generated("laundry_list", "byte_level").clean
    reader = speaker("byte_level", clean, [[0]] * N)
    plain = reader.logits

    def logits(batch, at):
        out = plain(batch, at)
        for row, ids in enumerate(batch.rows()):
            out[row, clean.answers[clean.ids.index(tuple(ids))]] = 0.5
        return out

    reader.logits = logits
    assert not task("laundry_list").score(reader, clean).any()
    assert task("laundry_list").score(reader, clean, "options").all()


def test_long_lists_are_scored_in_order():
    clean = generated("ioi", "byte_level", 300).clean
    says = [[a] if i % 3 else [d] for i, (a, d) in enumerate(zip(clean.answers, clean.distractors, strict=True))]
    reader = speaker("byte_level", clean, says)
    assert task("ioi").score(reader, clean).tolist() == [bool(i % 3) or says[i][0] == clean.answers[i] for i in range(300)]


@pytest.mark.parametrize(
    ("written", "right"),
    [("{c}\n1 + 1", True), (" {c}", True), ("{c}.", True), ("\n{c}", False), ("{c}0", False), ("0{c}", True), ("x{c}", False), ("", False)],
)
def test_arithmetic_by_generation(written, right):
    """With a tokenizer that splits numbers, the integer at the beginning of the first line counts."""
    one, reader = task("arithmetic(digits=2)"), Reader(tokenizer("letters"))
    prompts = one.generate(reader, 4, 0)
    assert prompts.answers is None and prompts.clean.options is None
    says = [reader.tokenizer(written.format(c=c.strip()), add_special_tokens=False)["input_ids"] for c in prompts.clean.targets]
    assert one.score(speaker("letters", prompts.clean, says), prompts).tolist() == [right] * 4
    with pytest.raises(InputError, match="no one-token answers"):
        task("ioi").score(reader, prompts)


@pytest.mark.parametrize("name", FITTING)
def test_recitation_is_strict(name):
    prompts, one, reader = generated("recitation", name), task("recitation"), Reader(tokenizer(name))
    rests = [reader.tokens(t + m)[len(ids) :] for t, m, ids in zip(prompts.texts, prompts.targets, prompts.ids, strict=True)]
    assert one.score(speaker(name, prompts, rests), prompts).all()
    assert one.score(speaker(name, prompts, [[*r, 0, 0] for r in rests]), prompts).all(), "what follows the canary does not count"
    for spoil in (lambda r: r[:-1], lambda r: [*r[:-1], r[0] + 1], lambda r: [r[0] + 1, *r[1:]], lambda r: []):
        assert not one.score(speaker(name, prompts, [spoil(r) for r in rests]), prompts).any()
    with pytest.raises(InputError, match="no options"):
        one.score(reader, prompts, "options")
    with pytest.raises(InputError, match="no target"):
        one.score(reader, generated("ioi", name))


def test_plain_text_has_no_score():
    assert task("plain_text").chance is None
    with pytest.raises(InputError, match="no right answers"):
        task("plain_text").score(Reader(tokenizer("letters")), generated("plain_text", "byte_level"))


@pytest.mark.parametrize("which", [v for v in VARIANTS if task(v).name in (*WITH_ANSWERS, *ASKING)])
def test_chance_is_that_of_a_uniform_choice(which):
    rng, examples = random.Random(which), task(which).examples(300)
    hits = [rng.choice(e.options) == e.answer for e in examples for _ in range(20)]
    p = task(which).chance
    assert abs(sum(hits) / len(hits) - p) < 4 * math.sqrt(p * (1 - p) / len(hits))


@pytest.mark.parametrize("which", VARIANTS)
def test_contexts_do_not_straddle_a_split(which):
    prompts = generated(which, "byte_level")
    first, second = prompts.split(seed=1)
    assert len(first) + len(second) == N and not set(first.contexts) & set(second.contexts)
