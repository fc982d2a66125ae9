//! The files that a program registered with a ring, by index.
//!
//! A place says what [`File`] it is. Whatever puts a file there comes by here, so a place that
//! nothing is known of is not open for direct I/O. Places whose file may need a mediated operation
//! are filled in the back ring, too: the program may close its descriptor, and to keep one of our
//! own would take the program's record locks with it when we close it (fcntl(2)).

use stableio_onepass as onepass;

use super::abi::FILES_SKIP;
use super::back::Back;
use super::map::{memory, unmap};
use crate::files::{self, File};
use crate::io::{self, Dir};
use crate::session;

/// `IORING_MAX_FIXED_FILES` of io_uring/rsrc.c.
const MOST: u32 = 1 << 20;

/// What a place holds.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    /// Zeros are a file that is not known, and not direct.
    file: File,
    /// The descriptor that it was registered by, which may mean something else by now.
    fd: i32,
    /// Whether the back ring has it.
    mirrored: bool,
}

/// The table of a ring.
#[derive(Clone, Copy)]
pub(super) struct Files {
    at: usize,
    nr: u32,
    /// Whether the back ring has a table.
    mirrors: bool,
}

impl Files {
    pub(super) const NONE: Files = Files { at: 0, nr: 0, mirrors: false };

    /// The program registered so many places. False if there is no memory.
    pub(super) fn begin(&mut self, nr: u32) -> bool {
        self.free();
        let nr = nr.min(MOST);
        let at = memory(nr as usize * size_of::<Place>());
        *self = Files { at: at.unwrap_or(0), nr, mirrors: false };
        at.is_some()
    }

    pub(super) fn free(&mut self) {
        unmap(self.at, self.nr as usize * size_of::<Place>());
        *self = Files::NONE;
    }

    fn places(&mut self) -> &mut [Place] {
        if self.at == 0 {
            return &mut [];
        }
        // SAFETY: mapped by `begin`, zeros being empty places; reached through this value
        // alone, under the ring's lock.
        unsafe { core::slice::from_raw_parts_mut(self.at as *mut Place, self.nr as usize) }
    }

    /// What is registered at an index.
    pub(super) fn get(&mut self, index: u32) -> File {
        self.places().get(index as usize).map_or(File::PLAIN, |place| place.file)
    }

    /// A descriptor of the file at an index, as far as it can be known.
    pub(super) fn fd(&mut self, index: u32) -> i32 {
        let place = self.places().get(index as usize).copied();
        place.filter(|place| files::of(place.fd) == place.file).map_or(-1, |place| place.fd)
    }

    /// Whether the back ring has the same at an index.
    pub(super) fn is_mirrored(&mut self, index: u32) -> bool {
        self.places().get(index as usize).is_some_and(|place| place.mirrored)
    }

    /// Whether a file needs to be known to the back ring.
    fn needs_mirror(file: File) -> bool {
        file.is_direct()
            && (session::detects()
                || file.is_uncached()
                || io::concerns(file, Dir::Read)
                || io::concerns(file, Dir::Write))
    }

    /// Puts what `fd` is at an index. `back` makes the back ring, or gives what there is of it.
    pub(super) fn set(
        &mut self,
        index: u32,
        fd: i32,
        back: impl FnOnce() -> Option<&'static Back>,
    ) {
        let file = if fd < 0 { File::PLAIN } else { files::of(fd) };
        let Some(place) = self.places().get_mut(index as usize) else { return };
        let was_mirrored = place.mirrored;
        let needs = Files::needs_mirror(file);
        *place = Place { file, fd, mirrored: false };
        if !needs && !was_mirrored {
            return;
        }
        let Some(back) = back() else { return };
        if !self.mirrors {
            self.mirrors = back.make_files(self.nr);
        }
        let mirrored = self.mirrors && back.set_file(index, if needs { fd } else { -1 });
        if let Some(place) = self.places().get_mut(index as usize) {
            place.mirrored = mirrored && needs;
        }
    }

    /// Puts the descriptors in a list of the program's at indices from `first` on.
    pub(super) fn set_list(
        &mut self,
        first: u32,
        list: u64,
        count: u32,
        mut back: impl FnMut() -> Option<&'static Back>,
    ) {
        for i in 0..count {
            let fd = read_fd(list + u64::from(i) * 4).unwrap_or(-1);
            if fd != FILES_SKIP {
                self.set(first.saturating_add(i), fd, &mut back);
            }
        }
    }
}

/// A descriptor in the program's memory.
pub(super) fn read_fd(at: u64) -> Option<i32> {
    let mut fd = 0i32;
    // SAFETY: the program's memory is foreign, the copy is ours. The signals are not blocked.
    unsafe { onepass::copy_in(at as *const u8, (&raw mut fd).cast(), size_of::<i32>()) }.ok()?;
    Some(fd)
}
