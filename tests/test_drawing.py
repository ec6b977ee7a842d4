"""No picture depends on the user's settings for Matplotlib, and none is a reason to lose a run."""
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import tiny
from tiny import QUICK, SHAPE, command

import evaluate
import train
from console import drawing, metrics, progress
from nanollm import Config, NanoLLM

ROOT = Path(train.__file__).parent
draw_loss = metrics.draw_loss       # the real one


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(drawing, "_failed", set())


@pytest.fixture
def folder(tmp_path):
    """With a metrics.csv to draw."""
    metrics.rewind(tmp_path / "metrics.csv", 0)
    for step in (1, 2):
        metrics.append(tmp_path / "metrics.csv", {"step": step, "train_loss": 3 / step, "val_loss": 2.0})
    return tmp_path


def test_settings_with_which_matplotlib_cannot_be_imported(folder):
    """They are what notebooks set for each command, and a matplotlibrc in the current folder, which counts first."""
    (folder / "matplotlibrc").write_bytes(b"\xff")
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from console import drawing, metrics
before = os.environ["MPLBACKEND"], os.getcwd()
metrics.draw_loss(Path())
assert before == (os.environ["MPLBACKEND"], os.getcwd())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False,
                          env=os.environ | {"MPLBACKEND": "module://of_a_notebook"})
    assert done.returncode == 0, done.stderr
    theirs = (folder / "loss.png").read_bytes()
    draw_loss(folder)
    assert theirs == (folder / "loss.png").read_bytes()


def test_settings_of_the_user_count_before_and_after_but_not_in_the_picture(folder):
    draw_loss(folder)
    expected = (folder / "loss.png").read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        draw_loss(folder)
        assert dict(matplotlib.rcParams) == before
    assert (folder / "loss.png").read_bytes() == expected


def test_training_ends_without_its_picture_and_warns_once(files, tmp_path, monkeypatch):
    """The last attempt comes when the model is there."""
    tiny.make_cheap(monkeypatch)
    monkeypatch.chdir(tmp_path)
    had, now = [], [0]

    def fail(folder):
        had.append((folder / "config.json").exists())
        raise OSError("no\nfont")
    monkeypatch.setattr(metrics, "draw_loss", fail)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.append(now[-1] + 1) or now[-1])
    code, out, err = command(train.main, *SHAPE, *QUICK, *files, "--max-steps", 12, "--log-every", 1,
                             "--artifact-dir", "run")
    assert (code, err) == (0, "train.py: warning: run/loss.png was not drawn: no font\n")
    assert "run holds the model" in out
    assert len(had) > 3 and had == [False] * (len(had) - 1) + [True]


def test_an_evaluation_ends_without_its_figure(files, tmp_path, monkeypatch):
    NanoLLM(Config(290, 16, 1, 2, 2, 8, 24)).save(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)            # it is not installed
    monkeypatch.chdir(tmp_path)
    code, out, err = command(evaluate.main, ".", *files[:2], "--figure", "a.png", name="evaluate.py")
    assert code == 0 and "bits per byte" in out and not Path("a.png").exists()
    assert err.startswith("evaluate.py: warning: a.png was not drawn: ") and err.count("\n") == 1
