"""Prompts as values: tokens and places, splits, digests, files, and the mistakes that are said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_tokenizers import FITTING, Reader, tokenizer

from interp.errors import InputError
from interp.models.batch import Batch
from interp.prompts import PromptPairs, Prompts, read_prompts
from interp.prompts.encoding import answer_tokens, continuations, encode
from interp.prompts.mixed import mixed
from interp.tasks import task

AWKWARD = (
    "two lines\nand a tab\t, and a carriage return\r\nhere",
    "emoji 👩‍👩‍👧 and 日本語, naïve café",
    "<script>alert('x')</script> & \"quotes\" \\ back",
    "line separators \u2028 and \u2029 and \x85 do not end a JSON line",
    " a leading space, and a trailing one ",
    "null \x00 byte",
)


@pytest.fixture(params=FITTING)
def reader(request) -> Reader:
    return Reader(tokenizer(request.param))


@pytest.fixture
def plain() -> Reader:
    return Reader(tokenizer("byte_level"))


def message(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def pairs_of(reader: Reader, n: int = 6) -> PromptPairs:
    found = task("boxes(n_boxes=3, queries=all)").generate(reader, n)
    assert isinstance(found, PromptPairs)
    return found


# ---- texts as tokens


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("text", AWKWARD[:4])
def test_every_character_belongs_to_tokens(text, slow):
    reader = Reader(tokenizer("byte_level"), slow=slow)
    (prompt,) = encode(reader, [text])
    assert list(prompt.ids) == reader.tokens(text) and len(prompt.offsets) == len(prompt.ids)
    for at, character in enumerate(text):
        tokens = prompt.covering((at, at + 1))
        assert tokens, (at, character)
        together = reader.decode([prompt.ids[i] for i in tokens])
        assert character in together
    # Tokens that share a character are whole only together, so the text comes back from any cut between characters.
    assert "".join(dict.fromkeys(text[a:b] + f"\0{a}" for a, b in prompt.offsets)).count("\0") <= len(prompt.ids)


def test_places_of_tokens_are_those_of_a_tokenizer_that_knows_them(reader):
    slow = Reader(reader.tokenizer, slow=True)
    for text in (*task("ioi").examples(1)[0].text.split(". "), AWKWARD[1], "A  b", "Mary, Mary."):
        fast, walked = encode(reader, [text])[0], encode(slow, [text])[0]
        for at, character in enumerate(text):
            if not character.isspace():
                assert fast.covering((at, at + 1)) == walked.covering((at, at + 1)), (text, at)


def test_special_tokens_come_first_and_cover_nothing():
    reader = Reader(tokenizer("metaspace"))
    (prompt,) = encode(reader, ["the store"])
    assert prompt.special == 1 and prompt.offsets[0] == (0, 0) and prompt.covering((0, 3)) == (1,)
    ends = Reader(tokenizer("closing"))
    assert reader.tokenizer.bos_token_id == prompt.ids[0] and ends.tokens("the store")[-1] == 0 != encode(ends, ["the store"])[0].ids[-1]


def test_a_beginning_token_that_the_text_spells_out_counts_once():
    class Never(Reader):
        def tokens(self, text):
            return [i for i in super().tokens(text) if i != self.tokenizer.bos_token_id]

    reader = Never(tokenizer("metaspace"))
    (prompt,) = encode(reader, ["<s>the store"])
    assert prompt.covered(prompt.covering((3, 6))) == "the" and len(prompt.ids) == len(prompt.offsets)


def test_continuations_are_read_in_place(reader):
    (prompt,) = encode(reader, ["walked to the"])
    assert answer_tokens(reader, [prompt], [" store"]) == (reader.tokens("walked to the store")[-1],)
    assert continuations(reader, [prompt], [" store. the"])[0] == tuple(reader.tokens("walked to the store. the")[len(prompt.ids) :])
    said = message(answer_tokens, reader, [prompt], ["store!"])
    assert "store!" in said


def test_text_that_cannot_be_encoded(plain):
    assert "prompt 1 is empty" in message(encode, plain, ["a", ""])
    assert "surrogate" in message(encode, plain, ["a\ud800"])
    assert "prompt 0 is a int" in message(encode, plain, [3])
    assert "prompt 1 has 4 tokens, but the model's context holds 3" in message(
        encode, Reader(plain.tokenizer, n_ctx=3), [" the", " the the the the"]
    )


# ---- values


def test_prompts_of_texts(reader):
    prompts = Prompts.of(reader, ["walked to the", "met at the store, and"], [" store", " the"], [" garden", " a"])
    assert len(prompts) == 2 and prompts.contexts == prompts.texts and prompts.task == "" and prompts.seed is None
    assert [list(row) for row in prompts.ids] == [reader.tokens(t) for t in prompts.texts]
    assert prompts.positions == {"END": tuple((len(row) - 1,) for row in prompts.ids)}
    assert [reader.decode([a]).strip() for a in prompts.answers] == ["store", "the"] and prompts.distractors is not None
    assert Prompts.of(reader, "walked to the").texts == ("walked to the",)
    batch = prompts.batch()
    assert (
        isinstance(batch, Batch)
        and batch.rows() == [list(row) for row in prompts.ids]
        and batch.index("END").tolist() == [len(r) - 1 for r in prompts.ids]
    )


def test_mistakes_in_prompts(plain):
    assert "no prompts" in message(Prompts.of, plain, [])
    assert "2 answers for 1 prompts" in message(Prompts.of, plain, ["to the"], [" store", " garden"])
    said = message(Prompts.of, plain, ["to the"], [" unheard"])
    assert "' unheard' of prompt 0 is 4 tokens (' ', 'un', 'he', 'ard')" in said
    assert "leading space" in message(Prompts.of, plain, ["to the"], ["store"])
    assert "2 entries for 1 prompts" in message(Prompts, ("a",), ((1, 2),), answers=(1, 2))
    assert "position S1 of prompt 0 is [2], but the prompt has 2 tokens" in message(Prompts, ("a",), ((1, 2),), {"S1": ((2,),)})
    assert "'a b' cannot name a position" in message(Prompts, ("a",), ((1, 2),), {"a b": ((0,),)})
    assert "END is the last token" in message(Prompts, ("a",), ((1, 2),), {"END": ((0,),)})


def test_slices(reader):
    pairs = pairs_of(reader)
    for prompts in (pairs, pairs.clean):
        assert prompts[:].digest == prompts.digest == prompts[list(range(6))].digest != prompts[:5].digest
        assert prompts[1:4].digest == prompts[[1, 2, 3]].digest and prompts[-1].digest == prompts[5].digest
        assert len(prompts[2]) == 1 and [p.digest for p in prompts] == [prompts[i].digest for i in range(6)]
        with pytest.raises(IndexError):
            prompts[6]
        assert "no prompt 9" in message(prompts.__getitem__, [0, 9])
        assert "no prompts are left" in message(prompts.__getitem__, slice(6, 9))
        assert "indices" in message(prompts.__getitem__, [True, False, True, False, True, False])
    assert pairs[3].clean.positions["label2"] == pairs.clean.positions["label2"][3:4] and pairs[4].answers == pairs.clean.answers[4:5]


def test_the_digest_is_that_of_the_content(plain):
    base = dict(texts=("a", "b"), ids=((1, 2), (3,)), answers=(5, 6), contexts=("x", "y"), tags={"k": ("1", "2")})
    same = Prompts(**base, task="t", seed=1)
    assert same.digest == Prompts(**base).digest and len(same.digest) == 64
    changes = [
        {"texts": ("a", "c")},
        {"ids": ((1, 2), (4,))},
        {"answers": (5, 7)},
        {"distractors": (1, 2)},
        {"options": ((5, 1), (6,))},
        {"targets": ("", "q")},
        {"contexts": ("x", "x")},
        {"tags": {"k": ("1", "3")}},
        {"positions": {"S1": ((0,), (0,))}},
    ]
    digests = {Prompts(**(base | change)).digest for change in changes} | {same.digest}
    assert len(digests) == len(changes) + 1
    pairs = pairs_of(plain)
    assert PromptPairs(pairs.corrupt, pairs.clean).digest != pairs.digest


def test_splits_keep_contexts_together(plain):
    pairs = pairs_of(plain, 30)
    seen = set()
    for seed in range(6):
        for fraction, groups in ((0.5, 5), (0.3, 3), (0.01, 1), (0.99, 9)):
            first, second = pairs.split(seed=seed, fraction=fraction)
            assert not set(first.contexts) & set(second.contexts) and len(set(first.contexts)) == groups
            assert sorted(first.clean.texts + second.clean.texts) == sorted(pairs.clean.texts)
            assert [t for t in pairs.clean.texts if t in set(first.clean.texts)] == list(first.clean.texts), "order is kept"
        assert pairs.split(seed=seed)[0].digest == pairs.split(seed=seed)[0].digest
        seen.add(pairs.split(seed=seed)[0].digest)
    assert len(seen) > 1
    one, other = pairs.clean.split(by="segment", fraction=0.34)
    assert len(set(one.tags["segment"])) == 1 and len(set(other.tags["segment"])) == 2
    assert "cannot be split by 'colour'; known: context, segment" in message(pairs.split, by="colour")
    assert "fraction is 1" in message(pairs.split, fraction=1)
    assert "single context" in message(pairs[:3].split)


def test_pairs_must_correspond(plain):
    pairs = pairs_of(plain)
    assert "6 clean prompts and 5 corrupt" in message(PromptPairs, pairs.clean, pairs.corrupt[:5])
    other = Prompts.of(plain, pairs.corrupt.texts)
    said = message(PromptPairs, pairs.clean, other)
    assert "label1" in said and "END" not in said
    assert pairs.aligned
    short = Prompts.of(plain, ["the"] * 6)
    assert not PromptPairs(Prompts.of(plain, pairs.clean.texts), short).aligned
    assert (pairs.answers, pairs.distractors, pairs.contexts, pairs.tags, pairs.task, pairs.seed) == (
        pairs.clean.answers, pairs.clean.distractors, pairs.clean.contexts, pairs.clean.tags, "boxes(n_boxes=3, queries=all)", 0,
    )  # fmt: skip


# ---- files


@pytest.mark.parametrize("which", ["ioi(corrupt=ABC)", "facts", "arithmetic", "recitation", "plain_text"])
def test_files_give_the_same_prompts_back(which, reader, tmp_path):
    prompts = task(which).generate(reader, 5, 3)
    path = prompts.to_jsonl(tmp_path / "prompts.jsonl")
    for back in (type(prompts).read(path, reader), read_prompts(path, reader)):
        assert type(back) is type(prompts) and back.digest == prompts.digest and (back.task, back.seed) == (which, 3)
    assert back.to_jsonl(tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_awkward_texts_survive(plain, tmp_path):
    prompts = Prompts.of(plain, AWKWARD)
    path = prompts.to_jsonl(tmp_path / "awkward.jsonl")
    assert path.read_bytes().count(b"\n") == len(AWKWARD)
    back = Prompts.read(path, plain)
    assert back.texts == AWKWARD and back.digest == prompts.digest and (back.task, back.seed) == ("", None)
    own = tmp_path / "own.jsonl"
    own.write_bytes("\ufeff".encode() + b"\r\n".join(json.dumps(t).encode() for t in AWKWARD) + b"\r\n\r\n")
    assert Prompts.read(own, plain).digest == prompts.digest


def test_files_of_a_person(reader, tmp_path):
    path = tmp_path / "mine.jsonl"
    text = (
        "Then Mary and John met at the store, and John handed a drink to"
        if reader.tokenizer is not tokenizer("splitting")
        else "to the store, to"
    )
    word, where = "store", text.index("store")
    row = {
        "text": text,
        "answer": " the",
        "distractor": " a",
        "options": [" the", " a"],
        "context": "c",
        "tags": {"kind": "x"},
        "target": " the",
    }
    row["spans"] = {"W": [where, where + len(word)], "two": [[where, where + len(word)], [len(text) - 2, len(text)]]}
    path.write_text(json.dumps(row) + "\n")
    prompts = Prompts.read(path, reader)
    assert [reader.decode([prompts.ids[0][i]]).strip() for i in prompts.positions["two"][0]] == [word, "to"]
    assert prompts.positions["W"][0] == prompts.positions["two"][0][:1] and prompts.positions["END"][0] == prompts.positions["two"][0][1:]
    assert (
        prompts.options == ((*prompts.answers, *prompts.distractors),) and prompts.targets == (" the",) and prompts.tags == {"kind": ("x",)}
    )
    lines = tmp_path / "lines.txt"
    lines.write_text('one prompt\n\n"another" {prompt}\n')
    assert Prompts.read(lines, reader).texts == ("one prompt", '"another" {prompt}')


GOOD = '{"text": "to the", "answer": " store"}\n'


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["f.jsonl is empty"]),
        ("\n \n", ["f.jsonl is empty"]),
        (GOOD + "\n{broken\n", ["line 3 of f.jsonl is not JSON", "'{broken'"]),
        (GOOD + "[1]\n", ["line 2", "list"]),
        (GOOD + "{}\n", ["line 2", "no text"]),
        ('{"text": 3}\n', ["line 1", "no text"]),
        ('"a"\n""\n', ["line 2", "is empty"]),
        ('{"text": "a", "anwser": "b"}', ["line 1", "'anwser'", "answer", "tags"]),
        (GOOD + '{"text": "to the"}\n', ["line 2", "no answer"]),
        (GOOD + '{"text": "to the", "answer": " unheard of"}\n', ["line 2", "' unheard of'", "expected one"]),
        ('{"text": "to the", "answer": 5}', ["line 1", "token id", "text"]),
        ('{"text": "to the", "answer": [1]}', ["line 1", "answer"]),
        ('{"text": "to the", "answer": true}', ["line 1", "answer", "true"]),
        ('{"text": "to the", "options": [" store", null]}', ["line 1", "options"]),
        ('{"text": "to the", "tags": {"a": 1}}', ["line 1", "tags"]),
        ('{"text": "to the", "tags": {"a": "1"}}\n"b"\n', ["line 2", "tags", "a"]),
        ('{"text": "to the", "spans": {"S": [0, 2]}}\n"b"\n', ["line 2", "positions", "S"]),
        ('{"text": "to the", "spans": {"S": [4, 9]}}', ["line 1", "[4, 9]", "6 characters"]),
        ('{"text": "to the", "spans": {"S": [2, 2]}}', ["line 1", "[2, 2]"]),
        ('{"text": "to the", "positions": {"S": 1}}', ["line 1", "ids", "spans"]),
        ('{"text": "to the", "ids": [1, 2], "positions": {"S": 1}}', ["line 1", "tokenizer"]),
        ('{"clean": {"text": "a"}, "corrupt": {"text": "b"}}', ["line 1", "PromptPairs.read"]),
        ('"a\\ud800"', ["line 1", "surrogate"]),
        ('"' + "the " * 600 + '"', ["line 1", "tokens", "512"]),
        (b"\xff\xfe", ["UTF-8"]),
    ],
)
def test_mistakes_in_files_are_located(content, parts, plain, tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = message(Prompts.read, path, plain)
    assert all(part in said for part in parts), said


def test_files_that_are_none(plain, tmp_path):
    assert "not there" in message(Prompts.read, tmp_path / "none.jsonl", plain)
    assert "folder" in message(read_prompts, tmp_path, plain)
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD)
    assert "line 1 of p.jsonl is not a pair" in message(PromptPairs.read, path, plain)
    path.write_text('{"clean": {"text": "the"}, "corrupt": {"text": ""}}')
    assert message(PromptPairs.read, path, plain) == "line 1 of p.jsonl, corrupt: the prompt is empty"


def test_a_file_of_another_tokenizer_is_refused(plain, tmp_path):
    path = pairs_of(plain).to_jsonl(tmp_path / "p.jsonl")
    assert "tokenizer" in message(PromptPairs.read, path, Reader(tokenizer("metaspace")))


# ---- where they come from


@pytest.mark.parametrize("which", ["ioi", "boxes(n_boxes=3)", "plain_text", "plain_text(source=prose)", "recitation", "facts"])
def test_the_first_prompts_are_those_of_a_smaller_n_and_no_others_claim_to_be(which, plain):
    whole, few = task(which).generate(plain, 7, 2), task(which).generate(plain, 4, 2)
    assert whole[:4].digest == few.digest and (whole[:4].seed, whole[:4].task) == (2, which) == (few.seed, few.task)
    assert whole[:4][:2].seed == 2 and whole[0].seed == 2
    for other in (whole[1:], whole[::2], whole[[1, 0]], whole[[0, 0]], whole[3], whole[1:][:2], whole.split(seed=1)[1]):
        assert other.seed is None and other.task == which
    if isinstance(whole, PromptPairs):
        assert whole.clean.seed == 2 and whole.corrupt.seed is None  # no command makes the counterfactuals alone
        assert PromptPairs(whole.clean, whole.clean).seed is None and PromptPairs(whole.corrupt, whole.clean).seed is None
        assert PromptPairs(whole.clean, whole.corrupt).seed == 2 and PromptPairs(whole.clean[:3], whole.corrupt[:3]).seed is None


def test_prompts_that_were_changed_have_no_seed(plain):
    from dataclasses import replace

    prompts = task("ioi").generate(plain, 4).clean
    assert replace(prompts, task="ioi").seed == 0
    assert replace(prompts, positions={}).seed is None and replace(prompts, answers=None).seed is None


def test_a_file_keeps_the_seed_of_what_is_still_whole(plain, tmp_path):
    for which in ("ioi", "plain_text"):
        prompts = task(which).generate(plain, 5, 3)
        path = prompts.to_jsonl(tmp_path / "prompts.jsonl")
        lines = path.read_text().splitlines(keepends=True)
        assert read_prompts(path, plain)[:3].seed == 3
        for rows in (lines[1:], lines[::-1], [*lines, lines[0]], [re.sub(r', "drawn": "\w+"', "", line) for line in lines]):
            path.write_text("".join(rows))
            back = read_prompts(path, plain)
            assert (back.seed, back.task) == (None, which)


def test_a_selection_says_that_no_command_repeats_it(plain):
    from interp.provenance import _described_input

    pairs = task("ioi").generate(plain, 6)
    whole, some = (_described_input("x", "prompts", given) for given in (pairs[:4], pairs[2:]))
    assert (whole["task"], whole["n"], whole["seed"]) == ("ioi", 4, 0) and "some_of" not in whole
    assert some["some_of"] == "ioi" and "task" not in some and not some["text"]


# ---- several sets


def test_a_mixture_goes_round_its_sets(plain):
    ioi, text = task("ioi").generate(plain, 3), task("plain_text").generate(plain, 5)
    both = mixed({"ioi": ioi, "text": text})
    assert both.tags == {"set": ("ioi", "text", "ioi", "text", "ioi", "text", "text", "text")} and list(both.positions) == ["END"]
    for name, one in (("ioi", ioi.clean), ("text", text)):
        mine = both[[i for i, other in enumerate(both.tags["set"]) if other == name]]
        assert (mine.texts, mine.ids, mine.contexts) == (one.texts, one.ids, one.contexts)
    assert mixed({"a": ioi, "b": ioi.corrupt}).positions["S2"] == tuple(
        x for pair in zip(ioi.clean.positions["S2"], ioi.corrupt.positions["S2"], strict=True) for x in pair
    )
    assert both.seed is None and not both.task
    seeds = [mixed({"ioi": some, "plain_text": text}, seed=0).seed for some in (ioi, ioi[1:], ioi[:2], ioi.clean)]
    assert seeds == [0, None, 0, 0]  # only what the tasks make with that seed, in order and from the first on
    assert mixed({"ioi": ioi, "other": text}, seed=0).seed is None and mixed({"ioi": ioi, "plain_text": text}, seed=1).seed is None
    for bad in ({}, {"": text}):
        with pytest.raises(InputError, match="each with a name"):
            mixed(bad)


def test_a_mixture_is_written_with_plus_and_replayed(plain, tmp_path):
    from interp.inputs import Session, checked_prompts

    written, session = "plain_text + ioi + boxes(n_boxes=3)", Session()
    whole, few = (session.prompts(written, plain, n, 4) for n in (8, 5))
    assert (whole.task, whole.seed, len(whole)) == (written, 4, 8) and whole[:5].digest == few.digest and whole[:5].seed == 4
    assert whole.tags["set"][-2:] == ("plain_text", "ioi") and whole[::3].seed is None
    assert session.prompts(written, plain, 2, 4).task == "plain_text + ioi"
    own = tmp_path / "a + b.txt"
    own.write_text("the ring\nthe blue\n")
    assert session.prompts(str(own), plain).tags == {}
    mix = session.prompts(f"{own.rename(tmp_path / 'own.txt')} + ioi", plain, 6)
    assert len(mix) == 5 and mix.seed is None and mix.task == ""
    for bad, why in (("ioi + ioi", "the same set twice"), ("ioi + iou", "ioi"), ("ioi + nothing.txt", "no file nothing.txt")):
        with pytest.raises(InputError, match=why):
            checked_prompts(bad)
    with pytest.raises(InputError, match="takes no seed"):
        session.prompts(f"{tmp_path / 'own.txt'} + ioi", plain, 6, 1)
