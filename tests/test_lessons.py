"""Each lesson's mistake goes wrong, its remedy goes right, and the page that shows them says what the files say."""
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import CI
from matplotlib.figure import Figure

from hardware import device
from lessons import common

FOLDER = Path(common.__file__).parent
NAMES = ["gradcheck_of_ones", "no_causal_mask", "validation_on_training_text", "unequal_batches",
         "float16_without_loss_scaling", "rope_pairing", "accuracy_of_one_column", "dropout_on_the_logit",
         "gradcheck_of_small_squares", "tied_weights_counted_once", "byte_pairs_in_the_wrong_order"]
SMALL = {"T": 8, "C": 32, "n_block": 1}
NOISE = np.random.default_rng(0).integers(0, 8, 4000), np.frombuffer(b"abcdefgh", np.uint8)
SONG = np.tile([0, 1, 2, 3, 0, 2, 1, 3, 3, 1], 200), NOISE[1]      # what comes next depends on several letters before


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """lesson(name, ...): what its main gives for these arguments, once its figure is drawn, at a low resolution."""
    monkeypatch.setattr(common, "FIGURES", tmp_path)
    save = Figure.savefig

    def cheaply(self, path, dpi):
        if not CI:
            self.set_layout_engine("none")      # it draws everything twice more
        save(self, path, dpi=20)
    monkeypatch.setattr(Figure, "savefig", cheaply)

    def run(name, *args, **named):
        module = importlib.import_module(f"lessons.{name}")
        found = module.main(*args, **named)
        module.draw(*found) if isinstance(found, tuple) else module.draw(found)
        assert (tmp_path / f"{name}.png").stat().st_size > 0
        return found
    return run


def test_ones_accept_what_a_random_dout_rejects(lesson, capsys):
    right, *wrong = lesson("gradcheck_of_ones").values()
    assert max(right) < 1e-9 and all(random > 0.05 for _, random in wrong)
    assert [ones < 1e-9 for ones, _ in wrong] == [True] * 4 + [False] * 2
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert [line.split()[-2:] for line in lines] == (
        [["passes", "passes"]] + [["passes", "fails"]] * 4 + [["fails", "fails"]] * 2)


def test_without_a_mask_the_loss_is_lower_and_the_model_worse(lesson):
    """The letters are random; without a mask the model knows them all the same, except the last."""
    found = lesson("no_causal_mask", NOISE, steps=100, prompt="a", **SMALL)
    (good, good_at, still), (bad, bad_at, moved) = found.values()
    assert np.mean(bad[-10:]) < np.mean(good[-10:]) - 0.5
    assert bad_at[:-1].max() < good_at.min() - 0.5 and bad_at[-1] > good_at[-1] + 0.2
    assert still == 0 and moved > 0.1


def test_training_text_does_not_show_overfitting(lesson):
    losses, rows = lesson("validation_on_training_text", NOISE, n=160, start=1000, steps=160, every=40, **SMALL)
    _, memory, truth = zip(*rows, strict=True)
    assert list(memory) == sorted(memory, reverse=True) and abs(memory[-1] - np.mean(losses[-10:])) < 0.2
    assert truth[-1] > memory[-1] + 0.5 and truth[-1] > min(truth) + 0.3


def test_parts_weigh_as_much_as_their_tokens(lesson):
    _, (wrong, right) = lesson("unequal_batches", SONG, steps=5, B=16, sizes=(8, 4, 1), draws=2, **SMALL)
    assert right.max() < 2e-6 and wrong[0] < 2e-6
    assert wrong[2] > 2 * wrong[1] > 0.04


def test_float16_needs_the_scale(lesson):
    unscaled, scaled = lesson("float16_without_loss_scaling", SONG, steps=40, B=4, batch_tokens=2 ** 20,
                              **SMALL).values()
    assert unscaled["zeros"] > 5 and scaled["zeros"] < 1
    assert unscaled["error"] > 10 and scaled["error"] < 1
    assert unscaled["loss"] > scaled["loss"] + 0.05


def test_a_pairing_goes_with_its_weights(lesson):
    halves, neighbours, sorted_rows = lesson("rope_pairing", SONG, steps=80, **SMALL).values()
    assert neighbours[0] == pytest.approx(halves[0], abs=1e-6)
    assert neighbours[1:].mean() > halves[1:].mean() + 0.4
    np.testing.assert_allclose(sorted_rows, halves, atol=1e-5)


def test_argmax_over_one_column_is_a_constant(lesson):
    losses, rows = lesson("accuracy_of_one_column", pair="01", n=120, epochs=12)
    assert set(rows[:, 0]) == {0.5} and losses[-1] < losses[0]
    assert rows[:, 1].max() > 0.6


def test_dropout_on_the_logit_makes_it_too_small(lesson):
    logit, features = lesson("dropout_on_the_logit", n=120, epochs=20).values()
    assert logit[0] > features[0] + 0.02                # half of the batch can only guess
    assert logit[2] < logit[1] and features[2] > features[1]        # with doubled logits
    assert logit[3].argmin() > features[3].argmin() + 3


def test_a_small_square_check_accepts_a_missing_transpose(lesson):
    verdicts, _, errors, losses, share = lesson("gradcheck_of_small_squares", SONG, steps=30, **SMALL)
    assert list(verdicts.values()) == [
        ["passes"] * 4, ["passes", "passes", "no fit", "passes"], ["passes", "no fit", "no fit", "passes"],
        ["passes", "fails", "fails", "fails"], ["passes", "fails", "fails", "fails"]]
    assert errors["ds q"][0] < 1e-3 < 0.1 < errors["ds q"][-1]
    right, wrong = losses.values()
    assert wrong[-1] < wrong[0] - 0.5 and abs(np.array(wrong) - right).max() > 1e-3
    assert share == 3 / 11          # W_k, and what lies below it: the first norm and the embedding


def test_tied_weights_need_both_gradients(lesson):
    both, lookup, output = lesson("tied_weights_counted_once", SONG, steps=40, **SMALL).values()
    assert both[1] == 0 and lookup[1] > 0.2 and output[1] > 0.2
    assert both[2] < 1e-4 and min(lookup[2], output[2]) > 0.02
    assert max(max(others) for *_, others in (both, lookup, output)) < 1e-4
    assert np.mean(lookup[0][-10:]) > np.mean(both[0][-10:]) + 0.2


def test_ids_in_the_wrong_order_decode_to_the_text(lesson):
    text = common.decode(*common.read_text())[:20_000]
    equal, found = lesson("byte_pairs_in_the_wrong_order", text, size=400, steps=40, **SMALL)
    assert equal == (True, True, True)
    (_, none, *_), *wrong = found.values()
    assert none == 0 and all(other > 0.02 and again for _, other, again, _ in wrong)
    assert wrong[0][3] > found["in order"][3] + 0.05


@pytest.mark.parametrize("letters", ["ab", "aab ", "the cat's  12_", "é却说👍. \n", "  \n\t-"])
def test_byte_pairs_are_the_librarys(letters):
    """Ties, overlaps such as aaa, words, spaces, several bytes a letter."""
    bpe = importlib.import_module("lessons.byte_pairs_in_the_wrong_order")
    text, other = ("".join(np.random.default_rng(seed).choice(list(letters), 600)) for seed in (0, 1))
    tokens, merges = bpe.learn(text, 300)
    library, theirs = bpe.library_of(text, 300)
    assert list(merges) == theirs and merges
    for part in (text, other, "isn't unseen: Ωmega"):
        assert bpe.encode(part, bpe.in_order, tokens, merges).tolist() == library.encode(part).ids


def test_the_scale_is_taken_out_again():
    """A power of two changes no digit, and none is left for Adam's eps to meet."""
    ends = [common.train(common.small_model(8, **SMALL), SONG[0], 4, B=2, scale=scale) for scale in (1, 2.0 ** -30)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_a_lesson_ends_as_a_command_does(capsys):
    def unavailable():
        raise device.Unavailable("no GPU")
    for main, code, shown in ((lambda: (1, 2), None, "1 2\n\nQuestion: why?\n"), (lambda: 3, None, "3\n\nQ"), (
            unavailable, 2, "")):
        with pytest.raises(SystemExit) as end:
            common.run(main, print, "why?")
        out, err = capsys.readouterr()
        assert end.value.code == code and out.startswith(shown) and ("no GPU\n" in err) == (code == 2)


def test_the_text_is_there_and_decodes():
    ids, alphabet = common.read_text()
    assert len(ids) > 200_000 and len(alphabet) < 256
    assert common.decode(common.encode("the function", alphabet), alphabet) == "the function"


def words(text):
    return " ".join(re.sub(r"[#`]", "", text).split())


def test_the_page_shows_each_lesson():
    """The page has its figure, command, question and folded answer, in the words of its file and in this order."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"python -m lessons\.(\w+)", page) == NAMES
    for name in NAMES:
        source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert (FOLDER / "figures" / f"{name}.png").exists() and f"(figures/{name}.png)" in page
        assert f"python -m lessons.{name}\n" in source.split("\n\n")[0] + "\n"
        assert words(importlib.import_module(f"lessons.{name}").QUESTION) in words(page)
        folded = "\n".join(re.findall(r"<details>(.*?)</details>", page, re.DOTALL))
        assert words(source.split("# The answer\n")[1]) in words(folded)
    assert {path.stem for path in FOLDER.glob("[a-z]*.py")} == {*NAMES, "common"}


def test_the_chinese_page_has_the_same_numbers():
    """Those of two digits or more: small ones may be words."""
    english, chinese = (re.findall(r"\d[\d.,]*\d", (FOLDER / name).read_text(encoding="utf-8"))
                        for name in ("README.md", "README.zh.md"))
    assert sorted(english) == sorted(chinese) and {"0.07", "48", "143,506"} <= set(chinese)
