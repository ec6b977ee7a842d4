"""What happens before the first step of training and after each: reports, evaluations, samples, checkpoints."""
import contextlib
import itertools
import math
import shlex
import warnings
from pathlib import Path

import numpy as np

from console import metrics
from console.cli import Stop, Stopped
from console.metrics import perplexity
from console.progress import Progress, say
from hardware import device, ranks
from nanollm import NanoLLM
from storage import checkpoint
from storage.files import InputError, read_json
from storage.huggingface import tokenizer_files


def open_run(request, model, tokenizer, entries):
    """The Run that a training writes: a new one, or the one that it resumes."""
    about = {"command": request.settings.to_json(), "hashes": request.hashes, "versions": checkpoint.versions()}
    folder = Path(request.folder) if request.checkpoint else checkpoint.new_run(request.folder)
    files = tokenizer_files(tokenizer, entries, model.config.max_context, request.source)
    return checkpoint.Run(folder, files, entries, about)


def make_model(request, team):
    """(model, its BOS and EOS ids as config.json has them): read from a folder, or fresh.

    Rank 0 alone reads or draws weights; the others get them from it.
    """
    source, entries = request.source, request.ends
    if source and team.rank == 0:
        model, hf = NanoLLM.load(source), read_json(Path(source, "config.json"))
        entries = {name: hf.get(name) for name in ("bos_token_id", "eos_token_id")}
        if not model.trainable:
            raise InputError(f"{source} is quantised and cannot be trained: start from the model "
                             "from which it was made")
    else:
        model = NanoLLM(request.config, request.settings.seed if team.rank == 0 else None)
    model.compute_dtype = np.dtype(request.settings.dtype)
    model.recompute = request.settings.recompute
    team.adopt(model.weights)
    return model, entries


def note_losses(state, unread):
    """Read and empty `unread`, which has (loss, loss_scale times gradient norm) of each of the last steps. A GPU is
    waited for once. Returns the last loss and norm, as floats.

    Adds each loss to the next report's mean, or reports a skipped step. With a loss scale above 1 a skipped step is
    expected: the scale is halved for the next one.
    """
    loss = norm = math.nan
    numbers, first = iter(device.floats(*itertools.chain(*unread))), state.step - len(unread) + 1
    for step, (loss, norm) in enumerate(zip(numbers, numbers, strict=True), first):
        norm /= state.loss_scale
        if math.isfinite(loss + norm):
            state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
            state.skipped_in_a_row = 0
            continue
        state.skipped, remedy = state.skipped + 1, f" (loss scale {state.loss_scale:.0f}, halved)"
        if state.loss_scale == 1:
            state.skipped_in_a_row, remedy = state.skipped_in_a_row + 1, ""
        say(f"step {step}: loss {loss}, gradient norm {norm}: skipped, {state.skipped} so far{remedy}")
    unread.clear()
    return loss, norm


def due(step, every):
    """Whether something that happens every `every` steps (None: never) happens after this step."""
    return every is not None and step % every == 0


class Observer:
    """Watches a training. After each step it reports, evaluates or saves if that is due.

    validate(watch) gives the loss, perplexity and bits_per_byte on the validation text, and `watch` wraps what it
    iterates over; it is None where there is no such text. sample() gives a text that the model writes. `saved` is the
    step that has a checkpoint already. What else is a text's own are the attributes and methods down to
    `next_command`; images.train has others.

    Each rank of a team has one, because they evaluate and save together. Only rank 0's has a run, and writes.
    """
    columns, unit, short = metrics.COLUMNS, "tokens", "tok"     # of metrics.csv; what a window consists of
    blocks = staticmethod(metrics.hidden_states)

    def __init__(self, run, settings, train_set, validate, sample, team=ranks.ALONE, saved=None):
        self.run, self.settings, self.train_set = run, settings, train_set
        self.validate, self.sample, self.team, self.saved = validate, sample, team, saved

    def per_window(self):
        return self.train_set.seq_len

    def flops(self, model):
        return metrics.flops_per_token(model.config, self.settings.seq_len)

    def announce(self, model, val_set):
        """What is about to be trained, and on what."""
        train_set, unseen = self.train_set, "no validation text"
        if val_set:
            unseen = f"{len(val_set.tokens):,} for validation"
        return (f"text       {train_set.file.text}: {len(train_set.tokens):,} tokens for training in "
                f"{len(train_set):,} windows, {unseen}\n"
                f"model      {model.weights.flat.size:,} parameters, {model.config}")

    def first_words(self):
        """How good the first loss is."""
        V, entropy = self.train_set.vocab_size, metrics.unigram_entropy(self.train_set)
        return (f"guessing evenly among {V} tokens gives ln V = {math.log(V):.3f}, guessing from token frequencies "
                f"gives {entropy:.3f}")

    def on_training_set(self, loss):
        """What `validate` would say about the training set, for its mean loss since the last report."""
        bits = loss / math.log(2) * len(self.train_set.tokens) / self.train_set.source_bytes
        return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits}

    def explain(self, result):
        """The loss and what else `validate` says, in words."""
        return (f"loss {result['loss']:.4f}, perplexity {result['perplexity']:,.1f}, "
                f"{result['bits_per_byte']:.4f} bits per byte")

    def next_command(self):
        """What to do with the finished run, and the command that does it."""
        prompt = shlex.quote(self.settings.prompt or self.beginning())
        return f"generate text with\n    python generate.py {shlex.quote(str(self.run.folder))} --prompt {prompt}"

    def has_finished(self, state, resumed):
        """Whether the run that continues from the checkpoint `resumed` has nothing left to do. Says so."""
        done = self.run and resumed and state.is_over(self.settings) and self.run.is_finished(resumed)
        done = self.team.exchange(bool(done))[0]
        if done and self.run:
            say(f"{self.run.folder} has finished, after step {state.step}; raise --num-epochs or --max-steps to train "
                "further")
        return done

    @contextlib.contextmanager
    def watch(self, model, state, val_set):
        """Around a training: the run's folder is held, signals stop it, progress is shown. Yields the Stop. At the end
        the model is written, if training is over, and the user is told what comes next.
        """
        held = checkpoint.held(self.run.folder, self.settings.program) if self.run else contextlib.nullcontext()
        with held, Stop(self.team) as stop, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)     # not finite: `train` skips such steps
            self.stop = stop
            if self.run:
                self.begin(model, state, val_set)
            with Progress(self.settings.max_steps, self.flops(model), state.step, state.seconds, bool(self.run),
                          self.short) as self.progress:
                yield stop
            if self.run:
                self.finish(model, state)

    def begin(self, model, state, val_set):
        in_a_step = self.settings.windows_per_step() * self.per_window()
        say(f"device     {device.reason}\n{self.announce(model, val_set)}\n"
            f"training   step {state.step} to {self.settings.max_steps}, {in_a_step:,} {self.unit} a step\n"
            f"folder     {self.run.folder}")
        if device.on_gpu:
            say("The first step takes some seconds longer if CuPy has to compile its kernels, once on each machine.")
        metrics.rewind(self.run.folder / "metrics.csv", state.step, self.columns)

    def is_milestone(self, state):
        """Whether the model is evaluated after the last step."""
        # The step crossed the end of an epoch if the windows taken in the new one are fewer than a step takes.
        ended_epoch = state.windows % len(self.train_set) < self.settings.windows_per_step()
        return ended_epoch or state.step >= self.settings.max_steps or due(state.step, self.settings.eval_every)

    def reports(self, state):                           # 1: the plot begins before training
        return self.is_milestone(state) or state.step == 1 or due(state.step, self.settings.log_every)

    def reads(self, state):
        """Whether losses are read after the last step: on a GPU, which has to be waited for, only where something is
        due; float16's next loss scale is due after each step.
        """
        every = self.settings.save_every, self.settings.sample_every
        return (not device.on_gpu or self.settings.dtype == "float16" or self.reports(state)
                or any(due(state.step, steps) for steps in every))

    def after_step(self, model, optimizer, state, lr, loss, norm):
        """Do what is due after a step that had this learning rate, loss and gradient norm."""
        self.progress.advance(self.settings.windows_per_step() * self.per_window())
        if state.step == 1:
            say(f"step 0: loss {loss:.3f} before training; {self.first_words()}")
        self.report_if_due(model, state, lr, norm)
        if due(state.step, self.settings.save_every):
            self.save(model, optimizer, state)

    def report_if_due(self, model, state, lr, norm):
        """Report, evaluate and sample if that is due after the last step. If a signal cuts the evaluation short,
        state.cut is the norm, and a resumed run calls this again.
        """
        settings, state.cut, milestone = self.settings, None, self.is_milestone(state)
        if self.reports(state):
            try:
                self.report(model, state, lr, norm, milestone)
            except Stopped:
                state.cut = norm if math.isfinite(norm) else 0.0
                return
        if self.run and (milestone if settings.sample_every is None else due(state.step, settings.sample_every)):
            say(f"sample: {self.sample()!r}")
            self.progress.restart()

    def report(self, model, state, lr, norm, milestone):
        """Show the mean loss since the last report and add a row to metrics.csv; evaluate at a milestone."""
        loss = state.loss_sum / state.loss_count if state.loss_count else math.nan
        progress, speed = self.progress, self.progress.speed
        row = {"step": state.step, "epoch": round(state.epoch, 6), self.unit: state.windows * self.per_window(),
               "train_loss": loss, "learning_rate": lr, "grad_norm": norm, "loss_scale": state.loss_scale,
               "skipped": state.skipped, f"{self.unit}_per_second": round(speed),
               "flops_per_second": round(speed * progress.flops_per_token)}
        progress.show(state.step, loss, lr, norm)
        if milestone:
            row |= self.evaluate(model, state, loss)
        state.loss_sum, state.loss_count = 0.0, 0
        if self.run:
            row["seconds"] = round(progress.seconds, 1)
            metrics.append(self.run.folder / "metrics.csv", row, self.columns)
            progress.redraw(self.run.folder)
        progress.restart()

    def evaluate(self, model, state, loss):
        """Show the training and validation loss and keep the best model. Return metrics.csv's validation columns."""
        line = f"epoch {state.epoch:.2f}: training {self.explain(self.on_training_set(loss))}"
        if not self.validate:
            say(line)
            return {}
        result = self.validate(self.stop.watch)
        line += f"; validation {self.explain(result)}"
        state.without_better += 1
        if result["loss"] < (math.inf if state.best_loss is None else state.best_loss):
            state.best_loss, state.without_better = result["loss"], 0
            line += ", the best so far"
            if self.run:
                self.run.write_best(model)
        say(line)
        return {f"val_{name}": value for name, value in result.items() if f"val_{name}" in self.columns}

    def save(self, model, optimizer, state):
        """Write a checkpoint, unless this step has one."""
        if self.saved == state.step:
            return
        moments = {"m": self.team.gather(optimizer.m), "v": self.team.gather(optimizer.v)}
        self.saved, state.seconds, state.updates = state.step, self.progress.seconds, int(optimizer.t)
        if self.run:
            self.run.write_checkpoint(model, moments, state, self.settings.keep_last)
        self.progress.restart()

    def beginning(self):
        """The first words of the training text, which its tokenizer knows."""
        words = self.train_set.file.tokenizer.decode(self.train_set.tokens[:200].tolist()).split()
        return " ".join(words[:4])[:30]

    def finish(self, model, state):
        """Write the model if training is over, and loss.png, on which nothing depends; say what can be done next."""
        over, folder = state.is_over(self.settings), self.run.folder
        if over:
            self.run.write_model(folder, model)
        self.progress.redraw(folder, every=0)
        done = f"{folder} holds the model, metrics.csv and loss.png; {self.next_command()}"
        resume = checkpoint.resume_command(folder, self.settings.program)
        say(f"\n{done}" if over else f"\nstopped after step {state.step}; continue with\n    {resume}")

    def give_up(self, model, ids):
        """Raise, on rank 0, an InputError that says where NaN or infinity comes from."""
        places = self.team.exchange(metrics.first_not_finite(model, ids, self.blocks))
        if self.run:
            raise InputError("10 steps in a row were not finite; the first NaN or inf is in the "
                             f"{next((place for place in places if place != 'loss'), 'loss')}. The checkpoints in "
                             f"{self.run.folder} are intact: continue from them with --resume and a lower "
                             "--learning-rate")
