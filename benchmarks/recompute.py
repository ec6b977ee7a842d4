"""Measure what --recompute costs and saves:  python benchmarks/recompute.py [--steps N]

It trains the configuration `small` of speed.py with and without, one step of each in turn. It measures the time of a
step (the median) and the peak of what Python's arrays hold (tracemalloc, in a separate step), and it writes the table
between the `recompute` marks in README.md.
"""
import argparse
import re
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "docs")

from results import commit, cpu  # noqa: E402

from hardware import device  # noqa: E402
from nanollm import Config, NanoLLM  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=5)
steps = parser.parse_args().steps
model = NanoLLM(Config(4096, 256, 4, 4, max_context=256, hidden_dim=768))
rng = np.random.default_rng(0)
seconds, peaks = {False: [], True: []}, {}


def step():
    ids = rng.integers(0, 4096, (16, 257))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()


step()
for _ in range(steps):
    for model.recompute in seconds:
        start = time.perf_counter()
        step()
        seconds[model.recompute].append(time.perf_counter() - start)
for model.recompute in seconds:
    tracemalloc.start()
    step()
    peaks[model.recompute] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
ratio = statistics.median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
lines = ["| `python benchmarks/recompute.py` (4 blocks, 256 wide, batch 16 × 256) | peak of a step's arrays, MB "
         "| forward and backward, s | time ratio |", "|---|---|---|---|"]
for again, name in (False, "activations kept"), (True, "`--recompute`"):
    lines.append(f"| {name} | {peaks[again] / 1e6:.0f} | {statistics.median(seconds[again]):.2f} "
                 f"| {ratio if again else 1:.2f} |")
lines += ["", f"{device.reason.split(';')[0]}, {cpu()}; seed 0; commit {commit()}"]
readme, table = ROOT / "README.md", "\n".join(lines)
print(table)
readme.write_text(re.sub(r"(?s)(<!-- recompute: .*? -->\n).*?(<!-- /recompute -->)", lambda m: f"{m[1]}{table}\n{m[2]}",
                         readme.read_text("utf-8")), "utf-8")
