"""Files and folders are written whole or not at all."""
import errno
import os

import pytest
import tiny

from storage import checkpoint
from storage.checkpoint import checkpoints

pytestmark = pytest.mark.usefixtures("cheap")


# ---------------------------------------------------------------- crashes in the middle of a save

def test_leftovers_are_never_taken_for_a_run_or_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    for name in (".checkpoint-5.new", ".checkpoint-3.old", ".best.new"):
        (run / name).mkdir(parents=True)
        (run / name / "trainer.json").write_text("{}")
    for name in (".metrics.csv.123", ".model.safetensors.99", ".loss.png.1", ".generation_config.json.4"):
        (run / name).touch()
    (run / "checkpoint-3").mkdir()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    checkpoint.recover(run)
    assert [path.name for path in run.iterdir()] == ["checkpoint-3"]
    (run / "checkpoint-3").rename(run / ".checkpoint-3.old")
    assert checkpoints(run) == [] and not checkpoint.holds_run(run)
    checkpoint.recover(run)
    assert [path.name for path in run.iterdir()] == ["checkpoint-3"]


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


def test_a_file_system_that_cannot_sync_folders(files, monkeypatch):
    """As some of those that are mounted over a network."""
    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(os, "fsync", fsync)
    assert tiny.run(*files, "--max-steps", 2, "--artifact-dir", "run") == 0
