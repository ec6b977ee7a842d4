"""Several processes: they share a step as one process does it, give the same bits each time, and end together."""
import contextlib
import functools
import multiprocessing
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import CI, only_ci, same_device
from safetensors.numpy import load_file
from tiny import QUICK, SHAPE, command, make_files, refused, rows, together

import train
from console import options
from evaluate import evaluate
from hardware import device, ranks
from hardware.local import packed
from hardware.random_bits import drop
from nanollm import Config, NanoLLM, Parameters

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [*SHAPE, *QUICK, "--max-steps", "8", "--batch-size", "3", "--grad-accum", "2", "--dropout", "0.2",
         "--weight-decay", "0.1", "--eval-every", "4", "--log-every", "1", "--save-every", "4", "--device", "cpu"]


# ---------------------------------------------------------------- a team, in threads

SHAPES = {"matrix": (5, 2), "vector": (7,)}


def a_step(team):
    """What a step does with a team, on 17 weights. Rank r's gradients are all r + 1."""
    weights = Parameters(SHAPES)
    if team.rank == 0:
        weights.flat[:] = device.xp.arange(17, dtype=np.float32)
    views = weights.tensor("matrix"), weights.tensor("vector")
    team.adopt(weights)
    weights.grad[:] = team.rank + 1
    summed = team.add_up(10.0 * team.rank)
    time.sleep(0.03 * (team.rank == team.size - 1))         # the others wait for its slice of the weights
    weights.flat[weights.own] -= weights.grad[weights.own]
    team.share_weights()
    flat, vector = device.to_host(weights.flat).copy(), device.to_host(views[1].data).copy()
    whole = team.gather(weights.grad[weights.own])
    part = team.scatter(np.arange(17) if team.rank == 0 else None)
    return summed, flat, part, whole, vector


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17])
def test_the_ranks_share_sums_and_weights(on_cpu, size):
    results = together(size, a_step, n=17)
    total = size * (size + 1) / 2
    for summed, flat, _, _, vector in results:
        assert summed == 10 * size * (size - 1) / 2
        np.testing.assert_array_equal(flat, np.arange(17) - total)
        np.testing.assert_array_equal(vector, flat[10:])
    np.testing.assert_array_equal(np.concatenate([part for _, _, part, *_ in results]), np.arange(17))
    np.testing.assert_array_equal(results[0][3], np.full(17, total))
    assert all(result[3] is None for result in results[1:])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_step_s_windows_are_shared_whole(size):
    teams = [SimpleNamespace(rank=rank, size=size) for rank in range(size)]
    shares = [list(ranks.Team.share(team, 100, 7, 3)) for team in teams]
    assert [first + i for share in shares for first, count in share for i in range(count)] == list(range(100, 107))
    assert all(1 <= count <= 3 for share in shares for _, count in share)


def test_evaluation_is_shared(make):
    dataset = make("the cat sat on the mat. " * 40, stride=8)
    model = NanoLLM(Config(dataset.vocab_size, 16, 1, 2, 1, 8, 24))
    whole = evaluate(model, dataset, 4)
    parts = [SimpleNamespace(rank=rank, size=3, sum=lambda value: value) for rank in range(3)]
    shares = [evaluate(model, dataset, 4, team=part) for part in parts]
    assert sum(share["tokens"] for share in shares) == whole["tokens"]
    assert sum(share["loss"] * share["tokens"] for share in shares) == pytest.approx(whole["loss"] * whole["tokens"])


def test_a_window_loses_the_same_elements_in_any_batch():
    x = device.xp.ones((6, 5, 4), np.float32)
    whole = device.to_host(drop(x, 0.5, (1, 7, 100)))
    for first, size in ((0, 2), (2, 1), (3, 3)):
        part = device.to_host(drop(x[:size], 0.5, (1, 7, 100 + first)))
        np.testing.assert_array_equal(part, whole[first:first + size])
    assert len({row.tobytes() for row in whole}) == 6


def test_the_default_number_divides_the_windows_of_a_step(monkeypatch):
    monkeypatch.setattr(device, "threads", 4)
    monkeypatch.setattr(device, "on_gpu", False)
    count = functools.partial(options.count_processes, settings=options.Settings(batch_size=3, grad_accum=2),
                              alone=False)
    assert (count(None), count(3), count(None, alone=True)) == (2, 3, 1)
    refused(lambda: count(7), "7 processes", "6 windows", "--batch-size", "--grad-accum")
    monkeypatch.setenv("PMI_SIZE", "3")
    assert count(None) == count(3) == 3
    refused(lambda: count(2), "--processes 2", "mpiexec has started 3")


def test_the_processes_of_a_machine_share_the_arrays_of_their_task():
    pixels = np.arange(60_000).astype(np.uint8).reshape(200, 300)
    words, memory = packed(("work", SimpleNamespace(train=pixels, val=pixels)), multiprocessing.get_context("spawn"))
    one, other = (pickle.loads(words, buffers=memory)[1] for _ in range(2))
    np.testing.assert_array_equal(one.train, pixels)
    one.train[7, 9] += 1
    assert other.val[7, 9] == one.train[7, 9] != pixels[7, 9] and len(words) < 1000


# ---------------------------------------------------------------- real processes

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, make_files(folder)


SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from console import cli, metrics
import train
"""
CHEAP = "os.fsync = metrics.draw_loss = lambda _: None\n"        # as tiny.make_cheap does
MAIN = """
if __name__ == "__main__":
    cli.run(train.main, "train.py")
"""


def start(place, name, *flags, processes=1, mpi=False, code=CHEAP):
    """Start train.py in a process group of its own, after `code` on every rank."""
    folder, files = place
    (folder / f"{name}.py").write_text(SCRIPT + code + MAIN)
    words = [sys.executable, folder / f"{name}.py", "--artifact-dir", folder / name, *(flags or (*files, *FLAGS))]
    if mpi:
        words = [Path(sys.executable).parent / "mpiexec", "-n", str(processes), *words]
    else:
        words += ["--processes", str(processes)]
    return subprocess.Popen([str(word) for word in words], cwd=folder, text=True, start_new_session=True,
                            env=os.environ | {"NANOLLM_CACHE": str(folder / "cache"), "NANOLLM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def running(group):
    """Whether a process of this group runs. A zombie does not: it has ended, and waits until init asks for its exit
    code, which takes a second in some containers.
    """
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):              # it has just ended
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            states += [state] * (int(its_group) == group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return set(states) != {"Z"}                     # without /proc there are none to look at
    return False


def finish(process):
    """(exit code, stdout, stderr), once nothing of its group is alive."""
    out, err = process.communicate(timeout=60)
    until = time.monotonic() + 5
    while running(process.pid):
        assert time.monotonic() < until, "a process is left"
        time.sleep(0.01)
    return process.returncode, out, err


NAN = CHEAP + """
from hardware.local import Local
add_up = Local.add_up
def poisoned(self, value):
    if self.rank:
        self.grad[:9] = float("nan")        # of rank 0's slice: what it gets from rank 1
    return add_up(self, value)
Local.add_up = poisoned
"""
AT_STEP_4 = CHEAP + """
from storage.files import InputError
before = train.Adam.step
def step(self, *args):
    last, t = self.weights.own.stop == self.weights.flat.size, self.t
    if t == 4 and last == {last}:
        {what}
    before(self, *args)
train.Adam.step = step
"""
FAILURES = {        # on which rank, what happens: the one line that the user sees
    "killed": (True, "os.kill(os.getpid(), 9)", "process 1 of 2 has ended (SIGKILL), and the training with it: "
               "continue with --resume, or use --processes 1"),
    "crashed": (True, "os.kill(os.getpid(), 11)", "process 1 of 2 has ended (SIGSEGV), "),
    "memory": (True, "raise MemoryError('no room')", "out of memory (no room): lower --batch-size"),
    "input": (True, "raise InputError('no such thing')", "no such thing"),
    "first": (False, "raise InputError('no such thing')", "no such thing"),
    "disk": (False, "raise OSError(28, 'No space left on device')", "cannot write "),
}


@pytest.fixture(scope="module")
def runs(place):
    """{name: (exit code, stdout, stderr)} of runs that take place at the same time."""
    with same_device(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLLM_CACHE", str(place[0] / "cache"))
        patch.chdir(place[0])
        tiny.make_cheap(patch)
        one = command(train.main, "--artifact-dir", "one", *place[1], *FLAGS)
    started = {"two": start(place, "two", processes=2, code=""), "again": start(place, "again", processes=2)}
    if CI:
        started["four"] = start(place, "four", processes=4)
    return {"one": one} | {name: finish(process) for name, process in started.items()}


def weights(place, name):
    tensors = load_file(place[0] / name / "model.safetensors")
    return np.concatenate([tensors[key].ravel() for key in sorted(tensors)])


def assert_like_one(place, name):
    for one, many in zip(rows(place[0] / "one"), rows(place[0] / name), strict=True):
        for column in ("train_loss", "val_loss", "grad_norm"):
            assert not one[column] or float(many[column]) == pytest.approx(float(one[column]), rel=2e-5), column
    np.testing.assert_allclose(weights(place, name), weights(place, "one"), atol=2e-4)


@pytest.mark.parametrize("name", ["two", pytest.param("four", marks=only_ci("two seconds"))])
def test_several_processes_train_as_one_does(place, runs, name):
    assert runs[name][0] == 0 and runs[name][2] == "", runs[name][2]
    assert f", {({'two': 2, 'four': 4})[name]} processes of 1 thread)" in runs[name][1].splitlines()[0]
    assert_like_one(place, name)
    assert np.abs(weights(place, name) - weights(place, "one/checkpoint-4")).max() > 0.005


@only_ci("some seconds")
def test_all_scale_and_skip_a_loss_in_float16_alike(place, cheap, monkeypatch):
    monkeypatch.setenv("NANOLLM_CACHE", str(place[0] / "cache"))
    flags = [*place[1], *FLAGS, "--dtype", "float16", "--learning-rate", "0.9", "--patience", "1", "--eval-every", "2"]
    several = start(place, "half2", *flags, processes=3)
    assert command(train.main, *flags, "--artifact-dir", "half")[0] == finish(several)[0] == 0
    one, three = rows(Path("half")), rows(place[0] / "half2")
    for column in ("step", "loss_scale", "skipped"):
        assert [row[column] for row in one] == [row[column] for row in three]
    assert len(one) < 8 and float(one[-1]["val_loss"]) == pytest.approx(float(three[-1]["val_loss"]), rel=0.02)


def test_the_same_number_of_processes_gives_the_same_bits(place, runs):
    tiny.assert_same(place[0] / "two", place[0] / "again")


def test_a_run_continues_with_another_number_of_processes(place, runs, monkeypatch, cheap):
    monkeypatch.setenv("NANOLLM_CACHE", str(place[0] / "cache"))
    shutil.copytree(place[0] / "two", "run")
    shutil.rmtree("run/checkpoint-8")
    assert "processes" not in Path("run/checkpoint-4/trainer.json").read_text().replace("2 processes of 1 thread", "")
    assert command(train.main, "--resume", "--artifact-dir", "run")[0] == 0
    np.testing.assert_allclose(weights((Path(),), "run"), weights(place, "two"), atol=2e-4)


@pytest.fixture(scope="module")
def failures(place):
    """{name: (exit code, stdout, stderr)} of FAILURES; each takes a second, so only continuous integration has all."""
    started = {name: start(place, name, processes=2, code=AT_STEP_4.format(last=last, what=what))
               for name, (last, what, _) in FAILURES.items() if CI or name in ("killed", "input")}
    if CI:
        started["nan"] = start(place, "nan", *place[1], *FLAGS, "--max-steps", "20", processes=2, code=NAN)
    return {name: finish(process) for name, process in started.items()}


def test_the_failure_of_one_is_the_end_of_all(failures):
    for name, (code, _, err) in failures.items():
        words = FAILURES[name][2] if name in FAILURES else "10 steps in a row were not finite; the first NaN or inf " \
            "is in the gradient of model.embed_tokens.weight"
        assert code == 2 and words in err and err.count("\n") == 1, err
        where = f"{name}.py (rank 1, {platform.node()})" if name in ("memory", "input") else "train.py"
        assert err.startswith(f"{where}: "), err


@pytest.fixture(scope="module")
def endless(place):
    """{name: process} of runs that begin at the same time, and end when a test ends them."""
    flags = *place[1], *FLAGS, *"--num-epochs 100000 --max-steps 100000 --save-every 100000".split()
    started = {name: start(place, name, *flags, processes=2) for name in ("gone", "stopped")}
    yield started
    for process in started.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_others_end_with_rank_0(endless):
    process = endless["gone"]
    assert any(line.startswith("step 5/") for line in process.stdout)
    process.kill()
    assert finish(process)[0] == -9


def test_a_signal_stops_all_with_a_checkpoint(place, endless):
    process = endless["stopped"]
    assert any(line.startswith("step 5/") for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 143 and "stopped after step" in out and err.split("\n")[1:] == [
        "stopping after this step; press Ctrl-C again to quit at once", ""], err
    assert len(list((place[0] / "stopped").glob("checkpoint-*"))) == 2


def test_processes_that_cannot_start(on_cpu, files, cheap, monkeypatch):
    flags = (*SHAPE, *QUICK, *files, "--max-steps", 1, "--processes", 2, "--device", "cpu")
    work = lambda plan, team: 0
    work.__module__ = "__main__"
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    plan = SimpleNamespace(processes=2, n_weight=3)
    with pytest.raises(device.Unavailable, match="only from a file: run python train"):
        ranks.run(lambda: plan, work, None)

    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", refuse)
    tiny.check(command(train.main, *flags), "process 1 could not start .Resource temporarily unavailable.: use fewer")


# ---------------------------------------------------------------- mpiexec

mpi = only_ci("half a minute")


@pytest.fixture(scope="module")
def mpi_runs(place, runs):
    started = {"mpi2": start(place, "mpi2", processes=2, mpi=True), "mpi4": start(place, "mpi4", processes=4, mpi=True)}
    for name in ("killed", "input", "first"):
        last, what, _ = FAILURES[name]
        started[name] = start(place, f"mpi-{name}", processes=2, mpi=True, code=AT_STEP_4.format(last=last, what=what))
    return {name: finish(process) for name, process in started.items()}


@mpi
@pytest.mark.parametrize(("name", "local"), [("mpi2", "two"), ("mpi4", "four")])
def test_mpi_has_the_bits_of_local_processes(place, mpi_runs, name, local):
    assert mpi_runs[name][0] == 0, mpi_runs[name][2]
    tiny.assert_same(place[0] / name, place[0] / local)


@mpi
def test_mpi_resumes_to_the_same_bits(place, mpi_runs):
    shutil.copytree(place[0] / "two", place[0] / "mpi-on")
    for path in [*(place[0] / "mpi-on").glob("*.safetensors"), place[0] / "mpi-on/config.json"]:
        path.unlink()
    shutil.rmtree(place[0] / "mpi-on/checkpoint-8")
    assert finish(start(place, "mpi-on", "--resume", processes=2, mpi=True))[0] == 0
    np.testing.assert_array_equal(weights(place, "mpi-on"), weights(place, "two"))


@mpi
@pytest.mark.parametrize("name", ["killed", "input", "first"])
def test_mpi_ends_all_with_one(mpi_runs, name):
    code, _, err = mpi_runs[name]
    assert code != 0 and (name == "killed" or err.count("no such thing") == 1), err


@mpi
def test_mpi_stops_with_a_checkpoint(place):
    process = start(place, "mpi-stopped", *place[1], *FLAGS, "--max-steps", "100000", "--save-every", "100000",
                    processes=2, mpi=True)
    assert any(line.startswith("step 5/") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 143 and "stopped after step" in out and err.count("stopping after this step") == 1, err
    assert len(list((place[0] / "mpi-stopped").glob("checkpoint-*"))) == 2
