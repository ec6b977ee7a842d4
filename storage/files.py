"""Files and folders that appear whole or not at all, and what is said of those that cannot be used."""
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot be used; the message names it, and the remedy, in one line."""


_UMASK = os.umask(0)                    # can only be read by being set
os.umask(_UMASK)


def replace_file(path, write):
    """Have write(path) make a file beside `path`, then rename it there: under its name it is whole, or the old one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.chmod(0o666 & ~_UMASK)       # safetensors makes files that only their owner can read
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path):
    """The JSON object in a file. Raises InputError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}; a Hugging Face model folder is needed") from None
    except (ValueError, RecursionError) as problem:     # not UTF-8, not JSON, or brackets in brackets without end
        raise InputError(f"{path}: not valid JSON ({problem})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def file_hash(path):
    """SHA-256 of a file's bytes, in hexadecimal. Raises InputError where there is none to read."""
    try:
        if not Path(path).is_file():    # opening a pipe would wait for ever
            raise InputError(f"{path}: there is no such file")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}") from None


def sync(path):
    """Have the disk hold what was written to a file, or the names in a folder (which Windows cannot open)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno != errno.EINVAL:       # which says that this file system cannot sync folders
            raise
    finally:
        os.close(handle)


def recover(folder):
    """Clear away what a crash, or a disk that was full, has left in a run's folder."""
    for leftover in folder.glob(".*"):
        if match := re.fullmatch(r"\.(best|checkpoint-\d+)\.(new|old)", leftover.name):
            path = leftover.with_name(match[1])
            if match[2] == "old" and not path.exists():
                leftover.rename(path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        elif re.fullmatch(r"\.[a-z_]+\.(csv|png|json|safetensors)\.\d+", leftover.name):
            leftover.unlink(missing_ok=True)


def replace_folder(path, write):
    """Have write(folder) fill a folder beside `path`, then put it there. One of that name gives way last."""
    recover(path.parent)
    beside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        beside.mkdir()
        write(beside)
        for file in beside.iterdir():
            sync(file)
        sync(beside)
        if path.exists():
            path.rename(old)            # killed here, nothing has the name: `recover` gives it back to the old one
        beside.rename(path)
        sync(path.parent)
    finally:
        recover(path.parent)


def remove_folder(path):
    """Remove a folder that, half removed, must not look like a whole one."""
    gone = path.with_name(f".{path.name}.new")
    path.rename(gone)
    shutil.rmtree(gone)
