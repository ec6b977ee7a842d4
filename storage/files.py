"""Reading and writing files: each appears whole or not at all, and one that cannot be used is named in one line."""
import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line that names it and says what to do."""


def require(valid, message):
    """Raise InputError unless `valid`."""
    if not valid:
        raise InputError(message)


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"      # begins the small file that stands for a large one


def readable(path, remedy="", others=None):
    """The path of a regular file that can be opened; links are followed. Raises InputError that says what is wrong.

    `remedy` ends the message, with its punctuation. Where nothing is, a file of the same folder may be named instead:
    the first that a pattern in `others` fits, {pattern of the name: what such a file is, and what to do}.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, not a file{remedy}")
    if os.path.exists(path) and not os.path.isfile(path):       # opening a pipe would wait for its other end
        raise InputError(f"{path} is a pipe or a device, not a regular file: save its content to a file first")
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except FileNotFoundError:
        instead = (f"; {beside.name} {what}" for pattern, what in (others or {}).items()
                   for beside in sorted(path.parent.glob("*")) if re.fullmatch(pattern, beside.name))
        raise InputError(dangling(path) or f"{path}: there is no such file{next(instead, remedy)}") from None
    except (OSError, ValueError) as problem:                    # ValueError: no file can have this name
        raise InputError(f"{path}: {getattr(problem, 'strerror', None) or problem}{remedy}") from None
    if len(start) < 1024 and start.startswith(_LFS_POINTER):
        raise InputError(f"{path} is only Git LFS's pointer to a file: get the file itself with git lfs pull")
    return path


def dangling(path):
    """A message if nothing is there because the path, or a folder above it, is a link to nothing; otherwise None."""
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):
            target = os.path.realpath(part)
            where = "itself" if os.path.islink(target) else f"{target}, which does not exist"
            return f"{part} is a link to {where}: restore that, or copy it here"
    return None


def read_json(path, remedy="", others=None):
    """The JSON object in a file, which a byte-order mark may begin. Raises InputError that names the file."""
    path = readable(path, remedy, others)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:     # not UTF-8, not JSON, or brackets nested too deeply
        raise InputError(f"{path}: not valid JSON ({problem}){remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object{remedy}")
    return value


def file_hash(path):
    """SHA-256 of a file's bytes, in hexadecimal. Raises InputError if there is no such file."""
    try:
        with open(readable(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}") from None


# ---------------------------------------------------------------- what a file system may lack

# How it answers: FAT and CIFS have no modes, many cannot sync a folder or lock it, mounted buckets cannot rename one.
_LACKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.EBADF, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP,
          errno.EOPNOTSUPP}


@contextlib.contextmanager
def _if_it_can():
    """Let an error pass that says that this file system cannot do a thing; not one that says that doing it failed."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in _LACKS:
            raise


def sync(path):
    """Wait until the disk holds what was written to a file, or the names in a folder, where the system can do that."""
    with _if_it_can():
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_existing(path):
    """Raise InputError if anything has this name."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists and is not overwritten: give another name")


# ---------------------------------------------------------------- whole or not at all

# .NAME.1a2b3c4d.nanollm/ holds NAME until it is complete. Half of the digits are random, half are the machine's.
_WORKPLACE = re.compile(r"\.(.+)\.([0-9a-f]{4})[0-9a-f]{4}\.nanollm")
_DAY = 24 * 3600        # where no lock tells, the process of a workplace that has not changed for a day is dead


@contextlib.contextmanager
def whole(path):
    """Yield a draft path, for a file or a folder. Once that is complete and on the disk, it gets the name `path`.

        with whole(folder / "config.json") as draft:
            draft.write_text("{}")

    After an error everything is as before; an OSError then names `path`, not the draft. If there is a folder of this
    name, it is moved aside at the very end; if this process is killed in that moment, `recover` moves it back. Only
    where the file system cannot rename a folder do its files get their names one by one.
    """
    path = Path(path)
    if any(_WORKPLACE.fullmatch(folder.name) for folder in path.parents):
        yield path                      # the folder that it is in becomes whole later, with all its files
        return
    recover(path.parent)
    try:
        with _workplace(path) as work:
            draft = work / path.name
            yield draft
            for part in [*draft.rglob("*"), draft]:             # if it is a file, there is nothing below it
                if part.is_file():
                    with _if_it_can():      # safetensors' files are readable by their owner only
                        part.chmod(work.stat().st_mode & 0o666)
                sync(part)
            if draft.is_dir() and path.is_dir():
                _move(path, work / (path.name + ".old"))
            _move(draft, path)
            sync(path.parent)
    except OSError as problem:
        if ".nanollm" in str(problem.filename or ".nanollm"):
            problem.filename = str(path)
        raise


def remove_folder(path):
    """Remove a folder that, half removed, must not look like a whole one."""
    with _workplace(path) as work:
        _move(path, work / path.name)


def _move(source, target):
    """Rename a file or a folder; where folders cannot be renamed, the files in it, one by one."""
    try:
        source.replace(target)
    except OSError as problem:
        if not source.is_dir() or problem.errno not in {*_LACKS, errno.EXDEV, errno.EMFILE}:
            raise
        target.mkdir()
        for part in source.iterdir():
            _move(part, target / part.name)
        source.rmdir()


def recover(folder):
    """Clear away what killed processes left unfinished in a folder. What a living process is writing stays.

    A lock tells whether a process of this machine lives. Those of other machines may not be seen on a shared disk.
    """
    for work in folder.glob(".*.nanollm"):
        if match := _WORKPLACE.fullmatch(work.name):
            # An error means that a living process holds the lock, or that another one has just cleared this away.
            with contextlib.suppress(OSError), lock(work) as is_held:
                changed = max(path.stat().st_mtime for path in (work, *work.rglob("*")))
                if (is_held and match[2] == _machine()) or time.time() - changed > _DAY:
                    _clear(work)


def _machine():
    """Four digits that tell this machine, or container, from most others."""
    return f"{zlib.crc32(platform.node().encode()) % 0x10000:04x}"


@contextlib.contextmanager
def lock(folder):
    """Hold a folder's lock until this block ends, or this process; gives False if the system has no locks.

    Raises BlockingIOError if another process holds it.
    """
    handle = None
    try:
        if fcntl:
            with _if_it_can():
                handle = os.open(folder, os.O_RDONLY)
        yield handle is not None and _try_lock(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _try_lock(handle):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:                     # not every network file system has locks
        return False
    return True


@contextlib.contextmanager
def _workplace(path):
    """A locked folder next to `path` for what should not be seen yet, or no longer. It is cleared at the end."""
    with contextlib.ExitStack() as stack:
        while True:
            work = path.with_name(f".{path.name}.{_machine()}{secrets.token_hex(2)}.nanollm")
            try:
                work.mkdir()
            except FileExistsError:
                continue
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(lock(work))
                if work.exists():       # no other process's `recover` came between mkdir and lock
                    break
        try:
            yield work
        finally:
            _clear(work)


def _clear(work):
    """Remove a workplace. A folder that was moved aside gets its name back if nothing has taken it."""
    path = work.with_name(_WORKPLACE.fullmatch(work.name)[1])
    old = work / (path.name + ".old")
    if old.exists() and not path.exists():
        _move(old, path)
    shutil.rmtree(work, ignore_errors=True)
