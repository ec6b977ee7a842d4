"""Train an image classifier on a folder of pictures:  python -m images.train --images FOLDER

The loop, Adam, the checkpoints and most flags are those of train.py. Here are the flags that pictures need and what is
reported about them. Of several processes (hardware/ranks.py) rank 0 reads the pictures: those that it starts share
them, those of mpiexec get a copy each.
"""
import dataclasses
import itertools
import math
import os
import shlex
import sys
import warnings
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

if __name__ == "__main__" and not __package__:          # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import cross_entropy, no_grad
from console import cli, options
from console.cli import number
from console.observer import Observer
from console.options import Request, Training
from hardware import device, ranks
from images import demo
from images.network import Config, ConvNet, preprocessor
from images.reading import ImageDataset
from storage import checkpoint
from storage.files import InputError, require
from train import Adam, rate, train

COMMAND = "-m images.train"
NAME = f"python {COMMAND}"
LIKE = {field.name: field for field in fields(options.Settings)}


def like(name, default=None, **changes):
    """train.py's flag of this name, perhaps with another default, help or group."""
    field = LIKE[name]
    return dataclasses.field(default=field.default if default is None else default, metadata=field.metadata | changes)


@dataclass(frozen=True)
class Settings(Training):
    """What a training is: the flags of images.train, and what "command" in a checkpoint's trainer.json holds."""
    program, runs = COMMAND, "images"
    title = "Train an image classifier on a folder of pictures, from scratch."
    needed = "--images FOLDER"
    paths = "images", "val_images"
    windows, more = "pictures", "--grad-accum, or give more pictures"
    dtype, sample_every = "float32", math.inf       # what train.py's loop and the Observer ask, too: never a sample

    images: str | None = options.in_run(None, cli.path, "a folder with one subfolder of pictures for each class",
                                        "FOLDER")
    val_images: str | None = options.in_run(None, cli.path, "another such folder to validate on, in place of "
                                            "--val-fraction of the first", "FOLDER")
    demo: bool = like("demo", help="train on digits drawn in matplotlib's fonts: no files needed")

    size: int = options.in_data(
        128, number(int, 16, 2048), "pictures become squares with this number of pixels on each side", fixed=True)
    val_fraction: float = like("val_fraction", 0.2, help="share of each class held out for validation; 0: none")
    num_epochs: int = like("num_epochs", help="passes over the training pictures")
    max_steps: int | None = like("max_steps")
    batch_size: int = like("batch_size", 64, help="number of pictures in a batch")

    tf32: bool = like("tf32")

    dropout: float = like("dropout", 0.5, help="share of the last features that becomes 0 in training")
    grad_accum: int = like("grad_accum")
    learning_rate: float = like("learning_rate", 1e-3, help="highest learning rate; in 470 steps on shirts and "
                                "T-shirts it reached 85.2 %% where the original's 1e-4 reached 82.0 %%")
    lr_schedule: str = like("lr_schedule")
    warmup_steps: int | None = like("warmup_steps")
    min_lr: float | None = like("min_lr")
    beta1: float = like("beta1")
    beta2: float = like("beta2")
    weight_decay: float = like("weight_decay")
    clip_norm: float = like("clip_norm", 0.0)
    patience: int | None = like("patience")
    seed: int = like("seed", help="random seed for the initial weights, the order of the pictures and dropout")

    eval_every: int | None = like("eval_every")
    save_every: int = like("save_every")
    keep_last: int = like("keep_last")
    log_every: int = like("log_every")

    def validates(self):
        return self.val_fraction > 0 or self.val_images is not None


# ---------------------------------------------------------------- what is reported

class ImageObserver(Observer):
    """An Observer of a training on pictures: a window is a picture, and what counts is the accuracy."""
    columns = ("step", "epoch", "images", "train_loss", "val_loss", "val_accuracy", "learning_rate", "grad_norm",
               "loss_scale", "skipped", "images_per_second", "flops_per_second", "seconds")
    unit, short, blocks = "images", "images", staticmethod(ConvNet.run_blocks)

    def per_window(self):
        return 1

    def flops(self, model):
        return model.config.flops_per_picture()

    def announce(self, model, val_set):
        """What is about to be trained, and what the most naive answer would score."""
        (name, share), K = (val_set or self.train_set).most_frequent(), len(self.train_set.classes)
        unseen, size = f"{len(val_set):,} for validation" if val_set else "none for validation", self.settings.size
        return (f"pictures   {self.settings.images}: {len(self.train_set):,} for training, {unseen}, in {K} classes; "
                f"always answering {name!r} would be right for {share:.1%}\n"
                f"model      {model.weights.flat.size:,} parameters, {size} x {size} pixels, "
                f"{', '.join(map(str, model.config.widths))} channels")

    def first_words(self):
        K = len(self.train_set.classes)
        return f"guessing evenly among {K} classes gives ln K = {math.log(K):.3f}"

    def on_training_set(self, loss):
        return {"loss": loss}

    def next_command(self):
        folder = shlex.quote(str(self.run.folder))
        return f"let it look at a picture with\n    python -m images.infer {folder} --image PATH"

    def explain(self, result):
        accuracy = f", accuracy {result['accuracy']:.1%}" if "accuracy" in result else ""
        return f"loss {result['loss']:.4f}{accuracy}"


def evaluate(model, dataset, batch_size=64, watch=iter, team=ranks.ALONE):
    """{loss, accuracy, confusion}: the mean loss in nats, the share of pictures whose class has the largest logit, and
    confusion[i, j], how many pictures of class i were taken for class j. In each turn every rank of a team takes a
    batch, and all get the result; `watch` wraps the turns.
    """
    nats, confusion = 0.0, np.zeros((len(dataset.classes),) * 2, np.int64)
    with no_grad():
        for turn in watch(itertools.zip_longest(*[dataset.in_order(batch_size)] * team.size)):
            if turn[team.rank] is None:         # the last turn has fewer batches
                continue
            pixels, labels = turn[team.rank]
            logits = model(pixels)
            nats += float(cross_entropy(logits, labels).data) * len(labels)
            np.add.at(confusion, (labels, device.to_host(logits.data).argmax(-1)), 1)
    nats, confusion = team.sum(nats), team.sum(confusion)
    return {"loss": nats / len(dataset), "accuracy": confusion.trace() / len(dataset), "confusion": confusion}


# ---------------------------------------------------------------- the command

@dataclass(frozen=True)
class Plan(Request):
    """A Request and the pictures that it names."""
    train_set: ImageDataset | None = None
    val_set: ImageDataset | None = None


def parse(argv):
    """The Request of these flags, after all checks that need no pictures. Raises InputError."""
    typed = vars(options.command_line(Settings).parse_args(argv))
    folder, where, processes = (typed.pop(name, None) for name in ("artifact_dir", "device", "processes"))
    if typed.pop("resume", False):
        request = options.continued(folder, typed, Settings)
    else:
        checkpoint.check_free(folder)
        request = Request(Settings(**defaults(typed) | typed), folder)
    settings = request.settings
    settings.check(typed)
    device.use(where, settings.tf32)
    if settings.demo and not os.path.isdir(settings.images or ""):
        images, val_images = demo.folders()
        settings = replace(settings, images=images, val_images=val_images)
    require(settings.images, "--images FOLDER is needed (or --demo, which needs no files)")
    return replace(request, settings=settings,
                   processes=options.count_processes(processes, settings, alone=argv is not None))


def defaults(typed):
    """For a new run: the settings that --demo gives in place of Settings' defaults."""
    if not typed.get("demo"):
        return {}
    if given := [name for name in Settings.paths if typed.get(name)]:
        raise InputError(f"--demo brings its own pictures: leave out {options.flag(given[0])}")
    return demo.SETTINGS


def read_folders(request):
    """(train_set, val_set or None, the hashes of both). Raises InputError if a resumed run's pictures have changed."""
    settings, val_set = request.settings, None
    train_set = ImageDataset.from_folder(settings.images, settings.size)
    if settings.val_images:
        val_set = ImageDataset.from_folder(settings.val_images, settings.size, train_set.classes)
        if count := train_set.shared_with(val_set):
            warnings.warn(f"pictures that are both in {settings.images} and in {settings.val_images}: {count}; the "
                          "validation is no test of unseen pictures", stacklevel=2)
    hashes = {"images": train_set.fingerprint(), "val_images": val_set.fingerprint() if val_set else ""}
    for name, value in request.hashes.items():
        require(hashes.get(name) == value, f"--resume: the pictures in {getattr(settings, name)} are not those with "
                "which this run began: put them back, or begin a new run")
    if not settings.val_images:
        train_set, val_set = train_set.split(settings.val_fraction)
    return train_set, val_set, hashes


def prepare(argv):
    """The Plan of these flags, which rank 0 makes. Raises InputError."""
    request = parse(argv)
    train_set, val_set, hashes = read_folders(request)
    request.settings.resolved(request.state, len(train_set))        # for its errors, before other processes start
    return Plan(**vars(replace(request, hashes=hashes, config=Config(tuple(train_set.classes), request.settings.size))),
                train_set=train_set, val_set=val_set)


def work(plan, team):
    """Train as one rank of a team; returns the exit code. Rank 0 alone writes, and is heard."""
    settings, state, resumed, leads = plan.settings, plan.state, plan.checkpoint, team.rank == 0
    about = {"command": settings.to_json(), "hashes": plan.hashes, "versions": checkpoint.versions()}
    settings = settings.resolved(state, len(plan.train_set))
    if leads and resumed:
        options.note_horizon(plan, settings, len(plan.train_set), rate)
    model = ConvNet.load(resumed) if leads and resumed else ConvNet(plan.config, settings.seed if leads else None)
    team.adopt(model.weights)
    optimizer = Adam(model, settings.learning_rate, (settings.beta1, settings.beta2),
                     weight_decay=settings.weight_decay)
    if resumed:
        checkpoint.read_moments(resumed, optimizer, team)
        optimizer.t[...] = state.updates
    run = None
    if leads:
        folder = Path(plan.folder) if resumed else checkpoint.new_run(plan.folder, Settings.runs)
        run = checkpoint.Run(folder, preprocessor(plan.config), {}, about)
    validate = lambda watch: evaluate(model, plan.val_set, settings.batch_size, watch, team)
    observer = ImageObserver(run, settings, plan.train_set, validate if plan.val_set else None, None, team,
                             saved=state.step if resumed else None)
    if observer.has_finished(state, resumed):
        return 0
    with observer.watch(model, state, plan.val_set) as stop:
        train(model, optimizer, plan.train_set, settings, state, observer, stop, team)
    return 0 if state.is_over(settings) else 128 + stop.signal


def main(argv=None):
    return ranks.run(partial(prepare, argv), work, partial(cli.run, name=NAME))


if __name__ == "__main__":
    cli.run(main, NAME)
