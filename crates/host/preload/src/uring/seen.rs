//! What of a ring is in flight, by `user_data`: so we know when the kernel is done with a copy
//! whose completion goes to the program directly.
//!
//! - **SEEN-1** An I/O's memory is given back only when as many completions of its `user_data`
//!   were seen as entries with it were submitted: one of another operation can not be taken for it.
//! - **SEEN-2** Where completions may have been missed, or may come from elsewhere, nothing is
//!   concluded any more: what is in flight then keeps its memory, and new I/Os are mediated.

use super::map::{memory, unmap};
use crate::io::Io;

/// What never goes down: an entry that may complete in silence.
const FOR_EVER: u32 = 1 << 24;
const NO_IO: u32 = u32::MAX;

#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    user_data: u64,
    /// Entries in flight with it; 0: the place is free.
    count: u32,
    io: u32,
}

/// A table, open addressing with linear probing, at most half full.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    at: usize,
    places: usize,
    used: usize,
    /// Entries in flight that will complete.
    pub(super) total: u32,
    /// I/Os that have memory.
    pub(super) ios: u32,
}

impl Seen {
    pub(super) const NONE: Seen = Seen { at: 0, places: 0, used: 0, total: 0, ios: 0 };

    /// A table for a ring with so many completions.
    pub(super) fn new(cq_entries: u32) -> Option<Seen> {
        let places = (cq_entries as usize * 4).max(4096).next_power_of_two();
        let at = memory(places * size_of::<Entry>())?;
        Some(Seen { at, places, ..Seen::NONE })
    }

    pub(super) fn free(&mut self) {
        unmap(self.at, self.places * size_of::<Entry>());
        *self = Seen::NONE;
    }

    fn table(&mut self) -> &mut [Entry] {
        if self.at == 0 {
            return &mut [];
        }
        // SAFETY: mapped by `new` with this length, zeros being free places; the table is reached
        // through this value alone, under the ring's lock.
        unsafe { core::slice::from_raw_parts_mut(self.at as *mut Entry, self.places) }
    }

    fn home(&self, user_data: u64) -> usize {
        (user_data.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (self.places - 1)
    }

    /// The place of this value, or the free one where it would be.
    fn place(&mut self, user_data: u64) -> usize {
        let mut place = self.home(user_data);
        let mask = self.places - 1;
        let table = self.table();
        while table[place].count != 0 && table[place].user_data != user_data {
            place = (place + 1) & mask;
        }
        place
    }

    /// An entry is being submitted. Whether no other with its `user_data` is in flight; `None` if
    /// there is no room to take note of it.
    pub(super) fn enter(&mut self, user_data: u64, silent: bool) -> Option<bool> {
        if self.places == 0 {
            return None;
        }
        let place = self.place(user_data);
        let full = self.used * 2 >= self.places;
        let entry = &mut self.table()[place];
        let alone = entry.count == 0;
        if alone && full {
            return None;
        }
        if alone {
            *entry = Entry { user_data, count: 0, io: NO_IO };
        }
        entry.count = entry.count.saturating_add(if silent { FOR_EVER } else { 1 });
        self.used += usize::from(alone);
        self.total += u32::from(!silent);
        Some(alone)
    }

    /// The entry with this `user_data`, the only one, is an I/O that has memory.
    pub(super) fn attach(&mut self, user_data: u64, io: Io) {
        let place = self.place(user_data);
        self.table()[place].io = io.index();
        self.ios += 1;
    }

    /// An entry has completed, or was not submitted after all. The I/O whose memory is free now,
    /// if there is one.
    pub(super) fn leave(&mut self, user_data: u64) -> Option<Io> {
        if self.places == 0 {
            return None;
        }
        let place = self.place(user_data);
        let entry = &mut self.table()[place];
        if entry.count == 0 {
            return None;
        }
        entry.count -= 1;
        let (left, io) = (entry.count, entry.io);
        self.total = self.total.saturating_sub(1);
        if left != 0 {
            return None;
        }
        self.used -= 1;
        self.close_gap(place);
        let io = if io == NO_IO { None } else { Io::from_index(io) };
        self.ios -= u32::from(io.is_some());
        io
    }

    /// Moves what was put behind a place because it was taken.
    fn close_gap(&mut self, mut gap: usize) {
        let mask = self.places - 1;
        let mut place = gap;
        loop {
            place = (place + 1) & mask;
            let entry = self.table()[place];
            if entry.count == 0 {
                return;
            }
            // It may move if its home does not lie behind the gap.
            let home = self.home(entry.user_data);
            if place.wrapping_sub(home) & mask >= place.wrapping_sub(gap) & mask {
                self.table()[gap] = entry;
                self.table()[place].count = 0;
                gap = place;
            }
        }
    }
}
