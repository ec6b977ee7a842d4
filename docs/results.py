"""Make the runs that README.md reports and write them there:  python docs/results.py tinyshakespeare.txt

They are the demo, which needs no file, and tiny Shakespeare with a token for each of its 65 characters. This writes
docs/demo.png, docs/shakespeare.png and the block between the `results` marks in README.md; docs/tables.py then copies
the block into README.zh.md.
"""
import csv
import functools
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import characters

ROOT = Path(__file__).resolve().parent.parent
YARDSTICK = ("--n-block 4 --n-head 4 --embedding-dim 128 --hidden-dim 344 --max-context 64 --tie-embeddings "
             "--batch-size 12 --max-steps 2000 --learning-rate 1e-3 --min-lr 1e-4 --warmup-steps 100 --beta2 0.99 "
             "--weight-decay 0.1 --eval-every 250")


def run(name, title, shown, flags, sampling):
    """Train in a temporary folder, generate with the flags `sampling`, return the lines of README.md about both."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        train = [sys.executable, "train.py", *flags, "--artifact-dir", str(folder)]
        log = subprocess.run(train, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(log)
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        last = rows[-1]
        sample = subprocess.run([sys.executable, "generate.py", str(folder), *sampling],
                                cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        shutil.copy(folder / "loss.png", ROOT / "docs" / f"{name}.png")
    speeds = sorted(float(row["tokens_per_second"]) for row in rows)
    device, parameters = re.search(r"(?s)device +([^;\n]+).*model +([\d,]+) parameters", log).groups()
    return [
        f"### {title}", "", f"    {shown}", "",
        "| parameters | steps | tokens | training loss | validation loss | perplexity | bits per byte "
        "| tokens/s | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {parameters} | {last['step']} | {int(last['tokens']):,} | {float(last['train_loss']):.3f} "
        f"| **{float(last['val_loss']):.3f}** | {float(last['val_perplexity']):.2f} "
        f"| {float(last['val_bits_per_byte']):.3f} | {speeds[len(speeds) // 2]:,.0f} | {float(last['seconds']):.0f} |",
        "", f"{device}, {cpu()}; seed 0; commit {commit()}. "
        f"`python generate.py FOLDER {shlex.join(sampling)}` prints this and stops at its limit:",
        "",
        *("    " + line for line in sample.strip().splitlines()), "",
    ]


@functools.cache                # main calls it before anything is written
def commit():
    git = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def cpu():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def main():
    commit()
    text = Path(sys.argv[1]).resolve()
    lines = run("demo", "The demo", "python train.py --demo", ["--demo"],
                ["--prompt", "The function returns", "--seed", "1", "--max-new-tokens", "80"])
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary, "characters.json")
        characters.write(text, tokenizer)
        shown = f"python train.py --text tinyshakespeare.txt --tokenizer characters.json {YARDSTICK}"
        for flag in (" --n-block", " --batch", " --beta2"):
            shown = shown.replace(flag, f" \\\n       {flag}")
        lines += run("shakespeare", "Tiny Shakespeare", shown,
                     ["--text", str(text), "--tokenizer", str(tokenizer), *YARDSTICK.split()],
                     ["--prompt", "ROMEO:", "--seed", "1", "--max-new-tokens", "300"])
    lines.insert(-1, "\n![training and validation loss on tinyshakespeare](docs/shakespeare.png)")
    readme = ROOT / "README.md"
    readme.write_text(re.sub("(?s)(<!-- results: .*? -->\n).*(?=<!-- /results -->)",
                             lambda found: found[1] + "\n".join(lines).rstrip() + "\n\n", readme.read_text()))


if __name__ == "__main__":
    main()
