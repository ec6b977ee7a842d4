"""Tokenizers of every kind, trained here, and what a text's ids must be."""
import functools
import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tiny import make_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from storage.tokens import Decoder, load_tokenizer

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


@functools.cache
def made():
    """{name: tokenizer}: one for each way to cut a text and to encode the pieces, over a few letters."""
    pre, norm, added = pre_tokenizers, normalizers, tokenizers.AddedToken
    pairs = [tuple(pair.split()) for pair in ("t h", "th e", "a a", "aa aa", "N N", "▁ t", "1 2", "却 说", "- -")]
    words = ["?", *dict.fromkeys("abcdehort ANC0129-=.,:\n\r\té却说。\u0301#▁"), *map("".join, pairs)]
    ids = {word: i for i, word in enumerate(words)}

    def bpe(cut=None, normalizer=None, merges=pairs, unknown="?", **settings):
        t = Tokenizer(models.BPE(ids, merges, unk_token=unknown, **settings))
        t.pre_tokenizer, t.normalizer = cut, normalizer
        return t

    def kmers(*steps):
        known = ["?", "the", *("".join(kmer) for n in (3, 4, 6) for kmer in itertools.product("AC", repeat=n))]
        t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="?"))
        t.pre_tokenizer = pre.Sequence(list(steps))
        return t

    def unigram(cut=None):
        t = Tokenizer(models.Unigram([(word, -len(word) - i / 100) for i, word in enumerate(words)], unk_id=0))
        t.pre_tokenizer = cut
        return t

    def gpt(cut=None, **settings):
        t = byte_bpe()
        t.pre_tokenizer = cut or t.pre_tokenizer
        if settings:
            t.add_tokens([added("the", **settings), added("--", **settings)])
        return t

    cuts = {"white space": pre.Whitespace(), "spaces": pre.WhitespaceSplit(), "bert": pre.BertPreTokenizer(),
            "digits": pre.Digits(), "each digit": pre.Digits(True), "punctuation": pre.Punctuation(),
            "delimiter": pre.CharDelimiterSplit("a"), "scripts": pre.UnicodeScripts(),
            **{f"▁ {when}": pre.Metaspace("▁", when) for when in ("first", "always", "never")},
            "▁ only": pre.Metaspace(split=False), "words only": pre.Split(Regex("[a-z]+"), "removed", invert=True),
            **{how: pre.Split(" ", how) for how in ("removed", "isolated", "merged_with_previous", "merged_with_next",
                                                    "contiguous")}}
    changes = {"NFC": norm.NFC(), "NFD": norm.NFD(), "NFKC": norm.NFKC(), "strip": norm.Strip(),
               "lower": norm.Lowercase(), "accents": norm.Sequence([norm.NFD(), norm.StripAccents()]),
               "one space": norm.Replace(Regex(" +"), " "), "no a": norm.Replace("a", "")}
    every = pre.FixedLength
    return ({name: bpe(cut) for name, cut in cuts.items()}
            | {name: bpe(pre.Whitespace(), change) for name, change in changes.items()}
            | {"no unknown": bpe(unknown=None), "fused": bpe(fuse_unk=True), "ignore merges": bpe(ignore_merges=True),
               "suffix": bpe(pre.Whitespace(), None, [], end_of_word_suffix="▁"),
               "prefix": bpe(pre.Whitespace(), None, [], continuing_subword_prefix="#"),
               "unigram": unigram(), "unigram ▁": unigram(pre.Metaspace()),
               "bytes ▁": gpt(pre.ByteLevel(True)), "bytes only": gpt(pre.ByteLevel(False, use_regex=False))}
            | {side: gpt(**{side: True}) for side in ("lstrip", "rstrip", "single_word", "normalized")}
            | {"every 3": kmers(every(3)), "every 4": kmers(every(4)), "every 6": kmers(every(6)),
               "every 3 of a word": kmers(pre.WhitespaceSplit(), every(3)),
               "every ...": kmers(pre.Split(Regex("..."), "isolated")),
               "every .{3}": kmers(pre.Split(Regex(".{3}"), "isolated")), "every 6, letters": bpe(every(6)),
               "every 6, then 4": kmers(every(6), every(4)),
               "every 6, then N": bpe(pre.Sequence([every(6), pre.Split("N", "isolated")])),
               "every 70": bpe(every(70)), "every .{70}": bpe(pre.Split(Regex(r"[\s\S]{70}"), "isolated"))})


def whole(text, tokenizer):
    return tokenizer.encode(text, add_special_tokens=False).ids


class Ids:
    """A TokenFile of the ids 0, 1, 2, ..."""
    def __init__(self, n):
        self.n_token, self.tokenizer = n, KINDS["characters"]

    def ids(self, first, last):
        return np.arange(first, last, dtype=np.uint16)

    def byte(self, n):
        return 10 * n


# ---------------------------------------------------------------- tokenizers made by hand, to decode with

def byte_fallback(letters="abc", merges=("▁ a", "a b", "▁a b")):
    """Like Llama's: words with a leading ▁, everything else as bytes <0x..>; the first space is not shown."""
    merges = [tuple(pair.split()) for pair in merges]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *map("".join, merges)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer


def few_words():
    words = ["[UNK]", "[CLS]", "a", "b", "##b", "ab", "##c", ".", "却", "👍"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    tokenizer.normalizer, tokenizer.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


@functools.cache
def decoding():
    """One tokenizer for each way of putting tokens together."""
    with tempfile.TemporaryDirectory() as folder:
        byte_level = load_tokenizer(make_tokenizer(Path(folder, "tokenizer.json")))
    return {"byte-level": byte_level, "byte fallback": byte_fallback(), "WordPiece": few_words()}


def in_bytes(words):
    """A tokenizer whose token i is the bytes words[i]."""
    return SimpleNamespace(decode=lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"),
                           id_to_token=lambda i: "")


def streamed(tokenizer, ids):
    """The pieces of the text of ids, as they are shown while a model writes."""
    decoder = Decoder(tokenizer)
    return [piece for piece in [*map(decoder.add, ids), decoder.rest()] if piece]
