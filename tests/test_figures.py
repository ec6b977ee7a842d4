"""docs/figures.py: the figures show what the code computes, and every one of them can be made."""
import sys
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import tiny

import autograd
import nanollm
from autograd import Tensor
from console import metrics
from data import TokenDataset
from generate import open_model
from nanollm import Config, NanoLLM
from train import Adam

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import figures
import probes

pytestmark = pytest.mark.usefixtures("on_cpu")
CONFIG = Config(30, 16, 2, 4, 2, max_context=12, hidden_dim=24)


def test_graph_shows_the_expression_with_its_values_and_gradients():
    svg = figures.graph_svg("((x * w).sum() + b) ** 2", {"x": [2.0, -1.0], "w": [3.0, 4.0], "b": -1.5})
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    # 6 - 4 - 1.5 = 0.5, and d(s²) = 2s = 1
    assert {"loss = ((x * w).sum() + b) ** 2", "x = [2, -1]", "dx = [3, 4]", "w = [3, 4]", "dw = [2, -1]", "b = -1.5",
            "db = 1", "out = [6, -4]", "dout = [1, 1]", "out = 2", "out = 0.5", "out = 0.25"} <= set(texts)
    assert [name for name in texts if name in figures.RULES] == ["mul", "sum", "add", "power"]
    assert texts.count("leaf") == 3 and texts.count("dout = 1") == 3        # of sum, add and the loss
    arrows = [path for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("fill") == "none"]
    assert len(arrows) == 2 * 6


def test_attention_maps_are_causal_distributions_and_the_ones_the_model_used(rng, monkeypatch):
    model, ids = NanoLLM(CONFIG, seed=1), rng.integers(0, 30, 12)
    model.weights.flat *= 10                                    # attention is far from even
    maps = probes.attention_maps(model, ids)
    assert maps.shape == (2, 4, 12, 12)
    assert np.allclose(maps.sum(-1), 1)
    future = np.triu(np.ones((12, 12), bool), 1)
    assert (maps[..., future] == 0).all() and (maps[..., ~future] > 0).all()
    assert np.ptp(maps[0, :, -1], axis=0).max() > 0.1   # heads differ

    op = nanollm.attention
    monkeypatch.setattr(nanollm, "attention", lambda q, k, v: op(q, Tensor(k.data[:, ::-1].copy()), v))
    with pytest.raises(AssertionError):
        probes.attention_maps(model, ids)


def test_rope_products_depend_on_the_distance_alone(rng):
    model = NanoLLM(CONFIG, dtype=np.float64)
    products = figures.rope_products(*rng.standard_normal((2, 4)), model.cos, model.sin)
    for distance in range(-11, 12):
        assert np.ptp(products.diagonal(distance)) < 1e-12
    assert np.ptp(products[0]) > 0.1


def test_a_measured_step_is_a_step_and_tells_every_op(rng):
    batch = rng.integers(0, 30, (2, 3, 12))
    plain, models, spans = autograd.record, [NanoLLM(CONFIG, seed=1) for _ in range(3)], {}
    models[0].loss(*batch).backward()
    Adam(models[0]).step()
    for model in models[1:]:
        model.recompute = model is models[2]
        tracemalloc.start()
        spans[model.recompute] = probes.training_step(model, Adam(model), lambda: batch)
        tracemalloc.stop()
        assert (model.weights.flat == models[0].weights.flat).all() and not model.weights.grad.any()
    assert autograd.record is plain
    phases = [span.phase for span in spans[False]]
    half = len(phases) // 2 - 1
    assert phases == ["data"] + ["forward"] * half + ["backward"] * half + ["optimizer"]
    ops = {phase: Counter(span.op for span in spans[False] if span.phase == phase) for phase in phases}
    assert ops["forward"] == ops["backward"]
    assert ops["forward"]["linear"] == 8 and ops["forward"]["rmsnorm"] == 5 and ops["forward"]["attention"] == 2
    again = Counter(span.op for span in spans[True] if span.phase == "forward")
    assert again["linear"] == 16 and again["recompute"] == 2
    assert all(span.seconds > 0 and span.peak > model.weights.flat.nbytes for span in spans[False])


def test_part_norms_add_up_to_the_norm_of_the_blocks_matrices(rng):
    model = NanoLLM(CONFIG)
    model.weights.flat[:] = rng.standard_normal(model.weights.flat.size)
    arrays = {name: t.data for name, t in model.parameters().items()}
    blocks = sum((a ** 2).sum() for name, a in arrays.items() if ".layers." in name and a.ndim == 2)
    norms = figures.part_norms(model, arrays)
    assert np.isclose(sum(norm ** 2 for part in norms.values() for norm in part), blocks)
    assert np.isclose(norms["down"][1], np.linalg.norm(arrays["model.layers.1.mlp.down_proj.weight"]))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A tiny run instead of the real one."""
    tiny.make_cheap(monkeypatch)
    files, folder = tiny.make_files(tmp_path), tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tiny.run(*files, "--artifact-dir", folder, "--max-steps", 6, "--max-context", 40)
        train_set, _ = TokenDataset.from_text(files[1], files[3], 40).split(0.1)
    result = figures.Trained(*open_model(folder)[:2], train_set, metrics.read(folder / "metrics.csv"))
    monkeypatch.setattr(figures, "trained", lambda: result)
    monkeypatch.setattr(figures, "LARGER", CONFIG)
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    return result


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_can_be_made(name, trained):
    with matplotlib.rc_context(figures.STYLE):
        figure, caption = figures.FIGURES[name]()
    assert figure and caption.endswith(".") and figures.FIGURES[name].__doc__


def test_the_page_keeps_the_other_figures(trained, capsys):
    figures.main(["graph"])
    figures.main(["sampling"])
    page = (figures.FOLDER / "README.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## graph", "## sampling"]
    for name in ("graph", "sampling"):
        ElementTree.parse(figures.FOLDER / f"{name}.svg")
        assert f"({name}.svg)" in page and f"`python docs/figures.py {name}` on cpu" in page
    figures.main(["graph"])
    assert (figures.FOLDER / "README.md").read_text() == page
