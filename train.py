"""Train a language model on a text:  python train.py --text FILE --tokenizer FILE

    windows x, y ─► loss = model.loss(x, y) ─► loss.backward() ─► gradients ─► Adam ─► better weights ─► again

Adam first, then the learning rate, the measure of success, the loop as a whole and the command; its flags: options.py.
"""
import math
import os
import shlex
import warnings
from pathlib import Path

import numpy as np

from console import cli, metrics, options
from console.metrics import Progress, perplexity, say
from data import TokenDataset
from evaluate import evaluate
from hardware import device
from nanollm import NanoLLM
from storage import checkpoint
from storage.files import InputError, file_hash, read_json
from storage.tokens import load_tokenizer

# ---------------------------------------------------------------- the optimizer


class Adam:
    """Adam with decoupled weight decay.  (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2)

        m ← β₁ m + (1-β₁) g            a running mean of the gradient
        v ← β₂ v + (1-β₂) g²           and of its square
        p ← p - lr · m̂ / (√v̂ + eps),   m̂ = m / (1-β₁ᵗ),  v̂ = v / (1-β₂ᵗ)

    m and v start at 0 and so are too small at first: for a constant g, m after t steps is
    (1-β₁) (1 + β₁ + … + β₁ᵗ⁻¹) g = (1-β₁ᵗ) g, hence the divisors. While g hardly changes, m̂/√v̂ is near ±1 whatever
    its scale; where its sign changes, it is smaller. So a weight moves by about lr a step, seldom more (at a sudden
    large g by up to (1-β₁)/√(1-β₂) of it, §2.1).
    Weight decay, p ← p - lr · weight_decay · p, is no part of g, or Adam would rescale it; only matrices decay. (As in
    PyTorch; the paper's λ is lr · weight_decay.)

    m, v, parameters and gradients are one flat array each: a step is one sweep over memory.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(flat=device.xp.ones(2), flat_grad=device.xp.array([0.001, -50.0]), n_matrix=0)
    >>> Adam(model, lr=0.1).step()
    >>> model.flat.round(4).tolist()        # step 1: m̂ = g, √v̂ = |g|, so lr against the sign of g, whatever its size
    [0.9, 1.1]
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
        # m̂ · lr = m · size,  √v̂ = √v · root
        size, root = number(lr / (1 - beta1 ** self.t)), number((1 - beta2 ** self.t) ** -0.5)
        keep, split = number(1 - lr * self.weight_decay), self.model.n_matrix
        arrays = self.model.flat, self.model.flat_grad, self.m, self.v

        def update(s):
            p, g, m, v = (array[s] for array in arrays)
            if self.weight_decay and s.start < split:
                p[:split - s.start] *= keep
            _adam(p, g, m, v, number(scale), number(1 - beta1), number(1 - beta2), size, root, number(self.eps))
        device.sweep(update, self.m.size, 1 << 17)

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
    """The rate of step 0 … steps-1: linearly up for `warmup` steps, then constant, or half a cosine down to `low`.

    >>> [round(learning_rate(step, 6, 1.0, 0.0, warmup=2), 4) for step in range(6)]     # (1 + cos 45°)/2 = 0.8536
    [0.5, 1.0, 0.8536, 0.5, 0.1464, 0.0]
    """
    if step < warmup:
        return peak * ((step + 1) / warmup)         # so that no rounding lifts it above the peak
    if schedule == "constant":
        return peak
    progress = (step + 1 - warmup) / (steps - warmup)       # 1 at the last step
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------- the loop

def gradients(model, optimizer, train_set, state, args, progress):
    """Put loss_scale · the gradients of the next big batch into the model; return its loss, their norm (unscaled) and
    the ids of its last part.

    The big batch comes in grad_accum parts. All are of one size, so the mean of their means is the mean over all
    tokens, and backward(1 / grad_accum) has the parts' gradients add up to that mean's.
    """
    optimizer.zero_grad()
    progress.phase("optimizer")                 # names the time that has passed since its last call
    loss = 0.0
    for _ in range(args.grad_accum):
        x, y = train_set.batch(state.windows, args.batch_size, args.seed)
        progress.phase("data")
        part = model.loss(x, y, args.dropout, (args.seed, state.windows))
        progress.phase("forward")
        part.backward(state.loss_scale / args.grad_accum)
        progress.phase("backward")
        loss = loss + part.data / args.grad_accum
        state.windows += args.batch_size
    return float(loss), gradient_norm(model) / state.loss_scale, x


def adapt_loss_scale(state, finite):
    """Dynamic loss scaling, for float16.  (Micikevicius et al. 2018, §3.2 and §5)

    Many gradients are below half the smallest positive float16, 3e-8, and would become 0. So backward begins not
    with 1 but with a large loss_scale, and Adam divides by it. As large as possible without an overflow: halved after
    one (the step is skipped), doubled after 1,000 steps without. Powers of two, which change no digit.
    """
    state.scale_age += 1
    if not finite:
        state.loss_scale, state.scale_age = max(state.loss_scale / 2, 1.0), 0
    elif state.scale_age == 1000:
        state.loss_scale, state.scale_age = min(state.loss_scale * 2, 2.0 ** 24), 0


def total_steps(args, state, train_set):
    """The step at which training ends: when the epochs are over, or at --max-steps if that comes first."""
    left = max(args.num_epochs * len(train_set) - state.windows, 0)
    end = state.step + -(-left // (args.batch_size * args.grad_accum))
    return min(end, args.max_steps) if args.max_steps else end


def is_over(args, state, total):
    return state.step >= total or (args.patience is not None and state.without_better >= args.patience)


def report(model, train_set, val_set, state, run, args, progress, lr, norm, milestone):
    """Show the mean loss since the last report and add a row to metrics.csv; at a milestone evaluate, too."""
    loss = state.loss_sum / state.loss_count if state.loss_count else math.nan
    state.loss_sum, state.loss_count = 0.0, 0
    speed = progress.speed
    row = {"step": state.step, "epoch": round(state.epoch, 6), "tokens": state.windows * train_set.seq_len,
           "train_loss": loss, "learning_rate": lr, "grad_norm": norm, "loss_scale": state.loss_scale,
           "skipped": state.skipped, "tokens_per_second": round(speed),
           "flops_per_second": round(speed * progress.flops_per_token), **progress.shares()}
    progress.show(state.step, loss, lr, norm)
    if milestone:
        bits = loss / math.log(2) * len(train_set.tokens) / train_set.source_bytes
        line = (f"epoch {state.epoch:.2f}: training loss {loss:.4f}, perplexity {perplexity(loss):,.1f}, "
                f"{bits:.4f} bits per byte")
        if val_set:
            result = evaluate(model, val_set, args.batch_size)
            row |= {f"val_{name}": result[name] for name in ("loss", "perplexity", "bits_per_byte")}
            better = result["loss"] < (math.inf if state.best_loss is None else state.best_loss)
            state.without_better = 0 if better else state.without_better + 1
            line += (f"; validation loss {result['loss']:.4f}, perplexity {result['perplexity']:,.1f}, "
                     f"{result['bits_per_byte']:.4f} bits per byte{', the best so far' if better else ''}")
            if better:
                state.best_loss = result["loss"]
                run.write_best(model)
        say(line)
    metrics.append(run.folder / "metrics.csv", row | {"seconds": round(progress.seconds, 1)})
    progress.redraw(run.folder)
    progress.restart()


def sample_text(model, tokenizer, prompt, dataset, seed, length=60):
    """The prompt, by default the dataset's first words, and how the model goes on."""
    ids = (tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else None) or dataset.tokens[:8].tolist()
    ids += model.generate(ids, length, temperature=0.8, top_p=0.95, seed=seed)
    return tokenizer.decode(ids).strip("\ufffd")     # characters cut in the middle


def train(model, optimizer, train_set, val_set, state, run, args, stop):
    """Train until all steps are done, patience ends or `stop` asks for an end; a checkpoint is then written.

    Raises InputError after 10 steps in a row, at a loss scale of 1, whose loss or gradient is not finite.
    """
    total, big_batch = total_steps(args, state, train_set), args.batch_size * args.grad_accum
    warmup = min(100, total // 100) if args.warmup_steps is None else args.warmup_steps
    low = args.learning_rate / 10 if args.min_lr is None else args.min_lr

    if args.dtype == "float16" and state.step == 0:
        state.loss_scale = 2.0 ** 16
    flops = model.config.flops_per_token(train_set.seq_len)
    with Progress(total, state.step, state.seconds, flops) as progress:
        if state.step == 0:     # now: a disk too small for a checkpoint must show at once, not after hours
            run.write_checkpoint(model, optimizer, state, args.keep_last)
        while not is_over(args, state, total) and not stop.signal:
            lr = learning_rate(state.step, total, args.learning_rate, low, warmup, args.lr_schedule)
            loss, norm, x = gradients(model, optimizer, train_set, state, args, progress)
            state.step += 1
            state.epoch = state.windows / len(train_set)
            scale = state.loss_scale
            if finite := math.isfinite(loss + norm):
                optimizer.step(lr, (min(1.0, args.clip_norm / norm) if args.clip_norm and norm else 1.0) / scale)
                state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
                state.skipped_in_a_row = 0
            else:
                state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + (scale == 1)
                say(f"step {state.step}: loss {loss}, gradient norm {norm}: skipped, {state.skipped} so far"
                    + f" (loss scale {scale:.0f}, halved)" * (scale > 1))
                if state.skipped_in_a_row == 10:
                    raise InputError(f"10 steps in a row were not finite; the first place is the "
                                     f"{metrics.diagnose(model, x)}: the checkpoints in {run.folder} are as they were, "
                                     "go on from them with --resume and a lower --learning-rate")
            if state.step == 1:
                V = model.config.vocab_size
                say(f"step 0: loss {loss:.3f} before training; an even guess among {V} tokens has ln V = "
                    f"{math.log(V):.3f}, one by their frequencies alone {metrics.unigram_entropy(train_set):.3f}")
            if args.dtype == "float16":
                adapt_loss_scale(state, finite)
            progress.phase("optimizer")
            progress.advance(big_batch * train_set.seq_len)

            def due(every):
                return bool(every) and state.step % every == 0

            ended_epoch = state.windows % len(train_set) < big_batch
            milestone = state.step >= total or ended_epoch or due(args.eval_every)
            if milestone or state.step == 1 or due(args.log_every):      # 1: the loss before training, on the plot, too
                report(model, train_set, val_set, state, run, args, progress, lr, norm, milestone)
            if milestone if args.sample_every is None else due(args.sample_every):
                say(f"sample: {sample_text(model, run.tokenizer, args.prompt, val_set or train_set, state.step)!r}")
                progress.restart()
            if due(args.save_every) or is_over(args, state, total) or stop.signal:
                state.seconds, state.updates = progress.seconds, optimizer.t
                run.write_checkpoint(model, optimizer, state, args.keep_last)
                progress.restart()
    metrics.draw_loss(run.folder)


# ---------------------------------------------------------------- the command

def make_model(args, tokenizer, newest):
    """(model, the entries of config.json that came with it): from a checkpoint, from --init-from, or fresh."""
    source, settings = newest or args.init_from, {}
    config = options.make_config(args, tokenizer, source)
    if source:
        model, hf = NanoLLM.load(source), read_json(Path(source, "config.json"))
        if model.flat is None:
            raise InputError(f"{source} is quantised and cannot be trained: start from the model that it was made of")
        settings = {name: hf.get(name) for name in ("bos_token_id", "eos_token_id")}
    else:
        model = NanoLLM(config, args.seed)
    model.compute, model.recompute = np.dtype(args.dtype), args.recompute
    return model, settings


def file_hashes(args):
    return {name: file_hash(getattr(args, name)) for name in ("text", "tokenizer")}


def main(argv=None):
    args, newest, state, about = options.parse(argv)
    if args.device:
        device.use(args.device)
    device.tf32 = args.tf32
    tokenizer = load_tokenizer(args.tokenizer)
    for name, value in file_hashes(args).items() if newest else ():
        if about["hashes"].get(name) != value:
            raise InputError(f"--resume: {getattr(args, name)} is not the {name} that this run began with: "
                             f"give the original with --{name}, or begin a new run")
    model, settings = make_model(args, tokenizer, newest)
    train_set, val_set = TokenDataset.from_text(args.text, args.tokenizer, args.seq_len, args.stride).split(
        args.val_fraction)
    if args.batch_size * args.grad_accum > len(train_set):
        raise InputError(f"--batch-size {args.batch_size} times --grad-accum {args.grad_accum} is more than the "
                         f"{len(train_set)} training windows: lower them, --seq-len or --stride, or give more text")
    total = total_steps(args, state, train_set)
    if (args.warmup_steps or 0) > total:
        raise InputError(f"--warmup-steps {args.warmup_steps} is more than the {total} steps of training: lower it")
    optimizer = Adam(model, args.learning_rate, (args.beta1, args.beta2), weight_decay=args.weight_decay)
    if newest:
        checkpoint.read_moments(newest, optimizer)
        optimizer.t = state.updates

    command = {name: value for name, value in vars(args).items() if name not in ("artifact_dir", "resume", "device")}
    command |= {name: os.path.abspath(command[name]) for name in ("text", "tokenizer", "init_from") if command[name]}
    about = {"command": command, "hashes": about.get("hashes") or file_hashes(args), "versions": checkpoint.versions()}
    folder = Path(args.artifact_dir) if newest else checkpoint.new_run(args.artifact_dir)
    run = checkpoint.Run(folder, tokenizer, settings, about)
    if newest and is_over(args, state, total) and run.is_finished(newest):
        say(f"{folder} has finished, after step {state.step}; more --num-epochs or --max-steps would continue it")
        return 0
    with checkpoint.held(folder), cli.Stop() as stop, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # of numbers that are not finite: `train` counts them
        say(f"device     {device.reason}\n"
            f"text       {args.text}: {len(train_set.tokens):,} tokens to train on in {len(train_set):,} windows, "
            f"{len(val_set.tokens) if val_set else 0:,} unseen ones to validate\n"
            f"model      {model.flat.size:,} parameters, {model.config}\n"
            f"training   step {state.step} to {total}, "
            f"{args.batch_size * args.grad_accum * args.seq_len:,} tokens a step\n"
            f"folder     {folder}")
        metrics.rewind(folder / "metrics.csv", state.step)
        train(model, optimizer, train_set, val_set, state, run, args, stop)
        if is_over(args, state, total):
            run.write_model(folder, model)
            prompt = args.prompt or "Once upon a time"
            say(f"\n{folder} holds the model, metrics.csv and loss.png; let it write with\n"
                f"    python generate.py {shlex.quote(str(folder))} --prompt {shlex.quote(prompt)}")
            return 0
    say(f"\nstopped after step {state.step}; go on with\n    {checkpoint.resume_command(folder)}")
    return 128 + stop.signal


if __name__ == "__main__":
    cli.run(main)
