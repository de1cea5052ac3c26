"""What counts as a right answer of the starter model, and the questions to ask it. Pure: no torch, no network."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = Path(__file__).parent / "questions.toml"
MIN_HELD_OUT = 3  # pairs with this many phrasings keep their last one out of training


@dataclass(frozen=True, slots=True)
class Question:
    """One question and the answer expected for it."""

    ask: str
    answer: str


@dataclass(frozen=True, slots=True)
class Questions:
    """The question sets: trained on, held-out paraphrases, and off-topic ones likewise."""

    trained: tuple[Question, ...]
    phrasings: tuple[Question, ...]
    paraphrases: tuple[Question, ...]
    off_topic: tuple[Question, ...]
    off_topic_held_out: tuple[Question, ...]


def load(path: Path = QUESTIONS) -> Questions:
    """Read the question file; `trained` is the first phrasing of every pair."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    trained, phrasings, paraphrases = [], [], []
    for pair in table["pair"]:
        asks, answer = pair["ask"], pair["answer"]
        kept = asks[:-1] if len(asks) >= MIN_HELD_OUT else asks
        trained.append(Question(kept[0], answer))
        phrasings += [Question(ask, answer) for ask in kept]
        paraphrases += [Question(ask, answer) for ask in asks[len(kept) :]]
    off = table["off_topic"]
    return Questions(
        tuple(trained),
        tuple(phrasings),
        tuple(paraphrases),
        tuple(Question(ask, off["answer"]) for ask in off["ask"]),
        tuple(Question(ask, off["answer"]) for ask in off["held_out"]),
    )


def correct(question: Question, text: str) -> bool:
    """Whether `text` is the expected answer, white space aside."""
    return " ".join(text.split()) == " ".join(question.answer.split())


def score(results: Iterable[tuple[Question, str]]) -> float:
    """The share of right answers, 0 to 1."""
    marks = [correct(question, text) for question, text in results]
    return sum(marks) / len(marks)
