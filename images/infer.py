"""What a picture shows:  python -m images.infer FOLDER --image PATH … [--size N] [--map PNG]"""
import sys
from pathlib import Path

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import linear, no_grad, softmax
from console import cli, drawing
from console.cli import number
from console.figure import check_path
from hardware import device
from images.network import ConvNet
from images.reading import read_images
from images.train import COMMAND
from storage.checkpoint import check_ended
from storage.files import InputError, require, whole

SHOWN = 5               # of the likeliest classes


def probabilities(model, pixels):
    """pixels (N, S, S, 3) -> the probability of each class (N, K), on the host."""
    with no_grad():
        return device.to_host(softmax(model(pixels)).data)


def class_map(model, pixels, label):
    """(S/16, S/16): what each place of pixels (1, S, S, 3) adds to the logit of this class.

    The mean and the linear layer can change places: the logit is the sum of this map plus the class's bias.
    (Class activation mapping: Zhou et al. 2016, §2)
    """
    with no_grad():
        scores = device.to_host(linear(model.features(pixels), model.classifier[0]).data)[0, ..., label]
    return scores / scores.size


@drawing.defaults()
def draw_map(path, pixels, scores, name, answer):
    """The picture (S, S, 3), and to its right, in grey, under the map: red where a place adds to the logit of the class
    `name`, blue where it takes from it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(answer)
    left, right = figure.subplots(1, 2)
    size, most = len(pixels), max(abs(scores).max(), 1e-9)
    left.imshow(pixels)
    right.imshow(pixels.mean(-1), cmap="gray", vmin=-128, vmax=383)         # pale: the map is what counts
    shades = right.imshow(scores, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.6, interpolation="bicubic",
                          extent=(-0.5, size - 0.5, size - 0.5, -0.5))
    figure.colorbar(shades, ax=right, label=f"adds to the logit of {name}")
    for axes in (left, right):
        axes.set_axis_off()
    with whole(path) as draft:
        figure.savefig(draft, format="png", dpi=120)


def command_line():
    parser = cli.Parser(usage="python -m images.infer FOLDER --image PATH [PATH …] [options]",
                        description="Say what a picture shows, with a model of images.train.")
    parser.add_argument("folder", metavar="FOLDER", type=cli.path, help="folder of a run, or one of its checkpoints")
    parser.add_argument("--image", metavar="PATH", nargs="+", required=True, help="one picture or several")
    parser.add("--size", None, number(int, 1, 4096), "pixels a side that the picture gets; default: as in training")
    parser.add("--map", None, cli.path, "draw which places of the (one) picture speak for its likeliest class",
               metavar="PNG")
    parser.add_device()
    return parser


def main(argv=None):
    args = command_line().read(argv)
    check_ended(Path(args.folder), COMMAND)
    if args.map is not None:
        check_path(args.map, "--map")
        require(len(args.image) == 1, f"--map is for one picture, not for {len(args.image)}: give one --image")
    model = ConvNet.load(args.folder)
    size, least = args.size or model.config.size, 2 ** model.config.n_block
    require(size >= least, f"--size {size}: must be at least {least}, because the network halves the picture "
            f"{model.config.n_block} times")
    pixels, _, bad = read_images(args.image, size)
    if bad:
        raise InputError(bad[min(bad)])
    for i, path in enumerate(args.image):
        p = probabilities(model, pixels[i:i + 1])[0]
        best = np.argsort(-p, kind="stable")[:SHOWN]
        answer = ", ".join(f"{model.config.classes[k]} {p[k]:.1%}" for k in best)
        print(f"{path}: {answer}")
        if args.map is not None:
            scores = class_map(model, pixels[i:i + 1], best[0])
            draw_map(Path(args.map), pixels[i], scores, model.config.classes[best[0]], answer)
    return 0


if __name__ == "__main__":
    cli.run(main, "python -m images.infer")
