"""The flags of training: each number's range, the help, and that each reaches what it is named for."""
import json
import re
from dataclasses import fields

import pytest
import tiny
from tiny import GOOD, check, command, edit_trainer, snapshot

import evaluate
import generate
import train
from console import options
from console.options import Settings
from hardware import device
from nanollm import Config, NanoLLM
from storage.checkpoint import read_trainer
from train import Adam

pytestmark = pytest.mark.usefixtures("cheap")

WHOLE = ("embedding-dim n-block n-head n-kv-head max-context hidden-dim head-dim seq-len stride num-epochs max-steps "
         "batch-size grad-accum eval-every save-every keep-last log-every sample-every patience").split()
WRONG = {name: ["0", "-1", "1.5", "x", "", "nan", "1e3", "10000000000"] for name in WHOLE}
WRONG |= {name: ["-1", "1.5", "x", "", "nan", "inf"] for name in ("seed", "warmup-steps")}
WRONG |= {name: ["0", "-1", "x", "", "nan", "inf", "1e999"] for name in ("learning-rate", "eps", "rope-theta")}
WRONG |= {name: ["-0.1", "1", "2", "x", "", "nan", "inf"] for name in ("beta1", "beta2", "val-fraction", "dropout")}
WRONG |= {name: ["-1", "x", "", "nan", "inf"] for name in ("min-lr", "weight-decay", "clip-norm")}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_out_of_range(name, tmp_path):
    for value in WRONG[name]:
        outcome = command(train.main, *GOOD, f"--{name}={value}")
        check(outcome, f"--{name}: must be a (whole )?number (of at least|above) [01]", re.escape(f"not '{value}'"))
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("flags", [[], ["--tokenizer", "tokenizer.json"]])
def test_a_text_is_needed(flags, tmp_path):
    check(command(train.main, *flags), "--text FILE is needed", "--demo")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("name", ["text", "tokenizer", "init-from", "artifact-dir"])
def test_a_name_that_is_empty_is_none(name, tmp_path):
    """A script's variable that was not set must not be read as the current folder, or as no flag at all."""
    check(command(train.main, *GOOD, f"--{name}", ""), f"--{name}: must not be empty")
    assert snapshot(tmp_path) == {}


def test_help_tells_every_flag_and_its_default(capsys):
    for main in (train.main, generate.main, evaluate.main):
        with pytest.raises(SystemExit) as end:
            main(["--help"])
        assert end.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "(None)" not in text and "%" not in text.replace("1 % of", "")
    text = " ".join(options.command_line().format_help().split())
    for field in fields(Settings):
        told = re.search(rf" {options.flag(field.name)} [^-].*?(?= --|$)", text)[0]
        assert (f"({field.default})" in told) == (field.default is not None and field.default is not False)
    for flag in ("--artifact-dir", "--resume", "--processes", "--device"):
        assert f" {flag} " in text


def test_the_original_s_defaults_stay():
    settings = options.read_flags(["--text", "text.txt"], options.command_line()).settings
    original = {"embedding_dim": 512, "n_block": 6, "n_head": 8, "max_context": 512, "hidden_dim": 2048, "eps": 1e-6,
                "seq_len": 512, "stride": 256, "num_epochs": 10, "batch_size": 4, "learning_rate": 1e-4}
    assert {name: getattr(settings, name) for name in original} == original


def test_a_flag_without_effect_is_refused_only_where_it_is_typed(files, tmp_path):
    """Runs that began before this was refused continue."""
    tiny.run(*files, "--max-steps", 1, "--val-fraction", 0, "--lr-schedule", "constant", "--artifact-dir", "run")
    command_ = read_trainer(tmp_path / "run/checkpoint-1")[1]["command"]
    edit_trainer(tmp_path / "run/checkpoint-1", command=command_ | {"patience": 2, "min_lr": 1e-4})
    resume = ["--resume", "--artifact-dir", "run", "--max-steps", 2]
    check(command(train.main, *resume, "--patience", 2), "--patience needs a validation part")
    check(command(train.main, *resume, "--min-lr", 1e-4), "--min-lr has no effect with --lr-schedule constant")
    assert command(train.main, *resume)[::2] == (0, "")


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


def test_tf32_reaches_the_device_and_is_kept_by_a_resumed_run(files, monkeypatch):
    monkeypatch.setattr(device, "tf32_products", False)
    tiny.run(*files, "--max-steps", 1, "--tf32", "--artifact-dir", "run")
    assert device.tf32_products
    tiny.run(*files, "--max-steps", 1, "--artifact-dir", "other")
    assert not device.tf32_products
    train.main(["--resume", "--max-steps", "2", "--artifact-dir", "run"])
    assert device.tf32_products


@pytest.mark.parametrize("size", options.SIZES)
def test_a_size_sets_defaults_and_what_is_typed_wins(size):
    typed = {"text": ["text.txt"], "size": size}
    settings = options.Settings(**(options.defaults(typed) | typed)).complete()
    assert options.SIZES[size].items() <= vars(settings).items()
    words = ["--text", "text.txt", "--size", size, "--n-block", "1", "--learning-rate", "0.5"]
    settings = options.read_flags(words, options.command_line()).settings
    assert (settings.n_block, settings.learning_rate, settings.size) == (1, 0.5, size)
    assert settings.hidden_dim == options.SIZES[size].get("hidden_dim", options.Settings().hidden_dim)


@pytest.mark.parametrize("flags", ["--demo", "--init-from run"])
def test_a_size_next_to_what_brings_its_own_is_refused(flags):
    check(command(train.main, *flags.split(), "--size", "tiny"), "leave out --size")
