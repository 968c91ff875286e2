"""VADER's sentiment as a reward: `--reward-fn experiments/vader_reward.py:sentiment`.

VADER (Hutto & Gilbert 2014) rates 7,500 words by hand and knows negations and intensifiers. Its
compound score of a sentence is between -1 and 1; a text's is the mean of its sentences', as its
authors advise, so that more sentences earn no more.
"""

import re
from functools import cache

SCALE = 3  # the deviation between a model's completions is then near 1, as a learned reward's is


@cache
def analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()


def sentiment(prompts, completions, **columns) -> list[float]:
    """Between -3 and 3 for each completion."""
    return [SCALE * mean_compound(text) for text in completions]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def mean_compound(text: str) -> float:
    scores = [analyzer().polarity_scores(part)["compound"] for part in sentences(text)]
    return sum(scores) / len(scores)
