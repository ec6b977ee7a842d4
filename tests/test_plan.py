"""The plan against what it plans: parameters against the model's, memory against what a real step allocates."""
import gc
import re
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import SHAPE, command, make_tokenizer

from autograd import ACTIVATIONS
from console import demo, metrics
from extras import plan
from hardware import device
from nanollm import Config, NanoLLM

CONFIG = Config(300, 64, 2, 4, 2, 64, 172)


@pytest.fixture(autouse=True)
def one_cpu_thread(monkeypatch):
    """tracemalloc sees what NumPy allocates; with more threads, chance decides how many hold a block at once."""
    for name, value in {"xp": np, "on_gpu": False, "threads": 1}.items():
        monkeypatch.setattr(device, name, value)


@pytest.fixture
def quick(monkeypatch):
    """A process of 50 MB on a machine with 60 MB, and no figure drawn."""
    monkeypatch.setattr(plan, "fixed_share", lambda: 50_000_000)
    monkeypatch.setattr(plan, "available", lambda: (60_000_000, "for a test"))


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer.json")


def planned(*flags):
    """What the command prints."""
    code, out, err = command(plan.main, *flags, name="plan.py")
    assert (code, err) == (0, "")
    return out


def cell(out, name):
    """The last cell of the table row that begins with `name`, a number."""
    return float(re.search(rf"^\| {re.escape(name)} .*?([\d,.]+) \|$", out, re.M)[1].replace(",", ""))


def megabytes(out):
    return float(re.search(r"^--batch-size \d+ takes ([\d,.]+) MB", out, re.M)[1].replace(",", ""))


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"n_kv_head": 1, "n_block": 3, "hidden_dim": 7},
                                    {"head_dim": 6, "qk_norm": True}, {"qkv_bias": True}])
def test_parameters_are_the_models(fields):
    config = Config(**{"vocab_size": 30, "embedding_dim": 16, "n_head": 4, "max_context": 8} | fields)
    count, model = plan.parameters(config), NanoLLM(config)
    assert sum(count.values()) == model.weights.flat.size
    assert count["embedding"] == 30 * 16
    assert count["lm_head"] == (0 if config.tie_embeddings else 30 * 16)
    of_heads = sum(n for name, (n, *_) in config.shapes().items() if name.endswith(("bias", "_norm.weight")))
    assert count["norms"] == model.weights.flat.size - model.weights.n_matrix - of_heads
    assert count["gated linear unit"] == config.n_block * 3 * 16 * config.hidden_dim


@pytest.mark.parametrize("fields, B, T, dtype, recompute, dropout", [
    ({}, 6, 64, "float32", False, 0.0),
    ({"activation": "relu", "hidden_dim": 16, "n_head": 32}, 6, 64, "float32", False, 0.0),
    ({"n_kv_head": 1}, 6, 64, "float32", False, 0.1),                   # v is a view of q, k, v
    ({"n_block": 4, "vocab_size": 40}, 6, 64, "float32", True, 0.0),
    ({"n_block": 3}, 1, 300, "float32", True, 0.2),
    ({}, 6, 64, "bfloat16", False, 0.0),
    ({"hidden_dim": 700}, 4, 64, "float16", True, 0.1),                 # the peak: linear gate, up
    ({"vocab_size": 3000}, 2, 32, "float32", False, 0.0),               # the peak: the loss
    ({"vocab_size": 3000, "tie_embeddings": True}, 6, 64, "bfloat16", True, 0.0),
    ({"hidden_dim": 16, "n_kv_head": 4, "vocab_size": 20, "n_block": 1}, 8, 128, "float32", False, 0.0),     # rmsnorm
    ({"head_dim": 64, "qk_norm": True, "n_block": 3}, 6, 64, "float32", False, 0.0),
    ({"head_dim": 64, "qk_norm": True, "n_block": 3, "hidden_dim": 16}, 6, 128, "bfloat16", False, 0.0),
    ({"qkv_bias": True, "n_kv_head": 1}, 6, 64, "float16", False, 0.0),
])
def test_a_step_allocates_what_is_planned(fields, B, T, dtype, recompute, dropout):
    config = Config(**vars(CONFIG) | {"max_context": 512, "head_dim": None} | fields)
    model, ids = NanoLLM(config), np.random.default_rng(0).integers(0, config.vocab_size, (2, B, T))
    model.compute_dtype, model.recompute = np.dtype(dtype), recompute
    model.loss(*ids).backward()                         # what a first step makes once, such as attention's mask
    model.weights.grad[...] = 0
    plans = plan.moments(config, B, T, model.compute_dtype.itemsize, recompute, dropout)
    gc.collect()
    tracemalloc.start()
    try:
        x, y = (part.copy() for part in ids)
        loss = model.loss(x, y, dropout, (1, 2))
        kept = tracemalloc.get_traced_memory()[0]
        loss.backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    after = plans["its backward"]
    assert kept == pytest.approx(after["activations"] + after["dx"] + after["dw"], rel=0.06)
    assert peak == pytest.approx(max(sum(parts.values()) for parts in plans.values()), rel=0.12)


def test_activations_do_not_change_what_is_kept():
    assert len({tuple(plan.kept_by_a_block(Config(9, activation=name), 2, 4)) for name in ACTIVATIONS}) == 1


def test_a_further_process_has_gradients_of_its_own(tokenizer, quick):
    out = planned("--tokenizer", tokenizer, *SHAPE)
    more = float(re.search(r"each further one of --processes adds about ([\d,.]+) MB", out)[1].replace(",", ""))
    n = sum(plan.parameters(Config(290, 16, 2, 2, 1, 8, 24)).values())
    logits, dw = 4 * 4 * 8 * 290, 4 * 290 * 16
    assert more == pytest.approx(cell(out, "Python and libraries") + (4 * n + logits + dw) / 1e6, abs=0.11)


def test_the_largest_batch_fits_and_one_more_does_not(tokenizer, quick):
    def takes(size):
        return planned("--tokenizer", tokenizer, *SHAPE, "--batch-size", size)

    most = int(re.search(r"largest that fits is ([\d,]+):", takes(1))[1].replace(",", ""))
    assert most > 100
    assert megabytes(takes(most)) <= 60.0 <= megabytes(takes(most + 1))


def test_a_machine_that_is_too_small_or_does_not_tell(tokenizer, quick, monkeypatch):
    flags = "--tokenizer", tokenizer, *SHAPE
    monkeypatch.setattr(plan, "available", lambda: (50_000_000, "for a test"))
    assert "Not even 1 fits" in planned(*flags)
    monkeypatch.setattr(plan, "available", lambda: (None, "nobody knows"))
    assert planned(*flags).endswith("nobody knows\n")


def test_free_memory_is_asked_of_the_device(monkeypatch):
    room, where = plan.available()
    assert room > plan.resident() > 1e7 and ("/proc/meminfo" in where or "sysconf" in where)
    assert plan.fixed_share() == pytest.approx(plan.resident(), rel=0.05)
    runtime = SimpleNamespace(memGetInfo=lambda: (123, 456))
    monkeypatch.setattr(device, "on_gpu", True)
    monkeypatch.setattr(device, "xp", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    assert plan.available()[0] == 123 and plan.fixed_share() == 0


def test_every_flag_that_matters_is_honoured(tokenizer, quick):
    def at_glu(*flags):
        return cell(planned("--tokenizer", tokenizer, *SHAPE, "--batch-size", 2000, *flags), "backward of glu")

    plain = at_glu()
    for flags in (["--recompute"], ["--seq-len", 4], ["--dtype", "float16"], ["--dtype", "bfloat16"],
                  ["--n-kv-head", 2]):          # more, but no longer a view of q, k, v
        assert at_glu(*flags) < plain - 0.5, flags
    assert at_glu("--dropout", 0.5) > plain + 0.05
    assert cell(planned("--tokenizer", tokenizer, *SHAPE, "--tie-embeddings"), "lm_head") == 0
    assert plain == at_glu("--grad-accum", 8) == at_glu("--text", "no/such/file")
    out = planned("--tokenizer", tokenizer, *SHAPE, "--batch-size", 3, "--grad-accum", 5)
    assert cell(out, "a step of 120 tokens") == 120 * cell(out, "a token") == 120 * metrics.flops_per_token(
        Config(290, 16, 2, 2, 1, 8, 24), 8)


def test_the_demo_needs_no_files(quick, cache_folder):
    out = planned("--demo")
    assert f"vocab_size={demo.WORDS}" in out and "embedding_dim=128" in out and "a step of 512 tokens" in out
    assert not cache_folder.exists()


def test_a_model_to_start_from_brings_its_shape(tmp_path, quick):
    NanoLLM(Config(290, 16, 3, 2, 1, 8, 24, tie_embeddings=True)).save(tmp_path / "model")
    make_tokenizer(tmp_path / "model/tokenizer.json")
    out = planned("--init-from", tmp_path / "model")
    assert "n_block=3" in out and "tie_embeddings=True" in out and "a step of 32 tokens" in out
    (tmp_path / "model/model.safetensors").unlink()
    assert planned("--init-from", tmp_path / "model") == out            # only the shape is read
    code, _, err = command(plan.main, "--init-from", tmp_path / "model", "--n-block", 2, name="plan.py")
    assert code == 2 and "--n-block is 2, but the model in" in err


@pytest.mark.parametrize("flags, said", [
    ([], "--tokenizer FILE or --vocab-size N is needed"),
    (["--tokenizer", "no/such.json"], "there is no such file"),
    (["--tokenizer", "TOKENIZER", "--seq-len", "600"], "longest context"),
    (["--tokenizer", "TOKENIZER", "--n-head", "3"], "multiple of twice --n-head"),
    (["--tokenizer", "TOKENIZER", "--batch-size", "0"], "--batch-size"),
    (["--tokenizer", "TOKENIZER", "--optimizer", "sgd"], "see --help"),
    (["--demo", "--tokenizer", "TOKENIZER"], "leave out --tokenizer"),
    (["--init-from", "no/such"], "no/such"),
])
def test_bad_input_is_one_line(tokenizer, flags, said):
    code, out, err = command(plan.main, *(str(tokenizer) if f == "TOKENIZER" else f for f in flags), name="plan.py")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("plan.py: ") and said in err
