//! Sizes as people write and read them.

use std::fmt;
use std::str::FromStr;

/// Bytes of a protection interval: what one guard covers.
pub const BLOCK: usize = stableio_onepass::BLOCK;

/// A number of bytes, written `64KiB`, `10GiB`, `512`, `1.5MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size: write a number and a unit, as 64KiB, 512MiB, 10GiB or 1TiB")]
pub struct ParseBytesError(String);

const UNITS: [(&str, u64); 6] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("PiB", 1 << 50),
];

impl FromStr for Bytes {
    type Err = ParseBytesError;

    /// Powers of 1024; a bare letter (`64K`) means the same as `64KiB`.
    fn from_str(text: &str) -> Result<Self, ParseBytesError> {
        let bad = || ParseBytesError(text.to_owned());
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = &text[digits.len()..];
        let factor = UNITS
            .iter()
            .find(|(name, _)| {
                unit.eq_ignore_ascii_case(name)
                    || (name.len() == 3 && unit.eq_ignore_ascii_case(&name[..1]))
            })
            .map(|&(_, factor)| factor)
            .or(unit.is_empty().then_some(1))
            .ok_or_else(bad)?;
        if let Ok(whole) = digits.parse::<u64>() {
            return whole.checked_mul(factor).map(Bytes).ok_or_else(bad);
        }
        let scaled = digits.parse::<f64>().map_err(|_| bad())? * factor as f64;
        // Only fractions that come to whole bytes are sizes.
        if scaled.is_finite() && (0.0..9e15).contains(&scaled) && scaled.fract() == 0.0 {
            Ok(Bytes(scaled as u64))
        } else {
            Err(bad())
        }
    }
}

impl fmt::Display for Bytes {
    /// The largest unit that needs at most two decimals and loses nothing
    /// that matters to a reader: `10 GiB`, `1.50 MiB`, `513 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) =
            UNITS.iter().rev().find(|(_, factor)| self.0 >= *factor).copied().unwrap_or(UNITS[0]);
        if self.0.is_multiple_of(factor) {
            write!(f, "{} {name}", self.0 / factor)
        } else {
            write!(f, "{:.2} {name}", self.0 as f64 / factor as f64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [
            ("64KiB", 65536),
            ("64K", 65536),
            ("512", 512),
            ("512B", 512),
            ("1.5MiB", 3 << 19),
            ("10gib", 10 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "KiB", "-1", "64QiB", "1.0001KiB", "99999999999GiB", "nanMiB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert_eq!(Bytes(65536).to_string(), "64 KiB");
        assert_eq!(Bytes(3 << 19).to_string(), "1.50 MiB");
        assert_eq!(Bytes(0).to_string(), "0 B");
    }
}
