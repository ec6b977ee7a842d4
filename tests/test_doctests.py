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
def test_the_examples_of_a_page_print_what_their_comments_say(page, capsys):
    examples = re.findall(r"(?s)```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"))
    assert examples
    for example in examples:
        exec(example, {})
        said = [line.split("# ")[1].split(";")[0].strip() for line in example.splitlines()
                if line.strip().startswith("print")]
        assert said and capsys.readouterr().out.splitlines() == said
        assert len(example.splitlines()) < 30


PAGES = ["README", "docs/guide", "docs/ops", "docs/benchmarks", "lessons/README"]        # each with a Chinese one


@pytest.mark.parametrize("name", PAGES)
def test_a_chinese_page_is_in_step(name):
    """The same headings, figures, links, commands, numbers in code, table rows and steps, in the same order."""
    pages = [(ROOT / f"{name}{end}").read_text(encoding="utf-8") for end in (".md", ".zh.md")]
    pages = [re.sub(r"  # .*|\.zh(?=\.md)|(?<=\.md)#[^)]+", "", page) for page in pages]     # remarks; anchors: below
    for pattern in (r"(?m)^#+(?= )", r"\]\(([^#)]+)\)", r"(?m)^    \S.*", r"(?m)^\|", r"(?s)```.*?```",
                    r"(?m)^(?:-|\d+\.) "):
        english, chinese = (re.findall(pattern, page) for page in pages)
        assert english == chinese
    english, chinese = (sorted(re.findall(r"`[^`\n]+`", re.sub(r"(?s)```.*?```", "", page))) for page in pages)
    assert english == chinese


def anchors(page):
    """What GitHub calls the headings of a page: small letters, hyphens for spaces, no other punctuation."""
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            for heading in re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", [*(name + end for name in PAGES for end in (".md", ".zh.md")), "CONTRIBUTING.md"])
def test_every_link_of_a_page_leads_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or target.suffix == ".py" or anchor in anchors(target), link
