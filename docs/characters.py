"""Write a tokenizer that has each character of a text as a token:  python docs/characters.py TEXT characters.json

All other characters become <unk>.
"""
import hashlib
import itertools
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # nanollm is run from its folder
from console import cli
from storage.files import whole
from storage.tokens import read_text


def write(text, path):
    """Write the tokenizer of the file `text` to the file `path`. Raises InputError if the text cannot be used."""
    known = set(itertools.chain.from_iterable(read_text(text, hashlib.sha256())))       # as training reads it, with \r
    vocabulary = {word: number for number, word in enumerate([*sorted(known), "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    with whole(path) as draft:
        tokenizer.save(str(draft))


def main(argv=None):
    parser = cli.Parser(usage="python docs/characters.py TEXT characters.json", description=__doc__)
    parser.add_argument("text", metavar="TEXT", help="a UTF-8 text")
    parser.add_argument("path", metavar="FILE", help="the tokenizer to write")
    args = parser.parse_args(argv)
    write(args.text, args.path)
    return 0


if __name__ == "__main__":
    cli.run(main)
