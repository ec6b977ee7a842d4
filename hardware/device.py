"""NumPy or CuPy: the one file that knows which, and how to keep either busy.

All other files use `device.xp`, which is NumPy or CuPy, and these helpers:

    matmul(a, b)     the matrix product: cuBLAS on a GPU, BLAS split over our threads on a CPU
    sweep(f, n, b)   f(rows) for slices of rows: everything at once on a GPU, cache-sized blocks on a CPU
    fuse(formula)    an elementwise formula: one compiled kernel on a GPU, itself on a CPU
    row_dot(a, b)    sum(a * b) along the last axis
    add_rows(...)    out[ids[i]] += rows[i]
    as_ids(ids, n)   token ids on the device, checked
    linear(x, w)     x @ wᵀ for a weight that is an array or a matrix in 8 or 4 bits
    to_host(array)   the array as NumPy has it, on the host; floats(a, b) are two numbers in one transfer

Always write `device.xp`, never `from hardware.device import xp`: the device is chosen when `xp` is first read, by
`NANOLLM_DEVICE` (auto, gpu or cpu), unless `use` was called before. Importing this file changes nothing; `use` does:
on a CPU it takes over BLAS's threads, and has the C library keep freed memory.
"""
import contextlib
import ctypes
import functools
import math
import os
import queue
import threading
from pathlib import Path

import ml_dtypes  # noqa: F401  (makes bfloat16 a type of NumPy's)
import numpy as np
from threadpoolctl import ThreadpoolController


class Unavailable(ValueError):
    """What was asked of the machine cannot be had; the message says why and what to do, in one line."""


# ---------------------------------------------------------------- the choice

on_gpu = tf32_products = False      # until a device is chosen; xp, reason and threads do not exist before
_no_gpu = ""                            # why none was chosen, where one would have been


def use(name=None, tf32=False, team=None):
    """Choose the device: "gpu" is CuPy, "cpu" is NumPy, "auto" is the GPU where one works.

    Call it before a model is made. Without a name the device that was chosen before is kept; if there is none,
    NANOLLM_DEVICE decides, by default auto. `device.reason` then says what was chosen and why. tf32 lets a GPU round
    the inputs of float32 products to TF32's 10 bits of mantissa (8 times the rate). A rank of a `team` (ranks.py)
    takes its share of the machine: some of the threads, or one card.
    Raises Unavailable for another name, for "gpu" where none works (with CuPy's reason), and for a NANOLLM_THREADS that
    is not a number of threads.
    """
    global xp, on_gpu, reason, threads, tf32_products, _no_gpu
    if name is None and "xp" in globals():
        tf32_products = tf32
        return
    source = "device" if name else "NANOLLM_DEVICE"
    name = name or os.environ.get("NANOLLM_DEVICE") or "auto"
    if name not in ("auto", "gpu", "cpu"):
        raise Unavailable(f"{source} {name!r}: must be auto, gpu or cpu")
    count = max(_thread_count() // (team.here if team else 1), 1)
    library, card, _no_gpu = np, None, _no_gpu if team else ""
    if name != "cpu":
        try:
            library, card = _find_gpu(team)
        except Exception as problem:            # whatever CuPy or CUDA raise: there is no GPU to use
            why = " ".join(str(problem).split()) or type(problem).__name__
            if name == "gpu":
                raise Unavailable(
                    f"{source} gpu: {why}; use --device cpu, or install CuPy and CUDA (see README)") from None
            _no_gpu = f"; no GPU: {why}"
    xp, on_gpu, threads, tf32_products = library, card is not None, count, tf32
    if on_gpu:
        reason = f"gpu (CuPy {xp.__version__}, {f'{team.size} x ' if team else ''}{card})"
        _blas_threads(None)
    else:
        several = f"{team.size} processes of " if team else ""
        reason = f"cpu (NumPy {np.__version__}, {several}{threads} thread{'s' if threads > 1 else ''}){_no_gpu}"
        _keep_freed_memory()
        _blas_threads(1)                        # `sweep` splits the work: BLAS must not split it again


def _find_gpu(team):
    """(cupy, the card's name). Raises whatever CuPy or CUDA raise where no GPU can compute."""
    import cupy
    if not cupy.is_available():
        raise RuntimeError("CuPy is installed, but sees no CUDA GPU or driver")
    if team:
        cupy.cuda.Device(team.local_rank % cupy.cuda.runtime.getDeviceCount()).use()
    probe = cupy.ones((2, 2), np.float32)
    float(cupy.exp(probe @ probe).sum())        # cuBLAS or the kernel compiler may be missing: find out now
    return cupy, cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def _thread_count():
    """How many threads share the work on a CPU: NANOLLM_THREADS, or one for each core that this process may use."""
    wanted = os.environ.get("NANOLLM_THREADS")
    if not wanted:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return math.ceil(min(cores, _quota()))
    if not (wanted.isdecimal() and len(wanted) <= 4 and 1 <= int(wanted) <= 1024):
        raise Unavailable(f"NANOLLM_THREADS must be a whole number from 1 to 1024, not {wanted!r}")
    return int(wanted)


def _quota(root=Path("/")):
    """How many cores' time this process may take, 1.5 after `docker run --cpus 1.5`; infinity if there is no limit.

    On Linux each process is in a control group, which has a limit or has it from a group above. /proc/self/cgroup names
    the group: in version 1 that of the controller "cpu", in version 2 of no controller. Its folder is below the place
    where its kind of groups is mounted; a container may see only the lower part of the tree.
    """
    groups, limits = {}, [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            groups |= dict.fromkeys(controllers.split(","), group)
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            place, kind = line.split(" - ", 1)
            top, mount = place.split()[3:5]
            group = groups.get({"cgroup": "cpu", "cgroup2": ""}.get(kind.split()[0]))
            if group is None:
                continue
            folder = root / mount[1:]
            for part in ["", *Path(os.path.relpath(group, top)).parts]:
                folder = folder / part
                limits += _limit(folder, "cpu.max") + _limit(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us")
    return min(limits)


def _limit(folder, *names):
    """[how many cores' time a control group may take, by these files]; [] if there is none, or no limit."""
    with contextlib.suppress(OSError, ValueError):      # ValueError: "max"
        quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
        return [quota / period] if quota > 0 else []
    return []


def places():
    """How many processes can share this machine: one for each thread, or for each card."""
    return xp.cuda.runtime.getDeviceCount() if on_gpu else threads


def __getattr__(name):
    if name in ("xp", "reason", "threads"):
        use()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def to_host(array):
    """The NumPy array with the same elements; waits for the GPU where the array is there."""
    return array.get() if on_gpu and isinstance(array, xp.ndarray) else np.asarray(array)


def floats(*numbers):
    """0-d arrays and numbers as Python's floats. A GPU is waited for once."""
    return to_host(xp.stack([xp.asarray(number) for number in numbers])).tolist() if numbers else []


def as_ids(ids, limit):
    """`ids` as an integer array on the device. A GPU wraps a wrong index around silently, so ids are checked here,
    on the host; an array that is on the GPU already is taken as it is.

    Raises TypeError for numbers that are not integers and IndexError for one outside 0 … limit-1.
    """
    if on_gpu and isinstance(ids, xp.ndarray):
        return ids
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":              # signed or unsigned
        raise TypeError(f"token ids must be integers, not {ids.dtype}")
    if ids.size and ids.astype(np.uint64).max() >= limit:       # what is below 0 becomes huge
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise IndexError(f"token id {wrong} is outside 0 … {limit - 1}: is this the model's tokenizer?")
    return xp.asarray(ids)


# ---------------------------------------------------------------- memory, threads and blocks

def _keep_freed_memory():
    """Have glibc keep the memory of large arrays, which it would return to the system after each use: getting it back
    costs page faults, 10 to 20 % of a training step. (M_MMAP_MAX 0, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX 1)
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):      # another C library: nothing to set
        for parameter, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 1 << 26), (-8, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


@functools.cache
def _blas_libraries():
    """[(a BLAS library of this process, the number of threads it had before we set any)]"""
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    return [(library, library.num_threads) for library in libraries]


def _blas_threads(n):
    """Let BLAS use n threads; None: as many as before."""
    for library, before in _blas_libraries():
        library.set_num_threads(n or before)


_workers = []                                   # threads, started by the first sweep that needs them
_jobs = queue.SimpleQueue()                     # of (a share of a sweep, the queue that waits for its end)
_here = threading.local()                       # .busy: this thread is already inside a sweep


def _start_workers(n):
    """Have n worker threads. A forked child inherits none of its parent's: it starts its own."""
    if not _workers and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_workers)
    while len(_workers) < n:                    # a queue hands over in a third of concurrent.futures' time
        _workers.append(threading.Thread(target=_work, args=(_jobs,), name="sweep", daemon=True))
        _workers[-1].start()


def _forget_workers():
    global _jobs
    _workers.clear()
    _jobs = queue.SimpleQueue()


def _work(jobs):
    np.seterr(over="ignore")                    # a worker's own setting; NaN still warns
    _here.busy = True
    while True:
        (share, ended), problem = jobs.get(), None
        try:
            share()
        except BaseException as raised:         # the thread that waits raises it
            problem = raised
        del share                               # before that thread wakes up: it may be the last to hold its arrays
        ended.put(problem)
        del ended, problem


def sweep(f, n, block):
    """[f(slice), ...] for slices that cover range(n): the loop under every row-wise operation.

    On a GPU there is one slice, all of it. On a CPU slices of at most `block` rows, small enough to stay in
    the cache while f passes over them several times, are shared between the threads (NumPy releases
    Python's lock while it computes). The slices do not depend on the number of threads, and the results are in
    their order: the same arguments give the same bits.
    """
    if on_gpu or n <= block:
        return [f(slice(0, n))] if n else []
    count = math.ceil(n / max(int(block), 1))
    count += count % 2                          # an even number: on two cores both end together
    size = math.ceil(n / count)
    slices = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    results, left = [None] * len(slices), iter(enumerate(slices))

    def share():
        for i, rows in left:                    # whoever is free takes the next
            results[i] = f(rows)

    helpers = min(threads, len(slices)) - 1
    if helpers < 1 or getattr(_here, "busy", False):
        share()
        return results
    _start_workers(helpers)
    ended = queue.SimpleQueue()
    for _ in range(helpers):
        _jobs.put((share, ended))
    _here.busy = True
    try:
        share()
    finally:                                    # also after an error: nobody may still be writing then
        _here.busy = False
        problems = [ended.get() for _ in range(helpers)]
    for problem in problems:
        if problem:
            raise problem
    return results


def joined(parts):
    """The rows (n, 1) that each call of a sweep returned, in one array."""
    return parts[0] if len(parts) == 1 else xp.concatenate(parts or [xp.empty((0, 1))])


def add_each(out, arrays):
    """out += array, for each of them in turn."""
    for array in arrays:
        out += array


def add_rows(out, ids, rows):
    """out[ids[i]] += rows[i] for every i: ids (N,) may repeat, rows (N, C). (On a GPU in no fixed order.)"""
    if on_gpu:
        xp.add.at(out, ids, rows)
    elif len(ids):                              # NumPy's add.at is slow: sum the runs of equal ids instead
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        out[ids[starts]] += np.add.reduceat(rows[order], starts)


def fuse(formula):
    """Decorate an elementwise formula that changes some of its arguments, arrays, in place.

    On a GPU CuPy compiles it into one kernel: one pass over memory instead of one for each operator.
    On a CPU it runs as it stands; call it on the rows of a `sweep`, so that its passes stay in the cache.
    """
    kernels = {}                                # of each library: tests also have one that only seems to be CuPy

    def call(*arrays):
        if not on_gpu:
            return formula(*arrays)
        if xp not in kernels:
            kernels[xp] = xp.fuse(formula)
        return kernels[xp](*arrays)

    call.formula, call.kernels = formula, kernels
    return call


BLOCK = 16_000_000      # elements of a GPU's largest temporary: 64 MB of float32
WHOLE = 64              # on a GPU a number of rows, and a row's elements in memory, are a multiple of this


def rows_at_once(width, on_cpu, least):
    """How many rows of `width` elements are computed at once: on a GPU those of a BLOCK; at least `least`."""
    return max(BLOCK // width // WHOLE * WHOLE if on_gpu else on_cpu, least)


def empty_rows(n, width, dtype):
    """An array (n, width) to be filled. On a GPU its rows begin where tensor cores read at their full rate."""
    stride = math.ceil(width / WHOLE) * WHOLE if on_gpu else width
    return xp.empty((n, stride), dtype)[:, :width]


def cast(x, out):
    """out[...] = x, vectors, out perhaps of another type and shorter."""
    def block(s):
        out[s] = x[s]
    sweep(block, out.size, 1 << 17)


def wide(x):
    """x, or its float32 if it is of half precision."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def loaded(x):
    """x as formulas read it: on a CPU half precision becomes float32 once, a GPU's kernels widen what they read."""
    return x if on_gpu else wide(x)


def row_dot(a, b):
    """sum(a * b) along the last axis, (..., n) -> (..., 1), without ever holding a * b."""
    return (_row_dot(a, b) if on_gpu else np.vecdot(a, b))[..., None]


@fuse
def _row_dot(a, b):
    return xp.sum(wide(a) * b, axis=-1)


def sum_of_squares(g):
    """The sum of all g² of a vector: a number, or a 0-d array that a GPU still computes."""
    if not on_gpu:
        return sum(sweep(lambda s: float(g[s] @ g[s]), g.size, 1 << 18))
    rows = g.reshape(-1, math.gcd(g.size, 1 << 12))     # one kernel cannot sum everything and keep the card busy
    return row_dot(rows, rows).sum()


# ---------------------------------------------------------------- the matrix product

def matmul(a, b, out=None, accumulate=False, dtype=None, scale=1):
    """scale · a (..., m, k) @ b (..., k, n) -> (..., m, n), written into `out`, or added to it with accumulate=True.

    Transposed views are not copied. a and b have equal leading axes, or none at all. Half precision is multiplied and
    summed as float32, and rounded once, unless `out` or `dtype` is float32.
    """
    if out is None:
        dtype = dtype or np.promote_types(a.dtype, b.dtype)
        if not on_gpu and a.dtype == b.dtype == dtype and a.itemsize > 2 and _FEW * a.size * b.shape[-1] < _SMALL:
            return np.matmul(a if scale == 1 else a * scale, b)         # by far the shortest way, as in generation
        out = xp.empty((*a.shape[:-1], b.shape[-1]), dtype)
    if out.size == 0 or a.shape[-1] == 0:
        if not accumulate:
            out[...] = 0
    elif on_gpu:
        _cublas(a, b, out, accumulate, scale)
    else:
        _blas(a, b, out, accumulate, scale)
    return out


def _product(a, b, out, accumulate):
    if accumulate:
        out += np.matmul(a, b)
    else:
        np.matmul(a, b, out=out)


_SMALL = 1 << 21        # multiplications below which handing work to a thread costs more than it gains
_FEW = 3                # rows: fewer take as long as this number, because reading the weights dominates
_TILE = 1 << 19         # elements of a product that is added to `out`: it must still be in the cache then


def _blas(a, b, out, accumulate, scale=1):
    """Split one product over the threads: by matrices, by the rows of a single one, or as BLAS itself does it."""
    if a.dtype.itemsize == 2:           # the arithmetic of a GPU's tensor cores
        a, b = a.astype(np.float32), b.astype(np.float32)
    if scale != 1:
        a, b = (a * scale, b) if a.size <= b.size else (a, b * scale)
    if out.dtype.itemsize == 2:
        wide = out.astype(np.float32) if accumulate else np.empty(out.shape, np.float32)
        _blas(a, b, wide, accumulate)
        with np.errstate(over="ignore"):        # infinity is a result
            out[...] = wide
        return
    m, n = out.shape[-2:]
    if out.size // m * max(m, _FEW) * a.shape[-1] < _SMALL:
        _product(a, b, out, accumulate)
        return
    alone, tiles = threads == 1 or getattr(_here, "busy", False), accumulate and out.ndim == 2 and m >= 64
    if alone and not tiles:
        _product(a, b, out, accumulate)
    elif out.ndim > 2:
        sweep(lambda s: _product(a[s], b[s], out[s], accumulate), len(out), math.ceil(len(out) / threads))
    elif m >= 64:
        block = math.ceil(m / threads)
        if accumulate:
            block = min(block, max(_TILE // n, 128))
        sweep(lambda s: _product(a[s], b, out[s], accumulate), m, block)
    else:                               # few rows, as in generation: BLAS's own threads busy-wait for the next product
        _blas_threads(threads)
        _product(a, b, out, accumulate)
        _blas_threads(1)


def rounded(w, dtype):
    """A weight's array in this type: the Tensor's `half`, if the model has rounded all weights at once."""
    ready = w.half is not None and w.half.dtype == dtype
    return w.half if ready else w.data.astype(dtype, copy=False)


def linear(x, w, out=None):
    """x (N, C) @ wᵀ -> (N, F); w (F, C) is an array, or a matrix in 8 or 4 bits, which has its own `times`."""
    if isinstance(w, xp.ndarray):
        return matmul(x, w.T, out=out)
    return w.times(x, xp.empty((len(x), len(w)), x.dtype) if out is None else out)


_CUDA_TYPE = {np.dtype(name): number for name, number in (              # cudaDataType
    ("float32", 0), ("float64", 1), ("float16", 2), ("bfloat16", 14))}


def _cublas(a, b, out, accumulate, scale):
    """out = scale a @ b (+ out) by cublasGemmEx or cublasGemmStridedBatchedEx; half inputs may have a float32 `out`.

    cuBLAS counts columns first: what it sees is the transpose of every row-major matrix, and outᵀ = bᵀ aᵀ.
    Hundreds of products a step come through here. What looks cheap, such as dtype.name, would cost more than the call.
    """
    from cupy_backends.cuda.libs import cublas
    kind, out_kind = _CUDA_TYPE[a.dtype], _CUDA_TYPE[out.dtype]
    compute = 68                                # cublasComputeType: float32
    if out_kind == 1:
        compute = 70                            # float64
    elif tf32_products and kind == 0:
        compute = 77                            # float32 by TF32
    alpha, beta = _address(scale, compute == 70), _address(int(accumulate), compute == 70)
    a, ta, lda, sa = _as_cublas(a)
    b, tb, ldb, sb = _as_cublas(b)
    target, tc, ldc, sc = _as_cublas(out)
    if target is not out or tc:
        raise ValueError("matmul: the rows of `out` must be contiguous and its leading axes one stride apart")
    (m, k), n, count = a.shape[-2:], b.shape[-1], out.size // (out.shape[-2] * out.shape[-1])
    handle = xp.cuda.device.get_cublas_handle()
    a_args, b_args = (a.data.ptr, kind, lda), (b.data.ptr, _CUDA_TYPE[b.dtype], ldb)
    c_args = out.data.ptr, out_kind, ldc
    if count == 1:
        cublas.gemmEx(handle, tb, ta, n, m, k, alpha, *b_args, *a_args, beta, *c_args, compute, -1)
    else:
        cublas.gemmStridedBatchedEx(handle, tb, ta, n, m, k, alpha, *b_args, sb, *a_args, sa, beta, *c_args, sc,
                                    count, compute, -1)


@functools.cache
def _number(value, wide):
    return np.array(value, np.float64 if wide else np.float32)


@functools.cache
def _address(value, wide):
    """Where cuBLAS finds this number in host memory; `_number` keeps it there."""
    return _number(value, wide).ctypes.data


def _as_cublas(x):
    """(array, transposed, leading dimension, batch stride), copied only where no such description fits x."""
    itemsize, shape, steps = x.itemsize, x.shape, x.strides
    (m, n), rows, columns = shape[-2:], steps[-2] // itemsize, steps[-1] // itemsize
    stride, one_stride = 0, True
    if len(shape) > 2:
        axes = [(size, step // itemsize) for size, step in zip(shape[:-2], steps, strict=False) if size > 1]
        one_stride = all(axes[i][1] == axes[i + 1][0] * axes[i + 1][1] for i in range(len(axes) - 1))
        stride = axes[-1][1] if axes else 0
    if one_stride and (columns == 1 or n == 1) and (rows >= n or m == 1):
        return x, 0, max(rows, n) if m > 1 else n, stride
    if one_stride and (rows == 1 or m == 1) and (columns >= m or n == 1):
        return x, 1, max(columns, m) if n > 1 else m, stride
    x = xp.ascontiguousarray(x)
    return x, 0, n, m * n
