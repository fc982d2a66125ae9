//! The pool under load: never more memory than it has (POOL-1), everybody gets
//! theirs (POOL-2, POOL-3), and who gives up takes nothing along.

mod support;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use mem::{BLOCK, Pool, PoolBuf, Reservation, StableBuf};
use stableio_mem as mem;
use support::Random;

/// Runs a future on this thread, which sleeps without a limit of time: a
/// wake-up that is lost makes it sleep for ever.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// Runs `work` on a thread of its own, and says whether it ended in time. If
/// not, the thread stays behind: nobody can end it.
fn ends_within(limit: Duration, work: impl FnOnce() + Send + 'static) -> bool {
    let (ended, has_ended) = mpsc::channel::<()>();
    let worker = thread::spawn(move || {
        // Also when `work` panics: `join` below tells that.
        let _dropped_at_the_end = ended;
        work();
    });
    if has_ended.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
        return false;
    }
    worker.join().expect("the work panicked");
    true
}

const LONG: Duration = Duration::from_secs(120);
const THREADS: usize = 8;
const ROUNDS: usize = 2_000;

/// Counts how often it was woken.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Count {
    fn of_wakes(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// Polls a future once, for somebody who counts its wake-ups.
fn poll<F: Future + Unpin>(future: &mut F, count: &Arc<Count>) -> Poll<F::Output> {
    let waker = Waker::from(count.clone());
    std::pin::Pin::new(future).poll(&mut Context::from_waker(&waker))
}

/// Fills a buffer with its owner's number; it must be there until the end, or
/// somebody else had the same memory.
fn sign(buf: &mut PoolBuf, owner: u8) {
    buf.pieces_mut().for_each(|piece| piece.fill(owner));
}

fn assert_signed(buf: &StableBuf, owner: u8) {
    assert!(buf.pieces().all(|piece| piece.iter().all(|&byte| byte == owner)), "memory was shared");
}

/// Takes a reservation apart at random; some buffers are let go by another
/// thread, which only does that, so that nobody waits while holding (POOL-2).
fn use_up(
    mut memory: Reservation,
    owner: u8,
    random: &mut Random,
    others: &mpsc::Sender<(u8, StableBuf)>,
) {
    let mut held = Vec::new();
    while memory.left() > 0 && random.below(5) > 0 {
        let mut part = memory.split(1 + random.below(memory.left()));
        let mut buf = part.take(1 + random.below(part.left()));
        sign(&mut buf, owner);
        held.push(buf.freeze());
    }
    while !held.is_empty() {
        let buf = held.swap_remove(random.below(held.len()));
        match random.below(3) {
            0 => others.send((owner, buf)).expect("it listens"),
            1 => {
                let half = buf.slice(0..buf.len() / 2);
                drop(buf);
                assert_signed(&half, owner);
            }
            _ => assert_signed(&buf, owner),
        }
    }
}

#[test]
fn many_threads_share_a_pool_and_all_finish() {
    let ended = ends_within(LONG, || {
        let pool = Pool::new(1 << 20).unwrap();
        let all_ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let watch = scope.spawn(|| {
                while !all_ended.load(Ordering::Relaxed) {
                    assert!(pool.used() <= pool.size(), "POOL-1");
                    thread::sleep(Duration::from_micros(50));
                }
            });
            let (others, from_others) = mpsc::channel::<(u8, StableBuf)>();
            scope.spawn(|| {
                from_others.into_iter().for_each(|(owner, buf)| assert_signed(&buf, owner))
            });
            let workers: Vec<_> = (0..THREADS)
                .map(|number| {
                    let (pool, others) = (&pool, others.clone());
                    scope.spawn(move || {
                        let owner = 1 + number as u8;
                        let mut random = Random(number as u64);
                        for _ in 0..ROUNDS {
                            // Mostly small; now and then all that there is.
                            let most = [64 << 10, 256 << 10, pool.size()][random.below(3)];
                            let mut reserve = Box::pin(pool.reserve(random.below(most + 1)));
                            // Some give up, while waiting or already granted.
                            if random.below(4) == 0 {
                                let _ = poll(&mut reserve, &Arc::default());
                                if random.below(2) == 0 {
                                    thread::yield_now();
                                }
                                continue;
                            }
                            let memory = block_on(reserve).expect("smaller than the pool");
                            use_up(memory, owner, &mut random, &others);
                        }
                    })
                })
                .collect();
            drop(others);
            // Without `join` a panic would leave the watch running.
            let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
            all_ended.store(true, Ordering::Relaxed);
            watch.join().expect("POOL-1");
            assert!(results.iter().all(Result::is_ok), "a worker panicked");
        });
        assert_eq!(pool.used(), 0);
        // Nothing is lost, neither from the count nor from the free runs.
        let mut all = pool.try_reserve(pool.size()).unwrap().unwrap();
        assert_eq!(all.take(pool.size()).freeze().pieces().count(), 1, "all runs were merged");
    });
    assert!(ended, "somebody waits for ever");
}

/// The twin of the test above: where a wake-up is lost, that is seen.
#[test]
fn a_lost_wake_up_is_seen() {
    let pool = Pool::new(1 << 20).unwrap();
    let all = pool.try_reserve(pool.size()).unwrap().unwrap();
    let waiting = pool.clone();
    let (queued, is_queued) = mpsc::channel();
    let ended = ends_within(Duration::from_millis(300), move || {
        let mut reserve = pin!(waiting.reserve(BLOCK));
        let mut deaf = Context::from_waker(Waker::noop());
        assert!(reserve.as_mut().poll(&mut deaf).is_pending());
        queued.send(()).unwrap();
        // As `block_on` does, which would poll again once it is woken.
        loop {
            thread::park();
        }
    });
    is_queued.recv().unwrap();
    drop(all);
    assert!(!ended);
}

#[test]
fn who_gives_up_in_front_lets_the_next_one_in() {
    let pool = Pool::new(1 << 20).unwrap();
    let mut all = pool.try_reserve(pool.size()).unwrap().unwrap();
    let (front, next) = (Arc::<Count>::default(), Arc::<Count>::default());
    let mut large = Box::pin(pool.reserve(pool.size()));
    let mut small = Box::pin(pool.reserve(BLOCK));
    assert!(poll(&mut large, &front).is_pending());
    assert!(poll(&mut small, &next).is_pending());
    drop(all.split(BLOCK));
    assert_eq!((front.of_wakes(), next.of_wakes()), (0, 0), "POOL-3: nobody overtakes");
    assert!(pool.try_reserve(BLOCK).unwrap().is_none(), "POOL-3: not that way either");

    drop(large);
    assert_eq!((front.of_wakes(), next.of_wakes()), (0, 1));
    let Poll::Ready(Ok(granted)) = poll(&mut small, &next) else { panic!("granted") };
    assert_eq!(granted.left(), BLOCK);
    drop((granted, all));
    assert_eq!(pool.used(), 0);
}

#[test]
fn who_gives_up_what_was_granted_passes_it_on() {
    let pool = Pool::new(1 << 20).unwrap();
    let all = pool.try_reserve(pool.size()).unwrap().unwrap();
    let (front, next) = (Arc::<Count>::default(), Arc::<Count>::default());
    let mut first = Box::pin(pool.reserve(pool.size()));
    let mut second = Box::pin(pool.reserve(pool.size() - BLOCK));
    assert!(poll(&mut first, &front).is_pending());
    assert!(poll(&mut second, &next).is_pending());
    drop(all);
    assert_eq!((front.of_wakes(), next.of_wakes()), (1, 0));
    assert_eq!(pool.used(), pool.size(), "what is granted counts, taken or not");

    drop(first);
    assert_eq!((front.of_wakes(), next.of_wakes()), (1, 1));
    assert_eq!(pool.used(), pool.size() - BLOCK);
    drop(second);
    assert_eq!(pool.used(), 0);
}

/// The waker that counts is the one of the last poll: a future may move from
/// one task to another.
#[test]
fn the_last_waker_is_woken() {
    let pool = Pool::new(1 << 20).unwrap();
    let all = pool.try_reserve(pool.size()).unwrap().unwrap();
    let (earlier, later) = (Arc::<Count>::default(), Arc::<Count>::default());
    let mut reserve = Box::pin(pool.reserve(1));
    assert!(poll(&mut reserve, &earlier).is_pending());
    assert!(poll(&mut reserve, &later).is_pending());
    drop(all);
    assert_eq!((earlier.of_wakes(), later.of_wakes()), (0, 1));
    assert!(poll(&mut reserve, &later).is_ready());
}

/// A waker is the code of somebody's executor. It may look at the pool and let
/// go of buffers, so the pool must not hold its lock meanwhile.
#[test]
fn a_waker_may_use_the_pool() {
    struct Meddler(Arc<Pool>, Mutex<Option<Reservation>>);
    impl Wake for Meddler {
        fn wake(self: Arc<Self>) {
            assert_eq!(self.0.used(), self.0.size());
            drop(self.1.lock().unwrap().take());
        }
    }
    let ended = ends_within(Duration::from_secs(20), || {
        let pool = Pool::new(1 << 20).unwrap();
        let mut all = pool.try_reserve(pool.size()).unwrap().unwrap();
        let kept = all.split(BLOCK);
        let waker = Waker::from(Arc::new(Meddler(pool.clone(), Some(kept).into())));
        let mut first = Box::pin(pool.reserve(pool.size() - BLOCK));
        assert!(first.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        let second = Arc::<Count>::default();
        let mut rest = Box::pin(pool.reserve(BLOCK));
        assert!(poll(&mut rest, &second).is_pending());
        drop(all);
        assert_eq!(second.of_wakes(), 1, "by what the waker of the first let go");
        drop((first, rest));
        assert_eq!(pool.used(), 0);
    });
    assert!(ended, "the pool calls wakers under its lock");
}

#[test]
fn more_than_the_pool_is_refused_at_once() {
    let pool = Pool::new(1).unwrap();
    assert_eq!(pool.size(), 1 << 20);
    let all = pool.try_reserve(pool.size()).unwrap().unwrap();
    // At once, although everything is taken: waiting would not help.
    let refused = block_on(pool.reserve(pool.size() + 1)).unwrap_err();
    assert_eq!((refused.need, refused.size), (pool.size() + BLOCK, pool.size()));
    assert_eq!(pool.try_reserve(pool.size() + 1).unwrap_err(), refused);
    drop(all);
}

#[test]
#[should_panic(expected = "POOL-2")]
fn more_than_was_reserved_is_not_given() {
    let pool = Pool::new(1 << 20).unwrap();
    let mut memory = pool.try_reserve(2 * BLOCK).unwrap().unwrap();
    let _first = memory.take(1);
    let _second = memory.take(BLOCK + 1);
}
