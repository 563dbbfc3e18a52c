//! When requests of an open loop are due.
//!
//! A thread of its own keeps the time: the runtime's timers round to a millisecond, which is more than what is
//! measured. A request that finds no free connection is late by no fault of its own, and its latency says so.

use std::io;
use std::thread;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::Instant;

/// When a request is due, and when its turn came.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    /// When it was to be sent.
    pub due: Instant,
    /// When the generator was told so: the difference is the generator's own delay.
    pub told: Instant,
}

impl Ticket {
    /// Due now.
    pub fn now() -> Self {
        let now = Instant::now();
        Self { due: now, told: now }
    }
}

/// Connections wait for it in line, which is what a lock across an await is.
pub(super) struct Pace(Mutex<Receiver<Ticket>>);

/// Tickets at `rate` a second. What nobody takes waits, for a minute at most.
pub(super) fn start(rate: f64, connections: usize) -> io::Result<Pace> {
    if !(rate > 0.0 && rate.is_finite()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a rate must be above 0"));
    }
    let (tickets, taken) = channel((rate as usize * 60).max(connections));
    let started = Instant::now();
    thread::Builder::new().name("pace".to_owned()).spawn(move || {
        for index in 0u64.. {
            let due = started + Duration::from_secs_f64(index as f64 / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if tickets.blocking_send(Ticket { due, told: Instant::now() }).is_err() {
                return;
            }
        }
    })?;
    Ok(Pace(Mutex::new(taken)))
}

impl Pace {
    /// The next ticket, as soon as it is due.
    pub(super) async fn next(&self) -> Option<Ticket> {
        self.0.lock().await.recv().await
    }
}
