//! The load generator: many connections on one thread, raw sockets, an answer checked as it is read.
//!
//! Closed loop: every connection sends its next request when the last answer is complete. Open loop: requests are
//! due at a fixed rate whether or not answers come, and latency counts from when a request was due, so that a server
//! that stalls cannot hide it by being asked less. Nothing here starts or ends a process.

mod answer;
mod connection;
mod distribution;
mod pace;
mod progress;
mod report;
mod request;
mod tally;

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, sleep, sleep_until};

use crate::canned::unix_nanos;
use crate::process::{self, Watch};
pub use connection::ask;
pub use distribution::Distribution;
pub use pace::Ticket;
pub use progress::Progress;
pub use report::{Percentiles, Report, Watched};
pub use request::{Kind, Mix, Request};
use tally::Tally;

/// Longer than any run.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// Whether requests wait for answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// A connection's next request is sent when its last answer is complete.
    Closed,
    /// So many requests a second, sent by whichever connection is free.
    Open {
        /// Requests a second.
        rate: f64,
    },
}

/// When a run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// After this time of measuring.
    Time(Duration),
    /// When this many requests have been sent and answered; there is no warm-up.
    Count(u64),
}

/// One run of the generator.
#[derive(Clone, Debug)]
pub struct Load {
    /// The router, or the server itself.
    pub target: SocketAddr,
    /// What is sent, in turn.
    pub requests: Vec<Request>,
    /// Connections, which are kept alive.
    pub connections: usize,
    /// Closed or open loop.
    pub mode: Mode,
    /// Time over which the connections start, so that their streams are not in step.
    pub ramp: Duration,
    /// Time before anything is measured, the ramp included.
    pub warmup: Duration,
    /// When the run is over.
    pub until: Until,
    /// Processes whose cost is measured over the same time.
    pub watch: Vec<Watch>,
    /// What the progress line begins with; nothing is shown without it.
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

    /// Runs it on the current thread's runtime.
    ///
    /// # Errors
    /// If a watched process cannot be read. What goes wrong with a request is counted, not returned.
    pub async fn run(self) -> io::Result<Report> {
        LocalSet::new().run_until(self.drive()).await
    }

    async fn drive(self) -> io::Result<Report> {
        let pace = match self.mode {
            Mode::Open { rate } => Some(pace::start(rate, self.connections)?),
            Mode::Closed => None,
        };
        let limit = if let Until::Count(count) = self.until { count } else { u64::MAX };
        let run = Rc::new(Run { tally: RefCell::default(), left: Cell::new(limit), load: self, pace });
        let mut connections = JoinSet::new();
        for index in 0..run.load.connections {
            connections.spawn_local(run.clone().connection(index));
        }
        run.measure(connections).await
    }
}

/// What the connections of a run share.
struct Run {
    load: Load,
    tally: RefCell<Tally>,
    /// Requests that may still be sent.
    left: Cell<u64>,
    pace: Option<pace::Pace>,
}

impl Run {
    async fn measure(&self, mut connections: JoinSet<()>) -> io::Result<Report> {
        let shown = self.load.label.clone().map(Progress::new);
        if let Until::Time(_) = self.load.until {
            self.show_until(shown.as_ref(), Instant::now() + self.load.warmup).await;
            self.tally.replace(Tally::default());
        }
        let (before, all_before) = (process::cost_of(&self.load.watch)?, process::all_busy());
        let (began_ns, started) = (unix_nanos(), Instant::now());
        let time = if let Until::Time(time) = self.load.until { time } else { FOREVER };
        let all = async { while connections.join_next().await.is_some() {} };
        tokio::select! {
            () = all => {}
            () = self.show_until(shown.as_ref(), started + time) => {}
        }
        let seconds = started.elapsed().as_secs_f64();
        let watched = process::difference(&self.load.watch, &before)?;
        let own: u64 = watched.iter().map(|watched| watched.cpu_ns).sum();
        let all = process::all_busy().saturating_sub(all_before);
        let mut report = self.tally.borrow().report(seconds, watched);
        report.began_ns = began_ns;
        report.others = all.saturating_sub(Duration::from_nanos(own)).as_secs_f64() / seconds;
        if self.pace.is_some() {
            report.times = self.tally.borrow().times();
        }
        Ok(report)
    }

    /// Sends requests one after the other until there are none left.
    async fn connection(self: Rc<Self>, index: usize) {
        let share = index as f64 / self.load.connections as f64;
        sleep(self.load.ramp.mul_f64(share)).await;
        let mut connection = connection::Connection::new(self.load.target);
        let mut turn = index;
        while self.left.get() > 0 {
            self.left.set(self.left.get() - 1);
            let request = &self.load.requests[turn % self.load.requests.len()];
            turn += 1;
            let ticket = match &self.pace {
                Some(pace) => match pace.next().await {
                    Some(ticket) => ticket,
                    None => return,
                },
                None => Ticket::now(),
            };
            match connection.exchange(request, &self.tally).await {
                Ok(times) => self.tally.borrow_mut().count(&ticket, &times),
                Err(error) => {
                    self.tally.borrow_mut().failed(error);
                    connection = connection::Connection::new(self.load.target);
                    // A server that refuses everything is not asked in a busy loop.
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    async fn show_until(&self, progress: Option<&Progress>, end: Instant) {
        let Some(progress) = progress else { return sleep_until(end).await };
        while Instant::now() < end {
            sleep_until(end.min(Instant::now() + Duration::from_millis(500))).await;
            let tally = self.tally.borrow();
            progress.show(tally.requests, tally.tokens, tally.errors);
        }
    }
}
