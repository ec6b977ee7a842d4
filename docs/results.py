"""Make the runs that the documents report and write them there:  python docs/results.py tinyshakespeare.txt fashion

With a text they are the demo, which needs no file, and tiny Shakespeare with a token for each of its 65 characters:
docs/demo.png, docs/shakespeare.png, the parts of README.md between the marks `story` and `results`, and the part of
docs/benchmarks.md between the marks `play`. With a folder, which docs/fashion_mnist.py makes, they are those of the
image classifier: docs/map.png and the part of docs/guide.md between the marks `pictures`. Either may be left out.
docs/tables.py then copies these parts into the Chinese pages.
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
import textwrap
from pathlib import Path

import characters
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # nanollm is run from its folder
from console.demo import SETTINGS  # noqa: E402
from images import demo  # noqa: E402

URL = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
YARDSTICK = ("--n-block 4 --n-head 4 --embedding-dim 128 --hidden-dim 344 --max-context 64 --tie-embeddings "
             "--batch-size 12 --max-steps 2000 --learning-rate 1e-3 --min-lr 1e-4 --warmup-steps 100 --beta2 0.99 "
             "--weight-decay 0.1 --eval-every 250")


def run(name, shown, flags, sampling):
    """Train in a temporary folder, keep loss.png as docs/NAME.png, generate with the flags `sampling`, and return the
    run's row of the table in README.md, the device, and the lines that were generated.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        train = [sys.executable, "train.py", *flags, "--artifact-dir", str(folder)]
        log = subprocess.run(train, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(log)
        with open(folder / "metrics.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        sample = subprocess.run([sys.executable, "generate.py", str(folder), *sampling],
                                cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        shutil.copy(folder / "loss.png", ROOT / "docs" / f"{name}.png")
    device, parameters = re.search(r"(?s)device +([^;\n]+).*model +([\d,]+) parameters", log).groups()
    return (f"| {shown} | {parameters} | {int(last['step']):,} | {int(last['tokens']):,} "
            f"| {float(last['train_loss']):.3f} | **{float(last['val_loss']):.3f}** "
            f"| {float(last['val_perplexity']):.2f} | {float(last['val_bits_per_byte']):.3f} "
            f"| {float(last['seconds']):.0f} |",
            device, [f"    {part}" for line in sample.strip().splitlines() for part in textwrap.wrap(line, 96) or [""]])


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
    """Train an image classifier, use(folder) it, and return its row of the table in docs/guide.md."""
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
    """The lines of docs/guide.md about the image classifier; `folder` holds Fashion-MNIST's train and test."""
    fashion = "--size 28 --num-epochs 3 --learning-rate 3e-3"
    rows = [classifier("python -m images.train --demo", ["--demo"], draw_map),
            classifier(f"python -m images.train --images fashion/train --val-images fashion/test {fashion}",
                       ["--images", str(folder / "train"), "--val-images", str(folder / "test"), *fashion.split()])]
    return ["| | training pictures | steps | training loss | validation loss | validation accuracy "
            "| always the most frequent class | seconds |", "|---|---|---|---|---|---|---|---|",
            *(row for row, _ in rows), "", f"{rows[0][1]}, {cpu()}; seed 0; commit {commit()}."]


def write(file, name, lines):
    """Put these lines between the marks of this name in a file."""
    page = ROOT / file
    page.write_text(re.sub(f"(?s)(<!-- {name}: .*? -->\n).*(?=<!-- /{name} -->)",
                           lambda found: found[1] + "\n".join(lines).rstrip() + "\n\n", page.read_text()))


def texts(text):
    """Write about the demo and about tiny Shakespeare, the file `text`."""
    limit = "This is what it writes until it reaches its limit:"
    sampling = ["--prompt", SETTINGS["prompt"], "--temperature", "0.5", "--seed", "1", "--max-new-tokens", "120"]
    demo_row, device, story = run("demo", "the demo", ["--demo"], sampling)
    write("README.md", "story", [f"    python generate.py runs/llm {shlex.join(sampling)}", "", limit, "", *story])
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary, "characters.json")
        characters.write(text, tokenizer)
        sampling = ["--prompt", "ROMEO:", "--seed", "1", "--max-new-tokens", "300"]
        row, _, play = run("shakespeare", "tiny Shakespeare",
                           ["--text", str(text), "--tokenizer", str(tokenizer), *YARDSTICK.split()], sampling)
    shown = YARDSTICK
    for flag in (" --batch", " --beta2"):
        shown = shown.replace(flag, f" \\\n       {flag}")
    write("docs/benchmarks.md", "play", [
        "    curl -Lo tinyshakespeare.txt \\", f"        {URL}",
        "    python docs/characters.py tinyshakespeare.txt characters.json",
        "    python train.py --text tinyshakespeare.txt --tokenizer characters.json --artifact-dir runs/shakespeare \\",
        f"        {shown}",
        f"    python generate.py runs/shakespeare {shlex.join(sampling)}", "", limit, "", *play])
    write("README.md", "results", [
        "| | parameters | steps | tokens | training loss | validation loss | perplexity | bits per byte | seconds |",
        "|---|---|---|---|---|---|---|---|---|", demo_row, row, "",
        f"{device}, {cpu()}; seed 0; commit {commit()}."])


def main():
    commit()
    for path in map(Path, sys.argv[1:]):
        if path.is_dir():
            write("docs/guide.md", "pictures", pictures(path.resolve()))
        else:
            texts(path.resolve())


if __name__ == "__main__":
    main()
