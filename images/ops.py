"""The ops of a convolutional network that autograd.py does not have: conv2d, max_pool2d, relu.

Shapes: N images of H · W pixels with C channels each, so an image is (H, W, C), a pixel's channels side by side in
memory. F is the number of channels of a result, and a kernel covers k · k pixels, k odd.
"""
import math

from autograd import ACTIVATIONS, by_rows, record
from hardware import device

_CACHE = 1 << 16        # elements of a block: 256 KB fits the cache
_PARTS = 16             # of a batch, for the threads: each sums a dw of its own, so more would take more memory


def _padded(x, k):
    """x (N, H, W, C) with k//2 rows and columns of zeros on every side."""
    (N, H, W, C), edge = x.shape, k // 2
    padded = device.xp.zeros((N, H + 2 * edge, W + 2 * edge, C), x.dtype)
    padded[:, edge:edge + H, edge:edge + W] = x
    return padded


def conv2d_plain(x, w, b):
    """out_p = b + sum_d w_d x_{p+d}, x 0 outside of the image.  x (N, H, W, C), w (F, C, k, k), b (F,) -> (N, H, W, F)

    p is a pixel, d one of the k · k steps from p to its neighbours, and w_d (F, C) a matrix: the sum of k · k
    linear layers, each on the image moved by -d. So, as in `linear`,
        dw_d = sum_p dout_p x_{p+d}ᵀ,   db = sum_p dout_p
    x_q entered every out_p with p + d = q, so dx_q = sum_d w_dᵀ dout_{q-d}: each term goes back to where it came from.

    >>> from autograd import Tensor
    >>> x = Tensor(device.xp.zeros((1, 3, 3, 1)), requires_grad=True)
    >>> x.data[0, 1, 1, 0] = 1.0                                # a single white pixel shows the kernel, turned by 180°
    >>> w = Tensor(device.xp.arange(9.0).reshape(1, 1, 3, 3))
    >>> out = conv2d_plain(x, w, Tensor([0.0]))
    >>> out.data[0, :, :, 0].tolist()
    [[8.0, 7.0, 6.0], [5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]
    >>> out.backward(device.xp.ones((1, 3, 3, 1)))              # the middle met all nine, 0 + … + 8; a corner met four
    >>> x.grad[0, :, :, 0].tolist()
    [[8.0, 15.0, 12.0], [21.0, 36.0, 27.0], [20.0, 33.0, 24.0]]
    """
    (_, H, W, _), k, weight = x.shape, w.shape[-1], w.data
    padded, edge = _padded(x.data, k), k // 2
    places = [(i, j, (slice(None), slice(i, i + H), slice(j, j + W))) for i in range(k) for j in range(k)]
    out = b.data + sum(padded[place] @ weight[:, :, i, j].T for i, j, place in places)

    def backward(dout):
        dpadded, dw = device.xp.zeros_like(padded), device.xp.zeros_like(weight)
        for i, j, place in places:
            dpadded[place] += dout @ weight[:, :, i, j]
            dw[:, :, i, j] = device.xp.tensordot(dout, padded[place], 2 * [(0, 1, 2)])
        return dpadded[:, edge:edge + H, edge:edge + W], dw, dout.sum((0, 1, 2))
    return record(out, (x, w, b), backward)


def _patches(x, k):
    """Yield (slice, patches) for a few images of x (N, H, W, C) at a time; patches has a row (k·k·C,) for each pixel.

    The patch of a pixel is its neighbourhood. On a CPU patches should be multiplied while they are in the cache.
    """
    (N, H, W, C), size = x.shape, k * k * x.shape[-1]
    count = N if device.on_gpu else max(_CACHE // (H * W * size), 1)
    for few in (slice(i, i + count) for i in range(0, N, count)):
        padded = _padded(x[few], k)
        n, h, w, c = padded.strides
        windows = device.xp.lib.stride_tricks.as_strided(padded, (len(padded), H, W, k, k, C), (n, h, w, h, w, c))
        yield few, windows.reshape(-1, size)


def conv2d(x, w, b):
    """`conv2d_plain` as one product: every pixel's neighbourhood, its patch, times w as a matrix (k·k·C, F).

    dw is then doutᵀ @ patches(x). With -d for d in the sum above,  dx_q = sum_d w_{-d}ᵀ dout_{q+d}: a convolution, too,
    of dout with the kernel turned by 180° and C and F exchanged. So `_patches` serves all three products. Patches are
    k·k times as large as the images: they are made for a few images at a time, and again in backward.
    """
    (N, H, W, C), (F, _, k, _), images, bias = x.shape, w.shape, x.data, b.data
    matrix = w.data.transpose(2, 3, 1, 0).reshape(-1, F)
    turned = w.data[:, :, ::-1, ::-1].transpose(2, 3, 0, 1).reshape(-1, C)
    out, wanted = device.xp.empty((N, H, W, F), x.dtype), x.requires_grad
    count = math.ceil(N / _PARTS)

    def convolve(x, matrix, out):
        for few, patches in _patches(x, k):
            device.matmul(patches, matrix, out=out[few].reshape(len(patches), -1))

    def forward(part):
        convolve(images[part], matrix, out[part])
        out[part] += bias
    device.sweep(forward, N, count)

    def backward(dout):
        dx = device.xp.empty(images.shape, images.dtype) if wanted else None
        dw, db = device.xp.zeros((F, k * k * C), x.dtype), device.xp.zeros_like(bias)
        ones = device.xp.ones((1, N * H * W), dout.dtype)

        def block(part):
            if wanted:
                convolve(dout[part], turned, dx[part])
            dw_part = sum(device.matmul(dout[part][few].reshape(-1, F).T, patches)
                          for few, patches in _patches(images[part], k))
            rows = dout[part].reshape(-1, F)
            return dw_part, device.matmul(ones[:, :len(rows)], rows)[0]
        for dw_part, db_part in device.sweep(block, N, count):
            dw += dw_part
            db += db_part
        return dx, dw.reshape(F, k, k, C).transpose(0, 3, 1, 2), db
    return record(out, (x, w, b), backward)


def _quarters(x):
    """The four pixels of every 2 · 2, row by row: four views (N, H//2, W//2, C) of x (N, H, W, C)."""
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return [x[:, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)]


def max_pool2d_plain(x):
    """The largest of each 2 · 2 pixels, channel by channel:  (N, H, W, C) -> (N, H//2, W//2, C)

    A small change of any but the largest changes nothing. So dout goes to the largest, and the others get 0. Of equal
    ones the first gets it, row by row, as in PyTorch. Of an odd size the last row or column is left out.

    >>> from autograd import Tensor
    >>> x = Tensor([[[[1.0], [7.0], [2.0]], [[7.0], [3.0], [9.0]]]], requires_grad=True)
    >>> out = max_pool2d_plain(x)
    >>> out.backward([[[[5.0]]]])
    >>> out.data.item(), x.grad[0, :, :, 0].tolist()
    (7.0, [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    """
    images, quarters = x.data, device.xp.stack(_quarters(x.data))               # (4, N, H//2, W//2, C)
    first = quarters.argmax(0)

    def backward(dout):
        dx = device.xp.zeros_like(images)
        for i, quarter in enumerate(_quarters(dx)):
            quarter[...] = dout * (first == i)
        return (dx,)
    return record(quarters.max(0), (x,), backward)


def max_pool2d(x):
    """`max_pool2d_plain`, a few pairs of rows at a time. Backward finds the largest by comparing with out: what a pixel
    takes is subtracted from dout before the next one looks: the first of equal ones takes all, the last what is left.
    """
    (N, H, W, C), (h, w) = x.shape, (x.shape[1] // 2, x.shape[2] // 2)
    if H % 2 or W % 2:
        x = x[:, :2 * h, :2 * w]
    windows = x.data.reshape(N * h, 2, w, 2, C)         # pairs of rows, row, pairs of columns, column
    out = device.xp.empty((N * h, w, C), x.dtype)
    count = _CACHE // (W * C)

    def forward(part):
        columns = device.xp.maximum(windows[part, 0], windows[part, 1])
        device.xp.maximum(columns[:, :, 0], columns[:, :, 1], out=out[part])
    device.sweep(forward, N * h, count)

    def backward(dout):
        dout, dwindows = dout.reshape(out.shape), device.xp.empty(windows.shape, windows.dtype)

        def block(part):
            left = dout[part].copy()
            for i, j in ((0, 0), (0, 1), (1, 0)):
                taken = dwindows[part, i, :, j]
                device.xp.multiply(left, windows[part, i, :, j] == out[part], out=taken)
                left -= taken
            dwindows[part, 1, :, 1] = left
        device.sweep(block, N * h, count)
        return (dwindows.reshape(N, 2 * h, 2 * w, C),)
    return record(out.reshape(N, h, w, C), (x,), backward)


def relu(x):
    """out = max(x, 0);  dx = dout where x > 0, else 0: the activation's formulas, by rows."""
    rows, shape = x.data.reshape(-1, x.shape[-1]), x.shape
    value, slope = lambda x: ACTIVATIONS["relu"](x)[0], lambda x, dout: dout * (x > 0)
    return record(by_rows(value, rows).reshape(shape), (x,), lambda dout: (
        by_rows(slope, rows, dout.reshape(rows.shape)).reshape(shape),))
