"""Words that needles are named after, and which pairs of them are kept for evaluation.

All are common words, one token each even in a vocabulary of 8,192: what a small model has to learn is to look pairs of
words up, not to spell rare ones.
"""

from __future__ import annotations

import zlib

_ADJECTIVES = """
    ancient bitter bold brave brief bright broken brown busy calm careful clean clever cold common cruel curious dark
    deep distant double early eager empty fair famous fancy fierce final foreign gentle golden grand grave green grey
    happy heavy hidden honest humble hungry idle iron kind large late little lively lonely loose loud loyal merry
    mighty modest narrow native noble odd old open pale patient plain pleasant poor private proud public pure quick
    quiet rapid rare red rich rough round royal sacred sad secret serious sharp silent silver simple slow small smooth
    soft solemn steady stern stiff strange strict strong sudden sweet swift tall tender thick thin tired upper usual
    warm weary white wicked wide wild wise wooden yellow young
"""

_NOUNS = """
    account anchor battle bear bell bird boat bottle bridge brother cabin captain carriage castle church clerk clock
    cloud coach coat corner council cousin crown curtain desert doctor door duke feather fellow field flag flower
    forest fortune friend garden gate general governor guard hat hill horse house island judge king kitchen knight
    lady lamp letter lion lord master merchant moon mountain nephew nurse oak ocean officer organ palace paper picture
    pocket poet prince prison queen river rose school season servant shadow ship shop sister soldier song spring stone
    storm stranger stream street sword table teacher tower treasure tree uncle valley vessel village visitor voyage
    watch well widow window winter witness wood writer
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())

#: One word pair in this many is never a key in training.
TEST_SHARE = 8


def is_test_key(words: tuple[str, ...]) -> bool:
    """Whether a tuple of words may be a key only in evaluation (a fixed hash, so every process agrees)."""
    return zlib.crc32(" ".join(words).encode()) % TEST_SHARE == 0
