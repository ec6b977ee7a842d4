"""How well a model predicts a text:  python evaluate.py FOLDER --text FILE [--stride N] [--figure PNG] [--json]

The text is cut into windows, and every token of it but the first is predicted once, from what stands before it in its
window. By default windows do not overlap, as in train.py's validation. That is the least work, but the first tokens of
each window are predicted from next to nothing. With --stride N the next window begins N tokens later, and only its last
N tokens count: each is predicted from at least seq-len - N + 1 others. That shows better what the model can do, and
costs seq-len / N times as much.
"""
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np

from autograd import logit_blocks, loss_of_rows, no_grad
from console import cli, drawing, figure
from console.cli import number
from console.metrics import perplexity
from data import TokenDataset
from generate import open_model
from hardware import device, formulas, ranks
from storage.checkpoint import WINDOW, usual_window
from storage.files import require
from storage.texts import gather, with_stdin

COMPARED = 1 << 16      # logits that a thread compares at a time, few enough to stay in its cache


def token_losses(x, w, targets, ranked=False):
    """The loss of each target in nats and, if `ranked` (else None), its rank: the number of other tokens with a logit
    that is not below the target's. So a tie, or a NaN, is no success. The model's loss is the mean of these losses.

    x (B, T, C) hidden states, w (V, C) the output layer, targets (B, T) -> two arrays (B, T).
    """
    rows, shape, V = x.data.reshape(-1, x.shape[-1]), x.shape[:-1], len(w.data)
    targets = device.as_ids(targets, V).reshape(-1)
    losses = device.xp.empty(len(rows), np.promote_types(x.dtype, np.float32))
    places = device.xp.empty(len(rows), np.int64)
    for part, z in logit_blocks(rows, device.rounded(w, rows.dtype)):
        if ranked:
            places[part] = ranks_of(z, targets[part])
        loss_of_rows(z, targets[part], losses[part])        # the last use of z
    return losses.reshape(shape), places.reshape(shape) if ranked else None


def ranks_of(z, targets):
    """The rank of each row's target in the logits z (N, V): how many other tokens' logits are not below its own."""
    ranks = device.xp.empty(len(z), np.int64)

    def block(rows):
        own = z[device.xp.arange(rows.start, rows.stop), targets[rows]]
        ranks[rows] = z.shape[1] - 1 - formulas.count_below(z[rows], own[:, None])
    device.sweep(block, len(z), COMPARED // z.shape[1])
    return ranks


def evaluate(model, dataset, batch_size=8, scores=None, watch=iter, team=ranks.ALONE):
    """The loss on a text: {loss, perplexity, bits_per_byte, tokens, bytes}; every token but the first is a target once.

    loss is the mean cross-entropy in nats per token. perplexity is its exponential: as unsure as when choosing evenly
    among this number of tokens. bits_per_byte, total nats / ln 2 / source bytes, is comparable between tokenizers.
    A dataset whose stride is below its seq_len gives each target more context, at more cost: its windows overlap.
    `scores`, if given, gets the losses and ranks of all targets, batch by batch (see Scores.add). In each turn every
    rank of a team (hardware/ranks.py) takes a batch, and all get the result. `watch` is given the turns and yields
    them; it may raise to end the evaluation (see Stop.watch in console/cli.py).
    """
    nats, count, ranked = 0.0, 0, scores is not None
    with no_grad():
        for turn in watch(itertools.zip_longest(*[dataset.in_order(batch_size)] * team.size)):
            if turn[team.rank] is None:         # the last turn has fewer batches
                continue
            x, y, new = turn[team.rank]
            start = x.shape[1] - new            # the targets before it counted in an earlier window
            hidden = model.hidden(x)[:, start:]
            losses, places = token_losses(hidden, model.lm_head, y[:, start:], ranked)
            losses = device.to_host(losses)                                                     # (B, new)
            nats, count = nats + float(losses.sum(dtype=np.float64)), count + losses.size
            if ranked:
                scores.add(start, losses, device.to_host(places))
    nats, count = team.sum(nats), team.sum(count)
    loss = nats / count
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": nats / math.log(2) / dataset.source_bytes,
            "tokens": count, "bytes": dataset.source_bytes}


class Scores:
    """What an evaluation finds out about single targets, in memory that does not grow with the text.

    Attributes: hits, {k: how many targets ranked among the first k tokens}; count, total and squares (seq_len,): the
    number, sum and sum of squares of the losses at each position of a window; first: the losses of the first targets.
    """
    def __init__(self, seq_len):
        self.hits, self.first = {1: 0, 5: 0}, np.zeros(0)
        self.count, self.total, self.squares = np.zeros((3, seq_len))

    def add(self, start, losses, ranks):
        """Take the losses and ranks (B, n) of the targets at positions start … start + n - 1 of B windows. A rank is
        the number of other tokens that the model thought at least as likely.
        """
        for k in self.hits:
            self.hits[k] += int((ranks < k).sum())
        losses = losses.astype(np.float64)
        if len(self.first) < figure.TOKENS:
            self.first = np.append(self.first, losses)[:figure.TOKENS]
        positions = slice(start, start + losses.shape[1])
        self.count[positions] += len(losses)
        self.total[positions] += losses.sum(0)
        self.squares[positions] += (losses ** 2).sum(0)


def command_line():
    parser = cli.Parser(usage="python evaluate.py FOLDER --text FILE [options]",
                        description="Measure how well a model predicts a text: loss, perplexity, bits per byte and "
                        "accuracy. Every token except the first is predicted once.")
    parser.add_model()
    parser.add_argument("--text", metavar="FILE", type=cli.path, required=True, action="append",
                        help="a UTF-8 text that the model was not trained on, or a folder or pattern of such, as in "
                        "train.py; can be given several times")
    parser.add("--field", "text", cli.text, "the field of a .jsonl's lines that holds a text", "NAME")
    parser.add("--no-separator", False, bool, "put nothing between two texts")
    parser.add("--seq-len", None, number(int, 1), "tokens in a window; default: as many as the run trained with, "
               f"for other models their longest context, but at most {WINDOW}")
    parser.add("--stride", None, number(int, 1), "tokens between the starts of two windows, of which only the last N "
               "count: smaller values give each token more context and take longer; default: --seq-len, no overlap")
    parser.add("--batch-size", 8, number(int, 1), "number of windows in a batch")
    parser.add("--figure", None, cli.text, "draw the loss by position and, token by token, the beginning of the text",
               metavar="FILE")
    parser.add("--json", False, bool, "print one JSON object")
    parser.add_device()
    return parser


def main(argv=None):
    args = command_line().read(argv)
    if args.figure is not None:
        figure.check_path(args.figure)
    model, tokenizer, *_ = open_model(args.folder)
    longest = model.config.max_context
    seq_len = args.seq_len or usual_window(args.folder, longest)
    stride = args.stride or seq_len
    require(seq_len <= longest, f"--seq-len {seq_len} is more than the model's longest context, {longest}")
    require(stride <= seq_len,
            f"--stride {stride} is more than a window, {seq_len} tokens: some tokens would be skipped")
    text, words = gather(with_stdin(args.text), tokenizer, args.field, not args.no_separator)
    dataset = TokenDataset.from_text(text, Path(args.folder) / "tokenizer.json", seq_len, stride)
    scores = Scores(seq_len)
    began = time.perf_counter()
    result = evaluate(model, dataset, args.batch_size, scores)
    speed = round(result["tokens"] / (time.perf_counter() - began), 1)
    result |= {f"top{k}_accuracy": hits / result["tokens"] for k, hits in scores.hits.items()}
    result |= {"seq_len": seq_len, "stride": stride, "tokens_per_second": speed}
    if args.json:
        print(json.dumps(result))
    else:
        first, five = (f"{100 * result[f'top{k}_accuracy']:.2f} %" for k in (1, 5))
        print(f"text           {words}\n" * (words != text) + f"loss           {result['loss']:.4f} nats per token\n"
              f"perplexity     {result['perplexity']:,.2f}\n"
              f"bits per byte  {result['bits_per_byte']:.4f}\n"
              f"accuracy       the right token ranked first {first} of the time, in the top five {five}\n"
              f"tokens         {result['tokens']:,} predicted, of {result['bytes']:,} bytes, in windows of {seq_len} "
              f"tokens, stride {stride}\n"
              f"speed          {result['tokens_per_second']:,.0f} tokens/s")
    if args.figure is not None:
        ids = dataset.tokens[:figure.TOKENS + 1].tolist()
        with drawing.optional(args.figure):
            figure.draw(Path(args.figure), scores, tokenizer, ids, result)
    return 0


if __name__ == "__main__":
    cli.run(main)
