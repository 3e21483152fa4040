"""Every public name is documented: the docstrings are the reference of the public files and packages.

What is asked of a public name:

- a class, a function, a method or a property: a docstring. A method may leave it to a protocol that has a method of the
  same name, or to its base class; `__init__` and `__call__` to their class. Other special methods need none.
- a public dataclass: each public field has a line under `Attributes:`, its own or that of a base class.
- a function that takes or returns tensors: a shape such as `[B, *latent]`.
- what a function raises in its own body is named under `Raises:`.
- a function with more than three parameters beside self: each of them is named in the docstring or explained under
  `Args:`, unless its name is always used for the same (PLAIN).
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CORE = Path(__file__).parents[2] / "dmdr"
PACKAGES = ("backends", "remote", "testing")
ERRORS = ("ConfigError", "TrainingError", "RewardError", "ValueError")
SHAPE = re.compile(r"\[(?!0, )\*?\w+( [+-] \d)?(, [^\]]+)?\]|\b(scalar|(any|same|this) shape)\b")  # but for [0, 1]
PLAIN = {
    "draw",
    "ctx",
    "backend",
    "sampler",
    "cond",
    "device",
    "dtype",
    "seed",
    "shape",
    "prompts",
    "columns",
    "images",
}
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Class:
    """What a class statement says."""

    node: ast.ClassDef
    file: Path

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def bases(self) -> list[str]:
        return [name for base in self.node.bases if (name := ast.unparse(base).split("[")[0].split(".")[-1])]

    @property
    def methods(self) -> dict[str, DEFINITION]:
        return {node.name: node for node in self.node.body if isinstance(node, DEFINITION)}

    @property
    def is_dataclass(self) -> bool:
        return any(ast.unparse(each).startswith("dataclass") for each in self.node.decorator_list)


@dataclass
class Surface:
    """The public files, parsed."""

    trees: Mapping[Path, ast.Module]
    classes: dict[str, Class] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file, tree in self.trees.items():
            self.classes |= {node.name: Class(node, file) for node in tree.body if isinstance(node, ast.ClassDef)}

    def ancestors(self, found: Class) -> Iterator[Class]:
        """Its base classes within the public files."""
        for name in found.bases:
            if name in self.classes:
                yield self.classes[name]
                yield from self.ancestors(self.classes[name])

    def promises(self) -> dict[str, str]:
        """Docstrings of the methods of all protocols, by name."""
        found: dict[str, str] = {}
        for each in self.classes.values():
            for name, node in each.methods.items() if "Protocol" in each.bases else ():
                found[name] = f"{found.get(name, '')}{ast.get_docstring(node) or ''}"
        return found


def public_files() -> list[Path]:
    return sorted([*CORE.glob("*.py"), *(file for name in PACKAGES for file in (CORE / name).glob("*.py"))])


def problems(surface: Surface) -> Iterator[str]:
    """What is missing, as `file:line name: what`."""
    promises = surface.promises()
    for file, tree in surface.trees.items():
        if tree.body and not ast.get_docstring(tree):
            yield f"{place(file, 1)} {file.stem}: the module has no docstring"
        for node in tree.body:
            if isinstance(node, DEFINITION) and not node.name.startswith("_"):
                yield from of_function(node, file, node.name)
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from of_class(surface, Class(node, file), promises)


def of_class(surface: Surface, found: Class, promises: Mapping[str, str]) -> Iterator[str]:
    name, ancestors = found.node.name, list(surface.ancestors(found))
    if not found.doc:
        yield f"{place(found.file, found.node.lineno)} {name}: no docstring"
    said = "\n".join([found.doc, *(each.doc for each in ancestors)])
    for node in found.node.body if found.is_dataclass else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            entry, plain = node.target.id, "ClassVar" not in ast.unparse(node.annotation)
            if plain and not entry.startswith("_") and not explained(entry, said):
                yield f"{place(found.file, node.lineno)} {name}.{entry}: no line under Attributes:"
    for method, definition in found.methods.items():
        if method in ("__init__", "__post_init__", "__call__"):
            yield from of_function(definition, found.file, f"{name}.{method}", inherited=said)
        elif not method.startswith("_"):
            own = [ast.get_docstring(each.methods[method]) or "" for each in ancestors if method in each.methods]
            inherited = "\n".join([promises.get(method, ""), *own]).strip()
            yield from of_function(definition, found.file, f"{name}.{method}", inherited=inherited)


def of_function(node: DEFINITION, file: Path, name: str, *, inherited: str = "") -> Iterator[str]:
    """What its docstring lacks, with the one that it inherits."""
    where = f"{place(file, node.lineno)} {name}"
    doc = f"{ast.get_docstring(node) or ''}\n{inherited}".strip()
    if not doc:
        yield f"{where}: no docstring"
        return
    annotations = [arg.annotation for arg in arguments(node)] + [node.returns]
    tensors = [each for each in annotations if each is not None and re.search(r"\bTensor\b", ast.unparse(each))]
    if tensors and not SHAPE.search(doc):
        yield f"{where}: takes or returns tensors, but says no shape, as in [B, *latent]"
    for error in sorted(raised(node)):
        if not re.search(rf"Raises:.*\b{error}\b", doc, re.DOTALL):
            yield f"{where}: raises {error}, but does not say so under Raises:"
    told = [arg.arg for arg in arguments(node) if not mentioned(arg.arg, doc)]
    if len(arguments(node)) > 3 and told:
        yield f"{where}: does not explain {', '.join(told)}"


def arguments(node: DEFINITION) -> list[ast.arg]:
    """All but self and cls, *args and **kwargs."""
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [arg for arg in found if arg.arg not in ("self", "cls")]


def raised(node: DEFINITION) -> set[str]:
    """Errors of ours that its own body raises; not those of functions inside it."""
    found, waiting = set(), list(node.body)
    while waiting:
        part = waiting.pop()
        if isinstance(part, DEFINITION | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call):
            found.add(ast.unparse(part.exc.func).split(".")[-1])
        waiting += ast.iter_child_nodes(part)  # type: ignore[arg-type]
    return found & set(ERRORS)


def explained(name: str, doc: str) -> bool:
    """Whether a line of `Attributes:` or `Args:` begins with this name, alone or among several."""
    return bool(re.search(rf"^\s+(\w+, )*{name}(, \w+)*: \S", doc, re.MULTILINE))


def mentioned(name: str, doc: str) -> bool:
    """Whether a parameter is plain, or a word of the docstring."""
    return name in PLAIN or bool(re.search(rf"\b{name}\b", doc))


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(CORE.parent)}:{line}"


def test_every_public_name_is_documented() -> None:
    surface = Surface({file: ast.parse(file.read_text(encoding="utf-8")) for file in public_files()})
    found = list(problems(surface))
    assert not found, f"{len(found)} names are not documented:\n" + "\n".join(found)


BAD = '''
"""A module."""

class Thing:
    def turn(self, x): ...

@dataclass
class Pair:
    """Two numbers.

    Attributes:
        first: The first.
    """

    first: int
    second: int

def scale(x: Tensor, by: float) -> Tensor:
    """x times a number."""
    if by < 0:
        raise ValueError("negative")

def many(a, b, c, d):
    """Of a, b and c."""
'''


def test_what_is_missing_is_named() -> None:
    file = CORE / "bad.py"
    assert list(problems(Surface({file: ast.parse(BAD.strip())}))) == [
        "dmdr/bad.py:3 Thing: no docstring",
        "dmdr/bad.py:4 Thing.turn: no docstring",
        "dmdr/bad.py:15 Pair.second: no line under Attributes:",
        "dmdr/bad.py:17 scale: takes or returns tensors, but says no shape, as in [B, *latent]",
        "dmdr/bad.py:17 scale: raises ValueError, but does not say so under Raises:",
        "dmdr/bad.py:22 many: does not explain d",
    ]
