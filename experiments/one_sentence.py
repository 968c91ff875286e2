r"""A rule that a small chat model does not keep by itself: one sentence of at most twelve words.

    python experiments/one_sentence.py                # writes experiments/data/questions*.jsonl
    python grpo.py --dataset experiments/data/questions.jsonl \
        --reward-fn experiments/one_sentence.py:one_sentence ...

The questions ask for brevity and never mention the rule: the reward teaches it. The held-out
questions are about other topics.
"""

import json
import re
from pathlib import Path

MOST_WORDS = 12
QUESTIONS = [
    "What is {}? Be brief.",
    "How would you explain {} to a child? Be brief.",
    "Why does {} matter? Be brief.",
    "Tell me about {}. Be brief.",
    "What should everyone know about {}? Be brief.",
]
TOPICS = """photosynthesis; gravity; the water cycle; a volcano; the moon; a solar eclipse; an
earthquake; magnetism; electricity; sound; a rainbow; evolution; a cell; the human heart; sleep; a
vaccine; exercise; the brain; bread; coffee; chocolate; cheese; rice; olive oil; salt; a bicycle;
a steam engine; a compass; a clock; the printing press; a camera; a bridge; the internet; a
computer; an algorithm; encryption; money; a bank; taxes; insurance; inflation; democracy; a
constitution; the Roman Empire; the Silk Road; the Renaissance; a novel; poetry; jazz; the piano;
painting; theatre; chess; football; swimming; a marathon; a forest; a desert; an island;
a glacier"""
HELD_OUT_TOPICS = """a comet; the tides; lightning; friction; a fossil; the lungs; tea; honey; a
sailing ship; a telescope; a robot; a library; a parliament; ancient Egypt; opera; the violin;
tennis; a river; a coral reef; recycling"""


def one_sentence(prompts, completions, **columns) -> list[float]:
    """1 where the completion is one sentence of at most twelve words, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(keeps_the_rule(text.strip())) for text in texts]


def keeps_the_rule(text: str) -> bool:
    one = re.fullmatch(r"[^.!?\n]+[.!?]", text) is not None
    return one and len(text.split()) <= MOST_WORDS


def write(name: str, topics: str) -> None:
    lines = []
    for topic in topics.replace("\n", " ").split("; "):
        for question in QUESTIONS:
            message = {"role": "user", "content": question.format(topic)}
            lines.append(json.dumps({"prompt": [message]}) + "\n")
    folder = Path(__file__).resolve().parent / "data"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write("questions", TOPICS)
    write("questions_heldout", HELD_OUT_TOPICS)
