"""The picture of an evaluation: each token in its place and colour, in any script, in a file written whole."""
import os
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny
from kinds import in_bytes
from matplotlib import font_manager
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from tiny import command, make_text, make_tokenizer

import evaluate
from console import figure
from nanollm import Config, NanoLLM
from storage.tokens import load_tokenizer


@pytest.fixture(autouse=True)
def only_matplotlib_s_fonts(monkeypatch):
    own = [font for font in font_manager.fontManager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_a_piece_has_all_tokens_of_its_characters(tokenizer):
    ids = encode(tokenizer, "the cat却x👍")
    found = figure.pieces(tokenizer, ids)
    assert "".join(text for text, _ in found) == "the cat却x👍" and sum(n for _, n in found) == len(ids)
    assert [text for text, _ in found][:2] == ["the", " cat"]
    sizes = dict(found)
    assert sizes["the"] == 1 and sizes["却"] == len(encode(tokenizer, "却")) and sizes["x"] == 1
    assert figure.pieces(tokenizer, ids[:-1]) == found[:-1]         # a part of 👍 shows nothing by itself
    # the last token ends one character and begins another
    assert figure.pieces(in_bytes([b"a\xc2", b"\xa9\xe5"]), [0, 1]) == [("a©", 2)]


def test_a_piece_longer_than_a_line_is_cut():
    (_, text, losses), = figure.layout([("却" * 999, 3)], np.arange(3))[0]
    assert text.startswith("却却") and text.endswith("…") and figure.cells(text) <= figure.COLUMNS and len(losses) == 3


def test_a_line_feed_is_shown_and_begins_a_line():
    lines = figure.layout([("a", 1), ("b\r\n", 2), ("\n", 1), ("c\td", 1)], np.arange(5))
    assert [[text for _, text, _ in line] for line in lines] == [["a", "b↵"], ["↵"], ["c⇥d"]]
    assert figure.cells("a却é") == 4 and figure.cells("e\u0301") == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_by_position_is_the_mean_of_the_losses_in_each_bin(rng, overlap):
    T, n = 40, 50
    losses = rng.random((n, T)) + np.arange(T)
    counted = losses >= 0
    if overlap:
        counted[1:, :24] = False            # only the first window counts all
    count, total, squares = (np.where(counted, x, 0).sum(0) for x in (np.ones((n, T)), losses, losses ** 2))
    context, mean, error = figure.by_position(count, total, squares)
    first = 24 if overlap else 0
    assert context[0] == first + 1 if not overlap else 25 <= context[0] < 27
    edges = [first]                         # from the centres back to the bins: the geometric mean of their ends
    for centre in context:
        edges.append(round(centre ** 2 / (edges[-1] + 1)))
    assert edges[-1] == T and len(context) >= 11 and context[-1] <= T
    for a, b, m, e in zip(edges, edges[1:], mean, error, strict=False):
        bin = losses[:, a:b]
        assert m == pytest.approx(bin.mean()) and e == pytest.approx(bin.std() / np.sqrt(bin.size), rel=1e-6)


def test_only_installed_fonts_are_asked_for():
    """Matplotlib warns of others. The usual letters come first, and DejaVu Sans, which has many signs, last."""
    assert figure.families() == ["DejaVu Sans Mono", "DejaVu Sans"]


def test_a_character_that_no_font_has_is_a_box_without_a_warning(tokenizer, tmp_path, drawn):
    ids = encode(tokenizer, "the 却 👍 cat 😀")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw(tmp_path / "a.png", scores_of([np.ones(len(ids) - 1)], len(ids) - 1), tokenizer, ids, {"loss": 1.0})
    assert {"却", "👍"} <= {text.get_text() for text in drawn[0].axes[1].texts}


@pytest.fixture
def drawn(monkeypatch):
    """The figures whose files are written."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: figures.append(self) or save(self, *args, **how))
    return figures


def scores_of(losses, seq_len):
    scores = evaluate.Scores(seq_len)
    for row in losses:
        scores.add(0, row[None].astype(np.float32), np.zeros((1, len(row)), int))
    return scores


def test_every_token_s_colour_lies_under_its_text(tokenizer, tmp_path, drawn, rng):
    text = "the 却 $x^2_$ cat\n👍 sat\x07\u0301 on 😀"
    ids = encode(tokenizer, text)
    losses = rng.random(len(ids) - 1) * 9
    figure.draw(tmp_path / "a.png", scores_of([losses], len(ids) - 1), tokenizer, ids, {"loss": 1.0})
    _, below, _ = drawn[0].axes
    shades, = (c for c in below.collections if isinstance(c, PolyCollection))
    colours = shades.get_array()
    assert colours.mask.tolist() == [True] + [False] * (len(ids) - 1)   # nothing predicts the first token
    np.testing.assert_allclose(colours[1:], losses, rtol=1e-6)
    assert shades.get_clim() == (0, pytest.approx(np.log(290)))
    boxes = [(path.vertices[:, 0].min(), path.vertices[:, 0].max(), path.vertices[0, 1]) for path in shades.get_paths()]
    at, texts = 0, {(t.get_position(), t.get_text()) for t in below.texts}
    assert not any(t.get_parse_math() for t in below.texts)
    column, row = 0, 0
    for piece, n in figure.pieces(tokenizer, ids):
        width = max(figure.cells(piece.replace("\n", "↵").replace("\x07", "□")), 1)
        np.testing.assert_allclose([box[:2] for box in boxes[at:at + n]],
                                   [(column + width * i / n, column + width * (i + 1) / n) for i in range(n)])
        assert {box[2] for box in boxes[at:at + n]} == {row}
        assert ((column, row + 0.45), {"\n": "↵", "\x07": "□"}.get(piece, piece)) in texts
        at, column = at + n, column + width
        if "\n" in piece:
            column, row = 0, row + 1
    assert at == len(boxes) == len(ids) and row == 1


@pytest.mark.parametrize("seq_len, stride", [(8, 3), (1, 1)])
def test_evaluate_draws(tmp_path, monkeypatch, drawn, seq_len, stride):
    monkeypatch.setattr(figure, "ROWS", 9)
    monkeypatch.chdir(tmp_path)
    tiny.make_cheap(monkeypatch)
    NanoLLM(Config(290, 16, 1, 2, 2, 8, 24)).save("model")
    make_tokenizer(Path("model/tokenizer.json"))
    make_text(Path("text.txt"), 20)
    Path("a.png").write_text("what was there before")
    flags = ["--seq-len", seq_len, "--stride", stride]
    assert command(evaluate.main, "model", "--text", "text.txt", "--figure", "a.png", *flags)[::2] == (0, "")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG") and sorted(os.listdir()) == [
        "a.png", "model", "nanollm-cache", "text.txt"]
    above, below, _ = drawn[0].axes
    context, loss = above.lines[0].get_data()
    assert context[0] >= max(seq_len - stride, 1) and context[-1] <= seq_len and np.isfinite(loss).all()
    assert len(below.texts) > 20


def test_scores_keep_the_first_losses_only(monkeypatch, rng):
    monkeypatch.setattr(figure, "TOKENS", 7)
    losses = rng.random((5, 4))
    scores = scores_of(losses, 4)
    np.testing.assert_allclose(scores.first, losses.ravel()[:7], rtol=1e-6)
    assert scores.count.tolist() == [5] * 4
