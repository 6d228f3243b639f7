"""The pocket task: word problems small enough that a transformer of half a million weights learns to solve them.

Eight families of generated problems, one to three steps each, over whole numbers up to 40. Every family goes
with one way of reasoning (plain chain of thought or one of the seven strategies). This is the only module that
knows the task: it yields the same records as ``problems.py`` reads from GSM8K, and a word-level tokenizer.
"""

import hashlib
import random

from tokenizers import Tokenizer, models, pre_tokenizers

from ..errors import WorkbookError
from . import Problem
from .tokens import PLAIN_WORDS, fast_tokenizer

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


def _walk(start: int, *changes: tuple[str, int]) -> list[str]:
    """Write the equations of changes (sign, amount) that are made one after the other."""
    steps = []
    for sign, amount in changes:
        end = start + amount if sign == "+" else start - amount if sign == "-" else start * amount
        steps.append(f"{start} {sign} {amount} = {end}")
        start = end
    return steps


def _event(rng: random.Random, total: int) -> tuple[str, str, int]:
    """Draw a gain or loss that keeps ``total`` within 0..20: its verb, sign and amount."""
    gain = total == 0 or (total < 20 and rng.random() < 0.5)
    amount = rng.randint(1, min(9, 20 - total if gain else total))
    return (rng.choice(GAINS), "+", amount) if gain else (rng.choice(LOSSES), "-", amount)


def _history(rng: random.Random, name: str, total: int, length: int) -> tuple[str, list[tuple[str, int]], int]:
    """Draw ``length`` gains and losses of ``name``: sentences, changes, and what is left."""
    sentences, changes = [], []
    for _ in range(length):
        verb, sign, amount = _event(rng, total)
        total += amount if sign == "+" else -amount
        sentences.append(f"{name} {verb} {amount} .")
        changes.append((sign, amount))
    return " ".join(sentences), changes, total


# A family draws a problem of n steps: its question, its equations, and the numbers a strategy names first.


def _chain(rng, n):
    name, item, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 15)
    told, changes, _ = _history(rng, name, start, n)
    return f"{name} has {start} {item} . {told} how many {item} has {name} ?", _walk(start, *changes), []


def _groups(rng, n):
    parts = [rng.randint(1, 9 if n < 3 else 6) for _ in range(n + 1)]
    listed = " ".join(f"{k} {c}" for k, c in zip(parts, rng.sample(COLOURS, n + 1), strict=True))
    steps = _walk(parts[0], *(("+", part) for part in parts[1:]))
    return f"a box holds {listed} {rng.choice(ITEMS)} . how many in all ?", steps, parts


def _claim(rng, n):
    parts = [rng.randint(1, 9 if n < 3 else 6) for _ in range(n)]
    said = sum(parts) + rng.randint(1, 9)
    steps = [*_walk(parts[0], *(("+", part) for part in parts[1:])), *_walk(said, ("-", sum(parts)))]
    name, counted = rng.choice(NAMES), " and ".join(map(str, parts))
    return f"{name} counts {counted} {rng.choice(ITEMS)} . {name} says {said} . how far off ?", steps, [said]


def _price(rng, n):
    name, item, unit, count = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(2, 5), rng.randint(2, 5)
    text, changes, total = f"one of {item} costs {unit} . {name} buys {count} .", [("*", count)], unit * count
    if n > 1:
        bag = rng.randint(1, 9)
        text, changes, total = f"{text} a bag costs {bag} .", [*changes, ("+", bag)], total + bag
    steps = _walk(unit, *changes)
    if n < 3:
        return f"{text} how much in all ?", steps, []
    paid = total + rng.randint(1, min(9, LARGEST - total))
    return f"{text} {name} pays {paid} . how much back ?", [*steps, *_walk(paid, ("-", total))], []


def _reverse(rng, n):
    name, item, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 15)
    told, changes, last = _history(rng, name, start, n)
    undone = [("-" if sign == "+" else "+", amount) for sign, amount in reversed(changes)]
    return f"{name} had some {item} . {told} now {name} has {last} . how many at first ?", _walk(last, *undone), [last]


def _compare(rng, n):
    name, other = rng.sample(NAMES, 2)
    item, start, times = rng.choice(ITEMS), rng.randint(2, 6), rng.randint(2, 4)
    text, steps = f"{name} has {start} {item} . {other} has {times} times as many .", _walk(start, ("*", times))
    if n == 1:
        return f"{text} how many {item} has {other} ?", steps, []
    total = start + start * times
    steps += _walk(start, ("+", start * times))
    if n > 2:
        verb, *change = _event(rng, min(total, 19))
        text, steps = f"{text} {other} {verb} {change[1]} .", [*steps, *_walk(total, change)]
    return f"{text} how many {item} in all ?", steps, []


def _odds(rng, n):
    one, two = rng.sample(COLOURS, 2)
    more, less = rng.randint(6, 12), rng.randint(1, 5)
    counts, steps, sentences = {one: more, two: less}, [], []
    for _ in range(n - 1):
        lead = counts[one] - counts[two]
        colour = rng.choice([one, two]) if lead > 9 else one
        amount = rng.randint(1, min(8, max(1, lead - 1) if colour == two else 8))
        steps += _walk(counts[colour], ("+", amount))
        counts[colour] += amount
        sentences.append(f"{amount} {colour} come . ")
    steps += _walk(counts[one], ("-", counts[two]))
    text = f"a bag holds {more} {one} {less} {two} {rng.choice(ITEMS)} . {''.join(sentences)}"
    return f"{text}how many more {one} than {two} ?", steps, [more, less]


def _units(rng, n):
    name, far, (move, then) = rng.choice(NAMES), rng.choice(DISTANCES), rng.sample(MOVES, 2)
    hours, speed = rng.randint(2, 5), rng.randint(2, 5)
    text, steps, total = f"{name} {move} {hours} hours at {speed} {far} .", _walk(hours, ("*", speed)), hours * speed
    if n == 2:
        extra = rng.randint(1, 9)
        text, steps = f"{text} then {then} {extra} {far} more .", [*steps, *_walk(total, ("+", extra))]
    if n == 3:
        hours, speed = rng.randint(2, 4), rng.randint(2, 4)
        text = f"{text} then {then} {hours} hours at {speed} {far} ."
        steps += [*_walk(hours, ("*", speed)), *_walk(total, ("+", hours * speed))]
    return f"{text} how many {far} in all ?", steps, []


FAMILIES = {  # the strategy that suits a family, and what draws its problems
    "chain": ("cot", _chain),
    "groups": ("mece", _groups),
    "claim": ("falsification", _claim),
    "price": ("expert", _price),
    "reverse": ("orthogonal", _reverse),
    "compare": ("doubt", _compare),
    "odds": ("bayesian", _odds),
    "units": ("multidomain", _units),
}


def split_of(question: str) -> str:
    """Return ``test``, ``validation`` or ``train``: one tenth, one tenth and the rest, by the MD5 of the question."""
    return {0: "test", 1: "validation"}.get(int(hashlib.md5(question.encode()).hexdigest(), 16) % 10, "train")


def generate(split: str, size: int, seed: int = 0, distinct: bool = True) -> list[Problem]:
    """Draw ``size`` problems of one split, families and step counts (1 to 3) in equal shares.

    Questions differ if ``distinct``. Raises ``WorkbookError`` if there are too few different ones.
    """
    rng, families = random.Random(f"{seed}-{split}"), list(FAMILIES)

    def draw(count: int) -> tuple[str, dict]:
        family, n = families[count % 8], 1 + count // 8 % 3
        strategy, drawn = FAMILIES[family]
        question, steps, lead = drawn(rng, n)
        record = {"question": question, "answer": steps[-1].split()[-1], "steps": steps, "difficulty": n}
        return question, record | {"family": family, "fits": [strategy], "lead": [str(x) for x in lead]}

    problems = _of_split(draw, split, size, "problems", distinct)
    rng.shuffle(problems)
    return problems


def _of_split(draw, split: str, size: int, what: str, distinct: bool = True) -> list[dict]:
    """Collect ``size`` records of a split. ``draw``: from the number collected so far a text, and its record."""
    found, seen, misses = [], set(), 0  # misses in a row
    while len(found) < size:
        text, record = draw(len(found))
        if split_of(text) != split or (distinct and text in seen):
            misses += 1
            if misses > 20_000:
                raise WorkbookError(f"the pocket task has fewer than {size} different {split} {what}; ask for fewer")
            continue
        misses = 0
        seen.add(text)
        found.append(record)
    return found


def _story(rng: random.Random) -> tuple[str, dict]:
    """Draw a story: its text, and its record as ``stories`` describes it."""
    name, item, total = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 15)
    opening, parts = f"{name} has {total} {item} .", []  # what leads to each result, and the equations behind it
    for n in rng.sample([1, 2, 3], 3):
        told, changes, left = _history(rng, name, total, n)
        parts.append((f"{told} now {name} has", _walk(total, *changes)))
        total = left
        if rng.random() < 0.3 and 2 <= total <= LARGEST // 3:  # the story goes on with another, who has more
            name, times = rng.choice([other for other in NAMES if other != name]), rng.randint(2, 3)
            parts.append((f"{name} has {times} times as many . {name} has", _walk(total, ("*", times))))
            total *= times
            if total > 20:
                break
    text, results = opening, []
    for before, steps in parts:
        text, answer = f"{text} {before}", steps[-1].split()[-1]
        results.append({"before": text, "answer": answer, "steps": steps})
        text = f"{text} {answer} {item} ."
    record = {"question": opening, "story": text[len(opening) + 1 :], "results": results}
    return text, record | {"difficulty": max(len(r["steps"]) for r in results), "family": "story"}


def stories(split: str, size: int, seed: int = 0) -> list[Problem]:
    """Draw ``size`` different stories of one split that state results in passing, none of them asked for.

    A record's ``question`` is how the story opens, ``story`` how it goes on, and ``results`` has for each result the
    text before it, the number, and the equations behind it. Raises ``WorkbookError`` if there are too few.
    """
    rng = random.Random(f"{seed}-{split}-stories")
    return _of_split(lambda _: _story(rng), split, size, "stories")


def word_tokenizer(extra_words: list[str]):
    """Return a word-level tokenizer over the task's closed vocabulary and ``extra_words`` (prompts, marker words)."""
    words = [*map(str, range(LARGEST + 21)), *"+ - * / =".split(), *TEMPLATE_WORDS, *NAMES, *ITEMS, *COLOURS]
    words += [*GAINS, *LOSSES, *MOVES, *DISTANCES, *PLAIN_WORDS.values(), *extra_words]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<bos>", "<eos>", "<unk>", *words]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast_tokenizer(raw, 192, unk_token="<unk>")
