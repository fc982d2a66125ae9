#!/usr/bin/env python3
"""Looks at the machine code of onepass' kernels: no foreign byte is loaded twice (ONCE-1).

Usage: tools/loads_once.py [DISASSEMBLY]

Builds the crate's example and disassembles it (objdump), or reads what
`objdump -dC --no-show-raw-insn` said of a program that was built with
RUSTFLAGS="-C symbol-mangling-version=v0". Looks at x86-64 only.

The source says that foreign vectors are loaded by inline assembly alone, from
an address in a register: `vmovdqu64 (%rbx),%zmm1`. The code is right if

- a fused kernel has such loads for two steps (the first one and that of the
  loop), or for a multiple of steps where the loop is unrolled, and no other
  vector loads but constants and spilled registers; with parity, also what is
  XORed: three terms (old, P, Q) for each vector that is loaded;
- so has a kernel across columns, for each of the columns; there, two terms (P,
  Q) for each place;
- it calls nothing;
- without parity it stores as many vectors as it loads, or none;
- a plain copy has as many stores as loads.

Before it says that all is well, it breaks one of each and sees that it notices.
"""

import os
import re
import subprocess
import sys

LANES = 4
ABREAST = 2
KERNEL = re.compile(r"<<stableio_onepass::(avx\w+)::.* as .*Vectors>::pass::<.*, (\d), (true|false)>>:$")
ACROSS = re.compile(r"<<stableio_onepass::(avx\w+)::.* as .*Vectors>::across::<.*>>:$")
COPY = re.compile(r"<stableio_onepass::avx(512::load_all|2::load_vectors)>:$")
VECTOR = re.compile(r"%[yz]mm\d")


def disassemble():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    target = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")), "loads-once")
    env = dict(os.environ, RUSTFLAGS="-C symbol-mangling-version=v0", CARGO_TARGET_DIR=target)
    build = ["cargo", "build", "--release", "-q", "-p", "stableio-onepass", "--example", "speed"]
    subprocess.run(build, cwd=root, env=env, check=True)
    program = os.path.join(target, "release", "examples", "speed")
    dump = ["objdump", "-dC", "--no-show-raw-insn", program]
    return subprocess.run(dump, check=True, capture_output=True, text=True).stdout


def functions(text):
    for part in text.split("\n\n"):
        head, *body = part.strip().split("\n")
        # %rbp and %r13 are encoded with a displacement even if there is none.
        yield head, [line.split("\t")[-1].split("#")[0].strip().replace(" 0x0(", " (") for line in body]


def accesses(body):
    """Vector loads by a plain address, other vector loads, and vector stores; not of the stack."""
    plain, other, stores = [], [], []
    for instruction in body:
        if not VECTOR.search(instruction) or "(" not in instruction:
            continue
        if "(%rip)" in instruction or "(%rsp" in instruction:
            continue
        name, operands = instruction.split(None, 1)
        if re.search(r"\)(\{%k\d\})?$", operands):
            stores.append(instruction)
        elif name.startswith("vmovdqu") and operands.startswith("(") and "," not in operands[: operands.index(")")]:
            plain.append(instruction)
        else:
            other.append(instruction)
    return plain, other, stores


def faults_of_loop(body, loads, terms_of_step):
    """What is wrong with a loop whose steps have so many foreign loads, and add so many terms."""
    plain, other, _ = accesses(body)
    if not plain or len(plain) % (2 * loads):
        yield f"{len(plain)} foreign loads"
    terms = [i for i in other if i.startswith("vpxor")]
    tables = [i for i in other if i.startswith("vbroadcast")]
    if len(terms) + len(tables) != len(other) or (tables and not terms_of_step):
        yield f"other loads: {other}"
    if len(terms) * loads != terms_of_step * len(plain):
        yield f"{len(terms)} terms for {len(plain)} vectors"
    calls = [i for i in body if i.startswith("call")]
    if calls:
        yield f"calls: {calls}"


def faults_of_kernel(body, store, parity):
    yield from faults_of_loop(body, LANES, 3 * LANES if parity else 0)
    plain, _, stores = accesses(body)
    if not parity and len(stores) != (len(plain) if store else 0):
        yield f"{len(stores)} stores for {len(plain)} loads"


def faults_of_copy(body):
    plain, other, stores = accesses(body)
    if other or not plain or len(plain) != len(stores):
        yield f"{len(plain)} loads, {len(stores)} stores, {other}"


def with_second_load(body):
    """The code as it would be if the first vector were loaded again."""
    at = next(i for i, instruction in enumerate(body) if instruction in accesses(body)[0])
    return body[: at + 1] + body[at:]


def main():
    text = open(sys.argv[1]).read() if len(sys.argv) > 1 else disassemble()
    kernels, across, copies, wrong = 0, 0, 0, 0
    for head, body in functions(text):
        if found := KERNEL.search(head):
            check = lambda body: list(faults_of_kernel(body, found[2] != "0", found[3] == "true"))
            kernels += 1
        elif ACROSS.search(head):
            check, across = lambda body: list(faults_of_loop(body, ABREAST, 2)), across + 1
        elif COPY.search(head):
            check, copies = lambda body: list(faults_of_copy(body)), copies + 1
        else:
            continue
        for fault in check(body):
            wrong += 1
            print(f"{head}\n  {fault}")
        if not wrong:
            assert check(with_second_load(body)), f"{head}: a second load is not noticed"
    if not kernels or not across or not copies:
        sys.exit("no kernels found: are the names as they were?")
    print(f"{kernels} fused kernels, {across} across columns, {copies} copies: {wrong} faults")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
