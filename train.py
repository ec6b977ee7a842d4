"""Train a language model on a text:  python train.py --text FILE --tokenizer FILE

    windows x, y ─► loss = model.loss(x, y) ─► loss.backward() ─► gradients ─► Adam ─► better weights ─► again

Adam first, then the learning rate, the measure of success, the loop as a whole, and the command line.
"""
import math
import os
import shlex
import signal
import sys
from pathlib import Path

import numpy as np

import checkpoint
import cli
import demo
import device
import metrics
from autograd import no_grad
from cli import number
from data import TokenDataset, load_tokenizer, vocab_size
from device import InputError
from metrics import Progress, perplexity
from nanollm import Config, NanoLLM, read_json

# ---------------------------------------------------------------- the optimizer


class Adam:
    """Adam with decoupled weight decay.  (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2)

        m ← β₁ m + (1-β₁) g            a running mean of the gradient
        v ← β₂ v + (1-β₂) g²           and of its square
        p ← p - lr · m̂ / (√v̂ + eps),   m̂ = m / (1-β₁ᵗ),  v̂ = v / (1-β₂ᵗ)

    m and v start at 0 and so are too small at first: after one step m = (1-β₁) g. A mean of constant g over t steps
    comes to (1-β₁ᵗ) g, hence the divisors. Each weight so moves by about lr a step, whatever its gradient's scale.
    Weight decay, p ← p - lr · weight_decay · p, is no part of g, or Adam would rescale it; only matrices decay.

    m, v, parameters and gradients are one flat array each: a step is one sweep over memory.
    """
    def __init__(self, model, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.model, self.lr, self.betas, self.eps, self.weight_decay = model, lr, betas, eps, weight_decay
        self.m, self.v = device.xp.zeros_like(model.flat), device.xp.zeros_like(model.flat)
        self.t = 0

    def step(self, lr=None, scale=1.0):
        """Update the model's weights from scale · its gradients, with this learning rate or the optimizer's own."""
        lr = self.lr if lr is None else lr
        self.t += 1
        beta1, beta2 = self.betas
        number = self.m.dtype.type              # a typed scalar keeps a fused kernel in float32
        size, root = number(lr / (1 - beta1 ** self.t)), number((1 - beta2 ** self.t) ** -0.5)
        keep, split = number(1 - lr * self.weight_decay), self.model.n_matrix
        arrays = self.model.flat, self.model.flat_grad, self.m, self.v

        def update(s):
            p, g, m, v = (array[s] for array in arrays)
            if self.weight_decay and s.start < split:
                p[:split - s.start] *= keep
            _adam(p, g, m, v, number(scale), number(1 - beta1), number(1 - beta2), size, root, number(self.eps))
        device.sweep(update, self.m.size, 1 << 15)

    def zero_grad(self):
        """Set all gradients to 0, for backward adds to them."""
        device.sweep(lambda s: self.model.flat_grad[s].fill(0), self.m.size, 1 << 20)


@device.fuse
def _adam(p, g, m, v, scale, gain1, gain2, size, root, eps):
    xp = device.xp
    g = g * scale
    m += (g - m) * gain1
    v += (g * g - v) * gain2
    p -= m * size / (xp.sqrt(v) * root + eps)


def gradient_norm(model):
    """√(sum of all squared gradients), a float: one number for how steep the loss is."""
    squares = device.sweep(lambda s: model.flat_grad[s] @ model.flat_grad[s], model.flat_grad.size, 1 << 18)
    return math.sqrt(sum(float(square) for square in squares))


def learning_rate(step, steps, peak, low, warmup, schedule="cosine"):
    """The rate of step 0 … steps-1: up in a line for `warmup` steps, then constant, or down half a cosine to `low`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------- the measure of success

def evaluate(model, dataset, batch_size=8):
    """The loss on a text: {loss, perplexity, bits_per_byte, tokens, bytes}; every token but the first is a target once.

    loss is the mean cross-entropy in nats a token, perplexity its exponential: as unsure as an even choice among so
    many words. bits_per_byte, total nats / ln 2 / source bytes, does not depend on how the tokenizer cuts the text.
    """
    nats, count = 0.0, 0
    with no_grad():
        for x, y in dataset.in_order(batch_size):
            nats += float(model.loss(x, y).data) * y.size
            count += y.size
    loss = nats / count
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": nats / math.log(2) / dataset.source_bytes,
            "tokens": count, "bytes": dataset.source_bytes}


def unigram_entropy(dataset):
    """-sum p log p in nats, p the share of each token: the loss of the best model that ignores all context."""
    counts, tokens = np.zeros(dataset.vocab_size, np.int64), dataset.tokens
    for start in range(0, len(tokens), 1 << 20):
        counts += np.bincount(tokens[start:start + (1 << 20)], minlength=dataset.vocab_size)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def diagnose(model, x):
    """Where numbers stopped being finite, in words: the first block whose weights, activations or gradients are not."""
    finite = device.xp.isfinite
    for name, parameter in model.parameters().items():
        if not finite(parameter.data).all():
            return f"weights of {name}"
    blocks = model.blocks
    try:
        with no_grad():
            for i in range(len(blocks)):
                model.blocks = blocks[:i + 1]
                if not finite(model.hidden(x).data).all():
                    return f"activations after block {i}"
    finally:
        model.blocks = blocks
    for name, parameter in reversed(model.parameters().items()):    # backward runs from the last block to the first
        if not finite(parameter.grad).all():
            return f"gradient of {name}"
    return "loss"


# ---------------------------------------------------------------- the loop

class Stop:
    """Ctrl-C or SIGTERM asks for an orderly end; a second one ends the process at once."""
    signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step; once more quits at once", file=sys.stderr)

    def __exit__(self, *_):
        for which, handler in self.before.items():
            signal.signal(which, handler)


def gradients(model, optimizer, train_set, state, args):
    """The loss of the next big batch, its gradients in the model, their norm, and the ids of its last part.

    The big batch comes in grad_accum parts. All are of one size, so the mean of their means is the mean over all
    tokens, and backward(1 / grad_accum) has the parts' gradients add up to that mean's.
    """
    optimizer.zero_grad()
    loss = 0.0
    for _ in range(args.grad_accum):
        x, y = train_set.batch(state.windows, args.batch_size, args.seed)
        part = model.loss(x, y)
        part.backward(1 / args.grad_accum)
        loss += float(part.data) / args.grad_accum
        state.windows += args.batch_size
    return loss, gradient_norm(model), x


def total_steps(args, state, train_set):
    """The step at which training ends: when the epochs are over, or at --max-steps if that comes first."""
    left = max(args.num_epochs * len(train_set) - state.windows, 0)
    end = state.step + -(-left // (args.batch_size * args.grad_accum))
    return min(end, args.max_steps) if args.max_steps else end


def is_over(args, state, total):
    return state.step >= total or (args.patience is not None and state.without_better >= args.patience)


def train(model, optimizer, train_set, val_set, state, run, args, stop):
    """Train until all steps are done, patience ends or `stop` asks for an end; a checkpoint is then written."""
    total, big_batch = total_steps(args, state, train_set), args.batch_size * args.grad_accum
    warmup = min(100, total // 100) if args.warmup_steps is None else args.warmup_steps
    low = args.learning_rate / 10 if args.min_lr is None else args.min_lr

    with Progress(total, state.step, state.seconds) as progress:
        while not is_over(args, state, total) and not stop.signal:
            lr = learning_rate(state.step, total, args.learning_rate, low, warmup, args.lr_schedule)
            loss, norm, x = gradients(model, optimizer, train_set, state, args)
            state.step += 1
            if math.isfinite(loss + norm):
                optimizer.step(lr, min(1.0, args.clip_norm / norm) if args.clip_norm and norm else 1.0)
                state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
                state.skipped_in_a_row = 0
            else:
                state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
                progress.say(f"step {state.step}: loss {loss}, gradient norm {norm}: skipped, {state.skipped} so far")
                if state.skipped_in_a_row == 10:
                    raise InputError(f"10 steps in a row were not finite, the first place is the {diagnose(model, x)}: "
                                     f"lower --learning-rate; the checkpoints in {run.folder} are as they were")
            if state.step == 1:
                progress.say(f"step 0: loss {loss:.3f} before training; an even guess among {train_set.vocab_size} "
                             f"tokens has ln V = {math.log(train_set.vocab_size):.3f}, one by their frequencies alone "
                             f"{unigram_entropy(train_set):.3f}")
            progress.advance(big_batch * train_set.seq_len)

            def due(every):
                return bool(every) and state.step % every == 0

            last, ended_epoch = state.step >= total, state.windows % len(train_set) < big_batch
            evaluating = val_set is not None and (last or ended_epoch or due(args.eval_every))
            if last or evaluating or due(args.log_every):
                report(model, val_set if evaluating else None, train_set, state, run, args, progress, lr, norm)
            if evaluating if args.sample_every is None else due(args.sample_every):
                text = sample_text(model, run.tokenizer, args.prompt, val_set or train_set, state.step)
                progress.say(f"sample: {text!r}")
            if is_over(args, state, total) or stop.signal or due(args.save_every):
                state.seconds, state.updates = progress.seconds, optimizer.t
                run.write_checkpoint(model, optimizer, state, args.keep_last)


def report(model, val_set, train_set, state, run, args, progress, lr, norm):
    """Show the mean loss since the last report, evaluate on val_set unless it is None, add a row to metrics.csv."""
    loss = state.loss_sum / state.loss_count if state.loss_count else math.nan
    state.loss_sum, state.loss_count = 0.0, 0
    epoch = state.windows / len(train_set)
    row = {"step": state.step, "epoch": epoch, "tokens": state.windows * train_set.seq_len, "train_loss": loss,
           "learning_rate": lr, "grad_norm": norm, "tokens_per_second": round(progress.speed)}
    progress.show(state.step, loss, lr, norm)
    if val_set is not None:
        result = evaluate(model, val_set, args.batch_size)
        row |= {f"val_{name}": result[name] for name in ("loss", "perplexity", "bits_per_byte")}
        better = state.best_loss is None or result["loss"] < state.best_loss
        state.without_better = 0 if better else state.without_better + 1
        progress.say(f"epoch {epoch:.2f}: training loss {loss:.4f}, perplexity {perplexity(loss):,.1f}; "
                     f"validation loss {result['loss']:.4f}, perplexity {result['perplexity']:,.1f}, "
                     f"{result['bits_per_byte']:.4f} bits per byte{', the best so far' if better else ''}")
        if better:
            state.best_loss = result["loss"]
            run.write_best(model)
    metrics.append(run.folder / "metrics.csv", row | {"seconds": round(progress.seconds, 1)})
    if val_set is not None or state.step == 1:
        metrics.draw_loss(run.folder)
    progress.restart()


def sample_text(model, tokenizer, prompt, dataset, seed, length=60):
    """The prompt, by default the dataset's first words, and how the model goes on."""
    ids = (tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else None) or dataset.tokens[:8].tolist()
    return tokenizer.decode(ids + list(model.generate(ids, length, temperature=0.8, top_p=0.95, seed=seed)))


# ---------------------------------------------------------------- the command line

MAY_CHANGE = ("num_epochs", "max_steps", "batch_size", "grad_accum", "learning_rate", "lr_schedule", "warmup_steps",
              "min_lr", "beta1", "beta2", "weight_decay", "clip_norm", "eval_every", "save_every", "log_every",
              "sample_every", "prompt", "keep_last", "patience", "text", "tokenizer")     # the last two go by content
ARCHITECTURE = {name: getattr(Config, name) for name in Config.__dataclass_fields__ if name != "vocab_size"}


def command_line():
    count, positive, share = number(int, 1), number(float, 0, open_low=True), number(float, 0, 1, open_high=True)
    parser = cli.Parser(prog="train.py", description="Train a Llama-style language model on a text, from scratch.")
    add = parser.add_argument

    def default(flag, value, kind, help):
        add(flag, default=value, type=kind, help=help)

    add("--text", metavar="FILE", help="the text to learn from, UTF-8")
    add("--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json")
    add("--demo", action="store_true", help="a small model on Python's own documentation: no files needed")
    add("--artifact-dir", metavar="DIR", help="the run's folder, by default runs/llm, then runs/llm-2, …")
    add("--resume", action="store_true",
        help="go on from the newest checkpoint of --artifact-dir (or of the last runs/llm)")
    add("--init-from", metavar="DIR", help="start from this model folder's weights, shape and tokenizer (fine-tuning)")
    default("--embedding-dim", 512, count, "C, the width of the model")
    default("--n-block", 6, count, "transformer blocks")
    default("--n-head", 8, count, "attention heads")
    default("--n-kv-head", None, count, "key/value heads (grouped-query attention); by default as many as heads")
    default("--max-context", 512, count, "the longest context, in tokens")
    default("--hidden-dim", 2048, count, "F, the width inside the gated linear unit")
    default("--eps", 1e-6, positive, "RMSNorm's epsilon")
    default("--rope-theta", 10000.0, positive, "RoPE's base")
    add("--activation", default="silu", choices=["silu", "sigmoid", "gelu", "relu"], help="of the gated linear unit")
    add("--tie-embeddings", action="store_true", help="use the embedding matrix as the output layer too")
    default("--seq-len", None, count, "tokens in a window; by default max-context")
    default("--stride", None, count, "tokens between the starts of two windows; by default seq-len/2")
    default("--val-fraction", 0.1, share, "the share of the text, its end, that validates; 0: none")
    default("--num-epochs", 10, count, "passes over the training windows")
    default("--max-steps", None, count, "end after so many steps, if the epochs have not ended before")
    default("--batch-size", 4, count, "windows in a batch")
    default("--grad-accum", 1, count, "batches whose gradients make one step")
    default("--learning-rate", 1e-4, positive, "the highest learning rate")
    add("--lr-schedule", default="cosine", choices=["cosine", "constant"], help="after the warm-up")
    default("--warmup-steps", None, number(int, 0), "steps of rising learning rate; by default 1 %% of all, up to 100")
    default("--min-lr", None, number(float, 0), "where the cosine ends; by default a tenth of the learning rate")
    default("--beta1", 0.9, share, "Adam's memory of the gradient")
    default("--beta2", 0.999, share, "Adam's memory of its square")
    default("--weight-decay", 0.0, number(float, 0), "decoupled, on matrices only")
    default("--clip-norm", 1.0, number(float, 0), "scale gradients down to this norm; 0: off")
    default("--seed", 0, number(int, 0), "of the weights and of the order of the windows")
    default("--eval-every", None, count, "steps between evaluations, besides the ends of epochs")
    default("--save-every", 500, count, "steps between checkpoints")
    default("--keep-last", 2, count, "checkpoints to keep")
    default("--log-every", 10, count, "steps between rows of metrics.csv")
    default("--sample-every", None, count, "steps between samples of text; by default one at each evaluation")
    add("--prompt", help="what the samples begin with; by default the validation text's first words")
    default("--patience", None, count, "end after so many evaluations without a better validation loss")
    add("--device", default="auto", choices=["auto", "gpu", "cpu"], help="CuPy on a GPU, or NumPy")
    return parser


def parse(argv):
    """(arguments, newest checkpoint or None, its State, its `about`): all that can be checked without the data."""
    parser = command_line()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**demo.SETTINGS)
    state, about, newest = checkpoint.State(), {}, None
    if args.resume:
        folder = Path(args.artifact_dir) if args.artifact_dir else checkpoint.last_run()
        if not checkpoint.checkpoints(folder):
            raise InputError(f"--resume: there is no checkpoint in {folder}; without --resume a new run begins")
        newest = checkpoint.checkpoints(folder)[-1]
        state, about = checkpoint.read_trainer(newest)
        parser.set_defaults(**{name: value for name, value in about["command"].items() if name in vars(args)})
        args = parser.parse_args(argv)
        args.artifact_dir = str(folder)
        for name, value in about["command"].items():
            if name not in MAY_CHANGE and getattr(args, name, value) != value:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {value} in this run and cannot become "
                                 f"{getattr(args, name)}")
        if args.batch_size * args.grad_accum != about["command"]["batch_size"] * about["command"]["grad_accum"]:
            print("the batch size has changed: training goes on with the next windows, but not as it would have")
    elif args.demo:
        args = parser.parse_args(argv)
    if args.demo:
        args.text, args.tokenizer = demo.files()
    if args.init_from and not args.tokenizer:
        args.tokenizer = str(Path(args.init_from) / "tokenizer.json")
    if not args.text or not args.tokenizer:
        raise InputError("--text FILE and --tokenizer FILE are needed (or --demo, which needs no files)")
    if args.artifact_dir and not args.resume and checkpoint.holds_run(Path(args.artifact_dir)):
        raise InputError(f"{args.artifact_dir} already holds a run, and nothing is ever overwritten: continue it with "
                         "--resume, or name another --artifact-dir")
    return args, newest, state, about


def make_model(args, tokenizer, newest):
    """(model, the entries of config.json that came with it): from a checkpoint, from --init-from, or fresh."""
    source = newest or args.init_from
    if not source:
        fields = {name: getattr(args, name) for name in ARCHITECTURE}
        return NanoLLM(Config(vocab_size(tokenizer), **fields), args.seed), {}
    model, hf = NanoLLM.load(source), read_json(Path(source) / "config.json")
    for name, usual in ARCHITECTURE.items():
        given, has = getattr(args, name), getattr(model.config, name)
        if given not in (usual, has):
            raise InputError(f"--{name.replace('_', '-')} is {given}, but the model in {source} has {has}")
        setattr(args, name, has)
    if vocab_size(tokenizer) > model.config.vocab_size:
        raise InputError(f"{args.tokenizer} has {vocab_size(tokenizer)} tokens, the model in {source} only "
                         f"{model.config.vocab_size}: use the tokenizer that it was trained with")
    return model, {name: hf.get(name) for name in ("bos_token_id", "eos_token_id")}


def check_same_files(args, hashes, about):
    """Raise InputError if a resumed run would go on with another text or tokenizer."""
    for name, value in about.get("hashes", {}).items():
        if hashes.get(name) != value:
            raise InputError(f"--resume: {getattr(args, name)} is not the {name} that this run began with: "
                             f"give the original with --{name}, or begin a new run")


def main(argv=None):
    args, newest, state, about = parse(argv)
    device.use(args.device)
    tokenizer = load_tokenizer(args.tokenizer)
    model, settings = make_model(args, tokenizer, newest)
    args.seq_len = args.seq_len or model.config.max_context
    args.stride = args.stride or max(args.seq_len // 2, 1)
    if args.seq_len > model.config.max_context:
        raise InputError(f"--seq-len {args.seq_len} is more than the longest context, {model.config.max_context}")
    dataset = TokenDataset.from_text(args.text, args.tokenizer, args.seq_len, args.stride)
    train_set, val_set = dataset.split(args.val_fraction)
    if args.batch_size * args.grad_accum > len(train_set):
        raise InputError(f"--batch-size {args.batch_size} times --grad-accum {args.grad_accum} is more than the "
                         f"{len(train_set)} training windows: lower them, --seq-len or --stride, or give more text")
    hashes = {"text": checkpoint.file_hash(args.text), "tokenizer": checkpoint.file_hash(args.tokenizer)}
    check_same_files(args, hashes, about)

    optimizer = Adam(model, args.learning_rate, (args.beta1, args.beta2), weight_decay=args.weight_decay)
    if newest:
        checkpoint.read_moments(newest, optimizer)
        optimizer.t = state.updates
    total = total_steps(args, state, train_set)
    folder = Path(args.artifact_dir) if newest else checkpoint.new_run(args.artifact_dir)
    if is_over(args, state, total) and (folder / "model.safetensors").exists():
        print(f"{folder} has finished, after step {state.step}; more --num-epochs or --max-steps would continue it")
        return 0
    checkpoint.recover(folder)
    metrics.rewind(folder / "metrics.csv", state.step)
    command = {name: value for name, value in vars(args).items() if name not in ("artifact_dir", "resume", "device")}
    command |= {name: os.path.abspath(command[name]) for name in ("text", "tokenizer")}
    run = checkpoint.Run(folder, tokenizer, settings, {"command": command, "hashes": hashes, "versions": versions()})

    print(f"device     {device.reason}")
    print(f"text       {args.text}: {len(train_set.tokens):,} tokens to train on in {len(train_set):,} windows, "
          f"{len(val_set.tokens) if val_set else 0:,} unseen ones to validate")
    print(f"model      {model.flat.size:,} parameters, {model.config}")
    print(f"training   step {state.step} to {total}, "
          f"{args.batch_size * args.grad_accum * args.seq_len:,} tokens a step")
    print(f"folder     {folder}", flush=True)
    with Stop() as stop:
        train(model, optimizer, train_set, val_set, state, run, args, stop)
        if is_over(args, state, total):
            run.write_model(folder, model)
            print(f"\n{folder} holds the model, metrics.csv and loss.png; let it write with\n"
                  f"    python generate.py {shlex.quote(str(folder))} --prompt 'Once upon a time'")
            return 0
    print(f"\nstopped after step {state.step}; go on with\n"
          f"    python train.py --resume --artifact-dir {shlex.quote(str(folder))}")
    return 128 + stop.signal


def versions():
    import platform

    import safetensors
    import tokenizers
    return {"python": platform.python_version(), "numpy": np.__version__, "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__, "device": device.reason}


if __name__ == "__main__":
    cli.run(main)
