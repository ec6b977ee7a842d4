"""docs/tables.py: README's table of the root names every file and folder there, and nothing else."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import scaling
import tables

README = tables.PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
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


def test_an_exchange_sends_gradients_and_weights_once():
    """Two ranks: half of 4 bytes a weight, gradients and then weights. 1 Gbit/s is 125 MB/s."""
    n = scaling.n_weight(scaling.BASE)
    seconds = scaling.exchange_seconds(scaling.BASE, 2, 125e6)
    assert seconds == pytest.approx(4 * n / 125e6) and scaling.exchange_seconds(scaling.BASE, 1, 1) == 0
    rate = scaling.step_seconds(scaling.BASE, 4, 1) / seconds       # so that a step takes as long as an exchange
    assert scaling.efficiency(scaling.BASE, 4, rate, 2, 125e6) == pytest.approx(0.5)
