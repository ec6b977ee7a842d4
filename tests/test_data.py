"""Ids to batches: windows, the endless stream, the two parts."""
import collections

import numpy as np
import pytest
from kinds import (
    CORPUS,
    KINDS,
    Ids,
    every_kind,
)

import data
from data import TokenDataset
from storage import tokens
from storage.files import InputError

# ---------------------------------------------------------------- windows and batches

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


def test_an_epoch_is_shuffled_once(make, monkeypatch):
    ds, calls = make("\n".join(CORPUS)), collections.Counter()
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: calls.update([tuple(key)]) or real(key))
    data.permutation.cache_clear()
    for start in range(0, 2 * len(ds), 3):
        ds.batch(start, 3, 7)
    assert set(calls.values()) == {1} and {(7, 0), (7, 1)} <= set(calls)


# ---------------------------------------------------------------- training and validation parts

def test_no_validation_part_if_the_fraction_is_0(make):
    ds = make(CORPUS[0])
    assert ds.split(0) == (ds, None)


@pytest.mark.filterwarnings("ignore:.* of the characters")         # of a word that is too long for WordPiece
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

def test_a_text_shorter_than_a_window_is_also_refused_from_the_cache(make):
    n = len(make("the quick brown fox", seq_len=2).tokens)
    with pytest.raises(InputError, match=rf"has {n} tokens, and one window needs 101"):
        make("the quick brown fox", seq_len=100)
    with pytest.raises(InputError, match=rf"has {n} tokens, and one window needs {n + 1} "):
        make("the quick brown fox", seq_len=n)
    assert len(make("the quick brown fox", seq_len=n - 1)) == 1


@pytest.mark.parametrize("numbers, message", [
    ((0, 1), "seq_len 0: "), ((-3, None), "seq_len -3: "), ((4, 0), "stride 0: "), ((4, -1), "stride -1: "),
    ((4, 5), "stride 5: .* skip tokens")])
def test_bad_numbers(make, numbers, message):
    with pytest.raises(InputError, match=message):
        make(CORPUS[0], "byte-bpe", *numbers)


@pytest.mark.parametrize("fraction, message", [
    (1, "at least 0 and less than 1"), (-0.1, "at least 0"), (float("nan"), "at least 0"),
    (0.01, r"the validation part, with --val-fraction 0.01, has 1 tokens, and one window needs 9 "),
    (0.99, r"the training part, with --val-fraction 0.99, has 1 tokens, and one window needs 9 ")])
def test_bad_fractions(fraction, message):
    with pytest.raises(InputError, match=message):
        TokenDataset(Ids(100), 0, 100, 8, 4).split(fraction)
