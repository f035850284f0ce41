"""The source of one function as it is shipped: checked by its tree, in one form, named by its hash. Pure.

What is accepted stands on its own: exactly one top-level function without decorators that uses nothing from
around it but builtins. Nothing is executed here.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import hmac
import json
import math
import re
import symtable
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core4.errors import BadArguments, FreeName, SourceRefused

CONTEXT = "process"  # a parameter of this name gets the job's context; the word is myjobs'
SIZE = 256 * 1024  # bytes of a source
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_BITS = 4096  # of an integer: of many more Python makes no text
_DEPTH = 200  # levels of a tree: what is deeper is a bomb for whoever walks it

_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__builtins__"}
_DEBUGGERS = frozenset({"breakpoint", "set_trace"})  # by these names, whosever they are
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A function that is accepted: its name, its canonical text and what it can be called with."""

    method: str
    code: str
    parameters: tuple[str, ...]
    required: tuple[str, ...]
    any_name: bool  # it takes ``**more``
    debug: bool = False  # it calls a debugger

    @property
    def key(self) -> str:
        """SHA-256 of the text: what the source is known by."""
        return key_of(self.code)

    @property
    def wants_context(self) -> bool:
        """True if it declares the parameter that gets the job's context."""
        return CONTEXT in self.parameters

    def check_call(self, kwargs: Mapping[str, Any]) -> None:
        """Whether it can be called with these keyword arguments.

        Raises: BadArguments.
        """
        missing = [name for name in self.required if name not in kwargs and name != CONTEXT]
        unknown = [] if self.any_name else [name for name in kwargs if name not in self.parameters]
        problems = [{"pointer": f"/{name}", "message": f"{self.method} needs [{name}]"} for name in missing]
        problems += [
            {"pointer": f"/{name}", "message": f"{self.method} has no parameter [{name:.100}]"}
            for name in unknown
        ]
        if problems:
            raise BadArguments(problems[:10])


def key_of(code: str) -> str:
    """The hash that names a canonical text."""
    return hashlib.sha256(code.encode()).hexdigest()


def sign(secret: str, code: str) -> str:
    """The signature of a canonical text by the holder of `secret` (HMAC with SHA-256)."""
    return hmac.new(secret.encode(), code.encode(), hashlib.sha256).hexdigest()


def is_signed(secret: str, code: str, signature: str) -> bool:
    """True if the holder of `secret` has signed this very text."""
    return hmac.compare_digest(sign(secret, code).encode(), signature.encode("utf-8", "replace"))


def read(text: str, values: Mapping[str, Any] | None = None) -> Source:
    """The function that `text` defines, as it may stand in a file: indented, with comments and ``self``.

    Args:
        values: fill ``{name}`` in its texts: a text that is nothing else becomes the value, any JSON;
            elsewhere the value is written into the text.

    Raises: SourceRefused, FreeName.
    """
    function = _only_function(text)
    _refuse_decorators(function)
    _refuse_braces(function)
    _drop_self(function)
    _drop_annotations(function)
    for node in ast.walk(function):
        if isinstance(node, ast.Constant):
            node.kind = None  # u'text' is 'text'
    if values:
        _Fill(values).visit(function)
    return _checked(_unparsed(function))


def sent(code: str) -> Source:
    """A text that somebody sends; it must be what `read` makes of it, so that one function has one hash.

    Else what was revoked could be sent again with one comment more.

    Raises: SourceRefused, FreeName.
    """
    found = read(code)
    if found.code != code:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SourceRefused(
            f"the source is not in its one form, which `core4.sources.read` makes of it with Python {version}"
        )
    return found


def stored(code: str) -> Source:
    """A text that was accepted once; it is not changed.

    Raises: SourceRefused, FreeName.
    """
    return _checked(code)


def _checked(code: str) -> Source:
    function = _only_function(code)
    _refuse_decorators(function)
    if not NAME.fullmatch(function.name):
        raise SourceRefused(f"the name {function.name[:50]!r} is not one of ASCII letters, digits and _")
    given = function.args
    if given.posonlyargs:
        raise SourceRefused(f"{function.name} has positional-only parameters: arguments are passed by name")
    if given.vararg is not None:
        raise SourceRefused(f"{function.name} takes *{given.vararg.arg}: arguments are passed by name")
    _refuse_free_names(code, function)
    _refuse_early_names(function)
    _refuse_debug(function)
    plain = [each.arg for each in given.args]
    required = plain[: len(plain) - len(given.defaults)]
    required += [
        each.arg for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None
    ]
    names = (*plain, *(each.arg for each in given.kwonlyargs))
    return Source(
        function.name, code, names, tuple(required), given.kwarg is not None, _calls_a_debugger(function)
    )


def _calls_a_debugger(function: _Function) -> bool:
    called = [each.func for each in ast.walk(function) if isinstance(each, ast.Call)]
    plain = {each.id for each in called if isinstance(each, ast.Name)}
    return bool(plain & _DEBUGGERS or {e.attr for e in called if isinstance(e, ast.Attribute)} & _DEBUGGERS)


def _only_function(text: str) -> _Function:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise SourceRefused("the source has half of a surrogate pair") from None
    if size > SIZE:
        raise SourceRefused(f"the source has {size} bytes, {SIZE} are accepted")
    body = _parsed(text).body
    if len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return body[0]
    raise SourceRefused("the source must be one function, written with `def`, and nothing beside it")


def _parsed(text: str) -> ast.Module:
    # An indented function is the body of something: so no line of it is changed, texts in it included.
    indented = text[:1] in (" ", "\t")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes: the author has seen them
            tree = ast.parse(f"if 1:\n{text}" if indented else text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SourceRefused(f"the source is not a function that Python can read: {error}") from None
    if indented:
        block, *more = tree.body
        if more or not isinstance(block, ast.If) or block.orelse:
            raise SourceRefused("the source must be one function and nothing beside it")
        tree = ast.Module(block.body, [])
    _refuse_depth(tree)
    return tree


def _refuse_depth(tree: ast.AST) -> None:
    level: list[ast.AST] = [tree]
    for _ in range(_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    raise SourceRefused(f"the source is nested deeper than {_DEPTH} levels")


def _refuse_decorators(function: _Function) -> None:
    if function.decorator_list:
        raise SourceRefused(f"{function.name} is decorated: what that makes of it is not in its source")


def _refuse_braces(function: _Function) -> None:
    """Braces in a format (``f"{x:\\x7bname\\x7d}"``) cannot be written down: they would become code."""
    formats = [node.format_spec for node in ast.walk(function) if isinstance(node, ast.FormattedValue)]
    parts = [part for each in formats if isinstance(each, ast.JoinedStr) for part in each.values]
    if any(isinstance(part, ast.Constant) and set("{}") & set(str(part.value)) for part in parts):
        raise SourceRefused(f"{function.name} has a brace in the format of a value")


def _refuse_debug(function: _Function) -> None:
    """Python compiles nothing that gives `__debug__` another value, under whatever name of the syntax."""
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) or isinstance(getattr(node, "ctx", None), ast.Load):
            continue
        if any(value == "__debug__" for _, value in ast.iter_fields(node)):
            raise SourceRefused(f"{function.name} gives [__debug__] another value")


def _drop_self(function: _Function) -> None:
    for names in (function.args.posonlyargs, function.args.args):
        if names and names[0].arg == "self":
            used = len(function.args.posonlyargs) + len(function.args.args)
            if len(function.args.defaults) == used:
                del function.args.defaults[0]
            del names[0]
            return
        if names:
            return


def _drop_annotations(function: _Function) -> None:
    """Types are for readers; those in signatures would be looked up when the function is made."""
    _WithoutTypes().visit(function)


class _WithoutTypes(ast.NodeTransformer):
    """Takes types from signatures and variables; those of a class's own fields mean something and stay."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._bare(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._bare(node)

    def _bare(self, node: _Function) -> ast.AST:
        given = node.args
        for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if each is not None:
                each.annotation = None
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.simple:
            node.annotation = ast.Constant(None)  # not left out: without a value it makes the name local
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        for each in node.body:
            if isinstance(each, ast.AnnAssign):
                self.generic_visit(each)
            else:
                self.visit(each)
        return node


# ---------------------------------------------------------------------- free names


def _refuse_free_names(code: str, function: _Function) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = symtable.symtable(code, "<function>", "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SourceRefused(f"the source is not a function that Python can read: {error}") from None
    own = {function.name}
    for scope in _scopes(table):
        for symbol in scope.get_symbols():
            name = symbol.get_name()
            if symbol.is_declared_global():
                raise SourceRefused(f"{function.name} declares [{name}] as global: nothing is shared there")
            free = symbol.is_global() if scope is not table else symbol.is_referenced()
            if free and name not in _BUILTINS and name not in own:
                raise FreeName(_explained(name, function), name=name)


def _refuse_early_names(function: _Function) -> None:
    for node in ast.walk(function):
        if isinstance(node, ast.ClassDef):
            for name in sorted(_ClassBody(node).early - _BUILTINS - {function.name}):
                raise FreeName(_explained(name, function), name=name)


class _ClassBody(ast.NodeVisitor):
    """The body of a class in the order in which it runs.

    `early` are those of its own names that it reads before it has set them: such a read goes past the
    function around it, to where nothing is.
    """

    def __init__(self, node: ast.ClassDef) -> None:
        self._set: set[str] = set()
        self._read: set[str] = set()
        self._outer: set[str] = set()
        for each in node.body:
            self.visit(each)
        self.early = (self._read & self._set) - self._outer

    def generic_visit(self, node: ast.AST) -> None:
        # What is set comes after what it is set to.
        for _, value in sorted(ast.iter_fields(node), key=lambda field: field[0] not in ("iter", "value")):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.AST):
                    self.visit(each)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._set.add(node.id)
        elif node.id not in self._set:
            self._read.add(node.id)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.visit(ast.Name(node.target.id, ast.Load()))
        self.generic_visit(node)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self._outer.update(node.names)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def _visit_function(self, node: _Function) -> None:
        """Its body runs later, and sees nothing of the class."""
        for each in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if each is not None:
                self.visit(each)
        self._set.add(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for each in (*node.args.defaults, *node.args.kw_defaults):
            if each is not None:
                self.visit(each)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for each in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(each)
        self._set.add(node.name)

    def _visit_comprehension(self, node: Any) -> None:
        """Only the first of what it goes through is looked up in the class."""
        self.visit(node.generators[0].iter)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def visit_alias(self, node: ast.alias) -> None:
        self._set.add((node.asname or node.name).partition(".")[0])

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.type is not None:
            self.visit(node.type)
        self._set.update([node.name] if node.name else ())
        for each in node.body:
            self.visit(each)

    def _visit_capture(self, node: Any) -> None:
        self.generic_visit(node)
        self._set.update(name for name in (getattr(node, "name", None), getattr(node, "rest", None)) if name)

    visit_MatchAs = visit_MatchStar = visit_MatchMapping = _visit_capture


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    waiting = [table]
    while waiting:
        scope = waiting.pop()
        yield scope
        waiting += scope.get_children()


def _explained(name: str, function: _Function) -> str:
    lines = [node.lineno for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
    where = f" (line {min(lines)} of its source)" if lines else ""
    return (
        f"name [{name}] is not defined inside {function.name}{where}: the function runs elsewhere, alone; "
        "import inside of it, and pass values as arguments"
    )


# ---------------------------------------------------------------------- placeholders


def placeholders(text: str) -> set[str]:
    """The names in braces that texts of the function have.

    Raises: SourceRefused.
    """
    return {
        name
        for node in ast.walk(_only_function(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in _PLACEHOLDER.findall(node.value)
    }


class _Fill(ast.NodeTransformer):
    """Puts values where texts name them; they become constants and never code."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        # What is left of `{{name}}` there is a part of a text, and stays one.
        for part in node.values:
            if isinstance(part, ast.Constant):
                part.value = self._written(str(part.value))
            else:
                self.visit(part)
        node.values = [part for part in node.values if not isinstance(part, ast.Constant) or part.value]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, str):
            return node
        whole = _PLACEHOLDER.fullmatch(node.value)
        if whole and whole[1] in self._values:
            return literal(self._value(whole[1]))
        return ast.Constant(self._written(node.value))

    def _written(self, text: str) -> str:
        def put(found: re.Match[str]) -> str:
            if found[1] not in self._values:
                return found[0]
            value = self._value(found[1])
            return value if isinstance(value, str) else json.dumps(value)

        return _PLACEHOLDER.sub(put, text)

    def _value(self, name: str) -> Any:
        value = self._values[name]
        if complaint := json_complaint(value):
            raise SourceRefused(f"args_replace[{name!r}] is not JSON: {complaint}")
        return value


def literal(value: Any) -> ast.expr:
    """The expression of a JSON value."""
    if isinstance(value, Mapping):
        keys: list[ast.expr | None] = [ast.Constant(key) for key in value]
        return ast.Dict(keys, [literal(each) for each in value.values()])
    if isinstance(value, list | tuple):
        return ast.List([literal(each) for each in value], ast.Load())
    if isinstance(value, int | float) and (value < 0 or str(value) == "-0.0"):
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def json_complaint(value: Any) -> str | None:
    """Why a value has no form in JSON that gives the same value back; None if it has one."""
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > 32:
            return "it is nested deeper than 32 levels"
        if isinstance(item, Mapping):
            if odd := [key for key in item if not isinstance(key, str)]:
                return f"the key {odd[0]!r:.100} is not a text"
            waiting += [(each, depth + 1) for each in item.values()]
        elif isinstance(item, list | tuple):
            waiting += [(each, depth + 1) for each in item]
        elif isinstance(item, int) and item.bit_length() > _BITS:
            return f"a number has more than {_BITS} bits"
        elif isinstance(item, float) and not math.isfinite(item):
            return f"{item} is not a number in JSON"
        elif item is not None and not isinstance(item, str | int | float | bool):
            return f"{type(item).__name__} has no form in JSON"
    return None


def _unparsed(function: _Function) -> str:
    try:
        code = ast.unparse(ast.fix_missing_locations(ast.Module([function], []))) + "\n"
        same = ast.dump(_only_function(code)) == ast.dump(function)
    except (RecursionError, ValueError) as error:
        raise SourceRefused(f"the source cannot be written down: {error}") from None
    if not same:
        raise SourceRefused(f"{function.name} would mean something else when it is written down")
    return code


def wanted(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Of `values`, those that are named: whoever passes ``locals()`` passes more."""
    return {name: value for name, value in values.items() if name in names}
