"""A strict stand-in for CuPy that computes with NumPy: what runs on it breaks none of CuPy's rules.

Much code that NumPy accepts fails on a GPU, and most machines that run these tests have none. CuPy itself
imports without a GPU, though, so the real package can be asked what exists and how it is called, and can even
trace the formulas given to `fuse`; only the arithmetic has to be done elsewhere. Here

- every name and every signature is looked up in the real CuPy, before NumPy's function of that name runs;
- a NumPy array or a list next to a device array is a TypeError, and so is turning a device array into a NumPy
  array without `.get()`;
- reductions give 0-d arrays; integer arrays as indices wrap around; repeated indices meet in a random order;
- a fused formula is traced by the real CuPy, and what comes out must have the dtypes that it says;
- `gemmEx` and `gemmStridedBatchedEx` read and write the memory that they are pointed to, column-major.

It is stricter than CuPy in places, always where CuPy would copy between host and device in silence:
`numpy.exp(x)`, a list or NumPy array as an index, and all of `cupy.random` are refused.
It proves discipline, not kernels: nothing is compiled or launched. It imports four private modules of CuPy, which a
new version may change: requirements.txt names the versions that it was tried with.

    with strict_gpu():
        ...                     # device.xp is the stand-in, `device.reason` says so
"""

import ctypes
import functools
import inspect
import re
import sys
import time
import types
import weakref
from contextlib import contextmanager
from unittest import mock

import cupy as real
import cupy_backends.cuda.libs
import cupyx.linalg  # noqa: F401  (a lazy module: it must not find the stand-in when it wakes up)
import numpy as np
from cupy._core import _kernel
from cupy._core import fusion as real_fusion
from cupy._core._carray import Indexer
from cupy._core._scalar import CScalar

# ---------------------------------------------------------------- arrays


class ndarray:
    """The stand-in's array: a NumPy array that answers only to what cupy.ndarray answers to.

    Views share memory, as they do on the device: slices, reshape, transpose write through.
    """

    __slots__ = ("__weakref__", "_host")
    __array_ufunc__ = None  # NumPy array + this: a TypeError, after Python has asked both
    __hash__ = None

    def __init__(self, shape, dtype=float):
        self._host = np.empty(shape, dtype)
        POOL.hold(self._host)

    # --- what CuPy refuses

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`.")

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} of a device array: call device.xp.{function.__name__}")

    # --- attributes and methods

    def __getattr__(self, name):
        """An attribute or method that cupy.ndarray has too; the method is called with cupy's signature."""
        if name.startswith("__") or not hasattr(real.ndarray, name):
            raise AttributeError(f"cupy.ndarray has no attribute {name!r}")
        value = getattr(self._host, name)
        if not callable(value):
            return to_device(value)
        if name in COMPUTED_OTHERWISE:
            value = functools.partial(COMPUTED_OTHERWISE[name], self._host)
        return checked(f"ndarray.{name}", getattr(real.ndarray, name), value, self)

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return np.array(self._host, order=order)
        out[...] = self._host
        return out

    def set(self, host, stream=None):
        if not isinstance(host, np.ndarray) or (host.shape, host.dtype) != (self.shape, self.dtype):
            raise TypeError("set: needs a NumPy array of the same shape and dtype")
        self._host[...] = host

    @property
    def data(self):
        """A pointer to the first element; gemmEx accepts only pointers that were asked for here."""
        pointer, owner = self._host.ctypes.data, _owner(self._host)
        allocations[pointer] = owner.ctypes.data, owner.ctypes.data + owner.nbytes
        return types.SimpleNamespace(ptr=pointer)

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if not self._host.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self._host)))

    def __repr__(self):
        return f"strict_cupy.{self._host!r}"

    def __format__(self, spec):
        return format(self._host, spec)

    # --- indexing

    def __getitem__(self, index):
        index = wrapped(index, self._host.shape)
        if not any(isinstance(i, np.ndarray) or i is Ellipsis for i in index):
            index = (*index, Ellipsis)  # x[0] of a vector is a 0-d view, not a number
        return to_device(self._host[index])

    def __setitem__(self, index, value):
        index, value = wrapped(index, self._host.shape), operand(value)
        if any(isinstance(i, np.ndarray) for i in index):
            index, value = scattered(self._host, index, value)
        with np.errstate(all="ignore"):
            self._host[index] = value


def _operator(name):
    def call(self, *other):
        with np.errstate(all="ignore"):
            result = getattr(self._host, f"__{name}__")(*map(operand, other))
        return self if result is self._host else to_device(result)

    setattr(ndarray, f"__{name}__", call)


for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    for _prefix in ("", "r", "i"):
        _operator(_prefix + _name)
for _name in "neg pos abs invert lt le eq ne gt ge".split():
    _operator(_name)

for _name in ("bool", "int", "float", "complex"):  # of a single element; each waits for the device
    setattr(ndarray, f"__{_name}__", lambda self, _name=_name: getattr(self._host, f"__{_name}__")())


def to_device(value):
    """What NumPy returned as CuPy would: arrays and NumPy scalars become (0-d) arrays, the rest stays."""
    if isinstance(value, np.ndarray | np.generic):
        array = object.__new__(ndarray)
        array._host = np.asarray(value)
        POOL.hold(_owner(array._host))
        return array
    if isinstance(value, tuple | list) and any(isinstance(v, np.ndarray | np.generic) for v in value):
        return type(value)(to_device(v) for v in value) if type(value) in (tuple, list) else value
    return value


def _owner(host):
    """The array whose memory this one looks at."""
    while isinstance(host.base, np.ndarray):
        host = host.base
    return host


def to_host(value):
    """Device arrays, in tuples and lists too, as the NumPy arrays in them; TypeError for NumPy's own."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return type(value)(map(to_host, value)) if type(value) in (tuple, list) else value


def operand(value):
    """The same for one array or number: neither lists nor tuples."""
    if isinstance(value, list | tuple):
        raise TypeError(f"Unsupported type {type(value)}")
    return to_host(value)


# ---------------------------------------------------------------- indices


def wrapped(index, shape):
    """The index as a tuple, each integer array in it modulo the length of its axis, as CuPy's kernels do."""
    index = tuple(map(operand, index if isinstance(index, tuple) else (index,)))
    axes = [0 if i is None or i is Ellipsis else _n_axes(i) for i in index]
    axis, result = 0, []
    for i, n in zip(index, axes, strict=True):
        if isinstance(i, np.ndarray) and i.dtype.kind in "iu" and axis < len(shape) and shape[axis]:
            i = i % shape[axis]
        axis += len(shape) - sum(axes) if i is Ellipsis else n
        result.append(i)
    return tuple(result)


def _n_axes(index):
    return index.ndim if isinstance(index, np.ndarray) and index.dtype == bool else 1


def scattered(target, index, value):
    """The cells target[index] one by one and the value for each, in a random order: the device has none."""
    cells = np.arange(target.size).reshape(target.shape)[index]
    order = shuffle.permutation(cells.size)
    value = np.broadcast_to(np.asarray(value, target.dtype), cells.shape)
    return np.unravel_index(cells.reshape(-1)[order], target.shape), value.reshape(-1)[order]


shuffle = np.random.default_rng(0)


# ---------------------------------------------------------------- functions


ARRAYS = set("a b x y x1 x2 ary arr array condition v indices".split())  # arguments named so are arrays


@functools.cache
def signature(function):
    """The signature of a function of the real CuPy; None where nothing tells it.

    Compiled functions have none for `inspect`, but their docstrings begin with it, C types included:
    "_ndarray_base.sort(self, int axis=-1, kind=None)".
    """
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        line = re.match(r"[\w.]+\((.*?)\)( ->.*)?$", (function.__doc__ or "").partition("\n")[0])
        arguments = line and re.sub(r"\w+ (?=\w)", "", line[1])
        return line and inspect.signature(eval(f"lambda {arguments}: None"))


def checked(name, function, compute, *bound):
    """compute, behind the signature of CuPy's function: takes device arrays and gives device arrays."""

    def call(*args, **kwargs):
        if any(isinstance(a, TRACED) for a in (*args, *kwargs.values())):
            return function(*args, **kwargs)  # the real CuPy is tracing a fused formula
        known = signature(function)
        try:
            arguments = known.bind(*bound, *args, **kwargs).arguments if known else {}
        except TypeError as problem:
            raise TypeError(f"cupy.{name}: {problem}") from None
        for value in (arguments[a] for a in ARRAYS & arguments.keys()):
            operand(value)
        with np.errstate(all="ignore"):
            result = compute(*map(to_host, args), **{key: to_host(value) for key, value in kwargs.items()})
        out = kwargs.get("out")
        return out if isinstance(out, ndarray) else to_device(result)

    return call


ATOMIC = {"add": "int32 int64 uint32 uint64 float16 float32 float64", "subtract": "int32 uint32",
          "maximum": "int32 int64 uint32 uint64 float32 float64",
          "minimum": "int32 int64 uint32 uint64 float32 float64"}


class ufunc:
    """An elementwise function: takes out=, dtype= and casting=, and no where=."""

    def __init__(self, name, function, compute):
        self.name, self.function, self.compute = name, function, compute

    def __call__(self, *args, out=None, **kwargs):
        if any(isinstance(a, TRACED) for a in args):
            return self.function(*args, **kwargs) if out is None else self.function(*args, out=out, **kwargs)
        if kwargs.keys() - {"dtype", "casting"}:
            raise TypeError(f"cupy.{self.name}: Wrong arguments {kwargs}")
        if not self.function.nin <= len(args) <= self.function.nargs:
            raise TypeError(f"cupy.{self.name}: Wrong number of arguments")
        if len(args) == self.function.nargs and self.function.nout == 1:
            *args, out = args
        if out is not None:
            kwargs["out"] = to_host(out)
        with np.errstate(all="ignore"):
            result = self.compute(*map(operand, args), **kwargs)
        return out if out is not None else to_device(result)

    def at(self, a, indices, b=None):
        """a[indices] op= b, every repeat counted, in a random order, because atomic operations have no order."""
        if self.name not in ATOMIC:
            raise NotImplementedError(f"`cupy_{self.name}.at` is not supported yet")
        host = operand(a)
        if host.dtype.name not in ATOMIC[self.name].split():
            raise TypeError(f"cupy.{self.name}.at only supports {ATOMIC[self.name]}")
        self.compute.at(host, *scattered(host, wrapped(indices, host.shape), operand(b)))

    def reduce(self, array, axis=0, dtype=None, out=None, keepdims=False):
        if self.name not in ("add", "multiply"):
            raise NotImplementedError(f"`cupy_{self.name}.reduce` is not supported yet")
        return (array.sum if self.name == "add" else array.prod)(axis, dtype, out, keepdims)

    def __getattr__(self, name):
        raise NotImplementedError(f"the stand-in has no cupy.{self.name}.{name}")


def _asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    """The one way from host to device, for arrays, lists and numbers; always a copy of what is the host's."""
    if isinstance(a, ndarray) and not copy:
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    if isinstance(a, list | tuple) and any(isinstance(v, ndarray) for v in a):
        return to_device(np.array([to_host(v) for v in a], dtype, order=order))  # CuPy stacks them
    if isinstance(a, ndarray):
        a = a._host
    return to_device(np.array(a, dtype, order=order or "K"))


def _array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    return _asarray(obj, dtype, order, copy=copy)


def _asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


def _get_array_module(*args):
    traced = any(isinstance(a, TRACED) for a in args)
    return real if traced else cp if any(isinstance(a, ndarray) for a in args) else np


def _take(a, indices, axis=None, out=None):
    return np.take(a, indices, axis, out, mode="wrap")


def _take_along_axis(a, indices, axis=-1):
    return np.take_along_axis(a, indices % a.shape[axis], axis)


COMPUTED_OTHERWISE = {"take": _take, "take_along_axis": _take_along_axis}


# ---------------------------------------------------------------- fused formulas

traced = {}  # (formula, types of its arguments) -> the CUDA source of its kernel, for all that were ever called
TRACED = (real_fusion._FusionVarArray, real_fusion._FusionVarScalar)


def _fuse(*args, **kwargs):
    """cupy.fuse: the real one traces the formula for these argument types, then NumPy computes it."""
    if not (len(args) == 1 and not kwargs and callable(args[0])):
        return lambda formula: _fuse(formula)
    formula, kernels = args[0], {}

    @functools.wraps(formula)
    def call(*args):
        kind = tuple((type(a), getattr(a, "dtype", None), getattr(a, "ndim", None)) for a in args)
        if kind not in kernels:
            kernels[kind] = fused_kernel(formula, *args)
            traced[formula, kind] = cuda_source(kernels[kind], args)
        result = formula(*args)
        made = [r.dtype for r in (result if isinstance(result, tuple) else (result,)) if r is not None]
        given = [p.dtype for p in kernels[kind].out_params]
        if made != given:
            raise TypeError(f"{formula.__name__}: CuPy gives {given}, NumPy {made}: give the scalars a type")
        return result

    return call


def fused_kernel(formula, *args):
    """The ElementwiseKernel that CuPy makes of the formula, not compiled. Raises TypeError if it makes none.

    The arrays it is traced with have a shape and a dtype, and point nowhere.
    """
    if not all(isinstance(a, ndarray | int | float | np.generic) or a is None for a in args):
        raise TypeError(f"Invalid argument type for {formula.__name__!r}: {[type(a).__name__ for a in args]}")
    history = real_fusion._FusionHistory()
    thread = real_fusion._thread_local
    thread.history, thread.is_old_fusing = history, True
    try:
        with mock.patch.dict(sys.modules, {"cupy": real}):  # which the tracer imports again and again
            kernel, _ = history.get_fusion(formula, [_placeholder(a) for a in args], formula.__name__)
    finally:
        thread.history, thread.is_old_fusing = None, False
    if not isinstance(kernel, real.ElementwiseKernel):
        raise TypeError(f"{formula.__name__}: a reduction inside a fused formula runs on one multiprocessor")
    return kernel


def cuda_source(kernel, args):
    """What CuPy would compile for arguments like these: arrays of one number of axes, not contiguous."""
    ndim = max(a.ndim for a in args if isinstance(a, ndarray))
    array, index, scalar = 1, 2, 3  # kinds of arguments
    kinds = [(array, real.ndarray, a.dtype, ndim, False, True) if isinstance(a, ndarray) else
             (scalar, CScalar, np.dtype(type(a)), 0, True, True) for a in args if a is not None]
    results = [(array, real.ndarray, p.dtype, ndim, False, True) for p in kernel.out_params]
    infos = [*kinds, *results, (index, Indexer, None, ndim, True, True)]
    return _kernel._get_elementwise_kernel_code(
        tuple(_kernel._ArgInfo(*info) for info in infos), _kernel._TypeMap(()), kernel.params, kernel.operation,
        kernel.name, kernel.preamble, **kernel.kwargs)


def _placeholder(a):
    if not isinstance(a, ndarray):
        return a
    memory = real.cuda.UnownedMemory(1, max(a.nbytes, 1), None, device_id=0)
    return real.ndarray(a.shape, a.dtype, real.cuda.MemoryPointer(memory, 0))


# ---------------------------------------------------------------- cuBLAS

CUDA_TYPE = {0: "float32", 1: "float64", 2: "float16", 14: "bfloat16"}  # cudaDataType
COMPUTE_TYPE = {68: "float32", 77: "float32", 70: "float64"}  # cublasComputeType: 32F, 32F_FAST_TF32, 64F
INPUTS = {"float32": ("float16", "bfloat16", "float32"), "float64": ("float64",)}

allocations = {}  # pointer handed out by ndarray.data -> first and last address of the memory it points into


class CUBLASError(RuntimeError):
    """cuBLAS refuses the arguments."""


def gemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb,
           beta, C, Ctype, ldc, computeType, algo):
    """C = alpha op(A) op(B) + beta C, all column-major, over pointers; see cublasGemmEx."""
    gemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0,
                         beta, C, Ctype, ldc, 0, 1, computeType, algo)


def gemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb,
                         strideB, beta, C, Ctype, ldc, strideC, batchCount, computeType, algo):
    """The same for batchCount matrices, each `stride` elements after the one before it."""
    if computeType not in COMPUTE_TYPE:
        raise CUBLASError(f"CUBLAS_STATUS_NOT_SUPPORTED: compute type {computeType}")
    wide = COMPUTE_TYPE[computeType]
    narrow, result = CUDA_TYPE[Atype], CUDA_TYPE[Ctype]
    if Btype != Atype or narrow not in INPUTS[wide] or result not in (narrow, wide):
        raise CUBLASError(f"CUBLAS_STATUS_NOT_SUPPORTED: {narrow}, {CUDA_TYPE[Btype]} -> {result} in {wide}")
    a = _matrices(A, narrow, lda, strideA, batchCount, *((k, m) if transa else (m, k)))
    b = _matrices(B, narrow, ldb, strideB, batchCount, *((n, k) if transb else (k, n)))
    c = _matrices(C, result, ldc, strideC, batchCount, m, n)
    a, b = (a.swapaxes(1, 2) if transa else a), (b.swapaxes(1, 2) if transb else b)
    with np.errstate(all="ignore"):
        out = _scalar(alpha, wide) * (a.astype(wide) @ b.astype(wide))
        if _scalar(beta, wide):  # beta = 0: C is not read, it may hold NaNs
            out += _scalar(beta, wide) * c.astype(wide)
        c[...] = out


def _scalar(pointer, dtype):
    """The number that alpha or beta points to, in host memory, in the type that the product is summed in."""
    c_type = {"float32": ctypes.c_float, "float64": ctypes.c_double}[dtype]
    return np.dtype(dtype).type(c_type.from_address(pointer).value)


def _matrices(pointer, dtype, ld, stride, count, rows, columns):
    """The memory as an array (count, rows, columns) of column-major matrices, if it is one allocation."""
    dtype = np.dtype(dtype)
    if ld < max(rows, 1) or min(rows, columns, count) < 1:
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE: {rows} x {columns}, leading dimension {ld}")
    n_bytes = ((count - 1) * stride + (columns - 1) * ld + rows) * dtype.itemsize
    low, high = allocations.get(pointer, (0, 0))
    if not low <= pointer <= pointer + n_bytes <= high:
        raise CUBLASError("an illegal memory access was encountered")
    steps = stride * dtype.itemsize, dtype.itemsize, ld * dtype.itemsize
    memory = (ctypes.c_char * n_bytes).from_address(pointer)
    return np.ndarray((count, rows, columns), dtype, memory, strides=steps)


# ---------------------------------------------------------------- the module


class _Device:
    """cupy.cuda.Device: the one card."""

    def __init__(self, device=None):
        self.id = 0

    def synchronize(self):
        pass

    def use(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        pass


class _Event:
    """cupy.cuda.Event: a moment in the device's work, which here is done at once."""

    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


class _Pool:
    """cupy.cuda.MemoryPool: counts the bytes of all device arrays; keeps the highest count, as the real one does."""

    def __init__(self):
        self.sizes, self.used, self.peak = {}, 0, 0

    def hold(self, owner):
        if id(owner) not in self.sizes:
            self.sizes[id(owner)] = owner.nbytes
            self.used += owner.nbytes
            self.peak = max(self.peak, self.used)
            weakref.finalize(owner, self._release, id(owner)).atexit = False

    def _release(self, key):
        self.used -= self.sizes.pop(key)

    def used_bytes(self):
        return self.used

    def total_bytes(self):
        return self.peak

    def free_all_blocks(self, stream=None):
        self.peak = self.used


POOL = _Pool()
OWN = {  # what is not NumPy's function of the same name
    "ndarray": ndarray,
    "array": _array,
    "asarray": _asarray,
    "asnumpy": _asnumpy,
    "get_array_module": _get_array_module,
    "fuse": _fuse,
    "is_available": lambda: True,
    "get_default_memory_pool": lambda: POOL,
    "cuda.Device": _Device,
    "cuda.Event": _Event,
    "cuda.get_elapsed_time": lambda start, end: 1000 * (end.time - start.time),
    "cuda.is_available": lambda: True,
    "cuda.device.get_cublas_handle": lambda: 1,
    "cuda.get_current_stream": lambda: types.SimpleNamespace(ptr=1),
    "cuda.memory.OutOfMemoryError": real.cuda.memory.OutOfMemoryError,
    "cuda.runtime.getDeviceProperties": lambda device: {"name": b"strict stand-in"},
    "cuda.runtime.getDeviceCount": lambda: 1,
    "cuda.runtime.deviceSynchronize": lambda: None,
    "cuda.runtime.memGetInfo": lambda: (1 << 33, 1 << 33),
    "__version__": real.__version__,
}


class Module(types.ModuleType):
    """cupy, or a module in it such as cupy.linalg: a name exists here if the real one has it."""

    def __init__(self, path=""):
        super().__init__(f"cupy.{path}".rstrip("."))
        self._path = path

    def __getattr__(self, name):
        path = f"{self._path}.{name}".lstrip(".")
        try:
            if name.startswith("__") and path not in OWN:
                raise AttributeError
            original = functools.reduce(getattr, path.split("."), real)
        except AttributeError:
            raise AttributeError(f"module 'cupy' has no attribute {path!r}") from None
        value = self._make(path, original)
        setattr(self, name, value)  # the next time it is found at once
        return value

    @staticmethod
    def _make(path, original):
        if path.split(".")[0] == "random":
            raise AttributeError("cupy.random: draw with NumPy, so that both devices see the same numbers")
        if path in OWN:
            return OWN[path]
        if inspect.ismodule(original):
            return Module(path)
        try:
            compute = COMPUTED_OTHERWISE.get(path) or functools.reduce(getattr, path.split("."), np)
        except AttributeError:
            raise NotImplementedError(f"the stand-in has no cupy.{path}, and neither has NumPy") from None
        if isinstance(original, real.ufunc):
            return ufunc(path, original, compute)
        if isinstance(compute, type) or not callable(compute):
            return compute  # float32, inf, newaxis
        return checked(path, original, compute)


cp = Module()


@contextmanager
def strict_gpu():
    """Inside, `import cupy` gives the stand-in and device.py uses it as its GPU."""
    from hardware import device

    cublas = types.ModuleType("cublas")
    cublas.gemmEx, cublas.gemmStridedBatchedEx, cublas.CUBLASError = gemmEx, gemmStridedBatchedEx, CUBLASError
    before = "gpu" if device.xp is not np else "cpu"
    try:
        with (mock.patch.dict(sys.modules, {"cupy": cp}),
              mock.patch.dict(vars(cupy_backends.cuda.libs), {"cublas": cublas})):
            device.use("gpu")
            yield cp
    finally:
        allocations.clear()
        device.use(before)
