"""Plant one bug after another in a copy of autograd.py and report those that no test of its gradients caught.

    python tests/tools/mutants.py                  every mutant: some minutes on two cores
    python tests/tools/mutants.py softmax rope     only those in these functions
    python tests/tools/mutants.py --list           show them, run nothing

The bugs are made from the syntax tree, so they follow every change of the source: in each function every product
loses a factor and each sum a term, signs turn, transposes vanish, gradients become 0 or 0.1 % too large, what adds
overwrites, statements are left out, conditions are always or never true. Exit status 1 if anything survives.
"""
import argparse
import ast
import functools
import itertools
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FILES = {   # the functions in which bugs are planted; None: all
    "autograd.py": None, "hardware/device.py": ("add_rows", "add_each", "_product"), "hardware/random_bits.py": None,
    "hardware/formulas.py": ("_exp_less", "_less_times", "rmsnorm", "rmsnorm_sums", "_g", "rmsnorm_dx", "_add_scaled",
                             "rotate"), "images/ops.py": None}
TIMEOUT = 180       # seconds: a mutant that runs in circles counts as caught

# Mutants that are no bugs, or none on a CPU: (the line, what it becomes): why. They cost time or memory, no result
# changes.
EQUIVALENT = {
    ("elif isinstance(node, Tensor):", "elif True:"): "a copy more",
    ("if old == dtype:", "if False:"): "a copy more",
    ("if extra > 0:", "if True:"): "a sum over no axes is a copy",
    ("if extra > 0:", "if extra >= 0:"): "a sum over no axes is a copy",
    ("if repeated:", "if True:"): "a sum over no axes is a copy",
    ("repeated = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)",
     "repeated = tuple(i for i, n in enumerate(shape) if n == 1)"): "a sum over one element is a copy",
    ("if p == 0:", "if False:"): "nothing is dropped",
    **{("rows, rows_of_dx, count = math.gcd(2 * height, _ROWS), math.gcd(H, _ROWS), _CACHE // (H * W * k * C)",
        f"rows, rows_of_dx, count = math.gcd({rows}, _ROWS), math.gcd(H, _ROWS), _CACHE // ({part})"): "other blocks"
       for rows, part in (("(2)", "H * W * k * C"), *(("2 * height", part) for part in (
           "(H * W * k)", "(C)", "(H * W) * C", "(k) * C", "(H) * k * C", "(W) * k * C")))},
    **{("high, row = rows + k - 1, k * C", f"high, row = {more}, k * C"): "rows of a strip that nobody reads"
       for more in ("(rows + k)", "(rows + k) + (1)")},
    ("dx = device.xp.empty(images.shape, dtype) if wanted else None",
     "dx = device.xp.empty(images.shape, dtype) if True else None"): "a gradient that nobody reads",
    ("L = xp.empty((B * K, G, T, 1), wide) if recording(q, k, v) else None",
     "L = xp.empty((B * K, G, T, 1), wide) if True else None"): "an array more",
    ("if n > 1:", "if n >= 1:"): "a 0 is added",
    ("if n > 1:", "if True:"): "a 0 is added",
    **{("queries = min(device.rows_at_once(B * H * S, _QUERIES, _QUERIES), T)",
        f"queries = min(device.rows_at_once({fewer}, _QUERIES, _QUERIES), T)"): "larger blocks on a GPU"
       for fewer in ("(B * H)", "(S)", "(B) * S", "(H) * S")},
    **{("heads, scale = _SCORES // (G * queries * S), D ** -0.5", f"heads, scale = _SCORES // ({fewer}), D ** -0.5"):
       "larger blocks" for fewer in ("(G * queries)", "(S)", "(G) * S", "(queries) * S")},
    ("latest = split(s)[..., end - n:]", "latest = split(s)[..., -(n):]"): "the last n of end",
    ("summed = dtype if queries == T else wide", "summed = dtype if False else wide"): "rounded later",
    ("if G == 1 or queries == T:", "if G == 1:"): "a copy more",
    ("if G == 1 or queries == T:", "if queries == T:"): "a copy more",
    ("if G == 1 or queries == T:", "if False:"): "a copy more",
    ("latest += _future(xp, n, wide)", "latest += (_future(xp, n, wide)) * 1.001"): "-inf and 0 stay",
    ("if dz:", "if True:"): "the logits are not read again",
    ("lift = 1 if dtype == wide else 2.0 ** 15",
     "lift = 1 if dtype == wide else (2.0 * 1.001) ** 15"): "any scale cancels",
    ("out[...] = x * (((r * r + z) >> half) >= limit) * scale",
     "out[...] = x * ((r * r + z) >> half > limit) * scale"): "one number of 2³²",
    ("if device.on_gpu:", "if False:"): "what a GPU does instead",
    ("if device.on_gpu:", "if True:"): "what a GPU does gives the same",
    **{("return _g_along_rows(x, q, dout, w, C, eps)[:, None], _g_along_columns(x, q, dout, C, eps)",
        f"return {wrong}"): "only on a GPU, where tests/test_gpu_path.py catches it"
       for factor in ("0", "1.001") for wrong in (
           f"(_g_along_rows(x, q, dout, w, C, eps)[:, None]) * {factor}, _g_along_columns(x, q, dout, C, eps)",
           f"_g_along_rows(x, q, dout, w, C, eps)[:, None], (_g_along_columns(x, q, dout, C, eps)) * {factor}")},
    ("if on_gpu:", "if True:"): "add.at gives the same, more slowly",
    ("if on_gpu:", "if False:"): "what a GPU does instead",
    **{("xp.add.at(out, ids, rows)", wrong): "only on a GPU, where tests/test_autograd.py catches it"
       for wrong in ("pass", "xp.add.at(out, ids, (rows) * 0)", "xp.add.at(out, ids, (rows) * 1.001)")},
    ("dz = z if dtype == wide else formulas.scaled(z, wide.type(lift), dtype)",
     "dz = z if False else formulas.scaled(z, wide.type(lift), dtype)"): "a copy more",
    ("h = step * max(1.0, abs(x))", "h = step * max((1.0 * 1.001), abs(x))"): "a step 0.1 % longer",
    ("if not excess <= worst:", "if not excess < worst:"): "a tie",
    ("if worst > 1:", "if worst >= 1:"): "an error of exactly the tolerance",
}


class Mutant(NamedTuple):
    file: str
    function: str
    line: int
    change: str
    before: str     # the line, without its comment
    after: str      # what becomes of it
    source: str     # the whole mutated file

    def __str__(self):
        return f"{self.file}:{self.line} {self.function}: {self.change}: {self.after}"


# ---------------------------------------------------------------- making them


OTHER = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}


def replacements(node, parent, text):
    """(what is done, new text) for every bug that can be planted in this place; text(node) is a node's source."""
    match node:
        case ast.BinOp(left=a, right=b, op=op):
            a, b = f"({text(a)})", f"({text(b)})"
            match op:
                case ast.Add():
                    yield from [("drop a term", a), ("drop a term", b), ("turn a sign", f"{a} - {b}")]
                case ast.Sub():
                    yield from [("drop a term", a), ("drop a term", f"-{b}"), ("turn a sign", f"{a} + {b}")]
                case ast.Mult():
                    yield from [("drop a factor", a), ("drop a factor", b)]
                case ast.Div():
                    yield from [("drop a factor", a), ("multiply instead", f"{a} * {b}")]
                case ast.Pow():
                    yield "drop the exponent", a
        case ast.UnaryOp(op=ast.USub(), operand=x) if not isinstance(x, ast.Constant):
            yield "turn a sign", text(x)
        case ast.Constant(value=float(c)) if c and not isinstance(parent, ast.arguments):
            yield "scale a number", f"({text(node)} * 1.001)"
        case ast.Call(func=ast.Name(id="_t"), args=[x]):
            yield "drop a transpose", text(x)
        case ast.Call(func=ast.Attribute(value=x, attr="transpose" | "swapaxes")):
            yield "drop a transpose", text(x)
        case ast.keyword(arg="accumulate", value=ast.Constant(value=True)):
            yield "overwrite", "accumulate=False"
        case ast.AugAssign(target=target, op=op, value=value):
            yield "drop a statement", "pass"
            yield "overwrite", f"{text(target)} = {text(value)}"
            if isinstance(op, ast.Sub):
                yield "turn a sign", f"{text(target)} += {text(value)}"
        case ast.Expr(value=ast.Call()):
            yield "drop a statement", "pass"
        case ast.BoolOp(values=values):
            yield from [("drop a condition", text(value)) for value in values]
        case ast.Compare(ops=[op], left=a, comparators=[b]):
            if type(op) in OTHER:
                yield "compare otherwise", f"{text(a)} {OTHER[type(op)]} {text(b)}"
    if isinstance(parent, ast.If | ast.IfExp) and node is parent.test:
        yield from [("always", "True"), ("never", "False")]
    if is_number(node, parent):
        yield from [("zero", f"({text(node)}) * 0"), ("scale", f"({text(node)}) * 1.001")]


def is_number(node, parent):
    """An array that an op hands on: returned, a slope, written into another, or given to a call that writes."""
    if isinstance(node, ast.Lambda):
        return False
    match parent:
        case ast.Tuple(parent=ast.Return() | ast.Lambda()):
            return True
        case ast.Lambda(args=ast.arguments(args=[])):
            return not isinstance(node, ast.arguments)
        case ast.Assign(targets=[ast.Subscript()]) | ast.AugAssign():
            return node is parent.value
        case ast.Assign(value=ast.Call(func=ast.Attribute(attr="matmul"))):
            return node is parent.value
        case ast.Call(parent=ast.Expr() | ast.Lambda(), func=ast.Attribute(attr="matmul")):
            return node is parent.args[0]
        case ast.Call(parent=ast.Expr() | ast.Lambda(), func=ast.Attribute(attr="at" | "add_rows")):
            return node is parent.args[-1]
    return False


@functools.cache
def everything():
    """Every mutant of every file but the equivalent ones, and of these the keys that match none any more."""
    made = [m for file, only in FILES.items() for m in mutants((ROOT / file).read_text(encoding="utf-8"), file)
            if only is None or m.function in only]
    stale = EQUIVALENT.keys() - {(m.before, m.after) for m in made}
    return [m for m in made if (m.before, m.after) not in EQUIVALENT], stale


def mutants(source, file="autograd.py"):
    """Every mutant of this text, in the order of its lines."""
    tree, lines = ast.parse(source), source.encode().splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]

    def span(node):                     # in bytes, as ast counts columns
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node):
        return source.encode()[slice(*span(node))].decode()

    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            child.parent = parent
    for top in tree.body:
        if isinstance(top, ast.Assign) and isinstance(top.value, ast.Lambda):
            top.name = top.targets[0].id
        elif not isinstance(top, ast.FunctionDef | ast.ClassDef):
            continue
        found, functions = [], {node.name for node in ast.walk(top) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(top):
            if hasattr(node, "lineno") and getattr(node, "id", "") not in functions and not in_message(node):
                for change, new in replacements(node, node.parent, text):
                    start, end = span(node)
                    changed = (source.encode()[:start] + new.encode() + source.encode()[end:]).decode()
                    before, after = (version.splitlines()[node.lineno - 1].partition("  #")[0].strip()
                                     for version in (source, changed))
                    found.append(Mutant(file, top.name, node.lineno, change, before, after, changed))
        yield from sorted({m.source: m for m in found}.values(), key=lambda m: m.line)


def in_message(node):
    """Inside an error's text or a __repr__."""
    while node := getattr(node, "parent", None):
        if isinstance(node, ast.Raise | ast.JoinedStr) or getattr(node, "name", "") == "__repr__":
            return True
    return False


# ---------------------------------------------------------------- which tests to try first


@functools.cache
def uses():
    """For each name that these two files define, the names that its definition mentions."""
    found = {}
    for top in [top for file in ("autograd.py", "images/ops.py")
                for top in ast.parse((ROOT / file).read_text(encoding="utf-8")).body]:
        names = {node.id for node in ast.walk(top) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(top) if getattr(node, "attr", "") in FILES["hardware/device.py"]}
        targets = top.targets if isinstance(top, ast.Assign) else [top]
        found |= {name: names for target in targets if (name := getattr(target, "id", getattr(target, "name", "")))}
    return found


def selection(function):
    """Pytest's -k for the tests of the ops that use this function; "" (all of them) where these are many."""
    users, before = {function}, None
    while users != before:
        before, users = users, users | {name for name, names in uses().items() if names & users}
    ops = [name for name in users if not name.startswith("_") and name.islower()]
    return " or ".join(sorted(ops)) if len(ops) <= 5 else ""


# ---------------------------------------------------------------- running them


def workplace(folder):
    """A copy of what the tests need."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, folder)
    for name in ("hardware", "storage", "console", "images"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def caught(folder, *arguments, write_bytecode=False):
    """Whether a test fails in this folder. None of pytest's plug-ins is needed, and they take seconds to load."""
    environment = os.environ | {"NANOLLM_DEVICE": "cpu", "NANOLLM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if not write_bytecode:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--assert=plain", "-p", "no:cacheprovider",
               "tests/test_autograd.py", "tests/test_precision.py"]
    try:
        run = subprocess.run([*command, *arguments], cwd=folder, env=environment, timeout=TIMEOUT,
                             capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return True
    if run.returncode in (3, 4):        # pytest itself broke: that proves nothing
        raise RuntimeError(run.stdout + run.stderr)
    return run.returncode not in (0, 5)


def survives(mutant, folder):
    """Whether no test fails: first those of the ops concerned, then all, last those that take PyTorch."""
    file = folder / mutant.file
    original = file.read_bytes()
    file.write_text(mutant.source, encoding="utf-8")
    first = selection(mutant.function)
    stages = [("-k", f"({first}) and not torch")] if first else []
    try:
        return not any(caught(folder, *stage) for stage in [*stages, ("-k", "not torch"), ("-k", "torch")])
    finally:
        file.write_bytes(original)


def run(chosen, workers=2):
    """The mutants that no test caught; each is shown as it is found."""
    survivors = []
    with tempfile.TemporaryDirectory() as parent:
        folders = queue.Queue()
        first = workplace(Path(parent, "0").resolve())
        if caught(first, write_bytecode=True):
            raise SystemExit("the tests fail without any mutant: make them pass first")
        for file in FILES:              # a mutant may have the size and the time of the file it was made from
            for compiled in (first / file).parent.glob(f"__pycache__/{Path(file).stem}.*"):
                compiled.unlink()
        for i in range(1, workers):
            shutil.copytree(first, Path(parent, str(i)))
        for i in range(workers):
            folders.put(Path(parent, str(i)).resolve())

        def one(mutant):
            folder = folders.get()
            try:
                if survives(mutant, folder):
                    survivors.append(mutant)
                    print(f"survived: {mutant}", flush=True)
            finally:
                folders.put(folder)
        with ThreadPoolExecutor(workers) as pool:
            for i, _ in enumerate(pool.map(one, chosen), 1):
                if i % 50 == 0:
                    print(f"{i} of {len(chosen)}", file=sys.stderr, flush=True)
    return survivors


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("functions", nargs="*", help="only mutants in these functions or classes")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    arguments = parser.parse_args()
    made, stale = everything()
    for before, after in stale:
        print(f"EQUIVALENT names a mutant that is not made any more: {before} -> {after}", file=sys.stderr)
    if unknown := set(arguments.functions) - {m.function for m in made}:
        parser.error(f"no bug can be planted in {', '.join(sorted(unknown))}")
    chosen = [m for m in made if not arguments.functions or m.function in arguments.functions]
    if arguments.list:
        for m in chosen:
            print(m)
        print(f"{len(chosen)} mutants")
        return 0
    survivors = run(chosen)
    print(f"{len(chosen)} mutants, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
