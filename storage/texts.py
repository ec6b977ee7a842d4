"""What --text names, as one UTF-8 text file: files, folders, patterns, .jsonl, .gz, standard input.

    names --expand--> paths --pieces--> documents, END between them --gather--> one file in the cache

A single file that is a plain text is used where it is. What comes later (ids, offsets, bits per byte) sees one text.
"""
import codecs
import contextlib
import glob
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import zlib

from storage.files import InputError, file_hash, read_json, readable, require, whole
from storage.tokens import read_text, showing, writable_cache

END = "<|endoftext|>"
ENDS = END, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]"    # what others call it
SURROGATE = re.compile("[\ud800-\udfff]")


def separator(tokenizer):
    """(what stands between two documents, the rule in words). tokenizer None stands for one that will have END."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()} if tokenizer else {END}
    if name := next((name for name in ENDS if name in known), None):
        return name, name
    return "\n\n", f"an empty line, because the tokenizer has none of {', '.join(ENDS)}"


def expand(names):
    """The paths of the files that these names stand for: in the order of the names, in a folder or pattern sorted.

    What is hidden in a folder (its name begins with a dot) is left out, links to folders are not followed, and a file
    counts once. Raises InputError.
    """
    def refuse(problem):
        raise InputError(f"cannot read the folder {problem.filename} ({problem.strerror}): make it readable")

    found = []
    for name in names:
        if os.path.isdir(name):
            inside = [os.path.join(folder, file) for folder, below, files in os.walk(name, onerror=refuse)
                      if not hide(below) for file in files if file[0] != "."]
            require(inside, f"the folder {name} has no files: give one with texts in it")
        elif glob.has_magic(name) and not os.path.lexists(name):
            inside = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            require(inside, f"no file fits the pattern {name}")
        else:
            inside = [name]
        found += sorted(inside)
    return [readable(path, ": give a UTF-8 text file") for path in dict.fromkeys(found)]


def hide(folders):
    """Take the hidden ones from os.walk's list of folders, so that it does not look into them."""
    folders[:] = [name for name in folders if name[0] != "."]


def kind(path):
    """(whether a file's lines are JSON objects, the function that opens it)."""
    name = path.name.lower()
    return name.removesuffix(".gz").endswith((".jsonl", ".ndjson")), gzip.open if name.endswith(".gz") else open


def pieces(path, field):
    """Yield (piece, whether a document begins with it): a text is one document, each line of a .jsonl is one.

    Raises InputError that names the file, and the line of a .jsonl.
    """
    has_lines, opener = kind(path)
    try:
        if has_lines:
            yield from ((text, True) for text in json_lines(path, opener, field) if text)
        else:
            blocks = filter(None, read_text(path, hashlib.sha256(), opener))
            yield from ((block, i == 0) for i, block in enumerate(blocks))
    except (EOFError, zlib.error, OSError) as problem:
        raise InputError(f"cannot read the text {path} ({problem}): is it the whole file?") from None


def json_lines(path, opener, field):
    """Yield the str that each line of a .jsonl has in this field. Raises InputError that names the line."""
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where, line = f"line {number} of the text {path}", line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode())
            except (ValueError, RecursionError) as problem:
                raise InputError(f"{where} is not valid JSON ({problem}): fix or remove it") from None
            text = value.get(field) if isinstance(value, dict) else None
            if not isinstance(text, str):
                fields = [name for name in value if isinstance(value[name], str)] if isinstance(value, dict) else []
                raise InputError(f"{where} has no text in a field {field!r}: name another with --field (it has texts "
                                 f"in: {', '.join(fields) or 'none'}), or remove the line")
            require(not SURROGATE.search(text), f"{where} has half of a surrogate pair, which is no character: fix or "
                    "remove it")
            yield text


def write(path, sources, field, between):
    """Write the documents of these files, with `between` between two of them, into one UTF-8 file; their number."""
    n_document = n_byte = 0
    with showing("gathering texts") as show, whole(path) as draft, open(draft, "wb") as out:
        for piece, begins in (found for source in sources for found in pieces(source, field)):
            n_document += begins
            data = ((between if begins and n_document > 1 else "") + piece).encode()
            n_byte += out.write(data)
            show(n_byte)
        require(n_document, f"the text {sources[0]} is empty{', and so are the others' * (len(sources) > 1)}: give a "
                "UTF-8 text")
    return n_document


def gather(names, tokenizer, field="text", separate=True):
    """(path, words): one UTF-8 text file with all that the names stand for (see `expand`), and how it was made.

    `field` is the one of .jsonl to read. A hash of the files' contents names the text in the cache. Raises InputError.
    """
    sources = expand(names)
    if len(sources) == 1 and kind(sources[0]) == (False, open):
        return str(sources[0]), str(sources[0])
    between, rule = separator(tokenizer) if separate else ("", "nothing")

    def recipe():
        contents = [(kind(path)[0], path.name.lower().endswith(".gz"), file_hash(path)) for path in sources]
        return hashlib.sha256(repr(("nanollm text 1", field, between, contents)).encode()).hexdigest()

    key, more = recipe(), f"-and-{len(sources) - 1}-more" if len(sources) > 1 else ""
    with writable_cache() as folder:
        path = folder / f"{sources[0].name[:40]}{more}.{key[:32]}.txt"
        about = path.with_suffix(".json")
        if not is_intact(path, about):
            n_document = write(path, sources, field, between)
            with whole(about) as draft:
                draft.write_text(json.dumps({"documents": n_document, "hash": file_hash(path)}))
            require(recipe() == key, f"the text {names[0]} changed while it was read: start again when it is complete")
    n_document = read_json(about)["documents"]
    return str(path), f"{path}: documents: {n_document:,}, files: {len(sources):,}, between documents: {rule}"


def is_intact(path, about):
    """Whether a text in the cache is as it was written."""
    with contextlib.suppress(InputError, KeyError):
        return file_hash(path) == read_json(about)["hash"]
    return False


def with_stdin(names):
    """These names, with a file in the cache for "-", which is standard input. Raises InputError."""
    if "-" not in names:
        return names
    with writable_cache() as folder:
        path = folder / f"stdin.{secrets.token_hex(8)}"
        with whole(path) as draft, open(draft, "wb") as out:
            shutil.copyfileobj(sys.stdin.buffer, out)
        kept = path.replace(folder / f"stdin.{file_hash(path)[:32]}.txt")
    return [str(kept) if name == "-" else name for name in names]
