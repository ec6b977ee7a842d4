"""CuPy on a device made of host memory:  python tests/tools/emulated_gpu/emulator.py train.py --demo

Runs a program, or `-m pytest tests/…`, with NANOLLM_DEVICE=gpu on the emulated device. See README.md here.
"""
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SOURCES = "runtime.c", "cublas.c", "cuda.h", "emulator.py"
C = ["-O1", "-shared", "-fPIC", "-w", "-Wl,-Bsymbolic"]         # a kernel may have the name of a function of C



@functools.cache
def wheel(name):
    """The folder of an installed package, or None."""
    with contextlib.suppress(ModuleNotFoundError):          # its parent is not there
        if spec := importlib.util.find_spec(name):
            return Path(spec.submodule_search_locations[0])
    return None


def missing():
    """What this machine lacks to emulate a GPU: "" if nothing."""
    lacking = [tool for tool in ("gcc", "g++", "nm") if not shutil.which(tool)]
    lacking += [name for name in ("cupy", "nvidia.cuda_nvrtc", "nvidia.cuda_runtime") if not wheel(name)]
    return ", ".join(lacking)


def built():
    """The folder of the compiled emulator, which is made if these sources have none for this Python and CuPy."""
    cupy_cublas = next((wheel("cupy_backends") / "cuda/libs").glob("cublas*.so"))
    text = b"".join((HERE / name).read_bytes() for name in SOURCES) + cupy_cublas.read_bytes() + sys.version.encode()
    folder = HERE / "built" / hashlib.sha256(text).hexdigest()[:16]
    if folder.exists():
        return folder
    making = folder.with_suffix(f".{os.getpid()}")
    (making / "kernels").mkdir(parents=True)
    (making / "include/cupy").mkdir(parents=True)
    shutil.copy(HERE / "cuda.h", making / "include")
    for empty in "cuda_fp16.h", "cuda_bf16.h", "cupy/complex.cuh":
        (making / "include" / empty).touch()
    own = (HERE / "cublas.c").read_text()
    wanted = subprocess.check_output(["nm", "-D", "--undefined-only", cupy_cublas], text=True)
    stubs = {name for name in re.findall(r"\bcublas\w+", wanted) if f"int {name}(" not in own}
    (making / "stubs.c").write_text("".join(f"int {name}(void) {{ return 15; }}\n" for name in sorted(stubs)))
    (making / "lt.c").write_text("int cublasLtGetVersion(void) { return 120900; }\n")
    gcc = ["gcc", *C, f"-I{sysconfig.get_paths()['include']}"]
    for target, *files in (("emulated_runtime.so", HERE / "runtime.c"), ("libcublasLt.so.12", making / "lt.c"),
                           ("libcublas.so.12", HERE / "cublas.c", making / "stubs.c")):
        subprocess.run([*gcc, f"-Wl,-soname,{target}", "-o", making / target, *files], check=True)
    try:
        making.rename(folder)
    except OSError:             # another process was faster
        shutil.rmtree(making)
    return folder


class Kernels:
    """Modules of CuPy's, compiled by NVRTC for an H100 to see whether it can, and by g++ to run them here."""

    def __init__(self, folder, compile_, execute):
        self.folder, self.compile, self.execute = folder / "kernels", compile_, execute
        self.modules, self.libraries = [b""], []

    def compile_source(self, source, options=(), arch=None, *rest, **others):
        """In place of cupy.cuda.compiler's function of this kind: (image, mapping)."""
        seen = self.folder / (hashlib.sha256(repr((source, options, arch)).encode()).hexdigest()[:24] + ".seen")
        if self.execute and seen.exists():
            return source.encode(), {}
        image, mapping = self.compile(source, options, arch, *rest, **others)
        seen.touch()
        return (source.encode(), {}) if self.execute else (image, mapping)

    def load(self, image):
        self.modules.append(bytes(image))
        return len(self.modules) - 1

    def function(self, module, name):
        """The addresses of a kernel that g++ compiled, in the order of runtime.c's Kernel; None if none is executed."""
        if not self.execute:
            return None
        source = self.modules[module].decode()
        path = self.folder / (hashlib.sha256((source + name).encode()).hexdigest()[:24] + ".so")
        if not path.exists():
            making = path.with_suffix(f".{os.getpid()}")
            text = f'#include "cuda.h"\n{source}\nEMULATED_RUN({name})\n'
            done = subprocess.run(
                ["g++", "-std=c++17", *C, "-ffp-contract=off", f"-I{self.folder.parent / 'include'}",
                 f"-I{wheel('cupy') / '_core/include'}", "-o", making, "-x", "c++", "-"],
                input=text, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ cannot compile {name}: {done.stderr[:3000]}")
            making.rename(path)
        library = ctypes.CDLL(str(path))
        self.libraries.append(library)
        variables = "threadIdx", "blockIdx", "blockDim", "gridDim", "emulated_barrier"
        addresses = [ctypes.addressof(ctypes.c_char.in_dll(library, variable)) for variable in variables]
        run = ctypes.cast(library.emulated_run, ctypes.c_void_p).value
        return run, *addresses, int("__syncthreads" in source.split('extern "C" __global__')[-1])


def host_view(array):
    """The memory of a contiguous device array as a NumPy array."""
    assert array.flags.c_contiguous, "only contiguous arrays are reduced in one call"
    memory = (ctypes.c_char * array.nbytes).from_address(array.data.ptr) if array.size else b""
    return np.ndarray(array.shape, array.dtype, memory)


def _reducer(kind, launches, execute):
    """In place of CUB's reductions over all elements, or over the last axes."""
    def reduce(x, op, reduce_axis, out_axis, out=None, keepdims=False, contiguous_size=0):
        import cupy
        for _ in range(launches):
            runtime.note("cub", kind)
        axes = tuple(i for i in range(x.ndim) if kind == "device" or i not in out_axis)
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes)
        y = cupy.ndarray(shape, x.dtype)
        if execute:
            values, functions = host_view(x), {0: np.sum, 1: np.min, 2: np.max, 5: np.prod}
            wide = values.astype(np.float32) if x.itemsize == 2 else values
            with np.errstate(all="ignore"):
                host_view(y)[...] = functions[op](wide, axis=axes, keepdims=keepdims)
        if out is not None:
            cupy._core.elementwise_copy(y, out)
            y = out
        return y
    return reduce


def install(execute=True):
    """Put CuPy, which must not be imported yet, on the emulated device. execute=False: kernels and products are only
    compiled and noted. Afterwards `emulator.runtime` has start(list), stop() and memory().
    """
    global runtime
    folder = built()
    os.environ |= {"CUPY_CACHE_DIR": str(folder / "cache"), "CUDA_PATH": str(wheel("nvidia.cuda_runtime")),
                   "NANOLLM_DEVICE": "gpu"}
    cudart = wheel("nvidia.cuda_runtime") / "lib/libcudart.so.12"
    for path in cudart, folder / "libcublasLt.so.12", folder / "libcublas.so.12":
        cublas = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)    # what has been loaded is found by its name
    import cupy_backends.cuda.api.runtime as api
    spec = importlib.util.spec_from_file_location("emulated_runtime", folder / "emulated_runtime.so")
    runtime = sys.modules["emulated_runtime"] = importlib.util.module_from_spec(spec)       # tests import it
    kernels = Kernels(folder, None, execute)
    runtime.install(kernels.load, kernels.function)
    properties = {"name": b"emulated H100", "warpSize": 32, "multiProcessorCount": 132, "major": 9, "minor": 0,
                  "totalGlobalMem": 80 << 30}
    for name, function in {                     # CuPy's Python calls these, not the C functions
            "getDevice": lambda: 0, "getDeviceCount": lambda: 1, "setDevice": lambda number: None,
            "driverGetVersion": lambda: 13000, "deviceSynchronize": lambda: runtime.note("sync", "device"),
            "memGetInfo": lambda: ((80 << 30) - runtime.memory()[0], 80 << 30),
            "getDeviceProperties": lambda number: properties,
            "deviceGetAttribute": lambda which, number: {75: 9, 16: 132, 10: 32}.get(which, 0)}.items():
        setattr(api, name, function)
    import cupy
    from cupy.cuda import compiler, cub
    cub.device_reduce, cub.device_segmented_reduce = _reducer("device", 2, execute), _reducer("segmented", 1, execute)
    kernels.compile = compiler._compile_using_nvrtc_no_warning
    compiler._compile_using_nvrtc_no_warning = kernels.compile_source
    ctypes.c_int.in_dll(cublas, "emulated_compute").value = execute
    install.callback = ctypes.CFUNCTYPE(None)(lambda: runtime.note("gemm", None))       # must live on
    ctypes.c_void_p.in_dll(cublas, "emulated_note").value = ctypes.cast(install.callback, ctypes.c_void_p).value
    if execute:                 # its images are sources: CuPy must not keep them, nor use CUB inside a kernel
        compiler._set_kernel_cache_backend(type("None", (), {"load": lambda *_: None, "save": lambda *_: None})())
        cupy._core.set_reduction_accelerators([])


def main():
    if problem := missing():
        sys.exit(f"emulator.py: no emulated GPU, because this machine has no {problem}")
    if not sys.argv[1:]:
        return print(f"the emulated GPU is in {built()}")
    sys.path[0] = os.getcwd()
    del sys.argv[0]
    install()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        return runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    return runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
