"""Pairs: what cannot be compared is refused, what can be is, with a note where it matters, and weights load late."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FOUR, saved, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import Batch, HookedModel, ModelPair, loading
from interp.sites import Site

ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7]]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 29))]
"""29 words for 31 rows of the embedding: two rows are padding."""


def tokenizer(words=WORDS, bos=False, template=None, extra=()):
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if extra:
        found.add_tokens(list(extra))
    if template:
        found.chat_template = template
    return found


def folder(path: Path, kind="llama", words=None, seed=0, **changes) -> Path:
    saved(tiny(kind, seed=seed, **changes), path)
    if words is not None:
        words.save_pretrained(path)
    return path


def plain_logits(plain, row):
    with torch.no_grad():
        return plain(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def check_equal(model, plain):
    got = model.logits(ROWS)
    for i, row in enumerate(ROWS):
        want = plain_logits(plain, row)
        assert (got[i, : len(row)] - want).abs().max() <= 8 * torch.finfo(want.dtype).eps * want.abs().max()


# ---- loading


@pytest.mark.parametrize("kind", FOUR)
def test_each_side_is_its_own_model(kind, tmp_path):
    a, b = folder(tmp_path / "a", kind, tokenizer()), folder(tmp_path / "b", kind, tokenizer(), seed=1)
    pair = ModelPair.load(a, str(b))
    assert pair.notes == () and pair.shared_vocab == 31 and pair.shape == pair.base.shape and pair.name == "a -> b"
    assert pair.tokens("w4 w9") == [4, 9] and pair.token("w7") == 7 and pair.batch(["w4 w5", "w6"]).rows() == [[4, 5], [6]]
    assert pair.decode([4, 5]) == "w4 w5" and pair.token_strings([4]) == ["w4"] and pair.token_text(5) == "w5"
    assert pair.base.fingerprint != pair.tuned.fingerprint and pair.tokenizer is pair.base.tokenizer
    assert not pair.base.loaded and not pair.tuned.loaded, "configs, tokenizers and headers suffice so far"
    check_equal(pair.base, tiny(kind))
    assert pair.base.loaded and not pair.tuned.loaded
    check_equal(pair.tuned, tiny(kind, seed=1))
    assert [(side, m) for side, m in pair.sides()] == [("base", pair.base), ("tuned", pair.tuned)] and pair.base.loaded


def test_models_given_as_objects():
    a, b = tiny("gpt2"), tiny("gpt2", seed=1)
    pair = ModelPair.load(a, HookedModel.load(b))
    check_equal(pair.base, a)
    check_equal(pair.tuned, b)
    assert pair.notes == () and pair.shared_vocab == 31
    with pytest.raises(InputError, match="was given as an object without a tokenizer"):
        pair.tokens("w4")
    before = pair.tuned.fingerprint
    with torch.no_grad():
        b.transformer.h[1].ln_1.weight[3] += 1e-3
    assert pair.tuned.fingerprint != before, "a checksum at each call"
    check_equal(pair.tuned, b)


def test_a_model_against_itself(tmp_path):
    a = folder(tmp_path / "a", words=tokenizer())
    pair = ModelPair.load(a, a)
    assert torch.equal(pair.base.logits(ROWS), pair.tuned.logits(ROWS)) and pair.base.fingerprint == pair.tuned.fingerprint
    with pair.tuned.edited(Edit((WeightChange(Site("W_O", 1), torch.ones(32, 24)),))):
        assert pair.tuned.active_edits != pair.base.active_edits == ()
        assert (pair.base.logits(ROWS) - pair.tuned.logits(ROWS)).abs().max() > 0.1


def test_one_at_a_time_lets_go_of_the_other_sides_weights(tmp_path):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", seed=1)
    pair = ModelPair.load(a, b, load="one at a time")
    logits, alive = {}, []
    for _ in range(2):
        for side, model in pair.sides():
            logits.setdefault(side, []).append(model.logits(ROWS))
            other = pair.tuned if side == "base" else pair.base
            assert model.loaded and not other.loaded
            if alive:
                gc.collect()
                assert not [ref for ref in alive if ref() is not None], "nothing keeps the released weights"
            alive = [] if alive else [weakref.ref(p) for p in model.wrapped.source.parameters()]
    for side, plain in (("base", tiny("llama")), ("tuned", tiny("llama", seed=1))):
        assert torch.equal(*logits[side])
        check_equal(getattr(pair, side), plain)
    given = ModelPair.load(tiny("llama"), b, load="one at a time")
    for _, model in given.sides():
        model.logits(ROWS)
    assert given.base.loaded, "a model given as an object is the caller's to let go"


def test_settings_that_are_refused(tmp_path, unchecked):
    a = folder(tmp_path / "a")
    for settings, message in (
        ({"load": "both"}, "load='both' is not 'together' or 'one at a time'"),
        ({"device": ("cpu", "cpu", "cpu")}, r"device takes one device or two \(base, tuned\), not 3"),
        ({"device": ("cpu", "cuda:99")}, "device 'cuda:99' is not there"),
        ({"dtype": "float12"}, "dtype 'float12' is not"),
        ({"bos": "perhaps"}, "bos='perhaps' is not"),
    ):
        with pytest.raises(InputError, match=message):
            ModelPair.load(a, a, **settings)
    with pytest.raises(InputError, match="there is no folder .*nowhere"):
        ModelPair.load(a, tmp_path / "nowhere")
    with pytest.raises(InputError, match="is taken as it is, with dtype torch.float32; dtype=torch.bfloat16"):
        ModelPair.load(tiny("llama"), a, dtype="bfloat16")
    pair = ModelPair.load(a, a, device=("cpu", "cpu"), dtype="float64", bos="never")
    assert pair.base.dtype == pair.tuned.dtype == torch.float64 == pair.tuned.logits(ROWS).dtype


def test_an_adapter_has_nothing_to_load_one_at_a_time(tmp_path):
    peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="an adapter shares its base's weights, so there is nothing to load one at a time"):
        ModelPair.load(folder(tmp_path / "a"), tmp_path / "adapter", load="one at a time")


def test_one_line_says_what_loading_needs(tmp_path, capsys, monkeypatch):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", seed=1)
    monkeypatch.setattr(loading, "needed_bytes", lambda checkpoint, dtype: 2**29 * dtype.itemsize)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 3 * 2**30)
    capsys.readouterr()
    ModelPair.load(a, b)
    assert capsys.readouterr().err == (
        "interp: loading a 2.0 GiB, b 2.0 GiB on cpu, 3.0 GiB free: "
        "does not fit at once: use load='one at a time', a smaller dtype, or device_map='auto'\n"
    )
    ModelPair.load(a, b, load="one at a time")
    assert capsys.readouterr().err == "", "each is announced when it loads"
    c = saved(tiny("llama").bfloat16(), tmp_path / "c")
    peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    ModelPair.load(c, tmp_path / "adapter")
    assert "loading c 2.0 GiB on cpu, 3.0 GiB free: fits" in capsys.readouterr().err, "in the fp32 it will be loaded in"
    ModelPair.load(c, c)
    assert "loading c 1.0 GiB, c 1.0 GiB on cpu" in capsys.readouterr().err


# ---- refused


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        (("llama", {}), ("qwen2", {}), "architecture is LlamaForCausalLM in base and Qwen2ForCausalLM in tuned"),
        (("llama", {}), ("llama", {"num_hidden_layers": 2}), "number of layers is 3 in base and 2 in tuned"),
        (("llama", {}), ("llama", {"hidden_size": 32}), "width of the residual stream is 24 in base and 32 in tuned"),
        (("gpt2", {}), ("gpt2", {"n_head": 6}), "number of heads is 4 in base and 6 in tuned"),
        (("llama", {}), ("llama", {"num_key_value_heads": 4}), "number of key/value heads is 2 in base and 4 in tuned"),
        (("llama", {}), ("llama", {"head_dim": 6}), "width of a head is 8 in base and 6 in tuned"),
        (("neox", {}), ("neox", {"intermediate_size": 44}), "width of the MLP is 40 in base and 44 in tuned"),
    ],
)
def test_models_of_other_sizes_cannot_be_compared(base, tuned, message, tmp_path):
    one, two = tiny(base[0], **base[1]), tiny(tuned[0], **tuned[1])
    with pytest.raises(InputError, match=f"cannot be compared: {message}"):
        ModelPair.load(one, two)
    with pytest.raises(InputError, match=f"a and b cannot be compared: {message}") as error:
        ModelPair.load(saved(one, tmp_path / "a"), saved(two, tmp_path / "b"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [0, 5, 28])
def test_a_token_that_means_something_else(tmp_path, place):
    other = [*WORDS]
    other[place] = "other"
    a, b = folder(tmp_path / "a", words=tokenizer()), folder(tmp_path / "b")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(other).backend_tokenizer, unk_token="<unk>").save_pretrained(b)
    with pytest.raises(InputError, match=f"a and b cannot be compared: token {place} is {WORDS[place]!r} in base and 'other' in tuned"):
        ModelPair.load(a, b)


def test_two_tokens_that_changed_places_and_one_behind_a_gap(tmp_path):
    swapped = [*WORDS]
    swapped[10], swapped[20] = swapped[20], swapped[10]
    a, b = folder(tmp_path / "a", words=tokenizer()), folder(tmp_path / "b", words=tokenizer(swapped))
    with pytest.raises(InputError, match="token 10 is 'w10' in base and 'w20' in tuned"):
        ModelPair.load(a, b)

    def gap(word):
        """29 entries, the last of them with the id 30."""
        raw = Tokenizer(models.WordLevel({**{w: i for i, w in enumerate(WORDS[:-1])}, word: 30}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")

    c, d = folder(tmp_path / "c", words=gap("last")), folder(tmp_path / "d", words=gap("other"))
    with pytest.raises(InputError, match="token 30 is 'last' in base and 'other' in tuned"):
        ModelPair.load(c, d)
    assert ModelPair.load(c, c).notes == ()


# ---- works and says so


@pytest.mark.parametrize("kind", FOUR)
def test_extra_tokens_and_rows(kind, tmp_path):
    """The tuned model got three tokens and an embedding padded to 40 rows."""
    a = folder(tmp_path / "a", kind, tokenizer())
    wider = tiny(kind)
    wider.resize_token_embeddings(40)
    with torch.no_grad():
        wider.get_input_embeddings().weight[31:] = 0.3
    b = saved(wider, tmp_path / "b")
    tokenizer(extra=["<tool>", "<think>", "<|im_start|>"]).save_pretrained(b)
    pair = ModelPair.load(a, b)
    assert pair.notes == (
        "the embedding has 31 rows in base and 40 in tuned; logits are compared on the shared ids",
        "the tokenizer has 29 entries in base and 32 in tuned; the first 29 are shared",
    )
    assert pair.shared_vocab == 29, "ids that both tokenizers use: the rows behind them mean nothing on one side"
    base, tuned = pair.base.logits(ROWS), pair.tuned.logits(ROWS)
    assert (base.shape[-1], tuned.shape[-1]) == (31, 40)
    assert (base[..., :29] - tuned[..., :29]).abs().max() <= 1e-5, "the shared rows are the same model"
    with pytest.raises(InputError, match=r"token id 35 is outside the vocabulary of a \(0 to 30\)"):
        pair.batch([[35]])
    with pytest.raises(InputError, match=r"token id 35 is outside the vocabulary of a"):
        ModelPair.load(b, a).batch([[35]])  # also when only the tuned model is too small
    assert ModelPair.load(b, a).shared_vocab == 29
    shutil.rmtree(b), folder(b, kind, tokenizer(), seed=2)
    assert ModelPair.load(a, b).shared_vocab == 31, "equal tokenizers: every row counts"


def test_rows_without_tokenizers():
    wider = tiny("llama")
    wider.resize_token_embeddings(36)
    pair = ModelPair.load(tiny("llama"), wider)
    assert pair.shared_vocab == 31
    assert pair.notes == ("the embedding has 31 rows in base and 36 in tuned; logits are compared on the shared ids",)


def test_a_chat_template_on_one_side(tmp_path):
    plain, chat = folder(tmp_path / "a", words=tokenizer()), folder(tmp_path / "b", words=tokenizer(template="{{ messages }}"))
    note = "only {} has a chat template; both models read the same raw text here"
    assert ModelPair.load(plain, chat).notes == (note.format("tuned"),)
    assert ModelPair.load(chat, plain).notes == (note.format("base"),)
    assert ModelPair.load(chat, chat).notes == () == ModelPair.load(plain, plain).notes


def test_tokenizers_that_mark_texts_differently(tmp_path):
    a, b = folder(tmp_path / "a", words=tokenizer()), folder(tmp_path / "b", words=tokenizer(bos=True))
    pair = ModelPair.load(a, b)
    assert pair.notes == ("the tokenizers split or mark a sample text differently; both models read the token ids of base's",)
    assert pair.batch(["w4 w5"]).rows() == [[4, 5]] and ModelPair.load(b, a).batch(["w4 w5"]).rows() == [[1, 4, 5]]
    assert ModelPair.load(b, a, bos="never").batch(["w4 w5"]).rows() == [[4, 5]]
    assert ModelPair.load(a, b, bos="always").batch(["w4 w5"]).rows() == [[1, 4, 5]]


def test_another_rope_is_each_models_own(tmp_path):
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "max_position_embeddings": 23}
    plain, other = tiny("llama"), tiny("llama", **settings)
    for pair in (ModelPair.load(plain, other), ModelPair.load(saved(plain, tmp_path / "a"), saved(other, tmp_path / "b"))):
        assert len(pair.notes) == 2 and "rotary settings differ: " in pair.notes[0] and "each model uses its own" in pair.notes[0]
        assert "50.0" in pair.notes[0] and "10000.0" in pair.notes[0]
        assert pair.notes[1] == "the longest context is 19 in base and 23 in tuned"
        check_equal(pair.base, plain)
        check_equal(pair.tuned, other)
        assert (pair.base.logits(ROWS) - pair.tuned.logits(ROWS)).abs().max() > 1e-3, "the same weights, other angles"
        with pytest.raises(InputError, match="prompt 0 has 21 tokens; .* takes at most 19"):
            pair.batch([[1] * 21])


@pytest.mark.parametrize("kind", FOUR)
def test_a_bf16_base_and_an_fp32_tuned_model(kind, tmp_path):
    a, b = saved(tiny(kind).bfloat16(), tmp_path / "a"), saved(tiny(kind, seed=1), tmp_path / "b")
    pair = ModelPair.load(a, b)
    assert pair.notes == ("base is bfloat16 and tuned float32; differences below rounding of the coarser are noise",)
    assert (pair.base.dtype, pair.tuned.dtype) == (torch.bfloat16, torch.float32)
    check_equal(pair.base, transformers.AutoModelForCausalLM.from_pretrained(a, dtype=torch.bfloat16))
    check_equal(pair.tuned, tiny(kind, seed=1))
    both = ModelPair.load(a, b, dtype="float32")
    assert both.notes == () and both.base.dtype == torch.float32
    check_equal(both.base, transformers.AutoModelForCausalLM.from_pretrained(a, dtype=torch.float32))


def test_an_unembedding_that_was_untied(tmp_path):
    pair = ModelPair.load(tiny("qwen2"), tiny("qwen2", tie_word_embeddings=False))
    assert pair.notes == ("the unembedding is tied to the embedding in base only",)
    a = saved(tiny("qwen2"), tmp_path / "a")
    b = Path(shutil.copytree(a, tmp_path / "b"))
    tensors = load_file(b / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.01
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    pair = ModelPair.load(a, b)
    assert pair.notes == ("the unembedding is tied to the embedding in base only",), "whatever the config says"
    assert (pair.tuned.weight("W_U") - pair.base.weight("W_U")).mean().item() == pytest.approx(0.01, rel=1e-4)


def test_batches_go_to_both():
    pair = ModelPair.load(tiny("neox"), tiny("neox", seed=1))
    batch = pair.batch(Batch.of(ROWS, {"mid": ((2,), (1,), (3,))}))
    assert pair.batch(batch) is batch
    one, two = (model.capture(batch, "L1H2.z@mid")[Site("z", 1, 2, "mid")] for _, model in pair.sides())
    assert one.shape == two.shape == (3, 6) and (one - two).abs().max() > 0.01
