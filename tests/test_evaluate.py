"""How well a model predicts: every target is scored once, and what the command prints."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny import QUICK, SHAPE, command, edit_trainer, make_files, make_text, make_tokenizer, set_gradients

import evaluate
import train
from data import TokenDataset
from extras import quantize
from hardware.device import to_host
from nanollm import Config, NanoLLM
from storage.checkpoint import usual_window

pytestmark = pytest.mark.usefixtures("cheap")


# ---------------------------------------------------------------- measures

def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluate_scores_every_target_once(files, batch_size):
    _, val = TokenDataset.from_text(files[1], files[3], 8, 3).split(0.11)
    model = NanoLLM(Config(290, 16, 2, 4, 2, 8, 24))
    model.weights.flat[:model.weights.n_matrix] *= 10
    ids, nats = np.asarray(val.tokens).astype(np.int64), 0.0
    for start in range(0, len(ids) - 1, 8):
        x, y = ids[start:start + 8], ids[start + 1:start + 9]
        scores = log_softmax(to_host(model(x[None, :len(y)]).data)[0].astype(np.float64))
        nats -= sum(scores[i, target] for i, target in enumerate(y))
    assert (len(ids) - 1) % 8           # the last window is shorter
    result = train.evaluate(model, val, batch_size)
    assert result["tokens"] == len(ids) - 1
    assert result["bytes"] == val.source_bytes
    assert result["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / val.source_bytes, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3])
def test_evaluate_slides_its_window(finished, stride):
    """Each target is scored by itself, in its window: 8 tokens, beginning at a multiple of the stride."""
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
    result = train.evaluate(model, val, 2, scores)
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
    before = to_host(model.weights.flat).copy(), to_host(model.weights.grad).copy()
    train.evaluate(model, val)
    np.testing.assert_array_equal(to_host(model.weights.flat), before[0])
    np.testing.assert_array_equal(to_host(model.weights.grad), before[1])


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
        expected = train.evaluate(NanoLLM.load(folder), dataset, 8, scores)
        assert set(expected) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}
        expected |= {f"top{k}_accuracy": scores.hits[k] / expected["tokens"] for k in (1, 5)}
        got = as_json(*flags)
        assert got.pop("tokens_per_second") > 0 and got == expected | {"seq_len": 8, "stride": stride}
        code, out, err = command(evaluate.main, folder, "--text", text, *flags)
        assert (code, err) == (0, "")
        for name, form, words in (
                ("loss", ".4f", " nats"), ("perplexity", ",.2f", "\n"), ("bits_per_byte", ".4f", "\n"),
                ("tokens", ",", " predicted"), ("bytes", ",", f" bytes, in windows of 8 tokens, stride {stride}\n")):
            assert f" {expected[name]:{form}}{words}" in out
        assert (f"the right token ranked first {100 * expected['top1_accuracy']:.2f} % of the time, in the top five "
                f"{100 * expected['top5_accuracy']:.2f} %\n") in out
        assert out.endswith(" tokens/s\n")
    short = as_json("--seq-len", 2, "--batch-size", 3)
    assert short["tokens"] == expected["tokens"] and short["loss"] != expected["loss"] and short["stride"] == 2
    code, out, err = command(evaluate.main, folder, "--text", text, "--seq-len", 9)
    assert (code, out) == (2, "") and "--seq-len 9" in err


def test_windows_are_as_long_as_in_training_and_otherwise_not_too_long(tmp_path):
    """A published model's longest context may be 40,960 tokens."""
    files = make_files(tmp_path)
    flags = [*SHAPE, *QUICK, *files, "--max-context", 32, "--seq-len", 12, "--max-steps", 1, "--artifact-dir"]
    assert train.main([*map(str, flags), "run"]) == 0
    NanoLLM(Config(290, 8, 1, 2, 2, 40960, 8)).save("long")
    make_tokenizer(Path("long/tokenizer.json"))
    NanoLLM(Config(290, 8, 1, 2, 2, 16, 8)).save("run/short")          # the other models of a run's folder are its own
    make_tokenizer(Path("run/short/tokenizer.json"))
    for folder, expected in ("run", 12), ("run/best", 12), ("run/checkpoint-1", 12), ("long", 512), ("run/short", 12):
        code, out, err = command(evaluate.main, folder, "--text", files[1])
        assert code == 0 and f"in windows of {expected} tokens, stride {expected}\n" in out, err
    Path("text.jsonl").write_text(json.dumps({"text": Path(files[1]).read_text("utf-8")}))
    code, out, err = command(quantize.main, "long", "small", "--text", "*.jsonl")
    assert (code, err) == (0, "") and "perplexity" in out
    edit_trainer(Path("run/checkpoint-1"), command={})
    assert usual_window("run", 10) == 10 and usual_window("run/best", 40960) == 512
