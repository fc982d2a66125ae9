//! What is exported: its name, its size and the requests that it takes.
//!
//! Quoted names are sections of the NBD protocol document, `doc/proto.md` of
//! <https://github.com/NetworkBlockDevice/nbd>.

use std::str;

use thiserror::Error;

/// Longest string of the protocol, in bytes ("Conventions").
const MAX_STRING: usize = 4096;

// "Size constraints". The smallest payload limit is what the protocol
// recommends; the greatest is ours, and keeps lengths of replies in 32 bits.
const MAX_MINIMUM_BLOCK: u32 = 1 << 16;
const LEAST_PREFERRED_BLOCK: u32 = 512;
pub(super) const LEAST_MAX_PAYLOAD: u32 = 1 << 20;
pub(super) const GREATEST_MAX_PAYLOAD: u32 = 1 << 30;

/// The size constraints of an export, in bytes ("Size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest length and alignment of a request; a power of two, at most 65536.
    pub minimum: u32,
    /// Length and alignment from which requests are efficient; a power of two,
    /// at least 512 and at least `minimum`.
    pub preferred: u32,
    /// Longest data of a read or a write; from 1 MiB (and `preferred`) to 1 GiB.
    pub max_payload: u32,
}

/// An export, as clients are told of it and as their requests are checked against it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    name: String,
    description: String,
    size: u64,
    blocks: BlockSizes,
    read_only: bool,
    fast_zero: bool,
}

/// An export that the protocol can not describe: a mistake of ours, not of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadExport {
    /// A name or description breaks a rule of "Conventions".
    #[error("a name or description has a NUL or more than {MAX_STRING} bytes")]
    Text,
    /// The block sizes break a rule of "Size constraints".
    #[error("{0:?} break the size constraints of NBD")]
    Blocks(BlockSizes),
    /// Clients could not reach the last bytes.
    #[error("the size {size} is no multiple of the minimum block {minimum}")]
    Size {
        /// The size asked for.
        size: u64,
        /// The minimum block that does not divide it.
        minimum: u32,
    },
    /// The device does not carry it out as described.
    #[error("larger than the device, or requests of {minimum} bytes are too small for it")]
    Device {
        /// The minimum block that was promised.
        minimum: u32,
    },
}

impl ExportInfo {
    /// A writable export of `size` bytes, a multiple of `blocks.minimum`.
    pub fn new(name: &str, size: u64, blocks: BlockSizes) -> Result<Self, BadExport> {
        let BlockSizes { minimum, preferred, max_payload } = blocks;
        let right = minimum.is_power_of_two()
            && minimum <= MAX_MINIMUM_BLOCK
            && preferred.is_power_of_two()
            && preferred >= minimum.max(LEAST_PREFERRED_BLOCK)
            && max_payload >= preferred.max(LEAST_MAX_PAYLOAD)
            && max_payload <= GREATEST_MAX_PAYLOAD;
        if !right {
            return Err(BadExport::Blocks(blocks));
        }
        if !size.is_multiple_of(minimum.into()) {
            return Err(BadExport::Size { size, minimum });
        }
        Ok(Self {
            name: our_text(name)?,
            description: String::new(),
            size,
            blocks,
            read_only: false,
            fast_zero: false,
        })
    }

    /// The same export with a text for humans.
    pub fn with_description(self, description: &str) -> Result<Self, BadExport> {
        Ok(Self { description: our_text(description)?, ..self })
    }

    /// The same export, refusing whatever writes.
    pub fn with_read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The same export, accepting write zeroes requests that are to fail with
    /// `NBD_ENOTSUP` where zeroing is no faster than writing.
    pub fn with_fast_zero(self) -> Self {
        Self { fast_zero: true, ..self }
    }

    /// The name that clients ask for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The text for humans; may be empty.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size constraints.
    pub fn blocks(&self) -> BlockSizes {
        self.blocks
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether fast zeroing may be asked for.
    pub fn fast_zero(&self) -> bool {
        self.fast_zero
    }
}

/// How the server answers requests on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// Simple replies only.
    Simple,
    /// Structured replies for whatever carries data, and for errors.
    Structured {
        /// `base:allocation` was selected for this export.
        block_status: bool,
    },
}

/// A string of the protocol: UTF-8 without NUL, not too long ("Conventions").
pub(super) fn text(bytes: &[u8]) -> Option<&str> {
    let fits = bytes.len() <= MAX_STRING && !bytes.contains(&0);
    str::from_utf8(bytes).ok().filter(|_| fits)
}

fn our_text(text_of_ours: &str) -> Result<String, BadExport> {
    text(text_of_ours.as_bytes()).map(str::to_owned).ok_or(BadExport::Text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_that_clients_could_not_use_are_not_made() {
        let with = |size, minimum, preferred, max_payload| {
            ExportInfo::new("", size, BlockSizes { minimum, preferred, max_payload })
        };
        let blocks = BlockSizes { minimum: 512, preferred: 4096, max_payload: 1 << 25 };
        assert!(with(0x1000, 4096, 4096, 1 << 20).is_ok());
        assert!(matches!(with(0x1001, 512, 4096, 1 << 20), Err(BadExport::Size { .. })));
        assert!(matches!(with(0, 0, 4096, 1 << 20), Err(BadExport::Blocks(_))));
        assert!(matches!(with(0, 1 << 17, 1 << 17, 1 << 20), Err(BadExport::Blocks(_))));
        assert!(matches!(with(0, 4096, 512, 1 << 20), Err(BadExport::Blocks(_))));
        assert!(matches!(with(0, 512, 4096, 4096), Err(BadExport::Blocks(_))));
        assert_eq!(ExportInfo::new("a\0b", 0, blocks), Err(BadExport::Text));
        assert_eq!(ExportInfo::new(&"x".repeat(4097), 0, blocks), Err(BadExport::Text));
    }
}
