"""A file that should be a UTF-8 text and is none: what it is instead, and what helps."""
import codecs
import contextlib
import re
import shlex
import warnings

from storage.files import InputError, require

SIGNATURES = {      # how files begin that are not texts
    b"%PDF-": "a PDF: pdftotext makes a text of it", b"\x1f\x8b": "a gzip archive: name it .gz, or unpack it",
    b"PK\x03\x04": "a zip archive, such as a .docx, .odt or .epub: unpack it, or save it as plain text",
    b"BZh91AY&SY": "a bzip2 archive: unpack it", b"\xfd7zXZ\0": "an xz archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it", b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"\xd0\xcf\x11\xe0": "an old Office document (.doc): save it as plain text", b"PAR1\x15": "a Parquet table",
    b"\x89PNG\r\n": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"SQLite format 3\0": "an SQLite database",
    **{b"GGUF%c\0" % version: "a GGUF model" for version in (1, 2, 3)}}
MARKUP = {b"<!doctype html": "HTML", b"<html": "HTML", b"{\\rtf": "RTF"}
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",       # before UTF-16: LE begins with its mark
         codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
ENCODINGS = ["cp1252", "euc_jp", "gb18030", "big5", "cp932", "cp949", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254",
             "cp1255", "cp1256", "cp874", "cp866", "iso8859_5", "iso8859_2"]        # the likelier first
TWO_BYTES = {"euc_jp", "gb18030", "big5", "cp932", "cp949"}     # of a letter; its second may be ASCII
SAMPLE = 1 << 16        # bytes read at once, and enough of them to tell an encoding
ESCAPED = re.compile("[\udc80-\udcff]")         # bytes that are not UTF-8, under errors="surrogateescape"


def refuse_binary(path, head):
    """Raise InputError if a file that begins with these bytes is no text, or one in UTF-16 or UTF-32."""
    require(head[257:262] != b"ustar", f"the text {path} is a tar archive: unpack it")
    is_safetensors = head[4:8] == bytes(4) and head[8:9] == b"{"
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            raise InputError(f"the text {path} is {name}")
    require(not is_safetensors, f"the text {path} is a safetensors model")
    if encoding := wide_encoding(head):
        raise InputError(f"the text {path} is {encoding}: {command(path, encoding)} converts it")
    for signature, name in MARKUP.items():
        if head[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(signature):
            warnings.warn(f"the text {path} is {name}: a model learns its markup, too", stacklevel=2)


def wide_encoding(head):
    """The name of the encoding, in iconv's words, of a file in UTF-16 or UTF-32 that begins with these bytes, or None.

    Without a byte-order mark the zeros tell: letters, spaces and line ends have them, always on the same side.
    """
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    found = {}
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE") if head.count(0) > 8 + len(head) // 200 else ():
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(name)().decode(head)
            if sum(c.isprintable() or c.isspace() for c in text) > 0.97 * len(text):
                found[name] = sum(c.isascii() for c in text)
    return max(found, key=found.get, default=None)


def command(path, encoding, flags=""):
    """The command that writes a UTF-8 copy of a file."""
    name, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    unpack, source = (f"gunzip -c {name} | ", "") if str(path).lower().endswith(".gz") else ("", f" {name}")
    return f"{unpack}iconv {flags}-f {encoding} -t UTF-8{source} > {new}"


def refuse_bytes(path, at, n_good, opener=open):
    """Raise InputError for a file that is not UTF-8 at byte `at`: what it is instead, and what helps.

    n_good is the number of bytes before `at` that continue a character: UTF-8 with damage has many, other encodings
    have next to none.
    """
    with opener(path, "rb") as file:
        line = 1 + sum(file.read(min(SAMPLE, at - i)).count(b"\n") for i in range(0, at, SAMPLE))
        sample = file.read(SAMPLE)
        decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        text = decode(sample)
        n_bad = len(ESCAPED.findall(text))
        n_good += len(text.encode("utf-8", "surrogateescape")) - len(text)
        if n_good > n_bad:
            n_bad += sum(len(ESCAPED.findall(decode(block))) for block in iter(lambda: file.read(SAMPLE), b""))
            raise InputError(f"the text {path} is UTF-8 with damage at byte {at}, in line {line} (wrong bytes in all: "
                             f"{n_bad}): {command(path, 'UTF-8', '-c ')} leaves them out")
        file.seek(max(0, at - SAMPLE))
        before = file.read(at - file.tell()).rpartition(b"\n")[2]
    where = f"the text {path} is not UTF-8 at byte {at}, in line {line},"
    encoding = probable_encoding(before + sample)
    require(encoding, f"{where} and does not look like text: give a text file")
    reading, place = (part.decode(encoding, "replace") for part in (before + sample, before))
    shown = "".join(c if c.isprintable() else " " for c in reading[max(0, len(place) - 15):len(place) + 25])
    name = encoding.upper().replace("_", "-")
    raise InputError(f"{where} and perhaps {name}, in which it reads {shown!r}: if that is right, "
                     f"{command(path, name)} converts it")


def probable_encoding(sample):
    """Which of ENCODINGS bytes that are not UTF-8 most probably have; None if they do not look like text."""
    from charset_normalizer import from_bytes  # here, because hardly any run needs it
    end = 1 + max(map(sample.rfind, b"\n ,.-"))         # not inside a character: no other character has these bytes
    sample = sample[:end] if end > len(sample) / 2 else sample
    lines = b"\n".join(line for line in sample.splitlines() if not line.isascii())
    # in a text of such letters two bytes in a row are beyond ASCII; a quotation mark of Windows' stands alone
    names = [name for name in ENCODINGS if name not in TWO_BYTES or re.search(rb"[\x80-\xff]{2}", lines)]
    matches = list(from_bytes(lines, cp_isolation=names, threshold=0.6)) if b"\0" not in sample else []
    if not matches:
        return None
    best, margin = matches[0], 0
    if best.coherence == 0:             # it speaks no known language: of those that are about as clean, does one?
        best = max((match for match in matches if match.chaos < best.chaos + 0.1), key=lambda match: match.coherence)
        margin = 0 if best.coherence else 0.03
    equals = [match.encoding for match in matches
              if match.chaos <= best.chaos + margin and match.coherence == best.coherence]
    return next(name for name in names if name in equals or lines.decode(name, "replace") == str(best))
