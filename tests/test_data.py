"""Text to batches: whatever the text and the tokenizer, the ids are those of encoding it whole, and none is lost."""

import collections
import itertools
import os
import sys
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data
from data import TokenDataset
from storage import tokens
from storage.files import InputError
from storage.tokens import load_tokenizer, vocab_size

CORPUS = ["The quick brown fox jumps over the lazy dog; it's the dog's 1,234th day.", "naïve café — “déjà vu”",
          "却说那孙悟空一个筋斗云，去了十万八千里。唐僧道：“悟空，休得无礼！”",
          "x = [1, 2]  # a list\r\n\r\n    return x\r\n", "aaaa aa aaaaaaaa", "    " * 4,
          "👍🏽 ok 👩‍👩‍👧 ok", "the theme there then other"] * 4


# ---------------------------------------------------------------- tokenizers of every kind, trained here

def wordpiece(lowercase=True):
    """BERT's: accents and case go, Chinese characters stand alone, a word that is too long is [UNK]."""
    t = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=12))
    t.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return t


def byte_bpe():
    """GPT-2's: bytes, so that a token may begin inside a character."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return t


def digits_bpe():
    """GPT-4's and Llama 3's: digits in threes, counted from where the number begins; accents are composed."""
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{L}\p{N}]?\p{L}+|[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s"),
                             "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.train_from_iterator([*CORPUS, "123 456 789 121 212"] * 2, trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return t


def llama_bpe():
    """Llama's: ▁ before the text and for every space, no words, unknown characters fall back to bytes."""
    special, letters = ["<unk>", "<s>", "</s>"], sorted(set("".join(CORPUS[:2]).replace(" ", "▁")) | {"a", "▁"})
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁"), ("a", "a"), ("aa", "aa"), ("o", "u"),
              ("▁", "a"), ("e", "r"), ("the", "r"), ("d", "o"), ("do", "g"), ("aa", "a"), ("▁▁▁▁", "▁▁▁▁")]
    tokens = special + [f"<0x{b:02X}>" for b in range(256)] + letters
    tokens += [m for m in dict.fromkeys([*(a + b for a, b in merges), "the"]) if m not in tokens]
    t = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True,
                             byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.add_special_tokens(special)
    return t


def characters(known, unknown):
    """One token a character."""
    vocabulary = {c: i for i, c in enumerate(dict.fromkeys(known + unknown))}
    t = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return t


KINDS = {"wordpiece": wordpiece(), "wordpiece-cased": wordpiece(False), "byte-bpe": byte_bpe(),
         "digits-bpe": digits_bpe(), "llama-bpe": llama_bpe(), "characters": characters("".join(CORPUS), "?")}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def make(tmp_path):
    """make(text, tokenizer, ...): a TokenDataset of a text and a tokenizer that are saved for it."""
    def make(text, tokenizer="byte-bpe", seq_len=8, stride=None):
        path, bytes_ = tmp_path / "text.txt", text.encode() if isinstance(text, str) else text
        path.write_bytes(bytes_)
        KINDS.get(tokenizer, tokenizer).save(str(tmp_path / "tokenizer.json"))
        return TokenDataset.from_text(path, tmp_path / "tokenizer.json", seq_len, stride)
    return make


def whole(text, tokenizer):
    return tokenizer.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------- chunks

snippets = st.one_of(
    st.sampled_from([
        *CORPUS, " ", "  ", "\r\n", "\n", "\t", "\r", "a", "aa", "the", " the", "dog", "e\u0301", "\u0301", "ﬁ", "😀",
        "👩\u200d👩\u200d👧", "却说", "。", "12", "345", "[MASK]", "[UNK]", "<|endoftext|>", "<|im_end|>", "</s>",
        "\x00", "\u200b", "\ufeff", "가", "\u1100\u1161", "▁"]),
    st.text(max_size=12),
    st.tuples(st.sampled_from([" ", "a", "=", "7", "\r\n", "é", "ab", "\u0301", "却", "e\u0301"]),
              st.integers(1, 90)).map(lambda t: t[0] * t[1]))
texts = st.lists(snippets, min_size=1, max_size=30).map("".join)


@every_kind
@settings(max_examples=40, deadline=None)
@given(text=texts, chunk=st.integers(1, 90), block=st.integers(1, 400))
def test_chunks_have_the_ids_of_the_whole_text(kind, text, chunk, block):
    tokenizer = KINDS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "CHUNK", chunk)
        patch.setattr(tokens, "CONTEXT", 64)
        patch.setattr(tokens, "PARALLEL", 3)
        parts = list(tokens.encode_text(tokenizer, [text[i:i + block] for i in range(0, len(text), block)]))
    assert "".join(body for _, body, _ in parts) == text
    assert [i for _, _, ids in parts for i in ids] == whole(text, tokenizer)


@pytest.mark.parametrize("text", [
    "a" * 9000, "x " + "the" * 3000 + " dog", " " * 9000 + "dog", "7" * 9000, "\r\n" * 4000, "e\u0301" * 4000,
    "dog" + "\u0301" * 9000 + "dog", "却" * 9000, "[MASK]" * 1500])
@every_kind
def test_a_text_with_hardly_a_place_to_cut(kind, text, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 700)
    parts = tokens.encode_text(KINDS[kind], [text])
    assert [i for _, _, ids in parts for i in ids] == whole(text, KINDS[kind])


def test_a_special_token_that_takes_the_spaces_before_it(monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 1000)
    t, text = byte_bpe(), "the dog " * 100 + " " * 9000 + "<mask> the" + " the" * 3000
    t.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])        # RoBERTa's
    assert [i for _, _, ids in tokens.encode_text(t, [text]) for i in ids] == whole(text, t)


@every_kind
def test_ordinary_text_is_cut_near_the_size_asked_for(kind, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 700)
    sizes = [len(body) for _, body, _ in tokens.encode_text(KINDS[kind], [" ".join(CORPUS) * 4])]
    assert len(sizes) > 4 and max(sizes) < 3 * 700


# ---------------------------------------------------------------- reading and the cache

@every_kind
def test_tokens_are_those_of_the_file(kind, make, cache_folder):
    text = "\r\n".join(CORPUS)
    ds = make(text, kind)
    assert ds.tokens.tolist() == whole(text, KINDS[kind])
    assert isinstance(ds.tokens, np.memmap) and ds.tokens.ndim == 1 and ds.tokens.dtype == np.uint16
    assert ds.vocab_size == vocab_size(KINDS[kind]) > ds.tokens.max()
    assert ds.source_bytes == len(text.encode())
    assert sorted(p.suffix for p in cache_folder.iterdir()) == [".ids", ".json"]


def test_line_ends_stay_and_a_byte_order_mark_goes(make):
    ds = make(b"\xef\xbb\xbfone\r\ntwo\rthree\nfour " * 1 + "\ufeffé".encode())
    assert ds.tokens.tolist() == whole("one\r\ntwo\rthree\nfour \ufeffé", KINDS["byte-bpe"])
    assert ds.source_bytes == len("one\r\ntwo\rthree\nfour \ufeffé".encode())


def test_blocks_may_end_inside_a_character(make, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 5)
    text = "".join(CORPUS) + "\ufeff" * 9
    assert make(text).tokens.tolist() == whole(text, KINDS["byte-bpe"])


def test_special_tokens_are_kept_where_written_and_never_inserted(make):
    ds = make("[CLS] the [SEP] dog aaaa the lazy theme then", "wordpiece-cased")
    assert ds.tokens.tolist().count(2) == ds.tokens.tolist().count(3) == 1


def test_truncation_padding_and_dropout_are_switched_off(make):
    t = byte_bpe()
    t.enable_truncation(4)
    t.enable_padding(length=500)
    t.model.dropout = 0.5
    assert make(CORPUS[0], t).tokens.tolist() == whole(CORPUS[0], KINDS["byte-bpe"])


def test_ids_of_a_large_vocabulary_need_32_bits_and_may_have_gaps(make):
    t = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "?": 5}, unk_token="?"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    ds = make("a b a b b a b a b b", t)
    assert vocab_size(t) == ds.vocab_size == 70_001
    assert ds.tokens.dtype == np.uint32 and ds.tokens.max() == 70_000


def test_a_second_time_nothing_is_encoded(make, monkeypatch):
    first = make(CORPUS[0]).tokens.tolist()
    monkeypatch.setattr(tokens, "encode_text", None)
    assert make(CORPUS[0], seq_len=4).tokens.tolist() == first


def test_another_text_or_tokenizer_is_another_cache(make, cache_folder):
    for text, kind in (("the quick fox", "byte-bpe"), ("the quick dog", "byte-bpe"), ("the quick fox", "characters")):
        make(text, kind, seq_len=2)
    assert len(list(cache_folder.glob("*.ids"))) == 3


@pytest.mark.parametrize("suffix", [".ids", ".json"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:9] + bytes([b[9] ^ 1]) + b[10:],
                                    lambda b: b + b"\0\0", lambda b: b"[1]", None])
def test_a_damaged_cache_is_made_again(make, cache_folder, suffix, damage):
    wanted = make("\n".join(CORPUS)).tokens.tolist()
    path, = cache_folder.glob("*" + suffix)
    good = path.read_bytes()
    path.write_bytes(damage(good)) if damage else path.unlink()
    assert make("\n".join(CORPUS)).tokens.tolist() == wanted
    assert path.read_bytes() == good


def test_leftovers_of_a_killed_run_go_after_a_day(make, cache_folder):
    cache_folder.mkdir()
    old, new = cache_folder / "a.ids.1.partial", cache_folder / "b.ids.2.partial"
    old.touch(), new.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    make(CORPUS[0])
    assert not old.exists() and new.exists()


def test_the_cache_folder_is_the_users_unless_named(monkeypatch, tmp_path):
    assert tokens.cache_folder() == tmp_path / "nanollm-cache"
    monkeypatch.delenv("NANOLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert tokens.cache_folder() == tmp_path / "xdg" / "nanollm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokens.cache_folder() == tmp_path / ".cache" / "nanollm"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tokens.cache_folder() == tmp_path / "Library" / "Caches" / "nanollm"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert tokens.cache_folder() == tmp_path / "local" / "nanollm"


def test_progress_is_plain_lines_where_there_is_no_terminal(make, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "CHUNK", 700)
    make("\n".join(CORPUS) * 3)
    assert capsys.readouterr().err == ""                # it was quick
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10_000, 4)).__next__)
    make("\n".join(CORPUS) * 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all("text.txt: " in line and line.endswith("%") for line in lines)


# ---------------------------------------------------------------- unknown tokens

@pytest.mark.parametrize("text, share", [("却说那孙悟空 " * 20, "100%"), ("the dog " * 8 + "却", "6%")])
def test_unknown_tokens_warn_also_from_the_cache(make, text, share):
    t = wordpiece()
    t.train_from_iterator(["the dog a cat"], trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{share} of the tokens of .*text.txt are unknown to .*byte-level BPE"):
            make(text, t)


def test_no_warning_for_few_unknown_tokens_or_those_spelled_out(make):
    make("the dog " * 100 + "😀", "wordpiece")             # pytest makes every warning an error
    make("the dog [UNK] " * 9, "wordpiece")
    make("the\nquick\nbrown\nox\n" * 9, characters("the quickbrownx", "\n"))


# ---------------------------------------------------------------- windows and batches

sizes = st.tuples(st.integers(2, 60), st.integers(1, 20), st.integers(1, 20)).filter(
    lambda t: t[0] > t[1] >= t[2])


class Ids:
    """A TokenFile of the ids 0, 1, 2, ..."""
    def __init__(self, n):
        self.n_token, self.tokenizer = n, KINDS["characters"]

    def ids(self, first, last):
        return np.arange(first, last, dtype=np.uint16)

    def byte(self, n):
        return 10 * n


@given(sizes)
def test_windows_cover_every_token_and_the_last_ends_at_the_end(size):
    n, seq_len, stride = size
    ds = TokenDataset(Ids(n), 0, n, seq_len, stride)
    windows = list(ds)
    assert len(windows) == len(ds)
    for i, (x, y) in enumerate(windows):
        assert x.shape == y.shape == (seq_len,) and x.dtype == y.dtype == np.int64
        start = min(i * stride, n - 1 - seq_len)
        assert x.tolist() == list(range(start, start + seq_len)) and y.tolist() == (x + 1).tolist()
    assert windows[-1][1][-1] == n - 1
    assert len({int(x[0]) for x, _ in windows}) == len(ds)              # no window twice
    assert {int(t) for x, y in windows for t in (*x, *y)} == set(range(n))


def test_index_from_the_end_and_out_of_range(make):
    ds = make(CORPUS[0], seq_len=4, stride=3)
    assert all((a == b).all() for a, b in zip(ds[-1], ds[len(ds) - 1], strict=True))
    assert all((a == b).all() for a, b in zip(ds[-len(ds)], ds[0], strict=True))
    for i in (len(ds), -len(ds) - 1):
        with pytest.raises(IndexError):
            ds[i]


def test_windows_are_copies(make):
    ds = make(CORPUS[0])
    (x, y), before = ds[0], ds[0]
    x[:] = -1
    assert (y == before[1]).all() and (ds[0][0] == before[0]).all()


@pytest.mark.parametrize("seq_len, stride", [(8, 4), (1, 1), (7, 3)])
def test_stride_is_half_a_window_if_not_given(make, seq_len, stride):
    assert make(CORPUS[0], seq_len=seq_len).stride == stride


@given(size=sizes, batch=st.integers(1, 9), seed=st.integers(0, 5), start=st.integers(0, 100))
def test_batches_are_the_windows_of_one_endless_stream(size, batch, seed, start):
    n, seq_len, stride = size
    ds = TokenDataset(Ids(n), 0, n, seq_len, stride)
    x, y = ds.batch(start, batch, seed)
    assert x.shape == y.shape == (batch, seq_len) and x.dtype == y.dtype == np.int64
    data.permutation.cache_clear()
    for i in range(batch):                              # in whatever portions and order it is read
        one = ds.batch(start + batch - 1 - i, 1, seed)
        assert (one[0][0] == x[batch - 1 - i]).all() and (one[1][0] == y[batch - 1 - i]).all()
    epochs = [ds.batch(e * len(ds), len(ds), seed)[0][:, 0].tolist() for e in range(3)]
    assert all(sorted(epoch) == sorted({int(w[0]) for w, _ in ds}) for epoch in epochs)
    if len(ds) > 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != ds.batch(0, len(ds), seed + 1)[0][:, 0].tolist()


def test_an_epoch_is_shuffled_once(make, monkeypatch):
    ds, calls = make("\n".join(CORPUS)), collections.Counter()
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: calls.update([tuple(key)]) or real(key))
    data.permutation.cache_clear()
    for start in range(0, 2 * len(ds), 3):
        ds.batch(start, 3, 7)
    assert set(calls.values()) == {1} and {(7, 0), (7, 1)} <= set(calls)


# ---------------------------------------------------------------- training and validation parts

@given(size=sizes, fraction=st.floats(0.01, 0.99), batch=st.integers(1, 5))
def test_parts_share_no_token_and_validation_scores_each_target_once(size, fraction, batch):
    n, seq_len, stride = size
    ds = TokenDataset(Ids(n), 0, n, seq_len, stride)
    n_val = round(n * fraction)
    if min(n_val, n - n_val) <= seq_len:
        with pytest.raises(InputError, match="one window needs"):
            ds.split(fraction)
        return
    train, val = ds.split(fraction)
    assert train.tokens.tolist() + val.tokens.tolist() == list(range(n)) and len(val.tokens) == n_val
    assert (train.seq_len, train.stride, val.seq_len, val.stride) == (seq_len, stride, seq_len, seq_len)
    assert max(y.max() for _, y in train) < min(x.min() for x, _ in val)
    starts = [int(x[0]) for x, _ in val]
    assert all(b - a == seq_len for a, b in itertools.pairwise(starts[:-1]))
    in_order = list(val.in_order(batch))
    pairs = [(int(a), int(b)) for x, y, _ in in_order for a, b in zip(x.ravel(), y.ravel(), strict=True)]
    assert pairs == [(t, t + 1) for t in range(n - n_val, n - 1)]
    assert all(x.shape == y.shape and x.shape[0] <= batch and x.shape[1] == new <= seq_len for x, y, new in in_order)
    assert [x.shape[1] for x, _, _ in in_order][:-1] == [seq_len] * (len(in_order) - 1)


@given(size=sizes, batch=st.integers(1, 5))
@example((30, 8, 8), 2)
@example((9, 8, 3), 2)
def test_in_order_every_id_but_the_first_is_a_new_target_once_behind_enough_context(size, batch):
    n, seq_len, stride = size
    scored, starts = [], []
    for x, y, new in TokenDataset(Ids(n), 0, n, seq_len, stride).in_order(batch):
        assert x.shape == y.shape and 1 <= len(x) <= batch and x.dtype == y.dtype == np.int64
        assert (y == x + 1).all() and (np.diff(x, axis=1) == 1).all() and 1 <= new <= x.shape[1] <= seq_len
        for row in y.tolist():
            scored += row[-new:]
            starts.append(row[0] - 1)
            assert all(target - starts[-1] >= min(target, seq_len - stride + 1) for target in row[-new:])
        assert len(x) == 1 or x.shape[1] == seq_len
    assert scored == list(range(1, n))
    assert starts == list(range(0, len(starts) * stride, stride))


def test_no_validation_part_if_the_fraction_is_0(make):
    ds = make(CORPUS[0])
    assert ds.split(0) == (ds, None)


@every_kind
def test_source_bytes_of_the_parts_are_those_of_their_characters(kind, make, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 90)
    monkeypatch.setattr(tokens, "CONTEXT", 64)
    text = "\r\n".join(CORPUS[:9]) + "the" * 60 + " " * 150 + "dog"
    ds = make(b"\xef\xbb\xbf" + text.encode(), kind, seq_len=1)
    assert len(ds.file.chunks) > 1
    spans = KINDS[kind].encode(text, add_special_tokens=False).offsets
    for n in range(2, len(spans) - 1):
        train, val = ds.split((len(spans) - n) / len(spans))
        assert len(train.tokens) == n
        assert train.source_bytes == len(text[:spans[n][0]].encode())
        assert train.source_bytes + val.source_bytes == ds.source_bytes == len(text.encode())


# ---------------------------------------------------------------- bad input

GB = "却说那孙悟空一个筋斗云，去了十万八千里。".encode("gb18030")


@pytest.mark.parametrize("text, message", [
    (b"", r"text.txt is empty"), (b"\xef\xbb\xbf", r"text.txt is empty"),
    (b"abc\n" * 100_000 + GB, r"not UTF-8 at byte 400004 and looks like GB18030: iconv -f GB18030 .*text.txt > "),
    ("bon caf\xe9, d\xe9j\xe0 vu".encode("latin-1"), r"not UTF-8 at byte 7 and looks like ISO-8859-1: iconv "),
    ("hello".encode("utf-16"), r"not UTF-8 at byte 0 and looks like UTF-16: iconv"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"not UTF-8 at byte 0 and looks like no text at all"),
    ("the dog é".encode()[:-1], r"ends inside a character, at byte 8: "),
    ("ab", r"text.txt has 2 tokens, and one window needs 9 \(seq_len \+ 1\)")])
def test_bad_texts(make, cache_folder, text, message):
    with pytest.raises(InputError, match=message) as caught:
        make(text)
    assert "\n" not in str(caught.value)
    assert not list(cache_folder.glob("*"))


def test_a_text_shorter_than_a_window_is_also_refused_from_the_cache(make):
    n = len(make("the quick brown fox", seq_len=2).tokens)
    with pytest.raises(InputError, match=rf"has {n} tokens, and one window needs 101"):
        make("the quick brown fox", seq_len=100)
    with pytest.raises(InputError, match=rf"has {n} tokens, and one window needs {n + 1} "):
        make("the quick brown fox", seq_len=n)
    assert len(make("the quick brown fox", seq_len=n - 1)) == 1


def test_texts_that_cannot_be_opened(make, tmp_path):
    make(CORPUS[0])
    for path, why in ((tmp_path / "none.txt", "No such file"), (tmp_path, "directory")):
        with pytest.raises(InputError, match=f"cannot read the text .*{why}"):
            TokenDataset.from_text(path, tmp_path / "tokenizer.json", 4)
    with pytest.raises(InputError, match="not a regular file"):
        TokenDataset.from_text(os.devnull, tmp_path / "tokenizer.json", 4)


def test_a_text_that_changes_while_it_is_read(make, monkeypatch, cache_folder, tmp_path):
    real = tokens.unknown_token

    def meddle(tokenizer):                              # called between the two readings
        (tmp_path / "text.txt").write_text(CORPUS[0] + "!")
        return real(tokenizer)
    monkeypatch.setattr(tokens, "unknown_token", meddle)
    with pytest.raises(InputError, match="changed while it was read"):
        make(CORPUS[0])
    assert not list(cache_folder.glob("*"))


@pytest.mark.parametrize("content, message", [
    ("not json", "is not JSON"), ("", "is not JSON"), (b"\xff\xfe\0", "is not JSON"), ("{}", "JSON but no tokenizer"),
    ('{"model_type": "llama"}', "JSON but no tokenizer"), ("[1, 2]", "JSON but no tokenizer"),
    (Tokenizer(models.BPE()).to_str(), "has no tokens")])
def test_bad_tokenizers(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizers_that_cannot_be_opened(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=r"cannot read the tokenizer .*Hugging Face tokenizer\.json"):
            load_tokenizer(path)


def test_a_tokenizer_without_its_unknown_token_cannot_encode_everything(make, cache_folder):
    t = Tokenizer(models.WordLevel({"the": 0, "dog": 1}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"cannot encode .*text\.txt"):
        make("the dog the dog the dog the cat", t)
    assert not list(cache_folder.glob("*"))


@pytest.mark.parametrize("numbers, message", [
    ((0, 1), "seq_len 0: "), ((-3, None), "seq_len -3: "), ((4, 0), "stride 0: "), ((4, -1), "stride -1: "),
    ((4, 5), "stride 5: .* skip tokens")])
def test_bad_numbers(make, numbers, message):
    with pytest.raises(InputError, match=message):
        make(CORPUS[0], "byte-bpe", *numbers)


@pytest.mark.parametrize("fraction, message", [
    (1, "at least 0 and less than 1"), (-0.1, "at least 0"), (float("nan"), "at least 0"),
    (0.01, r"the validation part, 0.01 of 100 tokens, has 1 tokens, and one window needs 9 "),
    (0.99, r"the training part, 1 - 0.99 of 100 tokens, has 1 tokens, and one window needs 9 ")])
def test_bad_fractions(fraction, message):
    with pytest.raises(InputError, match=message):
        TokenDataset(Ids(100), 0, 100, 8, 4).split(fraction)


def test_a_cache_that_cannot_be_written(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the token cache .*set NANOLLM_CACHE"):
        make(CORPUS[0])
