"""Let a model write:  python generate.py FOLDER --prompt TEXT [--stop TEXT] [--num-samples N]

The text goes to stdout as it comes, everything else to stderr.

A model sees at most max_context tokens, as many as it was made for. The text may be longer, and the prompt too: when a
token more comes than fit, the oldest half of the context is forgotten and the rest read again (`NanoLLM.generate`).
"""
import itertools
import sys
import time
from pathlib import Path

import numpy as np

from console import cli
from console.cli import number
from hardware import device
from nanollm import NanoLLM
from storage.checkpoint import checkpoints, resume_command
from storage.files import InputError, read_json
from storage.tokens import load_tokenizer, stream_text, vocab_size


def open_model(folder):
    """(model, tokenizer, BOS id or None, EOS ids) of a Hugging Face folder. Raises InputError naming what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one that training or transformers has written")
    if (folder / "metrics.csv").exists() and not (folder / "config.json").exists():
        ready = [folder / "best"] * (folder / "best").exists() + checkpoints(folder)[::-1]
        raise InputError(f"{folder} has no model yet, its training has not ended: "
                         + (f"use {ready[0]}" if ready else f"go on with {resume_command(folder)}"))
    model, tokenizer = NanoLLM.load(folder), load_tokenizer(folder / "tokenizer.json")
    if vocab_size(tokenizer) > model.config.vocab_size:
        raise InputError(f"{folder / 'tokenizer.json'} has {vocab_size(tokenizer)} tokens, the model only "
                         f"{model.config.vocab_size}")
    config = read_json(folder / "config.json")
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token in [*eos, *([] if bos is None else [bos])]:
        if type(token) is not int or not 0 <= token < model.config.vocab_size:
            raise InputError(f"{folder / 'config.json'}: {token!r} is no token id of this model")
    return model, tokenizer, bos, eos


def until_stop(pieces, stops, start=0):
    """Yield the text of `pieces` until the first of the strings `stops` is complete, of which nothing is shown; the
    first `start` characters are not searched. Text at the end that may be the beginning of a stop waits for the next
    piece. However the text is cut into pieces, the result is the same.
    """
    held = ""
    for piece in pieces:
        free, held = piece[:start], held + piece[start:]
        start -= len(free)
        found = [(held.index(stop) + len(stop), -len(stop)) for stop in stops if stop in held]
        if found:
            end, length = min(found)            # complete first; of two that end there the longer
            yield free + held[:end + length]
            return
        waits = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield free + held[:len(held) - waits]
        held = held[len(held) - waits:]
    yield held


def speed(n_prompt, n_sample, n_new, times):
    """A line on how fast it was; times: when it began, and when each step's tokens, one a sample, were there."""
    reading, writing = times[1] - times[0], times[-1] - times[1]
    line = f"{n_prompt:,} prompt tokens read in {reading:.2f} s, {n_new:,} new ones written"
    return line + (f" at {(n_new - n_sample) / writing:,.0f} tokens/s" if writing else "")    # the first: by reading


def main(argv=None):
    parser = cli.Parser(prog="generate.py", description="Let a model write. Prompt and text may be longer than the "
                        "model's max_context: when a token more comes than fit, the oldest half of the context is "
                        "forgotten and the rest read again.")
    parser.add_argument("folder", metavar="FOLDER", help="a run's folder, or a Llama-type one from elsewhere")
    parser.add("--prompt", "", cli.text, "what the text begins with")
    parser.add("--max-new-tokens", 200, number(int, 1), "how many tokens to add at most")
    parser.add_argument("--stop", metavar="TEXT", type=cli.text, action="append", default=[],
                        help="end before this text, should the model write it; may be given several times")
    parser.add("--num-samples", 1, number(int, 1, 1000), "so many texts from one prompt, written together and shown "
               "one after the other, with a line --- between them")
    parser.add("--temperature", 0.8, number(float, 0), "0: always the likeliest token")
    parser.add("--top-k", None, number(int, 1), "choose among the k likeliest tokens only")
    parser.add("--top-p", 0.95, number(float, 0, 1, open_low=True),
               "choose among the likeliest tokens that hold this share of the probability")
    parser.add("--seed", None, number(int, 0), "the same seed gives the same text, for the same number of samples; by "
               "default it varies")
    parser.add_device()
    args = parser.parse_args(argv)
    if "" in args.stop:
        raise InputError("--stop: an empty text would end every text at once; give at least one character")
    if args.device:
        device.use(args.device)
    model, tokenizer, bos, eos = open_model(args.folder)
    prompt = ([] if bos is None else [bos]) + tokenizer.encode(args.prompt, add_special_tokens=False).ids
    if not prompt:
        raise InputError("this model has no token to begin a text with: give the beginning with --prompt TEXT")
    sys.stdout.reconfigure(encoding="utf-8")
    new = model.generate(np.tile(prompt, (args.num_samples, 1)), args.max_new_tokens, args.temperature, args.top_k,
                         args.top_p, args.seed, eos)
    times, count = [time.perf_counter()], 0

    def clocked(steps):
        for tokens in steps:
            times.append(time.perf_counter())
            yield tokens

    def row(steps, i):
        nonlocal count
        for tokens in steps:
            count += 1
            if tokens[i] in eos:
                return
            yield int(tokens[i])
    given = len("".join(stream_text(tokenizer, prompt)))
    for i, steps in enumerate(itertools.tee(clocked(new), args.num_samples)):   # no row goes further than it is read
        if i:
            print("---")
        pieces = stream_text(tokenizer, itertools.chain(prompt, row(steps, i)))
        for piece in until_stop(pieces, args.stop, given):
            print(piece, end="", flush=True)
        print()
    if sys.stderr.isatty():
        print(speed(len(prompt), args.num_samples, count, times), file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
