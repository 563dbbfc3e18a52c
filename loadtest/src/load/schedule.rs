//! The schedule of an open loop.
//!
//! A separate thread keeps the time: tokio's timers round to a millisecond, which is more than the latencies
//! that are measured. A request that finds no free connection is sent late, and its latency includes that.

use std::io;
use std::thread;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::Instant;

/// When a request is due, and when the generator learned that.
#[derive(Clone, Copy, Debug)]
pub struct SendTime {
    /// When it should be sent.
    pub due: Instant,
    /// When the generator released it. The difference is the generator's own delay.
    pub issued: Instant,
}

impl SendTime {
    /// Due now, as in a closed loop.
    pub fn now() -> Self {
        let now = Instant::now();
        Self { due: now, issued: now }
    }
}

/// Connections queue for the next send time, which is why this lock is held across an await.
pub(super) struct Schedule(Mutex<Receiver<SendTime>>);

/// Releases send times at `rate` per second. Those that no connection takes are kept for a minute at most.
pub(super) fn start(rate: f64, connections: usize) -> io::Result<Schedule> {
    if !(rate > 0.0 && rate.is_finite()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a rate must be above 0"));
    }
    let (send_times, taken) = channel((rate as usize * 60).max(connections));
    let started = Instant::now();
    thread::Builder::new().name("schedule".to_owned()).spawn(move || {
        for index in 0u64.. {
            let due = started + Duration::from_secs_f64(index as f64 / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if send_times.blocking_send(SendTime { due, issued: Instant::now() }).is_err() {
                return;
            }
        }
    })?;
    Ok(Schedule(Mutex::new(taken)))
}

impl Schedule {
    /// The next send time, as soon as it is due.
    pub(super) async fn next(&self) -> Option<SendTime> {
        self.0.lock().await.recv().await
    }
}
