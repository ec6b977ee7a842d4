"""Train a language model on a text:  python train.py --text FILE

One step in its plainest form (`train`, below, adds clipping, half precision, several processes):

    optimizer.zero_grad()
    loss = model.loss(x, y)             # x, y: the next windows of the text
    loss.backward()                     # dLoss/dw for every weight w
    optimizer.step()                    # Adam

The file has four parts: Adam, the learning rate, the loop, the command. The flags (Settings) are in
console/options.py; what happens after a step (reports, evaluations, checkpoints) is in
console/observer.py; how far training is (State) is in storage/checkpoint.py.
"""
import math
from functools import partial

from console import cli, options
from console.observer import Observer, make_model, note_losses, open_run
from data import TokenDataset
from evaluate import evaluate
from generate import sample_text
from hardware import device, ranks
from hardware.formulas import adam_factors, clipping, scaled_or_0
from storage import checkpoint
from storage.files import require

# ---------------------------------------------------------------- the optimizer


class Adam:
    """Adam with decoupled weight decay.
    (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2)

        m ← β₁ m + (1-β₁) g            a running mean of the gradient g
        v ← β₂ v + (1-β₂) g²           a running mean of its square
        p ← p - lr · m̂ / (√v̂ + eps),   m̂ = m / (1-β₁ᵗ),  v̂ = v / (1-β₂ᵗ)

    m and v start at 0 and are too small at first: for a constant g, m after t steps is
    (1-β₁) (1 + β₁ + … + β₁ᵗ⁻¹) g = (1-β₁ᵗ) g, hence the divisors. While g hardly changes,
    m̂/√v̂ is near ±1, whatever g's scale; where g keeps changing its sign, it is nearer to 0. So
    a weight moves by about lr a step (but by lr · (1-β₁)/√(1-β₂) after one sudden large g, §2.1).

    Weight decay, p ← p - lr · weight_decay · p, is not added to g, because Adam would rescale it;
    only matrices decay. (As in PyTorch; the paper's λ is lr · weight_decay, with a constant lr.)
    m, v, parameters and gradients are one flat array each: a step is one sweep over memory. One of
    several processes has m and v for its slice `weights.own` alone, and updates that.

    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> from nanollm import Parameters
    >>> weights = Parameters({"bias": (2,)}, np.float64)        # two ones
    >>> weights.grad[...] = device.xp.array([0.001, -50.0])
    >>> Adam(SimpleNamespace(weights=weights), lr=0.1).step()
    >>> weights.flat.round(4).tolist()      # step 1: m̂ = g, √v̂ = |g|: lr against the sign of g
    [0.9, 1.1]
    """
    def __init__(self, model, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.weights, self.lr, self.betas, self.eps = model.weights, lr, betas, eps
        self.weight_decay = weight_decay
        require(self.weights.grad is not None, "this model has no gradients: load it with "
                "trainable=True, or if it is quantised, the model from which it was made")
        self.m = device.xp.zeros_like(self.weights.flat[self.weights.own])
        self.v = device.xp.zeros_like(self.m)
        self.t = device.xp.zeros(())
        self.factors = [device.xp.empty((), self.m.dtype) for _ in range(6)]    # see adam_factors

    def step(self, lr=None, scale=1.0):
        """Update the weights from scale · their gradients, with this lr or the optimizer's own.

        `scale` is clipping and 1/loss_scale in one factor. If it is not finite, nothing changes. A
        GPU may not have computed it yet, and an `if` would wait: there all factors become 0.
        """
        lr, own = self.lr if lr is None else lr, self.weights.own
        *factors, decay = self.factors
        adam_factors(scale, lr, *self.betas, self.weight_decay, self.t, *factors, decay)
        if not (device.on_gpu or factors[1]):   # 1-β₁; 0 if scale is not finite
            return
        eps = self.m.dtype.type(self.eps)       # a typed scalar keeps a fused kernel in float32
        n_matrix = self.weights.n_matrix - own.start
        arrays = self.weights.flat[own], self.weights.grad[own], self.m, self.v

        def update(s):
            p, g, m, v = (array[s] for array in arrays)
            if self.weight_decay and s.start < n_matrix:
                p[:n_matrix - s.start] *= decay         # the slice's part in matrices, or all of it
            _adam(p, g, m, v, *factors, eps)
        device.sweep(update, self.m.size, 1 << 17)

    def zero_grad(self):
        """Set all gradients to 0, because backward adds to them."""
        grad = self.weights.grad
        device.sweep(lambda s: grad[s].fill(0), grad.size, 1 << 20)


@device.fuse
def _adam(p, g, m, v, scale, one_minus_beta1, one_minus_beta2, step_size, root, eps):
    g = scaled_or_0(g, scale)                   # g * scale. p, m and v change in place
    m += (g - m) * one_minus_beta1              # now β₁ m + (1-β₁) g
    v += (g * g - v) * one_minus_beta2          # now β₂ v + (1-β₂) g²
    # m · step_size = lr · m̂,  √v · root = √v̂
    p -= m * step_size / (device.xp.sqrt(v) * root + eps)


def loss_and_norm(model, loss, team=ranks.ALONE):
    """The sum of the team's losses and the norm √(sum of all squares) of its gradients.

    `loss` is this rank's. On a GPU both results are 0-d arrays, and nobody has waited for them.
    """
    loss, g = team.add_up(loss), model.weights.grad[model.weights.own]
    return loss, device.xp.sqrt(team.sum(device.sum_of_squares(g)))


def learning_rate(step, steps, peak, low, warmup, schedule="cosine"):
    """The rate of step 0 … steps-1: linearly up to `peak` in `warmup` steps, then constant, or (the
    schedule "cosine") down to `low` by half a cosine.  (1 + cos 45°)/2 = 0.8536.

    >>> [round(learning_rate(step, 6, 1.0, 0.0, warmup=2), 4) for step in range(6)]
    [0.5, 1.0, 0.8536, 0.5, 0.1464, 0.0]
    """
    if step < warmup:
        return peak * ((step + 1) / warmup)     # the quotient is at most 1, also when rounded
    if schedule == "constant":
        return peak
    progress = (step + 1 - warmup) / (steps - warmup)       # 1 at the last step
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


def rate(settings, step):
    """The learning rate of this step in a run with these settings."""
    return learning_rate(step, settings.max_steps, settings.learning_rate, settings.min_lr,
                         settings.warmup_steps, settings.lr_schedule)


# ---------------------------------------------------------------- the loop

def train(model, optimizer, train_set, settings, state, observer, stop, team=ranks.ALONE):
    """Train to settings.max_steps, or until patience runs out or a signal comes; then save.

    Ctrl-C, SIGTERM and the like (console/cli.py, Stop): the running step is finished, an evaluation
    is left to the resumed run, and a checkpoint is written. The observer then prints the command
    that continues. A second Ctrl-C ends the process at once.

    A step takes the next batch_size · grad_accum windows; state.windows says which, so a resumed
    run takes the same ones. Each rank of the team takes its share, a batch at a time. The mean loss
    of all is the sum of the batches' means, each times its share of the windows. The
    gradients are summed in the same way.

    A GPU works while Python is already at the next step. Reading a loss would wait for it, so
    losses are read only before a report, an evaluation or a checkpoint.
    """
    unread = []                                 # (loss, norm) of the last steps
    if state.step == 0:
        state.loss_scale = 2.0 ** 16 if settings.dtype == "float16" else 1.0
        observer.save(model, optimizer, state)      # a disk that is too small fails now, not later
    elif state.cut is not None:
        observer.report_if_due(model, state, rate(settings, state.step - 1), state.cut)
    while not state.is_over(settings) and not stop.asked():
        lr = rate(settings, state.step)
        optimizer.zero_grad()
        loss, count = 0.0, settings.windows_per_step()
        for first, size in team.share(state.windows, count, settings.batch_size):
            x, y = train_set.batch(first, size, settings.seed)
            part = model.loss(x, y, settings.dropout, (settings.seed, first))
            part.backward(state.loss_scale * size / count)
            loss = loss + part.data * (size / count)            # stays on the device: no waiting
        loss, norm = loss_and_norm(model, loss, team)
        limit = settings.clip_norm or 1e38              # no norm in float32 is much larger
        optimizer.step(lr, clipping(loss, norm, limit, state.loss_scale))
        team.share_weights()
        unread.append((loss, norm))
        state.step, state.windows = state.step + 1, state.windows + count
        state.epoch = state.windows / len(train_set)
        if observer.reads(state):
            loss, norm = note_losses(state, unread)
            if state.skipped_in_a_row >= 10:
                observer.give_up(model, x)
            if settings.dtype == "float16":
                adapt_loss_scale(state, math.isfinite(loss + norm))
        observer.after_step(model, optimizer, state, lr, loss, norm)
    note_losses(state, unread)
    observer.save(model, optimizer, state)


def adapt_loss_scale(state, finite):
    """Dynamic loss scaling, for float16.  (Micikevicius et al. 2018, §3.2 and §5)

    Many gradients are below 3e-8, half the smallest positive float16, and would round to 0. So
    backward begins not with 1 but with a large loss_scale, and Adam's step divides by it. It should
    be as large as possible without an overflow: it starts high, at 2¹⁶, is halved after an overflow
    (that step is skipped) and doubled after 1,000 finite steps. Multiplying by a power of two is
    exact. (The fixed 2¹⁵ in linear_cross_entropy is for the logits' gradient alone.)
    """
    state.scale_age += 1
    if not finite:
        state.loss_scale, state.scale_age = max(state.loss_scale / 2, 1.0), 0
    elif state.scale_age == 1000:
        state.loss_scale, state.scale_age = min(state.loss_scale * 2, 2.0 ** 24), 0


# ---------------------------------------------------------------- the command

def work(request, team):
    """Train as one rank of a team; returns the exit code. Rank 0 alone writes, and is heard."""
    settings, state, resumed = request.settings, request.state, request.checkpoint
    model, entries = make_model(request, team)
    with team.first_here():                 # it encodes the text, the others find the ids
        text, path, _ = request.files()
        dataset = TokenDataset.from_text(text, path, settings.seq_len, settings.stride)
        train_set, val_set = dataset.split(settings.val_fraction)
        settings = settings.resolved(state, len(train_set))
    require(dataset.file.digest == team.exchange(dataset.file.digest)[0],
            f"{text} or {path} is another file than on rank 0's machine")
    tokenizer, leads = dataset.file.tokenizer, team.rank == 0
    if leads and resumed:
        options.note_horizon(request, settings, len(train_set), rate)
    optimizer = Adam(model, settings.learning_rate, (settings.beta1, settings.beta2),
                     weight_decay=settings.weight_decay)
    if resumed:
        checkpoint.read_moments(resumed, optimizer, team)
        optimizer.t[...] = state.updates
    run = open_run(request, model, tokenizer, entries) if leads else None
    validate = lambda watch: evaluate(model, val_set, settings.batch_size, watch=watch, team=team)
    sample = lambda: sample_text(model, tokenizer, request.opening, val_set or train_set,
                                 seed=state.step)
    observer = Observer(run, settings, train_set, validate if val_set else None, sample, team,
                        saved=state.step if resumed else None)
    if observer.has_finished(state, resumed):
        return 0
    with observer.watch(model, state, val_set) as stop:
        train(model, optimizer, train_set, settings, state, observer, stop, team)
    return 0 if state.is_over(settings) else 128 + stop.signal


def main(argv=None):
    return ranks.run(partial(options.parse, argv), work, cli.run)


if __name__ == "__main__":
    cli.run(main)
