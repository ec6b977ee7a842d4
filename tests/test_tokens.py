"""Text to ids: for any text and tokenizer, the ids are those of the whole text encoded at once, and none is lost."""
import errno
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers
from kinds import CORPUS, KINDS, byte_bpe, characters, every_kind, whole, wordpiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data import TokenDataset
from storage import files, tokens
from storage.files import InputError, lock
from storage.tokens import load_tokenizer, vocab_size

# ---------------------------------------------------------------- chunks

@pytest.mark.parametrize("text", [
    "a" * 3000, "x " + "the" * 1000 + " dog", " " * 3000 + "dog", "7" * 3000, "\r\n" * 1500, "e\u0301" * 1500,
    "dog" + "\u0301" * 3000 + "dog", "却" * 3000, "[MASK]" * 500])
@every_kind
def test_a_text_with_hardly_any_place_to_cut(kind, text, monkeypatch):
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


def test_leftovers_of_a_killed_run_go_and_a_running_one_is_left_alone(make, cache_folder):
    dead, alive = (cache_folder / f".{name}.ids.{files._machine()}abcd.nanollm" for name in "ab")
    dead.mkdir(parents=True), alive.mkdir()
    with lock(alive):
        make(CORPUS[0])
    assert not dead.exists() and alive.exists()


def test_two_starts_at_once_share_the_cache(make, cache_folder, tmp_path, monkeypatch):
    """In containers each of them may be process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    wanted = make(CORPUS[0]).tokens.tolist()
    start, found = threading.Barrier(3), []

    def begin():
        start.wait()
        found.append(TokenDataset.from_text(tmp_path / "text.txt", tmp_path / "tokenizer.json", 8).tokens.tolist())
    for _ in range(5):
        shutil.rmtree(cache_folder)
        threads = [threading.Thread(target=begin) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [wanted] * 15
    assert sorted(path.suffix for path in cache_folder.iterdir()) == [".ids", ".json"]


def test_a_cache_that_another_process_has_written_meanwhile_will_do(make, monkeypatch):
    """Where a file that is open cannot be replaced, the second of two writers is refused."""
    write = tokens.write_tokens

    def refused(*args):
        write(*args)
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(tokens, "write_tokens", refused)
    assert make(CORPUS[0]).tokens.tolist()


def test_a_cache_that_cannot_be_mapped_is_named(make, monkeypatch):
    data = make(CORPUS[0])

    def no_device(*_):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    monkeypatch.setattr(np, "memmap", no_device)
    with pytest.raises(InputError, match=r"cannot map .*\.ids into memory \(No such device\): set NANOLLM_CACHE"):
        data.tokens.tolist()


def test_a_cache_that_does_not_keep_what_is_written_is_named(make, monkeypatch):
    monkeypatch.setattr(tokens, "write_tokens", lambda path, *_: path.write_bytes(b"??"))
    with pytest.raises(InputError, match=r"token cache .*does not hold what was written.*NANOLLM_CACHE"):
        make(CORPUS[0])


def test_the_cache_folder_is_the_users_unless_named(monkeypatch, tmp_path):
    assert tokens.cache_folder() == tmp_path / "nanollm-cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOLLM_CACHE", "~/x")          # as a configuration file may have it, without a shell
    assert tokens.cache_folder() == tmp_path / "x"
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


def test_the_unknown_token_of_every_kind_of_model():
    pairs = [("<unk>", 0.0), ("a", -1.0)]
    assert tokens.unknown_token(Tokenizer(models.Unigram(pairs, unk_id=0))) == "<unk>"
    assert tokens.unknown_token(Tokenizer(models.Unigram(pairs))) is None
    assert [tokens.unknown_token(KINDS[kind]) for kind in ("wordpiece", "byte-bpe", "llama-bpe", "characters")] == [
        "[UNK]", None, "<unk>", "?"]


def test_no_warning_for_few_unknown_tokens_or_those_spelled_out(make):
    make("the dog " * 100 + "😀", "wordpiece")             # pytest makes every warning an error
    make("the dog [UNK] " * 9, "wordpiece")
    make("the\nquick\nbrown\nox\n" * 9, characters("the quickbrownx", "\n"))


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("text, message", [
    (b"", r"text.txt is empty"), (b"\xef\xbb\xbf", r"text.txt is empty"),
    ("bon caf\xe9, d\xe9j\xe0 vu".encode("latin-1"), r"not UTF-8 at byte 7, in line 1, and perhaps CP1252"),
    ("the dog é".encode()[:-1], r"ends inside a character, at byte 8: "),
    ("ab", r"text.txt has 2 tokens, and one window needs 9 \(seq_len \+ 1\)")])
def test_bad_texts(make, cache_folder, text, message):
    with pytest.raises(InputError, match=message) as caught:
        make(text)
    assert "\n" not in str(caught.value)
    assert not list(cache_folder.glob("*"))


def test_texts_that_cannot_be_opened(make, tmp_path):
    make(CORPUS[0])
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "none.txt", "there is no such file: give a"), (tmp_path, "is a folder, .*: give a"),
                      (os.devnull, "is a pipe or a device"), (tmp_path / "pipe", "is a pipe or a device")):
        with pytest.raises(InputError, match=f"^{path}:? {why}"):
            TokenDataset.from_text(path, tmp_path / "tokenizer.json", 4)


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
    ("not json", "not valid JSON"), ("", "not valid JSON"), (b"\xff\xfe\0", "not valid JSON"),
    ("{}".encode("utf-16"), "not valid JSON"), ("[" * 200_000, r"not valid JSON.*: give a"),
    ("{}", "JSON but not a tokenizer"),
    ('{"model_type": "llama"}', "JSON but not a tokenizer"), ("[1, 2]", "not a JSON object: give a"),
    (Tokenizer(models.BPE()).to_str(), "has no tokens")])
def test_bad_tokenizers(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizers_that_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "none.json", "there is no such file.*Hugging Face tokenizer"),
                      (tmp_path, "is a folder, .*Hugging Face tokenizer"),
                      (tmp_path / "pipe", "is a pipe or a device")):
        with pytest.raises(InputError, match=f"^{path}:? {why}"):
            load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "qwen.tiktoken"])
def test_a_tokenizer_in_another_format_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"tokenizer.json: there is no such file; {name} is a tokenizer in another"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_may_begin_with_a_byte_order_mark(make, tmp_path):
    make(CORPUS[0])
    path = tmp_path / "tokenizer.json"
    before = load_tokenizer(path).to_str()
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_tokenizer(path).to_str() == before


def test_a_tokenizer_without_its_unknown_token_cannot_encode_everything(make, cache_folder):
    t = Tokenizer(models.WordLevel({"the": 0, "dog": 1}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"cannot encode .*text\.txt"):
        make("the dog the dog the dog the cat", t)
    assert not list(cache_folder.glob("*"))


def test_a_cache_that_cannot_be_written(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the token cache .*set NANOLLM_CACHE"):
        make(CORPUS[0])
