"""The library's own attack on its reliability, as a table.

`python -m tests.attack [NAME ...] [--seed N] [--count N]`. Each kind of attack is one file here. A trial is made of its seed
alone, so that `python -m tests.attack NAME --seed N --count 1` repeats it. All of it is done in processes of its own.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.attack.trials import FAILED, KINDS, REFUSED, SURVIVED, Trial, count_of, run

HEAD = f"{'attack':<10}{'tried':>8}{'survived':>10}{'refused':>9}{'failed':>8}{'seconds':>9}"


def row(name: str, trials: list[Trial], seconds: float) -> str:
    """One row of the table, and a line for each failed trial."""
    counts = [sum(t.verdict == verdict for t in trials) for verdict in (SURVIVED, REFUSED, FAILED)]
    lines = [f"{name:<10}{len(trials):>8}{counts[0]:>10}{counts[1]:>9}{counts[2]:>8}{seconds:>9.0f}"]
    lines += [f"  --seed {t.seed}: {t.why}" for t in trials if t.verdict == FAILED]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a trial failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"kinds of attack, of {', '.join(KINDS)}; all if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; each further one has the next")
    parser.add_argument("--count", type=int, help="trials of each kind, instead of its own number")
    parser.add_argument("--verbose", action="store_true", help="prints each trial, and failed ones in full")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in KINDS]:
        parser.error(f"NAME must be one of {', '.join(KINDS)}, got {unknown[0]!r}")
    print(HEAD, flush=True)
    failed = 0
    for name in arguments.names or KINDS:
        begin, trials = time.perf_counter(), []
        for trial in run(name, range(arguments.seed, arguments.seed + (arguments.count or count_of(name)))):
            trials.append(trial)
            if arguments.verbose:
                print(f"  {name} {trial.seed}: {trial.verdict} {trial.trace or trial.why}", file=sys.stderr, flush=True)
        failed += sum(t.verdict == FAILED for t in trials)
        print(row(name, trials, time.perf_counter() - begin), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
