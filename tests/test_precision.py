"""Half precision, dropout and recomputation: what they may change, and what they must not."""
import math
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from tiny import rows

import autograd
import train
from autograd import Tensor, attention, dropout, embedding, gradcheck, linear, linear_cross_entropy, no_grad, recompute
from hardware import device
from hardware.device import to_host
from nanollm import Config, NanoLLM

pytestmark = pytest.mark.usefixtures("cheap")
UNIT = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}       # unit roundoff
CONFIG = Config(vocab_size=50, embedding_dim=32, n_block=3, n_head=4, n_kv_head=2, hidden_dim=40, max_context=20)


@pytest.fixture(params=UNIT)
def half(request):
    return np.dtype(request.param)


def model_and_batch(rng, dtype="float32"):
    model = NanoLLM(CONFIG, seed=1)
    model.compute_dtype = np.dtype(dtype)
    model.weights.flat[:model.weights.n_matrix] *= 4            # trained weights are larger than fresh ones
    ids = rng.integers(0, 50, (3, 21))
    return model, (ids[:, :-1], ids[:, 1:])


def relative(a, b):
    return np.linalg.norm(to_host(a).astype(np.float64) - to_host(b)) / np.linalg.norm(to_host(b))


# ---------------------------------------------------------------- half precision

def test_the_weights_are_rounded_once_a_pass_and_follow_what_changes_them(rng, half, monkeypatch):
    """A pass rounds all matrices at once, a token that continues a cached text none; float32 has no copy."""
    model, (x, y) = model_and_batch(rng, half)
    rounded, cast = [], device.cast
    monkeypatch.setattr(device, "cast", lambda flat, out: rounded.append(out.size) or cast(flat, out))
    first = model.loss(x, y).data
    assert rounded == [model.weights.n_matrix]
    assert model.lm_head.half.dtype == half and model.norm.half is None
    model.weights.flat *= 2
    other = model.loss(x, y).data
    expected, _ = model_and_batch(rng, half)
    expected.weights.flat *= 2
    assert to_host(other) == to_host(expected.loss(x, y).data) != to_host(first)
    rounded.clear()
    list(model.generate([1, 2], 5))
    assert rounded == [model.weights.n_matrix]
    model.compute_dtype = np.dtype("float32")
    model.loss(x, y)
    assert model.lm_head.half is None


def test_an_embedding_gives_rounded_rows_and_sums_its_gradient_in_float32(rng, half):
    w = Tensor(device.xp.asarray(rng.standard_normal((3, 4)), np.float32), requires_grad=True)
    w.half = w.data.astype(half)
    out = embedding(w, [2] * 3000 + [0])
    assert out.dtype == half and (to_host(out.data)[[0, -1]] == to_host(w.half)[[2, 0]]).all()
    out.backward(np.ones(out.shape))
    assert w.grad.dtype == np.float32 and to_host(w.grad)[:, 0].tolist() == [1, 0, 3000]    # half stops at 256 or 2048


def test_a_power_keeps_the_type_of_its_base(half):
    x = Tensor(device.xp.asarray(np.array([4.0, 16.0], half)), requires_grad=True)
    root = x ** 0.5
    root.sum().backward()
    assert root.dtype == x.grad.dtype == half
    assert (root.data.tolist(), x.grad.tolist()) == ([2.0, 4.0], [0.25, 0.125])


@pytest.mark.parametrize("op, shapes", [(op, shapes) for op, *shapes in [
    (autograd.softmax, (2, 3, 7)), (autograd.rmsnorm, (4, 9), (9,)), (linear, (2, 5, 8), (7, 8)),
    (lambda x: autograd.glu(x, activation="gelu"), (5, 12)),
    (autograd.attention, (2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
    (lambda x: x.sum(axis=1), (4, 3)), (lambda x, b: x * b, (4, 3), (1, 3)),
    (lambda z: autograd.cross_entropy(z, np.arange(4)), (4, 9)),
    (lambda x, w: linear_cross_entropy(x, w, np.arange(4)), (4, 8), (9, 8)),
]], ids="softmax rmsnorm linear glu attention sum mul cross_entropy linear_cross_entropy".split())
def test_an_op_in_half_is_the_op_in_double_but_for_rounding(rng, half, op, shapes):
    """Inputs of half precision, exact in double: what differs was rounded on the way. Weights stay float32."""
    arrays = [rng.standard_normal(shape).astype(half) for shape in shapes]

    def run(dtype, weights):
        leaves = [Tensor(device.xp.asarray(x.astype(weights if i and x.ndim <= 2 else dtype)), requires_grad=True)
                  for i, x in enumerate(arrays)]
        if op.__name__ == "<lambda>" and len(shapes) == 2 and shapes[1] == (1, 3):
            leaves[1] = Tensor(leaves[1].data.astype(dtype), requires_grad=True)
        out = op(*leaves)
        out.backward(device.xp.asarray(np.random.default_rng(1).standard_normal(out.shape).astype(out.dtype)))
        return out.data, *(leaf.grad for leaf in leaves)
    for got, true in zip(run(half, np.float32), run(np.float64, np.float64), strict=True):
        assert relative(got, true) < 4 * UNIT[half.name]


def test_the_gradient_in_half_is_that_of_float32_but_for_rounding(rng, half):
    model, batch = model_and_batch(rng)
    expected = model.loss(*batch)
    expected.backward()
    narrow, _ = model_and_batch(rng, half)
    loss = narrow.loss(*batch)
    loss.backward(2.0 ** 12)
    assert loss.dtype == narrow.weights.flat.dtype == narrow.weights.grad.dtype == np.float32
    assert abs(float(loss.data) / float(expected.data) - 1) < UNIT[half.name]
    assert 0 < relative(narrow.weights.grad / 2 ** 12, model.weights.grad) < 8 * UNIT[half.name]


def test_what_half_cannot_hold_on_the_way_is_float32(half):
    """Sums over 5,000 elements stop growing in half; the square of 300 is beyond float16."""
    def value(op, *arrays):
        return to_host(op(*(Tensor(device.xp.asarray(a)) for a in arrays)).data).astype(np.float64)
    zeros = np.zeros((1, 5000), half)
    assert value(autograd.softmax, zeros).sum() == pytest.approx(1, rel=UNIT[half.name])
    assert value(lambda z: autograd.cross_entropy(z, [7]), zeros) == pytest.approx(math.log(5000), rel=1e-6)
    large = np.full((1, 5000), 300, half)
    np.testing.assert_allclose(value(autograd.rmsnorm, large, np.ones(5000, np.float32)), 1, rtol=UNIT[half.name])
    assert value(lambda x: x.sum(axis=1) * 0.01, np.ones((1, 5000), half)) == pytest.approx(50, rel=2 * UNIT[half.name])
    slopes = Tensor(device.xp.asarray(np.full((1, 2), -9, half)), requires_grad=True)
    autograd.glu(slopes).sum().backward()           # 1 + x (1 - σ) in half would have three digits
    true = Tensor(device.xp.asarray(np.full((1, 2), -9.0)), requires_grad=True)
    autograd.glu(true).sum().backward()
    np.testing.assert_allclose(to_host(slopes.grad).astype(np.float64), to_host(true.grad), rtol=2 * UNIT[half.name])


def test_gradient_of_cast(half):
    x = Tensor(device.xp.asarray(np.arange(4, dtype=np.float32)), requires_grad=True)
    assert autograd.cast(x, np.float32) is x
    (autograd.cast(x, half) * 3).sum().backward()
    assert x.grad.dtype == np.float32 and (to_host(x.grad) == 3).all()


def test_activations_are_half(rng, half):
    model, (x, _) = model_and_batch(rng, half)
    assert model.hidden(x).dtype == half and model(x).dtype == half
    with no_grad():
        exact = NanoLLM(CONFIG, seed=1)
        exact.weights.flat[...] = model.weights.flat
        assert 0 < relative(model(x).data, exact(x).data) < 8 * UNIT[half.name]


def test_a_product_in_half_is_rounded_once(rng, half):
    """As a GPU multiplies: 4,096 ones sum up to 4,096, which is far beyond where a sum kept in half stops growing."""
    one = device.xp.ones((2, 4096), half)
    assert (to_host(device.matmul(one, one.T)) == 4096).all()
    a, b = (rng.standard_normal(shape).astype(half) for shape in ((40, 300), (300, 30)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    a, b = device.xp.asarray(a), device.xp.asarray(b)
    out = device.matmul(a, b)
    assert out.dtype == half
    np.testing.assert_allclose(to_host(out).astype(np.float64), exact, rtol=UNIT[half.name], atol=1e-5)
    np.testing.assert_allclose(to_host(device.matmul(a, b, dtype=np.float32)), exact, rtol=1e-4, atol=1e-5)
    sums = device.xp.ones((40, 30), np.float32)
    np.testing.assert_allclose(to_host(device.matmul(a, b, sums, accumulate=True)), exact + 1, rtol=1e-4, atol=1e-5)


def test_small_gradients_of_many_tokens_do_not_become_0(rng):
    """With 500,000 tokens in the vocabulary nearly all of p - onehot is smaller than what a float16 holds in full."""
    x = Tensor(device.xp.asarray(rng.standard_normal((2, 2)).astype(np.float16)), requires_grad=True)
    w = Tensor(device.xp.asarray(0.3 * rng.standard_normal((500_000, 2)).astype(np.float32)), requires_grad=True)
    linear_cross_entropy(x, w, [0, 1]).backward(1024)
    got = to_host(w.grad)
    assert (got[2:] != 0).all()
    x32 = Tensor(x.data.astype(np.float32))
    w.grad = None
    linear_cross_entropy(x32, w, [0, 1]).backward(1024)
    assert relative(got[2:], w.grad[2:]) < 2 * UNIT["float16"]


def test_weights_below_halfs_reach_still_move(half):
    """An update of 1e-5 to a weight of 1 is lost in half, which is why the weights are float32."""
    w = Tensor(device.xp.ones((3, 4), np.float32), requires_grad=True)
    linear(Tensor(device.xp.ones((2, 4), half)), w).sum().backward()
    assert w.grad.dtype == np.float32
    before = float(w.data[0, 0])
    w.data -= 1e-5 * w.grad
    assert float(w.data[0, 0]) < before


def test_training_in_half_comes_to_the_same_loss(files, tmp_path):
    ends = {}
    for dtype in ("float32", *UNIT):
        tiny.run(*files, "--num-epochs", 3, "--batch-size", 8, "--dtype", dtype, "--artifact-dir", dtype)
        ends[dtype] = float(rows(tmp_path / dtype)[-1]["val_loss"])
    assert ends["float16"] != ends["float32"] != ends["bfloat16"]
    for dtype in UNIT:
        assert ends[dtype] == pytest.approx(ends["float32"], rel=0.01)


def test_an_overflow_halves_the_loss_scale_and_is_survived(files, tmp_path, monkeypatch, capsys):
    """Steps with a gradient beyond 65,504 are skipped: the weights stay as they are, and training continues."""
    backward, weights = Tensor.backward, []

    def steep(self, dout=None):
        backward(self, dout if dout is None or dout < 2.0 ** 14 else dout * 2.0 ** 40)
    monkeypatch.setattr(Tensor, "backward", steep)
    loss_and_norm = train.loss_and_norm

    def seen(model, *others):
        weights.append(to_host(model.weights.flat).copy())
        return loss_and_norm(model, *others)
    monkeypatch.setattr(train, "loss_and_norm", seen)
    tiny.run(*files, "--max-steps", 6, "--log-every", 1, "--dtype", "float16", "--artifact-dir", "run")
    table = rows(tmp_path / "run")
    assert [math.log2(float(row["loss_scale"])) for row in table] == [15, 14, 13, 13, 13, 13]
    assert [row["skipped"] for row in table] == list("123333")
    assert all((weights[i] == weights[0]).all() for i in range(4)) and (weights[4] != weights[3]).any()
    assert "loss scale 65536, halved" in capsys.readouterr().out


def test_the_loss_scale_grows_while_nothing_overflows():
    state = train.checkpoint.State(loss_scale=8.0)
    for _ in range(999):
        train.adapt_loss_scale(state, True)
    assert state.loss_scale == 8
    train.adapt_loss_scale(state, True)
    assert (state.loss_scale, state.scale_age) == (16, 0)
    for scale in (8, 4, 2, 1, 1):
        train.adapt_loss_scale(state, False)
        assert state.loss_scale == scale


def test_the_loss_scale_does_not_change_the_update(files, tmp_path, monkeypatch):
    """Clipping and Adam see the gradient itself, whatever the scale: a power of two changes no digit."""
    folders = []
    for exponent in (10, 12):
        monkeypatch.setattr(train, "adapt_loss_scale",
                            lambda state, finite, scale=2.0 ** exponent: setattr(state, "loss_scale", scale))
        folders.append(tmp_path / str(exponent))
        tiny.run(*files, "--max-steps", 8, "--dtype", "float16", "--clip-norm", 0.3, "--artifact-dir", folders[-1])
    a, b = (to_host(NanoLLM.load(folder).weights.flat) for folder in folders)
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("flags", [["--dtype", "float16"], ["--dtype", "bfloat16", "--recompute"],
                                   ["--dropout", "0.2", "--grad-accum", "2"]], ids=" ".join)
def test_a_resumed_run_continues_bit_for_bit(files, flags):
    tiny.run(*files, *flags, "--max-steps", 7, "--lr-schedule", "constant", "--artifact-dir", "whole")
    tiny.run(*files, *flags, "--max-steps", 4, "--lr-schedule", "constant", "--artifact-dir", "halves")
    train.main("--resume --max-steps 7 --artifact-dir halves".split())
    a, b = (to_host(NanoLLM.load(folder).weights.flat) for folder in ("whole", "halves"))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 if device.on_gpu else 0)    # see `embedding`
    states = [train.checkpoint.read_trainer(Path(folder, "checkpoint-7"))[0] for folder in ("whole", "halves")]
    assert states[0].loss_scale == states[1].loss_scale == (2.0 ** 16 if "float16" in flags else 1)
    assert states[0].scale_age == states[1].scale_age


# ---------------------------------------------------------------- dropout

def test_gradient_of_dropout(rng):
    assert gradcheck(lambda x: dropout(x, 0.4, (1, 2)), rng.standard_normal((5, 7)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_that_share_and_keeps_the_mean(p):
    n = 200_000
    out = to_host(dropout(Tensor(device.xp.ones(n, np.float32)), p, (3,)).data)
    assert set(np.unique(out).tolist()) == {0.0, float(np.float32(1 / (1 - p)))}
    assert abs((out == 0).mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("name, unit", [("float64", 2.0 ** -52), ("float32", 2.0 ** -23), *UNIT.items()])
def test_what_dropout_keeps_is_scaled_in_float32_or_more(rng, name, unit):
    """A half is rounded once, at the end; a double is not scaled by a number in single precision."""
    x = device.xp.asarray(rng.standard_normal(1000).astype(np.dtype(name)))
    out = dropout(Tensor(x), 0.3, (1,)).data
    kept, exact = to_host(out).astype(np.float64), to_host(x).astype(np.float64) / 0.7
    assert out.dtype == x.dtype
    assert (abs(kept - exact) <= 1.01 * unit * abs(exact))[kept != 0].all()


def test_the_random_numbers_are_squares():
    """Widynski's function in Python's own integers, which do not wrap around by themselves."""
    def squares(counter, key):
        def turn(x):
            return (x >> 32 | x << 32) % 2 ** 64
        x = y = counter * key % 2 ** 64
        z = (y + key) % 2 ** 64
        x = turn((x * x + y) % 2 ** 64)
        x = turn((x * x + z) % 2 ** 64)
        x = turn((x * x + y) % 2 ** 64)
        return (x * x + z) % 2 ** 64 >> 32
    start, key = (int(word) for word in np.random.SeedSequence((4, 2)).generate_state(2, np.uint64))
    for p in (0.3, 0.7):
        kept = to_host(dropout(Tensor(device.xp.ones((100, 5), np.float32)), p, (4, 2, 7)).data).ravel() != 0
        assert kept.tolist() == [squares((start + 35 + i) % 2 ** 64, key | 1) >= p * 2 ** 32 for i in range(500)]


def test_masks_are_independent_and_a_function_of_the_key():
    def kept(*key):
        return to_host(dropout(Tensor(device.xp.ones((300, 300), np.float32)), 0.5, key).data).ravel() > 0
    assert (kept(1, 2, 3) == kept(1, 2, 3)).all()
    first = kept(0, 0, 0)
    for other in (kept(1, 0, 0), kept(0, 1, 0), kept(0, 0, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / 300
    for shift in (1, 2, 300, 512):
        assert abs(np.corrcoef(first[shift:], first[:-shift])[0, 1]) < 5 / 300


def test_each_place_of_each_step_has_its_own_mask(files, monkeypatch):
    keys, drop = [], autograd.dropout
    monkeypatch.setattr("nanollm.dropout", lambda x, p, key: keys.append((key, p)) or drop(x, p, key) if p else x)
    tiny.run(*files, "--max-steps", 3, "--grad-accum", 2, "--dropout", 0.3, "--seed", 5, "--artifact-dir", "run")
    assert len(set(keys)) == len(keys) == 3 * 2 * (1 + 2 * 2) and {p for _, p in keys} == {0.3}
    assert {key[1] for key, _ in keys} == {5} and {key[2] for key, _ in keys} == {0, 2, 4, 6, 8, 10}


def test_nothing_is_dropped_in_evaluation(rng):
    model, batch = model_and_batch(rng)
    dropped = {float(model.loss(*batch, 0.5, (step,)).data) for step in range(3)}
    with no_grad():
        assert len(dropped) == 3 and float(model.loss(*batch).data) not in dropped


# ---------------------------------------------------------------- recomputation

@pytest.mark.parametrize("dtype", ["float32", *UNIT])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_recomputed_gradients_are_the_same_to_the_last_bit(rng, dtype, p):
    model, batch = model_and_batch(rng, dtype)
    kept, again = [], []
    for results in (kept, again):
        model.recompute = results is again
        for step in range(2):                   # the second adds to the first one's
            loss = model.loss(*batch, p, (step,))
            loss.backward(64)
            if device.on_gpu:                   # which adds up the embedding's gradient in no fixed order
                model.embed.grad[...] = 0
            results += [to_host(loss.data), to_host(model.weights.grad).copy()]
        model.weights.grad[...] = 0
    assert all((a == b).all() for a, b in zip(kept, again, strict=True))


def test_recompute_needs_less_memory(rng, monkeypatch):
    """Of six blocks, all except one keep only their input."""
    if device.on_gpu:
        pytest.skip("tracemalloc does not see a GPU's memory")
    config = Config(vocab_size=8, embedding_dim=16, n_block=6, n_head=2, hidden_dim=64, max_context=64)
    model, ids = NanoLLM(config), rng.integers(0, 8, (16, 65))

    def held(again):
        model.recompute = again
        tracemalloc.start()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        after_forward = tracemalloc.get_traced_memory()[0]
        loss.backward()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return after_forward, peak
    held(False)                         # what a first step makes once
    (forward, peak), (forward_again, peak_again) = held(False), held(True)
    assert forward_again < 0.25 * forward and peak_again < 0.5 * peak


def test_recompute_without_gradients_only_computes(rng):
    x = Tensor(device.xp.asarray(rng.standard_normal(3)))
    with no_grad():
        assert not recompute(lambda x: x * 2, x).requires_grad
    w = Tensor(device.xp.ones(3), requires_grad=True)
    recompute(lambda x: x * w, x).sum().backward()      # x needs no gradient, but w does
    np.testing.assert_array_equal(to_host(w.grad), to_host(x.data))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_sums_over_blocks_of_queries_in_float32(dtype):
    """Two blocks that each add less than half a last digit to dv of the first key: together they add one."""
    digit = float(ml_dtypes.finfo(dtype).eps)
    q, k, v = (Tensor(device.xp.zeros((1, 1, 512, 1), dtype), requires_grad=True) for _ in range(3))
    dout = device.xp.zeros((1, 1, 512, 1), dtype)
    for t, part in ((511, 1), (255, 0.45 * digit), (127, 0.45 * digit)):
        dout[0, 0, t] = (t + 1) * part          # all scores are equal: p = 1 / (t + 1)
    attention(q, k, v).backward(dout)
    assert float(v.grad[0, 0, 0, 0]) == 1 + digit
