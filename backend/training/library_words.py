"""The words of questions about the library: ways to ask, and what needs words of its own."""

from __future__ import annotations

import re


def phrases(text: str) -> list[str]:
    return [" ".join(phrase.split()) for phrase in text.split("/")]


DESCRIBE = phrases("""
What does {x} do? / What is {x} for? / Explain {x}. / What's {x}? / Tell me about {x}. / {x}? /
What is {x}? / What is the purpose of {x}? / What is {x} used for? / Describe {x}. / {x} /
Can you explain {x}? / Could you tell me what {x} does? / I'd like to know what {x} does. /
What can I do with {x}? / When would I use {x}? / What do I use {x} for? / Define {x}. /
Give me a short description of {x}. / Explain {x} to me. / What does {x} mean? / 
How does {x} work? / What is the meaning of {x}? / Help me understand {x}. / Do you know {x}? /
Do you know what {x} does? /
I don't understand {x}. / I found {x} in some code. What does it do? / What's {x} for? /
What's the point of {x}? / Say in one sentence what {x} does. / Summarise {x}. / Summarize {x}. /
Why would I use {x}? / What does the documentation say about {x}? / Remind me what {x} does. /
I forgot what {x} does. / Tell me what {x} is. / What happens when I use {x}? / help {x}""")
PURPOSE = phrases("""
What is the {x} module for? / What does the {x} module do? / What is the {x} module? /
What's in the {x} module? / Tell me about the {x} module. / Explain the {x} module. /
What is the module {x} for? / What can I do with the {x} module? / Describe the {x} module. /
When would I use the {x} module? / What do I use the {x} module for? / Why would I import {x}? /
What's the {x} module good for? / What does "import {x}" give me? / The {x} module? /
What is {x}? / What does {x} do? / Tell me about {x}. / Explain {x}. / What is {x} for? /
What is the purpose of the {x} module? / Give me a short description of the {x} module.""")
ARGUMENTS = phrases("""
What are the arguments of {x}? / How do I call {x}? / What arguments does {x} take? /
What is the signature of {x}? / Show me the signature of {x}. / Which parameters does {x} have? /
What parameters does {x} take? / How is {x} called? / What do I pass to {x}? / Signature of {x}? /
What are the parameters of {x}? / Give me the signature of {x}. / {x} arguments?""")
MODULE = phrases("""
Which module is {x} in? / Where do I find {x}? / What module has {x}? / Where is {x} defined? /
Which module do I import for {x}? / What do I import to use {x}? / From which module is {x}? /
Where does {x} come from? / In which module is {x}? / Which module provides {x}? / Where is {x}?""")
FITTING = phrases("""
Which Python {kind} fits this description: {text} / What is this called in Python: {text} /
Which {kind} of the standard library is this? {text} / Name the {kind} described here: {text} /
I am looking for a Python {kind}. {text} / What in the standard library does this? {text} /
Give me the name of the Python {kind} for this: {text}""")
WHICH = phrases("""
Which {kind} {text}? / What {kind} {text}? / Which Python {kind} {text}? /
Name a {kind} that {text}. /
Is there a {kind} that {text}? / I need a {kind} that {text}. / Which standard {kind} {text}?""")
FOLLOW = {
    "arguments": phrases("""And what are its arguments? / What arguments does it take? /
    How do I call it? / And its signature? / And how do I call it? / What's the signature?"""),
    "module": phrases(
        """Which module is that in? / Where do I find it? / What do I have to import? /
And where is it?"""
    ),
    "other": phrases("""And {x}? / And what about {x}? / What about {x}? / And what does {x} do? /
    How about {x}? / OK, and {x}? / Thanks. And {x}?"""),
}
SYSTEMS = phrases("""You are a helpful assistant. / Answer briefly. / You know Python well. /
You are a Python expert. / Be concise. / You help with Python's standard library. /
You are a friendly assistant. / Answer in one sentence where you can. / You help programmers.""")
START = ("In Python, ", "Please: ", "Quick question: ", "Python: ", "Hi! ", "Hello. ", "One more: ")

# Verbs that descriptions begin with, as a question needs them.
VERBS = {
    verb: verb + "s"
    for verb in phrases("""
Return/Create/Set/Get/Convert/Construct/Remove/Read/Write/Open/Close/Compute/Generate/Print/Add/
Insert/Append/Split/Join/Replace/Delete/Send/Receive/Raise/Call/Execute/Run/Start/Stop/Load/Format/
Wait/Check/Test/Compare/Determine/Find/Search/List/Make/Move/Rename/Change/Encode/Decode/Extract/
Register/Update/Clear/Block/Parse/Display/Show/Sort/Yield/Build/Draw/Open/Round/Iterate/Calculate/
Invoke/Install/Initialize/Evaluate/Enable/Disable/Emit/Download/Walk/Rotate/Shuffle/Map/Decompress""")
}
VERBS |= {"Compress": "compresses", "Copy": "copies", "Flush": "flushes", "Push": "pushes"}
VERBS |= {"Match": "matches", "Search": "searches", "Apply": "applies", "Fetch": "fetches"}
VERBS |= {
    verb + "s": verb + "s" for verb in ("Return", "Create", "Remove", "Set", "Get", "Convert")
}

# What is asked most, where the documentation's first sentence says too little by itself.
OWN = dict(
    line.split(" = ")
    for line in """
os.path.join = Join parts of a path with the separator of the operating system.
os.path = Functions that work on path names: join, split, test and normalize them.
json.dumps = Turn a Python object into a string of JSON.
json.dump = Write a Python object as JSON to a file.
json.loads = Turn a string of JSON into a Python object.
json.load = Read JSON from a file and turn it into a Python object.
dict.get = Return the value for `key`, or `default` if the key is not in the dictionary.
dict.items = Return a view of the dictionary's (key, value) pairs.
dict.setdefault = Return the value for `key`; if it is missing, first insert it as `default`.
dict.update = Add the pairs of another mapping, which overwrite those of equal keys.
list.append = Add an item to the end of the list.
list.extend = Add all items of an iterable to the end of the list.
list.insert = Insert an item before the given index.
list.pop = Remove the item at an index, by default the last one, and return it.
list.remove = Remove the first item that is equal to the given value.
list.reverse = Reverse the items of the list in place.
str.split = Split the string at a separator, or at white space, and return the list of its parts.
str.join = Join the strings of an iterable, with this string between them.
str.format = Fill the fields in braces with the arguments and return the new string.
str.encode = Return the string encoded as bytes, by default in UTF-8.
len = Return the number of items in an object.
int = Convert a number or a string to an integer.
float = Convert a number or a string to a floating point number.
str = Return an object as a string; it is also the type of text.
list = A mutable sequence; called with an iterable, it makes a list of its items.
dict = A mapping from keys to values; called, it makes a new dictionary.
set = A mutable collection of distinct hashable objects.
tuple = An immutable sequence; called with an iterable, it makes a tuple of its items.
range = An immutable sequence of numbers, often used to loop a number of times.
enumerate = Return an iterator of pairs of a count, from `start` on, and an item of the iterable.
zip = Iterate over several iterables in parallel and give tuples with an item of each one.
print = Print objects to a text stream, separated by `sep` and followed by `end`.
type = Return the type of an object, or make a new type when called with three arguments.
super = Return a proxy that passes method calls on to a parent or sibling class.
isinstance = Return whether an object is an instance of a class or of one of several classes.
property = Make an attribute that is managed by getter, setter and deleter functions.
functools.partial = Return a callable that calls a function with some arguments already given.
functools.lru_cache = Decorate a function so that the results of its latest calls are remembered.
functools.wraps = Decorate a wrapper function so that it looks like the function it wraps.
functools.reduce = Combine the items of an iterable, from left to right, with a function.
collections.defaultdict = A dictionary that makes a default value for a key that is missing.
collections.Counter = A dictionary that counts hashable objects.
collections.deque = A list-like container with fast appends and pops at both ends.
datetime.datetime = A date together with a time of day.
datetime.date = A date of year, month and day.
datetime.time = A time of day, independent of any date.
datetime.timedelta = The difference between two dates or times.
subprocess.run = Run a command, wait for it to finish and return a `CompletedProcess`.
pathlib.Path = A path of the file system, with methods that work on the file it names.
threading.Thread = A thread of control, which runs a function beside the rest of the program.
re.compile = Compile a regular expression into a pattern that can be used many times.
contextlib.contextmanager = Make a context manager of a generator function that yields once.
dataclasses.dataclass = Add `__init__`, `__repr__` and more to a class, from its fields.
typing = Support for type hints.
glob = Find the files whose names match a pattern, as a Unix shell does.
random.random = Return a random floating point number from 0.0 up to, but not including, 1.0.
contextlib.suppress = Make a context manager that suppresses the given exceptions.
input = Read a line from standard input, after printing the prompt if there is one.
pathlib.Path.glob = Yield the paths in this directory that match a pattern.
asyncio.run = Run a coroutine in a new event loop and return its result.
""".strip().splitlines()
)
COMMON = re.compile(
    r"(itertools|functools|collections|re|json|os\.path|shutil|random|math|subprocess|csv|statistics"
    r"|time|copy|glob|tempfile|textwrap|heapq|bisect|dataclasses|contextlib)\.[a-z_]+$"
    r"|(pathlib\.(Pure)?Path|datetime\.\w+|str|list|dict|set)\.[a-z]\w*$|[a-zA-Z]+$"
)
# Words that make names of nothing.
TAILS = ["", "", "", "_all", "_rows", "_path", "_text", "_items", "_files", "_fast", "2", "_with"]
INVENTED = phrases("""
blend/unfold/glimmer/whisk/sharpen/untangle/ripen/scatter_rows/melt/braid/fastjoin/smooth/gather_all/
autofix/zipline/reshape/polish/rejoin/stitch/drizzle/superscan/frobnicate/beautify/tidy/undo/teleport/
sprinkle/knit/mergefast/quickload/deepread/fold_up/skim/wander/simplify_all/hypersort/untwist/graft/
splice_in/echo_back/lookahead/shine/trim_all/rebuild/magic/guess/improve/autocorrect/summon/juggle/
crumble/safe_open/bulk_copy/turbo/vanish/translate_all/whirl/pour/stack_up/unravel/condense/foresee""")
