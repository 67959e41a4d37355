"""Small sums: at once where a small network can, else worked out digit by digit in a thought."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from training.dialogue import Dialogue, assistant, reserved, system, user

WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
ASKS = (
    "{a} {op} {b}", "{a}{op}{b}", "{a} {op} {b} =", "{a}{op}{b}=?", "What is {a} {op} {b}?",
    "what is {a} {op} {b}", "What's {a} {op} {b}?", "Calculate {a} {op} {b}.", "{a} {word} {b}",
    "How much is {a} {op} {b}?", "what is {a} {word} {b}?", "How much is {a} {word} {b}?",
    "Compute {a} {op} {b}", "Please work out {a} {word} {b}.", "Can you tell me what {a} {op} {b} is?",
    "Solve {a} {op} {b}.", "I need {a} {op} {b}.", "{a} {word} {b}?", "how much is {a}{op}{b}",
)  # fmt: skip
STORIES = {
    "+": (
        "I have {a} apples and get {b} more. How many do I have?",
        "A train has {a} seats and a second one {b}. How many seats are there?",
        "Anna read {a} pages on Monday and {b} on Tuesday. How many pages in all?",
        "A shirt costs {a} euros and a hat {b}. What do both cost?",
        "There are {a} red and {b} blue marbles. How many marbles are there?",
    ),
    "-": (
        "I had {a} coins and spent {b}. How many are left?",
        "A book has {a} pages and I read {b}. How many pages are left?",
        "There were {a} birds and {b} flew away. How many stayed?",
        "Tom has {a} stickers and gives {b} away. How many has he now?",
        "A tank holds {a} litres and {b} are used. What remains?",
    ),
    "*": (
        "There are {a} boxes with {b} pens each. How many pens are there?",
        "A ticket costs {b} euros. What do {a} tickets cost?",
        "A week has {a} hours of class for {b} weeks. How many hours?",
        "{a} rows of {b} chairs: how many chairs?",
    ),
    "/": (
        "{a} sweets are shared by {b} children. How many does each get?",
        "{a} eggs go into boxes of {b}. How many boxes?",
        "A rope of {a} metres is cut into {b} equal parts. How long is one?",
    ),
}


def _result(a: int, op: str, b: int) -> str:
    if op == "/":
        whole, rest = divmod(a, b)
        return f"{whole}" if rest == 0 else f"{whole} remainder {rest}"
    return str({"+": a + b, "-": a - b, "*": a * b}[op])


def _work(a: int, op: str, b: int) -> str:
    """Steps that need one look each: a digit and a carry, or one row of a product."""
    if op == "+":
        return _add(a, b)
    if op == "-":
        return _subtract(a, b)
    if op == "*":
        return _multiply(a, b)
    whole, rest = divmod(a, b)
    return f"{b} * {whole} = {b * whole}. {a} - {b * whole} = {rest}."


def _add(a: int, b: int) -> str:
    steps, carry = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    for at in range(max(len(x), len(y))):
        p, q = (int(n[at]) if at < len(n) else 0 for n in (x, y))
        total = p + q + carry
        steps.append(f"{p} + {q} + {carry} = {total}: write {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*steps, f"So {a + b}."])


def _subtract(a: int, b: int) -> str:
    if a < b:
        return (
            f"{a} is less than {b}: the result is negative.\n"
            + _subtract(b, a)[:-1]
            + ", negative."
        )
    steps, borrow = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    for at in range(len(x)):
        p, q = int(x[at]), int(y[at]) if at < len(y) else 0
        left = p - q - borrow
        borrow, left = (1, left + 10) if left < 0 else (0, left)
        steps.append(f"{p} - {q}: write {left}, borrow {borrow}")
    return "\n".join([*steps, f"So {a - b}."])


def _multiply(a: int, b: int) -> str:
    parts = [int(digit) * 10**power for power, digit in enumerate(reversed(str(b)))]
    rows = [(part, a * part) for part in parts if part]
    steps = [f"{a} * {part} = {product}" for part, product in rows]
    total = 0
    for _, product in rows:
        if total:
            steps.append(f"{total} + {product} = {total + product}")
        total += product
    return "\n".join([*steps, f"So {a * b}."])


def _pair(random: Random, thinking: bool) -> tuple[int, str, int]:
    op = random.choice("++--**/")
    if op in "+-":
        top = 10 ** random.choice((1, 2, 2, 3, 4 if thinking else 3))
        return random.randrange(top), op, random.randrange(top)
    if op == "*":
        if thinking:
            return random.randrange(2, 1000), op, random.randrange(2, random.choice((13, 100)))
        wide = random.random() < 0.4
        return random.randrange(100 if wide else 13), op, random.randrange(10 if wide else 13)
    b = random.randrange(2, 13)
    whole = random.randrange(1, 40 if thinking else 13)
    return b * whole + (random.randrange(b) if random.random() < 0.3 else 0), op, b


def _sum(random: Random, held: bool) -> Dialogue:
    thinking = random.random() < 0.5
    while True:
        a, op, b = _pair(random, thinking)
        if reserved("sums", op, a, b) == held:
            break
    answer = f"{a} {op} {b} = {_result(a, op, b)}."
    if random.random() < 0.2 and (op != "-" or a >= b) and (op != "/" or a % b == 0):
        question = random.choice(STORIES[op]).format(a=a, b=b)
    else:
        shown = random.choice((op, op, {"*": "×", "/": ":"}.get(op, op)))
        question = random.choice(ASKS).format(a=a, b=b, op=shown, word=WORDS[op])
    return _made(random, question, answer, _work(a, op, b) if thinking else None)


def _list(random: Random, held: bool) -> Dialogue:
    """Largest, smallest, in order: of a few numbers."""
    while True:
        numbers = random.sample(
            range(1, random.choice((20, 100, 1000))), random.choice((2, 3, 4, 5))
        )
        if reserved("numbers", *sorted(numbers)) == held:
            break
    listed = ", ".join(map(str, numbers))
    kind = random.randrange(4)
    if kind == 0:
        question = random.choice(("Which is the largest: {}?", "largest of {}", "Maximum of {}?"))
        answer = f"The largest is {max(numbers)}."
    elif kind == 1:
        question = random.choice(("Which is the smallest: {}?", "smallest of {}", "Minimum of {}?"))
        answer = f"The smallest is {min(numbers)}."
    elif kind == 2:
        question = random.choice(("Sort {}.", "Put {} in order.", "sort these numbers: {}"))
        answer = f"In order: {', '.join(map(str, sorted(numbers)))}."
    else:
        question = random.choice(("What is half of {}?", "half of {}", "Double {}.", "Twice {}?"))
        number = 2 * numbers[0] if "half" in question.lower() else numbers[0]
        half = "half" in question.lower()
        answer = (
            f"Half of {number} is {number // 2}." if half else f"Twice {number} is {number * 2}."
        )
        listed = str(number)
    thoughts = f"The numbers are {listed}." if random.random() < 0.2 else None
    return _made(random, question.format(listed), answer, thoughts)


def _made(random: Random, question: str, answer: str, thoughts: str | None) -> Dialogue:
    texts = ("You are a helpful assistant.", "You are good at sums.", "Answer briefly.")
    before = [system(random.choice(texts))] if random.random() < 0.1 else []
    messages = [*before, user(question), assistant(answer, thoughts=thoughts)]
    return Dialogue("sums", messages, {"equals": answer}, thinking=thoughts is not None)


def train(random: Random) -> Iterator[Dialogue]:
    while True:
        yield (_list if random.random() < 0.12 else _sum)(random, False)


def held_out(random: Random) -> Iterator[Dialogue]:
    while True:
        yield (_list if random.random() < 0.12 else _sum)(random, True)
