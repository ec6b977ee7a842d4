"""Training: the optimizer, the schedule, a step, and what the command says."""
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import reference
from tiny import QUICK, SHAPE, check, command, rows, set_gradients
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import train
from console import metrics, options
from data import TokenDataset
from hardware import device
from hardware.device import to_host
from nanollm import Config, NanoLLM
from storage import checkpoint
from storage.tokens import load_tokenizer
from train import Adam, learning_rate, loss_and_norm

pytestmark = pytest.mark.usefixtures("cheap")
TINY = Config(vocab_size=50, embedding_dim=16, n_block=2, n_head=4, n_kv_head=2, max_context=12, hidden_dim=24)


# ---------------------------------------------------------------- Adam

def batches(config, count, seed=0, shape=(3, 12)):
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (count, shape[0], shape[1] + 1))
    return [(one[:, :-1], one[:, 1:]) for one in ids]


@pytest.mark.parametrize(("weight_decay", "tied"), [(0.0, False), (0.3, True)])
def test_ten_steps_have_the_losses_of_torch_and_transformers(tmp_path, weight_decay, tied):
    torch, transformers = reference("torch"), reference("transformers")
    torch.set_num_threads(1)            # with more, such small products wait for each other on a busy machine
    model = NanoLLM(Config(50, 16, 2, 4, 2, 12, 24, tie_embeddings=tied), seed=3)
    model.weights.flat[:model.weights.n_matrix] *= 8            # with the initial weights, attention hardly matters
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
    p = to_host(model.weights.flat).astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    matrix = np.arange(p.size) < model.weights.n_matrix
    for t, lr in ((1, None), (2, 0.03), (3, None)):
        set_gradients(model, t)
        g = to_host(model.weights.grad) * 0.5
        adam.step(lr, scale=0.5)
        rate = 0.1 if lr is None else lr
        m, v = 0.7 * m + 0.3 * g, 0.9 * v + 0.1 * g * g
        p = p - rate * 0.25 * p * matrix
        p = p - rate * (m / (1 - 0.7 ** t)) / (np.sqrt(v / (1 - 0.9 ** t)) + 1e-3)
        np.testing.assert_allclose(to_host(model.weights.flat), p, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(to_host(adam.m), m, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(to_host(adam.v), v, rtol=1e-5, atol=1e-6)
        assert adam.t == t
    assert 0 < model.weights.n_matrix < p.size


def test_a_scale_of_0_is_a_step_as_of_gradients_that_are_0():
    models = [NanoLLM(TINY) for _ in range(2)]
    for model, scale in zip(models, (0.0, 1.0), strict=True):
        adam = Adam(model, lr=0.1)
        set_gradients(model, 1)
        adam.step()
        if scale:
            adam.zero_grad()
        adam.step(scale=scale)
        assert float(adam.t) == 2
    np.testing.assert_array_equal(*(to_host(model.weights.flat) for model in models))


def test_the_boundary_between_matrices_and_vectors_may_fall_anywhere_in_a_sweep():
    """The sweep has more than one block, and the last matrix ends inside one."""
    model = NanoLLM(Config(2100, 32, 1, 4, 2, 12, 24))
    assert model.weights.flat.size > 2 << 16 and model.weights.n_matrix % (1 << 12)
    model.weights.flat[...] = 1
    Adam(model, lr=0.5, weight_decay=0.1).step()
    expected = np.where(np.arange(model.weights.flat.size) < model.weights.n_matrix, np.float32(0.95), 1)
    np.testing.assert_allclose(to_host(model.weights.flat), expected, rtol=1e-6)


def test_zero_grad_loss_and_norm():
    model = NanoLLM(Config(2100, 32, 1, 4, 2, 12, 24))
    set_gradients(model, 0)
    expected = np.linalg.norm(to_host(model.weights.grad).astype(np.float64))
    assert device.floats(*loss_and_norm(model, device.xp.asarray(1.5, "float32"))) == [
        1.5, pytest.approx(expected, rel=1e-5)]
    Adam(model).zero_grad()
    assert device.floats(*loss_and_norm(model, 0.0)) == [0, 0] and not to_host(model.weights.grad).any()


@pytest.mark.parametrize("loss, norm, limit, loss_scale, expected", [
    (2.0, 4.0, 8.0, 1.0, 1.0), (2.0, 4.0, 4.0, 1.0, 1.0), (2.0, 4.0, 1.0, 1.0, 0.25), (2.0, 0.0, 1.0, 1.0, 1.0),
    (2.0, 4.0, 1e38, 1.0, 1.0), (2.0, 64.0, 1.0, 16.0, 1 / 64), (2.0, 8.0, 1.0, 16.0, 1 / 16),
    (math.nan, 4.0, 1.0, 1.0, math.nan), (math.inf, 4.0, 1.0, 1.0, math.nan), (2.0, math.inf, 1.0, 1.0, math.nan),
    (2.0, math.nan, 1.0, 1.0, math.nan), (-math.inf, math.inf, 1.0, 1.0, math.nan)])
def test_clipping_undoes_the_loss_scale_and_shortens_what_is_too_long(loss, norm, limit, loss_scale, expected):
    numbers = (device.xp.asarray(x, "float32") for x in (loss, norm))
    with np.errstate(invalid="ignore"):
        got, = device.floats(train.clipping(*numbers, limit, loss_scale))
    assert got == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("factor", [1e-9, 1 / 3, 1e9])
def test_any_number_is_a_scale(factor):
    """Also one that half precision cannot hold."""
    models = [NanoLLM(TINY) for _ in range(2)]
    for model, scale in zip(models, (1.0, 1 / factor), strict=True):
        set_gradients(model, 1)
        model.weights.grad[...] /= scale
        Adam(model, lr=0.1).step(scale=scale)
    np.testing.assert_allclose(*(to_host(model.weights.flat) for model in models), atol=1e-6)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_scale_that_is_not_finite_changes_nothing(scale, steps_before):
    """Not even the count of steps, also if the gradients are not finite; the next step is as if there had been none."""
    models = [NanoLLM(TINY) for _ in range(2)]
    adams = [Adam(model, lr=0.1, weight_decay=0.1) for model in models]
    for i in range(steps_before + 1):
        if i == steps_before:
            models[0].weights.grad[...] = 7.0
            models[0].weights.grad[3:6] = device.xp.asarray([math.nan, math.inf, -math.inf])
            adams[0].step(scale=device.xp.asarray(scale, "float32"))
            adams[0].step(scale=scale)
            assert float(adams[0].t) == steps_before
        for model, adam in zip(models, adams, strict=True):
            set_gradients(model, i)
            adam.step()
    for name in "m", "v", "t":
        np.testing.assert_array_equal(*(to_host(getattr(adam, name)) for adam in adams))
    np.testing.assert_array_equal(*(to_host(model.weights.flat) for model in models))


# ---------------------------------------------------------------- the learning rate

def test_the_schedule_rises_in_a_line_and_falls_by_half_a_cosine():
    rate = [learning_rate(step, 11, 1.0, 0.1, 4) for step in range(11)]
    assert rate[:4] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(rate[4:], [0.1 + 0.45 * (1 + math.cos(math.pi * i / 7)) for i in range(1, 8)])
    assert rate[-1] == 0.1


def test_the_schedule_may_be_constant_after_the_warm_up():
    assert [learning_rate(step, 5, 2.0, 0.1, 2, "constant") for step in range(5)] == [1, 2, 2, 2, 2]


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
    # the epoch ends first, after 118 windows; 1 % of the steps, 1, warms up; the last rate is a tenth
    assert column(tmp_path / "c", "learning_rate") == [learning_rate(s, 118, 0.01, 0.001, 1) for s in range(118)]


# ---------------------------------------------------------------- a step

def recorded_steps(monkeypatch):
    """The (lr, scale, gradient) of each call of Adam.step from now on."""
    calls, step = [], Adam.step

    def record(self, lr=None, scale=1.0):
        calls.append((lr, float(scale), to_host(self.weights.grad).copy()))
        step(self, lr, scale)
    monkeypatch.setattr(Adam, "step", record)
    return calls


def test_gradients_are_scaled_down_to_the_norm_and_never_up(files, tmp_path, monkeypatch):
    calls = recorded_steps(monkeypatch)
    tiny.run(*files, "--max-steps", 6, "--log-every", 1, "--clip-norm", 1.9, "--artifact-dir", "a")
    norms = [np.linalg.norm(g.astype(np.float64)) for _, _, g in calls]
    np.testing.assert_allclose(column(tmp_path / "a", "grad_norm"), norms, rtol=1e-5)      # before clipping
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


# ---------------------------------------------------------------- what a run shows and writes

def test_the_last_line_is_a_command_with_the_run_s_own_prompt(finished):
    assert finished[2].splitlines()[-1].endswith("/run --prompt 'the cat'")


def test_a_sample_begins_with_the_unseen_text_and_holds_no_broken_character(files):
    tokenizer = load_tokenizer(files[3])
    _, val = TokenDataset.from_text(files[1], files[3], 8).split(0.1)
    model = NanoLLM(Config(290, 16, 2, 2, 1, 8, 24))
    text = train.sample_text(model, tokenizer, [], val, 0)
    assert text.startswith(tokenizer.decode(val.tokens[:8].tolist()).strip("\ufffd"))
    assert text == train.sample_text(model, tokenizer, [], val, 0)
    cut = tokenizer.encode("却").ids[:-1]
    assert train.sample_text(model, tokenizer, tokenizer.encode("却").ids, val, 0).startswith("却")
    model.generate = lambda *_, **__: iter(cut)
    assert train.sample_text(model, tokenizer, tokenizer.encode("a dog").ids, val, 0) == "a dog"


def test_a_prompt_that_cannot_be_encoded_stops_before_the_first_step_but_not_a_run_that_has_it(files, tmp_path):
    t = Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(set(Path(files[1]).read_text("utf-8"))))}))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    t.save("characters.json")
    flags = [*SHAPE, *QUICK, *files[:2], "--tokenizer", "characters.json", "--artifact-dir", "run", "--prompt", "a Zoë"]
    check(command(train.main, *flags), "--prompt: the tokenizer cannot encode 'Z' .character 3., 'ë' .character 5.")
    assert not (tmp_path / "run").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "encode_prompt", lambda *_: [])          # as before prompts were checked
        assert command(train.main, *flags, "--max-steps", 2)[0] == 0
    resume = ["--resume", "--artifact-dir", "run", "--max-steps", 4]
    code, out, err = command(train.main, *resume)
    assert (code, err) == (0, "") and "cannot encode 'Z'" in out and "validation text\n" in out
    check(command(train.main, *resume, "--prompt", "Zoë"), "cannot encode 'Z'")


def test_folders_have_names_of_their_own_by_default(files, tmp_path):
    for name in ("runs/llm", "runs/llm-2", "runs/llm-3"):
        code, out, _ = command(train.main, *SHAPE, *QUICK, *files, "--max-steps", 1)
        assert code == 0 and f"folder     {name}\n" in out and f"generate.py {name} " in out
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(
            ["best", "checkpoint-0", "checkpoint-1", "config.json", "generation_config.json", "metrics.csv",
             "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    assert checkpoint.last_run() == Path("runs/llm-3")
