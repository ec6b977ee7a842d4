"""What all tests share.

`NANOLLM_DEVICE=gpu python -m pytest tests` runs the same tests on a card, tools/emulated_gpu without one.
"""

import contextlib
import gc
import importlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("NANOLLM_DEVICE", "cpu")          # before any test module imports device.py
collect_ignore = [] if os.environ["NANOLLM_DEVICE"] == "gpu" else ["test_gpu_path.py"]

CI = bool(os.environ.get("CI"))


def only_ci(time):
    """The mark of a test that takes so long that continuous integration alone runs it."""
    return pytest.mark.skipif(not CI, reason=f"it takes {time}: only continuous integration runs it")


def reference(name):
    """The package `name`, such as torch, to compare with; a test without it skips, except in CI."""
    return importlib.import_module(name) if CI else pytest.importorskip(name)


@contextlib.contextmanager
def same_device():
    """After it the device is what it was before, whatever was chosen inside."""
    from hardware import device
    names = ["xp", "reason", "threads", "on_gpu", "tf32_products"]
    choice = {name: getattr(device, name) for name in names}
    try:
        yield
    finally:
        vars(device).update(choice)
        device._blas_threads(None if device.on_gpu else 1)


def pytest_configure(config):
    if os.environ["NANOLLM_DEVICE"] == "gpu":       # where it cannot compute nothing is tested, least of all on the CPU
        from hardware import device
        try:
            device.use("gpu")
        except device.Unavailable as problem:
            raise pytest.UsageError(str(problem)) from None


def pytest_collection_finish():
    """What is there already stays: a search for garbage, such as gc.collect() in a test, need not look through it."""
    gc.collect()
    gc.freeze()


def _skip_is_failure(report):
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which continuous integration does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    return _skip_is_failure((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    return _skip_is_failure((yield))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Each test has its own token cache: the user's is neither read nor written."""
    folder = tmp_path / "nanollm-cache"
    monkeypatch.setenv("NANOLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def rng():
    """The same random numbers in every run, drawn on the host so that both devices see the same."""
    return np.random.default_rng(0)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    """The test runs once in each precision."""
    return request.param


@pytest.fixture
def cheap(monkeypatch, tmp_path):
    """Nothing waits for the disk, nothing is drawn, and the current folder is the test's own."""
    import tiny
    tiny.make_cheap(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def device_afterwards():
    """A flag --device chooses for the whole process: the next test still begins with the device of the first."""
    with same_device():
        yield


@pytest.fixture
def on_cpu(device_afterwards):
    """On the CPU equal means bit for bit; a GPU adds up the embedding's gradient in any order."""
    from hardware import device
    device.use("cpu")


@pytest.fixture
def files(tmp_path):
    import tiny
    return tiny.make_files(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(folder, flags for its text and tokenizer, what it printed): three epochs, evaluated in their middle too.

    Only read by the tests that share it.
    """
    import tiny

    import train
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("finished")
        patch.setenv("NANOLLM_CACHE", str(root / "cache"))
        tiny.make_cheap(patch)
        files = tiny.make_files(root)
        code, out, err = tiny.command(train.main, *tiny.SHAPE, *tiny.QUICK, *files, "--num-epochs", 3, "--stride", 8,
                                      "--batch-size", 17, "--eval-every", 4, "--sample-every", 8, "--prompt",
                                      "the cat", "--artifact-dir", root / "run")
        assert (code, err) == (0, "")
        return root / "run", files, out


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """A run that was stopped after step 10 of 20, with checkpoint-5 and checkpoint-10. Use a copy of it."""
    import tiny
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("stopped")
        patch.setenv("NANOLLM_CACHE", str(root / "cache"))
        tiny.make_cheap(patch)
        tiny.stop_at(patch, 10)
        flags = [*tiny.make_files(root), "--max-steps", 20, "--eval-every", 4, "--artifact-dir", root / "run"]
        assert tiny.run(*flags) == 143
        return root / "run"


@pytest.fixture
def halfway(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture
def make(tmp_path):
    """make(text, tokenizer, ...): a TokenDataset of a text and a tokenizer that are saved for it."""
    from kinds import KINDS

    from data import TokenDataset

    def make(text, tokenizer="byte-bpe", seq_len=8, stride=None):
        path, bytes_ = tmp_path / "text.txt", text.encode() if isinstance(text, str) else text
        path.write_bytes(bytes_)
        KINDS.get(tokenizer, tokenizer).save(str(tmp_path / "tokenizer.json"))
        return TokenDataset.from_text(path, tmp_path / "tokenizer.json", seq_len, stride)
    return make
