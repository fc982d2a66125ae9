//! In which order a member's superblocks are written.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use stableio_array::array::ArrayOptions;
use stableio_array::{Array, Attached, Level, assemble, probe};
use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Device, Limits, OpName, Outcome, Request, Ticket};
use support::Bed;

/// Notes where writes and flushes go.
struct Watched {
    below: FileDevice,
    seen: Arc<Mutex<Vec<Step>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Write(u64),
    Flush,
}

impl Device for Watched {
    fn limits(&self) -> &Limits {
        self.below.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        match request.op.range() {
            (OpName::Write, at, _) => self.seen.lock().unwrap().push(Step::Write(at)),
            (OpName::Flush, ..) => self.seen.lock().unwrap().push(Step::Flush),
            _ => {}
        }
        self.below.submit(request)
    }
}

/// Power failure may tear the copy that is being written. If that is the only
/// one that counts, nothing is left of the member (SAVE-1).
#[test]
fn the_copy_that_counts_is_written_last() {
    let bed = Bed::new(Level::Single, 1, 65536);
    let path = &bed.members[0];
    let last = File::open(path).unwrap().metadata().unwrap().len() - 4096;
    for torn in [last, 0] {
        let counts = last - torn;
        File::options().write(true).open(path).unwrap().write_all_at(&[7; 512], torn).unwrap();
        let assembly = assemble(&[probe(path).unwrap()], None).unwrap();
        let seen = Arc::default();
        let worker = bed.worker.handle();
        let below = FileDevice::open(path, &OpenOptions::default(), worker.clone()).unwrap();
        let device: Arc<dyn Device> = Arc::new(Watched { below, seen: Arc::clone(&seen) });
        let attached = vec![Attached { name: "m".into(), device: Some(device), incoming: None }];
        let options = ArrayOptions::default();
        let array = Array::over(&assembly, attached, options, worker).unwrap();
        let steps = seen.lock().unwrap().clone();
        let first = steps.iter().position(|step| *step == Step::Write(torn)).unwrap();
        let then = steps.iter().position(|step| *step == Step::Write(counts)).unwrap();
        assert!(steps[first..then.max(first)].contains(&Step::Flush), "{torn}: {steps:?}");
        array.close().unwrap();
        assert!(probe(path).unwrap().bad_copies.is_empty());
    }
}
