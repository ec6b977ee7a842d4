"""What --text names: which files, in which order, what of them, and what is between two documents."""
import gzip
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from kinds import KINDS, characters, every_kind, whole
from tiny import GOOD, SHAPE, check, command, make_files, rows

import evaluate
import train
from data import TokenDataset
from storage import texts, tokens
from storage.checkpoint import read_trainer
from storage.files import InputError
from storage.texts import END, ENDS, expand, gather, with_stdin

pytestmark = pytest.mark.usefixtures("cheap")
FILES = {"b.txt": "bé", "a/z.md": "# A\r\n", "a/deep/x.py": "x = 1\n", "a/.hidden": "no", "a/.git/log.txt": "no",
         "a.jsonl": '{"text": "one"}\n\n{"n": 1, "text": "two\\u00e9"}\n{"text": ""}', "c.txt.gz": "packed",
         "D.JSONL.GZ": '\ufeff{"text": "three"}\r\n{"body": "no", "text": "four\\n"}\r\n', "empty.txt": ""}
DOCUMENTS = ["three", "four\n", "one", "twoé", "x = 1\n", "# A\r\n", "bé", "packed"]       # in the order of the names


def make(folder, files=FILES):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    return folder


def read(*names, tokenizer=None, **options):
    return Path(gather(list(names), tokenizer, **options)[0]).read_bytes().decode()


# ---------------------------------------------------------------- which files

def test_a_plain_file_is_used_where_it_is(tmp_path, cache_folder):
    make(tmp_path)
    for name in ("b.txt", "b.tx?", "a/deep"):
        assert gather([name], None) == (("b.txt" if name[0] == "b" else "a/deep/x.py"),) * 2
    assert not cache_folder.exists()


def test_files_are_in_the_order_of_the_names_and_count_once(tmp_path):
    make(tmp_path)
    Path("[1].txt").write_text("a name, not a pattern")
    for names, found in {("b.txt", "a"): "b.txt a/deep/x.py a/z.md", ("a", "a/z.md"): "a/deep/x.py a/z.md",
                         ("*.txt", "b.txt"): "[1].txt b.txt empty.txt", ("**/*.[mp]*",): "a/deep/x.py a/z.md",
                         ("[1].txt",): "[1].txt"}.items():
        assert [str(path) for path in expand(names)] == found.split(), names


def test_every_kind_of_file_and_the_separator_between_documents(tmp_path):
    make(tmp_path / "all")
    assert read("all") == END.join(DOCUMENTS)
    assert read("all", separate=False) == "".join(DOCUMENTS)
    assert read("all", tokenizer=KINDS["characters"]) == "\n\n".join(DOCUMENTS)
    assert read("all/D.JSONL.GZ", "all/b.txt", separate=False) == "three" + "four\n" + "bé"
    Path("other.jsonl").write_text('{"body": "x", "text": 3}\n{"body": "y"}\n')
    assert read("other.jsonl", field="body") == f"x{END}y"


@pytest.mark.parametrize("name", ENDS)
def test_the_separator_is_the_tokenizer_s_end_of_text(name):
    t = characters("ab", "?")
    t.add_special_tokens(["[PAD]", name])
    assert texts.separator(t) == (name, name)
    assert whole(f"a{name}b", t)[1] == t.token_to_id(name)


@pytest.mark.filterwarnings("ignore:.* of the characters")
@every_kind
def test_the_ids_are_those_of_each_document(kind, tmp_path, monkeypatch):
    """Joined by an end-of-text token, documents are encoded as alone."""
    make(tmp_path / "all")
    monkeypatch.setattr(tokens, "CHUNK", 90)
    t = KINDS[kind].from_str(KINDS[kind].to_str())
    t.add_special_tokens([END])
    t.save("t.json")
    ids = TokenDataset.from_text(gather(["all"], t)[0], "t.json", 2).tokens.tolist()
    number = t.token_to_id(END)
    assert ids == whole(END.join(DOCUMENTS), t)
    if kind.startswith("byte"):
        apart = [id for document in DOCUMENTS for id in (number, *whole(document, t))]
        assert ids == apart[1:]


# ---------------------------------------------------------------- the cache

def test_a_text_is_gathered_once_and_again_if_it_is_damaged(tmp_path, monkeypatch):
    make(tmp_path / "all")
    path = Path(gather(["all"], None)[0])
    with monkeypatch.context() as patch:
        patch.setattr(texts, "write", None)
        assert gather(["all"], None)[0] == str(path)
    path.write_bytes(b"damaged")
    assert read("all") == END.join(DOCUMENTS)
    before = {path.name for path in path.parent.iterdir()}
    Path("all/b.txt").write_text("changed")
    assert "changed" in read("all") and {path.name for path in path.parent.iterdir()} > before


def test_standard_input_is_stored_first(monkeypatch, cache_folder):
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("typed é\r\n".encode())))
        first, path = with_stdin(["a.txt", "-"])
        assert first == "a.txt" and Path(path).read_bytes() == "typed é\r\n".encode()
    assert [str(path) for path in cache_folder.iterdir()] == [path]
    assert with_stdin(["a.txt"]) == ["a.txt"]


# ---------------------------------------------------------------- bad input

BAD = {"half.gz": gzip.compress(b"text " * 999)[:-20], "not.gz": b"text", "late.jsonl": '{"text": "a"}\n{"text": 3}',
       "list.jsonl": "\n[1]", "broken.jsonl": '{"text": "a"}\n{"text"', "latin.jsonl": b'{"text": "\xe9"}',
       "surrogate.jsonl": '{"text": "a\\ud83d"}', "nothing.jsonl": '{"text": ""}\n', "deep.jsonl": "[" * 100_000,
       "latin.txt": b"caf\xe9 na\xefve " * 50, "bad.txt.gz": gzip.compress(b"caf\xe9 na\xefve " * 50),
       "a.png": b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("names, words", {
    "half.gz": "the text half.gz .*is it the whole file", "not.gz": "the text not.gz .*Not a gzipped file",
    "late.jsonl": "line 2 of the text late.jsonl has no text in a field 'text': .*--field .*in: none",
    "list.jsonl": "line 2 of the text list.jsonl has no text in a field", "deep.jsonl": "line 1 .*not valid JSON",
    "broken.jsonl": "line 2 of the text broken.jsonl is not valid JSON", "latin.jsonl": "line 1 .*not valid JSON",
    "surrogate.jsonl": "line 1 of the text surrogate.jsonl has half of a surrogate pair",
    "nothing.jsonl": "the text nothing.jsonl is empty", "none.txt": "none.txt: there is no such file: give",
    "none*.txt": "no file fits the pattern", "empty": "the folder empty has no files", "pipe": "pipe is a pipe",
    "good.txt latin.txt": "the text latin.txt is not UTF-8 at byte 3, .*iconv -f CP1252 -t UTF-8 latin.txt >",
    "good.txt bad.txt.gz": "bad.txt.gz is not UTF-8 at byte 3, .*gunzip -c bad.txt.gz | iconv -f CP1252 -t UTF-8 >",
    "good.txt a.png": "the text a.png is a PNG picture"}.items())
def test_each_file_is_named_in_errors(names, words, tmp_path, cache_folder):
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("empty/.hidden").mkdir(parents=True)
    Path("good.txt").write_text("good")
    os.mkfifo("pipe")
    with pytest.raises(InputError, match=words):
        gather(names.split(), None)
    assert not list(cache_folder.glob("*"))


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    make(tmp_path)
    scan = os.scandir

    def refused(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(InputError, match=r"cannot read the folder a/deep .Permission denied"):
        expand(["a"])


# ---------------------------------------------------------------- in a run

def test_a_run_on_several_texts_is_resumed_with_all_of_them(tmp_path):
    make_files(tmp_path)
    make(tmp_path / "all")
    Path("all/lines.jsonl").write_text("".join(json.dumps({"body": f"the cat {i}"}) + "\n" for i in range(99)))
    flags = [*SHAPE, *tiny.QUICK, "--tokenizer", "tokenizer.json", "--artifact-dir", "run", "--no-separator"]
    os.remove("all/a.jsonl"), os.remove("all/D.JSONL.GZ")
    code, out, err = command(train.main, *flags, "--text", "text.txt", "all", "--field", "body", "--max-steps", 2)
    assert (code, err) == (0, "") and "documents: 104, files: 7, between documents: nothing" in out
    settings = read_trainer(Path("run/checkpoint-2"))[1]["command"]
    assert settings["text"] == [str(tmp_path / "text.txt"), str(tmp_path / "all")]
    resume = ["--resume", "--artifact-dir", "run", "--max-steps", 3]
    code, _, err = command(train.main, *resume)
    assert (code, err, len(rows(tmp_path / "run"))) == (0, "", 3)
    Path("all/new.txt").write_text("new")
    check(command(train.main, *resume), "--resume: .* is not the text that this run began with")
    check(command(train.main, *resume, "--field", "text"), "--field was body in this run and cannot become text")


@pytest.mark.parametrize("flags, ends", [(["--text", "text.txt", "b.txt"], True), (["--text", "text.txt"], False),
                                         (["--text", "text.txt", "b.txt", "--no-separator"], False)])
def test_a_model_of_separated_texts_ends_with_the_separator(flags, ends, tmp_path):
    make(tmp_path)
    tiny.make_text(tmp_path / "text.txt")
    assert tiny.run(*flags, "--max-steps", 1, "--artifact-dir", "run") == 0
    assert json.loads(Path("run/generation_config.json").read_text())["eos_token_id"] == (0 if ends else None)
    assert json.loads(Path("run/tokenizer_config.json").read_text())["eos_token"] == (END if ends else None)


def test_an_evaluation_of_several_texts(finished, tmp_path):
    folder, *_ = finished
    make(tmp_path / "all")
    Path("joined.txt").write_bytes("\n\n".join(DOCUMENTS).encode())
    one, other = (json.loads(command(evaluate.main, folder, "--json", "--text", name)[1])
                  for name in ("all", "joined.txt"))
    assert one | {"tokens_per_second": 0} == other | {"tokens_per_second": 0}
    assert "between documents: an empty line" in command(evaluate.main, folder, "--text", "all")[1]
    Path("other.txt").write_text(DOCUMENTS[0])
    several = command(evaluate.main, "--text", "joined.txt", "--text", "other.txt", folder)[1]      # the folder last
    assert "documents: 2, files: 2" in several


def test_a_tokenizer_may_be_a_folder(finished, tmp_path):
    folder, *_ = finished
    make_files(tmp_path)
    assert command(train.main, *GOOD, "--tokenizer", folder, "--max-steps", 1)[::2] == (0, "")
    assert read_trainer(Path("run/checkpoint-1"))[1]["command"]["tokenizer"] == str(folder / "tokenizer.json")
