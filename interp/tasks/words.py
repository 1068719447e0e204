"""The word lists of the tasks.

Every word is one token with a leading space in GPT-2's vocabulary; a task checks them again against
the tokenizer of the model at hand. No word is part of another word of its list, so that looking a
word up in a text by substring cannot find a different one.
"""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class WordList:
    """Words a task draws from, and how many of them it cannot do without.

    Attributes:
        words: the words, without a leading space.
        needed: the task cannot be generated with fewer.
        capitals: the capitalised form must be one token too.
    """

    words: tuple[str, ...]
    needed: int
    capitals: bool = False

    def forms(self, word: str) -> tuple[str, ...]:
        """The strings of a word that must be one token each, with their leading space."""
        return (f" {word}", f" {word.capitalize()}") if self.capitals else (f" {word}",)


NAMES = _words(
    "Aaron Adam Alan Alice Amber Amy Andrew Angela Anthony Arthur Ashley Brandon Brian Bruce Carl Carol Charles Claire Craig Daniel "
    "David Dennis Diana Donald Douglas Dylan Edward Emily Emma Eric Erin Ethan Felix Fiona Frank Gary George Gordon Grace Hannah "
    "Harold Heather Helen Henry Holly Hugh Isaac Ivan Jack Jacob James Jane Jason Jessica Jill Joel Jordan Joseph Joshua Justin "
    "Karen Keith Kelly Kenneth Kevin Kyle Laura Lawrence Leon Linda Lisa Lucas Lucy Marcus Martin Mary Matthew Megan Michelle "
    "Monica Nancy Nathan Nicole Oliver Oscar Owen Patrick Peter Rachel Raymond Rebecca Robert Roger Russell Ruth Samuel Sarah Simon "
    "Thomas Walter"
)
"""100 first names."""

PLACES = _words("store garden station office kitchen museum library school")
THINGS = _words("ring drink bone letter coin map flower basket")

COLORS = _words("red orange yellow green blue purple brown black")
COLORED = _words("pencil notebook cup plate jug mug puzzle leash necklace bracelet bottle ball envelope lighter bowl candle scarf")
"""Small things that lie on a table."""

OBJECTS = _words(
    "apple bottle camera candle carpet chair clock drum engine folder glass guitar hammer ladder lamp mirror pencil phone plate rope "
    "shirt towel wallet watch bell bread brick brush bucket cable cake coin cross crown desk dress fan flag flower hat helmet jacket "
    "jewel key knife letter magazine map mask medal milk mug needle note picture pillow radio rose ruler sheet shell shoe soap spoon "
    "stamp stone suit sugar sword tape ticket train tree tube umbrella wheel whistle wire battery basket machine book television "
    "computer blanket"
)
"""85 nouns."""

LABELS = _words("A C D E F G H I J K L M N O P Q R S U V W X Y Z")
"""Box labels: B and T are left out, they occur in "Box" and "The"."""

CHORES = _words(
    "pencil folder battery book knife rope lamp clock shirt bottle towel chair phone camera mirror hammer basket brush candle glass "
    "plate watch wallet drum guitar carpet ladder bucket pillow jacket"
)
"""30 things one packs, finds or cleans."""

CITIES = _words("Paris London Berlin Rome Madrid Cairo Lima Tokyo Moscow Vienna Dublin Boston Chicago Denver Seattle Athens")
JOBS = _words("teacher baker farmer doctor nurse pilot sailor painter writer singer dancer lawyer judge driver soldier miner")
PETS = _words("dog cat rabbit turtle snake goat sheep duck horse pig monkey lion wolf fox bear lizard")

CANARY = tuple(dict.fromkeys((*OBJECTS, *JOBS, *PETS, *PLACES, *COLORS)))
"""Words of the random canaries."""
