"""Training: the optimizer, the schedule, what is measured and shown; and what generate.py and evaluate.py print."""

import io
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import QUICK, SHAPE, command, make_files, make_text, make_tokenizer, rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import evaluate
import generate
import train
from console import demo, metrics, options
from data import TokenDataset
from hardware import device
from hardware.device import to_host
from nanollm import Config, NanoLLM
from storage import checkpoint
from storage.files import InputError
from storage.tokens import load_tokenizer
from train import Adam, gradient_norm, learning_rate

draw_loss = metrics.draw_loss       # the real one
TINY = Config(vocab_size=50, embedding_dim=16, n_block=2, n_head=4, n_kv_head=2, max_context=12, hidden_dim=24)


@pytest.fixture(autouse=True)
def cheap(monkeypatch, tmp_path):
    tiny.make_cheap(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, flags for its text and tokenizer, what it printed): three epochs, evaluated in their middle too.

    Only read by the tests that share it.
    """
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("finished")
        patch.setenv("NANOLLM_CACHE", str(root / "cache"))
        tiny.make_cheap(patch)
        files = make_files(root)
        code, out, err = command(train.main, *SHAPE, *QUICK, *files, "--num-epochs", 3, "--stride", 8,
                                 "--batch-size", 17, "--eval-every", 4, "--sample-every", 8, "--prompt", "the cat",
                                 "--artifact-dir", root / "run")
        assert (code, err) == (0, "")
        return root / "run", files, out


# ---------------------------------------------------------------- Adam

def batches(config, count, seed=0, shape=(3, 12)):
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (count, shape[0], shape[1] + 1))
    return [(one[:, :-1], one[:, 1:]) for one in ids]


def set_gradients(model, seed):
    model.flat_grad[...] = device.xp.asarray(np.random.default_rng(seed).standard_normal(model.flat.size, np.float32))


@pytest.mark.parametrize(("weight_decay", "tied"), [(0.0, False), (0.3, True)])
def test_ten_steps_have_the_losses_of_torch_and_transformers(tmp_path, weight_decay, tied):
    torch, transformers = reference("torch"), reference("transformers")
    torch.set_num_threads(1)            # with more, such small products wait for each other on a busy machine
    model = NanoLLM(Config(50, 16, 2, 4, 2, 12, 24, tie_embeddings=tied), seed=3)
    model.flat[:model.n_matrix] *= 8            # as initialised, the attention hardly matters
    model.save(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
    ours = Adam(model, **settings, weight_decay=weight_decay)
    if weight_decay:
        groups = [{"params": [p for p in theirs.parameters() if p.ndim == n], "weight_decay": weight_decay * (n == 2)}
                  for n in (1, 2)]
        torchs = torch.optim.AdamW(groups, **settings)
    else:
        torchs = torch.optim.Adam(theirs.parameters(), **settings)
    losses = []
    for x, y in batches(model.config, 2) * 5:
        ours.zero_grad()
        loss = model.loss(x, y)
        loss.backward()
        ours.step()
        logits = theirs(torch.tensor(x)).logits
        their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(y).flatten())
        torchs.zero_grad()
        their_loss.backward()
        torchs.step()
        losses.append((float(loss.data), their_loss.item()))
    got, expected = np.array(losses).T
    np.testing.assert_allclose(got, expected, rtol=2e-4)
    assert abs(expected[0] - expected[-1]) > 0.3           # enough happened for a mistake to show


def test_adam_follows_the_formulas_with_bias_correction_and_decay_of_matrices_only():
    model = NanoLLM(TINY)
    adam = Adam(model, lr=0.1, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.25)
    p = to_host(model.flat).astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    matrix = np.arange(p.size) < model.n_matrix
    for t, lr in ((1, None), (2, 0.03), (3, None)):
        set_gradients(model, t)
        g = to_host(model.flat_grad) * 0.5
        adam.step(lr, scale=0.5)
        rate = 0.1 if lr is None else lr
        m, v = 0.7 * m + 0.3 * g, 0.9 * v + 0.1 * g * g
        p = p - rate * 0.25 * p * matrix
        p = p - rate * (m / (1 - 0.7 ** t)) / (np.sqrt(v / (1 - 0.9 ** t)) + 1e-3)
        np.testing.assert_allclose(to_host(model.flat), p, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(to_host(adam.m), m, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(to_host(adam.v), v, rtol=1e-5, atol=1e-6)
        assert adam.t == t
    assert 0 < model.n_matrix < p.size


def test_the_first_step_moves_every_weight_by_the_learning_rate():
    model = NanoLLM(TINY)
    before = to_host(model.flat).copy()
    set_gradients(model, 0)
    Adam(model, lr=0.01).step()
    sign = np.sign(to_host(model.flat_grad))
    np.testing.assert_allclose(before - to_host(model.flat), 0.01 * sign, rtol=1e-3)


def test_without_gradients_only_the_decay_moves_weights():
    model = NanoLLM(TINY)
    before = to_host(model.flat).copy()
    adam = Adam(model, lr=0.5, weight_decay=0.1)
    adam.zero_grad()
    adam.step()
    np.testing.assert_allclose(to_host(model.flat)[:model.n_matrix], before[:model.n_matrix] * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(to_host(model.flat)[model.n_matrix:], before[model.n_matrix:])


def test_the_boundary_between_matrices_and_vectors_may_fall_anywhere_in_a_sweep():
    """More than one block of the sweep, the last matrix ending inside one."""
    model = NanoLLM(Config(2100, 32, 1, 4, 2, 12, 24))
    assert model.flat.size > 2 << 16 and model.n_matrix % (1 << 12)
    model.flat[...] = 1
    Adam(model, lr=0.5, weight_decay=0.1).step()
    expected = np.where(np.arange(model.flat.size) < model.n_matrix, np.float32(0.95), 1)
    np.testing.assert_allclose(to_host(model.flat), expected, rtol=1e-6)


def test_zero_grad_and_gradient_norm():
    model = NanoLLM(Config(2100, 32, 1, 4, 2, 12, 24))
    set_gradients(model, 0)
    expected = np.linalg.norm(to_host(model.flat_grad).astype(np.float64))
    assert gradient_norm(model) == pytest.approx(expected, rel=1e-5) and isinstance(gradient_norm(model), float)
    Adam(model).zero_grad()
    assert gradient_norm(model) == 0 and not to_host(model.flat_grad).any()


# ---------------------------------------------------------------- the learning rate

def test_the_schedule_rises_in_a_line_and_falls_by_half_a_cosine():
    rate = [learning_rate(step, 11, 1.0, 0.1, 4) for step in range(11)]
    assert rate[:4] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(rate[4:], [0.1 + 0.45 * (1 + math.cos(math.pi * i / 7)) for i in range(1, 8)])
    assert rate[-1] == 0.1


def test_the_schedule_may_be_constant_after_the_warm_up():
    assert [learning_rate(step, 5, 2.0, 0.1, 2, "constant") for step in range(5)] == [1, 2, 2, 2, 2]


@given(st.integers(1, 500), st.floats(1e-6, 1), st.floats(0, 1), st.integers(0, 500),
       st.sampled_from(["cosine", "constant"]))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_the_rate_stays_between_its_ends_and_never_rises_after_the_warm_up(steps, peak, share, warmup, schedule):
    low, warmup = peak * share, min(warmup, steps)
    rate = [learning_rate(step, steps, peak, low, warmup, schedule) for step in range(steps)]
    assert all(0 <= r <= peak * (1 + 1e-12) for r in rate)
    assert all(a >= b for a, b in itertools.pairwise(rate[max(warmup - 1, 0):]))
    assert all(a < b for a, b in itertools.pairwise(rate[:warmup]))
    if schedule == "cosine" and warmup < steps:
        assert rate[-1] == low


def column(folder, name):
    return [float(row[name]) for row in rows(folder) if row[name]]


def test_the_command_line_takes_the_rates_of_the_schedule(files, tmp_path):
    flags = (*files, "--max-steps", 8, "--log-every", 1)
    tiny.run(*flags, "--warmup-steps", 3, "--min-lr", 0.004, "--artifact-dir", "a")
    assert column(tmp_path / "a", "learning_rate") == [learning_rate(s, 8, 0.01, 0.004, 3) for s in range(8)]
    tiny.run(*flags, "--lr-schedule", "constant", "--artifact-dir", "b")
    assert column(tmp_path / "b", "learning_rate") == [0.01] * 8
    tiny.run(*files, "--num-epochs", 1, "--max-steps", 400, "--batch-size", 1, "--stride", 8, "--log-every", 1,
             "--artifact-dir", "c")
    # the epoch ends first: 118 windows; a hundredth of the steps, 1, to warm up; a tenth of the rate at last
    assert column(tmp_path / "c", "learning_rate") == [learning_rate(s, 118, 0.01, 0.001, 1) for s in range(118)]


# ---------------------------------------------------------------- a step

def recorded_steps(monkeypatch):
    """The (lr, scale, gradient) of each call of Adam.step from now on."""
    calls, step = [], Adam.step

    def record(self, lr=None, scale=1.0):
        calls.append((lr, scale, to_host(self.model.flat_grad).copy()))
        step(self, lr, scale)
    monkeypatch.setattr(Adam, "step", record)
    return calls


def test_gradients_are_scaled_down_to_the_norm_and_never_up(files, tmp_path, monkeypatch):
    calls = recorded_steps(monkeypatch)
    tiny.run(*files, "--max-steps", 6, "--log-every", 1, "--clip-norm", 1.9, "--artifact-dir", "a")
    norms = [np.linalg.norm(g.astype(np.float64)) for _, _, g in calls]
    np.testing.assert_allclose(column(tmp_path / "a", "grad_norm"), norms, rtol=1e-5)      # as it was before
    np.testing.assert_allclose([scale for _, scale, _ in calls], np.minimum(1, 1.9 / np.array(norms)), rtol=1e-5)
    assert min(norms) < 1.9 < max(norms)
    calls.clear()
    tiny.run(*files, "--max-steps", 2, "--clip-norm", 0, "--artifact-dir", "b")
    assert [scale for _, scale, _ in calls] == [1, 1]


def test_the_parts_of_a_big_batch_give_its_gradient(files, tmp_path, monkeypatch):
    calls = recorded_steps(monkeypatch)
    for name, size, parts in (("whole", 6, 1), ("parts", 2, 3)):
        tiny.run(*files, "--max-steps", 4, "--log-every", 1, "--batch-size", size, "--grad-accum", parts,
                 "--artifact-dir", name)
    whole, parts = calls[:4], calls[4:]
    for (_, _, a), (_, _, b) in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * abs(a).max())
    for name in ("train_loss", "grad_norm"):
        np.testing.assert_allclose(column(tmp_path / "whole", name), column(tmp_path / "parts", name), rtol=1e-4)
    for name in ("tokens", "epoch"):
        assert column(tmp_path / "whole", name) == column(tmp_path / "parts", name)


def test_the_batches_are_the_stream_of_the_seed(files, tmp_path, monkeypatch):
    seen, loss = [], NanoLLM.loss
    monkeypatch.setattr(NanoLLM, "loss", lambda self, x, y, *drop: seen.append((x, y)) or loss(self, x, y))
    tiny.run(*files, "--max-steps", 5, "--grad-accum", 2, "--val-fraction", 0, "--seed", 7, "--artifact-dir", "run")
    stream = TokenDataset.from_text(files[1], files[3], 8)
    for i, (x, y) in enumerate(seen):
        expected = stream.batch(2 * i, 2, seed=7)
        assert np.array_equal(x, expected[0]) and np.array_equal(y, expected[1])
    assert len(seen) == 10


def test_training_learns(files, tmp_path):
    tiny.run(*files, "--num-epochs", 6, "--batch-size", 16, "--learning-rate", 0.02, "--log-every", 10,
             "--artifact-dir", "run")
    losses = column(tmp_path / "run", "train_loss")
    entropy = metrics.unigram_entropy(TokenDataset.from_text(files[1], files[3], 8))
    assert losses[0] > entropy > 2 * losses[-1]


# ---------------------------------------------------------------- measures

def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluate_scores_every_target_once(files, batch_size):
    _, val = TokenDataset.from_text(files[1], files[3], 8, 3).split(0.11)
    model = NanoLLM(Config(290, 16, 2, 4, 2, 8, 24))
    model.flat[:model.n_matrix] *= 10
    ids, nats = np.asarray(val.tokens).astype(np.int64), 0.0
    for start in range(0, len(ids) - 1, 8):
        x, y = ids[start:start + 8], ids[start + 1:start + 9]
        scores = log_softmax(to_host(model(x[None, :len(y)]).data)[0].astype(np.float64))
        nats -= sum(scores[i, target] for i, target in enumerate(y))
    assert (len(ids) - 1) % 8           # a last window that is shorter
    result = train.evaluate(model, val, batch_size)
    assert result["tokens"] == len(ids) - 1
    assert result["bytes"] == val.source_bytes
    assert result["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / val.source_bytes, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3])
def test_evaluate_slides_its_window(finished, stride):
    """Each target by itself, as it stands in its window: one of 8 tokens that ends at a multiple of the stride."""
    folder, files, _ = finished
    _, val = TokenDataset.from_text(files[1], files[3], 8, 3).split(0.03)
    val.stride, model = stride, NanoLLM.load(folder)
    ids, nats, hits = np.asarray(val.tokens).astype(np.int64), [], []
    for t in range(1, len(ids)):
        start = max(0, -(-(t - 8) // stride) * stride)
        scores = log_softmax(to_host(model(ids[None, start:t]).data)[0, -1].astype(np.float64))
        nats.append(-scores[ids[t]])
        hits.append([(scores > scores[ids[t]]).sum() < k for k in (1, 5)])
    scores = evaluate.Scores(8)
    result = train.evaluate(model, val, 2, scores.see)
    assert result["tokens"] == len(ids) - 1 == scores.count.sum() and result["bytes"] == val.source_bytes
    assert result["loss"] == pytest.approx(np.mean(nats), rel=1e-5) == train.evaluate(model, val, 7)["loss"]
    assert list(scores.hits.values()) == np.sum(hits, 0).tolist() and scores.hits[1] < scores.hits[5]
    np.testing.assert_allclose(scores.first, nats, rtol=1e-4, atol=1e-5)
    at = np.array([t - max(0, -(-(t - 8) // stride) * stride) - 1 for t in range(1, len(ids))])
    for i in range(8):
        here = np.array(nats)[at == i]
        assert (scores.count[i], scores.total[i], scores.squares[i]) == pytest.approx(
            (here.size, here.sum(), (here ** 2).sum()), rel=1e-4)


def test_evaluate_leaves_the_gradients_and_the_weights_alone(files):
    _, val = TokenDataset.from_text(files[1], files[3], 8).split(0.1)
    model = NanoLLM(Config(290, 16, 2, 4, 2, 8, 24))
    set_gradients(model, 0)
    before = to_host(model.flat).copy(), to_host(model.flat_grad).copy()
    train.evaluate(model, val)
    assert np.array_equal(before[0], to_host(model.flat)) and np.array_equal(before[1], to_host(model.flat_grad))


def test_unigram_entropy_by_hand():
    class Tokens:
        vocab_size, tokens = 9, np.array([3, 3, 3, 3, 5, 5, 0, 8], np.uint16)
    assert metrics.unigram_entropy(Tokens) == pytest.approx(1.75 * math.log(2))


def test_perplexity():
    assert metrics.perplexity(math.log(50)) == pytest.approx(50)
    assert math.isnan(metrics.perplexity(math.nan)) and metrics.perplexity(1e9) > 1e300


# ---------------------------------------------------------------- what a run shows and writes

def test_the_first_loss_is_shown_beside_ln_V_and_the_unigram_entropy(finished):
    _, files, out = finished
    line = next(line for line in out.splitlines() if line.startswith("step 0:"))
    loss, ln_v, entropy = map(float, re.findall(r"\d+\.\d+", line))
    train_set, _ = TokenDataset.from_text(files[1], files[3], 8, 8).split(0.1)
    model = NanoLLM(Config(290, 16, 2, 2, 1, 8, 24))
    assert loss == pytest.approx(float(model.loss(*train_set.batch(0, 17, 0)).data), abs=6e-4)
    assert ln_v == pytest.approx(math.log(290), abs=6e-4) and "290" in line
    assert entropy == pytest.approx(metrics.unigram_entropy(train_set), abs=6e-4)


def test_metrics_csv(finished):
    folder, files, _ = finished
    text = (folder / "metrics.csv").read_text()
    assert text.splitlines()[0] == ("step,epoch,tokens,train_loss,val_loss,val_perplexity,val_bits_per_byte,"
                                    "learning_rate,grad_norm,loss_scale,skipped,tokens_per_second,flops_per_second,"
                                    "data_share,forward_share,backward_share,optimizer_share,seconds")
    table = rows(folder)
    # 118 windows by 17: epochs end in steps 7, 14, 21; rows in step 1 and every 3, evaluations every 4 and at the ends
    evaluated = [4, 7, 8, 12, 14, 16, 20, 21]
    assert [int(row["step"]) for row in table] == sorted({1, *range(3, 22, 3), *evaluated})
    for row in table:
        step = int(row["step"])
        for name in ("val_loss", "val_perplexity", "val_bits_per_byte"):
            assert bool(row[name]) == (step in evaluated)
        assert all(row[name] for name in row if not name.startswith("val_"))
        assert int(row["tokens"]) == step * 17 * 8 and float(row["epoch"]) == pytest.approx(step * 17 / 118, abs=1e-6)
        shares = [float(row[f"{phase}_share"]) for phase in ("data", "forward", "backward", "optimizer")]
        assert min(shares) >= 0 and sum(shares) == pytest.approx(1, abs=1e-3)
        flops = 6 * (2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 290 * 16) + 6 * 2 * 16 * 8
        assert int(row["flops_per_second"]) == pytest.approx(flops * float(row["tokens_per_second"]), abs=flops)
        assert row["skipped"] == "0" and row["loss_scale"] == "1.0"
        if row["val_loss"]:
            assert float(row["val_perplexity"]) == pytest.approx(math.exp(float(row["val_loss"])))
    assert table[-1]["step"] == "21" and table[-1]["train_loss"] and table[-1]["val_loss"]
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    _, val = TokenDataset.from_text(files[1], files[3], 8, 8).split(0.1)
    assert float(table[-1]["val_loss"]) == train.evaluate(NanoLLM.load(folder), val, 17)["loss"]


def test_train_loss_is_the_mean_since_the_row_before(files, tmp_path):
    flags = (*files, "--max-steps", 8, "--eval-every", 5)
    tiny.run(*flags, "--log-every", 1, "--artifact-dir", "each")
    tiny.run(*flags, "--log-every", 3, "--artifact-dir", "some")
    each, last = [float(row["train_loss"]) for row in rows(tmp_path / "each")], 0
    for row in rows(tmp_path / "some"):
        step = int(row["step"])
        assert float(row["train_loss"]) == pytest.approx(np.mean(each[last:step]), rel=1e-6)
        last = step
    assert [row["step"] for row in rows(tmp_path / "some")] == ["1", "3", "5", "6", "8"]


def test_the_last_line_is_a_command_with_the_run_s_own_prompt(finished):
    assert finished[2].splitlines()[-1].endswith("/run --prompt 'the cat'")


def test_lines_of_epochs_tell_both_losses(finished):
    folder, files, out = finished
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    table = {row["epoch"]: row for row in rows(folder) if row["val_loss"]}
    assert len(lines) == len(table) == 8
    train_set, _ = TokenDataset.from_text(files[1], files[3], 8, 8).split(0.1)
    for line, row in zip(lines, table.values(), strict=True):
        values = [float(value.replace(",", "")) for value in re.findall(r"\d[\d,]*\.\d+", line)]
        loss = float(row["train_loss"])
        bits = loss / math.log(2) * len(train_set.tokens) / train_set.source_bytes
        np.testing.assert_allclose(values, [float(row["epoch"]), loss, math.exp(loss), bits, float(row["val_loss"]),
                                            float(row["val_perplexity"]), float(row["val_bits_per_byte"])], atol=0.051)
    assert "epoch 1.01" in out and "epoch 2.02" in out and "epoch 3.03" in out and "the best so far" in lines[0]


def test_progress_in_plain_lines(finished):
    lines = [line for line in finished[2].splitlines() if re.match(r"step \d+/21 ", line)]
    assert len(lines) == len(rows(finished[0]))
    for line in lines:
        assert re.fullmatch(r"step \d+/21  loss \d+\.\d{4}  ppl [\d,]+\.\d  lr \d\.\de-\d+  \|g\| \d+\.\d\d  "
                            r"[\d,]+ tok/s  [\d,]+\.\d GFLOP/s  [\d:]+ left", line)


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with metrics.Progress(10, 4, 60.0, 1000) as progress:
        progress.advance(100)
        progress.show(5, 2.0, 1e-3, 0.5)
        assert 60 <= progress.seconds < 70 and progress.speed > 0
    out, err = capsys.readouterr()
    assert out == "" and "5/10" in err and "loss 2.0000  ppl 7.4  lr 1.0e-03  |g| 0.50" in err


def test_a_closed_pipe_does_not_end_a_run():
    """`python train.py … | head`: what nobody reads is dropped, silently."""
    code = "from console import metrics\nfor i in range(1000): metrics.say('x' * 1000)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=Path(train.__file__).parent) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_samples_are_shown_at_evaluations_or_as_often_as_asked(finished, files):
    samples = re.findall("^sample: (.*)$", finished[2], re.MULTILINE)
    assert len(samples) == 2 and all(sample[1:].startswith("the cat") for sample in samples)      # steps 8 and 16
    code, out, _ = command(train.main, *SHAPE, *files, "--max-steps", 6, "--eval-every", 2)
    assert code == 0 and len(re.findall("^sample: ", out, re.MULTILINE)) == 3


def test_a_sample_begins_with_the_unseen_text_and_holds_no_broken_character(files):
    tokenizer = load_tokenizer(files[3])
    _, val = TokenDataset.from_text(files[1], files[3], 8).split(0.1)
    model = NanoLLM(Config(290, 16, 2, 2, 1, 8, 24))
    text = train.sample_text(model, tokenizer, None, val, 0)
    assert text.startswith(tokenizer.decode(val.tokens[:8].tolist()).strip("\ufffd"))
    assert text == train.sample_text(model, tokenizer, None, val, 0)
    cut = tokenizer.encode("却").ids[:-1]
    assert train.sample_text(model, tokenizer, "却", val, 0).startswith("却")
    model.generate = lambda *_, **__: iter(cut)
    assert train.sample_text(model, tokenizer, "a dog", val, 0) == "a dog"


def test_loss_png_is_drawn_with_labelled_axes(finished, monkeypatch):
    folder = finished[0]
    draw_loss(folder)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    from matplotlib.figure import Figure
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self) or Path(path).touch())
    draw_loss(folder)
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "loss (nats per token)"
    train_line, val_line = axes.lines
    table = rows(folder)
    assert train_line.get_xdata().tolist() == [int(row["step"]) for row in table]
    assert train_line.get_ydata().tolist() == [float(row["train_loss"]) for row in table]
    assert val_line.get_ydata().tolist() == [float(row["val_loss"]) for row in table if row["val_loss"]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation (unseen text)"]


@pytest.mark.parametrize("name", ["a$^$b", "训练", "%s{"])
def test_any_folder_name_can_be_drawn(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    metrics.rewind(folder / "metrics.csv", 0)
    draw_loss(folder)
    assert (folder / "loss.png").stat().st_size > 1000


def test_the_loss_is_drawn_as_training_goes_on(files, monkeypatch):
    drawn, now = [], [0]
    monkeypatch.setattr(metrics, "draw_loss", lambda folder: drawn.append(rows(folder)[-1]["step"]))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.append(now[-1] + 1) or now[-1])
    tiny.run(*files, "--max-steps", 12, "--log-every", 1)
    assert len(drawn) > 3 and drawn[-1] == "12"             # every 15 s of this clock, and in the end
    drawn.clear()
    monkeypatch.setattr(metrics.time, "monotonic", lambda: 0.0)
    tiny.run(*files, "--max-steps", 12, "--val-fraction", 0, "--log-every", 1)
    assert drawn == ["12"]


def test_no_validation_part(files, tmp_path):
    code, out, err = command(train.main, *SHAPE, *QUICK, *files, "--val-fraction", 0, "--max-steps", 20, "--stride", 8,
                             "--batch-size", 16, "--artifact-dir", "run")
    assert (code, err) == (0, "")
    assert all(not row["val_loss"] and row["train_loss"] for row in rows(tmp_path / "run"))
    assert not (tmp_path / "run/best").exists()
    assert len([line for line in out.splitlines() if line.startswith("epoch ")]) == 3       # steps 9, 17 and 20
    assert "validation loss" not in out


def test_folders_have_names_of_their_own_by_default(files, tmp_path):
    for name in ("runs/llm", "runs/llm-2", "runs/llm-3"):
        code, out, _ = command(train.main, *SHAPE, *QUICK, *files, "--max-steps", 1)
        assert code == 0 and f"folder     {name}\n" in out and f"generate.py {name} " in out
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(
            ["best", "checkpoint-0", "checkpoint-1", "config.json", "generation_config.json", "metrics.csv",
             "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    assert checkpoint.last_run() == Path("runs/llm-3")


def test_the_defaults_are_the_documented_ones():
    args = vars(options.command_line().parse_args([]))
    assert args == {
        "text": None, "tokenizer": None, "demo": False, "artifact_dir": None, "resume": False, "init_from": None,
        "embedding_dim": 512, "n_block": 6, "n_head": 8, "n_kv_head": None, "max_context": 512, "hidden_dim": 2048,
        "eps": 1e-6, "rope_theta": 10000.0, "activation": "silu", "tie_embeddings": False, "seq_len": None,
        "stride": None, "val_fraction": 0.1, "num_epochs": 10, "max_steps": None, "batch_size": 4, "grad_accum": 1,
        "dtype": "float32", "tf32": False, "recompute": False, "dropout": 0.0,
        "learning_rate": 1e-4, "lr_schedule": "cosine", "warmup_steps": None, "min_lr": None, "beta1": 0.9,
        "beta2": 0.999, "weight_decay": 0.0, "clip_norm": 1.0, "seed": 0, "eval_every": None, "save_every": 500,
        "keep_last": 2, "log_every": 10, "sample_every": None, "prompt": None, "patience": None, "device": None}


def test_every_flag_reaches_what_it_is_named_for(files, tmp_path, monkeypatch):
    built = []
    init = Adam.__init__
    monkeypatch.setattr(Adam, "__init__", lambda self, *args, **named: built.append((args, named)) or init(
        self, *args, **named))
    tiny.run(*files, "--max-steps", 1, "--eps", 1e-4, "--rope-theta", 500, "--activation", "relu", "--tie-embeddings",
             "--seq-len", 6, "--stride", 2, "--beta1", 0.8, "--beta2", 0.9, "--weight-decay", 0.05,
             "--artifact-dir", "run")
    assert NanoLLM.load(tmp_path / "run").config == Config(290, 16, 2, 2, 1, 8, 24, 1e-4, 500.0, "relu", True)
    assert (built[0][0][1:], built[0][1]) == ((0.01, (0.8, 0.9)), {"weight_decay": 0.05})
    command = json.loads((tmp_path / "run/checkpoint-1/trainer.json").read_text())["command"]
    assert (command["seq_len"], command["stride"], command["n_kv_head"]) == (6, 2, 1)


def test_the_demo_s_settings_are_a_valid_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "files", lambda: tuple(make_files(tmp_path)[1::2]))
    args, newest, *_ = options.parse(["--demo", "--max-steps", "3"])
    assert newest is None and args.max_steps == 3       # the command line wins over the demo's settings
    for name, value in demo.SETTINGS.items():
        if name != "max_steps":
            assert getattr(args, name) == value
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
             for name, value in demo.SETTINGS.items()]
    assert {name: vars(options.command_line().parse_args(flags))[name] for name in demo.SETTINGS} == demo.SETTINGS


# ---------------------------------------------------------------- generate.py

def byte_fallback():
    """As Llama's: words with a leading ▁, whatever else as bytes <0x..>; the first space is not shown."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in ("▁", "a", "b", "c", "▁a", "ab", "▁ab"):
        vocab[word] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer


def wordpiece():
    words = ["[UNK]", "[CLS]", "a", "b", "##b", "ab", "##c", ".", "却", "👍"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    tokenizer.normalizer, tokenizer.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    path = make_tokenizer(tmp_path_factory.mktemp("kinds") / "tokenizer.json")
    return {"byte-level": load_tokenizer(path), "byte fallback": byte_fallback(), "WordPiece": wordpiece()}


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "WordPiece"])
@given(text=st.text(st.sampled_from("ab c.却说é👍\n"), max_size=150))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@example(text="却说孙悟空一个筋斗云👍👍👍ab" * 20)
def test_text_streams_whole_characters(kinds, kind, text):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = list(generate.stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(piece and "\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "WordPiece"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_whatever_a_model_says_can_be_streamed(kinds, kind, data):
    """Parts of characters in any order: nothing raises, nothing gets lost or comes twice."""
    tokenizer = kinds[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=90))
    if kind == "byte fallback":         # for one wrong byte it takes back a whole run of them, of which some were shown
        ids = [i for i in ids if not 3 <= i < 3 + 128]
    text, whole = "".join(generate.stream_text(tokenizer, ids)), tokenizer.decode(ids)
    if kind == "byte fallback":
        text, whole = (re.sub("[^abc ]", "", one) for one in (text, whole))
    assert text == whole.rstrip("\ufffd")


def test_text_comes_as_soon_as_a_character_is_complete(kinds):
    tokenizer, shown = kinds["byte-level"], []
    ids = tokenizer.encode("a却👍").ids
    for n in range(1, len(ids) + 1):
        shown.append("".join(generate.stream_text(tokenizer, ids[:n])))
    assert shown[0] == "a" and shown[-1] == "a却👍" and set(shown) == {"a", "a却", "a却👍"}


def test_streaming_takes_time_in_proportion(kinds):
    class Counting:
        seen = 0

        def decode(self, ids):
            Counting.seen += len(ids)
            return kinds["byte-level"].decode(ids)
    ids = kinds["byte-level"].encode("the cat sat on the mat. 却" * 200).ids
    text = "".join(generate.stream_text(Counting(), ids))
    assert text == kinds["byte-level"].decode(ids) and Counting.seen < 80 * len(ids)


def test_generate_prints_only_text(finished):
    folder = finished[0]
    code, out, err = command(generate.main, folder, "--prompt", "the 却", "--max-new-tokens", 12, "--seed", 3)
    assert (code, err) == (0, "") and out.startswith("the 却") and out.endswith("\n")
    model, tokenizer = NanoLLM.load(folder), load_tokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode("the 却").ids
    ids += model.generate(ids, 12, temperature=0.8, top_p=0.95, seed=3)
    assert out == tokenizer.decode(ids).rstrip("\ufffd") + "\n"
    assert command(generate.main, folder, "--prompt", "the 却", "--max-new-tokens", 12, "--seed", 3)[1] == out


def test_generate_s_flags_reach_the_model(finished, monkeypatch):
    seen, word = [], load_tokenizer(finished[0] / "tokenizer.json").encode("a").ids
    monkeypatch.setattr(NanoLLM, "generate", lambda self, ids, *rest: seen.append((ids.tolist(), *rest)) or iter([]))
    command(generate.main, finished[0], "--prompt", "a", "--max-new-tokens", 5, "--temperature", 0, "--top-k", 7,
            "--top-p", 0.5, "--seed", 9)
    assert seen == [([word], 5, 0.0, 7, 0.5, 9, [])]


def test_text_without_a_prompt_needs_a_bos_token(finished):
    code, out, err = command(generate.main, finished[0], name="generate.py")
    assert (code, out) == (2, "") and err.startswith("generate.py: ") and "--prompt" in err and err.count("\n") == 1


@pytest.fixture
def with_bos(tmp_path):
    """A folder as of a chat model: <s> begins a text, </s> or <end> ends it; no token says anything else."""
    folder = tmp_path / "bos"
    NanoLLM(Config(293, 16, 1, 2, 2, 8, 24)).save(folder, bos_token_id=0, eos_token_id=[1, 2])
    make_tokenizer(folder / "tokenizer.json", 293, ["<s>", "</s>", "<end>"])
    return folder


def test_bos_begins_and_eos_ends_a_text(with_bos, monkeypatch):
    prompts, read = [], NanoLLM.generate
    word = load_tokenizer(with_bos / "tokenizer.json").encode("a").ids[0]

    def scripted(self, ids, count, *rest):
        prompts.extend(ids.tolist())
        assert rest[-1] == [1, 2]
        return iter([np.array([token]) for token in (word, word, 2, word)])
    monkeypatch.setattr(NanoLLM, "generate", scripted)
    assert command(generate.main, with_bos) == (0, "aa\n", "")
    assert command(generate.main, with_bos, "--prompt", "aa") == (0, "aaaa\n", "")
    assert prompts == [[0], [0, word, word]]
    monkeypatch.setattr(NanoLLM, "generate", read)
    assert command(generate.main, with_bos, "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize("bad", [290, -1, True, "a", 1.5, [0, 999]])
def test_bos_and_eos_must_be_ids_of_the_model(with_bos, bad):
    config = json.loads((with_bos / "config.json").read_text())
    (with_bos / "config.json").write_text(json.dumps(config | {"eos_token_id": 999 if bad == 290 else bad}))
    code, out, err = command(generate.main, with_bos)
    assert (code, out) == (2, "") and "config.json" in err and "token id" in err


# ---------------------------------------------------------------- stop strings, several samples, speed

def cut_at(text, stops, start):
    """The definition: letter by letter, until a stop string is complete; of two complete at once the longer counts."""
    for end in range(start, len(text) + 1):
        ended = [stop for stop in stops if text[start:end].endswith(stop)]
        if ended:
            return text[:end - max(map(len, ended))]
    return text


@given(st.lists(st.text("ab", max_size=4), max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
       st.integers(0, 6))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_text_ends_before_a_stop_string_however_it_comes(pieces, stops, start):
    text, taken = "".join(pieces), []
    start = min(start, len(text))
    shown, expected = "", cut_at(text, stops, start)
    for piece in generate.until_stop((taken.append(p) or p for p in pieces), stops, start):
        shown += piece
        assert expected.startswith(shown)
        if len(taken) < len(pieces):            # nothing waits but what may begin a stop
            waits = "".join(taken)[len(shown):]
            assert not waits or any(stop.startswith(waits) for stop in stops) or shown == expected
    assert shown == expected
    if expected != text:                        # and no piece is asked for that is not needed
        assert not any(stop in "".join(taken[:-1])[start:] for stop in stops)


def test_a_stop_string_spans_tokens_and_is_not_looked_for_in_the_prompt(with_bos, monkeypatch):
    tokenizer, read = load_tokenizer(with_bos / "tokenizer.json"), []
    ids = tokenizer.encode("the cat却. the mat", add_special_tokens=False).ids

    def scripted(self, prompt, count, *rest):
        for token in ids:
            read.append(token)
            yield np.array([token])
    monkeypatch.setattr(NanoLLM, "generate", scripted)
    whole = "the cat却. the mat"
    for stops, end in (["t却"], "the ca"), (["x", "却. t"], "the cat"), (["却. tx"], whole), (["at", "the m"], "the c"):
        read.clear()
        flags = [word for stop in stops for word in ("--stop", stop)]
        assert command(generate.main, with_bos, "--prompt", "t却 at the m", *flags) == (0, f"t却 at the m{end}\n", "")
        assert (len(read) < len(ids)) == (end != whole)


def test_samples_are_the_rows_of_one_batch(finished):
    folder = finished[0]
    model, tokenizer = NanoLLM.load(folder), load_tokenizer(folder / "tokenizer.json")
    flags = [folder, "--prompt", "the 却", "--max-new-tokens", 40, "--seed", 3, "--temperature", 1]     # of 8 at a time
    code, out, err = command(generate.main, *flags, "--num-samples", 3)
    ids = np.tile(tokenizer.encode("the 却").ids, (3, 1))
    rows = np.stack(list(model.generate(ids, 40, top_p=0.95, seed=3)), 1)
    texts = [tokenizer.decode([*ids[0], *row]).rstrip("\ufffd") for row in rows]
    assert (code, err) == (0, "") and len(set(texts)) == 3 and out == "\n---\n".join(texts) + "\n"
    assert command(generate.main, *flags, "--num-samples", 3)[1] == out
    assert command(generate.main, *flags[:-3], 4, *flags[-2:], "--num-samples", 3)[1] != out
    stop = next(text for text in (" the", " a", "o", "t") if any(text in whole[5:] for whole in texts))
    cut = [cut_at(text, [stop], 5) for text in texts]
    assert command(generate.main, *flags, "--num-samples", 3, "--stop", stop)[1] == "\n---\n".join(cut) + "\n"


def test_each_sample_ends_by_itself(with_bos, monkeypatch):
    a, b, c = (load_tokenizer(with_bos / "tokenizer.json").encode(letter).ids[0] for letter in "abc")
    steps, read = np.array([[a, b, c, a], [2, b, a, a], [2, c, b, b], [2, a, c, c], [2, b, 1, b], [2, b, 1, b]]), []
    monkeypatch.setattr(NanoLLM, "generate", lambda *_: (read.append(step) or step for step in steps))
    code, out, err = command(generate.main, with_bos, "--num-samples", 4, "--stop", "bca", "--prompt", "x")
    assert (code, err) == (0, "") and out == "xa\n---\nxb\n---\nxcabc\n---\nxaabcbb\n" and len(read) == 6
    read.clear()
    out = command(generate.main, with_bos, "--num-samples", 3, "--stop", "bc")[1]
    assert out == "a\n---\nb\n---\nca\n" and len(read) == 4     # all three have ended: nothing more is written


@pytest.mark.parametrize("samples, count, numbers", [(1, 40, ("3 prompt tokens", "40 new")), (2, 5, ("10 new",)),
                                                     (2, 1, ("2 new",))])
def test_the_speed_is_told_on_a_terminal_only(finished, monkeypatch, samples, count, numbers):
    flags = [finished[0], "--prompt", "the cat sat", "--seed", 1, "--max-new-tokens", count, "--num-samples", samples]
    _, out, err = command(generate.main, *flags)
    assert err == ""
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(tiny.io, "StringIO", terminal)
    again = command(generate.main, *flags)
    assert again[:2] == (0, out) and again[2].count("\n") == 1 and all(words in again[2] for words in numbers)
    assert ("tokens/s" in again[2]) == (count > 1)


def test_a_text_may_be_four_times_as_long_as_the_context(finished):
    model, tokenizer = NanoLLM.load(finished[0]), load_tokenizer(finished[0] / "tokenizer.json")
    prompt = "the cat sat on the mat. a dog ran to the cat! who ran?"
    ids, T = tokenizer.encode(prompt).ids, model.config.max_context
    assert len(ids) > T
    new = list(model.generate(ids, 4 * T, temperature=0))
    out = command(generate.main, finished[0], "--prompt", prompt, "--max-new-tokens", 4 * T, "--temperature", 0)[1]
    assert len(new) == 4 * T == 32 and out == tokenizer.decode(ids + new).rstrip("\ufffd") + "\n"


# ---------------------------------------------------------------- evaluate.py

def test_evaluate_prints_json_or_words(finished, tmp_path):
    folder, files, _ = finished
    text = make_text(tmp_path / "other.txt", seed=1)

    def as_json(*flags):
        code, out, err = command(evaluate.main, folder, "--text", text, "--json", *flags)
        assert (code, err) == (0, "")
        return json.loads(out)
    for flags, stride in ((), 8), (("--stride", 3), 3):
        scores = evaluate.Scores(8)
        dataset = TokenDataset.from_text(text, files[3], 8, stride)
        expected = train.evaluate(NanoLLM.load(folder), dataset, 8, scores.see)
        assert set(expected) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}
        expected |= {f"top{k}_accuracy": scores.hits[k] / expected["tokens"] for k in (1, 5)}
        got = as_json(*flags)
        assert got.pop("tokens_per_second") > 0 and got == expected | {"seq_len": 8, "stride": stride}
        code, out, err = command(evaluate.main, folder, "--text", text, *flags)
        assert (code, err) == (0, "")
        for name, form, words in (
                ("loss", ".4f", " nats"), ("perplexity", ",.2f", "\n"), ("bits_per_byte", ".4f", "\n"),
                ("top1_accuracy", ".2%", " of the tokens"), ("top5_accuracy", ".2%", " among the five"),
                ("tokens", ",", " predicted"), ("bytes", ",", f" bytes, in windows of 8, {stride} apart")):
            assert f" {expected[name]:{form}}{words}" in out
        assert out.endswith(" tokens/s\n")
    short = as_json("--seq-len", 2, "--batch-size", 3)
    assert short["tokens"] == expected["tokens"] and short["loss"] != expected["loss"] and short["stride"] == 2
    code, out, err = command(evaluate.main, folder, "--text", text, "--seq-len", 9)
    assert (code, out) == (2, "") and "--seq-len 9" in err


def test_the_best_model_and_checkpoints_open_like_the_last(finished):
    folder, files, _ = finished
    losses = {name: json.loads(command(evaluate.main, folder / name, "--text", files[1], "--json")[1])["loss"]
              for name in ("", "best", "checkpoint-21", "checkpoint-20")}
    assert losses[""] == losses["checkpoint-21"] != losses["checkpoint-20"]


def test_what_is_no_model_folder_is_named(tmp_path, files):
    (tmp_path / "empty").mkdir()
    for name, word in (("none", "none"), ("text.txt", "text.txt"), ("empty", "config.json")):
        for main, flags in ((generate.main, ["--prompt", "a"]), (evaluate.main, ["--text", files[1]])):
            code, out, err = command(main, tmp_path / name, *flags)
            assert (code, out) == (2, "") and word in err and err.count("\n") == 1


def test_a_run_that_has_not_ended_points_to_its_best(files, tmp_path):
    tiny.run(*files, "--max-steps", 5, "--eval-every", 2, "--artifact-dir", "run")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(InputError, match="run/best"):
        generate.open_model(tmp_path / "run")
