"""Print the figures of the house: ``python tests/house.py [folder]`` reads ``folder/qs_lib``, in wings or flat.

``tests/test_house.py`` holds the bounds. Nothing is imported from the library, so any checkout can be measured.
"""

import ast
import io
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Floors from the ground up. A wing (folder or file) imports only from the floors below its own.
ORDER = (
    "errors < stats, files, settings < thoughts < data, mixing < model, champion < evaluation < training, viewing "
    "< workbook < experiments"
)
FLOORS = [floor.split(", ") for floor in ORDER.split(" < ")]
ENTRY_POINTS = {"main"}  # what `python -m` calls, in every file that it can run
REASON = 5  # words a comment needs at least to be a reason


class Function(NamedTuple):
    """One ``def``: where it stands, its lines, its parameters, and the comment that excuses them."""

    file: str
    name: str
    lines: int
    parameters: int
    reason: str

    def __str__(self):
        return f"{self.file}: {self.name}, {self.lines} lines, {self.parameters} parameters"


class Import(NamedTuple):
    """One file that imports another, both as dotted names below ``qs_lib``."""

    file: str
    imported: str

    @property
    def wings(self) -> tuple[str, str]:
        return self.file.split(".")[0], self.imported.split(".")[0]


def sources(root: Path) -> dict[str, str]:
    """Return the text of every file of ``root/qs_lib``, by path below it."""
    library = root / "qs_lib"
    return {path.relative_to(library).as_posix(): path.read_text("utf-8") for path in sorted(library.rglob("*.py"))}


@cache
def tree(text: str) -> ast.Module:
    """Return the parsed source, parsed once."""
    return ast.parse(text)


def imports(files: dict[str, str]) -> list[Import]:
    """Return which file imports which, each pair once. ``__init__`` files may import anything and are left out."""
    modules = {dotted(path) for path in files}
    found = set()
    for path, text in files.items():
        file = dotted(path)
        if path.endswith("__init__.py"):
            continue
        for node in ast.walk(tree(text)):
            for name in imported_names(node, file):
                while name and name not in modules:
                    name = name.rpartition(".")[0]
                found.add(Import(file, name or "__init__"))
    return sorted(pair for pair in found if pair.file != pair.imported)


def dotted(path: str) -> str:
    """Return the module of a path below ``qs_lib``: ``data.tokens``, a wing's ``__init__`` as the wing itself."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported_names(node, file: str) -> list[str]:
    """Return the names below ``qs_lib`` that an import statement may load, in a file called ``file``."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = ["qs_lib", *file.split(".")]
        start = ".".join(package[: len(package) - node.level]) if node.level else ""
        start = ".".join(filter(None, [start, node.module]))
        names = [f"{start}.{alias.name}" for alias in node.names]
    else:
        return []
    return [name.partition(".")[2] for name in names if name.split(".")[0] == "qs_lib"]


def wrong_imports(files: dict[str, str]) -> list[str]:
    """Return one line for each import that does not go to a lower floor, and for each wing that has no floor."""
    floor = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
    homeless = {dotted(path).split(".")[0] for path in files} - set(floor) - {"__init__"}
    wrong = [f"{wing} has no floor" for wing in sorted(homeless)]
    for pair in imports(files):
        upper, lower = pair.wings
        if upper != lower and not homeless & {upper, lower} and floor[upper] <= floor.get(lower, len(FLOORS)):
            wrong.append(f"{pair.file} imports {pair.imported}")
    return wrong


def functions(files: dict[str, str]) -> list[Function]:
    """Return every function and method of the library."""
    found = []
    for path, text in files.items():
        comments = comment_lines(text)
        for node in ast.walk(tree(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                found.append(Function(path, node.name, lines, parameters(node), reason(node, comments)))
    return found


def parameters(function) -> int:
    """Return how many parameters a function takes, ``self`` and ``cls`` left out, ``**rest`` counted as one."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([n for n in names if n not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


def reason(function, comments: dict[int, str]) -> str:
    """Return the comment right above a function, or the one with which its body begins; "" where there is none."""
    above, line = [], min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 1
    while line in comments:
        above.insert(0, comments[line])
        line -= 1
    inside = [comments[n] for n in body_top(function) if n in comments]
    said = [" ".join(part) for part in (above, inside)]
    return next((text for text in said if len(text.split()) >= REASON), "")


def body_top(function) -> range:
    """Return the lines before the first statement of a body: after its docstring, or else after its signature."""
    first, *rest = function.body
    if ast.get_docstring(function) is not None:
        return range(first.end_lineno + 1, rest[0].lineno if rest else function.end_lineno + 1)
    given = function.args
    signed = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return range(max([function.lineno, *(a.end_lineno for a in signed if a)]) + 1, first.lineno)


@cache
def comment_lines(text: str) -> dict[int, str]:
    """Return the comments that stand alone on their lines, by line number."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            found[token.start[0]] = token.string.lstrip("# ")
    return found


def docstrings(files: dict[str, str]) -> list[str]:
    """Return the docstrings of all modules, classes and functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for text in files.values() for node in ast.walk(tree(text)) if isinstance(node, kinds)]
    return [text for text in map(ast.get_docstring, nodes) if text]


def semicolons(files: dict[str, str]) -> float:
    """Return the number of semicolons in 1,000 words of docstring."""
    text = " ".join(docstrings(files))
    return 1000 * text.count(";") / max(1, len(text.split()))


def top_level_names(text: str) -> set[str]:
    """Return what a file defines at its top level, imports left out."""
    names, nodes = set(), list(tree(text).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            nodes += ast.iter_child_nodes(node)
    return {name for name in names if not name.startswith("__")}


def defined_twice(files: dict[str, str], public: bool = True) -> dict[str, list[str]]:
    """Return the names that two or more files define, with these files. ``public``: only those without underscore."""
    where = {}
    for path, text in files.items():
        for name in top_level_names(text) - ENTRY_POINTS:
            where.setdefault(name, []).append(path)
    return {n: p for n, p in sorted(where.items()) if len(p) > 1 and not (public and n.startswith("_"))}


def first_floor(root: Path) -> tuple[list[str], list[str]]:
    """Return the folders and the files that lie directly in ``root/qs_lib``."""
    entries = [p for p in sorted((root / "qs_lib").iterdir()) if not p.name.startswith((".", "__pycache__"))]
    return [p.name for p in entries if p.is_dir()], [p.name for p in entries if p.is_file()]


AIM = 10_200  # lines of the library


def lines(files: dict[str, str]) -> dict[str, int]:
    """Return the number of lines of each file."""
    return {path: text.count("\n") for path, text in files.items()}


def skips(files: dict[str, str]) -> int:
    """Return how often the formatter is told to leave something alone."""
    return sum(text.count("fmt: skip") + text.count("fmt: off") for text in files.values())


def too_long(files: dict[str, str], most: int = 60) -> list[Function]:
    """Return the functions of more than ``most`` lines that give no reason."""
    return [f for f in functions(files) if f.lines > most and not f.reason]


def too_wide(files: dict[str, str], most: int = 10) -> list[Function]:
    """Return the functions of more than ``most`` parameters that give no reason."""
    return [f for f in functions(files) if f.parameters > most and not f.reason]


def figures(root: Path) -> dict[str, str]:
    """Return all figures of a checkout as text, by name."""
    files = sources(root)
    pairs, every, length = imports(files), functions(files), lines(files)
    across = [pair for pair in pairs if pair.wings[0] != pair.wings[1]]
    folders, flat = first_floor(root)
    longest, widest = max(every, key=lambda f: f.lines), max(every, key=lambda f: f.parameters)
    public, both = defined_twice(files), defined_twice(files, public=False)
    total = sum(length.values())
    return {
        "files": str(len([path for path in files if not path.endswith("__init__.py")])),
        "first floor": f"{len(folders)} folders, {len(flat)} files",
        "imports between files": str(len(pairs)),
        "imports between wings": f"{len(across)} ({len({pair.wings for pair in across})} pairs of wings)",
        "imports against the order": str(len(wrong_imports(files))) if folders else "no wings",
        "longest function": str(longest),
        "functions above 60 lines": f"{sum(f.lines > 60 for f in every)}, {len(too_long(files))} without a reason",
        "widest signature": str(widest),
        "signatures above 10": f"{sum(f.parameters > 10 for f in every)}, {len(too_wide(files))} without a reason",
        "longest file": "{}, {} lines".format(*max(length.items(), key=lambda item: item[1])),
        "files above 450 lines": str(sum(n > 450 for n in length.values())),
        "semicolons per 1,000 words": f"{semicolons(files):.1f}",
        "fmt: skip": str(skips(files)),
        "names defined twice": f"{len(public)} public, {len(both)} in all",
        "lines": f"{total:,} (aim: below {AIM:,}, {'reached' if total < AIM else 'not reached'})",
    }


if __name__ == "__main__":
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    for name, value in figures(checkout).items():
        print(f"{name:28}{value}")
    print("public names defined twice: ", ", ".join(defined_twice(sources(checkout))) or "none")
