"""What may not enter qs_lib: pickle, eval, unsafe YAML, code from the hub, and HTML with text that was not escaped.

The rules read the source; each is tried on planted lines first, so that a rule that sees nothing is noticed.
"""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "qs_lib").rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "pd.read_pickle",
}
# What may stand between the tags of an f-string: escaping, numbers, and functions whose own result is HTML made this way.
SAFE_CALLS = {
    "safe_text",
    "safe_token",
    "render",
    "overview",
    "_effect",
    "right_or_wrong",
    "_nats",
    "_shade",
    "shade",
    "len",
    "_words",
    "_likeliest",
    "current_html",
}
SAFE_NAMES = {  # file -> names that hold such results
    "html.py": {
        "words",
        "numbers",
        "cut",
        "rows",
        "head",
        "body",
        "rest",
        "read",
        "name",
        "t",
        "answers",
        "facts",
        "number",
        "n",
        "k",
        "left_out",
        "heading",
        "moved",
        "colour",
        "opened",
    },
    "inspector.py": {"body", "title", "STYLE", "place", "listed", "part", "count", "searched"},
}


def calls(node):
    """``torch.load`` for a call of it."""
    if isinstance(node, ast.Attribute):
        return f"{calls(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str, file: str = "x.py") -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{file}:{line} imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = calls(node.func)
            if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
                found.append(f"{file}:{line} calls {name}")
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None))
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and on:
                    found.append(f"{file}:{line} sets {keyword.arg}")
                if keyword.arg == "weights_only" and not on:
                    found.append(f"{file}:{line} clears weights_only")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            found += [f"{file}:{line} formats HTML"] if "<" in ast.unparse(node.func.value) else []
        if isinstance(node, ast.JoinedStr) and any("<" in p.value for p in node.values if isinstance(p, ast.Constant)):
            found += [
                f"{file}:{line} puts {ast.unparse(p.value)} into HTML"
                for p in node.values
                if isinstance(p, ast.FormattedValue) and not escaped(p, file)
            ]
    return found


def escaped(part: ast.FormattedValue, file: str) -> bool:
    """Whether a value in an f-string with tags is a number by its format, escaped, or HTML made here."""
    value = part.value
    if part.format_spec is not None:
        return ast.unparse(part.format_spec).rstrip("'\"")[-1] in "f,d%e"
    if isinstance(value, ast.IfExp):
        return all(escaped(ast.FormattedValue(v, -1, None), file) for v in (value.body, value.orelse))
    if isinstance(value, ast.BoolOp):
        return all(escaped(ast.FormattedValue(v, -1, None), file) for v in value.values)
    if isinstance(value, (ast.Constant, ast.JoinedStr)):
        return True  # a JoinedStr is looked at for itself
    if isinstance(value, ast.Call):
        name = calls(value.func)
        return name.split(".")[-1] in SAFE_CALLS or (
            isinstance(value.func, ast.Attribute)
            and value.func.attr == "join"
            and isinstance(value.func.value, ast.Constant)
        )
    if isinstance(value, ast.BinOp):
        return isinstance(value.op, (ast.Sub, ast.Mult, ast.Add)) and "text" not in ast.unparse(value)
    if isinstance(value, ast.Attribute):
        return value.attr in ("position", "problem", "difficulty")  # integers of an Episode
    return isinstance(value, ast.Name) and value.id in SAFE_NAMES.get(file, set())


PLANTED = (
    "import pickle",
    "from pickle import load",
    "import dill as p",
    "torch.load('a.pt')",
    "torch.load('a', weights_only=False)",
    "eval('1')",
    "exec(text)",
    "__import__('os')",
    "yaml.load(text)",
    "yaml.unsafe_load(text)",
    "np.load('a', allow_pickle=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=flag)",
    "subprocess.run(text, shell=True)",
    "html = f'<p>{question}</p>'",
    "html = f'<p>{e.question}</p>'",
    "html = f'<b>{token or 1}</b>'",
    "html = f'<b>{str(answer)}</b>'",
    "html = f'<td title={name!r}>'",
    "html = f'<p>{a + text}</p>'",
    "html = '<p>{}</p>'.format(x)",
)


@pytest.mark.parametrize("line", PLANTED)
def test_planted_lines_are_found(line):
    assert findings(line)


@pytest.mark.parametrize(
    "line",
    [
        "html = f'<p>{safe_text(question)}</p>'",
        "html = f'<p>{x:.2f}</p>'",
        "model.eval()",
        "f'{question}'",
        "yaml.safe_load(text)",
        "load(name, trust_remote_code=False)",
        "re.compile('a')",
    ],
)
def test_innocent_lines_are_not(line):
    assert not findings(line)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_nothing_of_it_is_in_the_library(path):
    assert not findings(path.read_text(encoding="utf-8"), path.name)


def test_an_escape_that_is_taken_out_is_found():
    """A planted fault in the real file: every call of safe_text or safe_token, one after the other."""
    source = next(p for p in SOURCES if p.name == "html.py").read_text(encoding="utf-8")
    for name in ("safe_text(", "safe_token("):
        pieces = source.split(name)
        holes = [name.join(pieces[: i + 1]) + "str(" + name.join(pieces[i + 1 :]) for i in range(len(pieces) - 1)]
        seen = [bool(findings(hole, "html.py")) for hole in holes]
        assert sum(seen) >= len(seen) - 1, "all but those whose result is joined before it meets a tag"
