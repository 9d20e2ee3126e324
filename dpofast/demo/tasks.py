"""Generates the demo's questions, each with a right, a wrong and a wordy answer.

Everything is generated from a seed. A wrong answer is exactly as long as the right one, so a model
can't learn to prefer right answers from their length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["wrong", "wordy"]
Message = dict[str, str]
Row = dict[str, list[Message]]

# Each entry: a country, its capital, and another of its cities with as many letters.
CITIES = """
France Paris Lille|Italy Rome Pisa|Germany Berlin Munich|Spain Madrid Malaga
Greece Athens Patras|Ireland Dublin Galway|Poland Warsaw Krakow|Norway Oslo Bodo
Japan Tokyo Osaka|Korea Seoul Busan|Vietnam Hanoi Dalat|Egypt Cairo Luxor
Peru Lima Puno|Kenya Nairobi Mombasa|Canada Ottawa Regina|Turkey Ankara Edirne
Russia Moscow Samara|China Beijing Nanjing|Cuba Havana Bayamo|Iraq Baghdad Karbala
Ukraine Kyiv Lviv|Hungary Budapest Debrecen|Wales Cardiff Swansea|England London Oxford
"""
CAPITAL_PROMPTS = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is {}'s capital?",
    "{} has which capital?",
    "Tell me {}'s capital.",
    "The capital of {}?",
    "What city is the capital of {}?",
    "Do you know the capital of {}?",
)
SUM_PROMPTS = (
    "What is {} + {}?",
    "Add {} and {}.",
    "How much is {} plus {}?",
    "{} + {} = ?",
    "{} and {} make?",
    "Tell me {} plus {}.",
)
ANIMALS = [
    "ant",
    "bee",
    "cow",
    "dog",
    "elk",
    "fox",
    "gnu",
    "hen",
    "jay",
    "koi",
    "owl",
    "pig",
    "rat",
    "yak",
]
LIST_PROMPTS = {
    "first": "Which comes first: {}?",
    "last": "Which comes last: {}?",
    "reverse": "Turn around: {}.",
}
WORDY_ANSWERS = (
    "Good question! I think that it is {}.",
    "Let me see. The answer must be {}.",
    "Well, I would say {}, more or less.",
)


@dataclass(frozen=True)
class Question:
    """A prompt and three answers to it.

    Attributes:
        family: capitals, sums or lists.
        prompt: the user's message.
        right: short, right answer.
        wrong: plausible wrong answer with as many bytes as `right`.
        wordy: right, but long-winded answer.
    """

    family: str
    prompt: str
    right: str
    wrong: str
    wordy: str

    def pair(self, kind: Kind) -> Row:
        """Make a preference pair of message lists: right against wrong, or right against wordy."""
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "chosen": [{"role": "assistant", "content": self.right}],
            "rejected": [{"role": "assistant", "content": getattr(self, kind)}],
        }


def capitals(rng: random.Random) -> Iterator[Question]:
    """Yield every country in every phrasing.

    A held-out prompt therefore asks for a fact that training contains in other words.
    """
    for entry in CITIES.strip().replace("\n", "|").split("|"):
        country, capital, other = entry.split()
        for prompt in CAPITAL_PROMPTS:
            yield _question("capitals", prompt.format(country), capital, other, rng)


def sums(rng: random.Random) -> Iterator[Question]:
    """Yield sums of two one-digit numbers that are at least 10, in every phrasing.

    The wrong answer has the digits in reverse: 41 for 14.
    """
    for a in range(2, 10):
        for b in range(2, 10):
            right = str(a + b)
            if a + b < 10 or right[0] == right[1]:
                continue  # one digit, or two equal ones: reversed, the answer would be the same
            for prompt in SUM_PROMPTS:
                yield _question("sums", prompt.format(a, b), right, right[::-1], rng)


def lists(rng: random.Random) -> Iterator[Question]:
    """Yield endless questions about lists of three animals.

    The wrong answer is the animal in the middle, or the list in its old order.
    """
    while True:
        operation = rng.choice(list(LIST_PROMPTS))
        items = rng.sample(ANIMALS, 3)
        forwards, backwards = ", ".join(items), ", ".join(reversed(items))
        answers = {
            "first": (items[0], items[1]),
            "last": (items[2], items[1]),
            "reverse": (backwards, forwards),
        }
        right, wrong = answers[operation]
        yield _question("lists", LIST_PROMPTS[operation].format(forwards), right, wrong, rng)


def _question(family: str, prompt: str, right: str, wrong: str, rng: random.Random) -> Question:
    return Question(family, prompt, right, wrong, rng.choice(WORDY_ANSWERS).format(right))
