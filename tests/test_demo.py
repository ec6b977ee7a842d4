"""The demo: its settings and its text."""
from pathlib import Path

import pytest
from tiny import QUICK, SHAPE, make_files, stop_at

import train
from console import demo, options
from storage.checkpoint import read_trainer

pytestmark = pytest.mark.usefixtures("cheap")


# ---------------------------------------------------------------- what a run shows and writes

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


# ---------------------------------------------------------------- other people's tools, other people's models

def test_the_demo_goes_on_too(tmp_path, monkeypatch):
    """--resume with --demo or without is the same; where the run is no demo it is refused (see above)."""
    files = make_files(tmp_path)
    monkeypatch.setattr(options.demo, "files", lambda: (files[1], files[3]))
    flags = [*SHAPE, *QUICK, "--max-steps", "4", "--eval-every", "50", "--sample-every", "100"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train.main(["--demo", *flags]) == 143
    assert train.main(["--resume", "--demo", "--max-steps", "3"]) == 0
    assert train.main(["--resume"]) == 0
    args = read_trainer(Path("runs/llm/checkpoint-3"))[1]["command"]
    assert args["demo"] is True and args["tie_embeddings"] is True and args["beta2"] == 0.99
