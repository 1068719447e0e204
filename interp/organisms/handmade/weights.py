"""A blueprint as a Llama: embedding, heads, neurons and norms, and the tokenizer of its words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.organisms.handmade.blueprint import (
    BEGIN,
    CONTENT_PLANES,
    CONTEXT,
    END_OF_TEXT,
    HIT,
    LOGIT,
    OFFSET_PLANES,
    REST,
    TARGET,
    TURN,
    UNKNOWN,
    Blueprint,
    Head,
    Match,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from interp.models import HookedModel

CONSTANT = 1024.0
"""Length C of the constant channel. The stream has a squared length s^2 of about a dozen besides, so the norm divides by
C / sqrt(d) up to a factor 1 + s^2 / 2 C^2 < 1 + 1e-5. A power of two: squared lengths of embeddings are exact integers
in fp32, so that two words of one kind give the same scale to the bit."""

SPECIAL = (BEGIN, END_OF_TEXT, UNKNOWN)


def written(blueprint: Blueprint, name: str) -> HookedModel:
    """The model of a blueprint, with its tokenizer."""
    from interp.models import HookedModel

    model = llama(blueprint)
    model.config._name_or_path = name
    return HookedModel.load(model, tokenizer=tokenizer(blueprint))


def tokenizer(blueprint: Blueprint) -> PreTrainedTokenizerFast:
    """One token per word of the blueprint, with its leading space; ``BEGIN`` is put before every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *blueprint.words))}, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\s"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    raw.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BEGIN,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def llama(blueprint: Blueprint) -> LlamaForCausalLM:
    """The weights of a blueprint. No number is drawn at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    n_layers, n_heads, n_kv_heads, d_head = blueprint.sizes
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(blueprint.words),
        hidden_size=blueprint.d_model,
        intermediate_size=blueprint.d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=d_head,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": float(TURN ** (d_head // 2))},
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index(BEGIN),
        eos_token_id=SPECIAL.index(END_OF_TEXT),
        pad_token_id=SPECIAL.index(END_OF_TEXT),
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM(config)
    model.requires_grad_(False).eval()
    for p in model.parameters():
        p.zero_()
    places = blueprint.places
    _write_words(blueprint, model, places)
    for (layer, head), what in blueprint.heads.items():
        _write_head(model.model.layers[layer].self_attn, head, what, places)
    for layer, neurons in blueprint.neurons.items():
        mlp = model.model.layers[layer].mlp
        for i, neuron in enumerate(neurons):
            mlp.gate_proj.weight[i] = _vector(neuron.gate, places, blueprint.d_model)
            mlp.up_proj.weight[i, places["const"].start] = 1.0
            mlp.down_proj.weight[:, i] = _vector(neuron.out, places, blueprint.d_model)
    return model


def _write_words(blueprint: Blueprint, model: Any, places: Mapping[str, range]) -> None:
    """Embedding, unembedding and norms."""
    words, d_model = list(blueprint.words), blueprint.d_model
    embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, places["const"].start] = CONSTANT
    embedding[:, places["word"].start] = 1.0
    embedding[SPECIAL.index(BEGIN), places["word"].start] = 0.0
    embedding[SPECIAL.index(BEGIN), places["start"].start] = 1.0
    for i, code in enumerate(blueprint.words.values(), len(SPECIAL)):
        for space, coordinate in code.items():
            embedding[i, places[space][coordinate]] = 1.0
    for space, answers in blueprint.answers.items():
        for at, word in zip(places[space], answers, strict=True):
            unembedding[len(SPECIAL) + words.index(word), at] = LOGIT
    # The gain undoes the division by C / sqrt(d), so that a norm's output is the stream itself, its constant channel 1.
    gain = torch.full((d_model,), CONSTANT / math.sqrt(d_model))
    gain[places["const"].start] /= CONSTANT
    for block in model.model.layers:
        block.input_layernorm.weight.copy_(gain)
        block.post_attention_layernorm.weight.copy_(gain)
    model.model.norm.weight.copy_(gain)


def _write_head(attention: Any, head: int, what: Head, places: Mapping[str, range]) -> None:
    """One head: queries carry every strength, keys and values only read, so that heads of a group can share them."""
    d_head, d_model = attention.head_dim, attention.q_proj.weight.shape[1]
    wide, n_planes = math.sqrt(d_head), d_head // 2
    query, key, value = (torch.zeros(d_head, d_model) for _ in range(3))
    # From the slowest plane on: what is written first is turned least, and shares its plane last.
    content = iter([p + half for half in (0, n_planes) for p in reversed(range(CONTENT_PLANES, n_planes))])

    def match(reads: str, finds: str, score: float) -> None:
        for q, k in zip(places[reads], places[finds], strict=True):
            dim = next(content)
            query[dim, q] = score * wide  # attention divides by sqrt(d_head)
            key[dim, k] = 1.0

    match("const", "start", REST)
    for part in what.attend:
        if isinstance(part, Match):
            match(part.query, part.key, part.score)
            continue
        for plane in range(OFFSET_PLANES):
            turn, strength = part.back / TURN**plane, part.amplitude * wide
            query[plane, places["const"].start] = strength * math.cos(turn)
            query[plane + n_planes, places["const"].start] = -strength * math.sin(turn)
            key[plane, places["word"].start] = 1.0
        match("const", "word", TARGET - OFFSET_PLANES * part.amplitude)
    columns = attention.o_proj.weight[:, head * d_head : (head + 1) * d_head]
    dims = iter(range(d_head))
    for move in what.move:
        for source, target in zip(places[move.source], places[move.target], strict=True):
            dim = next(dims)
            value[dim, source] = 1.0
            columns[target, dim] = move.amount / HIT
    attention.q_proj.weight[head * d_head : (head + 1) * d_head] = query
    shared = head // attention.num_key_value_groups
    rows = slice(shared * d_head, (shared + 1) * d_head)
    for matrix, wanted in ((attention.k_proj.weight, key), (attention.v_proj.weight, value)):
        if matrix[rows].any() and not torch.equal(matrix[rows], wanted):
            raise ValueError(f"head {head} has other keys or values than the heads it shares them with")
        matrix[rows] = wanted


def _vector(coefficients: Mapping[str, tuple[float, ...]], places: Mapping[str, range], size: int) -> Tensor:
    """Coefficients by space as a vector of the residual stream."""
    vector = torch.zeros(size)
    for space, numbers in coefficients.items():
        vector[list(places[space])] = torch.tensor(numbers)
    return vector
