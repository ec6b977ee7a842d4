"""A run's folder: written whole or not at all, and resumed exactly.

    runs/llm/                   a Hugging Face model folder once training has ended
        config.json  model.safetensors  generation_config.json  tokenizer.json  tokenizer_config.json
        metrics.csv  loss.png
        best/                   such a folder too, of the lowest validation loss
        checkpoint-1200/        such a folder too, and with it what a resumed run needs:
            optimizer.safetensors   Adam's two moments
            trainer.json            how far training is, and the command that made it

A folder or file appears under its name only when it is complete: it is written beside, under a name that starts
with a dot, synced to the disk and renamed. Whatever a crash leaves has such a name, is never read, and is cleared
away when the run goes on.
"""
import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import device
from data import load_tokenizer, vocab_size
from device import InputError
from nanollm import NanoLLM, read_json, replace_file

# ---------------------------------------------------------------- files and folders, whole or not at all

def file_hash(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Have the disk hold what was written to a file, or the names in a folder (which Windows cannot open)."""
    if os.name == "nt" and Path(path).is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(path, write):
    """Have write(folder) fill a folder beside `path`, then put it there. A folder of that name gives way last."""
    beside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        beside.mkdir()
        write(beside)
        for file in beside.iterdir():
            sync(file)
        sync(beside)
        if path.exists():
            path.rename(old)            # killed between these two: `recover` gives the old one its name back
        beside.rename(path)
        sync(path.parent)
    finally:
        for leftover in (beside, old):
            if path.exists():
                shutil.rmtree(leftover, ignore_errors=True)


def recover(folder):
    """Clear away what a crash has left in a run's folder."""
    for old in folder.glob(".*.old"):
        path = old.with_name(old.name[1:-len(".old")])
        if not path.exists():
            old.rename(path)
    for leftover in folder.glob(".*"):
        if leftover.name.endswith((".new", ".old")):
            shutil.rmtree(leftover, ignore_errors=True)
        elif re.fullmatch(r"\..+\.\d+", leftover.name):
            leftover.unlink(missing_ok=True)


# ---------------------------------------------------------------- the run

def holds_run(folder):
    """Whether anything that a run writes is in this folder."""
    return any(any(folder.glob(name)) for name in ("metrics.csv", "config.json", "model.safetensors", "checkpoint-*"))


def new_run(folder=None, default="runs/llm"):
    """Make the folder of a new run: `folder`, which must not hold one, or the first free default, default-2, …

    Raises InputError where a run is there already, or where nothing can be written.
    """
    try:
        if folder is not None:
            folder = Path(folder)
            if folder.is_dir() and holds_run(folder):
                raise InputError(f"{folder} already holds a run, and nothing is ever overwritten: "
                                 "continue it with --resume, or name another --artifact-dir")
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".probe.0"
            probe.touch()
            probe.unlink()
            return folder
        for n in itertools.count(1):
            folder = Path(default if n == 1 else f"{default}-{n}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()          # fails, atomically, where anybody has it
                return folder
            except FileExistsError:
                continue
    except OSError as problem:
        raise InputError(f"cannot write to {folder} ({problem.strerror}): name another --artifact-dir") from None


def last_run(default="runs/llm"):
    """The folder that a run without --artifact-dir made last. Raises InputError where there is none."""
    runs = [path for path in Path(default).parent.glob(Path(default).name + "*") if path.is_dir()]
    pattern = re.compile(re.escape(Path(default).name) + r"(?:-(\d+))?")
    numbered = [(int(match[1] or 1), path) for path in runs if (match := pattern.fullmatch(path.name))]
    if not numbered:
        raise InputError(f"--resume: there is no run in {default}; name its folder with --artifact-dir")
    return max(numbered)[1]


# ---------------------------------------------------------------- models and checkpoints

@dataclass
class State:
    """How far training is: with the weights and Adam's moments, all that decides how it goes on."""
    step: int = 0
    windows: int = 0                    # of the endless stream, consumed so far
    loss_sum: float = 0.0               # of the steps since the last row of metrics.csv, and their number
    loss_count: int = 0
    best_loss: float | None = None      # the lowest validation loss, and the evaluations since then
    without_better: int = 0
    skipped: int = 0                    # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    updates: int = 0                    # Adam's t
    seconds: float = 0.0


class Run:
    """What goes into every folder of a run beside the numbers: the tokenizer, and `about`, a dict for trainer.json.

    `settings` are entries of config.json that belong to the model, such as bos_token_id, where it came from a folder
    that had them. The tokenizer goes out as training used it, inserting no special tokens, unless they name a BOS.
    """
    def __init__(self, folder, tokenizer, settings, about):
        self.folder, self.tokenizer, self.about = Path(folder), tokenizer, about
        self.settings = {name: value for name, value in settings.items() if value is not None}
        content = json.loads(tokenizer.to_str())
        if "bos_token_id" not in self.settings:
            content["post_processor"] = None
        self.tokenizer_json = json.dumps(content, ensure_ascii=False) + "\n"

    def write_model(self, folder, model):
        """Fill `folder` with a complete Hugging Face model folder, each file whole or not at all."""
        for name, text in {
            "tokenizer.json": self.tokenizer_json,
            "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None,
                                            "clean_up_tokenization_spaces": False,
                                            "model_max_length": model.config.max_context}),
            "generation_config.json": _json({"bos_token_id": None, "eos_token_id": None} | self.settings),
        }.items():
            replace_file(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        model.save(folder, **self.settings)

    def write_best(self, model):
        replace_folder(self.folder / "best", lambda folder: self.write_model(folder, model))

    def write_checkpoint(self, model, optimizer, state, keep_last):
        """Write checkpoint-STEP, complete, then remove all of this run but the last `keep_last` (at least 1)."""
        def write(folder):
            self.write_model(folder, model)
            moments = {"m": device.to_host(optimizer.m), "v": device.to_host(optimizer.v)}
            replace_file(folder / "optimizer.safetensors", lambda path: save_file(moments, path))
            (folder / "trainer.json").write_text(_json(asdict(state) | self.about), encoding="utf-8")

        replace_folder(self.folder / f"checkpoint-{state.step}", write)
        for old in checkpoints(self.folder)[:-keep_last]:
            gone = old.with_name(f".{old.name}.new")    # half removed, it must not look complete
            old.rename(gone)
            shutil.rmtree(gone)


def _json(value):
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def checkpoints(folder):
    """The complete checkpoints of a run, oldest first."""
    found = [(int(path.name[len("checkpoint-"):]), path) for path in Path(folder).glob("checkpoint-*")
             if path.name[len("checkpoint-"):].isdigit()]
    return [path for _, path in sorted(found)]


def read_trainer(checkpoint):
    """(State, about) of a checkpoint's trainer.json. Raises InputError naming the file and what is wrong in it."""
    path = checkpoint / "trainer.json"
    about, values = read_json(path), {}
    for field in fields(State):
        value = about.pop(field.name, "missing")
        if not isinstance(value, field.type) or isinstance(value, bool):
            raise InputError(f"{path}: {field.name} is {value!r}")
        values[field.name] = value
    for name in ("command", "hashes"):
        if not isinstance(about.get(name), dict):
            raise InputError(f"{path}: {name} is not an object")
    return State(**values), about


def read_moments(checkpoint, optimizer):
    """Read Adam's moments into the optimizer. Raises InputError naming the file."""
    path = checkpoint / "optimizer.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            for name, target in (("m", optimizer.m), ("v", optimizer.v)):
                header = file.get_slice(name)
                if tuple(header.get_shape()) != target.shape or header.get_dtype() != "F32":
                    raise InputError(f"{path}: {name} is not float32 of shape {target.shape}")
                values = file.get_tensor(name)
                if not np.isfinite(values).all() or (name == "v" and (values < 0).any()):
                    raise InputError(f"{path}: {name} holds values that Adam cannot have made")
                target[...] = device.xp.asarray(values)
    except (OSError, SafetensorError) as problem:
        raise InputError(f"{path}: not a whole safetensors file ({problem})") from None


# ---------------------------------------------------------------- a finished model

def open_model(folder):
    """(model, tokenizer, BOS id or None, EOS ids) of a Hugging Face folder. Raises InputError naming what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one that training or transformers has written")
    if holds_run(folder) and not any(folder.glob("model.safetensors*")):
        ready = [folder / "best"] * (folder / "best").exists() + checkpoints(folder)[::-1]
        raise InputError(f"{folder} has no model yet, its training has not ended"
                         + (f": use {ready[0]}" if ready else ""))
    model, tokenizer = NanoLLM.load(folder), load_tokenizer(folder / "tokenizer.json")
    if vocab_size(tokenizer) > model.config.vocab_size:
        raise InputError(f"{folder / 'tokenizer.json'} has {vocab_size(tokenizer)} tokens, the model only "
                         f"{model.config.vocab_size}")
    config = read_json(folder / "config.json")
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token in [*eos, *([] if bos is None else [bos])]:
        if not isinstance(token, int) or not 0 <= token < model.config.vocab_size:
            raise InputError(f"{folder / 'config.json'}: {token!r} is no token id of this model")
    return model, tokenizer, bos, eos
