"""A file that is no UTF-8 text is named for what it is, and no advice loses a character without saying so."""
import gzip
import shutil
import subprocess

import pytest
from kinds import CORPUS

from storage import encodings, tokens
from storage.files import InputError

CHINESE = "却说那孙悟空一个筋斗云，去了十万八千里。唐僧道：“悟空，休得无礼！”\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга.\n"
FRENCH = "Longtemps, je me suis couché de bonne heure. À peine ma bougie éteinte, mes yeux se fermaient\n"
OTHERS = {      # the name in the message: a text, and how Python calls the encoding
    "GB18030": (CHINESE, "gbk"), "BIG5": ("卻說那孫悟空一個筋斗雲，去了十萬八千里。\n", "big5"),
    "CP932": ("吾輩は猫である。名前はまだ無い。どこで生れたか\n", "shift_jis"),
    "EUC-JP": ("吾輩は猫である。名前はまだ無い。どこで生れたか\n", "euc_jp"),
    "CP949": ("죽는 날까지 하늘을 우러러 한 점 부끄럼이 없기를\n", "euc_kr"),
    "CP1251": (RUSSIAN, "cp1251"), "KOI8-R": (RUSSIAN, "koi8_r"), "CP1252": (FRENCH, "latin-1"),
    "CP1250": ("Litwo! Ojczyzno moja! ty jesteś jak zdrowie; Ile cię trzeba cenić\n", "cp1250")}


def problem_of(path, content):
    """What read_text says of a file; None if it is a text."""
    path.write_bytes(content)
    try:
        for _ in tokens.read_text(path, tokens.hashlib.sha256()):
            pass
    except InputError as problem:
        assert str(problem).isprintable() and str(problem).startswith(f"the text {path} is ")
        return str(problem).removeprefix(f"the text {path} is ")


def converted(problem):
    """What the command in a message makes of the file."""
    command = problem[problem.index("iconv "):problem.index(" > ")]
    return subprocess.run(command, shell=True, check="-c" not in command, stdout=subprocess.PIPE).stdout.decode()


needs_iconv = pytest.mark.skipif(not shutil.which("iconv"), reason="iconv is the advice that is tried")


@needs_iconv
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("before", [b"", b"abc\n" * 30_000])
def test_other_encodings_are_guessed_shown_and_called_a_guess(name, before, tmp_path):
    text, encoding = OTHERS[name]
    problem = problem_of(tmp_path / "my text", before + text.encode(encoding) * 3)
    line = before.count(b"\n") + 1
    assert f", in line {line}, and perhaps {name}, in which it reads '" in problem and "if that is right, " in problem
    shown = problem.split("reads '")[1].split("'")[0].strip()
    assert len(shown) > 10 and shown in (text * 3).replace("\n", " ")
    assert converted(problem) == before.decode() + text * 3


@needs_iconv
def test_curly_quotes_are_windows_1252_not_control_characters(tmp_path):
    text = "The “quick” brown fox — it’s the dog’s day… and so on.\n" * 9
    assert converted(problem_of(tmp_path / "text", text.encode("cp1252"))) == text


@pytest.mark.parametrize("line", ["it’s late", "an “apple", "£5 – no more", "a\xa0b"])
def test_one_windows_1252_mark_in_an_english_text_is_not_half_of_a_chinese_letter(line, tmp_path):
    content = ("The quick brown fox jumps over the lazy dog.\n" * 90 + line + "\n").encode("cp1252")
    assert "perhaps CP1252" in problem_of(tmp_path / "text", content)


@needs_iconv
@pytest.mark.parametrize("text, damage, n_wrong", [
    (CHINESE * 900, b"\xff", 1), (RUSSIAN * 90, b"\xd0", 1), (FRENCH * 90, FRENCH.encode("latin-1"), 3),
    (CHINESE * 90, b"\xed\xa0\xbd\xed\xb8\x80", 6)], ids=["chinese", "russian", "one line in latin-1", "surrogates"])
@pytest.mark.parametrize("where", ["begin", "end"])
def test_utf_8_with_damage_is_not_taken_for_another_encoding(text, damage, n_wrong, where, tmp_path):
    text, line = text.encode(), text.count("\n")
    if where == "end":
        content, at = text + damage + CHINESE.encode(), len(text)
    else:
        content, at, line = damage + CHINESE.encode() + text, 0, 0
    at += next((i for i, byte in enumerate(damage) if byte > 127))
    problem = problem_of(tmp_path / "text", content)
    assert problem.startswith(f"UTF-8 with damage at byte {at}, in line {line + 1} (wrong bytes in all: {n_wrong}): ")
    assert problem.endswith("leaves them out")
    assert converted(problem) == content.decode(errors="ignore")


@needs_iconv
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["The quick brown fox\r\njumps 17 times\n" * 20, CHINESE * 20])
def test_wide_encodings_with_and_without_a_mark(text, encoding, tmp_path):
    problem = problem_of(tmp_path / "text", text.encode(encoding))
    assert problem.startswith(encoding.upper().replace("-LE", "LE").replace("-BE", "BE") + ": ")
    assert converted(problem) == text


@pytest.mark.parametrize("content, name", [
    (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"), (gzip.compress(b"abc"), "a gzip archive"),
    (b"PK\x03\x04\x14\0\6\0", "a zip archive, such as a .docx"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG picture"),
    (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG picture"), (b"GGUF\3\0\0\0", "a GGUF model"),
    (b"a.txt".ljust(257, b"\0") + b"ustar\00000root", "a tar archive"),
    ((70).to_bytes(8, "little") + b'{"weight": {}}', "a safetensors model"),
    (bytes(range(256)) * 9, "not UTF-8 at byte 128, in line 2, and does not look like text")])
def test_what_is_no_text_is_named(content, name, tmp_path):
    assert problem_of(tmp_path / "text", content).startswith(name)


@pytest.mark.parametrize("text", ["GGUF is a format", "PK", "BZ", "a\0b", "\0" * 99, "The quick brown fox\0\n" * 9,
                                  "却说\0" * 99, "".join(CORPUS)])
def test_texts_that_only_look_like_something_else(text, tmp_path):
    assert problem_of(tmp_path / "text", text.encode()) is None


@pytest.mark.parametrize("text, name", [("\n<!DOCTYPE html>\n<p>", "HTML"), ("\ufeff<HTML>", "HTML"),
                                        (r"{\rtf1 a}", "RTF")])
def test_markup_is_a_text_with_a_warning(text, name, tmp_path):
    with pytest.warns(UserWarning, match=f"is {name}: a model learns its markup"):
        assert problem_of(tmp_path / "text", text.encode()) is None


@pytest.mark.parametrize("sample", [400, 401, 402, 403])
def test_a_sample_that_ends_inside_a_character(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "SAMPLE", sample)
    assert "perhaps GB18030" in problem_of(tmp_path / "text", (CHINESE * 90).encode("gb18030"))


def test_damage_is_counted_in_the_whole_text_and_only_a_sample_is_guessed_from(tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "SAMPLE", 64)
    content = (CHINESE.encode() * 9 + b"\xff") * 5
    assert "(wrong bytes in all: 5)" in problem_of(tmp_path / "text", content)
    assert "perhaps CP1252" in problem_of(tmp_path / "text", b"abc\n" * 999 + FRENCH.encode("latin-1") * 99)
