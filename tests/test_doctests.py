"""The examples in the docstrings are what the code says."""
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITH_EXAMPLES = sorted(file.stem for file in ROOT.glob("*.py") if "\n>>> " in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted and not results.failed


def test_the_readme_example_prints_what_its_comments_say(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    exec(example, {})
    said = [line.split("# ")[1].split(";")[0].strip() for line in example.splitlines() if line.startswith("print")]
    assert said and capsys.readouterr().out.splitlines() == said
