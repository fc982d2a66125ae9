//! Definitions to compare with, and memory that ends where it ends.

#![allow(dead_code, reason = "each test takes what it needs")]

use std::ptr;

use proptest::prelude::*;
use stableio_onepass::{
    BLOCK, Fault, Format, Guard, Interval, Kernels, Parities, Parity, Pass, Segment, Tier,
    available_tiers,
};

/// The CRCs as their specifications define them: bit by bit.
pub(crate) fn naive_guard(guard: Guard, bytes: &[u8]) -> u64 {
    let reflected = |polynomial: u64, ones: u64| {
        ones ^ bytes.iter().fold(ones, |crc, byte| {
            (0..8).fold(crc ^ u64::from(*byte), |crc, _| (crc >> 1) ^ (polynomial * (crc & 1)))
        })
    };
    match guard {
        Guard::Crc16T10Dif => bytes.iter().fold(0, |crc, byte| {
            (0..8).fold(crc ^ u64::from(*byte) << 8, |crc, _| {
                (crc << 1 & 0xffff) ^ (0x8bb7 * (crc >> 15))
            })
        }),
        Guard::Crc32c => reflected(u64::from(0x1edc_6f41_u32.reverse_bits()), 0xffff_ffff),
        Guard::Crc64Nvme => reflected(0xad93_d235_94c9_3659_u64.reverse_bits(), u64::MAX),
    }
}

/// The guards of some bytes, the last of which may cover less than an interval.
pub(crate) fn naive_guards(format: Format, bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(format.interval.bytes()).map(|b| naive_guard(format.guard, b)).collect()
}

/// `a * b` in GF(2^8), bit by bit.
pub(crate) fn naive_mul(a: u8, b: u8) -> u8 {
    (0..8).rev().fold(0, |product, bit| {
        let doubled = u16::from(product) << 1;
        let reduced = if doubled > 0xff { doubled ^ 0x11d } else { doubled };
        reduced as u8 ^ if b >> bit & 1 == 1 { a } else { 0 }
    })
}

/// P and Q of some columns, byte by byte.
pub(crate) fn naive_parities(columns: &[Vec<u8>]) -> [Vec<u8>; 2] {
    let len = columns.first().map_or(0, Vec::len);
    let (mut p, mut q) = (vec![0; len], vec![0; len]);
    // Horner's rule: from the last column on, Q doubles.
    for column in columns.iter().rev() {
        for (i, byte) in column.iter().enumerate() {
            p[i] ^= byte;
            q[i] = naive_mul(q[i], 2) ^ byte;
        }
    }
    [p, q]
}

/// Bytes without a pattern, different for each seed (the generator is splitmix64).
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).to_le_bytes()
    };
    std::iter::repeat_with(&mut word).flatten().take(len).collect()
}

/// The parity modes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    None,
    Set,
    Xor,
}

impl Mode {
    pub(crate) fn of(self, parity: *mut u8) -> Parity {
        match self {
            Mode::None => Parity::None,
            Mode::Set => Parity::Set(parity),
            Mode::Xor => Parity::Xor(parity),
        }
    }

    /// What parity must be after taking up `change`.
    pub(crate) fn expected(self, before: &[u8], change: &[u8]) -> Vec<u8> {
        match self {
            Mode::None => before.to_vec(),
            Mode::Set => change.to_vec(),
            Mode::Xor => xor(before, change),
        }
    }
}

pub(crate) fn any_mode() -> impl Strategy<Value = Mode> {
    prop::sample::select(vec![Mode::None, Mode::Set, Mode::Xor])
}

pub(crate) fn xor(a: &[u8], b: &[u8]) -> Vec<u8> {
    a.iter().zip(b).map(|(a, b)| a ^ b).collect()
}

/// Where bytes lie between two pages that are not there.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// The page in front of them is not there.
    First,
    /// The page behind them is not there.
    Last,
    /// So far from the start of a page.
    At(usize),
}

pub(crate) fn any_place() -> impl Strategy<Value = Place> {
    prop_oneof![Just(Place::First), Just(Place::Last), (0_usize..64).prop_map(Place::At)]
}

const PAGE: usize = 4096;
const UNTOUCHED: u8 = 0xa5;

/// Bytes with unmapped pages on both sides, and margins that must stay as they are.
#[derive(Debug)]
pub(crate) struct Fenced {
    /// Everything between the two pages.
    inside: *mut u8,
    room: usize,
    start: usize,
    len: usize,
}

impl Fenced {
    pub(crate) fn new(place: Place, content: &[u8]) -> Fenced {
        let len = content.len();
        let room = (len + 64).next_multiple_of(PAGE);
        // SAFETY: maps where nothing is.
        let inside = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let all = libc::mmap(ptr::null_mut(), room + 2 * PAGE, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(all, libc::MAP_FAILED);
            all.cast::<u8>().add(PAGE)
        };
        // SAFETY: the middle of the mapping of ours.
        let done =
            unsafe { libc::mprotect(inside.cast(), room, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(done, 0);
        let start = match place {
            Place::First => 0,
            Place::Last => room - len,
            Place::At(offset) => offset,
        };
        let mut new = Fenced { inside, room, start, len };
        new.all().fill(UNTOUCHED);
        new.bytes().copy_from_slice(content);
        new
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.inside.wrapping_add(self.start)
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let (start, len) = (self.start, self.len);
        &mut self.all()[start..start + len]
    }

    pub(crate) fn segment(&self) -> Segment {
        Segment { addr: self.ptr(), len: self.len }
    }

    /// Panics unless the bytes are these, and the margins untouched.
    pub(crate) fn check(&mut self, expected: &[u8], what: &str) {
        assert!(self.bytes() == expected, "{what}: wrong content");
        let (start, len) = (self.start, self.len);
        let all = self.all();
        let margins = all[..start].iter().chain(&all[start + len..]);
        assert!(margins.copied().all(|byte| byte == UNTOUCHED), "{what}: outside was written");
    }

    fn all(&mut self) -> &mut [u8] {
        // SAFETY: our mapping, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.inside, self.room) }
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: our mapping, which nobody uses any more.
        unsafe { libc::munmap(self.inside.wrapping_sub(PAGE).cast(), self.room + 2 * PAGE) };
    }
}

/// Cuts bytes in pieces, each in memory of its own: of these lengths and the rest in the last.
pub(crate) fn scatter(data: &[u8], cuts: &[(usize, Place)]) -> Vec<Fenced> {
    let mut rest = data;
    let mut pieces = Vec::new();
    for (len, place) in cuts {
        let (piece, behind) = rest.split_at((*len).min(rest.len()));
        pieces.push(Fenced::new(*place, piece));
        rest = behind;
    }
    let place = cuts.first().map_or(Place::Last, |(_, place)| *place);
    pieces.push(Fenced::new(place, rest));
    pieces
}

pub(crate) fn segments(pieces: &[Fenced]) -> Vec<Segment> {
    pieces.iter().map(Fenced::segment).collect()
}

pub(crate) fn any_cuts() -> impl Strategy<Value = Vec<(usize, Place)>> {
    let len = prop_oneof![0_usize..20, 0_usize..1200, 0_usize..9000, Just(512), Just(4096)];
    prop::collection::vec((len, any_place()), 0..6)
}

pub(crate) fn any_format() -> impl Strategy<Value = Format> {
    (prop::sample::select(&Guard::ALL[..]), prop::sample::select(&Interval::ALL[..]))
        .prop_map(|(guard, interval)| Format { guard, interval })
}

pub(crate) fn all_formats() -> impl Iterator<Item = Format> {
    let of = |guard| Interval::ALL.map(|interval| Format { guard, interval });
    Guard::ALL.into_iter().flat_map(of)
}

/// The kernels of each tier of this machine.
pub(crate) fn tiers() -> impl Iterator<Item = (Tier, &'static Kernels)> {
    available_tiers().iter().map(|tier| (*tier, Kernels::of(*tier).expect("available")))
}

/// Copies as many blocks as there are guards from `src` to `dst`, and takes them up in parities.
///
/// # Safety
///
/// That of [`Pass::foreign`].
pub(crate) unsafe fn stabilize(
    kernels: &Kernels,
    src: *const u8,
    dst: *mut u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    let all = [Segment { addr: src, len: guards.len() * BLOCK }];
    let pass = Pass { parities, ..Pass::copy(Format::NATIVE, dst) };
    // SAFETY: the caller's promises.
    unsafe { pass.foreign_with(kernels, &all, guards) }
}

/// The same without a copy.
///
/// # Safety
///
/// That of [`Pass::foreign`].
pub(crate) unsafe fn sample(
    kernels: &Kernels,
    src: *const u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    let all = [Segment { addr: src, len: guards.len() * BLOCK }];
    let pass = Pass { parities, ..Pass::guards(Format::NATIVE) };
    // SAFETY: the caller's promises.
    unsafe { pass.foreign_with(kernels, &all, guards) }
}
