"""How well a model predicts a text:  python evaluate.py FOLDER --text FILE [--json]"""
import json
from pathlib import Path

import cli
import device
from checkpoint import open_model
from cli import number
from data import TokenDataset
from train import evaluate


def main(argv=None):
    parser = cli.Parser(prog="evaluate.py", description="Loss, perplexity and bits per byte of a model on a text.")
    parser.add_argument("folder", metavar="FOLDER", help="a run's folder, or a Llama-type one from elsewhere")
    parser.add_argument("--text", metavar="FILE", required=True, help="a UTF-8 text that the model was not trained on")
    parser.add_argument("--batch-size", type=number(int, 1), default=8, help="windows of max-context tokens at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="auto", choices=["auto", "gpu", "cpu"], help="CuPy on a GPU, or NumPy")
    args = parser.parse_args(argv)
    device.use(args.device)
    model, *_ = open_model(args.folder)
    dataset = TokenDataset.from_text(args.text, Path(args.folder) / "tokenizer.json", model.config.max_context)
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
