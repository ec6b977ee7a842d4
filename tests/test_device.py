"""The choice of a device, threads and what a process keeps of its own."""
import math
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import same_device
from threadpoolctl import threadpool_info
from tiny import command

import generate
from autograd import Tensor, glu, no_grad, softmax
from hardware import device

ROOT = Path(__file__).resolve().parent.parent


def python(code, **environment):
    """(exit code, stdout, stderr) of a new process that runs this code in the project's folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"NANOLLM_DEVICE": "cpu"} | environment)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("threads", ["abc", "-3", "0", " ", "1.5", "9999", "1" * 5000])
def test_a_number_of_threads_that_is_none_is_one_line(threads, monkeypatch):
    monkeypatch.setenv("NANOLLM_THREADS", threads)
    code, out, err = command(generate.main, "folder", "--device", "cpu", name="generate.py")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("generate.py: NANOLLM_THREADS") and threads in err


def test_a_device_of_another_name_is_one_line():
    code = "from console import cli; from hardware import device; cli.run(lambda: print(device.xp))"
    code, out, err = python(code, NANOLLM_DEVICE="tpu")
    assert (code, out, err) == (2, "", "-c: NANOLLM_DEVICE 'tpu': must be auto, gpu or cpu")


def test_the_threads_are_those_asked_for():
    code = "from hardware import device; print(device.threads, device.reason)"
    assert python(code, NANOLLM_THREADS="3")[1] == f"3 cpu (NumPy {np.__version__}, 3 threads)"


V1 = "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "41 31 0:38 {top} /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
OF_V1, OF_V2 = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/unified"
AB = {f"{OF_V2}/a/cpu.max": "150000 100000", f"{OF_V2}/a/b/cpu.max": "max 100000"}


@pytest.mark.parametrize(("groups", "mounts", "limits", "expected"), [
    ("0::/a/b\n", V2.format(top="/"), AB, 1.5),
    ("0::/a\n", V2.format(top="/"), {f"{OF_V2}/cpu.max": "300000 100000", f"{OF_V2}/a/cpu.max": "40000 100000"}, 0.4),
    ("0::/docker/1a\n", V2.format(top="/docker/1a"), {f"{OF_V2}/cpu.max": "200000 100000"}, 2.0),
    ("4:cpu,cpuacct:/docker/1a/x\n1:cpuset:/y\n0::/\n", V1.format(top="/docker/1a") + V2.format(top="/"),
     {f"{OF_V1}/cpu.cfs_quota_us": "250000", f"{OF_V1}/cpu.cfs_period_us": "100000",
      f"{OF_V1}/x/cpu.cfs_quota_us": "-1", f"{OF_V1}/x/cpu.cfs_period_us": "100000"}, 2.5),
    ("4:cpu,cpuacct:/z\n", V1.format(top="/"), {f"{OF_V1}/y/cpu.cfs_quota_us": "1"}, math.inf),
    ("junk\n", "junk\n", {}, math.inf), (None, None, {}, math.inf)])
def test_the_quota_of_a_container(groups, mounts, limits, expected, tmp_path, monkeypatch):
    for name, content in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **limits}.items():
        if content is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
    assert device._quota(tmp_path) == expected
    monkeypatch.setattr(device, "_quota", lambda: expected)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.delenv("NANOLLM_THREADS", raising=False)
    assert device._thread_count() == min(8, math.ceil(min(expected, 8)))


SWEEP = """
import os, threading
import numpy as np
from hardware import device
device.use("cpu")
def names():
    return sorted(thread.name for thread in threading.enumerate())
def total():
    return sum(device.sweep(lambda s: float(np.arange(s.start, s.stop).sum()), 100_000, 1000))
"""


def test_threads_start_with_the_first_sweep_that_needs_them():
    code = SWEEP + """
before = names()
device.sweep(lambda s: None, 10, 1000)
small = names()
total()
print(before == small == ["MainThread"], names())
"""
    assert python(code, NANOLLM_THREADS="3")[1] == "True ['MainThread', 'sweep', 'sweep']"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_its_own_threads():
    """A child inherits none of its parent's threads: waiting for them would hang for ever."""
    code = SWEEP + """
import warnings
warnings.simplefilter("ignore")         # newer Pythons warn of a fork in a process with threads
expected = total()
child = os.fork()
if child == 0:
    os._exit(0 if total() == expected and names().count("sweep") == 1 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), total() == expected)
"""
    assert python(code, NANOLLM_THREADS="2")[1] == "0 True"


def test_an_error_in_a_share_of_a_sweep_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(device, "threads", 2)

    def fail(s):
        if s.stop == 100:
            raise KeyError("the last block")
    with pytest.raises(KeyError, match="the last block"):
        device.sweep(fail, 100, 10)
    assert device.sweep(lambda s: s.stop - s.start, 100, 10) == [10] * 10


def test_an_activation_that_overflows_is_no_warning_and_the_callers_settings_stay():
    """exp(1000) is infinite, and 1 / infinity is the right 0: in every thread, whatever the caller has set."""
    both = Tensor(np.full((2, 100_000), -1000.0))
    with np.errstate(over="raise"):
        before = np.geterr()
        assert not glu(both).data.any() and np.geterr() == before


def test_blas_has_one_thread_on_a_cpu_and_its_own_number_on_a_gpu(monkeypatch):
    """Our threads split the rows of a product on a CPU; on a GPU the user's NumPy keeps what it had."""
    def blas_threads():
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    usual = {number for _, number in device._blas_libraries()}
    device.use("cpu")
    assert blas_threads() <= {1}
    monkeypatch.setattr(device, "_find_gpu", lambda team: (np, "a card"))
    device.use("gpu")
    assert blas_threads() == usual
    device.use("auto", tf32=True)
    assert device.on_gpu and device.tf32_products


def test_the_next_test_has_the_device_that_this_one_began_with(monkeypatch):
    """A command with --device chooses for the process: with NANOLLM_DEVICE=gpu the rest would be tested on the CPU."""
    monkeypatch.setattr(device, "_find_gpu", lambda team: (types.SimpleNamespace(__version__="0"), "a card"))
    before = device.xp, device.on_gpu, device.reason, device.tf32_products
    with same_device():
        device.use("gpu")
        with same_device():
            command(generate.main, "no/such/folder", "--device", "cpu")
            assert not device.on_gpu
        assert device.on_gpu and device.reason == "gpu (CuPy 0, a card)"
        device.use(tf32=True)
    assert (device.xp, device.on_gpu, device.reason, device.tf32_products) == before


def test_tests_for_a_gpu_that_does_not_work_are_an_error_not_tests_of_the_cpu(monkeypatch):
    def broken(team):
        raise RuntimeError("no driver")
    monkeypatch.setenv("NANOLLM_DEVICE", "gpu")
    monkeypatch.setattr(device, "_find_gpu", broken)
    with pytest.raises(pytest.UsageError, match="device gpu: no driver"):
        conftest.pytest_configure(None)


def test_a_fused_formula_is_compiled_by_each_library_that_it_meets(monkeypatch):
    formula, results = device.fuse(lambda x: x), []
    monkeypatch.setattr(device, "on_gpu", True)
    for name in "card", "stand-in", "card":
        library = types.ModuleType(name)
        library.fuse = lambda formula, name=name: lambda x: results.append((name, formula(x)))
        monkeypatch.setattr(device, "xp", library)
        formula(1)
    assert results == [("card", 1), ("stand-in", 1), ("card", 1)]


def test_no_grad_is_the_threads_own():
    x, inside, done = Tensor([1.0, 2.0], requires_grad=True), threading.Event(), threading.Event()

    def sample():
        with no_grad():
            inside.set()
            done.wait(10)
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        assert inside.wait(10) and softmax(x).requires_grad
        with no_grad():
            assert not softmax(x).requires_grad
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("dtype, m, k, n", [("float32", 3, 5, 4), ("float64", 70, 9, 2), ("bfloat16", 4, 5, 6)])
def test_the_scale_of_a_product_is_part_of_it(dtype, m, k, n, rng):
    """In cuBLAS it is alpha. On a CPU the smaller factor is multiplied, in float32 if both are half."""
    a, b, c = (rng.standard_normal(shape).astype(dtype) for shape in ((2, m, k), (2, k, n), (2, m, n)))
    wide = np.result_type(dtype, np.float32)
    product = a.astype(wide) @ b.astype(wide) * 0.3
    x, y, out = (device.xp.asarray(array) for array in (a, b, c.astype(wide)))
    got = device.to_host(device.matmul(x, y, dtype=wide, scale=0.3))
    np.testing.assert_allclose(got, product, rtol=1e-5, atol=1e-6)
    device.matmul(x, y, out=out, accumulate=True, scale=0.3)
    np.testing.assert_allclose(device.to_host(out), c.astype(wide) + product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 4096, 3 * 4096, 10_000])
def test_a_sum_of_squares_of_any_size(size, rng):
    g = rng.standard_normal(size).astype(np.float32)
    expected = float((g.astype(float) ** 2).sum())
    assert float(device.sum_of_squares(device.xp.asarray(g))) == pytest.approx(expected, rel=1e-5)
