"""Metrics of single benchmarks, with their quirks: what their published numbers were computed by."""

from __future__ import annotations

import contextlib
import math
import re
import string
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_HEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = tuple(
    map(
        re.compile,
        (
            r"-?\b\d{1,3}(?:,\d{3})+\b",
            r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
            r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
        ),
    )
)
"""With commas, in scientific notation, plain."""
_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
_DOT = re.compile(r"\.(?!\d)")
_MOST_DOTS = 32
ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
"""Number words that VQA's evaluation takes for digits."""
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


def check_answers(answers: Sequence[str]) -> None:
    """Refuse accepted answers that are none, or a string in place of a list."""
    if isinstance(answers, str):  # A sequence too: its letters would be taken for answers.
        raise TypeError(f"answers must be a sequence of strings, got the string {answers!r}")
    if not answers:
        raise ValueError("no answers to score against")


def vqav2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score min(1, matches / 3) among the other answers, averaged over leaving out each answer once.

    Source: VQA (arXiv 1505.00468) as lmms-eval computes it for VQAv2: the prediction is normalised as EvalAI
    does (punctuation, number words, articles, contractions), the answers only where they are not all the
    same. Of fewer than four answers no prediction scores 1.

    >>> [round(vqav2_accuracy("Two.", ["2"] * n + ["3"] * (10 - n)), 6) for n in range(5)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    check_answers(answers)
    predicted = _normalize(_tokenize(prediction))
    expected = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(expected)) > 1:
        expected = [_normalize(answer) for answer in expected]
        predicted = _normalize(predicted)
    matches = [answer == predicted for answer in expected]
    return math.fsum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def gqa_accuracy(prediction: str, answer: str) -> float:
    """Score 1.0 if the texts are equal, ignoring case, ASCII punctuation and outer whitespace.

    Source: GQA (arXiv 1902.09506), as lmms-eval computes it.

    >>> gqa_accuracy("T-shirt.", "tshirt"), gqa_accuracy("the left", "left")
    (1.0, 0.0)
    """
    found, expected = (text.strip().lower().translate(_NO_PUNCTUATION) for text in (prediction, answer))
    return float(found == expected)


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
    words = (DIGITS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Drop a mark that has a space beside it anywhere, make a space of any other; all go beside 1,000."""
    found = text
    drops_all = _BETWEEN_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        drops = drops_all or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if drops else " ")
    return _DOT.sub("", found, count=_MOST_DOTS)


def ocrbench_accuracy(prediction: str, answer: str) -> float:
    """Score 1.0 if the answer stands in the prediction, ignoring case and the width of characters.

    Source: OCRBench (arXiv 2305.07895), as lmms-eval computes it.

    >>> ocrbench_accuracy("It says ＣＥＮＴＲＥ.", "centre"), ocrbench_accuracy("center", "centre")
    (1.0, 0.0)
    """
    found, expected = (
        text.lower().strip().replace("\n", " ").translate(_NARROW) for text in (prediction, answer)
    )
    return float(expected in found)


def ocrbench_formula(prediction: str, answer: str) -> float:
    """Score 1.0 if a formula stands in the prediction, ignoring spaces and line breaks but not case.

    Source: OCRBench, its rows of HME100k, as lmms-eval computes it.

    >>> ocrbench_formula("x ^ { 2 } + Y", "x^{2}"), ocrbench_formula("X^{2}", "x^{2}")
    (1.0, 0.0)
    """
    found, expected = (text.strip().replace("\n", " ").replace(" ", "") for text in (prediction, answer))
    return float(expected in found)


def mmmu_choice(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score 1.0 if a prediction picks the letter of the answer.

    Source: MMMU (arXiv 2311.16502), its official parser: letters in brackets, else before a space, else
    before a dot, else, in more than five words, the texts of choices; of several the last one.

    Deviation: where nothing is picked the official one draws a letter; here that is wrong.

    Args:
        prediction: What the model said.
        answers: Letters that are accepted.
        choices: Texts of the choices; without them all letters may be picked.

    >>> [mmmu_choice(text, ["B"], ["red", "blue"]) for text in ("B", "(B) blue", "A or B", "b", "red")]
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    check_answers(answers)
    return float(_pick(prediction, choices) in answers)


def mmmu_open(prediction: str, answer: str) -> float:
    """Score 1.0 if an open question's answer is found in a prediction.

    Source: MMMU, its official parser: what stands behind words such as "is" and "answer" in each sentence,
    numbers to two decimals, other texts where they occur.

    >>> mmmu_open("So the result is 3.14159", "3.14"), mmmu_open("a chain of events", "chain")
    (1.0, 1.0)
    """
    expected = _readings(answer)
    for found in {reading for text in _parse_open(prediction) for reading in _readings(text)}:
        if isinstance(found, float) and found in expected:
            return 1.0
        if isinstance(found, str) and any(isinstance(each, str) and each in found for each in expected):
            return 1.0
    return 0.0


def _pick(prediction: str, choices: Sequence[str]) -> str | None:
    letters = string.ascii_uppercase[: len(choices) or None]
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: (text.rfind(place.format(letter)), -ord(letter)))
    if len(text.split()) <= 5:
        return None
    places = {
        letter: text.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=False)
    }
    last = max(places.values(), default=-1)
    return next((letter for letter, at in places.items() if at == last), None) if last >= 0 else None


def _parse_open(prediction: str) -> list[str]:
    """Return the ends of sentences that an answer may be in, and the numbers in them."""
    text = prediction.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    ends: list[str] = []
    for at, sentence in enumerate(sentences):
        heads = _HEADS if at < len(sentences) - 1 else (*_HEADS, "=")
        tails = [sentence.split(head)[-1].strip() for head in heads if head in sentence]
        shortest = min(filter(None, tails), key=len, default="")
        if shortest and shortest not in ":,.!?;'":
            ends.append(shortest)
    ends = ends or [text]
    return [*ends, *(number for end in ends for pattern in _NUMBER_FORMS for number in pattern.findall(end))]


def _readings(text: str) -> list[str | float]:
    """Return what a text is compared as: a number, or itself; a single letter only beside a space."""
    text = text.strip()
    with contextlib.suppress(ValueError):
        return [round(float(text.replace(",", "")), 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
