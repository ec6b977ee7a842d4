"""Make the runs that README.md reports and write them there:  python docs/results.py tinyshakespeare.txt fashion

With a text they are the demo, which needs no file, and tiny Shakespeare with a token for each of its 65 characters:
docs/demo.png, docs/shakespeare.png and the block between the `results` marks in README.md. With a folder, which
docs/fashion_mnist.py makes, they are those of the image classifier: docs/map.png and the block between the `pictures`
marks. Either may be left out. docs/tables.py then copies both blocks into README.zh.md.
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
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # nanollm is run from its folder
from images import demo  # noqa: E402

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


def draw_map(folder):
    """Draw docs/map.png: where the demo's model, in this run's folder, sees a 4 on a page of sixteen digits."""
    rng, page = np.random.default_rng(7), Image.new("RGB", (128, 128))
    for i, digit in enumerate("4170482344954164"):
        page.paste(demo.draw(digit, rng.choice(demo.FONTS["val"]), rng), (i % 4 * 32, i // 4 * 32))
    page.save(f"{folder}/page.png")
    subprocess.run([sys.executable, "-m", "images.infer", folder, "--image", f"{folder}/page.png", "--size", "128",
                    "--map", "docs/map.png"], cwd=ROOT, check=True)


def classifier(shown, flags, use=lambda folder: None):
    """Train an image classifier, use(folder) it, and return its row of the table in README.md."""
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "images.train", *flags, "--artifact-dir", f"{folder}/run"]
        log = subprocess.run(train, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(log)
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        use(f"{folder}/run")
    pattern = r"(?s)device +([^;\n]+).*: ([\d,]+) for training.* right for ([\d.]+)%"
    device, count, share = re.search(pattern, log).groups()
    return (f"| `{shown}` | {count} | {last['step']} | {float(last['train_loss']):.3f} | {float(last['val_loss']):.3f} "
            f"| **{float(last['val_accuracy']):.1%}** | {share}% | {float(last['seconds']):.0f} |"), device


def pictures(folder):
    """The lines of README.md about the image classifier; `folder` holds Fashion-MNIST's train and test."""
    fashion = "--size 28 --num-epochs 3 --learning-rate 3e-3"
    rows = [classifier("python -m images.train --demo", ["--demo"], draw_map),
            classifier(f"python -m images.train --images fashion/train --val-images fashion/test {fashion}",
                       ["--images", str(folder / "train"), "--val-images", str(folder / "test"), *fashion.split()])]
    return ["| | training pictures | steps | training loss | validation loss | validation accuracy "
            "| always the most frequent class | seconds |", "|---|---|---|---|---|---|---|---|",
            *(row for row, _ in rows), "", f"{rows[0][1]}, {cpu()}; seed 0; commit {commit()}."]


def write(name, lines):
    """Put these lines between the marks of this name in README.md."""
    readme = ROOT / "README.md"
    readme.write_text(re.sub(f"(?s)(<!-- {name}: .*? -->\n).*(?=<!-- /{name} -->)",
                             lambda found: found[1] + "\n".join(lines).rstrip() + "\n\n", readme.read_text()))


def texts(text):
    """The lines of README.md about the demo and about tiny Shakespeare, the file `text`."""
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
    return lines


def main():
    commit()
    for path in map(Path, sys.argv[1:]):
        if path.is_dir():
            write("pictures", pictures(path.resolve()))
        else:
            write("results", texts(path.resolve()))


if __name__ == "__main__":
    main()
