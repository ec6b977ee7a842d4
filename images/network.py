"""The image classifier: conv2d, max_pool2d and relu, four times; the mean over the picture; one linear to K logits.

    pixels (N, S, S, 3) ─ conv2d ─ max_pool2d ─ relu ─► (N, S/2, S/2, 16) ─► (N, S/4, S/4, 32) ─► (N, S/8, S/8, 64)
        ─► (N, S/16, S/16, 128) ─ mean ─► (N, 128) ─ linear ─► logits (N, K)

Each pooling halves the picture and each convolution doubles the channels: fewer places, more said about each (VGG:
Simonyan & Zisserman 2015, §2.1). max and relu keep the order of numbers, so pooling first gives the same and leaves
relu a quarter of the work: conv_block is the three in one. The mean takes pictures of any size (Network in Network: Lin
et al. 2014, §3.2).
Shapes: N pictures of S · S pixels, K classes.
"""
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autograd import Tensor, cross_entropy, dropout, linear, mean
from hardware import device
from images.ops import conv_block
from nanollm import Parameters
from storage import huggingface
from storage.files import require

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # of the pixels in ImageNet, from 0 to 1
TYPE = "nanollm-convnet"


@dataclass(frozen=True)
class Config:
    """The shape of a network: the names of its classes, the size of its pictures, the channels of each stage."""
    classes: tuple
    size: int = 128
    widths: tuple = (16, 32, 64, 128)

    n_block = property(lambda self: len(self.widths))
    tie_embeddings = False              # as storage.huggingface asks

    def shapes(self):
        """{name: shape}, kernels and matrices first, named as in a PyTorch model whose `features` is the Sequential of
        Conv2d, MaxPool2d, ReLU, Conv2d, … and whose `classifier` is a Linear.
        """
        channels = enumerate(zip((3, *self.widths), self.widths, strict=False))
        kernels = {f"features.{3 * i}.weight": (F, C, 3, 3) for i, (C, F) in channels}
        biases = {f"features.{3 * i}.bias": (F,) for i, F in enumerate(self.widths)}
        K = len(self.classes)
        return kernels | {"classifier.weight": (K, self.widths[-1])} | biases | {"classifier.bias": (K,)}

    def flops_per_picture(self):
        """Floating-point operations of training on one picture: each weight of a kernel is multiplied and added at each
        place, once forward and twice backward (dx, dw); the first layer needs no dx.
        """
        places = [(self.size >> i) ** 2 for i in range(self.n_block)]
        products = [n * math.prod(shape) for n, shape in zip(places, self.shapes().values(), strict=False)]
        return 6 * sum(products) - 2 * products[0] + 6 * len(self.classes) * self.widths[-1]

    @classmethod
    def load(cls, folder):
        """The Config of a folder. Raises InputError that names the file."""
        path, settings = huggingface.read_config(folder)
        labels, size, widths = (settings.get(name) for name in ("id2label", "image_size", "hidden_sizes"))
        require(settings.get("model_type") == TYPE,
                f"{path}: model_type {settings.get('model_type')!r} is no image classifier of images.train")
        require(isinstance(labels, dict) and list(labels) == [str(i) for i in range(len(labels))] and len(labels) > 1
                and all(isinstance(name, str) for name in labels.values()),
                f"{path}: id2label must name the classes 0, 1, …")
        require(isinstance(widths, list) and 0 < len(widths) < 10
                and all(type(x) is int and 0 < x < 10**4 for x in [size, *widths]),
                f"{path}: image_size and hidden_sizes must be whole numbers")
        return cls(tuple(labels.values()), size, tuple(widths))


class ConvNet:
    """The network of a Config. Fresh weights depend on the seed alone; seed None leaves them to be overwritten.

    A conv2d sums n = 9 C products. Its weights are normal with variance 2/n, so that what leaves relu, half of it 0, is
    as large as what came in (He et al. 2015, §2.2). The last linear layer starts at 0: an even guess, a loss of ln K.
    """
    trainable = True

    def __init__(self, config, seed=0, dtype=np.float32):
        self.config, self.weights = config, Parameters(config.shapes(), dtype)
        if seed is not None:
            self._draw_weights(np.random.default_rng(seed))
        tensor = self.weights.tensor
        self.blocks = [(tensor(f"features.{3 * i}.weight"), tensor(f"features.{3 * i}.bias"))
                       for i in range(config.n_block)]
        self.classifier = tensor("classifier.weight"), tensor("classifier.bias")

    def _draw_weights(self, rng):
        self.weights.flat[...] = 0
        for w in self.weights.views(self.weights.flat).values():
            if w.ndim == 4:
                drawn = rng.standard_normal(w.shape, np.float32) * (2 / math.prod(w.shape[1:])) ** 0.5
                w[...] = device.xp.asarray(drawn.astype(w.dtype))

    def parameters(self):
        """{PyTorch's name: Parameter}: views of the weights and of their gradients."""
        return self.weights.pairs()

    def run_blocks(self, pixels):
        """Yield what each block makes of pixels (N, S, S, 3) from 0 to 255."""
        row = pixels.shape[2], 1                # of both, because NumPy is slow with three numbers at a time
        scale, shift = (device.xp.asarray(np.tile(x, row), self.weights.flat.dtype)
                        for x in (1 / (255 * np.array(STD)), np.array(MEAN) / STD))
        x = Tensor(device.xp.asarray(pixels) * scale - shift)
        for w, b in self.blocks:
            x = conv_block(x, w, b)
            yield x

    def features(self, pixels):
        """(N, S/16, S/16, 128): what the last block says about each place of the pictures (N, S, S, 3)."""
        return functools.reduce(lambda _, x: x, self.run_blocks(pixels))

    def __call__(self, pixels, p=0.0, key=()):
        """pixels (N, S, S, 3) -> logits (N, K). p, key: see `loss`."""
        w, b = self.classifier
        return linear(dropout(mean(self.features(pixels), (1, 2)), p, key), w) + b

    def loss(self, pixels, labels, p=0.0, key=()):
        """Mean cross-entropy in nats of labels (N,); a scalar Tensor.

        p is the probability of dropout, in the features and never in the logits; `key` decides which elements.
        """
        return cross_entropy(self(pixels, p, key), labels)

    def save(self, folder):
        """Write config.json and model.safetensors."""
        config = self.config
        labels = {str(i): name for i, name in enumerate(config.classes)}
        settings = {
            "architectures": ["ConvNet"], "model_type": TYPE, "num_channels": 3, "image_size": config.size,
            "hidden_sizes": config.widths, "id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
        huggingface.save_model(folder, settings, self.weights.arrays())

    @classmethod
    def load(cls, folder):
        """The network of a folder that `save` wrote. Raises InputError naming the file and what is wrong with it."""
        config = Config.load(folder)
        read, _ = huggingface.tensor_reader(Path(folder), config)
        model = cls(config, seed=None)
        for name, parameter in model.parameters().items():
            for rows, part in read(name):
                parameter.data[rows] = device.xp.asarray(part)
        return model


def preprocessor(config):
    """{"preprocessor_config.json": its text}: with it, `transformers` makes of a picture the numbers that we make."""
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 1,
        "size": {"height": config.size, "width": config.size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD}
    return {"preprocessor_config.json": json.dumps(settings, indent=2) + "\n"}
