"""From logits to the next token, on the host: temperature, top-k, top-p."""
import numpy as np


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """softmax(logits / temperature), cut to the likeliest tokens.  (B, V) -> float64 (B, V)

    First the top_k largest are kept (of equal ones the first), then the fewest of these whose
    share reaches top_p (nucleus sampling, Holtzman et al. 2020, §3.1). All others get 0, and the
    rest is scaled to sum to 1. At temperature 0 the largest logit gets it all.

    >>> p = probabilities(np.log([[4, 3, 2, 1]]), top_k=3, top_p=0.7)   # 4/9 + 3/9 reach 0.7
    >>> p.round(4).tolist()
    [[0.5714, 0.4286, 0.0, 0.0]]
    >>> probabilities(np.log([[1, 3]]), temperature=0.5).round(4).tolist()      # 1² : 3²
    [[0.1, 0.9]]
    """
    z = np.asarray(logits, np.float64)
    if temperature == 0:
        return (np.arange(z.shape[1]) == z.argmax(1)[:, None]).astype(np.float64)
    with np.errstate(over="ignore"):                    # near 0: -inf, a probability of 0
        z = (z - z.max(1, keepdims=True)) / temperature
    if top_k is not None and top_k < z.shape[1]:
        last = np.partition(z, -top_k, axis=1)[:, -top_k, None]         # the smallest that is kept
        room = top_k - (z > last).sum(1, keepdims=True)
        z[(z < last) | ((z == last) & (np.cumsum(z == last, 1) > room))] = -np.inf
    p = np.exp(z)
    p /= p.sum(1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = np.argsort(-p, axis=1, kind="stable")
        falling = np.take_along_axis(p, order, 1)
        before = np.cumsum(falling, 1) - falling
        falling[before >= top_p] = 0
        np.put_along_axis(p, order, falling, 1)
        p /= p.sum(1, keepdims=True)
    return p


def sample(logits, u, temperature=1.0, top_k=None, top_p=None):
    """For each row of logits (B, V) the first token whose cumulative p exceeds u (B,), in [0, 1).

    >>> logits = np.log([[1, 2, 1]] * 3)            # cumulative: 0.25, 0.75, 1
    >>> sample(logits, np.array([0.1, 0.5, 0.9])).tolist()
    [0, 1, 2]
    """
    if temperature == 0:
        return np.asarray(logits).argmax(1)
    total = np.cumsum(probabilities(logits, temperature, top_k, top_p), 1)
    return (total > (u * total[:, -1])[:, None]).argmax(1)
