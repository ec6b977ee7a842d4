"""Fill in what README.md counts:  python docs/tables.py [--check]

Lines of each file, the place of each op and how many tests it has. Words are the authors', numbers are the script's.
With --check nothing is written; exit status 1 says that something is out of date.
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"


def lines_of(text):
    """| [`name.py`](name.py) | 123 | …: the second cell of each row about a file."""
    def count(match):
        return f"{match[1]}{len((ROOT / match[2]).read_text(encoding='utf-8').splitlines())} |"
    return re.sub(r"(?m)^(\| \[`([\w/]+\.py)`\]\([^)]+\) \| )\d* ?\|", count, text)


def places():
    """{op: the line of autograd.py at which it is defined}"""
    tree = ast.parse((ROOT / "autograd.py").read_text(encoding="utf-8"))
    return {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}


def tests():
    """The ids of all tests of the ops, "…test_gradient[softmax-batch]", one a line."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", "-p", "no:cacheprovider",
               "tests/test_autograd.py", "tests/test_precision.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def ops_of(text):
    """| `name`, `name` | forward | backward | where | tests |: the last two cells of each row about ops."""
    known, ids = places(), tests()

    def fill(match):
        names = re.findall(r"`(\w+)`", match[2])
        if not set(names) <= known.keys():
            return match[0]
        where = ", ".join(f"[{known[name]}](autograd.py#L{known[name]})" for name in names)
        either = "|".join(names)
        count = len(re.findall(rf"\[(?:float\d\d-)?(?:{either})\b", ids)
                    or re.findall(rf"::test_\w*(?:{either})", ids))
        return f"{match[1]} {where} | {count} |"
    return re.sub(r"(?m)^(\| ((?:`\w+`(?:, )?)+) \|[^|\n]*\|[^|\n]*\|)[^|\n]*\|[^|\n]*\|$", fill, text)


def filled(text):
    return ops_of(lines_of(text))


def main():
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        if after != before:
            print("README.md is out of date: python docs/tables.py", file=sys.stderr)
        return after != before
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
