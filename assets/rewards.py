"""The truth of the embedded world: rewards in TRL's signature, f(prompts, completions, **columns) -> list[float]."""

import re

# word -> (part of speech, valence): what one use of the word adds to a review's gold reward
VALENCE = {
    "superb": ("adjective", 1.5),
    "brilliant": ("adjective", 1.5),
    "great": ("adjective", 1.0),
    "moving": ("adjective", 1.0),
    "charming": ("adjective", 1.0),
    "good": ("adjective", 0.5),
    "solid": ("adjective", 0.5),
    "familiar": ("adjective", 0.0),
    "slow": ("adjective", -0.5),
    "thin": ("adjective", -0.5),
    "dull": ("adjective", -1.0),
    "clumsy": ("adjective", -1.0),
    "bad": ("adjective", -1.0),
    "awful": ("adjective", -1.5),
    "dreadful": ("adjective", -1.5),
    "loved": ("verb", 1.5),
    "enjoyed": ("verb", 1.0),
    "liked": ("verb", 0.5),
    "endured": ("verb", -0.5),
    "disliked": ("verb", -1.0),
    "hated": ("verb", -1.5),
}
MODIFIERS = {"very": 1.5, "rather": 0.5, "not": -0.5}


def sentiment(prompts, completions, **columns) -> list[float]:
    """Gold reward of a review: the valence of its words, times 1.5 after "very", 0.5 after "rather", -0.5 after "not".

    A word counts once: repeating praise earns nothing. A learned reward can be fooled there, this one cannot.
    """
    rewards = []
    for text in completions:
        words = re.findall(r"[a-z]+", text.lower())
        seen, reward = set(), 0.0
        for before, word in zip([""] + words, words):
            if word in VALENCE and word not in seen:
                seen.add(word)
                reward += VALENCE[word][1] * MODIFIERS.get(before, 1.0)
        rewards.append(reward)
    return rewards


def correct_sum(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion is the number in the `answer` column and nothing else, else 0."""
    return [float(text.strip() == right) for text, right in zip(completions, answer)]


def final_number(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion's final number equals that of the `answer` column, else 0: GSM8K, "... #### 42".

    The final number is the one after the last "####", else the last one. 1,234 and 1234.0 and $1234 are equal.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    numbers = [(last_number(text), last_number(right)) for text, right in zip(texts, answer)]
    return [float(number is not None and number == right) for number, right in numbers]


def last_number(text: str) -> float | None:
    before, mark, after = text.rpartition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", after)
    if not numbers:
        return None
    return float(numbers[0 if mark else -1].replace(",", ""))
