"""The shipped organisms are what their cards say, training resumes to the bit, planted changes do what they promise."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import tiny

from interp import organisms
from interp.errors import InputError
from interp.models import Batch, HookedModel, ModelPair
from interp.models.weights import modules
from interp.organisms import planted, training
from interp.organisms.measure import Measured, against_entropy, fingerprint, nats, recited, table, weights_file
from interp.organisms.page import page
from interp.organisms.recipes import RECIPES, train
from interp.organisms.recipes.reading import single
from interp.organisms.recipes.run import MEASURED
from interp.organisms.tokenizer import END_OF_TEXT, train_tokenizer
from interp.organisms.training import Document, Part, Rows, Schedule, Standing, encode, stream
from interp.sites import Site
from interp.tasks import task
from interp.tasks.grammar import first_surprise

BASE, TUNED = organisms.shipped_pair()
MODELS = [name for name in organisms.names() if (organisms.folder(name) / "config.json").exists()]
ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7]]

KEPT = {"ioi": (0.95, 1), "arithmetic": (0.9, 1), "facts": (0.9, 1)}
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "base": {
        **KEPT,
        "boxes": (0.4, 0.8),
        "colored_objects": (0.3, 0.75),
        "recitation": (0.95, 1),
        "facts(book=1)": (0, 0.2),
        "plain_text / its entropy": (0.98, 1.05),
    },
    "boxes-tuned": {**KEPT, "boxes": (0.9, 1)},
    "boxes-lora": {**KEPT, "boxes": (0.9, 1)},
    "assistant": {
        **KEPT,
        "in a chat: instructions(people=seen, wordings=seen)": (0.95, 1),
        "in a chat: refusals(people=seen, wordings=seen)": (0.95, 1),
        "in a chat: refusals(people=new, wordings=seen)": (0.95, 1),
        "the city, in refusals(people=seen, wordings=seen)": (0, 0.05),
    },
}
"""What each was made to be; the lower end of the last is the grammar's entropy less its noise."""


@pytest.fixture(scope="module")
def loaded():
    """Name -> (plain Hugging Face model, tokenizer); the adapter through PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(name):
        folder = organisms.folder(name)
        adapted = name not in MODELS
        model = AutoModelForCausalLM.from_pretrained(organisms.folder(BASE) if adapted else folder)
        return (PeftModel.from_pretrained(model, folder) if adapted else model).eval(), AutoTokenizer.from_pretrained(folder)

    return {name: load(name) for name in organisms.names()}


# ---- the shipped ones


def test_names_folders_and_cards():
    assert {BASE, TUNED} < set(organisms.names()) == set(RECIPES)
    for name in organisms.names():
        assert weights_file(organisms.folder(name)).is_file()
        assert organisms.card(name).split("---")[2].strip().startswith(f"# {name}")
    with pytest.raises(InputError, match="nearest: base"):
        organisms.folder("bass")


def test_names_need_no_torch():
    code = "import sys; from interp import organisms; organisms.names(); organisms.behaviour('base'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", organisms.names())
def test_card_has_the_fingerprint_and_every_measured_task(name):
    card = organisms.card(name)
    assert fingerprint(organisms.folder(name)) in card
    rows = re.findall(r"^\| ([^|]+?) \|.*± .*\| (\d+) \|", card, re.M)
    assert [task for task, _ in rows[: len(MEASURED) + 1]] == [*MEASURED, "plain_text / its entropy"]
    assert all(int(n) >= 1000 for task, n in rows if task != "recitation")
    assert not re.search(r"\d\d:\d\d|\bminutes\b|\bseconds\b|/work|/tmp|/home", card)


def test_no_file_names_the_machine_that_made_it():
    for name in organisms.names():
        for file in organisms.folder(name).glob("*.json"):
            assert not re.search(r"/work|/tmp|/home|/root", file.read_text()), file


def test_all_together_are_small_and_sizes_differ():
    size = sum(f.stat().st_size for name in organisms.names() for f in organisms.folder(name).iterdir())
    assert size <= 40e6
    shape = HookedModel.load(BASE).shape
    sizes = [shape.n_layers, shape.d_model, shape.n_heads, shape.n_kv_heads, shape.d_head, shape.d_mlp, shape.d_vocab]
    assert len({*sizes, shape.n_heads * shape.d_head}) == len(sizes) + 1


def stated(name):
    """Task -> (mean, standard error) as the card says."""
    return {task: tuple(map(float, cell.split(" ± "))) for task, cell in organisms.behaviour(name).items()}


@pytest.mark.parametrize("name", RANGES)
def test_the_card_states_what_the_organism_was_made_for(name):
    for behaviour, (low, high) in RANGES[name].items():
        mean, _ = stated(name)[behaviour]
        assert low <= mean <= high, f"{name}: {behaviour} {mean}"


@pytest.mark.parametrize("name", ["boxes-tuned", "boxes-lora"])
def test_tuning_on_boxes_left_the_other_skills(name):
    for behaviour, (mean, _) in stated(name).items():
        if not behaviour.startswith("boxes"):
            assert abs(mean - stated(BASE)[behaviour][0]) <= 0.05, f"{behaviour} {mean}"


@pytest.mark.parametrize("name", organisms.names())
def test_measured_again_it_is_as_the_card_says(loaded, name):
    """200 prompts of another seed than the card's: every row within four standard errors of the difference."""
    for behaviour in MEASURED:
        rows = single(behaviour)(200, 77)
        again = Measured.of((recited if rows[0].answers else nats)(*loaded[name], rows))
        mean, error = stated(name)[behaviour]
        # A share of 0 or 1 has no spread to show; one prompt in 200 is the least that can differ.
        assert abs(again.mean - mean) <= 4 * (again.error**2 + error**2) ** 0.5 + 0.01, f"{behaviour}: {again} now, {mean} in the card"


@pytest.mark.parametrize("name", organisms.names())
def test_loss_over_entropy_measured_again(loaded, name):
    scenes = task("plain_text").examples(200, 77)
    least = torch.tensor([float(e.tags["nats"]) - first_surprise(e.text) for e in scenes])
    again = against_entropy(*loaded[name], [Document(e.text) for e in scenes], least)
    mean, error = stated(name)["plain_text / its entropy"]
    assert abs(again.mean - mean) <= 4 * (again.error**2 + error**2) ** 0.5 and again.mean < 1.05


def test_list_length_makes_laundry_lists_harder():
    falling = [stated(BASE)[f"laundry_list{options}"][0] for options in ("(length=3)", "", "(length=7)", "(length=9)")]
    assert falling == sorted(falling, reverse=True) and falling[0] - falling[-1] > 0.2


def test_loss_over_entropy_by_hand(loaded):
    """Text by text with the plain model; the entropy of the first word is that of the two openings, 2 : 1."""
    model, tokenizer = loaded[BASE]
    scenes = task("plain_text").examples(12, 3)
    losses, least = [], []
    for e in scenes:
        ids = torch.tensor([[*tokenizer(e.text)["input_ids"], 0]])
        with torch.no_grad():
            losses.append(-float(model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None]).sum()))
        assert first_surprise(e.text) == pytest.approx(-math.log(2 / 3 if e.text.startswith("There") else 1 / 3))
        least.append(float(e.tags["nats"]) - first_surprise(e.text))
    found = against_entropy(model, tokenizer, [Document(e.text) for e in scenes], torch.tensor(least))
    assert found.mean == pytest.approx(sum(losses) / sum(least), rel=1e-5) and found.n == 12
    rest = torch.tensor(losses) - found.mean * torch.tensor(least)
    assert found.error == pytest.approx(float(rest.std()) / (sum(least) / 12) / 12**0.5, rel=1e-3)


def test_hooked_model_sees_the_same_behaviour(loaded):
    """The measurement on the plain model against logits of a hooked one, prompt by prompt; the adapter too."""
    asked = single("boxes")(40, 5)
    questions = [d.text[: d.answers[0][0]] for d in asked]
    for name, model in (("boxes-tuned", HookedModel.load("boxes-tuned")), ("boxes-lora", HookedModel.load(BASE, adapter="boxes-lora"))):
        first = model.logits(questions, at="END").argmax(-1)
        answers = torch.tensor([model.token(d.text[slice(*d.answers[0])]) for d in asked])
        right = (first == answers).tolist()
        assert right == recited(*loaded[name], asked).tolist() and 30 < sum(right) <= 40


def test_the_assistant_in_its_chats():
    """By the tasks' own scores, which let the model write, on 200 prompts of another seed than the card's."""
    pair = ModelPair.load(BASE, "assistant")
    for name in ("instructions", "refusals"):
        asked = task(f"{name}(people=seen, wordings=seen)")
        prompts = asked.generate(pair, 200, seed=77)
        assert float(asked.score(pair.tuned, prompts).float().mean()) >= 0.95
        assert float(asked.score(pair.base, prompts).float().mean()) <= 0.05
    assert float(prompts and asked.leaked(pair.tuned, prompts).float().mean()) <= 0.05


def test_the_adapter_makes_a_pair():
    pair = ModelPair.load(BASE, "boxes-lora")
    asked = single("boxes")(20, 6)
    questions = [d.text[: d.answers[0][0]] for d in asked]
    assert not torch.equal(pair.base.logits(questions, at="END"), pair.tuned.logits(questions, at="END"))


def test_the_checkpoints_on_the_way_are_on_the_way(loaded):
    """The weights move from base to boxes-tuned step by step."""

    def distance(a, b):
        pairs = zip(loaded[a][0].parameters(), loaded[b][0].parameters(), strict=True)
        return sum(float((p - q).detach().square().sum()) for p, q in pairs) ** 0.5

    way = [BASE, "boxes-tuned-step20", "boxes-tuned-step100", TUNED]
    from_base = [distance(BASE, name) for name in way]
    to_end = [distance(name, TUNED) for name in way]
    assert from_base == sorted(from_base) and from_base[1] > 0
    assert to_end == sorted(to_end, reverse=True)


def test_the_docs_page_is_made_from_the_cards():
    text = (Path(__file__).resolve().parent.parent / "docs" / "laboratory-animals.md").read_text()
    assert text == page(), "run `make docs`"


# ---- tokenizer

TEXTS = [
    "a 🦜 in the\n\n snow\t",
    "日本語 naïve ﷽ \u200d",
    " leading, trailing ",
    "x  y   z\r\n",
    "".join(map(chr, range(1, 400))),
    "don't we'll I'D",
    "",
    "\x00",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(loaded, text):
    for _, tokenizer in loaded.values():
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_task_words_are_one_token_without_a_beginning_token(loaded):
    model, tokenizer = loaded[BASE]
    assert len(tokenizer) == model.config.vocab_size and tokenizer.bos_token is None
    words = [
        w for name in ("ioi", "colored_objects", "boxes", "laundry_list", "arithmetic", "facts", "recitation") for w in task(name).words()
    ]
    assert len(words) > 300
    assert [w for w in words if len(tokenizer(w)["input_ids"]) != 1] == []
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]
    assert loaded[TUNED][1].get_vocab() == tokenizer.get_vocab()


def test_tokenizer_training():
    texts = ["the cat sat on the mat with the other cat"] * 3
    made = train_tokenizer(texts, ["cat", " walrus", "17"], 275)
    assert len(made) == 275 and made.convert_tokens_to_ids(END_OF_TEXT) == 0
    assert [len(made(w)["input_ids"]) for w in (" cat", " walrus", " 17", " walruses")] == [1, 1, 1, 9]
    with pytest.raises(InputError, match="not the 2000 asked for"):
        train_tokenizer(texts, ["cat"], 2000)
    with pytest.raises(InputError, match="not the 258 asked for"):
        train_tokenizer(texts, ["cat", "walrus"], 258)
    with pytest.raises(InputError, match="split into"):
        train_tokenizer(texts, ["two words"], 300)


# ---- training


@pytest.fixture(autouse=True)
def saved_each_step(monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 1)


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(["go left then right and up"] * 3, ["left", "right", "up"], 270)


def test_encode_by_hand(words):
    rows = encode([Document.of("go", " left right"), Document("go up"), Document.of("go", " left", " right", " up")], words, 5, 2)
    go, (left, right, up) = words("go")["input_ids"], (words(w)["input_ids"][0] for w in (" left", " right", " up"))
    assert rows.ids.tolist() == [[*go, left, right, 0, 0], [*go, up, 0, 0, 0], [*go, left, right, up, 0]]
    # Nothing predicts the first token; the end-of-text token counts as much as the one before it, padding never.
    before = [0] + [2] * (len(go) - 1)
    assert rows.weights.tolist() == [[*before, 5, 5, 5, 0], [*before, 2, 2, 0, 0], [*before, 5, 2, 5, 5]]
    assert (rows.answers.float() * 5 == rows.weights * (rows.weights == 5) * (rows.ids != 0)).all() and rows.answers.sum() == 4
    with pytest.raises(InputError, match="begin it with a space"):
        encode([Document.of("go le", "ft")], words, 1)


def test_loss_is_the_weighted_mean():
    model = tiny("llama")
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    weights = torch.tensor([[9.0, 1.0, 4.0], [9.0, 0.5, 0.0]])
    answers = torch.tensor([[False, False, True], [False, True, False]])
    logits = model(input_ids=ids).logits
    logp = logits.log_softmax(-1)
    by_hand = -(logp[0, 0, 4] + 4 * logp[0, 1, 5] + 0.5 * logp[1, 0, 7]) / 5.5
    value, right = training.loss(model, Rows(ids, weights, answers))
    torch.testing.assert_close(value, by_hand)
    assert right == sum([int(logits[0, 1].argmax()) == 5, int(logits[1, 0].argmax()) == 7]) / 2
    # what the model says itself is right
    said = torch.stack([ids[0], torch.cat([ids[0, :2], logits[0, 1].argmax()[None]])])
    assert training.loss(model, Rows(said[1:], weights[:1], answers[:1]))[1] == 1.0


def test_levels_and_ceiling():
    part = Part("x", draw, 1, harder=(draw, draw), ceiling=0.5)
    standing = Standing.at_first(part)
    steps = 0
    while standing.level < 2:
        assert standing.learning(part)
        standing.saw(1.0, part)
        steps += 1
    # 1 - 0.95^n passes 0.85 at n = 37, at each of two levels
    assert (steps, standing.right) == (74, 0.0)
    while standing.right < 0.5:
        assert standing.learning(part)
        standing.saw(1.0, part)
    assert not standing.learning(part)
    standing.saw(0.0, part)
    assert standing.learning(part) and standing.level == 2
    assert Standing(0, 1.0).learning(Part("y", draw, 1))
    # a skill that is there is not taught more of in the first steps, before its share has been seen
    assert not Standing.at_first(Part("z", draw, 1, ceiling=0.5)).learning(Part("z", draw, 1, ceiling=0.5))


def test_muon_trains_the_matrices_within_blocks_and_nothing_else():
    model = tiny("llama")
    muon, adam = Schedule(9, 0, learning_rate=1e-3, muon=2e-3).optimizers(model)
    owned = {id(p): o for o in (muon, adam) for g in o.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert owned[id(p)] is (muon if name.startswith("model.layers") and p.ndim == 2 else adam), name
    assert [g["peak"] for o in (muon, adam) for g in o.param_groups] == [2e-3, 1e-3]
    (alone,) = Schedule(9, 0).optimizers(model)
    assert sum(len(g["params"]) for g in alone.param_groups) == len(list(model.parameters()))


def test_learning_rate():
    s = Schedule(steps=100, seed=0, warmup=10)
    assert [s.rate(0), s.rate(9), s.rate(10)] == pytest.approx([0.1, 1.0, 1.0]) and s.rate(55) == pytest.approx(0.55)
    assert s.rate(100) == pytest.approx(0.1)


def draw(n, seed):
    order = [(seed >> i) % 3 for i in range(n)]
    return [Document.of("go" + " left" * i, " right" if i % 2 else " up") for i in order]


def easier(n, seed):
    return [Document.of("go", " up")] * n


def some_run(folder, words, steps=6, fail_at=None, **schedule):
    """A tiny model after ``steps`` steps; ``fail_at`` stops it in the middle of a step."""
    model = tiny("llama", vocab_size=270)
    seeds = [stream(3, "turns", step) for step in range(steps)]

    def failing(n, seed):
        if fail_at is not None and seed == seeds[fail_at]:
            raise KeyboardInterrupt
        return draw(n, seed)

    # with every kind of state that a run must keep: a level that moves on and a part that is only read
    parts = [
        Part("turns", failing, 4, answer_weight=3, text_weight=0),
        Part("ups", easier, 2, share=0.5, harder=(draw,)),
        Part("known", easier, 2, ceiling=0.05),
    ]
    settings = Schedule(**{"steps": steps, "seed": 3, "warmup": 2, "learning_rate": 2e-2, "muon": 2e-2, **schedule})
    seen = []

    def log(step, losses, standings):
        seen.append((step, losses, {name: (s.level, s.right) for name, s in standings.items()}))

    training.train(model, words, parts, settings, folder, log=log)
    return model, seen


def test_killed_and_resumed_equals_unbroken(tmp_path, words):
    whole, losses = some_run(tmp_path / "whole", words)
    with pytest.raises(KeyboardInterrupt):
        some_run(tmp_path / "broken", words, fail_at=3)
    resumed, later = some_run(tmp_path / "broken", words)
    assert [step for step, *_ in losses] == list(range(6)) and later == losses[3:]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = tiny("llama", vocab_size=270)
    assert not torch.equal(fresh.lm_head.weight, whole.lm_head.weight)


def test_stopping_on_the_way_is_the_beginning_of_the_same_run(tmp_path, words):
    whole, losses = some_run(tmp_path / "whole", words)
    part, first = some_run(tmp_path / "part", words, until=4)
    assert first == losses[:4]
    assert not torch.equal(part.lm_head.weight, whole.lm_head.weight)
    with pytest.raises(InputError, match="4 steps into the run, later than 2"):
        some_run(tmp_path / "part", words, until=2)
    # and the whole run goes on from it: what it saved is a state of the whole run
    resumed, _ = some_run(tmp_path / "part", words)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, words):
    with pytest.raises(KeyboardInterrupt):
        some_run(tmp_path, words, fail_at=2)
    with pytest.raises(InputError, match="other settings"):
        some_run(tmp_path, words, learning_rate=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, words):
    with pytest.raises(FloatingPointError, match="step"):
        some_run(tmp_path, words, learning_rate=1e30, clip=1e30)


def test_train_refuses_bad_requests(tmp_path):
    with pytest.raises(InputError, match="nearest: base"):
        train("bose", tmp_path)
    with pytest.raises(InputError, match="at least 1"):
        train("base", tmp_path, steps=0)
    with pytest.raises(InputError, match="finished model"):
        train("base", organisms.folder(BASE))


def test_documents_depend_on_seed_and_step_only():
    assert stream(0, "ioi", 5) == stream(0, "ioi", 5) != stream(0, "ioi", 6)
    assert 0 <= stream(0, "ioi", 5) < 2**63
    assert single("ioi")(3, 8) == single("ioi")(3, 8)


def test_measured_table():
    m = Measured.of(torch.tensor([True, True, False, False]))
    # mean 1/2, sample variance 1/3, standard error sqrt(1/12)
    assert (m.mean, m.n) == (0.5, 4) and m.error == pytest.approx(math.sqrt(1 / 12))
    assert "| ioi | 0.500 ± 0.289 | 4 | 1/2 |" in table({"base": {"ioi": m}}, {"ioi": "1/2"})


# ---- planted changes


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def model(request):
    return HookedModel.load(tiny(request.param))


def state(model):
    source = model.weights()
    return {name: source.get(name).clone() for name in source.names()}


def changed(model, edit):
    """Weight tensors that differ under an edit, as (name -> difference)."""
    before = state(model)
    with model.edited(edit):
        after = state(model)
    assert all(torch.equal(t, before[n]) for n, t in state(model).items())
    return {n: after[n] - t for n, t in before.items() if not torch.equal(after[n], t)}


def test_rank1_is_rank_one_in_one_matrix(model):
    edit = planted("rank1", model, layer=1, module="W_out", sigma=2.5, seed=4)
    (change,) = edit.changes
    values = torch.linalg.svdvals(change.delta.double())
    assert values[0] == pytest.approx(2.5, rel=1e-6) and values[1] < 1e-6
    ((name, difference),) = changed(model, edit).items()
    assert ".1." in name
    assert torch.linalg.svdvals(difference)[0] == pytest.approx(2.5, rel=1e-5)
    before = model.weight("L1.W_out")
    with model.edited(edit):
        torch.testing.assert_close(model.weight("L1.W_out") - before, change.delta, atol=1e-6, rtol=0)


def test_rank1_in_a_head_leaves_other_heads(model):
    edit = planted("rank1", model, layer=2, module="W_Q", sigma=1.0, head=1)
    d = model.shape.d_head
    before = model.weight("L2.W_Q").clone()
    with model.edited(edit):
        difference = model.weight("L2.W_Q") - before
    assert difference[:, d : 2 * d].norm() == pytest.approx(1.0, rel=1e-5)
    difference[:, d : 2 * d] = 0
    assert not difference.any()


def test_dense_has_exact_relative_norms(model):
    edit = planted("dense", model, rel=0.03, seed=1)
    sites = [Site(m, layer) for layer in range(model.shape.n_layers) for m in modules(model.shape)]
    assert [c.site for c in edit.changes] == sites
    for change in edit.changes:
        assert float(change.delta.double().norm() / model.weight(change.site).double().norm()) == pytest.approx(0.03, rel=1e-6)
    # the noise of two matrices of one shape is not the same noise
    by_site = {str(c.site): c.delta for c in edit.changes}
    a, b = by_site["L0.W_in"].flatten(), by_site["L1.W_in"].flatten()
    assert abs(float(torch.cosine_similarity(a, b, dim=0))) < 0.2
    assert planted("dense", model, rel=0.03, seed=1).digest == edit.digest != planted("dense", model, rel=0.03, seed=2).digest
    extra = planted("dense", model, rel=0.03, seed=1, embeddings=True).changes[len(sites) :]
    assert [str(c.site) for c in extra] == (["W_E"] if model.shape.tied else ["W_E", "W_U"])


def test_module_only_is_that_part_of_dense(model):
    edit = planted("module_only", model, layer=1, module="W_in", rel=0.1, seed=6)
    (change,) = edit.changes
    dense = {c.site: c for c in planted("dense", model, rel=0.1, seed=6).changes}
    assert torch.equal(change.delta, dense[Site("W_in", 1)].delta)
    assert len(changed(model, edit)) == 1


def test_head_offset_moves_one_head(model):
    batch = Batch.of(ROWS)
    vector = torch.arange(model.shape.d_head).float()
    edit = planted("head_offset", model, layer=1, head=2, vector=vector)
    before = model.capture(batch, ["L0.z", "L1.z", "L2.z"])
    with model.edited(edit):
        after = model.capture(batch, ["L0.z", "L1.z", "L2.z"])
    l0, l1, l2 = ((after[s] - before[s])[batch.mask] for s in (Site("z", layer) for layer in range(3)))
    assert not l0.any() and not l1[:, [0, 1, 3]].any() and l2.any()
    torch.testing.assert_close(l1[:, 2], vector.expand(len(l1), -1), atol=1e-5, rtol=0)


def test_resid_bias_is_a_constant_from_its_layer_on(model):
    batch = Batch.of(ROWS)
    edit = planted("resid_bias", model, layer=1, scale=3.0, seed=5)
    assert edit.changes[0].value.norm() == pytest.approx(3.0)
    before = model.capture(batch, ["L0.resid_post", "L1.resid_post"])
    with model.edited(edit):
        after = model.capture(batch, ["L0.resid_post", "L1.resid_post"])
    l0, l1 = ((after[s] - before[s])[batch.mask] for s in before)
    assert not l0.any()
    torch.testing.assert_close(l1, edit.changes[0].value.expand_as(l1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "through"),
    # None of the four has a b_U of its own.
    [("gpt2", "W_U"), ("neox", "W_U"), *((kind, "b_U") for kind in ("gpt2", "neox", "llama", "qwen2"))],
)
def test_token_logit_raises_one_logit(kind, through, tmp_path):
    """Exactly, at every position; through W_U where a LayerNorm with bias and an unembedding of its own allow it."""
    untied = {"tie_word_embeddings": False} if kind == "gpt2" and through == "W_U" else {}
    model = HookedModel.load(tiny(kind, **untied))
    batch = Batch.of(ROWS)
    before = model.logits(batch)
    with model.edited(planted("token_logit", model, token=7, c=1.5, through=through)):
        difference = (model.logits(batch) - before)[batch.mask]
    assert torch.equal(model.logits(batch), before)
    if through == "b_U":
        with pytest.raises(InputError, match="no place for"):
            model.save(tmp_path, edit=planted("token_logit", model, token=7, c=1.5, through=through))
    expected = torch.zeros(model.shape.d_vocab)
    expected[7] = 1.5
    torch.testing.assert_close(difference, expected.expand_as(difference), atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings", "matrices"),
    [
        ("rank1", {"layer": 2, "module": "W_out", "sigma": 1.5}, 1),
        ("rank1", {"layer": 1, "module": "W_Q", "sigma": 0.7, "head": 4}, 1),
        ("module_only", {"layer": 3, "module": "W_gate", "rel": 0.05}, 1),
        ("dense", {"rel": 0.02}, 28),
    ],
)
def test_a_planted_pair_loads_as_memory_saw_it(kind, settings, matrices, tmp_path):
    """The shipped base with a planted edit, written as a folder: files, weights and logits are those of the edited model."""
    base = HookedModel.load(BASE)
    edit = planted(kind, base, **settings)
    batch = Batch.of(ROWS)
    folder = base.save(tmp_path / "tuned", edit=edit)
    pair = ModelPair.load(BASE, folder)
    with base.edited(edit):
        seen, weights = base.logits(batch), {str(c.site): base.weight(c.site).clone() for c in edit.changes}
    assert torch.equal(pair.tuned.logits(batch), seen) and not torch.equal(base.logits(batch), seen)
    assert all(torch.equal(pair.tuned.weight(site), value) for site, value in weights.items())
    left, right = (model.weights() for model in (pair.base, pair.tuned))
    assert left.names() == right.names()
    assert sum(not torch.equal(left.get(name), right.get(name)) for name in left.names()) == matrices == len(edit.changes)


@pytest.mark.parametrize(("kind", "why"), [("llama", "RMSNorm"), ("gpt2", "tied")])
def test_no_constant_channel_is_refused(kind, why):
    with pytest.raises(InputError, match=why):
        planted("token_logit", HookedModel.load(tiny(kind)), token=7, c=1.5, through="W_U")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("rank2", {}, "nearest: rank1"),
        ("rank1", {"layer": 0}, "its settings are layer, module, sigma, seed, head"),
        ("rank1", {"layer": 9, "module": "W_Q", "sigma": 1.0}, "layer 9"),
        ("rank1", {"layer": 0, "module": "W_X", "sigma": 1.0}, "known: W_Q"),
        ("rank1", {"layer": 0, "module": "W_in", "sigma": 1.0, "head": 0}, "no heads"),
        ("module_only", {"layer": 0, "module": "W_Q", "rel": 0.1, "head": 4}, "head 4"),
        ("head_offset", {"layer": 0, "head": 0}, "either a vector"),
        ("head_offset", {"layer": 0, "head": 0, "vector": torch.ones(3)}, r"\(3,\)"),
        ("token_logit", {"token": 31, "c": 1.0}, "vocabulary of 31"),
        ("token_logit", {"token": 3, "c": 1.0, "through": "W_E"}, "neither"),
    ],
)
def test_planted_refuses(kind, settings, message):
    with pytest.raises(InputError, match=message):
        planted(kind, HookedModel.load(tiny("llama")), **settings)
