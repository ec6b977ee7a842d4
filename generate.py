"""Let a model write:  python generate.py FOLDER --prompt TEXT

The text goes to stdout as it comes, everything else to stderr.
"""
import sys

from tokenizers.decoders import DecodeStream

import cli
import device
from checkpoint import open_model
from cli import number
from device import InputError


def stream_text(tokenizer, ids):
    """Yield the text of an iterator of ids piece by piece. A character of several bytes comes when it is complete."""
    stream = DecodeStream(skip_special_tokens=True)
    for token in ids:
        piece = stream.step(tokenizer, token)
        if piece:
            yield piece


def main(argv=None):
    parser = cli.Parser(prog="generate.py", description="Let a model write.")
    parser.add_argument("folder", metavar="FOLDER", help="a run's folder, or a Llama-type one from elsewhere")
    parser.add_argument("--prompt", default="", help="what the text begins with")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=200, help="how many tokens to add at most")
    parser.add_argument("--temperature", type=number(float, 0), default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=number(int, 1), help="choose among the k likeliest tokens only")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), default=0.95,
                        help="choose among the likeliest tokens that hold this share of the probability")
    parser.add_argument("--seed", type=number(int, 0), help="the same seed gives the same text; by default it varies")
    parser.add_argument("--device", default="auto", choices=["auto", "gpu", "cpu"], help="CuPy on a GPU, or NumPy")
    args = parser.parse_args(argv)
    device.use(args.device)
    model, tokenizer, bos, eos = open_model(args.folder)
    prompt = ([] if bos is None else [bos]) + tokenizer.encode(args.prompt, add_special_tokens=False).ids
    if not prompt:
        raise InputError("this model has no token to begin a text with: give the beginning with --prompt TEXT")
    sys.stdout.reconfigure(encoding="utf-8")
    new = model.generate(prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, eos)

    def ids():
        yield from prompt
        yield from new
    for piece in stream_text(tokenizer, ids()):
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    cli.run(main)
