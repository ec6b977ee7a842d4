"""What `train.py --demo` learns from: the documentation that every Python has, so nothing is downloaded.

The text is the language reference in pydoc's topics, and then docstrings of the standard library, which are read from
its source files without running them. The tokenizer is a byte-level BPE, trained on that text.
"""
import ast
import pydoc_data.topics
import sysconfig
from pathlib import Path

from storage.files import whole
from storage.tokenizer_training import byte_bpe
from storage.tokens import cache_folder, writable_cache

SETTINGS = {"embedding_dim": 192, "n_block": 4, "n_head": 6, "hidden_dim": 512, "max_context": 128,
            "tie_embeddings": True, "batch_size": 16, "num_epochs": 100, "max_steps": 300, "learning_rate": 3e-3,
            "beta2": 0.99, "weight_decay": 0.1, "eval_every": 100, "prompt": "The function returns"}
CHARACTERS = 1_500_000
WORDS = 2048


def docstrings():
    """The docstrings of the standard library's own modules, classes and functions, in the order of their files."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    yield text


def files():
    """The paths of the demo's text and tokenizer, made in the cache folder unless they are there."""
    folder = cache_folder()
    text, tokenizer = folder / "demo.txt", folder / "demo.tokenizer.json"
    if not (text.exists() and tokenizer.exists()):
        with writable_cache():
            topics = pydoc_data.topics.topics
            parts, length = [topics[name].strip() for name in sorted(topics)], 0
            for part in docstrings():
                length += len(part)
                if length > CHARACTERS:
                    break
                parts.append(part)
            corpus = "\n\n".join(parts) + "\n"
            with whole(tokenizer) as path:
                byte_bpe([corpus], WORDS).save(str(path))
            with whole(text) as path:
                path.write_text(corpus, encoding="utf-8")
    return str(text), str(tokenizer)
