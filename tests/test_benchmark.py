"""benchmarks/speed.py on its smallest configuration: both sides compute the same, and the report is complete."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import only_ci
from safetensors.numpy import save_file

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(*options):
    return subprocess.run([sys.executable, BENCHMARKS / "speed.py", "--config", "tiny", "--rounds", "1", *options],
                          capture_output=True, text=True, timeout=300)


@only_ci("half a minute")
def test_both_sides_agree_and_everything_is_reported(tmp_path):
    file = tmp_path / "speed.json"
    done = run("--megabytes", "0.01", "--threads", "2", "--processes", "2", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())

    header = result["header"]
    assert {"date", "commit", "command", "cpu", "threads", "seed", "versions", "gemm_flops_per_second"} <= header.keys()
    assert header["threads"] == 2 and {"numpy", "torch"} == header["gemm_flops_per_second"].keys()

    rows = result["rows"]
    assert [(row["what"], row["against"]) for row in rows] == [
        ("tiny: training step", "PyTorch"), ("tiny: training step", "1 process"), ("tiny: generation", "transformers"),
        ("tokenisation", "tokenizers"), ("tokenisation", "tokenizers, its lines")]
    for row in rows:
        median, low, high = row["ratio"]
        assert 0 < low <= median <= high and row["nanollm"] > 0 and row["other"] > 0
        assert f"| {row['what']} | " in done.stdout and f" {row['unit']} | {row['against']} | " in done.stdout

    step = rows[0]
    ours, theirs = step["first_loss"]
    assert abs(ours - np.log(50)) < 0.1 and abs(ours - theirs) < 1e-5 * ours
    assert 0 < step["weight_difference"]["share_of_training"] < 1e-4
    assert all(size > 1e7 for size in step["peak_bytes"])
    # 1 + 1 attention and 3 GLU matrices a block, two KV heads for four; lm_head; 2 blocks, 2 x 16 tokens
    N = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16) + 50 * 16
    assert step["flops"] == 32 * (6 * N + 6 * 2 * 16 * 16)


@only_ci("a quarter of a minute")
def test_another_checkout_is_what_is_compared(tmp_path):
    """A copy whose loss is twice as large is refused."""
    root, copy = BENCHMARKS.parent, tmp_path / "copy"
    for folder in (".", "benchmarks", "hardware", "storage", "console"):
        for file in (root / folder).glob("*.py"):
            (copy / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy / folder)
    with open(copy / "nanollm.py", "a") as file:
        file.write("\nloss = NanoLLM.loss\nNanoLLM.loss = lambda self, x, y: 2 * loss(self, x, y)\n")
    done = run("--threads", "1", "--before", str(copy))
    assert done.returncode == 1 and "NOT EQUAL: tiny: first loss {'nanollm': 3.9" in done.stderr
    assert "'before': 7.8" in done.stderr


def test_half_precision_generates_in_float32_and_a_failed_check_loses_no_row(tmp_path, monkeypatch):
    """bfloat16 rounds nearly equal logits in another order than PyTorch does: the same tokens cannot be demanded."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "docs"))
    import speed
    file, dtypes = tmp_path / "speed.json", []

    @contextlib.contextmanager
    def running(**sides):
        dtypes.extend(sides[name][1]["args"].dtype for name in ("nanollm", "transformers") if name in sides)
        yield {name: lambda *request: {"torch": 1.0} for name in sides}
    rows = [{"what": "generation", "unit": "tokens/s", "nanollm": 1.0, "against": "PyTorch", "other": 1.0,
             "ratio": [1, 1, 1]}]
    monkeypatch.setattr(speed.importlib.metadata, "version", lambda package: "1.0")     # PyTorch may be missing here
    monkeypatch.setattr(speed, "running", running)
    monkeypatch.setattr(speed, "language_model", lambda *args: [])
    monkeypatch.setattr(speed, "compare", lambda *args: (rows, {"nanollm": 1, "transformers": 1}))
    monkeypatch.setattr(speed, "tokenisation", lambda *args: speed.check(False, "the ids of the text"))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--config", "tiny", "--dtype", "bfloat16", "--json", str(file)])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit, match="NOT EQUAL"):
        speed.main()
    result = json.loads(file.read_text())
    assert dtypes == ["float32", "float32"] and result["rows"] == rows and result["header"]["dtype"] == "bfloat16"


def test_different_weights_are_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from speed import WEIGHT_TOLERANCE, weight_difference

    rng = np.random.default_rng(0)
    start = rng.standard_normal((5, 3), np.float32)
    moved = rng.standard_normal((5, 3), np.float32)
    folders = {name: tmp_path / name for name in ("start", "ours", "theirs")}

    def difference(ours):
        for name, w in {"start": start, "ours": ours, "theirs": start + moved}.items():
            folders[name].mkdir(exist_ok=True)
            save_file({"w": w}, folders[name] / "model.safetensors")
        return weight_difference(*folders.values())["share_of_training"]

    assert difference(start + moved) == 0
    assert np.isclose(difference(start + 1.01 * moved), 0.01, rtol=1e-3)
    assert not difference(start + np.float32(np.nan)) <= WEIGHT_TOLERANCE["float32"]
