#!/usr/bin/env python3
"""Takes the data out of the members of a stableio array, without stableio.

Written from docs/format.md alone, with Python's standard library alone: the
page is complete if this works. Members are only read. Of an array that was not
shut down the log is replayed in memory.

Exit: 0 all data is there, 1 no array can be assembled, 2 blocks are lost.
"""

import argparse
import os
import stat
import struct
import sys
from collections import defaultdict

INTENDED = 1 << 63
BLOCK = 4096
ZERO = bytes(BLOCK)
UNWRITTEN, WRITTEN, LOST, UNGUARDED = 0, 1, 2, 3
NONE = (0, 0, UNWRITTEN, 0)  # the tuple of an unwritten block


class Refused(Exception):
    """No array can be assembled from these members."""


# ---- Checksums and GF(256) ----

def crc_tables():
    """Slicing by 8: table k is that of a byte with k bytes behind it."""
    first = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x9A6C9329AC4BC9B5 if value & 1 else 0)
        first.append(value)
    tables = [first]
    for _ in range(7):
        tables.append([first[v & 255] ^ (v >> 8) for v in tables[-1]])
    return tables


TABLES = crc_tables()


def crc(data):
    """CRC-64/NVME of whole words of 8 bytes."""
    h, g, f, e, d, c, b, a = TABLES
    value = 0xFFFFFFFFFFFFFFFF
    for word in struct.unpack(f"<{len(data) // 8}Q", data):
        x = value ^ word
        value = (a[x & 255] ^ b[x >> 8 & 255] ^ c[x >> 16 & 255] ^ d[x >> 24 & 255]
                 ^ e[x >> 32 & 255] ^ f[x >> 40 & 255] ^ g[x >> 48 & 255] ^ h[x >> 56])
    return value ^ 0xFFFFFFFFFFFFFFFF


ZERO_GUARD = crc(ZERO)


def guard(block):
    return ZERO_GUARD if block == ZERO else crc(block)


POWER = [1]
for _ in range(254):
    POWER.append(POWER[-1] << 1 ^ (0x11D if POWER[-1] & 0x80 else 0))
LOGARITHM = {value: i for i, value in enumerate(POWER)}
FACTORS = {}


def times(factor, block):
    """Every byte of the block times the factor."""
    if factor not in FACTORS:
        by = LOGARITHM[factor]
        FACTORS[factor] = bytes([0] + [POWER[(by + LOGARITHM[v]) % 255] for v in range(1, 256)])
    return block.translate(FACTORS[factor])


def inverse(factor):
    return POWER[-LOGARITHM[factor] % 255]


def xor(*blocks):
    total = 0
    for block in blocks:
        total ^= int.from_bytes(block, "little")
    return total.to_bytes(BLOCK, "little")


# ---- Superblocks and what follows from them ----

class Superblock:
    def __init__(self, block):
        """Parses, or raises ValueError."""
        if len(block) != BLOCK or block[:8] != b"stableio":
            raise ValueError("no superblock")
        if crc(block[:4088]) != struct.unpack_from("<Q", block, 4088)[0]:
            raise ValueError("damaged superblock")
        (self.format, self.flags, self.array, self.member, self.generation, self.epoch, _,
         self.level, self.n, self.role, checksum, self.c, self.stripes, self.size, name,
         self.log, _, self.log_from, _) = struct.unpack_from("<II16s16sQQQBBBBIQQ64sIIQQ", block, 8)
        self.checksums = checksum == 1
        if self.format != 1 or checksum > 1:
            raise ValueError(f"format {self.format}, checksum {checksum}: not known here")
        self.name = name.rstrip(b"\0").decode("utf-8", "replace")
        self.table = block[256:1280]
        openings = [h for h in struct.unpack_from("<256Q", block, 1280) if h]
        self.openings = [h & ~INTENDED for h in openings]
        self.begun = [h for h in openings if not h & INTENDED]
        self.heard = {h & ~INTENDED for h in openings if h & INTENDED}
        self.roles = [struct.unpack_from("<16sB7xQ16sQ", self.table, 64 * i) for i in range(16)]
        least, most = {0: (1, 1), 1: (2, 8), 5: (3, 16), 6: (4, 16)}.get(self.level, (17, 0))
        if not least <= self.n <= most or self.c not in [1 << i for i in range(9)]:
            raise ValueError("impossible level, members or chunk")
        self.parities = {5: 1, 6: 2}.get(self.level, 0)
        self.d = self.n - self.parities if self.parities else 1
        self.w = self.d + (self.parities == 2)
        self.group = self.n if self.parities else 1
        self.redundancy = self.parities or self.n - 1
        self.record = self.d + self.parities * self.w
        self.r = 1 << (240 // self.record).bit_length() - 1
        self.heights = self.stripes // self.group * self.c
        self.pages = -(-self.heights // self.r)
        self.guards_at = 65536 + BLOCK * self.log
        chunk = self.chunk = BLOCK * self.c
        self.data_at = -(-(self.guards_at + self.pages * BLOCK) // chunk) * chunk
        if self.data_at + self.stripes * chunk > self.size - BLOCK or not self.stripes:
            raise ValueError("regions that overlap")
        if self.role >= self.n or self.member not in (self.roles[self.role][0], self.roles[self.role][3]):
            raise ValueError("not a member of its own array")

    def place(self, stripe):
        """Members of P and Q (None without) and of the columns (lists: raid1 has several)."""
        if not self.parities:
            return None, None, [list(range(self.n))]
        p = self.n - 1 - stripe % self.n
        q = (p + 1) % self.n if self.parities == 2 else None
        return p, q, [[(p + self.parities + k) % self.n] for k in range(self.d)]

    def follows(self, older):
        """Whether this one comes from what `older` was."""
        if not older.begun or older.begun[0] in self.begun:
            return True
        if older.begun[0] in self.heard:
            both = enumerate(zip(older.roles[:self.n], self.roles[:self.n]))
            return any(role != older.role and then[0] == now[0] and then[1] == now[1] == 1
                       for role, (then, now) in both)
        return len(self.openings) == 256 and older.epoch + 256 < self.epoch

    def newer(self, other):
        """Whether `other` is older than this one; None if they were written apart."""
        if self.openings[:1] == other.openings[:1]:
            if self.generation == other.generation and self.table != other.table:
                return None
            return self.generation > other.generation
        mine, its = self.follows(other), other.follows(self)
        if mine and its:
            return self.generation >= other.generation
        return mine if mine or its else None


class Member:
    def __init__(self, path):
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.bytes = os.lseek(self.fd, 0, os.SEEK_END)
        self.superblock = None
        self.look(self.bytes // BLOCK * BLOCK)

    def look(self, size):
        """The newest valid superblock, if the member has `size` bytes."""
        for at in (0, size - BLOCK):
            try:
                found = Superblock(self.read(at) or b"")
            except ValueError as why:
                if self.superblock is None:
                    self.why = why
                continue
            if at == 0 and found.size != size and found.size <= self.bytes:
                self.superblock = found
                self.look(found.size)
                return
            if self.superblock is None or found.generation > self.superblock.generation:
                self.superblock = found

    def read(self, at):
        """A block, or None if it cannot be read."""
        try:
            block = os.pread(self.fd, BLOCK, at)
        except OSError:
            return None
        return block if len(block) == BLOCK else None


def say(text):
    print(f"extract: {text}", file=sys.stderr)


def assemble(paths):
    """The superblock to believe and the members by role, None where one is missing."""
    members = [Member(path) for path in paths]
    sizes = {m.superblock.size for m in members if m.superblock}
    for m in members:
        for size in sizes if m.superblock is None else ():
            m.look(size)
        if m.superblock is None:
            say(f"{m.path}: {m.why}: left out")
    members = [m for m in members if m.superblock]
    if not members:
        raise Refused("no member has a superblock")
    best = members[0]
    for m in members:
        if m.superblock.newer(best.superblock):
            best = m
    s = best.superblock
    for m in members:
        if m.superblock.array != s.array:
            raise Refused(f"{m.path} and {best.path} belong to different arrays")
        for o in members:
            a, b = m.superblock, o.superblock
            if m is not o and a.member == b.member:
                raise Refused(f"{m.path} and {o.path} are copies of one member")
            if a.newer(b) is None:
                raise Refused(f"{m.path} and {o.path} have been written apart: name only those whose data is wanted")
    by_role = [None] * s.n
    for m in members:
        member, state, _, replacement, _ = s.roles[m.superblock.role]
        if m.superblock.member == member and state == 1:
            by_role[m.superblock.role] = m
        elif m.superblock.member == replacement:
            say(f"{m.path}: a replacement that is being filled: left out")
        else:
            say(f"{m.path}: stale: left out")
    gone = [str(role) for role, m in enumerate(by_role) if m is None]
    if len(gone) > s.redundancy:
        raise Refused(f"{len(gone)} of {s.n} members are missing (roles {', '.join(gone)}), {s.redundancy} may be")
    if gone:
        say(f"members missing: roles {', '.join(gone)}")
    return s, by_role


# ---- The log ----

class Write:
    """What one batch says about one row: column (255: P) -> (old, new, content)."""

    def __init__(self, sequence):
        self.sequence = sequence
        self.columns = {}

    def whole(self, d):
        data = (change for k, change in self.columns.items() if k < d)
        return all(content or new[2] != WRITTEN for _, new, content in data)


def tuple_at(data, at):
    """Guard, application tag, state, reference tag; guard None where a written block's was not kept."""
    found, application, state, reference = struct.unpack_from("<QHHI", data, at)
    return (None, application, WRITTEN, reference) if state == UNGUARDED else (found, application, state, reference)


def fits(t, block):
    """Whether this may be a block of the tuple."""
    return t[2] == WRITTEN and (t[0] is None or t[0] == guard(block))


def read_log(s, by_role):
    """Writes of the rows that the log names, in order, and what was flushed."""
    heads = {}
    for m in filter(None, by_role):
        for slot in range(s.log):
            block = m.read(65536 + slot * BLOCK)
            if block is None or struct.unpack_from("<Q", block, 24)[0] not in s.openings:
                continue
            value, sequence, epoch = struct.unpack_from("<QQQ", block)
            if epoch == s.epoch and sequence >= s.log_from and sequence % s.log == slot and crc(block[8:]) == value:
                heads[sequence] = block
    for last in sorted(heads, reverse=True):
        if whole_batch(s, by_role, heads, last, content_too=True) is not None:
            break
    else:
        return {}, 0
    tail, durable, _, blocks = struct.unpack_from("<QQQI", heads[last], 32)
    rows, at, end = defaultdict(list), max(tail, s.log_from), last + blocks
    while at < end:
        batch = whole_batch(s, by_role, heads, at, content_too=False)
        if batch is None:
            say(f"the log is damaged at sequence {at}")
            at = min(sequence for sequence in heads if sequence > at)
            continue
        for row, write in batch.items():
            rows[row].append(write)
        at += struct.unpack_from("<I", heads[at], 56)[0]
    return rows, durable


def whole_batch(s, by_role, heads, first, content_too):
    """Writes of the batch by row, None if something of it is missing."""
    first_sequence, blocks, count = struct.unpack_from("<QIH", heads.get(first, ZERO), 48)
    if first_sequence != first or not 0 < count <= blocks:
        return None
    writes = {}
    for sequence in range(first, first + count):
        block = heads.get(sequence)
        if block is None or struct.unpack_from("<Q", block, 48)[0] != first:
            return None
        for i in range(struct.unpack_from("<H", block, 62)[0]):
            at = 64 + 56 * i
            stripe, row, column, content = struct.unpack_from("<QIB3xQ", block, at)
            old, new = tuple_at(block, at + 24), tuple_at(block, at + 40)
            data = None
            if content:
                where = 65536 + content % s.log * BLOCK
                copies = (m.read(where) for m in by_role if m)
                data = next((c for c in copies if c and guard(c) == new[0]), None)
                if data is None and content_too:
                    return None
            write = writes.setdefault((stripe, row), Write(first))
            write.columns[column] = (old, new, data)
    return writes


# ---- Rows ----

def reconstruct(s, blocks, unknown, p, q):
    """Every way to have the unknown columns from the others and parity."""
    known = [(k, block) for k, block in enumerate(blocks) if k not in unknown and block]
    if p:
        p = xor(p, *(block for _, block in known))
    if q:
        q = xor(q, *(times(POWER[k], block) for k, block in known))
    if len(unknown) == 1:
        if p:
            yield [p]
        if q:
            yield [times(inverse(POWER[unknown[0]]), q)]
    elif len(unknown) == 2 and p and q:
        a, b = unknown
        first = times(inverse(POWER[a] ^ POWER[b]), xor(times(POWER[b], p), q))
        yield [first, xor(p, first)]


class Array:
    def __init__(self, s, by_role, writes, durable):
        self.s, self.by_role, self.writes, self.durable = s, by_role, writes, durable
        # First tuple of a member's record at each position.
        self.first = []
        for m in range(s.n):
            at, starts = 0, []
            for position in range(s.group):
                starts.append(at)
                at += s.w if m in s.place(position)[:2] else 1
            self.first.append(starts)
        self.written = self.unwritten = self.mended = self.reconstructed = self.misfits = 0
        self.lost = []

    def read_page(self, q):
        """By role the page's sectors, each (sequence, bytes) or None if damaged."""
        s, pages, blank = self.s, [], True
        for role, m in enumerate(self.by_role):
            page = m.read(s.guards_at + q * BLOCK) if m else None
            sectors = [None] * 8
            for i in range(8) if page else ():
                sector = page[512 * i:512 * i + 512]
                value, number, sequence, array, of = struct.unpack_from("<QQQ4sB", sector)
                if not any(sector):
                    sectors[i] = (0, sector)
                elif (number, array, of) == (q * 8 + i, s.array[:4], role) and crc(sector[8:]) == value:
                    possible = max(sector[42::16]) <= UNGUARDED and not any(sector[43::16])
                    sectors[i] = (sequence, sector) if possible else None
            blank = blank and (m is None or page == ZERO)
            pages.append(sectors)
        return pages, blank

    def tuple(self, pages, height, position, column, holders):
        """The newest copy of a tuple, None if none is left."""
        best, newest = None, -1
        for m in holders:
            parity = m in self.s.place(position)[:2]
            number = height % self.s.r * self.s.record + self.first[m][position] + (column if parity else 0)
            sector = pages[m][number // 30]
            if sector and sector[0] > newest:
                newest, best = sector[0], tuple_at(sector[1], 32 + number % 30 * 16)
        return best

    def block(self, role, stripe, row):
        m = self.by_role[role] if role is not None else None
        return m.read(self.s.data_at + stripe * self.s.chunk + row * BLOCK) if m else None

    def rows(self):
        """Every row with its data: stripe, row, and by column the block, None if lost, ZERO unwritten."""
        s = self.s
        logged = defaultdict(set)
        for stripe, row in self.writes:
            logged[(stripe // s.group * s.c + row) // s.r].add((stripe, row))
        for q in range(s.pages):
            pages, blank = self.read_page(q)
            if blank and not logged[q]:
                rest = min(s.r, s.heights - q * s.r)
                self.unwritten += rest * s.group * s.d
                continue
            for height in range(q * s.r, min(q * s.r + s.r, s.heights)):
                for position in range(s.group):
                    stripe, row = height // s.c * s.group + position, height % s.c
                    p, q_role, columns = s.place(stripe)
                    parity = [m for m in (p, q_role) if m is not None]
                    tuples = [self.tuple(pages, height, position, k, columns[k] + parity) for k in range(s.d)]
                    if (stripe, row) in self.writes:
                        blocks = self.recover(stripe, row, tuples)
                    elif all(t and t[2] == UNWRITTEN for t in tuples):
                        self.unwritten += s.d
                        continue
                    else:
                        of_q = self.tuple(pages, height, position, s.d, parity) if q_role is not None else None
                        blocks = self.settled(stripe, row, tuples, of_q)
                    yield stripe, row, blocks

    def count(self, stripe, row, blocks, states):
        for k, state in enumerate(states):
            if state == UNWRITTEN:
                self.unwritten += 1
            elif blocks[k] is None:
                self.lost.append((stripe * self.s.d + k) * self.s.c + row)
            else:
                self.written += 1

    def settled(self, stripe, row, tuples, of_q):
        """A row as it lies there; what does not fit its guard comes from the others."""
        s = self.s
        p_role, q_role, columns = s.place(stripe)
        states = [t[2] if t else LOST for t in tuples]
        # Lost blocks count as zeros in parity, those without a tuple do not: nobody knows.
        blocks = [None if t is None or t[2] == WRITTEN else ZERO for t in tuples]
        for k, t in enumerate(tuples):
            for role in columns[k] if t and t[2] == WRITTEN else ():
                block = self.block(role, stripe, row)
                if block and fits(t, block):
                    blocks[k] = block
                elif self.by_role[role]:
                    self.misfits += 1
        p, q = self.block(p_role, stripe, row), self.block(q_role, stripe, row)
        if not s.checksums:
            # Nothing tells whether parity has in it what was lost.
            known = all(t and t[2] != LOST for t in tuples)
            p, q = known and p, known and of_q and of_q[2] == WRITTEN and q
        elif p and None not in tuples:
            expected = 0 if s.d % 2 else ZERO_GUARD
            for t in tuples:
                expected ^= t[0] if t[2] == WRITTEN else ZERO_GUARD
            if guard(p) != expected:
                self.misfits, p = self.misfits + 1, None
        if q and of_q and not fits(of_q, q):
            self.misfits, q = self.misfits + 1, None
        unknown = [k for k in range(s.d) if blocks[k] is None]
        for found in reconstruct(s, blocks, unknown, p, q) if unknown else ():
            if all(tuples[k] is None or fits(tuples[k], b) for k, b in zip(unknown, found)):
                for k, block in zip(unknown, found):
                    if tuples[k]:
                        blocks[k] = block
                        self.tell_source(columns[k])
                break
        for k, state in enumerate(states):
            if state == LOST:
                blocks[k] = None
        self.count(stripe, row, blocks, states)
        return blocks

    def tell_source(self, roles):
        if any(self.by_role[role] for role in roles):
            self.mended += 1
        else:
            self.reconstructed += 1

    def recover(self, stripe, row, tuples):
        """A row that the log names: steps 1 to 5 of recovery."""
        s, writes = self.s, self.writes[(stripe, row)]
        p_role, q_role, columns = s.place(stripe)
        blocks, states = [None] * s.d, [None] * s.d

        def settle(k, t, block):
            states[k], blocks[k] = t[2], block if t[2] == WRITTEN else ZERO

        # 1. Whole writes, the last ones first.
        p, q = self.block(p_role, stripe, row), self.block(q_role, stripe, row)
        last = next((write for write in reversed(writes) if min(write.columns) < s.d), None)
        if not s.checksums:
            # The medium's are those of the row only where no write may have been under way.
            lost = any(not t or t[2] == LOST for t in tuples)
            p, q = None if last or lost else p, None
        for write in reversed(writes):
            if not write.whole(s.d):
                break
            for k, (_, new, content) in write.columns.items():
                if k < s.d and states[k] is None:
                    settle(k, new, content)
            if write is last:
                p = write.columns.get(255, (0, 0, None))[2] or p
                q = write.columns.get(s.d, (0, 0, None))[2] or q
        # 2. The newest version that some member has.
        versions, absent, later = {}, {}, {}
        for k in range(s.d):
            if states[k] is not None:
                continue
            changes = [(w.sequence, *w.columns[k][:2]) for w in writes if k in w.columns]
            # What fits anything is no evidence of what was there before.
            before = [None if old[0] is None else old for _, old, _ in changes[:1]]
            found = before + [new for _, _, new in changes] if changes else [tuples[k]]
            flushed = [i for i, (sequence, _, _) in enumerate(changes, 1) if sequence < self.durable]
            discards = [i for i, (_, _, new) in enumerate(changes, 1) if new[2] == UNWRITTEN]
            start = max([0] + flushed + discards)
            versions[k], later[k] = found[start:], len(found) - 1 - start
            media = [b for b in (self.block(role, stripe, row) for role in columns[k]) if b]
            absent[k] = not media
            for t in reversed(versions[k]):
                if t is None:
                    continue
                block = next((b for b in media if fits(t, b)), None)
                if block:
                    settle(k, t, block)
                    break
                if t[2] != WRITTEN and len(versions[k]) == 1 or t[2] == UNWRITTEN and start in discards and media:
                    settle(k, t, ZERO)
                    break

        # 3. From parity, as far as it goes.
        def from_parity():
            unknown = [k for k in range(s.d) if states[k] is None]
            for found in reconstruct(s, blocks, unknown, p, q) if unknown else ():
                which = [next((t for t in reversed(versions[k]) if t and fits(t, b)), None)
                         for k, b in zip(unknown, found)]
                if all(which):
                    for k, t, b in zip(unknown, which, found):
                        settle(k, t, b)
                    return

        from_parity()
        # 4. What was unwritten before, and cannot have been written since.
        for k in range(s.d):
            if states[k] is None and (not absent[k] or later[k] <= 1):
                if versions[k][0] and versions[k][0][2] == UNWRITTEN:
                    settle(k, NONE, ZERO)
        from_parity()
        # 5. The rest is lost.
        states = [LOST if state is None else state for state in states]
        for k, state in enumerate(states):
            if state == LOST:
                blocks[k] = None
        self.count(stripe, row, blocks, states)
        return blocks


# ---- The image ----

def extract(arguments):
    s, by_role = assemble(arguments.members)
    writes, durable = {}, 0
    if s.flags & 1 and not s.flags & 2:
        writes, durable = read_log(s, by_role)
        say(f"was not shut down: {len(writes)} rows from the log")
    elif s.flags & 1:
        say("was not shut down, and has no log: blocks in flight may be lost")
    array = Array(s, by_role, writes, durable)
    image = None
    if arguments.output:
        image = os.open(arguments.output, os.O_WRONLY | os.O_CREAT, 0o666)
        if stat.S_ISREG(os.fstat(image).st_mode):
            os.ftruncate(image, 0)
            os.ftruncate(image, s.stripes * s.d * s.chunk)
    for stripe, row, blocks in array.rows():
        for k, block in enumerate(blocks) if image is not None else ():
            if block and block is not ZERO:
                os.pwrite(image, block, ((stripe * s.d + k) * s.c + row) * BLOCK)
    for block in sorted(array.lost):
        say(f"lost: block {block}, bytes {block * BLOCK} to {block * BLOCK + BLOCK - 1}")
    print(f"{array.written} blocks written, {array.unwritten} unwritten, {array.mended} mended, {len(array.lost)} lost"
          f" ({array.reconstructed} reconstructed for missing members, {array.misfits} copies or parities did not fit)")
    return 2 if array.lost and not arguments.ignore_lost else 0


def main():
    parser = argparse.ArgumentParser(description="Takes the data out of the members of a stableio array.")
    parser.add_argument("members", metavar="MEMBER", nargs="+")
    parser.add_argument("-o", dest="output", metavar="IMAGE", help="where the data goes, sparsely")
    parser.add_argument("--check", action="store_true", help="only verify")
    parser.add_argument("--ignore-lost", action="store_true", help="lost blocks are zeros: exit 0 all the same")
    # 2 means lost blocks.
    parser.error = lambda why: parser.exit(1, f"extract: {why}\n")
    arguments = parser.parse_args()
    if bool(arguments.output) == arguments.check:
        parser.error("either -o IMAGE or --check")
    try:
        if arguments.output and os.path.exists(arguments.output):
            for member in arguments.members:
                if os.path.samefile(member, arguments.output):
                    raise Refused(f"{arguments.output} is a member")
        return extract(arguments)
    except (Refused, OSError) as why:
        say(why)
        return 1


if __name__ == "__main__":
    sys.exit(main())
