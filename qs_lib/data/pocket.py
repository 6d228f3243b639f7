"""The pocket task: word problems small enough that a transformer of half a million weights learns to solve them.

Eight families of generated problems, one to three steps each, over whole numbers up to 40. Every family goes
with one way of reasoning (plain chain of thought or one of the seven strategies). This is the only module that
knows the task: it yields the same records as :mod:`qs_lib.data.problems` reads from GSM8K, and a word-level tokenizer.
"""

import hashlib
import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import WorkbookError
from .tokens import PLAIN_WORDS

FAMILY_STRATEGY = {
    "chain": "cot",
    "groups": "mece",
    "claim": "falsification",
    "price": "expert",
    "reverse": "orthogonal",
    "compare": "doubt",
    "odds": "bayesian",
    "units": "multidomain",
}
NAMES = "ben tom mia zoe ana leo sam eva".split()
ITEMS = "pens books nuts cups keys balls coins cards".split()
COLOURS = "red blue green white black".split()
GAINS, LOSSES = "finds buys wins".split(), "gives loses sells".split()
MOVES, DISTANCES = "walks rides sails runs".split(), "miles blocks".split()
LARGEST = 40
TEMPLATE_WORDS = (
    "has . how many ? a box holds in all counts and says far off one of costs bag much pays back had some now at "
    "first hours then come more than times as many"
).split()


def _event(rng: random.Random, total: int) -> tuple[str, int, str]:
    """A gain or loss that keeps ``total`` within 0..20: its verb, amount and sign."""
    gain = total == 0 or (total < 20 and rng.random() < 0.5)
    amount = rng.randint(1, min(9, 20 - total if gain else total))
    return (rng.choice(GAINS), amount, "+") if gain else (rng.choice(LOSSES), amount, "-")


def _apply(left: int, sign: str, right: int) -> tuple[str, int]:
    result = left + right if sign == "+" else left - right if sign == "-" else left * right
    return f"{left} {sign} {right} = {result}", result


def _history(rng: random.Random, name: str, total: int, length: int) -> tuple[list[str], list[str], int]:
    """``length`` gains and losses of ``name``: sentences, equations, and what is left."""
    sentences, steps = [], []
    for _ in range(length):
        verb, amount, sign = _event(rng, total)
        equation, total = _apply(total, sign, amount)
        sentences.append(f"{name} {verb} {amount} .")
        steps.append(equation)
    return sentences, steps, total


def _chain(rng, n):
    name, item, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 15)
    sentences, steps, _ = _history(rng, name, start, n)
    return f"{name} has {start} {item} . {' '.join(sentences)} how many {item} has {name} ?", steps, []


def _groups(rng, n):
    parts = [rng.randint(1, 9 if n < 3 else 6) for _ in range(n + 1)]
    steps, total = [], parts[0]
    for part in parts[1:]:
        equation, total = _apply(total, "+", part)
        steps.append(equation)
    listed = " ".join(f"{k} {c}" for k, c in zip(parts, rng.sample(COLOURS, n + 1), strict=True))
    return f"a box holds {listed} {rng.choice(ITEMS)} . how many in all ?", steps, parts


def _claim(rng, n):
    parts = [rng.randint(1, 9 if n < 3 else 6) for _ in range(n)]
    steps, total = [], parts[0]
    for part in parts[1:]:
        equation, total = _apply(total, "+", part)
        steps.append(equation)
    said = total + rng.randint(1, 9)
    steps.append(_apply(said, "-", total)[0])
    name, counted = rng.choice(NAMES), " and ".join(map(str, parts))
    return f"{name} counts {counted} {rng.choice(ITEMS)} . {name} says {said} . how far off ?", steps, [said]


def _price(rng, n):
    name, item, unit, count = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(2, 5), rng.randint(2, 5)
    equation, total = _apply(unit, "*", count)
    text, steps, ask = f"one of {item} costs {unit} . {name} buys {count} .", [equation], "how much in all ?"
    if n > 1:
        bag = rng.randint(1, 9)
        equation, total = _apply(total, "+", bag)
        text, steps = f"{text} a bag costs {bag} .", [*steps, equation]
    if n > 2:
        paid = total + rng.randint(1, LARGEST - total if total > LARGEST - 9 else 9)
        steps, ask = [*steps, _apply(paid, "-", total)[0]], "how much back ?"
        text = f"{text} {name} pays {paid} ."
    return f"{text} {ask}", steps, []


def _reverse(rng, n):
    name, item, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 15)
    sentences, forward, last = _history(rng, name, start, n)
    steps, total = [], last
    for equation in reversed(forward):
        _, sign, amount, *_ = equation.split()
        equation, total = _apply(total, "-" if sign == "+" else "+", int(amount))
        steps.append(equation)
    text = f"{name} had some {item} . {' '.join(sentences)} now {name} has {last} . how many at first ?"
    return text, steps, [last]


def _compare(rng, n):
    name, other = rng.sample(NAMES, 2)
    item, start, times = rng.choice(ITEMS), rng.randint(2, 6), rng.randint(2, 4)
    equation, more = _apply(start, "*", times)
    text, steps, ask = f"{name} has {start} {item} . {other} has {times} times as many .", [equation], f"has {other} ?"
    if n > 1:
        equation, total = _apply(start, "+", more)
        steps, ask = [*steps, equation], "in all ?"
    if n > 2:
        verb, amount, sign = _event(rng, min(total, 19))
        text, steps = f"{text} {other} {verb} {amount} .", [*steps, _apply(total, sign, amount)[0]]
    return f"{text} how many {item} {ask}", steps, []


def _odds(rng, n):
    one, two = rng.sample(COLOURS, 2)
    more, less = rng.randint(6, 12), rng.randint(1, 5)
    counts, steps, sentences = {one: more, two: less}, [], []
    for _ in range(n - 1):
        colour = rng.choice([one, two]) if counts[one] - counts[two] > 9 else one
        amount = rng.randint(1, min(8, max(1, counts[one] - counts[two] - 1) if colour == two else 8))
        equation, counts[colour] = _apply(counts[colour], "+", amount)
        steps.append(equation)
        sentences.append(f"{amount} {colour} come . ")
    steps.append(_apply(counts[one], "-", counts[two])[0])
    text = f"a bag holds {more} {one} {less} {two} {rng.choice(ITEMS)} . {''.join(sentences)}"
    return f"{text}how many more {one} than {two} ?", steps, [more, less]


def _units(rng, n):
    name, far, (move, then) = rng.choice(NAMES), rng.choice(DISTANCES), rng.sample(MOVES, 2)
    hours, speed = rng.randint(2, 5), rng.randint(2, 5)
    equation, total = _apply(hours, "*", speed)
    text, steps = f"{name} {move} {hours} hours at {speed} {far} .", [equation]
    if n == 2:
        extra = rng.randint(1, 9)
        text, steps = f"{text} then {then} {extra} {far} more .", [*steps, _apply(total, "+", extra)[0]]
    if n == 3:
        hours, speed = rng.randint(2, 4), rng.randint(2, 4)
        equation, second = _apply(hours, "*", speed)
        text = f"{text} then {then} {hours} hours at {speed} {far} ."
        steps = [*steps, equation, _apply(total, "+", second)[0]]
    return f"{text} how many {far} in all ?", steps, []


_FAMILIES = dict(
    zip(FAMILY_STRATEGY, (_chain, _groups, _claim, _price, _reverse, _compare, _odds, _units), strict=True)
)


def split_of(question: str) -> str:
    """``test``, ``validation`` or ``train``: one tenth, one tenth and the rest, by the MD5 of the question."""
    return {0: "test", 1: "validation"}.get(int(hashlib.md5(question.encode()).hexdigest(), 16) % 10, "train")


def generate(split: str, size: int, seed: int = 0, distinct: bool = True) -> list[dict]:
    """``size`` problems of one split, families and step counts (1-3) in equal shares, all different if ``distinct``.

    A record holds ``question``, ``answer``, ``steps`` (equations), ``difficulty`` (their number), ``family``,
    ``fits`` (strategies that suit it) and ``lead`` (numbers the strategy names first; may be empty).
    """
    rng, records, seen, families = random.Random(f"{seed}-{split}"), [], set(), list(_FAMILIES)
    misses = 0
    while len(records) < size:
        family, n = families[len(records) % 8], 1 + len(records) // 8 % 3
        question, steps, lead = _FAMILIES[family](rng, n)
        if split_of(question) != split or (distinct and question in seen):
            misses += 1
            if misses > 20_000:  # in a row
                raise WorkbookError(f"the pocket task has fewer than {size} different {split} problems; ask for fewer")
            continue
        misses = 0
        seen.add(question)
        records.append(
            {
                "question": question,
                "answer": steps[-1].split()[-1],
                "steps": steps,
                "difficulty": n,
                "family": family,
                "fits": [FAMILY_STRATEGY[family]],
                "lead": [str(x) for x in lead],
            }
        )
    rng.shuffle(records)
    return records


def build_tokenizer(extra_words: list[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the task's closed vocabulary plus ``extra_words`` (prompts and marker words)."""
    words = [*map(str, range(LARGEST + 21)), *"+ - * / =".split(), *TEMPLATE_WORDS, *NAMES, *ITEMS, *COLOURS]
    words += [*GAINS, *LOSSES, *MOVES, *DISTANCES, *PLAIN_WORDS.values(), *extra_words]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<bos>", "<eos>", "<unk>", *words]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=192,
    )
