"""Bad input: one line on stderr that names the culprit and the remedy, exit code 2, nothing written."""
import contextlib
import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import pytest
from tiny import GOOD, QUICK, SHAPE, check, command, make_files, make_tokenizer, snapshot

import evaluate
import generate
import train
from console import cli
from console.cli import number
from nanollm import Config, NanoLLM
from storage.files import InputError

pytestmark = pytest.mark.usefixtures("cheap")

ROOT = Path(train.__file__).parent


def make_input(folder):
    """Everything, good and bad, that the cases below name."""
    make_files(folder)
    chinese = "却说那孙悟空一个筋斗云，去了十万八千里。" * 60
    for name, content in {
        "empty.txt": b"", "short.txt": b"the cat sat", "gb.txt": chinese.encode("gb18030"),
        "utf16.txt": chinese.encode("utf-16"), "latin.txt": ("plain text " * 50 + "déjà vu").encode("latin-1"),
        "binary.txt": random.Random(0).randbytes(5000), "late.txt": b"the cat sat. " * 40_000 + b"\xff",
        "half.txt": "the cat 却".encode()[:-1], "not.json": b"{", "other.json": b'{"a": 1}', "list.json": b"[]",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "folder/a.png").mkdir(parents=True)
    model = NanoLLM(Config(260, 16, 1, 2, 2, 8, 24))
    model.save(folder / "model")                    # with fewer tokens than its tokenizer has
    make_tokenizer(folder / "model/tokenizer.json")
    (folder / "bert").mkdir()
    (folder / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    make_tokenizer(folder / "bert/tokenizer.json")
    (folder / "used").mkdir()
    (folder / "used/metrics.csv").touch()


# what is wrong: the flags added to good ones, then words of the message (regular expressions, in this order)
CASES = {
    "no such text": ("--text none.txt", "none.txt", "no such file", "give a"),
    "a text without a byte": ("--text empty.txt", "empty.txt", "is empty", "give a"),
    "a folder as text": ("--text folder", "folder", "has no files", "give one"),
    "Chinese in GB18030": ("--text gb.txt", "gb.txt", "not UTF-8 at byte 4", "iconv -f GB18030 -t UTF-8 gb.txt"),
    "UTF-16": ("--text utf16.txt", "utf16.txt is UTF-16", "iconv -f UTF-16 -t UTF-8"),
    "Latin-1": ("--text latin.txt", "latin.txt", "not UTF-8 at byte 551", "perhaps CP1252", "iconv -f CP1252"),
    "no text at all": ("--text binary.txt", "binary.txt", "not UTF-8 at byte", "does not look like text", "give a"),
    "a wrong byte late": ("--text late.txt", "late.txt", "not UTF-8 at byte 520000"),
    "a character cut off": ("--text half.txt", "half.txt", "ends inside a character, at byte 8"),
    "less than one window": ("--text short.txt", "short.txt", r"\d+ tokens", "needs 9", "give more text or a smaller"),
    "no such tokenizer": ("--tokenizer none.json", "none.json", "no such file", "give a"),
    "a folder as tokenizer": ("--tokenizer folder", "folder/tokenizer.json", "no such file", "give a"),
    "broken JSON": ("--tokenizer not.json", "not.json", "not valid JSON", "give a"),
    "JSON of something else": ("--tokenizer other.json", "other.json", "not a tokenizer", "give a"),
    "a list": ("--tokenizer list.json", "list.json", "not a JSON object", "give a"),
    "a text as tokenizer": ("--tokenizer text.txt", "text.txt", "not valid JSON", "give a"),
    "ids beyond the vocabulary": ("--init-from model", "tokenizer.json", "290", "260", "own tokenizer"),
    "another kind of model": ("--init-from bert", "bert/config.json", "model_type 'bert' is not implemented"),
    "a run that has not ended": ("--init-from used", "used has no model yet", "has not ended: continue it"),
    "no model to start from": ("--init-from none", "none/config.json", "no such file", "a model's folder"),
    "heads that do not divide": ("--n-head 3 --n-kv-head 3", r"--embedding-dim \(16\)", "multiple of",
                                 r"--n-head \(3\)"),
    "an odd head size": ("--embedding-dim 6 --n-head 2", "even", r"--embedding-dim \(6\)", r"twice --n-head \(2\)"),
    "key/value heads that do not divide": ("--n-head 4 --n-kv-head 3", r"--n-kv-head \(3\)",
                                           r"must divide --n-head \(4\)"),
    "a stride with gaps": ("--stride 9", "--stride 9 is more than a window, 8 tokens"),
    "too little to validate": ("--val-fraction 0.001", "validation part", "1 tokens", "needs 9", "more text"),
    "too little to train on": ("--val-fraction 0.999", "training part", "1 tokens", "needs 9", "more text"),
    "a batch of more than there is": ("--batch-size 300", "300 windows", "--batch-size 300", "235 training windows",
                                      "lower"),
    "the same by parts": ("--batch-size 30 --grad-accum 10", "300 windows", "--batch-size 30 × --grad-accum 10",
                          "235 training windows", "lower"),
    "windows longer than the context": ("--seq-len 9", "--seq-len 9", "longest context", "--max-context 8"),
    "a rate that would rise": ("--min-lr 0.1", "--min-lr 0.1", "--learning-rate 0.01", "lower --min-lr"),
    "patience without validation": ("--patience 2 --val-fraction 0", "--patience needs a validation part", "leave it"),
    "an end of a constant rate": ("--min-lr 1e-4 --lr-schedule constant", "--min-lr has no effect with",
                                  "--lr-schedule constant", "leave it out"),
    "more warm-up than training": ("--warmup-steps 9 --max-steps 8", "--warmup-steps 9", "the 8 steps", "lower"),
    "a file as folder": ("--artifact-dir text.txt", "text.txt", "Not a directory", "another --artifact-dir"),
    "a folder below a file": ("--artifact-dir text.txt/a", "text.txt/a", "Not a directory", "another --artifact-dir"),
    "a folder that holds a run": ("--artifact-dir used", "used", "already holds a run", "--resume", "--artifact-dir"),
    "a name too long": ("--artifact-dir " + "x" * 300, "xxx", "name too long", "another --artifact-dir"),
    "nothing to resume": ("--resume --artifact-dir folder", "--resume", "no checkpoint in folder", "without --resume"),
    "no folder to resume": ("--resume --artifact-dir none", "--resume", "no folder none", "with --artifact-dir"),
    "a demo with a text": ("--demo", "--demo brings", "leave out --text"),
    "an unknown flag": ("--batchsize 3", "unrecognized arguments: --batchsize", "--help"),
    "a flag cut short": ("--batch 3", "unrecognized arguments: --batch", "--help"),
    "a flag without its value": ("--seed", "--seed", "expected one argument", "--help"),
    "a word too many": ("word", "unrecognized arguments: word", "--help"),
    "an unknown activation": ("--activation tanh", "--activation", "invalid choice: 'tanh'", "silu"),
    "an unknown device": ("--device tpu", "--device", "invalid choice: 'tpu'", "auto"),
    "a prompt in another encoding": ("--prompt \udcff", "--prompt", "UTF-8"),
    "a model beyond any memory": ("--embedding-dim 1000000 --hidden-dim 1000000 --n-block 1000 --max-context 8",
                                  "out of memory", "allocate", "smaller model"),
}
ENCODED = {"a batch of more than there is", "the same by parts", "too little to validate", "too little to train on",
           "more warm-up than training"}        # only the tokens show it: the good text's ids stay in the cache


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tmp_path, cache_folder):
    make_input(tmp_path)
    cache_folder.mkdir()
    before = snapshot(tmp_path)
    flags, *words = CASES[case]
    check(command(train.main, *GOOD, *flags.split()), *words)
    if case in ENCODED:
        assert {path.suffix for path in cache_folder.iterdir()} == {".ids", ".json"}
    assert {path: content for path, content in snapshot(tmp_path).items()
            if not (case in ENCODED and path.startswith(f"{cache_folder.name}/"))} == before


def test_the_good_flags_are_good(tmp_path):
    make_input(tmp_path)
    assert command(train.main, *GOOD, "--max-steps", 1)[::2] == (0, "")


# ---------------------------------------------------------------- what a test must arrange

def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    make_input(tmp_path)
    real = open

    def denied(path, *args, **named):
        if str(path).endswith(locked):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **named)
    monkeypatch.setattr("builtins.open", denied)
    monkeypatch.setattr("io.open", denied)
    for locked in ("text.txt", "tokenizer.json"):
        check(command(train.main, *GOOD), re.escape(locked), "Permission denied", "give a")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    make_input(tmp_path)
    before = snapshot(tmp_path)

    def denied(*args, **named):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", denied)
    check(command(train.main, *GOOD), "cannot write to run", "Read-only file system", "another --artifact-dir")
    check(command(train.main, *GOOD[:-2]), "cannot write to runs", "Read-only file system", "another --artifact-dir")
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a folder in which nobody can make a file")
def test_a_folder_that_really_cannot_be_written(tmp_path):
    make_input(tmp_path)
    check(command(train.main, *GOOD, "--artifact-dir", "/proc/nanollm"), "cannot write to /proc/nanollm", "another")


def test_no_gpu_with_cupy_s_reason(tmp_path, monkeypatch):
    make_input(tmp_path)
    before = snapshot(tmp_path)

    def is_available():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is\ninsufficient")
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(is_available=is_available))
    check(command(train.main, *GOOD, "--device", "gpu"), "device gpu", "cudaErrorInsufficientDriver: CUDA driver "
          "version is insufficient", "--device cpu")
    monkeypatch.setattr(sys.modules["cupy"], "is_available", lambda: False)
    check(command(train.main, *GOOD, "--device", "gpu"), "device gpu", "no CUDA GPU", "--device cpu")
    monkeypatch.setitem(sys.modules, "cupy", None)          # not installed
    for main, flags in ((train.main, GOOD), (generate.main, ["model"]), (evaluate.main, ["model", "--text", "a"])):
        check(command(main, *flags, "--device", "gpu"), "device gpu", "cupy", "--device cpu")
    assert snapshot(tmp_path) == before


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    """CuPy's OutOfMemoryError is a MemoryError too. What was saved stays; smaller batches can resume."""
    make_input(tmp_path)
    real = NanoLLM.loss

    def big(self, x, y, *drop):
        if x.size > 20:
            raise MemoryError("Out of memory allocating 9,999 bytes")
        return real(self, x, y)
    monkeypatch.setattr(NanoLLM, "loss", big)
    code, _, err = command(train.main, *GOOD, "--batch-size", 4)
    assert code == 2 and err.count("\n") == 1
    assert re.search("out of memory .*9,999 bytes.*lower --batch-size.*--grad-accum.*--seq-len", err)
    flags = ["--resume", "--artifact-dir", "run", "--max-steps", 2, "--batch-size", 2, "--grad-accum", 2]
    assert command(train.main, *flags)[::2] == (0, "")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken():
        raise TypeError("a bug")
    with pytest.raises(TypeError):
        cli.run(broken)


# ---------------------------------------------------------------- cli.py itself

def outcome(main):
    return command(lambda _: main() or 0)


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize(("error", "code", "line"), [
    (InputError("a\n  b"), 2, "train.py: a b\n"),
    (FileNotFoundError(2, "No such file", "x.txt"), 2, "train.py: x.txt: No such file\n"),
    (OSError("odd"), 2, "train.py: odd\n"),
    (MemoryError("3 GB"), 2, "train.py: out of memory (3 GB): "),
    (KeyboardInterrupt(), 130, "train.py: interrupted\n")])
def test_errors_become_one_line(error, code, line):
    got = outcome(raising(error))
    assert got[0] == code and got[1] == "" and got[2].startswith(line) and got[2].count("\n") == 1


def test_warnings_are_one_line_too():
    code, out, err = outcome(lambda: __import__("warnings").warn("mind\nthis", stacklevel=1))
    assert (code, out) == (0, "") and err == "train.py: warning: mind this\n"


def test_warnings_that_are_errors_are_shown_and_end_nothing(capsys):
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("error")          # python -W error
        cli.run(lambda: warnings.warn("mind this", stacklevel=1), "it")
    assert not end.value.code and capsys.readouterr().err == "it: warning: mind this\n"


def test_a_process_whose_streams_are_closed(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: print("x", file=sys.stdout) or sys.stderr.isatty())
    assert end.value.code is False
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_a_stream_that_is_no_file_s(finished):
    """A notebook's, an editor's."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit) as end:
        cli.run(lambda: generate.main([str(finished[0]), "--prompt", "the cat", "--max-new-tokens", "2"]), "it")
    assert end.value.code == 0 and shown.getvalue().startswith("the cat")


def test_what_a_terminal_cannot_show_does_not_stop_a_run(tmp_path):
    code = "from console import cli\ncli.run(lambda: print('却说'))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, rb"\u5374\u8bf4" + b"\n", b"")


def test_a_reader_that_has_seen_enough(tmp_path):
    code = "from console import cli\ncli.run(lambda: print('x' * 1_000_000))\n"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("flags", [{}, {"write_through": True}])
def test_what_stdout_cannot_take(flags, monkeypatch, capsys):
    """As on a full disk. With an empty buffer Python's own end does not fail a second time."""
    for main in (lambda: print("x"), lambda: (print("x"), sys.exit())):         # the second is --help's way
        with open("/dev/full", "w") as full, pytest.raises(SystemExit) as end:
            full.reconfigure(**flags)
            monkeypatch.setattr(sys, "stdout", full)
            cli.run(main, "it")
        assert end.value.code == 2 and capsys.readouterr().err == "it: standard output: No space left on device\n"


def test_number():
    assert number(int, 1)("3") == 3 and number(float, 0)("0") == 0 and number(int, 0, 5)("5") == 5
    assert isinstance(number(int, 1)("3"), int) and isinstance(number(float, 0)("3"), float)
    for kind, text in (
            (number(int, 1), "0"), (number(int, 1, 5), "6"), (number(int, 1), "3.0"), (number(int, 0), "1" * 5000),
            (number(float, 0), "nan"), (number(float, 0), "inf"), (number(float, 0, open_low=True), "0"),
            (number(float, 0, 1, open_high=True), "1"), (number(float, 0, 1), "1.1")):
        with pytest.raises(cli.argparse.ArgumentTypeError, match=f"must be a .*number .* not '{text}'"):
            kind(text)


@pytest.mark.parametrize("name", ["train.py", "generate.py", "evaluate.py", "-m extras.plan", "-m extras.quantize",
                                  "-m extras.export_gguf"])
def test_commands_as_they_are_called(name):
    """Each runs in its own process: exit code and stderr are what a shell sees. The usage is one line."""
    wrong, helped = (subprocess.Popen([sys.executable, *name.split(), flag], cwd=ROOT, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                     for flag in ("--nonsense", "--help"))          # at the same time
    (out, err), (shown, _) = (process.communicate(timeout=60) for process in (wrong, helped))
    assert wrong.returncode == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"{name}: " if name.endswith(".py") else f"python {name}: ")
    usage, blank, *_ = shown.split("\n")
    assert usage.startswith(f"usage: python {name} ") and not blank


OTHERS = [
    (generate.main, "model", "tokenizer.json has 290 tokens, but the model has only 260"),
    (generate.main, "none", "none is not a folder"), (generate.main, "text.txt", "text.txt is not a folder"),
    (generate.main, "folder", "folder/config.json: there is no such file; is this a model's folder"),
    (generate.main, "bert", "model_type 'bert'"),
    (generate.main, "used", "used has no model yet because its training has not ended"),
    (generate.main, "", "the following arguments are required: FOLDER"),
    (generate.main, "model --temperature -1", "--temperature: must be a number of at least 0"),
    (generate.main, "model --top-k 0", "--top-k: must be a whole number of at least 1"),
    (generate.main, "model --top-p 0", "--top-p: must be a number above 0 and at most 1"),
    (generate.main, "model --top-p 1.1", "--top-p: must be a number above 0 and at most 1"),
    (generate.main, "model --max-new-tokens 0", "--max-new-tokens: must be a whole number of at least 1"),
    (generate.main, "model --seed -1", "--seed: must be a whole number of at least 0"),
    (generate.main, "model --prompt \udcff", "--prompt: must be UTF-8"),
    (generate.main, "model --stop \udcff", "--stop: must be UTF-8"),
    (generate.main, "model --stop a --stop=", "--stop: an empty text .*at least one character"),
    (generate.main, "model --num-samples 0", "--num-samples: must be a whole number of at least 1 and at most 1000"),
    (generate.main, "model --num-samples 1001", "--num-samples: must be a whole number of at least 1 and at most 1000"),
    (evaluate.main, "model", "required: --text"), (evaluate.main, "none --text text.txt", "none is not a folder"),
    (evaluate.main, "fine --text none.txt", "none.txt: there is no such file"),
    (evaluate.main, "fine --text empty.txt", "empty.txt is empty"),
    (evaluate.main, "fine --text short.txt --seq-len 9", "--seq-len 9 is more than the model's longest context, 8"),
    (evaluate.main, "fine --text short.txt", r"short.txt has \d tokens, and one window needs 9"),
    (evaluate.main, "fine --text text.txt --batch-size 0", "--batch-size: must be a whole number of at least 1"),
    (evaluate.main, "fine --text text.txt --stride 0", "--stride: must be a whole number of at least 1"),
    (evaluate.main, "fine --text text.txt --stride 9", "--stride 9 is more than a window, 8 tokens"),
    (evaluate.main, "fine --text text.txt --seq-len 4 --stride 5", "--stride 5 is more than a window, 4 tokens"),
    (evaluate.main, "none --text none.txt --figure loss.pdf", "--figure loss.pdf: .*ends in .png"),
    (evaluate.main, "none --text none.txt --figure folder/a.png", "folder/a.png is a folder: name a file in it"),
    (evaluate.main, "none --text none.txt --figure nowhere/a.png", "nowhere/a.png .No such file.*name another"),
    (evaluate.main, "none --text none.txt --figure text.txt/a.png", "text.txt/a.png .Not a directory"),
    (evaluate.main, f"none --text none.txt --figure {'x' * 251}.png", "File name too long"),
    (evaluate.main, "none --text none.txt --figure \udcff.png", "--figure: must be UTF-8"),
]


@pytest.mark.parametrize(("main", "flags", "words"), OTHERS, ids=[f"{m.__module__} {f}" for m, f, _ in OTHERS])
def test_bad_input_to_the_other_commands(main, flags, words, tmp_path, cache_folder):
    make_input(tmp_path)
    cache_folder.mkdir()
    NanoLLM(Config(290, 16, 1, 2, 2, 8, 24)).save(tmp_path / "fine")
    make_tokenizer(tmp_path / "fine/tokenizer.json")
    before = snapshot(tmp_path)
    check(command(main, *flags.split(), name="it"), words, name="it")
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- signals

SLEEPER = """
import sys, time
sys.path[:0] = [{root!r}]
import train
from console import cli
def slow(self, *args, **named):
    print("in a step", flush=True)
    time.sleep(60)
train.Adam.step = slow
cli.run(train.main)
"""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_quits_at_once(files, first, second):
    flags = [*SHAPE, *QUICK, *files, "--device", "cpu", "--artifact-dir", "run"]
    with subprocess.Popen([sys.executable, "-c", SLEEPER.format(root=str(ROOT)), *flags], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for line in process.stdout:
            if line == "in a step\n":
                break
        process.send_signal(first)
        assert "Ctrl-C again" in process.stderr.readline() + process.stderr.readline()
        began = time.monotonic()
        process.send_signal(second)
        assert process.wait(50) == -second
        assert time.monotonic() - began < 45
        assert process.stderr.read() == ""


def test_only_ctrl_c_quits_a_run_that_was_told_to_stop(monkeypatch):
    """Several signals may say the same: the end of a session sends SIGHUP and SIGTERM, a limit of CPU time sends one a
    second. nohup lets a process ignore SIGHUP, and the terminal on which to answer may have gone.
    """
    def gone(handle, text):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "write", gone)
    with cli.Stop() as stop:
        for number in (signal.SIGXCPU, signal.SIGXCPU, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGXCPU and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_may_interrupt_a_print(capfd):
    """Python refuses to enter a buffered stream that is being written to: the answer to a signal must not need one."""
    class Interrupted(io.RawIOBase):
        def writable(self):
            return True

        def write(self, text):
            os.kill(os.getpid(), signal.SIGTERM)
            return len(text)
    stream = io.TextIOWrapper(io.BufferedWriter(Interrupted()))
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), cli.Stop() as stop:
        print("a line", flush=True)
    assert stop.signal == signal.SIGTERM and "Ctrl-C again" in capfd.readouterr().err
