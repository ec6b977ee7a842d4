"""What a run says on the terminal: lines above a bar or, elsewhere, plain lines; and the clock."""
import os
import sys
import threading
import time

from tqdm import tqdm

from console import drawing, metrics

_LOCK = threading.RLock()       # tqdm's own is for processes that share a bar: a killed one would leave it


def say(text):
    """Print a line above the bar. Ignore a closed pipe or a full disk: the run is worth more than its log."""
    tqdm.set_lock(_LOCK)
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """The bar on a terminal, or lines elsewhere; and the clock: the speed, the time left, the total time.

    steps: the number of steps of the whole run. step, seconds: where an earlier process left off. shown: no bar if not.
    `unit` is what a token is called, which may also be a picture.
    """
    def __init__(self, steps, flops_per_token, step=0, seconds=0.0, shown=True, unit="tok"):
        tqdm.set_lock(_LOCK)
        self.steps, self.flops_per_token, self.unit = steps, flops_per_token, unit
        self.began, self.drawn = time.monotonic() - seconds, time.monotonic()
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True,
                        disable=not (shown and sys.stderr.isatty()))
        self.restart()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    @property
    def seconds(self):
        """Time since the run began, over all its resumptions."""
        return time.monotonic() - self.began

    def restart(self):
        """Measure the speed from here on, because what came before, such as an evaluation, was not training."""
        self.tokens = self.advanced = 0
        self.since = time.monotonic()

    def advance(self, tokens):
        """Count another step, of this number of tokens."""
        self.tokens, self.advanced = self.tokens + tokens, self.advanced + 1
        self.bar.update()

    @property
    def speed(self):
        """Tokens a second since the last restart."""
        return self.tokens / max(time.monotonic() - self.since, 1e-9)

    def redraw(self, folder, every=15):
        """Draw loss.png again, unless that was done in the last `every` seconds, because it takes a moment."""
        if time.monotonic() >= self.drawn + every:
            with drawing.optional(folder / "loss.png"):
                metrics.draw_loss(folder)
            self.drawn = time.monotonic()

    def show(self, step, loss, lr, norm):
        perplexity = f"ppl {metrics.perplexity(loss):,.1f}  " if self.unit == "tok" else ""     # a picture has none
        text = (f"loss {loss:.4f}  {perplexity}lr {lr:.1e}  |g| {norm:.2f}  "
                f"{self.speed:,.0f} {self.unit}/s  {self.speed * self.flops_per_token / 1e9:,.1f} GFLOP/s")
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        left = (time.monotonic() - self.since) / max(self.advanced, 1) * (self.steps - step)
        say(f"step {step}/{self.steps}  {text}  {tqdm.format_interval(left)} left")
