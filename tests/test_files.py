"""What is opened is a regular file; what is written gets its name when it is complete and on the disk, whoever dies or
refuses in between.
"""
import errno
import itertools
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from conftest import reference

import storage.files as module
import train
from extras import export_gguf, quantize
from storage.files import (
    InputError,
    dangling,
    file_hash,
    lock,
    read_json,
    readable,
    recover,
    refuse_existing,
    remove_folder,
    whole,
)

ROOT = Path(module.__file__).parent.parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(path, kind, content):
    """Make a file or a folder with a file and a folder in it."""
    if kind == "file":
        path.write_text(content)
    else:
        (path / "sub").mkdir(parents=True)
        (path / "a.txt").write_text(content)
        (path / "sub/b.txt").write_text(content)


def content(path):
    """{relative path: text} of a file, or of all files in a folder."""
    parts = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
    return {str(part.relative_to(path)): part.read_text() for part in parts}


both = pytest.mark.parametrize("kind", ["file", "folder"])


# ---------------------------------------------------------------- reading

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def put(path, kind):
    """Make something that cannot be read as a file, and return the words that say what it is."""
    match kind:
        case "pipe":
            os.mkfifo(path)
            return f"{path} is a pipe or a device, not a regular file: save"
        case "folder":
            path.mkdir()
            return f"{path} is a folder, not a file"
        case "dangling link":
            path.symlink_to("between")
            (path.parent / "between").symlink_to("sub/gone")
            return f"{path} is a link to {path.parent}/sub/gone, which does not exist"
        case "loop":
            path.symlink_to(path.name)
            return f"{path}: Too many levels"
        case "pointer":
            path.write_text(POINTER)
            return f"{path} is only Git LFS's pointer .*git lfs pull"
    return f"{path}: there is no such file"


@pytest.mark.parametrize("kind", ["nothing", "pipe", "folder", "dangling link", "loop", "pointer"])
def test_what_cannot_be_read_is_named_for_what_it_is(tmp_path, kind):
    words = put(tmp_path / "name", kind)
    for read in (readable, read_json, file_hash):
        with pytest.raises(InputError, match=words):
            read(tmp_path / "name")


def test_a_folder_that_is_a_link_to_itself(tmp_path):
    (tmp_path / "run").symlink_to("run")
    assert dangling(tmp_path / "run").startswith(f"{tmp_path}/run is a link to itself")


def test_links_are_followed(tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "far/away/blob").write_text('{"a": 1}')
    (tmp_path / "one").symlink_to("far/away/blob")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "folder").symlink_to("far/away")
    for name in ("one", "two", "folder/blob"):
        assert read_json(tmp_path / name) == {"a": 1}
    shutil.rmtree(tmp_path / "far")
    with pytest.raises(InputError, match=f"^{tmp_path}/folder is a link to {tmp_path}/far/away, which does not exist"):
        read_json(tmp_path / "folder/blob")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_what_no_file_can_be_called_is_refused(tmp_path, name):
    for read in (readable, file_hash):
        with pytest.raises(InputError):
            read(tmp_path / name)


def test_a_text_that_begins_like_a_pointer_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_text(POINTER + "That is what a pointer looks like. " * 50)
    assert readable(tmp_path / "a.txt") == tmp_path / "a.txt"


def test_a_byte_order_mark_in_json_is_skipped(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_what_lies_there_instead_is_named(tmp_path):
    others = {r"a\..+": "is a", r".+\.b": "is b"}
    for name, words in (("x.c", "try again"), ("y.b", "y.b is b"), ("x.b", "x.b is b"), ("a.b", "a.b is a")):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"there is no such file; {words}$"):
            readable(tmp_path / "name", "; try again", others)
    (tmp_path / "name").touch()
    assert readable(tmp_path / "name", "; try again", others)


# ---------------------------------------------------------------- writing

@both
def test_the_name_appears_at_the_end_and_nothing_else_stays(tmp_path, kind):
    path = tmp_path / "name.txt"
    for text in ("old", "new"):
        before = content(path) if path.exists() else None
        with whole(path) as draft:
            assert draft.name == path.name
            fill(draft, kind, text)
            assert (content(path) if path.exists() else None) == before
        assert names(tmp_path) == ["name.txt"] and set(content(path).values()) == {text}


@both
@pytest.mark.parametrize("was_there", [False, True])
def test_after_an_error_all_is_as_before(tmp_path, kind, was_there):
    path = tmp_path / "name"
    if was_there:
        fill(path, kind, "old")
    with pytest.raises(RuntimeError, match="no more"), whole(path) as draft:
        fill(draft, kind, "new")
        raise RuntimeError("no more")
    assert names(tmp_path) == ["name"] * was_there
    if was_there:
        assert set(content(path).values()) == {"old"}


@both
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_usual_permissions(tmp_path, kind, mask):
    """Whatever they were made with: safetensors makes files that only their owner can read."""
    before = os.umask(mask)
    try:
        with whole(tmp_path / "name") as draft:
            fill(draft, kind, "text")
            for part in [draft] if kind == "file" else draft.rglob("*.txt"):
                part.chmod(0o600)
    finally:
        os.umask(before)
    for part in [tmp_path / "name", *(tmp_path / "name").rglob("*")]:
        usual = 0o777 if part.is_dir() else 0o666
        assert part.stat().st_mode & 0o777 == usual & ~mask, part


def test_a_folder_is_made_whole_with_all_its_files(tmp_path, monkeypatch):
    """So a file in it needs no workplace of its own, which would cost time."""
    sync, synced = module.sync, []
    monkeypatch.setattr(module, "sync", lambda path: synced.append(path.name) or sync(path))
    with whole(tmp_path / "folder") as folder:
        folder.mkdir()
        with whole(folder / "a.txt") as inside:
            assert inside == folder / "a.txt"
            inside.write_text("a")
            inside.chmod(0o600)
        assert names(folder) == ["a.txt"] and synced == []
    assert sorted(synced) == sorted(["a.txt", "folder", tmp_path.name])
    (tmp_path / "usual").touch()
    assert (tmp_path / "folder/a.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full", "DRAFT"),
                                   OSError(errno.ENOENT, "no", "other.txt")])
def test_an_error_names_the_final_path(tmp_path, error):
    with pytest.raises(OSError, match=r"full|no") as caught, whole(tmp_path / "run") as draft:
        draft.mkdir()
        if error.filename == "DRAFT":
            error.filename = str(draft / "a.txt")
        raise error
    assert caught.value.filename == ("other.txt" if error.errno == errno.ENOENT else str(tmp_path / "run"))


def test_an_error_names_the_final_path_although_no_draft_could_be_made(tmp_path, monkeypatch):
    def refuse(self, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only") as caught, whole(tmp_path / "run"):
        pass
    assert caught.value.filename == str(tmp_path / "run")


def test_what_is_replaced_by_nothing_comes_back(tmp_path, monkeypatch):
    """The disk refuses the very last step, when the old folder has already been moved aside."""
    path, replace = tmp_path / "name", Path.replace
    fill(path, "folder", "old")

    def refuse(self, target):
        if target != path or self.name.endswith(".old"):
            return replace(self, target)
        assert not path.exists()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Read-only"), whole(path) as draft:
        fill(draft, "folder", "new")
    monkeypatch.setattr(Path, "replace", replace)
    assert names(tmp_path) == ["name"] and set(content(path).values()) == {"old"}


# ---------------------------------------------------------------- processes that die, and processes that live

WRITER = """
import sys, time, pathlib
from storage.files import whole
path, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
with whole(path) as draft:
    if kind == "aside":
        move = pathlib.Path.replace
        pathlib.Path.replace = lambda source, target: (
            print("ready", flush=True) or time.sleep(100) if target == path else move(source, target))
        draft.mkdir()
    elif kind == "begun":
        print("ready", flush=True)
        time.sleep(100)
    else:
        draft.write_text("half")
        print("ready", flush=True)
        time.sleep(100)
"""


def writer(path, kind="half"):
    """A process that has begun to write `path` and waits."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, path, kind], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.communicate(timeout=60)


@pytest.mark.parametrize("kind", ["half", "begun"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path, kind):
    dead, alive = writer(tmp_path / "dead.txt", kind), writer(tmp_path / "alive.txt", kind)
    try:
        left = names(tmp_path)
        assert len(left) == 2 and all(name.startswith(".") for name in left)
        recover(tmp_path)
        assert names(tmp_path) == left
        end(dead)
        assert names(tmp_path) == left
        with whole(tmp_path / "other.txt") as draft:       # whoever writes next clears it away
            draft.write_text("other")
        kept = [name for name in left if "alive" in name]
        assert names(tmp_path) == [*kept, "other.txt"]
    finally:
        end(dead), end(alive)
    recover(tmp_path)
    assert names(tmp_path) == ["other.txt"]


def test_a_folder_that_gave_way_to_nothing_comes_back(tmp_path):
    """Killed at the one moment when nothing has the name."""
    path = tmp_path / "best"
    fill(path, "folder", "old")
    process = writer(path, "aside")
    try:
        assert not path.exists()
        recover(tmp_path)
        assert not path.exists()        # its process may still finish
    finally:
        end(process)
    recover(tmp_path)
    assert names(tmp_path) == ["best"] and set(content(path).values()) == {"old"}


def test_what_gave_way_to_something_is_removed(tmp_path):
    process = writer(tmp_path / "best", "aside") if fill(tmp_path / "best", "folder", "old") is None else None
    end(process)
    fill(tmp_path / "best", "folder", "new")            # by a process that did not know of the other
    recover(tmp_path)
    assert names(tmp_path) == ["best"] and set(content(tmp_path / "best").values()) == {"new"}


def test_without_locks_a_leftover_goes_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    for name in (".old.txt.0123abcd.nanollm", ".new.txt.0123abcd.nanollm"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".old.txt.0123abcd.nanollm", (time.time() - 2 * 24 * 3600,) * 2)
    with whole(tmp_path / "a.txt") as draft:
        draft.write_text("a")
    assert names(tmp_path) == [".new.txt.0123abcd.nanollm", "a.txt"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """As some that are mounted over a network."""
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(module.fcntl, "flock", flock)
    (tmp_path / ".new.txt.0123abcd.nanollm").mkdir()
    with lock(tmp_path) as is_held:
        assert not is_held
    with whole(tmp_path / "a.txt") as draft:
        draft.write_text("a")
    assert names(tmp_path) == [".new.txt.0123abcd.nanollm", "a.txt"]


def test_a_draft_of_another_machine_stays_for_a_day(tmp_path, monkeypatch):
    """Some shared disks grant each machine a lock of its own."""
    monkeypatch.setattr(module.fcntl, "flock", lambda *_: None)
    two_days_ago = (time.time() - 2 * 24 * 3600,) * 2
    with whole(tmp_path / "theirs.txt") as draft:
        draft.write_text("half")
        with monkeypatch.context() as patch:
            patch.setattr(platform, "node", lambda: "another")
            recover(tmp_path)
            os.utime(draft.parent, two_days_ago)        # begun long ago, and still written to
            recover(tmp_path)
            assert draft.exists()
            os.utime(draft, two_days_ago)
            recover(tmp_path)
            assert not draft.exists()
        draft.parent.mkdir()
        draft.write_text("whole")
    assert names(tmp_path) == ["theirs.txt"]


def test_no_two_processes_share_a_workplace(tmp_path, monkeypatch):
    """Whatever their process ids: in containers that share a folder, each may be process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    digits = iter(["0123", "0123", "4567"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(digits))
    with whole(tmp_path / "name") as one, whole(tmp_path / "name") as two:
        assert one.parent != two.parent
        one.write_text("one"), two.write_text("two")
    assert content(tmp_path / "name") == {".": "one"} and names(tmp_path) == ["name"]


def test_names_that_only_look_alike_stay(tmp_path):
    others = [".hidden.nanollm", ".a.0123ABCD.nanollm", ".a.0123abcd.nanollm.txt", "a.0123abcd.nanollm", ".a.0123abcd"]
    for name in others:
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert names(tmp_path) == sorted(others)
    recover(tmp_path / "nowhere")


def test_many_at_once(tmp_path):
    """Threads that write one file and sweep its folder over and over: there is always one of them, whole."""
    problems = []

    def work(n):
        try:
            for _ in range(30):
                with whole(tmp_path / "same.txt") as draft:
                    draft.write_text(str(n) * 1000)
                text = (tmp_path / "same.txt").read_text()
                assert len(text) == 1000 and len(set(text)) == 1
        except BaseException as problem:
            problems.append(problem)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and names(tmp_path) == ["same.txt"]


def test_a_removed_folder_is_never_seen_in_part(tmp_path, monkeypatch):
    fill(tmp_path / "checkpoint-1", "folder", "old")
    seen, rmtree = [], module.shutil.rmtree

    def watched(*args, **how):
        seen.append(names(tmp_path))
        rmtree(*args, **how)
    monkeypatch.setattr(module.shutil, "rmtree", watched)
    remove_folder(tmp_path / "checkpoint-1")
    assert names(tmp_path) == [] and len(seen) == 1 and "checkpoint-1" not in seen[0]


def test_nothing_is_overwritten(tmp_path):
    refuse_existing(tmp_path / "new")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "."):
        with pytest.raises(InputError, match="exists and is not overwritten: give another name"):
            refuse_existing(tmp_path / name)


def test_a_lock_is_for_one(tmp_path):
    with lock(tmp_path) as is_held:
        assert is_held
        with pytest.raises(BlockingIOError), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


# ---------------------------------------------------------------- a whole run

@pytest.mark.usefixtures("cheap")
def test_all_is_on_the_disk_before_it_has_its_name(files, tmp_path, monkeypatch):
    synced, order = {}, []

    def look(path):
        info = os.stat(path)
        return info.st_size, info.st_mtime_ns

    def fsync(handle):
        info = os.fstat(handle)
        synced[info.st_ino] = (info.st_size, info.st_mtime_ns)
        order.append(info.st_ino)

    def checked(operation):
        def move(source, target, **named):
            name = os.path.basename(target)
            if not name.startswith("."):
                inside = [os.path.join(source, file) for file in os.listdir(source)] if os.path.isdir(source) else []
                for path in [source, *inside]:
                    assert synced.get(os.stat(path).st_ino) == look(path), f"{path} was not synced"
                moved.append((name, os.stat(os.path.dirname(target)).st_ino, len(order)))
            operation(source, target, **named)
        return move
    moved = []
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    tiny.run(*files, "--max-steps", 4, "--eval-every", 2, "--save-every", 2, "--artifact-dir", "run")
    assert {name for name, *_ in moved} >= {"checkpoint-0", "checkpoint-2", "checkpoint-4", "best", "model.safetensors",
                                            "config.json", "metrics.csv"}
    for name, parent, when in moved:        # and then, at once, the folder that has the new name
        if name in ("checkpoint-2", "best", "config.json"):
            assert order[when] == parent, name


# ---------------------------------------------------------------- file systems that lack something

CANNOT = [errno.EPERM, errno.EACCES, errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP]
CALLS = "chmod", "fsync", "replace", "flock"


def refuse(patch, *numbers, calls=CALLS):
    """As FAT, CIFS, FUSE and mounted buckets may: no modes, no locks; no folder is synced or renamed."""
    number = itertools.cycle(numbers)

    def refused(call, only_folders):
        def answer(what, *rest, **named):
            path = f"/proc/self/fd/{what}" if isinstance(what, int) else what
            if only_folders and not os.path.isdir(path):
                return call(what, *rest, **named)
            code = next(number)
            raise OSError(code, os.strerror(code), str(what))
        return answer
    for name in calls:
        owner = module.fcntl if name == "flock" else os
        patch.setattr(owner, name, refused(getattr(owner, name), name in ("fsync", "replace")))


@pytest.mark.parametrize("number", CANNOT, ids=errno.errorcode.get)
def test_what_a_file_system_cannot_do_is_left_out(tmp_path, monkeypatch, number):
    refuse(monkeypatch, number)
    for kind in ("file", "folder"):
        for text in ("old", "new"):
            with whole(tmp_path / kind) as draft:
                fill(draft, kind, text)
            assert set(content(tmp_path / kind).values()) == {text}
    remove_folder(tmp_path / "folder")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["chmod", "fsync", "replace"])
def test_what_it_can_do_and_fails_at_is_an_error(tmp_path, monkeypatch, call, number):
    refuse(monkeypatch, number, calls=[call])
    with pytest.raises(OSError, match=os.strerror(number)) as caught, whole(tmp_path / "name") as draft:
        fill(draft, "folder", "new")
    assert caught.value.errno == number
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EMFILE])
def test_a_folder_that_cannot_be_renamed_is_moved_file_by_file(tmp_path, monkeypatch, number):
    """A container's image, or a mounted bucket."""
    fill(tmp_path / "name", "folder", "old")
    (tmp_path / "name/empty").mkdir()
    refuse(monkeypatch, number, calls=["replace"])
    with whole(tmp_path / "name") as draft:
        fill(draft, "folder", "new")
    assert names(tmp_path) == ["name"] and content(tmp_path / "name") == {"a.txt": "new", "sub/b.txt": "new"}
    remove_folder(tmp_path / "name")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_opened_has_no_lock(tmp_path, monkeypatch):
    def closed(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    monkeypatch.setattr(os, "open", closed)
    with lock(tmp_path) as is_held:
        assert not is_held
    module.sync(tmp_path)


@pytest.mark.usefixtures("cheap")
def test_a_run_on_a_file_system_that_can_do_little(files, tmp_path, monkeypatch):
    reference("gguf")
    refuse(monkeypatch, *CANNOT)
    tiny.run(*files, "--max-steps", 6, "--save-every", 2, "--eval-every", 2, "--keep-last", 1, "--artifact-dir", "run")
    assert {"best", "checkpoint-6", "model.safetensors"} <= set(names(tmp_path / "run"))
    assert not list((tmp_path / "run").glob(".*"))
    assert train.main("--resume --max-steps 7 --artifact-dir run".split()) == 0
    quantize.main(["run", "small"])
    export_gguf.export("run", "model.gguf")
    assert {"small", "model.gguf"} <= set(names(tmp_path))
