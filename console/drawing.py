"""Matplotlib as it comes: a picture does not depend on the user's settings for it, and is no reason to lose a run.

All pictures are drawn inside `defaults`; those of train.py and evaluate.py inside `optional`, too. Matplotlib is
imported only then, because that takes as long as a small model's start.
"""
import contextlib
import os
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

BLUE, RED, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"     # safe for the colour-blind (Okabe & Ito 2008)
INK, GREY, PALE, PAPER = "#24292f", "#6e7781", "#dde1e5", "#fcfcfa"
STYLE = {"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.titlesize": 11, "axes.titlelocation": "left", "axes.edgecolor": GREY, "axes.spines.top": False,
         "axes.spines.right": False, "axes.facecolor": PAPER, "figure.facecolor": PAPER, "axes.axisbelow": True,
         "axes.grid": True, "grid.color": PALE, "legend.frameon": False, "lines.linewidth": 1.8}

_failed = set()         # pictures of which `optional` has warned


def load():
    """The package matplotlib, imported as anyone in this process would import it: it may be the user's notebook.

    If that fails, MPLBACKEND or a matplotlibrc may be why: it is imported again where neither counts, in a folder with
    an empty matplotlibrc. (That of the current folder counts, and no other.)
    """
    try:
        import matplotlib
    except ImportError:
        raise
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            del sys.modules[name]               # parts of it refer to the one that has failed
        with (tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder),
              mock.patch.dict(os.environ, MPLBACKEND="agg")):
            Path("matplotlibrc").touch()
            import matplotlib
    return matplotlib


@contextlib.contextmanager
def defaults(style=()):
    """In this block, or in a function decorated with this, Matplotlib has its own defaults, and those in `style`."""
    matplotlib = load()
    own = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context(own | dict(style)):
        yield


@contextlib.contextmanager
def optional(path):
    """Continue if this block fails to draw the picture `path`, with one warning for each picture."""
    try:
        yield
    except Exception as problem:        # whatever Matplotlib raises, or the lack of it
        if path not in _failed:
            _failed.add(path)
            warnings.warn(f"{path} was not drawn: {problem or type(problem).__name__}", stacklevel=3)
