"""The demo: its settings, its stories and what they hold, its files."""
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
from tiny import QUICK, SHAPE, check, command, make_files, stop_at

import train
from console import demo, options, stories
from storage.checkpoint import read_trainer
from storage.tokens import load_tokenizer

pytestmark = pytest.mark.usefixtures("cheap")


# ---------------------------------------------------------------- its settings

def test_the_demo_s_settings_are_a_valid_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "files", lambda: tuple(make_files(tmp_path)[1::2]))
    request = options.parse(["--demo", "--max-steps", "3"])
    settings = request.settings
    assert request.checkpoint is None and settings.max_steps == 3   # the command line wins over the demo's settings
    for name, value in demo.SETTINGS.items():
        if name != "max_steps":
            assert getattr(settings, name) == value
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
             for name, value in demo.SETTINGS.items()]
    assert vars(options.command_line().parse_args(flags)) == demo.SETTINGS


def test_the_demo_can_be_resumed_too(tmp_path, monkeypatch):
    """--resume works the same with --demo and without; for a run that is not a demo, --demo is refused."""
    files = make_files(tmp_path)
    monkeypatch.setattr(options.demo, "files", lambda: (files[1], files[3]))
    flags = [*SHAPE, *QUICK, "--max-steps", "4", "--eval-every", "50", "--sample-every", "100"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train.main(["--demo", *flags]) == 143
    assert train.main(["--resume", "--demo", "--max-steps", "3"]) == 0
    assert train.main(["--resume"]) == 0
    args = read_trainer(Path("runs/llm/checkpoint-3"))[1]["command"]
    assert args["demo"] is True and args["tie_embeddings"] is True and args["beta2"] == 0.99


# ---------------------------------------------------------------- its stories

STORY = ("This is the story of Ben Bell and Carl Fisher. Ben had a big hat for Carl, because it was his birthday. "
         "He had made the hat with his uncle. Ben hid the hat behind the door. Carl looked all over the house. At last "
         'he looked behind the door and saw a big hat. "Thank you, Ben!" said Carl. "What a lovely hat!"')
# Ben, the plot, Carl, the hat, big, made with whom, the uncle, what Ben hid, where, how Carl looked, what he said
CHOICES = 12 * 6 * 11 * 12 * 10 * 4 * 6 * 3 * 12 * 4 * 4


def test_a_story_and_its_bits_by_hand():
    story = stories.Story(random.Random(3))
    assert story.text == STORY
    assert story.bits == pytest.approx(math.log2(CHOICES))


def test_every_form_is_right():
    texts = "\n".join(story.text for story in stories.stories(500))
    assert not re.search(r"[{}]|\ba [aeiou]|\ban [^aeiou]|  |\bthe the\b", texts)
    assert not set(stories.GIRLS) & set(stories.BOYS)
    for name, forms in (("Mia", "she She her her"), ("Tom", "he He him his")):
        assert "{0.he} {0.He} {0.him} {0.his}".format(stories.Word(name)) == forms


def expansions(sentence):
    """Every text that a sentence can become; a word stays as its list's first word, so that {s} and {t} look alike."""
    parts = re.split(r"{(\w+)(?:\.\w+)?}", sentence)
    return ["".join(chosen) for chosen in itertools.product(*(
        [part] if i % 2 == 0 else [stories.WORDS[part][0]] if part in stories.WORDS else
        [text for option in stories.SENTENCES[part] for text in expansions(option)] for i, part in enumerate(parts)))]


def test_a_story_shows_every_choice_so_its_bits_are_no_more_than_the_least():
    texts = expansions("{story}")
    assert len(set(texts)) == len(texts) > 5000
    for words in [*stories.WORDS.values(), stories.ADJECTIVES]:
        assert len(set(words)) == len(words)
    for story in stories.stories(500):
        for word in story.values():
            assert word in story.text or word[word.index("the"):] in story.text
            assert not word.adjective or word.full in story.text


def test_the_floor_is_the_stories_bits_per_byte():
    some = stories.stories(1500)
    size = sum(len(f"{story.text}\n\n") for story in some)
    assert sum(story.bits for story in some) / size == pytest.approx(demo.FLOOR, rel=0.01)


# ---------------------------------------------------------------- its text and tokenizer

@pytest.fixture
def few(monkeypatch):
    """A short text and a small vocabulary."""
    monkeypatch.setattr(demo, "STORIES", 60)
    monkeypatch.setattr(demo, "WORDS", 400)


def test_the_text_is_the_stories_and_the_tokenizer_knows_every_text(few, cache_folder):
    text, tokenizer = map(Path, demo.files())
    said = text.read_text(encoding="utf-8")
    assert said.removesuffix("\n").split("\n\n") == [story.text for story in stories.stories(60)]
    assert {text.parent, tokenizer.parent} == {cache_folder}
    bpe = load_tokenizer(str(tokenizer))
    said += "👍 and words\tit has never seen\r\n"
    ids = bpe.encode(said).ids
    assert bpe.decode(ids) == said and len(ids) < len(said.encode()) / 2 and bpe.get_vocab_size() == 400


def test_text_and_tokenizer_are_made_once_and_again_if_one_is_missing(few, monkeypatch):
    files = [Path(path) for path in demo.files()]
    before = [path.read_bytes() for path in files]
    with monkeypatch.context() as patch:
        patch.setattr(stories, "stories", None)
        assert [Path(path) for path in demo.files()] == files
    for path in files:
        path.unlink()
        assert [Path(path).read_bytes() for path in demo.files()] == before


def test_the_first_command_of_the_readme(few):
    code, out, err = command(train.main, "--demo", *SHAPE, *QUICK, "--max-steps", 3,
                             "--prompt", "This is the story")
    assert (code, err) == (0, "") and Path("runs/llm/config.json").exists()
    assert f"needs {demo.FLOOR} bits per byte" in out
    assert "This is the story" in out and "--prompt 'This is the story" in out.splitlines()[-1]
    assert json.loads(Path("runs/llm/config.json").read_text())["vocab_size"] == 400


def test_a_cache_folder_that_cannot_be_made_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "file/cache"))
    check(command(train.main, "--demo"), "cannot write to the cache folder", "file/cache", "Not a directory",
          "set NANOLLM_CACHE")
