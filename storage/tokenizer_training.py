"""A byte-level BPE tokenizer, made from a text: for a run without --tokenizer, the demo and extras.make_tokenizer.

It knows every text, because its smallest tokens are the 256 bytes. The others are made of pairs that occur most often.
"""
import hashlib
import itertools
import os

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from storage.files import file_hash, whole
from storage.texts import END
from storage.tokens import read_text, showing, writable_cache

SAMPLE = 1 << 23        # bytes of a text that are looked at
LEAST = 257             # the bytes and END


def byte_bpe(texts, words, special=()):
    """A tokenizers.Tokenizer of at most `words` tokens, trained on an iterable of str; special tokens come first.

    The same texts give the same tokenizer. Chinese and Japanese are cut into pairs of characters for the training
    alone. They have no spaces, so each clause would be a new word, and training would take three times as long and
    memory that grows with the text; the tokens would be 7 % longer.
    """
    bpe, by_bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs = pre_tokenizers.Split(Regex(r"[\p{Han}\p{Hiragana}\p{Katakana}]{1,2}"), "isolated")
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([pairs, by_bytes]), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=words, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special)))
    bpe.pre_tokenizer = by_bytes
    return bpe


def usual_size(n_byte):
    """The size of the vocabulary for a text of n_byte bytes: a 500th of them, as a power of two from 512 to 8,192.

    >>> [usual_size(n) for n in (1000, 300_000, 2_100_000, 10**9)]
    [512, 512, 4096, 8192]
    """
    return 1 << min(max((n_byte // 500).bit_length() - 1, 9), 13)


def sample(text):
    """Yield blocks from all over a text, at most SAMPLE bytes in all, without END."""
    size, n_byte = os.path.getsize(text), 0
    every = 1 + size // SAMPLE
    with showing(f"making a tokenizer from {text}", size // every) as show:
        for block in itertools.islice(read_text(text, hashlib.sha256()), 0, None, every):
            yield from block.split(END)
            n_byte += len(block.encode())
            show(n_byte)


def trained_tokenizer(text, words=None):
    """The tokenizer of a UTF-8 text file; words None: `usual_size`. Raises InputError if the text cannot be used."""
    return byte_bpe(sample(text), words or usual_size(os.path.getsize(text)), [END])


def cached_tokenizer(text, words=None):
    """The path of `trained_tokenizer`'s tokenizer.json in the cache. Raises InputError."""
    recipe = f"nanollm tokenizer 1, {tokenizers.__version__}, {SAMPLE}, {words}, {file_hash(text)}"
    with writable_cache() as folder:
        path = folder / f"{hashlib.sha256(recipe.encode()).hexdigest()}.tokenizer.json"
        if not path.exists():
            made = trained_tokenizer(text, words)
            with whole(path) as draft:
                made.save(str(draft))
    return str(path)
