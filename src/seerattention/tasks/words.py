"""Words that needles are named after, and which pairs of them are kept for evaluation."""

from __future__ import annotations

import zlib

ADJECTIVES = tuple(
    """amber ancient bitter bold brave brief bright broken brown busy calm careful clean clever cloudy cold common copper
    crooked cruel curious damp dark deep distant double dusty early eager eastern elegant empty fair faded famous fancy
    fierce final foreign formal frozen gentle giant golden grand grave green grey happy hasty heavy hidden hollow honest
    humble hungry idle inner iron ivory jolly kind large late lazy little lively lonely loose loud loyal lucky merry
    mighty modest narrow native naval noble northern odd old open outer pale patient plain pleasant polite poor private
    proud public pure purple quick quiet rapid rare raw red rich rough round royal rural rusty sacred sad scarlet secret
    serious sharp shy silent silver simple sleepy slow small smooth soft solemn solid southern steady steep stern stiff
    stony strange strict strong sudden sunny sweet swift tall tame tender thick thin tiny tired tough upper usual vacant
    violet warm weary western white wicked wide wild wise wooden yellow young""".split()
)

NOUNS = tuple(
    """account admiral anchor apple archer arrow artist badger banker barrel basket battle bear beggar bell bench bird
    bishop blanket boat bottle bridge brother bucket butcher cabin candle captain carpet carriage castle cattle cellar
    chapel chimney church clerk clock cloud coach coat colonel corner cottage council cousin cradle crown curtain dancer
    desert diamond doctor donkey door dragon driver duke eagle engine falcon farmer feather fellow ferry field flag flower
    forest fortune fountain fox friend garden garment gate general giant glove goat governor guard hammer harbor hat hawk
    helmet hill horse hospital hotel house hunter insect island jewel journal judge kettle king kitchen knight ladder lady
    lamb lamp lantern lawyer letter library lion lord major manor market mason master meadow merchant miller mirror monk
    moon mountain mouse museum needle nephew nurse oak ocean officer orchard organ owl painter palace paper parrot parson
    pasture peasant pencil picture pigeon pilgrim pilot pirate planet pocket poet pond porter prince prison prophet queen
    rabbit railway raven ribbon river robber robin rose sailor scholar school sculptor season senator sergeant servant
    shadow shepherd shield ship shop sister soldier song spider spring squire stable statue stone storm stranger stream
    street student surgeon sword table tailor teacher temple theatre tiger tower traveler treasure tree trumpet tunnel
    turtle uncle valley vessel village violin visitor voyage wagon waiter warrior watch well whale widow window winter
    witch witness wolf wood writer yacht""".split()
)

#: One word pair in this many is never a key in training.
TEST_SHARE = 8


def is_test_key(words: tuple[str, ...]) -> bool:
    """Whether a tuple of words may be a key only in evaluation (a fixed hash, so every process agrees)."""
    return zlib.crc32(" ".join(words).encode()) % TEST_SHARE == 0
