"""Make a tokenizer from texts:  python -m extras.make_tokenizer TEXT [TEXT ...] OUT [--vocab-size N]

It is the byte-level BPE that train.py makes where no --tokenizer is given: for several runs, or for texts of which one
part is trained on later.
"""
import os
import sys

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from console import cli
from console.cli import number
from storage.files import refuse_existing, whole
from storage.texts import gather, with_stdin
from storage.tokenizer_training import LEAST, trained_tokenizer


def main(argv=None):
    parser = cli.Parser(usage="python -m extras.make_tokenizer TEXT [TEXT ...] OUT [options]",
                        description="Make a byte-level BPE tokenizer from texts.")
    parser.add_argument("text", metavar="TEXT", nargs="+", type=cli.path,
                        help="a UTF-8 text, .jsonl or .gz, a folder, a pattern, or - for standard input")
    parser.add_argument("out", metavar="OUT", type=cli.path, help="the tokenizer.json to write; it must not exist yet")
    parser.add("--vocab-size", None, number(int, LEAST, 10**6), "most tokens; default: a 500th of the text's bytes, as "
               "a power of two from 512 to 8192")
    parser.add("--field", "text", cli.text, "the field of a .jsonl's lines that holds a text", "NAME")
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    text, words = gather(with_stdin(args.text), None, args.field)
    tokenizer = trained_tokenizer(text, args.vocab_size)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with whole(args.out) as draft:
        tokenizer.save(str(draft))
    print(f"{args.out}: {tokenizer.get_vocab_size():,} tokens, made from {words}")
    return 0


if __name__ == "__main__":
    cli.run(main, "python -m extras.make_tokenizer")
