#!/usr/bin/env python3
"""Counts the instructions of onepass' hot kernels, which no busy machine disturbs.

Usage: tools/instructions.py [--record]

Runs the crate's example `counted` under callgrind, with two numbers of calls:
the difference is that of the calls. Compares with tools/instructions.txt, and
fails where a count is more than 2 percent higher; --record writes the file
anew. Counts of another compiler are shown and not judged. valgrind knows neither AVX-512 nor VPCLMULQDQ, so that the tiers are
portable and avx2-pclmul: what they share with the others, which is all but the
vectors, is counted too.

Counts say what was added to a loop or to a call, not how fast it is.
"""

import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECORD = os.path.join(ROOT, "tools", "instructions.txt")
TIERS = ["portable", "avx2-pclmul"]
WORKS = ["copy-4k", "copy-4k-odd", "verify-64k", "update-pq-4k", "row-4+1-64k", "row-4+2-64k",
         "reconstruct-two-4k"]
CALLS = (2, 12)
MOST = 1.02


def build():
    command = ["cargo", "build", "--release", "-q", "-p", "stableio-onepass", "--example", "counted"]
    subprocess.run(command, cwd=ROOT, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    return os.path.join(target, "release", "examples", "counted")


def total(program, tier, work, calls):
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, work, str(calls)]
    env = dict(os.environ, STABLEIO_ONEPASS=tier)
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode != 0 or not found:
        sys.exit(f"{work} on {tier}: {run.stderr}")
    return int(found[1])


def count(program, tier, work):
    few, many = (total(program, tier, work, calls) for calls in CALLS)
    return round((many - few) / (CALLS[1] - CALLS[0]))


def compiler():
    return subprocess.run(["rustc", "--version"], check=True, capture_output=True, text=True).stdout.strip()


def recorded():
    """The compiler, and the counts."""
    with open(RECORD) as file:
        made_by, *lines = file
    counts = {(tier, work): int(found) for tier, work, found in map(str.split, lines)}
    return made_by.removeprefix("# ").strip(), counts


def main():
    program = build()
    counts = {(tier, work): count(program, tier, work) for tier in TIERS for work in WORKS}
    if sys.argv[1:] == ["--record"]:
        with open(RECORD, "w") as file:
            file.write(f"# {compiler()}\n")
            file.writelines(f"{tier:<12} {work:<20} {counts[tier, work]:>8}\n" for tier, work in counts)
        return
    (made_by, before), failed = recorded(), False
    for key, now in counts.items():
        ratio = now / before[key]
        failed |= ratio > MOST
        print(f"{key[0]:<12} {key[1]:<20} {now:>8} {ratio:>6.3f}{' MORE' if ratio > MOST else ''}")
    if made_by != compiler():
        print(f"not judged: recorded with {made_by}, this is {compiler()}")
    elif failed:
        sys.exit("a kernel takes more instructions than recorded; --record if that is meant")


if __name__ == "__main__":
    main()
