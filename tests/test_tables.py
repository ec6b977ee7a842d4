"""docs/tables.py: README's table of the root names every file and folder there, and nothing else; the numbers."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import scaling
import tables

README = tables.README[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", tables.README, ids=lambda page: page.name)
def test_every_file_and_folder_of_the_root_has_a_row(page):
    assert tables.map_errors(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("old", "new", "errors"), [
    ("| [`storage/`](storage) |", "| storage |", ["has no row for storage/"]),
    ("| [`LICENSE`](LICENSE) |", "| [`LICENCE`](LICENCE) |",
     ["has no row for LICENSE", "names LICENCE, which does not exist"]),
    ("`tokens.py`", "`token.py`", ["names storage/token.py, which does not exist"]),
])
def test_a_row_that_is_missing_or_wrong_is_named(old, new, errors):
    assert old in README
    assert tables.map_errors(README.replace(old, new)) == errors


def test_only_a_python_file_has_lines(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x\n" * 3)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.lines_of("| [`a.py`](a.py) | 9 | x |\n| [`b/`](b) | | y |\n") == (
        "| [`a.py`](a.py) | 3 | x |\n| [`b/`](b) | | y |\n")


def test_a_ratio_is_filled_in_where_a_page_says_so(tmp_path, monkeypatch):
    rows = [{"what": what, "against": against, "ratio": [ratio, 0, 9]} for what, against, ratio in (
        ("a: training step", "PyTorch", 0.9), ("b: training step", "PyTorch", 1.2),
        ("b: training step", "torch.compile", 7), ("b: generation", "transformers", 0.5))]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "speed.json").write_text(json.dumps([{"rows": rows}, {"rows": []}]))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = "<!-- ratios of training step -->{}<!-- / --> times, <!-- ratios of generation -->{}<!-- / --> times"
    assert tables.ratios_of(page.format("?", "?")) == page.format("0.90–1.20", "0.50–0.50")


def test_an_exchange_sends_gradients_and_weights_once():
    """Two ranks: half of 4 bytes a weight, gradients and then weights. 1 Gbit/s is 125 MB/s."""
    n = scaling.n_weight(scaling.BASE)
    seconds = scaling.exchange_seconds(scaling.BASE, 2, 125e6)
    assert seconds == pytest.approx(4 * n / 125e6) and scaling.exchange_seconds(scaling.BASE, 1, 1) == 0
    rate = scaling.step_seconds(scaling.BASE, 4, 1) / seconds       # so that a step takes as long as an exchange
    assert scaling.efficiency(scaling.BASE, 4, rate, 2, 125e6) == pytest.approx(0.5)
