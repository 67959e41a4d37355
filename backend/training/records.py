"""JSON for a schema: facts out of a text, or made up where the question asks to invent.

Fields are drawn from a pool and joined to schemas that are mostly met once; values are copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from flash_moe.chat.template import SCHEMA_PROMPT
from training import pools
from training.dialogue import Dialogue, Message, assistant, reserved, system, user

Json = Any


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    schema: dict[str, Any]
    draw: Callable[[Random, bool], Json]
    says: tuple[str, ...]  # parts of a sentence about somebody or something; {} is the value


def _text(make: Callable[[Random], str]) -> Callable[[Random, bool], Json]:
    return lambda random, held: pools.draw(make, random, held)


def _pick(values: list[str]) -> Callable[[Random, bool], Json]:
    return lambda random, held: random.choice(values)


def _number(low: int, high: int) -> Callable[[Random, bool], Json]:
    return lambda random, held: random.randint(low, high)


def _few(values: list[str]) -> Callable[[Random, bool], Json]:
    return lambda random, held: random.sample(values, random.choice((2, 2, 3)))


def _flag(random: Random, held: bool) -> Json:
    return random.random() < 0.5


TEXT, WHOLE, NUMBER, FLAG = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
STRINGS = {"type": "array", "items": {"type": "string"}}
HOBBIES = "chess tennis reading cooking hiking swimming painting dancing fishing sailing".split()
FIELDS = [
    Field("age", WHOLE, _number(1, 99), ("is {} years old", "is {}", "aged {}")),
    Field("city", TEXT, _text(pools.city), ("lives in {}", "is in {}", "comes from {}")),
    Field("town", TEXT, _text(pools.city), ("is from {}", "was seen in {}")),
    Field("country", TEXT, _pick(pools.COUNTRIES), ("was born in {}", "comes from {}")),
    Field("job", TEXT, _pick(pools.JOBS), ("works as a {}", "is a {} by trade")),
    Field("profession", TEXT, _pick(pools.JOBS), ("is a {}", "earns a living as a {}")),
    Field("email", TEXT, _text(pools.email), ("can be reached at {}", "has the address {}")),
    Field("color", TEXT, _pick(pools.COLOURS), ("likes {} best", "is {} in colour")),
    Field("colour", TEXT, _pick(pools.COLOURS), ("is painted {}", "has the colour {}")),
    Field("pet", TEXT, _pick(pools.ANIMALS), ("has a {}", "keeps a {}")),
    Field("food", TEXT, _pick(pools.FOODS), ("loves {}", "eats {} every day")),
    Field("price", NUMBER, lambda r, h: pools.price(r), ("costs {} euros", "is sold for {}")),
    Field("quantity", WHOLE, _number(1, 400), ("comes {} to a box", "is there {} times")),
    Field("count", WHOLE, _number(0, 900), ("was counted {} times", "has {} parts")),
    Field("year", WHOLE, _number(1850, 2035), ("dates from {}", "started in {}")),
    Field("weight", WHOLE, _number(1, 900), ("weighs {} kg", "has a weight of {} kg")),
    Field("height", WHOLE, _number(10, 300), ("is {} cm tall", "measures {} cm")),
    Field("score", WHOLE, _number(0, 100), ("scored {}", "got {} points")),
    Field("rating", WHOLE, _number(1, 5), ("is rated {} of 5", "has {} stars")),
    Field("date", TEXT, _text(pools.date), ("is due on {}", "was signed on {}")),
    Field("birthday", TEXT, _text(pools.date), ("was born on {}", "has a birthday on {}")),
    Field("time", TEXT, _text(pools.clock), ("starts at {}", "is open from {}")),
    Field("day", TEXT, _pick(pools.DAYS), ("comes on {}", "is free on {}")),
    Field("month", TEXT, _pick(pools.MONTHS), ("goes away in {}", "returns in {}")),
    Field("id", TEXT, _text(pools.code), ("has the id {}", "is number {}")),
    Field("code", TEXT, _text(pools.code), ("carries the code {}", "is filed under {}")),
    Field("file", TEXT, _text(pools.file_path), ("is stored in {}", "is kept in {}")),
    Field("owner", TEXT, _text(pools.full_name), ("belongs to {}", "is owned by {}")),
    Field("friend", TEXT, _text(pools.first), ("is a friend of {}", "often meets {}")),
    Field("nickname", TEXT, _text(pools.made_word), ("is called {}", "goes by {}")),
    Field("brand", TEXT, _text(lambda r: pools.made_word(r).title()), ("is made by {}",)),
    Field("languages", STRINGS, _few(pools.LANGUAGES), ("speaks {}", "understands {}")),
    Field("hobbies", STRINGS, _few(HOBBIES), ("enjoys {}", "likes {}")),
    Field("tools", STRINGS, _few(pools.THINGS), ("carries {}", "never goes without {}")),
    Field("ingredients", STRINGS, _few(pools.FOODS), ("is made of {}", "contains {}")),
    Field("married", FLAG, _flag, ("is married", "is not married")),
    Field("active", FLAG, _flag, ("is active", "is not active")),
    Field("vegetarian", FLAG, _flag, ("is a vegetarian", "is not a vegetarian")),
    Field("in_stock", FLAG, _flag, ("is in stock", "is not in stock")),
    Field("paid", FLAG, _flag, ("has been paid for", "has not been paid for")),
]
PREFIXES = ("", "", "", "", "main_", "first_", "home_", "user_", "current_", "default_")
SUBJECTS = ("name", "name", "name", "full_name", "title", "product", "person", "item")
MOODS = {
    "positive": ("I love it", "This is wonderful", "What a great day", "It works very well",
                 "The best I ever had", "We were very happy", "Excellent service"),
    "negative": ("I hate it", "This is terrible", "What an awful day", "It broke at once",
                 "The worst I ever had", "We were very disappointed", "Rude service"),
    "neutral": ("It arrived on Monday", "It is a table", "The box is closed",
                "It has four legs", "The shop opens at nine", "It was there"),
}  # fmt: skip


def _spoken(value: Json) -> str:
    if isinstance(value, list):
        return f"{', '.join(value[:-1])} and {value[-1]}"
    return str(value)


def _said(field: Field, value: Json, random: Random) -> str:
    if isinstance(value, bool):
        return field.says[0 if value else 1]
    return random.choice(field.says).format(_spoken(value))


def _fields(random: Random, held: bool, count: int) -> tuple[str, list[Field]]:
    """A subject's name and fields; a combination is either trained on or held out."""
    while True:
        subject = random.choice(SUBJECTS)
        fields = random.sample(FIELDS, count)
        prefix = random.choice(PREFIXES)
        if reserved("fields", *sorted(f.name for f in fields), share=0.1) == held:
            break
    named = [Field(prefix + f.name, f.schema, f.draw, f.says) for f in fields]
    return subject, named


def _schema(subject: str, fields: list[Field], random: Random) -> dict[str, Any]:
    properties: dict[str, Any] = {subject: {"type": "string"}}
    properties |= {f.name: dict(f.schema) for f in fields}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if random.random() < 0.7:
        schema["required"] = list(properties)
    if random.random() < 0.15:
        schema["additionalProperties"] = False
    if random.random() < 0.15:
        for name, prop in properties.items():
            prop["description"] = f"The {name.replace('_', ' ')}"
    return schema


def _who(subject: str, random: Random, held: bool) -> str:
    if subject in ("product", "item", "title"):
        made = random.choice(("", f"{random.choice(pools.COLOURS)} ")) + random.choice(pools.THINGS)
        return f"{pools.draw(pools.made_word, random, held).title()} {made}"
    return pools.draw(pools.full_name, random, held)


def _facts(
    subject: str, fields: list[Field], random: Random, held: bool
) -> tuple[dict[str, Json], str]:
    who = _who(subject, random, held)
    value = {subject: who} | {f.name: f.draw(random, held) for f in fields}
    parts = [_said(f, value[f.name], random) for f in fields]
    random.shuffle(parts)
    return value, _sentences(who, parts, random)


def _sentences(who: str, parts: list[str], random: Random) -> str:
    text, said = "", random.choice((who, f"{who}"))
    while parts:
        take = min(len(parts), random.choice((1, 2, 2, 3)))
        now, parts = parts[:take], parts[take:]
        joined = now[0] if take == 1 else f"{', '.join(now[:-1])} and {now[-1]}"
        text += f"{' ' if text else ''}{said} {joined}."
        said = random.choice((who, "It also", "Also,") if " " in who else (who,))
        said = who if said in ("It also", "Also,") else said
    return text


def _ask(text: str, schema: dict[str, Any], random: Random, system_text: str = "") -> list[Message]:
    """The schema in the system message as the engine puts it, or in the question's own words."""
    compact = json.dumps(schema)
    way = random.random()
    if way < 0.6:
        begin = system_text or random.choice(("", "", "", "You are a helpful assistant."))
        whole = SCHEMA_PROMPT.format(compact)
        return [system(f"{begin}\n\n{whole}" if begin else whole), user(text)]
    if way < 0.8:
        words = random.choice(("Answer in JSON with this schema: {}", "As JSON: {}",
                               "Use this JSON schema: {}", "Reply with JSON like this schema: {}",
                               "Give me JSON for the schema {}"))  # fmt: skip
        both = [text, words.format(compact)]
        if random.random() < 0.4:
            both.reverse()
        return [user("\n".join(both))]
    names = list(schema["properties"])
    words = random.choice(("as JSON with the keys {}", "JSON please, keys: {}",
                           "Write this as JSON with {}", "Extract {} as JSON"))  # fmt: skip
    return [user(f"{text}\n{words.format(_spoken(names) if len(names) > 1 else names[0])}")]


def _noted(value: Json) -> str:
    """A value as a thought puts it down."""
    words = isinstance(value, list) and value and isinstance(value[0], str)
    return _spoken(value) if words else json.dumps(value)


def _dialogue(
    messages: list[Message], value: Json, schema: dict[str, Any], random: Random, free: bool = False
) -> Dialogue:
    thinking = random.random() < 0.12
    found = value if isinstance(value, dict) else {}
    listed = ", ".join(f"{name}: {_noted(part)}" for name, part in found.items())
    thoughts = f"I have to fill in {listed}." if thinking else None
    reply = assistant(json.dumps(value, ensure_ascii=False), thoughts=thoughts)
    check = {"schema": schema} if free else {"json": value, "schema": schema}
    return Dialogue("json", [*messages, reply], check, thinking=thinking)


def _one(random: Random, held: bool) -> Dialogue:
    subject, fields = _fields(random, held, random.choice((1, 2, 2, 3, 3, 4, 5)))
    schema = _schema(subject, fields, random)
    value, text = _facts(subject, fields, random, held)
    if random.random() < 0.2 and "required" in schema:
        # Something the text does not say.
        extra = random.choice([f for f in FIELDS if f.schema is TEXT and f.name not in value])
        schema["properties"][extra.name] = {"type": ["string", "null"]}
        schema["required"] = list(schema["properties"])
        value[extra.name] = None
    return _dialogue(_ask(text, schema, random), value, schema, random)


def _many(random: Random, held: bool) -> Dialogue:
    subject, fields = _fields(random, held, random.choice((1, 2, 2)))
    inner = _schema(subject, fields, random)
    facts = [_facts(subject, fields, random, held) for _ in range(random.choice((2, 2, 3)))]
    name = random.choice(("items", "items", "items", "people", "entries", "results"))
    schema = {
        "type": "object",
        "properties": {name: {"type": "array", "items": inner}},
        "required": [name],
    }
    value = {name: [value for value, _ in facts]}
    text = " ".join(text for _, text in facts)
    return _dialogue(_ask(text, schema, random), value, schema, random)


def _nested(random: Random, held: bool) -> Dialogue:
    subject, fields = _fields(random, held, random.choice((2, 3, 4)))
    schema = _schema(subject, fields, random)
    value, text = _facts(subject, fields, random, held)
    outer = random.choice(("person", "record", "entry", "product", "data"))
    schema = {"type": "object", "properties": {outer: schema}, "required": [outer]}
    return _dialogue(_ask(text, schema, random), {outer: value}, schema, random)


def _mood(random: Random, held: bool) -> Dialogue:
    """Putting a text into one of the classes that the schema lists."""
    mood = random.choice(list(MOODS))
    text = random.choice(MOODS[mood])
    key = random.choice(("sentiment", "mood", "label", "feeling"))
    about = f" {pools.draw(pools.made_word, random, held).title()}" if random.random() < 0.5 else ""
    text = f"{text}{random.choice(('.', '!', ''))}{' It was at' + about + '.' if about else ''}"
    prop = {"type": "string", "enum": random.sample(list(MOODS), 3)}
    schema = {"type": "object", "properties": {key: prop}, "required": [key]}
    return _dialogue(_ask(text, schema, random), {key: mood}, schema, random)


def _invent(random: Random, held: bool) -> Dialogue:
    """As llm's own documentation asks: a dog, with a name, an age and a short bio."""
    thing = random.choice(pools.ANIMALS + pools.JOBS + ["person", "city", "book", "country"])
    fields = random.sample(FIELDS, random.choice((1, 1, 2)))
    schema = _schema("name", fields, random)
    name = pools.draw(pools.first, random, held)
    value = {"name": name} | {f.name: f.draw(random, held) for f in fields}
    if random.random() < 0.6:
        bio = random.choice(("short_bio", "bio", "description", "one_sentence_bio"))
        schema["properties"][bio] = {"type": "string"}
        if "required" in schema:
            schema["required"].append(bio)
        likes = random.choice(pools.FOODS + pools.THINGS)
        place = random.choice(pools.CITIES)
        value[bio] = random.choice(
            (f"{name} is a {thing} from {place} and likes {likes}.",
             f"A {random.choice(('friendly', 'clever', 'quiet', 'brave'))} {thing} from {place}.",
             f"{name} lives in {place} and dreams of {likes}.")
        )  # fmt: skip
    verb = random.choice(("Invent a {}", "invent a cool {}", "Make up a {}", "Create a {}",
                          "Describe a {}", "Think of a nice {}"))  # fmt: skip
    text, schema_out, out = verb.format(thing), schema, value
    if random.random() < 0.3:
        text = f"{random.choice(('Invent', 'Make up', 'invent'))} two {thing}s"
        second = dict(value) | {"name": pools.draw(pools.first, random, held)}
        schema_out = {
            "type": "object",
            "properties": {"items": {"type": "array", "items": schema}},
            "required": ["items"],
        }
        out = {"items": [value, second]}
    return _dialogue(_ask(text, schema_out, random), out, schema_out, random, free=True)


MAKERS = (_one, _one, _one, _one, _one, _many, _nested, _mood, _invent, _invent)


def train(random: Random) -> Iterator[Dialogue]:
    while True:
        yield random.choice(MAKERS)(random, False)


def held_out(random: Random) -> Iterator[Dialogue]:
    while True:
        yield random.choice(MAKERS)(random, True)
