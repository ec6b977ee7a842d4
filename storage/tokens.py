"""A text's token ids: encoded once, in bounded memory, and kept on disk.

    text --read_text--> blocks --cut_text--> chunks --encode_text--> ids --cached_tokens--> TokenFile

The ids equal those of the whole text encoded at once. The text may be larger than memory: it is read in chunks, and its
ids are in a file that is mapped into memory, never loaded.
"""
import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import time
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers
from tqdm import tqdm

from storage.encodings import SAMPLE, refuse_binary, refuse_bytes
from storage.files import InputError, read_json, readable, require, whole

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
    remedy = ": give a Hugging Face tokenizer.json, the folder with it, or hf:ORG/NAME"
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
    if not isinstance(tokenizer.model, models.Unigram):
        return tokenizer.model.unk_token
    model = json.loads(tokenizer.to_str())["model"]             # it has an index into its list of (text, score)
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]


def completed(tokenizer):
    """The tokenizer, or a copy of it that has an unknown token, if it needs one for some texts and has none.

    Without one, BPE leaves characters out (and the offsets of the tokens after them are wrong), and the other models
    make the library raise an Exception. The copy's ids are its own.
    """
    about = json.loads(tokenizer.to_str())
    model, unknown = about["model"], unknown_token(tokenizer)
    if model["type"] == "Unigram" and unknown is None:
        model["unk_id"], model["vocab"] = len(model["vocab"]), [*model["vocab"], ["\uffff", 0.0]]
    elif unknown is None or tokenizer.model.token_to_id(unknown) is None:
        model["unk_token"] = "\uffff" if unknown is None else unknown
        model["vocab"][model["unk_token"]] = vocab_size(tokenizer)
    else:
        return tokenizer
    return tokenizers.Tokenizer.from_str(json.dumps(about))


class Losses:
    """Which characters of a text no id stands for: a call (text, its ids) gives bool (len(text),), True for those.

    They are in an unknown token, unless the text itself spells it out, or in no token. White space in no token counts
    only where the tokenizer keeps spaces.
    """
    def __init__(self, tokenizer):
        self.tokenizer, self.unknown = tokenizer, unknown_token(tokenizer)
        self.number = None if self.unknown is None else tokenizer.model.token_to_id(self.unknown)
        self.is_dropped = {}            # of each character seen so far

    def __call__(self, text, ids):
        letters = set(text)
        self.is_dropped.update((c, self.drops(c)) for c in letters - self.is_dropped.keys())
        if (any(self.is_dropped[c] for c in letters)
                or (self.number is not None and ids.count(self.number) != text.count(self.unknown))):
            return self.look(text)                      # which takes longer than to encode
        return np.zeros(len(text), bool)

    def drops(self, c):
        """Whether a character is in no token, as the first of a word, inside it or as the last."""
        try:
            encoding = self.tokenizer.encode(f"{c}{c}{c} {c}", add_special_tokens=False)
        except Exception:                               # see `completed`
            return True
        in_none = ~covered(spans_of(encoding), 5)
        return in_none[[0, 1, 2, 4]].any() and not (c.isspace() and in_none[3])

    @functools.cached_property          # rarely needed, and a copy of a large vocabulary takes a second
    def complete(self):
        tokenizer = completed(self.tokenizer)
        unknown = unknown_token(tokenizer)
        return tokenizer, unknown, tokenizer.model.token_to_id(unknown)

    def look(self, text):
        tokenizer, unknown, number = self.complete
        encoding = tokenizer.encode(text, add_special_tokens=False)
        spans, strange = spans_of(encoding), np.array(encoding.ids) == number
        for i in np.flatnonzero(strange):
            strange[i] = text[slice(*spans[i])] != unknown
        missing = ~covered(spans, len(text))
        for i in np.flatnonzero(missing):       # an accent that a normalizer joins to its letter is in no token either
            missing[i] = self.is_dropped[text[i]]
        return missing | covered(spans[strange], len(text))


def spans_of(encoding):
    """[first, last + 1], int (number of tokens, 2), of the characters of each token."""
    return np.fromiter(itertools.chain.from_iterable(encoding.offsets), np.intp, 2 * len(encoding)).reshape(-1, 2)


def covered(spans, n):
    """bool (n,): which of n characters are in any of these spans."""
    changes = np.bincount(spans[:, 0], minlength=n + 1) - np.bincount(spans[:, 1], minlength=n + 1)
    return np.cumsum(changes)[:n] > 0


def runs(lost):
    """[[first, last + 1], …] of the runs of True."""
    return np.flatnonzero(np.diff(lost, prepend=False, append=False)).reshape(-1, 2).tolist()


def encode_prompt(tokenizer, text):
    """The ids of a --prompt: [] if it is empty, or white space that the tokenizer drops.

    Warns of characters that are lost. Raises InputError if all are, or if the tokenizer has no way to lose them.
    """
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:                               # see `completed`
        ids = None
    lost = Losses(tokenizer)(text, ids or [])
    found = [f"{text[a:b]!r} (character {a + 1})" for a, b in runs(lost)]
    names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    require(ids is not None, f"--prompt: the tokenizer cannot encode {names or repr(text)}, and has no token for what "
            "it does not know: leave that out")
    if found:
        require(any(not (c.isspace() or is_lost) for c, is_lost in zip(text, lost, strict=True)),
                f"--prompt: the tokenizer knows nothing of {text!r}: give a text in its own language")
        warnings.warn(f"--prompt: the tokenizer does not know {names}: {fate(tokenizer)}", stacklevel=2)
    return ids


def fate(tokenizer):
    """What becomes of characters that a tokenizer does not know, in words."""
    unknown = unknown_token(tokenizer)
    return "left out" if unknown is None else f"replaced by {unknown!r}"


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

def read_text(path, digest, opener=open):
    """Yield the characters of a UTF-8 text in blocks and feed its bytes to the digest. Raises InputError.

    A byte-order mark is dropped; line ends stay as they are.
    """
    offset, n_good, rest = 0, 0, b""
    try:
        with opener(readable(path, ": give a UTF-8 text file"), "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if offset == 0:
                    refuse_binary(path, block[:SAMPLE])
                characters, used = codecs.utf_8_decode(rest + block)
                yield characters if offset else characters.removeprefix("\ufeff")
                offset, n_good, rest = offset + used, n_good + used - len(characters), (rest + block)[used:]
        codecs.utf_8_decode(rest, "strict", True)       # a character cut off by the end of the file
    except OSError as error:
        raise InputError(f"cannot read the text {path} ({error.strerror or error}): give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise InputError(f"the text {path} ends inside a character, at byte {offset + error.start}: "
                             "is it the whole file, and UTF-8?") from None
        good = error.object[:error.start]
        refuse_bytes(path, offset + error.start, n_good + len(good) - len(good.decode()), opener)


def find_cut(encode, text, first, last):
    """(begin, cut, ids of text[begin:cut], the context) for a place to cut, first < cut <= last; None if there is none.

    With k = CONTEXT, the ids of text[begin:cut] must be the first of those of text[begin:cut+k]: then the text left of
    the cut is encoded the same way whatever follows. (Newlines would not do: "\\n\\n" is one token in GPT-2's
    vocabulary, and Llama's tokenizer puts a space before the first word.) Ends of words are tried first.
    Where one side has few ids, as in a long word or among accents that a normalizer strips, agreement proves too
    little, so such a place is rejected.
    """
    few = CONTEXT // 32
    places = range(last, max(first, last - TRIES), -1)
    begin = max(0, last - TRIES - CONTEXT)      # the same for all places: pieces of 3 characters end at some of them
    for cut in sorted(places, key=lambda c: text[c - 1].isspace() or not text[c].isspace()):
        context = encode(text[begin:cut]).ids
        both = encode(text[begin:cut + CONTEXT]).ids
        left, right = len(context), len(both) - len(context)        # the number of ids on each side
        if min(left, right) > few and both[:left] == context:
            return begin, cut, context
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
            begin, cut, context = found
            yield text[:start], ids, text[start:cut]
            text, start, ids = text[begin:], cut - begin, context
            last = start + CHUNK
    yield text[:start], ids, text[start:]


def counting(tokenizer):
    """Whether the pre-tokenizer counts characters from where its text begins, as FixedLength does, or Split by "...".

    "seen": yes, and the ends of its pieces show how far. "unseen": yes, but the pieces are long, or a later step cuts
    them again. None: no. It counts if the ends of a run of one character depend on where the run begins.
    """
    whole, steps = tokenizer.pre_tokenizer, json.loads(tokenizer.to_str())["pre_tokenizer"]
    if whole is None:
        return None
    n_step = len(steps.get("pretokenizers", [steps]))
    parts = [pre_tokenizers.Sequence([whole[i] for i in range(n)]) for n in range(1, n_step)]
    length = 16 * CONTEXT if re.search(r"FixedLength|\{\d", json.dumps(steps)) else 128     # large numbers have digits

    def ends(part, run):
        return {end - len(run) for _, (_, end) in part.pre_tokenize_str(run) if len(run) - end < length // 2}

    found = None
    for run in (c * length for c in "AN0- 却"):
        for part in [*parts, whole]:
            here = ends(part, run)
            if here != ends(part, run + run[0]):
                if here != ends(whole, run) or len(here) < length // 16:
                    return "unseen"
                found = "seen"
    return found


def encode_text(tokenizer, blocks):
    """Yield (context, body, ids of the body, lost) for each chunk; all these ids are those of the whole text.

    lost, bool (len(body),), says which characters no id stands for (see Losses).

    A chunk is encoded after its context, whose ids are then dropped. That is right if the two chunks that meet there
    agree on those ids: the right one on all of them, the left one on their second half, which is out of reach of where
    the context happens to begin. If the pre-tokenizer counts, they also agree on where in the text these tokens and its
    pieces are, because in a run of unknown tokens the ids say nothing; if it counts unseen, the text is one chunk. Two
    chunks that disagree are encoded again as one. No special tokens are inserted; those that the text spells out are
    kept.
    """
    counts, lost, done = counting(tokenizer), Losses(tokenizer), []

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def last(encoding, begin, end, n):
        """Tokens begin … end-1, of which the last ends with character n."""
        ids = encoding.ids[begin:end]
        if not counts:
            return ids
        spans, pieces = encoding.offsets[begin:end], encoding.word_ids[begin:end]
        return [(token, a - n, b - n, piece - pieces[0])
                for token, (a, b), piece in zip(ids, spans, pieces, strict=True)]

    def agree(before, after):
        (earlier, _, body, left), (context, dropped, _, right) = before, after
        n, m = len(dropped), len(left)
        half = n - n // 2
        return right.ids[:n] == dropped and m >= half and (
            last(left, m - half, m, len(earlier + body)) == last(right, n - half, n, len(context)))

    def finished(chunk):
        context, dropped, body, encoding = chunk
        ids = encoding.ids
        return context, body, ids[len(dropped):], lost(context + body, ids)[len(context):]

    encode_batch = tokenizer.encode_batch if counts else tokenizer.encode_batch_fast
    chunks = iter([("", [], "".join(blocks))]) if counts == "unseen" else cut_text(encode, blocks)
    while several := list(itertools.islice(chunks, PARALLEL)):      # the last chunk in `done` waits for its neighbour
        encodings = encode_batch([context + body for context, _, body in several], add_special_tokens=False)
        for chunk in zip(*zip(*several, strict=True), encodings, strict=True):
            while done and not agree(done[-1], chunk):
                context, dropped, left, _ = done.pop()
                body = left + chunk[2]
                chunk = context, dropped, body, encode(context + body)
            done.append(chunk)
        yield from map(finished, done[:-1])
        done = done[-1:]
    yield from map(finished, done)


# ---------------------------------------------------------------- ids on disk

class TokenFile:
    """A text's ids in the cache, and where in the text they come from.

    NAME.ids holds only the ids. NAME.json holds their number and type, a CRC-32, the share of the characters that no id
    stands for, and for each chunk [first id, first byte, first byte of its context]: 0.5 MB for a text of 1 GB. Bytes
    are counted from after a byte-order mark. Raises OSError, ValueError, KeyError or TypeError if one of the files is
    damaged.
    """
    def __init__(self, path, text, tokenizer):
        about = read_json(path.with_suffix(".json"))
        self.text, self.tokenizer = text, tokenizer
        self.digest = path.stem         # a hash of the text, of the tokenizer and of the library that encoded it
        self.n_token, self.n_byte, self.lost = about["tokens"], about["bytes"], about["lost"]
        self.dtype, self.chunks = np.dtype(about["dtype"]), np.array(about["chunks"])
        self.file = open(readable(path), "rb")  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        crc = 0
        while block := self.file.read(BLOCK):
            crc = zlib.crc32(block, crc)
        if crc != about["crc"]:
            raise ValueError(f"{path} does not hold the ids that were written")

    def warn_of_lost(self, name):
        """Warn if no id stands for more than 1 % of the characters, which the tokenizer.json `name` does not know."""
        if self.lost > 0.01:
            warnings.warn(f"{self.lost:.0%} of the characters of {self.text} are unknown to {name} and "
                          f"{fate(self.tokenizer)}. No model can learn what they were, and bits per byte come out too "
                          "low: their bytes count, but nothing has to predict them. A byte-level BPE tokenizer knows "
                          "every text, a WordPiece the languages it was made for (Chinese: bert-base-chinese)",
                          stacklevel=3)

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


@contextlib.contextmanager
def writable_cache():
    """The cache folder, which exists then. Raises InputError if this or the block cannot write there."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as problem:
        raise InputError(f"cannot write to the cache folder {folder} ({problem.strerror}): set NANOLLM_CACHE to a "
                         "folder that can be written and has room") from None


@contextlib.contextmanager
def showing(what, total=None):
    """Yield a function of the number of bytes done: a bar, or a line every 5 seconds, shows it."""
    shown = time.monotonic()
    bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def show(done):
        nonlocal shown
        bar.update(done - bar.n)
        if bar.disable and time.monotonic() > shown + 5:
            shown = time.monotonic()
            print(f"{what}: {done / total:.0%}" if total else f"{what}: {done / 1e6:,.0f} MB", file=sys.stderr)
    with bar:
        yield show


def refuse_short(what, n_token, seq_len):
    if n_token <= seq_len:
        raise InputError(f"{what} has {n_token} tokens, and one window needs {seq_len + 1} (seq_len + 1): "
                         "give more text or a smaller seq_len")


def write_tokens(path, text, tokenizer, digest, seq_len):
    """Encode a text into NAME.ids and NAME.json. A bar, or a line every 5 seconds, shows the progress."""
    dtype = np.dtype(np.uint16 if vocab_size(tokenizer) <= 1 << 16 else np.uint32)
    n_token = n_byte = n_character = n_lost = crc = 0
    is_known, chunks = False, []
    progress = showing(f"encoding {text}", os.path.getsize(text))
    with progress as show, whole(path) as draft, open(draft, "wb") as file:
        for context, body, ids, lost in encode_text(tokenizer, read_text(text, digest)):
            data = np.array(ids, dtype).tobytes()
            file.write(data)
            crc = zlib.crc32(data, crc)
            chunks.append((n_token, n_byte, n_byte - len(context.encode())))
            n_token, n_byte = n_token + len(ids), n_byte + len(body.encode())
            n_lost, n_character = n_lost + int(lost.sum()), n_character + len(body)
            is_known = is_known or any(not body[i].isspace() for i in np.flatnonzero(~lost))
            show(n_byte)
        require(is_known or not n_lost, f"the tokenizer knows no character of the text {text}: give one that was made "
                "for this language, or a byte-level BPE, which knows every text")
        refuse_short(f"the text {text}", n_token, seq_len)
        if digest.hexdigest() != path.stem:
            raise InputError(f"the text {text} changed while it was read: start again when it is complete")
    with whole(path.with_suffix(".json")) as draft:
        draft.write_text(json.dumps({"tokens": n_token, "bytes": n_byte, "lost": n_lost / n_character,
                                      "dtype": dtype.str, "crc": crc, "chunks": chunks}))


def first_lost(text, tokenizer):
    """A line on the first characters of a text for which the library raises an Exception; "" if there are none."""
    n_line = 1
    for _, body, _, lost in encode_text(completed(tokenizer), read_text(text, hashlib.sha256())):
        if lost.any():
            a, b = runs(lost)[0]
            line = n_line + body.count("\n", 0, a)
            return (f"{body[a:b][:40]!r} in line {line} of {text}, and has no token for what it does not know: give "
                    "one that was made for this text")
        n_line += body.count("\n")
    return ""


def cached_tokens(text, tokenizer, seq_len):
    """The TokenFile of a text: from the cache, or encoded now if it is missing or damaged.

    A hash of the text, the tokenizer and the library's version names it. Raises InputError; then nothing was written.
    """
    recipe = hashlib.sha256(f"nanollm tokens 2, {tokenizers.__version__}, {tokenizer.to_str()}".encode())
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
        raise InputError(f"the tokenizer cannot encode {first_lost(text, tokenizer) or error}") from None
    if file := cached():
        return file
    raise InputError(f"cannot write the token cache {path.parent} ({why}): "
                     "set NANOLLM_CACHE to a folder that can be written and has room")
