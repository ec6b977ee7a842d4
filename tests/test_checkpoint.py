"""A run's folder: a run killed at any moment continues exactly; a full, read-only or damaged disk is named."""
import contextlib
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import reference
from kinds import byte_fallback
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tiny import (
    QUICK,
    SHAPE,
    TIMINGS,
    Killed,
    assert_same,
    command,
    contents,
    edit_trainer,
    make_text,
    make_tokenizer,
    rows,
    snapshot,
    stop_at,
    with_sums,
)
from tokenizers import Tokenizer, processors

import data
import generate
import train
from console import cli, metrics
from hardware import device
from hardware.device import to_host
from nanollm import Config, NanoLLM, Parameters
from storage import checkpoint, tokens
from storage.checkpoint import State, checkpoints, read_trainer
from storage.files import InputError
from storage.huggingface import tokenizer_files
from storage.tokens import load_tokenizer
from train import Adam

pytestmark = pytest.mark.usefixtures("cheap")

ROOT = Path(train.__file__).parent
EPOCHS = "--num-epochs 3 --stride 8 --batch-size 17 --eval-every 4".split()        # an epoch has 7 steps and some


def resume(folder, *flags):
    return train.main(["--resume", "--artifact-dir", str(folder), *map(str, flags)])


# ---------------------------------------------------------------- exactly as if nothing had happened

@pytest.mark.parametrize("flags", [
    EPOCHS, [*EPOCHS, *"--batch-size 5 --grad-accum 3 --weight-decay 0.1".split()]], ids=["batches", "accumulated"])
def test_a_stopped_or_killed_run_continues_bit_for_bit(on_cpu, files, tmp_path, monkeypatch, flags):
    flags = [*files, *flags, "--max-steps", 20]
    seen, batch = [], data.TokenDataset.batch
    monkeypatch.setattr(data.TokenDataset, "batch", lambda self, *args: seen.append(args) or batch(self, *args))
    tiny.run(*flags, "--artifact-dir", "whole")
    expected, batches = contents(tmp_path / "whole"), seen.copy()
    for name, step, number, code in (("stopped", 10, signal.SIGTERM, 143), ("interrupted", 11, signal.SIGINT, 130),
                                     ("killed", 13, None, None)):
        seen.clear()
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            with contextlib.suppress(Killed):
                assert tiny.run(*flags, "--artifact-dir", name) == code
        last = checkpoints(tmp_path / name)[-1]
        assert last.name == f"checkpoint-{10 if number is None else step}"
        del seen[int(last.name[11:]) * (3 if "--grad-accum" in flags else 1):]      # not the repeated steps
        assert resume(tmp_path / name) == 0
        assert seen == batches
        got = contents(tmp_path / name)
        assert {path for path in got if "checkpoint-" not in path} == {p for p in expected if "checkpoint-" not in p}
        for path in expected:
            assert got.get(path, expected[path]) == expected[path], f"{name}: {path}"
        assert "checkpoint-20/optimizer.safetensors" in got


def test_it_continues_exactly_from_the_very_beginning_too(on_cpu, files, tmp_path, monkeypatch):
    """The run is killed before the first step, and again before each checkpoint."""
    tiny.run(*files, "--max-steps", 12, "--artifact-dir", "whole")
    for step in (1, 4, 5, 6, 9, 11):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            stop_at(patch, step, None)
            if step == 1:
                tiny.run(*files, "--max-steps", 12, "--artifact-dir", "run")
            resume(tmp_path / "run")
            raise AssertionError("it was not killed")
    assert resume(tmp_path / "run") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_seconds_and_steps_continue(halfway):
    assert read_trainer(halfway / "checkpoint-10")[0].seconds > 0
    edit_trainer(halfway / "checkpoint-10", seconds=1000.0)
    assert resume(halfway) == 0
    seconds = [float(row["seconds"]) for row in rows(halfway)]
    assert seconds == sorted(seconds) and seconds[-1] >= 1000
    assert read_trainer(halfway / "checkpoint-20")[0].seconds >= 1000
    assert [int(row["step"]) for row in rows(halfway)] == [1, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20]


def test_a_resumed_run_ends_with_the_epochs_of_the_whole_run(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert tiny.run(*files, *EPOCHS, "--artifact-dir", "run") == 143
    assert resume("run") == 0
    assert checkpoints("run")[-1].name == "checkpoint-21"
    assert float(rows(tmp_path / "run")[-1]["epoch"]) == pytest.approx(21 * 17 / 118, abs=1e-6)


def test_it_continues_in_and_from_another_folder(files, tmp_path, monkeypatch):
    """The text was named relative to where training began, and nothing in a run's folder names the folder."""
    stop_at(monkeypatch, 5)
    flags = "--text text.txt --tokenizer tokenizer.json --max-steps 7 --artifact-dir run".split()
    assert tiny.run(*flags) == 143
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume("../moved") == 0
    assert device.reason in json.loads(Path("../moved/checkpoint-7/trainer.json").read_text())["versions"]["device"]


def test_without_a_folder_the_last_run_continues(files, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2)
    for _ in range(2):
        assert tiny.run(*files, "--max-steps", 3) == 143
    (tmp_path / "runs/llm-old").mkdir()
    assert train.main(["--resume"]) == 0
    assert (tmp_path / "runs/llm-2/config.json").exists() and not (tmp_path / "runs/llm/config.json").exists()


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize(("number", "code"), [(number, 128 + number) for number in cli.SIGNALS], ids=str)
def test_a_signal_ends_training_after_the_running_step(files, tmp_path, monkeypatch, number, code):
    before = signal.getsignal(number)
    stop_at(monkeypatch, 7, number)
    got, out, _ = command(train.main, *SHAPE, *QUICK, *files, "--max-steps", 20, "--artifact-dir", "a b")
    assert got == code and checkpoints("a b")[-1].name == "checkpoint-7"
    assert out.endswith("stopped after step 7; continue with\n    python train.py --resume --artifact-dir 'a b'\n")
    assert not (tmp_path / "a b/config.json").exists()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("steps", [9, 4])           # it is the last thing that the shorter run does
def test_a_signal_cuts_an_evaluation_short_and_the_resumed_run_makes_it(on_cpu, files, tmp_path, monkeypatch, steps):
    flags = [*SHAPE, *QUICK, *files, "--max-steps", steps, "--eval-every", 4, "--save-every", 3, "--artifact-dir"]
    assert command(train.main, *flags, "whole")[0] == 0
    in_order, taken = data.TokenDataset.in_order, []

    def and_a_signal(self, batch_size):
        for batch in in_order(self, batch_size):
            taken.append(batch)
            if len(taken) in (2, 4):
                os.kill(os.getpid(), signal.SIGHUP)
            yield batch
    monkeypatch.setattr(data.TokenDataset, "in_order", and_a_signal)
    code, out, _ = command(train.main, *flags, "run")
    assert code == 129 and out.endswith("stopped after step 4; continue with\n"
                                        "    python train.py --resume --artifact-dir run\n")
    assert len(taken) == 2 and [row["step"] for row in rows(tmp_path / "run")] == ["1", "3"]
    assert checkpoints("run")[-1].name == "checkpoint-4" and not (tmp_path / "run/best").exists()
    assert resume("run") == 129 and len(taken) == 4         # again
    assert resume("run") == 0
    assert rows(tmp_path / "run", TIMINGS) == rows(tmp_path / "whole", TIMINGS)
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_before_the_first_step_or_after_the_last(files, tmp_path, monkeypatch):
    write = checkpoint.Run.write_checkpoint
    for step in (0, 2):
        def and_a_signal(self, model, optimizer, state, keep_last, step=step):
            write(self, model, optimizer, state, keep_last)
            if state.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Run, "write_checkpoint", and_a_signal)
            code = tiny.run(*files, "--max-steps", 2, "--artifact-dir", f"run{step}")
        assert checkpoints(f"run{step}")[-1].name == f"checkpoint-{step}"
        assert code == (143 if step == 0 else 0)
        assert resume(f"run{step}") == 0
        assert (tmp_path / f"run{step}/config.json").exists()


def test_a_signal_while_the_text_is_encoded(files, tmp_path, monkeypatch, cache_folder):
    for number, code, line in ((signal.SIGINT, 130, "train.py: interrupted\n"), (signal.SIGTERM, 143, ""),
                               (signal.SIGHUP, 129, "")):
        encode = tokens.encode_text

        def interrupted(*args, number=number, encode=encode):
            yield from encode(*args)
            os.kill(os.getpid(), number)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it
        try:
            with monkeypatch.context() as patch:
                patch.setattr(tokens, "encode_text", interrupted)
                got, _, err = command(train.main, *SHAPE, *QUICK, *files, "--artifact-dir", "run")
        finally:
            signal.signal(signal.SIGINT, before)
        assert (got, err) == (code, line)
        assert not (tmp_path / "run").exists() and not list(cache_folder.glob("*"))


# ---------------------------------------------------------------- what --resume refuses, and what it lets change

FIXED = {"embedding-dim": 32, "n-block": 1, "n-head": 4, "n-kv-head": 2, "max-context": 16, "hidden-dim": 8,
         "eps": 1e-3, "rope-theta": 5.0, "activation": "relu", "tie-embeddings": None, "head-dim": 4,
         "qk-norm": None, "seq-len": 4, "stride": 3,
         "val-fraction": 0.2, "seed": 1, "demo": None, "init-from": "best", "dtype": "float16"}


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_change_is_named(stopped, name):
    before = snapshot(stopped)
    flags = [f"--{name}"] if FIXED[name] is None else [f"--{name}", FIXED[name]]
    with pytest.raises(InputError, match=rf"^--resume: --{name} was .* and cannot become {FIXED[name] or True}$"):
        resume(stopped, *flags)
    assert snapshot(stopped) == before


def test_the_same_values_may_be_given_again(halfway):
    assert resume(halfway, *SHAPE, "--seq-len", 8, "--stride", 4, "--seed", 0, "--max-steps", 11) == 0


@pytest.mark.parametrize("name", ["text", "tokenizer"])
def test_another_text_or_tokenizer_is_refused(stopped, tmp_path, name, cache_folder):
    other = make_text(tmp_path / "other", seed=5) if name == "text" else make_tokenizer(tmp_path / "other", 280)
    before = snapshot(stopped)
    with pytest.raises(InputError, match=rf"other is not the {name} that this run began with.*--{name}"):
        resume(stopped, f"--{name}", other)
    assert snapshot(stopped) == before and not cache_folder.exists()


def test_the_tokenizer_is_what_it_is_however_it_was_written(halfway, tmp_path):
    """Truncation, padding and what inserts special tokens do not count, because training does not use them."""
    original = Path(json.loads((halfway / "checkpoint-10/trainer.json").read_text())["command"]["tokenizer"])
    other = Tokenizer.from_file(str(original))
    other.enable_truncation(3)
    other.enable_padding()
    other.post_processor = processors.TemplateProcessing("a $A", special_tokens=[("a", 1)])
    other.save(str(tmp_path / "other.json"))
    for flags in (["--tokenizer", "other.json"], ["--tokenizer", halfway / "checkpoint-10/tokenizer.json"], []):
        assert resume(halfway, *flags, "--max-steps", 11) == 0
        shutil.rmtree(halfway / "checkpoint-11")
    with pytest.raises(InputError, match=r"^gone\.json: there is no such file"):
        resume(halfway, "--tokenizer", "gone.json")


@pytest.mark.parametrize("change", ["gone", "another", "broken"])
def test_without_its_original_a_run_uses_its_own_copy_of_the_tokenizer(on_cpu, files, tmp_path, monkeypatch, change):
    """So does a run that was moved to another machine, where the text is in another place."""
    flags = [*files, "--max-steps", 7, "--artifact-dir"]
    tiny.run(*flags, "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert tiny.run(*flags, "run") == 143
    text, tokenizer = Path(files[1]), Path(files[3])
    if change == "gone":
        tokenizer.unlink()
    elif change == "another":
        make_tokenizer(tokenizer, 280)
    else:
        tokenizer.write_text("{")
    text.rename(tmp_path / "moved.txt")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    code, out, err = command(train.main, "--resume", "--artifact-dir", "elsewhere")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert re.search(r"--resume: .*text\.txt: there is no such file: .*; say with --text where", err)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert resume("elsewhere", "--text", "moved.txt", "--keep-last", 1) == 143      # checkpoint-4 goes, too
    assert resume("elsewhere") == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_text_may_have_moved_but_must_be_there(halfway, stopped, tmp_path):
    about = json.loads((halfway / "checkpoint-10/trainer.json").read_text())
    shutil.copy(about["command"]["text"], tmp_path / "moved.txt")
    assert resume(halfway, "--text", "moved.txt", "--max-steps", 11) == 0
    with pytest.raises(InputError, match=r"gone\.txt: there is no such file"):
        resume(halfway, "--text", "gone.txt", "--max-steps", 12)
    assert resume(halfway, "--max-steps", 12) == 0      # where it was last
    command = json.loads((halfway / "checkpoint-12/trainer.json").read_text())["command"]
    assert command["text"] == str(tmp_path / "moved.txt")


def test_what_may_change(halfway):
    changes = {"num-epochs": 2, "max-steps": 14, "learning-rate": 0.02, "lr-schedule": "constant", "warmup-steps": 0,
               "beta1": 0.5, "beta2": 0.9, "weight-decay": 0.1, "clip-norm": 0.5, "eval-every": 2,
               "save-every": 1, "log-every": 2, "sample-every": 9, "prompt": "a dog", "keep-last": 3, "patience": 50}
    code, out, err = command(train.main, "--resume", "--artifact-dir", halfway,
                             *(f"--{name}={value}" for name, value in changes.items()))
    assert (code, err) == (0, "") and "batch size" not in out
    assert [path.name for path in checkpoints(halfway)] == ["checkpoint-12", "checkpoint-13", "checkpoint-14"]
    saved = read_trainer(halfway / "checkpoint-14")[1]["command"]
    assert {name: saved[name.replace("-", "_")] for name in changes} == changes
    assert {float(row["learning_rate"]) for row in rows(halfway) if int(row["step"]) > 10} == {0.02}
    assert resume(halfway, "--max-steps", 16, "--lr-schedule", "cosine", "--min-lr", 0.003) == 0
    assert float(rows(halfway)[-1]["learning_rate"]) == pytest.approx(0.003)        # where the cosine ends


def test_a_later_end_that_raises_the_rate_is_told_with_the_way_to_keep_it(files, tmp_path, monkeypatch):
    tiny.run(*files, "--max-steps", 6, "--min-lr", 0.0012345, "--log-every", 1, "--artifact-dir", "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    later = ["--resume", "--max-steps", 1000, "--artifact-dir"]         # of them 10 warm up
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        _, out, err = command(train.main, *later, "run")
        line, = (line for line in out.splitlines() if "the cosine" in line)
        _, again, _ = command(train.main, *later, "copy", *line.partition("add ")[2].split())
    rates = [row["learning_rate"] for row in rows(tmp_path / "run")]
    assert err == "" and float(rates[5]) == 0.0012345 and "ends after step 1000 now, not 6" in line
    assert f"rises from 0.00123 to {float(rates[6]):.3g};" in line
    assert [row["learning_rate"] for row in rows(tmp_path / "copy")[6:]] == ["0.00123"] * 2 and "cosine" not in again
    for steps in (8, 9):
        assert "cosine" not in command(train.main, "--resume", "--max-steps", steps, "--artifact-dir", "run")[1]


def test_another_batch_size_continues_with_the_next_windows_and_a_note(halfway, monkeypatch):
    seen, batch = [], data.TokenDataset.batch
    monkeypatch.setattr(data.TokenDataset, "batch", lambda self, *args: seen.append(args) or batch(self, *args))
    code, out, _ = command(train.main, "--resume", "--artifact-dir", halfway, "--batch-size", 5, "--max-steps", 12)
    assert code == 0 and "the batch size has changed" in out
    assert seen == [(20, 5, 0), (25, 5, 0)]
    code, out, _ = command(train.main, "--resume", "--artifact-dir", halfway, "--batch-size", 1, "--grad-accum", 5,
                           "--max-steps", 13)
    assert code == 0 and "the batch size has changed" not in out


# ---------------------------------------------------------------- nothing to continue from, or nothing left to do

def test_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for flags, word in (([], "runs/llm"), (["--artifact-dir", "none"], "none"), (["--artifact-dir", "empty"], "empty"),
                        (["--artifact-dir", "file"], "file")):
        before = snapshot(tmp_path)
        code, out, err = command(train.main, "--resume", *flags)
        assert (code, out) == (2, "") and err.startswith("train.py: --resume: there is no ") and word in err
        assert err.count("\n") == 1 and snapshot(tmp_path) == before


def test_a_finished_run_says_so_and_stays_as_it_is(files, tmp_path):
    tiny.run(*files, "--max-steps", 6, "--artifact-dir", "run")
    before = snapshot(tmp_path / "run")
    code, out, err = command(train.main, "--resume", "--artifact-dir", "run")
    assert (code, err) == (0, "") and out.startswith("run has finished, after step 6; raise --num-epochs")
    assert snapshot(tmp_path / "run") == before
    assert resume("run", "--max-steps", 8) == 0
    tiny.run(*files, "--max-steps", 8, "--lr-schedule", "constant", "--artifact-dir", "whole")
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(tmp_path / "whole")]
    assert checkpoints("run")[-1].name == "checkpoint-8"


def test_a_run_killed_before_its_last_model_was_written_writes_it(files, tmp_path, monkeypatch):
    tiny.run(*files, "--max-steps", 6, "--artifact-dir", "run")
    with monkeypatch.context() as patch:
        save = NanoLLM.save

        def killed(self, folder, **settings):
            if Path(folder).name == "run":
                raise Killed
            save(self, folder, **settings)
        patch.setattr(NanoLLM, "save", killed)
        with contextlib.suppress(Killed):
            resume("run", "--max-steps", 8)
    assert checkpoints("run")[-1].name == "checkpoint-8"
    assert resume("run") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "run/checkpoint-8" / name).read_bytes()
    (tmp_path / "run/config.json").unlink()             # killed between the two files
    assert resume("run") == 0
    assert (tmp_path / "run/config.json").exists()


def test_a_run_is_never_overwritten(halfway, files):
    before = snapshot(halfway)
    code, out, err = command(train.main, *SHAPE, *QUICK, *files, "--artifact-dir", halfway)
    assert (code, out) == (2, "") and "already holds a run" in err
    assert "--resume" in err and "another --artifact-dir" in err
    assert err.count("\n") == 1 and snapshot(halfway) == before


def test_what_else_is_in_the_folder_stays(files, tmp_path):
    for name in ("notes.txt", ".hidden.1", ".best.nanollm", ".config", "checkpoint-x.txt", ".Metrics.csv.7"):
        (tmp_path / "run" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    (tmp_path / "run/checkpoint-x.txt").unlink()
    before = snapshot(tmp_path / "run")
    tiny.run(*files, "--max-steps", 6, "--artifact-dir", "run")
    after = snapshot(tmp_path / "run")
    assert {name: after.get(name) for name in before} == before


def test_two_at_once(halfway, files, tmp_path):
    """The lock belongs to the open folder, so this one process can play both."""
    with checkpoint.held(halfway):
        before = snapshot(halfway)
        with pytest.raises(InputError, match="another process is training in"):
            resume(halfway)
        assert snapshot(halfway) == before
    (tmp_path / "new").mkdir()
    with checkpoint.held(tmp_path / "new"), pytest.raises(InputError, match="another process is training in new"):
        tiny.run(*files, "--artifact-dir", "new")
    assert resume(halfway, "--max-steps", 11) == 0


# ---------------------------------------------------------------- which checkpoints stay

@pytest.mark.parametrize(("keep", "expected"), [(1, [11]), (2, [9, 11]), (100, [0, 3, 6, 9, 11])])
def test_the_last_checkpoints_are_kept(files, keep, expected):
    tiny.run(*files, "--max-steps", 11, "--save-every", 3, "--keep-last", keep, "--artifact-dir", "run")
    assert [path.name for path in checkpoints("run")] == [f"checkpoint-{step}" for step in expected]


def fake_evaluations(patch, losses):
    values = iter(losses)
    patch.setattr(train, "evaluate", lambda *_, **__: {"loss": next(values), "perplexity": 1.0, "bits_per_byte": 1.0})


def test_best_is_the_lowest_validation_loss_across_resumptions(files, tmp_path, monkeypatch):
    weights, step = {}, Adam.step

    def record(self, *args):
        step(self, *args)
        weights[int(self.t)] = to_host(self.weights.flat).copy()
    monkeypatch.setattr(Adam, "step", record)
    fake_evaluations(monkeypatch, [math.nan, 5.0, 3.0, 4.0, math.nan, 3.0, 2.0, 9.0])

    def best():
        return to_host(NanoLLM.load(tmp_path / "run/best").weights.flat)
    tiny.run(*files, "--max-steps", 8, "--eval-every", 2, "--log-every", 1, "--artifact-dir", "run")
    np.testing.assert_array_equal(best(), weights[6])       # of nan, 5, 3, 4
    state = read_trainer(tmp_path / "run/checkpoint-8")[0]
    assert (state.best_loss, state.without_better) == (3.0, 1)
    assert rows(tmp_path / "run")[1]["val_loss"] == ""      # nan is left out
    resume("run", "--max-steps", 12)                        # nan, 3.0
    np.testing.assert_array_equal(best(), weights[6])
    resume("run", "--max-steps", 16)                        # 2.0, 9.0
    np.testing.assert_array_equal(best(), weights[14])


def test_patience(files, tmp_path, monkeypatch):
    flags = (*SHAPE, *QUICK, *files, "--max-steps", 40, "--eval-every", 2, "--log-every", 100, "--artifact-dir", "run")
    fake_evaluations(monkeypatch, [5.0, 6.0, 4.0, 4.0, 4.5, 7.0, 3.0, 8.0, 8.0, 8.0, 8.0])
    code, out, _ = command(train.main, *flags, "--patience", 3)
    assert code == 0 and "run holds the model" in out
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "4", "6", "8", "10", "12"]
    assert rows(tmp_path / "run")[-1]["train_loss"] and rows(tmp_path / "run")[-1]["val_loss"]
    assert (tmp_path / "run/config.json").exists()
    assert "has finished" in command(train.main, "--resume", "--artifact-dir", "run")[1]
    assert resume("run", "--patience", 4) == 0
    assert [row["step"] for row in rows(tmp_path / "run")][-1] == "22"


# ---------------------------------------------------------------- crashes in the middle of a save

OPERATIONS = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "chmod")


def die_at(patch, call):
    """Let the process die at change number `call` of the disk, counted from 0; no later change happens either."""
    count = [0]

    def wrap(operation):
        def deadly(*args, **named):
            count[0] += 1
            if count[0] > call:
                raise Killed
            return operation(*args, **named)
        return deadly
    for name in OPERATIONS:
        patch.setattr(os, name, wrap(getattr(os, name)))
    return count


def little_run(folder, step, seed):
    """(Run, model, moments, State) of one step of a run in this folder; each step has its own weights."""
    model = NanoLLM(Config(290, 8, 1, 2, 2, 4, 4), seed)
    moments = {name: np.full(model.weights.flat.size, seed, np.float32) for name in ("m", "v")}
    files = tokenizer_files(load_tokenizer(folder.parent / "tokenizer.json"), {}, 4)
    run = checkpoint.Run(folder, files, {}, {"command": {}, "hashes": {}})
    return run, model, moments, State(step=step)


def weights(folder):
    return to_host(NanoLLM.load(folder).weights.flat).tolist()


def test_a_crash_at_any_moment_of_a_save_leaves_the_old_or_the_new(files, tmp_path, monkeypatch):
    begin = tmp_path / "begin"
    begin.mkdir()
    (begin / "metrics.csv").touch()
    for step in (1, 2):
        run, model, adam, state = little_run(begin, step, step)
        run.write_best(model)
        run.write_checkpoint(model, adam, state, 2)
    old, new = (to_host(little_run(begin, step, step)[1].weights.flat).tolist() for step in (2, 3))
    moments = []
    for call in range(1000):
        folder = shutil.copytree(begin, tmp_path / "run")
        run, model, adam, state = little_run(folder, 3, 3)
        with monkeypatch.context() as patch:
            die_at(patch, call)
            try:
                run.write_best(model)
                run.write_checkpoint(model, adam, state, 2)
                finished = True
            except Killed:
                finished = False
        moments.append(sorted(path.name for path in folder.iterdir()))
        for path in checkpoints(folder):                    # what has the name is complete
            checkpoint.check_sums(path)
        checkpoint.recover(folder)
        assert sorted(path.name for path in folder.glob(".*")) == []
        assert weights(folder / "best") in (old, new)
        names = [path.name for path in checkpoints(folder)]
        assert names[-1] in ("checkpoint-2", "checkpoint-3") and 2 <= len(names) <= 3
        newest = checkpoint.newest_checkpoint(folder)
        assert weights(newest) == (old if newest.name == "checkpoint-2" else new)
        shutil.rmtree(folder)
        if finished:
            break
    assert finished and call > 50
    left = [" ".join(names) for names in moments]       # by the process that died
    assert any(".best." in names and "best" not in names.split() for names in left)     # the narrowest place of all
    assert any(".checkpoint-3." in names for names in left)
    assert any(".checkpoint-1." in names and "checkpoint-1" not in names.split() for names in left)     # half removed


def test_a_run_that_crashed_at_any_moment_continues_exactly(on_cpu, files, tmp_path, monkeypatch):
    """The whole command dies at 12 moments between the first and the last change of the disk."""
    flags = [*files, "--max-steps", 7, "--eval-every", 2, "--save-every", 2, "--artifact-dir"]
    tiny.run(*flags, "first")       # the text is encoded once
    write, first = checkpoint.Run.write_checkpoint, []
    with monkeypatch.context() as patch:
        count = die_at(patch, math.inf)
        patch.setattr(checkpoint.Run, "write_checkpoint", lambda *args: write(*args) or first.append(count[0]))
        tiny.run(*flags, "whole")
    for call in np.linspace(3, count[0] - 1, 12).astype(int):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with monkeypatch.context() as patch:
            die_at(patch, call)
            with contextlib.suppress(Killed):
                tiny.run(*flags, "run")
        if checkpoints("run"):
            assert resume("run") == 0
            assert_same(tmp_path / "run", tmp_path / "whole")
        else:
            assert call < first[0]


def test_the_rows_of_a_checkpoint_are_on_the_disk_before_it(files, tmp_path, monkeypatch):
    events = []
    for module in (checkpoint, sys.modules["storage.files"]):
        monkeypatch.setattr(module, "sync", lambda path: events.append(Path(path).name))
    tiny.run(*files, "--max-steps", 3, "--artifact-dir", "run")
    events = [name for name in events if name in ("metrics.csv", "SHA256SUMS")]
    assert events == ["metrics.csv"] + ["metrics.csv", "SHA256SUMS"] * 2        # begun; then steps 0 and 3


# ---------------------------------------------------------------- disks that refuse

def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def read_only(path, *_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


REFUSALS = {
    "metrics": (metrics.csv.DictWriter, "writerow", no_space, "No space left on device"),
    "mkdir": (Path, "mkdir", read_only, "Read-only file system"),
    "moments": (checkpoint, "save_file", full_safetensors, "No space left on device"),
    "json": (Path, "write_text", no_space, "No space left on device"),
    "rename": (Path, "replace", read_only, "Read-only file system"),
    "sync": (os, "fsync", no_space, "No space left on device"),
}


@pytest.mark.parametrize("where", REFUSALS)
def test_a_disk_that_refuses(on_cpu, where, files, tmp_path, monkeypatch):
    owner, name, refuse, words = REFUSALS[where]
    flags = [*SHAPE, *QUICK, *files, "--max-steps", 13, "--eval-every", 4, "--artifact-dir"]
    train.main([*map(str, flags), "whole"])
    step = Adam.step

    def full(self, *args):
        step(self, *args)
        if self.t == 7:
            patch.setattr(owner, name, refuse)
    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", full)
        code, _, err = command(train.main, *flags, "run")
    assert code == 2 and err.count("\n") == 1 and err.startswith("train.py: cannot write ")
    assert words in err and "run/checkpoint-5 is complete" in err and ".nanollm" not in err
    assert "python train.py --resume --artifact-dir run" in err
    assert checkpoint.newest_checkpoint(tmp_path / "run").name == "checkpoint-5"
    assert resume("run") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_real_limit_on_the_size_of_files(files, tmp_path):
    """The kernel itself stops a process in the middle of a file."""
    resource = pytest.importorskip("resource")
    flags = [sys.executable, ROOT / "train.py", *SHAPE, *QUICK, *files, "--device", "cpu", "--artifact-dir", "run"]
    limit = 60_000                  # the weights have 53 kB, the moments 106
    done = subprocess.run(flags, capture_output=True, text=True, timeout=120, check=False,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train.py: cannot write run") and "File too large" in done.stderr
    assert "nothing was saved yet" in done.stderr and "step 0:" not in done.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]


# ---------------------------------------------------------------- numbers that are not finite

def poison(patch, steps, value=math.nan):
    """Give the gradients of these steps, counted from 1, one number that is not finite."""
    loss_and_norm, count = train.loss_and_norm, [0]

    def poisoned(model, *others):
        count[0] += 1
        if count[0] in steps:
            model.parameters()["model.layers.0.mlp.up_proj.weight"].grad[1, 2] = value
        return loss_and_norm(model, *others)
    patch.setattr(train, "loss_and_norm", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30], ids=str)
def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(files, tmp_path, monkeypatch, value):
    seen, step = {}, Adam.step

    def record(self, *args):
        step(self, *args)
        seen[int(self.t)] = to_host(self.weights.flat).copy()
    monkeypatch.setattr(Adam, "step", record)
    poison(monkeypatch, {2, 3, 6}, value)       # the square of 1e30 is infinite in float32
    code, out, err = command(train.main, *SHAPE, *QUICK, *files, "--max-steps", 6, "--log-every", 1,
                             "--artifact-dir", "run")
    assert (code, err) == (0, "")
    shown = [line for line in out.splitlines() if "skipped" in line]
    for line, step, count in zip(shown, (2, 3, 6), (1, 2, 3), strict=True):
        assert re.fullmatch(rf"step {step}: loss \d\.\d+, gradient norm (nan|inf): skipped, {count} so far", line)
    state = read_trainer(tmp_path / "run/checkpoint-6")[0]
    assert (state.skipped, state.skipped_in_a_row, state.updates, state.windows) == (3, 1, 3, 12)
    np.testing.assert_array_equal(to_host(NanoLLM.load("run").weights.flat), seen[3])
    table = rows(tmp_path / "run")
    assert [bool(row["train_loss"]) for row in table] == [True, False, False, True, True, False]
    assert [bool(row["grad_norm"]) for row in table] == [True, False, False, True, True, False]
    assert table[-1]["val_loss"]


def test_ten_in_a_row_end_with_a_diagnosis(files, tmp_path, monkeypatch):
    poison(monkeypatch, {3, *range(7, 40)})
    code, out, err = command(train.main, *SHAPE, *QUICK, *files, "--log-every", 1, "--artifact-dir", "run")
    assert code == 2 and err.count("\n") == 1 and out.count("skipped") == 11
    for words in ("10 steps in a row", "gradient of model.layers.0.mlp.up_proj.weight", "--learning-rate", "--resume"):
        assert words in err
    assert checkpoint.newest_checkpoint("run").name == "checkpoint-15"
    assert weights("run/checkpoint-15") == weights("run/checkpoint-10")


def test_a_resumed_run_counts_on(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(4, 50))
        assert tiny.run(*files, "--max-steps", 9, "--artifact-dir", "run") == 0
    assert read_trainer(tmp_path / "run/checkpoint-9")[0].skipped_in_a_row == 6
    poison(monkeypatch, range(50))
    with pytest.raises(InputError, match="10 steps in a row"):
        resume("run", "--max-steps", 13)


# ---------------------------------------------------------------- damage

FILES = ("SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "optimizer.safetensors",
         "tokenizer.json", "tokenizer_config.json", "trainer.json")


def test_a_checkpoint_has_these_files(stopped, tmp_path):
    assert sorted(path.name for path in (stopped / "checkpoint-10").iterdir()) == sorted(FILES)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=stopped / "checkpoint-10",
                       check=True)
    (tmp_path / "usual").touch()
    for path in stopped.rglob("*"):
        if path.is_file():          # as readable as any other file
            assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode, path


CHANGES = {"empty": lambda old: b"", "cut short": lambda old: old[:len(old) // 2], "longer": lambda old: old + b"\n",
           "flipped": lambda old: old[:len(old) // 2] + bytes([old[len(old) // 2] ^ 1]) + old[len(old) // 2 + 1:]}


def damage(path, how):
    moved = path.rename(path.parents[2] / "elsewhere")
    if how in CHANGES:
        path.write_bytes(CHANGES[how](moved.read_bytes()))
    elif how == "link":
        path.symlink_to("../../elsewhere")
    elif how == "folder":
        path.mkdir()


@pytest.mark.parametrize("how", ["missing", *CHANGES, "link", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_way_back_too(halfway, name, how):
    damage(halfway / "checkpoint-10" / name, how)
    before = snapshot(halfway)
    code, out, err = command(train.main, "--resume", "--artifact-dir", halfway)
    if how == "link":
        assert code == 0            # the hashes are right, even behind a link
        return
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("train.py: --resume: ")
    assert "checkpoint-10/" in err if name == "SHA256SUMS" else f"checkpoint-10/{name}" in err
    assert f"to continue from {halfway}/checkpoint-5, move {halfway}/checkpoint-10 away" in err
    assert snapshot(halfway) == before


def test_the_older_checkpoint_is_a_way_on(on_cpu, files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        tiny.run(*files, "--max-steps", 20, "--eval-every", 4, "--artifact-dir", "run")
    run, whole = tmp_path / "run", Path(shutil.copytree(tmp_path / "run", tmp_path / "whole"))
    damage(run / "checkpoint-10/model.safetensors", "flipped")
    (run / "checkpoint-10").rename(tmp_path / "away")
    assert resume(run) == resume(whole) == 0
    assert_same(run, whole)
    for path in checkpoints(run):
        damage(path / "model.safetensors", "flipped")
    shutil.rmtree(checkpoints(run)[0])
    with pytest.raises(InputError, match="no older checkpoint is left"):
        resume(run, "--max-steps", 30)


def refused(halfway, name):
    """What --resume says about a wrong file with a right hash."""
    with_sums(halfway / "checkpoint-10")
    before = snapshot(halfway)
    code, out, err = command(train.main, "--resume", "--artifact-dir", halfway)
    assert (code, out) == (2, "") and err.count("\n") == 1 and f"checkpoint-10/{name}" in err, err
    assert snapshot(halfway) == before
    return err


@pytest.mark.parametrize("change", [
    {"step": -1}, {"step": 2.5}, {"step": "10"}, {"step": None}, {"step": True}, {"windows": math.inf}, {"windows": []},
    {"epoch": math.nan}, {"loss_sum": -math.inf}, {"loss_sum": 1}, {"best_loss": "low"}, {"best_loss": math.nan},
    {"updates": -3}, {"seconds": {}}, {"command": None}, {"command": []}, {"hashes": "x"}])
def test_a_wrong_value_in_trainer_json_is_named(halfway, change):
    edit_trainer(halfway / "checkpoint-10", **change)
    assert next(iter(change)) in refused(halfway, "trainer.json")


@pytest.mark.parametrize("change", [
    {"batch_size": 0}, {"batch_size": "many"}, {"batch_size": [1]}, {"learning_rate": -1}, {"learning_rate": "nan"},
    {"activation": "tanh"}, {"nonsense": 3}, {"n_head": 2.5}, {"tie_embeddings": 1}, {"log_every": True},
    {"prompt": "\ud800"}])
def test_a_wrong_value_in_its_command_is_named(halfway, change):
    command = read_trainer(halfway / "checkpoint-10")[1]["command"]
    edit_trainer(halfway / "checkpoint-10", command=command | change)
    assert next(iter(change)).replace("_", "-") in refused(halfway, "trainer.json: command: ")


def test_missing_values_and_other_json_are_refused(halfway):
    path = halfway / "checkpoint-10/trainer.json"
    about = json.loads(path.read_text())
    for field in fields(State)[:-1]:                # older checkpoints lack the last
        path.write_text(json.dumps({name: value for name, value in about.items() if name != field.name}))
        assert field.name in refused(halfway, "trainer.json")
    for content in (b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000):
        path.write_bytes(content)
        refused(halfway, "trainer.json")


def moments_of(halfway):
    path = halfway / "checkpoint-10/optimizer.safetensors"
    return path, load_file(path)


WRONG = {
    "shape": lambda m: {"m": m["m"][:-1], "v": m["v"]},
    "dimensions": lambda m: {"m": m["m"][None], "v": m["v"]},
    "half": lambda m: {"m": m["m"].astype(np.float16), "v": m["v"]},
    "double": lambda m: {"m": m["m"], "v": m["v"].astype(np.float64)},
    "whole": lambda m: {"m": m["m"].astype(np.int32), "v": m["v"]},
    "one only": lambda m: {"m": m["m"]},
    "nan": lambda m: {"m": np.where(np.arange(m["m"].size) == 7, np.float32(np.nan), m["m"]), "v": m["v"]},
    "infinite": lambda m: {"m": m["m"], "v": np.full_like(m["v"], np.inf)},
    "negative": lambda m: {"m": m["m"], "v": m["v"] - 1},
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_moments_are_refused(halfway, how):
    path, moments = moments_of(halfway)
    save_file(WRONG[how](moments), path)
    refused(halfway, "optimizer.safetensors")


def test_of_the_moments_one_is_read_at_a_time(tmp_path):
    """So that a run which just fits in memory also resumes."""
    optimizer = Adam(SimpleNamespace(weights=Parameters({"w": (1 << 19,)})))
    moments = {name: np.arange(1 << 19, dtype=np.float32) + shift for name, shift in (("m", -9), ("v", 0))}
    save_file(moments, tmp_path / "optimizer.safetensors")
    tracemalloc.start()
    checkpoint.read_moments(tmp_path, optimizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (to_host(optimizer.m) == moments["m"]).all() and (to_host(optimizer.v) == moments["v"]).all()
    assert peak < 1.1 * moments["m"].nbytes


@pytest.mark.parametrize("content", [
    b"", b"\0" * 8, b"\xff" * 8, (10**13).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}",
    (66).to_bytes(8, "little") + b'{"m":{"dtype":"F32","shape":[9000000000000],"data_offsets":[0,9]}}'])
def test_headers_that_lie_are_refused(halfway, content):
    moments_of(halfway)[0].write_bytes(content)
    refused(halfway, "optimizer.safetensors")


# ---------------------------------------------------------------- other people's tools, other people's models

@pytest.fixture(scope="module")
def transformers():
    return reference("transformers")


@pytest.fixture
def llama(tmp_path):
    """A Llama-type folder made elsewhere, whose texts begin with <s>."""
    folder = tmp_path / "llama"
    tokenizer = byte_fallback("theca", ("▁ t", "h e", "▁t he", "▁ c", "a t", "▁c at"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    config = Config(271, 16, 1, 2, 1, 8, 24, eps=1e-5, tie_embeddings=True)
    NanoLLM(config, seed=5).save(folder, bos_token_id=1, eos_token_id=2)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 5]}')
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def assert_transformers_agrees(transformers, folder, text):
    import torch
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, ours, ends = generate.open_model(folder)
    ids = ours.encode(text, add_special_tokens=False).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer(text)["input_ids"] == ends.front + ids
    assert tokenizer.decode(ids) == ours.decode(ids)
    ids = np.array([ids[:model.config.max_context]])
    with torch.no_grad():
        np.testing.assert_allclose(to_host(model(ids).data), theirs(torch.tensor(ids)).logits.numpy(), atol=1e-4)
    prompt = ids[:, :3]
    expected = theirs.generate(torch.tensor(prompt), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert list(model.generate(prompt[0], 5, temperature=0)) == expected
    return tokenizer


def test_a_finished_folder_opens_in_transformers(transformers, files, tmp_path):
    """Its best model opens too."""
    tiny.run(*files, "--max-steps", 6, "--learning-rate", 0.05, "--artifact-dir", "run")
    for folder in ("run", "run/best"):
        tokenizer = assert_transformers_agrees(transformers, tmp_path / folder, "the cat 却说 👍 ran , on it .\n")
        assert tokenizer.model_max_length == 8 and tokenizer.bos_token is None and tokenizer.eos_token is None
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0       # versions 4 and 5
    generation = json.loads((tmp_path / "run/generation_config.json").read_text())
    assert generation == {"bos_token_id": None, "eos_token_id": None}


def test_training_starts_from_a_folder_made_elsewhere(transformers, llama, files, tmp_path):
    """It takes the folder's weights, shape and tokenizer, and the new model keeps its BOS."""
    flags = [*QUICK, "--text", files[1], "--init-from", str(llama), "--max-steps", 12, "--log-every", 1]
    code, _, err = command(train.main, *flags, "--learning-rate", 1e-9, "--artifact-dir", "same")
    assert (code, err) == (0, "")
    np.testing.assert_allclose(weights("same"), weights(llama), atol=1e-7)
    assert NanoLLM.load("same").config == NanoLLM.load(llama).config
    code, _, err = command(train.main, *flags, "--artifact-dir", "run")
    assert (code, err) == (0, "")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert generate.open_model("run")[2] == ([1], [1], [2, 5])
    tokenizer = assert_transformers_agrees(transformers, tmp_path / "run", "the cat at the 却")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert float(rows(tmp_path / "run")[-1]["train_loss"]) < float(rows(tmp_path / "run")[0]["train_loss"]) - 0.2
    assert resume("run", "--max-steps", 13) == 0
    assert resume("run", "--init-from", "llama", "--max-steps", 14) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["bos_token_id"] == 1
    assert generate.open_model("run")[2] == ([1], [1], [2, 5])


@pytest.mark.parametrize("fields", [{"qkv_bias": True}, {"qk_norm": True, "head_dim": 6},
                                    {"rope_scaling": (8.0, 0.2, 2.0, 32), "tie_embeddings": True}])
def test_other_families_are_tuned_and_resumed(files, fields):
    """Without a --seq-len a window has 512 tokens at most, however long the model's context is."""
    model = NanoLLM(Config(290, 16, 2, 2, 1, 600, 24, **fields))
    model.save("model")
    shutil.copy(files[3], "model")
    flags = [*QUICK, "--text", files[1], "--init-from", "model", "--val-fraction", "0", "--batch-size", "1",
             "--artifact-dir"]
    assert train.main([*flags, "run", "--max-steps", "2"]) == resume("run", "--max-steps", 3) == 0
    assert NanoLLM.load("run").config == model.config
    assert read_trainer(Path("run/checkpoint-3"))[1]["command"]["seq_len"] == 512
    assert train.main([*flags, "told", "--max-steps", "1", "--seq-len", "600"]) == 0
    code, _, err = command(train.main, *flags, "wide", "--head-dim", 10)
    assert code == 2 and f"--head-dim is 10, but the model in model has {model.config.head_dim}" in err


def test_heads_are_normalised_and_as_wide_as_flags_say(files, tmp_path):
    assert tiny.run(*files, "--max-steps", 2, "--qk-norm", "--head-dim", 6, "--artifact-dir", "run") == 0
    assert resume("run", "--max-steps", 3) == 0
    config = NanoLLM.load("run").config
    assert (config.qk_norm, config.head_dim, config.embedding_dim, config.n_head) == (True, 6, 16, 2)
    assert json.loads((tmp_path / "run/config.json").read_text())["model_type"] == "qwen3"


def test_text_trained_on_has_no_bos_inserted(llama, files, tmp_path, monkeypatch):
    seen, batch = [], data.TokenDataset.batch
    monkeypatch.setattr(data.TokenDataset, "batch", lambda self, *args: seen.append(batch(self, *args)) or seen[-1])
    train.main([*QUICK, "--text", files[1], "--init-from", str(llama), "--max-steps", "3", "--artifact-dir", "run"])
    assert not any((x == 1).any() for x, _ in seen)


@pytest.mark.parametrize(("flags", "words"), [
    (["--n-head", "8"], "--n-head is 8, but the model in .*llama has 2"),       # though 8 is the default of a new model
    (["--embedding-dim", "512"], "--embedding-dim is 512"), (["--rope-theta", "1e6"], "--rope-theta"),
    (["--tie-embeddings"], None), (["--hidden-dim", "24"], None)])
def test_a_shape_other_than_the_folder_s_is_refused(llama, files, flags, words):
    flags = [*QUICK, "--text", files[1], "--init-from", str(llama), "--max-steps", "1", "--artifact-dir", "run", *flags]
    if words is None:
        assert train.main(flags) == 0
    else:
        with pytest.raises(InputError, match=words):
            train.main(flags)
        assert not Path("run").exists()


def test_another_vocabulary_is_refused(llama, files, tmp_path):
    flags = [*QUICK, "--text", files[1], "--init-from", str(llama), "--max-steps", "1", "--artifact-dir", "run"]
    smaller = make_tokenizer(tmp_path / "smaller.json", 260)
    for other in (files[3], str(smaller)):
        with pytest.raises(InputError, match=re.escape(other) + ".*vocabulary.*its own tokenizer"):
            train.main([*flags, "--tokenizer", other])
    shutil.copy(llama / "tokenizer.json", tmp_path / "copy.json")
    assert train.main([*flags, "--tokenizer", "copy.json"]) == 0
    (llama / "tokenizer.json").unlink()
    flags[-1] = "run2"
    with pytest.raises(InputError, match=r"llama/tokenizer\.json"):
        train.main(flags)
    with pytest.raises(InputError, match=r"smaller\.json.*vocabulary"):
        train.main([*flags, "--tokenizer", str(smaller)])
    assert train.main([*flags, "--tokenizer", "copy.json"]) == 0
