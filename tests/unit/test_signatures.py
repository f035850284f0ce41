"""JSON Schema from a signature, and what it accepts."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import pytest
from jsonschema import Draft202012Validator

from core4.errors import JobInvalid
from core4.signatures import Kept, check, complaint, digest, schema

if TYPE_CHECKING:
    from decimal import Decimal


def of(annotation: Any) -> Any:
    """The schema of one annotated parameter."""

    def func(x): ...  # type: ignore[no-untyped-def]

    func.__annotations__ = {"x": annotation}
    return schema(func)["properties"]["x"]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (str, {"type": "string"}),
        (bool, {"type": "boolean"}),
        (None, {"type": "null"}),
        (Any, {}),
        (object, {}),
        (list, {"type": "array"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (dict, {"type": "object"}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (Mapping[str, Any], {"type": "object"}),
        (Optional[int], {"type": ["integer", "null"]}),  # noqa: UP045
        (int | str | None, {"type": ["integer", "string", "null"]}),
        (
            Union[list[int], None],  # noqa: UP007
            {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]},
        ),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}),
        (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
        (datetime.date, {"x-python": "datetime.date"}),
        (Callable[[int], str], {"x-python": "collections.abc.Callable[[int], str]"}),
        (datetime.date | None, {"x-python": "datetime.date"}),
    ],
)
def test_annotations(annotation: Any, expected: Any) -> None:
    assert of(annotation) == expected


def example(
    self: object,
    city: str,
    days: int = 3,
    mode: Literal["a", "b"] = "a",
    price: Decimal = None,  # type: ignore[assignment] # noqa: RUF013
    tags: list[str] = None,  # type: ignore[assignment] # noqa: RUF013
    **more: Any,
) -> None:
    """Do something.

    Args:
        city: where it is
        days (int): how long

    Returns:
        nothing: at all
    """


def test_a_whole_signature() -> None:
    made = schema(example)

    Draft202012Validator.check_schema(made)
    assert made["required"] == ["city"]
    assert made["additionalProperties"] is True
    assert made["properties"] == {
        "city": {"type": "string", "description": "where it is"},
        "days": {"type": "integer", "default": 3, "description": "how long"},
        "mode": {"enum": ["a", "b"], "default": "a"},
        "price": {"x-python": "Decimal", "default": None},  # known to type checkers only; the others are kept
        "tags": {
            "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
            "default": None,
        },
    }


def test_descriptions_of_the_sphinx_form() -> None:
    def func(size: int) -> None:
        """Do.

        :param int size: how big
        """

    assert schema(func)["properties"]["size"]["description"] == "how big"


def test_a_positional_only_parameter_cannot_be_given() -> None:
    def func(self: object, x: int, /) -> None: ...

    with pytest.raises(JobInvalid, match="positional-only"):
        schema(func)


def strict(count: int, ratio: float = 0.5, flag: bool = False) -> None: ...


@pytest.mark.parametrize(
    ("args", "errors"),
    [
        ({"count": 3}, []),
        ({"count": 3, "ratio": 1}, []),
        ({"count": True}, [("/count", "True is not of type 'integer'")]),
        ({"count": "3"}, [("/count", "'3' is not of type 'integer'")]),
        ({"count": 1.5}, [("/count", "1.5 is not of type 'integer'")]),
        ({"count": 1, "flag": 1}, [("/flag", "1 is not of type 'boolean'")]),
        ({"count": 1, "ratio": None}, [("/ratio", "None is not of type 'number'")]),
        ({}, [("/count", "is required")]),
        ({"count": 1, "ration": 2}, [("/ration", "is not an argument; did you mean ratio?")]),
        ({"count": 1, "a/b~c": 2}, [("/a~1b~0c", "is not an argument")]),
        ([], [("", "[] is not of type 'object'")]),
        (None, [("", "None is not of type 'object'")]),
    ],
)
def test_check(args: Any, errors: list[tuple[str, str]]) -> None:
    found = check(schema(strict), args)

    assert [(row["pointer"], row["message"]) for row in found] == errors


def test_an_error_inside_an_argument_is_pointed_to() -> None:
    def func(rows: list[dict[str, int]]) -> None: ...

    assert check(schema(func), {"rows": [{"a": 1}, {"b": "x"}]})[0]["pointer"] == "/rows/1/b"


def test_many_errors_are_bounded() -> None:
    def func(rows: list[int]) -> None: ...

    assert len(check(schema(func), {"rows": ["x"] * 1000})) <= 20


def test_the_digest_tells_signatures_apart() -> None:
    assert digest(schema(strict)) == digest(schema(strict))
    assert digest(schema(strict)) != digest(schema(example))


def test_no_complaint_of_what_is_made_here() -> None:
    """Whatever a signature says: a worker's own schemas are accepted from it over HTTP."""

    def func(
        self: Any,
        plain: Any,
        when: datetime.date,
        choice: Literal["a", 1],
        some: list[dict[str, int | None]],
        either: str | list[list[float]] | dict[str, Any],
        *more: dict[str, bool],
        maybe: Annotated[int, "how many"] | None = None,
        given: dict[str, Any] = {"pattern": ["x"], "$ref": "http://a"},  # noqa: B006
        **further: list[int] | None,
    ) -> None:
        """Do it.

        Args:
            some: of these
        """

    assert complaint(schema(func, positional=True)) is None
    assert complaint({}) is None


def test_a_schema_refers_to_nothing_elsewhere() -> None:
    """Its author may be anybody: what is not there is an error, and nobody is asked for it."""
    assert [row["pointer"] for row in check({"$ref": "http://127.0.0.1:9/x"}, {})] == [""]
    assert check({"$defs": {"x": {"type": "object"}}, "$ref": "#/$defs/x"}, {}) == []


def test_what_is_kept_checks_the_same() -> None:
    """What checks against a schema that is kept is made once, and says what a new one says."""
    plain = schema(strict)
    kept = Kept(plain)
    for args in ({}, {"x": 1}, {"nothing": None}):
        assert check(kept, args) == check(plain, args)
    assert kept.validator is kept.validator
    assert kept == plain
