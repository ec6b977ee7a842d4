"""Write docs/scaling.md: how far several machines would go, by a step in docs/speed.json and what an exchange sends."""
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
sys.path.insert(0, str(ROOT))

from console.metrics import flops_per_token  # noqa: E402
from nanollm import Config  # noqa: E402

MACHINES = 2, 8, 16, 64
NETWORKS = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 10e9 / 8, "100 Gbit/s": 100e9 / 8}      # bytes a second, each way
CARDS = {"NVLink, 450 GB/s": 450e9, "400 Gbit/s a card": 400e9 / 8}
BASE = Config(30522)
BILLION = Config(32000, 2048, 22, 32, 4, 2048, 5632)
CORES = 32              # times the measured rate: a machine with 64 cores, assumed
CARD = 150e12           # FLOP/s of a training step in bfloat16 on one card, assumed


def n_weight(config):
    return sum(math.prod(shape) for shape in config.shapes().values())


def step_seconds(config, windows, rate):
    """The time of a step of `windows` windows of max_context tokens, at `rate` FLOP/s."""
    return windows * config.max_context * flops_per_token(config, config.max_context) / rate


def exchange_seconds(config, n, bandwidth):
    """The time in which n ranks exchange gradients and weights. Each sends, and receives, (n - 1)/n of either."""
    return 2 * 4 * n_weight(config) * (n - 1) / n / bandwidth


def efficiency(config, windows, rate, n, bandwidth):
    """The share of n ranks' time in which they compute: nothing is sent meanwhile."""
    computing = step_seconds(config, windows, rate)
    return computing / (computing + exchange_seconds(config, n, bandwidth))


def table(config, windows, rate, networks):
    """How n ranks of this rate do. Each takes `windows` windows a step, so the batch grows with n."""
    rows = [f"| network | exchange, n = {MACHINES[-1]} | " + " | ".join(f"n = {n}" for n in MACHINES) + " |",
            "|---" * (2 + len(MACHINES)) + "|"]
    for name, bandwidth in networks.items():
        shares = (efficiency(config, windows, rate, n, bandwidth) for n in MACHINES)
        rows.append(f"| {name} | {exchange_seconds(config, MACHINES[-1], bandwidth):.3g} s | "
                    + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return rows


def memory(config):
    """A table of a rank's memory. Its part of Adam's two moments shrinks; over MPI it has room for what it receives."""
    rows = ["| n | weights | gradients | moments | received (MPI) | sum, GB |", "|---|---|---|---|---|---|"]
    size = 4 * n_weight(config) / 1e9
    for n in (1, *MACHINES):
        parts = size, size, 2 * size / n, size * (n > 1)
        rows.append(f"| {n} | " + " | ".join(f"{part:.2f}" for part in (*parts, sum(parts))) + " |")
    return "\n".join(rows)


def page():
    run = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))[0]
    row = next(row for row in run["rows"] if row["what"] == "base: training step")
    about, rate = run["header"], row["flops"] / (row["nanollm"] / 1000)
    show = lambda *arguments: "\n".join(table(*arguments))
    return f"""# How far several machines would go

This page is computed, not measured. `python docs/scaling.py` writes it from one measurement, a training step of base in
{row['nanollm'] / 1000:.2f} s, which is {rate / 1e9:,.0f} GFLOP/s: `{about['command']}`,
{about['cpu']}, {about['threads']} cores, {about['device']}, {about['dtype']}, commit {about['commit']}.

A step of n ranks takes the time of one rank's windows, and then that of the exchange. With S = 4 bytes times the number
of weights, each rank sends and receives S (n - 1)/n of gradients, and as much of weights:

    seconds = FLOPs of a rank's windows / its rate + 2 S (n - 1)/n / bandwidth

The tables show in which share of this time the ranks compute. Each rank keeps its number of windows, so the batch grows
with n. At a fixed batch a rank has less to compute, and the share falls. `--grad-accum` raises it.

## base: {n_weight(BASE) / 1e6:.1f} million weights

4 windows of 512 tokens on a machine like the measured one, {step_seconds(BASE, 4, rate):.2f} s:

{show(BASE, 4, rate, NETWORKS)}

32 windows on a machine with 64 cores, assumed {CORES} times as fast, {step_seconds(BASE, 32, CORES * rate):.2f} s:

{show(BASE, 32, CORES * rate, NETWORKS)}

## A model of {n_weight(BILLION) / 1e9:.1f} billion weights

8 windows of 2,048 tokens on such a machine with 64 cores, {step_seconds(BILLION, 8, CORES * rate):,.0f} s:

{show(BILLION, 8, CORES * rate, NETWORKS)}

8 windows on a card, assumed to reach {CARD / 1e12:.0f} TFLOP/s, {step_seconds(BILLION, 8, CARD):.2f} s:

{show(BILLION, 8, CARD, CARDS)}

The memory of a rank, activations not counted:

{memory(BILLION)}

## Where this ends, and what would come next

- Every rank holds all weights and all gradients, 8 bytes a weight; only the moments are shared out (ZeRO stage 1). At 5
  billion weights that is half of a card's 80 GB.
- The exchange waits for the whole backward pass. It could begin with the last block's gradients while those of the
  first blocks are computed, because the flat array is in the order of the blocks. It could also send bfloat16, which is
  half as much but not exact.
- With mpiexec, r ranks on a machine send r times as much through its network card as one rank with as many threads
  does. `mpiexec -ppn 1` is better where the network is slow.
- For larger models the gradients would be shared out, too (ZeRO stage 2: as much to send), and then the weights (stage
  3: half as much again). Where one window is too much for a card, its matrices would be cut up (tensor parallelism).
"""


def main():
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
