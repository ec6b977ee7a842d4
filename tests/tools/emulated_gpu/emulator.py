"""CuPy on a device made of host memory:  python tests/tools/emulated_gpu/emulator.py train.py --demo

Runs a program, or `-m pytest tests/…`, with NANOLLM_DEVICE=gpu on the emulated device. See README.md here.
"""
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ml_dtypes  # noqa: F401  (makes bfloat16 a type of NumPy's)
import numpy as np

HERE = Path(__file__).resolve().parent
# -U: fibers jump from stack to stack. -Bsymbolic: a kernel may have the name of a function of C.
C = ["-O1", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-Wl,-Bsymbolic"]
LIBRARIES = "libcublas.so", "libcublasLt.so"        # CuPy asks for both, and finds by its name what has been loaded
FLOATS = {number: np.dtype(name) for number, name in (          # cudaDataType
    (0, "float32"), (1, "float64"), (2, "float16"), (14, "bfloat16"))}
MEMORY = ctypes.c_char * sys.maxsize        # from an address on; a type for each size would be garbage to collect
SUPPORTED = {                   # (inputs, result, sums: a cublasComputeType)
    (0, 0, 68), (0, 0, 77), (1, 1, 70), (2, 2, 68), (2, 0, 68), (14, 14, 68), (14, 0, 68)}


@functools.cache
def wheel(name):
    """The folder of an installed package, or None."""
    with contextlib.suppress(ModuleNotFoundError):          # its parent is not there
        if spec := importlib.util.find_spec(name):
            return Path(spec.submodule_search_locations[0])
    return None


def missing():
    """What this machine lacks to emulate a GPU: "" if nothing."""
    lacking = [tool for tool in ("gcc", "g++") if not shutil.which(tool)]
    lacking += [name for name in ("cupy", "nvidia.cuda_nvrtc", "nvidia.cuda_runtime") if not wheel(name)]
    return ", ".join(lacking)


def built():
    """The folder of the compiled emulator, which is made if these sources have none for this Python."""
    text = b"".join((HERE / name).read_bytes() for name in ("runtime.c", "cuda.h")) + sys.version.encode()
    folder = HERE / "built" / hashlib.sha256(text).hexdigest()[:16]
    if folder.exists():
        return folder
    making = folder.with_suffix(f".{os.getpid()}")
    for part in "kernels", "include/cupy":
        (making / part).mkdir(parents=True)
    shutil.copy(HERE / "cuda.h", making / "include")
    for empty in "cuda_fp16.h", "cuda_bf16.h", "cupy/complex.cuh":
        (making / "include" / empty).touch()
    for name in LIBRARIES:
        subprocess.run(["gcc", *C, f"-I{sysconfig.get_paths()['include']}", f"-Wl,-soname,{name}.12", "-o",
                        making / name, HERE / "runtime.c"], check=True)
    try:
        making.rename(folder)
    except OSError:             # another process was faster
        shutil.rmtree(making)
    return folder


class Kernels:
    """Modules of CuPy's, compiled by NVRTC for an H100 to see whether it can, and by g++ to run them here."""

    def __init__(self, folder, execute):
        self.folder, self.execute, self.libraries = folder / "kernels", execute, []

    def compile_source(self, source, options=(), arch=None, *rest, **others):
        """In place of cupy.cuda.compiler's function of this kind: (image, mapping)."""
        seen = self.folder / (hashlib.sha256(repr((source, options, arch)).encode()).hexdigest()[:24] + ".seen")
        if self.execute and seen.exists():
            return source.encode(), {}
        image, mapping = self.compile(source, options, arch, *rest, **others)
        seen.touch()
        return (source.encode(), {}) if self.execute else (image, mapping)

    def function(self, image, name):
        """(the address of a kernel that g++ compiled, whether it has barriers); None if none is executed."""
        if not self.execute:
            return None
        source = image.decode()
        path = self.folder / (hashlib.sha256((source + name).encode()).hexdigest()[:24] + ".so")
        if not path.exists():
            making = path.with_suffix(f".{os.urandom(8).hex()}")       # ranks may be threads of one process
            text = f'#include "cuda.h"\n{source}\nEMULATED_RUN({name})\n'
            done = subprocess.run(
                ["g++", "-std=c++20", *C, "-ffp-contract=off", f"-I{self.folder.parent / 'include'}",
                 f"-I{wheel('cupy') / '_core/include'}", "-o", making, "-x", "c++", "-"],
                input=text, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ cannot compile {name}: {done.stderr[:3000]}")
            making.rename(path)
        library = ctypes.CDLL(str(path))
        self.libraries.append(library)
        run = ctypes.cast(library.emulated_run, ctypes.c_void_p).value
        return run, "__syncthreads" in source.split('extern "C" __global__')[-1]


def in_memory(address, dtype, shape, strides):
    """What is at an address of the device, as a NumPy array."""
    return np.ndarray(shape, dtype, MEMORY.from_address(address), 0, strides)


def matrices(address, kind, lead, step, count, rows, columns, transposed=False):
    """`count` matrices in memory as cuBLAS describes them, column by column."""
    dtype, n = FLOATS[kind], FLOATS[kind].itemsize
    row, column = (lead, 1) if transposed else (1, lead)
    return in_memory(address, dtype, (count, rows, columns), (step * n, row * n, column * n))


def product(mine, count, m, n, k, ta, tb, alpha, a, a_kind, lda, a_step, b, b_kind, ldb, b_step, beta, c, c_kind, ldc,
            c_step, compute, algo):
    """cublasGemmStridedBatchedEx, as strict as cuBLAS: the status. Sums are in double precision."""
    leads = lda >= max(k if ta else m, 1), ldb >= max(n if tb else k, 1), ldc >= max(m, 1)
    aligned = all(address % FLOATS[kind].itemsize == 0 for address, kind in ((a, a_kind), (b, b_kind), (c, c_kind)))
    if not (mine and all(leads) and aligned and ta in (0, 1) and tb in (0, 1) and algo in (-1, 99)):
        return 7                                # invalid value; algorithm 99 is CuPy's, on tensor cores
    if a_kind != b_kind or (a_kind, c_kind, compute) not in SUPPORTED:
        return 15                               # not supported
    number = ctypes.c_double if compute == 70 else ctypes.c_float
    alpha, beta = (number.from_address(address).value for address in (alpha, beta))
    left, right = matrices(a, a_kind, lda, a_step, count, m, k, ta), matrices(b, b_kind, ldb, b_step, count, k, n, tb)
    out = matrices(c, c_kind, ldc, c_step, count, m, n)
    with np.errstate(all="ignore"):             # with beta 0 what `out` was is not read
        out[...] = alpha * (left.astype(float) @ right.astype(float)) + (beta * out.astype(float) if beta else 0)
    return 0


def _reducer(kind, launches, execute):
    """In place of CUB's reductions over all elements, or over the last axes."""
    def reduce(x, op, reduce_axis, out_axis, out=None, keepdims=False, contiguous_size=0):
        import cupy
        for _ in range(launches):
            runtime.note("cub")
        axes = tuple(i for i in range(x.ndim) if kind == "device" or i not in out_axis)
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes)
        y = cupy.ndarray(shape, x.dtype)
        if execute:
            values, result = (in_memory(array.data.ptr, array.dtype, array.shape, array.strides) for array in (x, y))
            wide = values.astype(np.float32) if x.itemsize == 2 else values
            with np.errstate(all="ignore"):
                result[...] = {0: np.sum, 1: np.min, 2: np.max, 5: np.prod}[op](wide, axis=axes, keepdims=keepdims)
        if out is not None:
            cupy._core.elementwise_copy(y, out)
            y = out
        return y
    return reduce


def install(execute=True):
    """Put CuPy, which must not be imported yet, on the emulated device. execute=False: kernels and products are only
    compiled and noted. Afterwards `emulator.runtime` has start(list) and stop().
    """
    global runtime
    folder = built()
    os.environ |= {"CUPY_CACHE_DIR": str(folder / "cache"), "CUDA_PATH": str(wheel("nvidia.cuda_runtime")),
                   "NANOLLM_DEVICE": "gpu"}
    for path in wheel("nvidia.cuda_runtime") / "lib/libcudart.so.12", *(folder / name for name in LIBRARIES):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    sys.setdlopenflags(os.RTLD_LAZY)            # what else CuPy would call of cuBLAS is not there
    import cupy_backends.cuda.api.runtime as api
    spec = importlib.util.spec_from_file_location("emulated_runtime", folder / LIBRARIES[0])
    runtime = sys.modules["emulated_runtime"] = importlib.util.module_from_spec(spec)       # tests import it
    kernels = Kernels(folder, execute)
    runtime.install(kernels.function, product if execute else None)
    properties = {"name": b"emulated H100", "warpSize": 32, "multiProcessorCount": 132, "major": 9, "minor": 0,
                  "totalGlobalMem": 80 << 30}
    for name, function in {                     # CuPy's Python calls these, not the C functions
            "getDevice": lambda: 0, "getDeviceCount": lambda: 1, "setDevice": lambda number: None,
            "driverGetVersion": lambda: 13000, "deviceSynchronize": lambda: runtime.note("sync"),
            "memGetInfo": runtime.memGetInfo, "getDeviceProperties": lambda number: properties,
            "deviceGetAttribute": lambda which, number: {75: 9, 16: 132, 10: 32}.get(which, 0)}.items():
        setattr(api, name, function)
    import cupy
    from cupy.cuda import compiler, cub
    cub.device_reduce, cub.device_segmented_reduce = _reducer("device", 2, execute), _reducer("segmented", 1, execute)
    kernels.compile = compiler._compile_using_nvrtc_no_warning
    compiler._compile_using_nvrtc_no_warning = kernels.compile_source
    if execute:                 # its images are sources: CuPy must not keep them, nor use CUB inside a kernel
        compiler._set_kernel_cache_backend(type("None", (), {"load": lambda *_: None, "save": lambda *_: None})())
        cupy._core.set_reduction_accelerators([])


def main():
    if problem := missing():
        sys.exit(f"emulator.py: no emulated GPU, because this machine has no {problem}")
    if not sys.argv[1:]:
        return print(f"the emulated GPU is in {built()}")
    del sys.argv[0]
    sys.path[0] = os.getcwd() if sys.argv[0] == "-m" else str(Path(sys.argv[0]).resolve().parent)
    install()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        return runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    return runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
