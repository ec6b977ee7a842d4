"""What holds for any input at all: texts, numbers, flags and damaged files that hypothesis makes up."""
import itertools
import json
import math
import os
import re
from dataclasses import asdict, fields

import numpy as np
import pytest

pytest.importorskip("hypothesis")       # requirements-dev.txt has it

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kinds import CORPUS, KINDS, Ids, decoding, every_kind, made, streamed, whole
from test_checkpoint import FILES
from test_generate import cut_at, expected_distribution
from tiny import GOOD, command, lively, logits_of, make_cheap, make_text, make_tokenizer

import data
import generate
import nanollm
import train
from autograd import ACTIVATIONS
from console import figure, options
from data import TokenDataset
from hardware.device import to_host
from hardware.sampling import probabilities, sample
from nanollm import Config, NanoLLM
from storage import checkpoint, huggingface, tokens
from storage.checkpoint import read_moments, read_trainer
from storage.files import InputError
from train import Adam, learning_rate

fresh = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
same = settings(fresh, derandomize=True, database=None)             # the same inputs in every run


# ---------------------------------------------------------------- Config

anything = st.one_of(st.none(), st.booleans(), st.integers(-2, 16), st.integers(), st.floats(), st.text(max_size=3),
                     st.lists(st.integers(), max_size=2))
some_fields = st.fixed_dictionaries({"vocab_size": st.integers(1, 50)}, optional={
    f.name: st.one_of(st.integers(1, 8), st.sampled_from([2, 4, 8]), anything) for f in fields(Config)[1:]} | {
    "rope_scaling": st.one_of(st.just(()), st.tuples(*[st.floats(0.1, 9)] * 4), st.tuples(anything, anything))})


@settings(same, max_examples=150)
@given(some_fields)
def test_any_values_make_a_config_or_an_input_error(values):
    try:
        config = Config(**values)
    except InputError as problem:
        assert any(f.name in str(problem) for f in fields(Config))
        return
    assert config.head_dim == values.get("head_dim") or config.embedding_dim == config.n_head * config.head_dim
    assert config.head_dim % 2 == 0
    assert config.n_head % config.n_kv_head == 0 and config.eps > 0 and config.activation in ACTIVATIONS
    assert Config(**huggingface.to_fields(json.loads(json.dumps(huggingface.to_config(config))))) == config


# ---------------------------------------------------------------- sampling

sampling_options = st.fixed_dictionaries({}, optional={
    "temperature": st.floats(0.1, 10), "top_k": st.integers(1, 12), "top_p": st.floats(0.01, 1)})
some_logits = st.one_of(st.lists(st.integers(-400, 400), min_size=1, max_size=9, unique=True),
                        st.lists(st.sampled_from([-200, 0, 100]), min_size=1, max_size=9)       # some are equal
                        ).map(lambda x: np.array(x) / 100)


@settings(same, max_examples=150)
@given(some_logits, sampling_options)
def test_probabilities(logits, options):
    rows = np.stack([logits, logits[::-1]]).astype(np.float32)
    for row, got in zip(rows.astype(np.float64), probabilities(rows, **options), strict=True):
        expected = expected_distribution(row, **options)
        # rounding may put a token on either side of top_p: then both meet the share almost exactly
        if ((got > 0) != (expected > 0)).any():
            full = expected_distribution(row, options.get("temperature", 1.0), options.get("top_k"))
            assert min(abs(full[p > 0].sum() - options["top_p"]) for p in (got, expected)) < 1e-6
        else:
            np.testing.assert_allclose(got, expected, atol=1e-6)


@settings(same, max_examples=150)
@given(some_logits, sampling_options)
def test_evenly_spread_draws_hit_each_token_in_proportion(logits, options):
    n = 1000
    p = probabilities(logits[None], **options)[0]
    u = (np.arange(n) + 0.5) / n
    counts = np.bincount(sample(np.tile(logits, (n, 1)), u, **options), minlength=len(logits))
    assert (abs(counts - n * p) <= 1 + 1e-6).all() and (counts[p == 0] == 0).all()
    edge = sample(np.stack([logits] * 2), np.array([0, 1 - 2**-53]), **options)
    possible = np.flatnonzero(np.diff(np.cumsum(p), prepend=0))     # a share below 1e-16 may not count at all
    assert edge.tolist() == [possible[0], possible[-1]]


# ---------------------------------------------------------------- a folder of a model, damaged

SMALLEST = Config(2, embedding_dim=2, n_block=1, n_head=1, max_context=2, hidden_dim=1)


@pytest.fixture(scope="module")
def flippable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    model = lively(SMALLEST)
    model.save(folder)
    return folder, (folder / "model.safetensors").read_bytes(), [t.shape for t in model.parameters().values()]


@settings(same, max_examples=250)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_load_the_same_shapes_or_are_refused(flippable, flips):
    folder, whole, shapes = flippable
    damaged = bytearray(whole)
    for where, mask in flips:
        damaged[int(where * len(damaged))] ^= mask
    # a new file each time, because an earlier one may still be mapped
    (folder / "new").write_bytes(damaged)
    os.replace(folder / "new", folder / "model.safetensors")
    try:
        model = NanoLLM.load(folder)
    except InputError as problem:
        assert "model.safetensors" in str(problem) and str(problem).isprintable()
        return
    assert [t.shape for t in model.parameters().values()] == shapes
    assert np.isfinite(to_host(model.weights.flat)).all()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 8), st.integers(), st.floats(), st.text(max_size=4),
              st.sampled_from(["llama", "silu", "default", "rope_type", "type"])),
    lambda x: st.one_of(st.lists(x, max_size=2),
                        st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", "x"]), x, max_size=2)),
    max_leaves=3)


@settings(same, max_examples=150)
@given(st.dictionaries(st.sampled_from([*huggingface.to_config(SMALLEST), "rope_scaling", "quantization_config",
                                        "pretraining_tp"]), json_values, min_size=1, max_size=2))
def test_any_json_in_a_setting_makes_a_config_or_is_refused(values):
    try:
        config = huggingface.config_of(huggingface.to_config(SMALLEST) | values, "folder/config.json", Config)
    except InputError as problem:
        assert str(problem).startswith("folder/config.json: ") and str(problem).isprintable()
        return
    assert all(size > 0 for shape in config.shapes().values() for size in shape)
    if math.prod(size for size in vars(config).values() if type(size) is int) < 10_000:
        assert np.isfinite(logits_of(NanoLLM(config), np.array([[0]]))).all()


# ---------------------------------------------------------------- a text in chunks

snippets = st.one_of(
    st.sampled_from([
        *CORPUS, " ", "  ", "\r\n", "\n", "\t", "\r", "a", "aa", "the", " the", "dog", "e\u0301", "\u0301", "ﬁ", "😀",
        "👩\u200d👩\u200d👧", "却说", "。", "12", "345", "[MASK]", "[UNK]", "<|endoftext|>", "<|im_end|>", "</s>",
        "\x00", "\u200b", "\ufeff", "가", "\u1100\u1161", "▁", "ACA", "AAC", "CA", "--"]),
    st.text(max_size=12),
    st.tuples(st.sampled_from([" ", "a", "=", "7", "\r\n", "é", "ab", "\u0301", "却", "e\u0301", "N", "-", "AC"]),
              st.integers(1, 90)).map(lambda t: t[0] * t[1]))
texts = st.lists(snippets, min_size=1, max_size=30).map("".join)


def check_chunks(tokenizer, text, chunk, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "CHUNK", chunk)
        patch.setattr(tokens, "CONTEXT", 64)
        patch.setattr(tokens, "PARALLEL", 3)
        parts = list(tokens.encode_text(tokenizer, [text[i:i + block] for i in range(0, len(text), block)]))
    assert "".join(body for _, body, *_ in parts) == text
    assert [i for _, _, ids, _ in parts for i in ids] == whole(text, tokenizer)
    assert all(len(lost) == len(body) for _, body, _, lost in parts)


@every_kind
@settings(fresh, max_examples=30)
@given(text=texts, chunk=st.integers(1, 90), block=st.integers(1, 400))
def test_chunks_have_the_ids_of_the_whole_text(kind, text, chunk, block):
    check_chunks(KINDS[kind], text, chunk, block)


@settings(fresh, max_examples=90)
@given(kind=st.sampled_from(sorted(made())), text=texts, chunk=st.integers(1, 90), block=st.integers(1, 400))
def test_chunks_of_any_tokenizer_have_the_ids_of_the_whole_text(kind, text, chunk, block):
    check_chunks(made()[kind], text, chunk, block)


# ---------------------------------------------------------------- windows and batches

sizes = st.tuples(st.integers(2, 60), st.integers(1, 20), st.integers(1, 20)).filter(
    lambda t: t[0] > t[1] >= t[2])


@fresh
@given(sizes)
def test_windows_cover_every_token_and_the_last_ends_at_the_end(size):
    n, seq_len, stride = size
    ds = TokenDataset(Ids(n), 0, n, seq_len, stride)
    windows = list(ds)
    assert len(windows) == len(ds)
    for i, (x, y) in enumerate(windows):
        assert x.shape == y.shape == (seq_len,) and x.dtype == y.dtype == np.int64
        start = min(i * stride, n - 1 - seq_len)
        assert x.tolist() == list(range(start, start + seq_len)) and y.tolist() == (x + 1).tolist()
    assert windows[-1][1][-1] == n - 1
    assert len({int(x[0]) for x, _ in windows}) == len(ds)              # no window twice
    assert {int(t) for x, y in windows for t in (*x, *y)} == set(range(n))


@fresh
@given(size=sizes, batch=st.integers(1, 9), seed=st.integers(0, 5), start=st.integers(0, 100))
def test_batches_are_the_windows_of_one_endless_stream(size, batch, seed, start):
    n, seq_len, stride = size
    ds = TokenDataset(Ids(n), 0, n, seq_len, stride)
    x, y = ds.batch(start, batch, seed)
    assert x.shape == y.shape == (batch, seq_len) and x.dtype == y.dtype == np.int64
    data.permutation.cache_clear()
    for i in range(batch):                              # in any portions and any order
        one = ds.batch(start + batch - 1 - i, 1, seed)
        assert (one[0][0] == x[batch - 1 - i]).all() and (one[1][0] == y[batch - 1 - i]).all()
    epochs = [ds.batch(e * len(ds), len(ds), seed)[0][:, 0].tolist() for e in range(3)]
    assert all(sorted(epoch) == sorted({int(w[0]) for w, _ in ds}) for epoch in epochs)
    if len(ds) > 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != ds.batch(0, len(ds), seed + 1)[0][:, 0].tolist()


# ---------------------------------------------------------------- training and validation parts

@fresh
@given(size=sizes, fraction=st.floats(0.01, 0.99), batch=st.integers(1, 5))
def test_parts_share_no_token_and_validation_scores_each_target_once(size, fraction, batch):
    n, seq_len, stride = size
    ds = TokenDataset(Ids(n), 0, n, seq_len, stride)
    n_val = round(n * fraction)
    if min(n_val, n - n_val) <= seq_len:
        with pytest.raises(InputError, match="one window needs"):
            ds.split(fraction)
        return
    train, val = ds.split(fraction)
    assert train.tokens.tolist() + val.tokens.tolist() == list(range(n)) and len(val.tokens) == n_val
    assert (train.seq_len, train.stride, val.seq_len, val.stride) == (seq_len, stride, seq_len, seq_len)
    assert max(y.max() for _, y in train) < min(x.min() for x, _ in val)
    starts = [int(x[0]) for x, _ in val]
    assert all(b - a == seq_len for a, b in itertools.pairwise(starts[:-1]))
    in_order = list(val.in_order(batch))
    pairs = [(int(a), int(b)) for x, y, _ in in_order for a, b in zip(x.ravel(), y.ravel(), strict=True)]
    assert pairs == [(t, t + 1) for t in range(n - n_val, n - 1)]
    assert all(x.shape == y.shape and x.shape[0] <= batch and x.shape[1] == new <= seq_len for x, y, new in in_order)
    assert [x.shape[1] for x, _, _ in in_order][:-1] == [seq_len] * (len(in_order) - 1)


@fresh
@given(size=sizes, batch=st.integers(1, 5))
@example((30, 8, 8), 2)
@example((9, 8, 3), 2)
def test_in_order_every_id_but_the_first_is_a_new_target_once_behind_enough_context(size, batch):
    n, seq_len, stride = size
    scored, starts = [], []
    for x, y, new in TokenDataset(Ids(n), 0, n, seq_len, stride).in_order(batch):
        assert x.shape == y.shape and 1 <= len(x) <= batch and x.dtype == y.dtype == np.int64
        assert (y == x + 1).all() and (np.diff(x, axis=1) == 1).all() and 1 <= new <= x.shape[1] <= seq_len
        for row in y.tolist():
            scored += row[-new:]
            starts.append(row[0] - 1)
            assert all(target - starts[-1] >= min(target, seq_len - stride + 1) for target in row[-new:])
        assert len(x) == 1 or x.shape[1] == seq_len
    assert scored == list(range(1, n))
    assert starts == list(range(0, len(starts) * stride, stride))


# ---------------------------------------------------------------- the learning rate

@given(st.integers(1, 500), st.floats(1e-6, 1), st.floats(0, 1), st.integers(0, 500),
       st.sampled_from(["cosine", "constant"]))
@settings(same, max_examples=200)
def test_the_rate_stays_between_its_ends_and_never_rises_after_the_warm_up(steps, peak, share, warmup, schedule):
    low, warmup = peak * share, min(warmup, steps)
    rate = [learning_rate(step, steps, peak, low, warmup, schedule) for step in range(steps)]
    assert all(0 <= r <= peak * (1 + 1e-12) for r in rate)
    assert all(a >= b for a, b in itertools.pairwise(rate[max(warmup - 1, 0):]))
    assert all(a < b for a, b in itertools.pairwise(rate[:warmup]))
    if schedule == "cosine" and warmup < steps:
        assert rate[-1] == low


# ---------------------------------------------------------------- streaming

@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "WordPiece"])
@given(text=st.text(st.sampled_from("ab c.却说é👍\n"), max_size=150))
@settings(same, max_examples=60)
@example(text="却说孙悟空一个筋斗云👍👍👍ab" * 20)
def test_text_streams_whole_characters(kind, text):
    tokenizer = decoding()[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(piece and "\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "WordPiece"])
@given(data=st.data())
@settings(same, max_examples=60)
def test_whatever_a_model_says_can_be_streamed(kind, data):
    """Parts of characters come in any order: nothing raises, nothing is lost or repeated."""
    tokenizer = decoding()[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=90))
    if kind == "byte fallback":         # one wrong byte makes it take back a whole run of bytes, some of them shown
        ids = [i for i in ids if not 3 <= i < 3 + 128]
    text, whole = "".join(streamed(tokenizer, ids)), tokenizer.decode(ids)
    if kind == "byte fallback":
        text, whole = (re.sub("[^abc ]", "", one) for one in (text, whole))
    assert text == whole.rstrip("\ufffd")


# ---------------------------------------------------------------- stop strings

class Pieces:
    """Stands for a Decoder: each "token" is its own text."""
    def add(self, piece):
        return piece

    def rest(self):
        return ""


def pieces_after(pieces, start):
    """These pieces without the first `start` characters."""
    for piece in pieces:
        if start < len(piece):
            break
        start, pieces = start - len(piece), pieces[1:]
    return [pieces[0][start:], *pieces[1:]] if pieces else []


@given(st.lists(st.text("ab", max_size=4), max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
       st.integers(0, 6))
@settings(same, max_examples=150)
def test_text_ends_before_a_stop_string_however_it_comes(pieces, stops, start):
    text = "".join(pieces)
    start = min(start, len(text))
    expected = cut_at(text, stops, start)
    pieces = pieces_after(pieces, start)
    shown = generate.Text(Pieces(), [text[:start]], stops)
    for i, piece in enumerate(pieces):
        shown.add(piece)
        assert expected.startswith(shown.ready)
        so_far = text[:start] + "".join(pieces[:i + 1])
        if shown.ended:                         # at once, with the piece that completes a stop string
            assert any(stop in so_far[start:] for stop in stops)
            break
        waits = so_far[len(shown.ready):]       # nothing is held back but what may begin a stop string
        assert not waits or any(stop.startswith(waits) for stop in stops)
    shown.end()
    assert shown.ready == expected


# ---------------------------------------------------------------- a checkpoint, damaged

@given(st.data())
@settings(same, max_examples=150)
def test_any_flipped_bytes_are_found(stopped, data):
    newest = stopped / "checkpoint-10"
    name = data.draw(st.sampled_from(FILES))
    content = bytearray((newest / name).read_bytes())
    before = bytes(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    if bytes(content).split() == before.split():
        return                      # white space at the end of a list of hashes
    try:
        (newest / name).write_bytes(content)
        with pytest.raises(InputError, match="checkpoint-10/"):
            checkpoint.check_sums(newest)
    finally:
        (newest / name).write_bytes(before)


word = st.text(max_size=5)
any_json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | word,
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=3))


@given(any_json, st.data())
@settings(same, max_examples=150)
def test_any_json_is_a_state_or_refused(stopped, value, data):
    folder = stopped.parent / "any"
    folder.mkdir(exist_ok=True)
    about = json.loads((stopped / "checkpoint-10/trainer.json").read_text())
    about[data.draw(st.sampled_from(sorted(about)))] = value
    (folder / "trainer.json").write_text(json.dumps(about))
    try:
        state, _ = read_trainer(folder)
    except InputError as problem:
        assert str(folder / "trainer.json") in str(problem)
    else:
        for number in asdict(state).values():
            assert number is None or (0 <= number < math.inf and not isinstance(number, bool))


@given(st.binary(max_size=40), st.integers(0, 400))
@same
def test_any_bytes_are_moments_or_refused(stopped, noise, where):
    model = NanoLLM(Config(290, 16, 2, 2, 1, 8, 24))
    folder = stopped.parent / "noise"
    folder.mkdir(exist_ok=True)
    content = (stopped / "checkpoint-10/optimizer.safetensors").read_bytes()
    (folder / "optimizer.safetensors").write_bytes(content[:where] + noise + content[where + len(noise):])
    optimizer = Adam(model)
    try:
        read_moments(folder, optimizer)
    except InputError as problem:
        assert str(folder / "optimizer.safetensors") in str(problem)
    else:
        assert np.isfinite(to_host(optimizer.m)).all() and (to_host(optimizer.v) >= 0).all()


# ---------------------------------------------------------------- any flags at all

VALUES = st.sampled_from([
    "0", "1", "2", "3", "4", "7", "8", "12", "-1", "0.5", "1e-9", "1e300", "nan", "-inf", "", "x", "٣", "1_0", " 5",
    "10000000000", "9" * 40, "1e-400", "--", "-", "None", "True"]) | st.text(
        st.characters(exclude_characters="\0"), max_size=6)
FLAGS = sorted({action.option_strings[-1][2:] for action in options.command_line()._actions} - {"help", "artifact-dir"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_text(folder / "text.txt")
    make_tokenizer(folder / "tokenizer.json")
    return folder


@given(st.lists(st.tuples(st.sampled_from(FLAGS), VALUES, st.booleans()), max_size=5))
@settings(same, max_examples=200)
@example([("warmup-steps", "9" * 40, True)])
@example([("resume", "", False), ("init-from", "x", True), ("demo", "", False)])
@example([("seed", "9" * 40, True), ("num-epochs", "1000000000", True)])
def test_any_flags_train_or_say_why_not(place, flags):
    """There is never a traceback, and nothing is left behind if training did not begin."""
    begun = []

    def begin(model, optimizer, train_set, settings, state, observer, stop, team):
        begun.append(settings.max_steps)
        stop.signal = 15
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("NANOLLM_CACHE", str(place / "cache"))
        make_cheap(patch)
        patch.setattr(train, "train", begin)
        patch.setattr(options.demo, "files", lambda: ("text.txt", "tokenizer.json"))
        words = [f"--{name}={value}" if joined else f"--{name}" for name, value, joined in flags]
        code, out, err = command(train.main, *GOOD, *words)
        run = place / "run"
        if code == 143:
            assert begun[0] >= 1 and [path.name for path in run.iterdir()] == ["metrics.csv"]
            (run / "metrics.csv").unlink()
            run.rmdir()
        else:
            assert code == 2 and err.count("\n") == 1 and err.startswith("train.py: ") and out == "", err
            assert not run.exists()


WORDS = st.sampled_from("prompt max-new-tokens temperature top-k top-p seed stop num-samples".split())


@given(st.lists(st.tuples(WORDS, VALUES), max_size=4))
@settings(same, max_examples=60)
def test_any_flags_generate_or_say_why_not(place, flags):
    if not (place / "fine").exists():
        NanoLLM(Config(290, 16, 1, 2, 2, 8, 24)).save(place / "fine")
        make_tokenizer(place / "fine/tokenizer.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanollm.NanoLLM, "generate", with_few_tokens)
        words = [f"--{name}={value}" for name, value in flags]
        code, out, err = command(generate.main, place / "fine", "--prompt", "a", *words)
    assert (code == 0 and out and err == "") or (code == 2 and out == "" and err.count("\n") == 1), (code, out, err)


real_generate = NanoLLM.generate


def with_few_tokens(self, ids, count, *rest):
    return real_generate(self, ids, min(count, 5), *rest)


# ---------------------------------------------------------------- the picture of an evaluation

@settings(same, max_examples=40)
@given(st.lists(st.tuples(
    st.text("ab \n\r\t$却é\u0301\0", max_size=9) | st.text(st.characters(exclude_characters="↵"), max_size=300),
    st.integers(1, 4)), max_size=60))
def test_layout_keeps_every_token_and_lets_no_text_overlap(found):
    losses = np.arange(sum(n for _, n in found), dtype=float)
    lines = figure.layout(found, losses)
    placed = [piece for line in lines for piece in line]
    shown = [loss for _, _, of_tokens in placed for loss in of_tokens]
    assert shown == losses[:len(shown)].tolist() and len(lines) <= figure.ROWS
    if len(lines) < figure.ROWS:
        assert len(shown) == len(losses)
    for line in lines:
        assert line and line[0][0] == 0 and line[-1][0] + figure.cells(line[-1][1]) <= figure.COLUMNS
        assert all(b == a + max(figure.cells(text), 1) for (a, text, _), (b, _, _) in itertools.pairwise(line))
        assert all(text.isprintable() for _, text, _ in line) and not any("↵" in text for _, text, _ in line[:-1])
