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
    }
}

fn gate(max_concurrent: u32, queue_size: usize) -> Arc<AdmissionHandle> {
    AdmissionHandle::new(Arc::new(AdmissionController::new(&options(max_concurrent, queue_size))))
}

type Entering = Pin<Box<dyn Future<Output = Result<Permit, Rejection>>>>;

fn entering(entrance: &Arc<AdmissionHandle>) -> Entering {
    let entrance = Arc::clone(entrance);
    Box::pin(
        async move { Ok(entrance.enter(Instant::now(), || Ok::<_, Rejection>(Some(())), || {}).await?.0) },
    )
}

fn poll(entering: &mut Entering) -> Poll<Result<Permit, Rejection>> {
    entering.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn enter_now(entrance: &Arc<AdmissionHandle>) -> Permit {
    match poll(&mut entering(entrance)) {
        Poll::Ready(Ok(place)) => place,
        _ => panic!("there is a place"),
    }
}

#[tokio::test]
async fn the_first_who_came_enters_first_and_nobody_overtakes() {
    let entrance = gate(1, 10);
    let held = enter_now(&entrance);
    let (mut first, mut second) = (entering(&entrance), entering(&entrance));
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    assert_eq!(entrance.gate().waiting(), 2);
    drop(held);
    // The place is free, but not for those who are not the first.
    assert!(poll(&mut second).is_pending());
    let mut late = entering(&entrance);
    assert!(poll(&mut late).is_pending());
    let Poll::Ready(Ok(place)) = poll(&mut first) else { panic!("it is the first's turn") };
    assert!(poll(&mut second).is_pending());
    drop(place);
    assert!(poll(&mut late).is_pending());
    assert!(poll(&mut second).is_ready());
    assert!(poll(&mut late).is_ready());
    assert_eq!(entrance.gate().waiting(), 0);
}

#[tokio::test]
async fn one_who_leaves_the_queue_frees_its_place_in_it_and_wakes_the_next() {
    let entrance = gate(1, 1);
    let held = enter_now(&entrance);
    let mut first = entering(&entrance);
    assert!(poll(&mut first).is_pending());
    let full = poll(&mut entering(&entrance));
    assert!(matches!(full, Poll::Ready(Err(Rejection::QueueFull { waiting: 1 }))));
    drop(first);
    let mut next = entering(&entrance);
    assert!(poll(&mut next).is_pending());
    drop(held);
    assert!(poll(&mut next).is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_at_its_time() {
    let entrance = gate(1, 10);
    let _held = enter_now(&entrance);
    let begun = tokio::time::Instant::now();
    let refused = entering(&entrance).await.err();
    assert_eq!(refused, Some(Rejection::QueueTimeout(Duration::from_secs(60))));
    assert!(begun.elapsed() >= Duration::from_secs(60) && begun.elapsed() < Duration::from_secs(61));
    assert_eq!(entrance.gate().waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_first_waits_for_what_else_it_needs_and_holds_no_place_meanwhile() {
    let entrance = gate(5, 10);
    let free = Arc::new(AtomicUsize::new(0));
    let wanted = Arc::clone(&free);
    let take = move || Ok::<_, Rejection>((wanted.load(Relaxed) > 0).then_some(()));
    let mut entering = pin!(entrance.enter(Instant::now(), take, || {}));
    let mut context = Context::from_waker(Waker::noop());
    assert!(entering.as_mut().poll(&mut context).is_pending());
    assert_eq!(entrance.gate().line.count.load(Relaxed) % (1 << 32), 0);
    free.store(1, Relaxed);
    // Nobody has said so: it looks by itself.
    let begun = tokio::time::Instant::now();
    assert!(entering.await.is_ok());
    assert!(begun.elapsed() < Duration::from_millis(200), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_raised_limit_lets_those_in_who_wait_and_a_lowered_one_holds_for_those_who_come() {
    let entrance = gate(1, 10);
    let held = enter_now(&entrance);
    let (mut first, mut second) = (entering(&entrance), entering(&entrance));
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    entrance.gate().reload(&options(3, 10));
    let (Poll::Ready(Ok(a)), Poll::Ready(Ok(b))) = (poll(&mut first), poll(&mut second)) else {
        panic!("there are two more places")
    };
    entrance.gate().reload(&options(1, 10));
    drop((held, a));
    let mut third = entering(&entrance);
    assert!(poll(&mut third).is_pending());
    drop(b);
    assert!(poll(&mut third).is_ready());
}

/// Many threads with runtimes of their own, as workers are: nobody is lost, nobody overtakes, no limit is passed.
#[test]
fn places_are_never_more_than_the_limit_and_nobody_is_left_behind() {
    const THREADS: usize = 4;
    const EACH: usize = 2_000;
    let shared = Arc::new(AdmissionController::new(&options(3, 1_000_000)));
    let (inside, most, entered) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(0));
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (shared, inside, most, entered) = (&shared, &inside, &most, &entered);
            scope.spawn(move || {
                let entrance = AdmissionHandle::new(Arc::clone(shared));
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                let run = async {
                    let one = async |turn: usize| {
                        let entering = entering(&entrance);
                        if (turn + number).is_multiple_of(7) {
                            // Some leave at once, entered or not.
                            let _ = tokio::time::timeout(Duration::ZERO, entering).await;
                            return;
                        }
                        let place = entering.await.unwrap();
                        most.fetch_max(inside.fetch_add(1, Relaxed) + 1, Relaxed);
                        tokio::task::yield_now().await;
                        inside.fetch_sub(1, Relaxed);
                        drop(place);
                        *entered.lock().unwrap() += 1;
                    };
                    for turn in (0..EACH).step_by(4) {
                        tokio::join!(one(turn), one(turn + 1), one(turn + 2), one(turn + 3));
                    }
                };
                let in_time = async { tokio::time::timeout(Duration::from_secs(60), run).await };
                runtime.block_on(in_time).expect("nobody waits for ever");
            });
        }
    });
    assert!(most.into_inner() <= 3);
    let leavers = (0..THREADS).flat_map(|n| (0..EACH).map(move |turn| turn + n)).filter(|sum| sum % 7 == 0);
    assert_eq!(entered.into_inner().unwrap(), THREADS * EACH - leavers.count());
    assert_eq!(shared.line.count.load(Relaxed), 0);
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
struct Woken(AtomicUsize);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[tokio::test]
async fn what_is_freed_wakes_the_first_and_only_it() {
    let entrance = gate(5, 10);
    // Without anyone who waits it is for nobody.
    drop(WakeOnDrop::by(&entrance));
    let woken = [Arc::new(Woken::default()), Arc::new(Woken::default())];
    let full = || Ok::<Option<()>, Rejection>(None);
    let mut first = pin!(entrance.enter(Instant::now(), full, || {}));
    let mut second = pin!(entrance.enter(Instant::now(), full, || {}));
    let wakers = woken.clone().map(Waker::from);
    assert!(first.as_mut().poll(&mut Context::from_waker(&wakers[0])).is_pending());
    assert!(second.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
    let counts = || woken.each_ref().map(|woken| woken.0.load(Relaxed));
    assert_eq!(counts(), [0, 0], "it must not wake itself, or it would never rest");
    drop(WakeOnDrop::by(&entrance));
    assert_eq!(counts(), [1, 0]);
}
