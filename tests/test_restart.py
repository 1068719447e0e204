"""Going on from a cached run, cell by cell against plain hooks on the plain Hugging Face model, one prompt at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import plain_hooks
import pytest
import torch
from test_sweeps import WORLD
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp.metrics import Metric
from interp.models import HookedModel
from interp.models.interventions import Part
from interp.models.restart import Restart, Stretch, keep, logits_of, projections
from interp.prompts import Prompts
from interp.sites import PER_HEAD, Site
from interp.sweeps import run
from interp.sweeps.patches import Patch, settings
from interp.sweeps.plain import cell as plain_cell
from interp.sweeps.plain import cells as plain_cells
from interp.sweeps.waves import Cells, tables, wave

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_post", "z", "q", "k", "v", "pattern", "groups")
INTO = WORLD["clean"]  # 5 prompts of 3 to 7 tokens; position S differs per prompt, and between the prompts of a pair


@pytest.fixture(autouse=True)
def _everything_in_fp64() -> Iterator[None]:
    """Hugging Face takes softmax and RMSNorm in fp32 even in fp64 models; lifted here, so that fp64 can be compared at 1e-12."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    softmax, patch = torch.nn.functional.softmax, pytest.MonkeyPatch()

    def wide(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **more)

    patch.setattr(torch.nn.functional, "softmax", wide)
    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        real = norm.forward

        def forward(self: Any, x: Tensor, real: Any = real) -> Tensor:
            if x.dtype != torch.float64:
                return real(self, x)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

        patch.setattr(norm, "forward", forward)
    yield
    patch.undo()


@cache
def plain(kind: str, dtype: torch.dtype) -> nn.Module:
    model: Any = tiny(kind, seed=1).to(dtype)
    model.set_attn_implementation("eager")
    return model


@cache
def hooked(kind: str, dtype: torch.dtype) -> HookedModel:
    return HookedModel.load(plain(kind, dtype))


@cache
def seen(kind: str, dtype: torch.dtype, ids: tuple[int, ...], what: tuple[str, int]) -> Tensor:
    return plain_hooks.seen(plain(kind, dtype), ids, [what])[what]


def drawn(component: str, model: HookedModel, n: int, *, names: tuple[str | int, ...]) -> list[tuple[Site, ...]]:
    """Random patches of one kind."""
    draws = random.Random(f"{component} {model.shape.architecture}")

    def site(what: str) -> Site:
        heads = model.shape.n_kv_heads if what in ("k", "v") else model.shape.n_heads
        head = draws.choice([None, *range(heads), *range(heads)]) if what in PER_HEAD else None
        return Site(what, draws.randrange(model.shape.n_layers), head, draws.choice(names))  # type: ignore[arg-type]

    if component != "groups":
        return [(site(component),) for _ in range(n)]
    kinds = [k for k in KINDS[:-1] if k != "pattern" and not (k == "resid_mid" and model.shape.parallel)]
    return [tuple({(s.component, s.layer, s.position): s for s in map(site, draws.sample(kinds, 3))}.values()) for _ in range(n)]


def restarted(model: HookedModel, into: Prompts, source: Prompts, patches: list[Patch], read: str, together: int = 7) -> dict[Any, Tensor]:
    """Logits of every cell that something can change, a few cells at a time."""
    batch = into.batch()
    found = settings(model, Part.of(batch), patches, (model, source.batch()))
    cells = Cells.of(found, batch.index(read), model.shape.n_layers)
    go, held, out = Restart(model.wrapped, keep(model, batch)), tables(found, model.shape.n_layers), {}
    for at, stop in cells.waves(lambda start, end: together):
        for i, logits in enumerate(logits_of(model, go(wave(cells, at, stop, held))), at):
            out[int(cells.patch[i]), int(cells.prompt[i])] = logits
    return out


def index(prompts: Prompts, position: str | int | None, row: int) -> int | None:
    if not isinstance(position, str):
        return position
    return prompts.positions[position][row][0]


def by_the_book(kind: str, dtype: torch.dtype, into: Prompts, source: Prompts, patch: tuple[Site, ...], row: int, read: str) -> Tensor:
    sets = []
    for s in patch:
        assert s.layer is not None
        there = seen(kind, dtype, source.ids[row], (s.component, s.layer))
        value = plain_hooks.part(there, s.component, s.head, index(source, s.position, row))
        if s.component == "pattern":
            value = value[..., : len(into.ids[row])]
            value = torch.nn.functional.pad(value, (0, len(into.ids[row]) - value.shape[-1]))
        sets.append(plain_hooks.Set(s.component, s.layer, s.head, index(into, s.position, row), value))
    # Later ones win where they overlap: in the order in which a pass meets them.
    return plain_hooks.patched(plain(kind, dtype), into.ids[row], sets)[index(into, read, row)]  # type: ignore[index]


# Partners, positions to patch, position that is read, share of the patches. Attention rows are set key by key: at the same tokens.
SETTINGS = (
    ("other", ("S", "END", 0, 1), (0, 1), "END", 0.6),
    ("same", (None, "S", "END", 0, 2), (None, "END", 0, 2), "END", 0.2),
    ("same", (None, 0, 1), (None, 0, 1), "S", 0.2),
)


def compare(kind: str, component: str, dtype: torch.dtype, n: int) -> int:
    """Compare the logits of random patches on every prompt; the number of cells."""
    model, plainly = hooked(kind, dtype), plain(kind, dtype)
    errors, moved, largest = {}, 0.0, 0.0
    for source, names, rows, read, share in SETTINGS:
        patches = drawn(component, model, max(1, round(n * share)), names=rows if component == "pattern" else names)
        got = restarted(model, INTO, WORLD[source], list(patches), read)
        for row, ids in enumerate(INTO.ids):
            base = plain_hooks.patched(plainly, ids, [])[index(INTO, read, row)]  # type: ignore[index]
            for i, patch in enumerate(patches):
                want = by_the_book(kind, dtype, INTO, WORLD[source], patch, row, read)
                errors[i, row, source, read, patch] = float((got.get((i, row), base) - want).abs().max())
                moved, largest = max(moved, float((want - base).abs().max())), max(largest, float(want.abs().max()))
    allowed = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps * largest
    assert {cell: error for cell, error in errors.items() if not error <= allowed} == {}
    assert moved > 1e-4
    return len(errors)


# Parallel blocks have no stream between attention and MLP.
CASES = [(kind, component) for kind in FOUR for component in KINDS if (kind, component) != ("neox", "resid_mid")]


@pytest.mark.parametrize(("kind", "component"), CASES)
def test_a_sample_against_plain_hooks(kind: str, component: str) -> None:
    assert compare(kind, component, torch.float64, 5) >= 25
    assert compare(kind, component, torch.float32, 3) >= 15


MIXED = [
    (Site.parse(text),)
    for text in (
        *("L0H1.z@S", "L0.mlp_out@END", "L0H2.z@END", "L0.k", "L1.resid_pre@S", "L1H0.v", "L1H3.q@S", "L1H2.z@S", "L2.resid_pre@S"),
        *("L2H1.v", "L2H0.z@END"),
    )
]
MIXED += [(Site.parse("L0H1.z@1"), Site.parse("L1.resid_pre@END")), (Site.parse("L0H1.z@S"), Site.parse("L2H1.v@END"))]


@pytest.mark.parametrize("kind", FOUR)
def test_rows_of_all_kinds_in_one_wave_few_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All together, and two by two: those that enter as kept behind their first position next to those that do not."""
    model = hooked(kind, torch.float64)
    together = restarted(model, INTO, WORLD["same"], list(MIXED), "END", together=1000)
    monkeypatch.setattr(Restart, "_at_once", lambda self, positions: 2)
    few = restarted(model, INTO, WORLD["same"], list(MIXED), "END", together=1000)
    for (i, row), logits in together.items():
        want = by_the_book(kind, torch.float64, INTO, WORLD["same"], MIXED[i], row, "END")
        torch.testing.assert_close(logits, want, atol=1e-12, rtol=0)
        torch.testing.assert_close(few[i, row], want, atol=1e-12, rtol=0)
    assert len(together) == len(few) >= 40


@pytest.mark.parametrize("kind", FOUR)
def test_q_k_and_v_are_made_only_where_the_stream_has_changed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head at one position: nothing in its own block, one token in the next, all behind it in the one after that."""
    model = hooked(kind, torch.float32)
    modules = [projections(model.wrapped, layer) for layer in range(3)]
    assert all(list(m) == ["q", "k", "v"] for m in modules)
    batch, made, called = INTO.batch(), dict[tuple[int, str], list[int]](), list[int]()
    own = modules[1]["k"].forward  # somebody's own forward on a module stays in force, and in place
    monkeypatch.setitem(modules[1]["k"].__dict__, "forward", lambda x: (called.append(len(x)), own(x))[1])
    found = settings(model, Part.of(batch), [(Site("z", 0, 1, 1),)], (model, WORLD["same"].batch()))
    cells = Cells.of(found, batch.index("END"), 3)
    (at,) = [i for i in range(len(cells)) if int(cells.prompt[i]) == 0]
    go = Restart(model.wrapped, keep(model, batch))
    names = {id(module.weight): (layer, name) for layer, m in enumerate(modules) for name, module in m.items()}
    real = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in names:
            made.setdefault(names[id(weight)], []).append(x[..., 0].numel())
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    called.clear()
    go(wave(cells, at, at + 1, tables(found, 3)))
    # The last block makes k and v of tokens 1 to 5, then everything of the last token.
    assert made == {(1, c): [1] for c in "qkv"} | {(2, c): [5, 1] for c in "qkv"} and called == [1]
    stretch = Stretch(wave(cells, at, at + 1, []), 1, 1, 7, range(1), 1)
    with pytest.raises(KeyError), go._projecting(stretch, range(1)):
        assert all("forward" in m.__dict__ for m in modules[1].values())
        raise KeyError
    assert ["forward" in m.__dict__ for m in modules[1].values()] == [False, True, False]


@pytest.mark.parametrize("kind", FOUR)
def test_checked_cells_are_rows_of_one_run(kind: str) -> None:
    """Each with a patch of its own, as if it were alone."""
    model, clean = hooked(kind, torch.float64), INTO.batch()
    reader = Metric.parse("logit_diff").reader(INTO)
    patches = [*MIXED, (Site.parse("L1.pattern@0"),), (Site.parse("L1H2.pattern"),)]
    patches += [] if model.shape.parallel else [(Site.parse("L1.resid_mid@S"), Site.parse("L1.resid_mid@END"))]
    found = settings(model, Part.of(clean), list(patches), (model, WORLD["same"].batch()))
    chosen = [(patch, (3 * i) % 5) for i, patch in enumerate(found)]
    got = plain_cells(model, clean, chosen, reader)
    alone = [plain_cell(model, clean, patch, reader, [row]) for patch, row in chosen]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(alone), atol=2e-7, rtol=0)  # metrics are read in fp32
    base = run(model, clean, reader)
    assert sum(abs(value - float(base[row])) > 1e-4 for (value, _), (_, row) in zip(got, chosen, strict=True)) >= len(chosen) - 3
    assert all(not point.fwd_hooks for point in model.wrapped.bridge.hook_dict.values())


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("kind", "component"), CASES)
def test_five_hundred_cells_against_plain_hooks(kind: str, component: str, dtype: torch.dtype) -> None:
    assert compare(kind, component, dtype, 100) >= 500
