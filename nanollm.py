"""The model: its shape, its parameters, the Llama-style transformer and text generation.

    ids (B, T) ─ embedding ─► h (B, T, C)
        n_block times:   h += attention(rmsnorm(h))      tokens look at themselves and earlier ones
                         h += glu(rmsnorm(h))            each token is processed on its own
    h ─ rmsnorm ─ lm_head ─► logits (B, T, V): a score for every token as the next one

(Touvron et al. 2023, §2.2: pre-normalisation, SwiGLU, rotary positions.) Shapes: B batch, T time,
S positions read so far, C embedding_dim, H n_head, K n_kv_head, D head_dim, F hidden_dim,
V vocab_size. Weights are (out, in), under Hugging Face's names.
"""
import itertools
import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np

from autograd import (
    ACTIVATIONS,
    Tensor,
    attention,
    cast,
    dropout,
    embedding,
    glu,
    linear,
    linear_cross_entropy,
    no_grad,
    recompute,
    rmsnorm,
    rope,
)
from hardware import device, formulas
from hardware.quantized import QuantizedParameters
from hardware.sampling import sample
from storage import huggingface
from storage.files import require

# ---------------------------------------------------------------- the shape

_LARGEST = 1 << 20      # the limit of every size in a Config: a file that asks for more is broken
_is_positive = lambda value: type(value) in (int, float) and 1e-30 < value < 1e30


@dataclass(frozen=True)
class Config:
    """The shape of a model. Raises InputError that names the field and the rule."""
    vocab_size: int
    embedding_dim: int = 512
    n_block: int = 6
    n_head: int = 8
    n_kv_head: int | None = None        # below n_head: grouped-query attention; None: n_head
    max_context: int = 512
    hidden_dim: int = 2048
    eps: float = 1e-6
    rope_theta: float = 10000.0
    activation: str = "silu"
    tie_embeddings: bool = False        # the embedding matrix is the output layer, too
    head_dim: int | None = None         # None: embedding_dim / n_head
    qkv_bias: bool = False              # q, k and v are products plus a vector (Qwen2)
    qk_norm: bool = False               # each head of q and k is normalised before RoPE (Qwen3)
    rope_scaling: tuple = ()            # Llama 3.1's four numbers, see `rope_table`

    def __post_init__(self):
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        for name in ("vocab_size", "embedding_dim", "n_block", "n_head", "n_kv_head",
                     "max_context", "hidden_dim"):
            size = getattr(self, name)
            require(type(size) is int and 1 <= size <= _LARGEST,        # isinstance takes True
                    f"{name} must be a whole number from 1 to {_LARGEST}, not {size!r}")
        for name in ("eps", "rope_theta"):
            value = getattr(self, name)
            require(_is_positive(value),
                    f"{name} must be a number above 0 that a float32 can hold, not {value!r}")
        D = self.embedding_dim / self.n_head if self.head_dim is None else self.head_dim
        require(type(D) in (int, float) and 2 <= D <= _LARGEST and D % 2 == 0,
                f"head_dim must be even because RoPE rotates pairs, not {D!r}: give it, or make "
                f"embedding_dim ({self.embedding_dim}) a multiple of twice n_head ({self.n_head})")
        object.__setattr__(self, "head_dim", int(D))
        require(self.n_head % self.n_kv_head == 0,
                f"n_kv_head ({self.n_kv_head}) must divide n_head ({self.n_head})")
        require(self.activation in list(ACTIVATIONS), "activation must be one of "
                f"{', '.join(ACTIVATIONS)}, not {self.activation!r}")
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be True or False, not {value!r}")
        require(not self.qkv_bias or not self.qk_norm, "qkv_bias and qk_norm exclude each other")
        scaling = self.rope_scaling
        require(scaling == () or (type(scaling) is tuple and len(scaling) == 4
                                  and all(map(_is_positive, scaling)) and scaling[1] < scaling[2]),
                f"rope_scaling must be () or (factor, low < high, length), not {scaling!r}")

    def shapes(self):
        """{Hugging Face name: shape} of every parameter, in the order of `Parameters`.

        Matrices come first, because only they decay (weight decay: train.py). q, k, v of a block
        are adjacent, and so are gate and up, because each group is computed as one product.
        """
        C, F, D = self.embedding_dim, self.hidden_dim, self.head_dim
        q, kv = self.n_head * D, self.n_kv_head * D
        matrices, vectors = {"model.embed_tokens.weight": (self.vocab_size, C)}, {}
        for i in range(self.n_block):
            for name, shape in {
                    "self_attn.q": (q, C), "self_attn.k": (kv, C), "self_attn.v": (kv, C),
                    "self_attn.o": (C, q), "mlp.gate": (F, C), "mlp.up": (F, C), "mlp.down": (C, F),
            }.items():
                matrices[f"model.layers.{i}.{name}_proj.weight"] = shape
            widths = {"input_layernorm.weight": C, "post_attention_layernorm.weight": C}
            if self.qkv_bias:
                widths |= {f"self_attn.{x}_proj.bias": q if x == "q" else kv for x in "qkv"}
            if self.qk_norm:
                widths |= {"self_attn.q_norm.weight": D, "self_attn.k_norm.weight": D}
            vectors |= {f"model.layers.{i}.{name}": (n,) for name, n in widths.items()}
        if not self.tie_embeddings:
            matrices["lm_head.weight"] = (self.vocab_size, C)
        return matrices | vectors | {"model.norm.weight": (C,)}

    @classmethod
    def load(cls, folder):
        """The Config of a Hugging Face folder. Raises InputError that names the file."""
        return huggingface.load_config(folder, cls)


# ---------------------------------------------------------------- the parameters

class Parameter(namedtuple("Parameter", "data grad")):
    """One parameter's weights and their gradient: views, to be changed in place."""
    shape = property(lambda self: self.data.shape)


class Parameters:
    """All parameters of a model in one flat array, and all their gradients in another.

    Whatever treats every parameter alike then needs no loop over their names: Adam is one sweep
    over memory, the norm of the gradient one reduction, a checkpoint's moments two arrays.
    Matrices that are used in one product lie side by side and are one Tensor (`tensor`), so no two
    Tensors share memory. Each Tensor's grad is a view of `grad` from the start, so the engine adds
    to it in place.

    shapes {name: shape}, matrices first. Attributes: `flat` and `grad`, 1-D arrays (grad is None if
    the model is only read, not `trainable`); `n_matrix`, the number of elements, at the front, that
    belong to matrices; `own`, the slice of them that this process updates: all, unless it trains as
    one of several (hardware/ranks.py).
    """
    bits = None             # not quantised

    def __init__(self, shapes, dtype=np.float32, trainable=True):
        sizes = [math.prod(shape) for shape in shapes.values()]
        ends = list(itertools.accumulate(sizes))
        self.shapes = shapes
        self.starts = dict(zip(shapes, [0, *ends[:-1]], strict=True))
        self.flat = device.xp.ones(ends[-1], dtype)
        self.grad = device.xp.zeros(ends[-1], dtype) if trainable else None
        self.n_matrix = sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
        self.own, self._tensors, self._half = slice(0, ends[-1]), [], None

    def views(self, array):
        """{name: view} of an array laid out like `flat`, such as `grad` or Adam's moments."""
        return {name: self._view(array, name, shape) for name, shape in self.shapes.items()}

    def tensor(self, *names):
        """One Tensor over adjacent matrices, stacked along their rows (or over one parameter)."""
        rows = sum(self.shapes[name][0] for name in names)
        shape = (rows, *self.shapes[names[0]][1:])
        tensor = Tensor(self._view(self.flat, names[0], shape), self.grad is not None)
        if self.grad is not None:
            tensor.grad = self._view(self.grad, names[0], shape)
        self._tensors.append((names[0], tensor))
        return tensor

    def place(self, flat, grad, own):
        """Use these arrays from now on; the Tensors become views of them."""
        self.flat, self.grad, self.own = flat, grad, own
        for name, tensor in self._tensors:
            tensor.data, tensor.grad = (self._view(x, name, tensor.shape) for x in (flat, grad))

    def round(self, dtype):
        """Let every product use the weights in half precision, rounded here, once for all of them.

        With a dtype that is not half precision they use the weights themselves again.
        """
        if self._half is None or self._half.dtype != dtype:
            self._half = device.xp.empty(self.n_matrix if dtype.itemsize == 2 else 0, dtype)
            for name, tensor in self._tensors:
                half = self._half.size and len(tensor.shape) > 1
                tensor.half = self._view(self._half, name, tensor.shape) if half else None
        device.cast(self.flat, self._half)

    def _view(self, array, name, shape):
        start = self.starts[name]
        return array[start:start + math.prod(shape)].reshape(shape)

    def pairs(self):
        """{name: Parameter}: views, to be changed in place; grad is None unless trainable."""
        grads = {} if self.grad is None else self.views(self.grad)
        return {name: Parameter(w, grads.get(name)) for name, w in self.views(self.flat).items()}

    def arrays(self):
        """{name: array on the host}: what a model's file holds."""
        return {name: np.ascontiguousarray(device.to_host(view))
                for name, view in self.views(self.flat).items()}


# ---------------------------------------------------------------- the key/value cache

class KVCache:
    """Keys and values of all positions read so far, so that a new token costs one position."""

    def __init__(self, config, batch, dtype, room=math.inf):
        room = min(room, config.max_context)
        shape = config.n_block, batch, config.n_kv_head, room, config.head_dim
        self.k, self.v = device.xp.empty(shape, dtype), device.xp.empty(shape, dtype)
        self.length = 0

    def extend(self, i, k, v):
        """Store block i's k and v (B, K, T, D) of T new positions; return all, (B, K, S, D)."""
        end = self.length + k.shape[2]
        ks, vs = self.k[i, :, :, :end], self.v[i, :, :, :end]
        formulas.copy_both(k.data, v.data, ks[:, :, self.length:], vs[:, :, self.length:])
        return Tensor(ks), Tensor(vs)


# ---------------------------------------------------------------- the transformer

Block = namedtuple("Block", "norm1 qkv bias q_norm k_norm o norm2 gate_up down")    # or None


def rope_table(config, dtype):
    """cos and sin (max_context, D) of the angles by which `rope` rotates.

    Pair i turns at position t by t θ^(-2i/D), θ = rope_theta: from one full turn in 2π positions
    (i = 0) to one in 2πθ^(1-2/D). Each angle appears twice, once for each half of a row.

    rope_scaling is for texts longer than the `length` of the first training (Llama 3.1). Pairs with
    at least `high` full turns within it stay. Those with at most `low` are slowed by `factor`, so
    they meet no angle that is new to them. In between the two are blended.
    """
    D = config.head_dim
    frequencies = config.rope_theta ** (-np.arange(0, D, 2) / D)                # (D/2,)
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        stays = np.clip((length * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
        frequencies *= stays + (1 - stays) / factor
    angles = np.outer(np.arange(config.max_context), np.tile(frequencies, 2))  # (max_context, D)
    return [device.xp.asarray(f(angles).astype(dtype)) for f in (np.cos, np.sin)]


class NanoLLM:
    """The transformer of a Config. Fresh weights depend on the seed alone.

    seed None leaves all weights at 1, to be overwritten. weights: Parameters (None: made here) or
    QuantizedParameters. `dtype` float64 exists for gradient checks. Set compute_dtype, the type of
    activations and of the products' inputs, to half precision for mixed precision. Set recompute
    to True, and training keeps only each block's input and computes the rest again in backward.

    Weights are drawn from a normal distribution of standard deviation 0.02. The two matrices of a
    block that write into h get 0.02/√(2·n_block), so that the sum of all 2·n_block contributions
    has the same size at any depth (GPT-2, Radford et al. 2019, §2.3). rmsnorm's weights start at 1.
    Small logits are nearly an even guess: the first loss is near ln V.
    """
    def __init__(self, config, seed=0, dtype=np.float32, weights=None):
        self.config, self.compute_dtype, self.recompute = config, np.dtype(dtype), False
        self.weights = weights or Parameters(config.shapes(), dtype)
        if self.trainable and seed is not None:
            self._draw_weights(np.random.default_rng(seed))
        tensor = self.weights.tensor
        self.embed, self.norm = tensor("model.embed_tokens.weight"), tensor("model.norm.weight")
        self.lm_head = self.embed if config.tie_embeddings else tensor("lm_head.weight")
        self.blocks = []
        for i in range(config.n_block):
            attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            self.blocks.append(Block(
                norm1=tensor(f"model.layers.{i}.input_layernorm.weight"),
                qkv=tensor(*(f"{attn}{x}_proj.weight" for x in "qkv")),
                bias=tensor(*(f"{attn}{x}_proj.bias" for x in "qkv")) if config.qkv_bias else None,
                q_norm=tensor(attn + "q_norm.weight") if config.qk_norm else None,
                k_norm=tensor(attn + "k_norm.weight") if config.qk_norm else None,
                o=tensor(attn + "o_proj.weight"),
                norm2=tensor(f"model.layers.{i}.post_attention_layernorm.weight"),
                gate_up=tensor(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
                down=tensor(mlp + "down_proj.weight")))
        self.cos, self.sin = rope_table(config, dtype)

    def _draw_weights(self, rng):
        for name, w in self.weights.views(self.weights.flat).items():
            if name.endswith(".bias"):
                w[...] = 0
            if w.ndim == 2:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= (2 * self.config.n_block) ** -0.5
                drawn = rng.standard_normal(w.size, np.float32).reshape(w.shape) * std
                w[...] = device.xp.asarray(drawn.astype(w.dtype))

    trainable = property(lambda self: self.weights.grad is not None)

    def parameters(self):
        """{Hugging Face name: Parameter}: views of the weights and of their gradients."""
        return self.weights.pairs()

    def _attend(self, i, x, cache):
        """Block i's attention on x (B, T, C): one product for q, k and v, and one back to C."""
        block, config, (B, T, _) = self.blocks[i], self.config, x.shape
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        start = 0 if cache is None else cache.length
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        heads = linear(x, block.qkv)
        if config.qkv_bias:
            heads = heads + cast(block.bias, x.dtype)
        heads = heads.reshape(B, T, H + 2 * K, D)   # before the slices: no copy in backward
        qk, v = (x.transpose(0, 2, 1, 3) for x in (heads[:, :, :H + K], heads[:, :, H + K:]))
        if config.qk_norm:
            q = rope(rmsnorm(qk[:, :H], block.q_norm, config.eps), cos, sin)
            k = rope(rmsnorm(qk[:, H:], block.k_norm, config.eps), cos, sin)
        else:
            qk = rope(qk, cos, sin)                                         # both in one call
            q, k = qk[:, :H], qk[:, H:]
        if cache is not None:
            k, v = cache.extend(i, k, v)                                    # (B, K, S, D)
        out = attention(q, k, v).transpose(0, 2, 1, 3).reshape(B, T, H * D)
        return linear(out, block.o)

    def run_block(self, i, h, cache=None, p=0.0, key=()):
        """Block i on h (B, T, C): attention, then the gated linear unit, each added to h."""
        block, eps = self.blocks[i], self.config.eps
        x = rmsnorm(h, block.norm1, eps)
        h = h + dropout(self._attend(i, x, cache), p, (2 * i + 1, *key))
        x = rmsnorm(h, block.norm2, eps)
        x = linear(x, block.gate_up)                                      # (B, T, 2F)
        x = glu(x, activation=self.config.activation)                       # (B, T, F)
        return h + dropout(linear(x, block.down), p, (2 * i + 2, *key))

    def hidden(self, ids, cache=None, p=0.0, key=()):
        """The last hidden state (B, T, C), normalised, of ids (B, T) that follow what `cache` read.

        p and key: see `loss`. Raises IndexError for an id outside the vocabulary, ValueError for
        more positions than max_context.
        """
        if self.trainable and (cache is None or not cache.length):
            self.weights.round(self.compute_dtype)
        h = embedding(self.embed, ids)
        end = h.shape[1] + (0 if cache is None else cache.length)
        if end > self.config.max_context:
            raise ValueError(f"{end} positions are more than max_context, "
                             f"{self.config.max_context}")
        h = dropout(cast(h, self.compute_dtype), p, (0, *key))
        for i in range(self.config.n_block):
            def run(h, i=i):
                return self.run_block(i, h, cache, p, key)
            h = recompute(run, h) if self.recompute else run(h)
        if cache is not None:
            cache.length = end
        return rmsnorm(h, self.norm, self.config.eps)

    def __call__(self, ids):
        """ids (B, T) -> all logits (B, T, V): those at t say what follows ids[:, :t + 1]."""
        return linear(self.hidden(ids), self.lm_head)

    def loss(self, ids, targets, p=0.0, key=()):
        """Mean cross-entropy in nats of targets (B, T), the ids that follow; a scalar Tensor.

        p is the probability of dropout, in the embedding and in what each half of a block adds to
        h; `key`, a tuple of ints, decides which elements; its last is the first window's number.
        """
        return linear_cross_entropy(self.hidden(ids, p=p, key=key), self.lm_head, targets)

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
                 stop_ids=(), use_cache=True):
        """Yield up to max_new_tokens ids: an int each for ids (T,), an array (B,) each for (B, T).

        `temperature` 0 is greedy; for top_k and top_p see hardware/sampling.py. A stop id ends its
        row and is still yielded. A batch ends when all its rows have ended; until then an ended
        row repeats its stop id.
        The context holds max_context tokens. When one more would not fit, its older half is
        dropped and the rest is read again, with or without the cache: all positions change, so no
        cached key would be right.
        Raises InputError for settings out of range, IndexError for ids outside the vocabulary.
        """
        ids = np.asarray(ids)
        require(ids.ndim in (1, 2) and ids.size, "generate needs at least one token to continue, "
                f"in shape (T,) or (B, T), not {ids.shape}")
        require(isinstance(max_new_tokens, int) and max_new_tokens >= 0,
                f"max_new_tokens must be a whole number of at least 0, not {max_new_tokens}")
        require(0 <= temperature < math.inf,
                f"temperature must be 0 (greedy) or above, not {temperature}")
        require(top_k is None or (isinstance(top_k, int) and top_k >= 1),
                f"top_k must be a whole number of at least 1, not {top_k}")
        require(top_p is None or 0 < top_p <= 1,
                f"top_p must be above 0 and at most 1, not {top_p}")
        require(seed is None or seed >= 0, f"seed must be at least 0, not {seed}")
        device.as_ids(ids, self.config.vocab_size)
        rng = np.random.default_rng(seed)
        choose = lambda logits: sample(logits, rng.random(len(logits)), temperature, top_k, top_p)
        rows = np.atleast_2d(ids).astype(np.int64)      # a copy: the caller may change ids
        steps = self._continue(rows, choose, set(stop_ids), use_cache, max_new_tokens)
        return steps if ids.ndim == 2 else (int(step[0]) for step in steps)

    def _continue(self, rows, choose, stop_ids, use_cache, max_new_tokens):
        """Yield the next ids (B,) of rows (B, T), as `choose` takes them from logits (B, V)."""
        start, cache, ended = 0, None, np.zeros(len(rows), bool)
        end = rows.shape[1] + max_new_tokens
        while rows.shape[1] < end and not ended.all():
            new = rows[:, -1:]
            while rows.shape[1] - start > self.config.max_context:
                start, cache = start + max(self.config.max_context // 2, 1), None
            if cache is None:
                new = rows[:, start:]
                if use_cache:
                    cache = KVCache(self.config, len(rows), self.compute_dtype, end)
            with no_grad():
                last = self.hidden(new, cache)[:, -1]
                logits = device.to_host(linear(last, self.lm_head).data)        # (B, V)
            chosen = np.where(ended, rows[:, -1], choose(logits))
            rows = np.concatenate([rows, chosen[:, None]], 1)
            ended |= [token in stop_ids for token in chosen.tolist()]
            yield chosen

    def save(self, folder, **settings):
        """Write config.json (with `settings`, such as eos_token_id) and model.safetensors."""
        settings = huggingface.to_config(self.config, self.weights.bits) | settings
        huggingface.save_model(folder, settings, self.weights.arrays())

    @classmethod
    def load(cls, folder, trainable=True):
        """The model of a Hugging Face folder, or of one that extras.quantize wrote.

        `float16` and `bfloat16` weights are widened to float32. Raises InputError naming the file
        and what is wrong with it; nothing in a file is ever executed.
        """
        config = Config.load(folder)
        read, bits = huggingface.tensor_reader(folder, config)
        if bits:
            return cls(config, weights=QuantizedParameters(
                config.shapes(), bits, read, Tensor, Parameter))
        weights = Parameters(config.shapes(), np.float32, trainable)
        for name, w in weights.views(weights.flat).items():
            for rows, part in read(name):           # never a large matrix twice
                w[rows] = device.xp.asarray(part)
        return cls(config, None, weights=weights)
