"""What a notebook cell shows of models, prompts, sites, circuits and edits; and figures as image files."""

import shutil

import pytest
import torch
from tiny_checkpoints import tiny

import interp
from interp import plots
from interp.circuit import Circuit
from interp.edits import ActivationChange, Edit, WeightChange
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.plots.cell import SHOWN, facts, table
from interp.prompts import PromptPairs, Prompts
from interp.sites import Heads, Site


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.load("base", "boxes-tuned")


def test_texts_and_a_model_make_prompts(pair) -> None:
    texts, answers = ["The ring is in the", "The key"], [" box", " is"]
    for reader in (pair, pair.base):
        made = Prompts(texts, reader, answers=answers, distractors=list(reversed(answers)))
        slow = Prompts.of(reader, texts, answers, list(reversed(answers)))
        assert made.digest == slow.digest and made.texts == tuple(texts)
    assert made.answers == tuple(pair.token(word) for word in answers)
    assert Prompts("The key", pair).ids == (tuple(pair.tokens("The key")),)
    assert Prompts((t for t in texts), pair).texts == tuple(texts)
    assert Prompts(texts, pair)[1:].texts == ("The key",)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda pair: Prompts(["a"]), r"write Prompts\(texts, model\)"),
        (lambda pair: Prompts(["a"], 3), "a int has none"),
        (lambda pair: Prompts([], pair), "there are no prompts"),
        (lambda pair: Prompts(["a", ""], pair), "prompt 1|empty"),
        (lambda pair: Prompts(["a"], pair, answers=[" box", " key"]), "2 answers for 1 prompts"),
        (lambda pair: Prompts(["The ring is in the"], pair, answers=[" unbelievable things"]), "one token|tokens"),
    ],
)
def test_what_cannot_be_prompts(pair, make, said) -> None:
    with pytest.raises(InputError, match=said):
        make(pair)


def test_values_are_told_in_a_line() -> None:
    assert eval(repr(Site("z", 9, 6, "END"))) == Site.parse("L9H6.z@END")  # noqa: S307
    assert eval(repr(Heads.parse("movers=L9H6,L9H9@END; L7H3@S2"))) == Heads.parse("movers=L9H6,L9H9@END; L7H3@S2")  # noqa: S307
    circuit = Circuit.of((3, 2, 1), {"movers": "L1H0.z@END", "senders": ["L0H1.z@S2", "L0H0.z@S2"]})
    assert repr(circuit) == "<Circuit of 3 nodes and 0 edges in a model of 3 layers with 2 heads: L0H0.z@S2, L0H1.z@S2, L1H0.z@END>"
    edit = Edit((WeightChange(Site("W_in", 0), torch.ones(2, 1), torch.full((1, 2), 2.0)),), "flat")
    assert repr(edit) == "<Edit 'flat' of add to L0.W_in>" and repr(Edit(())) == "<Edit of nothing>"
    assert "rank 1, norm 4" in edit._repr_html_()  # 2 x 2 twos
    steering = Edit((ActivationChange(Site("resid_post", 1), "add", torch.tensor([3.0, 4.0])),))
    assert "norm 5" in steering._repr_html_() and repr(steering) == "<Edit of add L1.resid_post>"
    assert "only attends to" in interp.attention_edit("L0H1", keys="S2")._repr_html_()


def test_cells_of_models_load_nothing(pair) -> None:
    fresh = ModelPair.load("base", "boxes-tuned")
    shown = fresh._repr_html_() + fresh.base._repr_html_()
    assert not fresh.base.loaded and not fresh.tuned.loaded
    assert "LlamaForCausalLM" in shown and "not loaded yet" in shown and "neither yet" in shown and repr(fresh) == repr(pair)
    hf = tiny("gpt2")
    model = HookedModel.load(hf)
    edit = Edit((WeightChange(Site("W_in", 0), torch.zeros(tuple(model.weight("L0.W_in").shape))),), "<b>nothing</b>")
    with model.edited(edit):
        shown = model._repr_html_()
    assert "a model in memory" in shown and "&lt;b&gt;nothing" in shown and "<b>nothing" not in shown
    assert "edits in force" not in model._repr_html_()


def test_cells_of_prompts_are_escaped_and_bounded(pair) -> None:
    many = Prompts([f"<script>{i}" for i in range(SHOWN + 3)], pair)
    shown = many._repr_html_()
    assert "<script>" not in shown and shown.count("&lt;script") == SHOWN and "and 3 more" in shown
    pairs = interp.task("ioi").generate(pair, 2)
    assert isinstance(pairs, PromptPairs) and pairs.corrupt.texts[1] in pairs._repr_html_().replace("&#39;", "'")
    assert "more" not in pairs._repr_html_() and "2 prompts of ioi" in repr(pairs)
    assert len(repr(many)) < 120


def test_facts_and_tables() -> None:
    assert facts("a", {"x": 0, "y": "", "z": None, "w": True}).count("<tr>") == 2  # 0 and True are facts
    assert table("t", ("a",), [(1,), (2,)], of=5).count("<tr>") == 3 and "and 3 more" in table("t", ("a",), [(1,), (2,)], of=5)


@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="no browser to draw in")
def test_figures_become_image_files(tmp_path) -> None:
    pytest.importorskip("kaleido")
    figure = plots.bars(["<a>", "b"], {"base": [1.0, 2.0]}, title="t")
    figure.write_image(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / "figure.png").stat().st_size > 3000
