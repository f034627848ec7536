"""Word problems of two to six steps, in GSM8K's format, for benchmarks/accuracy.py.

Each kind of problem has several valid solutions, which calculate other quantities or in another
order. The written answer follows one of them, drawn at random. As with the answers to GSM8K, which
many people wrote, a model that learns from them can find the other solutions.
"""

import operator
import random
from collections.abc import Mapping
from dataclasses import dataclass

from standin import BOXES, NAMES, THINGS

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST = 40  # no quantity is larger, so that the demo's model knows most of the arithmetic


@dataclass(frozen=True)
class Kind:
    """A kind of problem. One letter stands for each quantity; ``r`` is the one asked for.

    Attributes:
        question: with the names of people and things, and the given quantities, in braces.
        given: the range of each given quantity, both ends included.
        sentences: the sentence that presents each calculated quantity. ``{step}`` is replaced by
            its calculation.
        solutions: the calculations of each, in order: ``k=a-b r=k*n``.
    """

    question: str
    given: Mapping[str, tuple[int, int]]
    sentences: Mapping[str, str]
    solutions: tuple[str, ...]


KINDS = (
    Kind(
        "{name} finds {a} {things} a day and gives {b} of them away. "
        "How many {things} does {name} keep in {n} days?",
        {"a": (3, 9), "b": (1, 8), "n": (2, 9)},
        {
            "k": "{She} keeps {step} a day.",
            "p": "{She} finds {step}.",
            "q": "{She} gives {step} away.",
            "r": "{She} keeps {step}.",
        },
        ("k=a-b r=k*n", "p=a*n q=b*n r=p-q", "q=b*n p=a*n r=p-q"),
    ),
    Kind(
        "Each of {n} children has {a} {things} and {b} {others}, and loses {c} of the {things}. "
        "How many {things} and {others} do they have now?",
        {"n": (2, 9), "a": (3, 15), "b": (2, 9), "c": (1, 9)},
        {
            "s": "A child has {step} at first.",
            "t": "A child keeps {step} {things}.",
            "k": "Now a child has {step}.",
            "p": "There are {step} {things}.",
            "q": "There are {step} {others}.",
            "e": "They lose {step}.",
            "u": "At first there are {step}.",
            "w": "They keep {step} {things}.",
            "r": "They have {step} now.",
        },
        (
            "s=a+b k=s-c r=n*k",
            "t=a-c k=t+b r=n*k",
            "p=n*a q=n*b u=p+q e=n*c r=u-e",
            "t=a-c w=n*t q=n*b r=w+q",
        ),
    ),
    Kind(
        "{name} has {a} {things}. {other} has {m} times as many, and {third} has {b} more than "
        "{other}. How many {things} do they have together?",
        {"a": (2, 12), "m": (2, 6), "b": (2, 20)},
        {
            "y": "{other} has {step}.",
            "z": "{third} has {step}.",
            "s": "{name} and {other} have {step}.",
            "t": "{other} and {third} have {step}.",
            "r": "Together they have {step}.",
        },
        ("y=m*a z=y+b s=a+y r=s+z", "y=m*a s=a+y z=y+b r=s+z", "y=m*a z=y+b t=y+z r=a+t"),
    ),
    Kind(
        "{name} sells {a} {things} on Monday and {b} on Tuesday for {c} coins each. "
        "The stand costs {d} coins. How many coins does {name} keep?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 30)},
        {
            "s": "{She} sells {step}.",
            "m": "That brings {step} coins.",
            "x": "Monday brings {step} coins.",
            "y": "Tuesday brings {step} coins.",
            "u": "After the stand, Monday leaves {step} coins.",
            "r": "{She} keeps {step} coins.",
        },
        ("s=a+b m=s*c r=m-d", "x=a*c y=b*c m=x+y r=m-d", "x=a*c u=x-d y=b*c r=u+y"),
    ),
    Kind(
        "A shop has {n} {boxes} of {a} {things}, {m} {boxes} of {b} {others} and {k} {boxes} of "
        "{c} {more}. {d} of all these are broken. How many are whole?",
        {
            "n": (2, 9),
            "a": (2, 9),
            "m": (2, 9),
            "b": (2, 9),
            "k": (2, 9),
            "c": (2, 9),
            "d": (2, 15),
        },
        {
            "p": "There are {step} {things}.",
            "q": "There are {step} {others}.",
            "w": "There are {step} {more}.",
            "s": "The first two make {step}.",
            "t": "The last two make {step}.",
            "u": "All make {step}.",
            "r": "{step} are whole.",
        },
        (
            "p=n*a q=m*b w=k*c s=p+q u=s+w r=u-d",
            "p=n*a q=m*b s=p+q w=k*c u=s+w r=u-d",
            "q=m*b w=k*c t=q+w p=n*a u=p+t r=u-d",
        ),
    ),
)


def make_problems(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` problems with distinct questions; the same ``seed`` gives the same ones."""
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < count:
        kind = rng.choice(KINDS)
        given, words = draw_given(kind, rng), _draw_words(rng)
        question = kind.question.format(**given, **words)
        answer = write_answer(kind, rng.choice(kind.solutions), given, words)
        problems.setdefault(question, answer)
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def calculation(left: int, sign: str, right: int) -> str:
    """As GSM8K writes it: ``3 + 4 = <<3+4=7>>7``."""
    result = OPERATORS[sign](left, right)
    return f"{left} {sign} {right} = <<{left}{sign}{right}={result}>>{result}"


def draw_given(kind: Kind, rng: random.Random) -> dict[str, int]:
    """The given quantities of a problem, such that all quantities are in 1 .. `LARGEST`."""
    while True:
        given = {letter: rng.randint(*limits) for letter, limits in kind.given.items()}
        calculated = [solve(solution, given) for solution in kind.solutions]
        if all(0 < value <= LARGEST for values in calculated for value in values.values()):
            return given


def solve(solution: str, given: Mapping[str, int]) -> dict[str, int]:
    """All quantities, given and calculated, of ``k=a-b r=k*n``."""
    values = dict(given)
    for letter, _, left, sign, right in solution.split():
        values[letter] = OPERATORS[sign](values[left], values[right])
    return values


def write_answer(
    kind: Kind, solution: str, given: Mapping[str, int], words: Mapping[str, str]
) -> str:
    """The answer that follows ``solution``."""
    values, lines = solve(solution, given), []
    for letter, _, left, sign, right in solution.split():
        step = calculation(values[left], sign, values[right])
        lines.append(kind.sentences[letter].format(step=step, **words))
    return "\n".join([*lines, f"#### {values['r']}"])


def _draw_words(rng: random.Random) -> dict[str, str]:
    """The people and things of a problem."""
    she = rng.choice(tuple(NAMES))
    name = rng.choice(NAMES[she])
    other, third = rng.sample([one for names in NAMES.values() for one in names if one != name], 2)
    things, others, more = rng.sample(THINGS, 3)
    boxes = rng.choice(BOXES)
    people = {"name": name, "other": other, "third": third, "she": she, "She": she.capitalize()}
    return people | dict(things=things, others=others, more=more, boxes=boxes)
