"""Let a model write:  python generate.py FOLDER --prompt TEXT

The text goes to stdout as it comes, everything else to stderr.
"""
import itertools
import sys

import cli
import device
from checkpoint import open_model
from cli import number
from device import InputError


def stream_text(tokenizer, ids):
    """Yield the text of an iterator of ids piece by piece, together tokenizer.decode of them all.

    A tokenizer that works on bytes spreads a character over several tokens and decodes a part of it as U+FFFD: such a
    piece waits for its next token. What follows is decoded behind the last words, as it may depend on them (the first
    word loses its space), but not behind all of them: that would take ever longer.
    """
    window, shown, mark = [], "", 0             # window[mark:] came after a place where all characters were complete
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window)
        if text.endswith("\ufffd"):
            continue
        if len(text) > len(shown):
            yield text[len(shown):]
        shown = text
        if len(window) >= mark + 32:
            window = window[mark:]
            shown, mark = tokenizer.decode(window), len(window)


def main(argv=None):
    parser = cli.Parser(prog="generate.py", description="Let a model write.")
    parser.add_argument("folder", metavar="FOLDER", help="a run's folder, or a Llama-type one from elsewhere")
    parser.add("--prompt", "", cli.text, "what the text begins with")
    parser.add("--max-new-tokens", 200, number(int, 1), "how many tokens to add at most")
    parser.add("--temperature", 0.8, number(float, 0), "0: always the likeliest token")
    parser.add("--top-k", None, number(int, 1), "choose among the k likeliest tokens only")
    parser.add("--top-p", 0.95, number(float, 0, 1, open_low=True),
               "choose among the likeliest tokens that hold this share of the probability")
    parser.add("--seed", None, number(int, 0), "the same seed gives the same text; by default it varies")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.device:
        device.use(args.device)
    model, tokenizer, bos, eos = open_model(args.folder)
    prompt = ([] if bos is None else [bos]) + tokenizer.encode(args.prompt, add_special_tokens=False).ids
    if not prompt:
        raise InputError("this model has no token to begin a text with: give the beginning with --prompt TEXT")
    sys.stdout.reconfigure(encoding="utf-8")
    new = model.generate(prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, eos)
    for piece in stream_text(tokenizer, itertools.chain(prompt, new)):
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    cli.run(main)
