"""python -m extras.make_tokenizer: the tokenizer that a run would make, in a file."""
from pathlib import Path

from tiny import check, command, make_text

from extras import make_tokenizer
from storage.tokenizer_training import cached_tokenizer


def test_the_command_writes_what_a_run_would_make(cheap, tmp_path):
    text = make_text(tmp_path / "text.txt")
    code, out, err = command(make_tokenizer.main, "text.txt", "new/t.json", "--vocab-size", 300)
    assert (code, out, err) == (0, "new/t.json: 300 tokens, made from text.txt\n", "")
    assert Path("new/t.json").read_bytes() == Path(cached_tokenizer(text, 300)).read_bytes()
    check(command(make_tokenizer.main, "text.txt", "new/t.json"), "new/t.json exists and is not overwritten")
    check(command(make_tokenizer.main, "none.txt", "t.json"), "none.txt: there is no such file")
    Path("lines.jsonl").write_text('{"body": "the cat"}\n' * 3)
    code, out, _ = command(make_tokenizer.main, "text.txt", "lines.jsonl", "t.json", "--field", "body")
    assert code == 0 and "documents: 4, files: 2" in out
