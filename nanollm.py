"""The model: a Llama-style transformer, its key/value cache, generation, and its folder on disk.

    ids (B, T) ─ embedding ─► h (B, T, C)
        n_block times:   h += attention(rmsnorm(h))      tokens look at themselves and those before
                         h += glu(rmsnorm(h))            each token is worked on by itself
    h ─ rmsnorm ─ lm_head ─► logits (B, T, V): a score for every token as the next one

(Touvron et al. 2023, §2.2: pre-normalisation, SwiGLU, rotary positions.) Shapes: B batch, T time, C embedding_dim,
H n_head, K n_kv_head, D = C/H, F hidden_dim, V vocab_size. Weights are (out, in), under Hugging Face's names.
"""
import functools
import json
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

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
    token_ids,
)
from hardware import device
from hardware.quantized import Quantized
from storage import huggingface
from storage.files import InputError, read_json, replace_file
from storage.huggingface import find_tensors

# ---------------------------------------------------------------- its shape

_LARGEST = 1 << 20      # any size in a Config: a file that asks for more is broken, and would take all memory


@dataclass(frozen=True)
class Config:
    """The shape of a model. Raises InputError that names the field and the rule."""
    vocab_size: int
    embedding_dim: int = 512
    n_block: int = 6
    n_head: int = 8
    n_kv_head: int | None = None        # fewer key/value than query heads: grouped-query attention; None: n_head
    max_context: int = 512
    hidden_dim: int = 2048
    eps: float = 1e-6
    rope_theta: float = 10000.0
    activation: str = "silu"
    tie_embeddings: bool = False        # lm_head is the embedding matrix itself

    def __post_init__(self):
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        for name in ("vocab_size", "embedding_dim", "n_block", "n_head", "n_kv_head", "max_context", "hidden_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
                raise InputError(f"{name} must be a whole number from 1 to {_LARGEST}, not {value!r}")
        for name in ("eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-30 < value < 1e30:
                raise InputError(f"{name} must be a number above 0 that a float32 can hold, not {value!r}")
        if self.embedding_dim % (2 * self.n_head):
            raise InputError(f"embedding_dim ({self.embedding_dim}) must be a multiple of 2 * n_head ({self.n_head}): "
                             "heads of one even size, for RoPE turns pairs")
        if self.n_head % self.n_kv_head:
            raise InputError(f"n_kv_head ({self.n_kv_head}) must divide n_head ({self.n_head})")
        if self.activation not in list(ACTIVATIONS):
            raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise InputError(f"tie_embeddings must be True or False, not {self.tie_embeddings!r}")

    @property
    def head_dim(self):
        return self.embedding_dim // self.n_head

    def flops_per_token(self, seq_len):
        """Floating-point operations of training on one token of a window, forward and backward, the model's own:
        what is done again to save memory does not count.  (PaLM, Chowdhery et al. 2022, appendix B)

        Each of a matrix's N weights is multiplied and added once forward and twice backward (dx, dw): 6 N. An embedding
        is looked up and not multiplied, so it does not count, unless it is the lm_head, too. A token meets T/2 keys on
        average, in two products of width C: 6 C T per block. (PaLM counts all T keys, masked or not: 12 C T.)
        """
        n = sum(shape[0] * shape[1] for shape in self.shapes().values() if len(shape) == 2)
        n -= (not self.tie_embeddings) * self.vocab_size * self.embedding_dim
        return 6 * n + 6 * self.n_block * self.embedding_dim * seq_len

    def to_hugging_face(self):
        """The settings in config.json of a LlamaForCausalLM."""
        return huggingface.to_config(self)

    @classmethod
    def from_hugging_face(cls, settings, path=None):
        """The Config of a Llama-type config.json. Raises InputError that names the setting, and the file if given."""
        with huggingface.in_words_of(path):
            config = cls(**huggingface.to_fields(settings))
            if settings.get("head_dim") not in (None, config.head_dim):
                raise InputError(f"head_dim {settings['head_dim']} is not embedding_dim / n_head; not implemented")
            return config

    @classmethod
    def load(cls, folder):
        """The Config of a Hugging Face folder. Raises InputError that names the file."""
        path, settings = huggingface.read_config(folder)
        return cls.from_hugging_face(settings, path)

    def shapes(self):
        """Every parameter's Hugging Face name and shape, in the order of the flat buffer.

        Matrices first, for only they decay; q, k, v and gate, up of a block lie side by side, so that one product
        serves them.
        """
        C, F, q, kv = self.embedding_dim, self.hidden_dim, self.embedding_dim, self.n_kv_head * self.head_dim
        matrices, vectors = {"model.embed_tokens.weight": (self.vocab_size, C)}, {}
        for i in range(self.n_block):
            block = f"model.layers.{i}."
            for name, shape in {
                "self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C),
                "self_attn.o_proj": (C, q), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
            }.items():
                matrices[block + name + ".weight"] = shape
            vectors[block + "input_layernorm.weight"] = vectors[block + "post_attention_layernorm.weight"] = (C,)
        if not self.tie_embeddings:
            matrices["lm_head.weight"] = (self.vocab_size, C)
        return matrices | vectors | {"model.norm.weight": (C,)}


# ---------------------------------------------------------------- from logits to the next token

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


# ---------------------------------------------------------------- the key/value cache

class KVCache:
    """Keys and values of the positions read so far, so that a new token costs one position, not all of them."""

    def __init__(self, config, batch, dtype):
        shape = (config.n_block, batch, config.n_kv_head, config.max_context, config.head_dim)
        self.k, self.v = device.xp.empty(shape, dtype), device.xp.empty(shape, dtype)
        self.length = 0

    def extend(self, block, k, v):
        """Store k and v (B, K, T, D) of the newest T positions; all so far, (B, K, S, D)."""
        end = self.length + k.shape[2]
        self.k[block, :, :, self.length:end], self.v[block, :, :, self.length:end] = k.data, v.data
        return Tensor(self.k[block, :, :, :end]), Tensor(self.v[block, :, :, :end])


# ---------------------------------------------------------------- the transformer

JOINT = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))      # parts of one product
Block = namedtuple("Block", "norm1 qkv o norm2 gate_up down")


class NanoLLM:
    """The transformer of this Config with fresh weights, a pure function of the seed (None: left for `load` to fill).

    `flat` (all parameters), `flat_grad` (all gradients, never None): two 1-D arrays of which the parameters are views;
    the first `n_matrix` elements belong to matrices. `dtype` float64 exists for gradient checks.

    `compute`: the type of activations and of the products' inputs, `flat`'s unless it is set to half precision.
    `recompute`: set to True, training keeps each block's input alone and computes the rest again in backward.

    Weights are drawn from a normal distribution of standard deviation 0.02; the two matrices of a block that write into
    h from one of 0.02/√(2·n_block), so that the sum of all 2·n_block contributions has the same size at any depth
    (GPT-2, Radford et al. 2019, §2.3). Those of rmsnorm start at 1.
    Small logits at the start mean an even guess: the first loss is near ln V.
    """

    def __init__(self, config, seed=0, dtype=np.float32):
        xp, self.config, self.compute, self.recompute = device.xp, config, np.dtype(dtype), False
        shapes = config.shapes()
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
        self.n_matrix = int(sum(np.prod(shape) for shape in shapes.values() if len(shape) == 2))
        self.flat, self.flat_grad = xp.ones(int(ends[-1]), dtype), xp.zeros(int(ends[-1]), dtype)
        rng, residual = np.random.default_rng(seed), (2 * config.n_block) ** -0.5
        self._parameters, start = {}, 0
        for (name, shape), end in zip(shapes.items(), ends.tolist(), strict=True):
            self._parameters[name] = self._view(start, end, shape)
            if len(shape) == 2 and seed is not None:
                scale = 0.02 * (residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
                weights = rng.standard_normal(end - start, np.float32)
                self.flat[start:end] = xp.asarray((weights * scale).astype(dtype))
            start = end
        self._assemble(self._parameters, self._joint)

    def _assemble(self, one, joint):
        """Put the parameters {name: Tensor} where they are used; joint(*names): matrices that one product serves."""
        xp, config = device.xp, self.config
        self.embed, self.norm = one["model.embed_tokens.weight"], one["model.norm.weight"]
        self.lm_head = self.embed if config.tie_embeddings else one["lm_head.weight"]
        self.blocks = [Block(one[at + "input_layernorm.weight"],
                             joint(*(at + f"self_attn.{x}_proj.weight" for x in "qkv")),
                             one[at + "self_attn.o_proj.weight"],
                             one[at + "post_attention_layernorm.weight"],
                             joint(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
                             one[at + "mlp.down_proj.weight"])
                       for at in (f"model.layers.{i}." for i in range(config.n_block))]
        # angle of pair i at position t: t · θ^(-2i/D), from one turn in 2π positions to one in 2πθ^(1-2/D)
        D = config.head_dim
        angles = np.outer(np.arange(config.max_context), np.tile(config.rope_theta ** (-np.arange(0, D, 2) / D), 2))
        self.cos, self.sin = (xp.asarray(table.astype(self.compute)) for table in (np.cos(angles), np.sin(angles)))

    def _view(self, start, end, shape):
        tensor = Tensor(self.flat[start:end].reshape(shape), requires_grad=True)
        tensor.grad = self.flat_grad[start:end].reshape(shape)
        return tensor

    def _joint(self, *names):
        """Matrices that lie side by side in the flat buffer, as one: the same memory, one product."""
        shapes, start = self.config.shapes(), 0
        for name, shape in shapes.items():
            if name == names[0]:
                break
            start += int(np.prod(shape))
        rows, columns = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        return self._view(start, start + rows * columns, (rows, columns))

    def parameters(self):
        """{Hugging Face name: Tensor}; data and grad are views of `flat` and `flat_grad`."""
        return dict(self._parameters)

    def _attend(self, i, h, cache):
        """Block i's attention on h (B, T, C): one product for q, k and v; RoPE; attention; one product back to C."""
        config, (B, T, C) = self.config, h.shape
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        start = cache.length if cache else 0
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        heads = linear(h, self.blocks[i].qkv).reshape(B, T, H + 2 * K, D).transpose(0, 2, 1, 3)  # (B, H+2K, T, D)
        turned, v = rope(heads[:, :H + K], cos, sin), heads[:, H + K:]
        q, k = turned[:, :H], turned[:, H:]
        if cache:
            k, v = cache.extend(i, k, v)                                                        # (B, K, S, D)
        out = attention(q, k, v).transpose(0, 2, 1, 3).reshape(B, T, C)
        return linear(out, self.blocks[i].o)

    def _block(self, i, drop, cache, h):
        """Block i on h (B, T, C): attention, then the gated linear unit, each added to h; dropout on what is added."""
        block, eps = self.blocks[i], self.config.eps
        h = h + drop(self._attend(i, rmsnorm(h, block.norm1, eps), cache), 2 * i + 1)
        gated = glu(linear(rmsnorm(h, block.norm2, eps), block.gate_up), activation=self.config.activation)
        return h + drop(linear(gated, block.down), 2 * i + 2)

    def hidden(self, ids, cache=None, drop=lambda h, place: h):
        """The last hidden state (B, T, C), normalised, of ids (B, T) that follow what `cache` has read.

        `drop` is dropout, by default none; `place` numbers its places in the model, so that each has its own mask.
        Raises IndexError for an id outside the vocabulary, ValueError for more positions than max_context.
        """
        h = embedding(self.embed, ids)
        end = (cache.length if cache else 0) + h.shape[1]
        if end > self.config.max_context:
            raise ValueError(f"{end} positions are more than max_context, {self.config.max_context}")
        h = drop(cast(h, self.compute), 0)
        for i in range(len(self.blocks)):
            block = functools.partial(self._block, i, drop, cache)
            h = recompute(block, h) if self.recompute else block(h)
        if cache:
            cache.length = end
        return rmsnorm(h, self.norm, self.config.eps)

    def __call__(self, ids):
        """ids (B, T) -> logits (B, T, V): position t's say what follows ids[:, :t + 1]."""
        return linear(self.hidden(ids), self.lm_head)

    def loss(self, ids, targets, p=0.0, key=()):
        """Mean cross-entropy in nats of targets (B, T), the ids that follow; a scalar Tensor.

        With p above 0 that share of the embedding, and of what each half block adds to it, is dropped; `key` (whole
        numbers) decides which.
        """
        drop = {"drop": lambda h, place: dropout(h, p, (*key, place))} if p else {}
        return linear_cross_entropy(self.hidden(ids, **drop), self.lm_head, targets)

    def first_not_finite(self, ids):
        """Where numbers stop being finite, in words: in which weights, activations or gradients."""
        finite = device.xp.isfinite
        for name, parameter in self.parameters().items():
            if not finite(parameter.data).all():
                return f"weights of {name}"
        with no_grad():
            h = cast(embedding(self.embed, ids), self.compute)
            for i in range(len(self.blocks)):
                h = self._block(i, lambda h, place: h, None, h)
                if not finite(h.data).all():
                    return f"activations after block {i}"
        for name, parameter in reversed(self.parameters().items()):     # backward runs from the last block to the first
            if not finite(parameter.grad).all():
                return f"gradient of {name}"
        return "loss"

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, stop_ids=(),
                 use_cache=True):
        """Yield up to max_new_tokens ids that continue `ids`: an int each for 1-D ids, an array (B,) for (B, T).

        `temperature` 0 is greedy; for top_k, top_p see `probabilities`. A stop id ends its row and is still yielded; a
        batch ends when all its rows have, until then an ended row repeats its stop id.
        The context holds max_context tokens. When one more comes, its oldest half is dropped and the rest is read
        again, with and without the cache: the positions of what is kept change, so no cached key would be right.
        Raises InputError for settings out of range, IndexError for ids outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.ndim not in (1, 2) or ids.size == 0:
            raise InputError(f"generate needs at least one token to continue, in shape (T,) or (B, T), not {ids.shape}")
        token_ids(ids, self.config.vocab_size)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens must be a whole number of at least 0, not {max_new_tokens}")
        if seed is not None and seed < 0:
            raise InputError(f"seed must be at least 0, not {seed}")
        check_sampling(temperature, top_k, top_p)
        ids, stop_ids = ids.astype(np.int64), list(stop_ids)    # our own: the caller may use up or change the others
        return self._generate(ids, max_new_tokens, temperature, top_k, top_p, seed, stop_ids, use_cache)

    def _generate(self, ids, max_new_tokens, temperature, top_k, top_p, seed, stop_ids, use_cache):
        rng, rows, start, cache = np.random.default_rng(seed), np.atleast_2d(ids), 0, None
        ended = np.zeros(len(rows), bool)
        for _ in range(max_new_tokens):
            new = rows[:, -1:]
            while rows.shape[1] - start > self.config.max_context:
                start, cache = start + max(self.config.max_context // 2, 1), None
            if cache is None:
                new = rows[:, start:]
                cache = KVCache(self.config, len(rows), self.compute) if use_cache else None
            with no_grad():
                last = self.hidden(new, cache)[:, -1]
                logits = device.to_host(linear(last, self.lm_head).data)        # (B, V)
            chosen = sample(logits, rng.random(len(rows)), temperature, top_k, top_p)
            chosen = np.where(ended, rows[:, -1], chosen)
            rows = np.concatenate([rows, chosen[:, None]], 1)
            ended |= [token in stop_ids for token in chosen.tolist()]
            yield int(chosen[0]) if ids.ndim == 1 else chosen
            if ended.all():
                return

    def save(self, folder, **settings):
        """Write config.json (with `settings` over its own, such as eos_token_id) and model.safetensors into folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(device.to_host(t.data)) for name, t in self._parameters.items()}
        replace_file(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
        config = json.dumps(self.config.to_hugging_face() | settings, indent=2) + "\n"
        replace_file(folder / "config.json", lambda path: path.write_text(config))

    @classmethod
    def load(cls, folder):
        """The model of a Hugging Face folder (config.json with model.safetensors, or its shards), Llama type only.

        `float16` and `bfloat16` weights are widened to float32. Raises InputError naming the file and what is wrong
        with it; nothing in a file is ever executed.
        """
        folder = Path(folder)
        config = Config.load(folder)
        bits = (read_json(folder / "config.json").get("quantization_config") or {}).get("bits")
        found = find_tensors(folder, config, bits)

        def read(name, dtype=np.float32):
            with safe_open(found[name], framework="numpy") as file, np.errstate(all="ignore"):
                weights = file.get_tensor(name).astype(dtype, copy=False)
            if not np.isfinite(weights).all():
                raise InputError(f"{found[name]}: {name} holds NaN or infinity, or more than a float32 can")
            return weights

        if bits:
            return cls._quantized(config, read, np.int8 if bits == 8 else np.uint8)
        model = cls(config, seed=None)
        for name, tensor in model._parameters.items():
            tensor.data[...] = device.xp.asarray(read(name))
        return model

    @classmethod
    def _quantized(cls, config, read, integers):
        """A model to evaluate and to generate with, not to train: `flat` is None, matrices stay integers."""
        model, shapes = cls.__new__(cls), config.shapes()
        model.config, model.compute, model.recompute = config, np.dtype(np.float32), False
        model.flat, model._parameters = None, {}

        def joint(*names):
            parts = [(read(name, integers), read(name + ".scale")) for name in names]
            return Quantized(*map(np.concatenate, zip(*parts, strict=True)), shapes[names[0]][1])
        one = {name: Tensor(read(name)) if len(shape) == 1 else joint(name) for name, shape in shapes.items()
               if not name.endswith(JOINT)}
        model._assemble(one, joint)
        return model
