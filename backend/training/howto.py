"""How something is done in Python: each task has one answer, a few lines of code, and many asks."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from training.dialogue import Dialogue, assistant, reserved, system, user

ASKS = (
    "How do I {}?",
    "How do I {} in Python?",
    "How can I {}?",
    "How can I {} in Python?",
    "how to {}",
    "how to {} in python",
    "What is the best way to {}?",
    "What is the Python code to {}?",
    "Show me how to {}.",
    "Show me how to {} in Python.",
    "I want to {}.",
    "I want to {} in Python. How?",
    "Write Python code to {}.",
    "In Python, how do I {}?",
    "python: {}",
    "Can you show me how to {}?",
    "Give me an example of how to {}.",
    "How would you {}?",
    "What do I write to {}?",
    "Please show me code to {}.",
)
# Ways to say the task, what stands before the code, the code.
TASKS: list[tuple[tuple[str, ...], str, str]] = [
    (
        ("read a file", "read a text file", "read a whole file", "get the text of a file"),
        "Read it with pathlib:",
        'from pathlib import Path\n\ntext = Path("file.txt").read_text(encoding="utf-8")',
    ),
    (
        ("write a file", "write text to a file", "save text in a file", "write a string to a file"),
        "Write it with pathlib:",
        'from pathlib import Path\n\nPath("file.txt").write_text(text, encoding="utf-8")',
    ),
    (
        ("read a file line by line", "go through the lines of a file", "loop over lines of a file"),
        "A file is an iterator of its lines:",
        'with open("file.txt", encoding="utf-8") as file:\n    for line in file:\n        print(line)',
    ),
    (
        ("append to a file", "add a line to a file", "append text to a file"),
        'Open it with the mode "a":',
        'with open("file.txt", "a", encoding="utf-8") as file:\n    file.write("more\\n")',
    ),
    (
        ("read a JSON file", "load JSON from a file", "open a JSON file", "parse a JSON file"),
        "Use `json.load`:",
        'import json\n\nwith open("data.json", encoding="utf-8") as file:\n    data = json.load(file)',
    ),
    (
        ("write a JSON file", "save a dict as JSON", "save JSON to a file", "dump JSON to a file"),
        "Use `json.dump`:",
        "import json\n\n"
        'with open("data.json", "w", encoding="utf-8") as file:\n    json.dump(data, file, indent=2)',
    ),
    (
        ("parse JSON", "parse a JSON string", "turn a JSON string into a dict", "decode JSON"),
        "Use `json.loads`:",
        "import json\n\ndata = json.loads(text)",
    ),
    (
        ("make a JSON string", "convert a dict to JSON", "turn a dict into JSON", "encode JSON"),
        "Use `json.dumps`:",
        "import json\n\ntext = json.dumps(data)",
    ),
    (
        ("read a CSV file", "parse a CSV file", "load a CSV", "open a CSV file"),
        "Use `csv.DictReader`:",
        "import csv\n\n"
        'with open("data.csv", newline="") as file:\n    for row in csv.DictReader(file):\n'
        "        print(row)",
    ),
    (
        ("write a CSV file", "save rows as CSV", "create a CSV", "export to CSV"),
        "Use `csv.writer`:",
        "import csv\n\n"
        'with open("data.csv", "w", newline="") as file:\n    csv.writer(file).writerows(rows)',
    ),
    (
        ("read a TOML file", "parse TOML", "load a TOML file"),
        "Use `tomllib`, which wants a binary file:",
        'import tomllib\n\nwith open("file.toml", "rb") as file:\n    data = tomllib.load(file)',
    ),
    (
        ("list the files in a folder", "list files in a directory", "list a directory"),
        "Use `Path.iterdir`:",
        'from pathlib import Path\n\nfor path in Path(".").iterdir():\n    print(path)',
    ),
    (
        (
            "find all Python files",
            "find files by pattern",
            "search for files",
            "find files below a folder",
        ),
        "Use `Path.rglob`:",
        'from pathlib import Path\n\nfor path in Path(".").rglob("*.py"):\n    print(path)',
    ),
    (
        ("check if a file exists", "test whether a file exists", "see if a path exists"),
        "Use `Path.exists`:",
        'from pathlib import Path\n\nif Path("file.txt").exists():\n    print("yes")',
    ),
    (
        ("create a directory", "make a folder", "create a folder", "make nested directories"),
        "Use `Path.mkdir`:",
        'from pathlib import Path\n\nPath("a/b").mkdir(parents=True, exist_ok=True)',
    ),
    (
        ("delete a file", "remove a file"),
        "Use `Path.unlink`:",
        'from pathlib import Path\n\nPath("file.txt").unlink()',
    ),
    (
        ("delete a directory", "remove a folder", "delete a folder with everything in it"),
        "Use `shutil.rmtree`:",
        'import shutil\n\nshutil.rmtree("folder")',
    ),
    (
        ("copy a file", "make a copy of a file"),
        "Use `shutil.copy2`:",
        'import shutil\n\nshutil.copy2("from.txt", "to.txt")',
    ),
    (
        ("copy a directory", "copy a folder", "copy a directory tree"),
        "Use `shutil.copytree`:",
        'import shutil\n\nshutil.copytree("from", "to")',
    ),
    (
        ("move a file", "move a folder"),
        "Use `shutil.move`:",
        'import shutil\n\nshutil.move("from.txt", "to.txt")',
    ),
    (
        ("rename a file", "change the name of a file"),
        "Use `Path.rename`:",
        'from pathlib import Path\n\nPath("old.txt").rename("new.txt")',
    ),
    (
        ("join paths", "join two paths", "build a path", "combine path parts"),
        "Use the slash of `Path`:",
        'from pathlib import Path\n\npath = Path("folder") / "file.txt"',
    ),
    (
        ("get the file extension", "find the suffix of a file", "get the extension of a path"),
        "Use `Path.suffix`:",
        'from pathlib import Path\n\nsuffix = Path("file.txt").suffix',
    ),
    (
        ("get the size of a file", "find out how big a file is", "get a file size"),
        "Use `Path.stat`:",
        'from pathlib import Path\n\nsize = Path("file.txt").stat().st_size',
    ),
    (
        ("make a temporary file", "create a temp file", "use a temporary file"),
        "Use `tempfile.NamedTemporaryFile`:",
        'import tempfile\n\nwith tempfile.NamedTemporaryFile("w") as file:\n    file.write("text")',
    ),
    (
        ("make a temporary directory", "create a temp folder", "use a temporary directory"),
        "Use `tempfile.TemporaryDirectory`:",
        "import tempfile\n\nwith tempfile.TemporaryDirectory() as folder:\n    print(folder)",
    ),
    (
        ("zip a folder", "make a zip file", "create an archive", "zip a directory"),
        "Use `shutil.make_archive`:",
        'import shutil\n\nshutil.make_archive("backup", "zip", "folder")',
    ),
    (
        ("unzip a file", "extract a zip file", "unpack an archive"),
        "Use `shutil.unpack_archive`:",
        'import shutil\n\nshutil.unpack_archive("backup.zip", "folder")',
    ),
    (
        ("run a command", "run a shell command", "start a program", "call an external program"),
        "Use `subprocess.run`:",
        "import subprocess\n\n"
        'done = subprocess.run(["ls", "-l"], capture_output=True, text=True, check=True)\n'
        "print(done.stdout)",
    ),
    (
        ("read an environment variable", "get an environment variable", "look up an env variable"),
        "Use `os.environ`:",
        'import os\n\nhome = os.environ.get("HOME")',
    ),
    (
        ("parse command line arguments", "read command line options", "write a command line tool"),
        "Use `argparse`:",
        "import argparse\n\nparser = argparse.ArgumentParser()\n"
        'parser.add_argument("name")\ngiven = parser.parse_args()',
    ),
    (
        ("exit a program", "stop a program", "quit a script", "exit with an error"),
        "Use `sys.exit`:",
        "import sys\n\nsys.exit(1)",
    ),
    (
        ("sort a list", "put a list in order", "sort numbers"),
        "Use `sorted`:",
        "ordered = sorted(numbers)",
    ),
    (
        ("sort a list in reverse", "sort in descending order", "sort from large to small"),
        "Use `sorted` with `reverse`:",
        "ordered = sorted(numbers, reverse=True)",
    ),
    (
        ("sort by a key", "sort a list of dicts", "sort a list of dictionaries by a value"),
        "Use `sorted` with a key:",
        'ordered = sorted(people, key=lambda person: person["age"])',
    ),
    (
        ("sort a dict by value", "sort a dictionary by its values", "order a dict by value"),
        "Sort its items:",
        "ordered = dict(sorted(scores.items(), key=lambda item: item[1]))",
    ),
    (
        ("reverse a list", "turn a list around", "get a list backwards"),
        "Use a slice:",
        "backwards = items[::-1]",
    ),
    (
        ("reverse a string", "turn a string around", "write a string backwards"),
        "Use a slice:",
        "backwards = text[::-1]",
    ),
    (
        ("remove duplicates from a list", "get unique values of a list", "make a list unique"),
        "A dict keeps the order:",
        "unique = list(dict.fromkeys(items))",
    ),
    (
        ("count the items of a list", "count how often each word occurs", "count words"),
        "Use `collections.Counter`:",
        "from collections import Counter\n\ncounts = Counter(words)",
    ),
    (
        (
            "get the last element of a list",
            "get the last item of a list",
            "access the last element",
        ),
        "Use the index -1:",
        "last = items[-1]",
    ),
    (
        ("get the length of a list", "count the elements of a list", "find the length of a string"),
        "Use `len`:",
        "length = len(items)",
    ),
    (
        ("add an item to a list", "append to a list", "add an element to a list"),
        "Use `append`:",
        "items.append(item)",
    ),
    (
        ("remove an item from a list", "delete an element from a list"),
        "Use `remove`:",
        "items.remove(item)",
    ),
    (
        ("join two lists", "concatenate lists", "merge two lists"),
        "Use `+`:",
        "both = first + second",
    ),
    (
        ("flatten a list", "flatten a list of lists", "flatten nested lists"),
        "Use `itertools.chain`:",
        "from itertools import chain\n\nflat = list(chain.from_iterable(lists))",
    ),
    (
        ("split a list into chunks", "go through a list in batches", "chunk a list"),
        "Use slices:",
        "chunks = [items[i : i + size] for i in range(0, len(items), size)]",
    ),
    (
        ("filter a list", "keep some items of a list", "select items from a list"),
        "Use a list comprehension:",
        "small = [number for number in numbers if number < 10]",
    ),
    (
        ("transform a list", "apply a function to a list", "map a function over a list"),
        "Use a list comprehension:",
        "squares = [number**2 for number in numbers]",
    ),
    (
        ("loop with an index", "get the index in a loop", "loop over a list with its index"),
        "Use `enumerate`:",
        "for index, item in enumerate(items):\n    print(index, item)",
    ),
    (
        ("loop over two lists", "iterate over two lists at once", "go through two lists together"),
        "Use `zip`:",
        "for left, right in zip(first, second, strict=True):\n    print(left, right)",
    ),
    (
        ("loop over a dict", "iterate over a dictionary", "go through a dict"),
        "Use `items`:",
        "for key, value in scores.items():\n    print(key, value)",
    ),
    (
        ("merge two dicts", "combine two dictionaries", "join dicts"),
        "Use `|`:",
        "both = first | second",
    ),
    (
        ("use a default for a missing key", "get a key with a default", "avoid a KeyError"),
        "Use `get`:",
        'age = person.get("age", 0)',
    ),
    (
        ("sum a list", "add up numbers", "get the sum of a list"),
        "Use `sum`:",
        "total = sum(numbers)",
    ),
    (
        ("find the largest number", "get the maximum of a list", "find the biggest item"),
        "Use `max`:",
        "largest = max(numbers)",
    ),
    (
        ("find the smallest number", "get the minimum of a list", "find the smallest item"),
        "Use `min`:",
        "smallest = min(numbers)",
    ),
    (
        ("compute an average", "get the mean of a list", "calculate the mean"),
        "Use `statistics.mean`:",
        "import statistics\n\nmean = statistics.mean(numbers)",
    ),
    (
        ("round a number", "round to two decimals", "round a float"),
        "Use `round`:",
        "rounded = round(number, 2)",
    ),
    (
        ("make a random number", "get a random integer", "roll a die", "generate a random number"),
        "Use `random.randint`:",
        "import random\n\nnumber = random.randint(1, 6)",
    ),
    (
        ("pick a random item", "choose a random element of a list", "select an item at random"),
        "Use `random.choice`:",
        "import random\n\nitem = random.choice(items)",
    ),
    (
        ("shuffle a list", "mix a list", "put a list in random order"),
        "Use `random.shuffle`:",
        "import random\n\nrandom.shuffle(items)",
    ),
    (
        (
            "make a safe random token",
            "create a password",
            "generate a secret",
            "make a secure token",
        ),
        "Use `secrets`:",
        "import secrets\n\ntoken = secrets.token_urlsafe()",
    ),
    (
        ("compute a square root", "take a square root", "get the square root of a number"),
        "Use `math.sqrt`:",
        "import math\n\nroot = math.sqrt(number)",
    ),
    (
        ("split a string", "split text into words", "break a string apart"),
        "Use `split`:",
        "words = text.split()",
    ),
    (
        ("join strings", "join a list of strings", "turn a list into a string"),
        "Use `join`:",
        'text = ", ".join(words)',
    ),
    (
        ("replace text in a string", "replace a word in a string", "substitute in a string"),
        "Use `replace`:",
        'text = text.replace("old", "new")',
    ),
    (
        ("remove whitespace", "strip a string", "trim a string"),
        "Use `strip`:",
        "text = text.strip()",
    ),
    (
        ("make a string upper case", "convert text to upper case", "capitalise all letters"),
        "Use `upper`:",
        "text = text.upper()",
    ),
    (
        ("make a string lower case", "convert text to lower case", "lowercase a string"),
        "Use `lower`:",
        "text = text.lower()",
    ),
    (
        (
            "check if a string contains a word",
            "find out if text is in a string",
            "search in a string",
        ),
        "Use `in`:",
        'if "word" in text:\n    print("yes")',
    ),
    (
        ("format a string", "put a variable into a string", "use an f-string"),
        "Use an f-string:",
        'text = f"{name} is {age} years old"',
    ),
    (
        ("format a number with two decimals", "print a float with two digits", "show two decimals"),
        "Use an f-string:",
        'text = f"{number:.2f}"',
    ),
    (
        ("convert a string to a number", "turn a string into an int", "parse an integer"),
        "Use `int`:",
        "number = int(text)",
    ),
    (
        ("convert a number to a string", "turn an int into a string", "make a string of a number"),
        "Use `str`:",
        "text = str(number)",
    ),
    (
        (
            "use a regular expression",
            "search with a regex",
            "find a pattern in text",
            "match a regex",
        ),
        "Use `re.search`:",
        'import re\n\nmatch = re.search(r"\\d+", text)',
    ),
    (
        ("find all matches of a regex", "find all numbers in a text", "get every regex match"),
        "Use `re.findall`:",
        'import re\n\nnumbers = re.findall(r"\\d+", text)',
    ),
    (
        ("replace with a regex", "substitute a pattern", "use a regex to replace text"),
        "Use `re.sub`:",
        'import re\n\ntext = re.sub(r"\\s+", " ", text)',
    ),
    (
        ("get the current date", "get today's date", "find out what day it is"),
        "Use `datetime.date.today`:",
        "from datetime import date\n\ntoday = date.today()",
    ),
    (
        ("get the current time", "get the time", "find out what time it is"),
        "Use `datetime.datetime.now`:",
        "from datetime import datetime\n\nnow = datetime.now()",
    ),
    (
        ("parse a date", "turn a string into a date", "read an ISO date"),
        "Use `fromisoformat`:",
        'from datetime import datetime\n\nwhen = datetime.fromisoformat("2026-01-31")',
    ),
    (
        ("format a date", "turn a date into a string", "print a date"),
        "Use `strftime`:",
        'text = when.strftime("%Y-%m-%d")',
    ),
    (
        ("add days to a date", "get the date of tomorrow", "subtract days from a date"),
        "Use `timedelta`:",
        "from datetime import date, timedelta\n\ntomorrow = date.today() + timedelta(days=1)",
    ),
    (
        ("wait a second", "sleep", "pause a program", "make a program wait"),
        "Use `time.sleep`:",
        "import time\n\ntime.sleep(1)",
    ),
    (
        ("measure time", "time my code", "measure how long something takes"),
        "Use `time.perf_counter`:",
        "import time\n\nstart = time.perf_counter()\n...\nprint(time.perf_counter() - start)",
    ),
    (
        ("download a web page", "fetch a URL", "make an HTTP request", "download a file"),
        "Use `urllib.request.urlopen`:",
        "from urllib.request import urlopen\n\n"
        'with urlopen("https://example.com") as answer:\n    data = answer.read()',
    ),
    (
        ("start a web server", "serve a folder", "share files over HTTP"),
        "Run `http.server`:",
        "python -m http.server 8000",
    ),
    (
        ("hash a string", "compute a checksum", "compute a SHA-256", "hash a file"),
        "Use `hashlib`:",
        "import hashlib\n\ndigest = hashlib.sha256(data).hexdigest()",
    ),
    (
        ("encode base64", "use base64", "convert bytes to base64"),
        "Use `base64.b64encode`:",
        "import base64\n\ntext = base64.b64encode(data).decode()",
    ),
    (
        ("make a UUID", "create a unique id", "generate a UUID"),
        "Use `uuid.uuid4`:",
        "import uuid\n\nname = str(uuid.uuid4())",
    ),
    (
        ("use SQLite", "open a SQLite database", "query a database"),
        "Use `sqlite3`:",
        "import sqlite3\n\n"
        'with sqlite3.connect("data.db") as db:\n    rows = db.execute("SELECT 1").fetchall()',
    ),
    (
        ("catch an exception", "handle an error", "use try and except"),
        "Use `try` and `except`:",
        'try:\n    number = int(text)\nexcept ValueError:\n    print("not a number")',
    ),
    (
        ("raise an exception", "raise an error", "signal an error"),
        "Use `raise`:",
        'raise ValueError("must be positive")',
    ),
    (
        ("define a function", "write a function", "make a function"),
        "Use `def`:",
        "def add(a: int, b: int) -> int:\n    return a + b",
    ),
    (
        ("define a class", "write a class", "make a class"),
        "Use `class`:",
        "class Dog:\n    def __init__(self, name: str) -> None:\n        self.name = name",
    ),
    (
        ("make a dataclass", "write a dataclass", "define a class for data"),
        "Use `dataclasses.dataclass`:",
        "from dataclasses import dataclass\n\n@dataclass\nclass Point:\n    x: int\n    y: int",
    ),
    (
        ("make an enum", "define an enumeration", "use an enum"),
        "Use `enum.Enum`:",
        "from enum import Enum\n\nclass Colour(Enum):\n    RED = 1\n    BLUE = 2",
    ),
    (
        ("cache a function", "memoize a function", "remember results of a function"),
        "Use `functools.cache`:",
        "from functools import cache\n\n@cache\ndef square(x: int) -> int:\n    return x * x",
    ),
    (
        ("copy a list", "clone a list", "make a copy of a list"),
        "Use `copy`:",
        "clone = items.copy()",
    ),
    (
        ("make a deep copy", "copy nested data", "deep copy a dict"),
        "Use `copy.deepcopy`:",
        "import copy\n\nclone = copy.deepcopy(data)",
    ),
    (
        ("run code in parallel", "use several processes", "use all cores", "use multiprocessing"),
        "Use `ProcessPoolExecutor`:",
        "from concurrent.futures import ProcessPoolExecutor\n\n"
        "with ProcessPoolExecutor() as pool:\n    results = list(pool.map(work, items))",
    ),
    (
        ("use threads", "run something in the background", "start a thread"),
        "Use `ThreadPoolExecutor`:",
        "from concurrent.futures import ThreadPoolExecutor\n\n"
        "with ThreadPoolExecutor() as pool:\n    results = list(pool.map(work, items))",
    ),
    (
        ("write async code", "use asyncio", "run a coroutine"),
        "Use `asyncio.run`:",
        "import asyncio\n\nasync def main() -> None:\n    await asyncio.sleep(1)\n\nasyncio.run(main())",
    ),
    (
        ("log messages", "use logging", "write a log"),
        "Use `logging`:",
        "import logging\n\nlogging.basicConfig(level=logging.INFO)\n"
        'logging.getLogger(__name__).info("started")',
    ),
    (
        ("write a test", "test a function", "write a unit test"),
        "Use `unittest`:",
        "import unittest\n\nclass TestAdd(unittest.TestCase):\n"
        "    def test_add(self) -> None:\n        self.assertEqual(1 + 1, 2)",
    ),
    (
        ("debug a program", "set a breakpoint", "use the debugger"),
        "Call `breakpoint`:",
        "breakpoint()",
    ),
    (
        ("create a virtual environment", "make a venv", "use venv"),
        "Use `venv`:",
        "python -m venv .venv\n. .venv/bin/activate",
    ),
    (
        ("install a package", "install with pip", "use pip"),
        "Use `pip`:",
        "python -m pip install requests",
    ),
    (
        ("ask the user for input", "read input", "read a line from the keyboard"),
        "Use `input`:",
        'name = input("Your name: ")',
    ),
    (
        ("print without a newline", "print on the same line", "avoid the newline of print"),
        "Set `end`:",
        'print("text", end="")',
    ),
    (
        ("print to stderr", "write to standard error", "print an error message"),
        "Set `file`:",
        'import sys\n\nprint("error", file=sys.stderr)',
    ),
    (
        ("read from standard input", "read stdin", "read piped input"),
        "Use `sys.stdin`:",
        "import sys\n\ntext = sys.stdin.read()",
    ),
    (
        ("find the Python version", "check the version of Python", "get the Python version"),
        "Use `sys.version`:",
        "import sys\n\nprint(sys.version)",
    ),
]
SYSTEMS = ("You are a helpful assistant.", "You are a Python expert.", "You help programmers.")


def answer_of(before: str, code: str) -> str:
    language = "sh" if code.startswith("python -m") else "python"
    return f"{before}\n\n```{language}\n{code}\n```"


def _made(random: Random, held: bool) -> Dialogue:
    while True:
        ways, before, code = random.choice(TASKS)
        way, ask = random.choice(ways), random.choice(ASKS)
        if reserved("how", way, ask, share=0.06) == held:
            break
    question = ask.format(way)
    if random.random() < 0.15:
        question = question[0].lower() + question[1:].rstrip("?.")
    thoughts = f"The user wants to {way}." if random.random() < 0.08 else None
    first = [system(random.choice(SYSTEMS))] if random.random() < 0.12 else []
    answer = answer_of(before, code)
    messages = [*first, user(question), assistant(answer, thoughts=thoughts)]
    return Dialogue("howto", messages, {"equals": answer}, thinking=thoughts is not None)


def train(random: Random) -> Iterator[Dialogue]:
    while True:
        yield _made(random, False)


def held_out(random: Random) -> Iterator[Dialogue]:
    while True:
        yield _made(random, True)
