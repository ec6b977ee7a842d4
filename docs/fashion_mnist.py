"""Make folders of pictures from Fashion-MNIST's four files:  python docs/fashion_mnist.py FOLDER TO

FOLDER holds train-images-idx3-ubyte.gz and the other three; Debian's package dataset-fashion-mnist puts them into
/usr/share/datasets/fashion-mnist. TO/train and TO/test get one subfolder for each class.
"""
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # nanollm is run from its folder
from console import cli  # noqa: E402
from storage.files import readable, refuse_existing  # noqa: E402

CLASSES = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split()


def read(path, header):
    """The bytes after the header. Raises InputError that names a file that is not there."""
    return np.frombuffer(gzip.decompress(readable(path).read_bytes()), np.uint8, offset=header)


def main(argv=None):
    parser = cli.Parser(usage="python docs/fashion_mnist.py FOLDER TO", description=__doc__.split(":")[0])
    parser.add_argument("folder", metavar="FOLDER", type=cli.path, help="where the four files are")
    parser.add_argument("to", metavar="TO", type=cli.path, help="the folder to make")
    args = parser.parse_args(argv)
    folder, to = Path(args.folder), Path(args.to)
    refuse_existing(to)
    data = {part: (read(folder / f"{prefix}-labels-idx1-ubyte.gz", 8),
                   read(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28))
            for part, prefix in (("train", "train"), ("test", "t10k"))}
    for part, (labels, pixels) in data.items():
        for name in CLASSES:
            (to / part / name).mkdir(parents=True)
        for i, (label, picture) in enumerate(zip(labels, pixels, strict=True)):
            Image.fromarray(picture).save(to / part / CLASSES[label] / f"{i:05}.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
