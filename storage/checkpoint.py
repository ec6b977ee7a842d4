"""A run's folder: what training writes, and how it resumes exactly where it stopped.

    runs/llm/                   a model's folder once training has ended:
        config.json  model.safetensors
        tokenizer.json  tokenizer_config.json  generation_config.json       (a language model's)
        metrics.csv  loss.png
        best/                   a model's folder too, from the evaluation with the lowest loss
        checkpoint-1200/        a model's folder too, with all that a resumed run needs:
            optimizer.safetensors   Adam's two moments
            trainer.json            how far training is (State), and the command that began it
            SHA256SUMS              the hashes of all these files, as `sha256sum -c` reads them

No run ever overwrites another. Within a run, `best` is replaced by a better model, the final model by that of a longer
training, and old checkpoints are removed (--keep-last).

Every file and folder gets its name only when it is complete and on the disk (see `whole` in files.py). What a crash
leaves behind is never read, and the next process that writes there removes it.
"""
import contextlib
import filecmp
import itertools
import json
import math
import platform
import re
import shlex
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hardware import device, ranks
from storage.files import (
    InputError,
    dangling,
    file_hash,
    lock,
    read_json,
    readable,
    recover,
    remove_folder,
    require,
    sync,
    whole,
)

# ---------------------------------------------------------------- the folder of a run

def checkpoints(folder):
    """The complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in Path(folder).glob("checkpoint-*")
             if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(found)]


WRITTEN = "metrics.csv", "config.json", "model.safetensors", "checkpoint-*"     # what shows that a folder holds a run


def check_free(folder=None):
    """Raise InputError unless a new run can begin in `folder`, or in runs. Tests by making a temporary folder."""
    place = Path("runs" if folder is None else folder)
    try:
        require(folder is None or not any(any(place.glob(name)) for name in WRITTEN),
                f"{folder} already holds a run, and no run overwrites another: continue it with --resume, or name "
                "another --artifact-dir")
        above = next(path for path in (place, *place.absolute().parents) if path.is_symlink() or path.exists())
        with tempfile.TemporaryDirectory(".nanollm", ".", above):
            pass
    except OSError as problem:
        raise InputError(dangling(place) or
                         f"cannot write to {place} ({problem.strerror}): name another --artifact-dir") from None


def new_run(folder=None, name="llm"):
    """Make the folder of a new run: `folder`, or the first free one of runs/NAME, runs/NAME-2, …"""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(folder)
    made, numbers = Path("runs", name), itertools.count(2)
    made.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):      # of two processes that try at once, one makes it
            made.mkdir()
            return made
        made = Path("runs", f"{name}-{next(numbers)}")


def last_run(name="llm"):
    """The folder that a run without --artifact-dir made last. Raises InputError where there is none."""
    runs = [(int(match[1] or 1), path) for path in Path("runs").glob(f"{name}*")
            if path.is_dir() and (match := re.fullmatch(rf"{name}(?:-(\d+))?", path.name))]
    require(runs, f"--resume: there is no run in runs/{name}; name its folder with --artifact-dir")
    return max(runs)[1]


def resume_command(folder, program="train.py"):
    return f"python {program} --resume --artifact-dir {shlex.quote(str(folder))}"


def check_ended(folder, program="train.py"):
    """Raise InputError if a run in this folder has not ended, because the model is written then."""
    if (folder / "metrics.csv").exists() and not (folder / "config.json").exists():
        ready = [path for path in (folder / "best", *reversed(checkpoints(folder))) if path.exists()]
        remedy = f"use {ready[0]}" if ready else f"continue it with {resume_command(folder, program)}"
        raise InputError(f"{folder} has no model yet because its training has not ended: {remedy}")


@contextlib.contextmanager
def held(folder, program="train.py"):
    """Keep a run's folder for this process while it trains. Raises InputError if another process has it.

    If the disk is full or becomes read-only in that time, this raises InputError too; complete checkpoints stay.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(folder))
        except BlockingIOError:
            raise InputError(f"another process is training in {folder}: wait until it ends, or name another "
                             "--artifact-dir") from None
        try:
            yield
        except (OSError, SafetensorError) as problem:
            where, why = getattr(problem, "filename", None) or folder, getattr(problem, "strerror", None) or problem
            saved = "nothing was saved yet: name an --artifact-dir on another disk"
            if done := checkpoints(folder):
                saved = f"{done[-1]} is complete: once that is fixed, continue with {resume_command(folder, program)}"
            raise InputError(f"cannot write {where} ({why}); {saved}") from None


# ---------------------------------------------------------------- models and checkpoints

WINDOW = 512            # tokens of a text that a model of others reads at once: its longest context takes much memory


@dataclass
class State:
    """Everything about progress that a resumed run needs, besides weights, moments and settings."""
    step: int = 0                       # steps done
    epoch: float = 0.0                  # passes over the training windows, with the fraction of the current one
    windows: int = 0                    # windows taken so far from the endless stream: a resumed run takes the next
    loss_sum: float = 0.0               # sum of the losses since the last row of metrics.csv
    loss_count: int = 0                 # number of steps in that sum
    best_loss: float | None = None      # lowest validation loss so far
    without_better: int = 0             # evaluations since then
    skipped: int = 0                    # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0           # of these, the ones since the last step that was finite
    updates: int = 0                    # Adam's t
    loss_scale: float = 1.0             # float16: what the loss is multiplied by
    scale_age: int = 0                  # steps since the loss scale changed
    seconds: float = 0.0                # time spent, over all resumptions
    cut: float | None = None            # the last step's gradient norm, if a signal cut its evaluation short

    def is_over(self, settings):
        """Whether all steps are done and evaluated, or patience has run out."""
        no_patience = settings.patience is not None and self.without_better >= settings.patience
        return (self.step >= settings.max_steps and self.cut is None) or no_patience


def versions():
    """What computed a run, for people who read its trainer.json."""
    packages = {package.__name__: package.__version__ for package in (np, tokenizers, safetensors)}
    return {"python": platform.python_version(), **packages, "device": device.reason}


@dataclass
class Run:
    """A run's folder, and what every model's folder in it holds besides the model.

    `files`, {name: text}, stand next to the model, such as its tokenizer. `settings` are entries of its config.json,
    such as bos_token_id. `about` is what trainer.json holds besides the State.
    """
    folder: Path
    files: dict
    settings: dict
    about: dict

    def write_model(self, folder, model):
        """Fill `folder` with a complete model's folder, config.json last."""
        for name, text in self.files.items():
            with whole(folder / name) as path:
                path.write_text(text, encoding="utf-8")
        model.save(folder, **self.settings)

    def write_best(self, model):
        with whole(self.folder / "best") as folder:
            folder.mkdir()
            self.write_model(folder, model)

    def write_checkpoint(self, model, moments, state, keep_last):
        """Write checkpoint-STEP, then remove all but the last `keep_last` checkpoints (at least 1) of this run.

        moments: {"m": array, "v": array}, Adam's, on the host.
        """
        sync(self.folder / "metrics.csv")           # the resumed run continues these rows
        with whole(self.folder / f"checkpoint-{state.step}") as folder:
            folder.mkdir()
            self.write_model(folder, model)
            save_file(moments, folder / "optimizer.safetensors")
            about = json.dumps(asdict(state) | self.about, indent=2)    # in ASCII: a file's name need not be Unicode
            (folder / "trainer.json").write_text(about + "\n")
            sums = [f"{file_hash(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
            (folder / "SHA256SUMS").write_text("".join(sums))
        for old in checkpoints(self.folder)[:-keep_last]:
            remove_folder(old)

    def is_finished(self, newest):
        """Whether the folder holds, complete, the model of the newest checkpoint."""
        return (self.folder / "config.json").exists() and filecmp.cmp(
            self.folder / "model.safetensors", newest / "model.safetensors", shallow=False)


def newest_checkpoint(folder):
    """The newest checkpoint of a run. Raises InputError if there is none, or if it is not as it was written."""
    require(Path(folder).is_dir(),
            f"--resume: there is no folder {folder}: name the folder of a run with --artifact-dir")
    recover(Path(folder))
    *older, newest = checkpoints(folder) or [None]
    require(newest, f"--resume: there is no checkpoint in {folder}: name the folder of another run, or begin a new run "
            "in a new folder, without --resume")
    try:
        check_sums(newest)
    except InputError as problem:
        way = "no older checkpoint is left: start a new run"
        if older:
            way = f"to continue from {older[-1]}, move {newest} away"
        raise InputError(f"--resume: {problem}; {way}") from None
    return newest


def check_sums(checkpoint):
    """Raise InputError that names the file unless all of a checkpoint's files are as they were written."""
    path = readable(checkpoint / "SHA256SUMS")
    try:
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        sums = {name: value for value, name in lines}
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}") from None
    except ValueError:
        raise InputError(f"{path} is damaged") from None
    for name in sorted({"trainer.json", "optimizer.safetensors", "model.safetensors", "config.json"} | sums.keys()):
        if file_hash(checkpoint / name) != sums.get(name):
            raise InputError(f"{checkpoint / name} is damaged: it is not what was written (see {path.name})")


def read_trainer(checkpoint):
    """(State, about) of a checkpoint's trainer.json. Raises InputError that names the file and what is wrong in it."""
    path = checkpoint / "trainer.json"
    about, values = {"cut": None} | read_json(path), {}        # checkpoints of before lack it
    for field in fields(State):
        require(field.name in about, f"{path}: {field.name} is missing")
        value = about.pop(field.name)
        of_its_type = isinstance(value, field.type) and not isinstance(value, bool)     # a bool counts as an int
        require(of_its_type and 0 <= (value or 0) < math.inf, f"{path}: {field.name} cannot be {value!r}")
        values[field.name] = value
    for name in ("command", "hashes"):
        require(isinstance(about.get(name), dict), f"{path}: {name} is not an object")
    return State(**values), about


def usual_window(folder, longest):
    """How many tokens of a text a folder's model should read at once: as many as in its training, if that was a run of
    ours, otherwise WINDOW; but not more than its longest context.
    """
    folder, length = Path(folder).absolute(), None
    for newest in [*checkpoints(folder.parent)[-1:], *checkpoints(folder)[-1:]]:       # this is `best`, or a run
        with contextlib.suppress(InputError):
            length = read_trainer(newest)[1]["command"].get("seq_len")
    return min(length if isinstance(length, int) and length > 0 else WINDOW, longest)


def read_moments(checkpoint, optimizer, team=ranks.ALONE):
    """Read Adam's moments into the optimizer; rank 0 alone reads them. Raises InputError that names the file."""
    path = checkpoint / "optimizer.safetensors"
    for name, target in (("m", optimizer.m), ("v", optimizer.v)):
        target[...] = device.xp.asarray(team.scatter(        # no name keeps the first moment while the second is read
            None if team.rank else read_moment(path, name, optimizer.weights.flat.shape)))


def read_moment(path, name, shape):
    """The moment `name`, a float32 array on the host. Raises InputError that names the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.get_slice(name)
            require(tuple(header.get_shape()) == shape and header.get_dtype() == "F32",
                    f"{path}: {name} is not float32 of shape {shape}")
            values = file.get_tensor(name)
    except (OSError, SafetensorError) as problem:
        raise InputError(f"{path}: not a whole safetensors file ({problem})") from None
    low, high = float(values.min()), float(values.max())        # both are NaN if there is one
    if not math.isfinite(high - low) or (name == "v" and low < 0):
        raise InputError(f"{path}: {name} holds values that Adam cannot have made")
    return values
