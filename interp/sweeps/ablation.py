"""What a metric is when parts of a model are knocked out: a circuit alone, or all but some of its nodes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError
from interp.metrics import Reader
from interp.models.ablated import StandIn, ablated, means, parts, recorded, zeros
from interp.names import unknown
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.sites import Site
from interp.sweeps.plain import baseline, run
from interp.sweeps.saved import Remembered, digest, identity_of_metric, identity_of_run
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

Ablation = Literal["mean", "resample", "zero"]
ABLATIONS = ("mean", "resample", "zero")
Key = tuple[str, ...]
_FEW = 10  # fewer prompts than that make a noisy mean
_ROWS = 4096  # runs that are put together at a time; memory decides how many of them pass at once


@dataclass(frozen=True)
class Knockout:
    """What is knocked out.

    Attributes:
        nodes: heads (``z``) and MLPs (``mlp_out``), each at a position, or everywhere without one.
        rest: all but the nodes is knocked out, not the nodes.
    """

    nodes: frozenset[Site]
    rest: bool = False

    @classmethod
    def all_but(cls, nodes: Iterable[Site]) -> Knockout:
        """A circuit alone."""
        return cls(frozenset(nodes), rest=True)

    @classmethod
    def of(cls, nodes: Iterable[Site]) -> Knockout:
        """The whole model without some nodes."""
        return cls(frozenset(nodes))

    def __str__(self) -> str:
        """The same text for the same knockout."""
        return ("all but " if self.rest else "") + " ".join(sorted(map(str, self.nodes)))


class Ablations:
    """The metric under knockouts; each is computed once.

    Attributes:
        intact: the metric of the whole model, [prompt].
        floor: largest change of it by rounding alone.
        group: context of every prompt, as ``grouped`` counts them.
        notes: what stands in for knocked-out parts, where that is not plain.
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: Prompts | PromptPairs,
        reader: Reader,
        *,
        ablation: Ablation = "mean",
        by: str | None = None,
        mlps: bool = False,
        seed: int = 0,
    ) -> None:
        """Runs the model once, and takes from the reference prompts what stands in.

        Args:
            model: the model.
            prompts: what is judged; of pairs the clean ones, and the corrupt ones give what stands in.
            reader: the metric.
            ablation: ``mean``, ``resample`` or ``zero``, as ``stand_in`` explains.
            by: which prompts share means.
            mlps: MLPs can be knocked out too; without, they always run free.
            seed: of the prompts that are drawn.

        Raises:
            InputError: as ``stand_in``.
        """
        self.batch = model.batch(clean_prompts(prompts))
        self.stand_in, self.notes = stand_in(model, prompts, ablation, by=by, mlps=mlps, seed=seed)
        self.model, self.reader, self.group = model, reader, grouped(prompts.contexts)
        self.intact, self.floor = baseline(model, self.batch, reader)
        self._known: dict[Knockout, Tensor] = {}
        self._kept = Remembered("knockouts", self._identity)

    def _identity(self) -> list[Any]:
        tables = {site: self.stand_in.table[site] for site in sorted(self.stand_in.table, key=str)}
        given = [digest(self.stand_in.entry), [[str(site), digest(x)] for site, x in tables.items()]]
        return [identity_of_run(self.model, self.batch), identity_of_metric(self.reader), given]

    def __call__(self, knockouts: Sequence[Knockout], desc: str = "knockouts") -> Float[Tensor, "knockout prompt"]:
        """The metric under each. Where nothing of a prompt is knocked out it is that of the whole model, to the bit.

        Raises:
            InputError: a position that the prompts do not name, or a node that cannot be knocked out.
        """
        self._known |= {k: self._kept.found[str(k)] for k in knockouts if k not in self._known and str(k) in self._kept.found}
        new = [k for k in dict.fromkeys(knockouts) if k not in self._known]
        many = max(1, _ROWS // len(self.batch))
        for at in progress(range(0, len(new), many), desc):
            chunk = new[at : at + many]
            found = dict(zip(chunk, self._runs(chunk), strict=True))
            self._known |= found
            self._kept.put({str(k): x for k, x in found.items()})
        return torch.stack([self._known[k] for k in knockouts]) if knockouts else self.intact.new_empty(0, len(self.batch))

    def mean(self, values: Float[Tensor, "... prompt"]) -> Float[Tensor, "... context"]:
        """Means per context: prompts of one context are no independent draws."""
        return by_context(values.movedim(-1, 0), self.group).movedim(0, -1)

    def _runs(self, knockouts: Sequence[Knockout]) -> Iterator[Tensor]:
        masks = _Masks(self.batch, knockouts, self.stand_in.table)
        number, prompt = masks.touched().nonzero(as_tuple=True)
        out = self.intact.repeat(len(knockouts), 1)
        if len(number):
            order = self.model, self.batch, prompt.tolist(), lambda site, rows, n: masks(site, number[rows], prompt[rows], n)
            for rows, logits in ablated(*order, self.stand_in, self.reader.position):
                out[number[rows], prompt[rows]] = self.reader[prompt[rows]](logits).to(out)
        yield from out

    def checked(self, many: int, seed: int) -> tuple[int, float]:
        """Some of what was computed once more, prompt by prompt, with every knocked-out head set by itself.

        Returns:
            How many, and the largest difference.
        """
        draw = random.Random(f"{seed} checked")
        done = [(k, i) for k in self._known for i in range(len(self.batch))]
        worst, chosen = 0.0, draw.sample(done, min(many, len(done)))
        for knockout, i in chosen:
            masks, one = _Masks(self.batch, [knockout], self.stand_in.table), self.batch[i]
            row, width = torch.tensor([i]), one.ids.shape[1]
            sets: dict[Site | str, Tensor] = {}
            for site, table in self.stand_in.table.items():
                out = masks(site, torch.tensor([0]), row, width)[0]
                values = self.stand_in.at(site, row, width, table)
                for head in range(out.shape[1]):
                    own = site if site.component == "mlp_out" else Site("z", site.layer, head)
                    value = values if own is site else values[:, :, head]
                    if bool(out[:, head].all()):
                        sets[own] = value
                    else:
                        sets |= {own.at(at): value[:, at] for at in out[:, head].nonzero().flatten().tolist()}
            with self.model.patched(sets):
                again = run(self.model, one, self.reader[[i]])
            worst = max(worst, float((again - self._known[knockout][i]).abs().max()))
        return len(chosen), worst


class _Masks:
    """Which tokens of which heads some knockouts concern."""

    def __init__(self, batch: Batch, knockouts: Sequence[Knockout], universe: Mapping[Site, Tensor]) -> None:
        nodes = dict.fromkeys(node for k in knockouts for node in k.nodes)
        places = list(dict.fromkeys(node.position for node in nodes)) or [None]
        self.real = batch.mask.cpu()
        self.tokens = torch.zeros(*self.real.shape, len(places))  # [prompt pos place]
        for p, place in enumerate(places):
            for row, tokens in enumerate([] if place is None else batch.at(place)):
                self.tokens[row, list(tokens), p] = 1
            if place is None:
                self.tokens[..., p] = 1
        heads = {site: x.shape[1] if site.component == "z" else 1 for site, x in universe.items()}
        self.member = {site: torch.zeros(len(knockouts), len(places), n) for site, n in heads.items()}
        for i, knockout in enumerate(knockouts):
            for node in knockout.nodes:
                if (site := Site(node.component, node.layer)) not in heads:
                    raise InputError(
                        f"{node} cannot be knocked out here; what can is {', '.join(dict.fromkeys(s.component for s in heads))}"
                    )
                self.member[site][i, places.index(node.position), node.head or 0] = 1
        self.rest = torch.tensor([k.rest for k in knockouts])

    def __call__(self, site: Site, number: Tensor, prompt: Tensor, width: int) -> Bool[Tensor, "row pos head"]:
        """What is knocked out of a layer's heads, for rows of (knockout, prompt)."""
        named = torch.bmm(self.tokens[prompt, :width], self.member[site][number]) > 0
        return named ^ self.rest[number][:, None, None]

    def touched(self) -> Bool[Tensor, "knockout prompt"]:
        """Where anything is knocked out at all. Parts whose nodes are at the same places are looked at once."""
        every = torch.cat(list(self.member.values()), dim=-1) > 0  # [knockout place part]
        found = torch.zeros(len(self.rest), len(self.real), dtype=torch.bool)
        known: dict[tuple[bool, ...], Tensor] = {}
        for number, rest in enumerate(self.rest.tolist()):
            for places in every[number].T.unique(dim=0):
                key = (rest, *places.tolist())
                if key not in known:
                    named = (self.tokens[..., places] > 0).any(-1)
                    known[key] = ((named ^ rest) & self.real).any(-1)
                found[number] |= known[key]
        return found


def stand_in(
    model: HookedModel, prompts: Prompts | PromptPairs, ablation: Ablation, *, by: str | None = None, mlps: bool = False, seed: int = 0
) -> tuple[StandIn, tuple[str, ...]]:
    """What knocked-out heads give in place of their own z, and in words what is special about it.

    - ``mean``: the mean z at the same token over reference prompts: the corrupt ones of pairs, otherwise the prompts themselves.
      For every prompt it leaves out itself, its partner and all others of its context, or in small groups the mean would tell the
      answer. Token by token is meant literally, so prompts that share means must have one length.
    - ``resample``: z at the same token of the corrupt partner, or without pairs of a prompt of that length and another context,
      drawn at random.
    - ``zero``: zeros.

    Args:
        model: the model.
        prompts: prompts, or pairs.
        ablation: one of these.
        by: which prompts share means, and are drawn for each other: those with the same value of a tag, or of several,
            ``template,order``; ``length`` stands for the number of tokens; ``all`` of them. None is ``template`` where the prompts
            have this tag, else ``length`` where they differ in it, else ``all``.
        mlps: also for MLPs.
        seed: of the draws.

    Raises:
        InputError: an unknown ablation or tag, lengths that differ where tokens must correspond, or too few prompts.
    """
    if ablation not in ABLATIONS:
        raise unknown("ablation", str(ablation), ABLATIONS)
    pairs = isinstance(prompts, PromptPairs)
    asked, reference = _sides(prompts)
    batch, sites = model.batch(asked), parts(model, mlps)
    if by is not None and (ablation == "zero" or (ablation == "resample" and pairs)):
        raise InputError(f"by={by} would not be used: ablation={ablation} takes no means and draws no prompts")
    if ablation == "zero":
        return zeros(model, batch, sites), ()
    if ablation == "resample" and pairs:
        odd = [i for i, (a, b) in enumerate(zip(asked.ids, reference.ids, strict=True)) if len(a) != len(b)]
        if odd:
            lengths = f"{len(asked.ids[odd[0]])} and {len(reference.ids[odd[0]])}"
            raise InputError(
                f"ablation=resample takes every token of the corrupt partner, but the prompts of pair {odd[0]} have {lengths} tokens; "
                "use ablation=mean with by=length, or zero"
            )
        return recorded(model, model.batch(reference), range(len(asked)), batch, sites), ()
    names = _tags(asked, by)
    own, theirs = (_keys(p, asked.tags, names) for p in (asked, reference))
    if ablation == "resample":
        return recorded(model, batch, _drawn(asked, own, seed), batch, sites), ("another prompt drawn for each",)
    return _means(model, asked, reference, own, theirs, names, sites)


def comparable(prompts: Prompts | PromptPairs, ablation: Ablation, by: str | None = None) -> list[int]:
    """Prompts that have others to take what stands in from: of another context, and alike in what ``by`` names.

    Raises:
        InputError: an unknown tag.
    """
    asked, reference = _sides(prompts)
    if ablation == "zero" or (ablation == "resample" and asked is not reference):
        return list(range(len(asked)))
    names = _tags(asked, by)
    own, theirs = (_keys(p, asked.tags, names) for p in (asked, reference))
    if ablation == "resample":
        return [i for i, others in enumerate(_partners(asked, own)) if others]
    return [i for i, others in enumerate(_others(asked, reference, own, theirs)) if others]


def _sides(prompts: Prompts | PromptPairs) -> tuple[Prompts, Prompts]:
    """What is asked, and where what stands in comes from."""
    return (prompts.clean, prompts.corrupt) if isinstance(prompts, PromptPairs) else (prompts, prompts)


def _tags(prompts: Prompts, by: str | None) -> list[str]:
    """The tags that prompts are grouped by."""
    if by is None:
        return ["template"] if "template" in prompts.tags else ["length"] if len({len(ids) for ids in prompts.ids}) > 1 else []
    if by == "all":
        return []
    names = [name.strip() for name in str(by).split(",")]
    for name in names:
        if name not in (*prompts.tags, "length"):
            have = f"they have {', '.join(prompts.tags)}" if prompts.tags else "they have no tags"
            raise InputError(f"by={by}: these prompts have no tag {name!r}; {have}, and by=length or by=all need none")
    return names


def _keys(prompts: Prompts, tags: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[Key]:
    """The group of every prompt; a corrupt prompt has the tags of its clean one."""
    rows = enumerate(prompts.ids)
    return [tuple(tags[name][i] if name in tags else str(len(ids)) for name in names) for i, ids in rows]


def _partners(prompts: Prompts, keys: Sequence[Key]) -> list[list[int]]:
    """For every prompt the others of its group and length, and of other contexts."""
    groups: dict[object, list[int]] = {}
    alike = [(key, len(ids)) for key, ids in zip(keys, prompts.ids, strict=True)]
    for i, key in enumerate(alike):
        groups.setdefault(key, []).append(i)
    return [[j for j in groups[key] if prompts.contexts[j] != prompts.contexts[i]] for i, key in enumerate(alike)]


def _drawn(prompts: Prompts, keys: Sequence[Key], seed: int) -> list[int]:
    """One of these for every prompt."""
    found = []
    for i, others in enumerate(_partners(prompts, keys)):
        if not others:
            wanted = f"another prompt of {len(prompts.ids[i])} tokens and another context"
            raise InputError(f"ablation=resample needs {wanted} for prompt {i}, and there is none")
        found.append(random.Random(f"{seed} {i}").choice(others))
    return found


def _kin(asked: Prompts, reference: Prompts) -> list[tuple[str, ...]]:
    """Whose contexts every reference prompt is of: that of the prompt it is the partner of, and its own."""
    return [tuple(dict.fromkeys(both)) for both in zip(asked.contexts, reference.contexts, strict=True)]


def _others(asked: Prompts, reference: Prompts, own: Sequence[Key], theirs: Sequence[Key]) -> list[int]:
    """For every prompt how many reference prompts of its group are of other contexts."""
    every = Counter(theirs)
    kin = Counter((key, context) for key, contexts in zip(theirs, _kin(asked, reference), strict=True) for context in contexts)
    return [every[key] - kin[key, context] for key, context in zip(own, asked.contexts, strict=True)]


def _means(
    model: HookedModel,
    asked: Prompts,
    reference: Prompts,
    own: Sequence[Key],
    theirs: Sequence[Key],
    names: Sequence[str],
    sites: Sequence[Site],
) -> tuple[StandIn, tuple[str, ...]]:
    """Means token by token over the reference prompts of each group that are of other contexts."""
    others = _others(asked, reference, own, theirs)
    groups = list(dict.fromkeys(own))
    for key in groups:
        _check_group(key, names, asked, reference, own, theirs, others)
    width = max(len(ids) for p in (asked, reference) for ids in p.ids)
    mine = list(zip(own, asked.contexts, strict=True))
    # Prompts of one group and one context leave out the same, so they share entries. What nobody asks for goes behind all others.
    first = {key: i * width for i, key in enumerate(groups)}
    entries = {pair: i * width for i, pair in enumerate(dict.fromkeys(mine))}
    nobody, none = len(groups) * width, len(entries) * width

    def slots(prompts: Prompts, starts: Sequence[int], last: int | None = None) -> Tensor:
        """Of every token, counted from where its prompt starts."""
        columns = torch.arange(max(map(len, prompts.ids)))
        padding = columns >= torch.tensor([len(ids) for ids in prompts.ids])[:, None]
        found = (torch.tensor(starts)[:, None] + columns).masked_fill(padding, 0)
        return found if last is None else found.clamp_max(last)

    kin = _kin(asked, reference)
    ways = [[entries.get((k, c[way]), none) if way < len(c) else none for k, c in zip(theirs, kin, strict=True)] for way in (0, 1)]
    stand_in = means(
        model,
        model.batch(reference),
        slots(reference, [first.get(key, nobody) for key in theirs]),
        torch.stack([slots(reference, starts, none) for starts in ways]),
        torch.cat([first[key] + torch.arange(width) for key, _ in entries]),
        slots(asked, [entries[pair] for pair in mine]),
        sites,
    )
    what = "the prompts" if asked is reference else "the corrupt prompts"
    few, most = min(others), max(others)
    each = f"{few}" if few == most else f"{few} to {most}"
    noisy = f": fewer than {_FEW} are noisy" if few < _FEW else ""
    return stand_in, (f"means over {what} of other contexts{' by ' + ','.join(names) if names else ''}, {each} each{noisy}",)


def _check_group(
    key: Key, names: Sequence[str], asked: Prompts, reference: Prompts, own: Sequence[Key], theirs: Sequence[Key], others: Sequence[int]
) -> None:
    """Refuse a group whose tokens do not correspond, or that has nothing to take a mean over."""
    said = ", ".join(f"{name}={value}" for name, value in zip(names, key, strict=True))
    lengths = {len(ids) for p, keys in ((asked, own), (reference, theirs)) for ids, k in zip(p.ids, keys, strict=True) if k == key}
    if len(lengths) > 1:
        which, way = (f"prompts with {said}", f"by={','.join(names)},length") if names else ("these prompts", "by=length, or ablation=zero")
        raise InputError(f"{which} have {min(lengths)} to {max(lengths)} tokens, and means are taken token by token; use {way}")
    if alone := [i for i, k in enumerate(own) if k == key and not others[i]]:
        what = "prompt" if asked is reference else "corrupt prompt"
        less = f", or group them by less than by={','.join(names)}" if names else ""
        none = f"prompt {alone[0]} has no {what} of another context to take a mean over{', with ' + said if said else ''}"
        raise InputError(f"{none}; give more prompts{less}")
