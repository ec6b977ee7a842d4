"""Dropout's random numbers, the same on either device: computed from a counter, not drawn from a generator.

Element i gets the random number of counter start + i in Squares (Widynski 2020: four rounds, 32 bits). `start` and the
odd factor come from the key. No state is advanced, so all numbers are computed at once, and again whenever needed.
"""
import math

import numpy as np

from hardware import device

BLOCK = 1 << 16         # elements of a sweep's block: 64-bit temporaries must stay in the cache


def drop(x, p, key):
    """x with each element set to 0 with probability p, and divided by 1 - p otherwise.

    `key`, a tuple of whole numbers of at least 0, decides which. Its last is the number of x's first row: a row has the
    same elements dropped at any place in a batch. The result has x's shape and dtype.
    """
    *key, first = key
    words = np.random.SeedSequence(key).generate_state(2, np.uint64)
    start, odd, limit = words[0], words[1] | np.uint64(1), np.uint64(round(p * 2 ** 32))
    wide = np.float32 if x.dtype.itemsize == 2 else x.dtype.type
    scale = wide(1 / (1 - p))                   # typed: a fused kernel must not become float64
    out, flat, before = device.xp.empty(x.shape, x.dtype), x.reshape(-1), first * math.prod(x.shape[1:])

    def block(s):
        i = device.xp.arange(before + s.start, before + s.stop, dtype=np.uint64)
        _drop(flat[s], i, start, odd, limit, scale, out.reshape(-1)[s])
    device.sweep(block, flat.size, BLOCK)
    return out


@device.fuse
def _drop(x, i, start, odd, limit, scale, out):
    half = np.uint64(32)
    y = (i + start) * odd
    z = y + odd
    r = y * y + y                               # round 1
    r = (r >> half) | (r << half)
    r = r * r + z                               # round 2
    r = (r >> half) | (r << half)
    r = r * r + y                               # round 3
    r = (r >> half) | (r << half)
    out[...] = x * (((r * r + z) >> half) >= limit) * scale     # round 4
