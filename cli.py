"""What the commands share: one clear line for bad input, and numbers checked as they are read."""
import argparse
import os
import sys
import warnings

from device import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and that never guesses an abbreviated flag."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists what can be given\n")


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


def run(main):
    """Exit with what main() returns. What the user can mend is one line and code 2; a bug keeps its traceback."""
    name = os.path.basename(sys.argv[0])
    warnings.showwarning = lambda message, *_: print(f"{name}: warning: {message}", file=sys.stderr)
    try:
        code = main()
        sys.stdout.flush()
    except InputError as problem:
        code = fail(name, problem)
    except MemoryError as problem:
        code = fail(name, f"out of memory ({problem}): lower --batch-size or --seq-len, or make the model smaller; "
                          "--grad-accum keeps a big batch")
    except BrokenPipeError:                     # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        code = fail(name, f"{where}{problem.strerror or problem}")
    except KeyboardInterrupt:
        code = fail(name, "interrupted", 130)
    sys.exit(code)


def fail(name, problem, code=2):
    print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return code
