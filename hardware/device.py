"""NumPy or CuPy: the one file that knows which, and how to keep either busy.

Everything above speaks to `device.xp`, which is NumPy or CuPy, and to these helpers:

    matmul(a, b)     the matrix product: cuBLAS on a GPU, BLAS split over our threads on a CPU
    sweep(f, n, b)   f(rows) for slices of rows: everything at once on a GPU, cache-sized blocks on a CPU
    fuse(formula)    an elementwise formula: one compiled kernel on a GPU, itself on a CPU
    row_dot(a, b)    sum(a * b) along the last axis
    add_rows(...)    out[ids[i]] += rows[i]
    to_host(array)   a NumPy array, wherever the data was

Always write `device.xp`, never `from device import xp`: the device is chosen when `xp` is first read, by
`NANOLLM_DEVICE` (auto, gpu or cpu) unless `use` came before.
"""
import contextlib
import ctypes
import os
import queue
import threading
import time

import ml_dtypes  # noqa: F401  (makes bfloat16 a type of NumPy's)
import numpy as np
from threadpoolctl import ThreadpoolController

np.seterr(over="ignore")    # infinity is a result, as on a GPU: train.py finds it in the gradients; NaN still warns


class Unavailable(ValueError):
    """There is no such device here; the message says why, in one line."""


# ---------------------------------------------------------------- the choice

on_gpu = False
tf32 = False            # GPU: let float32 products round their inputs to TF32's 10 bits of mantissa (8x the rate)


def use(name="auto"):
    """Choose the device: "gpu" is CuPy, "cpu" is NumPy, "auto" is the GPU where one works.

    Call it before a model is made. `device.reason` then says what was chosen and why.
    Raises Unavailable for another name, and for "gpu" where none works (with the reason that CuPy gave).
    """
    global xp, on_gpu, reason
    if name not in ("auto", "gpu", "cpu"):
        raise Unavailable(f"device {name!r}: must be auto, gpu or cpu")
    xp, on_gpu, reason = np, False, f"cpu (NumPy {np.__version__}, {threads} threads)"
    if name == "cpu":
        return
    try:
        import cupy
        if not cupy.is_available():
            raise RuntimeError("CuPy is installed, but sees no CUDA GPU or driver")
        probe = cupy.ones((2, 2), np.float32)
        float(cupy.exp(probe @ probe).sum())    # cuBLAS or the kernel compiler may be missing: find out now
        card = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        xp, on_gpu, reason = cupy, True, f"gpu (CuPy {cupy.__version__}, {card})"
    except Exception as problem:                # whatever CuPy or CUDA raise: there is no GPU to use
        why = " ".join(str(problem).split()) or type(problem).__name__
        if name == "gpu":
            raise Unavailable(f"device gpu: {why}; use --device cpu, or install CuPy and CUDA (see README)") from None
        reason += f"; no GPU: {why}"


def __getattr__(name):                          # reached only while `xp` and `reason` do not exist yet
    if name in ("xp", "reason"):
        use(os.environ.get("NANOLLM_DEVICE", "auto"))
        return globals()[name]
    raise AttributeError(f"module 'device' has no attribute {name!r}")


def to_host(array):
    """The NumPy array with the same elements; waits for the GPU where the array is there."""
    return array.get() if on_gpu and isinstance(array, xp.ndarray) else np.asarray(array)


def mark():
    """A moment, for `seconds`: on a GPU in its own queue of work, so that nobody has to wait for it now."""
    if not on_gpu:
        return time.perf_counter()
    event = xp.cuda.Event()
    event.record()
    return event


def seconds(start, end):
    """Between two marks. Waits for the GPU to come to the second one."""
    if not on_gpu:
        return end - start
    end.synchronize()
    return xp.cuda.get_elapsed_time(start, end) / 1000


# ---------------------------------------------------------------- memory, threads and blocks

def _keep_freed_memory():
    """Have glibc reuse the memory of large arrays, which it would return to the system: each new one is then paid for
    with page faults, a tenth to a fifth of a training step. (M_MMAP_MAX 0, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX 1)
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):      # another C library: nothing to set
        for parameter, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 1 << 26), (-8, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


_keep_freed_memory()

threads = int(os.environ.get("NANOLLM_THREADS", 0)) or (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
_jobs = queue.SimpleQueue()                     # of (a share of a sweep, the queue that waits for its end)
_here = threading.local()                       # .busy: this thread is already inside a sweep
_blas_libraries = ThreadpoolController().select(user_api="blas").lib_controllers


def _blas_threads(n):
    for library in _blas_libraries:
        library.set_num_threads(n)


_blas_threads(1)                                # the rows are split here, once, for every kind of work


def _worker():
    np.seterr(over="ignore")                    # each thread has its own
    _here.busy = True
    while True:
        share, ended = _jobs.get()
        try:
            ended.put(share())
        except BaseException as problem:        # for whoever waits to raise
            ended.put(problem)


for _ in range(max(threads - 1, 1)):            # a third of the hand-over time of concurrent.futures
    threading.Thread(target=_worker, name="sweep", daemon=True).start()


def sweep(f, n, block):
    """[f(slice), ...] for slices that cover range(n): the loop under every row-wise operation.

    On a GPU there is one slice, all of it. On a CPU slices of at most `block` rows, small enough to stay in
    the cache while f passes over them several times, are shared between the threads (NumPy lets go of
    Python's lock while it computes). The slices do not depend on the number of threads, the results stand in
    their order: the arithmetic is the same on every run.
    """
    if on_gpu or n <= block:
        return [f(slice(0, n))] if n else []
    count = -(-n // max(int(block), 1))
    block = -(-n // (count + count % 2))        # an even number of one size: the threads end together
    slices = [slice(i, min(i + block, n)) for i in range(0, n, block)]
    workers = min(threads, len(slices))
    if workers <= 1 or getattr(_here, "busy", False):
        return [f(rows) for rows in slices]
    results, left, ended = [None] * len(slices), iter(enumerate(slices)), queue.SimpleQueue()

    def share():
        for i, rows in left:                    # whoever is free takes the next
            results[i] = f(rows)

    for _ in range(workers - 1):
        _jobs.put((share, ended))
    _here.busy = True
    try:
        share()
    finally:                                    # even after an error nobody may still be writing
        _here.busy = False
        problems = [ended.get() for _ in range(workers - 1)]
    for problem in filter(None, problems):
        raise problem
    return results


def add_rows(out, ids, rows):
    """out[ids[i]] += rows[i] for every i: ids (N,) may repeat, rows (N, C). (On a GPU in no fixed order.)"""
    if on_gpu:
        xp.add.at(out, ids, rows)
    elif len(ids):                              # NumPy's add.at is slow: sum the runs of equal ids instead
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        out[ids[starts]] += np.add.reduceat(rows[order], starts)


def row_dot(a, b):
    """sum(a * b) along the last axis, (..., n) -> (..., 1): on a CPU without ever holding a * b."""
    return (a * b).sum(-1, keepdims=True) if on_gpu else np.vecdot(a, b)[..., None]


def fuse(formula):
    """Decorate an elementwise formula f(..., out) that writes into its last arguments with `out[...] = `.

    On a GPU CuPy compiles it into one kernel: one pass over memory instead of one for each operator.
    On a CPU it runs as it stands; call it on the rows of a `sweep`, so that its passes stay in the cache.
    """
    kernel = None

    def call(*arrays):
        nonlocal kernel
        if not on_gpu:
            return formula(*arrays)
        kernel = kernel or xp.fuse(formula)
        return kernel(*arrays)

    call.formula = formula
    return call


# ---------------------------------------------------------------- the matrix product

def matmul(a, b, out=None, accumulate=False, dtype=None):
    """a (..., m, k) @ b (..., k, n) -> (..., m, n), written into `out`, or added to it with accumulate=True.

    Transposed views are not copied. Both have the same leading (batch) axes, or at most two axes have none. Half
    precision is multiplied and summed as float32, and rounded once, unless `out` or `dtype` is float32.
    """
    shape = (*a.shape[:-1], b.shape[-1])
    if out is None:
        out = xp.empty(shape, dtype or np.promote_types(a.dtype, b.dtype))
    if out.size == 0 or a.shape[-1] == 0:
        if not accumulate:
            out[...] = 0
    elif on_gpu:
        _cublas(a, b, out, accumulate)
    else:
        _blas(a, b, out, accumulate)
    return out


def _product(a, b, out, accumulate):
    if accumulate:
        out += np.matmul(a, b)
    else:
        np.matmul(a, b, out=out)


_SMALL = 1 << 21        # multiplications below which handing work to a thread costs more than it gains
_FEW = 3                # rows: a product of fewer counts as one of so many, for it waits for its weights from memory
_TILE = 1 << 19         # elements of a product that is added to `out`: it must still be in the cache then


def _blas(a, b, out, accumulate):
    """Split one product over the threads: by matrices, by the rows of a single one, or as BLAS itself does it."""
    if a.dtype.itemsize == 2:           # the arithmetic of a GPU's tensor cores
        a, b = a.astype(np.float32), b.astype(np.float32)
    if out.dtype.itemsize == 2:
        wide = out.astype(np.float32) if accumulate else np.empty(out.shape, np.float32)
        _blas(a, b, wide, accumulate)
        out[...] = wide
        return
    m, n = out.shape[-2:]
    if out.size // m * max(m, _FEW) * a.shape[-1] < _SMALL or threads == 1 or getattr(_here, "busy", False):
        _product(a, b, out, accumulate)
    elif out.ndim > 2:
        sweep(lambda s: _product(a[s], b[s], out[s], accumulate), len(out), -(-len(out) // threads))
    elif m >= 64:
        block = -(-m // threads)
        if accumulate:
            block = min(block, max(_TILE // n, 128))
        sweep(lambda s: _product(a[s], b, out[s], accumulate), m, block)
    else:                               # few rows, as in generation: BLAS's own threads wait awake for the next product
        _blas_threads(threads)
        _product(a, b, out, accumulate)
        _blas_threads(1)


_CUDA_TYPE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}     # cudaDataType


def _cublas(a, b, out, accumulate):
    """out = a @ b (+ out) by cublasGemmEx or cublasGemmStridedBatchedEx; half inputs may have a float32 `out`.

    cuBLAS counts columns first: what it sees is the transpose of every row-major matrix, and outᵀ = bᵀ aᵀ.
    """
    from cupy_backends.cuda.libs import cublas
    wide = out.dtype.name == "float64"
    compute = 70 if wide else 77 if tf32 and a.dtype.name == "float32" else 68      # cublasComputeType
    scalar = np.float64 if wide else np.float32
    one, beta = np.array(1, scalar), np.array(1 if accumulate else 0, scalar)       # read from host memory
    a, ta, lda, sa = _as_cublas(a)
    b, tb, ldb, sb = _as_cublas(b)
    target, tc, ldc, sc = _as_cublas(out)
    if target is not out or tc:
        raise ValueError("matmul: the rows of `out` must be contiguous and its leading axes one stride apart")
    m, k, n, count = a.shape[-2], a.shape[-1], b.shape[-1], out.size // (out.shape[-2] * out.shape[-1])
    handle = xp.cuda.device.get_cublas_handle()
    a_args, b_args = (a.data.ptr, _CUDA_TYPE[a.dtype.name], lda), (b.data.ptr, _CUDA_TYPE[b.dtype.name], ldb)
    c_args = (out.data.ptr, _CUDA_TYPE[out.dtype.name], ldc)
    if count == 1:
        cublas.gemmEx(handle, tb, ta, n, m, k, one.ctypes.data, *b_args, *a_args,
                      beta.ctypes.data, *c_args, compute, -1)
    else:
        cublas.gemmStridedBatchedEx(handle, tb, ta, n, m, k, one.ctypes.data, *b_args, sb, *a_args, sa,
                                    beta.ctypes.data, *c_args, sc, count, compute, -1)


def _as_cublas(x):
    """(array, transposed, leading dimension, batch stride), copied only where no such description fits x."""
    *batch, rows, columns = (step // x.itemsize for step in x.strides)
    m, n = x.shape[-2:]
    axes = [(size, step) for size, step in zip(x.shape, batch, strict=False) if size > 1]
    one_stride = all(axes[i][1] == axes[i + 1][0] * axes[i + 1][1] for i in range(len(axes) - 1))
    stride = axes[-1][1] if axes else 0
    if one_stride and (columns == 1 or n == 1) and (rows >= n or m == 1):
        return x, 0, max(rows, n) if m > 1 else n, stride
    if one_stride and (rows == 1 or m == 1) and (columns >= m or n == 1):
        return x, 1, max(columns, m) if n > 1 else m, stride
    x = xp.ascontiguousarray(x)
    return x, 0, n, m * n
