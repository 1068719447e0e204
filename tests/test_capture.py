"""Captures on disk: the same numbers as in memory and as prompt by prompt, whatever interrupts them."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import FOUR, saved, tiny

from interp.edits import ActivationChange, Edit, WeightChange
from interp.errors import InputError
from interp.models import Batch, Capture, HookedModel
from interp.models import capture as module
from interp.models.capture import capture_bytes
from interp.sites import PER_HEAD, Site

ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7], [11, 4, 30, 20, 2, 8], [12], [9, 9, 9, 1]]
COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_post")
NEAR = {"rtol": 0, "atol": 5e-6}


def batch():
    mid, two = tuple((len(r) // 2,) for r in ROWS), tuple((len(r) - 1, 0) for r in ROWS)
    return Batch.of(ROWS, {"mid": mid, "two": two})


@pytest.fixture(scope="module")
def four():
    return {kind: HookedModel.load(tiny(kind).double()) for kind in FOUR}


@pytest.fixture
def llama(four):
    return four["llama"]


@pytest.fixture
def small_shards(monkeypatch):
    """A prompt or two per shard."""
    monkeypatch.setattr(module, "SHARD_BYTES", 700)


def every_site(model):
    """Every component at every kind of position, whole and by head."""
    sites = [Site("embed"), Site("embed", None, None, "mid")]
    for component in COMPONENTS:
        if component == "resid_mid" and model.shape.parallel:
            continue
        layer = len(sites) % model.shape.n_layers
        for position in (None, "mid", "END", "two", 0, -1):
            sites += [Site(component, layer, head, position) for head in ((None, 1) if component in PER_HEAD else (None,))]
    return sites


def check_equal(found, model, sites):
    """Against captures in memory, together and prompt by prompt."""
    together = model.capture(batch(), sites)
    each = [model.capture(batch()[i], sites) for i in range(len(ROWS))]
    for site in sites:
        whole = found[site]
        for i, row in enumerate(ROWS):
            alone = each[i][site][0]
            if site.position is None:
                mine = found.prompt(site, i)
                start = sum(map(len, ROWS[:i]))
                assert torch.equal(whole[start : start + len(row)], mine)
                assert torch.equal(found.prompt(str(site), i - len(ROWS)), mine)
                torch.testing.assert_close(mine, together[site][i, : len(row)], **NEAR)
            else:
                mine = whole[i]
            torch.testing.assert_close(mine, alone, **NEAR, msg=f"{site} of prompt {i}")


@pytest.mark.parametrize("kind", FOUR)
def test_disk_is_memory_at_every_kind_of_site(four, kind, tmp_path, small_shards):
    model = four[kind]
    sites = every_site(model)
    found = model.capture(batch(), sites, to=tmp_path)
    assert len(found.shards) > 2 and found.sites == tuple(sites) and found.complete
    check_equal(found, model, sites)
    tensors = [t for file in tmp_path.glob("*.safetensors") for t in load_file(file).values()]
    assert sum(t.numel() * t.element_size() for t in tensors) == capture_bytes(model, batch(), sites)
    sums = {round(float(found[s].abs().sum()), 6) for s in sites}
    # -1 is END, and a first token attends to itself only, so that there z is v.
    assert len(sums) >= sum(s.position != -1 and (s.component, s.position) != ("z", 0) for s in sites), (
        "they must differ, to tell them apart"
    )


def test_a_position_that_names_no_token(llama, tmp_path):
    none = Batch.of(ROWS, {"none": ((),) * len(ROWS)})
    assert llama.capture(none, "L1.z@none")[Site("z", 1, None, "none")].shape == (len(ROWS), 0, 4, 8)
    assert llama.capture(none, "L1.z@none", to=tmp_path)["L1.z@none"].shape == (len(ROWS), 0, 4, 8)


def test_one_shard_and_any_pass_size(llama, tmp_path, monkeypatch):
    sites = [Site("z", 1), Site("resid_post", 2, None, "END")]
    one = llama.capture(batch(), sites, to=tmp_path / "one")
    assert len(one.shards) == 1
    check_equal(one, llama, sites)
    monkeypatch.setattr(llama._budget, "size", 1)  # one prompt per pass
    two = llama.capture(batch(), sites, to=tmp_path / "two")
    for site in sites:
        torch.testing.assert_close(one[site], two[site], **NEAR)
    assert one.digest == two.digest == Capture.open(tmp_path / "two").digest


def test_half_precision(llama, tmp_path, small_shards):
    sites = ["L1.resid_post", "L1H2.z@END"]
    found = llama.capture(batch(), sites, to=tmp_path / "half", dtype=torch.float16)
    exact = llama.capture(batch(), sites, to=tmp_path / "exact")
    assert exact["L1.resid_post"].dtype == torch.float64 and found["L1.resid_post"].dtype == torch.float16
    for site in sites:
        assert torch.equal(found[site], exact[site].half())
    assert capture_bytes(llama, batch(), list(found.sites), torch.float16) * 4 == capture_bytes(llama, batch(), list(found.sites))
    in_memory = llama.capture(batch(), sites, dtype=torch.float16)
    assert in_memory[Site("z", 1, 2, "END")].dtype == torch.float16


def test_what_overflows_half_precision_is_refused(llama, tmp_path):
    """fp16 ends at 65504; beyond, it is infinity without a word."""
    message = r"L0.resid_post has activations up to 7e\+04, too large for float16; keep them as bfloat16"
    with llama.patched({"L0.resid_post": torch.full((24,), 7e4, dtype=torch.float64)}):
        for to in ({}, {"to": tmp_path}):
            with pytest.raises(InputError, match=message):
                llama.capture(batch(), "L0.resid_post", dtype=torch.float16, **to)
        assert llama.capture(batch(), "L0.resid_post", dtype=torch.bfloat16)[Site("resid_post", 0)].isfinite().all()


class Killed(Exception):
    pass


def kill_after(monkeypatch, name, calls, meanwhile=lambda *a: None):
    """Let a function of the module work so many times, then die."""
    real, done = getattr(module, name), []

    def mortal(*args, **kwargs):
        if len(done) == calls:
            meanwhile(*args)
            raise Killed
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, mortal)


@pytest.mark.parametrize("where", ["computing", "writing a shard", "before the index"])
def test_an_interrupted_capture_goes_on(llama, tmp_path, monkeypatch, small_shards, where):
    sites = [Site("resid_post", 1), Site("z", 2, 3, "mid")]
    whole = llama.capture(batch(), sites, to=tmp_path / "whole")
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        if where == "computing":
            kill_after(patch, "_shard", 2)
        elif where == "writing a shard":
            kill_after(patch, "save_file", 2, lambda tensors, path: path.write_bytes(b"half a file"))
        else:
            kill_after(patch, "_write_index", 3)  # the empty index and two shards
        with pytest.raises(Killed):
            llama.capture(batch(), sites, to=folder)
    first = [folder / name for name, _, _ in whole.shards[:2]]
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in first}
    done = whole.shards[1][2]
    with pytest.raises(InputError, match=f"was interrupted at prompt {done} of 6; capture again to the same folder to go on"):
        Capture.open(folder)
    computed = []
    real = module._shard
    monkeypatch.setattr(module, "_shard", lambda *a: computed.append(a[2]) or real(*a))
    found = llama.capture(batch(), sites, to=folder)
    assert computed == [start for _, start, _ in whole.shards[2:]], "whole shards are kept"
    assert all((f.read_bytes(), f.stat().st_mtime_ns) == before[f] for f in first)
    assert found.shards == whole.shards and found.digest == whole.digest
    for site in sites:
        assert torch.equal(found[site], whole[site])
    check_equal(found, llama, sites)
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".part") == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_a_whole_capture_is_not_computed_again(llama, tmp_path, monkeypatch):
    first = llama.capture(batch(), "L1.z", to=tmp_path)
    monkeypatch.setattr(llama, "forward", None)
    again = llama.capture(batch(), ["L1.z", "L1.z"], to=tmp_path)
    assert torch.equal(again["L1.z"], first["L1.z"])


def test_another_captures_folder_is_refused(llama, four, tmp_path):
    folder = tmp_path / "taken"
    llama.capture(batch(), "L1.z", to=folder)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    other_rows = [[*ROWS[0][:-1], 6], *ROWS[1:]]
    near = tiny("llama").double()
    near.lm_head.weight.data[3, 4] += 1e-9
    edit = Edit((WeightChange(Site("W_O", 2), torch.ones(32, 24) * 1e-9),))
    attempts = [
        (llama, Batch.of(other_rows, batch().positions), "L1.z", {}),
        (llama, Batch.of(ROWS[:-1]), "L1.z", {}),
        (llama, batch(), "L1.q", {}),
        (llama, batch(), ["L1.z", "L2.z"], {}),
        (llama, batch(), "L1.z", {"dtype": torch.float32}),
        (HookedModel.load(near), batch(), "L1.z", {}),
        (four["qwen2"], batch(), "L1.z", {}),
    ]
    for model, prompts, sites, settings in attempts:
        with pytest.raises(InputError, match="holds a capture of something else"):
            model.capture(prompts, sites, to=folder, **settings)
    with pytest.raises(InputError, match="holds a capture of something else"), llama.edited(edit):
        llama.capture(batch(), "L1.z", to=folder)
    value = {"L0.resid_post": torch.zeros(24)}
    with pytest.raises(InputError, match="holds a capture of something else"), llama.patched(value):
        llama.capture(batch(), "L1.z", to=folder)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    with llama.patched(value):
        llama.capture(batch(), "L1.z", to=tmp_path / "patched")
    with pytest.raises(InputError, match="holds a capture of something else"):
        llama.capture(batch(), "L1.z", to=tmp_path / "patched")


def test_the_precision_of_the_model_is_part_of_the_identity(tmp_path):
    """The same files computed in bf16 and in fp32 give other numbers, though both are kept as fp16."""
    files = saved(tiny("gpt2"), tmp_path / "model")
    HookedModel.load(files).capture(batch(), "L1.z", to=tmp_path / "to", dtype=torch.float16)
    with pytest.raises(InputError, match="holds a capture of something else"):
        HookedModel.load(files, dtype="bfloat16").capture(batch(), "L1.z", to=tmp_path / "to", dtype=torch.float16)


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("pass_size", [1, 2**28])
def test_interventions_reach_their_own_prompts_on_disk(four, kind, tmp_path, monkeypatch, small_shards, pass_size):
    """Each prompt is patched with its own value, whichever shard and pass it falls into."""
    model = four[kind]
    monkeypatch.setattr(model._budget, "size", pass_size)
    draws = torch.Generator().manual_seed(3)
    n, p, d = len(ROWS), 7, model.shape.d_model
    stream = torch.randn(n, p, d, generator=draws, dtype=torch.float64)
    head = torch.randn(n, model.shape.d_head, generator=draws, dtype=torch.float64)
    sites = [Site("resid_post", 2), Site("z", 1, 3, "END"), Site("z", 1)]
    with model.patched({"L0.resid_post": stream, "L1H3.z@END": head}) as ledger:
        found = model.capture(batch(), sites, to=tmp_path / "to")
        in_memory = model.capture(batch(), sites)
    assert all(e.fired >= len(found.shards) for e in ledger.entries)
    assert torch.equal(found[sites[1]], head)
    plain = model.capture(batch(), sites[0])[sites[0]]
    for i, row in enumerate(ROWS):
        with model.patched({"L0.resid_post": stream[i : i + 1, : len(row)], "L1H3.z@END": head[i]}):
            alone = model.capture([row], [sites[0], sites[2]])
        for site in (sites[0], sites[2]):
            torch.testing.assert_close(found.prompt(site, i), alone[site][0], **NEAR)
            torch.testing.assert_close(in_memory[site][i, : len(row)], alone[site][0], **NEAR)
        assert (plain[i, : len(row)] - found.prompt(sites[0], i)).abs().max() > 0.01


def test_an_edited_capture_goes_on_under_the_same_edit_only(llama, tmp_path, monkeypatch, small_shards):
    delta = torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edit = Edit((WeightChange(Site("W_out", 0), torch.randn(40, 24).double()), ActivationChange(Site("resid_post", 0), "add", delta[0])))
    with monkeypatch.context() as patch, llama.edited(edit), pytest.raises(Killed):
        kill_after(patch, "_shard", 1)
        llama.capture(batch(), "L2.z", to=tmp_path)
    with pytest.raises(InputError, match="something else"):
        llama.capture(batch(), "L2.z", to=tmp_path)
    with pytest.raises(InputError, match="something else"), llama.edited(edit.scaled(0.5)):
        llama.capture(batch(), "L2.z", to=tmp_path)
    with llama.edited(edit):
        found = llama.capture(batch(), "L2.z", to=tmp_path)
        check_equal(found, llama, [Site("z", 2)])


@pytest.mark.parametrize("kind", FOUR)
def test_nothing_behind_the_last_site_is_computed(four, kind, tmp_path, monkeypatch):
    model = four[kind]
    entered, heads = [], []
    handles = [b.register_forward_pre_hook(lambda m, a, i=i: entered.append(i)) for i, b in enumerate(model.wrapped.bridge.blocks)]
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: heads.append(1) if len(w) == 31 else None or real(x, w, b))
    try:
        model.capture(batch(), ["L0.resid_post", "L1H0.q@END"], to=tmp_path / "a")
        assert set(entered) == {0, 1} and not heads
        entered.clear()
        model.capture(batch(), "L2.resid_post", to=tmp_path / "b")
        assert set(entered) == {0, 1, 2} and not heads, "no unembedding"
        model.capture(batch(), "L2.resid_post")
        assert not heads
        with pytest.raises((TypeError, AttributeError)):
            model.logits(batch())  # the broken unembedding is noticed: the count above means something
        assert heads
    finally:
        for h in handles:
            h.remove()


def test_reading_opens_only_the_files_it_needs(llama, tmp_path, small_shards):
    found = llama.capture(batch(), "L1.z", to=tmp_path)
    want, i = found.prompt("L1.z", 2), next(n for n, (_, a, b) in enumerate(found.shards) if a <= 2 < b)
    for n, (name, _, _) in enumerate(found.shards):
        if n != i:
            (tmp_path / name).unlink()
    assert torch.equal(found.prompt("L1.z", 2), want)
    with pytest.raises(InputError, match=f"lacks {found.shards[0 if i else 1][0]} and {len(found.shards) - 2} more"):
        Capture.open(tmp_path)


def test_a_file_is_mapped_not_read(llama, tmp_path):
    """The bytes of the tensor belong to the file: the process maps it."""
    found = llama.capture(batch(), "L1.z", to=tmp_path)
    piece = next(found.pieces("L1.z"))
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else found.shards[0][0]  # noqa: SIM115
    assert found.shards[0][0] in maps and piece.shape == (sum(map(len, ROWS)), 4, 8)


def test_what_is_not_in_a_capture(llama, tmp_path):
    found = llama.capture(batch(), ["L1.z", "L1.q@END"], to=tmp_path)
    with pytest.raises(InputError, match="L2.z was not captured; .* holds L1.z, L1.q@END"):
        found["L2.z"]
    with pytest.raises(InputError, match="L1.q@END has one entry per prompt"):
        found.prompt("L1.q@END", 0)
    with pytest.raises(IndexError):
        found.prompt("L1.z", 6)
    with pytest.raises(InputError, match="'nonsense' is not a site|nonsense"):
        found["nonsense"]


def test_folders_that_hold_no_capture(llama, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no capture: index.json is expected"):
        Capture.open(tmp_path)
    later = json.dumps({"format": 2, "identity": "", "sites": [], "lengths": [], "shards": []})
    for i, text in enumerate(("{", "[]", '{"format": 1}', later)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "index.json").write_text(text)
        for use in (Capture.open, lambda folder: llama.capture(batch(), "L1.z", to=folder)):
            with pytest.raises(InputError, match=r"index\.json is not the index of a capture"):
                use(tmp_path / str(i))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written"):
        llama.capture(batch(), "L1.z", to=tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="0.00 GiB free; capture fewer sites, or as dtype=torch.float16"):
        llama.capture(batch(), "L1.z", to=tmp_path / "full")


def test_only_what_is_left_must_fit_on_the_disk(llama, tmp_path, monkeypatch, small_shards):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "_shard", 2)
        llama.capture(batch(), "L1.z", to=tmp_path)
    left = sum(map(len, ROWS[json.loads((tmp_path / "index.json").read_text())["shards"][-1][2] :])) * 32 * 8
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=left - 1))
    with pytest.raises(InputError, match="the capture takes another"):
        llama.capture(batch(), "L1.z", to=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=left))
    check_equal(llama.capture(batch(), "L1.z", to=tmp_path), llama, [Site("z", 1)])


@pytest.mark.parametrize(
    ("kind", "sites", "message"),
    [
        ("llama", "L1.pattern", "L1.pattern has a row of its own length per prompt and is not streamed"),
        ("llama", "L1.W_Q", "W_Q is not an activation"),
        ("llama", "L1H1.0", "svd is not an activation"),
        ("neox", "L1.resid_mid", r"GPTNeoXForCausalLM has no resid_mid \(its blocks are parallel\)"),
        ("llama", "L3.z", "L3.z: layer 3 is out of range; the model has layers 0 to 2"),
        ("llama", "L0H4.z", "L0H4.z: head 4 is out of range; the model has heads 0 to 3"),
        ("llama", "L0H2.k", "L0H2.k: head 2 is out of range; the model has key/value heads 0 to 1"),
        ("llama", "L0.zz", "unknown component 'zz'"),
        ("llama", "L0.z@subject", "no position 'subject' in these prompts; they name mid, two, odd, END"),
        ("llama", "L0.z@1", "position 1 is outside prompt 4, which has tokens 0 to 0"),
        ("llama", "L0.z@odd", "position 'odd' names 1 to 2 tokens per prompt"),
        ("llama", [], "no sites to capture were given"),
    ],
)
@pytest.mark.parametrize("pass_size", [1, 2**28])
def test_sites_that_are_refused_leave_nothing_behind(four, kind, sites, message, pass_size, tmp_path, monkeypatch):
    model = four[kind]
    monkeypatch.setattr(model._budget, "size", pass_size)  # a refusal that hung on it would be no refusal
    odd = tuple((0,) if len(r) < 3 else (0, 1) for r in ROWS)
    prompts = Batch.of(ROWS, {**{k: v for k, v in batch().positions.items() if k != "END"}, "odd": odd})
    with pytest.raises(InputError, match=message):
        model.capture(prompts, sites, to=tmp_path / "to")
    assert not (tmp_path / "to").exists()
    if "streamed" not in message:
        with pytest.raises(InputError, match=message):
            model.capture(prompts, sites)
