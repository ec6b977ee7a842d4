"""Fill in the numbers of README.md, docs/guide.md, docs/ops.md and docs/benchmarks.md:  python docs/tables.py [--check]

They are: the lines of each Python file at the root, the line of each op in its file and the number of its tests, and
the comparison in docs/speed.json, which benchmarks/speed.py writes. NAME.zh.md gets the parts of NAME.md that
a script wrote, with their captions translated. docs/scaling.md is rewritten. People write the words, scripts
write the numbers.

Exit status 1: README's table of the root has no row for a file or folder there, or names something that does not
exist. With --check nothing is written, and the status is also 1 if a page is out of date.
"""
import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import scaling

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [(ROOT / f"{name}.md", ROOT / f"{name}.zh.md")
         for name in ("README", "docs/guide", "docs/ops", "docs/benchmarks")]
README = PAIRS[0]
ROW = re.compile(r"(?m)^(\| \[`([\w./-]+)`\]\([^)]+\) \| )\d* ?\|(.*)$")      # | [`name`](name) | 123 | what it is |
CHINESE = {
    "parameters | steps | tokens | training loss | validation loss | perplexity | bits per byte | seconds":
        "参数量 | 步数 | token 数 | 训练损失 | 验证损失 | 困惑度 | 每字节比特数 | 秒",
    "training pictures | steps | training loss | validation loss | validation accuracy "
    "| always the most frequent class | seconds":
        "训练图片 | 步数 | 训练损失 | 验证损失 | 验证准确率 | 总猜最常见的类别 | 秒",
    "This is what it writes until it reaches its limit:": "它写出以下内容，达到 token 数上限后停止：",
    "| the demo |": "| demo |",
    "compared with | its figure | time ratio (range) | peak MB of both | share of the sgemm rate of both":
        "对比对象 | 对方的数值 | 时间之比（范围）| 双方的内存峰值，MB | 双方达到 sgemm 速率的比例",
    ": training step |": "：训练步 |",
    ": generation |": "：文本生成 |",
    "| tokenisation |": "| 分词 |",
    "tokenizers, its lines": "tokenizers，逐行",
    " process |": " 个进程 |",
    " processes |": " 个进程 |",
    "tokens/s |": "token/秒 |",
    "MB/s |": "MB/秒 |",
    " ms |": " 毫秒 |",
}


def lines_of(text):
    """Fill the second cell of each row about a file of Python."""
    def count(match):
        start, name, rest = match.groups()
        lines = f"{len((ROOT / name).read_text(encoding='utf-8').splitlines())} " if name.endswith(".py") else ""
        return f"{start}{lines}|{rest}"
    return ROW.sub(count, text)


def map_errors(text):
    """What is wrong with the rows about the files and folders of the root."""
    rows = {name: rest for _, name, rest in ROW.findall(text)}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    there = {re.sub("/.*", "/", path) for path in tracked.splitlines() if path[0] != "."}
    named = {name + file for name, rest in rows.items() if name.endswith("/")
             for file in re.findall(r"`(\w+\.py|\w+/)`", rest)}
    return [*(f"has no row for {name}" for name in sorted(there - rows.keys())),
            *(f"names {name}, which does not exist" for name in sorted(rows.keys() - there)),
            *(f"names {name}, which does not exist" for name in sorted(named) if not (ROOT / name).exists())]


@functools.cache
def tests():
    """The ids of all tests of the ops, "…test_gradient[softmax-batch]", one per line."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", "-p", "no:cacheprovider",
               "tests/test_autograd.py", "tests/test_precision.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def ops_of(text):
    """| `name`, `name` | forward | backward | line | tests |: fill the last two cells of each row about ops."""
    known, ids = {}, tests()
    for file in ("autograd.py", "images/ops.py"):
        known |= {node.name: f"[{node.lineno}](../{file}#L{node.lineno})"
                  for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
                  if isinstance(node, ast.FunctionDef)}

    def fill(match):
        names = re.findall(r"`(\w+)`", match[2])
        if not set(names) <= known.keys():
            return match[0]
        where = ", ".join(known[name] for name in names)
        either = "|".join(names)
        count = len(re.findall(rf"\[(?:cpu-)?(?:float\d\d-)?(?:{either})\b", ids)
                    or re.findall(rf"::test_\w*(?:{either})", ids))
        return f"{match[1]} {where} | {count} |"
    return re.sub(r"(?m)^(\| ((?:`\w+`(?:, )?)+) \|[^|\n]*\|[^|\n]*\|)[^|\n]*\|[^|\n]*\|$", fill, text)


SPEED = ("| | nanollm | compared with | its figure | time ratio (range) | peak MB of both "
         "| share of the sgemm rate of both |\n|---|---|---|---|---|---|---|")


def comparison(row):
    """The row of a table below SPEED for one of the comparisons that benchmarks/speed.py makes."""
    memory = " / ".join(f"{size / 1e6:,.0f}" for size in row.get("peak_bytes", ()))
    share = " / ".join(f"{share:.0%}" for share in row.get("share_of_gemm", ()))
    median, low, high = row["ratio"]
    return (f"| {row['what']} | {shown(row['nanollm'])} {row['unit']} | {row['against']} | {shown(row['other'])} "
            f"| **{median:.2f}** ({low:.2f}–{high:.2f}) | {memory} | {share} |")


def speed():
    """The runs in docs/speed.json: a table for each, below its command and machine."""
    rows = []
    for run in json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8")):
        about = run["header"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        rows += [f"`{about['command']}`  ",
                 f"{about['cpu']}, {about['threads']} threads, {about['device']}, {about['dtype']}; "
                 f"seed {about['seed']}; commit {about['commit']}; {versions}", "",
                 SPEED, *map(comparison, run["rows"]), ""]
    return "\n".join(rows)


def ratios_of(text):
    """Fill the text after each mark <!-- ratios of WHAT --> with the least and largest ratio of language models."""
    def fill(match):
        ratios = [row["ratio"][0] for run in runs for row in run["rows"] if row["what"].endswith(match[2])
                  and row["against"] in ("PyTorch", "transformers") and not row["what"].startswith("images")]
        return f"{match[1]}{min(ratios):.2f}–{max(ratios):.2f}{match[3]}"
    runs = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))
    return re.sub(r"(<!-- ratios of ([\w ]+) -->).*?(<!-- / -->)", fill, text)


def shown(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


BLOCK = re.compile(r"(?s)<!-- (\w+): written by .*?<!-- /\1 -->")


def translated(text):
    for english, chinese in CHINESE.items():
        text = text.replace(english, chinese)
    return text


def filled(english, chinese):
    """(the text of an English page, that of its Chinese one) with every number up to date."""
    texts = [ratios_of(ops_of(lines_of(page.read_text(encoding="utf-8")))) for page in (english, chinese)]
    texts[0] = re.sub(r"(?s)(<!-- speed: .*? -->\n).*?(<!-- /speed -->)",
                      lambda match: f"{match[1]}{speed()}{match[2]}", texts[0])
    written = {match[1]: translated(match[0]) for match in BLOCK.finditer(texts[0])}
    texts[1] = BLOCK.sub(lambda match: written[match[1]], texts[1])
    return texts


def main():
    pages = {scaling.PAGE: scaling.page()}
    for pair in PAIRS:
        pages |= zip(pair, filled(*pair), strict=True)
    wrong = [f"{page.name} {error}" for page in README for error in map_errors(pages[page])]
    for page, text in pages.items():
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            wrong.append(f"{page.name} is out of date: python docs/tables.py")
    for error in wrong:
        print(error, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
