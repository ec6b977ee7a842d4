"""Byte-pair encoding by hand, with its merges in the wrong order:  python -m lessons.byte_pairs_in_the_wrong_order

What you see. Fewer than 60 lines, from WORD to `in_order`, learn a vocabulary from a text and cut texts with it. Their
768 merges and 143,506 ids equal those of the tokenizers library. Two other ways to use the same vocabulary cut words
otherwise: the leftmost merge first, 28 % of them, and the longest token first, 6 %. What they give decodes to the text
all the same, so no round trip notices it. But a model that was trained on the right ids reads the same text with 3.20
and 2.14 bits per byte instead of 2.00.

Why. Training begins with the 256 bytes as tokens. Again and again it joins the most frequent pair of neighbours, within
words only, to a new token. What it learns is a list of merges, in order:

    merge n was counted in a text in which merges 1 … n - 1 had been made already

So a word must be cut as training cut it: of all merges that fit, the one learnt first. Any other order makes sequences
of tokens that training hardly ever made, and the model has never learnt what follows them. Ties have an order, too. Of
pairs that are equally frequent, the library joins the one with the lowest ids first, and so does this file.

How nanollm avoids it. It leaves both to the library. A long text is encoded in parts, and tests/test_properties.py
demands the ids of the whole.
"""
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from lessons import common

QUESTION = ("decode(encode(text)) gives back a million different texts. Why does that say nothing about the order of "
            "the merges, and what does?")

# ---------------------------------------------------------------- byte-pair encoding

# GPT-2's words: an ending such as 's, letters, digits, other signs, each with one space before it; and spaces.
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]       # in Latin-1; the library numbers them first
BYTES = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))            # the bytes of the ids 0 … 255
ID = {byte: i for i, byte in enumerate(BYTES)}


def merge(ids, pair, new):
    """ids with `new` in place of each `pair`, from left to right."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


def learn(text, size):
    """(tokens, merges): {bytes: id} of `size` tokens, and {(left, right): the id of both together}, in their order."""
    words = Counter(WORD.findall(text))
    cuts, often = [[ID[byte] for byte in word.encode()] for word in words], list(words.values())
    count, where = Counter(), defaultdict(set)          # of each pair: how often it occurs, and in which words

    def add(n, sign):
        for pair in itertools.pairwise(cuts[n]):
            count[pair] += sign * often[n]
            where[pair].add(n)

    for n in range(len(cuts)):
        add(n, 1)
    tokens, merges = {bytes([byte]): i for i, byte in enumerate(BYTES)}, {}
    while len(tokens) < size and max(count.values(), default=0) > 0:
        pair = min(count, key=lambda pair: (-count[pair], pair))        # the most frequent; of equals, the lowest ids
        names = list(tokens)
        merges[pair] = tokens.setdefault(names[pair[0]] + names[pair[1]], len(tokens))
        for n in where.pop(pair):
            add(n, -1)
            cuts[n] = merge(cuts[n], pair, merges[pair])
            add(n, 1)
    return tokens, merges


def pairs_of(ids, merges):
    """The pairs in ids that have a merge, from left to right."""
    return [pair for pair in itertools.pairwise(ids) if pair in merges]


def in_order(word, tokens, merges):
    """The ids of a word: of all merges that fit, the one that was learnt first, until none fits."""
    rank, ids = {pair: n for n, pair in enumerate(merges)}, [ID[byte] for byte in word.encode()]
    while known := pairs_of(ids, merges):
        pair = min(known, key=rank.get)
        ids = merge(ids, pair, merges[pair])
    return ids


# ---------------------------------------------------------------- two mistakes

def leftmost_first(word, tokens, merges):
    """Wrong: of all merges that fit, the leftmost."""
    ids = [ID[byte] for byte in word.encode()]
    while known := pairs_of(ids, merges):
        ids = merge(ids, known[0], merges[known[0]])
    return ids


def longest_first(word, tokens, merges):
    """Wrong: the longest token with which the rest of the word begins."""
    ids, rest = [], word.encode()
    while rest:
        size = next(n for n in range(len(rest), 0, -1) if rest[:n] in tokens)
        ids, rest = [*ids, tokens[rest[:size]]], rest[size:]
    return ids


def encode(text, cut, tokens, merges):
    """The ids of a text whose words are cut by this function."""
    cut_once = lru_cache(None)(lambda word: cut(word, tokens, merges))
    return np.array([i for word in WORD.findall(text) for i in cut_once(word)])


def library_of(text, size):
    """A tokenizer of the tokenizers library, trained on the same text, and its merges as pairs of ids."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(bpe.to_str())["model"]
    return bpe, [tuple(model["vocab"][token] for token in pair) for pair in model["merges"]]


def bits_per_byte(model, ids, n_byte):
    """The model's loss on these ids of a text of n_byte bytes: in windows that do not overlap, in bits per byte."""
    T = model.config.max_context
    end = (len(ids) - 1) // T * T
    loss = common.loss_by_position(model, ids[:end].reshape(-1, T), ids[1:end + 1].reshape(-1, T)).mean()
    return loss * len(ids) / n_byte / math.log(2)


def main(text=None, size=1024, steps=400, **shape):
    text = text or common.decode(*common.read_text())
    middle = len(text) * 9 // 10
    start, rest = text[:middle], text[middle:]
    tokens, merges = learn(start, size)
    library, theirs = library_of(start, size)
    ids = encode(start, in_order, tokens, merges)
    equal = theirs == list(merges), *(library.encode(part).ids == encode(part, in_order, tokens, merges).tolist()
                                      for part in (start, rest))
    print(f"{len(merges)} merges and {len(ids):,} ids equal the library's: {equal}")
    model = common.small_model(len(tokens), **shape)
    common.train(model, ids, steps)
    words, names, found, n_byte = Counter(WORD.findall(rest)), list(tokens), {}, len(rest.encode())
    cuts = {cut: {word: cut(word, tokens, merges) for word in words}
            for cut in (in_order, leftmost_first, longest_first)}
    differ = lambda word: word.strip().isalpha() and len({tuple(of_word[word]) for of_word in cuts.values()}) == 3
    example = next(filter(differ, words), " ")
    for cut, of_word in cuts.items():
        ids = encode(rest, cut, tokens, merges)
        other = sum(n for word, n in words.items() if of_word[word] != cuts[in_order][word]) / words.total()
        again = b"".join(names[i] for i in ids).decode() == rest
        pieces = "|".join(names[i].decode(errors="replace") for i in of_word[example])
        bits = bits_per_byte(model, ids, n_byte)
        print(f"{cut.__name__}: {n_byte / len(ids):.2f} bytes per token; {other:.0%} of the words cut otherwise, such "
              f"as {pieces!r}\n    the ids decode to the text: {again}; loss {bits:.2f} bits per byte")
        found[cut.__name__.replace("_", " ")] = pieces, other, again, bits
    return equal, found


@common.defaults()
def draw(equal, found):
    drawing, axes = common.figure("Same vocabulary, same text: only one order of the merges is the model's",
                                  ("loss of one model on the same text (bits per byte)", ""))
    for y, (pieces, _, _, bits) in enumerate(found.values()):
        colour = common.WRONG if y else common.RIGHT
        axes.barh(y, bits, 0.6, color=colour)
        axes.text(0.06, y, pieces.replace(" ", "␣"), color="white", va="center", fontsize=13, family="monospace")
        common.note(axes, f"{bits:.2f}", (bits, y), (5, -4), colour)
    labels = [f"{name}:\n{other:.0%} of words cut otherwise" for name, (_, other, _, _) in found.items()]
    axes.set(yticks=range(len(found)), yticklabels=labels, xlim=(0, 1.1 * max(bits for *_, bits in found.values())))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    common.save(drawing, "byte_pairs_in_the_wrong_order")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# However a text is cut into tokens, they decode to that text; 256 single bytes do so, too. A round trip shows that
# nothing is lost, not where the cuts are. Compare the ids with those of the tokenizer that the model was trained with,
# on texts with spaces, digits, other scripts and repeated letters.
