"""From one unit to another, with factors that are exact, and answers of few digits."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from random import Random

from training.dialogue import Dialogue, assistant, reserved, system, user

# Names in the plural, and how many of the smallest unit one is.
SCALES: tuple[dict[str, int], ...] = (
    {"millimetres": 1, "centimetres": 10, "metres": 1000, "kilometres": 1_000_000},
    {"inches": 1, "feet": 12, "yards": 36},
    {"milligrams": 1, "grams": 1000, "kilograms": 1_000_000, "tonnes": 1_000_000_000},
    {"ounces": 1, "pounds": 16},
    {"millilitres": 1, "centilitres": 10, "litres": 1000},
    {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800},
    {"months": 1, "years": 12, "decades": 120, "centuries": 1200},
    {"bytes": 1, "kilobytes": 1000, "megabytes": 10**6, "gigabytes": 10**9, "terabytes": 10**12},
    {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3},
    {"bits": 1, "bytes": 8},
    {"cents": 1, "euros": 100},
    {"pieces": 1, "dozen": 12},
)
ONE = {"feet": "foot", "inches": "inch", "centuries": "century", "KiB": "KiB", "MiB": "MiB",
       "GiB": "GiB", "dozen": "dozen"}  # fmt: skip
CELSIUS = ("degrees Celsius", "degrees Celsius", "Celsius", "°C", "C")
FAHRENHEIT = ("degrees Fahrenheit", "degrees Fahrenheit", "Fahrenheit", "°F", "F")
SHORT = {"millimetres": "mm", "centimetres": "cm", "metres": "m", "kilometres": "km", "grams": "g",
         "kilograms": "kg", "milligrams": "mg", "litres": "l", "millilitres": "ml", "seconds": "s",
         "minutes": "min", "hours": "h", "pounds": "lb", "megabytes": "MB", "gigabytes": "GB",
         "kilobytes": "kB", "terabytes": "TB"}  # fmt: skip
# Between the two systems, with factors as people know them: what comes of them is rounded.
ACROSS = (
    ("miles", "kilometres", "1.61"), ("kilometres", "miles", "0.62"),
    ("inches", "centimetres", "2.54"), ("centimetres", "inches", "0.39"),
    ("feet", "metres", "0.3"), ("metres", "feet", "3.28"),
    ("pounds", "kilograms", "0.45"), ("kilograms", "pounds", "2.2"),
    ("ounces", "grams", "28.3"), ("gallons", "litres", "3.79"), ("litres", "gallons", "0.26"),
)  # fmt: skip
ASKS = (
    "How many {to} are in {n} {of}?", "how many {to} are {n} {of}?", "Convert {n} {of} to {to}.",
    "{n} {of} in {to}", "{n} {of} in {to}?", "What is {n} {of} in {to}?", "How many {to} is {n} {of}?",
    "{n} {of} to {to}", "Please convert {n} {of} into {to}.", "Express {n} {of} in {to}.",
    "How many {to} do {n} {of} have?", "I have {n} {of}. How many {to} is that?",
)  # fmt: skip


def name(unit: str, number: Fraction | int) -> str:
    if number != 1:
        return unit
    return ONE.get(unit) or unit.removesuffix("s")


def written(number: Fraction) -> str | None:
    """As a decimal of few digits, if it is one."""
    if number.denominator == 1:
        return str(number.numerator) if number < 10**10 else None
    for digits in (1, 2, 3):
        if 10**digits % number.denominator == 0:
            return f"{float(number):.{digits}f}"
    return None


def _short(number: Fraction) -> str:
    return f"{float(round(number, 1)):g}"


def _scaled(random: Random, held: bool) -> Dialogue:
    while True:
        scale = random.choice(SCALES)
        of, to = random.sample(list(scale), 2)
        number = Fraction(_number(random))
        factor = Fraction(scale[of], scale[to])
        got = written(number * factor)
        if got is not None and reserved("units", number, of, to) == held:
            break
    answer = f"{number} {name(of, number)} = {got} {name(to, number * factor)}."
    if factor >= 1:
        work = f"1 {name(of, 1)} = {factor} {name(to, factor)}. {number} * {factor} = {got}."
    else:
        back = 1 / factor
        work = f"1 {name(to, 1)} = {written(back) or back} {of}. {number} / {back} = {got}."
    short = random.random() < 0.2
    shown = {"of": SHORT.get(of, name(of, number)) if short else name(of, number),
             "to": SHORT.get(to, to) if short else to}  # fmt: skip
    return _made(random, random.choice(ASKS).format(n=number, **shown), answer, work)


def _number(random: Random) -> int:
    most, step = random.choice(((10, 1), (20, 1), (100, 1), (100, 1), (50, 100), (12, 12)))
    return step * random.randint(1, most)


def _across(random: Random, held: bool) -> Dialogue:
    while True:
        of, to, factor = random.choice(ACROSS)
        number = random.randint(1, random.choice((10, 50, 100)))
        if reserved("across", number, of, to) == held:
            break
    got = f"{float(round(number * Fraction(factor), 2)):g}"
    answer = f"{number} {name(of, number)} ≈ {got} {to}."
    work = f"1 {name(of, 1)} ≈ {factor} {to}. {number} * {factor} = {got}."
    short = random.random() < 0.2
    shown = {"of": SHORT.get(of, name(of, number)) if short else name(of, number),
             "to": SHORT.get(to, to) if short else to}  # fmt: skip
    question = random.choice(ASKS).format(n=number, **shown)
    if random.random() < 0.2:
        question = question.replace("metres", "meters").replace("litres", "liters")
    return _made(random, question, answer, work)


def _degrees(random: Random, held: bool) -> Dialogue:
    while True:
        degrees, up = random.randint(-40, random.choice((40, 120, 300))), random.random() < 0.5
        if reserved("degrees", degrees, up) == held:
            break
    if up:
        scaled, got = Fraction(degrees * 9, 5), Fraction(degrees * 9, 5) + 32
        ask, unit = f"{degrees} {random.choice(CELSIUS)}", "F"
        work = f"{degrees} * 9 / 5 = {_short(scaled)}. {_short(scaled)} + 32 = {_short(got)}."
    else:
        got = Fraction((degrees - 32) * 5, 9)
        ask, unit = f"{degrees} {random.choice(FAHRENHEIT)}", "C"
        work = f"{degrees} - 32 = {degrees - 32}. {degrees - 32} * 5 / 9 = {_short(got)}."
    to = random.choice(FAHRENHEIT if up else CELSIUS).removeprefix("degrees ")
    answer = f"{degrees} °{'C' if up else 'F'} = {_short(got)} °{unit}."
    frames = ("What is {} in {}?", "Convert {} to {}.", "{} in {}", "How much is {} in {}?",
              "{} to {}", "what is {} in {}")  # fmt: skip
    return _made(random, random.choice(frames).format(ask, to), answer, work)


def _made(random: Random, question: str, answer: str, work: str) -> Dialogue:
    thoughts = work if random.random() < 0.4 else None
    before = [system("You are a helpful assistant.")] if random.random() < 0.08 else []
    messages = [*before, user(question), assistant(answer, thoughts=thoughts)]
    return Dialogue("units", messages, {"equals": answer}, thinking=thoughts is not None)


MAKERS = (_scaled, _scaled, _scaled, _scaled, _across, _across, _degrees)


def train(random: Random) -> Iterator[Dialogue]:
    while True:
        yield random.choice(MAKERS)(random, False)


def held_out(random: Random) -> Iterator[Dialogue]:
    while True:
        yield random.choice(MAKERS)(random, True)
