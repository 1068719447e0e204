"""LoRA adapters as files: read as factors, never merged (Hu et al. 2021, arXiv:2106.09685).

PEFT stores A [rank, in] and B [out, rank] of a module; on row vectors the module's change is
``x @ (scale * A^T B^T)``, whichever way round the module keeps its own weight. With ``left = A^T`` and
``right = scale * B^T`` it is ``delta = left @ right``, and ``scale`` is alpha / rank, or alpha / sqrt(rank)
for rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.errors import InputError
from interp.models import weights
from interp.models.checkpoint import Shape, file_digest, holds_adapter, read_header
from interp.models.weights import TensorInfo, TensorSource
from interp.sites import Site

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])(?:\.default)?\.weight|embedding_(?P<rows>[AB])(?:\.default)?)")
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(?P<kind>weight|bias)")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"
_NOT_LOW_RANK = {
    "use_dora": "DoRA (it rescales whole columns, so its change is not of low rank)",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "an activated LoRA (it acts after its invocation tokens only)",
    "layer_replication": "one with replicated layers",
    "target_parameters": "one on bare parameters",
    "trainable_token_indices": "one with trained single tokens",
    "lora_bias": "one with biases on B",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "a routed one (Arrow)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder, or an organism, is an adapter (and no whole model)."""
    return holds_adapter(adapter_folder(folder))


def adapter_folder(what: str | Path) -> Path:
    """The folder that is meant: as for models, a folder wins over an organism of its name."""
    folder = Path(what).expanduser()
    if isinstance(what, str) and not folder.is_dir():
        from interp import organisms

        if what in organisms.names():
            return organisms.folder(what)
    return folder


@dataclass(frozen=True, eq=False)
class Adapter:
    """A PEFT adapter on disk.

    Attributes:
        path: the folder.
        config: its adapter_config.json.
        kind: "lora", or another method's name in lower case; only lora is read.
        rank: the rank the config gives; modules may have their own.
        base: name or path of the model it was trained on, as its author wrote it.
        tensors: what the file holds.
    """

    path: Path
    config: Mapping[str, Any]
    kind: str
    rank: int
    base: str
    tensors: Mapping[str, TensorInfo]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over the weights' and the config's own sha256."""
        digests = [file_digest(self.path / name) for name in (_WEIGHTS, _CONFIG)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @cached_property
    def low_rank(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> (left [in, rank], right [rank, out]) in float32, scale folded into right; an embedding's rows are its ``in``."""
        self._refuse()
        raw: dict[str, dict[str, Tensor]] = {}
        for key in self.tensors:
            if match := _FACTOR.fullmatch(key):
                raw.setdefault(_module(match["module"]), {})[match["linear"] or match["rows"]] = self._get(key)
        factors = {}
        for module, pair in raw.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                found = ", ".join(f"{k} {list(t.shape)}" for k, t in sorted(pair.items()))
                raise InputError(f"adapter {self.name}: module {module} has {found}, expected A [rank, in] and B [out, rank]")
            factors[module] = (pair["A"].T.float(), pair["B"].T.float() * self.scale(module, pair["A"].shape[0]))
        return factors

    @cached_property
    def replaced(self) -> dict[str, Tensor]:
        """Tensors trained whole (``modules_to_save``, biases): bare name in the model -> new tensor."""
        self._refuse()
        found = {}
        for key in self.tensors:
            if not _FACTOR.fullmatch(key):
                match = _WHOLE.fullmatch(key)
                if not match or ".lora_" in key:
                    raise InputError(f"adapter {self.name}: tensor {key} is neither a LoRA factor nor a whole weight; {_MERGE}")
                found[weights.bare(f"{_module(match['module'])}.{match['kind']}")] = self._get(key)
        return found

    def scale(self, module: str, rank: int) -> float:
        """Factor on B A of a module: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``; ``alpha_pattern`` is heeded."""
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def factors(self, shape: Shape) -> dict[Site, tuple[Tensor, Tensor]]:
        """Weight site -> (left [rows, rank], right [rank, cols]) with ``delta = left @ right`` on its canonical matrix; fused QKV is split.

        Raises:
            InputError: the adapter is not a plain LoRA, or does not fit a model of these sizes (the first misfit is named).
        """
        if not weights.known(shape):
            raise InputError(f"adapter {self.name}: the weights of {shape.architecture} are not known by site")
        found: dict[Site, tuple[Tensor, Tensor]] = {}
        for module, (left, right) in self.low_rank.items():
            parts = self._split(module, left, right, shape)
            found.update({site: (left, part) for site, part in parts.items()})
        return found

    def check(self, shape: Shape) -> None:
        """Refuse an adapter that does not fit a base model of these sizes.

        Raises:
            InputError: names the first module that does not fit.
        """
        factors = self.factors(shape)
        for name, tensor in self.replaced.items():
            weights.check_shape(name, tuple(tensor.shape), shape)
        if shape.tied:
            touched = {site.component for site in factors} | {s.component for name in self.replaced for s in weights.sites_of(name, shape)}
            whole = [self.replaced.get(weights.key_of(c, shape) or "") for c in ("W_E", "W_U")]
            agree = whole[0] is not None and whole[1] is not None and torch.equal(whole[0], whole[1])
            if touched & {"W_E", "W_U"} and (not agree or {Site("W_E"), Site("W_U")} & factors.keys()):
                raise InputError(f"adapter {self.name} changes the embedding or the unembedding, which the base ties together; {_MERGE}")

    def _split(self, module: str, left: Tensor, right: Tensor, shape: Shape) -> dict[Site, Tensor]:
        """The right factor of each site in a module, after checking the sizes."""
        sites = weights.sites_of(f"{module}.weight", shape)
        if not sites:
            raise InputError(f"adapter {self.name} trains {module}, which a {shape.architecture} of {shape.n_layers} layers does not have")
        rows = weights.weight_shape(sites[0].component, shape)[0]
        cols = sum(weights.weight_shape(s.component, shape)[1] for s in sites)
        if (left.shape[0], right.shape[1]) != (rows, cols):
            came = f"{left.shape[0]} inputs and {right.shape[1]} outputs"
            raise InputError(f"adapter {self.name} does not fit: its {module} has {came}, the base has {rows} and {cols}")
        return weights.split_columns(module, right, shape)

    def _get(self, key: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(str(self.path / _WEIGHTS), framework="pt") as file:
            return file.get_tensor(key)

    def _refuse(self) -> None:
        if self.kind != "lora":
            raise InputError(f"adapter {self.name} is of kind {self.kind}, expected lora; {_MERGE}")
        for setting, what in _NOT_LOW_RANK.items():
            if self.config.get(setting):
                raise InputError(f"adapter {self.name} is {what}, expected a plain LoRA; {_MERGE}")
        start = self.config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise InputError(f"adapter {self.name} started from {start}, which changes the base's weights, expected a plain LoRA; {_MERGE}")
        if any("lora_magnitude_vector" in key for key in self.tensors):
            raise InputError(f"adapter {self.name} is {_NOT_LOW_RANK['use_dora']}, expected a plain LoRA; {_MERGE}")


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's config and tensor headers, of a folder or of an organism.

    Raises:
        InputError: the folder is no adapter, has its weights only as a pickle, or the file is damaged.
    """
    folder = adapter_folder(folder)
    if not (folder / _CONFIG).is_file():
        raise InputError(f"{folder} is no adapter: expected {_CONFIG} and {_WEIGHTS}")
    if not (folder / _WEIGHTS).is_file():
        pickled = "only as a pickle, which is never opened here" if (folder / "adapter_model.bin").is_file() else "nowhere"
        raise InputError(f"adapter {folder} has its weights {pickled}; expected {_WEIGHTS}")
    try:
        config = json.loads((folder / _CONFIG).read_text())
        kind, rank = str(config["peft_type"]).lower(), int(config.get("r") or 0)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / _CONFIG} is no adapter's config ({error!r})") from error
    if config.get("use_dora"):
        kind = "dora"
    return Adapter(folder, config, kind, rank, str(config.get("base_model_name_or_path") or ""), read_header(folder / _WEIGHTS))


class AdaptedTensors:
    """A base with an adapter as a ``TensorSource``: touched tensors come in float32 with the change added, others as they are."""

    def __init__(self, base: TensorSource, adapter: Adapter, shape: Shape) -> None:
        """Check that the adapter fits; nothing is read yet."""
        adapter.check(shape)
        self._base, self._adapter, self._shape = base, adapter, shape
        self._changes: dict[str, dict[Site, tuple[Tensor, Tensor]]] = {}
        for site, factors in adapter.factors(shape).items():
            key = weights.key_of(site.component, shape, site.layer) or ""
            self._changes.setdefault(key, {})[site] = factors

    def names(self) -> list[str]:
        """The base's names."""
        return self._base.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype; float32 where the adapter adds a change."""
        bare = weights.bare(name)
        if bare in self._adapter.replaced:
            whole = self._adapter.replaced[bare]
            return TensorInfo(tuple(whole.shape), torch.float32 if bare in self._changes else whole.dtype)
        info = self._base.info(name)
        return TensorInfo(info.shape, torch.float32) if bare in self._changes else info

    def get(self, name: str) -> Tensor:
        """The tensor as the adapted model uses it."""
        bare = weights.bare(name)
        tensor = self._adapter.replaced.get(bare)
        tensor = self._base.get(name) if tensor is None else tensor
        if bare not in self._changes:
            return tensor
        tensor = tensor.to(torch.float32, copy=True)
        for site, (left, right) in self._changes[bare].items():
            ((_, accessor),) = weights.locate(site, [name], self._shape)
            view = accessor(tensor)
            view += (left @ right).reshape(view.shape)
        return tensor


def _module(path: str) -> str:
    """A module's name in the base model, from its name in PEFT's wrapper."""
    return path.removeprefix("base_model.").removeprefix("model.") if path.startswith("base_model.") else path
