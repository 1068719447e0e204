"""Checkpoints as files: found, checked and read tensor by tensor, without building a model.

Only safetensors are read: a pickle can run code when it is opened.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.models import weights
from interp.models.weights import TensorInfo

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CONVERT = "convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
CONFIG_NOTES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer, read from its config.

    Attributes:
        architecture: Hugging Face class name, e.g. ``LlamaForCausalLM``.
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_heads: query heads per layer.
        n_kv_heads: key/value heads per layer; fewer than ``n_heads`` under grouped-query attention.
        d_head: width of a head; ``n_heads * d_head`` need not be ``d_model``.
        d_mlp: hidden width of the MLP.
        d_vocab: rows of the embedding.
        n_ctx: longest context.
        tied: the unembedding is the embedding transposed.
        gated: the MLP multiplies two projections of its input.
        parallel: attention and MLP read the same residual stream.
    """

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    tied: bool
    gated: bool
    parallel: bool


def _number(config: PretrainedConfig, *fields: str, default: int | None = None) -> int:
    for name in fields:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    if default is None:
        raise InputError(f"the config of type {config.model_type!r} has no {fields[0]}; is it a decoder-only language model?")
    return default


def _architecture(config: PretrainedConfig) -> str:
    """The causal language model class of a config; ``GPT2Model`` is read as ``GPT2LMHeadModel``."""
    given = (getattr(config, "architectures", None) or [""])[0]
    if given.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return given
    if given and not given.endswith("Model"):
        raise InputError(f"the checkpoint is a {given}, expected a causal language model such as LlamaForCausalLM")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not isinstance(name, str):
        raise InputError(f"the config's model type {config.model_type!r} is no causal language model")
    return name


def read_shape(config: PretrainedConfig) -> Shape:
    """Sizes from a Hugging Face config, with what it leaves out derived as its architecture does.

    Raises:
        InputError: the config is of no causal language model, lacks a size, or its sizes contradict each other.
    """
    architecture = _architecture(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    config = config.get_text_config()
    family = weights.FAMILIES.get(architecture)
    d_model = _number(config, "hidden_size")
    n_heads = _number(config, "num_attention_heads")
    n_kv_heads = _number(config, "num_key_value_heads", "num_kv_heads", default=n_heads)
    if architecture == "FalconForCausalLM" and not config.new_decoder_architecture:
        n_kv_heads = 1 if config.multi_query else n_heads
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise InputError(f"the config has {n_heads} heads, which {n_kv_heads} key/value heads do not divide")
    parallel = family.parallel if family else bool(getattr(config, "parallel_attn", False))
    return Shape(
        architecture=architecture,
        n_layers=_number(config, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=_number(config, "head_dim", default=d_model // n_heads),
        d_mlp=_number(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * d_model),
        d_vocab=_number(config, "vocab_size"),
        n_ctx=_number(config, "max_position_embeddings", "seq_length", default=2048),
        tied=tied,
        gated=family.gated if family else False,
        parallel=bool(getattr(config, parallel, False)) if isinstance(parallel, str) else parallel,
    )


def shape_of(model: nn.Module) -> Shape:
    """Sizes of a model in memory, tied only if its unembedding is the embedding, whatever its config says.

    Raises:
        InputError: as ``read_shape``.
    """
    plain: Any = model
    shape, (head, embedding) = read_shape(plain.config), (plain.get_output_embeddings(), plain.get_input_embeddings())
    same = getattr(head, "weight", None) is getattr(embedding, "weight", None)
    return shape if head is None or same == shape.tied else replace(shape, tied=same)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes in a safetensors file.

    Raises:
        InputError: the file is cut short, is a Git LFS pointer, or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise InputError(f"{file} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(length) if 8 + length <= size else b""
    if len(start) < 8 or len(header) < length:
        raise InputError(f"{file} is cut short or no safetensors file: {size} bytes, expected a header of {length} bytes")
    try:
        entries = json.loads(header)
        end = 8 + length + max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
        infos = {name: TensorInfo(tuple(e["shape"]), DTYPES[e["dtype"]], file) for name, e in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no safetensors file: its header cannot be read ({error!r})") from error
    if size < end:
        raise InputError(f"{file} is cut short: {size} bytes, expected {end} (was a download interrupted?)")
    return infos


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as transformers chooses: model.safetensors, else the shards of its index, else its only file."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index} cannot be read as an index of shards ({error})") from error
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise InputError(f"{folder} lacks {len(missing)} of the {len(names)} shards its index names; the first is {missing[0]}")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise InputError(f"{folder} has {len(files)} safetensors files but no model.safetensors.index.json to say which belong together")
    if pickles := [p.name for pattern in _PICKLES for p in sorted(folder.glob(pattern))]:
        raise InputError(f"{folder} has its weights only as a pickle ({pickles[0]}), which is never opened here; {_CONVERT}")
    raise InputError(f"{folder} has no weights: expected model.safetensors")


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interp" / "fingerprints"


def file_digest(file: Path) -> str:
    """Sha256 of a file, remembered by path, size and modification time in the user's cache folder."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    memory = _cache_dir() / key
    if memory.is_file() and len(text := memory.read_text().strip()) == 64:
        return text
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a read-only home only means that the file is read again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        draft = memory.with_suffix(f".{os.getpid()}")
        draft.write_text(digest)
        draft.replace(memory)
    return digest


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder with a config and safetensors; reads one tensor at a time. Implements ``TensorSource``.

    Attributes:
        path: the folder.
        name: what a person calls it: the Hub id with its revision, the organism, or the folder's name.
        config: the Hugging Face config.
        shape: the sizes in it.
        tensors: what the files hold, by stored name.
    """

    path: Path
    name: str
    config: PretrainedConfig
    shape: Shape
    tensors: Mapping[str, TensorInfo]

    def names(self) -> list[str]:
        """Stored names of the tensors."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor, asked for with or without a prefix such as ``model.``."""
        return self.tensors[self._stored(name)]

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from its file; the unembedding of a tied model is its embedding.

        Raises:
            InputError: there is no such tensor.
        """
        from safetensors import safe_open

        stored = self._stored(name)
        with safe_open(str(self.tensors[stored].file), framework="pt") as file:
            return file.get_tensor(stored)

    def _stored(self, name: str) -> str:
        place = weights.key_of("W_U", self.shape)
        if self.shape.tied and place and weights.bare(name) == place and all(weights.bare(t) != place for t in self.tensors):
            name = weights.key_of("W_E", self.shape) or name
        return weights.stored_name(name, self.tensors, f"checkpoint {self.name}")

    @property
    def n_parameters(self) -> int:
        """Number of stored weights; a tied unembedding counts once."""
        return sum(torch.Size(t.shape).numel() for t in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the stored weights."""
        return sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most weights are stored in."""
        counts: dict[torch.dtype, int] = {}
        for t in self.tensors.values():
            counts[t.dtype] = counts.get(t.dtype, 0) + torch.Size(t.shape).numel()
        return max(counts, key=lambda d: counts[d])

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over the weight files' own sha256 (remembered) and the settings of the config, which change what they compute."""
        settings = {k: v for k, v in self.config.to_dict().items() if k not in CONFIG_NOTES}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for file in sorted({t.file for t in self.tensors.values() if t.file}):
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
        return digest.hexdigest()

    def check(self, *, finite: bool = False) -> None:
        """Refuse a checkpoint whose tensors do not make the model its config describes.

        ``resolve`` has done this; ``finite=True`` also reads every tensor and looks for NaN and infinity.

        Raises:
            InputError: names the first tensor that is missing, of the wrong size, or not finite.
        """
        if weights.known(self.shape):
            components = (("W_E", None), *((m, i) for i in range(self.shape.n_layers) for m in weights.modules(self.shape)))
            stored = {weights.bare(t): t for t in self.tensors}
            for component, layer in components:
                if (key := weights.key_of(component, self.shape, layer)) not in stored:
                    last = f"layers 0 to {self.shape.n_layers - 1}"
                    raise InputError(f"checkpoint {self.name} lacks {key}, which its config ({self.shape.architecture}, {last}) needs")
            for name, info in self.tensors.items():
                weights.check_shape(name, info.shape, self.shape)
            rows = self.tensors[stored[weights.key_of("W_E", self.shape) or ""]].shape[0]
            if rows != self.shape.d_vocab:
                raise InputError(f"checkpoint {self.name} embeds {rows} tokens, but its config says vocab_size {self.shape.d_vocab}")
        if finite:
            weights.check_finite(self, f"checkpoint {self.name}")


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model; some trainers save the base's config beside the adapter."""
    return (folder / "adapter_config.json").is_file() and not list(folder.glob("model*.safetensors*"))


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The Hugging Face config of a folder; code that a checkpoint brings along runs only when it is trusted.

    Raises:
        InputError: there is no config, or transformers does not know its architecture.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; expected a checkpoint folder as save_pretrained writes it")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be used: {_first_line(error)}") from error


def open_checkpoint(folder: Path, name: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Read the config and the tensor headers of a folder.

    Raises:
        InputError: the folder holds an adapter, no config, no safetensors, damaged files, or tensors that do not fit its config.
    """
    if holds_adapter(folder):
        raise InputError(f"{name or folder} is an adapter, not a model; give its base as the model and this folder as its adapter")
    if (folder / "adapter_config.json").is_file():  # transformers would put it on the model without being asked
        raise InputError(f"{folder} holds a whole model and an adapter; keep them in two folders and give the second as the adapter")
    config = read_config(folder, trust_remote_code)
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        tensors.update(read_header(file))
    if not tensors:
        raise InputError(f"{folder} holds no tensors")
    checkpoint = Checkpoint(folder, name or folder.resolve().name, config, read_shape(config), tensors)
    checkpoint.check()
    if checkpoint.shape.tied and _own_head(checkpoint):
        return replace(checkpoint, shape=replace(checkpoint.shape, tied=False))
    return checkpoint


def _own_head(checkpoint: Checkpoint) -> bool:
    """Whether the files hold an unembedding unlike the embedding; transformers then keeps it, whatever the config says of tying."""
    stored = {weights.bare(name): name for name in checkpoint.tensors}
    names = [stored.get(weights.key_of(c, checkpoint.shape) or "") for c in ("W_E", "W_U")]
    return None not in names and not torch.equal(*(checkpoint.get(name or "") for name in names))


def resolve(what: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
    """Find a checkpoint: a folder, the name of an organism, or a Hub id such as ``org/model@revision``.

    A folder wins over an organism of the same name, with a warning. A Hub id is looked up in the local cache first.

    Raises:
        InputError: there is nothing of that name (near names are listed), or what is there cannot be used.
    """
    text = str(what)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{text} is a folder, which has no revision {revision!r}; revisions belong to Hub ids")
        if isinstance(what, str) and text in _organisms():
            warnings.warn(f"{text!r} is a folder here and an organism; the folder is used", stacklevel=2)
        return open_checkpoint(folder, trust_remote_code=trust_remote_code)
    if folder.is_file():
        raise InputError(f"{text} is a file, expected the folder of a checkpoint")
    if text in _organisms():
        from interp.organisms import folder as organism

        if revision is not None:
            raise InputError(f"{text} is an organism, which has no revision {revision!r}")
        return open_checkpoint(organism(text), text, trust_remote_code=trust_remote_code)
    name, _, pinned = text.partition("@")
    if pinned and revision and pinned != revision:
        raise InputError(f"{text} names the revision {pinned}, but revision={revision!r} was given too")
    revision = revision or pinned or None
    if isinstance(what, Path) or text.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name:
        raise InputError(f"there is no folder {text}{_near(folder.name, _siblings(folder))}")
    found = _from_hub(name, revision)
    return open_checkpoint(found, name + (f"@{revision}" if revision else ""), trust_remote_code=trust_remote_code)


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a Hub checkpoint: from the local cache when it is whole there, else downloaded unless offline."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if offline or _whole(cached):
            return cached
    except HFValidationError:
        raise InputError(f"{name!r} is no folder, no organism and no Hub id{_near_names(name)}") from None
    except (LocalEntryNotFoundError, OSError):
        if offline:
            sought = name + (f" at revision {revision}" if revision else "")
            why = f"the Hub cache does not hold {sought}, and HF_HUB_OFFLINE is set"
            raise InputError(f"{name!r} is no folder and no organism; {why}{_near_names(name)}") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = f"the Hub did not give it ({_first_line(error)})"
        raise InputError(f"{name!r} is no folder and no organism; {why}{_near_names(name)}") from error


def _whole(folder: Path) -> bool:
    try:
        return bool(_weight_files(folder))
    except InputError:
        return False


def _near_names(name: str) -> str:
    return _near(name, [*_organisms(), *_siblings(Path(name))])


def _organisms() -> list[str]:
    from interp.organisms import names

    return list(names())


def _siblings(path: Path) -> list[str]:
    parent = path.parent
    return [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    return f"; near: {', '.join(near)}" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, as the checkpoint's own files describe it.

    Raises:
        InputError: the folder has none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    if not has_tokenizer(folder):
        raise InputError(f"{folder} has no tokenizer; expected tokenizer.json, tokenizer.model or vocab.json with merges.txt")
    try:
        if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
            named = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
            if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
                # AutoTokenizer overrules this for some model types and builds its own tokenizer around the vocabulary.
                return PreTrainedTokenizerFast.from_pretrained(str(folder))
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error


def has_tokenizer(path: Path | str) -> bool:
    """Whether a folder brings a tokenizer of its own."""
    return any((Path(path) / name).is_file() for name in _TOKENIZER_FILES)
