"""Every gradient is proved: by finite differences, by the plain composition of simpler ops, and by PyTorch.

`python -m pytest tests/test_autograd.py -v` reads as a table of contents: a line for each op, shape, dtype and device.
The tables come first (CASES and LARGE: what there is to prove), then the engine, the proofs that run over all of the
tables, what is peculiar to one op, the memory, and last the check itself, which must reject every planted bug.
"""
import gc
import os
import re
import tracemalloc
import weakref
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from conftest import reference
from threadpoolctl import threadpool_info

import autograd as ag
from autograd import Tensor, gradcheck, no_grad
from evaluate import token_losses
from hardware import device
from images import ops


@pytest.fixture(autouse=True, params=[os.environ["NANOLLM_DEVICE"]])
def on():
    """The device, for the name of each test."""


# ---------------------------------------------------------------- what there is to prove

class Case(NamedTuple):
    """An op at one choice of shapes: f of Tensors, the same in PyTorch (t is torch), the shapes of the inputs."""
    name: str
    f: Callable
    torch: Callable
    shapes: tuple
    positive: bool = False

    def inputs(self):
        """Random numbers, the same in every run; nothing is ever all ones."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        arrays = [rng.standard_normal(shape) for shape in self.shapes]
        return [np.abs(x) + 0.5 for x in arrays] if self.positive else arrays


def case(name, f, torch, *shapes, positive=False):
    return Case(name, f, torch, shapes, positive)


def some_ids(shape, limit):
    """Random ids, of which some occur twice if there is room."""
    return np.random.default_rng(2).integers(0, limit, shape)


def angles(T, half):
    """cos and sin of any angles (not of any model's), float64."""
    angle = np.random.default_rng(3).uniform(-3, 3, (T, half))
    return np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)


def elementwise():
    ops = {"add": (ag.add, lambda t, a, b: a + b), "sub": (ag.sub, lambda t, a, b: a - b),
           "mul": (ag.mul, lambda t, a, b: a * b), "div": (ag.div, lambda t, a, b: a / b)}
    shapes = {"same-shape": ((2, 3), (2, 3)), "a-row": ((2, 3), (3,)), "rows-and-columns": ((2, 1), (1, 3)),
              "a-scalar": ((), (2, 3)), "new-axes": ((3, 1), (2, 1, 1, 4)), "size-1": ((1,), (1, 1))}
    for op, (ours, theirs) in ops.items():
        for about, pair in shapes.items():
            yield case(f"{op}-{about}", ours, theirs, *pair, positive=op == "div")


def operator(name, f, positive=False):
    """Where Tensors and torch tensors are written alike."""
    return case(name, f, lambda t, *xs: f(*xs), *((2, 3),) * f.__code__.co_argcount, positive=positive)


def rope(T, half):
    """The op for float inputs of any dtype, and Hugging Face's two lines for Llama."""
    def ours(x):
        return ag.rope(x, *(device.xp.asarray(a, x.dtype) for a in angles(T, half)))

    def theirs(t, x):
        cos, sin = (t.tensor(a, dtype=x.dtype) for a in angles(T, half))
        return x * cos + t.cat([-x[..., half:], x[..., :half]], -1) * sin
    return ours, theirs


def glu(activation):
    functions = {"silu": lambda t, x: t.nn.functional.silu(x), "sigmoid": lambda t, x: t.sigmoid(x),
                 "gelu": lambda t, x: t.nn.functional.gelu(x, approximate="tanh"), "relu": lambda t, x: t.relu(x)}

    def theirs(t, *x):
        gate, up = x if len(x) == 2 else x[0].chunk(2, -1)
        return functions[activation](t, gate) * up
    return lambda gate, up=None: ag.glu(gate, up, activation), theirs


def torch_attention(t, q, k, v):
    repeat, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    visible = t.ones(T, S, dtype=t.bool).tril(S - T)
    return t.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def qkv(B, H, K, T, S, D):
    return (B, H, T, D), (B, K, S, D), (B, K, S, D)


def losses(N, V):
    """cross_entropy(logits), linear_cross_entropy(x, w) and the same two in PyTorch, for targets of shape N."""
    y = some_ids(N, V)

    def torch_loss(t, z):
        return t.nn.functional.cross_entropy(z.reshape(-1, V), t.tensor(y.reshape(-1)))
    return (lambda z: ag.cross_entropy(z, y), torch_loss,
            lambda x, w: ag.linear_cross_entropy(x, w, y), lambda t, x, w: torch_loss(t, x @ w.T))


def cross_entropy(about, N, V):
    return case(f"cross_entropy-{about}", *losses(N, V)[:2], (*N, V))


def linear_cross_entropy(about, N, V, C):
    return case(f"linear_cross_entropy-{about}", *losses(N, V)[2:], (*N, C), (V, C))


def softmax(about, *shape):
    return case(f"softmax-{about}", ag.softmax, lambda t, x: x.softmax(-1), shape)


def rmsnorm(about, *shape, eps=0.3):        # an eps that matters compared with mean(x²)
    return case(f"rmsnorm-{about}", lambda x, w: ag.rmsnorm(x, w, eps),
                lambda t, x, w: t.nn.functional.rms_norm(x, w.shape, w, eps), shape, shape[-1:])


def embedding(about, ids, V=4):
    return case(f"embedding-{about}", lambda w: ag.embedding(w, ids), lambda t, w: w[t.tensor(ids.astype(int))], (V, 3))


def conv2d(about, N, H, W, C, F, k):
    """Images and kernel as ours; PyTorch has the channels first."""
    return case(f"conv2d-{about}", ops.conv2d, lambda t, x, w, b: t.nn.functional.conv2d(
        x.permute(0, 3, 1, 2), w, b, padding="same").permute(0, 2, 3, 1), (N, H, W, C), (F, C, k, k), (F,))


def max_pool2d(about, *shape):
    return case(f"max_pool2d-{about}", ops.max_pool2d, lambda t, x: t.nn.functional.max_pool2d(
        x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1), shape)


def relu(about, *shape):
    return case(f"relu-{about}", ops.relu, lambda t, x: t.relu(x), shape)


def conv_block(about, N, H, W, C, F, k):
    def theirs(t, x, w, b):
        return t.relu(t.max_pool2d(t.conv2d(x.permute(0, 3, 1, 2), w, b, padding="same"), 2)).permute(0, 2, 3, 1)
    return case(f"conv_block-{about}", ops.conv_block, theirs, (N, H, W, C), (F, C, k, k), (F,))


def conv_block_plain(x, w, b):
    return ops.relu(ops.max_pool2d(ops.conv2d(x, w, b)))


MASK = np.array([[0, 0, -np.inf], [-np.inf, 0, -np.inf]])

CASES = [
    *elementwise(),
    operator("add-number", lambda x: 2 + (x + 0.5)),
    operator("sub-number", lambda x: 2 - (x - 0.5)),
    operator("mul-number", lambda x: 3 * (x * 0.7)),
    operator("div-number", lambda x: 2 / (x / 3), positive=True),
    operator("neg", lambda x: -x),
    operator("power-square", lambda x: x ** 2),
    operator("power-cube", lambda x: x ** 3),
    operator("power-square_root", lambda x: x ** 0.5, positive=True),
    operator("power-inverse", lambda x: x ** -1, positive=True),
    operator("matmul-operator", lambda x: x @ x.transpose(1, 0)),

    case("sum-all", ag.sum, lambda t, x: x.sum(), (2, 3)),
    case("sum-axis_0", lambda x: x.sum(0), lambda t, x: x.sum(0), (2, 3)),
    case("sum-last_axis_kept", lambda x: x.sum(-1, keepdims=True), lambda t, x: x.sum(-1, keepdim=True), (2, 3, 4)),
    case("sum-two_axes", lambda x: x.sum((0, -1)), lambda t, x: x.sum((0, 2)), (2, 3, 4)),
    case("sum-axis_of_size_1", lambda x: x.sum(1), lambda t, x: x.sum(1), (3, 1)),
    case("mean-all", ag.mean, lambda t, x: x.mean(), (2, 3)),
    case("mean-axis_0", lambda x: x.mean(0), lambda t, x: x.mean(0), (2, 3)),
    case("mean-two_axes_kept", lambda x: x.mean((-1, 0), keepdims=True),
         lambda t, x: x.mean((0, 2), keepdim=True), (2, 3, 4)),
    case("reshape-tuple", lambda x: x.reshape((3, -1)), lambda t, x: x.reshape(3, -1), (2, 3, 4)),
    case("reshape-sizes", lambda x: x.reshape(4, 1, 6), lambda t, x: x.reshape(4, 1, 6), (2, 3, 4)),
    case("transpose-all", ag.transpose, lambda t, x: x.permute(2, 1, 0), (2, 3, 4)),
    case("transpose-axes", lambda x: x.transpose(1, 2, 0), lambda t, x: x.permute(1, 2, 0), (2, 3, 4)),
    case("transpose-axes_from_the_end", lambda x: x.transpose(0, -1, 1), lambda t, x: x.permute(0, 2, 1), (3, 3, 3)),
    case("getitem-int", lambda x: x[1], lambda t, x: x[1], (2, 3)),
    case("getitem-slices", lambda x: x[1:, ::2], lambda t, x: x[1:, ::2], (3, 4)),
    case("getitem-backwards", lambda x: x[::-1], lambda t, x: x.flip(0), (3, 2)),
    case("getitem-ellipsis", lambda x: x[..., -1], lambda t, x: x[..., -1], (2, 1, 3)),

    case("matmul-matrices", ag.matmul, lambda t, a, b: a @ b, (2, 3), (3, 4)),
    case("matmul-batch", ag.matmul, lambda t, a, b: a @ b, (2, 1, 2, 3), (2, 1, 3, 4)),
    case("matmul-one_a_many_b", ag.matmul, lambda t, a, b: a @ b, (2, 3), (2, 2, 3, 2)),
    case("matmul-many_a_one_b", ag.matmul, lambda t, a, b: a @ b, (2, 2, 3), (3, 4)),
    case("matmul-batch_sizes_1", ag.matmul, lambda t, a, b: a @ b, (2, 1, 2, 3), (1, 3, 3, 1)),
    case("matmul-size_1", ag.matmul, lambda t, a, b: a @ b, (1, 1), (1, 1)),
    case("linear-rows", ag.linear, lambda t, x, w: x @ w.T, (2, 3), (4, 3)),
    case("linear-batch", ag.linear, lambda t, x, w: x @ w.T, (2, 1, 3), (4, 3)),
    case("linear-one_row", ag.linear, lambda t, x, w: x @ w.T, (3,), (2, 3)),
    case("linear-size_1", ag.linear, lambda t, x, w: x @ w.T, (1, 1), (1, 1)),
    embedding("ids_that_repeat", np.array([[1, 3, 1], [1, 0, 3]])),
    embedding("one_id", np.array(2)), embedding("ids_of_a_token_cache", np.array([3, 0, 3], np.uint16)),
    embedding("vocabulary_of_1", np.array([0, 0]), V=1),

    softmax("rows", 2, 4), softmax("batch", 2, 1, 3), softmax("one_row", 3), softmax("width_1", 2, 1),
    case("softmax-masked", lambda x: ag.softmax(x + device.xp.asarray(MASK)),
         lambda t, x: (x + t.tensor(MASK, dtype=x.dtype)).softmax(-1), (2, 3)),
    rmsnorm("rows", 3, 4), rmsnorm("batch", 2, 1, 3), rmsnorm("one_row", 3), rmsnorm("width_1", 2, 1),
    rmsnorm("small_eps", 2, 3, eps=1e-6),

    case("rope-heads", *rope(3, 2), (2, 1, 3, 4)),
    case("rope-one_head", *rope(3, 2), (3, 4)),
    case("rope-one_position", *rope(1, 2), (2, 1, 4)),
    case("rope-one_pair", *rope(3, 1), (2, 3, 2)),
    *(case(f"glu-{a}-rows", *glu(a), (2, 3), (2, 3)) for a in ag.ACTIVATIONS),
    *(case(f"glu-{a}-joint", *glu(a), (2, 1, 6)) for a in ag.ACTIVATIONS),
    case("glu-silu-width_1", *glu("silu"), (2, 1), (2, 1)),

    case("attention-square", ag.attention, torch_attention, *qkv(B=2, H=2, K=2, T=3, S=3, D=2)),
    case("attention-grouped", ag.attention, torch_attention, *qkv(B=2, H=4, K=2, T=3, S=3, D=2)),
    case("attention-one_kv_head", ag.attention, torch_attention, *qkv(B=1, H=3, K=1, T=2, S=2, D=3)),
    case("attention-more_keys", ag.attention, torch_attention, *qkv(B=1, H=4, K=2, T=2, S=4, D=2)),
    case("attention-one_query", ag.attention, torch_attention, *qkv(B=2, H=2, K=1, T=1, S=4, D=3)),
    case("attention-size_1", ag.attention, torch_attention, *qkv(B=1, H=1, K=1, T=1, S=1, D=1)),

    cross_entropy("rows", (3,), 4), cross_entropy("batch", (2, 3), 4), cross_entropy("one_row", (1,), 4),
    cross_entropy("vocabulary_of_1", (2,), 1),
    linear_cross_entropy("rows", (3,), 4, 2), linear_cross_entropy("batch", (2, 3), 4, 3),
    linear_cross_entropy("one_row", (1,), 4, 2), linear_cross_entropy("size_1", (2,), 1, 1),

    conv2d("kernel_3", N=3, H=2, W=3, C=2, F=3, k=3), conv2d("kernel_5", N=1, H=4, W=2, C=1, F=2, k=5),
    conv2d("kernel_1", N=3, H=2, W=1, C=3, F=2, k=1), conv2d("size_1", N=1, H=1, W=1, C=1, F=1, k=3),
    max_pool2d("even", 3, 4, 2, 2), max_pool2d("odd_height", 1, 3, 2, 2), max_pool2d("odd_width", 1, 4, 5, 1),
    max_pool2d("one_place", 3, 2, 2, 1),
    relu("images", 2, 3, 1, 2), relu("rows", 5, 3), relu("width_1", 3, 1),
    conv_block("kernel_3", N=3, H=2, W=4, C=2, F=3, k=3), conv_block("kernel_5", N=2, H=4, W=2, C=1, F=2, k=5),
    conv_block("kernel_1", N=1, H=6, W=3, C=3, F=2, k=1), conv_block("odd_height", N=2, H=5, W=4, C=2, F=2, k=3),
    conv_block("one_place", N=1, H=3, W=3, C=1, F=1, k=3), conv_block("eight_rows", N=1, H=16, W=2, C=2, F=1, k=3),
]

# Sizes that no block of rows, queries or logits divides, and more of them than one block holds.
LARGE = [
    softmax("many_rows", 521, 131), softmax("long_rows", 3, 40_001),
    rmsnorm("many_rows", 521, 131), rmsnorm("long_rows", 3, 40_001),
    case("rope-many_positions", *rope(513, 3), (3, 7, 513, 6)),
    *(case(f"glu-{a}-many_rows", *glu(a), (521, 131), (521, 131)) for a in ag.ACTIVATIONS),
    case("glu-silu-joint_many_rows", *glu("silu"), (521, 262)),
    case("attention-513", ag.attention, torch_attention, *qkv(B=1, H=2, K=2, T=513, S=513, D=2)),
    case("attention-513_grouped", ag.attention, torch_attention, *qkv(B=2, H=4, K=2, T=513, S=513, D=1)),
    case("attention-513_more_keys", ag.attention, torch_attention, *qkv(B=1, H=2, K=1, T=513, S=700, D=2)),
    cross_entropy("many_rows", (521,), 131), cross_entropy("long_rows", (3,), 40_001),
    linear_cross_entropy("many_rows", (521,), 131, 3),
    case("matmul-large", ag.matmul, lambda t, a, b: a @ b, (3, 131, 67), (67, 203)),
    case("linear-large", ag.linear, lambda t, x, w: x @ w.T, (521, 131), (67, 131)),
    case("linear-few_rows", ag.linear, lambda t, x, w: x @ w.T, (3, 300), (2500, 300)),
    embedding("many_ids", some_ids((521,), 40), V=40),
    conv_block("many_images", N=37, H=33, W=17, C=3, F=5, k=3), conv_block("large_images", 3, 72, 70, 7, 5, 5),
]

# On a GPU an embedding's gradient is summed in any order: autograd.embedding says so.
REPRODUCIBLE = [c for c in LARGE if device.xp is np or not c.name.startswith("embedding")]


def for_all(cases):
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


# ---------------------------------------------------------------- what the proofs share


@pytest.fixture(autouse=True)
def cache_folder():
    """No token cache, so no folder for one: a thousand short tests start faster."""


def value_and_gradients(f, inputs, dtype):
    """f(*inputs) and the gradient of each input for a random dout: arrays of the host, all of this dtype."""
    leaves = [Tensor(device.xp.array(x, dtype), requires_grad=True) for x in inputs]
    out = f(*leaves)
    out.backward(random_dout(out.shape))
    results = [device.to_host(array) for array in (out.data, *(leaf.grad for leaf in leaves))]
    assert {array.dtype for array in results} == {np.dtype(dtype)}
    return results


def random_dout(shape):
    return device.xp.asarray(np.random.default_rng(1).standard_normal(shape))


def torch_value_and_gradients(f, inputs, dtype):
    torch = reference("torch")
    leaves = [torch.tensor(np.asarray(x, dtype), requires_grad=True) for x in inputs]
    out = f(torch, *leaves)
    out.backward(torch.tensor(device.to_host(random_dout(tuple(out.shape))), dtype=out.dtype))
    return [out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


def assert_close(got, expected, dtype):
    """Equal to about as many digits as the dtype has, measured by each array's largest element."""
    tolerance = {np.float32: 1e-5, np.float64: 1e-10}[dtype]
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def blocks_of(monkeypatch, rows):
    """From here on a sweep goes over blocks of this number of rows."""
    sweep = device.sweep
    monkeypatch.setattr(device, "sweep", lambda f, n, block: sweep(f, n, rows))


# ---------------------------------------------------------------- the engine


def tensor(*shape, seed=5, dtype=np.float64):
    data = np.random.default_rng(seed).standard_normal(shape)
    return Tensor(device.xp.asarray(data, dtype), requires_grad=True)


def shared_gradient(x):
    """y and u receive one and the same array from their sum; then y is sent more before u has used its own."""
    y, u = x * 2, x * 3
    return ((y + u) * 0.7 + y * x) + u * x


def shared_gradient_then_slice(x):
    y, u = x * 2, x * 3
    return ((y + u) * 0.7 + y[:, :1]) + u * x


def three_users(x):
    y = x * x
    return y * 2 + y * x + y


GRAPHS = {
    "diamond": lambda x: (lambda y: y * y + y * 3)(x * x),
    "leaf_used_twice": lambda x: x * x + x,
    "leaf_times_its_transpose": lambda x: x @ x.transpose(),
    "tied_weight": lambda w: ag.linear(ag.embedding(w, np.array([2, 0, 2])), w),
    "overlapping_slices": lambda x: x[1:] * x[:-1] + x[:1],
    "slices_of_a_result": lambda x: (lambda y: y[1:] * y[:-1] + y[1:])(x * x),
    "slice_before_result": lambda x: (lambda y: y[:, :1] + y * y)(x * x),
    "slice_after_result": lambda x: (lambda y: y * y + y[:, :1])(x * x),
    "gradient_that_two_share": shared_gradient,
    "gradient_that_two_share_then_slice": shared_gradient_then_slice,
    "three_users": three_users,
    "broadcast_of_a_result": lambda x: (x * x).sum(0) * x + (x * x).mean(),
    "no_op_at_all": lambda x: x,
}


@pytest.mark.parametrize("f", GRAPHS.values(), ids=GRAPHS)
def test_graph(f):
    """Gradients meet and add up, and the dout that was given is the caller's as before."""
    x = tensor(3, 2)
    assert gradcheck(f, x.data)
    out = f(x)
    dout = random_dout(out.shape)
    before = device.to_host(dout).copy()
    out.backward(dout)
    np.testing.assert_array_equal(device.to_host(dout), before)
    assert not device.xp.may_share_memory(x.grad, dout)


def test_chain_of_5000_ops():
    x = tensor(2, 3)
    y = x
    for _ in range(5000):
        y = y + 0.001
    y.backward(2 * device.xp.ones((2, 3)))
    assert (x.grad == 2).all()


def test_backward_adds_to_the_gradient_in_the_buffer_where_it_lies():
    """A parameter's .grad is a view into one flat buffer: whatever kind of part arrives, it has to stay that view."""
    def loss(x, w, e):
        return ag.linear(x, w) * ag.embedding(e, np.array([1, 0])) + x[:, 1:].sum() + w.sum()
    fresh = [tensor(2, 3), tensor(2, 3), tensor(2, 2)]
    loss(*fresh).backward(random_dout((2, 2)))
    once = np.concatenate([device.to_host(leaf.grad).ravel() for leaf in fresh])

    flat = device.xp.full(16, 7.0)
    leaves = [Tensor(leaf.data, requires_grad=True) for leaf in fresh]
    for leaf, start in zip(leaves, (0, 6, 12), strict=True):
        leaf.grad = flat[start:start + leaf.data.size].reshape(leaf.shape)
    for times in (1, 2):
        loss(*leaves).backward(random_dout((2, 2)))
        np.testing.assert_allclose(device.to_host(flat), 7 + times * once, rtol=1e-12)


def test_only_leaves_that_ask_keep_a_gradient():
    x, y = tensor(2, 3), Tensor(device.xp.ones((2, 3)))
    product = x * y
    product.sum().backward()
    assert x.grad is not None and y.grad is None and product.grad is None


def test_backward_of_a_scalar_needs_no_dout_and_any_other_does():
    for shape in ((), (1,), (1, 1)):
        x = tensor(*shape)
        (x * 3).backward()
        assert x.grad == 3 and x.grad.shape == shape
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) needs dout"):
        (tensor(2, 3) * 3).backward()


def test_dout_of_another_shape_or_kind_fails():
    x = tensor(2, 3)
    with pytest.raises(ValueError, match="broadcast"):
        (x * 3).backward(device.xp.ones((3, 2)))
    assert x.grad is None
    (x * 3).backward(2.0)                           # one number for all
    assert (x.grad == 6).all()


def test_second_backward_raises():
    x = tensor(2, 3)
    shared = x * 2
    first, second = shared.sum(), (shared * shared).sum()
    first.backward()
    for used in (first, second):
        with pytest.raises(RuntimeError, match="freed by an earlier backward; run the forward pass again"):
            used.backward()


def test_backward_without_a_graph_raises():
    with no_grad():
        out = tensor(2, 3).sum()
    for nothing in (out, Tensor(device.xp.ones(())) * 2):
        with pytest.raises(RuntimeError, match="depends on nothing that requires a gradient"):
            nothing.backward()


def test_no_grad_records_nothing_and_ends_with_its_block():
    x = tensor(2, 3)
    with no_grad():
        with no_grad():
            assert not (x * 2).requires_grad
        assert not (x * 2).requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        1 / 0  # noqa: B018
    assert (x * 2).requires_grad


def test_integers_require_no_gradient():
    for data in ([1, 2], [True]):
        with pytest.raises(TypeError, match="requires_grad needs floating-point data"):
            Tensor(data, requires_grad=True)
    assert Tensor([1, 2]).dtype.kind == "i"


@pytest.mark.parametrize("op", [
    ag.softmax, ag.glu, lambda x: ag.rmsnorm(x, tensor(4)), lambda x: ag.linear(x, tensor(3, 4)),
    lambda x: ag.cross_entropy(x, [0, 1]), lambda x: ag.linear_cross_entropy(x, tensor(3, 4), [0, 1])])
def test_integers_are_refused_where_the_result_would_be_cut_to_integers(op):
    with pytest.raises(TypeError, match="this op needs floating-point data, not int64"):
        op(Tensor(np.arange(8).reshape(2, 4)))


def test_matmul_says_that_it_needs_matrices():
    for a, b in (((3,), (3, 2)), ((2, 3), (3,)), ((), (2, 2))):
        with pytest.raises(ValueError, match=re.escape(f"matmul needs matrices, not arrays of shape {a} and {b}")):
            tensor(*a) @ tensor(*b)


def test_the_power_0_is_flat_even_at_0():
    x = Tensor([0.0, 1.0, -2.0], requires_grad=True)
    (x ** 0).sum().backward()
    assert x.grad.tolist() == [0, 0, 0]


def test_numbers_and_arrays_take_the_dtype_of_the_tensor():
    x = tensor(2, 3, dtype=np.float32)
    for other in (2, 2.5, np.float64(2.5), device.xp.full((2, 3), 2.5)):
        for out in (x + other, other + x, x - other, other - x, x * other, other * x, x / other, other / x):
            assert isinstance(out, Tensor) and out.dtype == np.float32
        for op in (ag.add, ag.sub, ag.mul, ag.div):
            assert op(x, other).dtype == op(other, x).dtype == np.float32
    assert (5 - x).data[0, 0] == 5 - x.data[0, 0] and (5 / x).data[0, 0] == 5 / x.data[0, 0]
    assert "requires_grad=True" in repr(x) and "requires_grad" not in repr(Tensor([1.0]))


# Wrong backward functions. An op is made by `record`.


def wrong_op(backward):
    return lambda x: ag.record(x.data * 2, (x,), lambda dout: backward(2 * dout))


@pytest.mark.parametrize("backward, error, message", [
    (lambda dx: (dx[:1],), ValueError, r"shape \(1, 3\) reached a value of shape \(2, 3\)"),
    (lambda dx: (dx.T,), ValueError, r"shape \(3, 2\) reached a value of shape \(2, 3\)"),
    (lambda dx: (dx[0],), ValueError, r"shape \(3,\) reached a value of shape \(2, 3\)"),
    (lambda dx: (dx, dx), ValueError, "zip"),
    (lambda dx: (), ValueError, "zip"),
    (lambda dx: (dx.astype(np.float32),), TypeError, "a float64 value received a float32 gradient"),
], ids=["shape", "transposed", "missing_axis", "one_too_many", "none", "dtype"])
def test_a_gradient_that_is_not_the_values_fails_loudly(backward, error, message):
    x = tensor(2, 3)
    for f in (wrong_op(backward), lambda x: wrong_op(backward)(x * 2)):
        with pytest.raises(error, match=message):
            f(x).sum().backward()


# ---------------------------------------------------------------- the proofs


@for_all(CASES)
def test_gradient(case, monkeypatch):
    """Every element of every gradient is the finite difference, even where a block is only two rows."""
    blocks_of(monkeypatch, rows=2)
    assert gradcheck(case.f, *case.inputs())


@for_all(LARGE)
def test_gradient_along_a_direction(case):
    """Many elements at once: the gradient times a random direction is the finite difference along it."""
    inputs, rng, h = case.inputs(), np.random.default_rng(4), 1e-6
    value, *gradients = value_and_gradients(case.f, inputs, np.float64)
    dout = device.to_host(random_dout(value.shape))
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        above, below = (device.to_host(case.f(*(Tensor(device.xp.asarray(x + h * sign * direction if j == i else x))
                                                for j, x in enumerate(inputs))).data) for sign in (1, -1))
        numeric = ((above - below) * dout).sum() / (2 * h)
        assert (gradient * direction).sum() == pytest.approx(numeric, rel=1e-5, abs=1e-8), f"input {i}"


@for_all(CASES + LARGE)
def test_matches_torch(case, dtype):
    assert_close(value_and_gradients(case.f, case.inputs(), dtype),
                 torch_value_and_gradients(case.torch, case.inputs(), dtype), dtype)


@for_all(CASES)
def test_float32_stays_float32_and_agrees_with_float64(case):
    """No Python number, mask or table makes anything float64 (value_and_gradients looks at every dtype)."""
    assert_close(value_and_gradients(case.f, case.inputs(), np.float32),
                 value_and_gradients(case.f, case.inputs(), np.float64), np.float32)


@for_all(CASES)
def test_changes_no_array_that_others_hold(case):
    """Not its inputs, not dout, not its own result; and no gradient is a view into any of them."""
    leaves = [Tensor(device.xp.array(x), requires_grad=True) for x in case.inputs()]
    out = case.f(*leaves)
    dout = random_dout(out.shape)
    held = [*(leaf.data for leaf in leaves), out.data, dout]
    before = [device.to_host(array).copy() for array in held]
    out.backward(dout)
    for array, old in zip(held, before, strict=True):
        np.testing.assert_array_equal(device.to_host(array), old)
    for leaf in leaves:
        others = [*held, *(other.grad for other in leaves if other is not leaf)]
        assert not any(device.xp.may_share_memory(leaf.grad, other) for other in others)


def strided(x):
    """The same elements, in neither C nor Fortran order, with gaps between them."""
    if not x.shape:
        return x
    wide = device.xp.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype, order="F")
    wide[..., ::2] = x
    return wide[..., ::2]


@for_all(CASES)
def test_takes_any_view(case):
    """Transposed or sliced inputs and douts, as the model hands them on, give what contiguous ones give."""
    leaves = [Tensor(strided(device.xp.array(x)), requires_grad=True) for x in case.inputs()]
    out = case.f(*leaves)
    out.backward(strided(random_dout(out.shape)))
    assert_close([device.to_host(array) for array in (out.data, *(leaf.grad for leaf in leaves))],
                 value_and_gradients(case.f, case.inputs(), np.float64), np.float64)


@for_all(CASES)
def test_each_input_gets_the_same_gradient_alone(case):
    """Where only one input requires a gradient, it gets the one that it gets among others; the rest get none."""
    expected = value_and_gradients(case.f, case.inputs(), np.float64)[1:]
    for i in range(len(expected)):
        leaves = [Tensor(device.xp.array(x), requires_grad=j == i) for j, x in enumerate(case.inputs())]
        out = case.f(*leaves)
        out.backward(random_dout(out.shape))
        assert [leaf.grad is None for leaf in leaves] == [j != i for j in range(len(leaves))]
        assert_close([device.to_host(leaves[i].grad)], [expected[i]], np.float64)


@for_all(CASES)
def test_a_second_use_adds_its_gradient_to_the_first(case):
    """Whether the two meet in one graph or come from two: nothing is overwritten."""
    once = value_and_gradients(case.f, case.inputs(), np.float64)
    twice = [2 * array for array in once]
    assert_close(value_and_gradients(lambda *x: case.f(*x) + case.f(*x), case.inputs(), np.float64), twice, np.float64)
    leaves = [Tensor(device.xp.array(x), requires_grad=True) for x in case.inputs()]
    for _ in range(2):
        out = case.f(*leaves)
        out.backward(random_dout(out.shape))
    assert_close([device.to_host(leaf.grad) for leaf in leaves], twice[1:], np.float64)


@for_all([c for c in REPRODUCIBLE if c.name.split("-")[0] not in ("matmul", "linear", "linear_cross_entropy")])
def test_same_bits_with_one_thread_and_two(case, monkeypatch):
    """A sweep's blocks and their order do not depend on the number of threads. (A single product's split does.)"""
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(device, "threads", threads)
        results.append(value_and_gradients(case.f, case.inputs(), np.float32))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_product_of_few_rows_has_all_of_blas_threads_and_gives_them_back(monkeypatch):
    monkeypatch.setattr(device, "threads", 2)
    during = []
    product = device._product
    monkeypatch.setattr(device, "_product", lambda *a: (during.append(blas_threads()), product(*a)))
    out = np.ones((1, 1000))
    device._blas(np.ones((1, 3000)), np.ones((3000, 1000)), out, True)
    np.testing.assert_array_equal(out, 3001)
    assert during[0] <= {2} and blas_threads() <= {1}           # empty where threadpoolctl does not know the library


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@for_all(REPRODUCIBLE)
def test_same_bits_in_every_run(case):
    for one, two in zip(*(value_and_gradients(case.f, case.inputs(), np.float32) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(one, two)


# ---------------------------------------------------------------- the blocked ops are the plain ones


def glu_whole(x, activation):
    gate, up = x.data[..., :x.shape[-1] // 2], x.data[..., x.shape[-1] // 2:]
    a, slope = ag.ACTIVATIONS[activation](gate)
    return ag.record(a * up, (x,), lambda dout: (device.xp.concatenate((dout * up * slope(), dout * a), -1),))


def softmax_whole(x):
    p = ag._softmax(x.data)                     # the formulas that `softmax` applies by rows, to all rows at once
    return ag.record(p, (x,), lambda dout: (ag._softmax_backward(p, dout),))


@pytest.mark.parametrize("fast, plain, shapes", [
    *((ag.attention, ag.attention_plain, case.inputs) for case in CASES + LARGE if case.name.startswith("attention")),
    *((ag.rmsnorm, ag.rmsnorm_plain, shapes) for shapes in [((2, 3, 5), (5,)), ((1, 4), (4,)), ((999, 131), (131,))]),
    *((lambda x, a=a: ag.glu(x, activation=a), lambda x, a=a: glu_whole(x, a), shapes)
      for a in ag.ACTIVATIONS for shapes in [((2, 3, 6),), ((1, 2),), ((999, 262),)]),
    *((ag.softmax, softmax_whole, shapes) for shapes in [((2, 3, 5),), ((1, 1),), ((999, 131),)]),
    *((ops.conv_block, conv_block_plain, case.inputs) for case in CASES + LARGE if case.name.startswith("conv_block")),
])
def test_an_op_is_its_plain_form(fast, plain, shapes, dtype, rng):
    """The form that the model uses has the value and the gradients of the form that reads as the derivation."""
    inputs = shapes() if callable(shapes) else [rng.standard_normal(shape) for shape in shapes]
    assert_close(value_and_gradients(fast, inputs, dtype), value_and_gradients(plain, inputs, dtype), dtype)


def test_cast_computes_in_the_new_type_and_its_gradient_has_the_old(on_cpu):
    x = Tensor(np.float32([0.5, 2.0]), requires_grad=True)
    out = ag.cast(x, np.float64)
    out.backward(np.float64([1 + 2.0 ** -40, 3.0]))
    assert (out.dtype, out.data.tolist()) == (np.float64, [0.5, 2.0])
    assert (x.grad.dtype, x.grad.tolist()) == (np.float32, [1.0, 3.0])
    assert ag.cast(x, np.float32) is x


def test_conv_block_takes_a_few_images_at_a_time(rng, monkeypatch):
    monkeypatch.setattr(ops, "_CACHE", 80)              # two images' rows of patches: 36 each
    inputs = [rng.standard_normal(shape) for shape in ((81, 3, 2, 2), (3, 2, 3, 3), (3,))]
    assert_close(value_and_gradients(ops.conv_block, inputs, np.float64),
                 value_and_gradients(conv_block_plain, inputs, np.float64), np.float64)


@pytest.mark.parametrize("pool, name, shapes", [
    (ops.max_pool2d, "max_pool2d", [(3, 5, 8, 4)]), (ops.conv_block, "conv_block", [(3, 8, 5, 4), (2, 4, 1, 1), (2,)])])
def test_of_equal_pixels_the_first_in_row_order_is_taken(pool, name, shapes, rng):
    inputs = [rng.integers(-1, 2, shape).astype(np.float64) for shape in shapes]
    theirs = next(case.torch for case in CASES if case.name.startswith(name))
    for got, expected in zip(value_and_gradients(pool, inputs, np.float64),
                             torch_value_and_gradients(theirs, inputs, np.float64), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-14)


def test_relu_is_flat_at_0():
    x = Tensor([[-1.0, 0.0, 2.0]], requires_grad=True)
    ops.relu(x).backward([[5.0, 6.0, 7.0]])
    assert x.grad.tolist() == [[0, 0, 7]]


@pytest.mark.parametrize("N, V, C", [(1, 5, 3), (64, 7, 2), (200, 7, 2), (321, 1, 1), (129, 203, 17)])
def test_linear_cross_entropy_in_several_blocks_equals_the_plain_loss(N, V, C, dtype, monkeypatch):
    monkeypatch.setattr(ag, "_LOGITS", 1)           # the smallest block of logits that there is
    rng, targets = np.random.default_rng(0), some_ids(N, V)
    inputs = rng.standard_normal((N, C)), rng.standard_normal((V, C))
    assert_close(value_and_gradients(lambda x, w: ag.linear_cross_entropy(x, w, targets), inputs, dtype),
                 value_and_gradients(lambda x, w: ag.cross_entropy(ag.linear(x, w), targets), inputs, dtype), dtype)


def test_blocks_of_logits_are_of_one_length(on_cpu, monkeypatch):
    """Of 1024 rows, 412 of which may be in a block, 412, 412 and 200 would need more memory and be no faster."""
    monkeypatch.setattr(ag, "_LOGITS", 412 * 3)
    sizes = lambda N: [len(z) for _, z in ag.logit_blocks(device.xp.ones((N, 2)), device.xp.ones((3, 2)))]
    assert sizes(1024) == [342, 342, 340] and sizes(0) == []


@pytest.mark.parametrize("N, V, C", [((1,), 5, 3), ((2, 100), 7, 2), ((3, 107), 1, 1), ((129,), 203, 17)])
def test_token_losses_are_those_of_each_target_and_its_rank(N, V, C, dtype, monkeypatch):
    monkeypatch.setattr(ag, "_LOGITS", 1)
    rng, targets = np.random.default_rng(0), some_ids(N, V)
    x, w = (Tensor(device.xp.asarray(rng.standard_normal(shape), dtype), True) for shape in ((*N, C), (V, C)))
    z = device.to_host(ag.linear(x, w).data).astype(np.float64)
    at = np.take_along_axis(z, targets[..., None], -1)
    losses, ranks = (device.to_host(array) for array in token_losses(x, w, targets, ranked=True))
    assert losses.shape == ranks.shape == N and losses.dtype == dtype and ranks.dtype == np.int64
    assert_close([losses], [np.log(np.exp(z - at).sum(-1))], dtype)
    assert (ranks == (z > at).sum(-1)).all()
    alone, none = token_losses(x, w, targets)
    assert none is None and (device.to_host(alone) == losses).all() and x.grad is None


def test_a_tie_and_a_nan_are_no_success():
    eye = Tensor(device.xp.eye(4))
    for z, rank in (([1, 1, 1, 1], 3), ([2, 1, 1, 0], 2), ([0, 1, 0, 0], 0), ([1, np.nan, 0, 0], 3)):
        _, ranks = token_losses(Tensor(device.xp.asarray([z], float)), eye, [1], ranked=True)
        assert device.to_host(ranks).tolist() == [rank]


def test_cross_entropy_is_minus_the_log_of_the_softmax(rng, dtype):
    z, targets = Tensor(device.xp.asarray(rng.standard_normal((5, 7)), dtype)), some_ids(5, 7)
    p = device.to_host(ag.softmax(z).data)
    assert float(ag.cross_entropy(z, targets).data) == pytest.approx(-np.log(p[range(5), targets]).mean(), rel=1e-6)
    alike = Tensor(device.xp.full((5, 7), 3.0, dtype))
    assert float(ag.cross_entropy(alike, targets).data) == pytest.approx(np.log(7), rel=1e-6)


# ---------------------------------------------------------------- what is peculiar to one op


def test_attention_never_sees_the_future(rng):
    """The mask is a true -inf: a later key a million times as strong changes no bit before it and gets exactly 0."""
    T, t = 150, 140
    q, k, v = (rng.standard_normal((1, 1, T, 4)) for _ in range(3))
    leaves = [Tensor(device.xp.array(x, np.float32), requires_grad=True) for x in (q, k, v)]
    before = ag.attention(*leaves)
    k[:, :, t:] = 1e6 * q[:, :, [t - 1]]            # loved most by the query just before
    v[:, :, t:] = 1e30
    after = ag.attention(*(Tensor(device.xp.array(x, np.float32)) for x in (q, k, v)))
    np.testing.assert_array_equal(*(device.to_host(out.data[:, :, :t]) for out in (before, after)))
    before[:, :, :t].backward(random_dout((1, 1, t, 4)))
    for leaf in leaves:
        assert (leaf.grad[:, :, t:] == 0).all() and (leaf.grad[:, :, :t] != 0).any()


def test_softmax_of_minus_infinity_is_exactly_zero():
    x = Tensor(device.xp.asarray([[0.0, -np.inf, 1.0]]), requires_grad=True)
    p = ag.softmax(x)
    p.backward([[1.0, 2.0, 3.0]])
    assert p.data[0, 1] == 0 and x.grad[0, 1] == 0 and (p.data[0, ::2] > 0).all()


EXTREME = np.array([[-1e4, 1e4, 0.0, -100.0], [100.0, -1e4, 1e4, 88.0]])
EXTREMES = {
    "softmax": (ag.softmax, EXTREME),
    "cross_entropy": (lambda z: ag.cross_entropy(z, np.array([0, 1])), EXTREME),
    "linear_cross_entropy": (lambda x, w: ag.linear_cross_entropy(x, w, np.array([0, 1])), EXTREME, np.eye(4)),
    "attention": (ag.attention, *(EXTREME.reshape(1, 1, 2, 4),) * 2, np.ones((1, 1, 2, 4))),
    "rmsnorm": (ag.rmsnorm, EXTREME, np.arange(4)),
    "rmsnorm-zero_row": (ag.rmsnorm, 0 * EXTREME, np.arange(4)),
    **{f"glu-{a}": (lambda gate, up, a=a: ag.glu(gate, up, a), EXTREME, np.ones((2, 4))) for a in ag.ACTIVATIONS},
    "glu-all_threads": (ag.glu, np.tile(EXTREME, (99_999, 1)), np.ones((199_998, 4))),
}


@pytest.mark.parametrize("f, inputs", [(f, inputs) for f, *inputs in EXTREMES.values()], ids=EXTREMES)
def test_extreme_values_overflow_nowhere(f, inputs, dtype):
    """Finite values and gradients, and no warning on the way (in these tests a warning is an error)."""
    assert all(np.isfinite(array).all() for array in value_and_gradients(f, inputs, dtype))


def test_relu_has_slope_0_at_0():
    value, dgate, _ = value_and_gradients(lambda g, u: ag.glu(g, u, "relu"), np.array([[[0.0]], [[2.0]]]), np.float64)
    assert value == 0 and dgate == 0


def test_rope_is_a_rotation(rng):
    """It keeps lengths, and the opposite angles undo it."""
    x, (cos, sin) = Tensor(device.xp.asarray(rng.standard_normal((2, 3, 4)))), map(device.xp.asarray, angles(3, 2))
    turned = ag.rope(x, cos, sin)
    assert_close([device.to_host((turned * turned).sum(-1).data), device.to_host(ag.rope(turned, cos, -sin).data)],
                 [device.to_host((x * x).sum(-1).data), device.to_host(x.data)], np.float64)
    assert turned.data.flags.c_contiguous


IDS = {"embedding": lambda ids: ag.embedding(Tensor(device.xp.zeros((5, 2))), ids),
       "cross_entropy": lambda ids: ag.cross_entropy(Tensor(device.xp.zeros((2, 5))), ids),
       "linear_cross_entropy": lambda ids: ag.linear_cross_entropy(Tensor(device.xp.zeros((2, 3))),
                                                                   Tensor(device.xp.zeros((5, 3))), ids),
       "token_losses": lambda ids: token_losses(Tensor(device.xp.zeros((2, 3))),
                                                   Tensor(device.xp.zeros((5, 3))), ids)}


@pytest.mark.parametrize("op", IDS)
def test_token_ids_are_checked(op):
    IDS[op](np.array([0, 4]))
    IDS[op](np.array([0, 4], np.uint16))            # as they come from a token cache
    IDS[op]([0, 4])
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=f"token id {wrong} is outside 0 … 4"):
            IDS[op](np.array([0, wrong]))
    for wrong in (np.array([0.0, 1.0]), np.array([True, False])):
        with pytest.raises(TypeError, match="token ids must be integers, not"):
            IDS[op](wrong)


def test_no_token_ids_are_no_rows():
    w = tensor(5, 2)
    out = ag.embedding(w, np.zeros((2, 0), int))
    out.backward(random_dout(out.shape))
    assert out.shape == (2, 0, 2) and (w.grad == 0).all()


@pytest.mark.parametrize("q, k, v", [
    ((1, 3, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4)),     # 2 does not divide 3 heads
    ((1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 2, 4)),     # more queries than keys
    ((1, 2, 2, 4), (1, 2, 2, 4), (1, 2, 3, 4)),     # keys without values
    ((2, 2, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4)),     # another batch
    ((1, 2, 2, 4), (1, 2, 2, 3), (1, 2, 2, 3)),     # another width
], ids=["heads", "queries", "values", "batch", "width"])
def test_attention_refuses_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(ValueError, match="does not go with"):
        ag.attention(*(Tensor(device.xp.zeros(shape)) for shape in (q, k, v)))


@pytest.mark.parametrize("index", [[0, 0], np.array([0, 1]), True, None, (0, [1])], ids=str)
def test_getitem_refuses_what_could_meet_an_element_twice(index):
    with pytest.raises(TypeError, match="ints and slices, not by"):
        Tensor(device.xp.zeros((2, 3)))[index]


# ---------------------------------------------------------------- memory


@pytest.fixture
def no_collector():
    """The garbage collector is off: what goes, goes because nothing refers to it any more."""
    gc.disable()
    yield
    gc.enable()


@for_all(CASES)
def test_memory_comes_back_without_the_collector(case, no_collector):
    """The result's array goes with the last name for it, whether the graph was used or not: there is no cycle."""
    leaves = [Tensor(device.xp.array(x), requires_grad=True) for x in case.inputs()]
    for use in (False, True):
        out = case.f(*leaves)
        array = weakref.ref(out.data)
        if use:
            out.backward(random_dout(out.shape))
        del out
        assert array() is None


def test_backward_frees_the_graph_though_the_loss_is_still_held(no_collector):
    x = tensor(2, 3)
    y = x * 2
    loss = (y * y).sum()
    array = weakref.ref(y.data)
    del y
    assert array() is not None
    loss.backward()
    assert array() is None and loss.data.size == 1


def test_an_array_that_no_backward_needs_goes_at_once(no_collector):
    """A sum's backward needs neither of its inputs: the graph does not hold them."""
    y = tensor(2, 3) * 2
    array = weakref.ref(y.data)
    loss = (y + 1).sum()
    del y
    assert array() is None
    loss.backward()


def peak_memory(f):
    """The most bytes that f() held at once beyond those held before: NumPy tells tracemalloc, CuPy's pool knows."""
    if device.on_gpu:
        pool = device.xp.cuda.MemoryPool()      # of its own: the other one may have room in gaps
        with device.xp.cuda.using_allocator(pool.malloc):
            f()
        return pool.total_bytes()
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_falls_during_backward():
    """A chain of products holds an array an op; going back needs a few more, not a second one an op."""
    n, length, size = 1 << 16, 40, 4 << 16

    def chain(backward):
        y = tensor(n, dtype=np.float32)
        for _ in range(length):
            y = y * 0.9
        if backward:
            y.backward(1.0)
    forward = peak_memory(lambda: chain(False))
    assert length * size < forward
    assert peak_memory(lambda: chain(True)) < forward + 6 * size


def test_no_grad_holds_no_graph():
    def run():
        with no_grad():
            y = tensor(1 << 16, dtype=np.float32)
            for _ in range(40):
                y = y * 0.9
    assert peak_memory(run) < 8 * (4 << 16)


def test_no_grad_losses_hold_no_gradient():
    N, V, C = 512, 2048, 256
    x, w, targets = tensor(N, C, dtype=np.float32), tensor(V, C, dtype=np.float32), some_ids(N, V)
    recorded = peak_memory(lambda: ag.linear_cross_entropy(x, w, targets))
    with no_grad():
        assert peak_memory(lambda: ag.linear_cross_entropy(x, w, targets)) < recorded - 0.9 * 4 * (N * C + V * C)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "and_backward"])
def test_attention_needs_memory_like_T_not_T_squared(backward, monkeypatch):
    monkeypatch.setattr(device, "BLOCK", 1 << 17)   # a GPU's, which is larger than all scores here
    def peak(T):
        def run():
            out = ag.attention(*(tensor(1, 1, T, 4, dtype=np.float32) for _ in range(3)))
            if backward:
                out.backward(1.0)
        return peak_memory(run)
    peak(64)                                        # what is made once is there from here on
    short, long = peak(1024), peak(4096)
    assert long < 5 * short                         # 4 times the length; T² would be 16 times the memory
    assert long < 4 * 4096 * 4096 / 2


def test_linear_cross_entropy_never_holds_all_logits():
    N, V, C = 2048, 1 << 15, 2

    def run():
        x, w = tensor(N, C, dtype=np.float32), tensor(V, C, dtype=np.float32)
        ag.linear_cross_entropy(x, w, some_ids(N, V)).backward()
        token_losses(x, w, some_ids(N, V), ranked=True)
    assert peak_memory(run) < 4 * N * V * 0.75


# ---------------------------------------------------------------- the check is checked

X, W = np.random.default_rng(6).standard_normal((2, 4, 4))


def linear_with(backward):
    """linear, and for its backward this function of (x, w, dout)."""
    def f(x, w):
        return ag.record(x.data @ w.data.T, (x, w), lambda dout: backward(x.data, w.data, dout))
    return f


def one_element(x, w, dout):
    dw = dout.T @ x
    dw[2, 1] *= 1.001
    return dout @ w, dw


PLANTED = {
    "zero_gradient": lambda x, w, dout: (dout @ w, 0 * w),
    "missing_factor": lambda x, w, dout: (dout @ w, dout.T @ (x / x)),
    "transposed_weight": lambda x, w, dout: (dout @ w.T, dout.T @ x),
    "off_by_0.1_percent": lambda x, w, dout: (dout @ w * 1.001, dout.T @ x),
    "wrong_sign": lambda x, w, dout: (dout @ w, -dout.T @ x),
    "missing_term": lambda x, w, dout: (dout[:, 1:] @ w[1:], dout.T @ x),
    "one_element_off_by_0.1_percent": one_element,
    "not_a_number": lambda x, w, dout: (dout @ w, dout.T @ x * np.nan),
}


def test_gradcheck_accepts_what_is_right():
    assert gradcheck(linear_with(lambda x, w, dout: (dout @ w, dout.T @ x)), X, W) is True


@pytest.mark.parametrize("backward", PLANTED.values(), ids=PLANTED)
def test_gradcheck_rejects(backward):
    with pytest.raises(AssertionError, match="backward says"):
        gradcheck(linear_with(backward), X, W)


def test_gradcheck_rejects_a_softmax_whose_gradient_is_zero():
    """The bug that a dout of ones cannot see: the rows sum to 1, so that 0 is compared with 0."""
    def softmax(x):
        return ag.record(ag.softmax(x).data, (x,), lambda dout: (0 * dout,))
    with pytest.raises(AssertionError):
        gradcheck(softmax, X)
    assert gradcheck(lambda x: softmax(x).sum(), X)


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (-1, -1)])
def test_gradcheck_rejects_a_gradient_that_is_nan_at_any_place(place):
    def nan(x, w, dout):
        dx = dout @ w
        dx[place] = np.nan
        return dx, dout.T @ x
    with pytest.raises(AssertionError, match="backward says nan"):
        gradcheck(linear_with(nan), X, W)


def test_whole_numbers_times_a_fraction_are_no_whole_numbers():
    whole = Tensor([1, 2, 3])
    assert (whole * 0.5).data.tolist() == [0.5, 1.0, 1.5] and whole.mean().data.item() == 2
    assert (whole * 2).dtype == whole.dtype and (Tensor(np.float32([1])) * 0.5).dtype == np.float32


def test_gradcheck_rejects_an_input_that_is_never_reached():
    with pytest.raises(AssertionError, match=r"input 1, element \(\d, \d\): backward says 0, "):
        gradcheck(lambda x, w: ag.linear(x, Tensor(w.data)), X, W)


def test_gradcheck_names_the_worst_element_with_both_values():
    def two_wrong(x, w, dout):
        dx, dw = dout @ w, dout.T @ x
        dx[0, 3] *= 1.01
        dw[3, 2] *= -1
        return dx, dw
    with pytest.raises(AssertionError) as error:
        gradcheck(linear_with(two_wrong), X, W)
    message = re.fullmatch(r"input 1, element \(3, 2\): backward says (\S+), finite differences (\S+)",
                           str(error.value))
    says, truth = map(float, message.groups())
    assert says == pytest.approx(-truth, rel=1e-6) and abs(truth) > 0.01


def test_gradcheck_leaves_its_inputs_alone_and_takes_any_floats():
    x = X.astype(np.float32)
    assert gradcheck(lambda x: x * x, x) and (x == X.astype(np.float32)).all()
    assert gradcheck(lambda x: x * x, [1.0, 2.0]) and gradcheck(lambda x: x * x, 3.0)


def test_gradcheck_allows_for_the_size_of_the_numbers():
    """Finite differences round: in proportion to a large gradient, and by a small amount where it is 0."""
    assert gradcheck(lambda x: x ** 3, 1e4 * X) and gradcheck(lambda x: (x - x) * 1e3 + x[:1].sum() * 0, X)


def test_rmsnorm_of_no_rows_has_a_gradient():
    x, w = ag.Tensor(np.zeros((0, 4)), requires_grad=True), ag.Tensor(np.ones(4), requires_grad=True)
    ag.rmsnorm(x, w).backward(device.xp.zeros((0, 4)))
    assert x.grad.shape == (0, 4) and w.grad.shape == (4,) and not device.to_host(w.grad).any()
