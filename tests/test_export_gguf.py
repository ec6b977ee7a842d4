"""The GGUF file, read back with llama.cpp's own reader."""
import functools
import json
import sys
import warnings

import numpy as np
import pytest
from conftest import reference
from tiny import snapshot

gguf = reference("gguf")

from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from autograd import Tensor, rope  # noqa: E402
from extras import export_gguf  # noqa: E402
from hardware.device import to_host  # noqa: E402
from nanollm import Config, NanoLLM  # noqa: E402
from storage.files import InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_cpu")      # where the command does its work

TEXT = ["the cat sat on the mat, and the dog lay on the log", "a cat and a dog"] * 5


def byte_level():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], show_progress=False,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return t


def llama():
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return t


def by_word():
    """Llama's, except that no token goes beyond a word."""
    t = llama()
    t.normalizer, t.pre_tokenizer = None, pre_tokenizers.Metaspace()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=[
        "<unk>"] + [f"<0x{i:02X}>" for i in range(256)]))
    return t


def wordpiece():
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[PAD]", "[UNK]"],
                                                          show_progress=False))
    return t


saved = functools.cache(lambda make: make().to_str())


def folder_of(tmp_path, tokenizer, **settings):
    fields = {"embedding_dim": 16, "n_block": 2, "n_head": 4, "n_kv_head": 2, "max_context": 8, "hidden_dim": 24,
              "eps": 1e-5, "rope_theta": 500.0}
    model = NanoLLM(Config(tokenizer.get_vocab_size(), **fields | settings), seed=3)
    weights = model.weights.flat
    weights[:] += 0.1 * np.random.default_rng(0).standard_normal(len(weights)).astype(np.float32)
    model.save(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    return model, tmp_path / "model"


def field(reader, name):
    return reader.get_field(name).contents()


SCALED = {"rope_scaling": (8.0, 0.3, 1.0, 32)}          # of the two pairs one stays, one is slowed


@pytest.mark.parametrize("fields, kind", [
    ({}, "llama"), ({"tie_embeddings": True}, "llama"), ({"head_dim": 8, "embedding_dim": 18}, "llama"),
    (SCALED, "llama"), ({"qkv_bias": True}, "qwen2"), ({"qk_norm": True, "head_dim": 8}, "qwen3")])
def test_every_tensor_and_setting_reads_back(tmp_path, fields, kind):
    model, folder = folder_of(tmp_path, byte_level(), **fields)
    C, D = model.config.embedding_dim, model.config.head_dim
    assert export_gguf.main([str(folder), str(tmp_path / "m.gguf")]) == 0
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    got = {t.name: np.array(t.data) for t in reader.tensors}
    if fields == SCALED:
        np.testing.assert_allclose(got.pop("rope_freqs.weight"), [1, 8], rtol=1e-6)
    assert len(got) == len(model.parameters())

    hf_names = {v: k for k, v in export_gguf.NAMES.items()} | {v: k for k, v in export_gguf.OUTSIDE.items()}
    for name, value in got.items():
        *block, part, suffix = name.split(".")
        ours = (f"model.layers.{block[1]}." if block else "") + hf_names[part] + "." + suffix
        expected = to_host(model.parameters()[ours].data)
        if kind == "llama" and part in ("attn_q", "attn_k"):    # llama.cpp's row 2i + j of a head is our row i + j D/2
            heads = 4 if part == "attn_q" else 2
            order = [D * h + i + D // 2 * j for h in range(heads) for i in range(D // 2) for j in range(2)]
            expected = expected[order]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert field(reader, "general.architecture") == kind
    for name, value in {"block_count": 2, "context_length": 8, "embedding_length": C, "feed_forward_length": 24,
                        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": D,
                        "attention.value_length": D, "rope.dimension_count": D,
                        "vocab_size": model.config.vocab_size}.items():
        assert field(reader, f"{kind}.{name}") == value, name
    assert field(reader, f"{kind}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert field(reader, f"{kind}.rope.freq_base") == pytest.approx(500)


def test_turning_neighbours_of_interleaved_rows_is_turning_halves_of_the_original_ones(rng):
    H, D, C, T = 3, 8, 5, 4
    w, h = rng.standard_normal((H * D, C)), rng.standard_normal((T, C))
    angles = np.outer(np.arange(T), 100.0 ** (-np.arange(0, D, 2) / D))
    twice = np.tile(angles, 2)
    ours = rope(Tensor((h @ w.T).reshape(T, H, D).swapaxes(0, 1)), np.cos(twice), np.sin(twice))

    theirs = (h @ export_gguf.interleave(w, H).T).reshape(T, H, D // 2, 2).swapaxes(0, 1)
    turned = (theirs[..., 0] + 1j * theirs[..., 1]) * np.exp(1j * angles)       # pairs (2i, 2i + 1), as llama.cpp
    np.testing.assert_allclose(np.concatenate([turned.real, turned.imag], -1), to_host(ours.data), atol=1e-12)


@pytest.mark.parametrize("make, kind", [(byte_level, "gpt2"), (llama, "llama"), (wordpiece, "bert")])
def test_the_tokenizer_goes_along(tmp_path, make, kind):
    tokenizer = make()
    _, folder = folder_of(tmp_path, tokenizer)
    export_gguf.export(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    words, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert field(reader, "tokenizer.ggml.model") == kind and len(words) == len(types) == tokenizer.get_vocab_size()
    for word, i in tokenizer.get_vocab().items():
        if kind == "bert" and types[i] == gguf.TokenType.NORMAL:
            word = word[2:] if word.startswith("##") else "▁" + word
        assert words[i] == word
    if kind == "gpt2":
        assert types[tokenizer.token_to_id("<|end|>")] == gguf.TokenType.CONTROL
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    if kind == "llama":                             # the earlier a merge, the higher its score
        scores, vocab = field(reader, "tokenizer.ggml.scores"), tokenizer.get_vocab()
        assert types[vocab["<0x41>"]] == gguf.TokenType.BYTE
        assert types[vocab["<unk>"]] == gguf.TokenType.UNKNOWN
        merged = [w for w in vocab if len(w) > 1 and types[vocab[w]] == gguf.TokenType.NORMAL]
        by_id = sorted(merged, key=vocab.get)
        assert [scores[vocab[w]] for w in by_id] == [-float(i) for i in range(len(by_id))]


def refused(call, place, words):
    """call() raises InputError, and everything in the folder `place` is as before."""
    before = snapshot(place)
    with pytest.raises(InputError, match=words):
        call()
    assert snapshot(place) == before


def test_the_ids_that_begin_and_end_a_text_go_along(tmp_path):
    tokenizer = byte_level()
    model, folder = folder_of(tmp_path, tokenizer)

    def exported(name):
        export_gguf.export(folder, tmp_path / name)
        reader = gguf.GGUFReader(tmp_path / name)
        fields = (reader.get_field(f"tokenizer.ggml.{key}") for key in (
            "bos_token_id", "add_bos_token", "eos_token_id", "eot_token_id", "eom_token_id"))
        return [each and each.contents() for each in fields]
    no_eos = tokenizer.token_to_id("ÿ")         # the byte 255; without an EOS llama.cpp would take token 11
    assert exported("neither") == [None, False, no_eos, None, None]
    model.save(folder, bos_token_id=0, eos_token_id=[5, 6])
    assert exported("not inserted") == [0, False, 5, 6, None]
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    model.save(folder, eos_token_id=[5, 6, 7])
    assert exported("inserted") == [0, True, 5, 6, 7]
    model.save(folder, eos_token_id=[5, 6, 7, 8])
    refused(lambda: exported("four"), tmp_path, "three")
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> <|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    model.save(folder)
    refused(lambda: exported("two in front"), tmp_path, "one token in front")


@pytest.mark.parametrize("unknown", [None, "<|end|>"])
def test_letters_for_some_bytes_may_be_missing(tmp_path, unknown):
    """As in SmolLM2's. The library leaves such a byte out, as llama.cpp does, unless there is a token for it."""
    content = json.loads(saved(byte_level))
    del content["model"]["vocab"]["ÿ"], content["model"]["vocab"]["Ā"]
    tokenizer = Tokenizer.from_str(json.dumps(content | {"model": content["model"] | {"unk_token": unknown}}))
    assert tokenizer.encode("a\x00b").tokens == ["a", *[unknown] * bool(unknown), "b"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        about = export_gguf.vocabulary(tokenizer, 400)
    assert [str(warning.message) for warning in caught] == ["this tokenizer lacks 2 of the 256 bytes; where it gives "
                                                            "'<|end|>', llama.cpp gives nothing"] * bool(unknown)
    assert about["add_eos_token_id"] == tokenizer.token_to_id("<|end|>")        # it has no token for the byte 255


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_goes_along(tmp_path, file):
    _, folder = folder_of(tmp_path, byte_level())
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% endfor %}"
    (folder / file).write_text(source if file.endswith("jinja") else json.dumps({"chat_template": source}))
    export_gguf.export(folder, tmp_path / "m.gguf")
    assert field(gguf.GGUFReader(tmp_path / "m.gguf"), "tokenizer.chat_template") == source


LLAMA_SPACE = normalizers.Replace(" ", "▁")
GPT2, QWEN2, LLAMA3 = export_gguf.GPT2, export_gguf.QWEN2, export_gguf.LLAMA3
Digits, Metaspace, BertNormalizer = pre_tokenizers.Digits, pre_tokenizers.Metaspace, normalizers.BertNormalizer


def split(regex, behavior="isolated"):
    return pre_tokenizers.Split(Regex(regex), behavior)


def words(use_regex=False, add_prefix_space=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def in_turn(*parts):
    return (pre_tokenizers if isinstance(parts[0], pre_tokenizers.PreTokenizer) else normalizers).Sequence(list(parts))


def formed(make, change):
    """A tokenizer with another normalizer, pre_tokenizer, decoder, or options of the model."""
    tokenizer = Tokenizer.from_str(saved(make))
    for name, value in change.items():
        setattr(tokenizer if hasattr(tokenizer, name) else tokenizer.model, name, value)
    return tokenizer


@pytest.mark.parametrize("make, change, key, value", [
    (byte_level, {}, "add_tokenizer_pre", "gpt-2"),
    (byte_level, {"pre_tokenizer": in_turn(split(GPT2), words())}, "add_tokenizer_pre", "gpt-2"),
    (byte_level, {"pre_tokenizer": in_turn(in_turn(words(True)))}, "add_tokenizer_pre", "gpt-2"),
    (byte_level, {"pre_tokenizer": in_turn(Digits(True), words(True))}, "add_tokenizer_pre", "smollm"),
    (byte_level, {"pre_tokenizer": in_turn(split(QWEN2), words())}, "add_tokenizer_pre", "qwen2"),
    (byte_level, {"pre_tokenizer": in_turn(split(LLAMA3), words())}, "add_tokenizer_pre", "dbrx"),
    (byte_level, {"pre_tokenizer": in_turn(split(LLAMA3), words()), "ignore_merges": True}, "add_tokenizer_pre",
     "llama-bpe"),
    (byte_level, {"decoder": None}, "add_tokenizer_pre", "gpt-2"),
    (llama, {}, "add_add_space_prefix", True), (llama, {"normalizer": LLAMA_SPACE}, "add_add_space_prefix", False),
    *((make, {"normalizer": None, "pre_tokenizer": Metaspace("▁", scheme, make is by_word)}, "add_add_space_prefix",
       scheme != "never") for scheme in ("first", "always", "never") for make in (llama, by_word)),
    *((wordpiece, {"normalizer": BertNormalizer(lowercase=lowercase, strip_accents=strip)},
       f"tokenizer.ggml.normalizer.{key}", value) for lowercase, strip, key, value in (
        (True, None, "lowercase", True), (True, None, "strip_accents", True), (False, None, "lowercase", False),
        (False, None, "strip_accents", False), (True, False, "strip_accents", False))),
])
def test_every_form_that_llama_cpp_knows(make, change, key, value):
    assert export_gguf.vocabulary(formed(make, change), 400)[key] == value


def test_the_normalizer_of_qwen_is_left_out_with_a_warning():
    parts = {"normalizer": normalizers.NFC(), "pre_tokenizer": in_turn(split(QWEN2), words())}
    with pytest.warns(UserWarning, match="NFC.*llama.cpp does not"):
        about = export_gguf.vocabulary(formed(byte_level, parts), 400)
    assert about == export_gguf.vocabulary(formed(byte_level, parts | {"normalizer": None}), 400)


@pytest.mark.parametrize("make, change, named", [
    (byte_level, {"normalizer": normalizers.Lowercase()}, "normalizer.*Lowercase"),
    (byte_level, {"normalizer": normalizers.NFKC()}, "normalizer.*NFKC"),
    (llama, {"normalizer": normalizers.NFC()}, "normalizer.*NFC"),
    (byte_level, {"pre_tokenizer": words(True, True)}, "pre_tokenizer.*add_prefix_space"),
    (byte_level, {"pre_tokenizer": words()}, "pre_tokenizer.*use_regex"),
    (byte_level, {"pre_tokenizer": None}, "pre_tokenizer"),
    (byte_level, {"pre_tokenizer": in_turn(pre_tokenizers.WhitespaceSplit(), words(True))}, "WhitespaceSplit"),
    (byte_level, {"pre_tokenizer": in_turn(Digits(False), words(True))}, "pre_tokenizer.*Digits"),
    (byte_level, {"pre_tokenizer": in_turn(words(True), Digits(True))}, "pre_tokenizer.*Digits"),
    (byte_level, {"pre_tokenizer": in_turn(split(LLAMA3), words(True))}, "pre_tokenizer"),
    (byte_level, {"pre_tokenizer": in_turn(split(r"\d"), words())}, "pre_tokenizer"),
    (byte_level, {"pre_tokenizer": in_turn(split(QWEN2, "removed"), words())}, "Removed"),
    (byte_level, {"ignore_merges": True}, "ignore_merges"), (byte_level, {"end_of_word_suffix": "</w>"}, "</w>"),
    (byte_level, {"decoder": decoders.Metaspace()}, "decoder.*Metaspace"),
    (llama, {"normalizer": in_turn(normalizers.NFKC(), normalizers.Prepend("▁"), LLAMA_SPACE)}, "normalizer.*NFKC"),
    (llama, {"normalizer": normalizers.Prepend("▁")}, "normalizer"), (llama, {"normalizer": None}, "pre_tokenizer"),
    (llama, {"pre_tokenizer": Metaspace()}, "pre_tokenizer.*Metaspace"),
    (llama, {"pre_tokenizer": pre_tokenizers.Whitespace()}, "pre_tokenizer.*Whitespace"),
    (llama, {"decoder": decoders.ByteFallback()}, "decoder"),
    (wordpiece, {"normalizer": None}, "normalizer"), (wordpiece, {"normalizer": normalizers.Lowercase()}, "Lowercase"),
    (wordpiece, {"normalizer": BertNormalizer(handle_chinese_chars=False)}, "handle_chinese_chars"),
    (wordpiece, {"pre_tokenizer": pre_tokenizers.Whitespace()}, "pre_tokenizer.*Whitespace"),
    (wordpiece, {"continuing_subword_prefix": "@@"}, "@@"),
    (wordpiece, {"max_input_chars_per_word": 9}, "max_input_chars_per_word"),
])
def test_a_form_that_llama_cpp_has_not_is_named(make, change, named):
    with pytest.raises(InputError, match=named) as error:
        export_gguf.vocabulary(formed(make, change), 400)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_llama_cpp_would_read_in_another_way_is_named():
    few = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    few.pre_tokenizer = words(True)
    strict = byte_level()
    strict.add_tokens([AddedToken("<mask>", lstrip=True)])
    spaces = by_word()
    spaces.add_tokens(["▁▁"])
    lacking = Tokenizer.from_str(saved(llama).replace('"<0x41>"', '"<0x41"'))
    for tokenizer, named in (few, "no special"), (lacking, "lacks 1"), (strict, "lstrip.*<mask>"), (
            spaces, "splits.*▁▁"):
        with pytest.raises(InputError, match=named):
            export_gguf.vocabulary(tokenizer, 400)


def test_without_the_package_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        export_gguf.main(["folder", str(tmp_path / "m.gguf")])


def test_refusals(tmp_path):
    _, folder = folder_of(tmp_path, byte_level(), activation="gelu")
    refused(lambda: export_gguf.export(folder, tmp_path / "m.gguf"), tmp_path, "gelu")
    characters = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    _, folder = folder_of(tmp_path, characters)
    refused(lambda: export_gguf.export(folder, tmp_path / "m.gguf"), tmp_path, "WordLevel")
    _, folder = folder_of(tmp_path, byte_level(), qk_norm=True, **SCALED)
    refused(lambda: export_gguf.export(folder, tmp_path / "m.gguf"), tmp_path, "qwen3 has no rope_scaling")
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        refused(lambda name=name: export_gguf.main([str(folder), str(tmp_path / name)]), tmp_path, "exists")


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    _, folder = folder_of(tmp_path, byte_level())
    tensors = export_gguf.tensors

    def another_process(model):
        (tmp_path / "m.gguf").write_text("theirs")
        return tensors(model)
    monkeypatch.setattr(export_gguf, "tensors", another_process)
    with pytest.raises(InputError, match="exists"):
        export_gguf.export(folder, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "theirs" and not list(tmp_path.glob(".*"))
