"""A text's token ids: encoded once, in bounded memory, and kept on disk.

    text --read_text--> blocks --cut_text--> chunks --encode_text--> ids --cached_tokens--> TokenFile

The ids equal those of the whole text encoded at once. The text may be larger than memory: it is read in chunks, and its
ids are in a file that is mapped into memory, never loaded.
"""
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import tokenizers
from tqdm import tqdm

from storage.encodings import SAMPLE, refuse_binary, refuse_bytes
from storage.files import InputError, read_json, readable, whole

BLOCK = 1 << 18         # bytes read at once
CHUNK = 1 << 16         # characters encoded by one call of the tokenizer
CONTEXT = 512           # characters seen on each side of a cut; WordPiece counts 100 letters, accents come on top
TRIES = 64              # places tried for a cut before the chunk grows
PARALLEL = 16           # chunks given to the tokenizers library together, so that it uses every core


# ---------------------------------------------------------------- tokenizer

# What may lie in a folder in place of tokenizer.json, and what to do. Keys: see `readable`.
OTHER_TOKENIZERS = {r".+\.model|.+\.tiktoken|vocab\..+|merges\.txt": "is a tokenizer in another format: transformers "
                    "writes tokenizer.json (AutoTokenizer.from_pretrained, then save_pretrained)"}


def load_tokenizer(path):
    """The tokenizers.Tokenizer of a Hugging Face tokenizer.json. Raises InputError.

    It will encode whole texts, always in the same way: truncation, padding and BPE dropout are switched off.
    """
    remedy = ": give a Hugging Face tokenizer.json (the file, not a model's name)"
    path = readable(path, remedy, OTHER_TOKENIZERS)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:                      # the library raises nothing more precise
        read_json(path, remedy)                     # says what is wrong if it is not even JSON
        raise InputError(f"{path} is JSON but not a tokenizer ({error}){remedy}") from None
    if not tokenizer.get_vocab():
        raise InputError(f"the tokenizer {path} has no tokens: train it first")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def vocab_size(tokenizer):
    """The largest id + 1, the number of rows of an embedding. There may be fewer tokens, because ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def unknown_token(tokenizer):
    """The text of the token for everything that the tokenizer does not know, or None."""
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] == "Unigram":                  # an index into its list of (text, score)
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model["unk_token"]


class Decoder:
    """The text of ids that come one by one; all pieces together are tokenizer.decode of all ids.

    A tokenizer that works on bytes may spread a character over several tokens, and decodes a part of it as U+FFFD:
    such a piece waits for its next token. A token is decoded together with the last words, because its text may depend
    on them (the first word loses its space), but not with the whole text, which would take longer and longer.
    """
    def __init__(self, tokenizer):
        self.tokenizer, self.window, self.shown = tokenizer, [], ""
        self.mark = 0           # window[mark:] came after a place where all characters were complete

    def add(self, token):
        """The text that is complete with this id, "" where a character is not."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        if text.endswith("\ufffd") and not self.is_spelled_out():
            return ""
        new, self.shown = text[len(self.shown):], text
        if len(self.window) >= self.mark + 32:
            # of 32 tokens that are not shown, such as <s>, none needs to stay, but the words before them must
            recent = self.window[self.mark:]
            self.window = recent if self.tokenizer.decode(recent) else self.window[:self.mark]
            self.shown, self.mark = self.tokenizer.decode(self.window), len(self.window)
        return new

    def is_spelled_out(self):
        """Whether the window ends with U+FFFD itself: as a character, in ByteLevel's letters or as bytes."""
        words = "".join(self.tokenizer.id_to_token(token) or "" for token in self.window)
        return words.endswith(("\ufffd", "ï¿½", "<0xEF><0xBF><0xBD>"))

    def rest(self):
        """What is left at the end: the last token may complete one character and begin the next."""
        return self.tokenizer.decode(self.window)[len(self.shown):].rstrip("\ufffd")


# ---------------------------------------------------------------- text -> chunks -> ids, in bounded memory

def read_text(path, digest):
    """Yield the characters of a UTF-8 text in blocks and feed its bytes to the digest. Raises InputError.

    A byte-order mark is dropped; line ends stay as they are.
    """
    offset, n_good, rest = 0, 0, b""
    try:
        with open(readable(path, ": give a UTF-8 text file"), "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if offset == 0:
                    refuse_binary(path, block[:SAMPLE])
                characters, used = codecs.utf_8_decode(rest + block)
                yield characters if offset else characters.removeprefix("\ufeff")
                offset, n_good, rest = offset + used, n_good + used - len(characters), (rest + block)[used:]
        codecs.utf_8_decode(rest, "strict", True)       # a character cut off by the end of the file
    except OSError as error:
        raise InputError(f"cannot read the text {path} ({error.strerror}): give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise InputError(f"the text {path} ends inside a character, at byte {offset + error.start}: "
                             "is it the whole file, and UTF-8?") from None
        good = error.object[:error.start]
        refuse_bytes(path, offset + error.start, n_good + len(good) - len(good.decode()))


def find_cut(encode, text, first, last):
    """(cut, context ids) for a place to cut, first < cut <= last; None where there is none.

    With k = CONTEXT, the ids of text[cut-k : cut] must be the first of those of text[cut-k : cut+k]: then the text left
    of the cut is encoded the same way whatever follows. (Newlines would not do: "\\n\\n" is one token in GPT-2's
    vocabulary, and Llama's tokenizer puts a space before the first word.) Ends of words are tried first.
    Where one side has few ids, as in a long word or among accents that a normalizer strips, agreement proves too
    little, so such a place is rejected.
    """
    few = CONTEXT // 32
    places = range(last, max(first, last - TRIES), -1)
    for cut in sorted(places, key=lambda c: text[c - 1].isspace() or not text[c].isspace()):
        begin = max(0, cut - CONTEXT)
        context = encode(text[begin:cut])
        both = encode(text[begin:cut + CONTEXT])
        left, right = len(context), len(both) - len(context)        # the number of ids on each side
        if min(left, right) > few and both[:left] == context:
            return cut, context
    return None


def cut_text(encode, blocks):
    """Yield (context, its ids, body): the bodies add up to the text, a context is the text before a body."""
    text, start, ids, last = "", 0, [], CHUNK       # text[:start] is the context of the chunk that is growing
    for block in blocks:
        text += block
        while last + CONTEXT <= len(text):
            found = find_cut(encode, text, max(start, last - CHUNK), last)
            if not found:
                last += CHUNK
                continue
            yield text[:start], ids, text[start:found[0]]
            begin = max(0, found[0] - CONTEXT)
            text, start, ids = text[begin:], found[0] - begin, found[1]
            last = start + CHUNK
    yield text[:start], ids, text[start:]


def encode_text(tokenizer, blocks):
    """Yield (context, body, ids of the body) for each chunk; all these ids are those of the whole text.

    A chunk is encoded after its context, whose ids are then dropped. That is right if the two chunks that meet there
    agree on those ids: the right one on all of them, the left one on their second half, which is out of reach of where
    the context happens to begin. Two chunks that disagree are encoded again as one.
    No special tokens are inserted; those that the text spells out are kept.
    """
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def agree(left, context, right):
        half = context[len(context) // 2:]
        return right[:len(context)] == context and left[max(0, len(left) - len(half)):] == half

    chunks, done = cut_text(encode, blocks), []     # the last chunk in `done` waits for its right neighbour
    while several := list(itertools.islice(chunks, PARALLEL)):
        encodings = tokenizer.encode_batch_fast([c + body for c, _, body in several], add_special_tokens=False)
        for (context, dropped, body), encoding in zip(several, encodings, strict=True):
            ids = encoding.ids
            while done and not agree(done[-1][3], dropped, ids):
                context, dropped, left, _ = done.pop()
                body = left + body
                ids = encode(context + body)
            done.append((context, dropped, body, ids))
        yield from ((context, body, ids[len(dropped):]) for context, dropped, body, ids in done[:-1])
        done = done[-1:]
    yield from ((context, body, ids[len(dropped):]) for context, dropped, body, ids in done)


# ---------------------------------------------------------------- ids on disk

class TokenFile:
    """A text's ids in the cache, and where in the text they come from.

    NAME.ids holds only the ids. NAME.json holds their number and type, a CRC-32, how many are unknown, and for each
    chunk [first id, first byte, first byte of its context]: 0.5 MB for a text of 1 GB. Bytes are counted from
    after a byte-order mark. Raises OSError, ValueError, KeyError or TypeError if one of the files is damaged.
    """
    def __init__(self, path, text, tokenizer):
        about = read_json(path.with_suffix(".json"))
        self.text, self.tokenizer = text, tokenizer
        self.n_token, self.n_byte, self.n_unknown = about["tokens"], about["bytes"], about["unknown"]
        self.dtype, self.chunks = np.dtype(about["dtype"]), np.array(about["chunks"])
        self.file = open(readable(path), "rb")  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        crc = 0
        while block := self.file.read(BLOCK):
            crc = zlib.crc32(block, crc)
        if crc != about["crc"]:
            raise ValueError(f"{path} does not hold the ids that were written")

    def warn_of_unknown(self, name):
        """Warn if more than 1 % of the tokens are unknown to the tokenizer.json `name`."""
        if self.n_unknown > 0.01 * self.n_token:
            warnings.warn(f"{self.n_unknown / self.n_token:.0%} of the tokens of {self.text} are unknown to {name}, "
                          "and no model can learn what they were: a byte-level BPE tokenizer knows every text, a "
                          "WordPiece the languages it was made for (Chinese: bert-base-chinese)", stacklevel=3)

    def ids(self, first, last):
        """ids[first:last], mapped again by each call: a map kept for long ends up holding the file in memory."""
        try:
            return np.memmap(self.file, self.dtype, "r", first * self.dtype.itemsize, (last - first,))
        except OSError as problem:
            raise InputError(f"cannot map {self.file.name} into memory ({problem.strerror}): "
                             "set NANOLLM_CACHE to a folder on a local disk") from None

    def byte(self, n):
        """Where id n begins in the text: the first byte of its first character. Id 0 begins with the text.

        A byte-level token may begin inside a character, a part of which then belongs to the id before.

        The chunk with id n is encoded again, after its context. Its tokens are counted from the end, so the number of
        context tokens does not matter: if the next chunk begins with id 20,000, id 19,997 is the third from the end.
        """
        if n in (0, self.n_token):
            return self.n_byte if n else 0
        chunk = np.searchsorted(self.chunks[:, 0], n, side="right") - 1
        begin = int(self.chunks[chunk, 2])
        next_id, end, _ = [*self.chunks, (self.n_token, self.n_byte, 0)][chunk + 1]
        with open(self.text, "rb") as file:
            file.seek(begin - self.n_byte, os.SEEK_END)
            text = file.read(end - begin).decode()
        spans = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return begin + len(text[:spans[n - next_id][0]].encode())


def cache_folder():
    """NANOLLM_CACHE if it is set, otherwise `nanollm` in the platform's folder for caches."""
    if folder := os.environ.get("NANOLLM_CACHE"):
        return Path(os.path.expanduser(folder))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local", "nanollm")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/nanollm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanollm")


def refuse_short(what, n_token, seq_len):
    if n_token <= seq_len:
        raise InputError(f"{what} has {n_token} tokens, and one window needs {seq_len + 1} (seq_len + 1): "
                         "give more text or a smaller seq_len")


def write_tokens(path, text, tokenizer, digest, seq_len):
    """Encode a text into NAME.ids and NAME.json. A bar, or a line every 5 seconds, shows the progress."""
    dtype = np.dtype(np.uint16 if vocab_size(tokenizer) <= 1 << 16 else np.uint32)
    unknown = unknown_token(tokenizer)
    n_token = n_byte = n_unknown = crc = 0
    chunks, total, shown = [], os.path.getsize(text), time.monotonic()
    bar = tqdm(desc=f"encoding {text}", total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    with bar, whole(path) as draft, open(draft, "wb") as file:
        for context, body, ids in encode_text(tokenizer, read_text(text, digest)):
            data = np.array(ids, dtype).tobytes()
            file.write(data)
            crc = zlib.crc32(data, crc)
            chunks.append((n_token, n_byte, n_byte - len(context.encode())))
            if unknown:                             # one that the text itself spells out is known
                n_unknown += ids.count(tokenizer.token_to_id(unknown)) - body.count(unknown)
            n_token += len(ids)
            n_byte += len(body.encode())
            bar.update(n_byte - bar.n)
            if bar.disable and time.monotonic() > shown + 5:
                shown = time.monotonic()
                print(f"encoding {text}: {n_byte / total:.0%}", file=sys.stderr)
        refuse_short(f"the text {text}", n_token, seq_len)
        if digest.hexdigest() != path.stem:
            raise InputError(f"the text {text} changed while it was read: start again when it is complete")
    with whole(path.with_suffix(".json")) as draft:
        draft.write_text(json.dumps({"tokens": n_token, "bytes": n_byte, "unknown": max(0, n_unknown),
                                      "dtype": dtype.str, "crc": crc, "chunks": chunks}))


def cached_tokens(text, tokenizer, seq_len):
    """The TokenFile of a text: from the cache, or encoded now if it is missing or damaged.

    A hash of the text, the tokenizer and the library's version names it. Raises InputError; then nothing was written.
    """
    recipe = hashlib.sha256(f"nanollm tokens 1, {tokenizers.__version__}, {tokenizer.to_str()}".encode())
    digest, n_character = recipe.copy(), 0
    for block in read_text(text, digest):
        n_character += len(block)
    if n_character == 0:
        raise InputError(f"the text {text} is empty: give a UTF-8 text")
    path, why = cache_folder() / f"{digest.hexdigest()}.ids", "it does not hold what was written to it"

    def cached():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return TokenFile(path, text, tokenizer)

    if file := cached():
        return file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tokens(path, text, tokenizer, recipe, seq_len)
    except OSError as error:            # some systems do not replace a file that is open: then another process wrote it
        why = error.strerror
    except Exception as error:
        if type(error) is not Exception:            # the library's own, such as for a vocabulary without its unk_token
            raise
        raise InputError(f"the tokenizer cannot encode {text}: {error}") from None
    if file := cached():
        return file
    raise InputError(f"cannot write the token cache {path.parent} ({why}): "
                     "set NANOLLM_CACHE to a folder that can be written and has room")
