"""Reverse-mode automatic differentiation over arrays, every backward pass derived and written by hand.

An op computes its result and leaves behind a function that turns dout = dLoss/dout into the gradients of its
inputs. The recorded ops form a graph, each result pointing to its inputs; its leaves are the tensors that no op made,
such as weights. `backward` walks it from the loss to the leaves and applies the chain rule at each op. That is the
engine: under two hundred lines. The rest of this file is one function per op, in the order in which the model needs
them, and at the end the check that each of them has to pass.

Shapes: B batch, T time, S keys (S >= T), C width, H heads, K key/value heads, D = C/H, F hidden width, V vocabulary,
N rows: all leading axes as one, (..., C) -> (N, C).

On `device` (hardware/device.py, to be read later): `xp` is NumPy or CuPy; `matmul(a, b)` is `a @ b`, with `out=c`
written into `c` and with `accumulate=True` added to it; `row_dot(a, b)` is `(a * b).sum(-1, keepdims=True)`;
`sweep(f, n, block)` calls `f` with slices that together are `range(n)`, a block of rows at a time, so that they stay in
the cache; `fuse` marks a formula that becomes one kernel on a GPU.

dx is dLoss/dx and has x's shape; * works element by element, @ is the matrix product. Two rules give most derivations:

    a value used in several places receives the sum of what the places send back (so a broadcast's backward is a sum);
    for out = a @ b:  da = dout @ bᵀ,  db = aᵀ @ dout  (the only products whose shapes fit).

>>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> loss = (x * x).sum()                # 1 + 4 + 9
>>> loss.backward()
>>> loss.data.item(), x.grad.tolist()   # d(x²)/dx = 2x
(14.0, [2.0, 4.0, 6.0])
"""
import builtins
import functools
import math
from contextlib import contextmanager

import numpy as np

from hardware import device
from hardware.quantized import Quantized

# ---------------------------------------------------------------- the engine

_recording = True


@contextmanager
def no_grad():
    """Inside, ops compute but record nothing: no graph, no memory kept for a backward pass."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


def recording(*tensors):
    """Whether an op on these tensors has to remember how it was done."""
    return _recording and any(t.requires_grad for t in tensors)


class Node:
    """How a result came about: the nodes of its inputs, and the function from dout to the inputs' gradients.

    It does not hold the result: backward functions hold the arrays that they need, all others can be freed at once.
    An input that requires no gradient is None here, a leaf is the Tensor itself, where its gradient will be kept.
    """
    __slots__ = ("parents", "backward", "shape", "dtype")


class Tensor:
    """An array and, unless it is a leaf, the Node that says how it came about.

    `data` is an array of device.xp, kept as it is (a float array keeps its dtype). `grad` is None, or for a leaf
    after `backward` the array dLoss/ddata; it grows by each further backward until somebody clears it.
    Raises TypeError for requires_grad=True on numbers that are not floats.
    """
    __slots__ = ("data", "requires_grad", "grad", "_node")
    __array_ufunc__ = None              # array * tensor: NumPy must ask the tensor

    def __init__(self, data, requires_grad=False):
        self.data = device.xp.asarray(data)
        if requires_grad and self.data.dtype.kind in "biu":
            raise TypeError(f"requires_grad needs floating-point data, not {self.data.dtype}")
        self.requires_grad = requires_grad
        self.grad = None
        self._node = None

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)

    def __repr__(self):
        return f"Tensor({self.data}{', requires_grad=True' if self.requires_grad else ''})"

    def backward(self, dout=None):
        """Add dLoss/dleaf to `grad` of every leaf below; dout = dLoss/dself, by default 1 for a scalar.

        The graph is taken apart on the way, so the memory of each op goes back as soon as its gradient is done.
        Raises RuntimeError without a graph, for a second call on the same one, and for a missing dout.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor depends on nothing that requires a gradient")
        if dout is None:
            if self.data.size != 1:
                raise RuntimeError(f"backward: a tensor of shape {self.shape} needs dout; only a scalar has a default")
            dout = 1.0
        dout = device.xp.broadcast_to(device.xp.asarray(dout, self.dtype), self.shape)
        root = self._node or self
        order, gradients = _topological(root), {id(root): _Sum(root, dout)}
        while order:
            node = order.pop()
            gradient = gradients.pop(id(node)).array
            if isinstance(node, Tensor):        # a leaf: its .grad already is the sum
                continue
            parents, backward = node.parents, node.backward
            node.parents, node.backward = (), _freed
            for parent, dparent in zip(parents, backward(gradient), strict=True):
                if parent is not None:
                    if id(parent) not in gradients:
                        gradients[id(parent)] = _Sum(parent)
                    gradients[id(parent)].add(dparent)


def _freed(dout):
    raise RuntimeError("backward: this graph was used and freed by an earlier backward; run the forward pass again")


def _topological(root):
    """All nodes below root, inputs before the results they lead to; no recursion, so no depth limit."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent in getattr(node, "parents", ()) if parent is not None)
    return order


class _Sum:
    """The gradient of one node while its users send their parts.

    A part is an array, or a function that is given the sum so far and adds its part in place: a weight's gradient then
    goes straight into the buffer where it is wanted, a slice's into its place, an embedding's into the rows it touches.
    """
    def __init__(self, node, array=None):
        self.node = node
        self.leaf = isinstance(node, Tensor)
        self.array = node.grad if self.leaf else None
        self.owned = self.leaf          # may be added to in place: nobody else holds it
        if array is not None:
            self.add(array)

    def add(self, part):
        shape, dtype = self.node.shape, self.node.dtype
        if callable(part):
            if self.array is None:
                self.array = device.xp.zeros(shape, dtype)
            elif not self.owned:
                self.array = self.array.copy()
            self.owned = True
            part(self.array)
        else:
            part = _unbroadcast(part, shape)
            if part.dtype != dtype:
                raise TypeError(f"a {dtype} value received a {part.dtype} gradient")
            if self.array is None:
                self.array = part.copy() if self.leaf else part         # perhaps shared: then not ours to change
            elif self.owned:
                self.array += part
            else:
                self.array, self.owned = self.array + part, True
        if self.leaf:
            self.node.grad = self.array


def _unbroadcast(gradient, shape):
    """The transpose of broadcasting: sum over the axes along which a value of this shape was repeated."""
    extra = gradient.ndim - len(shape)
    if extra > 0:
        gradient = _total(gradient, tuple(range(extra)))
    repeated = tuple(i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] != 1)
    if repeated:
        gradient = _total(gradient, repeated, keepdims=True)
    if gradient.shape != shape:
        raise ValueError(f"a gradient of shape {gradient.shape} reached a value of shape {shape}")
    return gradient


def _wide(x):
    """x, in float32 if it is of half precision: before sums, exponentials and normalisations."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def _wide_dtype(x):
    return np.dtype(np.float32) if x.dtype.itemsize == 2 else x.dtype


def _total(x, axis, keepdims=False):
    return x.sum(axis=axis, keepdims=keepdims, dtype=_wide_dtype(x)).astype(x.dtype, copy=False)


def _result(data, parents, backward):
    """What an op returns. `backward` holds arrays, not the returned Tensor: a reference cycle would keep its memory."""
    out = Tensor(data)
    if recording(*parents):
        out.requires_grad, out._node = True, Node()
        out._node.parents = tuple((t._node or t) if t.requires_grad else None for t in parents)
        out._node.backward, out._node.shape, out._node.dtype = backward, out.shape, out.dtype
    return out


def _tensors(a, b):
    """Both as Tensors; a Python number or a plain array takes the other's dtype (so nothing becomes float64)."""
    dtype = a.dtype if isinstance(a, Tensor) else b.dtype
    return [x if isinstance(x, Tensor) else Tensor(device.xp.asarray(x, dtype)) for x in (a, b)]


# ---------------------------------------------------------------- elementwise

def add(a, b):
    """out = a + b;  da = dout,  db = dout.  Broadcasts; the engine sums the gradient back."""
    a, b = _tensors(a, b)
    return _result(a.data + b.data, (a, b), lambda dout: (dout, dout))


def sub(a, b):
    """out = a - b;  da = dout,  db = -dout."""
    a, b = _tensors(a, b)
    return _result(a.data - b.data, (a, b), lambda dout: (dout, -dout))


def neg(x):
    """out = -x;  dx = -dout."""
    return _result(-x.data, (x,), lambda dout: (-dout,))


def mul(a, b):
    """out = a * b;  da = dout * b,  db = dout * a."""
    a, b = _tensors(a, b)
    x, y = a.data, b.data
    return _result(x * y, (a, b), lambda dout: (dout * y, dout * x))


def div(a, b):
    """out = a / b;  da = dout / b,  db = -dout * a / b² = -da * out."""
    a, b = _tensors(a, b)
    y, out = b.data, a.data / b.data

    def backward(dout):
        da = dout / y
        return da, -da * out
    return _result(out, (a, b), backward)


def power(x, p):
    """out = x**p for a Python number p;  dx = dout * p * x**(p-1).  The square root is power(x, 0.5)."""
    data = x.data
    return _result(data ** p, (x,), lambda dout: (dout * (p * data ** (p - 1)),))


def cast(x, dtype):
    """The same numbers in another floating-point type;  dx is dout in x's own."""
    old = x.dtype
    return x if old == dtype else _result(x.data.astype(dtype), (x,), lambda dout: (dout.astype(old),))


# ---------------------------------------------------------------- shape

def sum(x, axis=None, keepdims=False):
    """out = sum of x over `axis` (an int, a tuple, or None: all);  dx = dout, repeated along the summed axes."""
    data = x.data
    axes = tuple(range(data.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(a % data.ndim for a in axes)

    def backward(dout):
        kept = tuple(1 if i in axes else size for i, size in enumerate(data.shape))
        return (device.xp.broadcast_to(dout.reshape(kept), data.shape),)
    return _result(_total(data, axes, keepdims), (x,), backward)


def mean(x, axis=None, keepdims=False):
    """out = sum(x) / n, n the number of summed elements;  dx = dout / n, repeated."""
    total = sum(x, axis, keepdims)
    return mul(total, total.data.size / x.data.size)


def reshape(x, *shape):
    """The same elements in another shape;  dx is dout in x's shape."""
    shape, old = shape[0] if isinstance(shape[0], tuple) else shape, x.shape
    return _result(x.data.reshape(shape), (x,), lambda dout: (dout.reshape(old),))


def transpose(x, *axes):
    """Axis i of out is axis axes[i] of x (by default all reversed);  dx: dout with the axes put back."""
    axes = axes or tuple(range(x.data.ndim))[::-1]

    def backward(dout):
        return (dout.transpose(sorted(range(len(axes)), key=lambda i: axes[i] % len(axes))),)
    return _result(x.data.transpose(axes), (x,), backward)


_INDEX = int, slice, type(Ellipsis)


def getitem(x, index):
    """out = x[index] for ints and slices, which meet no element twice;  dx is dout there and 0 elsewhere."""
    for part in index if isinstance(index, tuple) else (index,):
        if not isinstance(part, _INDEX) or isinstance(part, bool):
            raise TypeError(f"a tensor is indexed by ints and slices, not by {type(part).__name__} (rows: embedding)")

    def backward(dout):
        def add_in_place(dx):
            dx[index] += dout
        return (add_in_place,)
    return _result(x.data[index], (x,), backward)


# ---------------------------------------------------------------- products

def _flat(x):
    """(..., C) -> (N, C): a view wherever the leading axes lie evenly."""
    return x.reshape(-1, x.shape[-1])


def _t(x):
    return x.swapaxes(-1, -2)


def matmul(a, b):
    """out = a @ b, a (..., m, k), b (..., k, n), leading axes broadcast.

    out_ij = sum_k a_ik b_kj, so da_ik = sum_j dout_ij b_kj and db_kj = sum_i a_ik dout_ij, that is
        da = dout @ bᵀ,   db = aᵀ @ dout      (and the sum over broadcast axes, in the engine)
    """
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    x, y = (device.xp.broadcast_to(t.data, lead + t.shape[-2:]) for t in (a, b))
    return _result(device.matmul(x, y), (a, b),
                   lambda dout: (device.matmul(dout, _t(y)), device.matmul(_t(x), dout)))


def _rows_times(rows, weight, out=None):
    """rows (N, C) @ weightᵀ, weight (F, C) an array, or Quantized (8 or 4 bits: quantized.py) -> (N, F)"""
    if isinstance(weight, Quantized):
        return weight.times(rows, device.xp.empty((len(rows), len(weight)), rows.dtype) if out is None else out)
    return device.matmul(rows, _t(weight.astype(rows.dtype, copy=False)), out=out)


def linear(x, w):
    """out = x @ wᵀ, x (..., C), w (F, C) as PyTorch and Hugging Face store it -> (..., F).

    `matmul` with b = wᵀ, all leading axes of x being rows: dx = dout @ w, and dw = (xᵀ @ dout)ᵀ = doutᵀ @ x,
    added by the product itself to the gradient that w has so far.

    Mixed precision: for x in half precision w is rounded to x's type for the product, but stays float32 itself, and
    so does dw: an update far below w's size would be lost in half.  (Micikevicius et al. 2018, §3.1)
    """
    rows, weight, shape = _flat(x.data), w.data, x.shape

    def backward(dout):
        dout = _flat(dout)
        dx = device.matmul(dout, weight.astype(dout.dtype, copy=False)).reshape(shape)
        return dx, lambda dw: device.matmul(_t(dout), rows, out=dw, accumulate=True)
    return _result(_rows_times(rows, weight).reshape(*shape[:-1], len(weight)), (x, w), backward)


def token_ids(ids, limit):
    """`ids` as an integer array on the device. A GPU wraps a wrong index around silently, so host ids are checked here.

    Raises TypeError for numbers that are not integers and IndexError for one outside 0 … limit-1.
    """
    if isinstance(ids, device.xp.ndarray) and device.on_gpu:
        return ids                      # was checked when it left the host
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids must be integers, not {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < limit:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise IndexError(f"token id {wrong} is outside 0 … {limit - 1}: is this the model's tokenizer?")
    return device.xp.asarray(ids)


def embedding(w, ids):
    """out = w[ids], w (V, C), integer ids of any shape -> (*ids.shape, C).

    Row v of w went wherever ids == v, so dw_v is the sum of dout over those places; the other rows get nothing
    and are not touched. (On a GPU the order of that sum varies from run to run; no other op does that.)
    """
    ids = token_ids(ids, len(w.data))

    def backward(dout):
        return (lambda dw: device.add_rows(dw, ids.reshape(-1), _flat(dout)),)
    return _result(w.data[ids], (w,), backward)


# ---------------------------------------------------------------- rows: softmax and normalisation

_CACHE = 1 << 16        # elements in a sweep's block: few enough for the cache, enough that Python is no bottleneck


def _sweep_rows(f, *shape):
    """Sweep over `shape[0]` rows of shape[1:] elements, as many at a time as stay in the cache."""
    return device.sweep(f, shape[0], _CACHE // max(math.prod(shape[1:]), 1))


def softmax(x):
    """out_i = exp(x_i) / sum_j exp(x_j) over the last axis.

    Subtracting the row's maximum changes nothing (it cancels) and keeps exp in range; -inf gives an exact 0.
    By the quotient rule d out_i / d x_j = out_i (1[i = j] - out_j), where 1[i = j] is 1 for i = j, else 0, so
        dx_j = sum_i dout_i out_i (1[i = j] - out_j) = out_j (dout_j - sum_i dout_i out_i)
    With a dout of ones dx is 0, and many a wrong formula gives 0, too: a gradient check needs a random dout.

    >>> x = Tensor(np.log([1.0, 3.0]), requires_grad=True)
    >>> p = softmax(x)                      # 1/4 and 3/4
    >>> p.backward([1.0, 0.0])              # sum dout · p = 1/4, so dx = 1/4 · (1 - 1/4), 3/4 · (0 - 1/4)
    >>> p.data.round(4).tolist(), x.grad.round(4).tolist()
    ([0.25, 0.75], [0.1875, -0.1875])
    """
    rows, shape = _flat(x.data), x.shape
    p = device.xp.empty(rows.shape, x.dtype)

    def forward(s):
        block = _wide(rows[s])
        block = device.xp.exp(block - block.max(-1, keepdims=True))
        p[s] = block / block.sum(-1, keepdims=True)
    _sweep_rows(forward, *rows.shape)

    def backward(dout):
        dout, dx = _flat(dout), device.xp.empty_like(p)

        def block(s):
            part, d = _wide(p[s]), _wide(dout[s])
            dx[s] = part * (d - (d * part).sum(-1, keepdims=True))
        _sweep_rows(block, *p.shape)
        return (dx.reshape(shape),)
    return _result(p.reshape(shape), (x,), backward)


def rmsnorm(x, w, eps=1e-6):
    """out = n * w,  n = x * r,  r = (mean(x²) + eps)^(-1/2) per row;  x (..., C), w (C,).  (Zhang & Sennrich 2019, §4)

    n receives dn = dout * w. x_i enters n_i directly and every n_j through r, which receives sum_j dn_j x_j, and with
    dr/dx_i = -½ r³ · 2 x_i/C = -r³ x_i/C
        dx_i = r dn_i - r³ x_i/C · sum_j dn_j x_j
             = r dn_i - x_i · r³ mean(dn * x)                   and with x = n/r
             = r (dn_i - n_i · mean(dn * n))        # dn without its part along n, for mean(n²) = 1 (but for eps)
        dw   = sum over rows of dout * n = rᵀ @ (dout * x)      # w is broadcast over the rows
    Saved: r, one number per row. n is never needed: the first form of dx and the last of dw do with x.

    >>> x, w = Tensor([[1.0, 7.0]], requires_grad=True), Tensor([1.0, 1.0], requires_grad=True)
    >>> out = rmsnorm(x, w, eps=0)          # mean(x²) = (1 + 49)/2 = 25, r = 1/5, n = (0.2, 1.4)
    >>> out.backward([[1.0, 0.0]])          # mean(dn · n) = 0.1, so dx = 1/5 · (1 - 0.2 · 0.1, 0 - 1.4 · 0.1)
    >>> out.data.round(4).tolist(), x.grad.round(4).tolist(), w.grad.round(4).tolist()
    ([[0.2, 1.4]], [[0.196, -0.028]], [0.2, 0.0])
    """
    rows, weight, shape, C = _flat(x.data), w.data, x.shape, x.shape[-1]
    r = device.xp.empty((len(rows), 1), _wide_dtype(x))
    out = device.xp.empty(rows.shape, x.dtype)

    def forward(s):
        part = _wide(rows[s])
        r[s] = 1 / device.xp.sqrt(device.row_dot(part, part) / C + eps)
        _times(part, r[s], weight, out[s])
    _sweep_rows(forward, *rows.shape)

    def backward(dout):
        dout, dx = _flat(dout), device.xp.empty_like(rows)

        def block(s):
            x, d = _wide(rows[s]), _wide(dout[s])
            dn = d * weight
            _project(dn, x, r[s], device.row_dot(dn, x) / C * r[s] * r[s] * r[s], dx[s])    # dn r - x · r³ mean(dn x)
            return device.matmul(_t(r[s]), d * x)[0]                                        # this block's part of dw
        dw = builtins.sum(_sweep_rows(block, *rows.shape), 0 * weight)      # Python's sum, from 0 of w's shape
        return dx.reshape(shape), dw
    return _result(out.reshape(shape), (x, w), backward)


@device.fuse
def _times(x, r, w, out):
    out[...] = x * r * w


@device.fuse
def _project(dn, x, r, along, out):
    out[...] = dn * r - x * along


# ---------------------------------------------------------------- position

def rope(x, cos, sin):
    """x (..., T, D), with pairs (x_i, x_{i+D/2}) rotated at position t by the angle t θ_i.

    θ_i = θ^(-2i/D), i = 0 … D/2-1, with the base θ, mostly 10,000: the first pairs turn fast, the last ones slowly.
    `cos` and `sin` (T, D) hold each angle twice, for x_i and for x_{i+D/2}. The halves x₁ and x₂ of a row become

        out₁ = x₁ cos - x₂ sin
        out₂ = x₂ cos + x₁ sin        a rotation R_t; (R_t q)ᵀ (R_s k) = qᵀ R_{s-t} k: only s - t matters

    or, for both at once, out = x cos + (-x₂, x₁) sin. Its matrix is orthogonal: the backward pass is its transpose, the
    rotation by the opposite angle. (RoFormer, Su et al. 2021, §3.2.2; to pair the halves is Hugging Face's way.)
    The result is contiguous whatever view x was: attention wants each head's rows together.

    >>> cos, sin = device.xp.zeros((1, 4)), device.xp.ones((1, 4))          # T = 1, D = 4: both pairs by 90°
    >>> rope(Tensor([[1.0, 2.0, 3.0, 4.0]]), cos, sin).data.tolist()        # (1, 3) -> (-3, 1), (2, 4) -> (-4, 2)
    [[-3.0, -4.0, 1.0, 2.0]]
    """
    return _result(_rotate(x.data, cos, sin), (x,), lambda dout: (_rotate(dout, cos, -sin),))


def _rotate(x, cos, sin):
    xp, half = device.xp, x.shape[-1] // 2
    out = xp.empty(x.shape, x.dtype)

    def block(s):
        part = xp.ascontiguousarray(x[..., s, :])       # a copy: it is read three times
        turned = xp.concatenate((-part[..., half:], part[..., :half]), -1)      # by 90°
        _turn(part, turned, cos[s], sin[s], out[..., s, :])
    _sweep_rows(block, x.shape[-2], x.size // x.shape[-2])
    return out


@device.fuse
def _turn(x, turned, cos, sin, out):
    out[...] = x * cos + turned * sin


# ---------------------------------------------------------------- gated linear units
# An activation returns its value and a function that gives its slope there, since both share the costly part.

def _sigmoid(x):
    return 1 / (1 + device.xp.exp(-x))      # where exp overflows, 1 / infinity is the right 0


def silu(x):
    """x σ(x), slope: σ' = σ(1-σ), so (x σ)' = σ + x σ(1-σ).  (Swish: Ramachandran et al. 2017)"""
    s = _sigmoid(x)
    a = x * s
    return a, lambda: s + a * (1 - s)


def sigmoid(x):
    """σ(x) = 1 / (1 + exp(-x)), slope σ(1-σ): the gate of the first gated linear unit (Dauphin et al. 2016, §3)."""
    s = _sigmoid(x)
    return s, lambda: s * (1 - s)


def gelu_pytorch_tanh(x):
    """x Φ(x), Φ the normal distribution function, nearly: ½x(1 + t), t = tanh(u), u = √(2/π)(x + 0.044715x³);
    slope ½(1+t) + ½x(1-t²)u', u' = √(2/π)(1 + 3 · 0.044715x²).  (GELU, Hendrycks & Gimpel 2016, §2)
    """
    a = 0.7978845608028654
    t = device.xp.tanh(a * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + t), lambda: 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (a * (1 + 0.134145 * x * x))


def relu(x):
    """max(x, 0), slope 1 above 0 and 0 below (and, by convention, at 0)."""
    return device.xp.maximum(x, 0), lambda: (x > 0).astype(x.dtype)


def _fused_glu(activation):
    """The two elementwise formulas of one GLU variant."""
    @device.fuse
    def forward(gate, up, out):
        out[...] = activation(_wide(gate))[0] * up

    @device.fuse
    def backward(gate, up, dout, dgate, dup):
        a, slope = activation(_wide(gate))
        dgate[...] = slope() * up * dout
        dup[...] = dout * a
    return forward, backward


ACTIVATIONS = {"silu": silu, "sigmoid": sigmoid, "gelu": gelu_pytorch_tanh, "relu": relu}
_GLU = {name: _fused_glu(activation) for name, activation in ACTIVATIONS.items()}


def glu(gate, up=None, activation="silu"):
    """out = a(gate) * up, elementwise, with the activation a(·) from ACTIVATIONS; "silu": SwiGLU.  (Shazeer 2020, §2)

    dgate = dout * up * a'(gate),  dup = dout * a(gate): the product rule.
    Without `up`, gate (..., 2F) holds both side by side, as one matrix product leaves them, and so will its gradient.

    >>> both = Tensor([[2.0, -1.0, 5.0, 7.0]], requires_grad=True)          # gate (2, -1), up (5, 7)
    >>> out = glu(both, activation="relu")
    >>> out.backward([[1.0, 1.0]])
    >>> out.data.tolist(), both.grad.tolist()
    ([[10.0, 0.0]], [[5.0, 0.0, 2.0, 0.0]])
    """
    forward, backward_sweep = _GLU[activation]
    joint = up is None
    width = gate.shape[-1] // 2 if joint else gate.shape[-1]
    both = _flat(gate.data)
    g, u = (both[:, :width], both[:, width:]) if joint else (both, _flat(up.data))
    out = device.xp.empty(g.shape, g.dtype)
    _sweep_rows(lambda s: forward(g[s], u[s], out[s]), *g.shape)
    shape = gate.shape

    def backward(dout):
        dout = _flat(dout)
        dboth = device.xp.empty((len(g), 2 * width), g.dtype)
        dg, du = dboth[:, :width], dboth[:, width:]
        _sweep_rows(lambda s: backward_sweep(g[s], u[s], dout[s], dg[s], du[s]), *g.shape)
        return (dboth.reshape(shape),) if joint else (dg.reshape(shape), du.reshape(shape))
    return _result(out.reshape(*shape[:-1], width), (gate,) if joint else (gate, up), backward)


# ---------------------------------------------------------------- attention

@functools.lru_cache(4)
def _future(xp, n, dtype):
    """(n, n): -inf where a key lies in the future of a query, above the diagonal, and 0 elsewhere."""
    return xp.triu(xp.full((n, n), -xp.inf, dtype), 1)


_QUERIES = 128          # queries in a block
_SCORES = 1 << 16       # elements of a block of scores on a CPU: several passes go over it, in the cache


def attention(q, k, v):
    """Causal scaled dot-product attention.  q (B, H, T, D), k and v (B, K, S, D), S >= T -> (B, H, T, D)

    The queries are the last T of the S positions, query t sees the keys up to its own position S - T + t; query head
    h reads key/value head h // (H/K).  (Vaswani et al. 2017, §3.2.1; grouped queries: Ainslie et al. 2023)

        s = q @ kᵀ / √D,  -inf where a key lies in the query's future;   p = softmax(s);   out = p @ v

    Backward, from the outside in (matmul, softmax, matmul):
        dv = pᵀ @ dout      dp = dout @ vᵀ
        ds = p * (dp - δ),  δ_t = sum_j p_tj dp_tj
        dq = ds @ k / √D    dk = dsᵀ @ q / √D       (dk and dv summed over the H/K query heads that share them)
    Neither s nor p is ever held whole: blocks of queries meet the keys that they may see, and backward computes p anew
    from the saved log-sum-exp of each row, L = log sum_j exp(s_j):  p = exp(s - L).  Memory grows with T, not with T².
    (FlashAttention, Dao et al. 2022, §3.1 and appendix B; one L per row: FlashAttention-2, Dao 2023, §3.1.) In half
    precision the products' inputs are half, s, p and the sums float32.

    >>> q, k, v = (Tensor(np.reshape(x, (1, 1, 2, 1))) for x in ([1.0, 1.0], [0.0, np.log(3)], [4.0, 8.0]))
    >>> attention(q, k, v).data.ravel().round(4).tolist()   # token 0 sees itself only; token 1: 1/4 · 4 + 3/4 · 8
    [4.0, 7.0]
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    if H % K or S < T or k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"attention: q {q.shape} does not go with k {k.shape} and v {v.shape}")
    xp, G, scale, dtype, wide = device.xp, H // K, D ** -0.5, q.dtype, _wide_dtype(q)
    qs = q.data.reshape(B * K, G, T, D)             # the G query heads that share a key/value head, together
    ks, vs = (t.data.reshape(B * K, S, D) for t in (k, v))
    out = xp.empty(qs.shape, dtype)
    log_sum = xp.empty((B * K, G, T, 1), wide) if recording(q, k, v) else None
    future = _future(xp, min(_QUERIES, T), wide)
    heads = _SCORES // (G * min(_QUERIES, T) * S)   # key/value heads in a block

    def blocks():                                   # t: a slice of queries; end: the keys that they may see
        return [(slice(t, min(t + _QUERIES, T)), S - T + min(t + _QUERIES, T)) for t in range(0, T, _QUERIES)]

    # s: from here on a slice of the B·K key/value heads, as ks and vs have them
    def rows(x, s, t):                              # (heads, G·n, D): n queries of the G heads of a group, one matrix
        x = x[s, :, t]
        return x.reshape(len(x), -1, x.shape[-1])

    def groups(x):                                  # and back: (heads, G, n, ...)
        return x.reshape(len(x), G, -1, x.shape[-1])

    def scaled(s, t):
        return (rows(qs, s, t) * scale).astype(dtype, copy=False)       # bfloat16 times a number is a float32

    def scores(s, t, end):                          # (heads, G·n, end)
        block = device.matmul(scaled(s, t), _t(ks[s, :end]), dtype=wide)
        n = t.stop - t.start                        # only the last n keys can lie in the future
        if n > 1:
            block.reshape(-1, G, n, end)[..., end - n:] += future[:n, :n]
        return block

    def forward(s):
        for t, end in blocks():
            p = scores(s, t, end)
            top = p.max(-1, keepdims=True)
            p -= top
            xp.exp(p, out=p)
            total = p.sum(-1, keepdims=True)
            result = device.matmul(p.astype(dtype, copy=False), vs[s, :end], dtype=wide)
            result /= total
            out[s, :, t] = groups(result)
            if log_sum is not None:
                log_sum[s, :, t] = groups(top + xp.log(total))
    device.sweep(forward, B * K, heads)

    def backward(dout):
        dout = dout.reshape(qs.shape)
        dq, dk, dv = xp.empty(qs.shape, dtype), xp.zeros(ks.shape, wide), xp.zeros(vs.shape, wide)

        def block(s):
            for t, end in blocks():
                p = scores(s, t, end)
                p -= rows(log_sum, s, t)
                xp.exp(p, out=p)
                do, keys = rows(dout, s, t), ks[s, :end]
                device.matmul(_t(p.astype(dtype, copy=False)), do, out=dv[s, :end], accumulate=True)
                ds = device.matmul(do, _t(vs[s, :end]), dtype=wide)
                ds -= device.row_dot(p, ds)         # dp - δ
                ds *= p
                ds = ds.astype(dtype, copy=False)
                dq[s, :, t] = groups(device.matmul(ds, keys, dtype=wide) * scale)
                device.matmul(_t(ds), scaled(s, t), out=dk[s, :end], accumulate=True)
        device.sweep(block, B * K, heads)
        dk, dv = (x.astype(dtype, copy=False).reshape(B, K, S, D) for x in (dk, dv))
        return dq.reshape(B, H, T, D), dk, dv
    return _result(out.reshape(B, H, T, D), (q, k, v), backward)


# ---------------------------------------------------------------- dropout

def dropout(x, p, key):
    """out = x * keep / (1 - p): each element becomes 0 with probability p, the rest grow so that the mean stays.

    dx = dout * keep / (1 - p): the same mask, which is not saved but drawn again, being a pure function of `key`, a
    tuple of whole numbers, 0 or more. So a resumed or recomputed step is the same step. (Srivastava et al. 2014, §4,
    where the weights are scaled at test time instead; to scale in training: §10.)

    Element i's random number is that of counter start + i in Squares (Widynski 2020: four rounds, 32 bits of output);
    start and the odd factor come from `key`. No generator is advanced: all numbers are computed at once, on either
    device alike.
    """
    words = np.random.SeedSequence(key).generate_state(2, np.uint64)
    start, odd, limit = words[0], words[1] | np.uint64(1), np.uint64(round(p * 2 ** 32))
    scale = _wide_dtype(x).type(1 / (1 - p))        # typed: a fused kernel must not become float64

    def masked(x):
        out, flat = device.xp.empty(x.shape, x.dtype), x.reshape(-1)

        def block(s):
            at = device.xp.arange(s.start, s.stop, dtype=np.uint64)
            _drop(flat[s], at, start, odd, limit, scale, out.reshape(-1)[s])
        device.sweep(block, flat.size, _CACHE)
        return out
    return _result(masked(x.data), (x,), lambda dout: (masked(dout),))


@device.fuse
def _drop(x, i, start, odd, limit, scale, out):
    half = np.uint64(32)
    y = (i + start) * odd
    z = y + odd
    r = y * y + y
    r = (r >> half) | (r << half)
    r = r * r + z
    r = (r >> half) | (r << half)
    r = r * r + y
    r = (r >> half) | (r << half)
    out[...] = x * (((r * r + z) >> half) >= limit) * scale


# ---------------------------------------------------------------- memory for time

def recompute(f, x):
    """f(x), but of all that f's backward will need only x is kept: backward runs f again, and then its backward.

    One more forward pass for a memory that holds the activations of one f at a time; the gradients are the same to the
    last bit, those of weights that f uses, too.  (Chen et al. 2016, §4)
    """
    if not recording(x):
        return f(x)
    with no_grad():
        out = f(x).data
    start = x.data

    def backward(dout):
        again = Tensor(start, requires_grad=True)
        f(again).backward(dout)
        return (again.grad,)
    return _result(out, (x,), backward)


# ---------------------------------------------------------------- loss

def cross_entropy(logits, targets):
    """-mean of log softmax(logits)[target], in nats (natural logarithm).  logits (..., V), targets (...) -> scalar.

    A row's loss is L - z_y, with y its target and L = log sum_j exp(z_j). Its derivative by z_j is exp(z_j)/sum, the
    softmax p_j, minus 1 where j = y, so for N rows
        dz_j = dout/N · (p_j - 1[j = y])        # what the model said minus what was true

    >>> logits = Tensor(np.log([[1.0, 3.0]]), requires_grad=True)           # p = 1/4, 3/4
    >>> loss = cross_entropy(logits, [1])
    >>> loss.backward()
    >>> round(loss.data.item(), 4), logits.grad.round(4).tolist()           # -ln(3/4), p - (0, 1)
    (0.2877, [[0.25, -0.25]])
    """
    rows, shape = _flat(logits.data), logits.shape
    targets = token_ids(targets, shape[-1]).reshape(-1)
    dz = device.xp.empty(rows.shape, _wide_dtype(rows)) if recording(logits) else None
    losses = _cross_entropy_rows(rows, targets, dz)

    def backward(dout):
        return ((dz * (dout / len(rows))).astype(rows.dtype, copy=False).reshape(shape),)
    return _result(losses.mean(), (logits,), backward)


def _cross_entropy_rows(z, targets, dz=None, ranks=None):
    """The loss of each row of z (N, V). Unless they are None, p - onehot goes into dz, which may be z itself, and into
    ranks how many other logits are not below the target's (so a tie, or a NaN, is no success).
    """
    losses = device.xp.empty(len(z), _wide_dtype(z))

    def rows(s):
        at = device.xp.arange(s.stop - s.start), targets[s]
        block = _wide(z[s])
        block = block - block.max(-1, keepdims=True)
        losses[s] = -block[at]
        if ranks is not None:
            ranks[s] = block.shape[1] - 1 - (block < block[at][:, None]).sum(-1, dtype=np.uint32)
        device.xp.exp(block, out=block)
        total = block.sum(-1, keepdims=True)
        losses[s] += device.xp.log(total[:, 0])
        if dz is not None:
            device.xp.divide(block, total, out=dz[s])
            dz[s][at] -= 1
    _sweep_rows(rows, *z.shape)
    return losses


_LOGITS = 1 << 24       # elements of a block of logits: 64 MB in float32


def _logit_blocks(rows, weight):
    """Yield (slice, rows[slice] @ weightᵀ) block by block, never all logits at once; each stands until the next."""
    N, V = len(rows), len(weight)
    block = max(_LOGITS // V, 64)
    logits = device.xp.empty((min(block, N), V), _wide_dtype(rows))
    for start in range(0, N, block):
        s = slice(start, start + block)
        yield s, _rows_times(rows[s], weight, logits[:len(rows[s])])


def linear_cross_entropy(x, w, targets):
    """cross_entropy(linear(x, w), targets) without ever holding all the logits.  x (..., C), w (V, C) -> scalar.

    With a large vocabulary the logits are a model's largest array: N·V. But a row's logits serve only its loss and
    its own gradient, which no other row enters (cross_entropy above). So each block of rows
    makes its logits z, turns them in place into dz = p - onehot, and at once into what backward will ask for:
        dx_block = dz @ w,      dw += dzᵀ @ x_block        (linear above)
    Backward has only to scale both with dout/N. Kept from forward to backward: dx and dw, no logits.
    (The idea of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, §3.2.)

    In half precision the logits, dx and dw are float32, only the products' inputs are half. Most of dz is 1/V or far
    less; a float16 loses digits below 6e-5 and becomes 0 below 3e-8. But all of dz is within ±1, so it is rounded as
    2¹⁵ dz, which still fits (the largest float16 is 65504).
    """
    rows, weight, shape = _flat(x.data), w.data.astype(x.dtype, copy=False), x.shape
    wide = _wide_dtype(x)
    x_dtype, lift = x.dtype, 2.0 ** 15 if x.dtype != wide else 1
    N, V = len(rows), len(weight)
    targets = token_ids(targets, V).reshape(-1)
    keep = recording(x, w)
    if keep:
        dx, dw = device.xp.empty(rows.shape, wide), device.xp.zeros(weight.shape, w.dtype)
    losses = device.xp.empty(N, wide)
    for s, z in _logit_blocks(rows, weight):
        losses[s] = _cross_entropy_rows(z, targets[s], z if keep else None)
        if keep:
            if x_dtype != wide:
                z *= lift
                z = z.astype(x_dtype)
            device.matmul(z, weight, out=dx[s])
            device.matmul(_t(z), rows[s], out=dw, accumulate=True)

    def backward(dout):
        scale = dout / (N * lift)
        return (dx * scale).astype(x_dtype, copy=False).reshape(shape), lambda total: _add_scaled(total, dw, scale)
    return _result(losses.mean(), (x, w), backward)


def token_losses(x, w, targets, ranked=False):
    """What linear_cross_entropy takes the mean of: the loss of each target in nats; and, if `ranked`, its rank among
    all logits, 0 for the largest, else None.  x (..., C), w (V, C), targets (...) -> two arrays (...), no gradient.
    """
    rows, weight, shape = _flat(x.data), w.data.astype(x.dtype, copy=False), x.shape[:-1]
    targets = token_ids(targets, len(weight)).reshape(-1)
    losses, ranks = device.xp.empty(len(rows), _wide_dtype(x)), device.xp.empty(len(rows), np.int64)
    for s, z in _logit_blocks(rows, weight):
        losses[s] = _cross_entropy_rows(z, targets[s], ranks=ranks[s] if ranked else None)
    return losses.reshape(shape), ranks.reshape(shape) if ranked else None


def _add_scaled(total, x, scale):
    def block(s):
        total[s] += x[s] * scale
    _sweep_rows(block, *x.shape)


# ---------------------------------------------------------------- operators and methods: the same functions

def _swapped(op):
    return lambda a, b: op(*reversed(_tensors(a, b)))


Tensor.__add__ = Tensor.__radd__ = add
Tensor.__mul__ = Tensor.__rmul__ = mul
Tensor.__sub__, Tensor.__rsub__ = sub, _swapped(sub)
Tensor.__truediv__, Tensor.__rtruediv__ = div, _swapped(div)
Tensor.__neg__, Tensor.__pow__, Tensor.__matmul__, Tensor.__getitem__ = neg, power, matmul, getitem
Tensor.sum, Tensor.mean, Tensor.reshape, Tensor.transpose = sum, mean, reshape, transpose


# ---------------------------------------------------------------- the check

def gradcheck(f, *inputs, step=1e-5, rtol=1e-5, atol=1e-7, seed=0):
    """Whether f's backward agrees with finite differences; True, or AssertionError with the worst element.

    f maps Tensors to a Tensor; `inputs` are arrays of floats, taken as float64. With one random dout, d,
    g(x) = sum(f(x) * d) is a scalar whose gradient backward gives, and for each element x_i

        ∂g/∂x_i ≈ (g(x + h e_i) - g(x - h e_i)) / 2h,  h = step · max(1, |x_i|),  e_i: 1 at place i, 0 elsewhere

    with an error of order h² from the third derivative (the second cancels) and u/h from rounding (u = 1.1e-16): least
    near h = 1e-5. d is random because a d of ones hides errors: softmax rows sum to 1, so the gradient is 0, and so is
    what many a wrong backward returns.
    """
    xp = device.xp
    leaves = [Tensor(xp.array(x, dtype=np.float64), requires_grad=True) for x in inputs]
    out = f(*leaves)
    d = xp.asarray(np.random.default_rng(seed).standard_normal(out.shape))
    out.backward(d)

    def g():
        with no_grad():
            return float((f(*leaves).data * d).sum())

    worst, report = 0.0, None
    for number, leaf in enumerate(leaves):
        analytic = device.to_host(leaf.grad) if leaf.grad is not None else np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            x = float(leaf.data[index])
            h = step * max(1.0, abs(x))
            leaf.data[index] = x + h
            above = g()
            leaf.data[index] = x - h
            below = g()
            leaf.data[index] = x
            numeric, got = (above - below) / (2 * h), float(analytic[index])
            excess = abs(got - numeric) / (atol + rtol * abs(numeric))
            if not excess <= worst:     # also when it is nan
                worst, report = excess, (number, index, got, numeric)
    if not worst <= 1:
        number, index, got, numeric = report
        raise AssertionError(f"input {number}, element {index}: backward says {got:.10g}, "
                             f"finite differences {numeric:.10g}")
    return True
