//! A client of a screen: it sends what it is told to and believes nothing.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1 << 0;
pub(crate) const NO_HOLE: u16 = 1 << 1;
pub(crate) const DF: u16 = 1 << 2;
pub(crate) const FAST_ZERO: u16 = 1 << 4;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;

/// How to be answered.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Ask {
    Simple,
    Structured,
}

/// What a request ended with: data, if it gives any, or an errno.
pub(crate) type Answer = Result<Vec<u8>, u32>;

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    ask: Ask,
    pub(crate) size: u64,
    /// Of the reads under way: offset, length, and the data once some is there.
    reads: HashMap<u64, (u64, usize, Vec<u8>)>,
    errors: HashMap<u64, u32>,
    /// The text of the last error.
    pub(crate) message: String,
    next: u64,
}

impl Client {
    pub(crate) fn connect(path: &Path, ask: Ask) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut client = Client {
            stream,
            ask,
            size: 0,
            reads: HashMap::new(),
            errors: HashMap::new(),
            message: String::new(),
            next: 1,
        };
        client.bytes(18)?;
        client.stream.write_all(&3_u32.to_be_bytes())?;
        if ask == Ask::Structured {
            client.option(OPT_STRUCTURED_REPLY, &[])?;
            let context = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
            client.option(OPT_SET_META_CONTEXT, context)?;
        }
        let infos = client.option(OPT_GO, &[0; 6])?;
        let export = infos.iter().find(|info| info[..2] == [0, 0]).expect("NBD_INFO_EXPORT");
        client.size = u64::from_be_bytes(export[2..10].try_into().unwrap());
        Ok(client)
    }

    fn option(&mut self, option: u32, data: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let len = data.len() as u32;
        let header = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &len.to_be_bytes(), data];
        self.stream.write_all(&header.concat())?;
        let mut replies = Vec::new();
        loop {
            let header = self.bytes(20)?;
            let data = self.bytes(be32(&header[16..]) as usize)?;
            match be32(&header[12..]) {
                1 => return Ok(replies),
                kind if kind >> 31 == 1 => {
                    return Err(io::Error::other(format!("option: {kind:x}")));
                }
                _ => replies.push(data),
            }
        }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Sends a request without its payload; gives its cookie.
    pub(crate) fn begin(&mut self, kind: u16, flags: u16, at: u64, len: u32) -> io::Result<u64> {
        let cookie = self.next;
        self.next += 1;
        let fields: [&[u8]; 6] = [
            &0x2560_9513_u32.to_be_bytes(),
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &at.to_be_bytes(),
            &len.to_be_bytes(),
        ];
        self.stream.write_all(&fields.concat())?;
        if kind == READ {
            self.reads.insert(cookie, (at, len as usize, Vec::new()));
        }
        Ok(cookie)
    }

    /// Sends a write; gives its cookie.
    pub(crate) fn begin_write(&mut self, flags: u16, at: u64, data: &[u8]) -> io::Result<u64> {
        let cookie = self.begin(WRITE, flags, at, data.len() as u32)?;
        self.stream.write_all(data)?;
        Ok(cookie)
    }

    /// The next request that is answered in full, and its answer.
    pub(crate) fn answer(&mut self) -> io::Result<(u64, Answer)> {
        loop {
            let magic = be32(&self.bytes(4)?);
            let done = match magic {
                0x6744_6698 => self.simple()?,
                0x668e_33ef => self.chunk()?,
                other => return Err(io::Error::other(format!("reply with magic {other:x}"))),
            };
            let Some((cookie, data)) = done else { continue };
            let read = self.reads.remove(&cookie).map(|(_, _, data)| data);
            let answer = match self.errors.remove(&cookie) {
                Some(errno) => Err(errno),
                None => Ok(read.unwrap_or(data)),
            };
            return Ok((cookie, answer));
        }
    }

    fn simple(&mut self) -> io::Result<Option<(u64, Vec<u8>)>> {
        let header = self.bytes(12)?;
        let cookie = be64(&header[4..]);
        match be32(&header) {
            0 => {
                if let Some((_, len, data)) = self.reads.get_mut(&cookie) {
                    data.resize(*len, 0xEE);
                    assert!(self.ask == Ask::Simple, "a structured read needs chunks");
                    self.stream.read_exact(data)?;
                }
            }
            errno => drop(self.errors.insert(cookie, errno)),
        }
        Ok(Some((cookie, Vec::new())))
    }

    fn chunk(&mut self) -> io::Result<Option<(u64, Vec<u8>)>> {
        assert!(self.ask == Ask::Structured, "structured replies were not asked for");
        let header = self.bytes(16)?;
        let (done, kind) = (header[1] & 1 == 1, u16::from_be_bytes([header[2], header[3]]));
        let (cookie, len) = (be64(&header[4..]), be32(&header[12..]) as usize);
        let mut payload = self.bytes(len)?;
        match kind {
            0 => {}
            1 => {
                let (from, room, data) = self.reads.get_mut(&cookie).expect("data for a read");
                data.resize(*room, 0xEE);
                let at = (be64(&payload) - *from) as usize;
                data[at..at + len - 8].copy_from_slice(&payload[8..]);
            }
            5 => return Ok(Some((cookie, payload.split_off(4)))),
            0x8001 => {
                self.errors.insert(cookie, be32(&payload));
                self.message = String::from_utf8(payload.split_off(6)).expect("UTF-8");
            }
            other => panic!("chunk of type {other:x}"),
        }
        Ok(done.then(|| (cookie, Vec::new())))
    }

    /// One request without payload, and its answer.
    pub(crate) fn call(&mut self, kind: u16, flags: u16, at: u64, len: u32) -> io::Result<Answer> {
        let sent = self.begin(kind, flags, at, len)?;
        let (cookie, answer) = self.answer()?;
        assert_eq!(cookie, sent);
        Ok(answer)
    }

    pub(crate) fn read(&mut self, at: u64, len: u32) -> io::Result<Answer> {
        self.call(READ, 0, at, len)
    }

    pub(crate) fn write(&mut self, flags: u16, at: u64, data: &[u8]) -> io::Result<Answer> {
        let sent = self.begin_write(flags, at, data)?;
        let (cookie, answer) = self.answer()?;
        assert_eq!(cookie, sent);
        Ok(answer)
    }

    /// Waits until the server has closed the connection; drops what it sent.
    pub(crate) fn wait_for_end(&mut self) {
        let mut waste = [0; 4096];
        loop {
            match self.stream.read(&mut waste) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return,
                Err(e) => panic!("the server did not hang up: {e}"),
            }
        }
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}
