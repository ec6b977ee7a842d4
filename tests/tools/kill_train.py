"""Kill training with SIGKILL at random moments and resume it each time; it must end as if nothing had happened.

    python tests/tools/kill_train.py                  50 kills
    python tests/tools/kill_train.py --processes 2    each of a random process of the two
    python tests/tools/kill_train.py --disk-full      30 times a limit on the size of files ends training (RLIMIT_FSIZE)

Short runs save every third step. Whenever one reaches its end, its folder must equal that of an undisturbed run
byte for byte: weights, moments, every column of metrics.csv except the timings. Then the next one begins.
"""

import argparse
import collections
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import tiny  # noqa: E402

from storage.checkpoint import check_sums, checkpoints  # noqa: E402

FLAGS = ("--embedding-dim 8 --n-block 1 --n-head 2 --hidden-dim 8 --max-context 8 --tie-embeddings --batch-size 3 "
         "--grad-accum 2 --learning-rate 0.01 --num-epochs 1000 --save-every 3 --log-every 2 --eval-every 7 "
         "--sample-every 1000000").split()


def others(pid):
    """The processes that a training process has started, except for multiprocessing's tracker."""
    with contextlib.suppress(OSError):          # it has just ended
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    return []


class Victim:
    """A training process in folder `run`: new, or resumed if there is a checkpoint."""
    steps, processes = 700, 1

    def __init__(self, folder, files, limit=None):
        self.run = folder / "run"
        if checkpoints(self.run):
            flags = ["--resume"]
        else:
            shutil.rmtree(self.run, ignore_errors=True)     # killed before the first checkpoint
            flags = [*FLAGS, "--max-steps", str(self.steps), *files]
        command = [sys.executable, ROOT / "train.py", "--device", "cpu", "--artifact-dir", "run",
                   "--processes", str(self.processes), *flags]
        environment = os.environ | {"NANOLLM_CACHE": str(folder / "cache"), "NANOLLM_THREADS": "1"}
        self.out = folder / "out"
        with open(self.out, "w") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=subprocess.PIPE, text=True, env=environment,
                preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))

    def wait_for_training(self):
        """Until the last line before the loop is there, or the process has ended."""
        while self.process.poll() is None and "\nfolder " not in self.out.read_text():
            time.sleep(0.005)

    def wait_for_saving(self):
        """Watch the folder until something is being written there: a save takes a few milliseconds only."""
        while self.process.poll() is None and not any(self.run.glob(".*")):
            pass

    def kill(self, rng):
        """The phase in which SIGKILL struck one of the processes, or "ended" if it came too late."""
        all_of_them = [self.process.pid, *others(self.process.pid)]
        struck = rng.choice(all_of_them)
        with contextlib.suppress(ProcessLookupError):
            os.kill(struck, signal.SIGKILL)
        _, err = self.process.communicate()
        until = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in all_of_them):
            assert time.monotonic() < until, "a process is left"
        if self.process.returncode == 2 and struck != self.process.pid:
            assert "has ended (SIGKILL), and the training with it" in err and err.count("\n") == 1, err
            return "training, another process"
        if self.process.returncode != -signal.SIGKILL:
            assert self.process.returncode == 0, err
            return "ended"
        for leftover in self.run.glob(".*"):
            return f"saving {'a checkpoint' if 'checkpoint' in leftover.name else 'best or a file'}"
        return "training"

    def end(self):
        """(exit code, lines of stderr) of a process left alone."""
        _, err = self.process.communicate(timeout=300)
        return self.process.returncode, err.splitlines()


def check(folder):
    """A run that has ended must be like the undisturbed one; it makes room for the next."""
    tiny.assert_same(folder / "run", folder / "whole")
    assert not list((folder / "run").glob(".*")), "something was left over"
    shutil.rmtree(folder / "run")


def kill(folder, files, kills, rng):
    phases, runs = collections.Counter(), 0
    while sum(phases.values()) - phases["ended"] < kills:
        victim = Victim(folder, files)
        if rng.random() < 0.08:
            time.sleep(rng.uniform(0, 0.5))
            phase = victim.kill(rng)
            phases["start-up" if phase.startswith("training") else phase] += 1
        else:
            victim.wait_for_training()
            time.sleep(rng.uniform(0, 0.5))
            if rng.random() < 0.3:
                victim.wait_for_saving()
                time.sleep(rng.uniform(0, 0.005))
            phases[victim.kill(rng)] += 1
        for path in checkpoints(folder / "run"):
            check_sums(path)
        if (folder / f"run/checkpoint-{Victim.steps}").exists() and rng.random() < 0.5:
            assert Victim(folder, files).end() == (0, [])
            check(folder)
            runs += 1
    assert Victim(folder, files).end() == (0, [])
    check(folder)
    inside = sum(count for phase, count in phases.items() if phase not in ("start-up", "ended"))
    print(f"{sum(phases.values()) - phases['ended']} kills, {inside} of them in training or saving:")
    for phase, count in sorted(phases.items()):
        print(f"    {count:3}  {phase}")
    print(f"{runs + 1} runs ended bit for bit like the undisturbed one")
    assert inside >= 0.8 * kills, "too few kills fell inside training or saving"


def fill(folder, files, times, rng):
    places, runs = collections.Counter(), 0
    while sum(places.values()) < times:
        if rng.random() < 0.4:                              # early in a run the limit strikes in other files
            shutil.rmtree(folder / "run", ignore_errors=True)
        code, lines = Victim(folder, files, rng.randrange(2_500, 30_000)).end()
        if code == 0:
            check(folder)
            runs += 1
            continue
        assert code == 2 and len(lines) == 1 and "cannot write" in lines[0] and "File too large" in lines[0], lines
        place = "weights or moments" if "serializing" in lines[0] else "another file"
        saved = checkpoints(folder / "run")
        places[f"{place}, {'after' if saved else 'before'} the first checkpoint"] += 1
        for path in saved:
            check_sums(path)
        victim = Victim(folder, files)                      # the disk has room again
        victim.wait_for_training()
        time.sleep(rng.uniform(0, 0.2))
        victim.kill(rng)
    assert Victim(folder, files).end() == (0, [])
    check(folder)
    print(f"the disk was full {times} times, each time code 2 and one line, in")
    for place, count in sorted(places.items()):
        print(f"    {count:3}  {place}")
    print(f"{runs + 1} runs ended bit for bit like the undisturbed one")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, help="kills (50) or full disks (30)")
    parser.add_argument("--disk-full", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    Victim.processes = args.processes
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None     # fsync is free there
    began = time.monotonic()
    Victim.steps = 300 if args.disk_full else Victim.steps
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        files = tiny.make_files(folder)
        assert Victim(folder, files).end() == (0, [])
        (folder / "run").rename(folder / "whole")
        if args.disk_full:
            fill(folder, files, args.times or 30, random.Random(args.seed))
        else:
            kill(folder, files, args.times or 50, random.Random(args.seed))
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}")


if __name__ == "__main__":
    main()
