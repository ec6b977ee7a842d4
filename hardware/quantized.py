"""A matrix in 8 or 4 bits: whole numbers and scales, made into float32 again a block at a time, where they are used.

    w ≈ ŵ = q · scale,   q = round(w / scale),   scale = m / low,   low … high = -127 … 127 (8 bits) or -8 … 7 (4 bits)

One scale serves a row (8 bits) or 64 neighbours of a row (4 bits); m is the one of them that is farthest from 0. The
sign of scale puts m on `low`, and every other weight is off by at most half a step, |scale| / 2, and by rounding. Only
in 4 bits is what lies beyond 7.5 steps on the other side clipped to 7, and off by at most one step. The levels -7 … 7
would clip nothing, but would leave one of 16 levels unused. A few large weights make a step large for all that share
it, hence the small groups where steps are few. 0 stays 0. (Scales below 1e-38, subnormal numbers, are less exact.)
(Absmax quantisation of rows: Dettmers et al. 2022, LLM.int8(), §2.1; of small groups: Dettmers & Zettlemoyer 2023, §2.)

>>> w = np.array([[0.5, -1.0, 0.25]], np.float32)
>>> q, scale = quantize(w, 8)
>>> q.tolist(), scale.tolist()          # -1 is -127 steps of 1/127
([[64, -127, 32]], [[0.007874015718698502]])
"""
import numpy as np

from hardware import device

GROUP = 64              # weights of a row that share a scale, in 4 bits
LEVELS = {8: (-127, 127), 4: (-8, 7)}       # low and high
BOTH = np.stack([np.arange(256) & 15, np.arange(256) >> 4], -1).astype(np.float32) - 8      # the two weights of a byte


def packed_shapes(shape, bits):
    """The shapes in which a matrix (F, C) is stored: of its integers and of its scales."""
    F, C = shape
    groups = -(-C // GROUP)
    return ((F, C), (F, 1)) if bits == 8 else ((F, groups * GROUP // 2), (F, groups))


def quantize(w, bits):
    """(q, scale) of a float32 matrix w (F, C) on the host: int8 (F, C), or for 4 bits uint8, two weights a byte.

    In 4 bits a row is filled up with zeros to whole groups; q + 8 of an even column is in a byte's low half.
    """
    (F, C), (low, high) = w.shape, LEVELS[bits]
    if bits == 4:
        w = np.pad(w, ((0, 0), (0, -C % GROUP))).reshape(F, -1, GROUP)
    scale = np.take_along_axis(w, abs(w).argmax(-1)[..., None], -1) / np.float32(low)
    q = np.rint(np.divide(w, scale, out=np.zeros_like(w), where=scale != 0))
    q = np.clip(q, low, high).astype(np.int8)           # a scale near 1e-45 is not exact
    if bits == 8:
        return q, scale
    q = (q + 8).astype(np.uint8).reshape(F, -1)
    return q[:, ::2] | q[:, 1::2] << 4, scale[..., 0]


class Quantized:
    """A weight matrix (F, C) for inference, held as `quantize` gives it; stands where a Tensor stands.

    Rows become float32 when they are asked for; no more than a block of them at a time on a CPU, a matrix on a GPU.
    """
    requires_grad, dtype, half = False, np.dtype(np.float32), None
    data = property(lambda self: self)

    def __init__(self, q, scale, columns):
        self.q, self.scale = device.xp.asarray(q), device.xp.asarray(scale)
        self.both = device.xp.asarray(BOTH).view(np.float64)[:, 0]      # a pair is copied as one number
        self.shape = len(q), columns

    def __len__(self):
        return self.shape[0]

    def part(self, rows):
        """The matrix of a slice of the rows: the same memory."""
        return Quantized(self.q[rows], self.scale[rows], self.shape[1])

    def astype(self, dtype, copy=False):
        return self                     # its rows are float32, whenever that is

    def __getitem__(self, rows):
        """The rows (…, C) of a slice or of an integer array (…), in float32."""
        q, scale = self.q[rows], self.scale[rows]
        if q.dtype == np.int8:
            return q * scale
        values = self.both.take(q).view(np.float32).reshape(*scale.shape, GROUP)
        values *= scale[..., None]
        return values.reshape(*q.shape[:-1], -1)[..., :self.shape[1]]

    def times(self, x, out):
        """out (N, F) = x (N, C) @ this matrixᵀ. A row's one scale is cheaper on its products than on its weights."""
        def block(s):
            if self.q.dtype == np.int8:
                device.matmul(x, self.q[s].astype(np.float32).T, out=out[:, s])
                out[:, s] *= self.scale[s, 0]
            else:
                device.matmul(x, self[s].T, out=out[:, s])
        device.sweep(block, len(self), (1 << 16) // self.shape[1])
        return out


class QuantizedParameters:
    """What a quantised model has instead of nanollm.Parameters: its `tensor`, `pairs` and `arrays`, but no gradients.

    read(name) yields (rows, these rows) of the arrays as they are stored: a matrix's integers, under name + ".scale"
    its scales, and vectors in float32. `vector` makes what the model computes with out of a vector's array, `pair` what
    `pairs` gives: autograd.Tensor and nanollm.Parameter, which this layer cannot import.
    """
    grad = None

    def __init__(self, shapes, bits, read, vector, pair):
        self.shapes, self.bits, self.vector, self.pair = shapes, bits, vector, pair
        self.read, self.made = read, {}         # made: {names: what `tensor` returned for them}

    def tensor(self, *names):
        """One vector of all, or the Quantized of matrices of one width, their rows below each other."""
        shape = self.shapes[names[0]]
        if len(shape) == 1:
            self.made[names] = self.vector(self._whole(names))
        else:
            self.made[names] = Quantized(self._whole(names), self._whole(names, ".scale"), shape[1])
        return self.made[names]

    def _whole(self, names, kind=""):
        """The arrays of these names, below each other, read a part at a time into one: never all of it twice."""
        whole, end = None, 0
        for part in (part for name in names for _, part in self.read(name + kind)):
            if whole is None:
                whole = np.empty((sum(self.shapes[name][0] for name in names), *part.shape[1:]), part.dtype)
            whole[end:end + len(part)] = part
            end += len(part)
        return whole

    def views(self):
        """{name: the Quantized of a matrix, or a vector's array}: the memory that the model computes with."""
        found = {}
        for names, made in self.made.items():
            end = 0
            for name in names:
                rows = slice(end, end + self.shapes[name][0])
                found[name], end = made.part(rows) if isinstance(made, Quantized) else made.data[rows], rows.stop
        return found

    def pairs(self):
        """{name: Parameter}, to be read: data[:] is an array of float32, grad is None."""
        return {name: self.pair(data, None) for name, data in self.views().items()}

    def arrays(self):
        """{name: array on the host}: what a model's file holds."""
        found = {}
        for name, data in self.views().items():
            parts = {"": data.q, ".scale": data.scale} if isinstance(data, Quantized) else {"": data}
            found |= {name + kind: device.to_host(array) for kind, array in parts.items()}
        return found
