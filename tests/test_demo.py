"""The demo: its settings, its text and tokenizer."""
import json
from pathlib import Path

import pytest
from tiny import QUICK, SHAPE, check, command, make_files, stop_at

import train
from console import demo, options
from storage.checkpoint import read_trainer
from storage.tokens import load_tokenizer

pytestmark = pytest.mark.usefixtures("cheap")


# ---------------------------------------------------------------- its settings

def test_the_demo_s_settings_are_a_valid_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "files", lambda: tuple(make_files(tmp_path)[1::2]))
    request = options.parse(["--demo", "--max-steps", "3"])
    settings = request.settings
    assert request.checkpoint is None and settings.max_steps == 3   # the command line wins over the demo's settings
    for name, value in demo.SETTINGS.items():
        if name != "max_steps":
            assert getattr(settings, name) == value
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
             for name, value in demo.SETTINGS.items()]
    assert vars(options.command_line().parse_args(flags)) == demo.SETTINGS


def test_the_demo_can_be_resumed_too(tmp_path, monkeypatch):
    """--resume works the same with --demo and without; for a run that is not a demo, --demo is refused."""
    files = make_files(tmp_path)
    monkeypatch.setattr(options.demo, "files", lambda: (files[1], files[3]))
    flags = [*SHAPE, *QUICK, "--max-steps", "4", "--eval-every", "50", "--sample-every", "100"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train.main(["--demo", *flags]) == 143
    assert train.main(["--resume", "--demo", "--max-steps", "3"]) == 0
    assert train.main(["--resume"]) == 0
    args = read_trainer(Path("runs/llm/checkpoint-3"))[1]["command"]
    assert args["demo"] is True and args["tie_embeddings"] is True and args["beta2"] == 0.99


# ---------------------------------------------------------------- its text and tokenizer

LONG = "explains what it does in a sentence that is longer than eighty characters, so that it is worth learning from."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of a few files, some of which hold nothing for the demo, and two topics of the reference."""
    root = tmp_path / "library"
    for name, content in {
        "b.py": f'"""B {LONG}"""\nclass C:\n    """C {LONG}"""\n    def method(self):\n        """M {LONG}"""\n',
        "a/inner.py": f'def f():\n    """F {LONG}\n\n        indented\n    """\n    return "{LONG}"\n',
        "short.py": '"""Short."""\n', "broken.py": f'"""Broken {LONG}"""\ndef f(:\n',
        "test/t.py": f'"""T {LONG}"""\n', "site-packages/s.py": f'"""S {LONG}"""\n', "latin.py": b"\xe9 = 1\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: {"stdlib": str(root)}[name])
    topics = {"while": "\nThe while statement.\n", "for": "The for 却 é.\n"}
    monkeypatch.setattr(demo.pydoc_data.topics, "topics", topics)


def test_docstrings_are_those_of_the_library_s_own_files_in_their_order(library):
    assert list(demo.docstrings()) == [f"F {LONG}\n\nindented", f"B {LONG}", f"C {LONG}", f"M {LONG}"]


def test_the_text_is_the_topics_and_then_docstrings_up_to_a_size(library, cache_folder, monkeypatch):
    monkeypatch.setattr(demo, "CHARACTERS", 3 * len(f"B {LONG}") + 20)
    monkeypatch.setattr(demo, "WORDS", 300)
    text, tokenizer = demo.files()
    expected = ["The for 却 é.", "The while statement.", f"F {LONG}\n\nindented", f"B {LONG}", f"C {LONG}"]
    assert Path(text).read_text(encoding="utf-8") == "\n\n".join(expected) + "\n"
    assert {Path(text).parent, Path(tokenizer).parent} == {cache_folder}
    bpe = load_tokenizer(tokenizer)
    said = Path(text).read_text(encoding="utf-8") + "👍 and words\tit has never seen\r\n"
    ids = bpe.encode(said).ids
    assert bpe.decode(ids) == said and len(ids) < len(said.encode()) and bpe.get_vocab_size() == 300


def test_text_and_tokenizer_are_made_once_and_again_if_one_is_missing(library, monkeypatch):
    monkeypatch.setattr(demo, "WORDS", 300)
    files = [Path(path) for path in demo.files()]
    before = [path.read_bytes() for path in files]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "docstrings", None)
        assert [Path(path) for path in demo.files()] == files
    for path in files:
        path.unlink()
        assert [Path(path).read_bytes() for path in demo.files()] == before


def test_the_first_command_of_the_readme(monkeypatch):
    """With Python's own documentation, though not all of it."""
    topics = demo.pydoc_data.topics.topics
    monkeypatch.setattr(demo.pydoc_data.topics, "topics", {name: topics[name] for name in sorted(topics)[:10]})
    monkeypatch.setattr(demo, "CHARACTERS", 20_000)
    monkeypatch.setattr(demo, "WORDS", 400)
    code, out, err = command(train.main, "--demo", *SHAPE, *QUICK, "--max-steps", 3, "--prompt", "The function")
    assert (code, err) == (0, "") and Path("runs/llm/config.json").exists()
    assert "The function" in out and "--prompt 'The function" in out.splitlines()[-1]
    assert json.loads(Path("runs/llm/config.json").read_text())["vocab_size"] == 400


def test_a_cache_folder_that_cannot_be_made_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "file/cache"))
    check(command(train.main, "--demo"), "cannot write to the cache folder", "file/cache", "Not a directory",
          "set NANOLLM_CACHE")
