"""What the commands share: one clear line for bad input, numbers checked as they are read, an orderly end."""
import argparse
import operator
import os
import signal
import sys
import warnings

from hardware import device
from storage.files import InputError


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

    def add(self, flag, default=None, kind=str, help="", metavar="N"):
        """Add a flag: a switch if kind is bool, else with a value of this type or from this list. The help shows the
        default if it says something, and calls the value `metavar`.
        """
        if kind is bool:
            self.group.add_argument(flag, action="store_true", help=help, default=self.argument_default or False)
            return
        rule = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": metavar}
        shown = help if default in (None, "") else f"{help} ({default})"
        self.group.add_argument(flag, help=shown, default=self.argument_default or default, **rule)

    def add_model(self):
        self.add_argument("folder", metavar="FOLDER", help="folder of a run, or of any Hugging Face Llama model")

    def add_device(self):
        self.add("--device", None, ["auto", "gpu", "cpu"],
                 "gpu: CuPy; cpu: NumPy; default: NANOLLM_DEVICE, or auto, which takes a GPU if one works")

    def read(self, argv):
        """Parse the arguments, then choose the device that --device names."""
        args = self.parse_args(argv)
        device.use(args.device)
        return args

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


class Stop:
    """Ctrl-C or SIGTERM asks for an orderly end and sets `signal` to its number. A second one ends the process at once.
    """
    signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.signal = number
        for which in self.before:
            signal.signal(which, signal.SIG_DFL)
        # os.write, because this may interrupt a print, and a second one inside it would fail
        os.write(2, b"\nstopping after this step; press Ctrl-C again to quit at once\n")

    def __exit__(self, *_):
        for which, handler in self.before.items():
            signal.signal(which, handler)


def fail(name, problem, code=2):
    print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


def run(main, name=None):
    """Exit with what main() returns. What the user can fix is one line and code 2; a bug keeps its traceback.

    `name` is the command as it is typed, by default the file's name.
    """
    name = name or os.path.basename(sys.argv[0])
    warnings.showwarning = lambda message, *_: fail(name, f"warning: {message}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))     # so half-written files are removed
    sys.stdout.reconfigure(errors="backslashreplace")       # a terminal without Chinese is no reason to stop
    try:
        code = main()
        sys.stdout.flush()
    except (InputError, device.Unavailable) as problem:
        code = fail(name, problem)
    except MemoryError as problem:
        code = fail(name, f"out of memory ({problem}): lower --batch-size (--grad-accum makes up for it) or "
                          "--seq-len, or use a smaller model")
    except BrokenPipeError:                     # `head` in `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        code = fail(name, f"{where}{problem.strerror or problem}")
    except KeyboardInterrupt:
        code = fail(name, "interrupted", 130)
    sys.exit(code)
