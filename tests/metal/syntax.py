"""Finds text that Metal's front end would refuse, as far as clang's C++ can tell.

Clang itself refuses pointers without an address space or with a wrong one, writes to constants, and
misspellings; there is no standard library to call. Constructs that C++ allows and Metal does not
are looked for in the syntax tree. Everything else only Apple's compiler knows.
"""

from __future__ import annotations

import re

from tests.metal import compiler
from tests.metal.capture import KernelCall

# Each a line of `-ast-dump`.
FORBIDDEN = {
    r"<AddressSpaceConversion>": "a cast changes the address space",
    # Also a literal without its f: a float in Metal, a double in CUDA and here.
    r"'double'": "double",
    r"\bGotoStmt\b": "goto",
    r"\bCXX(Try|Throw)\w+": "an exception",
    r"\bCXX(New|Delete)Expr\b": "new or delete",
    r"\bLambdaExpr\b": "a lambda",
    r"VarDecl .*\(\*": "a pointer to a function",
    r"\bCXXRecordDecl .* polymorphic\b|\bCXXMethodDecl .* virtual\b": "a virtual function",
}
# A pointer to a thread's own memory is all that clang takes without an address space. With `thread`
# spelled `volatile`, one that does not say it is one without either.
BARE = (
    r"VarDecl 0x\w+ <[^\n]*> \S+ (?:(?:used|referenced) )?\w+ "
    r"'(?![^\n]*\b(?:device|constant|volatile)\b)[^':\n]*[*&]'"
)


def complaints(call: KernelCall) -> list[str]:
    """None for a text that may well be Metal."""
    errors, tree = _parse(call)
    problems = errors + [name for sign, name in FORBIDDEN.items() if re.search(sign, tree)]
    if not errors and re.search(BARE, _parse(call, "-DMETAL_THREAD=volatile")[1]):
        problems.append("a pointer or reference without an address space")
    return problems


def _parse(call: KernelCall, *flags: str) -> tuple[list[str], str]:
    # The source is the only part of the text in this namespace.
    dump = ("-Xclang", "-ast-dump", "-Xclang", "-ast-dump-filter=shader::")
    done = compiler.check_syntax(call.text(), *dump, *flags)
    errors = re.findall(r"^.*?error: (.*)$", done.stderr, re.M)
    if done.returncode and not errors:
        raise compiler.CompileError(done.stderr)
    return errors, done.stdout
