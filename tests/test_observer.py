"""What follows a step: the first line, the rows of metrics.csv, evaluations, samples."""
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from tiny import QUICK, SHAPE, command, rows

import train
from console import metrics
from console.observer import Observer
from data import TokenDataset
from hardware import device
from nanollm import Config, NanoLLM

pytestmark = pytest.mark.usefixtures("cheap")


def test_the_first_loss_is_shown_next_to_ln_V_and_the_unigram_entropy(finished):
    _, files, out = finished
    line = next(line for line in out.splitlines() if line.startswith("step 0:"))
    loss, ln_v, entropy = map(float, re.findall(r"\d+\.\d+", line))
    train_set, _ = TokenDataset.from_text(files[1], files[3], 8, 8).split(0.1)
    model = NanoLLM(Config(290, 16, 2, 2, 1, 8, 24))
    assert loss == pytest.approx(float(model.loss(*train_set.batch(0, 17, 0)).data), abs=6e-4)
    assert ln_v == pytest.approx(math.log(290), abs=6e-4) and "290" in line
    assert entropy == pytest.approx(metrics.unigram_entropy(train_set), abs=6e-4)


class Windows(list):
    seq_len, tokens, file = 4, range(9), SimpleNamespace(text="text.txt")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_on_a_gpu_the_compilation_of_the_first_step_is_announced(on_gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(device, "on_gpu", on_gpu)
    settings = SimpleNamespace(windows_per_step=lambda: 2, seq_len=4, text="text.txt", max_steps=3)
    run = SimpleNamespace(folder=tmp_path)
    observer = Observer(run, settings, Windows(), None, None)
    observer.begin(NanoLLM(Config(9, 4, 1, 1, 1, 4, 4)), SimpleNamespace(step=0), None)
    assert ("compile its kernels" in capsys.readouterr().out) is on_gpu


def test_the_last_line_has_a_prompt_that_the_tokenizer_knows(finished, files, capsys):
    assert finished[2].endswith("--prompt 'the cat'\n")
    chinese = "却说孙悟空一个筋斗云。"
    for text, words in (f"\n{chinese}", f"{chinese} {chinese} {chinese[:6]}"), ("\nthe cat\n's mat", "the cat 's mat"):
        Path("text.txt").write_text(text * 90, encoding="utf-8")
        tiny.run(*files, "--max-steps", 1)
        assert capsys.readouterr().out.endswith(f" --prompt {shlex.quote(words)}\n")


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


def test_samples_are_shown_at_evaluations_or_as_often_as_asked(finished, files):
    samples = re.findall("^sample: (.*)$", finished[2], re.MULTILINE)
    assert len(samples) == 2 and all(sample[1:].startswith("the cat") for sample in samples)      # steps 8 and 16
    code, out, _ = command(train.main, *SHAPE, *files, "--max-steps", 6, "--eval-every", 2)
    assert code == 0 and len(re.findall("^sample: ", out, re.MULTILINE)) == 3


def test_no_validation_part(files, tmp_path):
    code, out, err = command(train.main, *SHAPE, *QUICK, *files, "--val-fraction", 0, "--max-steps", 20, "--stride", 8,
                             "--batch-size", 16, "--artifact-dir", "run")
    assert (code, err) == (0, "")
    assert all(not row["val_loss"] and row["train_loss"] for row in rows(tmp_path / "run"))
    assert not (tmp_path / "run/best").exists()
    assert len([line for line in out.splitlines() if line.startswith("epoch ")]) == 3       # steps 9, 17 and 20
    assert "validation loss" not in out and ", no validation text\n" in out
