"""The plain values that a python function gives to the attributes of a configuration, from its syntax tree."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from uniap_tune.errors import InputError

from .nemo_keys import KEYS, SWITCHES
from .source_text import SourceFile

_MOST_CALLS = 50
_LARGEST = 10**15
_TRAIN = frozenset({"global_batch_size", "micro_batch_size", "train_iters"})
_FLAT_SECTIONS = {"precision_config": "mixed_precision", "mixed_precision": "mixed_precision"}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as text, where it is given (``file:line``), and why it is not known if it is not."""

    value: str
    where: str
    unknown: str = ""


@dataclass(slots=True)
class Config:
    """Settings by path; ``base`` names the model it starts from, and where."""

    settings: dict[tuple[str, ...], Setting] = field(default_factory=dict)
    base: tuple[str, str] = ("", "")

    def put(self, path: tuple[str, ...], value: Value) -> None:
        """Gives a path a value, or all that a configuration of its own says."""
        if isinstance(value, Config):
            for inner, setting in value.settings.items():
                self.settings[(*path, *inner)] = setting
            self.base = value.base if value.base[0] else self.base
        elif value is not None and path:
            self.settings[path] = value

    def part(self, name: str) -> Config:
        """What it says below a name."""
        inner = {path[1:]: setting for path, setting in self.settings.items() if path[0] == name and path[1:]}
        return Config(inner, self.base)


Value = Config | Setting | None
Scope = dict[str, Value]


def read_settings(file: SourceFile, function: str) -> tuple[dict[tuple[str, ...], Setting], tuple[str, str]]:
    """The settings of a recipe function by path, such as ``("model", "num_layers")``, and its base model.

    Raises:
        InputError: not python, or no such function; names file and line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the recipe's style
            tree = ast.parse(file.text)
    except SyntaxError as error:
        raise InputError(f"{file.name}:{error.lineno or 1}: not python", why=error.msg, fix="correct it") from None
    except (ValueError, RecursionError, MemoryError):
        raise InputError(f"{file.name}: not python that can be read", fix="give a plainer recipe") from None
    reader = _Reader(file, tree)
    node = reader.recipe(function)
    try:
        result = reader.call(node, {})
    except RecursionError:
        raise InputError(f"{file.name}: nested too deeply", fix="give a plainer recipe") from None
    config = result if isinstance(result, Config) else Config()
    return dict(config.settings), config.base


class _Reader:
    def __init__(self, file: SourceFile, tree: ast.Module) -> None:
        self.file = file
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.calls = 0
        self.globals: Scope = {}
        self.body([node for node in tree.body if isinstance(node, ast.Assign)], self.globals)

    def where(self, node: ast.AST) -> str:
        return f"{self.file.name}:{getattr(node, 'lineno', 1)}"

    def recipe(self, name: str) -> ast.FunctionDef:
        if name:
            if name not in self.functions:
                known = ", ".join(list(self.functions)[:10]) or "none"
                raise InputError(f"{self.file.name}: has no function {name}", why=f"its functions are {known}")
            return self.functions[name]
        called = {
            node.func.id
            for function in self.functions.values()
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        public = [node for name, node in self.functions.items() if not name.startswith("_") and name not in called]
        if len(public) != 1:
            names = ", ".join(node.name for node in public[:10]) or "none"
            raise InputError(
                f"{self.file.name}: which recipe is meant is not clear",
                why=f"its functions are {names}",
                fix=f"give {self.file.name}::FUNCTION",
            )
        return public[0]

    def call(self, node: ast.FunctionDef, given: Scope) -> Value:
        self.calls += 1
        if self.calls > _MOST_CALLS:
            raise InputError(f"{self.where(node)}: {node.name} calls itself", fix="give a plainer recipe")
        scope: Scope = dict(self.globals)
        arguments = [*node.args.posonlyargs, *node.args.args]
        defaults = node.args.defaults
        for argument, default in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True):
            scope[argument.arg] = self.value(default, self.globals)
        for argument, keyword in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            scope[argument.arg] = self.value(keyword, self.globals) if keyword is not None else None
        scope |= given
        return self.body(node.body, scope)

    def body(self, statements: list[ast.stmt] | list[ast.Assign], scope: Scope) -> Value:
        """Follows statements; returns what they return. Branches are not followed: their tests are not known."""
        for node in statements:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self.assign(target, node.value, scope)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self.assign(node.target, node.value, scope)
            elif isinstance(node, ast.Return):
                return self.value(node.value, scope) if node.value is not None else None
            elif isinstance(node, ast.If | ast.For | ast.While | ast.Try | ast.With):
                self.forget(node, scope)
        return None

    def forget(self, node: ast.stmt, scope: Scope) -> None:
        """What a branch that is not followed sets is not known."""
        reason = f"the branch at {self.where(node)}"
        for inner in ast.walk(node):
            for target in inner.targets if isinstance(inner, ast.Assign) else []:
                path = _path(target)
                owner = scope.get(path[0]) if path else None
                if isinstance(owner, Config) and len(path) > 1:
                    owner.settings[path[1:]] = Setting("unknown", self.where(inner), reason)

    def assign(self, target: ast.expr, value: ast.expr, scope: Scope) -> None:
        if isinstance(target, ast.Tuple):
            return
        path = _path(target)
        if len(path) == 1:
            scope[path[0]] = self.value(value, scope)
        elif path:
            owner = scope.get(path[0])
            if not isinstance(owner, Config):
                owner = scope[path[0]] = Config()
            owner.put(path[1:], self.value(value, scope))

    def value(self, node: ast.expr, scope: Scope) -> Value:
        where = self.where(node)
        match node:
            case ast.Constant(value=value):
                return Setting("null" if value is None else str(value), where)
            case ast.Name(id=name):
                return scope.get(name) if name in scope else Setting(name, where, f"{name} at {where}")
            case ast.Attribute():
                return self.attribute(node, scope)
            case ast.Call():
                return self.called(node, scope)
            case ast.Dict(keys=keys, values=values):
                found = Config()
                for key, item in zip(keys, values, strict=True):
                    if key is None:  # {**other}
                        found.put((), self.value(item, scope))
                    elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                        found.put((key.value,), self.value(item, scope))
                return found
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
                return self.arithmetic(node, self.value(left, scope), sign, self.value(right, scope))
            case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in _COMPARE:
                return self.comparison(node, self.value(left, scope), sign, self.value(right, scope))
            case ast.List(elts=items):
                texts = [
                    inner.value for inner in (self.value(item, scope) for item in items) if isinstance(inner, Setting)
                ]
                return Setting(" ".join(texts), where)
        return self.unknown(node)

    def attribute(self, node: ast.Attribute, scope: Scope) -> Value:
        """``cfg.model.seq_length`` as it was set, else the last name (``torch.bfloat16``, ``F.silu``)."""
        path = _path(node)
        owner = scope.get(path[0]) if path else None
        if isinstance(owner, Config):
            setting = owner.settings.get(path[1:])
            if setting is not None:
                return setting
            for name in path[1:]:
                owner = owner.part(name)
            if owner.settings:
                return owner
            return Setting("unknown", self.where(node), f"{'.'.join(path)} at {self.where(node)}")
        return Setting(node.attr, self.where(node))

    def arithmetic(self, node: ast.expr, left: Value, sign: ast.operator, right: Value) -> Setting:
        numbers = _numbers(left, right)
        if numbers is not None and not (isinstance(sign, ast.FloorDiv) and numbers[1] == 0):
            result = _ARITHMETIC[type(sign)](*numbers)
            if abs(result) < _LARGEST:
                return Setting(str(result), self.where(node))
        return self.unknown(node)

    def comparison(self, node: ast.expr, left: Value, sign: ast.cmpop, right: Value) -> Setting:
        numbers = _numbers(left, right)
        if numbers is None:
            return self.unknown(node)
        return Setting(str(_COMPARE[type(sign)](*numbers)), self.where(node))

    def unknown(self, node: ast.expr) -> Setting:
        return Setting("unknown", self.where(node), f"the expression at {self.where(node)}")

    def called(self, node: ast.Call, scope: Scope) -> Value:
        given: Scope = {}
        for keyword in node.keywords:
            inner = self.value(keyword.value, scope)
            if keyword.arg is not None:
                given[keyword.arg] = inner
            elif isinstance(inner, Config):  # **kwargs
                given |= {path[0]: setting for path, setting in inner.settings.items() if len(path) == 1}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in self.functions and isinstance(node.func, ast.Name):
            parameters = [argument.arg for argument in self.functions[name].args.args]
            given = dict(zip(parameters, (self.value(a, scope) for a in node.args), strict=False)) | given
            return self.call(self.functions[name], given)
        found = Config()
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call):
            inner = self.value(node.func.value, scope)  # AutoBridge.from_hf_pretrained(…).to_megatron_provider(…)
            found.put((), inner)
        first = self.value(node.args[0], scope) if node.args else None
        path = given.get("hf_path") or first
        if name == "from_hf_pretrained" or "hf_path" in given:
            found.base = (path.value, path.where) if isinstance(path, Setting) else found.base
        elif "Provider" in name and name != "to_megatron_provider":
            found.base = (name, self.where(node))
        is_container = "Provider" in name or name.endswith(("Config", "Container")) or name in ("dict",)
        for key, value in given.items():
            found.put((key,) if is_container else _flat(key), value)
        return found


def _numbers(left: Value, right: Value) -> tuple[int, int] | None:
    """Two whole numbers, if both are."""
    texts = [side.value if isinstance(side, Setting) else "" for side in (left, right)]
    if not all(text.isascii() and text.isdecimal() and len(text) < 16 for text in texts):
        return None
    return int(texts[0]), int(texts[1])


def _flat(key: str) -> tuple[str, ...]:
    """Where a keyword of a recipe's helper function ends up."""
    if key in _TRAIN:
        return ("train", key)
    if key in _FLAT_SECTIONS:
        return (_FLAT_SECTIONS[key],)
    return ("model", key) if key in KEYS or key in SWITCHES else (key,)


def _path(node: ast.expr) -> tuple[str, ...]:
    """``cfg.model.x`` as its names; empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else ()
