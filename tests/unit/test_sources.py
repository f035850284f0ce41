"""The source of a function: what is accepted, its one form, and what values become in it."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core4 import sources
from core4.actions import signature_path, verified
from core4.errors import BadArguments, FreeName, SourceRefused

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_one_form_for_all_ways_of_writing() -> None:
    """Comments, types, indentation and `self` are not part of it."""
    plain = sources.read("def f(a, b=1):\n    return a + b\n")
    fancy = sources.read("    def f(self, a: int, b: 'No' = 1) -> Any:  # adds\n\n        return (a + b)\n")

    assert fancy == plain
    assert sources.stored(plain.code) == plain
    assert plain.key == sources.key_of(plain.code)
    assert (plain.parameters, plain.required) == (("a", "b"), ("a",))


def test_only_a_leading_self_is_dropped() -> None:
    found = sources.read("def f(self=1, itself=2, *, self_=3): return 'self, ', itself, self_")

    assert found.parameters == ("itself", "self_")
    assert "'self, '" in found.code


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    import math\n    return math.pi",
        "def f(n):\n    return n and f(n - 1)",
        "def f():\n    class A:\n        x: int = 3\n    return A().x",
        "def f():\n    def g(n: Unknown): return n\n    return [g(each) for each in range(3)]",
        "async def f():\n    import asyncio\n    await asyncio.sleep(0)",
        "def f(**more):\n    n: Unknown = 1\n    return {**more, 'n': n}",
        "def f():\n    from os import path as p\n    return (lambda q: (p, q))(1), __name__",
    ],
)
def test_what_stands_on_its_own_is_accepted(text: str) -> None:
    compile(sources.read(text).code, "f", "exec")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("def f(): return LIMIT", "LIMIT"),
        ("def f(a=LIMIT): pass", "LIMIT"),
        ("def f():\n    def g():\n        return deep\n    return g", "deep"),
        ("def f():\n    return [each for each in these]", "these"),
        ("def f(): return __file__", "__file__"),
    ],
)
def test_a_free_name_is_refused(text: str, name: str) -> None:
    with pytest.raises(FreeName, match=rf"name \[{name}\]"):
        sources.read(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "f = lambda: 1", "class A: pass", "def f(): pass\nf()", "@a\ndef f(): pass"),
        *("def f(): global x; x = 1", "def f(*a): pass", "def f(a, /): pass", "def f(", "def \xe4(): pass"),
        *("def f(): return '\ud800'", "def f(): return " + "(" * 300 + ")" * 300, "def f():\n  '\0'"),
        *(" def f():\n  pass\nx=1\n", " def f():\n  pass\nelse:\n  x=1\n", " def f(): pass\nelif 1: pass"),
        "def f(): return " + "-" * 500 + "1",
        "def f(): return '" + "x" * sources.SIZE + "'",
    ],
)
def test_what_is_no_plain_function_is_refused(text: str) -> None:
    with pytest.raises(SourceRefused):
        sources.read(text)
    with pytest.raises(SourceRefused):
        sources.stored(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x = x", "x"),
        ("x += 1", "x"),
        ("y = x\n  x = 1", "x"),
        ("x = [each for each in x]", "x"),
        ("def x(a=x): pass", "x"),
        ("class x(x): pass", "x"),
        ("for x in x: pass", "x"),
        ("del x\n  x = 1", "x"),
    ],
)
def test_a_class_reads_its_own_names_after_it_has_set_them(text: str, name: str) -> None:
    """What it reads before comes from outside of the function, not from around the class."""
    with pytest.raises(FreeName, match=rf"name \[{name}\]"):
        sources.read(f"def f(x):\n class A:\n  {text}")


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n  y = x + 1\n  x += y",
        "for i in range(3): y = i",
        "import os.path as p, os\n  q = p, os",
        "def x(self): return 1\n  y = property(x)",
        "int = int\n  f = f",
        "try: pass\n  except ValueError as e: y = e",
        "match 1:\n   case [*x]: y = x\n   case {**z}: y = z\n   case w: y = w",
        "nonlocal x\n  x = x + 1",
        "with open('a') as b: y = b",
        "y = lambda a=1: z\n  z = 1",
        "y = (z := 1), z",
    ],
)
def test_a_class_that_sets_its_names_first_is_accepted(text: str) -> None:
    before = " z = 0\n" if "lambda" in text else ""
    compile(sources.read(f"def f(x):\n{before} class A:\n  {text}").code, "f", "exec")


@pytest.mark.parametrize(
    "text",
    [
        *("__debug__ = 1", "def __debug__(): pass", "import os as __debug__", "print(__debug__=1)"),
        *("x.__debug__ = 1", "g = lambda __debug__: 1", "for __debug__ in x: pass"),
    ],
)
def test_what_cannot_be_compiled_is_refused(text: str) -> None:
    with pytest.raises(SourceRefused):
        sources.stored(f"def f(x):\n {text}\n")
    assert sources.stored("def f(x):\n return __debug__, x.__debug__\n").method == "f"


@pytest.mark.parametrize(
    "text",
    [
        "return f'{x:\\x7bcity\\x7d}'",
        "return f'{x:\\173city\\175}'",
        "return f'{x:{y}\\x7bcity\\x7d}'",
        "return f'{x:\\N{LEFT CURLY BRACKET}city\\N{RIGHT CURLY BRACKET}}'",
    ],
)
@pytest.mark.parametrize("values", [{}, {"city": "{__import__('os').getpid()}"}])
def test_a_brace_in_a_format_is_refused(text: str, values: dict[str, str]) -> None:
    """Written down it would be code, or something else."""
    with pytest.raises(SourceRefused, match="brace in the format"):
        sources.read(f"def f(x, y=1):\n {text}", values)


def test_a_value_that_would_be_read_as_something_else_is_refused() -> None:
    text = "def f(x):\n match x:\n  case '{city}': return 1"

    assert sources.read(text, {"city": "Bern"}).method == "f"
    with pytest.raises(SourceRefused, match="something else"):
        sources.read(text, {"city": {"a": 1}})


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    return 1\n#\n",
        "def f():\n    return 1",
        "def f():\n    return (1)\n",
        "def f():\n    return  1\n",
        "def f():\n    return u'a'\n",
        "def f(a: int):\n    return 1\n",
        "def f(self):\n    return 1\n",
        "def f(): return 1\n",
        " def f():\n    return 1\n",
    ],
)
def test_a_function_has_one_form(code: str) -> None:
    """Else what was revoked could be sent again with one comment more."""
    with pytest.raises(SourceRefused, match="not in its one form"):
        sources.sent(code)
    found = sources.read(code)
    assert sources.sent(found.code) == found


def test_large_numbers_are_values() -> None:
    found = sources.read("def f(): return '{a}', '{b}'", {"a": -(10**400), "b": -0.0})
    scope: dict[str, Any] = {}
    exec(found.code, scope)

    assert scope["f"]()[0] == -(10**400)
    for value in (10**5000, [-(10**5000)]):
        with pytest.raises(SourceRefused, match="more than 4096 bits"):
            sources.read("def f(): return '{a}'", {"a": value})


@given(JSON)
def test_a_value_becomes_itself(value: Any) -> None:
    """Whatever it is: a constant, and never code."""
    found = sources.read("def f(): return '{value}'", {"value": value})
    scope: dict[str, Any] = {}
    exec(found.code, scope)

    assert json.dumps(scope["f"]()) == json.dumps(value)


@given(st.text(), st.text())
def test_a_text_in_a_text_stays_one(value: str, other: str) -> None:
    """Braces in a value are not filled again."""
    text = "def f(): return 'a {value} b {other} {{c}}', f'{{value}}'"
    try:
        found = sources.read(text, {"value": value, "other": other})
    except SourceRefused:
        assert any("\ud800" <= char <= "\udfff" for char in value + other)
        return
    scope: dict[str, Any] = {}
    exec(found.code, scope)

    assert scope["f"]() == (f"a {value} b {other} {{{{c}}}}", value)
    assert not [node for node in ast.walk(ast.parse(found.code)) if isinstance(node, ast.Call)]


def test_values_that_nobody_names_may_be_anything() -> None:
    names = sources.placeholders("def f(): return '{a} {b}'")

    assert names == {"a", "b"}
    assert sources.wanted({"a": 1, "c": object()}, names) == {"a": 1}


@pytest.mark.parametrize("value", [{1}, object(), b"", float("inf"), {1: 2}, [[set()]]])
def test_a_value_that_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises(SourceRefused, match="is not JSON"):
        sources.read("def f(): return '{a}'", {"a": value})


def test_a_call_has_to_fit() -> None:
    found = sources.read("def f(a, process, b=1, *, c): pass")

    found.check_call({"a": 1, "c": 2})
    with pytest.raises(BadArguments, match=r"needs \[c\]"):
        found.check_call({"a": 1})
    with pytest.raises(BadArguments, match=r"no parameter \[d\]"):
        found.check_call({"a": 1, "c": 1, "d": 1})
    assert found.wants_context


def action(code: str, secret: str = "s") -> tuple[dict[str, Any], dict[str, Any]]:
    """An action that Ann has signed, and a job that calls it."""
    found = sources.read(code)
    _, _, mine = signature_path("Ann").partition(".")
    signature = {"by": "Ann", "signer": "key", "signature": sources.sign(secret, found.code)}
    stored = {"_id": found.key, "code": found.code, "signatures": {mine: signature}, "revoked": None}
    return stored, {"key": found.key, "method": found.method, "by": "ann", "signer": "key"}


def test_what_is_signed_is_run() -> None:
    stored, job = action("def f(): return 1")

    assert verified(stored, job, {"key": "s"}).method == "f"


@pytest.mark.parametrize(
    ("fields", "of_job", "keys"),
    [
        ({"code": "def f():\n    return 2\n"}, {}, {"key": "s"}),
        ({"_id": "0" * 64}, {}, {"key": "s"}),
        ({"signatures": {}}, {}, {"key": "s"}),
        ({"revoked": {"by": "bob"}}, {}, {"key": "s"}),
        ({}, {"key": "0" * 64}, {"key": "s"}),
        ({}, {"by": "eve"}, {"key": "s"}),
        ({}, {"method": "g"}, {"key": "s"}),
        ({}, {"signer": "other"}, {"key": "s", "other": "s"}),
        ({}, {}, {"key": "t"}),
        ({}, {}, {}),
    ],
)
def test_all_else_is_refused(fields: dict[str, Any], of_job: dict[str, Any], keys: dict[str, str]) -> None:
    stored, job = action("def f(): return 1")

    with pytest.raises(SourceRefused):
        verified({**stored, **fields}, {**job, **of_job}, keys)
