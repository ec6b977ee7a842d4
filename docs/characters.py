"""Write a tokenizer that has each character of a text as a token:  python docs/characters.py TEXT characters.json"""
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers


def write(text, path):
    """Write the tokenizer of the file `text` to the file `path`."""
    vocabulary = {character: number for number, character in enumerate(sorted(set(Path(text).read_text("utf-8"))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path))


if __name__ == "__main__":
    write(*sys.argv[1:])
