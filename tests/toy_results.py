"""Small invented analyses, models and prompts for the tests of results, stores and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.results import Result, analysis

NASTY = (
    "<b>bold</b>", "&lt;", "\n", " the", " the", "the", "🙂", "<script>window.ran = 1</script>", "$x^2$", "<br>", "%{z}",
    "2024", "1e3", "", "\u202e", "a" * 60, "\t", "&amp;", '"><img src=x onerror="window.ran = 2">',
    "</script><script>window.ran = 3</script>",
)  # fmt: skip


@dataclass
class ToyCheckpoint:
    path: Path = Path("models/toy")
    name: str = "toy"


@dataclass
class ToyModel:
    name: str = "toy"
    fingerprint: str = "f0"
    dtype: torch.dtype = torch.float32
    active_edits: tuple[str, ...] = ()
    device: str = "cpu"
    checkpoint: ToyCheckpoint | None = field(default_factory=ToyCheckpoint)
    adapter: Path | None = None


@dataclass
class ToyPair:
    base: ToyModel = field(default_factory=lambda: ToyModel("toy-base", "f1", checkpoint=ToyCheckpoint(Path("models/base"), "base")))
    tuned: ToyModel = field(default_factory=lambda: ToyModel("toy-tuned", "f2", checkpoint=ToyCheckpoint(Path("models/tuned"), "tuned")))
    notes: tuple[str, ...] = ("the tuned model has 2 more tokens",)

    def sides(self) -> tuple[tuple[str, ToyModel], ...]:
        return ("base", self.base), ("tuned", self.tuned)


@dataclass
class ToyPrompts:
    digest: str = "d1"
    task: str = ""
    seed: int | None = None
    n: int = 3

    def __len__(self) -> int:
        return self.n


@dataclass(frozen=True, eq=False)
class EchoResult(Result):
    """Of every kind of field one."""

    value: Float[Tensor, "prompt layer head"]
    floor: Float[Tensor, " layer"]
    bias: Float[Tensor, ""]
    right: Bool[Tensor, " prompt"]
    answer: Int[Tensor, " prompt"] | None
    wide: Float[Tensor, "prompt layer head d_model"]
    ragged: dict[str, Tensor]
    words: tuple[str, ...]
    pairs: tuple[tuple[int, str], ...]
    listed: list[int]
    counts: dict[int, float]
    mode: Literal["a", "b"]
    scale: float
    remark: str | None
    flag: bool
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def summary(self) -> str:
        return f"mean {float(self.value.nanmean()):.3g} over {self.value.shape[0]} prompts"

    def plot(self) -> Any:
        return plots.heatmap(self.value.nanmean(0), xlabel="head", ylabel="layer")


def echo_fields(seed: int = 0, **changes: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    value = torch.randn(4, 3, 2, generator=draw)
    value[0, 1, 1] = torch.nan
    fields = dict(
        value=value,
        floor=torch.tensor([0.1, 0.2, 0.3]),
        bias=torch.tensor(5.0, dtype=torch.float64),
        right=torch.tensor([True, False, True, True]),
        answer=torch.tensor([3, 1, 4, 1]),
        wide=torch.zeros(4, 3, 2, 5),
        ragged={"a/b": torch.ones(2), "a": torch.zeros(0), "ü": value.transpose(0, 1)},
        words=("x", "y\n<b>"),
        pairs=((1, "one"), (2, "two")),
        listed=[1, 2],
        counts={-3: 0.5, 7: 1.0},
        mode="b",
        scale=1.0,
        remark=None,
        flag=True,
        labels={"layer": ("low", "mid", "top")},
    )
    return fields | changes


@analysis(version=2)
def echo(model: ToyModel, prompts: ToyPrompts, *, scale: float = 1.0, names: tuple[str, ...] = ("a",), metric: Any = "kl", deep: bool = False, seed: int = 0) -> EchoResult:  # fmt: skip  # noqa: E501
    return EchoResult(**echo_fields(seed))


@dataclass(frozen=True, eq=False)
class CellsResult(Result):
    """Figures of every kind, full of text that looks like markup."""

    cells: Float[Tensor, "row token"]
    note: str
    labels: dict[str, tuple[str, ...]]

    def summary(self) -> str:
        return f"0.5 nats ± 0.1 in <b>{self.note}</b> & more"

    def strongest(self, n: int = 10) -> Any:
        import pandas as pd

        return pd.DataFrame({"site": [NASTY[0]], "effect": [0.25]})

    def figures(self) -> dict[str, Any]:
        tokens, rows = self.labels["token"], self.labels["row"]
        curve = self.cells[0]
        return {
            "Cells <i>by token</i>": plots.heatmap(
                self.cells,
                tokens,
                rows,
                tokens="x",
                title=f"Title with {self.note}",
                xlabel="token",
                ylabel="row",
                unit="nats <b>",
                floor=0.2,
            ),
            "Lines": plots.lines(
                {"base": curve, "tuned": curve + 1, "<b>other</b>": curve * 2},
                bands={"base": (curve - 0.5, curve + 0.5), "tuned": (curve + 0.7, curve + 1.3)},
                title="The course of a value with its interval over the tokens of a text that is <b>long</b> enough to need two lines",
                xlabel="token",
                ylabel="KL(tuned || base), nats",
                tokens=tokens,
                floor=0.3,
            ),
            "Bars": plots.bars(
                rows,
                {"base": self.cells[:, 0], "tuned": self.cells[:, 1]},
                intervals={
                    "base": (self.cells[:, 0] - 0.3, self.cells[:, 0] + 0.3),
                    "tuned": (self.cells[:, 1] - 0.3, self.cells[:, 1] + 0.3),
                },
                title="Bars",
                ylabel="share",
                reference=0.5,
                reference_label="chance <b>",
            ),
            "Points": plots.scatter(
                self.cells[0],
                self.cells[1],
                labels=tokens,
                groups=["base" if i % 2 else "tuned" for i in range(len(tokens))],
                xlabel="base, nats",
                ylabel="tuned, nats",
                diagonal=True,
                title="Points",
            ),
        }

    def html(self) -> str:
        return plots.coloured_tokens(self.labels["token"], self.cells[0], unit="nats <b>", title=self.note, floor=0.2)


@analysis(version=1)
def cells(pair: ToyPair, prompts: ToyPrompts, *, words: tuple[str, ...] = NASTY, seed: int = 0) -> CellsResult:
    draw = torch.Generator().manual_seed(seed)
    rows = ("layer 0", "<b>layer 1</b>", "layer 0", "MLP & more")
    labels = {"row": rows, "token": tuple(words)}
    return CellsResult(torch.randn(len(rows), len(words), generator=draw), "<script>window.ran = 4</script>", labels)
