"""From logits to the next token: temperature, top-k, top-p."""
import numpy as np

from device import InputError


def check_sampling(temperature, top_k, top_p):
    """Raise InputError unless `sample` can use these."""
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (greedy) or above, not {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k must be a whole number of at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, not {top_p}")


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """softmax(logits / temperature), (B, V) -> float64 (B, V), cut to the likeliest tokens: the top_k largest (and what
    ties with the last of them); of these the fewest whose share reaches top_p (nucleus sampling, Holtzman et al. 2020,
    §3.1). All others get 0, and what is left is scaled to sum to 1. At temperature 0 the largest logit gets it all.

    >>> probabilities(np.log([[4, 3, 2, 1]]), top_k=3, top_p=0.7).round(4).tolist()     # 4/9 + 3/9 reach 0.7
    [[0.5714, 0.4286, 0.0, 0.0]]
    >>> probabilities(np.log([[1, 3]]), temperature=0.5).round(4).tolist()              # 1² : 3²
    [[0.1, 0.9]]
    """
    z = np.asarray(logits, np.float64)
    if temperature == 0:
        return (np.arange(z.shape[1]) == z.argmax(1)[:, None]).astype(np.float64)
    z = (z - z.max(1, keepdims=True)) / temperature         # near temperature 0: -inf, a probability of 0
    if top_k is not None and top_k < z.shape[1]:
        z[z < np.partition(z, -top_k, axis=1)[:, -top_k, None]] = -np.inf
    p = np.exp(z)
    p /= p.sum(1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = np.argsort(-p, axis=1, kind="stable")
        down = np.take_along_axis(p, order, 1)
        down[np.cumsum(down, 1) - down >= top_p] = 0        # the share was reached before this token
        np.put_along_axis(p, order, down, 1)
        p /= p.sum(1, keepdims=True)
    return p


def sample(logits, u, temperature=1.0, top_k=None, top_p=None):
    """One token a row of logits (B, V), chosen by u (B,), uniform on [0, 1): where the cumulative p first exceeds u.

    >>> logits = np.log([[1, 2, 1]] * 3)            # cumulative: 0.25, 0.75, 1
    >>> sample(logits, np.array([0.1, 0.5, 0.9])).tolist()
    [0, 1, 2]
    """
    if temperature == 0:
        return np.asarray(logits).argmax(1)
    total = np.cumsum(probabilities(logits, temperature, top_k, top_p), 1)
    return (total > (u * total[:, -1])[:, None]).argmax(1)
