"""Make folders of pictures from Fashion-MNIST's four files:  python docs/fashion_mnist.py FOLDER TO

FOLDER holds train-images-idx3-ubyte.gz and the other three; Debian's package dataset-fashion-mnist puts them into
/usr/share/datasets/fashion-mnist. TO/train and TO/test get one subfolder for each class.
"""
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split()

if __name__ == "__main__":
    source, to = map(Path, sys.argv[1:])
    for part, prefix in ("train", "train"), ("test", "t10k"):
        content = [gzip.decompress((source / f"{prefix}-{name}-ubyte.gz").read_bytes())
                   for name in ("labels-idx1", "images-idx3")]
        labels, pixels = (np.frombuffer(data, np.uint8, offset=start)
                          for data, start in zip(content, (8, 16), strict=True))
        for name in CLASSES:
            (to / part / name).mkdir(parents=True)
        for i, picture in enumerate(pixels.reshape(-1, 28, 28)):
            Image.fromarray(picture).save(to / part / CLASSES[labels[i]] / f"{i:05}.png")
