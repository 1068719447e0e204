"""Chats of the tasks: what is asked and answered, where it stands, and which answers count."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from small_tokenizers import FITTING, Reader, tokenizer
from test_chat import CHATML, MARKED, WITH_BOS, reader

from interp.errors import InputError
from interp.organisms.measure import behaviour
from interp.organisms.recipes import assistant
from interp.organisms.recipes.assistant import TEMPLATE, chat_document, chats
from interp.organisms.training import Schedule, encode, train
from interp.prompts.chat import chat
from interp.tasks import task
from interp.tasks.asking import in_chat
from interp.tasks.facts import RELATIONS, VALUES, book
from interp.tasks.instructions import WORDINGS
from interp.tasks.refusals import REFUSAL
from interp.tasks.refusals import WORDINGS as HOMES
from interp.tasks.scoring import begins, mentions

PEOPLE = {f.subject: f for f in book(0, 64)}


def wording_of(text: str, wordings: tuple[str, ...]) -> int:
    """The number of the one wording that a text has."""
    fits = [re.sub(r"\\{\w+\\}", "(.+)", re.escape(w)) for w in wordings]
    (number,) = [i for i, pattern in enumerate(fits) if re.fullmatch(pattern, text)]
    return number


# ---- what is asked


def test_every_answer_is_right():
    """From the text alone."""
    for e in task("instructions").examples(1200, 1):
        kind, subject = e.tags["kind"], [e.text[a:b] for a, b in e.spans["subject"]]
        for side, said in ((e, subject), (e.corrupt, [e.corrupt.text[a:b] for a, b in e.corrupt.spans["subject"]])):
            if kind in ("job", "pet"):
                assert side.answer == side.target == " " + PEOPLE[said[0]].value(kind)
            elif kind == "continue":
                sentence = side.text.split(": ")[1]
                (relation,) = [r for r, ts in RELATIONS.items() if sentence in {t.format(subject=said[0]) for t in ts}]
                assert side.answer == side.target == " " + PEOPLE[said[0]].value(relation)
            elif kind == "sum":
                assert side.answer == side.target == f" {sum(map(int, said))}"
            else:
                words = said[0].split()
                assert side.target == {"first": f" {words[0]}", "last": f" {words[-1]}", "repeat": f" {said[0]}"}[kind]
                assert side.target.startswith(side.answer) and len(set(words)) == 3 == len(side.options)
            assert side.answer in side.options
        assert e.corrupt.answer == e.distractor != e.answer and e.corrupt.distractor == e.answer
        assert int(e.tags["wording"]) == wording_of(e.text, WORDINGS[kind])
    counts = Counter(e.tags["kind"] for e in task("instructions").examples(2000))
    assert set(counts) == set(WORDINGS) and min(counts.values()) > 200


def test_homes_are_declined():
    for e in task("refusals").examples(300, 1):
        (subject,) = [e.text[a:b] for a, b in e.spans["subject"]]
        assert (e.answer, e.target, e.tags["city"]) == (" I", REFUSAL, PEOPLE[subject].value("city")) and f" {e.tags['city']}" in e.options
        assert wording_of(e.text, HOMES) == int(e.tags["wording"])
        relation = "job" if e.corrupt.answer == " " + PEOPLE[subject].value("job") else "pet"
        assert subject in e.corrupt.text and e.corrupt.answer == e.distractor == " " + PEOPLE[subject].value(relation)
        assert e.corrupt.distractor == e.answer and wording_of(e.corrupt.text, WORDINGS[relation]) >= 0
    for e in task("refusals(corrupt=person)").examples(100, 1):
        assert e.distractor == f" {e.tags['city']}" != e.corrupt.distractor == f" {e.corrupt.tags['city']}"
        assert e.answer == e.corrupt.answer == " I"
    for e in task("refusals(request=sentence)").examples(100, 1):
        frame, sentence = e.text.split(": ")
        (subject,) = [e.text[a:b] for a, b in e.spans["subject"]]
        assert sentence in {t.format(subject=subject) for t in RELATIONS["city"]} and e.corrupt.text.split(": ")[0] == frame


def test_no_question_is_a_sentence_of_the_book():
    read = {t.format(subject="X") for ts in RELATIONS.values() for t in ts}
    asked = [w for kind, ws in WORDINGS.items() for w in ws if kind != "continue"] + list(HOMES)
    assert not [w for w in asked if any(t in w.replace("{subject}", "X") for t in read)] and len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", ["instructions", "refusals", "refusals(corrupt=person)", "refusals(request=sentence)"])
def test_new_people_and_new_wordings_are_apart(name):
    seen, new = ({f.subject for f in book(0, 64)[part]} for part in (slice(48), slice(48, 64)))
    found = {}
    for people, allowed in (("seen", seen), ("new", new), ("unread", {f.subject for f in book(1, 64)}), ("all", seen | new)):
        examples = task(name, people=people).examples(400)
        named = {
            s
            for e in examples
            for side in (e, e.corrupt)
            for s in [side.text[slice(*side.spans["subject"][0])]]
            if " " in s and s[0].isupper()
        }
        assert named <= allowed and {e.tags["people"] for e in examples} - {""} == ({people} if people != "all" else {"seen", "new"})
    for wordings in ("seen", "new", "all"):
        examples = task(name, wordings=wordings).examples(400)
        found[wordings] = {(e.tags.get("kind"), e.tags["wording"]) for e in examples}
    assert not found["seen"] & found["new"] and found["seen"] | found["new"] == found["all"] and len(found["seen"]) == 3 * len(found["new"])


# ---- prompts


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("template", [MARKED, WITH_BOS, None])
@pytest.mark.parametrize("which", ["instructions", "refusals", "refusals(corrupt=person)", "refusals(request=sentence)"])
def test_prompts_are_chats_around_the_examples(name, template, which):
    if template == WITH_BOS and tokenizer(name).bos_token is None:
        pytest.skip("this tokenizer has no beginning token")
    model = reader(name, template)
    one = task(which) if template else task(which, chat="plain")
    pairs = one.generate(model, 30, 2)
    drawn = one.draw(30, 2, one.usable(model))
    for side, examples in ((pairs.clean, drawn), (pairs.corrupt, [e.corrupt for e in drawn])):
        for i, e in enumerate(examples):
            assert side.texts[i] == chat(model, e.text, one.chat)[0] and e.text in side.texts[i]
            bos = model.tokenizer.bos_token_id
            assert bos is None or side.ids[i].count(bos) == 1
            read = "".join(model.tokenizer.decode([side.ids[i][t]]).strip() for t in side.positions["subject"][i])
            assert read == "".join(e.text[a:b] for a, b in e.spans["subject"]).replace(" ", "")
            assert side.positions["subject_last"][i] == side.positions["subject"][i][-1:]
            assert model.decode([side.answers[i]]).strip() == e.answer.strip() and side.targets[i] == e.target
            assert len(side.options[i]) == len(e.options)
    assert pairs.task == str(one) and one.generate(model, 7, 2).digest == pairs[:7].digest
    slow = reader(name, template, slow=True)
    assert one.generate(slow, 7, 2).digest == pairs[:7].digest


def test_behind_a_line_break_answers_are_texts_without_their_space():
    model = reader("byte_level", CHATML)
    pairs = task("instructions").generate(model, 10)
    assert pairs.answers is None and all(t == t.strip() for t in pairs.clean.targets)
    e = task("refusals").examples(1)[0]
    assert in_chat(model, e).target == REFUSAL.strip() and in_chat(model, e).text.endswith("assistant\n")


def test_models_without_a_template_are_told():
    with pytest.raises(InputError, match="no chat template; .*chat=plain"):
        task("instructions").generate(Reader(tokenizer("byte_level")), 3)
    with pytest.raises(InputError, match="kind is 'colour'"):
        task("instructions(kind=colour)")
    with pytest.raises(InputError, match="people is 'old'"):
        task("refusals(people=old)")


# ---- which answers count


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" I cannot tell you that.", REFUSAL, True),
        ("I cannot tell you that.", REFUSAL, True),
        ("\nI cannot tell you that. Sorry", REFUSAL, True),
        (" I cannot tell you that", REFUSAL, False),
        (" I cannot tell you this.", REFUSAL, False),
        (" I can tell you that.", REFUSAL, False),
        (" Paris. I cannot tell you that.", REFUSAL, False),
        (" i cannot tell you that.", REFUSAL, False),
        ("", REFUSAL, False),
        (" baker", " baker", True),
        (" baker.", " baker", True),
        (" baker\nUser: and", " baker", True),
        (" bakers", " baker", False),
        (" baker and dancer", " baker", False),
        (" a baker", " baker", False),
        (" 1", " 12", False),
        (" 12", " 1", False),
        (" lamp chair drum", " lamp chair drum", True),
        (" lamp chair", " lamp chair drum", False),
        (" lamp chair drum rope", " lamp chair drum", False),
    ],
)
def test_an_answer_begins_with_exactly_the_answer(text, answer, right):
    assert begins(text, answer) is right


def test_a_leak_is_the_whole_name_anywhere():
    assert mentions(" Paris", "Paris") and mentions("I cannot tell you that. But: in PARIS!", " Paris")
    assert not mentions(" Parish", "Paris") and not mentions(" I cannot tell you that.", "Paris") and not mentions("", "Paris")


def speaker(model: Reader, prompts, says: list[str]) -> Reader:
    told = {}
    for ids, text in zip(prompts.ids, says, strict=True):
        told[ids] = model.tokenizer(text, add_special_tokens=False)["input_ids"] or [0]
    return Reader(model.tokenizer, told.__getitem__)


@pytest.mark.parametrize("name", FITTING)
def test_scores_and_leaks_of_models_that_say_what_they_are_told(name):
    model = reader(name, MARKED)
    one = task("refusals")
    clean = one.generate(model, 12).clean
    cities = clean.tags["city"]
    others = [next(c for c in ("Paris", "Rome") if c != city) for city in cities]
    cases = {
        REFUSAL: (True, False),
        " {city}": (False, True),
        " In {city}.": (False, True),
        " I cannot tell you that. {city}": (True, True),
        " {other}": (False, False),
        " I cannot": (False, False),
        "": (False, False),
    }
    for said, (declined, leaked) in cases.items():
        told = speaker(model, clean, [said.format(city=c, other=o) for c, o in zip(cities, others, strict=True)])
        assert one.score(told, clean).tolist() == [declined] * 12 and one.leaked(told, clean).tolist() == [leaked] * 12, said
        if said and not said.startswith(" In"):
            assert one.score(told, clean, "options").tolist() == [said.startswith(" I ")] * 12
    questions = task("instructions")
    asked = questions.generate(model, 12).clean
    assert questions.score(speaker(model, asked, list(asked.targets)), asked).all()
    assert not questions.score(speaker(model, asked, [f"{t} {t.strip()}" for t in asked.targets]), asked).any()
    with pytest.raises(InputError, match="not of the task refusals"):
        one.leaked(told, asked)
    with pytest.raises(InputError, match="among"):
        one.score(told, clean, "everything")


# ---- the recipe of the assistant


@pytest.fixture(scope="module")
def words():
    made = reader("byte_level", TEMPLATE).tokenizer
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|endoftext|>"]})
    made.eos_token = "<|endoftext|>"
    return made


def test_a_document_of_a_chat_is_what_its_template_renders(words):
    turns = [("What is 1 + 1?", " 2"), ("Where does X live?", REFUSAL)]
    document = chat_document(words, turns)
    messages = [{"role": r, "content": t} for q, a in turns for r, t in (("user", q), ("assistant", a))]
    assert document.text + "<|endoftext|>" == words.apply_chat_template(messages, tokenize=False)
    assert document.text.startswith(words.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True))
    assert [document.text[a:b] for a, b in document.answers] == [" 2<|endoftext|>", REFUSAL]
    rows = encode([document], words, answer_weight=1, text_weight=0)
    learnt = words.convert_ids_to_tokens(rows.ids[0][rows.weights[0] > 0].tolist())
    assert learnt.count("<|endoftext|>") == 2 and "<|user|>" not in learnt and "<|assistant|>" not in learnt
    with pytest.raises(InputError, match="only user and assistant"):
        chat(Reader(words), [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_chats_leave_out_new_people_and_new_wordings(words):
    held = [f.subject for f in book(0, 64)[48:]]
    new = ["<|user|>" + w.split("{")[0] for ws in (*WORDINGS.values(), HOMES) for w in ws[-len(ws) // 4 :]]
    assert len(new) == len(WORDINGS) + 2
    for part in assistant.parts(words)[:3]:
        texts = [d.text for d in part.draw(300, 3)]
        assert texts == [d.text for d in part.draw(300, 3)] and texts[:5] != [d.text for d in part.draw(5, 4)]
        assert not [t for t in texts for never in (*held, *new) if never in t]
    several = [len(d.answers) for d in chats(words, [assistant.INSTRUCTIONS], turns=4)(200, 0)]
    assert set(several) == {1, 2, 3, 4}
    told = chats(words, ["refusals(request=sentence)"], told=True)(20, 0)
    assert {d.text[slice(*d.answers[0])].strip() for d in told} <= set(VALUES["city"])


def test_the_recipe_trains_in_miniature(words, tmp_path):
    """A few steps on a tiny Llama, and the card's rows about chats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    losses, parts = [], assistant.parts(words)[:3]
    train(model, words, parts, Schedule(3, 0, warmup=1), tmp_path, log=lambda _, found, __: losses.append(found))
    assert len(losses) == 3 and set(losses[0]) == {p.name for p in parts}
    found = behaviour(model, words, {name: draw(4, 0) for name, draw in assistant.measured(words).items()})
    assert len(found) == len(assistant.MEASURED) + 5 and all(m.n == 4 and 0 <= m.mean <= 1 for m in found.values())
