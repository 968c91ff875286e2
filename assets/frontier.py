"""The most gold reward that any policy can gain over tiny-sft at each KL, as make.py computed it from
pi* = pi_ref exp(r / beta) / Z."""

import json
from pathlib import Path


def gain_at(kl: float) -> float | None:
    """Nats per completion -> gold reward above the reference's; None beyond the points of frontier.json,
    linear between them."""
    table = json.loads((Path(__file__).resolve().parent / "frontier.json").read_text())
    points = [(0.0, 0.0)] + [(p["kl"], p["reward"] - table["reward_ref"]) for p in table["points"]]
    for (kl_0, gain_0), (kl_1, gain_1) in zip(points, points[1:]):
        if kl_0 < kl <= kl_1:
            return gain_0 + (gain_1 - gain_0) * (kl - kl_0) / (kl_1 - kl_0)
    return None
