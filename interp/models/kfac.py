"""Kronecker factors of a model's curvature, streamed over any number of tokens in bounded memory.

Martens and Grosse 2015 (arXiv 1503.05671) for the factors, George et al. 2018 and Merullo et al. 2025 (arXiv 2510.24256) for their use.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.models import weights
from interp.models.batch import Batch
from interp.models.factors import Factors, folder_path, read_index, save, write_index
from interp.models.hooked import HookedModel
from interp.models.linear_maps import Linear, check_apart, check_one_model, linear_maps, matrix_sites, plain_copy
from interp.models.loading import free_bytes
from interp.models.memory import Budget
from interp.models.outer_sums import OuterSums, triangle_bytes
from interp.progress import progress

Labels = Literal["sampled", "gold"]

EVERY = 30.0
"""Seconds between two saves ..."""

TIMES = 20.0
"""... or so many times what the last one took, if that is more."""

CHUNK = 2**14
"""Tokens between two looks at the clock."""

_SHARE = 0.5  # of the free memory that sums may take before modules are done one group after another
_VERSION = 1


def kfac_factors(
    model: HookedModel,
    prompts: Any,
    folder: str | Path,
    *,
    modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    labels: Labels = "sampled",
    seed: int = 0,
    groups: int | None = None,
) -> Factors:
    """The Kronecker factors of a model's matrices: A of what they read, G of the gradients by what they write.

    The loss of a prompt of S tokens is the sum, over its positions 0 to S - 2, of the cross-entropy with one label each; inputs and
    gradients of just these positions go into A and G (the gradient at the last one is 0). With labels drawn from the model's own
    distribution, the mean of (g g^T) kron (x x^T) over draws is a block of the Fisher matrix, which for cross-entropy is the Gauss-Newton
    matrix, and G kron A stands for it; with the tokens that follow in the text ("gold") it is another matrix. Nothing is centred or damped.

    The work is saved now and then: called again after a kill, with the same prompts, it goes on; when it was done, they are returned as
    they are. Called with other prompts then, it adds them to the sums, as if all had come at once; until the first of these are saved,
    the folder is what it was. Draws are keyed by (seed, prompt, position), so neither changes them, nor does the size of a pass. Weight
    edits in force count. The model is left as it came.

    Args:
        model: the model.
        prompts: whatever ``model.batch`` takes.
        folder: where the factors go.
        modules: among W_Q, W_K, W_V, W_O, W_in, W_gate, W_out; None is all that the model has.
        layers: their layers; None is all.
        labels: "sampled" from the model's own predictions, or "gold".
        seed: of the labels.
        groups: in so many parts, one pass over the data each, to save memory; None is as few as the free memory allows, and in a
            folder that is gone on with as many as it began with.

    Raises:
        InputError: no such module or layer, or one tensor in two blocks; no position with a next token; a prompt whose loss is not
            finite; a folder that holds factors of something else, of other settings, or of some of these prompts and not just these;
            activation edits or patches in force; a pair or something else that is no model, or no prompts.
    """
    if labels not in ("sampled", "gold"):
        raise InputError(f"labels are 'sampled' or 'gold', not {labels!r}")
    if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
        raise InputError(f"groups is the number of parts, from 1; got {groups!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"the seed of kfac_factors is a whole number, but {seed!r} came")
    check_one_model(model, "kfac_factors")
    path = folder_path(folder)
    wanted = matrix_sites(model, modules, layers)
    check_apart(model, wanted)
    if not isinstance(prompts, Iterable | Batch) and not hasattr(prompts, "batch"):
        raise InputError(f"kfac_factors reads Prompts, texts, or lists of token ids, but {prompts!r} came")
    batch = model.batch(prompts)
    if int(batch.lengths.max()) < 2:
        raise InputError("no prompt has two tokens, so there is no position with a next token to predict")
    with _full_precision():
        plain = plain_copy(model)
        maps = linear_maps(plain, wanted, model.shape)
        identity = {"fingerprint": model.fingerprint, "edits": list(model.active_edits), "labels": labels, "seed": seed}
        identity |= {"sites": list(map(str, wanted)), "dtype": str(model.dtype).removeprefix("torch."), "version": _VERSION}
        body = _begin(path, identity, batch, maps, model, groups)
        if not body["complete"]:
            for number in range(len(body["groups"])):
                _Collection(model, plain, maps, batch, path, body, number).run()
            _finish(path, body, model, identity)
    found = Factors.open(path)
    _warn(found, model)
    return found


@contextmanager
def _full_precision() -> Iterator[None]:
    """No product of less than the precision of its factors (TF32 and bf16 passes would show in small eigenvalues)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------- the folder


def _begin(
    path: Path, identity: dict[str, Any], batch: Batch, maps: list[Linear], model: HookedModel, groups: int | None
) -> dict[str, Any]:
    """The index to go on from: a new one, that of an interrupted collection, one with more prompts than before, or one that is complete."""
    rows = _row_digests(batch)
    body = read_index(path)
    if body is None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} is not empty; factors go to a folder of their own")
        shares = _shares(maps, model, groups)
        body = {"fingerprint": identity["fingerprint"], "n": 0, "divisor": 0, "digest": "", "meta": {}, "sites": {}, "complete": False}
        body |= {"identity": identity, "rows": [], "before": 0, "groups": [{"shares": s, "done": 0, "file": ""} for s in shares]}
    elif "identity" not in body:
        raise InputError(f"{path} holds factors that were made by hand, and nothing can be added to them")
    elif other := [key for key, value in identity.items() if body["identity"].get(key) != value]:
        raise InputError(f"{path} holds factors of something else (other {', '.join(other)}); choose another folder")
    elif body["complete"] and body["rows"] == rows:
        return body
    elif body["complete"]:
        _check_new(path, body["rows"], rows, "open them with Factors.open, or add other prompts")
        body["before"] = len(body["rows"])
    else:
        before, done = body["before"], max(group["done"] for group in body["groups"])
        again = f"give again those that were being added to the {before} before" if before else "give the same ones"
        if body["rows"][before:done] != rows[: max(0, done - before)]:
            was = f"{done - before} prompts were done when it was interrupted, and these begin with others"
            raise InputError(f"{path} holds an unfinished collection: {was}; {again} to go on, or choose another folder")
        _check_new(path, body["rows"][:before], rows, f"{again} to go on")
    begun = body | {"rows": body["rows"][: body["before"]] + rows, "complete": False}
    try:
        path.mkdir(parents=True, exist_ok=True)
        sizes = sum(_bytes(m) for m in maps)
        if 2 * sizes > (free := shutil.disk_usage(path).free):
            gib = f"{sizes / 2**30:.1f} GiB, twice while they are saved, and {path} has {free / 2**30:.1f} GiB free"
            raise InputError(f"these factors take {gib}; choose fewer modules or layers")
        write_index(path, body if body["complete"] else begun)  # what is complete stays so until more of it is saved
    except OSError as e:
        raise InputError(f"{path} cannot be written: {e.strerror}") from e
    return begun


def _check_new(path: Path, held: list[str], rows: list[str], advice: str) -> None:
    """Refuse prompts that are in the sums: they would count twice."""
    if known := set(held) & set(rows):
        first = next(i for i, row in enumerate(rows) if row in known)
        which = f"{sum(r in known for r in rows)} of these {len(rows)} prompts, the first of them prompt {first}"
        raise InputError(f"the factors in {path} have {which}, already; {advice}")


def prompts_digest(batch: Batch) -> str:
    """What ``meta["prompts_digest"]`` is of factors of just these prompts, in this order."""
    return _digest_of(_row_digests(batch))


def _row_digests(batch: Batch) -> list[str]:
    return [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16] for row in batch.rows()]


def _digest_of(rows: list[str]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _bytes(m: Linear) -> int:
    """What the sums of one map take."""
    return sum(map(triangle_bytes, m.outputs.values())) + (triangle_bytes(m.d_in) if m.records else 0)


def _shares(maps: list[Linear], model: HookedModel, groups: int | None) -> list[list[str]]:
    """Which inputs, with the matrices that read them, are collected together: as even parts as they make."""
    sizes: dict[str, int] = {}
    for m in maps:
        sizes[m.share] = sizes.get(m.share, 0) + _bytes(m)
    total = sum(sizes.values())
    if groups is None:
        groups = max(1, -(-total // max(1, int(_SHARE * free_bytes(model.device)))))
    found: list[list[str]] = [[] for _ in range(groups)]
    seen = 0
    for share, size in sizes.items():
        found[min(groups - 1, int((seen + size / 2) / total * groups))].append(share)
        seen += size
    return [part for part in found if part]


def _finish(path: Path, body: dict[str, Any], model: HookedModel, identity: dict[str, Any]) -> None:
    """Close the index."""
    rows, n = body["rows"], body["groups"][0]["positions"]
    content = [identity, rows, sorted(body["sites"])]
    meta = {k: v for k, v in identity.items() if k not in ("fingerprint", "sites")} | {"model": model.name, "prompts": len(rows)}
    meta |= {"prompts_digest": _digest_of(rows), "sums": "float64 of float32 products"}
    meta["sums"] = "float64" if model.dtype == torch.float64 else meta["sums"]
    body |= {"n": n, "divisor": n, "meta": meta, "complete": True, "digest": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    order = {site: body["sites"][site] for site in identity["sites"]}
    write_index(path, body | {"sites": order})


def _warn(found: Factors, model: HookedModel) -> None:
    """Say what the factors cannot tell."""
    n = found.n
    sizes = {site: max(weights.weight_shape(site.component, model.shape)) for site in found.sites}
    widest = max(sizes, key=lambda site: sizes[site])
    if n < sizes[widest]:
        short = f"{n} positions give factors of at most that rank, and {widest} has {sizes[widest]} dimensions on its longer side"
        warnings.warn(
            f"{short}: the rest of the spectrum is 0 for want of data; at least {sizes[widest]} positions are needed", stacklevel=3
        )


# ------------------------------------------------------------------------------------------- the passes


class _Collection:
    """One group of maps over all prompts that are still to be done."""

    def __init__(
        self, model: HookedModel, plain: nn.Module, maps: list[Linear], batch: Batch, path: Path, body: dict[str, Any], number: int
    ) -> None:
        self.model, self.plain, self.batch, self.path, self.body = model, plain, batch, path, body
        self.number, self.group = number, body["groups"][number]
        self.maps = [m for m in maps if m.share in self.group["shares"]]
        self.before, self.labels, self.seed = body["before"], body["identity"]["labels"], body["identity"]["seed"]
        self.wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.budget = Budget(6 * model._budget.size)  # more than a pass without a graph: adding up costs the same for any number of rows
        self.sums = OuterSums()
        self.index = torch.zeros(0)

    def run(self) -> None:
        """Go through the prompts; saves now and then, and at the end."""
        done = self._back()
        chunks, saved, took = _chunks(self.batch, done), time.monotonic(), 0.0
        bar = progress(chunks, f"factors, part {self.number + 1} of {len(self.body['groups'])}", total=len(chunks), unit="chunk")
        steps = iter(bar)
        while done < len(self.batch):
            first, last = next(steps)
            if not self._add(first, last):  # the pass has left half of its products behind
                done = self._back()
                steps = iter(_chunks(self.batch, done))
                continue
            done = last
            if done == len(self.batch) or time.monotonic() - saved >= max(EVERY, TIMES * took):
                begun = time.monotonic()
                self._save(done)
                saved = time.monotonic()
                took = saved - begun

    def _back(self) -> int:
        """The sums as they were saved last; returns how many of these prompts are in them."""
        self.sums = OuterSums()
        if self.group["file"]:
            self.sums.load(self.path / self.group["file"])
        return max(0, self.group["done"] - self.before)

    def _save(self, done: int) -> None:
        file = f"group{self.number}-{self.before + done}.safetensors"
        save(self.path / file, self.sums.tensors())
        positions = int((self.batch.lengths[:done] - 1).sum()) + self.body["n"]  # those of earlier calls
        self.group |= {"done": self.before + done, "file": file, "positions": positions}
        for m in self.maps:
            for site in m.outputs:
                self.body["sites"][str(site)] = {"A": m.share, "file": file}
        write_index(self.path, self.body)
        for left in self.path.glob(f"group{self.number}-*"):
            if left.name != file:
                left.unlink()

    def _add(self, first: int, last: int) -> bool:
        """Some prompts, the longest first; False when memory ran out."""
        order = sorted(range(first, last), key=lambda i: -int(self.batch.lengths[i]))
        at = 0
        while at < len(order):
            rows = order[at : at + self.budget.rows(self._bytes_per_prompt(int(self.batch.lengths[order[at]])))]
            if not self.budget.attempt(lambda rows=rows: self._pass(rows), len(rows))[0]:
                return False
            at += len(rows)
        return True

    def _bytes_per_prompt(self, width: int) -> int:
        """What the graph of one prompt takes, from the lowest of the modules up."""
        s = self.model.shape
        depth = s.n_layers - min(site.layer or 0 for m in self.maps for site in m.outputs)
        per_token = depth * (12 * s.d_model + 5 * s.d_mlp + 6 * s.n_heads * s.d_head) + 4 * s.d_vocab
        eager = getattr(self.plain.config, "_attn_implementation", "eager") == "eager"
        return max(self.model.dtype.itemsize, 4) * width * (per_token + eager * 3 * depth * s.n_heads * width)

    def _pass(self, rows: list[int]) -> None:
        """One forward and one backward pass; every product is added as soon as its factor is there."""
        part = self.batch.select(rows).to(self.model.device)
        self.index = (part.mask.roll(-1, 1) & (part.position_ids < part.lengths[:, None] - 1)).flatten().nonzero()[:, 0]
        if not len(self.index):
            return
        inputs: dict[str, Any] = {"input_ids": part.ids, "use_cache": False} | ({"attention_mask": part.mask.long()} if part.padded else {})
        handles = [m.module.register_forward_hook(self._reader(m)) for m in self.maps]
        try:
            with torch.enable_grad():
                logits = self.plain(**inputs).logits
            torch.autograd.backward(logits, self._gradient(logits.detach(), part, rows))
        finally:
            for handle in handles:
                handle.remove()
        if lost := {str(site) for m in self.maps for site in m.outputs} - {name[2:] for name in self.sums.strips if name[0] == "G"}:
            raise InputError(f"no gradient of the loss comes to {', '.join(sorted(lost))}")

    def _reader(self, m: Linear) -> Callable[[nn.Module, Any, Tensor], None]:
        def read(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if m.records:
                self.sums.add(f"A {m.share}", self._scored(args[0]))
            if not out.requires_grad:
                out.requires_grad_()  # the graph begins here
            out.register_hook(record)

        def record(gradient: Tensor) -> None:
            for site, g in m.split(self._scored(gradient)).items():
                self.sums.add(f"G {site}", g)

        return read

    def _scored(self, x: Tensor) -> Tensor:
        """The rows of scored positions, wide enough to be multiplied."""
        return x.detach().reshape(-1, x.shape[-1]).index_select(0, self.index.to(x.device)).to(self.wide)

    def _gradient(self, logits: Tensor, part: Batch, rows: list[int]) -> Tensor:
        """The gradient of the loss by the logits: what the model predicts less the label, 0 where nothing is scored."""
        flat = logits.flatten(0, 1)
        index = self.index.to(flat.device)
        labels = part.ids.roll(-1, 1).flatten().to(flat.device)[index]
        uniform = self._uniform(part, rows).to(flat.device) if self.labels == "sampled" else None
        out = torch.zeros_like(flat)
        wrong = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        step = max(1, 2**22 // flat.shape[1])  # float64 cumulative sums of a few rows at a time
        for some in torch.arange(len(index), device=flat.device).split(step):
            p = flat[index[some]].to(self.wide).softmax(-1)
            if uniform is not None:
                cumulative = p.double().cumsum(-1)
                drawn = torch.searchsorted(cumulative, uniform[some, None] * cumulative[:, -1:], right=True)[:, 0]
                labels[some] = drawn.clamp(max=flat.shape[1] - 1)
            picked = labels[some, None]
            wrong[index[some]] = ~p[:, 0].isfinite()  # one logit that is none makes all of them NaN
            out[index[some]] = p.scatter_add(1, picked, -torch.ones_like(picked, dtype=p.dtype)).to(out.dtype)
        if bool(wrong.any()):
            bad = min(rows[i] for i in wrong.view(len(rows), -1).any(1).nonzero()[:, 0].tolist())
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise InputError(f"the loss of prompt {bad} is not finite: {self.model.name} gives it NaN or infinite logits in {dtype}")
        return out.view_as(logits)

    def _uniform(self, part: Batch, rows: list[int]) -> Tensor:
        """One number in [0, 1) per scored position: of a stream of its own for every prompt, so that batching changes nothing."""
        streams = (np.random.default_rng([self.seed % 2**64, self.before + row]) for row in rows)
        drawn = [stream.random(n - 1) for stream, n in zip(streams, part.lengths.tolist(), strict=True)]
        return torch.from_numpy(np.concatenate(drawn))


def _chunks(batch: Batch, done: int) -> list[tuple[int, int]]:
    """Prompts between two looks at the clock."""
    found, first, size = [], done, 0
    for i, length in enumerate(batch.lengths.tolist()[done:], done):
        size += length
        if size >= CHUNK or i == len(batch) - 1:
            found.append((first, i + 1))
            first, size = i + 1, 0
    return found
