"""Do composition scores foretell what heads tell each other (after Merullo et al. 2024, "Talking Heads", arXiv 2406.09519)?

The heads are those that circuits of `base` name: they are searched for in IOI and Colored Objects, and among previous-token and induction
heads; to these comes the channel that is strongest by weights alone. For every sender, receiver and kind stand the components of the sender
by their score from weights, and what deleting each takes from the logit difference: for that input of the receiver alone, for
all inputs of all later heads but no MLP, and for all readers. Controls are random directions that the same head can write along and its
other components. The same is done on models written by hand, where the answer is known.

    python studies/channels.py [--out results/channels] [--n 100] [--quick]

Writes ``channels.html`` and prints the tables. About two minutes on one core, a third of one with ``--quick``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from channel_tables import Asked, Line, Measured, compact, head_name, table, verdict
from torch import Tensor

import interp
from interp.circuit import Circuit
from interp.metrics import Metric
from interp.models import HookedModel
from interp.models.composition import alive, merged, spans
from interp.models.heads import folded_heads
from interp.models.steered import Channels, Look, Steered, Ways
from interp.organisms import hand_built
from interp.prompts import PromptPairs
from interp.roles import named
from interp.sites import Site
from interp.sweeps.channels import Found, generator, random_directions, single, sweep
from interp.sweeps.staged import by_context, grouped

MODEL, TASKS, WRITTEN = "base", ("ioi", "colored_objects"), ("ioi", "induction")
ALSO = ("laundry_list(length=7)", "boxes")
"""Other tasks on which the channel that is strongest by weights is tried."""
KINDS = ("q", "k", "v")
LOOKED_AT = ("IO", "query_object", "target")
"""What receivers may look at from END where the sender writes at END itself: the first that the prompts name."""


# ------------------------------------------------------------------------------------------------ which


def from_circuit(task: str, circuit: Circuit) -> list[Asked]:
    """Edges between heads, by values as the search has them and by keys at the same token; and nodes at END that have a later one there."""
    found: list[Asked] = []
    n_heads, n_kv = circuit.model[1:]
    score = {(n.layer, n.head): abs(circuit.scores.get(n, 0.0)) for n in circuit.nodes}
    for edge in circuit.edges:
        if edge.sender.component != "z" or edge.receiver.head is None:
            continue
        kind, group = edge.receiver.component, n_heads // n_kv
        # A receiver of keys or values is that of several query heads: the one that matters most stands for them.
        own = [edge.receiver.head] if kind == "q" else list(range(edge.receiver.head * group, (edge.receiver.head + 1) * group))
        head = max(own, key=lambda h, layer=edge.receiver.layer: score.get((layer, h), 0.0))
        for k in (kind,) if kind == "q" else (kind, "kv".replace(kind, "")):
            found.append(Asked(task, edge.sender, Site("z", edge.receiver.layer, head), k, "edge"))
    ends = [n for n in circuit.nodes if n.position == "END" and n.component == "z"]
    pairs = [(a, b) for a in ends for b in ends if (a.layer or 0) < (b.layer or 0)]
    return found + [Asked(task, a, Site("z", b.layer, b.head), kind, "both at END") for a, b in pairs for kind in KINDS]


def strongest(composed: Any, tasks: Sequence[str]) -> list[Asked]:
    """The channel with the largest z of a composition, at END of every task."""
    row = composed.top(1).iloc[0]
    sender, _, receiver = row.channel.partition(" -> ")
    reads, _, head = receiver.partition(" for ")  # the head that attends, where heads share keys and values
    to = Site.parse(f"{head or reads.partition('.')[0]}.z")
    return [Asked(task, Site.parse(f"{sender.partition('.')[0]}.z@END"), to, composed.kind, "strongest by weights") for task in tasks]


# -------------------------------------------------------------------------------------------- measuring


def measured_line(model: HookedModel, pairs: PromptPairs, asked: Asked, composed: Any, *, draws: int = 8, seed: int = 0) -> Line:
    """Scores and effects of everything that one sender writes, for one receiver."""
    layer, head = asked.sender.layer or 0, asked.sender.head or 0
    parts = folded_heads(model, layer).components("ov")
    write, strength = parts.Vh[head], parts.S[head]
    at = (_index(composed, "sender", asked.sender), slice(None), _index(composed, "receiver", asked.receiver))
    single_score, single_place = composed.component[0][at], composed.place[0][at]
    score, place, _ = (x[0, :, 0] for x in merged(single_score[None, :, None], single_place[None, :, None], strength[None]))
    there, first = alive(strength, model.shape.d_model), spans(strength)
    begins = [r for r in first.unique().tolist() if bool(there[r])]
    units = tuple(tuple(r for r in range(len(first)) if int(first[r]) == b and bool(there[r])) for b in begins)
    batch, n, rank = model.batch(pairs.clean), len(units), len(write)
    drawn = [random_directions(write[there], 1, generator("channels", seed, str(asked.sender), d)) for d in range(draws)]
    where = single(batch, asked.sender.position or "END", str(asked.sender)).expand(rank + draws, -1)
    channels = Channels(((layer, head),) * (rank + draws), torch.cat([write, *drawn]), where)
    gone = torch.zeros(2 + n + draws, rank + draws, dtype=torch.bool)
    gone[1, :rank] = there
    for row, unit in enumerate(units, start=2):
        gone[row, list(unit)] = True
    gone[torch.arange(2 + n, 2 + n + draws), torch.arange(rank, rank + draws)] = True
    at_end = [name for name in LOOKED_AT if name in batch.positions and asked.sender.position == "END"]
    looked = str((at_end or [asked.sender.position])[0])
    look = Look(((asked.receiver.layer or 0, asked.receiver.head or 0),), named(batch, looked)[None])
    reader = Metric.parse("logit_diff").reader(pairs)
    group = grouped(pairs.contexts)

    def judge(logits: Tensor, rows: Tensor) -> Tensor:
        return reader[rows.cpu()](logits).cpu()[:, None]

    found: list[Found] = []
    for receivers in ([_read(model, asked)], later_inputs(model, layer), []):
        steered = Steered(model, batch, channels, look, receivers)
        found.append(sweep(steered, Ways.without(gone), judge, seed=seed, desc=asked.title))
    told = torch.stack([f.told[..., 0].double() for f in found if f.told is not None])  # [through way prompt]
    values = by_context(told.movedim(-1, 0), group).movedim(0, -1).double()
    taken = values[:, :1] - values[:, 1:]
    paid = by_context(found[0].paid[..., 0, 0].T.double(), group).T.double()
    return Line(
        asked=asked,
        units=units,
        score=score[begins].double(),
        z=_z(composed, asked, score[begins].double(), units),
        place=place[begins],
        rivals=int(composed.rivals[0, at[2]]),
        effect=taken[:, 1 : 1 + n],
        head=taken[:, 0],
        random=taken[:, 1 + n :],
        attention=paid[:1] - paid[2 : 2 + n],
        looked=looked,
        intact=values[0, 0],
        note="; ".join(dict.fromkeys(f.note for f in found if f.note)),
    )


def later_inputs(model: HookedModel, layer: int) -> list[Site]:
    """Queries, keys and values of every head of later layers."""
    shape = model.shape
    sizes = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
    return [Site(kind, at, head) for at in range(layer + 1, shape.n_layers) for kind, size in sizes.items() for head in range(size)]


def _read(model: HookedModel, asked: Asked) -> Site:
    """The receiver's input; keys and values by the head that holds them."""
    head, shape = asked.receiver.head or 0, model.shape
    return Site(asked.kind, asked.receiver.layer, head if asked.kind == "q" else head * shape.n_kv_heads // shape.n_heads)


def _index(composed: Any, axis: str, head: Site) -> int:
    return composed.labels[axis].index(head_name(head))


def _z(composed: Any, asked: Asked, score: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """As the composition has them; spans from its table, which knows their chance."""
    at = composed.component_z[0, _index(composed, "sender", asked.sender), :, _index(composed, "receiver", asked.receiver)]
    z = torch.stack([at[u[0]] for u in units]).double()
    if all(len(u) == 1 for u in units):
        return z
    rows = composed.top(10**6, sender=head_name(asked.sender), receiver=head_name(asked.receiver))
    known = {row.channel.split(" -> ")[0].partition(".")[2]: row.z for row in rows.itertuples()}
    names = [f"{u[0]}" + (f"-{u[-1]}" if len(u) > 1 else "") for u in units]
    return torch.tensor([known.get(name, float(x)) for name, x in zip(names, z, strict=True)], dtype=torch.float64)


def measured(n: int, *, quick: bool = False, seed: int = 0) -> Measured:
    """Everything."""
    model: Any = HookedModel.load(MODEL)
    out, draws = Measured(seed=seed), 4 if quick else 16
    composed = {kind: interp.composition(model, kind=kind, draws=100, seed=seed) for kind in KINDS}  # type: ignore[arg-type]
    asked: list[Asked] = []
    held_out: dict[str, PromptPairs] = {}
    for task in TASKS:
        found_on, held_out[task] = interp.task(task).generate(model, n=2 * n, seed=seed).split()  # type: ignore[union-attr]
        search: Any = interp.circuit_discovery(model, found_on, seed=seed)
        out.results.append(search)
        asked += from_circuit(task, search.circuit())
    roles: Any = interp.head_roles(model, seed=seed)
    out.roles = {role: heads for role, heads in roles.named().items() if role in ("previous_token", "induction")}
    out.results += [roles, *composed.values()]
    for task in ALSO:
        held_out[task] = interp.task(task).generate(model, n=n, seed=seed)  # type: ignore[assignment]
    asked += strongest(composed["q"], list(held_out))
    first = {(one.task, one.why): one for one in reversed(asked)}
    for one in list(first.values())[::-1] if quick else asked:
        out.lines.append(measured_line(model, held_out[one.task], one, composed[one.kind], draws=draws, seed=seed))
    out.sizes = {task: (len(pairs), len(set(pairs.contexts))) for task, pairs in held_out.items()}
    for name in WRITTEN:
        out.written += [(name, line) for line in by_hand(name, 24, draws=4, seed=seed)]
    return out


def by_hand(name: str, n: int, *, draws: int, seed: int) -> list[Line]:
    """The channels of a model written by hand, each through all three inputs of its receiver: one is right, two are wrong."""
    made = hand_built(name)
    pairs, lines = made.task.generate(made.model, n=n, seed=seed), []
    composed = {kind: interp.composition(made.model, kind=kind, draws=20, seed=seed) for kind in KINDS}  # type: ignore[arg-type]
    for edge in made.circuit.edges:
        if edge.sender.component != "z" or edge.receiver.head is None or edge.receiver.layer <= edge.sender.layer:
            continue
        for kind in KINDS:
            why = "written" if kind == edge.receiver.component else "not written"
            head = edge.receiver.head
            if edge.receiver.component != "q":
                head *= made.model.shape.n_heads // made.model.shape.n_kv_heads
            one = Asked(name, edge.sender, Site("z", edge.receiver.layer, head), kind, why)
            lines.append(measured_line(made.model, pairs, one, composed[kind], draws=draws, seed=seed))
    return lines


WARNINGS = (
    "Scores know nothing of MLPs and norms between two heads, nor of what is written on a prompt. In grouped attention keys and values "
    "belong to several query heads: the change for a receiver's key or value is read by all of its group.",
    "Each logit difference is that of one token of the answer; a channel may matter for what this does not see.",
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/channels"), help="folder of the page")
    parser.add_argument("--n", type=int, help="prompts of each task to judge on, and as many to search on (100; 24 with --quick)")
    parser.add_argument("--quick", action="store_true", help="one channel of each origin and fewer random directions")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and controls")
    given = parser.parse_args(words)
    start = time.monotonic()
    try:
        if (n := given.n if given.n is not None else (24 if given.quick else 100)) < 8:
            raise interp.InputError(f"--n is {n}, expected 8 or more")
        found = measured(n, quick=given.quick, seed=given.seed)
        lines = verdict(found, MODEL)
        page = interp.write_report(
            found.results, given.out / "channels.html", title="Channels between heads", verdict=lines, warnings=WARNINGS
        )
    except interp.InputError as error:
        parser.error(str(error))
    tables = [table(found.lines, f"channels of {MODEL}", given.seed), compact(found.written, given.seed)]
    print(*tables, *lines, f"{page} ({time.monotonic() - start:.0f} s)", sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
