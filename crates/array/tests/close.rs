//! What is left of an array that was closed.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stableio_array::array::ArrayOptions;
use stableio_array::{Array, Attached, Level, assemble, probe};
use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Device, Limits, OpName, Outcome, Request, Stack, Ticket, exec, ring};
use support::{Bed, Open};

/// A member whose next flush takes long, if it is told so; the later ones do
/// not.
struct SlowOnce {
    below: Arc<FileDevice>,
    slow: Arc<AtomicBool>,
}

impl Device for SlowOnce {
    fn limits(&self) -> &Limits {
        self.below.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        if request.op.range().0 != OpName::Flush || !self.slow.swap(false, Ordering::Relaxed) {
            return self.below.submit(request);
        }
        let below = self.below.clone();
        exec::spawn(async move {
            ring::sleep(Duration::from_millis(300)).await;
            below.submit(request).await
        })
    }
}

/// ENG-4: a checkpoint that began by itself is over when the array is closed,
/// though the one of the close itself took less time.
#[test]
fn nothing_of_a_closed_array_is_under_way() {
    let bed = Bed::new(Level::Single, 1, 65536);
    let path = &bed.members[0];
    let slow = Arc::new(AtomicBool::new(false));
    let below = FileDevice::open(path, &OpenOptions::default(), bed.worker.handle().clone());
    let member: Arc<dyn Device> =
        Arc::new(SlowOnce { below: Arc::new(below.unwrap()), slow: slow.clone() });
    let left = Arc::downgrade(&member);
    let attached = vec![Attached { name: "m".into(), device: Some(member), incoming: None }];
    let assembly = assemble(&[probe(path).unwrap()], None).unwrap();
    let (options, worker) = (ArrayOptions::default(), bed.worker.handle());
    let array = Array::over(&assembly, attached, options, worker).unwrap();
    let stack = Stack::new("t", array.device().clone(), bed.pool.clone(), worker.clone());
    let open = Open { array, stack };
    slow.store(true, Ordering::Relaxed);
    for at in (0..).step_by(4096) {
        open.write(at % open.size() as u64, vec![7; 4096]).unwrap();
        if !slow.load(Ordering::Relaxed) {
            break;
        }
    }
    open.close();
    assert_eq!(left.strong_count(), 0, "somebody still has the member");
}
