"""What heads attend to and write, against loops on plain models; planted heads; heads that only count tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_hooks
import pytest
import torch
from tiny_checkpoints import FOUR, sharp
from torch import Tensor

from interp import organisms, roles
from interp.analyses import head_roles as roles_of
from interp.analyses.head_roles import HeadRolesResult, head_roles
from interp.cli import main
from interp.errors import InputError
from interp.metrics import Metric
from interp.models import Batch, HookedModel, ModelPair
from interp.prompts import PromptPairs, Prompts

# 5 prompts of unequal lengths with repeats, 3 layers, 4 heads
ROWS = [[3, 4, 5, 4, 7, 4, 9], [10, 11, 10], [13, 14, 15, 14, 14], [18, 19, 20, 21, 22, 23, 19, 20], [24, 24, 24, 25]]
EPS = torch.finfo(torch.float32).eps


def by_hand(pattern: str, ids: list[int], query: int) -> set[int]:
    """The keys that a head of a kind attends to."""
    if pattern == "previous_token":
        return {query - 1} - {0, -1}
    if pattern == "duplicate_token":
        return {k for k in range(1, query) if ids[k] == ids[query]}
    return {k + 1 for k in range(query) if ids[k] == ids[query]}


@pytest.mark.parametrize("pattern", roles.PATTERNS)
def test_targets(pattern: roles.Pattern) -> None:
    found = roles.targets(pattern, Batch.of(ROWS))
    for row, ids in enumerate(ROWS):
        for query in range(8):
            keys = by_hand(pattern, ids, query) if query < len(ids) else set()
            assert set(found[row, query].nonzero().flatten().tolist()) == keys, (row, query)


def test_attention_of_a_head_by_hand() -> None:
    batch = Batch.of([[5, 6, 5, 6]])
    attention = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.7, 0.2, 0], [0.1, 0.2, 0.3, 0.4]])[None, None]
    # The second 5 looks at 6 behind the first 5 with 0.7, the second 6 at the second 5 with 0.3; the first token is no target.
    assert float(roles.paid(attention, roles.targets("induction", batch))) == pytest.approx((0.7 + 0.3) / 2)
    assert float(roles.paid(attention, roles.targets("duplicate_token", batch))) == pytest.approx(0.2)
    assert float(roles.paid(attention, roles.targets("previous_token", batch))) == pytest.approx((0.7 + 0.3) / 2)
    assert float(roles.paid(roles.even(batch)[:, None], roles.targets("induction", batch))) == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert roles.paid(attention, torch.zeros(1, 4, 4, dtype=torch.bool)).isnan().all()


@pytest.mark.parametrize("kind", FOUR)
def test_scores_are_those_of_plain_patterns(kind: str, monkeypatch: Any) -> None:
    hf = sharp(kind)
    model, batch = HookedModel.load(hf), Batch.of(ROWS)
    monkeypatch.setattr(roles, "_HELD", 4 * 3 * 4 * 64 * 2)  # two prompts at a time
    got = roles.scores(model, batch, [roles.targets(p, batch) for p in roles.PATTERNS])
    for row, ids in enumerate(ROWS):
        seen = plain_hooks.seen(hf, ids, [("pattern", layer) for layer in range(3)])
        for k, pattern in enumerate(roles.PATTERNS):
            asked = [q for q in range(len(ids)) if by_hand(pattern, ids, q)]
            for layer in range(3):
                x = seen["pattern", layer]
                want = torch.stack([x[:, q, list(by_hand(pattern, ids, q))].sum(-1) for q in asked]).mean(0) if asked else None
                cell = got[k, layer, :, row]
                assert cell.isnan().all() if want is None else torch.allclose(cell.float(), want, atol=1e-6), (pattern, row)


def test_rows_of_targets_are_those_of_the_whole() -> None:
    batch = Batch.of([[3, 5, 5, 6, 3, 5, 6], [4, 4, 4], [7, 8, 7, 8, 9]], {"S": ((4,), (1,), (3,))})
    for where in (batch.index("END"), batch.index("S"), batch.index(0)):
        rows = torch.arange(3)
        assert torch.equal(roles.even_from(batch, where), roles.even(batch)[rows, where])
        for pattern in roles.PATTERNS:
            assert torch.equal(roles.targets_from(pattern, batch, where), roles.targets(pattern, batch)[rows, where])


def test_looks_a_few_prompts_at_a_time_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of it needs the tokens of every query: what is held grows with the width, not with its square."""
    model = HookedModel.load(sharp("llama"))
    batch = Batch.of([[3, 5, 5, 6, 3, 5, 6], [4, 4, 4], [7, 8, 7, 8, 9], [2, 2]], {"S": ((4,), (1,), (3,), (0,))})
    once, rows = roles.looks(model, batch, ["END", "S", -1]), roles.attention_from(model, batch, "END")
    monkeypatch.setattr(roles, "_HELD", 1)
    monkeypatch.setattr(roles, "even", None)
    monkeypatch.setattr(roles, "targets", None)
    again = roles.looks(model, batch, ["END", "S", -1])
    for x, y in zip(once, again, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(roles.attention_from(model, batch, "END"), rows, atol=1e-6, rtol=0)


def test_looks_are_means_over_the_prompts_that_have_them() -> None:
    hf = sharp("llama")
    batch = Batch.of(ROWS, {"S": ((1,), (0,), (3,), (6,), (2,)), "set": ((0, 1), (2,), (), (5, 7), (3,))})
    seen, even = roles.looks(HookedModel.load(hf), batch, ["END", "S"])
    assert seen.shape == (2, 5, 3, 4) and even.shape == (2, 5)
    want: dict[tuple[int, int], list[Tensor]] = {}
    for row, ids in enumerate(ROWS):
        patterns = torch.stack([plain_hooks.seen(hf, ids, [("pattern", layer)])["pattern", layer] for layer in range(3)])
        for place, query in enumerate((len(ids) - 1, batch.at("S")[row][0])):
            keys = [by_hand(p, ids, query) for p in roles.PATTERNS] + [{k for k in batch.at(n)[row] if k <= query} for n in ("S", "set")]
            for k, some in enumerate(keys):
                if some:
                    want.setdefault((place, k), []).append(patterns[:, :, query, sorted(some)].sum(-1))
    for cell, found in want.items():
        assert torch.allclose(seen[cell].float(), torch.stack(found).mean(0), atol=1e-6)
    assert all(seen[p, k].isnan().all() for p in range(2) for k in range(5) if (p, k) not in want)


@pytest.mark.parametrize("kind", FOUR)
def test_what_a_head_writes_is_the_fall_without_it(kind: str) -> None:
    """The last stream less z W_O of a head, through the plain model's own final norm and unembedding."""
    hf: Any = sharp(kind)
    model = HookedModel.load(hf)
    asked = answered(model)
    got = roles.direct_effect(model, model.batch(asked), Metric.parse("logit_diff").reader(asked))
    last = {"gpt2": lambda: hf.transformer.ln_f, "neox": lambda: hf.gpt_neox.final_layer_norm}.get(kind, lambda: hf.model.norm)()
    for row, ids in enumerate(ROWS):
        a, b = asked.answers[row], asked.distractors[row]
        seen = plain_hooks.seen(hf, ids, [("z", layer) for layer in range(3)] + [("resid_post", 2)])
        stream = seen["resid_post", 2][-1]

        def judged(x: Tensor, a: int = a, b: int = b) -> float:
            with torch.no_grad():
                logits = hf.get_output_embeddings()(last(x[None]))[0]
            return float(logits[a] - logits[b])

        for layer in range(3):
            out = model.weight(f"L{layer}.W_O").reshape(4, -1, 24)
            for head in range(4):
                want = judged(stream) - judged(stream - seen["z", layer][-1, head] @ out[head])
                assert float(got[layer, head, row]) == pytest.approx(want, abs=64 * EPS * float(model.logits([ids]).abs().max()))


def answered(model: HookedModel) -> Prompts:
    logits = model.logits(ROWS, at="END")
    ids = tuple(map(tuple, ROWS))
    return Prompts(tuple(map(str, ROWS)), ids, answers=tuple(logits.argmax(1).tolist()), distractors=tuple(row[0] for row in ROWS))


# ---- random tokens that come twice


def test_repeats() -> None:
    made = organisms.hand_built("induction")
    model = made.model
    drawn, again, other = (roles.repeats(model, 6, seed) for seed in (0, 0, 1))
    assert torch.equal(drawn.twice.ids, again.twice.ids) and not torch.equal(drawn.twice.ids, other.twice.ids)
    assert torch.equal(roles.repeats(model, 3, 0).twice.ids, drawn.twice.ids[:3]), "more of them do not change the first ones"
    bos, half = model.tokenizer.bos_token_id, (drawn.twice.ids.shape[1] - 1) // 2
    for twice, once in zip(drawn.twice.ids.tolist(), drawn.once.ids.tolist(), strict=True):
        assert twice[0] == once[0] == bos and twice[1 : half + 1] == twice[half + 1 :] == once[1 : half + 1]
        assert len(set(once)) == len(once) and not set(once[1:]) & set(model.tokenizer.all_special_ids)
    bare = roles.repeats(HookedModel.load(sharp("gpt2")), 2, 0)
    assert bare.twice.ids.shape == (2, 18), "no tokenizer, nothing in front; 19 positions hold two halves of 9"
    with pytest.raises(InputError, match="n is 0, expected at least 1 sequence"):
        roles.repeats(model, 0, 0)


def test_planted_heads_have_their_names() -> None:
    made = organisms.hand_built("induction")
    result = head_roles(made.model, n=12)
    found = result.named()
    # Decoys attend as the planted heads do, and write what nobody reads: attention alone cannot tell them apart.
    assert sorted(found["induction"]) == [(1, 0), (1, 1)] and sorted(found["previous_token"]) == [(0, 0), (0, 1)]
    assert not found["duplicate_token"] and set(found) == set(roles.PATTERNS)
    assert float(result.score("previous_token")[0, 1].mean()) == pytest.approx(0.9, abs=1e-3)
    two_back = result.to_frame().query("site == 'L0H2.z' and role == 'previous_token'")
    assert two_back.score.item() < 0.01 and two_back.beside.item() == pytest.approx(0.9, abs=1e-3), "the control sees the offset"
    assert "induction L1H0, L1H1" in result.summary() and "n = 12 sequences" in result.summary()


def test_movers_and_inhibition_heads() -> None:
    made = organisms.hand_built("ioi")
    pairs = made.task.generate(made.model, 8, seed=3)
    result = head_roles(made.model, pairs, n=6)
    found = result.named()
    assert found["mover"] == [(3, 2)] and not found["negative_mover"], "its decoy looks there too and writes nothing that is read"
    assert sorted(found["inhibition"]) == [(2, 0), (2, 1), (2, 3)]
    assert float(result.direct[0, 3, 2].mean()) == pytest.approx(float(result.clean.mean()), rel=1e-3), "it alone writes the answer"
    hf: Any = copy.deepcopy(made.model.wrapped.source)
    hf.model.layers[3].self_attn.o_proj.weight.data *= -1
    tuned = HookedModel.load(hf, tokenizer=made.model.tokenizer)
    both = head_roles(ModelPair.load(made.model, tuned), pairs, n=6)
    assert both.named("base")["mover"] == both.named("tuned")["negative_mover"] == [(3, 2)] and not both.named("tuned")["mover"]
    by_place = head_roles(made.model, pairs, n=6, answer="IO")
    assert torch.equal(by_place.looks.nan_to_num(), result.looks.nan_to_num())
    assert head_roles(made.model, pairs.clean, n=6).named() == found


def test_prompts_of_one_context_count_once() -> None:
    """Ten times the same prompts, one context of them twice as often: the same names, means, intervals and tests."""
    made = organisms.hand_built("ioi")
    pairs = made.task.generate(made.model, 9, seed=3)
    pairs = pairs[[pairs.contexts.index(c) for c in dict.fromkeys(pairs.contexts)]]
    k = len(pairs)
    once, often = (head_roles(made.model, p, n=4) for p in (pairs, pairs[[*range(k), 0] * 10]))
    assert once.named() == often.named() and once.named()["mover"] == [(3, 2)]
    a, b = (r.to_frame().query("role not in @roles.PATTERNS") for r in (once, often))
    for name in ("effect", "effect_se", "score", "low", "high", "beside", "p", "p_adjusted", "direct"):
        assert b[name].to_numpy() == pytest.approx(a[name].to_numpy(), abs=1e-5), name
    assert f"and {k} prompts" in once.summary() and f"and {k} contexts of {10 * (k + 1)} prompts" in often.summary()
    table = often.to_frame(per="prompt")
    assert len(table[table.role == "mover"]) == 24 * 10 * (k + 1), "every prompt is in the table of prompts"


def test_contexts_weigh_the_same_over_the_prompts_that_have_a_value() -> None:
    values = torch.tensor([[1.0, 3.0, float("nan"), 5.0, float("nan")], [2.0, 4.0, float("nan"), 0.0, float("nan")]]).double()
    found = roles_of._means(values, torch.tensor([0, 0, 0, 1, 2]))
    assert found.tolist() == [[2.0, 5.0], [3.0, 0.0]]


def test_a_head_that_only_counts_tokens_is_no_induction_head(monkeypatch: Any) -> None:
    """It looks as many tokens back as a half is long, whatever stands there: all of its score is in the control."""
    made = organisms.hand_built("offset_copy")
    result = head_roles(made.model, n=6)
    whole = roles.repeats(made.model, 6, 0)
    half = (whole.twice.ids.shape[1] - 1) // 2
    fake = torch.zeros(3, 6, 5, *[whole.twice.ids.shape[1]] * 2)
    for q in range(half, fake.shape[-1]):
        fake[:, :, :, q, q - half + 1] = 1

    def counting(model: HookedModel, batch: Batch) -> Any:
        yield slice(0, 6), fake

    monkeypatch.setattr(roles, "patterns", counting)
    blind = head_roles(made.model, n=6)
    assert blind.score("induction").min() > 0.9 and not blind.named()["induction"]
    assert not result.named()["induction"]


def test_random_models_have_no_roles() -> None:
    model = HookedModel.load(sharp("llama"))
    result = head_roles(model, n=9)
    flat = result.to_frame()
    assert flat.effect.abs().max() < 0.5
    same = head_roles(ModelPair.load(model, HookedModel.load(sharp("llama"))), n=9)
    assert torch.equal(same.attention[0], same.attention[1]) and same.named("base") == same.named("tuned")
    change = [figure for name, figure in same.figures().items() if "tuned - base" in name]
    assert len(change) == 3


def test_tables_and_files(tmp_path: Path) -> None:
    made = organisms.hand_built("ioi")
    result = head_roles(made.model, made.task.generate(made.model, 8), n=6)
    frame, each = result.to_frame(), result.to_frame(per="prompt")
    assert len(frame) == 6 * 24 and len(each) == 3 * 24 * 6 + 3 * 24 * 8
    means = each.groupby(["role", "site"], sort=False).score.mean()
    assert frame.score.to_numpy() == pytest.approx(means.to_numpy(), abs=1e-6)
    assert (frame.effect - (frame.score - frame.beside)).abs().max() < 1e-9
    named = {(role, f"L{a}H{b}.z") for role, heads in result.named().items() for a, b in heads}
    assert (
        set(map(tuple, frame[frame.named][["role", "site"]].to_numpy()))
        == named
        == set(map(tuple, result.strongest(99)[["role", "site"]].to_numpy()))
    )
    again = HeadRolesResult.load(result.save(tmp_path / "one"))
    assert again.summary() == result.summary() and again.to_frame().equals(frame)
    assert list(result.figures()) == list(result.roles) and result.plot()


def test_wrong_input() -> None:
    model = HookedModel.load(sharp("llama"))
    asked = answered(model)
    wrong = (
        ("these prompts have none", replace(asked, answers=None), {}),
        ("no position named 'I0'", asked, {"answer": "I0"}),
        ("judges what is written for the answer at END, which kl does not", asked, {"metric": "kl"}),
        ("needs one distractor token per prompt", replace(asked, distractors=None), {}),
    )
    for said, given, settings in wrong:
        with pytest.raises(InputError, match=said):
            head_roles(model, given, n=2, **settings)
    result = head_roles(model, replace(asked, distractors=None), n=2, metric="answer_logprob")
    assert not result.named()["inhibition"] and "no inhibition (no prompt has what it looks at)" in result.summary()
    for call in (lambda: result.score("movers"), lambda: result.named("base"), lambda: result.to_frame(per="head")):
        with pytest.raises(InputError):
            call()
    assert isinstance(head_roles(model, PromptPairs(asked, asked), n=2), HeadRolesResult)


def test_the_command_needs_no_prompts(tmp_path: Path, capsys: Any) -> None:
    assert main(["run", "head_roles", "--model=base", "--n=3", f"--out={tmp_path}"]) == 0
    (place,) = (tmp_path / "results" / "head_roles").iterdir()
    assert main(["replay", str(place)]) == 0 and "to the last bit" in capsys.readouterr().out
    assert main(["run", "circuit_discovery", "--model=base", f"--out={tmp_path}"]) == 2 and "needs --prompts" in capsys.readouterr().err
