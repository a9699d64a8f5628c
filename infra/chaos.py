#!/usr/bin/env python
"""Chaos test: a tiny two-rank run with random faults must equal an undisturbed run bit for bit.

    python infra/chaos.py --minutes 30 --seed 1

Processes are killed and frozen, disks are unmounted or full, system calls fail, the clock steps, the network
and the store are disconnected. It runs in its own namespaces and does not affect the machine. Called again
with the same directory, it continues where it was interrupted. See infra/docs/operations.md.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 1600
"""100 steps."""


def main() -> int:
    """Run the episodes; return 0 if no invariant was violated and faults were frequent enough, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of episodes, over all calls (default 30)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the choice of faults (default 1)")
    parser.add_argument("--directory", type=Path, help="work folder; default build/chaos/seed-SEED")
    parser.add_argument(
        "--at-least",
        type=int,
        help="fail if a possible fault occurred less often; default 1 for each half hour",
    )
    parser.add_argument("--episodes", type=int, help="end after this many episodes, if minutes are left")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAULT", help='e.g. kill "full disk" freeze')
    parser.add_argument("--images", type=int, default=IMAGES, help=f"length of each run (default {IMAGES})")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from infra.chaos_faults import namespaces

    status = namespaces.run_isolated([sys.executable, *sys.argv])
    if status is not None:
        return status
    if namespaces.is_isolated():
        namespaces.prepare()
    from infra.chaos_faults.campaign import ChaosCampaign

    directory = (options.directory or ROOT / "build" / "chaos" / f"seed-{options.seed}").resolve()
    least = int(options.minutes // 30) if options.at_least is None else options.at_least
    try:
        campaign = ChaosCampaign(directory, options.seed, options.minutes, options.images, options.only)
        for name, reason in campaign.not_run.items():
            print(f"not run: {name}: {reason}", flush=True)
        campaign.run(options.episodes)
    except ValueError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    print(campaign.table(least))
    return int(bool(campaign.violations() or campaign.missing(least)))


if __name__ == "__main__":
    sys.exit(main())
