"""The GPU's path through nanollm: everything equals NumPy. Collected where NANOLLM_DEVICE=gpu: on a card, or emulated:

    python tests/tools/emulated_gpu/emulator.py -m pytest tests

which also runs all the other tests there. A product handed to cuBLAS the wrong way round fails, and so does whatever
CuPy refuses.
"""

import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import same_device
from test_autograd import CASES, case, for_all
from test_ranks import a_step, together
from tokenizers import Tokenizer, decoders, models

import autograd as ag
import evaluate
import generate
import nanollm
import train
from autograd import Tensor
from hardware import device, formulas, nccl, random_bits
from images import network
from images.network import ConvNet
from nanollm import Config
from storage.checkpoint import read_trainer

emulated = pytest.mark.skipif("emulated" not in device.reason, reason="needs the emulated device")
ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}


def on_both(work, tolerance):
    """The arrays that work() returns must be the same on NumPy and on the GPU."""
    results = work()
    assert all(isinstance(a, device.xp.ndarray) for a in results), "an array is not on the device"
    got = [device.to_host(a) for a in results]
    with same_device():
        device.use("cpu")
        expected = [device.to_host(a) for a in work()]
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        least = max(tolerance, 1e-6 if a.dtype == np.float32 else 0)
        np.testing.assert_allclose(a, b, rtol=least, atol=least * abs(b).max(initial=1), err_msg=number)


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
            adam.step(scale=1 / train.loss_and_norm(model, loss.data)[1])
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
    with same_device():
        device.use("cpu")
        on_cpu = nanollm.NanoLLM(config, seed=3)
        on_cpu.save(tmp_path / "cpu")
    model = nanollm.NanoLLM.load(tmp_path / "cpu")
    assert isinstance(model.weights.flat, device.xp.ndarray)
    np.testing.assert_array_equal(model.weights.flat.get(), on_cpu.weights.flat)
    model.save(tmp_path / "gpu")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "gpu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()


@pytest.mark.parametrize("tf32, dtype, compute", [          # compute: a cublasComputeType
    (False, "float32", 68), (True, "float32", 77), (True, "float16", 68), (True, "float64", 70)])
def test_tf32_is_for_float32_products_alone(tf32, dtype, compute, monkeypatch):
    from cupy_backends.cuda.libs import cublas
    asked, gemm = [], cublas.gemmEx
    monkeypatch.setattr(cublas, "gemmEx", lambda *args: asked.append(args[-2]) or gemm(*args))
    monkeypatch.setattr(device, "tf32_products", not tf32)
    device.use(tf32=tf32)
    a = device.xp.ones((2, 3), dtype)
    device.matmul(a, a.T)
    assert asked == [compute]


def test_the_rows_of_logits_begin_where_tensor_cores_read_fast(monkeypatch):
    """Also where the size of the vocabulary is no multiple of anything, in the logits and in their half copy."""
    from cupy_backends.cuda.libs import cublas
    asked, gemm = [], cublas.gemmEx
    monkeypatch.setattr(cublas, "gemmEx", lambda *args: asked.append(args) or gemm(*args))
    x, w = (Tensor(device.xp.ones((n, 64), dtype), True) for n, dtype in ((8, "bfloat16"), (101, "float32")))
    ag.linear_cross_entropy(x, w, np.arange(8))
    assert len(asked) == 3 and {args[place] for args in asked for place in (9, 12, 16)} == {64, 128}   # from row to row
    assert device.rows_at_once(30522, 0, 64) == 512         # 62 MB


def test_wrong_token_ids_are_caught_on_the_host(config):
    """On the device they would wrap around in silence."""
    model = nanollm.NanoLLM(config)
    for ids in ([[0, config.vocab_size]], [[-1, 0]]):
        with pytest.raises(IndexError, match="token id"):
            model(np.array(ids))
        with pytest.raises(IndexError, match="token id"):
            model.loss(np.array([[0, 1]]), np.array(ids))


def test_token_ids_on_the_device_are_not_looked_at_again(monkeypatch):
    """That would stop the GPU."""
    ids, w = device.xp.asarray(np.array([2, 4, 2])), Tensor(device.xp.zeros((5, 2)), requires_grad=True)
    monkeypatch.setattr(device, "to_host", None)
    out = ag.embedding(w, ids)
    assert device.as_ids(ids, 5) is ids
    assert isinstance(device.as_ids(np.array([4]), 5), device.xp.ndarray)      # CuPy would copy an index each time
    out.sum().backward()
    assert w.grad.tolist() == [[0, 0], [0, 0], [2, 2], [0, 0], [1, 1]]


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
    train.main(["--resume", "--max-steps", "6", "--artifact-dir", halves, "--device", "gpu"])
    seen = {}
    for folder, name in (whole, "cpu"), (halves, "gpu"):
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


@emulated
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_waits_for_the_gpu_only_to_report(files, cheap, monkeypatch, dtype):
    """For all losses and norms since the last report in one transfer. float16's next loss scale waits for each."""
    import emulated_runtime
    notes, step, waits = [], train.Adam.step, []

    def counted(self, *args):
        waits.append([kind for kind, _ in notes].count("sync"))
        step(self, *args)
    monkeypatch.setattr(train.Adam, "step", counted)
    emulated_runtime.start(notes)
    tiny.run(*files, "--max-steps", 9, "--log-every", 3, "--save-every", 9, "--grad-accum", 2, "--dtype", dtype,
             "--artifact-dir", "run")
    emulated_runtime.stop()
    assert np.diff(waits)[1:].tolist() == ([1] * 7 if dtype == "float16" else [0, 1, 0, 0, 1, 0, 0])


@emulated
@pytest.mark.parametrize("flags", [("float32", "4"), ("float32", "16"), ("bfloat16", "4"), ("bfloat16", "16")])
def test_the_memory_pool_reserves_what_is_planned(flags):
    out = subprocess.run([sys.executable, ROOT / "tests/tools/emulated_gpu/count.py", *flags], capture_output=True,
                         text=True, timeout=300, check=True).stdout
    reserved, planned = (float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) MB", out))
    assert planned == pytest.approx(reserved, rel=0.05)


def test_losses_that_are_read_late_are_reported_as_if_at_once(files, cheap, monkeypatch, capsys):
    """The numbers of skipped steps, the means, Adam's count: the same whether each step is waited for or not; also in
    the checkpoints of a step that nothing else is due at, and of one that a signal made the last.
    """
    loss_and_norm, seen = train.loss_and_norm, []

    def poisoned(model, *others):
        count[0] += 1
        if count[0] in (2, 3, 6):
            model.weights.grad[5] = math.nan
        if count[0] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_and_norm(model, *others)
    monkeypatch.setattr(train, "loss_and_norm", poisoned)
    for folder in "late", "at-once":
        count = [0]
        tiny.run(*files, "--max-steps", 9, "--log-every", 4, "--save-every", 6, "--artifact-dir", folder)
        states = [dataclasses.replace(read_trainer(Path(folder, f"checkpoint-{step}"))[0], seconds=0)
                  for step in (6, 7)]
        shown = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
        seen.append([shown, tiny.rows(Path(folder), tiny.TIMINGS), states,
                     device.to_host(nanollm.NanoLLM.load(Path(folder, "checkpoint-7")).weights.flat).tolist()])
        monkeypatch.setattr(train.Observer, "reads", lambda *_: True)
    assert seen[0] == seen[1] and len(seen[0][0]) == 3


def test_each_formula_is_one_kernel_and_none_is_double(rng):
    """CuPy's older fusion makes one of each. Its newer one, to which it turns in silence, keeps most of a card idle."""
    ids = rng.integers(0, 23, (2, 13))
    for activation in ag.ACTIVATIONS:
        for dtype in "float32", "float16", "bfloat16":
            model = nanollm.NanoLLM(dataclasses.replace(CONFIGS["plain"], activation=activation))
            model.compute_dtype = np.dtype(dtype)
            model.loss(ids[:, :-1], ids[:, 1:], 0.1, (1, 2)).backward()
            train.Adam(model).step()
            assert np.isfinite(device.floats(*train.loss_and_norm(model, 0.0))).all()
    evaluate.ranks_of(device.xp.ones((2, 23), "float32"), device.xp.zeros(2, int))
    modules = ag, device, formulas, random_bits, train
    for formula in {f for module in modules for f in vars(module).values() if hasattr(f, "kernels")}:
        fusion = formula.kernels[device.xp]
        assert fusion.new_fusion is None, formula.formula
        for types, (kernel, _) in fusion._memo.items():
            assert "d" in types or "double" not in getattr(kernel, "operation", ""), formula.formula


# ---------------------------------------------------------------- GPUs

class Cards:
    """Stands for NCCL, on memory of this process: all ranks are threads, and every call is noted."""
    available, NCCL_FLOAT32, NCCL_SUM = True, 7, 0

    def __init__(self, size):
        self.barrier, self.calls, self.at = threading.Barrier(size, timeout=30), [], {}

    def get_unique_id(self):
        return b"key"

    def NcclCommunicator(self, size, key, rank):
        assert key == b"key"
        call = functools.partial(functools.partial, self.call, rank)
        return SimpleNamespace(**{name: call(name) for name in ("allReduce", "bcast", "reduceScatter", "allGather")})

    def call(self, rank, name, *args):
        read = lambda address, n: np.ctypeslib.as_array((ctypes.c_float * n).from_address(address))
        self.at[rank], size = args, self.barrier.parties
        self.calls.append((name, rank, *args))
        self.barrier.wait()
        if name == "bcast":
            pointer, n, *_ = args
            result = read(self.at[0][0], n).copy()
        elif name == "allReduce":
            _, pointer, n, *_ = args
            result = sum(read(self.at[other][0], n).copy() for other in range(size))
        elif name == "reduceScatter":
            _, pointer, n, *_ = args
            result = sum(read(self.at[other][0] + 4 * n * rank, n).copy() for other in range(size))
        else:
            _, pointer, n, *_ = args
            result, n = np.concatenate([read(self.at[other][0], n) for other in range(size)]), n * size
        self.barrier.wait()
        read(pointer, n)[:] = result
        self.barrier.wait()


@emulated
@pytest.mark.parametrize("size", [2, 3])
def test_gpus_send_each_other_the_arrays_by_nccl(size, monkeypatch):
    cards = Cards(size)
    monkeypatch.setattr(device.xp.cuda, "nccl", cards, raising=False)
    results = together(size, a_step, nccl.Nccl)
    total = size * (size + 1) / 2
    for summed, flat, *_ in results:
        assert summed == 10 * size * (size - 1) / 2
        np.testing.assert_array_equal(flat, np.arange(17) - total)
    part, stream = {2: 9, 3: 6}[size], cards.calls[0][-1]
    for rank in range(size):
        sent, value, summed, shared = [call for call in cards.calls if call[1] == rank]
        assert sent[0] == "bcast" and sent[3:] == (part * size, 7, 0, stream)
        assert value[0] == "allReduce" and value[2] == value[3] and value[4:] == (1, 7, 0, stream)
        assert summed[0] == "reduceScatter" and summed[3] == summed[2] + 4 * part * rank
        assert summed[4:] == (part, 7, 0, stream)
        assert shared[0] == "allGather" and shared[2] == shared[3] + 4 * part * rank and shared[4:] == (part, 7, stream)
