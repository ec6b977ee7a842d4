"""The tokenizer that a run without one makes from its text: what it is, where it is kept, who reads it."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from kinds import whole
from tiny import GOOD, SHAPE, check, command, make_text

import train
from console import options
from storage import tokenizer_training, tokens
from storage.checkpoint import read_trainer
from storage.texts import END
from storage.tokenizer_training import cached_tokenizer, trained_tokenizer, usual_size
from storage.tokens import load_tokenizer

pytestmark = pytest.mark.usefixtures("cheap")
FLAGS = [*SHAPE, *tiny.QUICK, "--text", "text.txt", "--artifact-dir", "run"]


@pytest.fixture(autouse=True)
def text(cheap, tmp_path):
    return make_text(tmp_path / "text.txt")


def test_it_spells_every_text_and_has_an_end_of_text_token(text):
    t, said = trained_tokenizer(text, 300), f"却说\r\n the cat\0 👍 é {END}"
    assert t.get_vocab_size() == 300 and t.token_to_id(END) == 0
    assert t.decode(whole(said, t), skip_special_tokens=False) == said and whole(said, t)[-1] == 0
    assert "Ġcat" in t.get_vocab()


def test_the_end_of_text_token_is_not_learned_from(tmp_path):
    Path("documents.txt").write_text(END.join(["a dog ran ", "a cat sat "] * 500))
    assert not [word for word in trained_tokenizer("documents.txt", 400).get_vocab() if "end" in word and word != END]


def test_chinese_words_are_learned_and_its_clauses_are_not(tmp_path):
    Path("zh.txt").write_text("却说孙悟空一个筋斗云" * 50, encoding="utf-8")
    t = trained_tokenizer("zh.txt", 600)
    lengths = [len(t.decode([id])) for id in whole("却说孙悟空一个筋斗云", t)]
    assert sum(lengths) == 10 and max(lengths) == 2


@pytest.mark.parametrize("n_byte, words", [
    (0, 512), (520_000, 1024), (1_100_000, 2048), (5 * 10**6, 8192), (10**12, 8192)])
def test_its_size_follows_from_that_of_the_text(n_byte, words):
    assert usual_size(n_byte) == words


def test_a_sample_of_a_large_text_comes_from_all_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer_training, "SAMPLE", 1 << 11)
    monkeypatch.setattr(tokens, "BLOCK", 1 << 10)
    Path("large.txt").write_text("".join(f"{i:07} " for i in range(1 << 10)))        # 8 KiB: 8 blocks
    taken = "".join(tokenizer_training.sample("large.txt"))
    assert len(taken) <= 1 << 11 and taken.startswith("0000000 ") and int(taken[-8:]) > 1 << 9


def test_the_same_text_gives_the_same_file_however_many_threads(text):
    code = "import sys; from storage.tokenizer_training import cached_tokenizer; print(cached_tokenizer(sys.argv[1]))"
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "NANOLLM_CACHE": str(text.parent / "other")}
    other = subprocess.run([sys.executable, "-c", code, str(text)], env=environment, capture_output=True, text=True,
                           check=True, cwd=Path(train.__file__).parent).stdout.strip()
    one, other = Path(cached_tokenizer(text)), Path(other)
    assert one != other and (one.name, one.read_bytes()) == (other.name, other.read_bytes())


def test_it_is_made_once_for_a_text_and_a_size(text, monkeypatch):
    first = cached_tokenizer(text)
    assert cached_tokenizer(text, 300) != first
    monkeypatch.setattr(tokenizer_training, "trained_tokenizer", None)
    assert cached_tokenizer(text) == first
    text.write_bytes(text.read_bytes() + b".")
    with pytest.raises(TypeError):
        cached_tokenizer(text)


# ---------------------------------------------------------------- in a run

def test_a_text_alone_is_a_complete_command_and_is_resumed_without_the_cache(tmp_path, cache_folder):
    code, out, err = command(train.main, *FLAGS, "--max-steps", 2)
    assert (code, err) == (0, "")
    n = load_tokenizer("run/tokenizer.json").get_vocab_size()
    assert out.startswith(f"tokenizer  a byte-level BPE of {n} tokens, made from the text\n")
    assert read_trainer(Path("run/checkpoint-2"))[1]["command"]["tokenizer"] is None
    shutil.rmtree(cache_folder)
    code, out, err = command(train.main, "--resume", "--artifact-dir", "run", "--max-steps", 3)
    assert (code, err) == (0, "") and "made from the text" not in out
    assert [name for name in os.listdir(cache_folder) if "tokenizer" in name] == []


def test_vocab_size_is_that_of_the_model(tmp_path):
    assert command(train.main, *FLAGS, "--max-steps", 1, "--vocab-size", 280)[::2] == (0, "")
    assert json.loads(Path("run/config.json").read_text())["vocab_size"] == 280
    tiny.make_tokenizer(tmp_path / "tokenizer.json")
    check(command(train.main, *GOOD, "--vocab-size", 300), "--vocab-size is for a tokenizer that is made")
    check(command(train.main, *FLAGS, "--vocab-size", 256), "--vocab-size: must be a whole number of at least 257")
    check(command(train.main, "--resume", "--artifact-dir", "run", "--vocab-size", 281),
          "--vocab-size was 280 in this run and cannot become 281")


def test_another_rank_reads_what_rank_0_made_and_another_machine_makes_the_same(text, monkeypatch, tmp_path):
    request = options.parse([*FLAGS])
    files = [request.files()]
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_training, "trained_tokenizer", None)
        files.append(request.files())
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "another machine's"))
    files.append(request.files())
    assert files[0] == files[1] != files[2]
    assert len({Path(path).read_bytes() for _, path, _ in files}) == 1


def test_two_processes_share_it(on_cpu, text):
    assert command(train.main, *FLAGS, "--max-steps", 1, "--processes", 2)[::2] == (0, "")


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"\xff\xfe", "UTF-16"), (b"caf\xe9 " * 99, "not UTF-8")])
def test_a_text_that_cannot_be_used_is_named(content, words, text):
    text.write_bytes(content)
    code, _, err = command(train.main, *FLAGS)
    assert code == 2 and err.count("\n") == 1 and "text.txt" in err and words in err
