"""The examples in the docstrings are what the code says."""
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITH_EXAMPLES = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts)
                       for room in (".", "hardware", "storage", "console", "images", "extras")
                       for file in (ROOT / room).glob("*.py") if ">>> " in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted and not results.failed


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "CONTRIBUTING.md"])
def test_the_example_of_a_page_prints_what_its_comments_say(page, capsys):
    text = (ROOT / page).read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(example, {})
    said = [line.split("# ")[1].split(";")[0].strip() for line in example.splitlines()
            if line.strip().startswith("print")]
    assert said and capsys.readouterr().out.splitlines() == said
    assert len(example.splitlines()) < 30


def test_the_chinese_page_is_in_step():
    """The same headings, figures, links, commands, numbers in code, table rows and references, in the same order."""
    pages = [re.sub(r"(  # .*?);.*", r"\1", (ROOT / name).read_text(encoding="utf-8"))     # ; and a translated remark
             for name in ("README.md", "README.zh.md")]
    for pattern in (r"(?m)^#+(?= )", r"\]\(((?!README)[^)]+)\)", r"(?m)^    \S.*?(?=  #|$)", r"(?m)^\|",
                    r"(?s)```.*?```", r"(?s)\*Attention Is All.*?\n\n", r"(?m)^(?:-|\d+\.) "):
        english, chinese = (re.findall(pattern, page) for page in pages)
        assert english == chinese and english
    english, chinese = (sorted(re.findall(r"`[^`\n]+`", re.sub(r"(?s)```.*?```", "", page))) for page in pages)
    assert english == chinese
