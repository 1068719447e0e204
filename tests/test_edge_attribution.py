"""Edge attribution against plain Hugging Face models whose inputs are split by hand, and against circuits written into weights."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import transformers
from tiny_checkpoints import FOUR, GQA, randomised, tiny
from torch import Tensor

from interp import organisms
from interp.analyses.edge_attribution import EdgeAttributionResult, edge_attribution
from interp.circuit import Circuit, Edge
from interp.errors import InputError
from interp.metrics import Metric, Targets
from interp.models import HookedModel, ModelPair
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site
from interp.stats import changed, permutation, ratio_of_means
from interp.sweeps.edges import Meeting, edge_scores

LAYERS, HEADS = 3, 4
# 5 pairs of 4 to 7 tokens; the two prompts of a pair have one length
CLEAN = [[3, 4, 5, 6, 7, 8], [10, 11, 12, 29], [13, 14, 15, 16, 17], [24, 25, 26, 27, 28, 1, 2], [7, 9, 11, 13]]
CORRUPT = [[3, 4, 9, 6, 7, 2], [12, 11, 12, 30], [13, 1, 15, 16, 16], [24, 5, 26, 30, 28, 1, 3], [8, 9, 11, 12]]
LEVEL = [[3, 4, 5, 6, 7], [10, 11, 12, 29, 8], [13, 14, 15, 16, 17]]
LEVEL_TOO = [[3, 4, 9, 6, 7], [12, 11, 12, 29, 6], [13, 1, 15, 16, 16]]


def prompts(rows: list[list[int]], **positions: tuple[tuple[int, ...], ...]) -> Prompts:
    return Prompts(tuple(" ".join(map(str, r)) for r in rows), tuple(map(tuple, rows)), positions=positions)


def toward(model: HookedModel, clean: Prompts, corrupt: Prompts) -> PromptPairs:
    """Pairs whose answer is what the clean prompt raises most."""
    gap = model.logits(clean, at="END") - model.logits(corrupt, at="END")
    return PromptPairs(replace(clean, answers=tuple(gap.argmax(-1).tolist()), distractors=tuple(gap.argmin(-1).tolist())), corrupt)


# ---- the slow twin: one unpadded prompt at a time on the plain model, every input of every reader a variable of its own

PARTS = {
    "llama": ("model.layers", "input_layernorm", "post_attention_layernorm", "self_attn", "o_proj", "model.norm"),
    "qwen2": ("model.layers", "input_layernorm", "post_attention_layernorm", "self_attn", "o_proj", "model.norm"),
    "gpt2": ("transformer.h", "ln_1", "ln_2", "attn", "c_proj", "transformer.ln_f"),
    "neox": (
        "gpt_neox.layers",
        "input_layernorm",
        "post_attention_layernorm",
        "attention",
        "dense",
        "gpt_neox.final_layer_norm",
    ),
}


class Twin:
    """A plain model whose readers can each be given an input of their own: what the stream holds plus ``added[reader]``."""

    def __init__(self, kind: str, hf: Any) -> None:
        self.kind, self.hf = kind, hf
        hf.set_attn_implementation("eager")
        blocks, self.ln1, self.ln2, self.attn, self.out, final = PARTS[kind]
        self.blocks, self.final = list(hf.get_submodule(blocks)), hf.get_submodule(final)
        c = hf.config
        self.heads, self.kv = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
        self.d_head = getattr(c, "head_dim", None) or c.hidden_size // self.heads

    def readers(self) -> list[str]:
        per = [f"H{h}.q" for h in range(self.heads)] + [f"H{h}.{c}" for c in "kv" for h in range(self.kv)] + [".resid_mid"]
        return [f"L{i}{r}" for i in range(len(self.blocks)) for r in per] + [f"L{len(self.blocks) - 1}.resid_post"]

    def senders(self) -> list[str]:
        return ["embed", *(f"L{i}{s}" for i in range(len(self.blocks)) for s in [*(f"H{h}.z" for h in range(self.heads)), ".mlp_out"])]

    def edges(self) -> list[tuple[str, str]]:
        """Who writes before whom, spelled out: by layer, and within a layer only attention before a sequential MLP."""
        found = []
        for s in self.senders():
            for r in self.readers():
                i, j = (-1 if s == "embed" else int(s[1])), int(r[1])
                within = ".z" in s and "resid_mid" in r and self.kind != "neox"
                if i < j or r.endswith("resid_post") or (i == j and within):
                    found.append((s, r))
        return found

    def projections(self, block: Any) -> list[tuple[Any, dict[tuple[str, int], slice]]]:
        """The modules that make q, k and v, and which of their outputs belong to which head."""
        attn, d = getattr(block, self.attn), self.d_head
        if self.kind == "gpt2":
            return [
                (
                    attn.c_attn,
                    {
                        (c, h): slice((i * self.heads + h) * d, (i * self.heads + h + 1) * d)
                        for i, c in enumerate("qkv")
                        for h in range(self.heads)
                    },
                )
            ]
        if self.kind == "neox":
            return [
                (
                    attn.query_key_value,
                    {(c, h): slice((3 * h + i) * d, (3 * h + i + 1) * d) for i, c in enumerate("qkv") for h in range(self.heads)},
                )
            ]
        n = {"q": self.heads, "k": self.kv, "v": self.kv}
        return [(getattr(attn, f"{c}_proj"), {(c, h): slice(h * d, (h + 1) * d) for h in range(n[c])}) for c in "qkv"]

    def run(self, ids: list[int], added: dict[str, Tensor], start: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the last token, and what every part sent."""
        sent: dict[str, Tensor] = {}
        stream: dict[Any, Tensor] = {}
        handles = []

        def remember(key):
            return lambda m, args: stream.update({key: args[0]})

        def project(i, module, ln, parts):
            def hook(m, args, out):
                out = out.clone()
                for (c, h), part in parts.items():
                    if (e := added.get(f"L{i}H{h}.{c}")) is not None:
                        y = ln.forward(stream[i, "pre"] + e)
                        bias = 0 if m.bias is None else m.bias
                        whole = y @ m.weight + bias if self.kind == "gpt2" else y @ m.weight.T + bias
                        out[..., part] = whole[..., part]
                return out

            return hook

        def mlp_input(i, ln):
            def hook(m, args):
                e = added.get(f"L{i}.resid_mid")
                return None if e is None else (ln.forward(stream[i, "mid"] + e),)

            return hook

        def enter(m, args):
            x = args[0] if start is None else start
            sent["embed"] = x
            return (x, *args[1:])

        def keep_z(i, m):
            def hook(_, args):
                weight = m.weight if self.kind == "gpt2" else m.weight.T
                for h in range(self.heads):
                    part = slice(h * self.d_head, (h + 1) * self.d_head)
                    sent[f"L{i}H{h}.z"] = args[0][..., part] @ weight[part]

            return hook

        handles.append(self.blocks[0].register_forward_pre_hook(enter))
        for i, block in enumerate(self.blocks):
            ln1, ln2, out = getattr(block, self.ln1), getattr(block, self.ln2), getattr(getattr(block, self.attn), self.out)
            handles.append(ln1.register_forward_pre_hook(remember((i, "pre"))))
            handles.append(ln2.register_forward_pre_hook(remember((i, "mid"))))
            handles += [m.register_forward_hook(project(i, m, ln1, parts)) for m, parts in self.projections(block)]
            handles.append(out.register_forward_pre_hook(keep_z(i, out)))
            handles.append(block.mlp.register_forward_pre_hook(mlp_input(i, ln2)))
            handles.append(block.mlp.register_forward_hook(lambda m, a, out, i=i: sent.update({f"L{i}.mlp_out": out})))
        last = f"L{len(self.blocks) - 1}.resid_post"
        handles.append(self.final.register_forward_pre_hook(lambda m, args: (args[0] + added[last],) if last in added else None))
        try:
            return self.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1], sent
        finally:
            for handle in handles:
                handle.remove()

    def scores(
        self, pairs: PromptPairs, method: str = "eap", steps: int = 1, meets: list[dict[int, int]] | None = None
    ) -> dict[tuple[str, str], Tensor]:
        """Every edge's score per prompt; ``meets`` says which corrupt token stands against a clean one, by default the same."""
        out: dict[tuple[str, str], list[float]] = {edge: [] for edge in self.edges()}
        for i in range(len(pairs)):
            a, b = (pairs.answers or ())[i], (pairs.distractors or ())[i]
            with torch.no_grad():
                base, here = self.run(list(pairs.clean.ids[i]), {})
                _, there = self.run(list(pairs.corrupt.ids[i]), {})
            change = {s: torch.zeros_like(here[s]) for s in self.senders()}
            for s in self.senders():
                for clean, corrupt in (meets[i] if meets else {t: t for t in range(len(pairs.clean.ids[i]))}).items():
                    change[s][0, clean] = there[s][0, corrupt] - here[s][0, clean]
            if method == "exact":
                for s, r in self.edges():
                    with torch.no_grad():
                        logits, _ = self.run(list(pairs.clean.ids[i]), {r: change[s]})
                    out[s, r].append(float((base[a] - base[b]) - (logits[a] - logits[b])))
                continue
            shares = [0.0] if method == "eap" else [(k + 0.5) / steps for k in range(steps)]
            slope = {r: torch.zeros_like(base) for r in self.readers()}
            for share in shares:
                own = {r: torch.zeros_like(change["embed"]).requires_grad_() for r in self.readers()}
                logits, _ = self.run(list(pairs.clean.ids[i]), own, here["embed"] + share * change["embed"])
                grads = torch.autograd.grad(logits[a] - logits[b], list(own.values()))
                slope = {r: (0 if share == shares[0] else slope[r]) + g / len(shares) for r, g in zip(own, grads, strict=True)}
            for s, r in self.edges():
                out[s, r].append(-float((change[s] * slope[r]).sum()))
        return {edge: torch.tensor(v, dtype=torch.float64) for edge, v in out.items()}


def table(result: EdgeAttributionResult, column: str = "effect") -> dict[tuple[str, str], float]:
    frame = result.to_frame()
    assert list(frame.edge) == list(result.edges)
    return {(s, r): v for s, r, v in zip(frame.sender, frame.receiver, frame[column], strict=True)}


def agree(result: EdgeAttributionResult, slow: dict[tuple[str, str], Tensor], tolerance: float) -> None:
    got, errors = table(result), table(result, "effect_se")
    assert got.keys() == slow.keys()  # these edges and no others
    top = max(float(v.mean().abs()) for v in slow.values())
    for edge, values in slow.items():
        assert abs(got[edge] - float(values.mean())) <= tolerance * top, edge
        assert abs(errors[edge] - float(values.std() / math.sqrt(len(values)))) <= tolerance * top, edge


@pytest.fixture(scope="module", params=FOUR)
def case(request: Any) -> tuple[Twin, HookedModel, PromptPairs]:
    hf = tiny(request.param, seed=2)
    model = HookedModel.load(hf)
    return Twin(request.param, hf), model, toward(model, prompts(CLEAN), prompts(CORRUPT))


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel.load(tiny("llama", seed=2))


@pytest.fixture(scope="module")
def pairs(llama: HookedModel) -> PromptPairs:
    clean = prompts(CLEAN, S=((1,), (0,), (2,), (3,), (1,)), words=((3, 4), (0, 1), (1, 2), (1, 3), (0, 2)))
    corrupt = prompts(CORRUPT, S=((1,), (0,), (2,), (3,), (1,)), words=((3, 4), (0, 1), (1, 2), (1, 3), (0, 2)))
    return toward(llama, clean, corrupt)


@pytest.fixture(scope="module")
def level(llama: HookedModel) -> PromptPairs:
    return toward(llama, prompts(LEVEL), prompts(LEVEL_TOO))


# ---- against the twin


def test_first_order_is_that_of_split_inputs(case: Any) -> None:
    twin, model, pairs = case
    agree(edge_attribution(model, pairs), twin.scores(pairs), 1e-5)


def test_integrated_gradients_are_those_of_split_inputs(case: Any) -> None:
    twin, model, pairs = case
    agree(edge_attribution(model, pairs, method="eap_ig", steps=3), twin.scores(pairs, "eap_ig", 3), 1e-5)


def test_exact_is_one_plain_run_per_edge(case: Any) -> None:
    twin, model, pairs = case
    agree(edge_attribution(model, pairs[:3], method="exact"), twin.scores(pairs[:3], "exact"), 2e-5)


def test_in_double_precision() -> None:
    """Of the four, only GPT-2 computes everything in the precision of its weights (not its norms or softmax in float32)."""
    kind, hf = "gpt2", tiny("gpt2", seed=2).double()
    model = HookedModel.load(hf)
    pairs = toward(model, prompts(CLEAN), prompts(CORRUPT))
    result = edge_attribution(model, pairs)
    assert result.score[0].dtype == torch.float64
    agree(result, Twin(kind, hf).scores(pairs), 1e-10)


# ---- what first order means, and what adds up


def test_the_error_of_first_order_is_of_second_order() -> None:
    """The corrupt word moves towards the clean one: what eap leaves out shrinks with the square of the way."""
    hf: Any = tiny("gpt2", seed=2).double()
    twin, model = Twin("gpt2", hf), HookedModel.load(hf)
    table_of_words = hf.transformer.wte.weight
    pairs = toward(model, prompts([[3, 4, 5, 6], [7, 5, 9, 4]]), prompts([[3, 4, 30, 6], [7, 30, 9, 4]]))
    way = table_of_words[30].detach().clone() - table_of_words[5].detach()
    left = []
    for share in (1e-1, 1e-2, 1e-3):
        with torch.no_grad():
            table_of_words[30] = table_of_words[5] + share * way
        slow = twin.scores(pairs, "exact")
        got = table(edge_attribution(model, pairs))
        left.append(max(abs(got[e] - float(v.mean())) for e, v in slow.items()))
    assert left[0] > 0 and all(60 < a / b < 160 for a, b in zip(left, left[1:], strict=False)), left


def test_edges_out_of_a_node_add_up_to_its_attribution(case: Any) -> None:
    _, model, pairs = case
    score = edge_attribution(model, pairs).score[0][..., 0].nansum(1)
    sites = [Site("resid_pre", 0), *(Site(c, i) for i in range(LAYERS) for c in ("z", "mlp_out"))]
    clean, corrupt = model.capture(pairs.clean, sites), model.capture(pairs.corrupt, sites)
    a, b = torch.tensor(pairs.answers), torch.tensor(pairs.distractors)
    rows, ends = torch.arange(len(pairs)), pairs.clean.batch().index("END")

    def loss(logits: Tensor) -> Tensor:
        return (logits[rows, ends, a] - logits[rows, ends, b]).sum()

    slope = model.gradients(pairs.clean, loss, sites)
    whole = []
    for site in sites:
        each = -(corrupt[site] - clean[site]) * slope[site] / len(pairs)
        whole += each.sum((0, 1, 3)).tolist() if site.component == "z" else [float(each.sum())]
    assert torch.allclose(score, torch.tensor(whole, dtype=torch.float64), atol=2e-5 * float(score.abs().max()))


def test_edges_out_of_the_input_add_up_to_the_whole_fall(case: Any) -> None:
    """Integrated gradients are complete; the midpoint rule gets there with the square of the steps."""
    _, model, pairs = case
    few, many = (edge_attribution(model, pairs, method="eap_ig", steps=n) for n in (20, 80))
    gap = float((many.clean - many.corrupt).mean())
    left = [abs(float(r.score[0][0, :, 0].nansum()) - gap) for r in (few, many)]
    assert left[1] < 0.01 * abs(gap) and left[1] < left[0] + 1e-4


def test_edges_into_the_logits_add_up_to_the_stream() -> None:
    """With everything before it frozen, the whole stream at END is the sum of what was sent there."""
    model = HookedModel.load(tiny("gpt2", seed=2).double())
    pairs = toward(model, prompts(CLEAN), prompts(CORRUPT))
    last = Site("resid_post", LAYERS - 1)
    clean, corrupt = (model.capture(side, last.at("END"))[last.at("END")] for side in (pairs.clean, pairs.corrupt))
    a, b = torch.tensor(pairs.answers), torch.tensor(pairs.distractors)
    rows, ends = torch.arange(len(pairs)), pairs.clean.batch().index("END")
    slope = model.gradients(pairs.clean, lambda x: (x[rows, ends, a] - x[rows, ends, b]).sum(), last.at("END"))[last.at("END")]
    into = edge_attribution(model, pairs).score[0][:, -1, 0].sum()
    assert float(into) == pytest.approx(-float(((corrupt - clean) * slope).sum()) / len(pairs), rel=1e-10)


@pytest.mark.parametrize("method", ["eap", "eap_ig", "exact"])
def test_prompts_alone_and_together(llama: HookedModel, pairs: PromptPairs, method: Any) -> None:
    """Padding adds nothing, and how prompts are put into passes changes nothing."""
    pairs = pairs[:3] if method == "exact" else pairs
    together = edge_attribution(llama, pairs, method=method)
    alone = torch.stack([edge_attribution(llama, pair, method=method).score[0] for pair in pairs])
    assert torch.allclose(together.score[0], alone.mean(0), atol=1e-5, equal_nan=True)
    assert torch.allclose(together.error[0], alone.std(0) / math.sqrt(len(pairs)), atol=1e-5, equal_nan=True)
    small = HookedModel.load(llama.wrapped.source)
    small._budget.size = 1
    split = edge_attribution(small, pairs, method=method)
    for a, b in ((together.score[0], split.score[0]), (together.error[0], split.error[0]), (together.clean, split.clean)):
        assert torch.allclose(a, b, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("method", ["eap", "eap_ig"])
def test_positions_add_up(llama: HookedModel, level: PromptPairs, method: Any) -> None:
    total, each = (edge_attribution(llama, level, method=method, per_position=p) for p in (False, True))
    assert each.labels["position"] == ("0", "1", "2", "3", "END") and total.labels["position"] == ("all",)
    assert torch.allclose(each.score[0].nansum(-1), total.score[0][..., 0].nan_to_num(), atol=1e-5)
    logits = each.score[0][:, -1]
    assert logits[:, :-1].isnan().all() and not logits[:, -1].isnan().any()


def test_named_positions(llama: HookedModel, pairs: PromptPairs) -> None:
    by_name = edge_attribution(llama, pairs, per_position=True)
    assert by_name.labels["position"] == ("S", "words", "END")
    bare = replace(pairs, clean=replace(pairs.clean, positions={}), corrupt=replace(pairs.corrupt, positions={}))
    singles = [edge_attribution(llama, pair, per_position=True).score[0].nan_to_num() for pair in bare]
    for k, name in enumerate(by_name.labels["position"]):
        hand = torch.stack([s[..., list(pairs.clean.positions[name][i])].sum(-1) for i, s in enumerate(singles)]).mean(0)
        there = ~by_name.score[0][..., k].isnan()
        assert torch.allclose(by_name.score[0][..., k][there], hand[there], atol=1e-5)


def test_exact_at_a_position_is_a_run_of_its_own(llama: HookedModel, level: PromptPairs) -> None:
    each = edge_attribution(llama, level[:2], method="exact", per_position=True)
    edge = "L0H1.z@2 -> L1H1.v@2"
    clean, corrupt = level.clean[:2], level.corrupt[:2]
    z = [llama.capture(side, "L0H1.z")[Site("z", 0, 1)] for side in (clean, corrupt)]
    pre, v = (llama.capture(clean, s)[Site.parse(s)] for s in ("L1.resid_pre", "L1H1.v"))
    change = torch.zeros_like(pre)
    change[:, 2] = ((z[1] - z[0]) @ llama.weight("L0H1.W_O"))[:, 2]
    norm = llama.wrapped.source.model.layers[1].input_layernorm
    with torch.no_grad():
        new = norm(pre + change) @ llama.weight("L1.W_V")[:, 8:16]  # key/value head 1; Llama has no bias
    assert torch.allclose(new[:, 0], v[:, 0], atol=1e-5)
    with llama.patched({"L1H1.v": new}):
        logits = llama.logits(clean, at="END")
    rows = torch.arange(2)
    value = logits[rows, list(clean.answers or ())] - logits[rows, list(clean.distractors or ())]
    frame = each.to_frame().set_index("edge")
    assert frame.effect[edge] == pytest.approx(float((each.clean - value).mean()), abs=1e-5)


# ---- clean and corrupt of different lengths


LONG = [[3, 4, 9, 6, 7, 2, 8, 1], [12, 11, 30], [13, 1, 15, 16, 16, 4], [24, 5, 26, 30, 28, 1, 3], [8, 9, 9, 11, 12]]
HERE = {"S": ((1,), (0,), (2,), (3,), (1,)), "words": ((3, 4), (1, 2), (0, 1), (1, 4), (0, 2)), "odd": ((0, 1),) * 5}
THERE = {"S": ((2,), (0,), (3,), (2,), (1,)), "words": ((5, 6), (0, 1), (0, 1), (1, 4), (3, 2)), "odd": ((0,),) + ((0, 1),) * 4}


def unequal(model: HookedModel) -> tuple[PromptPairs, list[dict[int, int]]]:
    """Pairs of other lengths, and by hand which corrupt token stands against a clean one: S, words and END."""
    meets = [
        {
            HERE["S"][i][0]: THERE["S"][i][0],
            **dict(zip(HERE["words"][i], THERE["words"][i], strict=True)),
            len(CLEAN[i]) - 1: len(LONG[i]) - 1,
        }
        for i in range(5)
    ]
    return toward(model, prompts(CLEAN, **HERE), prompts(LONG, **THERE)), meets


@pytest.mark.parametrize(("method", "steps"), [("eap", 1), ("eap_ig", 3), ("exact", 1)])
def test_prompts_of_other_lengths_meet_at_names(case: Any, method: Any, steps: int) -> None:
    twin, model, _ = case
    pairs, meets = unequal(model)
    if method == "exact":
        pairs, meets = pairs[:2], meets[:2]
    result = edge_attribution(model, pairs, method=method, steps=steps)
    agree(result, twin.scores(pairs, method, steps, meets), 2e-5)
    if method == "eap":
        assert "4 of 5 pairs differ in length" in result.notes[0] and "tokens that S, words, END name, 20 of 26" in result.notes[0]
        assert result.notes[1].startswith("odd left out: other numbers of tokens") and "odd left out" in result.summary()


def test_names_left_out_have_no_scores(llama: HookedModel) -> None:
    """Nor do tokens without a name: positions that do not overlap add up to the whole."""
    pairs, _ = unequal(llama)
    each, total = (edge_attribution(llama, pairs, per_position=p) for p in (True, False))
    assert set(each.labels["position"]) == {"S", "words", "END"}
    assert all(len({*HERE["S"][i], *HERE["words"][i], len(CLEAN[i]) - 1}) == 4 for i in range(5))
    assert torch.allclose(each.score.nansum(-1), total.score[..., 0].nan_to_num(), atol=1e-5)
    bare = replace(pairs, clean=replace(pairs.clean, positions={}), corrupt=replace(pairs.corrupt, positions={}))
    only = edge_attribution(llama, bare, per_position=True)
    assert only.labels["position"] == ("END",)
    assert torch.allclose(only.score[..., 0], each.score[..., each.labels["position"].index("END")], atol=1e-5, equal_nan=True)


def test_prompts_of_one_length_are_the_same_either_way(llama: HookedModel, pairs: PromptPairs) -> None:
    clean, corrupt = (side.batch() for side in (pairs.clean, pairs.corrupt))
    plain = Meeting.of(clean, corrupt)
    spelled = Meeting(torch.arange(clean.ids.shape[1]).expand_as(clean.ids) * clean.mask, clean.mask, plain.names)
    reader = Metric.parse("logit_diff").reader(pairs)
    scores = [edge_scores(llama, clean, corrupt, m, reader, method="eap_ig", steps=2, names=("all",)) for m in (plain, spelled)]
    assert plain.columns is None and plain.notes == () and torch.equal(scores[0][1], scores[1][1])


# ---- pairs of models


@pytest.fixture(scope="module")
def two(llama: HookedModel) -> ModelPair:
    hf: Any = tiny("llama", seed=2)
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight += 0.3 * torch.randn(24, 32, generator=torch.Generator().manual_seed(4))
    return ModelPair.load(llama, HookedModel.load(hf))


def test_a_pair_is_two_models_and_their_difference(two: ModelPair, pairs: PromptPairs) -> None:
    both = edge_attribution(two, pairs)
    alone = [edge_attribution(m, pairs) for m in (two.base, two.tuned)]
    assert both.sides == ("base", "tuned")
    for i, one in enumerate(alone):
        assert torch.allclose(both.score[i], one.score[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(both.clean[i], one.clean[0]) and torch.equal(both.corrupt[i], one.corrupt[0])
    each = both.to_frame(per="prompt")
    assert len(each) == 2 * 5 * len(both.edges)
    wide = each.pivot(index=["edge", "prompt"], columns="side", values="effect")
    by_hand = (wide.tuned - wide.base).groupby("edge").agg(["mean", "std"])
    frame = both.to_frame()
    assert list(dict.fromkeys(frame.side)) == ["tuned - base", "base", "tuned"]
    change = frame[frame.side == "tuned - base"].set_index("edge")
    by_hand = by_hand.loc[change.index]
    assert change.effect.to_numpy() == pytest.approx(by_hand["mean"].to_numpy(), abs=1e-6)
    assert change.effect_se.to_numpy() == pytest.approx(by_hand["std"].to_numpy() / math.sqrt(5), abs=1e-6)
    assert torch.allclose(both.change, alone[1].score[0] - alone[0].score[0], equal_nan=True)


def test_what_is_told_of_a_pair(two: ModelPair, pairs: PromptPairs) -> None:
    both = edge_attribution(two, pairs)
    first = both.strongest(3)
    assert list(first.columns) == ["edge", "side", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted"]
    change = both.to_frame().query("side == 'tuned - base'")
    assert list(first.edge) == list(change.edge[change.effect.abs().sort_values(ascending=False).index[:3]])
    assert both.summary().startswith(f"{first.edge[0]} changed by {first.effect[0]:.3g} +- {first.effect_se[0]:.2g} of logit_diff")
    assert " in tuned and " in both.summary() and set(map(str, both.top(3, side="tuned - base").edges)) == set(first.edge)
    tuned = edge_attribution(two.tuned, pairs)
    assert both.top(5).edges == tuned.top(5).edges == both.top(5, side="tuned").edges
    assert list(both.figures())[:2] == ["strongest edges, tuned - base", "senders and receivers, tuned - base"] and len(both.figures()) == 6


def test_a_model_and_itself(llama: HookedModel, pairs: PromptPairs) -> None:
    same = edge_attribution(ModelPair.load(llama, HookedModel.load(tiny("llama", seed=2))), pairs)
    assert same.change.nan_to_num().abs().max() == 0 and (same.strongest().p == 1).all() and (same.strongest().effect_se == 0).all()


@pytest.mark.parametrize("head", [(1, 4), pytest.param((2, 1), marks=pytest.mark.full), pytest.param((3, 2), marks=pytest.mark.full)])
def test_the_head_that_was_changed_comes_first(head: tuple[int, int]) -> None:
    """A pair whose base has no W_Q in one head: what changed the most goes in or out of that head, and what is not planted stays."""
    built = organisms.hand_built("ioi")
    hf: Any = copy.deepcopy(built.model.wrapped.source)
    layer, h = head
    rows = slice(h * built.model.shape.d_head, (h + 1) * built.model.shape.d_head)
    hf.model.layers[layer].self_attn.q_proj.weight.data[rows] = 0
    pair = ModelPair.load(HookedModel.load(hf, tokenizer=built.model.tokenizer), built.model)
    result = edge_attribution(pair, built.task.generate(built.model, n=6, seed=5), method="exact")
    planted = {str(Edge(e.sender.at(None), e.receiver.at(None))) for e in built.circuit.edges}
    first = result.strongest(1)
    assert first.edge[0] in planted and f"L{layer}H{h}." in first.edge[0] and first.p_adjusted[0] <= 2 / 2**6
    frame = result.to_frame().query("side == 'tuned - base'")
    others = frame[(frame.sender == f"L{layer}H{h}.z") & ~frame.edge.isin(planted)]
    assert len(others) or layer == 3
    assert not len(others) or others.effect.abs().max() < 1e-3 * abs(first.effect[0])


# ---- noise


def test_intervals_and_tests_are_those_of_the_scores(llama: HookedModel, two: ModelPair, pairs: PromptPairs) -> None:
    for model, view in ((llama, 0), (two, 2)):
        result = edge_attribution(model, pairs)
        gap = result.clean - result.corrupt
        values = (result.values[0], None, result.values[-1].double() - result.values[0].double())[view]
        assert values is not None and torch.equal(result.kept, torch.arange(190)) and result.adjusted is None
        test = permutation(values)
        got = result.strongest(190).set_index("edge").loc[list(result.edges)]
        assert torch.equal(torch.tensor(got.p.to_numpy()), test.p) and torch.equal(torch.tensor(got.p_adjusted.to_numpy()), test.adjusted)
        if view:
            runs = [(v, torch.zeros(5), g) for v, g in zip(result.values, gap, strict=True)]
            share = changed(runs[0], runs[1])
        else:
            share = ratio_of_means(values, gap[0])
        for column, wanted in (("recovered", share.value), ("low", share.low), ("high", share.high)):
            assert torch.allclose(torch.tensor(got[column].to_numpy()), wanted, atol=1e-12, equal_nan=True)


def test_only_the_strongest_are_kept_where_there_are_many(two: ModelPair, pairs: PromptPairs, monkeypatch: Any, tmp_path: Any) -> None:
    whole = edge_attribution(two, pairs)
    monkeypatch.setattr("interp.sweeps.edges._ALL", 100)
    monkeypatch.setattr("interp.sweeps.edges._STRONGEST", 7)
    monkeypatch.setattr("interp.sweeps.edges._COLUMNS", 11)
    few = edge_attribution(two, pairs)
    for name in ("score", "error"):
        assert torch.allclose(getattr(few, name), getattr(whole, name), atol=1e-12, equal_nan=True)
    assert 7 < len(few.kept) <= 21
    assert torch.equal(few.values, whole.values[..., few.kept])
    frames = [r.strongest(7) for r in (few, whole)]
    assert frames[0].equals(frames[1])
    assert len(few.strongest(100)) == len(few.kept) and set(few.strongest(100).edge) == {few.edges[i] for i in few.kept.tolist()}
    assert len(few.to_frame(per="prompt")) == 2 * 5 * len(few.kept)
    again = EdgeAttributionResult.load(few.save(tmp_path / "few"))
    assert again.strongest(7).equals(frames[0]) and EdgeAttributionResult.load(whole.save(tmp_path / "whole")).adjusted is None


def test_scores_that_do_not_fit_are_refused(llama: HookedModel, level: PromptPairs, monkeypatch: Any) -> None:
    monkeypatch.setattr("interp.sweeps.edges.free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="scores of 190 edges for 3 prompts take 0.0 GiB and 0.0 GiB are free; take fewer prompts"):
        edge_attribution(llama, level)


# ---- models whose circuit is known


def auroc(scores: Any, planted: Any) -> float:
    """How often a planted edge has the larger score; half for a tie."""
    pos, neg = scores[planted], scores[~planted]
    return float(((pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)).mean())


@pytest.mark.parametrize("name", organisms.HAND_BUILT)
@pytest.mark.parametrize("method", ["eap", "eap_ig", "exact"])
def test_planted_edges_come_first(name: str, method: Any) -> None:
    built = organisms.hand_built(name)
    pairs = built.task.generate(built.model, n=8, seed=5)
    frame = edge_attribution(built.model, pairs, method=method, per_position=True).to_frame()
    planted = frame.edge.isin([str(e) for e in built.circuit.edges]).to_numpy()
    scores = frame.effect.abs().to_numpy()
    assert planted.sum() == len(built.circuit.edges)
    assert auroc(scores, planted) >= (0.95 if method != "eap" else 0.9)
    assert scores[planted].min() > 1000 * scores[~planted].max()
    dead = {f"L{i}H{h}.z" for group in built.bystanders for i, h in group.heads}
    live = {str(s.at(None)) for s in built.circuit.heads().sites()} | {f"L{i}H{h}.z" for group in built.decoys for i, h in group.heads}
    zero = {str(s) for s in (Site("z", i, h) for i in range(built.model.shape.n_layers) for h in range(built.model.shape.n_heads))} - live
    assert dead <= zero and (frame.effect[frame.sender.isin(zero)] == 0).all()


def test_the_circuit_comes_back() -> None:
    built = organisms.hand_built("ioi")
    pairs = built.task.generate(built.model, n=8, seed=5)
    result = edge_attribution(built.model, pairs, method="eap_ig", per_position=True)
    found = result.top(len(built.circuit.edges))
    assert found.edges == built.circuit.edges and found.nodes == built.circuit.nodes
    assert found.prompts == pairs.digest and found.contexts == tuple(sorted(set(pairs.contexts)))
    assert found.check(built.model.shape) and set(found.scores) == set(found.edges)
    assert result.summary().startswith(str(max(found.edges, key=lambda e: abs(found.scores[e]))) + " carries ")
    exact = edge_attribution(built.model, pairs, method="exact")
    mover = exact.recovered()[exact.labels["sender"].index("L3H2.z"), -1, 0]
    assert float(mover) == pytest.approx(1, abs=1e-3)  # it alone writes the answer


# ---- other architectures, other settings


def test_parallel_blocks_with_one_norm() -> None:
    """GPT-J: attention and MLP share a norm; the edges out of a node still add up to its attribution, which they otherwise do not."""
    settings = {"vocab_size": 31, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 19, "rotary_dim": 4}
    config = transformers.GPTJConfig(bos_token_id=1, eos_token_id=2, **cast("Any", settings))
    model = HookedModel.load(randomised(transformers.AutoModelForCausalLM.from_config(config), 2))
    pairs = toward(model, prompts(CLEAN), prompts(CORRUPT))
    test_edges_out_of_a_node_add_up_to_its_attribution((None, model, pairs))
    assert "L0H1.z -> L0.resid_mid" not in edge_attribution(model, pairs).edges


def test_norms_behind_the_parts_are_refused() -> None:
    config = transformers.Gemma2Config(bos_token_id=1, eos_token_id=2, pad_token_id=0, head_dim=8, **cast("Any", GQA))
    model = HookedModel.load(randomised(transformers.AutoModelForCausalLM.from_config(config), 2))
    pairs = toward(model, prompts(CLEAN), prompts(CORRUPT))
    with pytest.raises(InputError, match="Gemma2ForCausalLM.* cannot be told apart"):
        edge_attribution(model, pairs)


def test_half_precision_is_near(llama: HookedModel, pairs: PromptPairs) -> None:
    half = HookedModel.load(tiny("llama", seed=2).bfloat16())
    ours, theirs = (edge_attribution(m, pairs).score[0].nan_to_num() for m in (half, llama))
    assert float((ours - theirs).norm()) < 0.1 * float(theirs.norm())


def test_other_metrics(llama: HookedModel, level: PromptPairs) -> None:
    kl = edge_attribution(llama, level, metric="kl", method="eap_ig")
    assert float(kl.clean.abs().max()) < 1e-5 and kl.score[0][0, :, 0].nansum() < 0  # the divergence rises, so it falls by less than 0
    elsewhere = edge_attribution(llama, level[0], metric="logit_diff@3")
    assert not elsewhere.score[0][:, -1].isnan().any()

    def answer(logits: Tensor, targets: Targets) -> Tensor:
        return logits.gather(1, targets.answers[:, None])[:, 0]  # type: ignore[index]

    assert edge_attribution(llama, level, metric=answer).metric == "user function"  # type: ignore[arg-type]


def test_edits_are_in_force(llama: HookedModel, level: PromptPairs) -> None:
    from interp.edits import Edit, WeightChange

    weight = llama.weight("L1.W_O")
    off = torch.zeros_like(weight)
    off[8:16] = -weight[8:16]  # head 1
    with llama.edited(Edit((WeightChange(Site("W_O", 1), off),))):
        score = edge_attribution(llama, level).score[0]
    sender = edge_attribution(llama, level).labels["sender"].index("L1H1.z")
    assert score[sender].nan_to_num().abs().max() == 0


# ---- results


def test_table_and_figures(llama: HookedModel, level: PromptPairs) -> None:
    result = edge_attribution(llama, level)
    frame = result.to_frame()
    assert len(frame) == len(result.edges) == 16 + sum((1 + 5 * i) * 8 + (1 + 5 * i + 4) for i in range(3))
    gap = float((result.clean - result.corrupt).mean())
    assert frame.recovered.to_numpy() == pytest.approx(frame.effect.to_numpy() / gap)
    best = frame.loc[frame.effect.abs().idxmax()]
    assert result.summary().startswith(f"{best.edge} carries {best.effect:.3g} +- ") and "n = 3 prompt pairs" in result.summary()
    assert list(result.figures()) == ["strongest edges", "senders and receivers"]
    again = [Edge.parse(text) for text in result.edges]
    assert len(set(again)) == len(again)
    one = edge_attribution(llama, level[0])
    assert one.error[0].isnan().all() and " +- " not in one.summary() and one.plot() and one.to_frame().recovered.isna().all()


def test_top(llama: HookedModel, pairs: PromptPairs, tmp_path: Any) -> None:
    result = edge_attribution(llama, pairs)
    circuit = result.top(7)
    frame = result.to_frame()
    strongest = set(frame.edge[frame.effect.abs().sort_values(ascending=False).index[:7]])
    assert {str(e) for e in circuit.edges} == strongest and {e.sender for e in circuit.edges} == set(circuit.nodes)
    assert Circuit.load(circuit.save(tmp_path / "c.json")) == circuit
    for n in (0, len(frame) + 1, 2.0, True):
        with pytest.raises(InputError, match="top takes 1 to 190 edges"):
            result.top(n)  # type: ignore[arg-type]


def test_wrong_input(llama: HookedModel, level: PromptPairs) -> None:
    def run(prompts: Any = level, **settings: Any) -> None:
        edge_attribution(llama, prompts, **settings)

    with pytest.raises(InputError, match=r"needs clean and corrupt prompts \(PromptPairs\), not Prompts"):
        run(level.clean)
    with pytest.raises(InputError, match="eap, eap_ig or exact, but it is 'ig'"):
        run(method="ig")
    for steps in (0, 2.5, True):
        with pytest.raises(InputError, match="steps must be a whole number from 1"):
            run(method="eap_ig", steps=steps)
    with pytest.raises(InputError, match="the same, token for token"):
        run(PromptPairs(level.clean, level.clean))
    longer = prompts([[*row, 3] if i == 1 else row for i, row in enumerate(LEVEL_TOO)], S=((0,), (1,), (2,)), T=((0,), (2,), (2,)))
    named = replace(level.clean, positions={"S": ((0,), (3,), (2,)), "T": ((0,), (3,), (2,))})
    with pytest.raises(InputError, match=r"token 3 of clean prompt 1 stands against two tokens of the corrupt one, 1 and 2 \(named T\)"):
        run(PromptPairs(named, longer))
    for method in ("eap", "exact"):
        with pytest.raises(InputError, match="does not differ between clean and corrupt prompts"):
            run(metric="logit_diff@0" if method == "eap" else lambda logits, targets: 0 * logits[:, 0], method=method)
    with pytest.raises(InputError, match="one distractor token per prompt"):
        run(PromptPairs(replace(level.clean, distractors=None), level.corrupt))
    with pytest.raises(InputError, match="this metric has no gradient"):
        run(metric="accuracy")
    with pytest.raises(InputError, match="kl is least at the clean run"):
        run(metric="kl")
    with pytest.raises(InputError, match="read at END, but it is logit_diff@2"):
        run(metric="logit_diff@2", per_position=True)
    with pytest.raises(InputError, match="no metric named 'logitdiff'"):
        run(metric="logitdiff")
    result = edge_attribution(llama, level)
    with pytest.raises(InputError, match="per must be 'prompt' or nothing, but it is 'edge'"):
        result.to_frame(per="edge")
    for ask in (result.recovered, lambda side: result.top(side=side)):
        with pytest.raises(InputError, match="there is no model 'base' in this result; it has model"):
            ask("base")
    assert not llama.wrapped.source.training and not llama._active
