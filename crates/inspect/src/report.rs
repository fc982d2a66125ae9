//! What the inspector says, as types.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::Kernel;

/// An answer that may not be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Tristate {
    No,
    Yes,
    Unknown,
}

/// Who is hurt when bytes change between two samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Radius {
    /// Nobody: the data is looked at once.
    Nobody,
    /// The program itself: its own block.
    Issuer,
    /// Others: the stripe's other blocks, the other leg.
    Everyone,
}

/// How damage shows itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shows {
    /// It does not: wrong data is read back without an error.
    Silently,
    /// The write fails.
    ErrorWriting,
    /// A read fails, of data that was written so or that is sound.
    ErrorReading,
}

/// What a layer does with the program's memory during a direct write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Writes {
    /// Hands it on, or has it read once.
    Passes,
    /// Copies it first: everything below sees the copy.
    Copies,
    /// Has it read more than once.
    Twice {
        /// Who is hurt.
        radius: Radius,
        /// How it shows.
        shows: Shows,
    },
    /// Nobody can say.
    Unknown {
        /// Why not.
        why: String,
        /// What root would have seen.
        root_would_show: Option<String>,
    },
}

/// What a layer does with the program's memory during a direct read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reads {
    /// Has the data put there and does not look at it again; or looks, but
    /// reads privately before it calls a mismatch an error.
    Passes,
    /// Reads into memory of the kernel's and copies from there.
    Copies,
    /// Verifies it there: a changed buffer is taken for bad data.
    Verifies {
        /// Who is hurt.
        radius: Radius,
    },
    /// Nobody can say.
    Unknown {
        /// Why not.
        why: String,
        /// What root would have seen.
        root_would_show: Option<String>,
    },
}

/// A file system or a block device on the way of the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// How many layers are above it.
    pub depth: usize,
    /// Of the device (`md0`), or the kind of the file system.
    pub name: String,
    /// What it is: `xfs`, `md raid5`, `zram`.
    pub kind: String,
    /// What it does with the data; the name is the subject of the sentence.
    pub does: String,
    /// How we know.
    pub evidence: String,
    /// During a direct write.
    pub writes: Writes,
    /// During a direct read.
    pub reads: Reads,
    /// Whether it alone would have the data of a direct write read more than
    /// once.
    pub samples_writes_twice: Tristate,
    /// Whether it verifies what is read while that lies in the program's
    /// memory.
    pub verifies_reads: Tristate,
    /// What to do about it, as an imperative.
    pub remedy: Option<String>,
    /// Whether it has several copies, or parity: it takes an error of a layer
    /// below for that layer's failure.
    pub redundant: bool,
}

/// The file system of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileSystem {
    /// `ext4`, `xfs`.
    pub kind: String,
    /// Where it is mounted; `None` if that is outside this namespace.
    #[serde(serialize_with = "lossy_option")]
    pub mount_point: Option<PathBuf>,
    /// What is mounted.
    pub source: String,
    /// The options that matter here.
    pub options: Vec<String>,
}

/// What this kernel does with a direct write at the top.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectWrite {
    /// The program's memory goes to the devices as it is.
    StraightThrough,
    /// It is copied, and the copy is written directly.
    Bounced {
        /// The kernel that began to; `None` where it always was so.
        since: Option<Kernel>,
    },
    /// It is written through the page cache, and waited for.
    BufferedFallback {
        /// The kernel that began to; `None` where it always was so.
        since: Option<Kernel>,
    },
    /// There is no such thing: every write is a copy.
    NotDirect {
        /// Why.
        why: String,
    },
    /// Nobody can say.
    Unknown {
        /// Why not.
        why: String,
    },
}

/// What direct I/O must be aligned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Alignment {
    /// Memory, in bytes.
    pub memory_bytes: u32,
    /// Offset and length, in bytes.
    pub offset_bytes: u32,
}

/// The sizes that a write may have which is never torn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AtomicWrites {
    /// The least, in bytes.
    pub min_bytes: u32,
    /// The most, in bytes.
    pub max_bytes: u32,
}

/// The conclusion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A buffer that changes in flight hurts nobody.
    Safe,
    /// It does hurt.
    AtRisk,
    /// It is not known.
    Unknown {
        /// Why not.
        why: String,
        /// What root would have seen; `None` if that would not help.
        root_would_show: Option<String>,
    },
}

/// What lies under a path, and what follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What was asked for.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// The kernel's release.
    pub kernel: String,
    /// `None` for a block device.
    pub file_system: Option<FileSystem>,
    /// From the top down; each stands below the nearest one before it of
    /// lesser depth.
    pub layers: Vec<Layer>,
    /// What this kernel does with a direct write.
    pub direct_write: DirectWrite,
    /// What direct I/O must be aligned to, where that is known.
    pub alignment: Option<Alignment>,
    /// Atomic writes, if there are any.
    pub atomic_writes: Option<AtomicWrites>,
    /// The smallest physical block of the disks below, in bytes, where each
    /// of them says it, every device on the way begins at a multiple of it,
    /// and writes go straight there. A loop device counts as a disk.
    pub physical_block_bytes: Option<u32>,
    /// Who is hurt when the memory of a write changes; `Everyone` where it is
    /// unknown.
    pub write_radius: Radius,
    /// Who is hurt when the memory of a read changes; `Everyone` where it is
    /// unknown.
    pub read_radius: Radius,
    /// How damage shows itself, if there may be any.
    pub shows: Option<Shows>,
    /// The conclusion, for writes and reads together.
    pub verdict: Verdict,
    /// Why, in a line.
    pub reason: String,
    /// What to do, in a sentence.
    pub advice: String,
    pub(crate) samples_writes_twice: Tristate,
    pub(crate) verifies_reads: Tristate,
}

impl Report {
    /// Whether the program's memory is read more than once during a direct
    /// write as this kernel does it: bounced or through the page cache it is
    /// not.
    pub fn samples_writes_twice(&self) -> Tristate {
        self.samples_writes_twice
    }

    /// Whether what a direct read brings is verified while it lies in the
    /// program's memory, so that a changed buffer gives a false error.
    pub fn verifies_reads(&self) -> Tristate {
        self.verifies_reads
    }

    /// One short line: the layer that decides, what it does, how we know.
    pub fn reason(&self) -> String {
        self.reason.clone()
    }
}

impl Layer {
    /// A layer that hands memory on and does not look at it.
    pub(crate) fn new(depth: usize, name: impl Into<String>, kind: impl Into<String>) -> Self {
        Self {
            depth,
            name: name.into(),
            kind: kind.into(),
            does: "hands the data on".to_owned(),
            evidence: String::new(),
            writes: Writes::Passes,
            reads: Reads::Passes,
            samples_writes_twice: Tristate::No,
            verifies_reads: Tristate::No,
            remedy: None,
            redundant: false,
        }
    }

    pub(crate) fn does(mut self, what: &str, evidence: impl Into<String>) -> Self {
        self.does = what.to_owned();
        self.evidence = evidence.into();
        self
    }

    pub(crate) fn remedy(mut self, what: impl Into<String>) -> Self {
        self.remedy = Some(what.into());
        self
    }

    pub(crate) fn redundant(mut self) -> Self {
        self.redundant = true;
        self
    }

    pub(crate) fn writes(mut self, writes: Writes) -> Self {
        self.samples_writes_twice = match &writes {
            Writes::Passes | Writes::Copies => Tristate::No,
            Writes::Twice { .. } => Tristate::Yes,
            Writes::Unknown { .. } => Tristate::Unknown,
        };
        self.writes = writes;
        self
    }

    pub(crate) fn reads(mut self, reads: Reads) -> Self {
        self.verifies_reads = match &reads {
            Reads::Passes | Reads::Copies => Tristate::No,
            Reads::Verifies { .. } => Tristate::Yes,
            Reads::Unknown { .. } => Tristate::Unknown,
        };
        self.reads = reads;
        self
    }

    /// The same for both directions: nobody can say.
    pub(crate) fn unknown(self, why: &str, root_would_show: Option<String>) -> Self {
        let why = why.to_owned();
        self.does("can not be judged", why.clone())
            .writes(Writes::Unknown { why: why.clone(), root_would_show: root_would_show.clone() })
            .reads(Reads::Unknown { why, root_would_show })
    }

    /// The line of [`Report::reason`] about this layer.
    pub(crate) fn sentence(&self) -> String {
        let Self { name, does, evidence, .. } = self;
        if evidence.is_empty() {
            format!("{name} {does}")
        } else {
            format!("{name} {does} ({evidence})")
        }
    }
}

/// A name that is no UTF-8 must not cost the whole report.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

fn lossy_option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.to_string_lossy()).serialize(serializer)
}

impl fmt::Display for Radius {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Radius::Nobody => "nobody",
            Radius::Issuer => "own data",
            Radius::Everyone => "others' data",
        })
    }
}

impl fmt::Display for Shows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Shows::Silently => "silent",
            Shows::ErrorWriting => "error on writing",
            Shows::ErrorReading => "error on reading",
        })
    }
}

impl fmt::Display for Tristate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tristate::No => "no",
            Tristate::Yes => "yes",
            Tristate::Unknown => "unknown",
        })
    }
}

impl fmt::Display for DirectWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = |f: &mut fmt::Formatter<'_>, since: &Option<Kernel>| match since {
            Some(kernel) => write!(f, " (since {kernel})"),
            None => Ok(()),
        };
        match self {
            DirectWrite::StraightThrough => f.write_str("straight through"),
            DirectWrite::Bounced { since: s } => f.write_str("bounced").and_then(|()| since(f, s)),
            DirectWrite::BufferedFallback { since: s } => {
                f.write_str("buffered fallback").and_then(|()| since(f, s))
            }
            DirectWrite::NotDirect { why } => write!(f, "none, each is a copy: {why}"),
            DirectWrite::Unknown { why } => write!(f, "unknown: {why}"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Safe => "safe",
            Verdict::AtRisk => "AT RISK",
            Verdict::Unknown { .. } => "can not tell",
        })
    }
}
