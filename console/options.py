"""The flags of train.py: what can be given, what they leave open, all that can be checked before any data is read."""
import argparse
import os
import sys
from pathlib import Path

from autograd import ACTIVATIONS
from console import cli, demo
from console.cli import number
from console.metrics import say
from nanollm import Config
from storage import checkpoint
from storage.files import InputError
from storage.tokens import load_tokenizer, vocab_size

ARCHITECTURE = [name for name in Config.__dataclass_fields__ if name != "vocab_size"]
# what no resuming changes
FIXED = [*ARCHITECTURE, "seq_len", "stride", "val_fraction", "seed", "demo", "init_from", "dtype"]


def command_line():
    count, positive, share = number(int, 1, 10**9), number(float, 0, open_low=True), number(float, 0, 1, open_high=True)
    size, rate = number(int, 1, 10**6), number(float, 0, 1, open_low=True)
    parser = cli.Parser(prog="train.py", description="Train a Llama-style language model on a text, from scratch.")
    add, switch, begin = parser.add, parser.switch, parser.begin
    begin("the run")
    add("--text", help="the text to learn from, a UTF-8 file")
    add("--tokenizer", help="a Hugging Face tokenizer.json")
    switch("--demo", "a small model on Python's own documentation: no files needed")
    add("--artifact-dir", help="the run's folder, by default runs/llm, then runs/llm-2, …")
    switch("--resume", "go on from the newest checkpoint of --artifact-dir (or of the last runs/llm)")
    add("--init-from", help="start from this model folder's weights, shape and tokenizer (fine-tuning)")
    begin("the model")
    add("--embedding-dim", 512, size, "C, the width of the model")
    add("--n-block", 6, number(int, 1, 1000), "transformer blocks")
    add("--n-head", 8, size, "attention heads")
    add("--n-kv-head", None, size, "key/value heads (grouped-query attention); by default as many as heads")
    add("--max-context", 512, size, "the most tokens that the model can ever see at once")
    add("--hidden-dim", 2048, size, "F, the width inside the gated linear unit")
    add("--eps", 1e-6, rate, "RMSNorm's epsilon")
    add("--rope-theta", 10000.0, positive, "RoPE's base")
    add("--activation", "silu", list(ACTIVATIONS), "of the gated linear unit")
    switch("--tie-embeddings", "use the embedding matrix as the output layer too")
    begin("the data")
    add("--seq-len", None, size, "tokens in a training window, at most (and by default) max-context")
    add("--stride", None, size, "tokens between the starts of two windows; by default seq-len/2")
    add("--val-fraction", 0.1, share, "the share of the text, its end, that validates; 0: none")
    add("--num-epochs", 10, count, "passes over the training windows")
    add("--max-steps", None, count, "end after so many steps, if the epochs have not ended before")
    add("--batch-size", 4, count, "windows in a batch")
    begin("speed and memory")
    add("--dtype", "float32", ["float32", "float16", "bfloat16"],
        "of activations and products; weights, sums, softmax and loss are always float32")
    switch("--tf32", "GPU: let float32 products round their inputs to 10 bits of mantissa, for the tensor cores")
    switch("--recompute", "compute a block's activations again in backward: less memory, more time")
    parser.add_device()
    begin("the training")
    add("--dropout", 0.0, share, "the share of activations that become 0 in training")
    add("--grad-accum", 1, count, "batches whose gradients make one step")
    add("--learning-rate", 1e-4, rate, "the highest learning rate")
    add("--lr-schedule", "cosine", ["cosine", "constant"], "after the warm-up")
    add("--warmup-steps", None, number(int, 0), "steps of rising learning rate; by default 1 %% of all, up to 100")
    add("--min-lr", None, number(float, 0), "where the cosine ends; by default a tenth of the learning rate")
    add("--beta1", 0.9, share, "Adam's memory of the gradient")
    add("--beta2", 0.999, share, "Adam's memory of its square")
    add("--weight-decay", 0.0, number(float, 0, 1), "shrink matrices by this times the learning rate in each step")
    add("--clip-norm", 1.0, number(float, 0), "scale gradients down to this norm; 0: off")
    add("--patience", None, count, "end after so many evaluations without a better validation loss")
    add("--seed", 0, number(int, 0), "of the weights and of the order of the windows")
    begin("reports and checkpoints")
    add("--eval-every", None, count, "steps between evaluations, besides the ends of epochs")
    add("--save-every", 500, count, "steps between checkpoints")
    add("--keep-last", 2, count, "checkpoints to keep")
    add("--log-every", 10, count, "steps between rows of metrics.csv, of which step 1 has the first")
    add("--sample-every", None, count, "steps between samples of text; by default one at each evaluation")
    add("--prompt", None, cli.text, "what the samples begin with; by default the validation text's first words")
    return parser


def read_flags(argv, parser):
    """(arguments, newest checkpoint or None, its State, its `about`): what the flags say, and what they leave open as
    --resume, --demo or --init-from has it. Raises InputError.
    """
    state, about, newest = checkpoint.State(), {}, None
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        args.artifact_dir = args.artifact_dir or str(checkpoint.last_run())
        newest = checkpoint.newest_checkpoint(args.artifact_dir)
        state, about = checkpoint.read_trainer(newest)
        flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
                 for name, value in about["command"].items() if value is not None and value is not False]
        try:
            before = parser.parse_args(flags)
        except InputError as problem:
            raise InputError(f"{newest / 'trainer.json'}: command: {problem}") from None
        args = parser.parse_args([*flags, *argv], argparse.Namespace(artifact_dir=args.artifact_dir))
        for name in FIXED:
            old, new = getattr(before, name), getattr(args, name)
            if new != old and not (name == "init_from" and os.path.abspath(new) == old):
                raise InputError(f"--resume: --{name.replace('_', '-')} was {old} in this run and cannot become {new}")
        if args.batch_size * args.grad_accum != before.batch_size * before.grad_accum:
            say("the batch size has changed: training goes on with the next windows, but not as it would have")
    elif args.demo:
        if given := [name for name in ("text", "tokenizer", "init_from") if getattr(args, name)]:
            raise InputError(f"--demo brings its own text and tokenizer: leave out --{given[0].replace('_', '-')}")
        parser.set_defaults(**demo.SETTINGS)
        args = parser.parse_args(argv)
    elif args.init_from:
        parser.set_defaults(**dict.fromkeys(ARCHITECTURE))      # None: as in that folder
        args = parser.parse_args(argv)
        args.tokenizer = args.tokenizer or str(Path(args.init_from, "tokenizer.json"))
    return args, newest, state, about


def parse(argv):
    """`read_flags`, and all that can be checked without the data. Raises InputError."""
    args, newest, state, about = read_flags(argv, command_line())
    if not args.demo and not (args.text and args.tokenizer):
        raise InputError("--text FILE and --tokenizer FILE are needed (or --demo, which needs no files)")
    if args.min_lr is not None and args.min_lr > args.learning_rate:
        raise InputError(f"--min-lr {args.min_lr} is above --learning-rate {args.learning_rate}: the rate must fall")
    if not args.resume:
        checkpoint.check_free(args.artifact_dir)
    if args.demo:
        args.text, args.tokenizer = demo.files()
    return args, newest, state, about


def make_config(args, tokenizer, source):
    """The Config of the model in the folder `source`, or without one (None) the flags'; args then lack nothing.

    tokenizer None stands for the demo's, which need not have been made yet. Raises InputError.
    """
    size = vocab_size(tokenizer) if tokenizer else demo.WORDS
    if source:
        config = Config.load(source)
        V, theirs = config.vocab_size, Path(source, "tokenizer.json")
        same = load_tokenizer(theirs).get_vocab() == tokenizer.get_vocab() if theirs.exists() else size == V
        if not same or size > V:
            raise InputError(f"{args.tokenizer} ({size} tokens) has not the vocabulary with which the model in "
                             f"{source} ({V}) was trained: use its own tokenizer")
    else:
        config = Config(size, **{name: getattr(args, name) for name in ARCHITECTURE})
    for name in ARCHITECTURE:
        given, has = getattr(args, name), getattr(config, name)
        if given not in (None, has):
            raise InputError(f"--{name.replace('_', '-')} is {given}, the model in {source} has {has}: leave it out")
        setattr(args, name, has)
    args.seq_len = args.seq_len or args.max_context
    args.stride = args.stride or max(args.seq_len // 2, 1)
    if args.seq_len > args.max_context:
        raise InputError(f"--seq-len {args.seq_len} is more than the longest context, --max-context {args.max_context}")
    return config
