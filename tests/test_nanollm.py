"""The model: its parameters and gradients, causality, generation with and without the cache, folders and bad ones."""
import gc
import itertools
import json
import math
import os
import re
import shutil
import struct
import tracemalloc
from dataclasses import FrozenInstanceError, asdict, fields

import numpy as np
import pytest
from conftest import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import nanollm
from autograd import ACTIVATIONS, Tensor, recording
from hardware import device
from hardware.device import to_host
from nanollm import Config, KVCache, NanoLLM, probabilities, sample
from storage.files import InputError

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def small(**changes):
    return Config(**{"vocab_size": 29, "embedding_dim": 24, "n_block": 2, "n_head": 4, "n_kv_head": 2,
                     "max_context": 16, "hidden_dim": 20, "eps": 1e-5} | changes)


def lively(config=None, seed=0, dtype=np.float32):
    """A model whose weights are large enough that every part of it shows in the logits; no norm weight is 1."""
    model, rng = NanoLLM(config or small(), dtype=dtype), np.random.default_rng(seed)
    weights = rng.standard_normal(model.flat.size) * 0.4
    weights[model.n_matrix:] += 1
    model.flat[...] = device.xp.asarray(weights.astype(dtype))
    return model


def random_ids(config, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def logits_of(model, ids):
    return to_host(model(ids).data)


def refused(call, *words):
    """call() raises InputError with one line that has all these words in it."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message and message.isprintable(), f"not one clean line: {message!r}"
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}", message), f"{word!r} is not named in: {message}"


# ---------------------------------------------------------------- Config

WHOLE = ("vocab_size", "embedding_dim", "n_block", "n_head", "n_kv_head", "max_context", "hidden_dim")


def test_config_has_the_documented_fields_and_defaults():
    assert asdict(Config(100)) == {
        "vocab_size": 100, "embedding_dim": 512, "n_block": 6, "n_head": 8, "n_kv_head": 8, "max_context": 512,
        "hidden_dim": 2048, "eps": 1e-6, "rope_theta": 10000.0, "activation": "silu", "tie_embeddings": False}
    assert Config(100, n_head=4).n_kv_head == 4         # None: as many as query heads
    assert small().head_dim == 6


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        small().n_head = 2
    assert small() == small() != small(n_block=1) and hash(small()) == hash(small())


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -4, 4.0, "4", True, [4], float("nan"), np.int64(4), 10**12, 10**30, {}])
def test_whole_numbers(name, value):
    refused(lambda: small(**{name: value}), name, "whole number")


@pytest.mark.parametrize("name", [n for n in WHOLE if n != "n_kv_head"])
def test_none_is_no_number(name):
    refused(lambda: small(**{name: None}), name, "whole number")


@pytest.mark.parametrize("name", ["eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-6, float("nan"), float("inf"), "1e-6", None, True, [1.0], 10**400, 1e-320])
def test_numbers_above_0(name, value):
    refused(lambda: small(**{name: value}), name, "above 0")


@pytest.mark.parametrize("changes, words", [
    ({"embedding_dim": 26}, ("embedding_dim", "26", "n_head", "4", "multiple")),        # heads of 6.5
    ({"embedding_dim": 12}, ("embedding_dim", "12", "n_head", "even")),                 # heads of 3
    ({"n_kv_head": 3}, ("n_kv_head", "3", "n_head", "4", "divide")),
    ({"n_kv_head": 8}, ("n_kv_head", "8", "n_head", "divide")),
    ({"activation": "swish"}, ("activation", "silu", "sigmoid", "gelu", "relu", "'swish'")),
    ({"activation": None}, ("activation", "one of")), ({"activation": ["silu"]}, ("activation", "one of")),
    ({"tie_embeddings": 1}, ("tie_embeddings", "True or False")),
    ({"tie_embeddings": None}, ("tie_embeddings", "True or False")),
])
def test_rules_between_fields(changes, words):
    refused(lambda: small(**changes), *words)


anything = st.one_of(st.none(), st.booleans(), st.integers(-2, 16), st.integers(), st.floats(), st.text(max_size=3),
                     st.lists(st.integers(), max_size=2))
some_fields = st.fixed_dictionaries({"vocab_size": st.integers(1, 50)}, optional={
    f.name: st.one_of(st.integers(1, 8), st.sampled_from([2, 4, 8]), anything) for f in fields(Config)[1:]})


@quick
@given(some_fields)
def test_any_values_make_a_config_or_an_input_error(values):
    try:
        config = Config(**values)
    except InputError as problem:
        assert any(f.name in str(problem) for f in fields(Config))
        return
    assert config.embedding_dim == config.n_head * config.head_dim and config.head_dim % 2 == 0
    assert config.n_head % config.n_kv_head == 0 and config.eps > 0 and config.activation in ACTIVATIONS
    assert Config.from_hugging_face(json.loads(json.dumps(config.to_hugging_face()))) == config


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
    assert model.flat.ndim == model.flat_grad.ndim == 1 and model.flat.dtype == model.flat_grad.dtype == np.float32
    assert model.flat.size == model.flat_grad.size == sum(math.prod(t.shape) for t in parameters.values())
    assert all(t.requires_grad and t.grad is not None and t.grad.shape == t.shape for t in parameters.values())
    assert not to_host(model.flat_grad).any()

    model.flat[...] = device.xp.arange(model.flat.size)         # each element now says where it is
    model.flat_grad[...] = device.xp.arange(model.flat.size) + 0.5
    start = {}
    for name, t in parameters.items():
        at = to_host(t.data).ravel()
        start[name] = int(at[0])
        assert (at == np.arange(at[0], at[0] + at.size)).all() and (to_host(t.grad).ravel() == at + 0.5).all()
        assert (at.max() < model.n_matrix) == (len(t.shape) == 2), f"{name}: matrices first, then vectors"
    assert len(set(start.values())) == len(start)
    for block in range(3):
        at = f"model.layers.{block}."
        for pair in ("self_attn.q_proj", "self_attn.k_proj"), ("self_attn.k_proj", "self_attn.v_proj"), (
                     "mlp.gate_proj", "mlp.up_proj"):
            a, b = (at + name + ".weight" for name in pair)
            assert start[a] + math.prod(parameters[a].shape) == start[b]


def test_gradients_keep_their_place_through_backward():
    model = NanoLLM(small())
    ids = random_ids(model.config, 2, 7)
    model.loss(ids, ids).backward()
    assert all(to_host(t.grad).any() for t in model.parameters().values())
    once = to_host(model.flat_grad).copy()
    model.loss(ids, ids).backward()
    np.testing.assert_allclose(to_host(model.flat_grad), 2 * once, rtol=1e-4, atol=1e-7)
    model.flat_grad[...] = 0                                        # how an optimizer clears them all
    assert not any(to_host(t.grad).any() for t in model.parameters().values())


def test_weights_are_a_pure_function_of_the_seed():
    flat = [to_host(NanoLLM(small(), seed=seed).flat) for seed in (5, 5, 6)]
    assert (flat[0] == flat[1]).all() and (flat[0] != flat[2]).any()
    assert (to_host(NanoLLM(small()).flat) == to_host(NanoLLM(small(), seed=0).flat)).all()


@pytest.mark.parametrize("n_block", [1, 8])
def test_initial_weights(n_block):
    model = NanoLLM(Config(500, embedding_dim=64, n_block=n_block, n_head=4, hidden_dim=96, max_context=8))
    for name, t in model.parameters().items():
        weights = to_host(t.data)
        if len(t.shape) == 1:
            assert (weights == 1).all()
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
    """The logits by the definition, a head and a row at a time, RoPE as a complex multiplication."""
    c, w = model.config, {name: to_host(t.data).astype(np.float64) for name, t in model.parameters().items()}
    H, K, D, T = c.n_head, c.n_kv_head, c.head_dim, ids.shape[1]
    activate = {"silu": lambda x: x / (1 + np.exp(-x)), "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
                "gelu": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
                "relu": lambda x: np.where(x > 0, x, 0)}[c.activation]
    spin = np.exp(1j * np.outer(np.arange(T), [c.rope_theta ** (-2 * i / D) for i in range(D // 2)]))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.eps) * w[name]

    def turned(x):
        z = (x[:, :D // 2] + 1j * x[:, D // 2:]) * spin
        return np.concatenate([z.real, z.imag], 1)

    def heads(x, name, n):
        return np.split(x @ w[name].T, n, axis=1)

    rows = []
    for row in ids:
        h = w["model.embed_tokens.weight"][row]
        for at in (f"model.layers.{i}." for i in range(c.n_block)):
            n, mixed = norm(h, at + "input_layernorm.weight"), []
            q, k, v = (heads(n, f"{at}self_attn.{x}_proj.weight", m) for x, m in zip("qkv", (H, K, K), strict=True))
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


SHAPES = list(itertools.product(ACTIVATIONS, (4, 2, 1), (False, True)))
every_shape = pytest.mark.parametrize("activation, n_kv_head, tied", SHAPES)


@every_shape
def test_logits_and_loss_follow_the_definition(activation, n_kv_head, tied):
    config = small(activation=activation, n_kv_head=n_kv_head, tie_embeddings=tied, rope_theta=50.0, eps=1e-2)
    model = lively(config, dtype=np.float64)
    ids, targets = random_ids(config, 2, 9), random_ids(config, 2, 9, seed=2)
    expected = plain(model, ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits_of(model, ids), expected, rtol=1e-9, atol=1e-9)
    log_sum = np.log(np.exp(expected).sum(-1))
    loss = (log_sum - np.take_along_axis(expected, targets[..., None], 2)[..., 0]).mean()
    np.testing.assert_allclose(float(model.loss(ids, targets).data), loss, rtol=1e-9)


@every_shape
def test_gradient_along_random_directions(activation, n_kv_head, tied):
    """(loss(w + hd) - loss(w - hd)) / 2h = gradient · d, in float64, for a random d in each parameter and in all."""
    config = small(activation=activation, n_kv_head=n_kv_head, tie_embeddings=tied, vocab_size=11, hidden_dim=10)
    model, rng = lively(config, dtype=np.float64), np.random.default_rng(3)
    model.flat *= 0.6                                               # a smoother function: a smaller h² error
    ids, targets = random_ids(config, 2, 6), random_ids(config, 2, 6, seed=2)
    model.loss(ids, targets).backward()
    assert model.flat_grad.dtype == np.float64
    before, gradient, h = model.flat.copy(), to_host(model.flat_grad), 1e-6
    start, directions = 0, {"all": rng.standard_normal(before.size)}
    for name, t in model.parameters().items():
        end = start + math.prod(t.shape)
        directions[name] = np.zeros(before.size)
        directions[name][start:end] = rng.standard_normal(end - start)
        start = end
    for name, d in directions.items():
        loss = []
        for sign in (1, -1):
            model.flat[...] = before + device.xp.asarray(sign * h * d)
            loss.append(float(model.loss(ids, targets).data))
        numeric = (loss[0] - loss[1]) / (2 * h)
        assert abs(numeric) > 1e-5
        assert gradient @ d == pytest.approx(numeric, rel=1e-5, abs=1e-8), name


def test_micro_batches_add_up_to_one_big_batch():
    model = lively(small(n_block=3))
    model.flat *= 0.5                                               # softmax far from saturation: less rounding
    ids, targets = random_ids(model.config, 8, 16), random_ids(model.config, 8, 16, seed=2)
    model.loss(ids, targets).backward()
    big = to_host(model.flat_grad).astype(np.float64)
    model.flat_grad[...] = 0
    for part in np.split(np.arange(8), 4):
        (model.loss(ids[part], targets[part]) * (1 / 4)).backward()
    difference = np.linalg.norm(to_host(model.flat_grad) - big) / np.linalg.norm(big)
    assert difference < 1e-6


def test_one_batch_can_be_overfitted():
    config = small(tie_embeddings=True)
    model, xp = NanoLLM(config), device.xp
    ids, targets = random_ids(config, 2, 16), random_ids(config, 2, 16, seed=2)
    m, v = xp.zeros_like(model.flat), xp.zeros_like(model.flat)
    first = float(model.loss(ids, targets).data)
    for step in range(1, 81):
        model.flat_grad[...] = 0
        model.loss(ids, targets).backward()
        m += 0.1 * (model.flat_grad - m)
        v += 0.01 * (model.flat_grad**2 - v)
        model.flat -= 0.02 * (m / (1 - 0.9**step)) / (xp.sqrt(v / (1 - 0.99**step)) + 1e-8)
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
        loss.backward()                                             # takes the graph apart though `loss` lives on
        after_backward = held() - before
        del loss
        for _ in range(3):
            step()
        abandoned = model.loss(ids, ids)
        del abandoned                                               # a graph that nobody runs backwards
        left = held() - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert graph > 100_000                                          # there was something to give back
    assert after_backward < graph / 20 and left < graph / 20, (graph, after_backward, left)


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
        assert (after[:, t:] != before[:, t:]).any(-1).all()        # and every later position does see it


def test_nor_does_it_with_the_cache():
    """Positions 0-4 are read at once, then 5-9 at once, then one at a time, as generation does."""
    model = lively()

    def read(ids):
        cache = KVCache(model.config, len(ids), model.flat.dtype)
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


# ---------------------------------------------------------------- generation

@pytest.fixture
def seen_logits(monkeypatch):
    """Every logits array that generation samples from, in order."""
    seen = []

    def recorder(logits, *args, **kwargs):
        seen.append(np.array(logits))
        return sample(logits, *args, **kwargs)
    monkeypatch.setattr(nanollm, "sample", recorder)
    return seen


def context(length, max_context):
    """Where what the model sees of `length` tokens begins: halves of max_context are dropped until the rest fits."""
    start, half = 0, max(max_context // 2, 1)
    while length - start > max_context:
        start += half
    return start


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("max_context, prompt", [(16, 1), (16, 5), (16, 16), (16, 17), (16, 60), (5, 4), (7, 9), (2, 1),
                                                 (1, 1), (1, 3)])
def test_generation_reads_the_context_by_the_rule_with_and_without_cache(seen_logits, use_cache, max_context, prompt):
    """The context holds max_context tokens; when one more comes, the oldest half is dropped and the rest read anew."""
    model = lively(small(max_context=max_context))
    ids = random_ids(model.config, 3, prompt)
    steps = 2 * max_context + 3                                     # the context slides at least twice
    new = np.stack(list(model.generate(ids, steps, seed=1, use_cache=use_cache)), 1)
    assert new.shape == (3, steps) and len(seen_logits) == steps
    text = np.concatenate([ids, new], 1)
    for i, got in enumerate(seen_logits):
        length = prompt + i
        expected = logits_of(model, text[:, context(length, max_context):length])[:, -1]
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_cached_or_not_alone_or_in_a_batch_the_logits_are_the_same(n_kv_head, monkeypatch):
    """Over four times the context, of which the oldest half is dropped again and again; what is sampled is given."""
    model, rows, steps = lively(small(n_kv_head=n_kv_head, max_context=8)), 2, 4 * 8
    ids, text = random_ids(model.config, rows, 5), random_ids(model.config, rows, steps, seed=2)

    def logits(rows, use_cache):
        seen = []
        monkeypatch.setattr(nanollm, "sample", lambda z, *_: seen.append(np.array(z)) or text[rows, len(seen) - 1])
        new = np.stack(list(model.generate(ids[rows], steps, use_cache=use_cache)), 1)
        assert (new == text[rows]).all()
        return np.stack(seen, 1)                                    # (B, steps, V)
    batch = logits(slice(None), True)
    assert batch.shape == (rows, steps, 29) and batch.std() > 0.1
    np.testing.assert_allclose(logits(slice(None), False), batch, atol=1e-4)
    for use_cache in (True, False):
        for i in range(rows):
            np.testing.assert_allclose(logits(slice(i, i + 1), use_cache), batch[i:i + 1], atol=1e-4)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_k": 5, "temperature": 0.7},
                                     {"seed": 3, "top_p": 0.8}])
def test_the_cache_changes_nothing(options):
    model = lively()
    ids = random_ids(model.config, 6)
    cached = list(model.generate(ids, 40, **options))
    assert cached == list(model.generate(ids, 40, use_cache=False, **options))
    assert len(cached) == 40 and len(set(cached)) > 3


def test_greedy_takes_the_largest_logit(seen_logits):
    model = lively()
    new = list(model.generate(random_ids(model.config, 6), 30, temperature=0))
    assert new == [int(logits.argmax()) for logits in seen_logits]
    assert new == list(model.generate(random_ids(model.config, 6), 30, top_k=1, seed=9))


def test_a_row_of_a_batch_is_generated_as_if_alone():
    model = lively()
    ids = random_ids(model.config, 5, 6)
    batch = np.stack(list(model.generate(ids, 25, temperature=0)), 1)
    assert len({tuple(row) for row in batch}) == 5
    for row, together in zip(ids, batch, strict=True):
        alone = list(model.generate(row, 25, temperature=0))
        assert alone == together.tolist() and all(type(token) is int for token in alone)
    single, batch_of_one = (list(model.generate(x, 25, seed=4)) for x in (ids[0], ids[:1]))
    assert [[token] for token in single] == [tokens.tolist() for tokens in batch_of_one]


def test_stop_ids_end_a_single_text_and_are_yielded():
    model = lively()
    ids = random_ids(model.config, 6)
    free = list(model.generate(ids, 40, temperature=0))
    for stop in set(free):
        assert list(model.generate(ids, 40, temperature=0, stop_ids=[stop])) == free[:free.index(stop) + 1]
    first = min(free.index(free[12]), free.index(free[20]))
    for both in ((free[12], free[20]), {free[12], free[20]}, iter([free[20], free[12]])):
        assert list(model.generate(ids, 40, temperature=0, stop_ids=both)) == free[:first + 1]
    never = next(t for t in range(29) if t not in free)
    assert list(model.generate(ids, 40, temperature=0, stop_ids=[never, 1000, -1])) == free


def test_stop_ids_end_each_row_of_a_batch_by_itself():
    model = lively()
    ids = random_ids(model.config, 6, 5)
    free = np.stack(list(model.generate(ids, 30, temperature=0)), 1)
    stop = int(free[0, 3])
    rows = [row.tolist() for row in free]
    ends = [row.index(stop) if stop in row else 29 for row in rows]
    assert min(ends) < max(ends)                                    # some rows end before others
    new = np.stack(list(model.generate(ids, 30, temperature=0, stop_ids=[stop])), 1)
    assert new.shape[1] == max(ends) + 1
    for row, got, end in zip(rows, new.tolist(), ends, strict=True):
        assert got == row[:end + 1] + [stop] * (max(ends) - end)
    finished = [i for i, row in enumerate(rows) if stop in row]
    short = np.stack(list(model.generate(ids[finished], 30, temperature=0, stop_ids=[stop])), 1)
    assert short.shape[1] == max(ends[i] for i in finished) + 1     # all have ended: nothing more is generated


def test_seeds():
    model, ids = lively(), np.array([1, 2, 3])
    a, b, c = (list(model.generate(ids, 30, seed=seed)) for seed in (7, 7, 8))
    assert a == b != c
    assert list(model.generate(ids, 30)) != list(model.generate(ids, 30))       # no seed: another text each time
    twins = np.stack(list(model.generate(np.stack([ids, ids]), 30, seed=7)), 1)
    assert (twins[0] != twins[1]).any()                             # each row draws for itself
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    list(model.generate(ids, 3))
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.6},
                                     {"temperature": 1.5, "top_k": 6, "top_p": 0.7}])
def test_generated_tokens_have_the_distribution_asked_for(options):
    model, n = lively(), 4000
    model.flat *= 0.75
    ids = np.tile(random_ids(model.config, 1, 4), (n, 1))
    p = expected_distribution(logits_of(model, ids[:1])[0, -1].astype(np.float64), **options)
    counts = np.bincount(next(model.generate(ids, 1, seed=5, **options)), minlength=29)
    assert (counts[p == 0] == 0).all() and (p > 0.01).sum() >= 3
    assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()      # 5 standard deviations


def test_every_token_of_every_row_is_drawn_by_itself():
    model = NanoLLM(small())
    model.flat[...] = 0                                             # all tokens are equally likely
    text = np.stack(list(model.generate(np.zeros((100, 1), int), 50, seed=0)), 1)
    assert (abs(np.bincount(text.ravel(), minlength=29) - 5000 / 29) < 5 * math.sqrt(5000 / 29)).all()
    for a, b in (text[1:], text[:-1]), (text[:, 1:], text[:, :-1]), (text[1:, 1:], text[:-1, :-1]):
        assert abs((a == b).mean() - 1 / 29) < 5 * math.sqrt(1 / 29 / a.size)


def test_it_yields_as_it_goes_and_stops_at_the_number_asked_for():
    model, ids = lively(), np.array([3, 4])
    stream = model.generate(ids, 10**9, temperature=0)
    first = [next(stream) for _ in range(5)]
    stream.close()
    assert first == list(model.generate(ids, 5, temperature=0))
    assert list(model.generate(ids, 0)) == []
    assert list(model.generate([3, 4], 5, temperature=0)) == first
    for dtype in (np.uint8, np.uint16, np.int32, np.uint64):
        assert list(model.generate(ids.astype(dtype), 5, temperature=0)) == first
        assert list(model.generate(ids.astype(dtype), 5, temperature=0, use_cache=False)) == first


def test_what_the_caller_does_to_the_arrays_changes_nothing():
    model = lively()
    ids = random_ids(model.config, 2, 5)
    free = [tokens.copy() for tokens in model.generate(ids, 8, temperature=0)]
    stop = int(free[3][0])
    expected = np.stack([t.copy() for t in model.generate(ids, 8, temperature=0, stop_ids=[stop])])
    mine, got = ids.copy(), []
    stream = model.generate(mine, 8, temperature=0, stop_ids=[stop])
    mine[...] = 0
    for tokens in stream:
        got.append(tokens.copy())
        tokens[...] = stop
    assert np.array_equal(np.stack(got), expected)


def test_generation_records_nothing_and_leaves_recording_as_it_was():
    model = lively()
    ids = random_ids(model.config, 1, 6)
    x = Tensor([1.0], requires_grad=True)
    model.loss(ids, ids).backward()
    expected = to_host(model.flat_grad).copy()
    model.flat_grad[...] = 0
    for _ in model.generate(ids, 3):                                # between two tokens the caller may train
        assert recording(x)
        model.loss(ids, ids).backward()
        np.testing.assert_array_equal(to_host(model.flat_grad), expected)
        model.flat_grad[...] = 0
    with nanollm.no_grad():
        for _ in model.generate(ids, 3):
            assert not recording(x)
        assert not recording(x)
    assert recording(x)


@pytest.mark.parametrize("ids, count, options, words", [
    ([], 1, {}, ["token"]), ([[]], 1, {}, ["token"]), (3, 1, {}, ["(T,)"]), ([[[1]]], 1, {}, ["(B, T)"]),
    ([1], -1, {}, ["max_new_tokens", "-1"]), ([1], 1.5, {}, ["max_new_tokens"]), ([1], None, {}, ["max_new_tokens"]),
    ([1], 1, {"temperature": -0.1}, ["temperature"]), ([1], 1, {"temperature": float("nan")}, ["temperature"]),
    ([1], 1, {"temperature": float("inf")}, ["temperature"]), ([1], 1, {"top_k": 0}, ["top_k"]),
    ([1], 1, {"top_k": -3}, ["top_k"]), ([1], 1, {"top_k": 2.5}, ["top_k"]), ([1], 1, {"top_p": 0.0}, ["top_p"]),
    ([1], 1, {"top_p": 1.01}, ["top_p"]), ([1], 1, {"top_p": float("nan")}, ["top_p"]),
    ([1], 1, {"seed": -1}, ["seed"]),
])
def test_settings_are_checked_at_the_call_not_at_the_first_token(ids, count, options, words):
    model = NanoLLM(small())
    refused(lambda: model.generate(np.array(ids, int), count, **options), *words)   # nobody asks for a token


def test_ids_are_checked_at_the_call():
    model = NanoLLM(small())
    for ids, error in ([1, 29], IndexError), ([-1], IndexError), ([0.5], TypeError):
        with pytest.raises(error):
            model.generate(np.array(ids), 1)


# ---------------------------------------------------------------- sampling

def expected_distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """What temperature, top_k and top_p mean, token by token."""
    weight = np.exp((logits - logits.max()) / temperature)
    likeliest = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    kept, share = [], 0.0
    for i in likeliest:
        kept.append(i)
        share += weight[i]
        if top_p is not None and share >= top_p * weight[likeliest].sum():
            break
    p = np.zeros(len(logits))
    p[kept] = weight[kept] / weight[kept].sum()
    return p


sampling_options = st.fixed_dictionaries({}, optional={
    "temperature": st.floats(0.1, 10), "top_k": st.integers(1, 12), "top_p": st.floats(0.01, 1)})
distinct_logits = st.lists(st.integers(-400, 400), min_size=1, max_size=9, unique=True).map(lambda x: np.array(x) / 100)


@quick
@given(distinct_logits, sampling_options)
def test_probabilities(logits, options):
    got = probabilities(np.stack([logits, logits[::-1]]).astype(np.float32), **options)
    expected = expected_distribution(logits.astype(np.float32).astype(np.float64), **options)
    # rounding may put a token on either side of top_p: then the share is met to 1e-9 by both
    if ((got[0] > 0) != (expected > 0)).any():
        full = expected_distribution(logits, options.get("temperature", 1.0), options.get("top_k"))
        assert min(abs(full[p > 0].sum() - options["top_p"]) for p in (got[0], expected)) < 1e-6
    else:
        np.testing.assert_allclose(got[0], expected, atol=1e-6)
        np.testing.assert_allclose(got[1], expected[::-1], atol=1e-6)


@pytest.mark.parametrize("top_k, top_p, expected", [
    (None, None, [1/8, 1/2, 1/8, 1/4]), (None, 1.0, [1/8, 1/2, 1/8, 1/4]), (None, 0.5, [0, 1, 0, 0]),
    (None, 0.51, [0, 2/3, 0, 1/3]), (None, 0.75, [0, 2/3, 0, 1/3]), (None, 0.76, [1/7, 4/7, 0, 2/7]),
    (None, 1e-9, [0, 1, 0, 0]), (None, 0.999, [1/8, 1/2, 1/8, 1/4]),
    (1, None, [0, 1, 0, 0]), (2, None, [0, 2/3, 0, 1/3]), (4, None, [1/8, 1/2, 1/8, 1/4]),
    (99, None, [1/8, 1/2, 1/8, 1/4]),
    (2, 0.6, [0, 1, 0, 0]),             # top_k first: 2/3 of what is left is more than 0.6
    (2, 0.7, [0, 2/3, 0, 1/3]),
])
def test_top_k_and_top_p_by_hand(top_k, top_p, expected):
    logits = np.log2([[1/8, 1/2, 1/8, 1/4]])
    np.testing.assert_allclose(probabilities(logits * math.log(2), top_k=top_k, top_p=top_p), [expected], atol=1e-12)


@quick
@given(distinct_logits, sampling_options)
def test_evenly_spread_draws_hit_each_token_in_proportion(logits, options):
    n = 1000
    p = probabilities(logits[None], **options)[0]
    u = (np.arange(n) + 0.5) / n
    counts = np.bincount(sample(np.tile(logits, (n, 1)), u, **options), minlength=len(logits))
    assert (abs(counts - n * p) <= 1 + 1e-6).all() and (counts[p == 0] == 0).all()
    edge = sample(np.stack([logits] * 2), np.array([0, 1 - 2**-53]), **options)
    possible = np.flatnonzero(np.diff(np.cumsum(p), prepend=0))     # a share below 1e-16 may not count at all
    assert edge.tolist() == [possible[0], possible[-1]]


def test_temperature_0_is_greedy_and_extremes_do_not_overflow():
    logits = np.array([[1.0, 3.0, 2.0, 3.0], [-1e30, -2e30, -3e30, -1e30]], np.float32)
    for u in (0, 1 - 2**-53):
        assert sample(logits, np.full(2, u), temperature=0).tolist() == [1, 0]      # the first of equals
    assert probabilities(logits, temperature=0).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(probabilities(logits, temperature=1e-310), [[0, .5, 0, .5], [.5, 0, 0, .5]])
    np.testing.assert_allclose(probabilities(logits[:1], temperature=1e30), np.full((1, 4), 1/4))


# ---------------------------------------------------------------- folders

def read_tensors(folder):
    return load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, *without, **values):
    path = folder / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
    path.write_text(json.dumps(kept | values))


@pytest.fixture
def folder(tmp_path):
    """A saved model of the smallest sort."""
    tiny = Config(3, embedding_dim=4, n_block=1, n_head=2, n_kv_head=1, max_context=8, hidden_dim=3)
    lively(tiny).save(tmp_path / "model")
    return tmp_path / "model"


@every_shape
def test_a_saved_model_loads_bit_for_bit(tmp_path, activation, n_kv_head, tied):
    config = small(activation=activation, n_kv_head=n_kv_head, tie_embeddings=tied, rope_theta=123.5, eps=3e-4)
    model = lively(config)
    model.save(tmp_path / "new" / "folder")
    again = NanoLLM.load(tmp_path / "new" / "folder")
    assert again.config == config and again.flat.dtype == np.float32
    assert (to_host(again.flat) == to_host(model.flat)).all()
    assert (logits_of(again, random_ids(config, 2, 9)) == logits_of(model, random_ids(config, 2, 9))).all()
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


def test_a_folder_is_named_by_a_string_too_and_settings_are_written_along(tmp_path, folder):
    model = NanoLLM.load(str(folder))
    model.save(str(folder), eos_token_id=2, model_type="llama")     # over the old one
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == 2 and config["bos_token_id"] is None
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000     # transformers 4 and 5
    assert (to_host(NanoLLM.load(folder).flat) == to_host(model.flat)).all()


def test_a_save_that_fails_leaves_the_old_model(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(nanollm, "save_file", full_disk)
    with pytest.raises(OSError):
        lively(NanoLLM.load(folder).config, seed=9).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["float16", "float64", "bfloat16"])
def test_other_float_types_are_converted(folder, name):
    dtype = getattr(reference("ml_dtypes"), name) if name == "bfloat16" else np.dtype(name)
    stored = {key: value.astype(dtype) for key, value in read_tensors(folder).items()}
    write_tensors(folder, stored)
    model = NanoLLM.load(folder)
    assert model.flat.dtype == np.float32
    for key, t in model.parameters().items():
        assert (to_host(t.data) == stored[key].astype(np.float32)).all()


def shard(folder, parts=3):
    """Spread model.safetensors over several files and an index."""
    tensors = sorted(read_tensors(folder).items())
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file(dict(tensors[i::parts]), folder / file)
        weight_map |= {name: file for name, _ in tensors[i::parts]}
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_put_together(folder):
    whole = to_host(NanoLLM.load(folder).flat)
    shard(folder)
    assert (to_host(NanoLLM.load(folder).flat) == whole).all()


def test_tensors_that_follow_from_others_are_skipped(tmp_path):
    model = lively(small(tie_embeddings=True))
    model.save(tmp_path)
    tensors = read_tensors(tmp_path)
    write_tensors(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"],
                                       "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    assert (to_host(NanoLLM.load(tmp_path).flat) == to_host(model.flat)).all()


def test_settings_that_may_be_absent_have_llamas_defaults(folder):
    edit_config(folder, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
                "rope_parameters", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "architectures")
    tensors = read_tensors(folder)
    for x in "kv":
        name = f"model.layers.0.self_attn.{x}_proj.weight"
        tensors[name] = np.tile(tensors[name], (2, 1))
    write_tensors(folder, tensors)
    assert NanoLLM.load(folder).config == Config(3, 4, 1, 2, 2, 2048, 3, 1e-6, 10000.0, "silu", False)


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 77.0}, {"rope_theta": 77}, {"rope_theta": 77.0, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}, {"rope_parameters": {"rope_theta": 77.0}},
    {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},   # as transformers 5 decides
    {"rope_theta": 77.0, "rope_scaling": {"type": "default"}}, {"rope_theta": 77.0, "rope_parameters": {}},
    {"rope_theta": 77.0, "rope_scaling": {"rope_type": "default"}, "rope_parameters": None},
])
def test_every_spelling_of_ropes_theta(folder, spelling):
    edit_config(folder, "rope_theta", "rope_parameters", **spelling)
    assert NanoLLM.load(folder).config.rope_theta == 77


# ---------------------------------------------------------------- folders that are refused

@pytest.mark.parametrize("setting, value, words", [
    ("model_type", "gpt2", ["gpt2"]), ("model_type", None, []), ("model_type", ["llama"], []),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, ["linear"]), ("rope_scaling", {"factor": 2.0}, []),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, ["llama3"]), ("rope_scaling", "linear", []),
    ("rope_scaling", [1], []), ("rope_scaling", 2.0, []), ("rope_scaling", {"type": ["default"]}, []),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}, ["yarn"]), ("rope_parameters", "default", []),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}, []),
    ("attention_bias", True, []), ("mlp_bias", True, []), ("quantization_config", {"bits": 4}, []),
    ("pretraining_tp", 2, []),
    ("head_dim", 4, ["4"]), ("head_dim", "2", []), ("head_dim", 0, []),
    ("hidden_act", "gelu", ["gelu"]), ("hidden_act", "tanh", []), ("hidden_act", None, []), ("hidden_act", 1, []),
    ("hidden_act", ["silu"], []), ("hidden_act", {}, []),
    *((name, value, []) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                     "max_position_embeddings", "intermediate_size")
      for value in ("4", None, [4], {}, 4.0, True, 0, -1, 10**13, 10**30)),
    *(("num_key_value_heads", value, []) for value in ("1", [1], 1.0, True, 0, 3, 10**30)),
    *((name, value, []) for name in ("rms_norm_eps",) for value in ("1e-6", None, [1], 0, -1, True, 10**400)),
    ("tie_word_embeddings", "false", []), ("tie_word_embeddings", None, []), ("tie_word_embeddings", 1, []),
])
def test_a_setting_that_is_wrong_or_not_implemented_is_named(folder, setting, value, words):
    edit_config(folder, **{setting: value})
    refused(lambda: NanoLLM.load(folder), "config.json", setting, *words)


@pytest.mark.parametrize("value", ["1", None, [1], {}, True, 0, -1])
def test_a_wrong_rope_theta_is_named_in_either_spelling(folder, value):
    edit_config(folder, "rope_parameters", rope_theta=value)
    refused(lambda: NanoLLM.load(folder), "config.json", "rope_theta")
    edit_config(folder, "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": value})
    refused(lambda: NanoLLM.load(folder), "config.json", "rope_theta")


@pytest.mark.parametrize("setting", ["model_type", "vocab_size", "hidden_size", "num_hidden_layers",
                                     "num_attention_heads", "intermediate_size"])
def test_a_missing_setting_is_named(folder, setting):
    edit_config(folder, setting)
    refused(lambda: NanoLLM.load(folder), "config.json", setting)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"llama"', b"\xff\xfe{}", b"[" * 100_000,
                                     b'{"model_type": "llama", "vocab_size": ' + b"1" * 5000 + b"}"])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(lambda: NanoLLM.load(folder), "config.json")


def test_missing_files(folder, tmp_path):
    refused(lambda: NanoLLM.load(tmp_path / "nowhere"), "config.json", "nowhere")
    refused(lambda: NanoLLM.load(folder / "config.json"), "config.json")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    refused(lambda: NanoLLM.load(tmp_path / "other"), "config.json")
    (folder / "model.safetensors").unlink()
    refused(lambda: NanoLLM.load(folder), "model.safetensors")
    (folder / "model.safetensors").mkdir()
    refused(lambda: NanoLLM.load(folder), "model.safetensors")


NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(DOWN), [DOWN, "missing"]),
    (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
    (lambda t: t.update({"model.layers.1.mlp.down_proj.weight": t[DOWN]}), ["model.layers.1.mlp.down_proj.weight"]),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]}), ["model.layers.0.self_attn.q_proj.bias"]),
    (lambda t: t.update({"two\nlines\x1b[2J": t[NORM]}), ["two"]),
    (lambda t: t.update({DOWN: t[DOWN].T.copy()}), [DOWN, "(3, 4)", "(4, 3)"]),
    (lambda t: t.update({DOWN: t[DOWN].reshape(-1)}), [DOWN, "(12,)"]),
    (lambda t: t.update({NORM: t[NORM][:0]}), [NORM, "(0,)"]),
    (lambda t: t.update({NORM: t[NORM].astype(np.int32)}), [NORM, "I32"]),
    (lambda t: t.update({NORM: t[NORM].astype(np.uint8)}), [NORM, "U8"]),
    (lambda t: t.update({NORM: t[NORM] > 0}), [NORM, "BOOL"]),
    *((lambda t, bad=bad, name=name: t.update({name: np.where(np.arange(t[name].size).reshape(t[name].shape) == 1,
                                                              np.float32(bad), t[name])}), [name, "NaN"])
      for bad in ("nan", "inf", "-inf") for name in (NORM, DOWN)),
    (lambda t: t.update({NORM: np.array([1, 1, 1, np.inf], np.float16)}), [NORM, "NaN"]),
    (lambda t: t.update({NORM: np.array([1, 1, 1, 1e300])}), [NORM]),         # infinite as float32
])
def test_wrong_tensors_are_named(folder, change, words):
    tensors = read_tensors(folder)
    change(tensors)
    write_tensors(folder, tensors)
    refused(lambda: NanoLLM.load(folder), "model.safetensors", *words)


def test_a_file_cut_short_anywhere(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(12), *range(12, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(lambda: NanoLLM.load(folder), "model.safetensors")
    path.write_bytes(whole + b"\0")
    refused(lambda: NanoLLM.load(folder), "model.safetensors")


@pytest.fixture(scope="module")
def flippable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    model = lively(Config(2, embedding_dim=2, n_block=1, n_head=1, max_context=2, hidden_dim=1))
    model.save(folder)
    return folder, (folder / "model.safetensors").read_bytes(), [t.shape for t in model.parameters().values()]


@settings(quick, max_examples=250)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_load_the_same_shapes_or_are_refused(flippable, flips):
    folder, whole, shapes = flippable
    damaged = bytearray(whole)
    for where, mask in flips:
        damaged[int(where * len(damaged))] ^= mask
    # a new name each time: nothing of an earlier file that is still mapped is written to
    (folder / "new").write_bytes(damaged)
    os.replace(folder / "new", folder / "model.safetensors")
    try:
        model = NanoLLM.load(folder)
    except InputError as problem:
        assert "model.safetensors" in str(problem) and str(problem).isprintable()
        return
    assert [t.shape for t in model.parameters().values()] == shapes
    assert np.isfinite(to_host(model.flat)).all()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 8), st.integers(), st.floats(), st.text(max_size=4),
              st.sampled_from(["llama", "silu", "default", "rope_type", "type"])),
    lambda x: st.one_of(st.lists(x, max_size=2),
                        st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", "x"]), x, max_size=2)),
    max_leaves=3)


@settings(quick, max_examples=100)
@given(st.data())
def test_any_json_in_a_setting_loads_or_is_refused(flippable, data):
    folder, whole, shapes = flippable
    (folder / "new").write_bytes(whole)
    os.replace(folder / "new", folder / "model.safetensors")
    original = (folder / "config.json").read_text()
    names = st.sampled_from([*json.loads(original), "rope_scaling", "quantization_config", "pretraining_tp"])
    try:
        edit_config(folder, **data.draw(st.dictionaries(names, json_values, min_size=1, max_size=2)))
        model = NanoLLM.load(folder)
        assert [t.shape for t in model.parameters().values()] == shapes
        assert np.isfinite(logits_of(model, np.array([[0]]))).all()
    except InputError as problem:
        assert str(folder) in str(problem) and str(problem).isprintable()
    finally:
        (folder / "config.json").write_text(original)


def allocated(call):
    """The most bytes that call() held at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def with_header(folder, header, length=None, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("header, length", [
    ({NORM: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, None),
    ({NORM: {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 8]}}, None),
    ({NORM: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, None),
    ({NORM: {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, None),
    ({NORM: {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**64]}}, None),
    ({NORM: {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, None),
    ({NORM: None}, None), ([], None), (b"\xff\xff", None), (b"[" * 50_000, None),
    ({}, 2**40), ({}, 2**63), ({}, 90_000_000), ({}, 0), ({}, None),
])
def test_a_header_that_lies_is_refused_before_anything_is_allocated(folder, header, length):
    with_header(folder, header, length, bytes(8))
    assert allocated(lambda: refused(lambda: NanoLLM.load(folder), "model.safetensors")) < 10e6


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**12}, {"vocab_size": 10**12}, {"vocab_size": 10**6},
    {"hidden_size": 2**20}, {"hidden_size": 2**40}, {"intermediate_size": 2**20}, {"intermediate_size": 2**62},
    {"max_position_embeddings": 10**12}, {"hidden_size": 2**20, "head_dim": 2**19, "num_hidden_layers": 10**6},
])
def test_a_config_that_asks_for_terabytes_is_refused_before_anything_is_allocated(folder, changes):
    edit_config(folder, **changes)
    assert allocated(lambda: refused(lambda: NanoLLM.load(folder), str(folder))) < 10e6


def test_nothing_outside_the_folder_is_opened(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refused(lambda: NanoLLM.load(folder), "model.safetensors", "out of")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "weights")
    refused(lambda: NanoLLM.load(folder), "model.safetensors")
    outside.rename(folder / "weights")
    NanoLLM.load(folder)                                            # a link within the folder is fine,
    (tmp_path / "link").symlink_to(folder)
    NanoLLM.load(tmp_path / "link")                                 # and so is a link to the folder
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    refused(lambda: NanoLLM.load(folder), "config.json", "out of")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a\0b",
                                  "\ud800", "a\nb", "x" * 5000, "gone.safetensors"])
def test_an_index_names_files_in_the_folder_only(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    weight_map = shard(folder)
    write_index(folder, weight_map | {NORM: name})
    refused(lambda: NanoLLM.load(folder), str(folder))


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {}, {NORM: None}, {NORM: 3}, {NORM: ["a"]}])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    shard(folder)
    write_index(folder, weight_map)
    refused(lambda: NanoLLM.load(folder), "model.safetensors.index.json")


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(lambda: NanoLLM.load(folder), "model-00002-of-00003.safetensors")


def test_a_tensor_in_no_shard_is_named(folder):
    weight_map = shard(folder)
    tensors = load_file(folder / weight_map[NORM])
    del tensors[NORM]
    save_file(tensors, folder / weight_map[NORM])
    refused(lambda: NanoLLM.load(folder), NORM, "missing")


# ---------------------------------------------------------------- Hugging Face's own model

@pytest.fixture(scope="module")
def torch():
    torch = reference("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def transformers(torch):
    transformers = reference("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def their_model(transformers, torch, config, **settings):
    """Hugging Face's Llama of the same shape, with random weights that are all large enough to matter."""
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.embedding_dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_block, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.max_context, rms_norm_eps=config.eps, tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        hidden_act={"gelu": "gelu_pytorch_tanh"}.get(config.activation, config.activation), **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (weight.dim() == 1))
    return theirs.eval()


def assert_same_text(theirs, torch, ours, length=40):
    """Greedy text is equal wherever the two best logits differ by more than 1e-4; and logits to 1e-4."""
    ids = random_ids(ours.config, 2, 5)
    text = np.concatenate([ids, np.stack(list(ours.generate(ids, length, temperature=0)), 1)], 1)
    with torch.no_grad():
        logits = theirs(torch.tensor(text)).logits.float().numpy()
    np.testing.assert_allclose(logits_of(ours, text), logits, atol=1e-4)
    best, second = np.sort(logits, -1)[:, 4:-1, :-3:-1].transpose(2, 0, 1)
    clear = best - second > 1e-4
    assert clear.mean() > 0.9 and (text[:, 5:][clear] == logits[:, 4:-1].argmax(-1)[clear]).all()


@every_shape
def test_logits_and_gradients_equal_those_of_transformers(transformers, torch, tmp_path, activation, n_kv_head, tied):
    config = small(activation=activation, n_kv_head=n_kv_head, tie_embeddings=tied, max_context=64, rope_theta=500.0,
                   eps=1e-3)
    theirs = their_model(transformers, torch, config)
    theirs.save_pretrained(tmp_path)
    ours = NanoLLM.load(tmp_path)
    assert ours.config == config
    assert_same_text(theirs, torch, ours)

    ids, targets = random_ids(config, 2, 20), random_ids(config, 2, 20, seed=2)
    loss = torch.nn.functional.cross_entropy(theirs(torch.tensor(ids)).logits.flatten(0, 1),
                                             torch.tensor(targets).flatten())
    loss.backward()
    mine = ours.loss(ids, targets)
    mine.backward()
    assert float(mine.data) == pytest.approx(loss.item(), abs=1e-5)
    gradients = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
    assert gradients.keys() == ours.parameters().keys()
    for name, t in ours.parameters().items():
        scale = abs(gradients[name]).max()
        np.testing.assert_allclose(to_host(t.grad), gradients[name], atol=1e-4 * scale, err_msg=name)


@every_shape
def test_transformers_opens_what_is_saved_here(transformers, torch, tmp_path, activation, n_kv_head, tied):
    ours = lively(small(activation=activation, n_kv_head=n_kv_head, tie_embeddings=tied, max_context=64,
                        rope_theta=500.0, eps=1e-3))
    ours.save(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    assert not any(info[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.config.bos_token_id is None and theirs.config.eos_token_id is None
    assert_same_text(theirs.eval(), torch, ours)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_their_shards_and_half_precision_load(transformers, torch, tmp_path, dtype, max_shard_size):
    reference("ml_dtypes")
    theirs = their_model(transformers, torch, small(max_context=64)).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "4KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_text(theirs.eval(), torch, NanoLLM.load(tmp_path))


@pytest.mark.parametrize("spelling", [{"rope_theta": 30.0}, {"rope_theta": 30.0, "rope_scaling": None},
                                      {"rope_parameters": {"rope_theta": 30.0, "rope_type": "default"}},
                                      {"rope_parameters": {"rope_theta": 30.0}, "rope_theta": 7.0}])
def test_transformers_and_we_read_ropes_theta_alike(transformers, torch, tmp_path, spelling):
    lively(small(max_context=64)).save(tmp_path)
    edit_config(tmp_path, "rope_theta", "rope_parameters", **spelling)
    assert_same_text(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch, NanoLLM.load(tmp_path))
