"""docs/characters.py: a tokenizer of the characters of a text."""
import sys
from pathlib import Path

import pytest
from kinds import whole
from tiny import check, command

from data import TokenDataset
from storage import tokens

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import characters


def test_every_character_is_a_token_and_all_others_are_one(tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "characters.json"
    text.write_bytes("\ufeffthe cat\r\nsat. 却\r\n".encode())
    assert command(characters.main, text, path) == (0, "", "")
    t = tokens.load_tokenizer(path)
    assert sorted(t.get_vocab()) == sorted({*"the cat\r\nsat. 却", "<unk>"})
    ds = TokenDataset.from_text(text, path, 4)          # pytest makes a warning an error
    assert t.decode(ds.tokens.tolist()) == "the cat\r\nsat. 却\r\n" and ds.tokens.max() + 1 < ds.vocab_size
    with pytest.warns(UserWarning, match="'€'"):
        assert tokens.encode_prompt(t, "a€") == [*whole("a", t), ds.vocab_size - 1]


def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 cr\xe8me")
    for text, message in ((tmp_path / "none.txt", "none.txt"), (tmp_path / "text.txt", "not UTF-8 at byte 3")):
        outcome = command(characters.main, text, tmp_path / "out.json", name="characters.py")
        check(outcome, message, name="characters.py")
    assert not (tmp_path / "out.json").exists()
    check(command(characters.main, tmp_path / "text.txt", name="characters.py"), "FILE", name="characters.py")
