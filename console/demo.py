"""What `train.py --demo` learns from: short stories by the grammar in console/stories.py, so nothing is downloaded.

The tokenizer is a byte-level BPE, trained on the stories.
"""
from console import stories
from storage.files import file_hash, whole
from storage.tokenizer_training import byte_bpe
from storage.tokens import cache_folder, writable_cache

SETTINGS = {"embedding_dim": 128, "n_block": 2, "n_head": 4, "hidden_dim": 256, "max_context": 128,
            "tie_embeddings": True, "batch_size": 4, "num_epochs": 100, "max_steps": 4000, "learning_rate": 3e-3,
            "beta2": 0.99, "weight_decay": 0.0, "log_every": 50, "eval_every": 500, "prompt": "This is the story of"}
STORIES = 4000
WORDS = 900
FLOOR = 0.106       # bits per byte of these stories for a model that knows the grammar


def files():
    """The paths of the demo's text and tokenizer, made in the cache folder unless they are there."""
    folder = cache_folder()
    name = f"stories-{file_hash(stories.__file__)[:8]}"         # another grammar's stories are other files
    text, tokenizer = folder / f"{name}.txt", folder / f"{name}.tokenizer.json"
    if not (text.exists() and tokenizer.exists()):
        with writable_cache():
            corpus = "\n\n".join(story.text for story in stories.stories(STORIES)) + "\n"
            with whole(tokenizer) as path:
                byte_bpe([corpus], WORDS).save(str(path))
            with whole(text) as path:
                path.write_text(corpus, encoding="utf-8")
    return str(text), str(tokenizer)
