"""The shipped organisms are what their cards say, training resumes to the bit, planted changes do what they promise."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from tiny_checkpoints import tiny

from interp import organisms
from interp.errors import InputError
from interp.models import Batch, HookedModel
from interp.models.weights import modules
from interp.organisms import planted, training
from interp.organisms.measure import Measured, fingerprint, nats, recited, table
from interp.organisms.recipes import RECIPES, train
from interp.organisms.recipes.run import MEASURED, documents
from interp.organisms.tokenizer import END_OF_TEXT, train_tokenizer
from interp.organisms.training import Document, Part, Rows, Schedule, encode, stream
from interp.sites import Site
from interp.tasks import task

BASE, TUNED = organisms.shipped_pair()
SKILL = "arithmetic"
ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7]]


@pytest.fixture(scope="module")
def loaded():
    """Name -> (plain Hugging Face model, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {name: organisms.folder(name) for name in (BASE, TUNED)}
    return {n: (AutoModelForCausalLM.from_pretrained(f).eval(), AutoTokenizer.from_pretrained(f)) for n, f in folders.items()}


# ---- the shipped ones


def test_names_folders_and_cards():
    assert {BASE, TUNED} <= set(organisms.names()) and set(organisms.names()) <= set(RECIPES)
    for name in organisms.names():
        assert (organisms.folder(name) / "model.safetensors").is_file()
        assert organisms.card(name).split("---")[2].strip().startswith(f"# {name}")
    with pytest.raises(InputError, match="nearest: base"):
        organisms.folder("bass")


def test_names_need_no_torch():
    code = "import sys; from interp import organisms; organisms.names(); organisms.card('base'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [BASE, TUNED])
def test_card_has_the_fingerprint_and_every_measured_task(name):
    card = organisms.card(name)
    assert fingerprint(organisms.folder(name)) in card
    rows = re.findall(r"^\| ([^|]+?) \|.*± .*\| (\d+) \|", card, re.M)
    assert [task for task, _ in rows] == list(MEASURED)
    assert all(int(n) >= 500 for task, n in rows if task != "recitation")
    assert not re.search(r"\d\d:\d\d|\bminutes\b|\bseconds\b", card)


def test_the_pair_is_small_and_its_sizes_differ(loaded):
    size = sum(f.stat().st_size for name in (BASE, TUNED) for f in organisms.folder(name).iterdir())
    assert size < 12e6
    shape = HookedModel.load(BASE).shape
    sizes = [
        shape.n_layers,
        shape.d_model,
        shape.n_heads,
        shape.n_kv_heads,
        shape.d_head,
        shape.d_mlp,
        shape.d_vocab,
        shape.n_heads * shape.d_head,
    ]
    assert len(set(sizes)) == len(sizes)
    assert sum(p.numel() for p in loaded[BASE][0].parameters()) <= 1.2e6


def share(loaded, name, text, n=100):
    return float(recited(*loaded[name], documents(text)(n, 77)).float().mean())


def test_behaviour_of_base(loaded):
    assert share(loaded, BASE, "ioi") >= 0.9
    assert share(loaded, BASE, "facts") >= 0.95
    assert share(loaded, BASE, "facts(book=1)") <= 0.2
    assert share(loaded, BASE, SKILL) <= 0.3


def test_behaviour_of_tuned(loaded):
    assert share(loaded, TUNED, SKILL) >= 0.8
    assert share(loaded, TUNED, "ioi") >= 0.9
    assert share(loaded, TUNED, "facts") >= 0.9


def test_plain_text_is_known_but_not_beyond_its_entropy(loaded):
    """No model is better than the entropy of the grammar, 3 standard errors allowed; one that knows it is not far off."""
    texts = task("plain_text").examples(200, 77)
    for name, slack in ((BASE, 0.15), (TUNED, 0.5)):
        model, tokenizer = loaded[name]
        counts = torch.tensor([len(tokenizer(e.text)["input_ids"]) for e in texts])
        # A rate per text: all its tokens but the first, which nothing predicts; so the entropy is a bound from below only about.
        losses = nats(model, tokenizer, [Document(e.text) for e in texts]) * counts
        excess = losses - torch.tensor([float(e.tags["nats"]) for e in texts])
        mean, error = float(excess.mean()), float(excess.std() / len(texts) ** 0.5)
        assert -3 * error - 2.0 < mean < slack * float(counts.float().mean())


def test_hooked_model_sees_the_same_behaviour(loaded):
    """The measurement on the plain model against logits of a hooked one, prompt by prompt."""
    asked = documents("ioi")(20, 5)
    model = HookedModel.load(TUNED)
    first = model.logits([d.text for d in asked], at="END").argmax(-1)
    answers = torch.tensor([model.token(d.answer) for d in asked])
    assert (first == answers).tolist() == recited(*loaded[TUNED], asked).tolist()


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


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(["go left then right and up"] * 3, ["left", "right", "up"], 270)


def test_encode_by_hand(words):
    rows = encode([Document("go", " left right"), Document("go up")], words, 5)
    go, (left, right, up) = words("go")["input_ids"], (words(w)["input_ids"][0] for w in (" left", " right", " up"))
    assert rows.ids.tolist() == [[*go, left, right, 0], [*go, up, 0, 0]]
    # Nothing predicts the first token; the end-of-text token counts once, padding never.
    assert rows.weights.tolist() == [[0] + [1] * (len(go) - 1) + [5, 5, 1], [0] + [1] * (len(go) - 1) + [1, 1, 0]]
    with pytest.raises(InputError, match="begin the answer with a space"):
        encode([Document("go le", "ft")], words, 1)


def test_loss_is_the_weighted_mean():
    model = tiny("llama")
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    weights = torch.tensor([[9.0, 1.0, 4.0], [9.0, 1.0, 0.0]])
    logp = model(input_ids=ids).logits.log_softmax(-1)
    by_hand = -(logp[0, 0, 4] + 4 * logp[0, 1, 5] + logp[1, 0, 7]) / 6
    torch.testing.assert_close(training.loss(model, Rows(ids, weights)), by_hand)


def test_learning_rate():
    s = Schedule(steps=100, seed=0, learning_rate=1.0, warmup=10)
    assert [s.rate(0), s.rate(9), s.rate(10)] == pytest.approx([0.1, 1.0, 1.0]) and s.rate(55) == pytest.approx(0.55)
    assert s.rate(100) == pytest.approx(0.1)


def draw(n, seed):
    order = [(seed >> i) % 3 for i in range(n)]
    return [Document("go" + " left" * i, " right" if i % 2 else " up") for i in order]


def some_run(folder, words, steps=6, fail_at=None, **schedule):
    """A tiny model after ``steps`` steps; ``fail_at`` stops it in the middle of a step."""
    model = tiny("llama", vocab_size=270)
    seeds = [stream(3, "turns", step) for step in range(steps)]

    def failing(n, seed):
        if fail_at is not None and seed == seeds[fail_at]:
            raise KeyboardInterrupt
        return draw(n, seed)

    parts = [Part("turns", failing, 4, answer_weight=3), Part("ups", draw, 2, share=0.5)]
    settings = Schedule(**{"steps": steps, "seed": 3, "warmup": 2, **schedule})
    seen = []
    training.train(model, words, parts, settings, folder, save_every=1, log=lambda step, losses: seen.append((step, losses)))
    return model, seen


def test_killed_and_resumed_equals_unbroken(tmp_path, words):
    whole, losses = some_run(tmp_path / "whole", words)
    with pytest.raises(KeyboardInterrupt):
        some_run(tmp_path / "broken", words, fail_at=3)
    resumed, later = some_run(tmp_path / "broken", words)
    assert [step for step, _ in losses] == list(range(6)) and later == losses[3:]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = tiny("llama", vocab_size=270)
    assert not torch.equal(fresh.lm_head.weight, whole.lm_head.weight)


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
    assert documents("ioi")(3, 8) == documents("ioi")(3, 8)


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
