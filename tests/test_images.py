"""The image commands: what a picture is read as, the network, a run from its folder to its answer, and bad input."""
import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import only_ci, reference
from PIL import Image
from safetensors.numpy import load_file
from tiny import check, command, refused, rows, snapshot, together

from autograd import Tensor
from console import cli, metrics, options
from hardware import device
from images import demo, infer, network, reading, train
from images.network import Config, ConvNet
from images.reading import ImageDataset, read_image, read_images
from storage.checkpoint import Run

pytestmark = pytest.mark.usefixtures("cheap")

NAME = "python -m images.train"
ROOT = Path(__file__).resolve().parent.parent
QUICK = "--size 16 --batch-size 4 --num-epochs 2 --log-every 3 --save-every 3".split()
SMALL = Config(("a", "b", "c"), 16, (4, 5, 6, 7))


def noise(level, seed, size=(20, 18)):
    """A picture whose pixels are about this bright."""
    pixels = np.random.default_rng(seed).normal(level, 20, (*size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_folder(root, counts=(("dark", 9), ("light", 7))):
    for label, (name, count) in enumerate(counts):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise(60 + 120 * label, 100 * label + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of 9 dark and 7 light pictures, only read."""
    return make_folder(tmp_path_factory.mktemp("pictures") / "images")


@pytest.fixture
def pictures(shared, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(shared, tmp_path / "images"))


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """(folder, what it printed): a finished run, only read."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny.make_cheap(patch)
        code, out, err = command(train.main, "--images", shared, *QUICK, "--artifact-dir", folder, name=NAME)
    assert (code, err) == (0, "")
    return folder, out


# ---------------------------------------------------------------- the network


def lively(config=SMALL, seed=0, dtype=np.float64):
    """A network of which no weight is 0, so that every part of it shows in the logits."""
    model, rng = ConvNet(config, dtype=dtype), np.random.default_rng(seed)
    model.weights.flat[...] = device.xp.asarray(rng.standard_normal(model.weights.flat.size) * 0.4)
    return model


def batch(n=5, size=16, K=3):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (n, size, size, 3), np.uint8), rng.integers(0, K, n)


def test_the_gradient_of_the_whole_network_along_a_direction():
    model, (pixels, labels) = lively(), batch()
    loss = lambda: model.loss(pixels, labels, 0.3, (7,))
    loss().backward()
    direction, h = device.xp.asarray(np.random.default_rng(2).standard_normal(model.weights.flat.size)), 1e-7
    model.weights.flat += h * direction
    above = float(loss().data)
    model.weights.flat -= 2 * h * direction
    below = float(loss().data)
    assert (above - below) / (2 * h) == pytest.approx(float(model.weights.grad @ direction), rel=1e-5)


def sequential(torch, config):
    """The network as a PyTorch user would write it; images are (N, 3, S, S) there, and normalised."""
    nn, layers = torch.nn, []
    for C, F in zip((3, *config.widths), config.widths, strict=False):
        layers += [nn.Conv2d(C, F, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.ModuleDict({"features": nn.Sequential(*layers),
                          "classifier": nn.Linear(config.widths[-1], len(config.classes))})


def test_pytorch_opens_the_file_strictly_and_has_the_same_logits_loss_and_gradients(tmp_path):
    torch = reference("torch")
    from safetensors.torch import load_file
    model, (pixels, labels) = lively(dtype=np.float32), batch()
    model.save(tmp_path)
    theirs = sequential(torch, SMALL)
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    x = (torch.tensor(pixels) / 255 - torch.tensor(network.MEAN)) / torch.tensor(network.STD)
    logits = theirs["classifier"](theirs["features"](x.permute(0, 3, 1, 2)).mean((2, 3)))
    np.testing.assert_allclose(tiny.to_host(model(pixels).data), logits.detach().numpy(), rtol=2e-5, atol=2e-5)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    loss.backward()
    ours = model.loss(pixels, labels)
    ours.backward()
    assert float(ours.data) == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(tiny.to_host(model.parameters()[name].grad), parameter.grad.numpy(),
                                   rtol=1e-4, atol=1e-5, err_msg=name)


def test_fresh_weights_follow_from_the_seed_and_the_first_loss_is_ln_K():
    pixels, labels = batch()
    flat = lambda seed: ConvNet(SMALL, seed).weights.flat
    assert (flat(1) == flat(1)).all() and (flat(1) != flat(2)).any()
    assert float(ConvNet(SMALL).loss(pixels, labels).data) == pytest.approx(math.log(3), rel=1e-6)
    kernels = device.to_host(ConvNet(Config(("a", "b"))).parameters()["features.9.weight"].data)
    assert kernels.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.01)


def test_dropout_leaves_the_logits_of_an_even_guess_alone():
    """It falls on the features: a logit that were dropped could never be learnt."""
    model, (pixels, _) = lively(), batch()
    model.classifier[1].data[...] = 5.0
    model.classifier[0].data[...] = 0
    assert (model(pixels, 0.9, (1,)).data == 5).all()


def test_flops_per_picture_are_those_of_the_products(monkeypatch):
    counted, matmul = [], device.matmul

    def count(a, b, **named):
        if a.shape[-2] > 1:                     # 1: the bias's gradient, which is no multiplication
            counted.append(2 * math.prod(a.shape) * b.shape[-1])
        return matmul(a, b, **named)
    monkeypatch.setattr(device, "matmul", count)
    ConvNet(SMALL).loss(*batch(2)).backward()
    assert sum(counted) == 2 * SMALL.flops_per_picture()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_first_block_that_is_not_finite_is_named():
    model, (pixels, _) = ConvNet(SMALL), batch()
    assert metrics.first_not_finite(model, pixels, ConvNet.run_blocks) == "loss"
    model.parameters()["features.3.weight"].data[...] = 3e38
    assert metrics.first_not_finite(model, pixels, ConvNet.run_blocks) == "activations after block 1"
    model.parameters()["features.6.bias"].data[0] = np.nan
    assert metrics.first_not_finite(model, pixels, ConvNet.run_blocks) == "weights of features.6.bias"


# ---------------------------------------------------------------- one picture


def bytes_of(image, format, **named):
    file = io.BytesIO()
    image.save(file, format, **named)
    return file.getvalue()


def png_of_size(width, height):
    """A PNG of a few bytes that claims this size."""
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                                + struct.pack(">I", zlib.crc32(kind + data)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


PICTURE = noise(120, 5, (40, 40))
JPEG, PNG = bytes_of(PICTURE, "JPEG"), bytes_of(PICTURE, "PNG")
BAD = {
    "truncated JPEG": (JPEG[:-200], "truncated"),
    "truncated PNG": (PNG[:len(PNG) // 2], "truncated|broken"),
    "flipped byte": (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], "broken|decoding|CRC|corrupt"),
    "empty": (b"", "the file is empty"),
    "text": (b"<html>not found</html>", "no picture in JPEG, PNG"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture in JPEG, PNG"),
    "bomb": (png_of_size(60_000, 60_000), "3600000000 pixels"),
    "large bomb": (png_of_size(10_000, 10_000), "100000000 pixels"),
    "float TIFF": (bytes_of(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "type F have no white"),
    "32-bit TIFF": (bytes_of(Image.fromarray(np.ones((9, 9), np.int32)), "TIFF"), "type I have no white"),
}


@pytest.mark.parametrize("content, words", BAD.values(), ids=BAD)
def test_what_is_no_picture_is_refused_by_name(content, words, tmp_path):
    path = tmp_path / "1.jpg"
    path.write_bytes(content)
    _, _, bad = read_images([path], 16)
    assert bad[0].startswith(f"{path}: ") and bad[0].isprintable()
    assert re.search(words, bad[0]), bad[0]


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")            # opening it would wait for ever
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, words in (("pipe.jpg", "is a pipe or a device"), ("folder.jpg", "is a folder"),
                        ("link.jpg", "is a link to"), ("none.jpg", "there is no such file"),
                        ("pointer.jpg", "is only Git LFS's pointer")):
        refused(lambda name=name: read_image(tmp_path / name, 16), name, words)
    (tmp_path / "1.jpg").write_bytes(JPEG)
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refused(lambda: read_image(tmp_path / "1.jpg", 16), "1.jpg: Permission denied")


def read(image, format="PNG", name="1.jpg", size=16, **named):
    """How an image is read from a file of this format, under any name."""
    Path(name).write_bytes(bytes_of(image, format, **named))
    return read_image(name, size)


@pytest.mark.parametrize("format", ["JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_the_content_counts_not_the_name(format):
    colour = read(Image.new("RGB", (9, 30), (200, 100, 0)), format)
    assert colour.shape == (16, 16, 3) and colour.dtype == np.uint8
    assert abs(colour.astype(int) - (200, 100, 0)).max() <= 5


def test_every_kind_of_pixel_becomes_red_green_and_blue():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    as_rgb = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(read(Image.fromarray(grey)), as_rgb)
    np.testing.assert_array_equal(read(Image.fromarray(grey.astype(np.uint16) << 8)), as_rgb)     # not clipped to white
    assert set(np.unique(read(Image.fromarray(grey).convert("1")))) == {0, 255}
    assert abs(read(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG").astype(int) - (255, 0, 0)).max() <= 3
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (read(clear) == 255).all() and (read(clear.convert("LA")) == 255).all()      # white, not what is hidden
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    assert (read(palette) == (10, 20, 30)).all() and (read(palette, transparency=1) == 255).all()


def test_a_picture_is_read_the_right_way_up_and_a_moving_one_by_its_first_frame():
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                            # the camera lay on its side: turn by 90° clockwise
    turned = read(Image.fromarray(halves), "JPEG", exif=exif, quality=95)
    assert turned[:, 12:].min() > 200 and turned[:, :4].max() < 50
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    assert (read(first, "GIF", save_all=True, append_images=[second]) == (255, 0, 0)).all()


def test_the_image_processor_of_transformers_makes_the_same_numbers(tmp_path, monkeypatch):
    transformers = reference("transformers")
    Run(tmp_path, network.preprocessor(SMALL), {}, {}).write_model(tmp_path, ConvNet(SMALL))
    picture = noise(120, 3, (23, 41))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"]
    seen, conv_block = [], network.conv_block
    monkeypatch.setattr(network, "conv_block", lambda x, w, b: seen.append(x.data) or conv_block(x, w, b))
    ConvNet(SMALL)(read(picture)[None])
    np.testing.assert_allclose(tiny.to_host(seen[0]).transpose(0, 3, 1, 2), theirs, atol=2e-6)


# ---------------------------------------------------------------- a folder of pictures


def test_a_real_folders_mess_is_left_out_and_counted(pictures, tmp_path):
    for name in (".DS_Store", ".hidden.png", "dark/._1.png", "dark/Thumbs.db", "dark/notes.txt", "above.png",
                 ".ipynb_checkpoints/1.png", "__MACOSX/1.png"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes(b"x")
    (pictures / "dark/more/deep").mkdir(parents=True)
    noise(60, 70).save(pictures / "dark/more/deep/UPPER.JPG")
    (pictures / "light/loop").symlink_to(pictures)
    (pictures / "loop").symlink_to(pictures)
    (pictures / "light/broken.png").write_bytes(PNG[:99])
    (pictures / "light/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.warns(UserWarning, match=r"2 of 19 pictures cannot be read and are left out, such as .*broken"):
        data = ImageDataset.from_folder(pictures, 16)
    assert data.classes == ["dark", "light"] and data.counts().tolist() == [10, 7] and len(data) == 17
    assert data.most_frequent() == ("dark", 10 / 17)


@pytest.mark.parametrize("names", [("猫", "Hündchen"), ("a b", "c'd"), (os.fsdecode(b"\xff"), "x")])
def test_classes_have_any_names(names, tmp_path):
    make_folder(tmp_path / "images", [(name, 3) for name in names])
    outcome = command(train.main, "--images", tmp_path / "images", *QUICK, "--max-steps", 1, "--artifact-dir", "run")
    assert outcome[0] == 0, outcome
    assert ConvNet.load("run").config.classes == tuple(sorted(names))


def test_the_split_is_by_what_the_pictures_show(pictures):
    """The same under any file names, a share of each class, and never a picture on both sides."""
    for i, path in enumerate(sorted(pictures.glob("dark/*"))):
        path.rename(path.with_name(f"{9 - i}-renamed.png"))
    for _ in range(3):
        shutil.copy(pictures / "light/1.png", pictures / f"light/copy-{_}.png")
    renamed = ImageDataset.from_folder(pictures, 16)
    train_set, val_set = renamed.split(0.3)
    assert val_set.counts()[0] == 3 and train_set.counts()[0] == 6 and len(train_set) + len(val_set) == 19
    assert val_set.counts()[1] in (3, 6) and train_set.shared_with(val_set) == 0
    assert renamed.split(0) == (renamed, None)
    again = ImageDataset.from_folder(pictures, 16).split(0.3)[1]
    assert again.fingerprint() == val_set.fingerprint()


def test_batches_are_a_stream_in_which_every_picture_comes_once_an_epoch(shared):
    data = ImageDataset.from_folder(shared, 16)
    keys = lambda start, size, seed=3: [x.tobytes() for x in data.batch(start, size, seed)[0]]
    epoch = keys(0, 16)
    assert len(set(epoch)) == 16 and keys(0, 16, 4) != epoch != keys(16, 16) and set(keys(16, 16)) == set(epoch)
    assert keys(5, 7) + keys(12, 9) == keys(5, 16)
    pixels, labels = data.batch(14, 4, 3)
    assert [bool(label) for label in labels] == [picture.mean() > 120 for picture in pixels]
    assert [len(labels) for _, labels in data.in_order(7)] == [7, 7, 2]


def test_a_picture_in_two_classes_or_in_both_folders_is_warned_of(pictures, tmp_path):
    shutil.copy(pictures / "dark/1.png", pictures / "light/copy.png")
    with pytest.warns(UserWarning, match="images: pictures that are in more than one class: 1"):
        ImageDataset.from_folder(pictures, 16)
    (pictures / "light/copy.png").unlink()
    other = make_folder(tmp_path / "val", [("dark", 2), ("light", 2)])
    code, _, err = command(train.main, "--images", pictures, "--val-images", other, *QUICK, "--max-steps", 1,
                           "--artifact-dir", "run")
    assert code == 0 and f"pictures that are both in {pictures} and in {other}: 4" in err


FOLDERS = {
    "missing": (lambda root: shutil.rmtree(root), "images: No such file or directory; give a folder of which each"),
    "a file": (lambda root: (shutil.rmtree(root), root.write_text("x")), "images: Not a directory"),
    "no class": (lambda root: [shutil.rmtree(root / x) for x in ("dark", "light")], "has 0 subfolders", "at least two"),
    "one class": (lambda root: shutil.rmtree(root / "dark"), "has 1 subfolders"),
    "splits": (lambda root: ((root / "dark").rename(root / "train"), (root / "light").rename(root / "Test")),
               "Test, train, which are no classes", "--val-images"),
    "empty class": (lambda root: (root / "empty").mkdir(), "empty holds no picture that can be read"),
    "one picture": (lambda root: ((root / "x").mkdir(), noise(9, 9).save(root / "x/1.png")),
                    "class x has too few different pictures", "--val-fraction 0"),
    "copies of one": (lambda root: ((root / "x").mkdir(), [noise(9, 9).save(root / f"x/{i}.png") for i in range(4)]),
                      "class x has too few different pictures"),
}


@pytest.mark.parametrize("change, words", [(f, words) for f, *words in FOLDERS.values()], ids=FOLDERS)
def test_a_folder_that_cannot_be_used_is_named(change, words, pictures):
    change(pictures)
    check(command(train.main, "--images", pictures, *QUICK, "--artifact-dir", "run", name=NAME), *words, name=NAME)
    assert not Path("run").exists()


def test_a_class_folder_that_cannot_be_listed_is_not_silently_empty(shared, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("light"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", closed)
    refused(lambda: reading.find_images(shared), "Permission denied")


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("flags, words", [
    ([], "--images FOLDER is needed"), (["--size", "8"], "--size: must be .* at least 16"),
    (["--size", "99999"], "--size"), (["--images", ""], "--images: must not be empty"),
    (["--val-fraction", "0", "--patience", "1"], "--patience needs a validation part"),
    (["--resume"], "there is no run in runs/images"), (["--dropout", "1"], "--dropout: must be"),
    (["--demo"], "--demo brings its own pictures: leave out --images"),
])
def test_flags_that_cannot_be(flags, words, shared):
    given = ["--images", shared] if flags and flags[0] not in ("--images", "--resume") else []
    check(command(train.main, *given, *flags, name=NAME), words, name=NAME)


def test_help_tells_every_flag():
    text = options.command_line(train.Settings).format_help()
    for field in dataclasses.fields(train.Settings):
        assert f"\n  {options.flag(field.name)}" in text
    assert "runs/images" in text and "--processes" in text and "None" not in text


def test_fashion_mnist_becomes_folders(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(train.__file__).parent.parent / "docs"))
    import fashion_mnist
    pixels, labels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8), np.array([9, 0, 9], np.uint8)
    convert = lambda: command(fashion_mnist.main, tmp_path, tmp_path / "to", name="fashion_mnist.py")
    check(convert(), "train-labels-idx1-ubyte.gz: there is no such file", name="fashion_mnist.py")
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    assert convert() == (0, "", "")
    classes, paths, found = reading.find_images(tmp_path / "to/test")
    assert len(classes) == 10 and [classes[label] for label in found] == ["Boot", "Boot", "T-shirt"]
    np.testing.assert_array_equal(read_image(paths[1], 28)[..., 0], pixels[2])
    check(convert(), "exists and is not overwritten", name="fashion_mnist.py")


def test_more_pictures_a_step_than_there_are_and_other_classes(shared, tmp_path):
    check(command(train.main, "--images", shared, "--size", 16, "--batch-size", 64, name=NAME),
          "a step takes 64 pictures", "only 13 training pictures", "lower --batch-size", name=NAME)
    other = make_folder(tmp_path / "val", [("dark", 2), ("grey", 2)])
    check(command(train.main, "--images", shared, "--val-images", other, "--size", 16, name=NAME),
          "has the classes dark, grey, not dark, light", name=NAME)


def test_a_run_learns_and_reports(trained, shared):
    folder, out = trained
    assert ("13 for training, 3 for validation, in 2 classes; always answering 'dark' would be right for 66.7%" in out
            and "guessing evenly among 2 classes gives ln K = 0.693" in out and "python -m images.infer" in out)
    table = rows(folder)
    assert tuple(table[0]) == train.ImageObserver.columns
    assert table[0]["train_loss"][:6] == "0.6931" and float(table[-1]["train_loss"]) < 0.6
    assert [row["step"] for row in table] == ["1", "3", "4", "6", "7"] and table[-1]["images"] == "28"
    assert "epoch 2.15: training loss" in out and table[-1]["val_accuracy"] == "1.0"
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "best", "checkpoint-7"} <= {
        path.name for path in folder.iterdir()}
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    assert labels == {"0": "dark", "1": "light"}


def test_evaluation_is_pytorchs(trained, shared):
    torch = reference("torch")
    data, model = ImageDataset.from_folder(shared, 16), lively(Config(("dark", "light"), 16), dtype=np.float32)
    result = train.evaluate(model, data, 5)         # batches of 5, 5, 5 and 1: each picture counts once
    logits = torch.tensor(tiny.to_host(model(data.pixels).data))
    labels = torch.tensor(data.labels)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert result["confusion"].sum(1).tolist() == [9, 7]


@pytest.fixture(scope="module")
def stopped(shared, tmp_path_factory):
    """(flags, folder): a run that was stopped after step 5, and was told so by SIGTERM. Use a copy."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    flags = "--images", shared, *QUICK, "--num-epochs", 3, "--artifact-dir"
    with pytest.MonkeyPatch.context() as patch:
        tiny.make_cheap(patch)
        tiny.stop_at(patch, 5)
        code, out, _ = command(train.main, *flags, folder, name=NAME)
    assert code == 143 and f"python -m images.train --resume --artifact-dir {folder}" in out
    return flags, folder


def test_resumed_equals_uninterrupted(stopped, tmp_path):
    flags, folder = stopped
    half = shutil.copytree(folder, tmp_path / "half")
    assert command(train.main, *flags, tmp_path / "whole")[0] == 0
    assert command(train.main, "--resume", "--artifact-dir", half)[0] == 0
    tiny.assert_same(half, tmp_path / "whole")
    code, out, _ = command(train.main, "--resume", "--artifact-dir", half)
    assert code == 0 and "has finished, after step" in out


def ended(folder):
    """(weights, the numbers of metrics.csv) of a finished run."""
    names = "train_loss", "val_loss", "val_accuracy", "grad_norm"
    return (np.concatenate([x.ravel() for x in load_file(folder / "model.safetensors").values()]),
            [float(row[name] or 0) for row in rows(folder) for name in names])


@pytest.fixture
def as_ranks(shared, on_cpu, monkeypatch):
    """train(size, *flags): a training by that many ranks, in threads of this process."""
    monkeypatch.setattr(cli, "handle", lambda *_: {})       # signals are for the main thread

    def train_(size, *flags):
        plan = train.prepare([str(flag) for flag in flags])
        copies = [pickle.loads(pickle.dumps(plan)) for _ in range(size)]        # as other processes get them
        assert together(size, lambda team: train.work(copies[team.rank], team), n=plan.n_weight) == [0] * size
    return train_


SHARED = [*QUICK, "--num-epochs", 3, "--batch-size", 3, "--dropout", 0.3, "--grad-accum", 2, "--seed", 5]


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_train_as_one_does_and_continue_with_any_number(size, as_ranks, shared, tmp_path):
    for ranks, name in ((1, "one"), (size, "several"), (size, "again")):
        as_ranks(ranks, "--images", shared, *SHARED, "--artifact-dir", tmp_path / name)
    tiny.assert_same(tmp_path / "several", tmp_path / "again")
    for one, several in zip(ended(tmp_path / "one"), ended(tmp_path / "several"), strict=True):
        np.testing.assert_allclose(one, several, rtol=1e-4, atol=1e-5)
    shutil.rmtree(tmp_path / "again/checkpoint-7")
    as_ranks(1, "--resume", "--artifact-dir", tmp_path / "again")
    np.testing.assert_allclose(ended(tmp_path / "again")[0], ended(tmp_path / "one")[0], rtol=1e-4, atol=1e-5)


@only_ci("some seconds")
def test_processes_give_the_bits_of_threads(as_ranks, shared, tmp_path):
    flags = ["--images", shared, *SHARED, "--device", "cpu", "--artifact-dir"]
    as_ranks(2, *flags, tmp_path / "threads")
    for name, typed in {"name": ("-m", "images.train"), "path": ("images/train.py",)}.items():
        words = sys.executable, *typed, "--processes", 2, *flags, tmp_path / name
        done = subprocess.run([str(word) for word in words], cwd=ROOT, env=os.environ | {"NANOLLM_THREADS": "2"},
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and ", 2 processes of 1 thread)" in done.stdout
        assert all(map(np.array_equal, ended(tmp_path / "threads"), ended(tmp_path / name)))


def test_more_processes_than_pictures_in_a_step(shared):
    check(command(train.main, "--images", shared, *QUICK, "--device", "cpu", "--processes", 5, name=NAME),
          "5 processes cannot share the 4 pictures of a step", name=NAME)


@pytest.mark.parametrize("change", [
    lambda root: noise(60, 77).save(root / "dark/new.png"), lambda root: (root / "light/1.png").unlink(),
    lambda root: noise(9, 9).save(root / "dark/1.png"), lambda root: (root / "dark").rename(root / "black")])
def test_a_resumed_run_has_the_pictures_that_it_began_with(change, stopped, pictures, tmp_path):
    half = shutil.copytree(stopped[1], tmp_path / "half")
    before = snapshot(half)
    change(pictures)
    check(command(train.main, "--resume", "--artifact-dir", half, "--images", pictures, name=NAME),
          f"--resume: the pictures in {pictures} are not those", name=NAME)
    assert snapshot(half) == before


def test_what_a_run_is_cannot_change(stopped, tmp_path):
    half = shutil.copytree(stopped[1], tmp_path / "half")
    check(command(train.main, "--resume", "--artifact-dir", half, "--size", 32, name=NAME),
          "--resume: --size was 16 in this run and cannot become 32", name=NAME)


def test_no_run_overwrites_another(trained, shared):
    check(command(train.main, "--images", shared, *QUICK, "--artifact-dir", trained[0], name=NAME),
          "already holds a run", name=NAME)


def test_the_demo_draws_every_digit_once_and_validates_on_fonts_that_it_does_not_train_on(monkeypatch, cache_folder):
    monkeypatch.setattr(demo, "EACH", {"train": 12, "val": 4})
    code, out, err = command(train.main, "--demo", "--max-steps", 1, "--artifact-dir", "run")
    assert (code, err) == (0, "") and "120 for training, 40 for validation, in 10 classes" in out
    assert not set(demo.FONTS["train"]) & set(demo.FONTS["val"])
    drawn = snapshot(cache_folder / "digits")
    monkeypatch.setattr(demo, "draw", None)         # it is not called again
    assert command(train.main, "--demo", "--max-steps", 1, "--artifact-dir", "again")[0] == 0
    assert snapshot(cache_folder / "digits") == drawn
    dark_on_light = Image.open(io.BytesIO(drawn["val/8/0.png"])).convert("L")
    assert dark_on_light.size == (32, 32) and 0.02 < (np.asarray(dark_on_light) < 128).mean() < 0.4


def test_a_step_that_is_never_finite_ends_the_run(shared, monkeypatch):
    monkeypatch.setattr(ConvNet, "loss", lambda *_: Tensor(device.xp.full((), np.nan, np.float32), True))
    code, _, err = command(train.main, "--images", shared, *QUICK, "--num-epochs", 9, name=NAME)
    check((code, "", err), "10 steps in a row were not finite; the first NaN or inf is in the loss", name=NAME)


# ---------------------------------------------------------------- what a picture shows


def infer_(*argv):
    return command(infer.main, *argv, name="python -m images.infer")


def test_the_answer_is_the_softmax_of_the_logits(trained, shared):
    folder, paths = trained[0], [shared / "dark/1.png", shared / "light/2.png"]
    code, out, err = infer_(folder, "--image", *paths)
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    for line, path, name in zip(out.splitlines(), paths, ("dark", "light"), strict=True):
        z = tiny.to_host(ConvNet.load(folder)(read_image(path, 16)[None]).data)[0]
        assert line.startswith(f"{path}: {name} {max(np.exp(z) / np.exp(z).sum()):.1%}, ")
    assert infer_(folder / "best", "--image", paths[0], "--size", 40)[0] == 0


def test_the_map_sums_to_the_logit(trained, shared, tmp_path):
    model, pixels = ConvNet.load(trained[0]), read_image(shared / "light/1.png", 48)[None]
    scores = infer.class_map(model, pixels, 1)
    assert scores.shape == (3, 3)
    bias = float(model.parameters()["classifier.bias"].data[1])
    assert scores.sum() + bias == pytest.approx(float(model(pixels).data[0, 1]), rel=1e-5)
    assert infer_(trained[0], "--image", shared / "light/1.png", "--size", 48, "--map", "map.png")[0] == 0
    with Image.open(tmp_path / "map.png") as image:
        assert image.width > 500


@pytest.mark.parametrize("argv, words", [
    (["--image", "none.png"], "none.png: there is no such file"),
    (["--image", "{good}", "--size", "8"], "--size 8: must be at least 16"),
    (["--image", "{good}", "{good}", "--map", "x.png"], "--map is for one picture, not for 2"),
    (["--image", "{good}", "--map", "x.jpg"], "--map x.jpg: only a PNG"),
    ([], "--image"),
])
def test_a_question_that_cannot_be_answered(argv, words, trained, shared):
    argv = [word.format(good=shared / "dark/1.png") for word in argv]
    check(infer_(trained[0], *argv), words, name="python -m images.infer")
    assert not Path("x.png").exists()


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "llama"}, "model_type 'llama' is no image classifier"), ({"id2label": {"1": "a"}}, "id2label"),
    ({"id2label": {"0": "a"}}, "id2label"), ({"hidden_sizes": [4, -1]}, "hidden_sizes"),
    ({"image_size": 16.5}, "image_size"),
    ({"hidden_sizes": [16, 32, 64, 127]}, "model.safetensors: .* has shape"),
])
def test_a_folder_that_holds_no_such_model(changes, words, trained, shared, tmp_path):
    folder = Path(shutil.copytree(trained[0], tmp_path / "run"))
    tiny.edit_config(folder, **changes)
    check(infer_(folder, "--image", shared / "dark/1.png"), words, name="python -m images.infer")


def test_a_run_that_has_not_ended_names_a_model_that_can_be_asked(stopped, shared):
    check(infer_(stopped[1], "--image", shared / "dark/1.png"), "has no model yet", "use .*best",
          name="python -m images.infer")
