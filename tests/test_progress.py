"""The progress of a run, on a terminal and in plain lines."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from tiny import rows

import train
from console import metrics, progress

pytestmark = pytest.mark.usefixtures("cheap")


def test_progress_in_plain_lines(finished):
    lines = [line for line in finished[2].splitlines() if re.match(r"step \d+/21 ", line)]
    assert len(lines) == len(rows(finished[0]))
    for line in lines:
        assert re.fullmatch(r"step \d+/21  loss \d+\.\d{4}  ppl [\d,]+\.\d  lr \d\.\de-\d+  \|g\| \d+\.\d\d  "
                            r"[\d,]+ tok/s  [\d,]+\.\d GFLOP/s  [\d:]+ left", line)


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.Progress(10, 1000, step=4, seconds=60.0) as bar:
        bar.advance(100)
        bar.show(5, 2.0, 1e-3, 0.5)
        assert 60 <= bar.seconds < 70 and bar.speed > 0
    out, err = capsys.readouterr()
    assert out == "" and "5/10" in err and "loss 2.0000  ppl 7.4  lr 1.0e-03  |g| 0.50" in err


def test_a_closed_pipe_does_not_end_a_run():
    """`python train.py … | head`: what nobody reads is silently dropped."""
    code = "from console.progress import say\nfor i in range(1000): say('x' * 1000)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=Path(train.__file__).parent) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_the_loss_is_drawn_during_training(files, monkeypatch):
    drawn, now = [], [0]
    monkeypatch.setattr(metrics, "draw_loss", lambda folder: drawn.append(rows(folder)[-1]["step"]))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.append(now[-1] + 1) or now[-1])
    tiny.run(*files, "--max-steps", 12, "--log-every", 1)
    assert len(drawn) > 3 and drawn[-1] == "12"             # every 15 s of this clock, and at the end
    drawn.clear()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    tiny.run(*files, "--max-steps", 12, "--val-fraction", 0, "--log-every", 1)
    assert drawn == ["12"]
