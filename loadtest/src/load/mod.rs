//! The load generator: many connections on one thread, raw sockets, each response checked while it is read.
//!
//! Closed loop: each connection sends its next request when the last response is complete. Open loop:
//! requests are due at a fixed rate whether or not responses arrive, and latency counts from when a request
//! was due, so that a server that stalls cannot hide it by receiving fewer requests (coordinated omission).
//! No process is started or killed here.

mod connection;
mod distribution;
mod measurements;
mod progress;
mod report;
mod request;
mod response;
mod schedule;

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, sleep, sleep_until};

use crate::canned::unix_nanos;
use crate::process::{self, WatchedProcess};
pub use connection::fetch;
pub use distribution::Distribution;
use measurements::Measurements;
pub use progress::Progress;
pub use report::{Percentiles, ProcessCost, Report};
pub use request::{Mix, Request, RequestKind};
pub use schedule::SendTime;

/// Longer than any run, and short enough to be added to an `Instant`.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// When the next request is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Closed loop: when the connection's last response is complete.
    Closed,
    /// Open loop: at a fixed rate, on whichever connection is free.
    Open {
        /// Requests a second.
        rate: f64,
    },
}

/// When a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// After measuring for this time.
    Time(Duration),
    /// When this many requests have completed. There is no warm-up.
    Count(u64),
}

/// One run of the generator.
#[derive(Clone, Debug)]
pub struct Load {
    /// The address of the router, or of a server.
    pub target: SocketAddr,
    /// Requests, sent in rotation.
    pub requests: Vec<Request>,
    /// Keep-alive connections.
    pub connections: usize,
    /// Closed or open loop.
    pub mode: Mode,
    /// Time over which connections start, so that their streams are not in step.
    pub ramp: Duration,
    /// Time before measuring starts, the ramp included.
    pub warmup: Duration,
    /// When the run ends.
    pub until: Until,
    /// Processes whose CPU time and memory are measured during the run.
    pub watch: Vec<WatchedProcess>,
    /// Prefix of the progress line; without it no progress is shown.
    pub label: Option<String>,
}

impl Load {
    /// A closed loop of `connections` for `time`, without a warm-up.
    pub fn new(target: SocketAddr, request: Request, connections: usize, time: Duration) -> Self {
        Self {
            target,
            requests: vec![request],
            connections,
            mode: Mode::Closed,
            ramp: Duration::ZERO,
            warmup: Duration::ZERO,
            until: Until::Time(time),
            watch: Vec::new(),
            label: None,
        }
    }

    /// Runs on the current thread's runtime.
    ///
    /// # Errors
    /// If a watched process cannot be read. Failed requests are counted, not returned.
    pub async fn run(self) -> io::Result<Report> {
        LocalSet::new().run_until(self.drive()).await
    }

    async fn drive(self) -> io::Result<Report> {
        let schedule = match self.mode {
            Mode::Open { rate } => Some(schedule::start(rate, self.connections)?),
            Mode::Closed => None,
        };
        let limit = if let Until::Count(count) = self.until { count } else { u64::MAX };
        let run =
            Rc::new(Run { measurements: RefCell::default(), left: Cell::new(limit), load: self, schedule });
        let mut connections = JoinSet::new();
        for index in 0..run.load.connections {
            connections.spawn_local(run.clone().connection(index));
        }
        run.measure(connections).await
    }
}

/// Shared by the connections of a run.
struct Run {
    load: Load,
    measurements: RefCell<Measurements>,
    /// Requests that have not been sent yet.
    left: Cell<u64>,
    schedule: Option<schedule::Schedule>,
}

impl Run {
    async fn measure(&self, mut connections: JoinSet<()>) -> io::Result<Report> {
        let progress = self.load.label.clone().map(Progress::new);
        if let Until::Time(_) = self.load.until {
            self.show_until(progress.as_ref(), Instant::now() + self.load.warmup).await;
            self.measurements.replace(Measurements::default());
        }
        let (before, all_before) = (process::cpu_times(&self.load.watch)?, process::machine_cpu_time());
        let (started_at_ns, started) = (unix_nanos(), Instant::now());
        let time = if let Until::Time(time) = self.load.until { time } else { FOREVER };
        let all = async { while connections.join_next().await.is_some() {} };
        tokio::select! {
            () = all => {}
            () = self.show_until(progress.as_ref(), started + time) => {}
        }
        let seconds = started.elapsed().as_secs_f64();
        let processes = process::costs_since(&self.load.watch, &before)?;
        let own: u64 = processes.iter().map(|processes| processes.cpu_ns).sum();
        let all = process::machine_cpu_time().saturating_sub(all_before);
        let mut report = self.measurements.borrow().report(seconds, processes);
        report.started_at_ns = started_at_ns;
        report.other_cores = all.saturating_sub(Duration::from_nanos(own)).as_secs_f64() / seconds;
        if self.schedule.is_some() {
            report.times = self.measurements.borrow().times();
        }
        Ok(report)
    }

    /// Sends requests one after the other until none are left.
    async fn connection(self: Rc<Self>, index: usize) {
        let share = index as f64 / self.load.connections as f64;
        sleep(self.load.ramp.mul_f64(share)).await;
        let mut connection = connection::Connection::new(self.load.target);
        let mut turn = index;
        while self.left.get() > 0 {
            self.left.set(self.left.get() - 1);
            let request = &self.load.requests[turn % self.load.requests.len()];
            turn += 1;
            let send_time = match &self.schedule {
                Some(schedule) => match schedule.next().await {
                    Some(send_time) => send_time,
                    None => return,
                },
                None => SendTime::now(),
            };
            match connection.exchange(request, &self.measurements).await {
                Ok(times) => self.measurements.borrow_mut().count(&send_time, &times),
                Err(error) => {
                    self.measurements.borrow_mut().failed(error);
                    connection = connection::Connection::new(self.load.target);
                    // Back off: a server that refuses connections would be retried in a busy loop.
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    async fn show_until(&self, progress: Option<&Progress>, end: Instant) {
        let Some(progress) = progress else { return sleep_until(end).await };
        while Instant::now() < end {
            sleep_until(end.min(Instant::now() + Duration::from_millis(500))).await;
            let measurements = self.measurements.borrow();
            progress.show(measurements.requests, measurements.tokens, measurements.errors);
        }
    }
}
