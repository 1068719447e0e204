"""Patching by the book on plain Hugging Face models: one prompt, one forward, hooks written by hand; nothing of interp runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from interp.prompts import Prompts
    from interp.sites import Site


class Set(NamedTuple):
    """An activation to set in a run: position None is all, head None is all."""

    component: str
    layer: int
    head: int | None
    pos: int | None
    value: Tensor


@contextmanager
def hooked(hf: Any, component: str, layer: int, change: Callable[[Tensor], None]) -> Iterator[None]:
    """Let ``change`` read or overwrite a copy of an activation: [pos d], [pos head d_head], or [head query key]."""
    with ExitStack() as stack:
        _install(stack, hf, component, layer, change)
        yield


def _install(stack: ExitStack, hf: Any, component: str, layer: int, change: Callable[[Tensor], None]) -> None:
    block, attention, out, mlp, down = _parts(hf, layer)
    config = hf.config
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads

    def split(x: Tensor) -> None:
        change(x[0].unflatten(-1, (-1, d_head)))

    if component == "resid_pre":
        _before(stack, block, lambda x: change(x[0]))
    elif component == "resid_post":
        _after(stack, block, lambda x: change(x[0]))
    elif component == "attn_out":
        _after(stack, attention, lambda x: change(x[0]))
    elif component == "mlp_out":
        _after(stack, mlp, lambda x: change(x[0]))
    elif component == "mlp_post":
        _before(stack, down, lambda x: change(x[0]))
    elif component == "z":
        _before(stack, out, split)
    elif component == "resid_mid":
        entering: list[Tensor] = []
        _before(stack, block, lambda x: entering.append(x.clone()))

        def through_attention(x: Tensor) -> None:
            middle = entering[-1] + x
            was = middle.clone()
            change(middle[0])
            rows = (middle != was).any(-1)
            x[rows] = (middle - entering[-1])[rows]

        _after(stack, attention, through_attention)
    elif component == "pattern":
        _patterns(stack, hf, layer, change)
    else:
        index = "qkv".index(component)
        if hasattr(hf, "transformer"):  # q, k and v side by side
            _after(stack, attention.c_attn, lambda x: change(x[0].unflatten(-1, (3, heads, d_head))[:, index]))
        elif hasattr(hf, "gpt_neox"):  # q, k and v of every head side by side
            _after(stack, attention.query_key_value, lambda x: change(x[0].unflatten(-1, (heads, 3, d_head))[:, :, index]))
        else:
            _after(stack, getattr(attention, f"{component}_proj"), split)


def _parts(hf: Any, layer: int) -> tuple[nn.Module, Any, nn.Module, nn.Module, nn.Module]:
    if hasattr(hf, "transformer"):
        block = hf.transformer.h[layer]
        return block, block.attn, block.attn.c_proj, block.mlp, block.mlp.c_proj
    if hasattr(hf, "gpt_neox"):
        block = hf.gpt_neox.layers[layer]
        return block, block.attention, block.attention.dense, block.mlp, block.mlp.dense_4h_to_h
    block = hf.model.layers[layer]
    return block, block.self_attn, block.self_attn.o_proj, block.mlp, block.mlp.down_proj


def _before(stack: ExitStack, module: nn.Module, change: Callable[[Tensor], None]) -> None:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        change(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _after(stack: ExitStack, module: nn.Module, change: Callable[[Tensor], None]) -> None:
    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        change(x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    stack.callback(module.register_forward_hook(hook).remove)


def _patterns(stack: ExitStack, hf: Any, layer: int, change: Callable[[Tensor], None]) -> None:
    """Eager attention hands its weights [prompt head query key] to a dropout, which does nothing here; layers take turns."""
    real, turn = nn.functional.dropout, [0]

    def dropout(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == 4:
            turn[0] += 1
            if turn[0] - 1 == layer:
                x = x.clone()
                change(x[0])
        return x

    nn.functional.dropout = dropout
    stack.callback(lambda: setattr(nn.functional, "dropout", real))


def seen(hf: nn.Module, ids: Sequence[int], wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
    """Activations of one prompt."""
    found: dict[tuple[str, int], Tensor] = {}
    with torch.no_grad():
        for what in wanted:  # one at a time: patterns are told apart by their turn
            with hooked(hf, *what, lambda x, what=what: found.__setitem__(what, x.clone())):
                hf(torch.tensor([list(ids)]), use_cache=False)
    return found


def patched(hf: nn.Module, ids: Sequence[int], sets: Sequence[Set]) -> Tensor:
    """Logits [pos vocab] of one prompt with activations set."""

    def write(x: Tensor, s: Set) -> None:
        where: Any = slice(None) if s.pos is None else s.pos
        head: Any = slice(None) if s.head is None else s.head
        if s.component == "pattern":
            x[head, where] = s.value
        elif s.component in ("q", "k", "v", "z"):
            x[where, head] = s.value
        else:
            x[where] = s.value

    with torch.no_grad(), ExitStack() as stack:
        for s in sets:
            stack.enter_context(hooked(hf, s.component, s.layer, lambda x, s=s: write(x, s)))
        return hf(torch.tensor([list(ids)]), use_cache=False).logits[0]


def part(x: Tensor, component: str, head: int | None, pos: int | None) -> Tensor:
    """The part of a whole activation that a ``Set`` writes."""
    where: Any = slice(None) if pos is None else pos
    every: Any = slice(None) if head is None else head
    if component == "pattern":
        return x[every, where]
    return x[where, every] if component in ("q", "k", "v", "z") else x[where]


def _tokens(prompts: Prompts, position: str | int | None, row: int) -> list[int]:
    if position is None:
        return list(range(len(prompts.ids[row])))
    return list(prompts.positions[position][row]) if isinstance(position, str) else [position]


def _at_input(stack: ExitStack, hf: nn.Module, receiver: Site, change: Any) -> None:
    """Read or overwrite what a receiver reads: [pos head d_head], or the input of an MLP behind its norm."""
    if receiver.component == "resid_mid":
        _before(stack, _parts(hf, receiver.layer or 0)[3], lambda x: change(x[0]))
    else:
        stack.enter_context(hooked(hf, receiver.component, receiver.layer or 0, change))


def path_patched(
    hf: Any,
    into: Prompts,
    source: Prompts,
    senders: list[Any],
    receivers: list[Any],
    freeze_mlps: bool = False,
    only_at: str | None = None,
    rows: range | None = None,
) -> Tensor:
    """The last logits of every path by the book, [sender receiver prompt vocab]: one prompt at a time, four runs each."""
    found = [_path_row(hf, into, source, row, senders, receivers, freeze_mlps, only_at) for row in rows or range(len(into))]
    return torch.stack(found, dim=2)


def _path_row(
    hf: Any, into: Prompts, source: Prompts, row: int, senders: list[Any], receivers: list[Any], freeze_mlps: bool, only_at: str | None
) -> Tensor:
    layers, ids = range(hf.config.num_hidden_layers), torch.tensor([into.ids[row]])
    held = [(c, i) for c in ("z", *(["mlp_out"] if freeze_mlps else [])) for i in layers]
    first = seen(hf, into.ids[row], held)
    where = {s: ("resid_pre", 0) if s.component == "embed" else (s.component, s.layer or 0) for group in senders for s in group}
    second = seen(hf, source.ids[row], list(dict.fromkeys(where.values())))
    inner = [r for group in receivers for r in group if r.component != "resid_post"]
    out = []
    for group in senders:
        read: dict[Site, Tensor] = {}

        def hold(x: Tensor, what: tuple[str, int], group: Any = group) -> None:
            if what in held:
                some: Any = slice(None) if only_at is None else _tokens(into, only_at, row)
                x[some] = first[what][some]
            for s in (s for s in group if where[s] == what):
                head: Any = () if s.head is None else (s.head,)
                for a, b in zip(_tokens(into, s.position, row), _tokens(source, s.position, row), strict=True):
                    x[(a, *head)] = second[what][(b, *head)]

        with torch.no_grad(), ExitStack() as stack:
            for r in dict.fromkeys(inner):
                _at_input(stack, hf, r, lambda x, r=r, read=read: read.__setitem__(r, x.clone()))
            for what in dict.fromkeys([*held, *(where[s] for s in group)]):
                stack.enter_context(hooked(hf, *what, lambda x, what=what, hold=hold: hold(x, what)))
            third = hf(ids, use_cache=False).logits[0, -1]
        last = []
        for readers in receivers:
            if readers[0].component == "resid_post":
                last.append(third)
                continue

            def receive(x: Tensor, r: Site, read: Any = read) -> None:
                head: Any = () if r.head is None else (r.head,)
                for t in _tokens(into, r.position, row):
                    x[(t, *head)] = read[r][(t, *head)]

            with torch.no_grad(), ExitStack() as stack:
                for r in readers:
                    _at_input(stack, hf, r, lambda x, r=r, receive=receive: receive(x, r))
                last.append(hf(ids, use_cache=False).logits[0, -1])
        out.append(torch.stack(last))
    return torch.stack(out)


def difference(logits: Tensor, into: Prompts) -> Tensor:
    """Logit differences of [... prompt vocab]."""
    rows = torch.arange(logits.shape[-2])
    return logits[..., rows, torch.tensor(into.answers)[rows]] - logits[..., rows, torch.tensor(into.distractors)[rows]]
