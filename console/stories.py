"""Short stories for `train.py --demo`, made by the grammar below, and how many bits of information they hold.

In a sentence, {name} is another sentence, one of SENTENCES[name], or a word, one of WORDS[name]: a person, a thing, a
place. A word is chosen when the story needs it first, and it stays the same until the story ends. So a model must learn
over a distance who "she" is, who has the kite, which colour it had and where it was hidden.

A choice among n is log2 n bits, and the story shows each choice that was made. So the sum of these bits is what a
perfect model, one that knows the grammar, needs on average to predict a story. No model can need less.
"""
import math
import random

# First name and surname. If first names could be exchanged for each other, the model would find it hard to learn them:
# it would have no reason to tell them apart before it can copy them, and it cannot copy what it does not tell apart.
GIRLS = {"Anna": "Baker", "Clara": "Brook", "Emma": "Cook", "Lucy": "Hill", "Mia": "Stone", "Rosa": "Wood"}
BOYS = {"Ben": "Bell", "Carl": "Fisher", "David": "King", "Jack": "Miller", "Sam": "Smith", "Tom": "Taylor"}
PEOPLE = GIRLS | BOYS
THINGS = "ball bell book box coin cup drum hat kite lamp ring spoon".split()
ADJECTIVES = "big black blue golden green new old red silver small".split()
PLACES = ("at the beach, at the farm, at the market, at the school, behind the church, by the lake, by the river, "
          "in the forest, in the garden, near the bridge, near the castle, on the hill").split(", ")
SPOTS = ("behind a tree, behind the clock, behind the door, in a basket, in a drawer, in a shoe, in the attic, "
         "in the cupboard, in the shed, under a bench, under a blanket, under the bed").split(", ")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
WORDS = {
    "a": [*PEOPLE], "b": [*PEOPLE], "x": THINGS, "y": THINGS, "p": PLACES, "q": PLACES, "s": SPOTS, "t": SPOTS,
    "day": DAYS, "other": DAYS, "parent": "mother father grandmother grandfather aunt uncle".split(),
    "animal": "cat crow dog duck fox frog goat hen lamb mouse owl pig pony rabbit".split(),
    "pet": "Bella Biscuit Button Captain Coco Luna Pepper Pip Rusty Smoky Star Teddy".split(),
    "food": "apples bread cake carrots cheese cherries honey nuts pancakes pears soup".split(),
}
SENTENCES = {
    "story": ["This is the story of {a.name} and {plot}"],
    "plot": ["{b.name}. {a} had {x.new}. {loved} {when} {a} could not find the {x}. {search} {ask} {answer} {thanks}",
             "{b.name}. {a} had {x.new}, and {b} had {y.new}. {when} they met {p}. {offer} {swap}",
             "{b.name}. {a} had {x.new} for {b}, because it was {b.his} birthday. {made} {hide} {seek} {glad}",
             "a little {animal}. {a} saw the {animal} {p}. {need} {keep} {pet_s}",
             "{b.name}. {a} and {b} wanted to go for a walk. {choose} {weather}",
             "{b.name}. {a} and {b} found an old chest {p}. It was locked. {open} {inside}"],
    "when": ["One morning", "One day", "One evening", "Last {day}", "Last summer", "Last year"],
    # {a} has lost {x}, and {b} helps
    "loved": ["The {x} was a present from {a.his} {parent}.", "{a.He} had bought the {x} {p}.",
              "{a.He} needed the {x} for school.", "{a.He} loved the {x}."],
    "search": ["{a.He} looked {s}, but it was not there.", "{a.He} looked {s} and {t}, but found nothing.",
               "First {a.he} looked {s}. Then {a.he} looked {t}. There was no {x}.",
               "The {x} was not {s}, and it was not {t}."],
    "ask": ['"Have you seen my {x}?" {a.he} asked {b}.', '"I have lost my {x}," {a.he} said to {b}.',
            'So {a.he} went to {b}. "Can you help me?" {a.he} asked.'],
    "answer": ['"I saw it {q}," said {b}. They ran to {q.the}, and there was the {x}!',
               '"I have it," said {b}. "I found it {q}." And {b.he} gave {a.him} the {x}.',
               '"Were you {q} on {other}?" asked {b}. They went to {q.the} and found the {x}.',
               '"No," said {b}, "but I will help you." They looked all day. At last {b} found it {q}.'],
    "thanks": ['"Thank you, {b}!" said {a}, and {a.he} gave {b.him} some {food}.', "{a} was happy and thanked {b}.",
               '"You are a good friend, {b}," said {a}.', "{a} never lost {a.his} {x.full} again."],
    # {a} has {x}, {b} has {y}
    "offer": ['"I like your {y}," said {a}. "{want}"', '"What a fine {y}!" said {a}. "{want}"',
              '"I do not like my {x} any more," said {a}. "{want}"', '"{want}" asked {a}.'],
    "want": ["Will you give me your {y} for my {x}?", "May I have your {y}?", "Shall we swap?"],
    "swap": ['"Yes," said {b}, and {b.he} took the {x}. That night {a} put the {y} {s}, and {b} put the {x} {t}.',
             '{b} nodded. So {a} went home with {y.new}, and {b} went home with {x.new}. {later}',
             '"No," said {b}. "My {parent} gave it to me." So {a} kept the {x}, and {b} kept the {y}. {still}',
             '{b} shook {b.his} head. That night {a} put the {x} {s}, and {b} put the {y} {t}.'],
    "later": ['"Where is your {x}?" asked {a}\'s {parent}. "{b} has it now," said {a}.', "Both of them were happy.",
              "On {other} {b} lost the {x}, but {a} still has the {y}."],
    "still": ["They were still good friends.", "Then they went to {q.the} and ate some {food}.",
              '"But I will show it to you," {b.he} said, and {b.he} gave {a.him} the {y} for a moment.'],
    # {a} has {x} for {b}
    "made": ["{a.He} had made the {x} with {a.his} {parent}.", "{a.He} had bought the {x} {p}.",
             "{a.He} had found the {x} {p}.", "The {x} had cost a lot of money."],
    "hide": ["{a} hid the {x} {s}.", "{a} put it {s}, so that {b} could not see it.",
             '{a} hid it {s}. "You must look for your present," {a.he} said.'],
    "seek": ["{b} looked {t}. Nothing! Then {b.he} looked {s} and found the {x}.",
             "{b} looked {s} at once. There it was!", '"Is it {t}?" asked {b}. "No," said {a}. "Is it {s}?" "Yes!"',
             "{b} looked all over the house. At last {b.he} looked {s} and saw {x.new}."],
    "glad": ['"I have always wanted {x.new}!" said {b}.', '"Thank you, {a}!" said {b}. "What a lovely {x}!"',
             "{b} loved the {x} and took it to {q.the} on {day}.", "Then {a} and {b} ate some {food} together."],
    # {a} finds {animal}
    "need": ["The {animal} was hungry, so {a.he} gave it some {food}. Soon the {animal} was not hungry any more.",
             'The {animal} looked hungry. "Would you like some {food}?" asked {a}. The {animal} ate all of it.',
             "The {animal} was cold, so {a.he} put {a.his} coat around it. Soon the {animal} was warm again.",
             "The {animal} was lost and afraid, but {a} spoke to it, and soon the {animal} was not afraid any more.",
             "Its leg was hurt, so {a} carried the {animal} to {b}. {b} knew what to do.",
             "The {animal} was stuck in the mud, so {a} pulled the {animal} out and washed it."],
    "keep": ['"May I keep it?" {a.he} asked {a.his} {parent}. "Yes," said {a.his} {parent}, "if you look after it."',
             "The {animal} followed {a.him} home and lay down {t}.", "{a} took it home and made a bed for it {t}."],
    "pet_s": ['"I will call you {pet}," said {a}. And {pet} the {animal} never left {a.him}.',
              "{a} called the {animal} {pet}, and {pet} and {a} became good friends.",
              '"Your name is {pet}," said {a}. Every {other} {a} and {pet} went to {q.the}.',
              '"Your name is {pet}," said {a}. But in autumn {pet} went back to {p.the}.'],
    # {a} and {b} go for a walk
    "choose": ['"Let us go to {p.the}," said {a}. "No, to {q.the}," said {b}. So they went to both.',
               '"Shall we go to {p.the} or to {q.the}?" asked {a}. "To {p.the}," said {b}, and so they did.',
               "{a} liked {p.the}, {b} liked {q.the}. They tossed a coin. {b} won, so they went to {q.the}."],
    "weather": ["The sun was shining. They sat down and ate some {food}. {found}",
                "It was a hot day, and they took off their shoes. {found}",
                "Soon it began to rain, and they had to wait under a tree. {wet}",
                "Suddenly there was thunder and heavy rain. {wet}"],
    "found": ['On the way home {b} found {x.new}. "May I have the {x}?" asked {a}. "No," said {b}, "I found it."',
              '"Look!" said {a}. "There is {x.new}!" {a} gave the {x} to {b}, who had never had one.',
              "They came home late, and {a}'s {parent} was angry with both of them."],
    "wet": ['"I am wet," said {a}. "So am I," said {b}. At home they sat by the fire and ate some {food}.',
            "They ran home, and {b}'s {parent} gave them dry clothes.", "{b} gave {a} {b.his} coat, so {b} was wet."],
    # {a} and {b} find a chest
    "open": ['"Where is the key?" asked {a}. {b} looked {s}. There was the key, and it opened the chest.',
             '"I know where the key is," said {b}. "It is {s}." {a} went to get it.',
             "They looked for the key {s} and {t}, but it was not there. So {b} broke the lock.",
             "{a} pulled and {b} pushed, and at last the chest opened."],
    "inside": ['Inside was {x.new}. "It is for both of us," said {a}. So {a} has the {x} on {day}, and {b} on {other}.',
               "In the chest were {x.new} and {y.new}. {a} took the {x}, and {b} took the {y}.",
               'Inside was {x.new}. "That is my {x}!" said {b}. "I lost it {q}." So {a} gave it to {b.him}.',
               "There was nothing inside but a letter from {a}'s {parent}."],
}


class Word(str):
    """A word of a story, with the forms that sentences ask for: {a.He} of a person, {x.new} of a thing."""
    adjective = ""
    he = property(lambda self: "she" if self in GIRLS else "he")
    He = property(lambda self: self.he.capitalize())
    him = property(lambda self: "her" if self in GIRLS else "him")
    his = property(lambda self: "her" if self in GIRLS else "his")
    name = property(lambda self: f"{self} {PEOPLE[self]}")                                  # Mia Stone
    full = property(lambda self: f"{self.adjective} {self}")                                # red kite
    new = property(lambda self: ("an " if self.full[0] in "aeiou" else "a ") + self.full)   # a red kite
    the = property(lambda self: self[self.index("the "):])                                  # by the river: the river


class Story(dict):
    """One story: its `text`, its `bits`, and the words that were chosen in it, which are all different."""
    def __init__(self, rng):
        self.rng, self.bits = rng, 0.0
        self.text = self["story"]

    def choose(self, options):
        self.bits += math.log2(len(options))
        return options[int(self.rng.random() * len(options))]       # the same in every version of Python

    def __missing__(self, name):
        if name in SENTENCES:
            return self.choose(SENTENCES[name]).format_map(self)
        word = self[name] = Word(self.choose([word for word in WORDS[name] if word not in self.values()]))
        if name in ("x", "y"):
            word.adjective = self.choose(ADJECTIVES)
        return word


def stories(count, seed=0):
    """A list of this many stories."""
    rng = random.Random(seed)
    return [Story(rng) for _ in range(count)]
