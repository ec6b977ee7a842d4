"""How a model writes: with and without the cache, sampling, streaming, stops, and the command."""
import io
import json
import math
import re

import numpy as np
import pytest
import tiny
from kinds import characters, decoding, in_bytes, streamed
from tiny import command, lively, logits_of, make_tokenizer, random_ids, refused, small
from tokenizers import Tokenizer, decoders, models, processors

import evaluate
import generate
import nanollm
from autograd import Tensor, recording
from hardware.device import to_host
from hardware.sampling import probabilities, sample
from nanollm import Config, NanoLLM
from storage.files import InputError
from storage.tokens import Decoder, load_tokenizer

pytestmark = pytest.mark.usefixtures("cheap")


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
    """Where the context of `length` tokens begins: halves of max_context are dropped until the rest fits."""
    start, half = 0, max(max_context // 2, 1)
    while length - start > max_context:
        start += half
    return start


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("max_context, prompt", [(16, 1), (16, 5), (16, 16), (16, 17), (16, 60), (5, 4), (7, 9), (2, 1),
                                                 (1, 1), (1, 3)])
def test_generation_reads_the_context_by_the_rule_with_and_without_cache(seen_logits, use_cache, max_context, prompt):
    """The context holds max_context tokens; when one more comes, the oldest half is dropped and the rest read again."""
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
    """The text is four times as long as the context, so halves are dropped repeatedly; the samples are given."""
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


@pytest.mark.parametrize("n_prompt, n_new, room", [(3, 4, 7), (3, 10**9, 1000), (1003, 2, 1000)])
def test_the_cache_has_room_for_what_will_be_read_and_no_more(monkeypatch, n_prompt, n_new, room):
    model, made, before = lively(small(max_context=1000)), [], nanollm.KVCache

    def make(*args):
        made.append(before(*args))
        return made[-1]
    monkeypatch.setattr(nanollm, "KVCache", make)
    next(model.generate(random_ids(model.config, n_prompt), n_new))
    assert [cache.k.shape for cache in made] == [cache.v.shape for cache in made] == [(2, 1, 2, room, 6)]


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
    assert list(model.generate(ids, 30)) != list(model.generate(ids, 30))       # no seed: a new text each time
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
    model.weights.flat *= 0.75
    ids = np.tile(random_ids(model.config, 1, 4), (n, 1))
    p = expected_distribution(logits_of(model, ids[:1])[0, -1].astype(np.float64), **options)
    counts = np.bincount(next(model.generate(ids, 1, seed=5, **options)), minlength=29)
    assert (counts[p == 0] == 0).all() and (p > 0.01).sum() >= 3
    assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()      # 5 standard deviations


def test_every_token_of_every_row_is_drawn_by_itself():
    model = NanoLLM(small())
    model.weights.flat[...] = 0                                             # all tokens are equally likely
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
    expected = to_host(model.weights.grad).copy()
    model.weights.grad[...] = 0
    for _ in model.generate(ids, 3):                                # between two tokens the caller may train
        assert recording(x)
        model.loss(ids, ids).backward()
        np.testing.assert_array_equal(to_host(model.weights.grad), expected)
        model.weights.grad[...] = 0
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
    refused(lambda: model.generate(np.array(ids, int), count, **options), *words)   # no token is asked for


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


@pytest.mark.parametrize("logits, top_k, kept", [
    ([1, 1, 1, 1], 2, [0, 1]), ([0, 3, 2, 2, 2], 3, [1, 2, 3]), ([2, 2, 3, 3], 1, [2])])
def test_top_k_keeps_exactly_k_and_of_equals_the_first(logits, top_k, kept):
    z = np.array(logits, np.float32)
    p = probabilities(np.stack([z, np.arange(len(z))]), top_k=top_k)
    expected = np.zeros(len(z))
    expected[kept] = np.exp(z[kept]) / np.exp(z[kept]).sum()
    np.testing.assert_allclose(p[0], expected, atol=1e-12)
    assert np.flatnonzero(p[1]).tolist() == list(range(len(z)))[-top_k:]        # another row has its own


def test_temperature_0_is_greedy_and_extremes_do_not_overflow():
    logits = np.array([[1.0, 3.0, 2.0, 3.0], [-1e30, -2e30, -3e30, -1e30]], np.float32)
    for u in (0, 1 - 2**-53):
        assert sample(logits, np.full(2, u), temperature=0).tolist() == [1, 0]      # the first of equals
    assert probabilities(logits, temperature=0).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(probabilities(logits, temperature=1e-310), [[0, .5, 0, .5], [.5, 0, 0, .5]])
    np.testing.assert_allclose(probabilities(logits[:1], temperature=1e30), np.full((1, 4), 1/4))


# ---------------------------------------------------------------- generate.py

def test_text_comes_as_soon_as_a_character_is_complete():
    tokenizer, shown = decoding()["byte-level"], []
    ids = tokenizer.encode("a却👍").ids
    for n in range(1, len(ids) + 1):
        shown.append("".join(streamed(tokenizer, ids[:n])))
    assert shown[0] == "a" and shown[-1] == "a却👍" and set(shown) == {"a", "a却", "a却👍"}


def test_a_text_ends_with_what_its_last_token_completes():
    words = [b"a\xc2", b"\xa9\xe5"]
    for stops, shown in ((), "a©"), (["©"], "a"), (["©!"], "a©"):
        text = generate.Text(Decoder(in_bytes(words)), stops=stops)
        text.add(0)
        text.add(1)
        text.end()
        assert text.ready == shown and text.ended and text.n_token == 2


@pytest.mark.parametrize("kind, skipped, text", [
    ("byte fallback", "<s>", "a b c"), ("WordPiece", "[CLS]", "a b ab"), ("byte-level", "<s>", "the cat sat")])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 100])
def test_tokens_that_are_not_shown_change_nothing_between_words(kind, skipped, text, n):
    """However many there are in a row: the next word is not the first one, which would lose its space."""
    tokenizer = Tokenizer.from_str(decoding()[kind].to_str())
    tokenizer.add_special_tokens([skipped])
    ids = [skipped_or_word for token in tokenizer.encode(text * 3).ids
           for skipped_or_word in (token, *[tokenizer.token_to_id(skipped)] * n)]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "characters"])
def test_u_fffd_in_a_text_is_shown_and_a_broken_character_is_not(kind):
    tokenizer = characters("ab\ufffd", "?") if kind == "characters" else decoding()[kind]
    for text in "\ufffd", "ab\ufffd", "a\ufffdb", "a\ufffd\ufffd":
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected = tokenizer.decode(ids)
        assert "\ufffd" in expected and "".join(streamed(tokenizer, ids)) == expected
        if kind == "byte-level":
            assert "".join(streamed(tokenizer, ids + tokenizer.encode("却").ids[:-1])) == expected


def test_streaming_takes_time_in_proportion():
    class Counting:
        seen = 0

        def decode(self, ids):
            Counting.seen += len(ids)
            return decoding()["byte-level"].decode(ids)

        def id_to_token(self, token):
            return ""
    ids = decoding()["byte-level"].encode("the cat sat on the mat. 却" * 200).ids
    text = "".join(streamed(Counting(), ids))
    assert text == decoding()["byte-level"].decode(ids) and Counting.seen < 80 * len(ids)


def test_generate_prints_only_text(finished):
    folder = finished[0]
    code, out, err = command(generate.main, folder, "--prompt", "the 却", "--max-new-tokens", 12, "--seed", 3)
    assert (code, err) == (0, "") and out.startswith("the 却") and out.endswith("\n")
    model, tokenizer = NanoLLM.load(folder), load_tokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode("the 却").ids
    ids += model.generate(ids, 12, temperature=0.8, top_p=0.95, seed=3)
    assert out == tokenizer.decode(ids).rstrip("\ufffd") + "\n"
    assert command(generate.main, folder, "--prompt", "the 却", "--max-new-tokens", 12, "--seed", 3)[1] == out


def test_generate_s_flags_reach_the_model(finished, monkeypatch):
    seen, word = [], load_tokenizer(finished[0] / "tokenizer.json").encode("a").ids
    monkeypatch.setattr(NanoLLM, "generate", lambda self, ids, *rest: seen.append((ids.tolist(), *rest)) or iter([]))
    command(generate.main, finished[0], "--prompt", "a", "--max-new-tokens", 5, "--temperature", 0, "--top-k", 7,
            "--top-p", 0.5, "--seed", 9)
    assert seen == [([word], 5, 0.0, 7, 0.5, 9, [])]


def test_text_without_a_prompt_needs_a_bos_token(finished):
    code, out, err = command(generate.main, finished[0], name="generate.py")
    assert (code, out) == (2, "") and err.startswith("generate.py: ") and "--prompt" in err and err.count("\n") == 1


@pytest.mark.parametrize("unknown, prompt, code, out, err", [
    ("<unk>", "the 5€", 0, "the <unk><unk>", r"warning: --prompt: .* '5€' \(character 5\): replaced by '<unk>'"),
    ("\n", "the 5€", 0, "the \n\n", r"warning: --prompt: .* '5€' \(character 5\): replaced by '\\n'"),
    (None, "the 5€", 2, "", r"--prompt: the tokenizer cannot encode '5€' \(character 5\)"),
    ("\n", "5€", 2, "", "--prompt: the tokenizer knows nothing of '5€'"),
    ("<unk>", "", 2, "", "this model has no BOS token: give a --prompt\n")])
def test_a_prompt_that_the_tokenizer_does_not_know(tmp_path, unknown, prompt, code, out, err):
    """Characters, as docs/characters.py makes them, and as it made them before (None)."""
    known = dict.fromkeys([*"the catdog\n", *([unknown] if unknown else [])])
    t = characters("the ", "\n")
    t.decoder = decoders.Fuse()
    t.model = models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=unknown or "<unk>")
    NanoLLM(Config(len(known), 16, 1, 2, 2, 8, 24)).save(tmp_path)
    t.save(str(tmp_path / "tokenizer.json"))
    got = command(generate.main, tmp_path, "--prompt", prompt, "--max-new-tokens", 1, name="generate.py")
    assert got[0] == code and got[1].startswith(out) and (out or not got[1])
    assert re.search(f"^generate.py: {err}", got[2]) and got[2].count("\n") == 1


@pytest.fixture
def with_bos(tmp_path):
    """A folder like a chat model's: its tokenizer puts <s> in front of a text, </s> or <end> ends it."""
    folder = tmp_path / "bos"
    NanoLLM(Config(293, 16, 1, 2, 2, 8, 24)).save(folder, bos_token_id=0, eos_token_id=[1, 2])
    tokenizer = load_tokenizer(make_tokenizer(folder / "tokenizer.json", 293, ["<s>", "</s>", "<end>"]))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_bos_begins_and_eos_ends_a_text(with_bos, monkeypatch):
    prompts, read = [], NanoLLM.generate
    word = load_tokenizer(with_bos / "tokenizer.json").encode("a").ids[1]

    def scripted(self, ids, count, *rest):
        prompts.extend(ids.tolist())
        assert rest[-1] == [1, 2]
        return iter([np.array([token]) for token in (word, word, 2, word)])
    monkeypatch.setattr(NanoLLM, "generate", scripted)
    assert command(generate.main, with_bos) == (0, "aa\n", "")
    assert command(generate.main, with_bos, "--prompt", "aa") == (0, "aaaa\n", "")
    assert prompts == [[0], [0, word, word]]
    monkeypatch.setattr(NanoLLM, "generate", read)
    assert command(generate.main, with_bos, "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize("bad", [290, -1, True, "a", 1.5, [0, 999]])
def test_bos_and_eos_must_be_ids_of_the_model(with_bos, bad):
    config = json.loads((with_bos / "config.json").read_text())
    (with_bos / "config.json").write_text(json.dumps(config | {"eos_token_id": 999 if bad == 290 else bad}))
    code, out, err = command(generate.main, with_bos)
    assert (code, out) == (2, "") and "config.json" in err and "token id" in err


# ---------------------------------------------------------------- stop strings, several samples, speed

def cut_at(text, stops, start):
    """The definition: read letter by letter until a stop string is complete; of two at once the longer counts."""
    for end in range(start, len(text) + 1):
        ended = [stop for stop in stops if text[start:end].endswith(stop)]
        if ended:
            return text[:end - max(map(len, ended))]
    return text


def test_a_stop_string_spans_tokens_and_is_not_looked_for_in_the_prompt(with_bos, monkeypatch):
    tokenizer, read = load_tokenizer(with_bos / "tokenizer.json"), []
    ids = tokenizer.encode("the cat却. the mat", add_special_tokens=False).ids

    def scripted(self, prompt, count, *rest):
        for token in ids:
            read.append(token)
            yield np.array([token])
    monkeypatch.setattr(NanoLLM, "generate", scripted)
    whole = "the cat却. the mat"
    for stops, end in (["t却"], "the ca"), (["x", "却. t"], "the cat"), (["却. tx"], whole), (["at", "the m"], "the c"):
        read.clear()
        flags = [word for stop in stops for word in ("--stop", stop)]
        assert command(generate.main, with_bos, "--prompt", "t却 at the m", *flags) == (0, f"t却 at the m{end}\n", "")
        assert (len(read) < len(ids)) == (end != whole)


def test_samples_are_the_rows_of_one_batch(finished):
    folder = finished[0]
    model, tokenizer = NanoLLM.load(folder), load_tokenizer(folder / "tokenizer.json")
    flags = [folder, "--prompt", "the 却", "--max-new-tokens", 40, "--seed", 3, "--temperature", 1]     # context: 8
    code, out, err = command(generate.main, *flags, "--num-samples", 3)
    ids = np.tile(tokenizer.encode("the 却").ids, (3, 1))
    rows = np.stack(list(model.generate(ids, 40, top_p=0.95, seed=3)), 1)
    texts = [tokenizer.decode([*ids[0], *row]).rstrip("\ufffd") for row in rows]
    assert (code, err) == (0, "") and len(set(texts)) == 3 and out == "\n---\n".join(texts) + "\n"
    assert command(generate.main, *flags, "--num-samples", 3)[1] == out
    assert command(generate.main, *flags[:-3], 4, *flags[-2:], "--num-samples", 3)[1] != out
    stop = next(text for text in (" the", " a", "o", "t") if any(text in whole[5:] for whole in texts))
    cut = [cut_at(text, [stop], 5) for text in texts]
    assert command(generate.main, *flags, "--num-samples", 3, "--stop", stop)[1] == "\n---\n".join(cut) + "\n"


def test_each_sample_ends_by_itself(with_bos, monkeypatch):
    a, b, c = (load_tokenizer(with_bos / "tokenizer.json").encode(letter).ids[1] for letter in "abc")
    steps, read = np.array([[a, b, c, a], [2, b, a, a], [2, c, b, b], [2, a, c, c], [2, b, 1, b], [2, b, 1, b]]), []
    monkeypatch.setattr(NanoLLM, "generate", lambda self, ids, *_: (
        read.append(step) or step[:len(ids)] for step in steps))
    code, out, err = command(generate.main, with_bos, "--num-samples", 4, "--stop", "bca", "--prompt", "x")
    assert (code, err) == (0, "") and out == "xa\n---\nxb\n---\nxcabc\n---\nxaabcbb\n" and len(read) == 6
    read.clear()
    out = command(generate.main, with_bos, "--num-samples", 3, "--stop", "bc")[1]
    assert out == "a\n---\nb\n---\nca\n" and len(read) == 4     # all three have ended: nothing more is written


@pytest.mark.parametrize("samples, count, numbers", [(1, 40, ("3 prompt tokens", "40 new")), (2, 5, ("10 new",)),
                                                     (2, 1, ("2 new",))])
def test_the_speed_is_told_on_a_terminal_only(finished, monkeypatch, samples, count, numbers):
    flags = [finished[0], "--prompt", "the cat sat", "--seed", 1, "--max-new-tokens", count, "--num-samples", samples]
    _, out, err = command(generate.main, *flags)
    assert err == ""
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(tiny.io, "StringIO", terminal)
    again = command(generate.main, *flags)
    assert again[:2] == (0, out) and again[2].count("\n") == 1 and all(words in again[2] for words in numbers)
    assert ("tokens/s" in again[2]) == (count > 1)


def test_a_text_may_be_four_times_as_long_as_the_context(finished):
    model, tokenizer = NanoLLM.load(finished[0]), load_tokenizer(finished[0] / "tokenizer.json")
    prompt = "the cat sat on the mat. a dog ran to the cat! who ran?"
    ids, T = tokenizer.encode(prompt).ids, model.config.max_context
    assert len(ids) > T
    new = list(model.generate(ids, 4 * T, temperature=0))
    out = command(generate.main, finished[0], "--prompt", prompt, "--max-new-tokens", 4 * T, "--temperature", 0)[1]
    assert len(new) == 4 * T == 32 and out == tokenizer.decode(ids + new).rstrip("\ufffd") + "\n"


# ---------------------------------------------------------------- evaluate.py

def test_the_best_model_and_checkpoints_open_like_the_last(finished):
    folder, files, _ = finished
    losses = {name: json.loads(command(evaluate.main, folder / name, "--text", files[1], "--json")[1])["loss"]
              for name in ("", "best", "checkpoint-21", "checkpoint-20")}
    assert losses[""] == losses["checkpoint-21"] != losses["checkpoint-20"]


def test_a_path_that_is_not_a_model_folder_is_named(tmp_path, files):
    (tmp_path / "empty").mkdir()
    for name, word in (("none", "none"), ("text.txt", "text.txt"), ("empty", "config.json")):
        for main, flags in ((generate.main, ["--prompt", "a"]), (evaluate.main, ["--text", files[1]])):
            code, out, err = command(main, tmp_path / name, *flags)
            assert (code, out) == (2, "") and word in err and err.count("\n") == 1


def test_an_unfinished_run_points_to_its_best(files, tmp_path):
    tiny.run(*files, "--max-steps", 5, "--eval-every", 2, "--artifact-dir", "run")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(InputError, match="run/best"):
        generate.open_model(tmp_path / "run")
