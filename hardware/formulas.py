"""Elementwise formulas of several ops, each of them one kernel on a GPU, and what a GPU does in another way than a CPU.

A formula that changes an argument says so; `out` comes last.
"""
import functools

import numpy as np

from hardware import device
from hardware.device import fuse, sweep


def exp_less(x, top, dtype=None):
    """x becomes exp(x - top). Returned in this dtype: x itself, or a rounded copy."""
    return _rounded_too(_exp_less, _exp_less_rounded, dtype, x, top)


def less_times(x, y, z, dtype=None):
    """x becomes (x - y) z. Returned in this dtype: x itself, or a rounded copy."""
    return _rounded_too(_less_times, _less_times_rounded, dtype, x, y, z)


def _rounded_too(formula, with_copy, dtype, x, *others):
    if dtype is None or dtype == x.dtype:
        formula(x, *others)
        return x
    out = device.xp.empty(x.shape, dtype)
    with_copy(x, *others, out)
    return out


@fuse
def _exp_less(x, top):
    x -= top
    device.xp.exp(x, x)


@fuse
def _exp_less_rounded(x, top, out):
    _exp_less(x, top)
    out[...] = x


@fuse
def _less_times(x, y, z):
    x -= y
    x *= z


@fuse
def _less_times_rounded(x, y, z, out):
    _less_times(x, y, z)
    out[...] = x


@fuse
def copy_both(a, b, to_a, to_b):
    """to_a becomes a, and to_b becomes b, of one shape."""
    to_a[...] = a
    to_b[...] = b


@fuse
def plus_log(a, b, out):
    """out becomes a + log b."""
    device.xp.add(a, device.xp.log(b), out)


@fuse
def less_plus_log(a, b, c, out):
    """out becomes a - b + log c."""
    device.xp.add(a - b, device.xp.log(c), out)


_r = lambda q, C, eps: 1 / device.xp.sqrt(q / C + eps)


@fuse
def rmsnorm(x, q, w, C, eps, out):
    """out becomes x r w, where r = (q/C + eps)^(-1/2) and q = sum(x²)."""
    device.xp.multiply(x * _r(q, C, eps), w, out)


def rmsnorm_sums(x, q, dout, w, C, eps):
    """sum(g w) of each row (N, 1) and sum(g) of each column (C,), for g = dout x r, which a GPU never holds."""
    if device.on_gpu:
        return _g_along_rows(x, q, dout, w, C, eps)[:, None], _g_along_columns(x, q, dout, C, eps)
    g = _g(x, q, dout, C, eps)
    return device.row_dot(g, w), g.sum(0)


def _g(x, q, dout, C, eps):             # at least float32
    g = device.wide(dout) * x
    g *= _r(q, C, eps)
    return g


@fuse
def _g_along_rows(x, q, dout, w, C, eps):
    return device.xp.sum(_g(x, q, dout, C, eps) * w, axis=-1)


@fuse
def _g_along_columns(x, q, dout, C, eps):
    return device.xp.sum(_g(x, q, dout, C, eps), axis=0)


@fuse
def rmsnorm_dx(x, q, dout, w, dot, C, eps, dx):
    """dx becomes dout w r - x r² dot/C, where dot = sum(g w)."""
    r = _r(q, C, eps)
    dn = dout * w
    dn *= r
    device.xp.subtract(dn, x * (dot / C * r * r), dx)


def scaled(x, scale, dtype):
    """x (N, C) * scale in this dtype; scale is typed."""
    return device.xp.multiply(x, scale, out=device.empty_rows(*x.shape, dtype))


def add_scaled(out, x, scale):
    """out += x * scale, (N, C) each."""
    sweep(lambda rows: _add_scaled(out[rows], x[rows], scale), len(x), (1 << 16) // x.shape[1])


@fuse
def _add_scaled(out, x, scale):
    out += x * scale


def at(z, targets):
    """z[i, targets[i]] for every row of z (N, V), targets (N,) -> (N,)."""
    if device.on_gpu:
        return _at(z, _numbers(device.xp, z.shape[1]), targets[:, None])
    return z[np.arange(len(z)), targets]


def count_below(z, own):
    """How many numbers of each row of z (N, V) are below that of own (N, 1) -> (N,)."""
    return _count_below(z, own) if device.on_gpu else (z < own).sum(-1, dtype=np.uint32)


@fuse
def _count_below(z, own):
    return device.xp.sum(z < own, axis=-1)


def divide_less_one(z, total, targets):
    """z /= total (N, 1), and then z[i, targets[i]] -= 1 for every row of z (N, V)."""
    if device.on_gpu:
        _divide_less_one(z, total, _numbers(device.xp, z.shape[1]), targets[:, None])
    else:
        z /= total
        z[np.arange(len(z)), targets] -= 1


@functools.lru_cache(4)
def _numbers(library, n):
    return library.arange(n)


@fuse
def _at(z, number, target):
    return device.xp.sum(device.xp.where(number == target, z, z.dtype.type(0)), axis=-1)


@fuse
def _divide_less_one(z, total, number, target):
    z[...] = z / total - (number == target)


def rotate(x, cos, sin, back=False):
    """x (..., T, D) times cos, plus (-x₂, x₁) times sin, x₁ and x₂ the halves of a row; cos and sin (T, D).

    back=True turns by the opposite angles. A contiguous copy of whole heads is turned in place, in the cache.
    """
    if device.on_gpu:
        return _rotate_on_gpu(x, cos, sin, back)
    out, (T, D) = x.copy(), x.shape[-2:]
    halves = T, 2, D // 2
    heads, cos = out.reshape(-1, *halves), cos.reshape(halves)          # views
    sin = sin.reshape(halves) * (_SIGNS[::-1] if back else _SIGNS)      # (-x₂, x₁) sin = (x₂, x₁) (-sin, sin)

    def block(part):
        xs = heads[part]
        swapped = np.concatenate((xs[:, :, 1:], xs[:, :, :1]), 2)       # long rows: faster than a view that turns back
        swapped *= sin
        xs *= cos
        xs += swapped
    sweep(block, len(heads), (1 << 16) // max(cos.size, 1))
    return out


_SIGNS = np.array([[-1], [1]], np.float32)


def _rotate_on_gpu(x, cos, sin, back):
    """The same in one kernel, which reads x where it is. The opposite angles are the same with the halves exchanged."""
    half, out = x.shape[-1] // 2, device.xp.empty(x.shape, x.dtype)
    halves = [slice(half), slice(half, None)][::-1 if back else 1]
    x1, x2, out1, out2 = (array[..., part] for array in (x, out) for part in halves)
    _rotate(x1, x2, cos[:, :half], sin[:, :half], out1, out2)
    return out


@fuse
def _rotate(x1, x2, cos, sin, out1, out2):
    out1[...] = x1 * cos - x2 * sin
    out2[...] = x2 * cos + x1 * sin


@fuse
def clipping(loss, norm, limit, loss_scale):
    """What Adam multiplies the gradients by: 1/loss_scale undoes the loss scale, and a factor of at most 1 brings their
    norm, `norm` / loss_scale, down to the limit. NaN if the loss or the norm is not finite.
    """
    longest = device.xp.maximum(norm / loss_scale, limit)
    return limit / longest / loss_scale + 0 * (loss + norm)     # 0 * infinity is NaN


def scaled_or_0(g, scale):
    """g * scale. On a GPU it is 0 for the scale 0, even where g is NaN or infinity."""
    return device.xp.where(scale == 0, 0, g * scale) if device.on_gpu else g * scale


@fuse
def adam_factors(scale, lr, beta1, beta2, weight_decay, t, of_g, of_new_m, of_new_v, step_size, root, decay):
    """t becomes the number of this step, and the others what Adam multiplies by in it. If the scale is not finite, t
    stays, and they become what changes nothing. t is float64 and is in all that is computed: among numbers alone, or a
    number and a bool, CuPy computes in half precision.
    """
    go = 0 * t + device.xp.isfinite(0 * t + scale)
    t += go
    of_g[...] = device.xp.where(go > 0, 0 * t + scale, 0)
    of_new_m[...] = go - go * beta1
    of_new_v[...] = go - go * beta2
    step_size[...] = go * lr / (1 - beta1 ** device.xp.maximum(t, 1))
    root[...] = (1 - beta2 ** device.xp.maximum(t, 1)) ** -0.5
    decay[...] = 1 - go * lr * weight_decay
