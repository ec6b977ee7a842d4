"""From a text file to batches: sliding windows over its token ids, in an endless stream.

    text, tokenizer --tokens.cached_tokens--> ids on disk --TokenDataset--> windows x, y (T,) --batch--> (B, T)

The model learns to predict y from x, and y is x one token later: every position of a window is a training example.
"""
import functools
import itertools
import warnings

import numpy as np

from storage.files import InputError
from storage.tokens import cached_tokens, load_tokenizer, refuse_short, vocab_size

# ---------------------------------------------------------------- windows and batches

@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n windows in an epoch. The last two are kept, as a batch may straddle two epochs."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class TokenDataset:
    """Windows over consecutive ids: x = ids[s : s + T], y = ids[s + 1 : s + T + 1], both int64.

    Window i begins at s = i * stride, but the last one is moved back to end with the last id: no id is left out.
    Attributes: seq_len, stride, vocab_size, and source_bytes: the UTF-8 bytes of the text that the ids stand for.

    >>> from types import SimpleNamespace as Fake
    >>> text = Fake(tokenizer=Fake(get_vocab=lambda: {"g": 6}), byte=int, ids=np.arange)        # its ids: 0 … 6
    >>> x, y = TokenDataset(text, 0, 7, seq_len=3, stride=2).windows([0, 1, 2])
    >>> x.tolist(), y.tolist()              # the last window would begin at 4: moved back to 3
    ([[0, 1, 2], [2, 3, 4], [3, 4, 5]], [[1, 2, 3], [3, 4, 5], [4, 5, 6]])
    """
    def __init__(self, file, first, last, seq_len, stride):
        self.file, self.first, self.last = file, first, last
        self.seq_len, self.stride = seq_len, stride
        self.vocab_size = vocab_size(file.tokenizer)
        self.source_bytes = file.byte(last) - file.byte(first)

    @classmethod
    def from_text(cls, text, tokenizer, seq_len, stride=None):
        """All of the text file `text`, by the tokenizer.json `tokenizer`; stride: seq_len // 2 if not given.

        Warns if more than 1 % of the tokens are the unknown one. Raises InputError for anything it cannot use.
        """
        stride = max(1, seq_len // 2) if stride is None else stride
        if seq_len < 1:
            raise InputError(f"seq_len {seq_len}: must be at least 1")
        if not 1 <= stride <= seq_len:
            raise InputError(f"stride {stride}: must be from 1 to seq_len, {seq_len}; more would skip tokens")
        file = cached_tokens(text, load_tokenizer(tokenizer), seq_len)
        refuse_short(f"the text {text}", file.n_token, seq_len)
        if file.n_unknown > 0.01 * file.n_token:
            warnings.warn(f"{file.n_unknown / file.n_token:.0%} of the tokens of {text} are unknown to {tokenizer}, "
                          "and no model can learn what they were: a byte-level BPE tokenizer knows every text, a "
                          "WordPiece the languages it was made for (Chinese: bert-base-chinese)", stacklevel=2)
        return cls(file, 0, file.n_token, seq_len, stride)

    @property
    def tokens(self):
        """The ids, 1-D, uint16 or uint32, mapped from disk."""
        return self.file.ids(self.first, self.last)

    def __len__(self):
        # the first window, and steps until a window holds the last id: 1 + ⌈(n - T - 1) / stride⌉ for n ids
        return -((self.seq_len + 1 + self.first - self.last) // self.stride) + 1

    def windows(self, i):
        """x and y of the windows whose numbers i holds, (..., T) each."""
        start = np.minimum(np.asarray(i) * self.stride, self.last - self.first - self.seq_len - 1)
        at = start[..., None] + np.arange(self.seq_len)         # (..., T)
        tokens = self.tokens
        return tokens[at].astype(np.int64), tokens[at + 1].astype(np.int64)

    def __getitem__(self, i):
        """x and y, (T,) each, of window i, or of the i-th from the end if i < 0."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return self.windows(i % len(self))

    def batch(self, start, size, seed):
        """x and y, (B, T) each: windows number start to start + size - 1 of an endless stream, in which every
        window comes once per epoch, each epoch in its own order. The result depends on the arguments alone.
        """
        epoch, place = np.divmod(np.arange(start, start + size), len(self))
        return self.windows(np.concatenate([permutation(len(self), seed, e)[place[epoch == e]]
                                            for e in range(epoch[0], epoch[-1] + 1)]))

    def in_order(self, size):
        """Yield x, y, new: the windows in order, (B, T) each, and last a shorter row, if ids are left. `new` counts
        the targets at the end of each row that no earlier window had: T in the first window, then stride, then the
        rest. So every id but the first is a new target exactly once, with at least seq_len - stride + 1 ids before it,
        or all there are.
        """
        n, T, step = self.last - self.first - 1, self.seq_len, self.stride
        whole = (n - T) // step + 1
        for a, b in itertools.pairwise([0, *range(int(step < T), whole, size), whole]):
            if a < b:
                yield *self.windows(np.arange(a, b)), step if a else T
        if left := (n - T) % step:
            rest = self.tokens[whole * step:].astype(np.int64)[None]
            yield rest[:, :-1], rest[:, 1:], left

    def split(self, val_fraction):
        """(train, val): the head of the ids and their tail, val_fraction of them, divided before windows are cut:
        no id is in both. val's stride is seq_len; it is None if val_fraction is 0. Raises InputError.
        """
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction {val_fraction}: must be at least 0 and less than 1")
        if val_fraction == 0:
            return self, None
        n = self.last - self.first
        cut = self.last - round(n * val_fraction)
        refuse_short(f"the training part, 1 - {val_fraction} of {n} tokens,", cut - self.first, self.seq_len)
        refuse_short(f"the validation part, {val_fraction} of {n} tokens,", self.last - cut, self.seq_len)
        return (TokenDataset(self.file, self.first, cut, self.seq_len, self.stride),
                TokenDataset(self.file, cut, self.last, self.seq_len, self.seq_len))
