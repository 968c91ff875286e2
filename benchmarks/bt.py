"""fit_bt side by side with choix, the usual Python package for Bradley-Terry, in one run: -> benchmarks/results/bt.json

    pip install -r benchmarks/requirements.txt
    python benchmarks/bt.py --threads 1                    # about 3 minutes
    python benchmarks/bt.py --threads 1 --only large       # 10,000 items, 10^7 comparisons

1,000 items with rewards from N(0, 1), 10^6 comparisons of random pairs, no ties (choix knows none). The solvers take
turns, five times; the medians are reported. fit_bt starts from the comparisons (tensors i, j, mu): checks, counts and
the test of connectedness are in its time. choix.ilsr_pairwise starts from its list of (winner, loser) tuples,
choix.ilsr_pairwise_dense from the counted matrix: counting is not in its time, and given beside it. Peak memory is of a
process that does nothing else, the data included. Processor seconds are given beside wall-clock seconds: on a busy
machine only they compare.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--only", choices=["choix", "large"])
parser.add_argument("--alone", help=argparse.SUPPRESS)  # one solver in this process, for its peak memory
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import choix  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import bt_bandit as bt  # noqa: E402

torch.set_num_threads(args.threads)


def simulate(num_items, num):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(num_items, generator=generator, dtype=torch.float64)
    i = torch.randint(num_items, (num,), generator=generator)
    j = (i + torch.randint(1, num_items, (num,), generator=generator)) % num_items
    mu = (torch.rand(num, generator=generator, dtype=torch.float64) < torch.sigmoid(rewards[i] - rewards[j])).double()
    return i, j, mu


def as_tuples(i, j, mu):
    won = mu == 1
    return list(zip(torch.where(won, i, j).tolist(), torch.where(won, j, i).tolist()))


def as_matrix(i, j, mu, num_items):
    won = (mu == 1).numpy()
    winners, losers = np.where(won, i, j), np.where(won, j, i)
    return np.bincount(winners * num_items + losers, minlength=num_items**2).reshape(num_items, num_items).astype(float)


def timed(function):
    """-> (wall-clock seconds, processor seconds), result"""
    began, cpu = time.perf_counter(), time.process_time()
    result = function()
    return (time.perf_counter() - began, time.process_time() - cpu), result


def peak_mb(which):
    command = [sys.executable, __file__, "--alone", which, "--threads", str(args.threads)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_mb():  # not ru_maxrss, which a process inherits from the one that started it
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def alone(which):
    """One solver in a fresh process -> its time, peak memory and convergence."""
    items, num = (10_000, 10**7) if which == "large" else (1000, 10**6)
    i, j, mu = simulate(items, num)
    before = memory_mb()
    if which in ("fit_bt", "large"):
        seconds, fit = timed(lambda: bt.fit_bt(i, j, mu, items))
        peak = memory_mb()
        gradient = bt.loss_and_derivatives(fit.rewards, fit.wins, 0.0)[1]
        more = {"iterations": fit.iterations, "gradient_norm": gradient.norm().item()}
    else:
        data = (items, as_tuples(i, j, mu)) if which == "ilsr_pairwise" else (as_matrix(i, j, mu, items),)
        seconds, more = timed(lambda: getattr(choix, which)(*data))[0], {}
        peak = memory_mb()
    results = {"seconds": seconds[0], "cpu_seconds": seconds[1], "peak_mb": peak, "data_mb": before,
               **more}
    print(json.dumps(results))


def against_choix():
    items = 1000
    i, j, mu = simulate(items, 10**6)
    tuples, ((count_seconds, count_cpu), matrix) = as_tuples(i, j, mu), timed(lambda: as_matrix(i, j, mu, items))
    solvers = {"fit_bt": lambda: bt.fit_bt(i, j, mu, items),
               "ilsr_pairwise": lambda: choix.ilsr_pairwise(items, tuples),
               "ilsr_pairwise_dense": lambda: choix.ilsr_pairwise_dense(matrix)}
    # The first call of a process pays for loading kernels.
    bt.fit_bt(i[:100_000], j[:100_000], mu[:100_000], items, l2=1.0)
    choix.ilsr_pairwise_dense(matrix[:50, :50] + 1)
    seconds, rewards = {name: [] for name in solvers}, {}
    for turn in range(args.repeats):
        for name in (list(solvers), list(solvers)[::-1])[turn % 2]:
            took, rewards[name] = timed(solvers[name])
            seconds[name].append(took)
    fit = rewards["fit_bt"]
    rewards = {name: fit.rewards if name == "fit_bt" else torch.tensor(r - r.mean()) for name, r in rewards.items()}
    results = {"items": items, "comparisons": 10**6, "threads": args.threads,
               "iterations": fit.iterations, "count_matrix_seconds": count_seconds,
               "count_matrix_cpu_seconds": count_cpu}
    for name in solvers:
        r = rewards[name].clone().requires_grad_()
        loss = bt.bt_loss(r, i, j, mu)
        loss.backward()
        wall, cpu = zip(*seconds[name])
        results |= {f"{name}_seconds": statistics.median(wall), f"{name}_seconds_all": wall,
                    f"{name}_cpu_seconds": statistics.median(cpu), f"{name}_loss": loss.item(),
                    f"{name}_gradient_norm_at_rewards": r.grad.norm().item(),
                    f"{name}_peak_mb": peak_mb(name)["peak_mb"]}
        if name != "fit_bt":
            results |= {f"speedup_over_{name}": results[f"{name}_seconds"] / results["fit_bt_seconds"],
                        f"cpu_speedup_over_{name}": results[f"{name}_cpu_seconds"] / results["fit_bt_cpu_seconds"],
                        f"loss_minus_{name}": results["fit_bt_loss"] - results[f"{name}_loss"],
                        f"largest_difference_to_{name}": (rewards[name] - rewards["fit_bt"]).abs().max().item()}
    return results


if __name__ == "__main__":
    if args.alone:
        alone(args.alone)
        sys.exit()
    path = ROOT / "benchmarks" / "results" / "bt.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {"torch": torch.__version__, "choix": "0.4.1", "device": f"CPU, {os.cpu_count()} cores"}
    if args.only != "large":
        results["choix_side_by_side"] = against_choix()
    if args.only != "choix":
        results["large"] = {"items": 10_000, "comparisons": 10**7, "threads": args.threads, **peak_mb("large")}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
