"""Weights in 8 and 4 bits: how far off they may be, and that a model of them is the model."""
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import command, snapshot

import autograd
import evaluate
import generate
import train
from autograd import Tensor, no_grad
from extras import export_gguf, quantize
from hardware import device
from hardware.device import to_host
from hardware.quantized import GROUP, LEVELS, Quantized, packed_shapes
from hardware.quantized import quantize as to_integers
from nanollm import Config, NanoLLM
from storage import huggingface
from storage.files import InputError, lock


@pytest.fixture(params=LEVELS)
def bits(request):
    return request.param


def held(w, bits, name="model.layers."):
    """As extras.quantize has it: with 4 bits the embedding and the output layer have 8."""
    return Quantized(*to_integers(w, bits if name.startswith("model.layers.") else 8), w.shape[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose model has learned something, and its text."""
    folder = tmp_path_factory.mktemp("trained")
    files = tiny.make_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLLM_CACHE", str(folder / "cache"))
        tiny.make_cheap(patch)
        tiny.run(*files, "--num-epochs", 4, "--batch-size", 8, "--embedding-dim", 48, "--hidden-dim", 72,
                 "--artifact-dir", folder / "run")
    return folder / "run", files[1]


# ---------------------------------------------------------------- the matrices

@pytest.mark.parametrize("shape", [(5, 64), (3, 128), (4, 1), (1, 63), (2, 65), (7, 200)], ids=str)
def test_every_weight_is_off_by_half_a_step_at_most(rng, bits, shape):
    w = rng.standard_normal(shape).astype(np.float32) * np.float32(10.0) ** rng.integers(-3, 3, (shape[0], 1))
    w = w.astype(np.float32)
    got = to_host(held(w, bits)[:])
    group = shape[1] if bits == 8 else GROUP
    for start in range(0, shape[1], group):
        part = np.s_[:, start:start + group]
        step = abs(w[part]).max(1, keepdims=True) / -LEVELS[bits][0]
        other = np.sign(w[part]) != np.sign(np.take_along_axis(w[part], abs(w[part]).argmax(1)[:, None], 1))
        clipped = other & (abs(w[part]) > (LEVELS[bits][1] + 0.5) * step)       # only 4 bits have one level less there
        off = abs(got[part] - w[part]) / step
        assert (off <= np.where(clipped, 1, 0.5) * (1 + 1e-4)).all() and (bits == 4 or not clipped.any())
        at = abs(w[part]).argmax(1)[:, None]
        np.testing.assert_allclose(np.take_along_axis(got[part], at, 1), np.take_along_axis(w[part], at, 1), rtol=1e-6)
    assert (abs(got - w) > 0).any() or shape[1] == 1


def test_whole_steps_come_back_as_they_were(rng, bits):
    """Every level, the odd and the even column of a byte, both signs."""
    low, high = LEVELS[bits]
    w = rng.integers(low, high + 1, (6, 2 * GROUP)).astype(np.float32)
    w[:, ::GROUP] = low
    w[::2] *= -1
    np.testing.assert_array_equal(to_host(held(w, bits)[:]), w)
    assert set(w[1::2].ravel()) == set(range(low, high + 1)) or bits == 8


def test_zeros_stay_zeros(bits):
    w = np.zeros((3, 70), np.float32)
    w[1, 2] = 5
    np.testing.assert_array_equal(to_host(held(w, bits)[:]), w)


def test_stored_shapes(rng, bits):
    for shape in ((3, 64), (2, 65), (4, 1)):
        q, scale = to_integers(rng.standard_normal(shape).astype(np.float32), bits)
        assert (q.shape, scale.shape) == packed_shapes(shape, bits) and scale.dtype == np.float32
        assert q.dtype == (np.int8 if bits == 8 else np.uint8)
    assert packed_shapes((3, 128), 4) == ((3, 64), (3, 2))


def test_linear_embedding_and_loss_are_those_of_the_rounded_weights(rng, bits):
    w = rng.standard_normal((300, 70)).astype(np.float32)
    q, x = held(w, bits), Tensor(device.xp.asarray(rng.standard_normal((2, 3, 70)).astype(np.float32)))
    rounded = Tensor(q[:])
    ids = np.array([[0, 299, 5], [5, 1, 2]])
    for op in (lambda w: autograd.linear(x, w), lambda w: autograd.embedding(w, ids),
               lambda w: autograd.linear_cross_entropy(x, w, ids)):
        np.testing.assert_allclose(to_host(op(q).data), to_host(op(rounded).data), rtol=1e-5, atol=1e-5)


def test_a_product_never_holds_the_matrix_in_float32(rng, bits):
    if device.on_gpu:
        pytest.skip("on a GPU it is one matrix at a time")
    w = rng.standard_normal((16000, 256)).astype(np.float32)
    q, x = held(w, bits), Tensor(rng.standard_normal((1, 256)).astype(np.float32))
    tracemalloc.start()
    autograd.linear(x, q)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < w.nbytes / 10 * max(device.threads / 2, 1)


# ---------------------------------------------------------------- the model

def perplexity(folder, text):
    code, out, err = command(evaluate.main, folder, "--text", text, "--json", name="evaluate.py")
    assert code == 0, err
    return json.loads(out)["perplexity"]


@pytest.mark.parametrize("bits, share", [(8, 0.005), (4, 0.05)])
def test_perplexity_hardly_changes(trained, tmp_path, bits, share):
    folder, text = trained
    code, out, err = command(quantize.main, folder, tmp_path / "small", "--bits", bits, "--text", text, name="quantize")
    assert (code, err) == (0, "")
    before, after = perplexity(folder, text), perplexity(tmp_path / "small", text)
    assert before < 60 and after != before          # less than 290, the number of tokens: it has learned
    assert after == pytest.approx(before, rel=share)
    for value in (before, after):
        assert f"perplexity {value:,.4f}," in out
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "small")]
    assert all(f"{size / 1e6:10,.2f} MB on disk" in out for size in sizes)
    assert sizes[1] < sizes[0] * {8: 0.45, 4: 0.35}[bits]       # the header is a large part of so small a file
    code, out, err = command(generate.main, tmp_path / "small", "--prompt", "the", "--temperature", 0,
                             "--max-new-tokens", 12, name="generate.py")
    assert code == 0 and len(out) > 10


def test_a_quantised_model_is_the_model_with_rounded_weights(trained, tmp_path, bits, rng):
    folder, _ = trained
    assert command(quantize.main, folder, tmp_path / "small", "--bits", bits)[0] == 0
    model, small = NanoLLM.load(folder), NanoLLM.load(tmp_path / "small")
    for name, tensor in model.parameters().items():
        if len(tensor.shape) == 2:
            tensor.data[...] = held(to_host(tensor.data), bits, name)[:]
    ids = rng.integers(0, 290, (2, 8))
    with no_grad():
        np.testing.assert_allclose(to_host(small(ids).data), to_host(model(ids).data), rtol=1e-4, atol=1e-4)
    assert model.trainable and not small.trainable


def test_its_parameters_are_listed_under_their_names_and_can_be_read(tmp_path, bits):
    """As of any model: shapes, data and a grad, which is None. What is read is the memory that the model uses."""
    model = tiny.lively(tiny.small(qkv_bias=True))
    model.save(tmp_path / "model")
    quantize.write(tmp_path / "small", tmp_path / "model", model, bits)
    small, read = NanoLLM.load(tmp_path / "small"), NanoLLM.load(tmp_path / "model", trainable=False).parameters()
    assert {name: w.shape for name, w in small.parameters().items()} == {name: w.shape for name, w in read.items()}
    for name, (data, grad) in small.parameters().items():
        w = to_host(read[name].data)
        np.testing.assert_array_equal(to_host(data[:]), to_host(held(w, bits, name)[:]) if w.ndim == 2 else w)
        assert grad is None and data[:].dtype == np.float32
    q = small.parameters()["model.layers.1.self_attn.k_proj.weight"].data.q
    q[...] = 0
    assert not to_host(small.blocks[1].qkv.data.q[small.config.n_head * small.config.head_dim:][:len(q)]).any()


@pytest.mark.parametrize("elsewhere", [True, False], ids=["elsewhere", "over itself"])
def test_a_quantised_model_is_saved_as_it_is(trained, tmp_path, bits, rng, elsewhere):
    assert command(quantize.main, trained[0], tmp_path / "small", "--bits", bits)[0] == 0
    small, before = NanoLLM.load(tmp_path / "small"), load_file(tmp_path / "small/model.safetensors")
    folder = tmp_path / ("other" if elsewhere else "small")
    small.save(folder, eos_token_id=3)
    after = load_file(folder / "model.safetensors")
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype and (after[name] == array).all(), name
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "nanollm"}         # so that no other program takes it for its own
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "nanollm", "bits": bits} and config["eos_token_id"] == 3
    ids = rng.integers(0, 290, (2, 8))
    with no_grad():
        assert (to_host(NanoLLM.load(folder)(ids).data) == to_host(small(ids).data)).all()


@pytest.mark.parametrize("fields", [{"qkv_bias": True}, {"qk_norm": True, "head_dim": 10}])
def test_biases_and_norms_of_heads_stay_as_they_are(tmp_path, rng, fields):
    model = tiny.lively(tiny.small(**fields))
    model.save(tmp_path / "model")
    quantize.write(tmp_path / "small", tmp_path / "model", model, 8)
    small = NanoLLM.load(tmp_path / "small")
    for name, tensor in model.parameters().items():
        if len(tensor.shape) == 2:
            tensor.data[...] = held(to_host(tensor.data), 8)[:]
        else:
            np.testing.assert_array_equal(small.weights.arrays()[name], to_host(tensor.data))
    ids = rng.integers(0, 29, (2, 8))
    with no_grad():
        np.testing.assert_allclose(to_host(small(ids).data), to_host(model(ids).data), rtol=1e-4, atol=1e-4)


def test_a_folder_from_before_whose_embedding_has_4_bits_opens(tmp_path, rng):
    model, arrays = tiny.lively(tiny.small()), {}
    for name, tensor in model.parameters().items():
        arrays[name] = w = to_host(tensor.data)
        if w.ndim == 2:
            arrays[name], arrays[name + ".scale"] = to_integers(w, 4)
            tensor.data[...] = held(w, 4)[:]
    huggingface.save_model(tmp_path, huggingface.to_config(model.config, 4), arrays)
    ids = rng.integers(0, 29, (2, 8))
    with no_grad():
        np.testing.assert_allclose(to_host(NanoLLM.load(tmp_path)(ids).data), to_host(model(ids).data), rtol=1e-4,
                                   atol=1e-4)


def test_it_is_loaded_a_part_at_a_time(tmp_path, bits, monkeypatch):
    if device.on_gpu:
        pytest.skip("there the memory is the card's")
    monkeypatch.setattr(huggingface, "AT_ONCE", 1 << 14)
    model = tiny.small(vocab_size=8000, embedding_dim=64, n_block=1)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in model.shapes().items()}
    for name, shape in model.shapes().items():
        if len(shape) == 2:
            tensors[name], tensors[name + ".scale"] = to_integers(tensors[name], bits)
    huggingface.save_model(tmp_path, huggingface.to_config(model, bits), tensors)
    tracemalloc.start()
    small = NanoLLM.load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.15 * sum(w.nbytes for w in small.weights.arrays().values())


def test_a_block_with_8_and_4_bits_is_refused(tmp_path):
    model = tiny.lively(tiny.small())
    model.save(tmp_path / "model")
    quantize.write(tmp_path / "small", tmp_path / "model", model, 4)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = load_file(tmp_path / "small/model.safetensors")
    tensors[name], tensors[name + ".scale"] = to_integers(to_host(model.parameters()[name].data), 8)
    save_file(tensors, tmp_path / "small/model.safetensors")
    with pytest.raises(InputError, match=rf"{name} has shape"):
        NanoLLM.load(tmp_path / "small")


def test_tied_weights_stay_tied(tmp_path):
    NanoLLM(Config(20, 16, 1, 2, hidden_dim=8, max_context=8, tie_embeddings=True)).save(tmp_path / "model")
    tokenizer = tiny.make_tokenizer(tmp_path / "model/tokenizer.json")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert tokenizer.exists() and config["tie_word_embeddings"]
    NanoLLM(Config(290, 16, 1, 2, hidden_dim=8, max_context=8, tie_embeddings=True)).save(tmp_path / "model")
    assert command(quantize.main, tmp_path / "model", tmp_path / "small")[0] == 0
    small = NanoLLM.load(tmp_path / "small")
    assert small.lm_head is small.embed and "lm_head.weight" not in load_file(tmp_path / "small/model.safetensors")
    assert (tmp_path / "small/tokenizer.json").read_bytes() == tokenizer.read_bytes()


# ---------------------------------------------------------------- what is refused

def test_nothing_is_overwritten_and_nothing_quantised_twice(trained, tmp_path):
    folder, _ = trained
    assert command(quantize.main, folder, tmp_path / "small")[0] == 0
    before = snapshot(tmp_path)
    for source, words in (folder, "exists"), (tmp_path / "small", "exists"):
        code, _, err = command(quantize.main, source, tmp_path / "small")
        assert code == 2 and err.count("\n") == 1 and words in err
    code, _, err = command(quantize.main, tmp_path / "small", tmp_path / "smaller")
    assert code == 2 and "quantised already" in err
    assert snapshot(tmp_path) == before


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_nothing_and_a_run_next_to_it_is_left_alone(trained, tmp_path, monkeypatch):
    folder, _ = trained
    saving = tmp_path / ".checkpoint-7.0123abcd.nanollm"        # of a run next to it
    saving.mkdir()
    with lock(saving):
        with monkeypatch.context() as patch:
            patch.setattr(huggingface, "save_file", no_space)
            code, _, err = command(quantize.main, folder, tmp_path / "small")
        assert code == 2 and "No space left" in err and err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir() if path.name != "nanollm-cache"] == [saving.name]
        assert command(quantize.main, folder, tmp_path / "small")[0] == 0
        assert saving.exists()
    weights, config = (tmp_path / "small" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode      # safetensors makes files for their owner alone


def test_a_file_that_stands_for_another_is_not_copied(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is only Git LFS's pointer"):
        quantize.main([str(folder), str(tmp_path / "small")])
    assert not (tmp_path / "small").exists()


def test_a_quantised_model_is_not_trained_and_not_exported(trained, tmp_path):
    folder, text = trained
    assert command(quantize.main, folder, tmp_path / "small")[0] == 0
    code, _, err = command(train.main, "--init-from", tmp_path / "small", "--text", text,
                           "--artifact-dir", tmp_path / "a")
    assert code == 2 and err.count("\n") == 1 and "quantised and cannot be trained" in err
    assert not (tmp_path / "a").exists()
    for model in NanoLLM.load(tmp_path / "small"), NanoLLM.load(folder, trainable=False):
        with pytest.raises(InputError, match="no gradients: load it with trainable=True"):
            train.Adam(model)
    with pytest.raises(InputError, match="cannot be exported"):
        export_gguf.tensors(NanoLLM.load(tmp_path / "small"))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("lm_head.weight.scale"), "lm_head.weight.scale is missing"),
    (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.float32)}), "is F32; only I8"),
    (lambda t: t.update({"lm_head.weight.scale": t["lm_head.weight.scale"][1:]}), "has shape"),
    (lambda t: t["lm_head.weight.scale"].__setitem__(0, np.nan), "NaN"),
], ids="missing type shape nan".split())
def test_damaged_files_are_refused(trained, tmp_path, change, words):
    folder, _ = trained
    assert command(quantize.main, folder, tmp_path / "small")[0] == 0
    tensors = load_file(tmp_path / "small/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "small/model.safetensors")
    with pytest.raises(InputError, match=words):
        NanoLLM.load(tmp_path / "small")


def test_other_ways_to_quantise_are_refused_by_name(trained, tmp_path):
    folder, _ = trained
    assert command(quantize.main, folder, tmp_path / "small")[0] == 0
    path = tmp_path / "small/config.json"
    config = json.loads(path.read_text())
    for value in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "nanollm", "bits": 3}, "8"):
        path.write_text(json.dumps(config | {"quantization_config": value}))
        with pytest.raises(InputError, match="quantization_config"):
            NanoLLM.load(tmp_path / "small")
