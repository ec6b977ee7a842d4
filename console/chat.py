"""What `generate.py --chat` needs: the words that a chat template puts around messages, and what the user says."""
import json
import sys
import time

from storage.files import InputError, read_json, readable, require


def find_template(folder):
    """(the chat template of a model's folder, or None; the file that should hold it; its tokenizer_config.json's
    settings). Raises InputError that names the file.
    """
    about, path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(about) if about.exists() else {}
    if path.exists():
        return readable(path).read_text("utf-8"), path, settings
    source = settings.get("chat_template")
    if isinstance(source, list):            # several, each {"name": …, "template": …}
        named = {each["name"]: each["template"] for each in source}
        require("default" in named, f"{about}: none of the chat templates, {', '.join(named)}, is called default: copy "
                "the right one to chat_template.jinja")
        source = named["default"]
    return source if isinstance(source, str) else None, about, settings


class Template:
    """The chat template of a model's folder: a small program in Jinja, which runs in Jinja's sandbox.

    Raises InputError that names the folder or the file.
    """
    def __init__(self, folder):
        source, self.path, settings = find_template(folder)
        require(source is not None, f"{folder} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), so it is no chat model: leave out --chat, and give it a --prompt to continue")
        tokens = {name: token["content"] if isinstance(token, dict) and "content" in token else token
                  for name, token in settings.items() if name.endswith("_token")}
        self.tokens = {name: token for name, token in tokens.items() if isinstance(token, str)}
        self.program = compiled(source, self.path)

    def render(self, messages):
        """The text that the model continues with its answer. A message is {"role": "user", "content": …}, or one of
        the "assistant".
        """
        try:
            return self.program.render(messages=messages, add_generation_prompt=True, **self.tokens)
        except Exception as problem:            # whatever a program may raise
            raise InputError(f"{self.path}: the chat template fails: {problem}") from None

    def end(self, tokenizer):
        """[the id of the token that ends an answer], or [] if the folder names none."""
        found = tokenizer.token_to_id(self.tokens.get("eos_token", ""))
        return [] if found is None else [found]


def compiled(source, path):
    """A jinja2.Template with what transformers gives to chat templates. Raises InputError that names the file."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise InputError("--chat needs the package jinja2: pip install jinja2") from None

    class Generation(jinja2.ext.Extension):     # {% generation %} marks answers, for training: they stay as they are
        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False} | how)
    environment.globals |= {"raise_exception": fail, "strftime_now": time.strftime}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as problem:
        raise InputError(f"{path}: not a chat template ({problem})") from None


def messages(first):
    """Yield what the user says: `first`, unless it is empty, then the lines of stdin, until its end."""
    if first:
        yield first
    if hasattr(sys.stdin, "reconfigure"):       # a notebook's need not have it
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(end="\n" if sys.stdin.isatty() else "", file=sys.stderr)
            return
        if line.strip():
            yield line.strip()
