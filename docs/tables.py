"""Fill in the figures of README.md and README.zh.md:  python docs/tables.py [--check]

Lines of each file, the place of each op and how many tests it has, and the comparison in docs/speed.json, written by
benchmarks/speed.py. README.zh.md takes from README.md what docs/results.py and benchmarks/recompute.py wrote there.
Words are the authors', numbers are the scripts'. With --check nothing is written; exit status 1 says that something is
out of date.
"""
import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "README.md", ROOT / "README.zh.md"


def lines_of(text):
    """| [`name.py`](name.py) | 123 | …: the second cell of each row about a file."""
    def count(match):
        return f"{match[1]}{len((ROOT / match[2]).read_text(encoding='utf-8').splitlines())} |"
    return re.sub(r"(?m)^(\| \[`([\w/]+\.py)`\]\([^)]+\) \| )\d* ?\|", count, text)


def places():
    """{op: the line of autograd.py at which it is defined}"""
    tree = ast.parse((ROOT / "autograd.py").read_text(encoding="utf-8"))
    return {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}


@functools.cache
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
        count = len(re.findall(rf"\[(?:cpu-)?(?:float\d\d-)?(?:{either})\b", ids)
                    or re.findall(rf"::test_\w*(?:{either})", ids))
        return f"{match[1]} {where} | {count} |"
    return re.sub(r"(?m)^(\| ((?:`\w+`(?:, )?)+) \|[^|\n]*\|[^|\n]*\|)[^|\n]*\|[^|\n]*\|$", fill, text)


def speed():
    """The runs in docs/speed.json, each as a table under what it was."""
    rows = []
    for run in json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8")):
        about = run["header"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        rows += [f"`{about['command']}`  ",
                 f"{about['cpu']}, {about['threads']} threads, {about['device']}, {about['dtype']}; "
                 f"seed {about['seed']}; commit {about['commit']}; {versions}", "",
                 "| | nanollm | beside | | ratio of times (range) | peak MB | share of the sgemm rate |",
                 "|---|---|---|---|---|---|---|"]
        for row in run["rows"]:
            memory = " / ".join(f"{size / 1e6:,.0f}" for size in row.get("peak_bytes", ()))
            share = " / ".join(f"{share:.0%}" for share in row.get("share_of_gemm", ()))
            median, low, high = row["ratio"]
            rows.append(f"| {row['what']} | {shown(row['nanollm'])} {row['unit']} | {row['against']} "
                        f"| {shown(row['other'])} | **{median:.2f}** ({low:.2f}–{high:.2f}) | {memory} | {share} |")
        rows.append("")
    return "\n".join(rows)


def shown(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def block(name, text):
    """(the text between the marks of this name, with the marks)"""
    return re.search(rf"(?s)<!-- {name}: .*?<!-- /{name} -->", text)[0]


def filled(text):
    text = ops_of(lines_of(text))
    for name in ("results", "recompute"):
        text = text.replace(block(name, text), block(name, PAGES[0].read_text(encoding="utf-8")))
    return re.sub(r"(?s)(<!-- speed: written by docs/tables.py -->\n).*?(<!-- /speed -->)",
                  lambda match: f"{match[1]}{speed()}{match[2]}", text)


def main():
    stale = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if "--check" not in sys.argv:
            page.write_text(after, encoding="utf-8")
        elif after != before:
            stale = 1
            print(f"{page.name} is out of date: python docs/tables.py", file=sys.stderr)
    return stale


if __name__ == "__main__":
    sys.exit(main())
