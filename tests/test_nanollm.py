"""The model: its configuration, parameters and gradients, what it computes, and that no token sees a later one."""
import gc
import itertools
import math
import tracemalloc
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from tiny import every_model, lively, logits_of, random_ids, refused, small

from hardware import device
from hardware.device import to_host
from nanollm import Config, KVCache, NanoLLM

# ---------------------------------------------------------------- Config

WHOLE = ("vocab_size", "embedding_dim", "n_block", "n_head", "n_kv_head", "max_context", "hidden_dim")


def test_what_config_works_out():
    assert Config(100, n_head=4).n_kv_head == 4         # None: as many as query heads
    assert small().head_dim == 6 and small(head_dim=8).head_dim == 8


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        small().n_head = 2
    assert small() == small() != small(n_block=1) and hash(small()) == hash(small())


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -4, 4.0, "4", True, [4], float("nan"), np.int64(4), 10**12, 10**30, {}])
def test_whole_numbers(name, value):
    refused(lambda: small(**{name: value}), name, "whole number")


@pytest.mark.parametrize("name", [n for n in WHOLE if n != "n_kv_head"])
def test_none_is_not_a_number(name):
    refused(lambda: small(**{name: None}), name, "whole number")


@pytest.mark.parametrize("name", ["eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-6, float("nan"), float("inf"), "1e-6", None, True, [1.0], 10**400, 1e-320])
def test_numbers_above_0(name, value):
    refused(lambda: small(**{name: value}), name, "above 0")


@pytest.mark.parametrize("changes, words", [
    ({"embedding_dim": 26}, ("embedding_dim", "26", "n_head", "4", "multiple")),
    ({"embedding_dim": 12}, ("embedding_dim", "12", "n_head", "even")),
    *(({"head_dim": value}, ("head_dim", "even")) for value in (5, 0, -2, 4.5, True, "4", [4], 2**30)),
    ({"qkv_bias": 1}, ("qkv_bias", "True or False")), ({"qk_norm": None}, ("qk_norm", "True or False")),
    ({"qkv_bias": True, "qk_norm": True}, ("qkv_bias", "qk_norm", "exclude")),
    *(({"rope_scaling": value}, ("rope_scaling", "(factor, low < high, length)")) for value in (
        None, [8, 1, 4, 32], (8, 1, 4), (8, 4, 4, 32), (0, 1, 4, 32), (8, None, 4, 32), (8, 1, True, 32))),
    ({"n_kv_head": 3}, ("n_kv_head", "3", "n_head", "4", "divide")),
    ({"n_kv_head": 8}, ("n_kv_head", "8", "n_head", "divide")),
    ({"activation": "swish"}, ("activation", "silu", "sigmoid", "gelu", "relu", "'swish'")),
    ({"activation": None}, ("activation", "one of")), ({"activation": ["silu"]}, ("activation", "one of")),
    ({"tie_embeddings": 1}, ("tie_embeddings", "True or False")),
    ({"tie_embeddings": None}, ("tie_embeddings", "True or False")),
])
def test_rules_between_fields(changes, words):
    refused(lambda: small(**changes), *words)


# ---------------------------------------------------------------- parameters

def test_names_and_shapes_are_those_of_a_hugging_face_llama():
    c = small(n_block=1)
    block = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": (29, 24), "lm_head.weight": (29, 24), "model.norm.weight": (24,),
        block + "input_layernorm.weight": (24,), block + "post_attention_layernorm.weight": (24,),
        block + "self_attn.q_proj.weight": (24, 24), block + "self_attn.k_proj.weight": (12, 24),
        block + "self_attn.v_proj.weight": (12, 24), block + "self_attn.o_proj.weight": (24, 24),
        block + "mlp.gate_proj.weight": (20, 24), block + "mlp.up_proj.weight": (20, 24),
        block + "mlp.down_proj.weight": (24, 20)}
    assert {name: t.shape for name, t in NanoLLM(c).parameters().items()} == expected
    del expected["lm_head.weight"]
    tied = NanoLLM(small(n_block=1, tie_embeddings=True))
    assert {name: t.shape for name, t in tied.parameters().items()} == expected


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_gradients_are_views_into_two_flat_buffers(tied):
    model = NanoLLM(small(n_block=3, tie_embeddings=tied))
    parameters = model.parameters()
    weights = model.weights
    assert weights.flat.ndim == weights.grad.ndim == 1 and weights.flat.dtype == weights.grad.dtype == np.float32
    assert model.weights.flat.size == model.weights.grad.size == sum(math.prod(t.shape) for t in parameters.values())
    assert all(t.data.shape == t.grad.shape == t.shape for t in parameters.values())
    assert not to_host(model.weights.grad).any()

    model.weights.flat[...] = device.xp.arange(model.weights.flat.size)         # each element now says where it is
    model.weights.grad[...] = device.xp.arange(model.weights.flat.size) + 0.5
    start = {}
    for name, t in parameters.items():
        at = to_host(t.data).ravel()
        start[name] = int(at[0])
        assert (at == np.arange(at[0], at[0] + at.size)).all() and (to_host(t.grad).ravel() == at + 0.5).all()
        assert (at.max() < model.weights.n_matrix) == (len(t.shape) == 2), f"{name}: matrices first, then vectors"
    assert len(set(start.values())) == len(start)
    for block in range(3):
        at = f"model.layers.{block}."
        for pair in ("self_attn.q_proj", "self_attn.k_proj"), ("self_attn.k_proj", "self_attn.v_proj"), (
                     "mlp.gate_proj", "mlp.up_proj"):
            a, b = (at + name + ".weight" for name in pair)
            assert start[a] + math.prod(parameters[a].shape) == start[b]


def test_a_model_that_is_only_read_has_no_gradients(tmp_path):
    lively().save(tmp_path)
    read, trained = (NanoLLM.load(tmp_path, trainable).parameters() for trainable in (False, True))
    for name, (data, grad) in trained.items():
        assert (read[name].data == data).all() and read[name].grad is None and grad is not None


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 10}])
def test_one_tensor_for_each_memory(fields):
    """What a name gives is what the model multiplies by; nothing can be replaced that the model would then ignore."""
    model, ids = lively(small(**fields)), np.array([[1, 2, 3]])
    tensors = [model.embed, model.lm_head, model.norm, *(x for block in model.blocks for x in block if x)]
    spans = sorted((tensor.data.__array_interface__["data"][0], tensor.data.nbytes) for tensor in tensors) \
        if device.xp is np else [(0, model.weights.flat.nbytes)]
    assert sum(n for _, n in spans) == model.weights.flat.nbytes
    assert all(start + n <= following for (start, n), (following, _) in itertools.pairwise(spans))
    for name, parameter in model.parameters().items():
        with pytest.raises(AttributeError):
            parameter.data = parameter.data * 0
        with pytest.raises(AttributeError):
            parameter.grad = None
        before = logits_of(model, ids)
        parameter.data[...] *= 1.5
        assert (logits_of(model, ids) != before).any(), name
    model.loss(ids, ids).backward()
    assert all(to_host(parameter.grad).any() for parameter in model.parameters().values())


def test_gradients_keep_their_place_through_backward():
    model = NanoLLM(small())
    ids = random_ids(model.config, 2, 7)
    model.loss(ids, ids).backward()
    assert all(to_host(t.grad).any() for t in model.parameters().values())
    once = to_host(model.weights.grad).copy()
    model.loss(ids, ids).backward()
    np.testing.assert_allclose(to_host(model.weights.grad), 2 * once, rtol=1e-4, atol=1e-7)
    model.weights.grad[...] = 0                                        # how an optimizer clears them all
    assert not any(to_host(t.grad).any() for t in model.parameters().values())


def test_weights_are_a_pure_function_of_the_seed():
    flat = [to_host(NanoLLM(small(), seed=seed).weights.flat) for seed in (5, 5, 6)]
    assert (flat[0] == flat[1]).all() and (flat[0] != flat[2]).any()
    assert (to_host(NanoLLM(small()).weights.flat) == to_host(NanoLLM(small(), seed=0).weights.flat)).all()


@pytest.mark.parametrize("n_block, fields", [(1, {}), (8, {"qkv_bias": True}), (1, {"qk_norm": True})])
def test_initial_weights(n_block, fields):
    model = NanoLLM(Config(500, embedding_dim=64, n_block=n_block, n_head=4, hidden_dim=96, max_context=8, **fields))
    for name, t in model.parameters().items():
        weights = to_host(t.data)
        if len(t.shape) == 1:
            assert (weights == (0 if name.endswith(".bias") else 1)).all()
            continue
        writes_into_h = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / math.sqrt(2 * n_block) if writes_into_h else 0.02
        assert abs(weights.std() / expected - 1) < 5 / math.sqrt(2 * weights.size), name    # 5 standard errors
        assert abs(weights.mean()) < 5 * expected / math.sqrt(weights.size), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_near_ln_V(tied):
    config = Config(3000, embedding_dim=64, n_block=4, n_head=4, hidden_dim=128, max_context=64, tie_embeddings=tied)
    loss = NanoLLM(config).loss(random_ids(config, 4, 64), random_ids(config, 4, 64, seed=2))
    assert loss.shape == () and abs(float(loss.data) - math.log(3000)) < 0.05


# ---------------------------------------------------------------- what the model computes

def plain(model, ids):
    """The logits by the definition: one head and one row at a time, RoPE as a complex multiplication."""
    c, w = model.config, {name: to_host(t.data).astype(np.float64) for name, t in model.parameters().items()}
    H, K, D, T = c.n_head, c.n_kv_head, c.head_dim, ids.shape[1]
    activate = {"silu": lambda x: x / (1 + np.exp(-x)), "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
                "gelu": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
                "relu": lambda x: np.where(x > 0, x, 0)}[c.activation]

    def angle(i):
        a = c.rope_theta ** (-2 * i / D)
        if not c.rope_scaling:
            return a
        factor, low, high, length = c.rope_scaling      # as Meta computes it
        turns = length / (2 * np.pi / a)
        if turns > high:
            return a
        if turns < low:
            return a / factor
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * a / factor + smooth * a
    spin = np.exp(1j * np.outer(np.arange(T), [angle(i) for i in range(D // 2)]))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.eps) * w[name]

    def turned(x):
        z = (x[:, :D // 2] + 1j * x[:, D // 2:]) * spin
        return np.concatenate([z.real, z.imag], 1)

    def heads(x, name, n):
        parts = np.split(x @ w[name + "_proj.weight"].T + w.get(name + "_proj.bias", 0), n, axis=1)
        return [norm(part, name + "_norm.weight") for part in parts] if name + "_norm.weight" in w else parts

    rows = []
    for row in ids:
        h = w["model.embed_tokens.weight"][row]
        for at in (f"model.layers.{i}." for i in range(c.n_block)):
            n, mixed = norm(h, at + "input_layernorm.weight"), []
            q, k, v = (heads(n, f"{at}self_attn.{x}", m) for x, m in zip("qkv", (H, K, K), strict=True))
            for head in range(H):
                scores = turned(q[head]) @ turned(k[head // (H // K)]).T / math.sqrt(D)
                p = np.exp(scores) * np.tri(T)
                mixed.append(p / p.sum(1, keepdims=True) @ v[head // (H // K)])
            h = h + np.concatenate(mixed, 1) @ w[at + "self_attn.o_proj.weight"].T
            n = norm(h, at + "post_attention_layernorm.weight")
            gate, up = (n @ w[f"{at}mlp.{x}_proj.weight"].T for x in ("gate", "up"))
            h = h + (activate(gate) * up) @ w[at + "mlp.down_proj.weight"].T
        head = "model.embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"
        rows.append(norm(h, "model.norm.weight") @ w[head].T)
    return np.stack(rows)


@every_model
def test_logits_and_loss_follow_the_definition(fields, kind):
    config = small(**{"rope_theta": 50.0, "eps": 1e-2} | fields)
    model = lively(config, dtype=np.float64)
    ids, targets = random_ids(config, 2, 9), random_ids(config, 2, 9, seed=2)
    expected = plain(model, ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits_of(model, ids), expected, rtol=1e-9, atol=1e-9)
    log_sum = np.log(np.exp(expected).sum(-1))
    loss = (log_sum - np.take_along_axis(expected, targets[..., None], 2)[..., 0]).mean()
    np.testing.assert_allclose(float(model.loss(ids, targets).data), loss, rtol=1e-9)


@every_model
def test_gradient_along_random_directions(fields, kind):
    """(loss(w + hd) - loss(w - hd)) / 2h = gradient · d, in float64, for a random d in each parameter and in all."""
    config = small(**{"vocab_size": 11, "hidden_dim": 10} | fields)
    model, rng = lively(config, dtype=np.float64), np.random.default_rng(3)
    model.weights.flat *= 0.6                                               # a smoother function: a smaller h² error
    ids, targets = random_ids(config, 2, 6), random_ids(config, 2, 6, seed=2)
    model.loss(ids, targets).backward()
    assert model.weights.grad.dtype == np.float64
    before, gradient, h = model.weights.flat.copy(), to_host(model.weights.grad), 1e-6
    start, directions = 0, {"all": rng.standard_normal(before.size)}
    for name, t in model.parameters().items():
        end = start + math.prod(t.shape)
        directions[name] = np.zeros(before.size)
        directions[name][start:end] = rng.standard_normal(end - start)
        start = end
    for name, d in directions.items():
        loss = []
        for sign in (1, -1):
            model.weights.flat[...] = before + device.xp.asarray(sign * h * d)
            loss.append(float(model.loss(ids, targets).data))
        numeric = (loss[0] - loss[1]) / (2 * h)
        assert abs(numeric) > 1e-5
        assert gradient @ d == pytest.approx(numeric, rel=1e-5, abs=1e-8), name


def test_micro_batches_add_up_to_one_big_batch():
    model = lively(small(n_block=3))
    model.weights.flat *= 0.5                                               # softmax far from saturation: less rounding
    ids, targets = random_ids(model.config, 8, 16), random_ids(model.config, 8, 16, seed=2)
    model.loss(ids, targets).backward()
    big = to_host(model.weights.grad).astype(np.float64)
    model.weights.grad[...] = 0
    for part in np.split(np.arange(8), 4):
        (model.loss(ids[part], targets[part]) * (1 / 4)).backward()
    difference = np.linalg.norm(to_host(model.weights.grad) - big) / np.linalg.norm(big)
    assert difference < 1e-6


def test_one_batch_can_be_overfitted():
    config = small(tie_embeddings=True)
    model, xp = NanoLLM(config), device.xp
    ids, targets = random_ids(config, 2, 16), random_ids(config, 2, 16, seed=2)
    m, v = xp.zeros_like(model.weights.flat), xp.zeros_like(model.weights.flat)
    first = float(model.loss(ids, targets).data)
    for step in range(1, 81):
        model.weights.grad[...] = 0
        model.loss(ids, targets).backward()
        m += 0.1 * (model.weights.grad - m)
        v += 0.01 * (model.weights.grad**2 - v)
        model.weights.flat -= 0.02 * (m / (1 - 0.9**step)) / (xp.sqrt(v / (1 - 0.99**step)) + 1e-8)
    assert first > 3 and float(model.loss(ids, targets).data) < 0.01
    assert (logits_of(model, ids).argmax(-1) == targets).all()


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_memory_goes_back_without_the_garbage_collector(n_kv_head):
    model = NanoLLM(small(embedding_dim=64, hidden_dim=96, n_kv_head=n_kv_head))
    ids = random_ids(model.config, 4, 16)

    def held():
        if device.on_gpu:
            return device.xp.get_default_memory_pool().used_bytes()
        return tracemalloc.get_traced_memory()[0]

    def step():
        model.loss(ids, ids).backward()
        list(model.generate(ids, 4))

    step()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        step()
        before = held()
        loss = model.loss(ids, ids)
        graph = held() - before
        loss.backward()                                             # takes the graph apart although `loss` lives on
        after_backward = held() - before
        del loss
        for _ in range(3):
            step()
        abandoned = model.loss(ids, ids)
        del abandoned                                               # a graph without a backward pass
        cycles = gc.collect()           # none were made: this empties Python's stock of small tuples, no more
        left = held() - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert graph > 100_000                                          # there was something to give back
    assert after_backward < graph / 20 and left < graph / 100 and cycles == 0, (graph, after_backward, left, cycles)


def test_bad_ids_are_refused():
    model = NanoLLM(small())
    for ids, error in ([[0, 29]], IndexError), ([[-1, 0]], IndexError), ([[0.0, 1.0]], TypeError), (
                       [[0] * 17], ValueError):
        with pytest.raises(error):
            model(np.array(ids))
    with pytest.raises(IndexError):
        model.loss(np.array([[0, 1]]), np.array([[0, 29]]))
    assert logits_of(model, np.array([[0] * 16])).shape == (1, 16, 29)


# ---------------------------------------------------------------- no token sees a later one

@pytest.mark.parametrize("T", [16, 140])                            # 140: more than one block of queries
def test_changing_a_token_leaves_the_logits_before_it_bit_identical(T):
    model = lively(small(max_context=T))
    ids = random_ids(model.config, 2, T)
    before = logits_of(model, ids)
    for t in (0, 1, T // 2, T - 2, T - 1):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        after = logits_of(model, changed)
        assert (after[:, :t] == before[:, :t]).all()
        assert (after[:, t:] != before[:, t:]).any(-1).all()        # and every later position sees it


def test_changing_a_token_changes_nothing_before_it_with_the_cache_either():
    """Positions 0-4 are read at once, then 5-9 at once, then one at a time, as generation does."""
    model = lively()

    def read(ids):
        cache = KVCache(model.config, len(ids), model.weights.flat.dtype)
        return [to_host(model.hidden(ids[:, start:end], cache).data)
                for start, end in [(0, 5), (5, 10), *((t, t + 1) for t in range(10, 16))]]
    ids = random_ids(model.config, 2, 16)
    before = np.concatenate(read(ids), 1)
    np.testing.assert_allclose(before, to_host(model.hidden(ids).data), atol=1e-4)
    for t in (0, 3, 6, 9, 12, 15):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        after = np.concatenate(read(changed), 1)
        assert (after[:, :t] == before[:, :t]).all() and (after[:, t:] != before[:, t:]).any(-1).all()
