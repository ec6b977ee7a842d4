"""The stand-in refuses what CuPy refuses and computes what NumPy computes; its two cuBLAS calls are exact."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import reference

reference("cupy")

import strict_cupy  # noqa: E402  (it needs CuPy)
from strict_cupy import CUBLASError, cp, strict_gpu  # noqa: E402

from hardware import device  # noqa: E402

host = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def x():
    with strict_gpu():
        yield cp.asarray(host)


def test_device_uses_it_inside_and_the_device_from_before_outside():
    before = device.xp
    with strict_gpu():
        assert device.xp is cp and device.on_gpu and "stand-in" in device.reason
        import cupy
        assert cupy is cp
    assert device.xp is before and sys.modules["cupy"] is not cp


def test_device_is_restored_after_an_error():
    before = device.xp
    with pytest.raises(ZeroDivisionError), strict_gpu():
        1 / 0  # noqa: B018
    assert device.xp is before


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("code, error", [
    # NumPy and lists do not mix with the device
    ("x + host", TypeError), ("host + x", TypeError), ("x @ host.T", TypeError), ("host.T @ x", TypeError),
    ("x + np.array(1.0)", TypeError), ("cp.add(x, host)", TypeError), ("cp.sum(host)", TypeError),
    ("cp.concatenate([x, host])", TypeError), ("cp.where(x > 0, x, host)", TypeError),
    ("x + [1, 2, 3]", TypeError), ("cp.exp([1.0])", TypeError), ("cp.sum([1.0])", TypeError),
    ("x.__setitem__(0, host[0])", TypeError), ("x.__iadd__(host)", TypeError), ("x < host", TypeError),
    ("cp.add(x, x, out=host)", TypeError), ("host.__iadd__(x)", TypeError), ("cp.exp(None)", TypeError),
    # nothing leaves the device in silence
    ("np.asarray(x)", TypeError), ("np.array(x)", TypeError), ("np.exp(x)", TypeError),
    ("np.sum(x)", TypeError), ("np.concatenate([host, x])", TypeError),
    ("host.__setitem__(0, x[0])", TypeError), ("np.float32(1) + np.ones(3) + x[0]", TypeError),
    ("range(x[0, 0])", TypeError), ("hash(x)", TypeError), ("x[[0, 1]]", TypeError),
    ("x[np.array([0])]", TypeError), ("list(x[0, 0])", TypeError),
    # arguments that CuPy does not have
    ("x.sum(where=x > 0)", TypeError), ("cp.sum(x, where=x > 0)", TypeError),
    ("x.max(initial=0)", TypeError), ("cp.add(x, x, where=x > 0)", TypeError),
    ("x.astype('f8', nonsense=1)", TypeError), ("cp.matmul(x, x.T, where=True)", TypeError),
    ("x.item(0)", TypeError), ("cp.exp(x, x, x)", TypeError), ("cp.exp()", TypeError),
    # names that CuPy does not have
    ("cp.vecdot(x, x)", AttributeError), ("cp.errstate()", AttributeError), ("cp.memmap", AttributeError),
    ("cp.block([[x]])", AttributeError), ("cp.nditer(x)", AttributeError),
    ("x.itemset(0, 1)", AttributeError), ("cp.nonsense", AttributeError),
    ("cp.OutOfMemoryError", AttributeError), ("cp.linalg.nonsense", AttributeError),
    ("x.nonsense", AttributeError), ("cp.random.default_rng(0)", AttributeError),
    ("cp.maximum.reduce(x)", NotImplementedError), ("cp.multiply.at(x, 0, 1)", NotImplementedError),
    ("cp.add.at(x.astype(bool), 0, True)", TypeError), ("cp.add.nonsense", NotImplementedError),
    # casting, as NumPy refuses it too
    ("cp.exp(x, out=x.astype(int))", TypeError), ("x.astype(int).__itruediv__(2)", TypeError),
    ("bool(x)", ValueError), ("float(x)", TypeError), ("x[2]", IndexError), ("x[0, 0, 0]", IndexError),
])
def test_refused(x, code, error):
    with pytest.raises(error):
        eval(code, {"x": x, "cp": cp, "np": np, "host": host.copy()})
    assert (x.get() == host).all()


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("code", [
    "x + x", "x - 1", "1 - x", "2.0 * x", "x / 3", "1 / (x + 1)", "x ** 2", "x @ x.T", "-x", "abs(-x)",
    "x % 2", "np.float32(2) * x", "np.float64(2) * x", "x * np.int64(2)", "x // 2", "~(x > 2)",
    "(x > 1) & (x < 4)", "x == 3", "xp.exp(x)", "xp.tanh(x)", "xp.maximum(x, 2)",
    "xp.where(x > 2, x, -xp.inf)", "xp.add(x, x, dtype=xp.float64)", "x.sum()",
    "x.sum(axis=-1, keepdims=True)", "xp.mean(x, axis=0)", "x.max(axis=1)", "x.argmax(axis=-1)",
    "xp.sum(x, axis=(0, 1))", "x.std()", "xp.linalg.norm(x)", "xp.cumsum(x, axis=1)", "xp.log(x[0])",
    "x[1]", "x[1, 2]", "x[..., -1]", "x[:, None, ::2]", "x[::-1]", "x[x > 2]", "x.T", "x.reshape(3, -1)",
    "x.ravel()", "x.transpose(1, 0)", "xp.swapaxes(x, 0, 1)", "xp.broadcast_to(x[0], (4, 3))",
    "xp.concatenate([x, x], axis=1)", "xp.stack([x, x])", "xp.split(x, [1])[1]", "xp.tril(x)",
    "xp.arange(5) * 0.5", "xp.zeros((2, 3), xp.float32)", "xp.full((2,), 3, xp.float16)",
    "xp.empty_like(x).shape", "x.astype(xp.float16)", "x.view(xp.int32)", "x.copy()", "xp.sort(-x, axis=1)",
    "xp.argsort(-x)", "xp.einsum('ij,kj->ik', x, x)", "xp.tensordot(x, x, ([1], [1]))",
    "xp.take_along_axis(x, xp.argmax(x, axis=1)[:, None], axis=1)",
    "xp.take(x, xp.asarray([0, 2]), axis=1)", "x[xp.asarray([1, 0, 1])]",
    "x[xp.asarray([1, 0]), xp.asarray([2, 1])]", "x[:, xp.asarray([[0], [2]])]", "xp.isfinite(x).all()",
    "float(x.sum())", "int(x[1, 1])", "bool(x[0, 1])", "x[1, 1].item()", "x.tolist()", "len(x)", "x.shape",
    "x.ndim", "x.size", "x.nbytes", "x.itemsize", "x.strides", "x.dtype", "[r.sum() for r in x]",
    "f'{x.sum():.3f}'", "xp.iinfo(xp.int32).max", "float(xp.finfo(x.dtype).eps)", "x.flags.c_contiguous",
    "xp.inf", "x.T.flags.c_contiguous", "xp.asarray([1, 2, 3])", "xp.asarray(2.5, xp.float32)",
    "xp.array(x, xp.float64)",
])
def test_computed_as_numpy_does(x, code):
    with np.errstate(divide="ignore"):
        expected = eval(code, {"x": host, "xp": np, "np": np})
    got = eval(code, {"x": x, "xp": cp, "np": np})
    if isinstance(expected, np.ndarray | np.generic):
        assert isinstance(got, cp.ndarray) and got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_array_equal(got.get(), expected)
    else:
        assert str(got).replace("strict_cupy.", "") == str(expected) or got == expected


def test_reductions_stay_on_the_device_as_0d_arrays(x):
    for value in (x.sum(), cp.max(x), x[1, 2], cp.linalg.norm(x), x.sum() + 1, cp.exp(x.sum())):
        assert isinstance(value, cp.ndarray) and value.shape == ()


def test_views_write_through_and_copies_do_not(x):
    flat = x.reshape(-1)
    flat[0:2] = 7
    x.T[2, 1] = 8
    x[1][1] = 9
    x[0, 2, ...] = 6
    cell = x[1, 0]
    cell += 10
    np.testing.assert_array_equal(x.get(), [[7, 7, 6], [13, 9, 8]])
    x.copy()[:] = 0
    cp.asarray(host)[:] = 0
    x.get()[:] = 0
    assert x[0, 0] == 7 and host[0, 1] == 1


def test_out_is_written_and_returned(x):
    out = cp.empty_like(x)
    assert cp.exp(x, out=out) is out and cp.add(x, 1, out) is out
    cp.sum(x, axis=0, out=out[0])
    np.testing.assert_array_equal(out.get(), [host.sum(0), host[1] + 1])
    before = x
    x += 1
    x *= 2
    assert x is before
    np.testing.assert_array_equal(x.get(), (host + 1) * 2)


def test_integer_indices_wrap_around(x):
    wrong = cp.asarray([2, -3, 5])
    np.testing.assert_array_equal(x[wrong].get(), host[[0, 1, 1]])
    np.testing.assert_array_equal(x[..., cp.asarray([3, 4])].get(), host[:, [0, 1]])
    np.testing.assert_array_equal(x[0, None, cp.asarray([4])].get(), host[0, None, [1]])
    np.testing.assert_array_equal(x.take(wrong, axis=0).get(), host[[0, 1, 1]])
    np.testing.assert_array_equal(cp.take_along_axis(x, cp.asarray([[3], [4]]), 1).get(), [[0], [4]])
    x[wrong] = 9
    assert (x == 9).all()


def test_assignments_to_one_cell_end_in_any_order(x):
    seen = set()
    for _ in range(50):
        x[cp.asarray([0, 0, 0]), cp.asarray([1, 1, 1])] = cp.asarray([10.0, 20.0, 30.0])
        seen.add(float(x[0, 1]))
    assert seen == {10.0, 20.0, 30.0}


def test_add_at_counts_every_repeat_in_any_order(rng):
    rows, values = rng.integers(0, 5, 1000), rng.standard_normal((1000, 3)).astype(np.float32)
    expected = np.zeros((5, 3), np.float32)
    np.add.at(expected, rows, values)
    sums = []
    with strict_gpu():
        for _ in range(2):
            total = cp.zeros((5, 3), np.float32)
            cp.add.at(total, cp.asarray(rows), cp.asarray(values))
            sums.append(total.get())
    np.testing.assert_allclose(sums[0], expected, atol=1e-4)
    assert (sums[0] != sums[1]).any()  # the last bits depend on the order


def test_add_at_writes_through_a_view(x):
    cp.add.at(x.T, cp.asarray([0, 0]), 1)
    np.testing.assert_array_equal(x.get(), host + [[2, 0, 0]])


def test_get_array_module_and_asnumpy(x):
    assert cp.get_array_module(x) is cp and cp.get_array_module(1, x) is cp
    assert cp.get_array_module(host) is np
    assert type(cp.asnumpy(x)) is np.ndarray and cp.asnumpy(host) is host


def test_the_card_that_is_not_there():
    with strict_gpu():
        assert cp.is_available() and cp.cuda.runtime.getDeviceProperties(0)["name"] == b"strict stand-in"
        cp.cuda.Device(0).synchronize()
        assert issubclass(cp.cuda.memory.OutOfMemoryError, MemoryError)


def test_the_memory_pool_counts():
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.used_bytes()
    a = cp.zeros(1000, np.float32)
    view, b = a[::2], a + 1
    assert pool.used_bytes() - before == 8000
    del a, b
    assert pool.used_bytes() - before == 4000 and pool.total_bytes() - before == 8000
    del view
    pool.free_all_blocks()
    assert pool.used_bytes() == pool.total_bytes() == before


def test_import_without_a_gpu_driver_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error'); import strict_cupy"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(strict_cupy.__file__).parent)


# ---------------------------------------------------------------- fused formulas


def test_fused_formula_runs(x):
    @cp.fuse
    def both(a, b, out):
        out[...] = cp.exp(a) * b

    @cp.fuse()
    def swish(a):
        xp = cp.get_array_module(a)
        return a / (1 + xp.exp(-a)), xp.where(a > 1, a, 0.5 * a)

    out = cp.empty_like(x)
    assert both(x, np.float32(2), out) is None
    np.testing.assert_array_equal(out.get(), np.exp(host) * 2)
    np.testing.assert_array_equal(swish(x)[0].get(), host / (1 + np.exp(-host)))


def _uses_numpy(a):
    return np.exp(np.asarray(a))


def _asks_an_element(a):
    return a * 2 if a > 0 else a


def _needs_the_shape(a):
    return a / a.shape[-1] ** 2 + a.reshape(-1)


def _adds_up(a):
    return (a * a).sum()


def _makes_an_array(a):
    return a + cp.zeros(3)


@pytest.mark.parametrize("formula", [_uses_numpy, _asks_an_element, _needs_the_shape, _adds_up,
                                     _makes_an_array])
def test_fused_formula_refused(x, formula):
    with pytest.raises(Exception) as problem:  # CuPy's tracer has a different one for each
        cp.fuse(formula)(x)
    assert not isinstance(problem.value, AssertionError)


def test_fused_formula_with_a_host_array_is_refused(x):
    with pytest.raises(TypeError, match="argument type"):
        cp.fuse(lambda a, b: a + b)(x, host)


# ---------------------------------------------------------------- cuBLAS


def _laid_out(rng, shape, dtype, how):
    """A random array of this shape: its memory contiguous, transposed, or a slice of something larger."""
    batch, (m, n) = shape[:-2], shape[-2:]
    if how == "transposed":
        array = cp.asarray(rng.standard_normal((*batch, n, m)).astype(dtype))
        return array.swapaxes(-1, -2)
    if how == "columns":
        return cp.asarray(rng.standard_normal((*batch, m, n + 5)).astype(dtype))[..., 2:2 + n]
    if how == "heads" and batch:  # (T, H, D) seen as H matrices (T, D)
        return cp.asarray(rng.standard_normal((m, *batch, n)).astype(dtype)).transpose(1, 0, 2)
    return cp.asarray(rng.standard_normal(shape).astype(dtype))


@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("types", ["float32 float32", "float64 float64", "float16 float32", "float16 float16",
                                   "bfloat16 float32", "bfloat16 bfloat16"])
def test_gemm_equals_numpy(rng, types, batch):
    """device.matmul through gemmEx and gemmStridedBatchedEx, for random shapes and layouts."""
    if "bfloat16" in types:
        reference("ml_dtypes")  # makes it known to NumPy
    dtype, out_dtype = types.split()
    layouts = ["plain", "transposed", "columns", "heads"]
    for trial in range(40):
        m, k, n = rng.integers(1, 9, 3)
        with strict_gpu():
            a = _laid_out(rng, (*batch, m, k), dtype, rng.choice(layouts))
            b = _laid_out(rng, (*batch, k, n), dtype, rng.choice(layouts))
            out = _laid_out(rng, (*batch, m, n), out_dtype, rng.choice(["plain", "columns", "heads"]))
            wide = np.float64 if dtype == "float64" else np.float32
            product = a.get().astype(wide) @ b.get().astype(wide)
            if trial % 2:
                product += out.get()
            else:
                out[...] = np.nan  # beta = 0 must not read it
            assert device.matmul(a, b, out=out, accumulate=bool(trial % 2)) is out
            tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[out_dtype]
            np.testing.assert_allclose(out.get().astype(wide), product, rtol=tolerance, atol=tolerance)


def _call(a, b, c, m, n, k, lda=None, ldb=None, ldc=None, types=(0, 0, 0), compute=68, alpha=1.0, beta=0.0):
    """gemmEx on three vectors of memory, everything column-major, nothing transposed."""
    scalars = [np.array(s, np.float32) for s in (alpha, beta)]
    strict_cupy.gemmEx(1, 0, 0, m, n, k, scalars[0].ctypes.data, a.data.ptr, types[0], lda or m,
                       b.data.ptr, types[1], ldb or k, scalars[1].ctypes.data, c.data.ptr, types[2], ldc or m,
                       compute, -1)


def test_gemm_alpha_beta_and_column_major_order(rng):
    a, b, c = (rng.standard_normal(n).astype(np.float32) for n in (6, 12, 8))
    on_card = [cp.asarray(v) for v in (a, b, c)]
    _call(*on_card, 2, 4, 3, alpha=0.5, beta=2.0)
    expected = 0.5 * a.reshape(2, 3, order="F") @ b.reshape(3, 4, order="F") + 2 * c.reshape(2, 4, order="F")
    np.testing.assert_allclose(on_card[2].get(), expected.ravel("F"), rtol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"lda": 1}, "INVALID_VALUE"), ({"ldb": 2}, "INVALID_VALUE"), ({"ldc": 1}, "INVALID_VALUE"),
    ({"m": 0}, "INVALID_VALUE"), ({"types": (0, 2, 0)}, "NOT_SUPPORTED"),
    ({"types": (0, 0, 2)}, "NOT_SUPPORTED"), ({"types": (1, 1, 1)}, "NOT_SUPPORTED"),
    ({"compute": 70}, "NOT_SUPPORTED"), ({"compute": 0}, "NOT_SUPPORTED"), ({"lda": 3}, "illegal memory"),
    ({"n": 5}, "illegal memory"), ({"ldc": 3}, "illegal memory"),
])
def test_gemm_refuses(change, message):
    vectors = [cp.zeros(n, np.float32) for n in (6, 12, 8)]
    sizes = {"m": 2, "n": 4, "k": 3}
    with pytest.raises(CUBLASError, match=message):
        _call(*vectors, **{**sizes, **change})
    _call(*vectors, **sizes)


def test_gemm_needs_pointers_of_this_device():
    on_card, elsewhere = cp.zeros(4, np.float32), np.zeros(4, np.float32)
    pretender = SimpleNamespace(data=SimpleNamespace(ptr=elsewhere.ctypes.data))
    with pytest.raises(CUBLASError, match="illegal memory"):
        _call(on_card, pretender, on_card, 2, 2, 2)
