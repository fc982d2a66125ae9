//! Faults as people write them on a command line.

use std::str::FromStr;
use std::sync::Arc;

use stableio_mem::Bytes;

use super::rules::{EVERYWHERE, Fault, Faults, How, Ops, Rule};

/// Why a text is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no fault: {why}; write [read-|write-|flush-]KIND[@AT+LENGTH][:N|:1/N], \
     as read-error:1/1000, write-error=ENOSPC@1M+64K:3, latent@8M+4K, flip:1/5000, \
     torn=4096:1/1000, torn-silent:2, flush-lost or stall:1/10000"
)]
pub struct ParseFaultError {
    text: String,
    why: &'static str,
}

const ERRNOS: [(&str, i32); 9] = [
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("ETIMEDOUT", libc::ETIMEDOUT),
    ("ENODATA", libc::ENODATA),
    ("EILSEQ", libc::EILSEQ),
    ("EREMOTEIO", libc::EREMOTEIO),
    ("ENODEV", libc::ENODEV),
    ("ENXIO", libc::ENXIO),
    ("EROFS", libc::EROFS),
];

impl Faults {
    /// The rules of a text, with commas between them.
    ///
    /// # Errors
    ///
    /// The first that is none.
    pub fn parse(text: &str, seed: u64) -> Result<Arc<Self>, ParseFaultError> {
        let faults = Faults::new(seed);
        for rule in text.split(',') {
            faults.add(rule.parse()?);
        }
        Ok(faults)
    }
}

impl FromStr for Rule {
    type Err = ParseFaultError;

    /// `[OPERATION-]KIND[=ARGUMENT][@AT+LENGTH][:HOW]`
    ///
    /// | part | means |
    /// |---|---|
    /// | `OPERATION` | `read`, `write` or `flush`; else all that the kind can happen to |
    /// | `KIND` | `error`, `latent`, `flip`, `torn`, `torn-silent`, `lost`, `stall` |
    /// | `ARGUMENT` | of `error` an errno, by number or name (`EIO`); of `torn` the unit (512) |
    /// | `AT+LENGTH` | sizes as `8M+4K`; else the whole device |
    /// | `HOW` | `N`, the next N, or `1/N`, by chance; else always |
    fn from_str(text: &str) -> Result<Self, ParseFaultError> {
        parse(text.trim()).map_err(|why| ParseFaultError { text: text.trim().to_owned(), why })
    }
}

fn parse(text: &str) -> Result<Rule, &'static str> {
    let (rest, how) = match text.split_once(':') {
        Some((rest, how)) => (rest, parse_how(how).ok_or("how often is N or 1/N, from 1 on")?),
        None => (text, How::Always),
    };
    let (rest, range) = match rest.split_once('@') {
        Some((rest, range)) => (rest, parse_range(range).ok_or("a range is AT+LENGTH, not empty")?),
        None => (rest, EVERYWHERE),
    };
    let (name, argument) = match rest.split_once('=') {
        Some((name, argument)) => (name, Some(argument)),
        None => (rest, None),
    };
    let prefixes = [("read-", Ops::READS), ("write-", Ops::WRITES), ("flush-", Ops::FLUSHES)];
    let (kind, ops) = prefixes
        .iter()
        .find_map(|(prefix, ops)| Some((name.strip_prefix(prefix)?, *ops)))
        .unwrap_or((name, Ops::ANY));
    let fault = parse_fault(kind, argument)?;
    let ops = ops.and(fault.ops());
    if ops.is_empty() {
        return Err("this kind does not happen to that operation");
    }
    if ops == Ops::FLUSHES && range != EVERYWHERE {
        return Err("a flush has no range");
    }
    Ok(Rule { ops, range, how, fault })
}

fn parse_fault(kind: &str, argument: Option<&str>) -> Result<Fault, &'static str> {
    let fault = match kind {
        "error" => {
            let errno = argument.map_or(Some(libc::EIO), parse_errno);
            return errno.map(Fault::Error).ok_or("this errno is not known");
        }
        "torn" | "torn-silent" => {
            let unit = argument.map_or(Some(512), parse_unit);
            let unit = unit.ok_or("the unit of a torn write is a power of two, from 512 on")?;
            return Ok(Fault::Torn { unit, silent: kind == "torn-silent" });
        }
        "latent" => Fault::Latent,
        "flip" => Fault::Flip,
        "lost" => Fault::Lost,
        "stall" => Fault::Stall,
        _ => return Err("this kind is not known"),
    };
    match argument {
        None => Ok(fault),
        Some(_) => Err("only error and torn have an argument"),
    }
}

fn parse_how(text: &str) -> Option<How> {
    let (how, n): (fn(u64) -> How, _) = match text.strip_prefix("1/") {
        Some(n) => (How::OneIn, n),
        None => (How::Next, text),
    };
    n.parse().ok().filter(|n| *n > 0).map(how)
}

fn parse_range(text: &str) -> Option<std::ops::Range<u64>> {
    let (at, len) = text.split_once('+')?;
    let (Bytes(at), Bytes(len)) = (at.parse().ok()?, len.parse().ok()?);
    Some(at..at.checked_add(len)?).filter(|range| !range.is_empty())
}

fn parse_errno(text: &str) -> Option<i32> {
    let named = ERRNOS.iter().find(|(name, _)| *name == text).map(|(_, errno)| *errno);
    named.or_else(|| text.parse().ok().filter(|errno| (1..4096).contains(errno)))
}

fn parse_unit(text: &str) -> Option<u32> {
    let Bytes(unit) = text.parse().ok()?;
    u32::try_from(unit).ok().filter(|unit| *unit >= 512 && unit.is_power_of_two())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read() {
        let rule = |ops, range, how, fault| Rule { ops, range, how, fault };
        let either = Ops { flushes: false, ..Ops::ANY };
        let mib = 1 << 20;
        for (text, expected) in [
            (
                "read-error:1/1000",
                rule(Ops::READS, EVERYWHERE, How::OneIn(1000), Fault::Error(libc::EIO)),
            ),
            (
                "write-error=ENOSPC@1M+64K:3",
                rule(Ops::WRITES, mib..mib + 65536, How::Next(3), Fault::Error(libc::ENOSPC)),
            ),
            ("error=5", rule(Ops::ANY, EVERYWHERE, How::Always, Fault::Error(5))),
            ("latent@8M+4K", rule(Ops::READS, 8 * mib..8 * mib + 4096, How::Always, Fault::Latent)),
            ("flip:1/5000", rule(either, EVERYWHERE, How::OneIn(5000), Fault::Flip)),
            ("write-flip:1", rule(Ops::WRITES, EVERYWHERE, How::Next(1), Fault::Flip)),
            (
                "torn:1/1000",
                rule(
                    Ops::WRITES,
                    EVERYWHERE,
                    How::OneIn(1000),
                    Fault::Torn { unit: 512, silent: false },
                ),
            ),
            (
                "torn-silent=4K",
                rule(
                    Ops::WRITES,
                    EVERYWHERE,
                    How::Always,
                    Fault::Torn { unit: 4096, silent: true },
                ),
            ),
            ("flush-lost", rule(Ops::FLUSHES, EVERYWHERE, How::Always, Fault::Lost)),
            (" stall:1/10000 ", rule(Ops::ANY, EVERYWHERE, How::OneIn(10000), Fault::Stall)),
        ] {
            assert_eq!(text.parse::<Rule>().unwrap(), expected, "{text}");
        }
        let faults = Faults::parse("latent@8M+4K, flip:1/2,latent@1K+1K", 1).unwrap();
        assert_eq!(faults.bad(), [8 * mib..8 * mib + 4096, 1024..2048]);
    }

    #[test]
    fn what_is_no_rule_is_refused_with_its_reason() {
        for (text, why) in [
            ("", "this kind is not known"),
            ("rot", "this kind is not known"),
            ("read-", "this kind is not known"),
            ("error=EWHATEVER", "this errno is not known"),
            ("error=0", "this errno is not known"),
            ("flip=3", "only error and torn have an argument"),
            ("torn=1000", "the unit of a torn write is a power of two, from 512 on"),
            ("read-torn", "this kind does not happen to that operation"),
            ("flush-flip", "this kind does not happen to that operation"),
            ("read-lost:3", "this kind does not happen to that operation"),
            ("flush-error@0+4K", "a flush has no range"),
            ("latent@8M", "a range is AT+LENGTH, not empty"),
            ("latent@8M+0", "a range is AT+LENGTH, not empty"),
            ("latent@18446744073709551615+1", "a range is AT+LENGTH, not empty"),
            ("error:0", "how often is N or 1/N, from 1 on"),
            ("error:1/0", "how often is N or 1/N, from 1 on"),
            ("error:2/3", "how often is N or 1/N, from 1 on"),
            ("error:", "how often is N or 1/N, from 1 on"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert_eq!((error.text.as_str(), error.why), (text, why));
            assert!(error.to_string().starts_with(&format!("'{text}' is no fault: {why}; write ")));
        }
        assert_eq!(Faults::parse("flip,rot", 1).err().unwrap().text, "rot");
    }
}
