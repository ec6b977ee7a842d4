"""The GPU's path through nanollm, on a machine without one: everything equals NumPy on the strict stand-in.

Whatever CuPy would refuse (see strict_cupy.py) fails here, and so does a product handed to cuBLAS the wrong way
round. `NANOLLM_DEVICE=gpu python -m pytest tests` runs all the other tests on a real card.
"""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from conftest import reference
from tokenizers import Tokenizer, decoders, models

reference("cupy")

from strict_cupy import cp, strict_gpu, traced  # noqa: E402  (it needs CuPy)
from test_autograd import CASES, case, for_all  # noqa: E402

import autograd as ag  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import nanollm  # noqa: E402
import train  # noqa: E402
from autograd import Tensor  # noqa: E402
from hardware import device  # noqa: E402
from images import network  # noqa: E402
from images.network import ConvNet  # noqa: E402
from nanollm import Config  # noqa: E402

TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}


def on_both(work, tolerance):
    """The arrays that work() returns must be the same on NumPy and on the stand-in."""
    before = device.xp
    device.use("cpu")
    expected = [device.to_host(a) for a in work()]
    with strict_gpu():
        results = work()
        assert all(isinstance(a, cp.ndarray) for a in results), "an array is not on the device"
        got = [device.to_host(a) for a in results]
    device.use("cpu" if before is np else "gpu")
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * abs(b).max(initial=1), err_msg=number)


OPS = [
    *CASES,
    case("attention-blocks", ag.attention, None, (1, 2, 140, 4), (1, 1, 150, 4), (1, 1, 150, 4)),
    case("matmul-views", lambda a, b: a.transpose(0, 2, 1) @ b.transpose(0, 2, 1), None, (2, 4, 3), (2, 5, 4)),
    case("getitem-twice", lambda x: x[1:, ..., ::2] * x[0, :, 1:3], None, (3, 2, 4)),
    case("rmsnorm_plain", ag.rmsnorm_plain, None, (2, 3, 5), (5,)),
    case("attention_plain", ag.attention_plain, None, (2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
    case("cast", lambda x: ag.cast(x, np.float64) * 3, None, (2, 3)),
    case("dropout", lambda x: ag.dropout(x, 0.4, (1, 2)), None, (5, 3)),
    case("recompute", lambda x, w: ag.recompute(lambda h: ag.linear(h, w), x), None, (2, 5, 4), (3, 4)),
]


def test_every_op_of_the_engine_is_here():
    """A new op has to be added to OPS: each makes its result with `record`, or is made of ops that do."""
    covered = " ".join(case.name for case in OPS) + " tensor"
    public = {name for name, f in vars(ag).items() if callable(f) and getattr(f, "__module__", "") == "autograd"
              and "record" in getattr(getattr(f, "__code__", None), "co_names", ())}
    assert {name for name in public if name not in covered} == set()


@for_all(OPS)
def test_op_equals_numpy(dtype, case):
    inputs = [x.astype(dtype) for x in case.inputs()]

    def work():
        leaves = [Tensor(x.copy(), requires_grad=True) for x in inputs]
        out = case.f(*leaves)
        cotangent = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
        out.backward(device.xp.asarray(cotangent))
        return [out.data, *(leaf.grad for leaf in leaves)]
    on_both(work, TOLERANCE[dtype])


def test_gradcheck_runs_on_the_device(rng):
    with strict_gpu():
        assert ag.gradcheck(ag.rmsnorm, rng.standard_normal((2, 3)), rng.standard_normal(3))
        with pytest.raises(AssertionError, match="finite differences"):
            ag.gradcheck(lambda x: Tensor(x.data) * x, rng.standard_normal(3))


def test_matmul_of_any_layout(rng):
    """Broadcast, transposed and sliced operands, sizes of 1, in both precisions and into a slice of `out`."""
    a, b = rng.standard_normal((4, 3, 7)), rng.standard_normal((4, 7, 5))
    w = rng.standard_normal((1, 7)).astype(np.float32)

    def work():
        x, y, v = (device.xp.asarray(h) for h in (a, b, w))
        out = device.xp.ones((4, 3, 8))
        device.matmul(x, y, out=out[..., 2:7])
        device.matmul(x[:, ::-1], y, out=out[..., 2:7], accumulate=True)
        return [out, device.matmul(x, device.xp.broadcast_to(y[0], y.shape)), device.matmul(x[1:2], y[:1]),
                device.matmul(y.swapaxes(1, 2)[:, 1:], x.swapaxes(1, 2)), device.matmul(x[:, :, :1], y[:, :1]),
                device.matmul(v, v.T), device.matmul(v.T, v), device.matmul(x[:, :0], y),
                device.matmul(x[..., :0], y[:, :0]), device.matmul(x[0], y[0, :, ::2])]
    on_both(work, 1e-12)


CONFIGS = {
    "plain": Config(vocab_size=23, embedding_dim=16, n_block=2, n_head=4, max_context=12, hidden_dim=24),
    "grouped and tied": Config(vocab_size=23, embedding_dim=16, n_block=2, n_head=4, n_kv_head=2,
                               max_context=12, hidden_dim=24, tie_embeddings=True, activation="gelu"),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


def test_logits_loss_and_gradients_equal_numpy(rng, config):
    ids = rng.integers(0, config.vocab_size, (3, 13))

    def work():
        model = nanollm.NanoLLM(config, seed=3)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return [model.weights.flat, model(ids[:, :-1]).data, loss.data, model.weights.grad]
    on_both(work, 1e-5)


def test_training_steps_equal_numpy(rng, config):
    batches = rng.integers(0, config.vocab_size, (3, 2, 13))

    def work():
        model = nanollm.NanoLLM(config, seed=3)
        adam = train.Adam(model, lr=1e-2, weight_decay=0.1)
        losses = []
        for ids in batches:
            adam.zero_grad()
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            adam.step(scale=1 / train.gradient_norm(model))
            losses.append(loss.data)
        return [*losses, model.weights.flat, adam.m, adam.v]
    on_both(work, 1e-4)


def test_steps_on_pictures_equal_numpy(rng):
    pixels, labels = rng.integers(0, 256, (3, 4, 16, 16, 3), np.uint8), rng.integers(0, 3, (3, 4))

    def work():
        model = ConvNet(network.Config(("a", "b", "c"), 16, (3, 4, 5, 6)))
        adam = train.Adam(model, lr=1e-2, weight_decay=0.1)
        for x, y in zip(pixels, labels, strict=True):
            adam.zero_grad()
            model.loss(x, y, 0.5, (1, 2)).backward()
            adam.step()
        return [model(pixels[0]).data, model.weights.flat, model.weights.grad]
    on_both(work, 1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_numpy(config, use_cache):
    """Past the end of the context too, where the oldest half is dropped."""
    def work():
        model = nanollm.NanoLLM(config, seed=3)
        model.weights.flat *= 20    # away from the even guess
        batch = [[3, 1, 4], [1, 5, 9]]
        greedy = list(model.generate([3, 1, 4], 20, temperature=0, use_cache=use_cache))
        sampled = np.array(list(model.generate(batch, 20, top_k=9, top_p=0.9, seed=5, use_cache=use_cache)))
        return [device.xp.asarray(a) for a in (greedy, sampled)]
    on_both(work, 0)


def test_a_model_saved_on_one_device_loads_on_the_other(tmp_path, config):
    on_cpu = nanollm.NanoLLM(config, seed=3)
    expected = device.to_host(on_cpu.weights.flat)
    on_cpu.save(tmp_path / "cpu")
    with strict_gpu():
        model = nanollm.NanoLLM.load(tmp_path / "cpu")
        assert isinstance(model.weights.flat, cp.ndarray)
        np.testing.assert_array_equal(model.weights.flat.get(), expected)
        model.save(tmp_path / "gpu")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "gpu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()


@pytest.mark.parametrize("tf32, dtype, compute", [          # compute: a cublasComputeType
    (False, "float32", 68), (True, "float32", 77), (True, "float16", 68), (True, "float64", 70)])
def test_tf32_is_for_float32_products_alone(tf32, dtype, compute, monkeypatch):
    with strict_gpu():
        from cupy_backends.cuda.libs import cublas
        asked, gemm = [], cublas.gemmEx
        monkeypatch.setattr(cublas, "gemmEx", lambda *args: asked.append(args[-2]) or gemm(*args))
        monkeypatch.setattr(device, "tf32_products", not tf32)
        device.use(tf32=tf32)
        a = device.xp.ones((2, 3), dtype)
        device.matmul(a, a.T)
        assert asked == [compute]


def test_wrong_token_ids_are_caught_on_the_host(config):
    """On the device they would wrap around in silence."""
    with strict_gpu():
        model = nanollm.NanoLLM(config)
        for ids in ([[0, config.vocab_size]], [[-1, 0]]):
            with pytest.raises(IndexError, match="token id"):
                model(np.array(ids))
            with pytest.raises(IndexError, match="token id"):
                model.loss(np.array([[0, 1]]), np.array(ids))


@pytest.fixture
def text_and_tokenizer(tmp_path, rng):
    """A text of made-up words, and a tokenizer that knows its letters."""
    words = ["".join(rng.choice(list("abcdefgh"), n)) for n in (2, 3, 4, 5, 6)]
    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    text.write_text(" ".join(rng.choice(words, 600)))
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh ")}, []))
    letters.decoder = decoders.Fuse()
    letters.save(str(tokenizer))
    return text, tokenizer


def test_programs_on_one_device_and_then_the_other(tmp_path, text_and_tokenizer, capsys):
    """Train half the way on NumPy, the rest on the device: as all of it on NumPy. Then evaluate and generate."""
    text, tokenizer = text_and_tokenizer
    size = "--embedding-dim 16 --n-block 1 --n-head 2 --max-context 16 --hidden-dim 24 --learning-rate 0.01"
    first = ["--text", str(text), "--tokenizer", str(tokenizer), *size.split(), "--lr-schedule", "constant",
             "--warmup-steps", "0", "--weight-decay", "0.1", "--grad-accum", "2", "--sample-every", "5"]
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    train.main([*first, "--max-steps", "6", "--artifact-dir", whole, "--device", "cpu"])
    train.main([*first, "--max-steps", "3", "--artifact-dir", halves, "--device", "cpu"])
    with strict_gpu():
        train.main(["--resume", "--max-steps", "6", "--artifact-dir", halves, "--device", "gpu"])
    seen = {}
    for folder, name in (whole, "cpu"), (halves, "gpu"):
        with strict_gpu() if name == "gpu" else contextlib.nullcontext():
            capsys.readouterr()
            evaluate.main([folder, "--text", str(text), "--json", "--device", name])
            seen[name] = json.loads(capsys.readouterr().out)
            generate.main([folder, "--prompt", "a", "--temperature", "0", "--max-new-tokens", "40", "--device", name])
            assert seen[name].pop("tokens_per_second") > 0
            seen[name]["text"] = capsys.readouterr().out
    assert len(seen["cpu"]["text"]) > 40
    assert seen["gpu"] == {key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                           for key, value in seen["cpu"].items()}
    got, expected = (nanollm.NanoLLM.load(folder).weights.flat for folder in (halves, whole))
    np.testing.assert_allclose(device.to_host(got), device.to_host(expected), atol=1e-4)


def test_fused_formulas_compile(rng):
    """CuPy's own compiler makes a kernel of each for Ampere and Hopper, which needs no card; nothing is double."""
    reference("nvidia.cuda_nvrtc")
    import cupy
    from cupy.cuda.compiler import _NVRTCProgram
    ids = rng.integers(0, 23, (2, 13))
    with strict_gpu():
        for activation in ag.ACTIVATIONS:
            for dtype in "float32", "float16", "bfloat16":
                model = nanollm.NanoLLM(dataclasses.replace(CONFIGS["plain"], activation=activation))
                model.compute_dtype = np.dtype(dtype)
                model.loss(ids[:, :-1], ids[:, 1:], 0.1, (1,)).backward()
                train.Adam(model).step()
    options = cupy._core.core.assemble_cupy_compiler_options(())
    options += "-ftz=true", "--device-as-default-execution-space"
    compiled = set()
    for (formula, kind), source in traced.items():
        if not any(dtype == np.float64 for cls, dtype, _ in kind if cls is cp.ndarray):
            for card in "sm_80", "sm_90":
                program = _NVRTCProgram(source, f"{formula.__name__}.cu", method="cubin")
                assert program.compile((*options, f"-arch={card}"))[0]
            assert "static_cast< double >" not in source, f"{formula.__name__} computes in float64"
            compiled.add(formula)
    modules = ag, nanollm, train
    assert compiled >= {f.formula for m in modules for f in vars(m).values() if hasattr(f, "formula")}
