"""metrics.csv, the plot, perplexity and entropy, and the diagnosis of what is not finite."""
import math
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import rows

import train
from console import metrics
from data import TokenDataset
from nanollm import Config, NanoLLM
from storage.files import InputError

pytestmark = pytest.mark.usefixtures("cheap")

draw_loss = metrics.draw_loss       # the real one


# ---------------------------------------------------------------- measures

def test_unigram_entropy_by_hand():
    class Tokens:
        vocab_size, tokens = 9, np.array([3, 3, 3, 3, 5, 5, 0, 8], np.uint16)
    assert metrics.unigram_entropy(Tokens) == pytest.approx(1.75 * math.log(2))


def test_perplexity():
    assert metrics.perplexity(math.log(50)) == pytest.approx(50)
    assert math.isnan(metrics.perplexity(math.nan)) and metrics.perplexity(1e9) > 1e300


# ---------------------------------------------------------------- what a run shows and writes

def test_metrics_csv(finished):
    folder, files, _ = finished
    text = (folder / "metrics.csv").read_text()
    assert text.splitlines()[0] == ("step,epoch,tokens,train_loss,val_loss,val_perplexity,val_bits_per_byte,"
                                    "learning_rate,grad_norm,loss_scale,skipped,tokens_per_second,flops_per_second,"
                                    "seconds")
    table = rows(folder)
    # 118 windows by 17: epochs end in steps 7, 14, 21; rows in step 1 and every 3, evaluations every 4 and at the ends
    evaluated = [4, 7, 8, 12, 14, 16, 20, 21]
    assert [int(row["step"]) for row in table] == sorted({1, *range(3, 22, 3), *evaluated})
    for row in table:
        step = int(row["step"])
        for name in ("val_loss", "val_perplexity", "val_bits_per_byte"):
            assert bool(row[name]) == (step in evaluated)
        assert all(row[name] for name in row if not name.startswith("val_"))
        assert int(row["tokens"]) == step * 17 * 8 and float(row["epoch"]) == pytest.approx(step * 17 / 118, abs=1e-6)
        flops = 6 * (2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 290 * 16) + 6 * 2 * 16 * 8
        assert int(row["flops_per_second"]) == pytest.approx(flops * float(row["tokens_per_second"]), abs=flops)
        assert row["skipped"] == "0" and row["loss_scale"] == "1.0"
        if row["val_loss"]:
            assert float(row["val_perplexity"]) == pytest.approx(math.exp(float(row["val_loss"])))
    assert table[-1]["step"] == "21" and table[-1]["train_loss"] and table[-1]["val_loss"]
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    _, val = TokenDataset.from_text(files[1], files[3], 8, 8).split(0.1)
    assert float(table[-1]["val_loss"]) == train.evaluate(NanoLLM.load(folder), val, 17)["loss"]


def test_loss_png_is_drawn_with_labelled_axes(finished, monkeypatch):
    folder = finished[0]
    draw_loss(folder)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    from matplotlib.figure import Figure
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self) or Path(path).touch())
    draw_loss(folder)
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "loss (nats)"
    train_line, val_line = axes.lines
    table = rows(folder)
    assert train_line.get_xdata().tolist() == [int(row["step"]) for row in table]
    assert train_line.get_ydata().tolist() == [float(row["train_loss"]) for row in table]
    assert val_line.get_ydata().tolist() == [float(row["val_loss"]) for row in table if row["val_loss"]]
    train, val = train_line.get_ydata()[-1], val_line.get_ydata().tolist()
    assert [text.get_text() for text in axes.texts] == [f"training {train:.3f}", f"validation {val[-1]:.3f}"]
    assert axes.get_title("left").startswith(f"The lowest validation loss is {min(val):.3f}, at step ")


@pytest.mark.parametrize("name", ["a$^$b", "训练", "%s{"])
def test_any_folder_name_can_be_drawn(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    metrics.rewind(folder / "metrics.csv", 0)
    draw_loss(folder)
    assert (folder / "loss.png").stat().st_size > 1000


# ---------------------------------------------------------------- numbers that are not finite

def diagnosed():
    model = NanoLLM(Config(50, 16, 3, 2, 2, 8, 24))
    x = np.arange(8)[None]
    model.loss(x, x).backward()
    return model, x


def test_the_diagnosis_names_the_first_place():
    model, x = diagnosed()
    assert metrics.first_not_finite(model, x) == "loss"
    model.parameters()["model.layers.2.mlp.up_proj.weight"].grad[0, 0] = np.inf
    assert metrics.first_not_finite(model, x) == "gradient of model.layers.2.mlp.up_proj.weight"
    model, x = diagnosed()
    for name in ("up", "down"):
        model.parameters()[f"model.layers.1.mlp.{name}_proj.weight"].data[...] = 3e38
    with np.errstate(all="ignore"):
        assert metrics.first_not_finite(model, x) == "activations after block 1"
    model.parameters()["model.layers.0.self_attn.k_proj.weight"].data[1, 1] = np.nan
    assert metrics.first_not_finite(model, x) == "weights of model.layers.0.self_attn.k_proj.weight"


# ---------------------------------------------------------------- metrics.csv

ROW = {"step": 3, "epoch": 0.5, "tokens": 7, "train_loss": 1 / 3, "learning_rate": 1e-4, "grad_norm": 2.0,
       "tokens_per_second": 5, "seconds": 1.5}


def test_rewind_forgets_later_rows_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics.rewind(path, 0)
    for step in (3, 6, 9):
        metrics.append(path, ROW | {"step": step})
    whole = path.read_text()
    assert len(metrics.read(path)) == 3 and float(metrics.read(path)[0]["train_loss"]) == 1 / 3
    for torn in ("12,0.5,7", "12,", "\0\0\0\0", "12,0.5,7,,,,,,,,5,6,7\n", "12,0.5,7,,,,,,,,5,6,7,8,9\n",
                 "x" * 50 + "\n", "12,0.5,7,0.3,,,,0.1,2.0,5"):
        path.write_text(whole + torn)
        assert [row["step"] for row in metrics.read(path)] == ["3", "6", "9"]
        metrics.rewind(path, 9)
        assert path.read_text() == whole
    path.write_bytes(whole.encode() + b"\xff\xfe\x00")
    metrics.rewind(path, 6)
    assert [row["step"] for row in metrics.read(path)] == ["3", "6"]
    metrics.rewind(path, 0)
    assert path.read_text() == ",".join(metrics.COLUMNS) + "\n"
    path.unlink()
    assert metrics.read(path) == []


def test_columns_of_older_versions_are_dropped_and_their_rows_are_kept(halfway):
    """Older runs also wrote shares of time: such a run can be resumed, and its rows stay."""
    path = halfway / "metrics.csv"
    before = path.read_text()
    shares = "data_share,forward_share,backward_share,optimizer_share,seconds"
    header, *lines = before.replace(",seconds", f",{shares}", 1).splitlines()
    path.write_text("\n".join([header, *(f"{line[:line.rindex(',')]},0.1,0.4,0.4,0.1{line[line.rindex(','):]}"
                                         for line in lines)]) + "\n")
    metrics.rewind(path, 10)
    assert path.read_text() == before
    path.write_text("step,train_loss\n3,0.5\n")        # a column that a later version adds is empty
    assert metrics.read(path) == [dict.fromkeys(metrics.COLUMNS, "") | {"step": "3", "train_loss": "0.5"}]


FORMS = {"a mark and other line ends": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
         "semicolons and commas": lambda text: text.replace(",", ";").replace(".", ","),
         "tabs and old line ends": lambda text: text.replace(",", "\t").replace("\n", "\r"),
         "quoted": lambda text: "".join(f'"{line}"\n'.replace(",", '","') for line in text.splitlines())}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_a_spreadsheet_saved_keeps_its_rows(form, tmp_path):
    path = tmp_path / "metrics.csv"
    metrics.rewind(path, 0)
    for step in (3, 6, 9):
        metrics.append(path, ROW | {"step": step})
    whole = path.read_text()
    path.write_text(FORMS[form](whole), encoding="utf-8", newline="")
    metrics.rewind(path, 9)
    assert path.read_text() == whole and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [
    lambda whole: whole.replace("6,0.5", "6,Jan 05"), lambda whole: whole.encode("utf-16"),
    lambda whole: whole.replace("step", "Schritt"), lambda whole: f"x{'y' * 200_000}\n{whole}",
    lambda whole: whole.splitlines()[-1], lambda whole: b"\xff\0" * 99])
def test_rows_that_cannot_be_read_are_kept_elsewhere(damage, tmp_path):
    path = tmp_path / "metrics.csv"
    metrics.rewind(path, 0)
    for step in (3, 6, 9):
        metrics.append(path, ROW | {"step": step})
    content = damage(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    (tmp_path / "metrics-1.csv").touch()
    with pytest.warns(UserWarning, match=r"kept as metrics-2\.csv, and [02] of its rows were read"):
        metrics.rewind(path, 9)
    assert (tmp_path / "metrics-2.csv").read_bytes() == before
    assert [row["step"] for row in metrics.read(path)] in ([], ["3", "9"])


def test_a_pipe_in_place_of_the_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(InputError, match=r"metrics\.csv is a pipe"):
        metrics.rewind(tmp_path / "metrics.csv", 0)


def test_cells_with_nothing_to_say_are_empty(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics.rewind(path, 0)
    metrics.append(path, ROW | {"train_loss": math.nan, "grad_norm": math.inf})
    assert path.read_text().splitlines()[1] == "3,0.5,7,,,,,0.0001,,,,5,,1.5"
