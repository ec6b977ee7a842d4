"""How well a model predicts a text:  python evaluate.py FOLDER --text FILE [--json]"""
import json
from pathlib import Path

import cli
import device
from checkpoint import open_model
from cli import number
from data import TokenDataset
from device import InputError
from train import evaluate


def main(argv=None):
    parser = cli.Parser(prog="evaluate.py", description="Loss, perplexity and bits per byte of a model on a text.")
    parser.add_argument("folder", metavar="FOLDER", help="a run's folder, or a Llama-type one from elsewhere")
    parser.add_argument("--text", metavar="FILE", required=True, help="a UTF-8 text that the model was not trained on")
    parser.add("--seq-len", None, number(int, 1), "tokens in a window; by default as many as the model can take")
    parser.add("--batch-size", 8, number(int, 1), "windows at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.device:
        device.use(args.device)
    model, *_ = open_model(args.folder)
    longest = model.config.max_context
    if (args.seq_len or 0) > longest:
        raise InputError(f"--seq-len {args.seq_len} is more than the model's longest context, {longest}")
    dataset = TokenDataset.from_text(args.text, Path(args.folder) / "tokenizer.json", args.seq_len or longest)
    result = evaluate(model, dataset, args.batch_size)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"loss           {result['loss']:.4f} nats per token\n"
              f"perplexity     {result['perplexity']:,.2f}\n"
              f"bits per byte  {result['bits_per_byte']:.4f}\n"
              f"tokens         {result['tokens']:,} predicted, of {result['bytes']:,} bytes")
    return 0


if __name__ == "__main__":
    cli.run(main)
