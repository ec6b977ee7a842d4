"""The examples in the docstrings are what the code says."""
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITH_EXAMPLES = sorted(file.stem for file in ROOT.glob("*.py") if "\n>>> " in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted and not results.failed
