"""What the commands share: one clear line for bad input, numbers checked as they are read, an orderly end."""
import argparse
import os
import signal
import sys
import warnings

from hardware.device import Unavailable
from storage.files import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, and that never guesses an abbreviated flag."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.group = self

    def begin(self, title):
        """Flags added from here on stand under this title in the help."""
        self.group = self.add_argument_group(title)

    def switch(self, flag, help):
        """Add a flag without a value."""
        self.group.add_argument(flag, action="store_true", help=help)

    def add(self, flag, default=None, kind=str, help=""):
        """Add a flag with a value of this type, or out of this list; the help tells its default, if it has one."""
        rule = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        self.group.add_argument(flag, default=default, help=help + (default is not None) * " (%(default)s)", **rule)

    def add_device(self):
        self.add("--device", None, ["auto", "gpu", "cpu"],
                 "CuPy on a GPU, or NumPy; by default NANOLLM_DEVICE or auto, the GPU where one works")

    def error(self, message):
        raise InputError(f"{message}; --help lists what can be given")


def number(kind, low, high=float("inf"), open_low=False, open_high=False):
    """An argparse type: an int or a float from low to high, the ends excluded where `open`."""
    rule = f"a {'whole ' if kind is int else ''}number {'above' if open_low else 'of at least'} {low}"
    if high != float("inf"):
        rule += f" and {'below' if open_high else 'at most'} {high}"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        if not inside or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text!r}")
        return value
    return convert


def text(value):
    """An argparse type: text that can be encoded, which what a terminal of another encoding sends may not be."""
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, not {value!r}")
    return value


class Stop:
    """Ctrl-C or SIGTERM asks for an orderly end: `signal` is its number then. A second one ends the process at once."""
    signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.signal = number
        for which in self.before:
            signal.signal(which, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more quits at once\n")    # print may be what was interrupted

    def __exit__(self, *_):
        for which, handler in self.before.items():
            signal.signal(which, handler)


def fail(name, problem, code=2):
    print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


def run(main):
    """Exit with what main() returns. What the user can mend is one line and code 2; a bug keeps its traceback."""
    name = os.path.basename(sys.argv[0])
    warnings.showwarning = lambda message, *_: fail(name, f"warning: {message}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))     # files half written are removed
    sys.stdout.reconfigure(errors="backslashreplace")       # a terminal without Chinese is no reason to stop
    try:
        code = main()
        sys.stdout.flush()
    except (InputError, Unavailable) as problem:
        code = fail(name, problem)
    except MemoryError as problem:
        code = fail(name, f"out of memory ({problem}): lower --batch-size (--grad-accum makes up for it) or "
                          "--seq-len, or use a smaller model")
    except BrokenPipeError:                     # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        code = fail(name, f"{where}{problem.strerror or problem}")
    except KeyboardInterrupt:
        code = fail(name, "interrupted", 130)
    sys.exit(code)
