"""Calling tools: the right one, with arguments copied from the question, and saying what it gave.

Tools are a verb and a noun with parameters from a pool, so that most of them are met once; beside
them stand the small Python functions that `llm`'s own documentation shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from training import pools
from training.dialogue import Dialogue, Message, assistant, call, reserved, system, user

Json = Any


@dataclass(frozen=True, slots=True)
class Param:
    name: str
    schema: dict[str, Any]
    draw: Callable[[Random, bool], Json]
    about: str
    phrases: tuple[str, ...]  # how a question says it; {} is the value


def _text(make: Callable[[Random], str]) -> Callable[[Random, bool], Json]:
    return lambda random, held: pools.draw(make, random, held)


def _number(low: int, high: int) -> Callable[[Random, bool], Json]:
    return lambda random, held: random.randint(low, high)


def _choice(*values: str) -> tuple[dict[str, Any], Callable[[Random, bool], Json]]:
    return {"type": "string", "enum": list(values)}, lambda random, held: random.choice(values)


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
LIST = {"type": "array", "items": {"type": "string"}}


def _words(random: Random, held: bool) -> list[str]:
    return [pools.draw(pools.made_word, random, held) for _ in range(random.choice((2, 2, 3)))]


def _sentence(random: Random) -> str:
    words = [pools.made_word(random) if random.random() < 0.3 else random.choice(pools.THINGS)]
    words += [random.choice(pools.FOODS + pools.COLOURS + pools.THINGS) for _ in range(3)]
    return " ".join(words[: random.choice((2, 3, 4))])


PARAMS = [
    Param("city", STRING, _text(pools.city), "Name of the city", ("in {}", "for {}")),
    Param("location", STRING, _text(pools.city), "Where", ("at {}", "in {}")),
    Param("name", STRING, _text(pools.full_name), "Full name", ("for {}", "of {}", "named {}")),
    Param("person", STRING, _text(pools.first), "Who", ("for {}", "with {}")),
    Param("email", STRING, _text(pools.email), "E-mail address", ("to {}", "with the address {}")),
    Param("path", STRING, _text(pools.file_path), "Path of the file", ("in {}", "at {}")),
    Param("date", STRING, _text(pools.date), "Date, YYYY-MM-DD", ("on {}", "for {}")),
    Param("time", STRING, _text(pools.clock), "Time, HH:MM", ("at {}",)),
    Param("id", STRING, _text(pools.code), "Identifier", ("with the id {}", "number {}")),
    Param("title", STRING, _text(_sentence), "Title", ('called "{}"', 'with the title "{}"')),
    Param("query", STRING, _text(_sentence), "What to look for", ('about "{}"', 'matching "{}"')),
    Param("text", STRING, _text(_sentence), "The text", ('saying "{}"', 'with the text "{}"')),
    Param("item", STRING, _text(pools.made_word), "The item", ("for the item {}", "of {}")),
    Param("count", INTEGER, _number(1, 500), "How many", ("{} times", "with a count of {}")),
    Param("limit", INTEGER, _number(1, 50), "At most so many", ("at most {}", "limited to {}")),
    Param("days", INTEGER, _number(1, 60), "Number of days", ("for {} days", "over {} days")),
    Param("minutes", INTEGER, _number(1, 180), "Minutes", ("for {} minutes", "in {} minutes")),
    Param("year", INTEGER, _number(1900, 2040), "The year", ("in {}", "from the year {}")),
    Param("amount", NUMBER, lambda r, h: pools.price(r), "The amount", ("of {}", "worth {}")),
    Param("width", INTEGER, _number(1, 999), "Width", ("{} wide", "with width {}")),
    Param("height", INTEGER, _number(1, 999), "Height", ("{} high", "with height {}")),
    Param("tags", LIST, _words, "Tags", ("tagged {}", "with the tags {}")),
    Param("names", LIST, _words, "Names", ("for {}", "named {}")),
    Param("unit", *_choice("celsius", "fahrenheit"), "Unit of temperature", ("in {}",)),
    Param("language", *_choice(*(x.lower() for x in pools.LANGUAGES)), "Language", ("in {}",)),
    Param("colour", *_choice(*pools.COLOURS[:8]), "Colour", ("in {}", "coloured {}")),
    Param("priority", *_choice("low", "normal", "high"), "Priority", ("with {} priority",)),
    Param("day", *_choice(*pools.DAYS), "Day of the week", ("on {}",)),
    Param("enabled", {"type": "boolean"}, lambda r, h: r.random() < 0.5, "On or off", ()),
]
VERBS = (
    "get find search list create add delete remove update send book cancel check count open close "
    "start stop play read write show set make order buy sell convert translate measure compare sort "
    "save load move copy rename draw print schedule track rate"
).split()
NOUNS = (
    "weather forecast flight train hotel room table ticket order invoice payment account user "
    "contact message email note reminder alarm timer event meeting task file folder document photo "
    "song playlist movie book recipe product parcel route map stock price currency sensor light "
    "door heater lamp robot report chart survey game score team player city country word sentence "
    "image video backup server job log record label"
).split()
NO_TOOL = "None of my tools can do that."


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    about: str
    params: tuple[Param, ...]
    optional: frozenset[str] = frozenset()

    def spec(self) -> dict[str, Any]:
        properties = {
            p.name: p.schema | ({"description": p.about} if p.about else {}) for p in self.params
        }
        required = [p.name for p in self.params if p.name not in self.optional]
        schema = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.about, "parameters": schema}
        return {"type": "function", "function": function}


def _made_tool(random: Random, held: bool) -> tuple[Tool, str]:
    """And how a question names it."""
    while True:
        verb, noun = random.choice(VERBS), random.choice(NOUNS)
        if reserved("tool", verb, noun) == held:
            break
    params = tuple(random.sample(PARAMS, random.choice((1, 1, 2, 2, 3))))
    if random.random() < 0.3:  # as functions without a documented signature give them
        params = tuple(replace(p, about="") for p in params)
    optional = frozenset(p.name for p in params[1:] if random.random() < 0.3)
    style = random.random()
    if style < 0.85:
        name = f"{verb}_{noun}"
    else:
        name = f"{verb}{noun.title()}" if style < 0.93 else f"{noun}_{verb}"
    article = random.choice(("a", "the"))
    about = random.choice((f"{verb.title()} {article} {noun}.", f"{verb.title()} {noun}s",
                           f"Use this to {verb} {article} {noun}."))  # fmt: skip
    return Tool(name, about, params, optional), f"{verb} {random.choice(('the', 'a', 'my'))} {noun}"


def _spoken(value: Json) -> str:
    if isinstance(value, list):
        return " and ".join([", ".join(value[:-1]), value[-1]]) if len(value) > 1 else value[0]
    return str(value)


def _asked(tool: Tool, asking: str, random: Random, held: bool) -> tuple[str, dict[str, Json]]:
    arguments: dict[str, Json] = {}
    said = []
    for p in tool.params:
        if p.name in tool.optional and random.random() < 0.5:
            continue
        arguments[p.name] = value = p.draw(random, held)
        if isinstance(value, bool):
            said.append(f"with {p.name} {random.choice(('on', 'true')) if value else 'off'}")
        else:
            said.append(random.choice(p.phrases).format(_spoken(value)))
    order = list(range(len(said)))
    random.shuffle(order)
    text = " ".join([asking, *(said[i] for i in order)])
    frame = random.choice(FRAMES)
    text = frame.format(text)
    return text[0].upper() + text[1:] if random.random() < 0.85 else text, arguments


FRAMES = (
    "{}.", "{}", "Please {}.", "Can you {}?", "Could you {}, please?", "I need you to {}.",
    "{}, please.", "I want to {}.", "Would you {}?", "Now {}.", "{} for me.", "Help me to {}.",
)  # fmt: skip


def _small(random: Random) -> tuple[Tool, str, dict[str, Json], Json, str]:
    """The functions people try first: tool, question, arguments, what it gives, the answer."""
    word = random.choice((pools.made_word(random), random.choice(pools.THINGS)))
    x, y = random.randrange(2, 10 ** random.randint(1, 6)), random.randrange(2, 10**5)
    whole = {"type": "integer"}

    def p(name: str, schema: dict[str, Any]) -> Param:
        return Param(name, schema, lambda r, h: None, "", ())

    kind = random.randrange(8)
    if kind < 3:
        name, sign, verb = random.choice(
            (("multiply", "*", "Multiply"), ("add", "+", "Add"), ("subtract", "-", "Subtract"))
        )
        result = {"*": x * y, "+": x + y, "-": x - y}[sign]
        ask = random.choice(("What is {} {} {}?", "{} {} {}", "Calculate {} {} {}.", "{} {} {} =",
                             "what's {} {} {}", "How much is {} {} {}?"))  # fmt: skip
        shown = random.choice((sign, {"*": "times", "+": "plus", "-": "minus"}[sign]))
        tool = Tool(name, f"{verb} two numbers.", (p("x", whole), p("y", whole)))
        answer = f"{x} {sign} {y} = {result}."
        return tool, ask.format(x, shown, y), {"x": x, "y": y}, str(result), answer
    if kind == 3:
        char = random.choice(word)
        tool = Tool("count_char", "Count the number of times a character appears in a text.",
                    (p("text", STRING), p("character", STRING)))  # fmt: skip
        ask = random.choice(("How many {}s are in {}?", "Count the {} in {}.", "how many {} in {}"))
        result = word.count(char)
        answer = f'"{char}" appears {result} {"time" if result == 1 else "times"} in "{word}".'
        return tool, ask.format(char, word), {"text": word, "character": char}, str(result), answer
    if kind == 4:
        name, about, made = random.choice(
            (("upper", "Convert text to uppercase.", word.upper()),
             ("reverse", "Reverse a text.", word[::-1]),
             ("length", "Count the characters of a text.", str(len(word))))
        )  # fmt: skip
        tool = Tool(name, about, (p("text", STRING),))
        ask = {"upper": ("Convert {} to upper case.", "{} in uppercase, please", "upper {}"),
               "reverse": ("Reverse {}.", "What is {} backwards?", "reverse the word {}"),
               "length": ("How long is {}?", "How many letters has {}?", "length of {}")}[name]  # fmt: skip
        return tool, random.choice(ask).format(word), {"text": word}, made, f"{made}."
    if kind == 5:
        made = f"0.{random.randrange(20, 60)}"
        ask = random.choice(("Which version of llm is this?", "What version of LLM am I running?",
                             "llm version?", "What LLM version?"))  # fmt: skip
        about = "Return the installed version of llm"
        return Tool("llm_version", about, ()), ask, {}, made, f"This is llm {made}."
    if kind == 6:
        at, day = pools.clock(random), pools.date(random)
        result = json.dumps({"utc_time": f"{day} {at}:00 UTC", "local_time": f"{day} {at}:00"})
        ask = random.choice(("What time is it?", "what is the time", "Tell me the time.",
                             "What's the time now?"))  # fmt: skip
        about = "Returns the current time, as local time and UTC"
        return Tool("llm_time", about, ()), ask, {}, result, f"It is {at} on {day}."
    sides = random.choice((6, 8, 10, 12, 20))
    made = str(random.randint(1, sides))
    ask = random.choice(("Roll a die with {} sides.", "Throw a {}-sided die.", "roll d{}"))
    tool = Tool("roll", "Roll a die.", (p("sides", whole),))
    return tool, ask.format(sides), {"sides": sides}, made, f"The die shows {made}."


def _result(random: Random, held: bool) -> tuple[str, str, str]:
    """What a made-up tool gives, how it is said, and what must be in it."""
    kind = random.randrange(6)
    if kind == 0:
        text = random.choice(("done", "ok", "success", "created", "saved", "sent"))
        return text, "Done.", "done"
    if kind == 1:
        value = str(random.randint(0, 5000))
        return value, f"The result is {value}.", value
    if kind == 2:
        value = pools.draw(_sentence, random, held)
        return value, f"The result is: {value}.", value
    if kind == 3:
        key, value = random.choice(("status", "owner", "place", "answer")), pools.draw(
            pools.made_word, random, held)  # fmt: skip
        return json.dumps({key: value}), f"The {key} is {value}.", value
    if kind == 4:
        items = _words(random, held)
        return json.dumps(items), f"I found {_spoken(items)}.", items[-1]
    text = random.choice(("not found", "no such entry", "permission denied", "timed out"))
    return f"Error: {text}", f"That did not work: {text}.", text


def _system(random: Random) -> list[Message]:
    texts = ("You are a helpful assistant.", "Use the tools when they help.", "Be brief.",
             "You are an assistant with tools.")  # fmt: skip
    return [system(random.choice(texts))] if random.random() < 0.2 else []


def _calling(calls: list[tuple[Tool, dict[str, Json]]], thinking: bool, random: Random) -> Message:
    message = assistant("")
    if thinking:
        steps = [
            f"{tool.name} with " + (", ".join(f"{k} {_spoken(v)}" for k, v in arguments.items()))
            if arguments
            else tool.name
            for tool, arguments in calls
        ]
        message["reasoning_content"] = f"I should call {' and '.join(steps)}."
    message["tool_calls"] = [call(tool.name, arguments) for tool, arguments in calls]
    return message


def _answer(text: str, thinking: bool) -> Message:
    return assistant(text, thoughts="The tool has answered." if thinking else None)


def dialogue(random: Random, held: bool) -> Dialogue:
    thinking = random.random() < 0.2
    made = [_made_tool(random, held) for _ in range(random.choice((1, 1, 2, 3, 4)))]
    made = list({tool.name: (tool, asking) for tool, asking in made}.values())
    tools = [tool for tool, _ in made]
    kind = random.random()
    messages = _system(random)
    if kind < 0.12:
        return _no_call(random, messages, tools, thinking)
    if kind < 0.45:
        small, question, arguments, result, answer = _small(random)
        tools = [small, *tools[: random.randrange(3)]]
        calls, must = [(small, arguments)], answer
        results, reply = [result], answer
    else:
        calls, questions, results, replies = [], [], [], []
        for tool, asking in made[: 2 if kind > 0.9 else 1]:
            question, arguments = _asked(tool, asking, random, held)
            result, reply, must = _result(random, held)
            calls.append((tool, arguments))
            questions.append(question)
            results.append(result)
            replies.append(reply)
        question, reply = " ".join(questions), " ".join(replies)
    random.shuffle(tools)
    messages += [user(question), _calling(calls, thinking, random)]
    specs = [tool.spec() for tool in tools]
    if random.random() < 0.5:
        wanted = [{"name": tool.name, "arguments": a} for tool, a in calls]
        return Dialogue("tools", messages, {"calls": wanted}, specs, thinking)
    named = zip(calls, results, strict=True)
    messages += [{"role": "tool", "name": t.name, "content": r} for (t, _), r in named]
    messages.append(_answer(reply, thinking))
    return Dialogue("tools", messages, {"contains": [must]}, specs, thinking)


def _no_call(
    random: Random, messages: list[Message], tools: list[Tool], thinking: bool
) -> Dialogue:
    """A greeting, or something that no tool does."""
    if random.random() < 0.4:
        question = random.choice(("Hello!", "Hi", "hey there", "Good morning."))
        reply, thoughts = "Hello! How can I help you?", "A greeting needs no tool."
    else:
        taken = {tool.name for tool in tools}
        other, asking = _made_tool(random, False)
        while other.name in taken:
            other, asking = _made_tool(random, False)
        question, _ = _asked(other, asking, random, False)
        reply, thoughts = NO_TOOL, "No tool does this."
    messages += [user(question), assistant(reply, thoughts=thoughts if thinking else None)]
    return Dialogue("tools", messages, {"equals": reply}, [t.spec() for t in tools], thinking)


def train(random: Random) -> Iterator[Dialogue]:
    while True:
        yield dialogue(random, held=False)


def held_out(random: Random) -> Iterator[Dialogue]:
    while True:
        yield dialogue(random, held=True)
