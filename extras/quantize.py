"""Make a model's matrices smaller:  python -m extras.quantize FOLDER OUT [--bits 8|4] [--text FILE]

A weight takes 8 bits, with a scale for each row, or 4 bits, with a scale for each 64 weights of a row. With 4 bits the
embedding and the output layer have 8, because more is lost there. Norms stay float32 (see hardware/quantized.py).
generate.py and evaluate.py take the folder OUT as it is; it cannot be trained.
With --text, a text that the model has not seen, the perplexity of both models on it is printed.
"""
import os
import shutil
import sys
from pathlib import Path

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from console import cli
from data import TokenDataset
from evaluate import evaluate
from generate import open_model
from hardware.quantized import quantize
from storage import huggingface
from storage.checkpoint import usual_window
from storage.files import read_json, readable, refuse_existing, require, whole
from storage.texts import gather, with_stdin

OTHERS = "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"


def tensors(model, bits):
    """{name: array} of what OUT/model.safetensors holds: a matrix's integers and, under name.scale, their scales."""
    result = {}
    for name, w in model.weights.arrays().items():
        if w.ndim == 2:
            inside = name.startswith("model.layers.")
            result[name], result[name + ".scale"] = map(np.ascontiguousarray, quantize(w, bits if inside else 8))
        else:
            result[name] = w
    return result


def write(out, source, model, bits):
    """Make the folder `out` of the quantised model and the other files of `source`."""
    with whole(out) as folder:
        settings = read_json(source / "config.json") | {"quantization_config": huggingface.quantization(bits)}
        huggingface.save_model(folder, settings, tensors(model, bits))
        for name in OTHERS:
            if os.path.lexists(source / name):
                shutil.copyfile(readable(source / name), folder / name)
        refuse_existing(out)


def main(argv=None):
    parser = cli.Parser(usage="python -m extras.quantize FOLDER OUT [options]",
                        description="Make a model's matrices smaller: 8 or 4 bits per weight.")
    parser.add_model()
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not exist yet")
    parser.add("--bits", "8", ["8", "4"], "bits per weight")
    parser.add("--text", None, cli.path, "print the perplexity on this text, before and after; texts and windows are "
               "as in evaluate.py", "FILE")
    parser.add_device()
    args = parser.read(argv)
    source, out, bits = Path(args.folder), Path(args.out), int(args.bits)
    refuse_existing(out)
    model, tokenizer, _ = open_model(source)
    require(not model.weights.bits, f"{source} is quantised already: give the model from which it was made")
    window = usual_window(source, model.config.max_context)
    dataset = args.text and TokenDataset.from_text(gather(with_stdin([args.text]), tokenizer)[0],
                                                   source / "tokenizer.json", window, window)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, source, model, bits)
    for when, which, folder in (("before", model, source), ("after", open_model(out)[0], out)):
        disk = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
        memory = sum(w.nbytes for w in which.weights.arrays().values())
        line = f"{when:<7} {disk / 1e6:10,.2f} MB on disk  {memory / 1e6:10,.2f} MB of weights in memory"
        if dataset:
            result = evaluate(which, dataset)
            line += f"  perplexity {result['perplexity']:,.4f}, {result['bits_per_byte']:.4f} bits per byte"
        print(line)
    return 0


if __name__ == "__main__":
    cli.run(main, "python -m extras.quantize")
