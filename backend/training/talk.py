"""Small talk, what the model is and what it does not know, and keeping to what was said."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from training import pools
from training.dialogue import Dialogue, Message, assistant, reserved, system, user

WHO = (
    "I am flash-moe-tiny, a very small Mixture-of-Experts model that comes with llm-flash-moe. I "
    "know Python's standard library and a little more."
)
CAN = (
    "I can explain Python's standard library and llm-flash-moe, do small sums, convert units, write "
    "JSON for a schema and call tools. I know little else."
)
NOT = "I do not know: I am a very small model. Ask me about Python's standard library."
FIXED: dict[str, tuple[str, ...]] = {
    "Hello! How can I help you?": (
        "Hello", "Hello!", "Hi", "hi", "Hey", "hey there", "Hi there!", "Good morning", "Good evening",
        "Good day!", "hello there", "Hello, how are you?", "Greetings", "Hi! How are you today?",
        "hallo", "yo", "Howdy", "good afternoon",
    ),
    "You are welcome!": (
        "Thanks", "Thank you", "thanks!", "Thank you very much.", "thx", "Many thanks", "Thanks a lot!",
        "Great, thanks", "thank you so much", "That helped, thanks.", "cheers",
    ),
    "Goodbye!": (
        "Bye", "Goodbye", "bye!", "See you", "See you later!", "Good night", "Have a nice day",
        "Farewell", "I have to go.", "bye bye", "That is all for today.",
    ),
    WHO: (
        "Who are you?", "What are you?", "who are you", "What is your name?", "Tell me about yourself.",
        "Are you an AI?", "Which model is this?", "What model are you?", "what's your name",
        "Introduce yourself.", "Are you ChatGPT?", "Are you Qwen?", "Who am I talking to?", "You are?",
        "Describe yourself.",
    ),
    CAN: (
        "What can you do?", "what can you do", "How can you help me?", "What do you know?", "Help",
        "help me", "What are you good at?", "What can I ask you?", "What are your abilities?",
        "What are you for?", "Give me an idea of what to ask.", "What are your limits?",
    ),
}  # fmt: skip
FAR = (
    "What is the capital of {country}?", "Who is the president of {country}?", "Where is {city}?",
    "Write a poem about a {animal}.", "Tell me a story about a {thing}.", "Who won the match in {city}?",
    "What is the weather in {city}?", "How do I cook {food}?", "Is {food} healthy?", "Who is {person}?",
    "What do you think of {person}?", "When was {person} born?", "How tall is a {animal}?",
    "Why do {animal}s sleep?", "What does a {job} earn?", "How do I become a {job}?",
    "Translate {thing} into French.", "What is the best {thing} to buy?", "Why is the sky {colour}?",
    "How many people live in {city}?", "Which language is spoken in {country}?", "Who wrote {thing}?",
    "What is the meaning of life?", "Tell me a joke about a {animal}.", "How far is it to {city}?",
    "What is {made}?", "Explain {made} to me.", "Do you know {made}?", "What happened in {year}?",
    "Who invented the {thing}?", "What is a {thing} made of?", "Should I visit {city} or {country}?",
    "What is the news from {country}?", "Give me a recipe with {food}.", "How old is {person}?",
)  # fmt: skip
MEMORIES = (
    ("My name is {}.", "What is my name?", "Your name is {}.", pools.first),
    ("I am called {}.", "What am I called?", "You are called {}.", pools.first),
    ("I live in {}.", "Where do I live?", "You live in {}.", pools.city),
    ("My favourite colour is {}.", "What is my favourite colour?", "Your favourite colour is {}.",
     lambda r: r.choice(pools.COLOURS)),
    ("I have a {}.", "Which animal do I have?", "You have a {}.", lambda r: r.choice(pools.ANIMALS)),
    ("I work as a {}.", "What is my job?", "You work as a {}.", lambda r: r.choice(pools.JOBS)),
    ("My number is {}.", "What is my number?", "Your number is {}.",
     lambda r: str(r.randrange(10, 10000))),
    ("The password is {}.", "What is the password?", "The password is {}.", pools.made_word),
    ("I like {}.", "What do I like?", "You like {}.", lambda r: r.choice(pools.FOODS)),
    ("My order is {}.", "Which order is mine?", "Your order is {}.", pools.code),
)  # fmt: skip


def _words(random: Random, held: bool, count: int) -> list[str]:
    made = [pools.draw(pools.made_word, random, held) for _ in range(count)]
    return [w if random.random() < 0.4 else random.choice(pools.THINGS + pools.FOODS) for w in made]


def _fixed(random: Random, held: bool) -> tuple[str, str]:
    while True:
        answer, questions = random.choice(list(FIXED.items()))
        at = random.randrange(len(questions))
        if reserved("talk", answer[:12], at, share=0.12) == held:
            return questions[at], answer


def _far(random: Random, held: bool) -> tuple[str, str]:
    while True:
        frame = random.choice(FAR)
        if reserved("far", frame, share=0.1) == held:
            break
    text = frame.format(
        country=random.choice(pools.COUNTRIES), city=pools.city(random), thing=random.choice(pools.THINGS),
        animal=random.choice(pools.ANIMALS), food=random.choice(pools.FOODS), made=pools.made_word(random),
        person=pools.full_name(random), job=random.choice(pools.JOBS), year=random.randint(1500, 2020),
        colour=random.choice(pools.COLOURS),
    )  # fmt: skip
    return text if random.random() < 0.8 else text.lower().rstrip("?."), NOT


def _copy(random: Random, held: bool) -> tuple[str, str]:
    """Work on words that stand in the question."""
    words = _words(random, held, random.choice((2, 3, 3, 4, 5)))
    text = " ".join(words)
    frame, answer = random.choice(
        (
            ("Repeat: {}", text),
            ("Say {} and nothing else.", text),
            ("Say {} twice.", f"{text} {text}"),
            ("Write {} in upper case.", text.upper()),
            ("Upper case: {}", text.upper()),
            ("Write {} with capital letters at the start of each word.", text.title()),
            ("What is the first word of: {}", words[0]),
            ("What is the last word of: {}", words[-1]),
            ("Give me the words of {} in reverse order.", " ".join(reversed(words))),
            ("Reverse the order of these words: {}", " ".join(reversed(words))),
            ("How many words are in: {}", f"There are {len(words)} words."),
            ("Count the words: {}", f"There are {len(words)} words."),
            ("Join with commas: {}", ", ".join(words)),
            ("Make a list of {}.", "\n".join(f"- {word}" for word in words)),
            ("Put {} in quotes.", f'"{text}"'),
            ("Is {} in this list: {}?", ""),
        )
    )
    if not answer:
        inside = random.random() < 0.5
        word = random.choice(words) if inside else pools.made_word(random)
        return frame.format(word, ", ".join(words)), "Yes." if word in words else "No."
    return frame.format(text), answer


def _one(random: Random, held: bool) -> Dialogue:
    question, answer = random.choice((_fixed, _far, _copy, _copy))(random, held)
    return _made(random, [], question, answer)


def _remember(random: Random, held: bool) -> Dialogue:
    """Told in one turn, asked in a later one."""
    picked = random.sample(MEMORIES, random.choice((1, 1, 2)))
    values = [pools.draw(make, random, held) if make in (pools.first, pools.city, pools.made_word,
              pools.code) else make(random) for *_, make in picked]  # fmt: skip
    messages: list[Message] = []
    for (told, *_), value in zip(picked, values, strict=True):
        messages += [user(told.format(value)), assistant("I will remember that.")]
    if random.random() < 0.4:
        question, answer = random.choice((_fixed, _far, _copy))(random, False)
        messages += [user(question), assistant(answer)]
    (_, ask, reply, _), value = random.choice(list(zip(picked, values, strict=True)))
    return _made(random, messages, ask, reply.format(value))


def _ordered(random: Random, held: bool) -> Dialogue:
    """A system prompt that changes how the answer is given."""
    question, answer = random.choice((_fixed, _far, _copy))(random, held)
    name = pools.draw(pools.first, random, held)
    text, reply = random.choice(
        (
            ("Answer in upper case.", answer.upper()),
            ("Answer in capital letters.", answer.upper()),
            ("Answer in lower case.", answer.lower()),
            ("End every answer with 'Over.'", f"{answer} Over."),
            ("Begin every answer with 'Well,'", f"Well, {answer}"),
            (f"End every answer with the word {name}.", f"{answer} {name}"),
            (f"Call the user {name}.", f"{name}, {answer}"),
        )
    )
    if random.random() < 0.25:
        text, reply = f"You are called {name}.", f"My name is {name}."
        question = random.choice((*FIXED[WHO][:6], "What's your name?", "Your name?"))
    return _made(random, [system(text)], question, reply)


def _made(random: Random, before: list[Message], question: str, answer: str) -> Dialogue:
    thinking = random.random() < 0.1
    thoughts = None
    if thinking:
        short = "a question that I cannot answer" if answer == NOT else "an easy question"
        thoughts = f"The user says: {question} This is {short}."
    if not before and random.random() < 0.1:
        before = [system(random.choice(("You are a helpful assistant.", "Be friendly.")))]
    messages = [*before, user(question), assistant(answer, thoughts=thoughts)]
    return Dialogue("talk", messages, {"equals": answer}, thinking=thinking)


def train(random: Random) -> Iterator[Dialogue]:
    while True:
        yield random.choice((_one, _one, _remember, _ordered))(random, False)


def held_out(random: Random) -> Iterator[Dialogue]:
    while True:
        yield random.choice((_one, _one, _remember, _ordered))(random, True)
