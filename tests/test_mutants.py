"""The script that plants bugs makes every kind, the tests catch them, and the unchanged files pass."""
import mutants
import pytest
from conftest import only_ci


def test_every_kind_of_bug_is_made():
    source = "def op(x, w):\n    out[s] = _t(x) * w - 0.5\n    total += out\n    return w if x > 0 else -w\n"
    made = {(m.line, m.change, m.after) for m in mutants.mutants(source)}
    assert {
        (2, "drop a term", "out[s] = (_t(x) * w)"), (2, "drop a term", "out[s] = -(0.5)"),
        (2, "turn a sign", "out[s] = (_t(x) * w) + (0.5)"), (2, "drop a factor", "out[s] = (_t(x)) - 0.5"),
        (2, "drop a factor", "out[s] = (w) - 0.5"), (2, "drop a transpose", "out[s] = x * w - 0.5"),
        (2, "scale a number", "out[s] = _t(x) * w - (0.5 * 1.001)"), (2, "zero", "out[s] = (_t(x) * w - 0.5) * 0"),
        (2, "scale", "out[s] = (_t(x) * w - 0.5) * 1.001"), (3, "drop a statement", "pass"),
        (3, "overwrite", "total = out"), (4, "always", "return w if True else -w"),
        (4, "never", "return w if False else -w"), (4, "compare otherwise", "return w if x >= 0 else -w"),
        (4, "turn a sign", "return w if x > 0 else w"),
    } <= made


def test_text_of_errors_is_left_alone():
    assert not list(mutants.mutants("def op(x):\n    raise ValueError(f'{x - 1} und {-x}')\n"))


def test_the_list_of_mutants_that_are_no_bugs_is_up_to_date():
    assert not mutants.everything()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mutants.workplace(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("function, change", [
    ("softmax", "scale"), pytest.param("linear", "drop a transpose", marks=only_ci("a second"))])
def test_a_planted_bug_is_caught(function, change, folder):
    bug = next(m for m in mutants.everything()[0] if (m.function, m.change) == (function, change))
    assert not mutants.survives(bug, folder)


def test_the_files_themselves_are_not_caught(folder):
    assert not mutants.caught(folder, "-k", "softmax and test_gradient")
