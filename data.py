"""From a text file to batches: sliding windows over the text's token ids, in an endless stream.

    text, tokenizer ─► ids on disk ─► windows x, y (T,) ─► batches x, y (B, T)

The model learns to predict y from x, and y is x one token later: every position of a window is a
training example.
"""
import functools
import math

import numpy as np

from storage.files import require
from storage.tokens import cached_tokens, load_tokenizer, refuse_short, vocab_size


def cut(ids, indices, seq_len, stride):
    """x and y, (..., T) each, int64, of the windows with these indices (...); T is seq_len.

    Window i begins at s = i * stride: x = ids[s : s + T], y = ids[s + 1 : s + T + 1]. The last one
    is shifted left so that it ends with the last id: no id is left out.

    >>> x, y = cut(np.arange(7), [0, 1, 2], seq_len=3, stride=2)
    >>> x.tolist(), y.tolist()          # the last one would begin at 4: shifted to 3
    ([[0, 1, 2], [2, 3, 4], [3, 4, 5]], [[1, 2, 3], [3, 4, 5], [4, 5, 6]])
    """
    start = np.minimum(np.asarray(indices) * stride, len(ids) - seq_len - 1)
    at = start[..., None] + np.arange(seq_len)                                      # (..., T)
    return ids[at].astype(np.int64), ids[at + 1].astype(np.int64)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n windows in an epoch. The cache holds two: a batch may straddle two epochs."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class TokenDataset:
    """The windows of ids[first:last] of a text's TokenFile, source_bytes bytes of its UTF-8."""
    def __init__(self, file, first, last, seq_len, stride):
        self.file, self.first, self.last = file, first, last
        self.seq_len, self.stride = seq_len, stride
        self.vocab_size = vocab_size(file.tokenizer)
        self.source_bytes = file.byte(last) - file.byte(first)

    @classmethod
    def from_text(cls, text, tokenizer, seq_len, stride=None):
        """The windows of a text file; `tokenizer` is a tokenizer.json; stride None: seq_len // 2.

        Warns if over 1 % of the characters are unknown. Raises InputError for what it cannot use.
        """
        stride = max(1, seq_len // 2) if stride is None else stride
        require(seq_len >= 1, f"seq_len {seq_len}: must be at least 1")
        require(1 <= stride <= seq_len, f"stride {stride}: must be from 1 to seq_len, {seq_len}; "
                "a larger one would skip tokens")
        file = cached_tokens(text, load_tokenizer(tokenizer), seq_len)
        refuse_short(f"the text {text}", file.n_token, seq_len)
        file.warn_of_lost(tokenizer)
        return cls(file, 0, file.n_token, seq_len, stride)

    @property
    def tokens(self):
        """The ids, 1-D, uint16 or uint32, mapped from disk."""
        return self.file.ids(self.first, self.last)

    def __len__(self):
        """One window, and one for each further stride until a window reaches the last id."""
        return 1 + math.ceil((self.last - self.first - self.seq_len - 1) / self.stride)

    def windows(self, indices):
        """x and y, (..., T) each, of the windows with these indices (...)."""
        return cut(self.tokens, indices, self.seq_len, self.stride)

    def __getitem__(self, i):
        """x and y, (T,) each, of window i, or of the i-th from the end if i < 0."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return self.windows(i % len(self))

    def batch(self, start, size, seed):
        """x and y, (B, T) each: windows number start … start + size - 1 of an endless stream.

        In the stream every window comes once per epoch, each epoch in its own order. The result
        depends on the arguments alone, so a resumed run gets the same batches if it remembers one
        number: how many windows it has taken (State.windows in a checkpoint's trainer.json).
        """
        epochs, places = np.divmod(np.arange(start, start + size), len(self))
        indices = [permutation(len(self), seed, epoch)[place]
                   for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]
        return self.windows(indices)

    def in_order(self, size):
        """Yield x, y, new: the windows in order, x and y (B, T), B ≤ size, to score the text.

        `new`, an int, counts the targets at the end of each row that no earlier window had: T in
        window 0, then `stride`. No window is shifted, because each target must count once: what is
        left comes as one row of T - stride + left. Every id but the first is a new target once,
        with at least T - stride + 1 ids before it, or all there are.
        """
        n, left = divmod(len(self.tokens) - 1 - self.seq_len, self.stride)
        yield *self.windows([0]), self.seq_len
        for i in range(1, n + 1, size):
            yield *self.windows(np.arange(i, min(i + size, n + 1))), self.stride
        if left:
            rest = self.tokens[(n + 1) * self.stride:].astype(np.int64)[None]
            yield rest[:, :-1], rest[:, 1:], left

    def split(self, val_fraction):
        """(train, val): the first 1 - val_fraction of the ids, and the rest (None for 0).

        They are divided before windows are cut: no id is in both. val's stride is seq_len.
        """
        require(0 <= val_fraction < 1,
                f"val_fraction {val_fraction}: must be at least 0 and less than 1")
        if val_fraction == 0:
            return self, None
        n, T = self.last - self.first, self.seq_len
        n_val = round(n * val_fraction)
        refuse_short(f"the training part, with --val-fraction {val_fraction},", n - n_val, T)
        refuse_short(f"the validation part, with --val-fraction {val_fraction},", n_val, T)
        return (TokenDataset(self.file, self.first, self.last - n_val, T, self.stride),
                TokenDataset(self.file, self.last - n_val, self.last, T, T))
