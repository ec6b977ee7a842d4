"""Text to ids: for any text and tokenizer, the ids are those of the whole text encoded at once, and none is lost."""
import errno
import os
import random
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers
from kinds import CORPUS, KINDS, byte_bpe, characters, every_kind, made, whole
from tokenizers import Tokenizer, models, pre_tokenizers

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
    assert [i for _, _, ids, _ in parts for i in ids] == whole(text, KINDS[kind])


def test_a_special_token_that_takes_the_spaces_before_it(monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 1000)
    t, text = byte_bpe(), "the dog " * 100 + " " * 9000 + "<mask> the" + " the" * 3000
    t.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])        # RoBERTa's
    assert [i for _, _, ids, _ in tokens.encode_text(t, [text]) for i in ids] == whole(text, t)


@every_kind
def test_ordinary_text_is_cut_near_the_size_asked_for(kind, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 700)
    sizes = [len(body) for _, body, *_ in tokens.encode_text(KINDS[kind], [" ".join(CORPUS) * 4])]
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

def words_only():
    t = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "dog": 2, "cat": 3, "##s": 4}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.add_special_tokens(["[UNK]"])
    return t


@pytest.mark.parametrize("kind, text, share, fate", [
    ("words", "the dog " * 6 + "却", "2%", r"replaced by '\[UNK\]'"), ("words", "the dogma " * 6, "50%", ""),
    ("no unknown", "the 汉字 a" * 9, "25%", "left out"), ("fused", "the 汉字 a" * 9, "25%", r"replaced by '\?'"),
    ("unigram", "the 汉字 a" * 9, "25%", ""), ("suffix", "th é " * 9, "40%", ""), ("prefix", "the " * 9, "50%", ""),
    ("removed", "xa " * 9, "33%", ""), ("no a", "the a " * 9, "17%", ""), ("words only", "the 12 " * 9, "29%", ""),
    ("every 3", "ACAACN" * 9, "50%", ""), ("▁ only", "the\f" * 9, "25%", ""), ("lines", "ab\nab\n" * 9, "33%", ""),
    ("NFC", "e\u0301 Z " * 9, "20%", "")])
def test_lost_characters_are_counted(make, kind, text, share, fate):
    """A word of WordPiece is lost as a whole, characters of a BPE one by one; white space where spaces are kept."""
    tokenizer = {"words": words_only(), "lines": characters("ab ", "?")}.get(kind) or made()[kind]
    for _ in range(2):                                  # encoded, and from the cache
        with pytest.warns(UserWarning, match=f"{share} of the characters of .*text.txt are unknown to .*{fate}.* low:"):
            make(text, tokenizer, seq_len=2)


@pytest.mark.parametrize("kind", ["words", "no unknown", "fused", "unigram ▁"])
def test_a_text_of_which_nothing_is_known_is_refused(make, kind, cache_folder):
    with pytest.raises(InputError, match=r"the tokenizer knows no character of the text .*text\.txt"):
        make("汉字 字\n" * 9, words_only() if kind == "words" else made()[kind])
    assert not list(cache_folder.glob("*"))


def test_lost_characters_are_counted_in_every_chunk(monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 700)
    text = "the a " * 200 + "the 汉 字汉" * 30 + "the 字" * 500
    for kind in "no unknown", "fused", "white space", "unigram":
        parts = list(tokens.encode_text(made()[kind], [text]))
        assert len(parts) > 4
        assert [[c for c, is_lost in zip(body, lost, strict=True) if is_lost] for _, body, _, lost in parts] == [
            [c for c in body if c in "汉字"] for _, body, *_ in parts]


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


def without_unknown(model):
    """A tokenizer of "the" and "dog" (a Unigram: of letters) with which the library raises an Exception."""
    letters = [(letter, -1.0) for letter in "▁thedog\n"]
    t = Tokenizer({"WordLevel": models.WordLevel({"the": 0, "dog": 1}, unk_token="[UNK]"),
                   "WordPiece": models.WordPiece({"the": 0, "dog": 1}, unk_token="[UNK]"),
                   "Unigram": models.Unigram(letters)}[model])
    t.pre_tokenizer = pre_tokenizers.Metaspace() if model == "Unigram" else pre_tokenizers.Whitespace()
    return t


every_model = pytest.mark.parametrize("model, unknown", [
    ("WordLevel", "'cat'"), ("WordPiece", "'cat'"), ("Unigram", "'ca'")])


@every_model
def test_a_tokenizer_without_its_unknown_token_cannot_encode_everything(make, cache_folder, model, unknown):
    make("the dog the\ndog the dog the", without_unknown("WordLevel"), seq_len=4)
    before = list(cache_folder.glob("*"))
    with pytest.raises(InputError, match=rf"cannot encode {unknown} in line 3 of .*text\.txt, and has no token for"):
        make("the dog the\ndog the dog\nthe cat", without_unknown(model))
    assert list(cache_folder.glob("*")) == before


# ---------------------------------------------------------------- prompts

def test_a_prompt_is_encoded_without_special_tokens():
    t = KINDS["wordpiece"]
    assert tokens.encode_prompt(t, "the [SEP] dog") == whole("the [SEP] dog", t)
    assert tokens.encode_prompt(t, "") == tokens.encode_prompt(t, " \n") == []
    for kind in KINDS.values():                         # pytest makes every warning an error
        tokens.encode_prompt(kind, "the dog")
    assert tokens.encode_prompt(without_unknown("WordLevel"), "the dog") == [0, 1]


@pytest.mark.parametrize("kind, prompt, named, left", [
    ("characters", "ab5€aï c", r"'5€' \(character 3\), 'ï' \(character 6\): replaced by '\\n'", "ab\n\na\n c"),
    ("no unknown", "the 汉字 a", r"'汉字' \(character 5\): left out", "the  a"),
    ("fused", "the 汉字 a", r"'汉字' \(character 5\): replaced by '\?'", "the ? a"),
    ("words", "the dogma cats", r"'dogma' \(character 5\): replaced by '\[UNK\]'", "the [UNK] cats"),
    ("no unknown", "汉a" * 9, r"'汉' \(character 9\) and 4 more: left out", "a" * 9)])
def test_what_a_prompt_loses_is_named(kind, prompt, named, left):
    t = {"characters": characters("abc ", "\n"), "words": words_only()}.get(kind) or made()[kind]
    with pytest.warns(UserWarning, match=named):
        assert tokens.encode_prompt(t, prompt) == whole(left, t)


@pytest.mark.parametrize("kind", ["no unknown", "characters", "words"])
def test_a_prompt_of_which_nothing_is_left_is_refused(kind):
    t = {"characters": characters("abc ", "\n"), "words": words_only()}.get(kind) or made()[kind]
    with pytest.raises(InputError, match="--prompt: the tokenizer knows nothing of '汉 字'"):
        tokens.encode_prompt(t, "汉 字")


@every_model
def test_a_prompt_that_cannot_be_encoded_is_refused(model, unknown):
    with pytest.raises(InputError, match=rf"--prompt: the tokenizer cannot encode {unknown} \(character 5\)"):
        tokens.encode_prompt(without_unknown(model), "the cat")


# ---------------------------------------------------------------- tokens that depend on how far the text has come

@pytest.mark.parametrize("kind", [kind for kind in made() if kind.startswith("every")])
def test_pieces_counted_from_the_beginning_of_a_text(kind, monkeypatch):
    """Genomes have runs of N. There all ids are those of the unknown token, however the pieces are counted."""
    monkeypatch.setattr(tokens, "CHUNK", 700)
    rng = random.Random(kind)
    text = "".join("N" * rng.randint(1, 3000) + "".join(rng.choices("AC", k=rng.randint(1, 900))) for _ in range(6))
    parts = list(tokens.encode_text(made()[kind], [text]))
    assert [i for _, _, ids, _ in parts for i in ids] == whole(text, made()[kind])
    assert (len(parts) > 1) == (tokens.counting(made()[kind]) == "seen")


def test_a_cache_that_cannot_be_written(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the token cache .*set NANOLLM_CACHE"):
        make(CORPUS[0])
