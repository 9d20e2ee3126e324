"""The demo's questions: small families, each with a right, a wrong and a wordy answer.

Everything is generated from a seed. A wrong answer is exactly as long as the right one, so a model
that prefers the right one can't have learnt to count.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["wrong", "wordy"]
Message = dict[str, str]
Row = dict[str, list[Message]]

# country, capital, another of its cities with as many letters
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
    """A prompt and three ways to answer it.

    Attributes:
        family: capitals, sums or lists.
        prompt: what the user asks.
        right: the short, right answer.
        wrong: a plausible error with as many bytes as `right`.
        wordy: right, but long-winded.
    """

    family: str
    prompt: str
    right: str
    wrong: str
    wordy: str

    def pair(self, kind: Kind) -> Row:
        """A preference pair as message lists: right against wrong, or against wordy."""
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "chosen": [{"role": "assistant", "content": self.right}],
            "rejected": [{"role": "assistant", "content": getattr(self, kind)}],
        }


def capitals(rng: random.Random) -> Iterator[Question]:
    """Every country in every phrasing: whoever knows a fact must find it in other words."""
    for entry in CITIES.strip().replace("\n", "|").split("|"):
        country, capital, other = entry.split()
        for prompt in CAPITAL_PROMPTS:
            yield _question("capitals", prompt.format(country), capital, other, rng)


def sums(rng: random.Random) -> Iterator[Question]:
    """Sums of two digits that come to 10 or more, in every phrasing; wrong is 41 for 14."""
    for a in range(2, 10):
        for b in range(2, 10):
            right = str(a + b)
            if a + b < 10 or right[0] == right[1]:
                continue
            for prompt in SUM_PROMPTS:
                yield _question("sums", prompt.format(a, b), right, right[::-1], rng)


def lists(rng: random.Random) -> Iterator[Question]:
    """Endless lists of three animals; wrong is the middle one, or the list as it was."""
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
