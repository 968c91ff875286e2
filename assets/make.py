"""Build the embedded world: two small languages whose truth is known, and models that speak them.

    python assets/make.py             # everything, in this order: about half an hour on 2 CPU cores
    python assets/make.py base        # one stage: text | base | sft | samples | rm | frontier

* text     demonstrations, prompts, sums and the tokenizer, from the grammar below and one seed
* base     tiny-base: a 0.9M-parameter Llama pretrained on a loose mix of both languages, and
           stopped half competent
* sft      tiny-sft: what `python sft.py` makes of tiny-base, rounded to bfloat16, which halves it
* samples  comparisons, rankings and battles: samples of tiny-sft, judged by the gold reward
           (assets/rewards.py) through the Bradley-Terry model, p(a > b) = sigma(r(a) - r(b)), so
           the judgements are noisy
* rm       tiny-rm: what `python reward_model.py` makes of tiny-sft and the comparisons, rounded too
* frontier the best gold reward that any policy can reach at each KL from tiny-sft

The two languages:

    Review of The Silent Harbor, a drama: The acting is very moving. I liked the score.
    Q: 37+58? 95

A review has a mood, a number drawn once, that tilts all its words: that is what a reader's
sentiment model would pick up, and what reinforcement learning can steer. A sum has one right
answer, which can be checked.
"""

import copy
import json
import math
import random

import shutil
import subprocess
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
DATA = ASSETS / "data"
sys.path[:0] = [str(ASSETS), str(ASSETS.parent)]

from rewards import VALENCE, sentiment  # noqa: E402

SEED = 1952  # Bradley and Terry
FRONTIER_PROPOSALS = [3.0, 1.5, 1.0, 0.7, 0.5, 0.35]  # values of beta
BASE_STEPS = 490  # where it is half competent at sums: 18% right, and tiny-sft 56% (greedy)
BASE_BATCH, BASE_LENGTH = 64, 128

# --- the languages ---

TITLE_ADJECTIVES = (
    "Silent Broken Golden Distant Hidden Crimson Frozen Gentle Hollow Last Lost Narrow Pale Quiet "
    "Restless Scarlet Second Secret Sleeping Summer Wild Winter Endless Burning Paper Glass Iron "
    "Velvet Northern Empty".split()
)
TITLE_NOUNS = (
    "Harbor River Garden Letter Bridge Castle Circus Desert Engine Forest Game Heart Hotel House "
    "Island Journey King Lake Lantern Mirror Moon Mountain Night Ocean Orchard Road Season Shadow "
    "Song Station Storm Street Tower Train Valley Village Voyage Window Witness Year".split()
)
GENRES = "drama comedy thriller western romance mystery musical documentary".split()
ASPECTS = "acting plot score pacing dialogue ending direction camera cast script".split()
ADJECTIVES = [w for w, (kind, _) in VALENCE.items() if kind == "adjective"]
VERBS = [w for w, (kind, _) in VALENCE.items() if kind == "verb"]
NEUTRAL = [
    "It runs for two hours.",
    "It is set in a small town.",
    "The cast is large.",
    "I saw it on a train.",
    "It is based on a book.",
    "There is a song at the end.",
]


def title(rng: random.Random) -> tuple[str, str]:
    """-> (review prompt, genre)."""
    genre = rng.choice(GENRES)
    name = f"The {rng.choice(TITLE_ADJECTIVES)} {rng.choice(TITLE_NOUNS)}"
    return f"Review of {name}, a {genre}:", genre


def review(rng: random.Random, genre: str, sentences: int | None = None) -> str:
    """One to three sentences that share a mood; the probability of a word is proportional to
    exp(mood * valence)."""
    mood = rng.gauss(0.0, 1.0)

    def pick(words: list[str]) -> str:
        return rng.choices(words, [math.exp(mood * VALENCE[w][1]) for w in words])[0]

    def phrase() -> str:
        modifier = rng.choices(["", "very ", "rather ", "not "], [6, 2, 1, 1])[0]
        return modifier + pick(ADJECTIVES)

    def sentence() -> str:
        kind = rng.random()
        a, b = rng.sample(ASPECTS, 2)
        if kind < 0.40:
            return f"The {a} is {phrase()}."
        if kind < 0.60:
            return f"I {pick(VERBS)} the {a}."
        if kind < 0.75:
            return f"The {a} is {pick(ADJECTIVES)} and the {b} is {pick(ADJECTIVES)}."
        if kind < 0.90:
            return f"What a {pick(ADJECTIVES)} {genre}."
        return rng.choice(NEUTRAL)

    sentences = sentences or rng.choices([1, 2, 3], [25, 45, 30])[0]
    return " " + " ".join(sentence() for _ in range(sentences))


def sum_row(a: int, b: int) -> dict:
    return {"prompt": f"Q: {a}+{b}?", "answer": str(a + b)}


def base_text(rng: random.Random, sums: list[tuple[int, int]]) -> str:
    """A loose page: sums in several notations, reviews with and without a title, of any length, on
    lines that follow each other without a clear end. What fine-tuning then has to teach is the
    format, and when to stop."""
    lines = []
    for _ in range(rng.randint(4, 10)):
        kind = rng.random()
        if kind < 0.60:
            a, b = rng.choice(sums)
            question = f"Q: {a}+{b}? {a + b}"
            lines.append(rng.choice([question, question, f"{a}+{b}={a + b}"]))
        else:
            prompt, genre = title(rng)
            text = review(rng, genre, rng.randint(1, 5))
            lines.append(prompt + text if kind < 0.85 else text.strip())
    return "\n".join(lines) + "\n"


def worlds() -> dict:
    """Everything that must not overlap, split once: titles and sums for training, and those that no
    model trains on."""
    rng = random.Random(SEED)
    prompts = {}
    while len(prompts) < 8000:
        prompt, genre = title(rng)
        prompts[prompt] = genre
    prompts = list(prompts.items())
    sums = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(sums)
    return {
        "rng": rng,
        "prompts": prompts[:7000],
        "prompts_heldout": prompts[7000:],
        "sums": sums[:9000],
        "sums_heldout": sums[9000:],
    }


def write(name: str, rows: list[dict]) -> None:
    DATA.mkdir(exist_ok=True)
    (DATA / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{name:34} {len(rows):6} rows  {(DATA / name).stat().st_size / 1e3:8.1f} kB")


# --- the stages ---


def make_text() -> None:
    world = worlds()
    rng = world["rng"]

    def demonstrations(prompts: list, sums: list) -> list[dict]:
        rows = [{"prompt": p, "completion": review(rng, genre)} for p, genre in prompts]
        for row in [sum_row(a, b) for a, b in sums]:
            rows.append({"prompt": row["prompt"], "completion": f" {row['answer']}"})
        rng.shuffle(rows)
        return rows

    train = demonstrations(world["prompts"][:3000], world["sums"][:3000])
    heldout = demonstrations(world["prompts_heldout"][:250], world["sums_heldout"][:250])
    write("demonstrations.jsonl", train)
    write("demonstrations_heldout.jsonl", heldout)
    write("review_prompts.jsonl", [{"prompt": p} for p, _ in world["prompts"][3000:4000]])
    write("review_prompts_heldout.jsonl", [{"prompt": p} for p, _ in world["prompts_heldout"]])
    write("sum_prompts.jsonl", [sum_row(*s) for s in world["sums"][3000:7000]])
    write("sum_prompts_heldout.jsonl", [sum_row(*s) for s in world["sums_heldout"][:500]])
    tokenizer = make_tokenizer([base_text(rng, world["sums"]) for _ in range(4000)])
    tokenizer.save_pretrained(ASSETS / "tiny-base")


def make_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: a sum is learnt column by column, and 37 must not be a symbol of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<bos>", "<eos>", "<pad>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_base(steps: int = BASE_STEPS, layers: int = 4, width: int = 128,
              directory: Path = ASSETS / "tiny-base") -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in one order: the same weights wherever this runs
    rng = random.Random(SEED + 1)
    sums = worlds()["sums"]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-base")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=344 * width // 128,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            attention_dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    stream: list[int] = []
    for step in range(steps):
        while len(stream) < BASE_BATCH * BASE_LENGTH:
            stream += tokenizer(base_text(rng, sums)).input_ids
        ids = torch.tensor(stream[: BASE_BATCH * BASE_LENGTH]).view(BASE_BATCH, BASE_LENGTH)
        stream = stream[BASE_BATCH * BASE_LENGTH :]
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"tiny-base step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_sft() -> None:
    run("sft.py", ASSETS / "tiny-sft")


def make_rm() -> None:
    run("reward_model.py", ASSETS / "tiny-rm")


def run(script: str, directory: Path) -> None:
    """The script with no flag of its own; what it writes beside the model is dropped."""
    command = [sys.executable, ASSETS.parent / script, "--output-dir", directory]
    subprocess.run([*command, "--save-dtype", "bfloat16"], check=True)
    shutil.rmtree(directory / "checkpoint")
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", "results.json", ".lock"):
        (directory / name).unlink(missing_ok=True)


def make_samples() -> None:
    """Judgements of tiny-sft's samples, drawn from Bradley-Terry (rankings: Plackett-Luce)."""

    import torch
    from common import generate, load_model, load_tokenizer

    rng = random.Random(SEED + 2)
    torch.manual_seed(SEED + 2)
    world = worlds()
    tokenizer = load_tokenizer(str(ASSETS / "tiny-sft"))

    def sample(prompts, num_samples, name="tiny-sft", temperature=1.0):
        model = load_model(str(ASSETS / name))
        rollout = generate(model, tokenizer, prompts, num_samples, 64, temperature)
        starts = range(0, len(prompts) * num_samples, num_samples)
        return [rollout.completions[i : i + num_samples] for i in starts]

    def ranked(texts):  # Plackett-Luce by Gumbel noise; for two texts this is Bradley-Terry
        noisy = [r - math.log(rng.expovariate(1.0)) for r in sentiment(None, texts)]
        return [text for _, text in sorted(zip(noisy, texts), reverse=True)]

    def judged(prompts, count):
        """`count` different completions of each prompt, best first."""
        rows = []
        for prompt, texts in zip(prompts, sample(prompts, 2 * count)):
            different = [text for text in dict.fromkeys(texts) if text.strip()][:count]
            if len(different) == count:
                rows.append((prompt, ranked(different)))
        equal = sum(len(set(sentiment(None, texts))) < count for _, texts in rows)
        print(f"{len(prompts) - len(rows)} prompts left out; "
              f"gold rewards differ in {1 - equal / len(rows):.1%}")
        return rows

    def write_judged(name, prompts):
        pairs, fours = judged(prompts, 2), judged(prompts[: len(prompts) // 4], 4)
        pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in pairs]
        write(f"comparisons{name}.jsonl", pairs)
        write(f"rankings{name}.jsonl", [{"prompt": p, "responses": texts} for p, texts in fours])

    heldout = [p for p, _ in world["prompts_heldout"]]
    write_judged("", [p for p, _ in world["prompts"][3000:]])
    write_judged("_heldout", heldout)

    # An arena: one review of the same film by two players, and a judge who cannot always decide
    # (ties: Rao and Kupper).
    players = {
        f"{name}, temperature {t}": [texts[0] for texts in sample(heldout[:500], 1, name, t)]
        for name in ("tiny-base", "tiny-sft")
        for t in (0.5, 0.7, 1.0, 1.3)
    }
    players["human"] = [review(rng, genre) for _, genre in world["prompts_heldout"][:500]]

    battles = []
    for _ in range(4000):
        (a, b), n = rng.sample(list(players), 2), rng.randrange(500)
        difference = sentiment(None, [players[a][n]])[0] - sentiment(None, [players[b][n]])[0]
        a_wins, b_wins = 1 / (1 + 1.5 * math.exp(-difference)), 1 / (1 + 1.5 * math.exp(difference))
        outcomes = {"model_a": a_wins, "model_b": b_wins, "tie": 1 - a_wins - b_wins}
        winner = rng.choices(list(outcomes), list(outcomes.values()))[0]
        battles.append({"model_a": a, "model_b": b, "winner": winner})
    write("battles.jsonl", battles)


def optimum(log_ratio, rewards, beta: float):
    """Samples of a proposal q, log_ratio = log pi_ref / q and rewards, each [prompts, samples] ->
    the KL of pi* = pi_ref exp(r / beta) / Z to pi_ref (nats), its reward, and how many of its own
    samples these are worth, each [prompts]."""
    log_weights = log_ratio + rewards / beta
    weights = log_weights.softmax(1)
    reward = (weights * rewards).sum(1)
    kl = reward / beta - (log_weights.logsumexp(1) - math.log(log_weights.shape[1]))
    return kl, reward, 1 / (weights**2).sum(1)


def make_frontier() -> None:
    """The best gold reward that any policy can reach at each KL from tiny-sft, on held-out reviews.

    The optimum is known up to its normaliser, pi* = pi_ref exp(r / beta) / Z (DPO's equation 4), so
    samples of any proposal q become samples of pi* with weights w proportional to
    pi_ref / q exp(r / beta): E*[r] = sum w r / sum w, KL = E*[r] / beta - log Z. tiny-sft's own
    samples run out at about 2 nats; further proposals are policies fitted to the re-weighted
    samples, at smaller and smaller beta. q is the mixture of all of them (the balance heuristic).
    """
    import torch

    from common import generate, load_model, load_tokenizer, sequence_logprobs

    torch.manual_seed(SEED + 3)
    world = worlds()
    train = [p for p, _ in world["prompts"][3000:4000]]
    heldout = [p for p, _ in world["prompts_heldout"][:32]]
    tokenizer = load_tokenizer(str(ASSETS / "tiny-sft"))
    policies = [load_model(str(ASSETS / "tiny-sft"))]
    for beta in FRONTIER_PROPOSALS:
        reference, last = policies[0], policies[-1]
        rollout = generate(last, tokenizer, train, 16)
        log_ratio = sequence_logprobs(reference, rollout.rows)
        log_ratio = log_ratio - sequence_logprobs(last, rollout.rows)
        rewards = torch.tensor(sentiment(None, rollout.completions))
        weights = (log_ratio + rewards / beta).view(-1, 16).softmax(1)
        chosen = torch.multinomial(weights, 8, replacement=True)
        chosen = chosen + 16 * torch.arange(len(train))[:, None]
        rows = [rollout.rows[i] for i in chosen.flatten().tolist()]
        policies.append(fitted(last, rows))
        print(f"proposal for beta {beta}: {len(rows)} samples of the one before, re-weighted",
              flush=True)

    rollouts = [generate(policy, tokenizer, heldout, 192) for policy in policies]
    rows = [row for rollout in rollouts for row in rollout.rows]
    texts = [text for rollout in rollouts for text in rollout.completions]
    logps = torch.stack([sequence_logprobs(policy, rows) for policy in policies]).double()
    log_ratio = logps[0] - (logps.logsumexp(0) - math.log(len(policies)))  # to the mixture
    rewards = torch.tensor(sentiment(None, texts)).double()

    def by_prompt(x):  # -> [prompt, sample]
        return x.view(len(policies), len(heldout), 192).transpose(0, 1).flatten(1)

    log_ratio, rewards = by_prompt(log_ratio), by_prompt(rewards)
    points = []
    for beta in torch.logspace(1.0, -0.5, 46).tolist():
        kl, reward, effective = optimum(log_ratio, rewards, beta)
        if effective.mean() >= 50:
            points.append({"beta": beta, "kl": kl.mean().item(), "reward": reward.mean().item(),
                           "effective_samples": effective.mean().item()})
            print(" ".join(f"{k} {v:.3f}" for k, v in points[-1].items()), flush=True)
    reward_ref = (log_ratio.softmax(1) * rewards).sum(1).mean().item()
    table = {"reward_ref": reward_ref, "points": points}
    (ASSETS / "frontier.json").write_text(json.dumps(table, indent=0) + "\n")


def fitted(policy, rows):
    """A copy of the policy, trained on these rows once."""
    import torch

    from common import micro_batches, pad_rows, set_learning_rate, token_logprobs

    policy = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True, weight_decay=0.0)
    order = torch.randperm(len(rows)).view(-1, 80).tolist()
    for step, batch in enumerate(order):
        set_learning_rate(optimizer, step, len(order), 1e-3)
        tokens = sum(sum(rows[i].mask) for i in batch)
        for group in micro_batches([len(rows[i].ids) for i in batch]):
            input_ids, mask = pad_rows([rows[batch[i]] for i in group])
            (-token_logprobs(policy, input_ids, mask).sum() / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


STAGES = {
    "text": make_text,
    "base": make_base,
    "sft": make_sft,
    "samples": make_samples,
    "rm": make_rm,
    "frontier": make_frontier,
}

if __name__ == "__main__":
    for stage in sys.argv[1:] or STAGES:
        STAGES[stage]()
