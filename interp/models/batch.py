"""Token ids as models take them: right-padded rows with a mask and named positions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import InputError

Positions = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts as tensors, right-padded, so that a column is the index in the prompt.

    Causal attention makes padding on the right invisible to the real tokens, and positions need no shift.

    Attributes:
        ids: token ids.
        mask: True on real tokens; every row has its real tokens first, and at least one.
        positions: name -> for each prompt the token indices it names (one or several). ``END`` is always there.
    """

    ids: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    positions: Positions = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the layout and add END."""
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            raise InputError(f"ids and mask of a batch are [prompt, pos] alike; got {tuple(self.ids.shape)} and {tuple(self.mask.shape)}")
        if self.mask.dtype != torch.bool:
            raise InputError(f"the mask of a batch is boolean, not {self.mask.dtype}; Batch.of_tensor reads masks of ones and zeros")
        lengths = self.mask.sum(1)
        if self.ids.shape[0] == 0 or int(lengths.min()) == 0:
            raise InputError("a batch needs at least one prompt, and every prompt at least one token")
        if not torch.equal(self.mask, torch.arange(self.ids.shape[1], device=self.ids.device)[None] < lengths[:, None]):
            raise InputError(
                "a batch is padded on the right; make it with Batch.of(rows) or model.batch(...), which also takes left-padded rows"
            )
        places = {name: tuple(tuple(int(i) for i in p) for p in per_prompt) for name, per_prompt in self.positions.items()}
        for name, per_prompt in places.items():
            if len(per_prompt) != len(self):
                raise InputError(f"position {name!r} names tokens of {len(per_prompt)} prompts; the batch has {len(self)}")
            for row, (indices, n) in enumerate(zip(per_prompt, lengths.tolist(), strict=True)):
                if any(not 0 <= i < n for i in indices):
                    raise InputError(f"position {name!r} of prompt {row} is {indices}; the prompt has tokens 0 to {n - 1}")
        last = tuple((n - 1,) for n in lengths.tolist())
        if places.setdefault("END", last) != last:
            raise InputError("END is the last token of every prompt; give another position another name")
        object.__setattr__(self, "positions", MappingProxyType(places))

    @classmethod
    def of(
        cls,
        rows: Sequence[Iterable[SupportsIndex]],
        positions: Positions | None = None,
        pad_id: int = 0,
        device: str | torch.device | None = None,
    ) -> Batch:
        """A batch from lists of token ids of any lengths.

        Raises:
            InputError: no prompts, an empty one, or what is no list of integers.
        """
        try:
            rows = [[operator.index(token) for token in row] for row in rows]
        except TypeError as e:
            raise InputError(f"prompts are lists of token ids, such as [[3, 9], [4]]; got {str(rows)[:60]}") from e
        if not rows or any(len(row) == 0 for row in rows):
            empty = next((i for i, row in enumerate(rows) if len(row) == 0), None)
            raise InputError("no prompts were given" if empty is None else f"prompt {empty} is empty: it has no tokens")
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return cls(ids, torch.arange(width, device=device)[None] < lengths[:, None], positions or {})

    @classmethod
    def of_tensor(cls, ids: Tensor, mask: Tensor | None = None, *, unpadded: bool = False) -> Batch:
        """A batch from a tensor of ids, padded on either side.

        Args:
            ids: [prompt, pos], or [pos] for one prompt.
            mask: of the same shape; 1 on real tokens, 0 on padding.
            unpadded: say that every token is real.

        Raises:
            InputError: neither a mask nor ``unpadded=True`` says which tokens are real, or the mask is none of ones and zeros
                with every prompt in one piece.
        """
        if mask is None and not unpadded:
            raise InputError("a tensor of token ids needs its attention mask, or unpadded=True if no row is padded")
        if ids.is_floating_point() or ids.ndim not in (1, 2) or (mask is not None and mask.shape != ids.shape):
            came = f"{tuple(ids.shape)} {ids.dtype}" + ("" if mask is None else f" and a mask {tuple(mask.shape)}")
            raise InputError(f"token ids are integers [prompt, pos] with a mask of the same shape; got {came}")
        ids = ids[None] if ids.ndim == 1 else ids
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().reshape(ids.shape)
        if mask is not None and not torch.equal(keep.to(mask.dtype).reshape(mask.shape), mask):
            raise InputError("an attention mask is 1 on real tokens and 0 on padding; this one has other numbers (an additive mask?)")
        # A hole would be closed up, and what follows it would get other positions than in the caller's model.
        begins = keep.to(torch.int8).diff(dim=1, prepend=torch.zeros_like(keep[:, :1], dtype=torch.int8)) == 1
        if bool((begins.sum(1) > 1).any()):
            raise InputError(
                "an attention mask has padding between real tokens of a prompt; only padding before or behind them is understood"
            )
        return cls.of([row[k].tolist() for row, k in zip(ids, keep, strict=True)], device=ids.device)

    def __len__(self) -> int:
        """Number of prompts."""
        return self.ids.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Tokens per prompt."""
        return self.mask.sum(1)

    @property
    def position_ids(self) -> Int[Tensor, "prompt pos"]:
        """The position each token has for the model: its column."""
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)

    @property
    def padded(self) -> bool:
        """True when rows differ in length."""
        return not bool(self.mask.all())

    def rows(self) -> list[list[int]]:
        """Token ids without padding."""
        return [row[:n].tolist() for row, n in zip(self.ids, self.lengths.tolist(), strict=True)]

    def at(self, position: str | int) -> list[tuple[int, ...]]:
        """The token indices a position names, per prompt.

        Raises:
            InputError: an unknown name, or an integer outside some prompt.
        """
        if isinstance(position, str):
            if position not in self.positions:
                raise InputError(f"no position {position!r} in these prompts; they name {', '.join(self.positions)}")
            return list(self.positions[position])
        found = []
        for row, n in enumerate(self.lengths.tolist()):
            if not -n <= position < n:
                raise InputError(f"position {position} is outside prompt {row}, which has tokens 0 to {n - 1}")
            found.append((position % n,))
        return found

    def index(self, position: str | int) -> Int[Tensor, " prompt"]:
        """The one token index a position names in each prompt.

        Raises:
            InputError: unknown, or not exactly one token in some prompt.
        """
        places = self.at(position)
        for row, place in enumerate(places):
            if len(place) != 1:
                raise InputError(f"position {position!r} names {len(place)} tokens in prompt {row}; exactly one is needed here")
        return torch.tensor([p[0] for p in places], device=self.ids.device)

    def columns(self, position: str | int) -> Int[Tensor, "prompt n"]:
        """The token indices a position names in each prompt, equally many in all.

        Raises:
            InputError: unknown, or different numbers of tokens in different prompts.
        """
        places = self.at(position)
        if len(numbers := {len(p) for p in places}) != 1:
            raise InputError(f"position {position!r} names {min(numbers)} to {max(numbers)} tokens per prompt; one number is needed here")
        return torch.tensor(places, dtype=torch.long, device=self.ids.device)

    def to(self, device: str | torch.device) -> Batch:
        """The batch on a device."""
        return self if self.ids.device == torch.device(device) else Batch(self.ids.to(device), self.mask.to(device), self.positions)

    def select(self, rows: Sequence[int]) -> Batch:
        """Some prompts, padded to their own longest."""
        rows = list(rows)
        if not rows:
            raise InputError(f"no prompts were selected; the batch has {len(self)}")
        ids, mask = self.ids[rows], self.mask[rows]
        width = int(mask.sum(1).max())
        return Batch(ids[:, :width], mask[:, :width], {k: tuple(v[r] for r in rows) for k, v in self.positions.items()})

    def __getitem__(self, which: slice | int) -> Batch:
        """Some prompts, padded to their own longest."""
        return self.select(range(len(self))[which] if isinstance(which, slice) else [range(len(self))[which]])
