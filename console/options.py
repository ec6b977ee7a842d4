"""The flags of train.py: one table, `Settings`, and what a command line makes of it before any data is read.

    argv --read_flags (defaults or resumed, then complete)--> Request --parse--> the same, after all checks that need no
    data --resolved--> Settings that know the last step, once the text is read
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from autograd import ACTIVATIONS
from console import cli, demo
from console.cli import number
from console.progress import say
from hardware import device, ranks
from nanollm import Config
from storage.checkpoint import WINDOW, State, check_ended, check_free, last_run, newest_checkpoint, read_trainer
from storage.files import InputError, file_hash, require
from storage.texts import ENDS, gather, separator, with_stdin
from storage.tokenizer_training import LEAST, cached_tokenizer
from storage.tokens import encode_prompt, load_tokenizer, vocab_size

COUNT, SIZE = number(int, 1, 10**9), number(int, 1, 10**6)
POSITIVE, SHARE = number(float, 0, open_low=True), number(float, 0, 1, open_high=True)
RATE = number(float, 0, 1, open_low=True)
SIZES = {               # other defaults; docs/guide.md says what they were measured to do
    "tiny": {"embedding_dim": 128, "n_block": 4, "n_head": 4, "hidden_dim": 344, "max_context": 128,
             "tie_embeddings": True, "batch_size": 16, "learning_rate": 3e-3, "beta2": 0.99, "weight_decay": 0.1,
             "max_steps": 1000},
    "small": {"embedding_dim": 256, "n_block": 6, "n_head": 8, "hidden_dim": 688, "max_context": 256,
              "tie_embeddings": True, "batch_size": 16, "learning_rate": 1e-3, "beta2": 0.99, "weight_decay": 0.1,
              "max_steps": 2000},
    "base": {}}


def setting(group, default, kind, help, metavar="N", fixed=False, several=False):
    """A field of Settings: its group in the help, its kind (bool, an argparse type or a list of choices), its help
    text, what the help calls its value, whether it may not change on --resume, and whether it is a list.
    """
    return dataclasses.field(default=default, metadata={"group": group, "kind": kind, "help": help, "metavar": metavar,
                                                        "fixed": fixed, "several": several})


in_run, in_model = partial(setting, "the run"), partial(setting, "the model", fixed=True)
in_data, in_machine = partial(setting, "the data"), partial(setting, "speed and memory")
in_training, in_reports = partial(setting, "the training"), partial(setting, "reports and checkpoints")


class Training:
    """What the Settings of every command that trains can do. They have the fields that these methods name."""
    program, runs = "train.py", "llm"           # what is typed after "python"; where runs go by default, in runs/
    title = "Train a Llama-style language model on a text, from scratch."
    needed = "--text FILE"
    paths = "text", "tokenizer", "init_from"
    windows, more = "windows", "--grad-accum, --seq-len or --stride, or give more text"

    def windows_per_step(self):
        return self.batch_size * self.grad_accum

    def resolved(self, state, n_window):
        """The last stage, once the data is read: fill in what depends on its number of windows, which is the last step,
        the warm-up and the lowest rate.

        Training ends with its epochs of `n_window` windows, or at --max-steps if that comes first. Raises InputError.
        """
        require(self.windows_per_step() <= n_window,
                f"a step takes {self.windows_per_step()} {self.windows} (--batch-size {self.batch_size} × --grad-accum "
                f"{self.grad_accum}), but there are only {n_window} training {self.windows}: lower --batch-size, "
                f"{self.more}")
        left = max(self.num_epochs * n_window - state.windows, 0)
        end = state.step + math.ceil(left / self.windows_per_step())
        steps = min(end, self.max_steps or end)
        if self.warmup_steps is not None and self.warmup_steps > steps:
            raise InputError(f"--warmup-steps {self.warmup_steps} is more than the {steps} steps of training: lower it")
        warmup = min(100, steps // 100) if self.warmup_steps is None else self.warmup_steps
        low = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        return replace(self, max_steps=steps, warmup_steps=warmup, min_lr=low)

    def check(self, typed):
        """Raise InputError if flags contradict each other, of which `typed` were typed."""
        require(self.min_lr is None or self.min_lr <= self.learning_rate or self.lr_schedule == "constant",
                f"--min-lr {self.min_lr} is above --learning-rate {self.learning_rate}, from which the rate falls: "
                "give a lower --min-lr")
        require("patience" not in typed or self.validates(),
                "--patience needs a validation part: leave it out, or give a --val-fraction above 0")
        require("min_lr" not in typed or self.lr_schedule == "cosine",
                f"--min-lr has no effect with --lr-schedule {self.lr_schedule}: leave it out, or give "
                "--lr-schedule cosine")

    def validates(self):
        return self.val_fraction > 0

    def to_json(self):
        """What trainer.json holds: files by their whole paths, so that a run can be resumed from any folder."""
        paths = {name: absolute(getattr(self, name)) for name in self.paths if getattr(self, name)}
        return asdict(self) | paths


def absolute(paths):
    """The whole path, or a list of them; a list of one is that one, as in checkpoints of before."""
    if isinstance(paths, str):
        return os.path.abspath(paths)
    return absolute(paths[0]) if len(paths) == 1 else [absolute(path) for path in paths]


@dataclass(frozen=True)
class Settings(Training):
    """What a training is: the flags of train.py, and what "command" in a checkpoint's trainer.json holds."""
    text: Sequence[str] | None = in_run(
        None, cli.path, "the texts to learn from, in UTF-8: files (.jsonl and .gz, too), folders, patterns, or - for "
        "standard input", "FILE", several=True)
    tokenizer: str | None = in_run(
        None, cli.path, "a Hugging Face tokenizer.json, a model's folder or hf:ORG/NAME; default: made from the text",
        "FILE")
    demo: bool = in_run(False, bool, "train a small model on stories that a grammar makes: no files needed", fixed=True)
    init_from: str | None = in_run(
        None, cli.path, "start from the weights, shape and tokenizer of this model (fine-tuning), which may be "
        "hf:ORG/NAME, too", "FOLDER", fixed=True)

    size: str = in_model(
        "base", list(SIZES), "other defaults, see docs/guide.md: tiny learns a book in minutes on two cores, small "
        "in an hour")
    embedding_dim: int = in_model(Config.embedding_dim, SIZE, "C, the width of the model")
    n_block: int = in_model(Config.n_block, number(int, 1, 1000), "number of transformer blocks")
    n_head: int = in_model(Config.n_head, SIZE, "number of attention heads")
    n_kv_head: int | None = in_model(
        None, SIZE, "number of key/value heads (grouped-query attention); default: as many as heads")
    max_context: int = in_model(Config.max_context, SIZE, "longest context in tokens")
    hidden_dim: int = in_model(Config.hidden_dim, SIZE, "F, the width inside the gated linear unit")
    head_dim: int | None = in_model(None, SIZE, "D, the width of a head; default: --embedding-dim / --n-head")
    eps: float = in_model(Config.eps, RATE, "RMSNorm's epsilon")
    rope_theta: float = in_model(Config.rope_theta, POSITIVE, "RoPE's base")
    activation: str = in_model(
        Config.activation, list(ACTIVATIONS), "activation function of the gated linear unit")
    tie_embeddings: bool = in_model(False, bool, "use the embedding matrix as the output layer too")
    qk_norm: bool = in_model(False, bool, "normalise each head's queries and keys, as Qwen3 does")

    field: str = in_data("text", cli.text, "the field of a .jsonl's lines that holds a text", "NAME", fixed=True)
    no_separator: bool = in_data(
        False, bool, "put nothing between two texts; default: the tokenizer's end-of-text token, or if it has none an "
        "empty line", fixed=True)
    vocab_size: int | None = in_data(
        None, number(int, LEAST, 10**6), "without --tokenizer: most tokens of the one that is made; default: a 500th "
        "of the text's bytes, as a power of two from 512 to 8192", fixed=True)
    seq_len: int | None = in_data(
        None, SIZE, "tokens in a training window, at most --max-context; default: --max-context, with --init-from "
        f"no more than {WINDOW}", fixed=True)
    stride: int | None = in_data(
        None, SIZE, "tokens between the starts of two windows; default: half of --seq-len", fixed=True)
    val_fraction: float = in_data(
        0.1, SHARE, "share of the text, taken from its end, held out for validation; 0: no validation", fixed=True)
    num_epochs: int = in_data(10, COUNT, "passes over the training windows")
    max_steps: int | None = in_data(
        None, COUNT, "stop after this many steps, or when the epochs end if that is sooner")
    batch_size: int = in_data(4, COUNT, "number of windows in a batch")

    dtype: str = in_machine(
        "float32", ["float32", "float16", "bfloat16"], "number format of activations and matrix-product inputs; "
        "weights, sums, softmax and loss stay float32", fixed=True)
    tf32: bool = in_machine(
        False, bool, "GPU: let float32 products round their inputs to 10 bits of mantissa, for the tensor cores")
    recompute: bool = in_machine(
        False, bool, "compute a block's activations again in backward: less memory, more time")

    dropout: float = in_training(
        0.0, SHARE, "share of the embedding, and of each branch added to h, that becomes 0 in training")
    grad_accum: int = in_training(1, COUNT, "number of batches whose gradients make one step")
    learning_rate: float = in_training(1e-4, RATE, "highest learning rate")
    lr_schedule: str = in_training(
        "cosine", ["cosine", "constant"], "shape of the learning rate after the warm-up")
    warmup_steps: int | None = in_training(
        None, number(int, 0), "steps over which the rate rises linearly; default: 1 %% of all steps, at most 100")
    min_lr: float | None = in_training(
        None, number(float, 0), "final learning rate of the cosine; default: a tenth of the learning rate")
    beta1: float = in_training(0.9, SHARE, "decay rate of Adam's mean of the gradient")
    beta2: float = in_training(0.999, SHARE, "decay rate of Adam's mean of the gradient's square")
    weight_decay: float = in_training(
        0.0, number(float, 0, 1), "shrink matrices by this times the learning rate in each step")
    clip_norm: float = in_training(1.0, number(float, 0), "scale gradients down to this norm; 0: off")
    patience: int | None = in_training(
        None, COUNT, "stop after this many evaluations without a better validation loss; default: never; needs a "
        "validation part")
    seed: int = in_training(
        0, number(int, 0), "random seed for the initial weights, the window order and dropout", fixed=True)

    eval_every: int | None = in_reports(
        None, COUNT, "steps between evaluations, in addition to the ends of epochs and the last step")
    save_every: int = in_reports(500, COUNT, "number of steps between checkpoints")
    keep_last: int = in_reports(2, COUNT, "number of checkpoints to keep")
    log_every: int = in_reports(10, COUNT, "steps between rows of metrics.csv; step 1 is always logged")
    sample_every: int | None = in_reports(
        None, COUNT, "steps between samples of text; default: one at each evaluation")
    prompt: str | None = in_reports(
        None, cli.text, "what the samples begin with; default: the first words of the validation text", "TEXT")

    def complete(self):
        """The first stage, before any file is read: fill in what follows from other flags. Raises InputError if two
        contradict each other.
        """
        seq_len = self.seq_len or (min(self.max_context, WINDOW) if self.init_from else self.max_context)
        stride = self.stride or max(seq_len // 2, 1)
        require(seq_len <= self.max_context,
                f"--seq-len {seq_len} is more than the longest context, --max-context {self.max_context}")
        require(stride <= seq_len, f"--stride {stride} is more than a window, {seq_len} tokens: some tokens would be "
                "skipped")
        tokenizer = self.tokenizer
        if tokenizer and os.path.isdir(tokenizer):
            tokenizer = str(Path(tokenizer, "tokenizer.json"))
        return replace(self, tokenizer=tokenizer, seq_len=seq_len, stride=stride,
                       n_kv_head=self.n_kv_head or self.n_head)

    def check(self, typed):
        super().check(typed)
        require("vocab_size" not in typed or not (self.tokenizer or self.demo),
                "--vocab-size is for a tokenizer that is made from the text, and there is one already: leave it out, "
                "or leave out --tokenizer")

    def shape(self):
        """The fields of Config that have a flag."""
        return {name: getattr(self, name) for name in SHAPE}


SHAPE = [field.name for field in fields(Config) if field.name in Settings.__dataclass_fields__.keys() - {"vocab_size"}]


def flag(name):
    return f"--{name.replace('_', '-')}"


def command_line(kind=Settings):
    """The parser of the flags of this kind of Training and of the four that belong to one call (--artifact-dir,
    --resume, --processes, --device), which are not stored. Its result holds only what was typed.
    """
    parser = cli.Parser(usage=f"python {kind.program} {kind.needed} [options]", description=kind.title,
                        argument_default=argparse.SUPPRESS)
    for group, members in itertools.groupby(fields(kind), lambda field: field.metadata["group"]):
        parser.begin(group)
        for field in members:
            parser.add(flag(field.name), field.default, field.metadata["kind"], field.metadata["help"],
                       field.metadata["metavar"], field.metadata["several"])
        if group == "the run":
            parser.add("--artifact-dir", kind=cli.path, metavar="FOLDER",
                       help=f"folder of the run; default: runs/{kind.runs}, then runs/{kind.runs}-2, …")
            parser.add("--resume", False, bool,
                       f"continue from the newest checkpoint of --artifact-dir (or of the last runs/{kind.runs})")
        if group == "speed and memory":
            parser.add("--processes", None, COUNT, f"number of processes that share the {kind.windows} of a step; "
                       "default: as many as there are cores or GPUs, if they can share them evenly")
            parser.add_device()
    return parser


def from_json(values, kind=Settings):
    """The Settings that `to_json` gave, read as a command line is. Raises InputError naming a value that its flag
    cannot have.
    """
    if unknown := values.keys() - {field.name for field in fields(kind)}:
        raise InputError(f"{flag(min(unknown))} is no flag of {kind.program}")
    lists = {field.name: values[field.name] for field in fields(kind)
             if field.metadata["several"] and isinstance(values.get(field.name), list)}
    words = [flag(name) if value is True else f"{flag(name)}={value}" for name, value in values.items()
             if name not in lists and value is not None and value is not False]
    words += [word for name, several in lists.items() for word in (flag(name), *map(str, several))]
    return kind(**vars(command_line(kind).parse_args(words)))


# ---------------------------------------------------------------- from a command line to a run

@dataclass(frozen=True)
class Request:
    """What a command line asks for: a run with these settings, from its beginning or from a checkpoint."""
    settings: Training
    folder: str | None                  # --artifact-dir
    checkpoint: Path | None = None      # from which --resume continues; its State, the hashes of its text and tokenizer
    state: State = dataclasses.field(default_factory=State)
    hashes: dict = dataclasses.field(default_factory=dict)
    before: Training | None = None      # the Settings in that checkpoint
    own_tokenizer: Path | None = None   # the checkpoint's, if the original has gone or changed
    processes: int | None = None        # --processes, and in the end how many there will be
    config: Config | None = None        # of the model, in the end
    opening: list = dataclasses.field(default_factory=list)     # the ids of --prompt, in the end
    ends: dict = dataclasses.field(default_factory=dict)        # a fresh model's eos_token_id, if its texts have one

    @property
    def n_weight(self):
        return sum(math.prod(shape) for shape in self.config.shapes().values())

    @property
    def source(self):
        """The folder from which the model comes, None for a fresh one."""
        return self.checkpoint or self.settings.init_from

    @property
    def tokenizer(self):
        """The tokenizer.json to read; None: make one."""
        return self.own_tokenizer or self.settings.tokenizer

    def files(self):
        """(text, tokenizer.json, how the text was made): the paths of the two files, which are made in this machine's
        cache unless they were given. Raises InputError.
        """
        settings = self.settings
        given = self.tokenizer and load_tokenizer(self.tokenizer)
        text, words = gather(settings.text, given, settings.field, not settings.no_separator)
        return text, self.tokenizer or cached_tokenizer(text, settings.vocab_size), words


def read_flags(argv, parser):
    """The Request of these flags, its Settings complete: what was typed wins over the demo's settings, over the shape
    of the model in --init-from, or over the checkpoint's settings. Chooses the device, too. Raises InputError.
    """
    typed = vars(parser.parse_args(argv))
    folder, where, processes = (typed.pop(name, None) for name in ("artifact_dir", "device", "processes"))
    if typed.pop("resume", False):
        request = resumed(folder, typed)
    else:
        request = Request(Settings(**(defaults(typed) | typed)).complete(), folder)
    request.settings.check(typed)
    device.use(where, request.settings.tf32)
    return replace(request, processes=processes)


def defaults(typed):
    """For a new run: the settings that --demo or --init-from gives in place of Settings' defaults."""
    if typed.get("demo"):
        if given := [name for name in ("text", "tokenizer", "init_from", "size") if typed.get(name)]:
            raise InputError(f"--demo brings its own text, tokenizer and size: leave out {flag(given[0])}")
        return demo.SETTINGS
    if source := typed.get("init_from"):
        require("size" not in typed, "--init-from brings its own shape: leave out --size")
        check_ended(Path(source))
        shape = asdict(Config.load(source))
        return {name: shape[name] for name in SHAPE} | {"tokenizer": str(Path(source, "tokenizer.json"))}
    return SIZES[typed.get("size", "base")]


def continued(folder, typed, kind=Settings):
    """For --resume: the Request that continues the run in this folder (None: the last), with its settings except where
    others were typed. Raises InputError.
    """
    newest = newest_checkpoint(folder or last_run(kind.runs))
    state, about = read_trainer(newest)
    try:
        before = from_json(about["command"], kind)
    except InputError as problem:
        raise InputError(f"{newest / 'trainer.json'}: command: {problem}") from None
    settings = replace(before, **typed)
    old, new = before.to_json(), settings.to_json()
    for name in (field.name for field in fields(kind) if field.metadata["fixed"]):
        if new[name] != old[name]:
            raise InputError(f"--resume: {flag(name)} was {old[name]} in this run and cannot become {typed[name]}")
    if settings.windows_per_step() != before.windows_per_step():
        say(f"the batch size has changed: training continues with the next {kind.windows}, but not as it would have")
    return Request(settings, str(newest.parent), newest, state, about["hashes"], before)


def resumed(folder, typed):
    """`continued` for a text: its settings complete, and the run's own copy of the tokenizer if the file has gone."""
    request = continued(folder, typed)
    settings, own = request.settings, request.checkpoint / "tokenizer.json"
    if is_tokenizer(settings.tokenizer or "", request.hashes.get("tokenizer"), own):
        own = None
    elif "tokenizer" in typed:
        load_tokenizer(settings.tokenizer)      # a file that cannot be read is another mistake
        raise InputError(f"--resume: {settings.tokenizer} is not the tokenizer that this run began with: leave out "
                         "--tokenizer, because the run has a copy of its own, or begin a new run")
    return replace(request, settings=settings.complete(), own_tokenizer=own)


def is_tokenizer(path, expected, own):
    """Whether the file has the hash `expected`, or is the same tokenizer as the file `own`, written in another way.

    What inserts special tokens does not count, because training inserts none.
    """
    with contextlib.suppress(InputError):
        if file_hash(path) == expected:
            return True
        theirs, ours = (json.loads(load_tokenizer(file).to_str()) | {"post_processor": None} for file in (path, own))
        return theirs == ours
    return False


def parse(argv):
    """What train.py does first: `read_flags`, the demo's files, and all checks that need no data. Raises InputError."""
    request = read_flags(argv, command_line())
    settings = request.settings
    require(settings.demo or settings.text, "--text FILE is needed (or --demo, which needs no files)")
    if not request.checkpoint:
        check_free(request.folder)
    if settings.demo and not os.path.isfile((settings.text or [""])[0]):
        text, tokenizer = demo.files()
        say(f"stories    made by a grammar; a perfect model, one that knows it, needs {demo.FLOOR} bits per byte")
        settings = replace(settings, text=[text], tokenizer=tokenizer)
    request = replace(request, settings=replace(settings, text=with_stdin(settings.text)))
    text, path, words = files_of(request)
    tokenizer = load_tokenizer(path)
    if words != text:
        say(f"texts      {words}")
    if not request.tokenizer:
        say(f"tokenizer  a byte-level BPE of {vocab_size(tokenizer):,} tokens, made from the text")
    request, between = with_opening(request, tokenizer), separator(tokenizer)[0]
    ended = words != text and not settings.no_separator and between in ENDS
    return replace(request, config=make_config(request, tokenizer),
                   ends={"eos_token_id": tokenizer.token_to_id(between)} if ended else {},
                   hashes=request.hashes or {"text": file_hash(text), "tokenizer": file_hash(path)},
                   processes=count_processes(request.processes, settings, alone=argv is not None))


def with_opening(request, tokenizer):
    """The Request with the ids of its --prompt. Raises InputError if that cannot be encoded, unless a checkpoint from
    before prompts were checked has it: then the run continues without one.
    """
    settings, before = request.settings, request.before
    try:
        return replace(request, opening=encode_prompt(tokenizer, settings.prompt or ""))
    except InputError as problem:
        if not before or before.prompt != settings.prompt:
            raise
        say(f"{problem}; samples begin with the first words of the validation text")
        return replace(request, settings=replace(settings, prompt=None))


def count_processes(wanted, settings, alone):
    """How many processes share the windows of a step: as many as --processes says or mpiexec has started. By default
    one if `alone`, which is for callers of train.main, or one for each core or GPU. Raises InputError.
    """
    started, windows = ranks.launched(), settings.windows_per_step()
    if started > 1:
        require(wanted in (None, started), f"--processes {wanted}: mpiexec has started {started}; leave the flag out")
        count = started
    else:
        count = wanted or (1 if alone else math.gcd(windows, device.places()))
        require(not device.on_gpu or count <= device.places(),
                f"--processes {count} is more than the GPUs of this machine, {device.places()}")
    require(count <= windows, f"{count} processes cannot share the {windows} {settings.windows} of a step "
            "(--batch-size times --grad-accum): use fewer, or raise one of these")
    return count


def files_of(request):
    """request.files(). Raises InputError unless a resumed run has the text that it began with."""
    if not request.checkpoint:
        return request.files()
    try:
        files = request.files()
    except InputError as problem:
        raise InputError(f"--resume: {problem}; say with --text where this run's text is now") from None
    require(file_hash(files[0]) == request.hashes.get("text"),
            f"--resume: {files[0]} is not the text that this run began with: give the original with --text, or begin a "
            "new run")
    return files


def note_horizon(request, settings, n_window, rate):
    """Say so if a resumed run's end has moved and its learning rate therefore rises. `rate` is train.py's."""
    before, step = request.before.resolved(request.state, n_window), request.state.step
    last, now = rate(before, max(step - 1, 0)), rate(settings, step)
    later = settings.max_steps > before.max_steps and settings.lr_schedule == "cosine"
    if step and later and now > rate(before, min(step, before.max_steps - 1)):
        say(f"training ends after step {settings.max_steps} now, not {before.max_steps}, which stretches the cosine: "
            f"the learning rate rises from {last:.3g} to {now:.3g}; to stay at {last:.3g}, add --lr-schedule constant "
            f"--learning-rate {last:.3g} --warmup-steps 0")


def make_config(request, tokenizer):
    """The Config of the model: that of the folder it comes from, or without one that of the flags.

    tokenizer None stands for the demo's, which need not have been made yet. Raises InputError.
    """
    settings, source = request.settings, request.source
    size = vocab_size(tokenizer) if tokenizer else settings.vocab_size or demo.WORDS
    if not source:
        try:
            return Config(size, **settings.shape())
        except InputError as problem:           # it names Config's fields: name the flags
            words = re.sub(r"\b(" + "|".join(SHAPE) + r")\b", lambda found: flag(found[0]), str(problem))
            raise InputError(words) from None
    config = Config.load(source)
    V, theirs = config.vocab_size, Path(source, "tokenizer.json")
    same = load_tokenizer(theirs).get_vocab() == tokenizer.get_vocab() if os.path.lexists(theirs) else size == V
    if not same or size > V:
        raise InputError(f"{settings.tokenizer} ({size} tokens) does not have the vocabulary with which the model in "
                         f"{source} ({V}) was trained: use its own tokenizer")
    for name, given in settings.shape().items():
        if given not in (None, getattr(config, name)):
            raise InputError(f"{flag(name)} is {given}, but the model in {source} has {getattr(config, name)}: "
                             "leave it out")
    return config
