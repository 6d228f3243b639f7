"""Seven ways of reasoning, each with a body of its own, written and checked by programs.

A worked body is built from a problem's equations, so the same seven programs serve the pocket task and GSM8K. Bodies
are written in plain words (``think parts 8 5 step 8 + 5 = 13 done``). ``tokens.mark`` turns the words into thinking
tokens, which keeps the prompted teacher's text and the student's text aligned one to one.
"""

import ast
import hashlib
import operator
import random
import re
from collections.abc import Sequence
from fractions import Fraction

from ..errors import WorkbookError, at_least
from . import Problem
from .tokens import in_words

STRATEGIES = ("mece", "falsification", "expert", "orthogonal", "doubt", "bayesian", "multidomain")
PROMPTS = {
    "cot": "work it out step by step .",
    "mece": "list all the parts first .",
    "falsification": "try to refute the claim .",
    "expert": "think as an expert does .",
    "orthogonal": "start from the other end .",
    "doubt": "doubt it and check again .",
    "bayesian": "update the odds as you go .",
    "multidomain": "take each field by itself .",
}
OPERATIONS = {"+": "plus", "-": "minus", "*": "times", "/": "over"}
LEAD_WORDS = ("back", "odds", "fields", "so", *OPERATIONS.values())
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SIGN_OF = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_OPENINGS = {"parts": "mece", "refute": "falsification", "expert": "expert"}
_OPENINGS |= {"reason back": "orthogonal", "reason odds": "bayesian", "reason fields": "multidomain"}


def exact_value(expression: str) -> Fraction:
    """Compute an arithmetic expression of numbers and + - * / ( ). Raises ``ValueError`` on anything else."""

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in SIGN_OF:
            return ARITHMETIC[SIGN_OF[type(node.op)]](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return Fraction(str(node.value))
        raise ValueError(f"not plain arithmetic: {expression!r}")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"not plain arithmetic: {expression!r}") from error


def operands(equation: str) -> list[str]:
    """Return the numbers left of the equals sign."""
    return [t for t in equation.split("=")[0].replace("(", " ").replace(")", " ").split() if t not in OPERATIONS]


def signs(equation: str) -> list[str]:
    """Return the operation signs left of the equals sign."""
    return [t for t in equation.split("=")[0].split() if t in OPERATIONS]


def result(equation: str) -> str:
    """Return the number right of the equals sign."""
    return equation.split("=")[1].strip()


def holds(equation: str) -> bool:
    """Return whether an equation is true to a cent. Raises ``ValueError`` if it is not plain arithmetic."""
    left, _, right = equation.partition("=")
    return abs(exact_value(left) - exact_value(right)) <= Fraction(1, 100)


def fresh_operands(steps: list[str]) -> list[list[str]]:
    """Return for each step the operands that no earlier step computed."""
    return [[x for x in operands(step) if x not in map(result, steps[:i])] for i, step in enumerate(steps)]


def _separate(steps: list[str]) -> int:
    """Count the steps that use no earlier result; the first one never does."""
    return sum(len(fresh) == len(operands(step)) for fresh, step in zip(fresh_operands(steps), steps, strict=True))


def inverse(equation: str) -> str | None:
    """Return the check of a two-operand equation by its inverse operation (9 + 8 = 17 -> 17 - 8 = 9).

    None for another equation, and where a rounded result (100 / 7 = 14.29) would make the check false.
    """
    numbers, ops = operands(equation), signs(equation)
    if len(numbers) != 2 or len(ops) != 1 or (ops[0] == "*" and float(numbers[1]) == 0):
        return None
    back = {"+": "-", "-": "+", "*": "/", "/": "*"}[ops[0]]
    check = f"{result(equation)} {back} {numbers[1]} = {numbers[0]}"
    return check if holds(check) else None


def fitting(steps: list[str]) -> list[str]:
    """Return the strategies whose program applies to these steps, in order (for data without families)."""
    ops = {sign for step in steps for sign in signs(step)}
    conditions = {
        "mece": set(signs(steps[-1])) == {"+"},
        "falsification": True,
        "expert": bool(ops),
        "orthogonal": ops <= {"+", "-"},
        "doubt": inverse(steps[-1]) is not None,
        "bayesian": len(steps) > 1 and _separate(steps) == 1,
        "multidomain": _separate(steps) > 1,
    }
    return [s for s in STRATEGIES if conditions[s]]


def body(strategy: str, steps: list[str], lead: list[str] = ()) -> str:
    """Write the worked thought in plain words, without its ``think`` and ``done``. It ends on the answer's number.

    ``lead``: numbers the strategy names first where the problem gives them (the claim to refute, the prior counts,
    the parts, the other end). They are read off the steps otherwise. Raises ``WorkbookError`` on another strategy.
    """
    worked = [f"step {step}" for step in steps]
    if strategy == "cot":
        return " ".join(worked)
    if strategy == "doubt":
        return " ".join([*worked, "doubt", inverse(steps[-1]), "so", result(steps[-1])])
    end = list(lead) or operands(steps[0])[:1]
    openings = {
        "mece": ["parts", *(lead or [x for fresh in fresh_operands(steps) for x in fresh])],
        "falsification": ["refute", *(lead or [_wrong(result(steps[-1]))])],
        "expert": ["expert", *(OPERATIONS[s] for step in steps for s in signs(step))],
        "orthogonal": ["reason back", *end],
        "bayesian": ["reason odds", *end],
        "multidomain": ["reason fields", str(_separate(steps))],
    }
    if strategy not in openings:
        raise WorkbookError(f"unknown strategy {strategy!r}; known: cot, {', '.join(STRATEGIES)}")
    return " ".join([*openings[strategy], *worked])


def _wrong(answer: str) -> str:
    """A claim that is off by a few, drawn from the answer itself so that it never changes."""
    value = Fraction(answer) + 1 + int(hashlib.md5(answer.encode()).hexdigest(), 16) % 5
    return str(value) if value.denominator == 1 else f"{float(value):g}"


def reply(strategy: str | None, problem: Problem) -> str:
    """Write what follows the question, in plain words: the answer alone (``None``) or a thought and the answer."""
    if strategy is None:
        return f"{problem['answer']} ."
    return f"think {body(strategy, problem['steps'], problem['lead'])} done {problem['answer']} ."


def prompts_with(problems: list[Problem], count: int, told: bool = False) -> dict[str, str]:
    """Return ``PROMPTS``, each after ``count`` worked examples of its strategy, a line each, ``told`` their equations.

    So is asked a model that was not trained on these forms. Raises ``WorkbookError`` if too few problems fit one.
    """
    found = {}
    for strategy, prompt in PROMPTS.items():
        fits = [p for p in problems if p["steps"] and (strategy == "cot" or strategy in p["fits"])][:count]
        if len(fits) < count:
            needs = f"its prompt needs {count} worked examples"
            raise WorkbookError(f"{len(fits)} problems fit {strategy}, {needs}: load more problems")
        shown = [f"{prompt} {_one_line(p['question'])}{_told(p['steps'] * told)} {reply(strategy, p)}\n" for p in fits]
        found[strategy] = "".join(shown) + prompt
    return found


def asked(problem: Problem, prompts: dict[str, str], equations: Sequence[str] = ()) -> str:
    """Put a question after the prompt of its first fitting strategy, and behind it the ``equations`` of a teacher."""
    prompt = prompts[(problem["fits"] or ["cot"])[0]]
    question = _one_line(problem["question"]) if chr(10) in prompt else problem["question"]
    return f"{prompt} {question}{_told(equations)}"


def _told(equations: Sequence[str]) -> str:
    return f" ( {' , '.join(equations)} )" if equations else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def strategy_of(thought: str) -> str | None:
    """Return the strategy a thought uses (text with plain or special markers), or None if it has no worked step."""
    words = [w for w in in_words(thought).split() if w not in ("think", "done")]
    if "step" not in words:
        return None
    if words[0] == "step":
        return "doubt" if "doubt" in words else "cot"
    return _OPENINGS.get(words[0]) or _OPENINGS.get(" ".join(words[:2]))


def check(example: dict) -> list[str]:
    """Return what is wrong with a worked example, as sentences, none where its program finds nothing.

    It reads the text alone: every equation must be true, the last number must be the answer, and the marker words must
    be those of the strategy, which must fit. If ``example["strict"]``, operands must be in the question or computed.
    """
    faults, text = [], example["reply"]
    thought = text.removeprefix("think ").split(" done ")[0]
    known = {Fraction(number) for number in re.findall(r"\d*\.?\d+", example["question"].replace(",", ""))}
    for equation in _equations(thought):
        try:
            if not holds(equation):
                faults.append(f"{equation} is false")
            if example.get("strict"):
                new = (x for x in operands(equation) if Fraction(x) not in known)
                faults += [f"{x} in {equation} comes from nowhere" for x in new]
            known.add(Fraction(result(equation)))
        except ValueError as error:
            faults.append(str(error))
    if not _equations(thought):
        faults.append("no worked step")
    if thought.split()[-1] != example["answer"] or text.split(" done ")[-1] != f"{example['answer']} .":
        faults.append(f"does not end on the answer {example['answer']}")
    if strategy_of(thought) != example["strategy"]:
        faults.append(f"reads as {strategy_of(thought)}, not {example['strategy']}")
    if example["strategy"] != "cot" and example["strategy"] not in example["fits"]:
        faults.append(f"{example['strategy']} does not fit")
    return faults


def _equations(thought: str) -> list[str]:
    pieces = thought.replace(" doubt ", " step ").replace(" so ", " step ").split("step ")
    return [p.strip() for p in pieces if "=" in p]


def reasoning_dataset(problems, held_out=(), cot: int = 400, per_strategy: int = 200, seed: int = 0):
    """Make ``cot`` chain-of-thought and ``per_strategy`` examples for each of the seven strategies, all different.

    ``problems`` are training records (``load_problems``). ``held_out`` are records whose questions may not appear.
    Returns a ``datasets.DatasetDict``, splits ``train`` and ``held_out``, with question, answer, strategy, prompt, reply,
    steps, difficulty, family and fits. Families that fit one strategy only are kept for it. Raises ``WorkbookError``
    naming the strategy that falls short or the example that fails its check, or for counts below 1.
    """
    from datasets import Dataset, DatasetDict  # see ``load_problems``

    at_least(0, cot=cot, per_strategy=per_strategy)
    if cot == per_strategy == 0:
        raise WorkbookError("cot and per_strategy are both 0: no example would be made")
    rng = random.Random(seed)
    pool, rows, used = [dict(p) for p in problems], [], {p["question"] for p in held_out}
    rng.shuffle(pool)
    for strategy, count in {**dict.fromkeys(STRATEGIES, per_strategy), "cot": cot}.items():
        fits = [p for p in pool if strategy in p["fits"]]
        if strategy == "cot" and not fits:  # it suits everything where no family claims it
            fits = pool
        different = {p["question"]: p for p in fits if p["question"] not in used and p["steps"]}
        chosen = list(different.values())[:count]
        if len(chosen) < count:
            raise WorkbookError(f"{len(chosen)} problems fit {strategy}, {count} are needed: load more problems")
        used |= {p["question"] for p in chosen}
        rows += [_example(strategy, p) for p in chosen]
    rng.shuffle(rows)
    held_rows = [_example((p["fits"] or ["cot"])[0], p) for p in held_out if p["steps"]]
    for row in rows + held_rows:
        if faults := check(row):
            raise WorkbookError(f"worked example {row['question']!r}: {'; '.join(faults)}")
    return DatasetDict(train=Dataset.from_list(rows), held_out=Dataset.from_list(held_rows))


def _example(strategy: str, problem: Problem) -> dict:
    kept = {k: problem[k] for k in ("question", "answer", "steps", "difficulty", "family", "fits")}
    return kept | {"strategy": strategy, "prompt": PROMPTS[strategy], "reply": reply(strategy, problem)}


def planted_faults(example: dict) -> dict[str, dict]:
    """Return the worked example with one fault each, by the kind of fault."""
    before, after = example["reply"].split("step ", 1)
    first = after.split(" step ")[0].split(" doubt ")[0].split(" done ")[0]
    right, answer = result(first), example["answer"]

    def steps(equation):
        return {**example, "reply": f"{before}step {equation}{after[len(first) :]}"}

    return {
        "a false sum": steps(f"{first.split('=')[0]}= 1{right}"),
        "a number from nowhere": {**steps(f"{right} + 977 - 977 = {right}"), "strict": True},
        "another answer": {**example, "reply": example["reply"].rsplit(f"{answer} .", 1)[0] + f"1{answer} ."},
        "another strategy's name": {**example, "strategy": next(s for s in STRATEGIES if s != example["strategy"])},
    }


def caught(examples: list[dict]) -> dict[str, float]:
    """Return the share of planted faults of each kind that the checker finds if every example gets each of them."""
    faulty = [planted_faults(example) for example in examples]
    return {kind: sum(bool(check(f[kind])) for f in faulty) / len(faulty) for kind in (faulty[0] if faulty else ())}


def grounded(examples: list[dict]) -> float:
    """Return the share of examples whose every operand stands in the question or was computed in an earlier step."""
    return sum(not check({**e, "strict": True}) for e in examples) / len(examples)
