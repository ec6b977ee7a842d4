"""From a folder of pictures to batches; one subfolder is one class, as in torchvision's ImageFolder.

    images/cat/1.jpg, images/dog/x/2.png … ─ read_images ─► pixels (N, size, size, 3) uint8 ─ batch ─► pixels, labels

Every picture is decoded once and stays in memory: 3 size² bytes each, so 25,000 of 128 · 128 pixels take 1.2 GB.
"""
import hashlib
import os
import sys
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data import permutation
from hardware import device
from storage.files import InputError, readable, require

FORMATS = "JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"    # whatever a file is called; no others are opened
ENDINGS = ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"
UNREAD = ".heic", ".heif", ".avif", ".jxl"      # pictures, too: they are counted as unreadable, not overlooked
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read_image(path, size):
    """The picture in a file as (size, size, 3) uint8: the right way up, squeezed to a square, on white where it is
    transparent; of a moving picture the first frame. Raises InputError naming the file and what is wrong with it.
    """
    require(os.path.getsize(readable(path)), f"{path}: the file is empty")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)                          # a camera held sideways says so there
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            require(image.mode not in ("I", "F"),
                    f"pixels of type {image.mode} have no white to scale them by: save it with 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
    except UnidentifiedImageError:
        raise InputError(f"{path}: no picture in {', '.join(FORMATS)} format") from None
    except Exception as problem:                # a damaged file can make Pillow raise anything
        why = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        raise InputError(f"{path}: {why}") from None


def read_images(paths, size):
    """(pixels (N, size, size, 3), SHA-256 of each, {index: why it could not be read}), on all threads, with a bar.

    Pillow's warnings, of which real folders give many, are not shown, except one: a picture that claims more than
    89 million pixels, however small its file, is refused before it is decoded.
    """
    pixels, digests, bad = np.zeros((len(paths), size, size, 3), np.uint8), [b""] * len(paths), {}

    def read(i):
        try:
            pixels[i] = read_image(paths[i], size)
            digests[i] = hashlib.sha256(pixels[i]).digest()
        except InputError as problem:
            bad[i] = str(problem)
    with warnings.catch_warnings(), ThreadPool(device.threads) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in tqdm(pool.imap_unordered(read, range(len(paths))), "reading", len(paths), leave=False, unit="picture",
                      disable=not sys.stderr.isatty(), dynamic_ncols=True):
            pass
    return pixels, digests, bad


def find_images(folder):
    """(classes, paths, labels): the files below each subfolder that are called like pictures, sorted by name."""
    folder = Path(folder)

    def fail(problem):
        raise InputError(f"{problem.filename}: {problem.strerror}; give a folder of which each subfolder is a class")
    try:
        classes = sorted(x.name for x in folder.iterdir() if x.is_dir() and not x.name.startswith((".", "__"))
                         and not folder.resolve().is_relative_to(x.resolve()))      # a link back up
    except OSError as problem:
        fail(problem)
    require(len(classes) > 1, f"{folder} has {len(classes)} subfolders: one for each class is needed, so at least two")
    require(not {name.lower() for name in classes} <= SPLITS, f"{folder} holds {', '.join(classes)}, which are no "
            "classes: give one of them as --images and another as --val-images")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(Path(top, file) for top, _, files in os.walk(folder / name, onerror=fail) for file in files
                       if file.lower().endswith(ENDINGS + UNREAD) and not file.startswith("."))
        paths += found
        labels += [label] * len(found)
    return classes, paths, labels


class ImageDataset:
    """Pictures of one size and what they show: those with the indices `at` of what a folder holds.

    pixels (…, size, size, 3) uint8 and labels (…,) int64 are the whole folder's, and so are `digests`, hashes of the
    pixels; `classes` are the names of the labels.
    """
    def __init__(self, pixels, labels, classes, digests, at):
        self.pixels, self.labels, self.classes, self.digests = pixels, labels, classes, digests
        self.at = np.array(at, np.int64)

    @classmethod
    def from_folder(cls, folder, size, classes=None):
        """Those of a folder, which must have these `classes` if given. Leaves out what cannot be read, and warns.
        Raises InputError for a folder, or a class, that cannot be used.
        """
        names, paths, labels = find_images(folder)
        require(classes in (None, names),
                f"{folder} has the classes {', '.join(names)}, not {', '.join(classes or ())} as --images")
        pixels, digests, bad = read_images(paths, size)
        if bad:
            warnings.warn(f"{len(bad)} of {len(paths)} pictures cannot be read and are left out, such as "
                          f"{bad[min(bad)]}", stacklevel=2)
        data = cls(pixels, np.array(labels, np.int64), names, digests, [i for i in range(len(paths)) if i not in bad])
        for name, count in zip(names, data.counts(), strict=True):
            require(count, f"{Path(folder, name)} holds no picture that can be read ({' '.join(ENDINGS)})")
        shown = {(digests[i], labels[i]) for i in data.at}
        if torn := len(shown) - len({digest for digest, _ in shown}):
            warnings.warn(f"{folder}: pictures that are in more than one class: {torn}", stacklevel=2)
        return data

    def __len__(self):
        return len(self.at)

    def counts(self):
        """The number of pictures in each class."""
        return np.bincount(self.labels[self.at], minlength=len(self.classes))

    def most_frequent(self):
        """(the name of the most frequent class, its share): always answering this is right that often."""
        counts = self.counts()
        return self.classes[counts.argmax()], counts.max() / len(self)

    def fingerprint(self):
        """A hash of everything that training sees."""
        seen = b"".join(self.digests[i] for i in self.at) + self.labels[self.at].tobytes()
        return hashlib.sha256(seen + repr(self.classes).encode("utf-8", "surrogateescape")).hexdigest()

    def shared_with(self, other):
        """The number of different pictures that both have."""
        return len({self.digests[i] for i in self.at} & {other.digests[i] for i in other.at})

    def batch(self, start, size, seed):
        """pixels (B, …) and labels (B,): pictures number start … start + size - 1 of an endless stream, in which every
        picture comes once per epoch, each epoch in its own order. The result depends on the arguments alone.
        """
        epochs, places = np.divmod(np.arange(start, start + size), len(self))
        at = self.at[[permutation(len(self), seed, epoch)[place]
                      for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]]
        return self.pixels[at], self.labels[at]

    def in_order(self, size):
        """Yield pixels (B, …) and labels (B,) of all pictures, at most `size` at a time."""
        for start in range(0, len(self), size):
            at = self.at[start:start + size]
            yield self.pixels[at], self.labels[at]

    def split(self, val_fraction):
        """(train, val): val_fraction of each class, at least one picture, is val (None for 0).

        The pictures' hashes decide: the split is the same in every run, whatever the files are called, and all copies
        of a picture are on one side. Raises InputError for a class that is too small to be split.
        """
        if val_fraction == 0:
            return self, None
        in_val = set()
        for label in range(len(self.classes)):
            digests = sorted(self.digests[i] for i in self.at if self.labels[i] == label)
            in_val |= set(digests[:max(round(len(digests) * val_fraction), 1)])
        parts = [[i for i in self.at if (self.digests[i] in in_val) == is_val] for is_val in (False, True)]
        train, val = (ImageDataset(self.pixels, self.labels, self.classes, self.digests, part) for part in parts)
        for name, count in zip(self.classes, train.counts(), strict=True):
            require(count, f"class {name} has too few different pictures to train and to validate on: add some, or "
                    "give --val-images or --val-fraction 0")
        return train, val
