"""The house: imports go down, every file compiles, nothing foreign comes in, and every command is found by its name."""
import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["hardware", "storage", "autograd", "data", "nanollm", "console", "generate", "evaluate", "train", "images",
         "extras", "lessons", "benchmarks"]
PRODUCT = ORDER[:-1]
COMMANDS = [f"{room}.{path.stem}" for room in ("images", "extras", "lessons")
            for path in sorted((ROOT / room).glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")]


def files_of(room):
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else sorted(ROOT.glob(f"{room}.py"))


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported(path):
    """The first names of the modules that a file imports."""
    found = set()
    for node in nodes(path):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, level=0):
                found.add(module)
    return {name.split(".")[0] for name in found}


def test_imports_go_down():
    for at, room in enumerate(ORDER):
        for path in files_of(room):
            assert imported(path) & set(ORDER) <= set(ORDER[:at + 1]), f"{path} imports upwards"


def test_every_file_has_its_room():
    assert {path.stem for path in ROOT.glob("*.py")} <= set(ORDER)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(ORDER)


def test_every_file_compiles():
    paths = [path for folder in [*ORDER, "docs", "tests"] for path in files_of(folder)]
    assert len(paths) > 60
    for path in paths:
        compile(path.read_text(encoding="utf-8"), path, "exec")


def test_the_notebook_needs_the_product_alone(tmp_path):
    """docs/tour.ipynb stands outside the order, as the scripts there do: it imports rooms, no room imports it."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    script = tmp_path / "tour.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), "utf-8")
    assert imported(script) - sys.stdlib_module_names <= {*PRODUCT, "probes", "numpy", "matplotlib"}


def test_no_framework_is_imported():
    frameworks = {"torch", "transformers", "jax", "flax", "tensorflow", "keras", "mlx", "tinygrad"}
    for path in (path for room in PRODUCT for path in files_of(room)):
        assert not imported(path) & frameworks, path


def test_nothing_is_pickled_or_executed():
    """No module of the product even names anything that could run a file's content. (hardware/local.py hands a task to
    processes that it starts itself, as multiprocessing does, in memory.)
    """
    banned = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "eval", "exec", "__import__",
              "allow_pickle", "system", "popen"}
    for path in (path for room in PRODUCT for path in files_of(room)):
        fields = ("id", "attr", "arg", "name", "module")
        names = {getattr(node, field, None) for node in nodes(path) for field in fields}
        assert names & banned <= ({"pickle"} if path.match("hardware/local.py") else set()), path


@pytest.fixture
def others(tmp_path):
    """A folder of other people's packages, of which some have the names of ours."""
    for room in ("images", "extras", "lessons", "hardware", "storage", "console"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    return tmp_path


def test_the_commands_are_ours_even_where_packages_of_their_names_are_installed(others):
    """A folder without __init__.py would lose to them, at any place on the path."""
    code = f"""
import importlib.util, runpy, sys
for name in {COMMANDS}:
    print(importlib.util.find_spec(name).origin)
sys.argv[1:] = ["--help"]
for name in {[name for name in COMMANDS if name.startswith("extras.")]}:
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == 0, name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(others)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:len(COMMANDS)] == [f"{ROOT / name.replace('.', '/')}.py" for name in COMMANDS]
    assert done.stdout.count("usage: ") >= 3 and len(COMMANDS) >= 9


def test_commands_run_by_their_paths_too(tmp_path):
    """Editors run the open file by its path: then Python looks for modules in the file's folder."""
    for name in COMMANDS:
        assert ' not __package__:' in (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"), name
    done = subprocess.run([sys.executable, ROOT / "extras/quantize.py", "--help"], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m extras.quantize "), done.stderr


def test_importing_changes_nothing_in_the_process():
    """What a run needs is set when a device is chosen. (Other people's packages are imported before we look.)"""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
               for room in PRODUCT for path in files_of(room)]
    code = f"""
import ctypes, importlib, os, signal, sys, threading, warnings
import matplotlib.figure, ml_dtypes, numpy, safetensors.numpy, threadpoolctl, tokenizers, tqdm

def state():
    blas = {{library["filepath"]: library["num_threads"] for library in threadpoolctl.threadpool_info()}}
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return dict(errors=numpy.geterr(), blas=blas, threads=threading.enumerate(), handlers=handlers,
                environment=dict(os.environ), warnings=list(warnings.filters), path=list(sys.path))

before, ctypes.CDLL = state(), None         # and nothing is told to the C library, such as how to keep memory
for name in {modules}:
    importlib.import_module(name)
    for what, value in state().items():
        assert value == before[what], f"import {{name}} changes {{what}}: {{before[what]}} -> {{value}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(modules) > 25
