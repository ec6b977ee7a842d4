"""Reverse-mode automatic differentiation over arrays, every backward pass derived by hand.

An op computes its result, `out`, and records a backward function, which takes dout, the gradient
of the loss with respect to out, and returns the gradients with respect to the op's inputs. The
recorded ops form a graph in which every result points to its inputs; its leaves are the tensors
that no op made, such as weights. `backward` walks from the loss to the leaves and applies the chain
rule at each op. After this engine come the ops, from simple ones to those of the model. softmax and
glu are a formula and a loop over blocks of rows. rmsnorm, attention and the loss come twice: plain,
as the derivation reads, and as the model uses them: the same values, a block at a time.

Shapes: B batch, T time, S keys (S > T where a cache holds earlier ones), C width, H heads,
K key/value heads, D their width, F hidden width, V vocabulary, N rows: (..., C) -> (N, C).
dx is dLoss/dx and has x's shape. * multiplies element by element, @ is the matrix product, ᵀ swaps
the last two axes. From `device` (hardware/device.py, which you can read later):

    xp                  NumPy or CuPy
    matmul(a, b)        a @ b; out=c writes it into c, accumulate=True adds it to c
    row_dot(a, b)       (a * b).sum(-1, keepdims=True)
    sweep(f, n, block)  [f(slice), …] over range(n): `block` at a time; on a GPU all at once
    fuse                marks a formula that becomes one kernel on a GPU

Two rules give most derivations: a value used in several places receives the sum of what they send
back; for out = a @ b, da = dout @ bᵀ and db = aᵀ @ dout (derived in `matmul`).

>>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> loss = (x * x).sum()                # 1 + 4 + 9
>>> loss.backward()
>>> loss.data.item(), x.grad.tolist()   # d(x²)/dx = 2x
(14.0, [2.0, 4.0, 6.0])
"""
import functools
import math
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from types import EllipsisType

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from hardware import device, formulas
from hardware.random_bits import drop

# ---------------------------------------------------------------- the engine

_no_grad = ContextVar("no_grad", default=False)         # every thread has its own


@contextmanager
def no_grad():
    """Inside, this thread's ops record nothing: no graph, no memory kept for a backward pass."""
    before = _no_grad.set(True)
    try:
        yield
    finally:
        _no_grad.reset(before)


def recording(*tensors):
    """Whether an op on these tensors must be recorded."""
    return not _no_grad.get() and any(t.requires_grad for t in tensors)


class Node:
    """How a result came about: where its inputs came from, and the op's backward function.

    A parent is None for an input that requires no gradient, its Node if an op made it, and the
    Tensor itself for a leaf, where the gradient is kept. `grad` is the sum received so far; if it
    is `shared`, others may hold that array, so it must not change. The result is not kept here.
    """
    __slots__ = ("parents", "backward", "shape", "dtype", "grad", "shared")


class Tensor:
    """An array and, unless it is a leaf, the Node that says how it came about.

    `data` is an array of device.xp, not copied. `grad` is None or, for a leaf after `backward`,
    the array dLoss/ddata; further backward passes add to it until it is cleared.
    Raises TypeError for requires_grad=True on numbers that are not floats.
    """
    __slots__ = ("data", "requires_grad", "grad", "half", "_node")
    __array_ufunc__ = None              # array * tensor: NumPy must leave it to the tensor
    shared = False                      # a leaf owns its grad: add to it in place
    shape, dtype = property(attrgetter("data.shape")), property(attrgetter("data.dtype"))

    def __init__(self, data, requires_grad=False):
        self.data = device.xp.asarray(data)
        if requires_grad and self.data.dtype.kind in "biu":         # bool, int, unsigned
            raise TypeError(f"requires_grad needs floating-point data, not {self.data.dtype}")
        self.requires_grad = requires_grad
        self.grad = self.half = self._node = None

    def __repr__(self):
        return f"Tensor({self.data}{', requires_grad=True' if self.requires_grad else ''})"

    # operators and methods: each is the op below of that name; `sum` is not Python's
    __add__ = __radd__ = lambda self, other: add(self, other)
    __mul__ = __rmul__ = lambda self, other: mul(self, other)
    __sub__ = lambda self, other: sub(self, other)
    __rsub__ = lambda self, other: sub(other, self)
    __truediv__ = lambda self, other: div(self, other)
    __rtruediv__ = lambda self, other: div(other, self)
    __matmul__ = lambda self, other: matmul(self, other)
    __neg__ = lambda self: neg(self)
    __pow__ = lambda self, p: power(self, p)
    __getitem__ = lambda self, index: getitem(self, index)
    sum = lambda self, axis=None, keepdims=False: sum(self, axis, keepdims)
    mean = lambda self, axis=None, keepdims=False: mean(self, axis, keepdims)
    reshape = lambda self, *shape: reshape(self, *shape)
    transpose = lambda self, *axes: transpose(self, *axes)

    def backward(self, dout=None):
        """Add dLoss/dleaf to `grad` of every leaf this tensor depends on.

        dout is dLoss/dself, by default 1 for a scalar. The graph is dismantled on the way: an op's
        memory is freed as soon as its gradients exist. Raises RuntimeError if nothing here
        requires a gradient, if the graph has been used, or if dout is missing for a non-scalar.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor depends on nothing that requires a gradient")
        if dout is None:
            if self.data.size != 1:
                raise RuntimeError(f"backward: a tensor of shape {self.shape} needs dout")
            dout = 1.0
        dout = device.xp.broadcast_to(device.xp.asarray(dout, self.dtype), self.shape)
        root = self._node or self
        order = _topological(root)
        _receive(root, dout)
        while order:
            node = order.pop()
            if isinstance(node, Tensor):            # a leaf: its .grad is what was asked for
                continue
            if node.backward is None:
                raise RuntimeError("backward: this graph was freed by an earlier backward; "
                                   "run the forward pass again")
            dout, parents, backward = node.grad, node.parents, node.backward
            node.grad, node.parents, node.backward = None, (), None
            for parent, gradient in zip(parents, backward(dout), strict=True):
                if parent is not None:
                    _receive(parent, gradient)


def _topological(root):
    """All that root depends on, inputs before results; clears the grad of Nodes. Not recursive."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            if isinstance(node, Node):
                node.grad, node.shared = None, False
                stack.extend((parent, False) for parent in node.parents if parent is not None)
    return order


def _receive(node, gradient):
    """In effect `node.grad += gradient`; the rest avoids copies.

    `gradient` is an array, or a function that adds one to node.grad in place: to a weight's
    buffer, to the place of a slice, to the rows of an embedding that were used. An array may have
    been sent to several nodes (`add` does), so the first is kept as it is and marked as shared.
    """
    if callable(gradient):
        if node.grad is None:
            node.grad = device.xp.zeros(node.shape, node.dtype)
        elif node.shared:
            node.grad, node.shared = node.grad.copy(), False
        gradient(node.grad)
        return
    gradient = _unbroadcast(gradient, node.shape)
    if gradient.dtype != node.dtype:
        raise TypeError(f"a {node.dtype} value received a {gradient.dtype} gradient")
    if node.grad is not None and not node.shared:
        node.grad += gradient
    elif node.grad is not None:
        node.grad, node.shared = node.grad + gradient, False
    elif isinstance(node, Tensor):
        node.grad = gradient.copy()             # a leaf's own: users may change it
    else:
        node.grad, node.shared = gradient, True


def _unbroadcast(gradient, shape):
    """Sum over the axes along which broadcasting repeated a value of this shape."""
    extra = gradient.ndim - len(shape)
    if extra > 0:
        gradient = _total(gradient, tuple(range(extra)))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    if repeated:
        gradient = _total(gradient, repeated, keepdims=True)
    if gradient.shape != shape:
        raise ValueError(f"a gradient of shape {gradient.shape} reached a value of shape {shape}")
    return gradient


_t = lambda x: x.swapaxes(-1, -2)       # xᵀ
# Sums, exponentials and normalisations of half precision are computed in float32.
_wide_dtype = lambda x: np.dtype(np.float32) if x.dtype.itemsize == 2 else x.dtype
_wide = device.wide
_total = lambda x, axis, keepdims=False: x.sum(
    axis, dtype=_wide_dtype(x), keepdims=keepdims).astype(x.dtype, copy=False)


def record(data, inputs, backward):
    """The Tensor that an op returns: `data`, and how it came from the Tensors `inputs`.

    backward maps dout to one gradient for each input (see `_receive`). It may hold arrays, never
    this Tensor: out → Node → backward → out is a cycle, which only the garbage collector frees.
    """
    out = Tensor(data)
    if not _no_grad.get() and any(t.requires_grad for t in inputs):
        out.requires_grad, node = True, Node()
        out._node, node.backward, node.shape, node.dtype = node, backward, out.shape, out.dtype
        node.parents = tuple((t._node or t) if t.requires_grad else None for t in inputs)
    return out


def _tensors(a, b):
    """Both as Tensors; a number or an array takes the dtype of the other, if that is a float."""
    dtype = a.dtype if isinstance(a, Tensor) else b.dtype
    dtype = None if dtype.kind in "biu" else dtype
    return [x if isinstance(x, Tensor) else Tensor(device.xp.asarray(x, dtype)) for x in (a, b)]


# ---------------------------------------------------------------- elementwise

def add(a, b):
    """out = a + b;  da = dout,  db = dout.  Broadcasts; the engine sums the gradient back."""
    a, b = _tensors(a, b)
    return record(a.data + b.data, (a, b), lambda dout: (dout, dout))


def sub(a, b):
    """out = a - b;  da = dout,  db = -dout."""
    a, b = _tensors(a, b)
    return record(a.data - b.data, (a, b), lambda dout: (dout, -dout))


def neg(x):
    """out = -x;  dx = -dout."""
    return record(-x.data, (x,), lambda dout: (-dout,))


def mul(a, b):
    """out = a * b;  da = dout * b,  db = dout * a."""
    a, b = _tensors(a, b)
    x, y = a.data, b.data
    return record(x * y, (a, b), lambda dout: (dout * y, dout * x))


def div(a, b):
    """out = a / b;  da = dout / b,  db = -dout * a / b² = -da * out."""
    a, b = _tensors(a, b)
    y, out = b.data, a.data / b.data
    return record(out, (a, b), lambda dout: (dout / y, -dout / y * out))


def power(x, p):
    """out = x**p for a number p;  dx = dout * p * x**(p-1), 0 if p = 0.  √x is power(x, 0.5)."""
    data, dtype = _wide(x.data), x.dtype        # CuPy has no powers of bfloat16
    return record((data ** p).astype(dtype, copy=False), (x,), lambda dout: (
        (dout * (p and p * data ** (p - 1))).astype(dtype, copy=False),))


def cast(x, dtype):
    """The same numbers in another floating-point type;  dx is dout in x's own type."""
    old = x.dtype
    if old == dtype:
        return x
    return record(x.data.astype(dtype), (x,), lambda dout: (dout.astype(old),))


# ---------------------------------------------------------------- the check

def gradcheck(f, *inputs, step=1e-5, rtol=1e-5, atol=1e-7, seed=0):
    """True if f's backward agrees with finite differences. AssertionError names the worst element.

    f maps Tensors to a Tensor; `inputs` are arrays, taken as float64. d is one random dout, and
    g(x) = sum(f(x) * d) is a scalar whose gradient backward gives. For each element x_i
        ∂g/∂x_i ≈ (g(x + h e_i) - g(x - h e_i)) / 2h,   h = step · max(1, |x_i|)
    where e_i is 1 in place i, else 0; they may differ by atol + rtol |∂g/∂x_i|. The error is about
    h², from the third derivative (the second cancels), plus u/h, from rounding, u = 1.1e-16:
    smallest near h = u^(1/3), 5e-6. A d of ones would hide errors: the rows of softmax sum to 1,
    so the right gradient is 0, and so is what many wrong backward functions return.

    >>> gradcheck(mul, [2.0, 3.0], [5.0, 7.0])
    True
    """
    xp = device.xp
    leaves = [Tensor(xp.array(x, dtype=np.float64), requires_grad=True) for x in inputs]
    out = f(*leaves)
    d = xp.asarray(np.random.default_rng(seed).standard_normal(out.shape))
    out.backward(d)
    g = lambda: float((f(*leaves).data * d).sum())
    worst, report = 0.0, None
    with no_grad():
        for number, leaf in enumerate(leaves):
            analytic = np.zeros(leaf.shape) if leaf.grad is None else device.to_host(leaf.grad)
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
                if not excess <= worst:             # also when it is NaN
                    worst = math.inf if math.isnan(excess) else excess
                    report = (f"input {number}, element {index}: backward says {got:.10g}, "
                              f"finite differences {numeric:.10g}")
    if worst > 1:
        raise AssertionError(report)
    return True


# ---------------------------------------------------------------- shape

def sum(x, axis=None, keepdims=False):
    """out = sum of x over `axis` (an int, a tuple, or None: all);  dx = dout, repeated."""
    shape = x.shape
    axes = normalize_axis_tuple(range(len(shape)) if axis is None else axis, len(shape))
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    return record(_total(x.data, axes, keepdims), (x,),
                  lambda dout: (device.xp.broadcast_to(dout.reshape(kept), shape),))


def mean(x, axis=None, keepdims=False):
    """out = sum(x) / n, n the number of summed elements;  dx = dout / n, repeated."""
    total = sum(x, axis, keepdims)
    return mul(total, total.data.size / x.data.size)            # 1/n


def reshape(x, *shape):
    """The same elements in another shape;  dx is dout in x's shape."""
    old = x.shape
    shape = shape[0] if isinstance(shape[0], tuple) else shape
    return record(x.data.reshape(shape), (x,), lambda dout: (dout.reshape(old),))


def transpose(x, *axes):
    """Axis i of out is axis axes[i] of x (by default all reversed);  dx: the axes put back."""
    axes = axes or tuple(reversed(range(x.data.ndim)))
    return record(x.data.transpose(axes), (x,), lambda dout: (
        dout.transpose(np.argsort([a % len(axes) for a in axes]).tolist()),))       # the inverse


def getitem(x, index):
    """out = x[index], by ints, slices and …: no element twice.  dx is dout there, 0 elsewhere."""
    for item in index if isinstance(index, tuple) else (index,):
        if type(item) not in (int, slice, EllipsisType):
            raise TypeError(f"a tensor is indexed by ints and slices, not by {type(item).__name__}")
    def backward(dout):
        def add_in_place(dx):
            dx[index] += dout
        return (add_in_place,)
    return record(x.data[index], (x,), backward)


# ---------------------------------------------------------------- products

def _rows(x):                           # (..., C) -> (N, C), without a copy if possible
    if x.dtype.kind in "biu":
        raise TypeError(f"this op needs floating-point data, not {x.dtype}")
    return x.reshape(-1, x.shape[-1])


def matmul(a, b):
    """out = a @ b, a (..., m, k), b (..., k, n), leading axes broadcast.

    out_ij = sum_k a_ik b_kj, so da_ik = sum_j dout_ij b_kj and db_kj = sum_i a_ik dout_ij, that is
        da = dout @ bᵀ,   db = aᵀ @ dout
    """
    if min(a.data.ndim, b.data.ndim) < 2:
        raise ValueError(f"matmul needs matrices, not arrays of shape {a.shape} and {b.shape}")
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    x, y = (device.xp.broadcast_to(t.data, lead + t.shape[-2:]) for t in (a, b))
    return record(device.matmul(x, y), (a, b),
                  lambda dout: (device.matmul(dout, _t(y)), device.matmul(_t(x), dout)))


def linear(x, w):
    """out = x @ wᵀ, x (..., C), w (F, C) as PyTorch and Hugging Face store it -> (..., F).

    This is `matmul` with b = wᵀ and x flattened to rows, so
        dx = dout @ w,   dw = (xᵀ @ dout)ᵀ = doutᵀ @ x      (added straight to w's gradient)
    Mixed precision: w is rounded to x's type for the product; w itself and dw stay float32, because
    half precision would lose updates far below w's size.  (Micikevicius et al. 2018, §3.1)
    """
    rows, weight, shape = _rows(x.data), device.rounded(w, x.dtype), x.shape
    def backward(dout):
        dout = _rows(dout)
        dx = device.matmul(dout, weight).reshape(shape)
        return dx, lambda dw: device.matmul(_t(dout), rows, out=dw, accumulate=True)
    return record(device.linear(rows, weight).reshape(*shape[:-1], len(weight)), (x, w), backward)


def embedding(w, ids):
    """out = w[ids], w (V, C), integer ids of any shape -> (*ids.shape, C).

    Row v of w went to every place where ids == v, so dw_v is the sum of dout over these places.
    (On a GPU the order of that sum varies from run to run. No other op does that.)
    """
    ids, table = device.as_ids(ids, len(w.data)), w.data if w.half is None else w.half
    return record(table[ids], (w,), lambda dout: (
        functools.partial(device.add_rows, ids=ids.reshape(-1), rows=_wide(_rows(dout))),))


# ---------------------------------------------------------------- softmax, RMSNorm and RoPE

_CACHE = 1 << 16        # elements of a block: 256 KB fits the cache; few blocks, little Python


def _sweep_rows(f, n, width):
    """f(slice) over n rows of `width` elements, as many at a time as fit the cache."""
    return device.sweep(f, n, _CACHE // max(width, 1))


def by_rows(f, *arrays):
    """f(*arrays), arrays (N, C), a block of rows at a time; half precision is float32 inside."""
    out = device.xp.empty(arrays[0].shape, arrays[0].dtype)
    def block(part):
        out[part] = f(*(_wide(array[part]) for array in arrays))
    _sweep_rows(block, *out.shape)
    return out


def _softmax(x):
    e = device.xp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


_softmax_backward = lambda p, dout: p * (dout - (dout * p).sum(-1, keepdims=True))


def softmax(x):
    """out_i = exp(x_i) / sum_j exp(x_j) over the last axis: both formulas above, through `by_rows`.

    Subtracting the row's maximum changes nothing (it cancels) and keeps exp in range; -inf gives
    an exact 0. Let e_i = exp(x_i), and 1[i = j] be 1 for i = j, else 0. By the quotient rule
        d out_i / d x_j = e_i 1[i = j] / sum e - e_i e_j / (sum e)² = out_i (1[i = j] - out_j), so
        dx_j = sum_i dout_i out_i (1[i = j] - out_j) = out_j (dout_j - sum_i dout_i out_i)

    >>> x = Tensor(np.log([1.0, 3.0]), requires_grad=True)
    >>> p = softmax(x)                  # 1/4 and 3/4
    >>> p.backward([1.0, 0.0])          # sum dout p = 1/4: dx = 1/4 (1 - 1/4), 3/4 (0 - 1/4)
    >>> p.data.round(4).tolist(), x.grad.round(4).tolist()
    ([0.25, 0.75], [0.1875, -0.1875])
    """
    p, shape = by_rows(_softmax, _rows(x.data)), x.shape
    return record(p.reshape(shape), (x,), lambda dout: (
        by_rows(_softmax_backward, p, _rows(dout)).reshape(shape),))


def rmsnorm_plain(x, w, eps=1e-6):
    """out = n * w,  n = x * r,  r = (mean(x²) + eps)^(-1/2) for each row;  x (..., C), w (C,).

    n receives dn = dout * w. x_i enters n_i directly, and every n_j through r. What r receives is
    sum_j dn_j x_j, and dr/dx_i = -½ r³ · 2 x_i/C = -r³ x_i/C, so
        dx_i = r dn_i - r³ x_i/C · sum_j dn_j x_j
             = r dn_i - x_i · r³ mean(dn * x)           with x = n/r:
             = r (dn_i - n_i · mean(dn * n))            dn without its component along n
        dw   = sum over rows of dout * n                w is broadcast over the rows
    (It is the component because mean(n²) = 1, up to eps.)  (Zhang & Sennrich 2019, §4)

    >>> x, w = Tensor([[1.0, 7.0]], requires_grad=True), Tensor([1.0, 1.0], requires_grad=True)
    >>> out = rmsnorm_plain(x, w, eps=0)    # mean(x²) = 25, r = 1/5, n = (0.2, 1.4)
    >>> out.backward([[1.0, 0.0]])          # mean(dn n) = 0.1: dx = (1 - 0.02, 0 - 0.14) / 5
    >>> out.data.round(4).tolist(), x.grad.round(4).tolist(), w.grad.round(4).tolist()
    ([[0.2, 1.4]], [[0.196, -0.028]], [0.2, 0.0])
    """
    r = ((x.data ** 2).mean(-1, keepdims=True) + eps) ** -0.5           # (..., 1)
    n, weight = x.data * r, w.data

    def backward(dout):
        dn = dout * weight
        dx = r * (dn - n * (dn * n).mean(-1, keepdims=True))
        dw = dout * n                           # the engine sums it over the rows
        return dx, dw
    return record(n * weight, (x, w), backward)


def rmsnorm(x, w, eps=1e-6):
    """`rmsnorm_plain`, a block of rows at a time.

    Besides x only q = sum(x²) is kept, one number per row, from which each formula gets its r.
    With g = dout * x * r:   dx = dout * w * r - x * r² mean(g * w),   dw = sum over rows of g
    """
    rows, weight, shape, number = _rows(x.data), w.data, x.shape, _wide_dtype(x).type
    C, eps, out = number(shape[-1]), number(eps), device.xp.empty(rows.shape, x.dtype)

    def forward(part):
        xs = device.loaded(rows[part])
        q = device.row_dot(xs, xs)
        formulas.rmsnorm(xs, q, weight, C, eps, out[part])
        return q
    q = device.joined(_sweep_rows(forward, *rows.shape))

    def backward(dout):
        dout, dx = _rows(dout), device.xp.empty_like(rows)
        def block(part):
            xs, dout_, q_ = device.loaded(rows[part]), device.loaded(dout[part]), q[part]
            dot, share = formulas.rmsnorm_sums(xs, q_, dout_, weight, C, eps)
            formulas.rmsnorm_dx(xs, q_, dout_, weight, dot, C, eps, dx[part])
            return share                                                # this block's, of dw
        shares = _sweep_rows(block, *rows.shape)
        return dx.reshape(shape), lambda dw: device.add_each(dw, shares)
    return record(out.reshape(shape), (x, w), backward)


def rope(x, cos, sin):
    """x (..., T, D), with pairs (x_i, x_{i+D/2}) rotated at position t by the angle t θ_i.

    θ_i = θ^(-2i/D), i = 0 … D/2-1, where θ is usually 10,000: the first pairs turn fast, the last
    ones slowly. cos and sin (T, D) hold each angle twice. The halves x₁ and x₂ of a row become
        out₁ = x₁ cos - x₂ sin,  out₂ = x₂ cos + x₁ sin,    or out = x cos + (-x₂, x₁) sin
    This is a rotation R_t, and only distances matter: (R_t q)ᵀ (R_s k) = qᵀ R_{s-t} k. R_t is
    orthogonal, so the backward pass is its transpose, the rotation by the opposite angle.
    (RoFormer, Su et al. 2021, §3.2.2; pairing the halves is Hugging Face's convention.)

    >>> cos, sin = device.xp.zeros((1, 4)), device.xp.ones((1, 4))      # T = 1, D = 4: by 90°
    >>> rope(Tensor([[1.0, 2.0, 3.0, 4.0]]), cos, sin).data.tolist()    # (1, 3) -> (-3, 1), …
    [[-3.0, -4.0, 1.0, 2.0]]
    """
    return record(formulas.rotate(x.data, cos, sin), (x,),
                  lambda dout: (formulas.rotate(dout, cos, sin, back=True),))


# ---------------------------------------------------------------- gated linear units
# An activation returns its value and a function that returns its slope: both share the costly part.

def sigmoid(x):
    """σ(x) = 1 / (1 + exp(-x)), slope σ(1-σ): the first GLU's gate (Dauphin et al. 2016, §3)."""
    out = 1 / (1 + device.xp.exp(-x))           # where exp overflows, 1 / infinity is the right 0
    return out, lambda: out * (1 - out)


def silu(x):
    """x σ(x), slope: σ' = σ(1-σ), so (x σ)' = σ + x σ(1-σ).  (Swish: Ramachandran et al. 2017)"""
    gate, _ = sigmoid(x)
    out = x * gate
    return out, lambda: gate + out * (1 - gate)


def gelu_pytorch_tanh(x):
    """½ x (1 + t), t = tanh(u), u = a (x + b x³), a = √(2/π), b = 0.044715: close to x Φ(x), Φ the
    normal CDF; slope ½ (1 + t) + ½ x (1 - t²) a (1 + 3b x²).  (Hendrycks & Gimpel 2016, §2)
    """
    a, b = math.sqrt(2 / math.pi), 0.044715
    t = device.xp.tanh(a * (x + b * x * x * x))
    return 0.5 * x * (1 + t), lambda: (
        0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (a * (1 + 3 * b * x * x)))


def relu(x):
    """max(x, 0), slope 1 above 0 and 0 below (and, by convention, at 0)."""
    return device.xp.maximum(x, 0), lambda: (x > 0).astype(x.dtype)


ACTIVATIONS = {"silu": silu, "sigmoid": sigmoid, "gelu": gelu_pytorch_tanh, "relu": relu}


@functools.cache
def _glu_formulas(name):
    activation = ACTIVATIONS[name]

    @device.fuse
    def forward(gate, up, out):                 # (n, F) each
        device.xp.multiply(activation(_wide(gate))[0], up, out)     # [0]: the value, not the slope

    @device.fuse
    def backward(gate, up, dout, dgate, dup):
        a, slope = activation(_wide(gate))
        device.xp.multiply(slope() * up, dout, dgate)
        device.xp.multiply(dout, a, dup)
    return forward, backward


def glu(gate, up=None, activation="silu"):
    """out = a(gate) * up, a from ACTIVATIONS; "silu" is SwiGLU. Computed `by_rows`.

    By the product rule  dgate = dout * up * a'(gate),  dup = dout * a(gate).  (Shazeer 2020, §2)
    Without `up`, gate (..., 2F) holds both next to each other, as one linear layer computes them.

    >>> both = Tensor([[2.0, -1.0, 5.0, 7.0]], requires_grad=True)      # gate (2, -1), up (5, 7)
    >>> out = glu(both, activation="relu")
    >>> out.backward([[1.0, 1.0]])
    >>> out.data.tolist(), both.grad.tolist()
    ([[10.0, 0.0]], [[5.0, 0.0, 2.0, 0.0]])
    """
    both = gate.data if up is None else device.xp.concatenate((gate.data, up.data), -1)
    forward, backward_formula = _glu_formulas(activation)
    shape, both, F = both.shape, _rows(both), both.shape[-1] // 2
    to = (*shape[:-1], F)                       # the shape of out
    g, u, out = both[:, :F], both[:, F:], device.xp.empty((len(both), F), both.dtype)
    with np.errstate(over="ignore"):            # see sigmoid
        _sweep_rows(lambda part: forward(g[part], u[part], out[part]), *g.shape)

    def backward(dout):
        dout, dboth = _rows(dout), device.xp.empty(both.shape, both.dtype)
        dg, du = dboth[:, :F], dboth[:, F:]
        block = lambda part: backward_formula(g[part], u[part], dout[part], dg[part], du[part])
        with np.errstate(over="ignore"):
            _sweep_rows(block, *g.shape)
        return (dboth.reshape(shape),) if up is None else (dg.reshape(to), du.reshape(to))
    return record(out.reshape(to), (gate,) if up is None else (gate, up), backward)


# ---------------------------------------------------------------- attention

def attention_plain(q, k, v):
    """Causal attention.  q (B, H, T, D), k and v (B, K, S, D), S >= T -> (B, H, T, D)

    The queries are the last T of S positions; query t sees the keys up to its own position,
    S - T + t. Query head h reads key/value head h // (H/K).
        s = q @ kᵀ / √D,  -inf for later keys;  p = softmax(s);  out = p @ v
    Backward, from the outside in (`matmul`, `softmax`, `matmul`, whose derivations are above):
        dv = pᵀ @ dout      dp = dout @ vᵀ
        ds = p * (dp - δ),  δ_t = sum_j p_tj dp_tj
        dq = ds @ k / √D    dk = dsᵀ @ q / √D     dk, dv: summed over the heads that share k, v
    (Vaswani et al. 2017, §3.2.1; grouped queries: Ainslie et al. 2023)

    >>> q, k, v = [[1.0, 1.0], [0.0, np.log(3)], [4.0, 8.0]]            # T = S = 2, D = 1
    >>> q, k, v = (Tensor(np.reshape(x, (1, 1, 2, 1))) for x in (q, k, v))
    >>> attention_plain(q, k, v).data.ravel().round(4).tolist()     # 4;  1/4 · 4 + 3/4 · 8
    [4.0, 7.0]
    """
    xp, inputs, (B, H, T, D), (_, K, S, _) = device.xp, (q, k, v), q.shape, k.shape
    q, k, v = q.data, *(xp.repeat(x.data, H // K, axis=1) for x in (k, v))      # k, v (B, H, S, D)
    future = xp.triu(xp.ones((T, S), bool), S - T + 1)      # True where key > S - T + query
    s = q @ _t(k) / D ** 0.5                                # (B, H, T, S)
    s = xp.where(future, -xp.inf, s)                        # the causal mask
    p = _softmax(s)

    def backward(dout):
        dv, dp = _t(p) @ dout, dout @ _t(v)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True))     # 0 under the mask, where p is 0
        dq, dk = ds @ k / D ** 0.5, _t(ds) @ q / D ** 0.5
        over_groups = lambda dx: dx.reshape(B, K, H // K, S, D).sum(2)
        return dq, over_groups(dk), over_groups(dv)
    return record(p @ v, inputs, backward)


_QUERIES = 128          # queries in a block on a CPU
_SCORES = 1 << 16       # scores in a block on a CPU: several passes go over it, in the cache


def _by_queries(f, T, S, size):
    """h -> f(h, t, end) for slices t of queries; the last query of each may see `end` keys."""
    def blocks(h):
        for start in reversed(range(0, T, size)):   # largest first: CuPy reuses it for smaller ones
            stop = min(start + size, T)
            f(h, slice(start, stop), S - T + stop)
    return blocks


@functools.lru_cache(4)
def _future(xp, n, dtype):              # (n, n): -inf above the diagonal, where keys are later
    return xp.triu(xp.full((n, n), -xp.inf, dtype), 1)


def attention(q, k, v):
    """`attention_plain` without ever holding s or p whole: memory grows with T, not with T².

    Each block of queries is multiplied only by the keys that it may see. Backward computes p again
    from the log-sum-exp of each row, L = log sum_j exp(s_j), as p = exp(s - L). (FlashAttention,
    Dao et al. 2022, §3.1 and appendix B; one L per row: FlashAttention-2, Dao 2023, §3.1.) The
    G = H/K query heads of a key/value head form one matrix of G·n rows, so dsᵀ @ q sums over them.
    h: a slice of the B·K key/value heads, t: a slice of n queries. Sums and scores are never half.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    if H % K or S < T or k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"attention: q {q.shape} does not go with k {k.shape} and v {v.shape}")
    xp, G, dtype, wide = device.xp, H // K, q.dtype, _wide_dtype(q)
    qs = q.data.reshape(B * K, G, T, D)
    ks, vs = (x.data.reshape(B * K, S, D) for x in (k, v))
    out = xp.empty(qs.shape, dtype)
    L = xp.empty((B * K, G, T, 1), wide) if recording(q, k, v) else None
    queries = min(device.rows_at_once(B * H * S, _QUERIES, _QUERIES), T)    # in a block
    heads, scale = _SCORES // (G * queries * S), D ** -0.5
    merged = lambda x: x.reshape(len(x), -1, x.shape[-1])           # (h, G, n, D) -> (h, G·n, D)
    split = lambda x: x.reshape(len(x), G, -1, x.shape[-1])         # and back

    def scores(h, t, end):                  # q (h, G·n, D) and the masked s (h, G·n, end)
        q = merged(qs[h, :, t])
        s = device.matmul(q, _t(ks[h, :end]), dtype=wide, scale=scale)
        n = t.stop - t.start                # The causal mask: the n queries stand at the last n of
        if n > 1:                           # `end` positions, so only keys there can be later.
            latest = split(s)[..., end - n:]        # a view
            latest += _future(xp, n, wide)
        return q, s

    def forward(h, t, end):
        _, p = scores(h, t, end)
        top = p.max(-1, keepdims=True)          # softmax without the division by its row sums:
        rounded = formulas.exp_less(p, top, dtype)              # changes p; the same in q's dtype
        total = p.sum(-1, keepdims=True)        # p @ v has D numbers a row to divide, p has `end`
        pv = device.matmul(rounded, vs[h, :end], dtype=wide)
        xp.divide(split(pv), split(total), out=out[h, :, t])
        if L is not None:
            formulas.plus_log(split(top), split(total), L[h, :, t])
    device.sweep(_by_queries(forward, T, S, queries), B * K, heads)

    def backward(dout):
        dout = dout.reshape(qs.shape)
        summed = dtype if queries == T else wide                # dk and dv, over the blocks
        dq, dk, dv = (xp.empty(x.shape, to) for x, to in ((qs, dtype), (ks, summed), (vs, summed)))

        def block(h, t, end):
            q, p = scores(h, t, end)
            rounded = formulas.exp_less(p, merged(L[h, :, t]), dtype)
            d, add = merged(dout[h, :, t]), t.stop < T          # the first block sees all keys
            device.matmul(_t(rounded), d, out=dv[h, :end], accumulate=add)
            del rounded                         # memory for what follows
            dp = device.matmul(d, _t(vs[h, :end]), dtype=wide)
            ds = formulas.less_times(dp, device.row_dot(p, dp), p, dtype)           # p (dp - δ)
            if G == 1 or queries == T:
                device.matmul(ds, ks[h, :end], out=merged(dq[h, :, t]), scale=scale)
            else:
                dq[h, :, t] = split(device.matmul(ds, ks[h, :end], scale=scale))
            device.matmul(_t(ds), q, out=dk[h, :end], accumulate=add, scale=scale)
        device.sweep(_by_queries(block, T, S, queries), B * K, heads)
        dk, dv = (x.astype(dtype, copy=False).reshape(B, K, S, D) for x in (dk, dv))
        return dq.reshape(B, H, T, D), dk, dv
    return record(out.reshape(B, H, T, D), (q, k, v), backward)


# ---------------------------------------------------------------- dropout and recomputation

def dropout(x, p, key):
    """out = x * keep / (1 - p): each element becomes 0 with probability p, and the mean is kept.

    dx = dout * keep / (1 - p). `keep` is not saved but computed again from `key`, a tuple of ints;
    its last is the number of x's first row.  (Srivastava et al. 2014, §4 and §10)
    """
    if p == 0:
        return x
    return record(drop(x.data, p, key), (x,), lambda dout: (drop(dout, p, key),))


def recompute(f, x):
    """f(x), but only x is kept for backward, which runs f again and then backpropagates through it.

    One more forward pass saves the memory of f's activations. The gradients are the same to the
    last bit; weights in f get theirs from the second graph's backward.  (Chen et al. 2016, §4)
    """
    if not recording(x):
        return f(x)
    with no_grad():
        start, out = x.data, f(x).data
    def backward(dout):
        again = Tensor(start, requires_grad=True)
        f(again).backward(dout)
        return (again.grad,)
    return record(out, (x,), backward)


# ---------------------------------------------------------------- loss

def cross_entropy(logits, targets):
    """-mean of log softmax(logits)[target], in nats.  logits (..., V), targets (...) -> scalar.

    The loss of a row is L - z_y, with y its target and L = log sum_j exp(z_j). Its derivative with
    respect to z_j is exp(z_j)/sum, the softmax p_j, minus 1 where j = y. So for N rows
        dz_j = dout/N · (p_j - 1[j = y])        # what the model said minus what was true

    >>> logits = Tensor(np.log([[1.0, 3.0]]), requires_grad=True)       # p = 1/4, 3/4
    >>> loss = cross_entropy(logits, [1])
    >>> loss.backward()
    >>> round(loss.data.item(), 4), logits.grad.round(4).tolist()       # -ln(3/4), p - (0, 1)
    (0.2877, [[0.25, -0.25]])
    """
    z, shape, dtype = _wide(_rows(logits.data)), logits.shape, logits.dtype
    target = device.xp.arange(len(z)), device.as_ids(targets, shape[-1]).reshape(-1)
    z = z - z.max(-1, keepdims=True)
    L = device.xp.log(device.xp.exp(z).sum(-1, keepdims=True))

    def backward(dout):
        dz = device.xp.exp(z - L)               # p
        dz[target] -= 1
        return ((dz * (dout / len(z))).astype(dtype, copy=False).reshape(shape),)
    return record((L[:, 0] - z[target]).mean(), (logits,), backward)


_LOGITS = 3 << 22       # elements of a block of logits on a CPU: 48 MB in float32


def logit_blocks(rows, weight):
    """Yield (slice, rows[slice] @ weightᵀ); the next overwrites it. If N allows, 64 rows."""
    N, V = len(rows), len(weight)
    count = math.ceil(N * V / _LOGITS) or 1     # on a CPU, of one length: none larger than needed
    size = device.rows_at_once(V, math.ceil(N / count), 64)
    logits = device.empty_rows(min(size, N), V, _wide_dtype(rows))
    for start in range(0, N, size):
        part = slice(start, min(start + size, N))
        yield part, device.linear(rows[part], weight, out=logits[:part.stop - start])


def loss_of_rows(z, targets, losses, dz=False):
    """Write each row's L - z_y to losses (N,). z (N, V) is lost; with dz it becomes p - onehot."""
    def block(part):
        p, target = z[part], targets[part]
        top, own = p.max(-1, keepdims=True), formulas.at(p, target)
        formulas.exp_less(p, top)
        total = p.sum(-1, keepdims=True)
        formulas.less_plus_log(top[:, 0], own, total[:, 0], losses[part])
        if dz:
            formulas.divide_less_one(p, total, target)
    _sweep_rows(block, *z.shape)


def linear_cross_entropy(x, w, targets):
    """cross_entropy(linear(x, w), targets), a block of logits at a time.  x (..., C), w (V, C)

    With a large vocabulary the logits, N·V, would be a model's largest array. But a row's logits
    serve only its own loss and gradient, which backward only scales by dout/N. So each block of
    rows (3·2²² logits, 48 MB) computes its logits z, overwrites them with dz = p - onehot and adds
        dx_block = dz @ w,   dw += dzᵀ @ x_block
    (The idea of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, §3.2.)

    In half precision, logits, dx and dw are float32, and the products' inputs are half. Most of dz
    is 1/V or far less; a float16 loses digits below 6e-5 and becomes 0 below 3e-8. But all of dz
    is within ±1, so 2¹⁵ dz, which is rounded instead, still fits (the largest float16 is 65504).
    """
    rows, shape, dtype, wide = _rows(x.data), x.shape, x.dtype, _wide_dtype(x)
    N, V, weight = len(rows), len(w.data), device.rounded(w, dtype)
    lift = 1 if dtype == wide else 2.0 ** 15
    targets = device.as_ids(targets, V).reshape(-1)
    losses, keep = device.xp.empty(N, wide), recording(x, w)
    if keep:
        dx, dw = device.xp.empty(rows.shape, wide), device.xp.zeros(weight.shape, w.dtype)
    for part, z in logit_blocks(rows, weight):
        loss_of_rows(z, targets[part], losses[part], keep)
        if keep:
            dz = z if dtype == wide else formulas.scaled(z, wide.type(lift), dtype)
            device.matmul(dz, weight, out=dx[part])
            device.matmul(_t(dz), rows[part], out=dw, accumulate=True)
            del dz                              # memory for the next one

    def backward(dout):
        scale = dout / (N * lift)
        dx_scaled = formulas.scaled(dx, scale, dtype).reshape(shape)
        return dx_scaled, lambda total: formulas.add_scaled(total, dw, scale)
    return record(losses.mean(), (x, w), backward)
