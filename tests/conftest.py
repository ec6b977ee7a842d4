"""What all tests share.

`NANOLLM_DEVICE=gpu python -m pytest tests` runs the same tests on a card, NANOLLM_DEVICE=strict those that compute
in this process on the stand-in for one (strict_cupy.py).
"""

import importlib
import os

import numpy as np
import pytest

STRICT = os.environ.get("NANOLLM_DEVICE") == "strict"
if STRICT or "NANOLLM_DEVICE" not in os.environ:
    os.environ["NANOLLM_DEVICE"] = "cpu"  # before any test module imports device.py

CI = bool(os.environ.get("CI"))


def reference(name):
    """The package `name`, such as torch, to compare with; a test without it skips, except in CI."""
    return importlib.import_module(name) if CI else pytest.importorskip(name)


def pytest_configure(config):
    if STRICT:
        from strict_cupy import strict_gpu
        stand_in = strict_gpu()
        stand_in.__enter__()
        config.add_cleanup(lambda: stand_in.__exit__(None, None, None))


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
    """Each test has a token cache of its own: nothing is read from the user's, nothing is left in it."""
    folder = tmp_path / "nanollm-cache"
    monkeypatch.setenv("NANOLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def rng():
    """The same random numbers in every run, drawn on the host: both devices see the same."""
    return np.random.default_rng(0)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    """The test runs once in each precision."""
    return request.param
