use std::pin::{Pin, pin};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;
use std::time::Instant;

use super::*;

fn options(max_concurrent: u32, queue_size: usize) -> AdmissionOptions {
    AdmissionOptions {
        max_concurrent: Some(max_concurrent),
        queue_size,
        queue_timeout: Duration::from_secs(60),
        rate: None,
        caps: BackendCaps::NONE,
        max_buffered: usize::MAX,
    }
}

fn handle(max_concurrent: u32, queue_size: usize) -> Arc<AdmissionHandle> {
    AdmissionHandle::new(Arc::new(AdmissionController::new(&options(max_concurrent, queue_size))))
}

type Admitting = Pin<Box<dyn Future<Output = Result<Permit, Rejection>>>>;

fn admitting(handle: &Arc<AdmissionHandle>) -> Admitting {
    let handle = Arc::clone(handle);
    Box::pin(async move { Ok(handle.admit(Instant::now(), || Ok::<_, Rejection>(Some(())), || {}).await?.0) })
}

fn poll(admitting: &mut Admitting) -> Poll<Result<Permit, Rejection>> {
    admitting.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn admit_now(handle: &Arc<AdmissionHandle>) -> Permit {
    match poll(&mut admitting(handle)) {
        Poll::Ready(Ok(permit)) => permit,
        _ => panic!("a permit is free"),
    }
}

#[tokio::test]
async fn requests_are_admitted_first_in_first_out() {
    let handle = handle(1, 10);
    let held = admit_now(&handle);
    let (mut first, mut second) = (admitting(&handle), admitting(&handle));
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    assert_eq!(handle.controller().waiting(), 2);
    drop(held);
    // A permit is free, but only for the head of the queue.
    assert!(poll(&mut second).is_pending());
    let mut late = admitting(&handle);
    assert!(poll(&mut late).is_pending());
    let Poll::Ready(Ok(permit)) = poll(&mut first) else { panic!("it is the head of the queue") };
    assert!(poll(&mut second).is_pending());
    drop(permit);
    assert!(poll(&mut late).is_pending());
    assert!(poll(&mut second).is_ready());
    assert!(poll(&mut late).is_ready());
    assert_eq!(handle.controller().waiting(), 0);
}

#[tokio::test]
async fn a_waiter_that_leaves_makes_room_in_the_queue_and_wakes_the_next() {
    let handle = handle(1, 1);
    let held = admit_now(&handle);
    let mut first = admitting(&handle);
    assert!(poll(&mut first).is_pending());
    let full = poll(&mut admitting(&handle));
    assert!(matches!(full, Poll::Ready(Err(Rejection::QueueFull { waiting: 1 }))));
    drop(first);
    let mut next = admitting(&handle);
    assert!(poll(&mut next).is_pending());
    drop(held);
    assert!(poll(&mut next).is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_queued_request_times_out() {
    let handle = handle(1, 10);
    let _held = admit_now(&handle);
    let start = tokio::time::Instant::now();
    let rejected = admitting(&handle).await.err();
    assert_eq!(rejected, Some(Rejection::QueueTimeout(Duration::from_secs(60))));
    assert!(start.elapsed() >= Duration::from_secs(60) && start.elapsed() < Duration::from_secs(61));
    assert_eq!(handle.controller().waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_head_of_the_queue_rechecks_backend_capacity_and_holds_no_permit_meanwhile() {
    let handle = handle(5, 10);
    let free = Arc::new(AtomicUsize::new(0));
    let capacity = Arc::clone(&free);
    let acquire = move || Ok::<_, Rejection>((capacity.load(Relaxed) > 0).then_some(()));
    let mut admitting = pin!(handle.admit(Instant::now(), acquire, || {}));
    let mut context = Context::from_waker(Waker::noop());
    assert!(admitting.as_mut().poll(&mut context).is_pending());
    assert_eq!(handle.controller().wait_queue.count.load(Relaxed) % (1 << 32), 0);
    free.store(1, Relaxed);
    // Without a wake-up, as when a backend recovers.
    let start = tokio::time::Instant::now();
    assert!(admitting.await.is_ok());
    assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_raised_limit_admits_waiters_and_a_lowered_one_applies_to_later_requests() {
    let handle = handle(1, 10);
    let held = admit_now(&handle);
    let (mut first, mut second) = (admitting(&handle), admitting(&handle));
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    handle.controller().reload(&options(3, 10));
    let (Poll::Ready(Ok(a)), Poll::Ready(Ok(b))) = (poll(&mut first), poll(&mut second)) else {
        panic!("two more permits are free")
    };
    handle.controller().reload(&options(1, 10));
    drop((held, a));
    let mut third = admitting(&handle);
    assert!(poll(&mut third).is_pending());
    drop(b);
    assert!(poll(&mut third).is_ready());
}

/// Threads with runtimes of their own, as workers have: no waiter is lost and the limit holds.
#[test]
fn concurrent_workers_never_exceed_the_limit_and_leave_no_waiter_behind() {
    const THREADS: usize = 4;
    const REQUESTS: usize = 2_000;
    let controller = Arc::new(AdmissionController::new(&options(3, 1_000_000)));
    let (running, most, admitted) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(0));
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (controller, running, most, admitted) = (&controller, &running, &most, &admitted);
            scope.spawn(move || {
                let handle = AdmissionHandle::new(Arc::clone(controller));
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                let run = async {
                    let one = async |turn: usize| {
                        let admitting = admitting(&handle);
                        if (turn + number).is_multiple_of(7) {
                            // Some are cancelled at once, admitted or not.
                            let _ = tokio::time::timeout(Duration::ZERO, admitting).await;
                            return;
                        }
                        let permit = admitting.await.unwrap();
                        most.fetch_max(running.fetch_add(1, Relaxed) + 1, Relaxed);
                        tokio::task::yield_now().await;
                        running.fetch_sub(1, Relaxed);
                        drop(permit);
                        *admitted.lock().unwrap() += 1;
                    };
                    for turn in (0..REQUESTS).step_by(4) {
                        tokio::join!(one(turn), one(turn + 1), one(turn + 2), one(turn + 3));
                    }
                };
                let in_time = async { tokio::time::timeout(Duration::from_secs(60), run).await };
                runtime.block_on(in_time).expect("no waiter is left behind");
            });
        }
    });
    assert!(most.into_inner() <= 3);
    let turns = (0..THREADS).flat_map(|number| (0..REQUESTS).map(move |turn| turn + number));
    let cancelled = turns.filter(|sum| sum % 7 == 0).count();
    assert_eq!(admitted.into_inner().unwrap(), THREADS * REQUESTS - cancelled);
    assert_eq!(controller.wait_queue.count.load(Relaxed), 0);
}

#[test]
fn retry_after_is_in_whole_seconds_and_never_0() {
    let limited = |after| Rejection::RateLimited { rate: 1, after }.retry_after();
    assert_eq!(limited(Duration::from_nanos(1)), 1);
    assert_eq!(limited(Duration::from_secs(2)), 2);
    assert_eq!(limited(Duration::from_millis(2_001)), 3);
    assert_eq!(Rejection::QueueFull { waiting: 3 }.retry_after(), 1);
}

#[derive(Default)]
struct CountingWaker(AtomicUsize);

impl std::task::Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[tokio::test]
async fn released_capacity_wakes_the_head_of_the_queue_only() {
    let handle = handle(5, 10);
    // With an empty queue it wakes no one.
    drop(WakeOnDrop::new(&handle));
    let wakers = [Arc::new(CountingWaker::default()), Arc::new(CountingWaker::default())];
    let no_capacity = || Ok::<Option<()>, Rejection>(None);
    let mut first = pin!(handle.admit(Instant::now(), no_capacity, || {}));
    let mut second = pin!(handle.admit(Instant::now(), no_capacity, || {}));
    let [waker_1, waker_2] = wakers.clone().map(Waker::from);
    assert!(first.as_mut().poll(&mut Context::from_waker(&waker_1)).is_pending());
    assert!(second.as_mut().poll(&mut Context::from_waker(&waker_2)).is_pending());
    let wake_ups = || wakers.each_ref().map(|waker| waker.0.load(Relaxed));
    assert_eq!(wake_ups(), [0, 0], "the head must not wake itself, or it would spin");
    drop(WakeOnDrop::new(&handle));
    assert_eq!(wake_ups(), [1, 0]);
}
