"""Generate text with a model:  python generate.py FOLDER --prompt TEXT [--stop TEXT] [--num-samples N]

The text goes to stdout as it comes, everything else to stderr.

A model sees at most max_context tokens, its training limit. The text may be longer, and the prompt too: when the
context is full, its oldest half is dropped and the rest is read again (see `NanoLLM.generate`).
"""
import sys
import time
from pathlib import Path

import numpy as np

from console import chat, cli
from console.chat import Template
from console.cli import number
from nanollm import NanoLLM
from storage.checkpoint import check_ended
from storage.files import InputError, dangling, require
from storage.huggingface import text_ends
from storage.tokens import Decoder, encode_prompt, load_tokenizer, vocab_size


def open_model(folder):
    """(model, tokenizer, its Ends) of a Hugging Face folder. Raises InputError that names what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(dangling(folder) or
                         f"{folder} is not a folder: give one that training or transformers has written")
    check_ended(folder)
    model, tokenizer = NanoLLM.load(folder, trainable=False), load_tokenizer(folder / "tokenizer.json")
    if vocab_size(tokenizer) > model.config.vocab_size:
        raise InputError(f"{folder / 'tokenizer.json'} has {vocab_size(tokenizer)} tokens, but the model has "
                         f"only {model.config.vocab_size}")
    return model, tokenizer, text_ends(folder, tokenizer, model.config.vocab_size)


class Text:
    """A text that grows token by token. `ready` is the part that can be printed now; `show` moves it to `shown`.

    The text ends before the first of the strings `stops` that it completes; only what comes after the prompt is
    searched. Text at the end that may be the beginning of a stop string is held back until the next token decides.
    The result does not depend on how tokens cut the text into pieces.
    """
    def __init__(self, decoder, prompt=(), stops=(), eos=()):
        self.decoder, self.stops, self.eos = decoder, stops, eos
        self.ready, self.held, self.ended, self.n_token = "".join(map(decoder.add, prompt)), "", False, 0
        self.shown = ""

    def add(self, token):
        """Take the model's next token. After the end of the text it is ignored."""
        if self.ended:
            return
        self.n_token += 1
        if token in self.eos:
            self.end()
        else:
            self.search(self.decoder.add(token))

    def end(self):
        """End the text, unless it has ended: no more tokens come."""
        if not self.ended:
            self.search(self.decoder.rest())
            self.ready, self.held, self.ended = self.ready + self.held, "", True

    def search(self, piece):
        """Take the next piece of the text: show it, hold it back, or end before a stop string."""
        self.held += piece
        found = [(self.held.index(stop) + len(stop), -len(stop)) for stop in self.stops if stop in self.held]
        if found:
            end, length = min(found)            # the first that is complete; of two that end there the longer
            self.ready, self.held, self.ended = self.ready + self.held[:end + length], "", True
            return
        waits = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        shown = len(self.held) - waits
        self.ready, self.held = self.ready + self.held[:shown], self.held[shown:]


def show(texts, turn):
    """Print what is ready of texts[turn]; if that text has ended, continue with the next one. Return the index of the
    text to print next. (Texts grow together, but they are printed one after the other.)
    """
    while True:
        print(texts[turn].ready, end="", flush=True)
        texts[turn].shown, texts[turn].ready = texts[turn].shown + texts[turn].ready, ""
        if not texts[turn].ended or turn + 1 == len(texts):
            return turn
        turn += 1
        print("\n---")


def write(model, texts, prompt, args, eos):
    """Print the texts while the model continues the prompt, a list of ids. Returns when it began and when each token
    came.
    """
    times, turn = [time.perf_counter()], show(texts, 0)
    for tokens in model.generate(np.tile(prompt, (len(texts), 1)), args.max_new_tokens, args.temperature,
                                 args.top_k, args.top_p, args.seed, eos):
        times.append(time.perf_counter())
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.add(token)
        turn = show(texts, turn)
        if all(text.ended for text in texts):
            break
    for text in texts:
        text.end()
    show(texts, turn)
    print()
    return times


def sample_text(model, tokenizer, prompt, dataset, seed, length=60):
    """The prompt, a list of ids, and how the model continues it: what train.py shows. An empty prompt stands for the
    dataset's first words.
    """
    ids = prompt or dataset.tokens[:8].tolist()
    text = Text(Decoder(tokenizer), [*ids, *model.generate(ids, length, temperature=0.8, top_p=0.95, seed=seed)])
    text.end()
    return text.ready if prompt else text.ready.lstrip("\ufffd")       # the first word may begin inside a character


def speed(n_prompt, n_sample, n_new, began, first_token, ended):
    """A line that says how fast the prompt was read and the new tokens written. The last three are times."""
    line = f"{n_prompt:,} prompt tokens read in {first_token - began:.2f} s, {n_new:,} new ones written"
    if ended == first_token:
        return line
    n_timed = n_new - n_sample              # reading the prompt gave the first token of each text
    return f"{line} at {n_timed / (ended - first_token):,.0f} tokens/s"


def command_line():
    parser = cli.Parser(usage="python generate.py FOLDER --prompt TEXT [options]",
                        description="Generate text with a model. The prompt and the text may be longer than the "
                        "model's max_context: when the context is full, its oldest half is dropped and the rest is "
                        "read again.")
    parser.add_model()
    parser.add("--prompt", "", cli.text, "what the text begins with", metavar="TEXT")
    parser.add("--chat", False, bool, "talk to a chat model: it answers the --prompt, then each line that you type, "
               "until Ctrl-D")
    parser.add("--max-new-tokens", 200, number(int, 1), "highest number of tokens to add")
    parser.add_argument("--stop", metavar="TEXT", type=cli.text, action="append", default=[],
                        help="stop before this text if the model writes it; repeatable")
    parser.add("--num-samples", 1, number(int, 1, 1000), "number of texts from one prompt; they are written together "
               "and shown one after the other, with a line --- between them")
    parser.add("--temperature", 0.8, number(float, 0), "how random the choice of a token is; 0: always the likeliest")
    parser.add("--top-k", None, number(int, 1), "choose only among the N likeliest tokens; default: among all")
    parser.add("--top-p", 0.95, number(float, 0, 1, open_low=True),
               "choose among the likeliest tokens that together have this probability; 1: among all")
    parser.add("--seed", None, number(int, 0), "the same seed gives the same text, for the same number of samples; "
               "default: a new one each time")
    parser.add_device()
    return parser


def converse(model, tokenizer, eos, args):
    """Answer the --prompt, then each line of stdin. Before each answer the model reads the whole conversation again."""
    template = Template(Path(args.folder))
    eos, said = [*eos, *template.end(tokenizer)], []
    for message in chat.messages(args.prompt):
        said.append({"role": "user", "content": message})
        answer = Text(Decoder(tokenizer), (), args.stop, eos)
        write(model, [answer], encode_prompt(tokenizer, template.render(said)), args, eos)
        said.append({"role": "assistant", "content": answer.shown})


def main(argv=None):
    args = command_line().read(argv)
    if "" in args.stop:
        raise InputError("--stop: an empty text would end every text at once; give at least one character")
    model, tokenizer, ends = open_model(args.folder)
    cli.reconfigure(encoding="utf-8")
    if args.chat:
        require(args.num_samples == 1, "--chat gives one answer: leave out --num-samples")
        converse(model, tokenizer, ends.eos, args)
        return 0
    prompt = ends.front + encode_prompt(tokenizer, args.prompt) or ends.bos
    if not prompt:
        raise InputError("this model has no BOS token: give a --prompt" + (" with words in it" if args.prompt else ""))
    texts = [Text(Decoder(tokenizer), prompt, args.stop, ends.eos) for _ in range(args.num_samples)]
    times = write(model, texts, prompt, args, ends.eos)
    if sys.stderr.isatty():
        n_new = sum(text.n_token for text in texts)
        print(speed(len(prompt), args.num_samples, n_new, times[0], times[1], times[-1]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
