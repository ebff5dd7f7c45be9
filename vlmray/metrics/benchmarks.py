"""Metrics of single benchmarks, with their quirks: what their published numbers were computed by."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
_DOT = re.compile(r"\.(?!\d)")
_MOST_DOTS = 32
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_REPAIRS = """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've
couldnt've>couldn't've didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've
hadn'tve>hadn't've hasnt>hasn't havent>haven't hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd
howll>how'll hows>how's isnt>isn't itd>it'd itd've>it'd've it'dve>it'd've itll>it'll maam>ma'am
mightnt>mightn't mightnt've>mightn't've mightn'tve>mightn't've mightve>might've mustnt>mustn't
mustve>must've neednt>needn't notve>not've oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at
'ows'at>'ow's'at 'ow'sat>'ow's'at shant>shan't shed've>she'd've she'dve>she'd've shouldve>should've
shouldnt>shouldn't shouldnt've>shouldn't've shouldn'tve>shouldn't've somebody'd>somebodyd
somebodyd've>somebody'd've somebody'dve>somebody'd've somebodyll>somebody'll somebodys>somebody's
someoned>someone'd someoned've>someone'd've someone'dve>someone'd've someonell>someone'll
someones>someone's somethingd>something'd somethingd've>something'd've something'dve>something'd've
somethingll>something'll thats>that's thered>there'd thered've>there'd've there'dve>there'd've
therere>there're theres>there's theyd>they'd theyd've>they'd've they'dve>they'd've theyll>they'll
theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've weve>we've
werent>weren't whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd
wheres>where's whereve>where've whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's
whove>who've whyll>why'll whyre>why're whys>why's wont>won't wouldve>would've wouldnt>wouldn't
wouldnt've>wouldn't've wouldn'tve>wouldn't've yall>y'all yall'll>y'all'll y'allll>y'all'll
yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've youd>you'd youd've>you'd've
you'dve>you'd've youll>you'll youre>you're youve>you've
"""
_CONTRACTIONS = dict(pair.split(">") for pair in _REPAIRS.split())
"""Spellings that VQA's evaluation repairs; those it lists with a capital never meet a lower-cased word."""


def vqav2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score min(1, matches / 3) among the other answers, averaged over leaving out each answer once.

    Source: VQA (arXiv 1505.00468) as lmms-eval computes it for VQAv2: the prediction is normalised as EvalAI
    does (punctuation, number words, articles, contractions), the answers only where they are not all the
    same. Of fewer than four answers no prediction scores 1.

    >>> [round(vqav2_accuracy("Two.", ["2"] * n + ["3"] * (10 - n)), 6) for n in range(5)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    if isinstance(answers, str):  # a sequence too: its letters would be taken for answers
        raise TypeError(f"answers must be a sequence of strings, got the string {answers!r}")
    if not answers:
        raise ValueError("no answers to score against")
    predicted = _normalize(_tokenize(prediction))
    expected = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(expected)) > 1:
        expected = [_normalize(answer) for answer in expected]
        predicted = _normalize(predicted)
    matches = [answer == predicted for answer in expected]
    return math.fsum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def mmstar_accuracy(prediction: str, answer: str) -> float:
    """Score 1.0 if a prediction begins with the letter of the answer.

    Source: MMStar (arXiv 2403.20330), as lmms-eval computes it: the letter is the first character, or stands
    behind "(", "option " or "the answer is ", ignoring case; whatever follows it, so "Blue" is B.

    >>> [mmstar_accuracy(text, "B") for text in ("b", "(B) blue", "The answer is B", "Blue", "It is B", "")]
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    text, letter = (value.lower().strip().replace("\n", " ") for value in (prediction, answer))
    starts = ("", "(", "option ", "the answer is ")
    return float(
        any(text[len(start) : len(start) + 1] == letter for start in starts if text.startswith(start))
    )


def _tokenize(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalize(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Drop a mark that has a space beside it anywhere, make a space of any other; all go beside 1,000."""
    found = text
    drops_all = _BETWEEN_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        drops = drops_all or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if drops else " ")
    return _DOT.sub("", found, count=_MOST_DOTS)
