"""The ops of a convolutional network that autograd.py does not have: conv2d, max_pool2d and relu, as their derivations
read, and conv_block, which the network uses: the three in one, and fast.

Shapes: N images of H · W pixels with C channels each, so an image is (H, W, C), a pixel's channels side by side in
memory. F is the number of channels of a result, and a kernel covers k · k pixels, k odd.
"""
import math

from autograd import record
from hardware import device

_CACHE = 1 << 18        # elements of a block's patches: 1 MB, and with the product of them they fit the cache
_ROWS = 8               # of an image, whose patches share memory: see `_patches`


def _framed(shape, k, dtype):
    """(frame, inside): zeros for images of this shape (N, H, W, C) and k//2 more on every side, and the view inside."""
    (N, H, W, C), edge = shape, k // 2
    frame = device.xp.zeros((N, H + 2 * edge, W + 2 * edge, C), dtype)
    return frame, frame[:, edge:edge + H, edge:edge + W]


def _every(rows, columns, x):
    """x (N, H, W, C) as a view (rows, columns, N, H/rows, W/columns, C): [i, j] is x[:, i::rows, j::columns]."""
    N, H, W, C = x.shape
    return x.reshape(N, H // rows, rows, W // columns, columns, C).transpose(2, 4, 0, 1, 3, 5)


def conv2d(x, w, b):
    """out_p = b + sum_d w_d x_{p+d}, x 0 outside of the image.  x (N, H, W, C), w (F, C, k, k), b (F,) -> (N, H, W, F)

    p is a pixel, d one of the k · k steps from p to its neighbours, and w_d (F, C) a matrix: the sum of k · k
    linear layers, each on the image moved by -d. So, as in `linear`,
        dw_d = sum_p dout_p x_{p+d}ᵀ,   db = sum_p dout_p
    x_q entered every out_p with p + d = q, so dx_q = sum_d w_dᵀ dout_{q-d}: each term goes back to where it came from.

    >>> from autograd import Tensor
    >>> x = Tensor(device.xp.zeros((1, 3, 3, 1)), requires_grad=True)
    >>> x.data[0, 1, 1, 0] = 1.0                                # a single white pixel shows the kernel, turned by 180°
    >>> w = Tensor(device.xp.arange(9.0).reshape(1, 1, 3, 3))
    >>> out = conv2d(x, w, Tensor([0.0]))
    >>> out.data[0, :, :, 0].tolist()
    [[8.0, 7.0, 6.0], [5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]
    >>> out.backward(device.xp.ones((1, 3, 3, 1)))              # the middle met all nine, 0 + … + 8; a corner met four
    >>> x.grad[0, :, :, 0].tolist()
    [[8.0, 15.0, 12.0], [21.0, 36.0, 27.0], [20.0, 33.0, 24.0]]
    """
    (_, H, W, _), k, images, weight = x.shape, w.shape[-1], x.data, w.data
    frame, inside = _framed(images.shape, k, images.dtype)
    inside[...] = images
    places = [(i, j, (slice(None), slice(i, i + H), slice(j, j + W))) for i in range(k) for j in range(k)]
    out = b.data + sum(frame[place] @ weight[:, :, i, j].T for i, j, place in places)

    def backward(dout):
        (dframe, dx), dw = _framed(images.shape, k, images.dtype), device.xp.zeros_like(weight)
        for i, j, place in places:
            dframe[place] += dout @ weight[:, :, i, j]
            dw[:, :, i, j] = device.xp.tensordot(dout, frame[place], 2 * [(0, 1, 2)])
        return dx, dw, dout.sum((0, 1, 2))
    return record(out, (x, w, b), backward)


def max_pool2d(x):
    """The largest of each 2 · 2 pixels, channel by channel:  (N, H, W, C) -> (N, H//2, W//2, C)

    A small change of any but the largest changes nothing. So dout goes to the largest, and the others get 0. Of equal
    ones the first gets it, row by row, as in PyTorch. Of an odd size the last row or column is left out.

    >>> from autograd import Tensor
    >>> x = Tensor([[[[1.0], [7.0], [2.0]], [[7.0], [3.0], [9.0]]]], requires_grad=True)
    >>> out = max_pool2d(x)
    >>> out.backward([[[[5.0]]]])
    >>> out.data.item(), x.grad[0, :, :, 0].tolist()
    (7.0, [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    """
    images, (N, H, W, C) = x.data, x.shape
    quarters = lambda images: _every(2, 2, images[:, :H // 2 * 2, :W // 2 * 2])
    of_each = quarters(images).reshape(4, N, H // 2, W // 2, C)
    first = of_each.argmax(0)

    def backward(dout):
        dx = device.xp.zeros_like(images)
        for i in range(4):
            quarters(dx)[i // 2, i % 2] = dout * (first == i)
        return (dx,)
    return record(of_each.max(0), (x,), backward)


def relu(x):
    """out = max(x, 0);  dx = dout where x > 0, else 0."""
    positive = x.data > 0
    return record(device.xp.maximum(x.data, 0), (x,), lambda dout: (dout * positive,))


def _patches(frame, k, rows, columns):
    """(rows, n, k·k·C): the patches of all n · rows pixels inside of the frame, in the order of `_every`.

    A pixel's patch is its neighbourhood: k rows of k pixels. The pixel below has k - 1 of these rows in its patch, too.
    So what is copied are strips, rows + k - 1 rows of k pixels, and [i] is a view of them: k rows each, from row i on.
    """
    (N, H, W, C), (n, h, w, c), view = frame.shape, frame.strides, device.xp.lib.stride_tricks.as_strided
    high, row = rows + k - 1, k * C
    strips = view(frame, (columns, N, (H - k + 1) // rows, (W - k + 1) // columns, high, k, C),
                  (w, n, rows * h, columns * w, h, w, c)).reshape(-1, high * row)
    return view(strips, (rows, len(strips), k * row), (row * c, strips.strides[0], c))


def conv_block(x, w, b):
    """relu(max_pool2d(conv2d(x, w, b))): the same for a few images at a time, which stay in the cache from op to op.

    As one product, conv2d is patches(x) @ matrix: a row for each pixel's patch, and w as a matrix (k·k·C, F). The
    rows may be in any order. In that of `_every` the four pixels of each 2 · 2 stand at the same place of four arrays,
    and pooling is a maximum of these. Neither adding b nor relu changes the order of numbers, so both come last, where
    there are a quarter as many. Besides x, only out and which pixel was taken are kept for backward:
        dpool = dout where out > 0,  db = sum of dpool,  dconv = dpool where taken, else 0,  dw = patches(x)ᵀ @ dconv
    With -d for d in conv2d's sum,  dx_q = sum_d w_{-d}ᵀ dconv_{q+d}: a convolution, too, of dconv with the kernel
    turned by 180° and C and F exchanged. Patches are far larger than images, so backward makes those of x again.
    """
    (N, H, W, C), (F, _, k, _), images, dtype = x.shape, w.shape, x.data, x.dtype
    height, width, wanted = H // 2, W // 2, x.requires_grad
    rows, rows_of_dx, count = math.gcd(2 * height, _ROWS), math.gcd(H, _ROWS), _CACHE // (H * W * k * C)
    each = lambda n, matrix: device.xp.broadcast_to(matrix, (n, *matrix.shape))
    matrix = each(rows, w.data.transpose(2, 3, 1, 0).reshape(-1, F))
    turned = each(rows_of_dx, w.data[:, :, ::-1, ::-1].transpose(2, 3, 0, 1).reshape(-1, C))
    bias = device.xp.tile(b.data, (width, 1))           # of a row, because NumPy is slow with F numbers at a time
    out = device.xp.empty((N, height, width, F), dtype)
    taken = device.xp.empty((rows // 2, 4, N, 2 * height // rows, width, F), bool)

    def patches_of(few):
        frame, inside = _framed(images[few].shape, k, dtype)
        inside[...] = images[few]
        return _patches(frame, k, rows, 2)

    def forward(few):
        first = taken[:, :, few]
        conv = device.matmul(patches_of(few), matrix).reshape(first.shape)
        largest = conv.max(1, keepdims=True)
        device.xp.equal(conv, largest, out=first)
        seen = first[:, 0].copy()
        for i in (1, 2, 3):
            first[:, i] &= ~seen
            seen |= first[:, i]
        largest += bias
        device.xp.maximum(largest, 0, out=_every(rows // 2, 1, out[few]))
    device.sweep(forward, N, count)

    def backward(dout):
        dx = device.xp.empty(images.shape, dtype) if wanted else None
        dw, db = device.xp.zeros_like(matrix[0]), device.xp.zeros_like(b.data)

        def block(few):
            dpool, dconv = dout[few] * (out[few] > 0), taken[:, :, few].astype(dtype)
            dconv *= device.xp.ascontiguousarray(_every(rows // 2, 1, dpool))
            if wanted:
                frame, inside = _framed((len(dpool), H, W, F), k, dtype)
                pooled = _every(rows, 2, inside[:, :2 * height, :2 * width])
                pooled[...] = dconv.reshape(pooled.shape)
                target = _every(rows_of_dx, 1, dx[few])
                target[...] = device.matmul(_patches(frame, k, rows_of_dx, 1), turned).reshape(target.shape)
            dpool, dconv = dpool.reshape(-1, F), dconv.reshape(rows, -1, F)
            return (device.matmul(patches_of(few).transpose(0, 2, 1), dconv).sum(0),
                    device.matmul(device.xp.ones((1, len(dpool)), dtype), dpool)[0])
        for dw_part, db_part in device.sweep(block, N, count):
            dw += dw_part
            db += db_part
        return dx, dw.reshape(k, k, C, F).transpose(3, 2, 0, 1), db
    return record(out, (x, w, b), backward)
