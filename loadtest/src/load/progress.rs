//! The progress line of a run.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use std::cell::Cell;

/// Written to stderr: in place on a terminal, otherwise a line every ten seconds.
pub struct Progress {
    label: String,
    started: Instant,
    is_terminal: bool,
    shown: Cell<Option<Instant>>,
}

impl Progress {
    /// A progress line that starts with `label`.
    pub fn new(label: String) -> Self {
        let is_terminal = io::stderr().is_terminal();
        Self { label, started: Instant::now(), is_terminal, shown: Cell::new(None) }
    }

    /// Prints the counters, unless that happened a moment ago.
    pub fn show(&self, requests: u64, tokens: u64, errors: u64) {
        let pause = if self.is_terminal { Duration::from_millis(250) } else { Duration::from_secs(10) };
        if self.shown.get().unwrap_or(self.started).elapsed() < pause {
            return;
        }
        self.shown.set(Some(Instant::now()));
        let seconds = self.started.elapsed().as_secs_f64();
        let text =
            format!("{}: {seconds:.1} s, {requests} requests, {tokens} tokens, {errors} errors", self.label);
        // An error means that stderr is closed; there is nowhere to report that.
        let _ = if self.is_terminal {
            write!(io::stderr(), "\r\x1b[2K{text}").and_then(|()| io::stderr().flush())
        } else {
            writeln!(io::stderr(), "{text}")
        };
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_terminal && self.shown.get().is_some() {
            let _ = write!(io::stderr(), "\r\x1b[2K");
        }
    }
}
