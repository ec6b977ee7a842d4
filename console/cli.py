"""What the commands share: one clear line for bad input, numbers checked as they are read, an orderly end."""
import argparse
import contextlib
import errno
import operator
import os
import signal
import sys
import warnings

from hardware import device, ranks
from storage.files import InputError
from storage.huggingface import HUB, MODEL, TOKENIZER, from_hub


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, and that never guesses an abbreviated flag.

    With argument_default=argparse.SUPPRESS its result holds only the flags that were typed.
    """
    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.group = self

    def begin(self, title):
        """Put the flags added from here on under this title in the help."""
        self.group = self.add_argument_group(title)

    def add(self, flag, default=None, kind=str, help="", metavar="N", several=False):
        """Add a flag: a switch if kind is bool, else with a value of this type or from this list; with a list of them
        if `several`. The help shows the default if it says something, and calls the value `metavar`.
        """
        if kind is bool:
            self.group.add_argument(flag, action="store_true", help=help, default=self.argument_default or False)
            return
        rule = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": metavar}
        if several:
            rule["nargs"] = "+"
        shown = help if default in (None, "") else f"{help} ({default})"
        self.group.add_argument(flag, help=shown, default=self.argument_default or default, **rule)

    def add_model(self):
        self.add_argument("folder", metavar="FOLDER", type=path, help="folder of a run or of a Hugging Face model, or "
                          "hf:ORG/NAME, a model on the Hugging Face Hub")

    def parse_args(self, argv=None, namespace=None):
        """Parse the arguments, then download a model or a tokenizer hf:ORG/NAME: the result holds its folder."""
        args = super().parse_args(argv, namespace)
        for name, files in (("folder", MODEL), ("init_from", MODEL), ("tokenizer", TOKENIZER)):
            value = getattr(args, name, None)
            if value and value.startswith(HUB):
                setattr(args, name, from_hub(value, files))
        return args

    def add_device(self):
        self.add("--device", None, ["auto", "gpu", "cpu"],
                 "gpu: CuPy; cpu: NumPy; default: NANOLLM_DEVICE, or auto, which takes a GPU if one works")

    def read(self, argv):
        """Parse the arguments, then choose the device that --device names."""
        args = self.parse_args(argv)
        device.use(args.device)
        return args

    def _get_values(self, action, arg_strings):
        """As argparse does it, except that before Python 3.13 it makes [] of the value of --flag=--."""
        if arg_strings == ["--"] and action.option_strings:
            self._check_value(action, value := self._get_value(action, "--"))
            return value
        return super()._get_values(action, arg_strings)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def number(kind, low, high=float("inf"), open_low=False, open_high=False):
    """An argparse type: an int or a float from low to high; open_low or open_high leaves out that end itself."""
    above, below = operator.gt if open_low else operator.ge, operator.lt if open_high else operator.le
    rule = f"a {'whole ' if kind is int else ''}number {'above' if open_low else 'of at least'} {low}"
    if high != float("inf"):
        rule += f" and {'below' if open_high else 'at most'} {high}"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (above(value, low) and below(value, high)) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text!r}")
        return value
    return convert


def text(value):
    """An argparse type: text that UTF-8 can encode. A terminal with another encoding may send text that it cannot."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, not {value!r}")
    return value


def path(value):
    """An argparse type: the name of a file or a folder."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return str(value)


# Ctrl-C; `kill` and schedulers; a terminal that has gone; what batch systems send before they kill
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
           if hasattr(signal, name)]            # Windows has only the first two


def handle(numbers, handler):
    """Let this handler answer these signals, except those that are ignored on purpose, as SIGHUP is under nohup. (A
    shell lets its background jobs ignore SIGINT, which nobody wants.) Return {signal: its handler before}.
    """
    return {number: signal.signal(number, handler) for number in numbers
            if number == signal.SIGINT or signal.getsignal(number) not in (signal.SIG_IGN, None)}


class Stopped(Exception):
    """A signal has cut short what can be done again later."""


class Stop:
    """A signal asks for an orderly end: `signal` is the number of the first. Ctrl-C after it ends the process at once,
    but no other signal does, because several may say the same: when a session ends, a process gets SIGHUP and SIGTERM.

    One rank of a team that is asked is enough to stop all; rank 0 alone says so.
    """
    def __init__(self, team=ranks.ALONE):
        self.signal, self.team = None, team

    def asked(self):
        """Whether any rank has been asked, which all ranks then know. All call this at the same place."""
        if asked := max(self.team.exchange(self.signal or 0)):
            self.signal = asked
        return asked

    def __enter__(self):
        self.before = handle(SIGNALS, self.ask)
        return self

    def ask(self, number, frame):
        if self.signal:
            return
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # os.write, because this may interrupt a print, and a second one inside it would fail
        if self.team.rank == 0:
            with contextlib.suppress(OSError):      # the terminal may have gone
                os.write(2, b"\nstopping after this step; press Ctrl-C again to quit at once\n")

    def watch(self, items):
        """Yield these items, of which all ranks have as many. Raise Stopped as soon as a signal has come."""
        for item in items:
            if self.asked():
                raise Stopped
            yield item

    def __exit__(self, *_):
        for which, handler in self.before.items():
            signal.signal(which, handler)


NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def reconfigure(**how):
    """Set how stdout encodes text, unless it takes text as it is, as a notebook's does."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(**how)


def fail(name, problem, code=2):
    with contextlib.suppress(OSError):          # the terminal may have gone
        print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


def written(main):
    """What main() returns, or --help exits with, once all that it printed is written."""
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    return code


def drop_stdout():
    """Write to nowhere what stdout could not take, so that Python's last attempt does not fail as well."""
    with contextlib.suppress(OSError):          # a notebook's is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main, name=None, where=""):
    """Exit with what main() returns. What the user can fix is one line and code 2; a bug keeps its traceback.

    `name` is the command as it is typed, by default the file's name; `where` says which rank of several this is.
    """
    name = f"{name or os.path.basename(sys.argv[0])}{where}"
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:        # closed, as in a service; no other file may get its number
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    # with -W error a warning is shown, but ends nothing
    warnings.filters[:] = [("default" if action == "error" else action, *rest) for action, *rest in warnings.filters]
    warnings.showwarning = lambda message, *_: fail(name, f"warning: {message}")
    handle(SIGNALS[1:], lambda number, frame: sys.exit(128 + number))       # so half-written files are removed
    reconfigure(errors="backslashreplace")      # a terminal without Chinese is no reason to stop
    try:
        code = written(main)
    except (InputError, device.Unavailable) as problem:
        code = fail(name, problem)
    except MemoryError as problem:
        code = fail(name, f"out of memory ({problem}): lower --batch-size (--grad-accum makes up for it), "
                          "--seq-len or --size, or use a smaller model")
    except BrokenPipeError:                     # `head` in `… | head` has read enough
        drop_stdout()
        code = 0
    except OSError as problem:
        what = f"{problem.filename}: " if problem.filename else ""
        if not what and problem.errno in NO_ROOM:       # errors of files name them
            what = "standard output: "
            drop_stdout()
        code = fail(name, f"{what}{problem.strerror or problem}")
    except KeyboardInterrupt:
        code = fail(name, "interrupted", 130)
    sys.exit(code)
