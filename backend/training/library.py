"""Questions about Python's standard library, each fact answered in one wording only."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from training.dialogue import Dialogue, Message, assistant, reserved, system, user
from training.library_entries import (
    LONGEST_SIGNATURE,
    SENTENCE,
    TYPES,
    Entry,
    entries,
    head,
)
from training.library_words import (
    ARGUMENTS,
    COMMON,
    DESCRIBE,
    FITTING,
    FOLLOW,
    INVENTED,
    MODULE,
    OWN,
    PURPOSE,
    START,
    SYSTEMS,
    TAILS,
    VERBS,
    WHICH,
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its answer. `key` tells the fact and the wording, and so what is kept."""

    key: tuple[str, int | str]
    question: str
    answer: str
    thought: str
    needs: str = ""  # what the answer must contain; empty: it must be equal


class Library:
    """The generator: reads the documentation once, then asks about it for ever."""

    def __init__(self, folder: Path) -> None:
        known = entries(folder)
        self.names = {each.name for each in known}
        self.entries = [each for each in known if each.text]
        self.homes = sorted({e.module or "str" for e in known if e.kind != "module"}) + TYPES
        self.functions = sorted({last(e.name) for e in self.entries if e.kind == "function"})
        self.texts = Counter(SENTENCE.split(each.text)[0] for each in self.entries)
        self.weights = list(accumulate(map(weight, self.entries)))

    def train(self, random: Random) -> Iterator[Dialogue]:
        return self.dialogues(random, held_out=False)

    def held_out(self, random: Random) -> Iterator[Dialogue]:
        return self.dialogues(random, held_out=True)

    def dialogues(self, random: Random, *, held_out: bool) -> Iterator[Dialogue]:
        while True:
            turns = self.turns(random)
            # The last turn is the judged one; nothing kept from training may stand before it.
            kept = [reserved("library", *turn.key) for turn in turns]
            if kept[-1] == held_out and not any(kept[:-1]):
                yield dialogue(random, turns)

    def turns(self, random: Random) -> list[Turn]:
        chance = random.random()
        if chance < 0.1:
            return [self.unknown(random)]
        index = bisect(self.weights, random.random() * self.weights[-1])
        turns = [self.first(random, self.entries[index], random.random())]
        more = 0 if chance > 0.2 else 2 if chance < 0.12 else 1
        for _ in range(more if self.entries[index].kind != "module" else 0):
            index, turn = self.follow(random, index)
            if all(turn.answer != before.answer for before in turns):
                turns.append(turn)
        return turns

    def first(self, random: Random, entry: Entry, chance: float) -> Turn:
        if entry.kind == "module":
            return describe(random, entry, "purpose", PURPOSE)
        if chance < 0.14 and "(" in entry.signature and len(entry.signature) < LONGEST_SIGNATURE:
            return signature(random, entry, "arguments", ARGUMENTS)
        if 0.14 < chance < 0.26 and (entry.short or not entry.module):
            return home(random, entry, "module", MODULE)
        if 0.26 < chance < 0.4 and self.texts[SENTENCE.split(entry.text)[0]] == 1:
            return reverse(random, entry)
        return describe(random, entry, "describe", DESCRIBE)

    def follow(self, random: Random, index: int) -> tuple[int, Turn]:
        """A question that says "it", or names a neighbour, which is then what is spoken of."""
        entry, chance = self.entries[index], random.random()
        if chance < 0.35 and "(" in entry.signature and len(entry.signature) < LONGEST_SIGNATURE:
            return index, signature(random, entry, "then arguments", FOLLOW["arguments"])
        if chance < 0.6 and (entry.short or not entry.module):
            return index, home(random, entry, "then module", FOLLOW["module"])
        # The list is in the order of the names, so that neighbours belong together.
        index = (index + random.randint(1, 9)) % len(self.entries)
        other = self.entries[index]
        name = "the {x} module" if other.kind == "module" else "{x}"
        forms = [form.replace("{x}", name) for form in FOLLOW["other"]]
        return index, describe(random, other, "then other", forms)

    def unknown(self, random: Random) -> Turn:
        """A name that is not there: a made-up word, or a function in another's module."""
        made_up = random.random() < 0.6
        word = random.choice(INVENTED if made_up else self.functions)
        tail = random.choice(TAILS) if made_up and "_" not in word else ""
        name = f"{random.choice(self.homes)}.{word}{tail}"
        if name in self.names or word.startswith("__"):
            return self.unknown(random)
        index = random.randrange(len(DESCRIBE))
        answer = f"There is no `{name}` in the standard library that I know of."
        question = dress(random, DESCRIBE[index], shape(random, name, True))
        thought = f"The user asks about {name}. I know nothing of that name."
        return Turn(("unknown", word if made_up else name), question, answer, thought)


def weight(entry: Entry) -> float:
    if entry.name in OWN:
        return 12
    return 6 if COMMON.match(entry.name) else 0.3 if entry.kind == "constant" else 1


def last(name: str) -> str:
    return name.rpartition(".")[2]


def describe(random: Random, entry: Entry, ask: str, forms: list[str]) -> Turn:
    index, answer = random.randrange(len(forms)), f"`{head(entry)}` — {entry.text}"
    return Turn(
        (f"{entry.name} {ask}", index),
        dress(random, forms[index], refer(random, entry)),
        answer,
        thinking_of(entry),
    )


def signature(random: Random, entry: Entry, ask: str, forms: list[str]) -> Turn:
    index = random.randrange(len(forms))
    question = dress(random, forms[index], refer(random, entry))
    return Turn(
        (f"{entry.name} {ask}", index), question, f"`{entry.signature}`", thinking_of(entry)
    )


def home(random: Random, entry: Entry, ask: str, forms: list[str]) -> Turn:
    """Where it is, asked by a name that does not say so already."""
    short = entry.name.removeprefix(entry.module + ".")
    short = short if short in entry.short or not entry.short else entry.short[-1]
    index, called = random.randrange(len(forms)), "(" in entry.signature
    name = random.choice(entry.short or (entry.name,))
    question = dress(random, forms[index], shape(random, name, called))
    where = f"in the `{entry.module}` module" if entry.module else "built in: no import is needed"
    key, answer = (f"{entry.name} {ask}", index), f"`{short}` is {where}."
    return Turn(key, question, answer, thinking_of(entry), entry.module)


def reverse(random: Random, entry: Entry) -> Turn:
    kind, text = entry.kind, SENTENCE.split(entry.text)[0]
    verb, _, rest = text.rstrip(".").partition(" ")
    if verb in VERBS and len(text) < 120 and " and " not in text and random.random() < 0.7:
        forms, ask, text = WHICH, "which", f"{VERBS[verb].lower()} {rest}"
    else:
        forms, ask = FITTING, "fitting"
    index = random.randrange(len(forms))
    question = forms[index].format(kind=kind, text=text)
    thought = f"The description fits {entry.name}."
    return Turn(
        (f"{entry.name} {ask}", index), question, f"That is `{entry.name}`.", thought, entry.name
    )


def thinking_of(entry: Entry) -> str:
    article = "an" if entry.kind[0] in "aeiou" else "a"
    where = f"in {entry.module}" if entry.module else "built into Python"
    what = "It is a module" if entry.kind == "module" else f"It is {article} {entry.kind} {where}"
    return f"The user asks about {entry.name}. {what}."


def refer(random: Random, entry: Entry) -> str:
    short = bool(entry.short) and random.random() < 0.35
    return shape(
        random, random.choice(entry.short) if short else entry.name, "(" in entry.signature
    )


def shape(random: Random, name: str, call: bool) -> str:
    """With or without parentheses and backticks."""
    name = f"{name}()" if call and random.random() < 0.25 else name
    return f"`{name}`" if random.random() < 0.45 else name


def dress(random: Random, form: str, name: str) -> str:
    """The same question as hasty, polite and careful people write it."""
    chance = random.random()
    if chance < 0.12:
        form = form.rstrip("?.")
    elif chance < 0.2 and not form.startswith(("{x}", "help", "And", "OK", "Thanks", "What about")):
        form = random.choice(START) + form
    elif chance < 0.25 and form[-1] in "?.":
        form = form[:-1] + ", please" + form[-1]
    if random.random() < 0.15 and not form.startswith(("{x}", "I ", "I'")):
        form = form[0].lower() + form[1:]
    return form.replace("{x}", name)


def dialogue(random: Random, turns: list[Turn]) -> Dialogue:
    thinking = random.random() < 0.1
    messages: list[Message] = [system(random.choice(SYSTEMS))] if random.random() < 0.15 else []
    for turn in turns:
        final = turn is turns[-1]
        thought = turn.thought if thinking and final else None
        messages += [user(turn.question), assistant(turn.answer, thoughts=thought)]
    needs = turns[-1].needs
    check = {"contains": [needs]} if needs else {"equals": turns[-1].answer}
    return Dialogue("library", messages, check, thinking=thinking)
