"""Texts that the front end must refuse, each beside the same text as it should be."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.metal.emulator import needs_clang
from tests.metal.small import one_kernel
from tests.metal.syntax import complaints

pytestmark = needs_clang

DEVICE = "inline float f(const device float* p) { return p[0]; }"
THREAD = "inline float f(const thread float* p) { return p[0]; }"
NO_MATCH = "no matching function"
NO_SPACE = "without an address space"

# what is wrong, body, header, complaint, the body and the header as they should be
CASES = [
    (
        "unqualified pointer to a buffer",
        *("const float* p = a; y[0] = p[0];", "", "cannot initialize"),
        *("const device float* p = a; y[0] = p[0];", ""),
    ),
    (
        "unqualified pointer to a thread's own",
        *("float v[2] = {1.0f, 2.0f}; const float* p = v; y[0] = p[1];", "", NO_SPACE),
        *("float v[2] = {1.0f, 2.0f}; const thread float* p = v; y[0] = p[1];", ""),
    ),
    (
        "unqualified parameter of a template",
        "float v[2] = {1.0f, 2.0f}; y[0] = f(v);",
        "template <class T> inline T f(const T* p) { return p[0]; }",
        NO_SPACE,
        "float v[2] = {1.0f, 2.0f}; y[0] = f(v);",
        "template <class T> inline T f(const thread T* p) { return p[0]; }",
    ),
    (
        "unqualified reference",
        "float v = 1.0f; f(v); y[0] = v;",
        "inline void f(float& v) { v = 2.0f; }",
        NO_SPACE,
        "float v = 1.0f; f(v); y[0] = v;",
        "inline void f(thread float& v) { v = 2.0f; }",
    ),
    (
        "thread memory for device",
        *("float v[2] = {1.0f, 2.0f}; y[0] = f(v);", DEVICE, NO_MATCH),
        *("float v[2] = {1.0f, 2.0f}; y[0] = f(v);", THREAD),
    ),
    (
        "device memory for thread",
        *("y[0] = f(a);", THREAD, NO_MATCH),
        *("y[0] = f(a);", DEVICE),
    ),
    (
        "threadgroup memory for thread",
        *("threadgroup float v[2]; v[0] = 1.0f; y[0] = f(v);", THREAD, NO_MATCH),
        *("float v[2]; v[0] = 1.0f; y[0] = f(v);", THREAD),
    ),
    (
        "threadgroup memory for device",
        *("threadgroup float v[2]; v[0] = 1.0f; y[0] = f(v);", DEVICE, NO_MATCH),
        *("threadgroup float v[2]; v[0] = 1.0f; y[0] = f(a) + v[0];", DEVICE),
    ),
    (
        "write to an input",
        *("a[0] = 1.0f; y[0] = 1.0f;", "", "not assignable"),
        *("y[0] = 1.0f;", ""),
    ),
    (
        "cast from device to thread",
        *("y[0] = ((const thread float*)a)[0];", "", "a cast changes the address space"),
        *("y[0] = float(((const device uint*)a)[0]);", ""),
    ),
    (
        "cast from device to constant",
        *("y[0] = ((const constant float*)a)[0];", "", "a cast changes the address space"),
        *("y[0] = ((const device float*)a)[0];", ""),
    ),
    ("double", *("y[0] = a[0] * 0.5;", "", "double"), *("y[0] = a[0] * 0.5f;", "")),
    (
        "two types for max",
        *("y[0] = metal::max(a[0], 1);", "", NO_MATCH),
        *("y[0] = metal::max(a[0], 1.0f);", ""),
    ),
    ("libc", *("y[0] = expf(a[0]);", "", "undeclared"), *("y[0] = metal::exp(a[0]);", "")),
    ("std", *("y[0] = std::exp(a[0]);", "", "std"), *("y[0] = metal::exp(a[0]);", "")),
    ("goto", *("goto end; end: y[0] = a[0];", "", "goto"), *("y[0] = a[0];", "")),
    (
        "a lambda",
        *("auto f = [](float v) { return v; }; y[0] = f(a[0]);", "", "a lambda"),
        *("y[0] = a[0];", ""),
    ),
    (
        "a pointer to a function",
        *("float (*p)(float) = f; y[0] = p(a[0]);", "inline float f(float v) { return v; }"),
        "a pointer to a function",
        *("y[0] = f(a[0]);", "inline float f(float v) { return v; }"),
    ),
    ("new", *("y[0] = (new float[2])[0];", "", "new or delete"), *("y[0] = a[0];", "")),
    ("throw", *("if (a[0] > 0.0f) throw 1;", "", "an exception"), *("y[0] = a[0];", "")),
    (
        "a virtual function",
        "S s; y[0] = s.f();",
        "struct S { virtual float f() { return 1.0f; } };",
        "a virtual function",
        "S s; y[0] = s.f();",
        "struct S { float f() { return 1.0f; } };",
    ),
]


@pytest.mark.parametrize(
    ("body", "header", "complaint", "good_body", "good_header"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_refused(body: str, header: str, complaint: str, good_body: str, good_header: str) -> None:
    a = [mx.zeros((64,))]
    assert any(complaint in text for text in complaints(one_kernel(body, a, header=header)))
    assert complaints(one_kernel(good_body, a, header=good_header)) == []


def test_small_inputs_are_constant() -> None:
    """MLX puts inputs of fewer than 8 elements into another address space: what works with 8
    experts chosen does not compile with 7."""
    for elements, good in ((7, False), (8, True)):
        call = one_kernel("y[0] = f(a);", [mx.zeros((elements,))], header=DEVICE)
        assert (complaints(call) == []) is good
