"""Imports go down: a file imports only what stands before it in this order, and nothing is in two places."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["hardware", "storage", "autograd", "data", "nanollm", "console", "generate", "evaluate", "train", "extras"]


def rooms(path):
    """The rooms of this house that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
            node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found & set(ORDER)


def test_imports_go_down():
    for at, room in enumerate(ORDER):
        for path in (ROOT / room).glob("*.py") if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]:
            assert rooms(path) <= set(ORDER[:at + 1]), f"{path} imports upwards"


def test_every_file_has_its_room():
    assert {path.stem for path in ROOT.glob("*.py")} <= set(ORDER)


def test_nothing_is_pickled_or_executed():
    """No module of ours so much as names what could run a file's content."""
    banned = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "eval", "exec", "__import__",
              "allow_pickle", "system", "popen"}
    folders = ".", "hardware", "storage", "console", "extras"
    for path in sorted(path for folder in folders for path in (ROOT / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        fields = ("id", "attr", "arg", "name", "module")
        names = {getattr(node, field, None) for node in ast.walk(tree) for field in fields}
        assert not names & banned, path.name
