//! The queue of lines between the threads that log and a sink that may be slow.
//!
//! A thread that logs appends its line to a buffer, and a writer thread empties it. If
//! the sink is slower than the log, lines are dropped, and the log says how many. The lines of a trace are
//! queued in the same way.

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::warn;

use super::format::{self, Format};

/// Queued bytes of each sink; a line beyond that is dropped. The writer thread may hold as many.
pub(super) const MAX_QUEUED: usize = 4 << 20;
/// How long a line waits for others to be written with it, unless there are [`ENOUGH`] bytes before: waking
/// the thread for each line costs several times as much as the line.
const GATHERING: Duration = Duration::from_millis(10);
pub(super) const ENOUGH: usize = 256 << 10;
/// How long the program waits at its end for queued lines to be written.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a write that failed.
const PAUSE: Duration = Duration::from_millis(100);

/// What the lines are, and so how it is said that some were lost.
#[derive(Clone, Copy)]
pub(super) enum Lines {
    /// Of the log in this format, among which a line says it.
    Log(Format),
    /// Of a trace, which has no place for it: the log says it.
    Trace,
}

impl Lines {
    fn name(self) -> &'static str {
        match self {
            Self::Log(_) => "log lines",
            Self::Trace => "trace lines",
        }
    }
}

/// The lines for one sink. Clones are the same queue.
#[derive(Clone)]
pub(super) struct LogQueue(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write, or the program ends.
    filled: Condvar,
    /// All has been written.
    emptied: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Lines dropped since this was last logged.
    lost: u64,
    /// The writer thread holds bytes that are not written yet.
    writing: bool,
    /// Threads that wait for the queue to be empty.
    finishing: usize,
}

impl LogQueue {
    /// Starts the writer thread.
    pub(super) fn start(name: &str, lines: Lines, mut sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let queue = Self(Arc::default());
        let shared = Arc::clone(&queue.0);
        // Never joined: a sink that takes nothing would block the end of the program. `finish` waits with a
        // bound.
        thread::Builder::new().name(name.into()).spawn(move || {
            let (mut batch, mut failing) = (Vec::new(), false);
            loop {
                shared.take(&mut batch);
                let written = write(sink.as_mut(), &batch);
                shared.wrote(&batch, written.is_ok(), lines);
                // Logged once for consecutive failures: this line goes to the same sink, and would cause the
                // next one.
                if let Err(error) = &written
                    && !failing
                {
                    warn!("{} could not be written: {error}", lines.name());
                }
                failing = written.is_err();
            }
        })?;
        Ok(queue)
    }

    /// Queues a line, which ends with a newline. Never blocks on the sink.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.0.lock();
        // Dropped, not waited for: a worker thread that waits for a slow disk delays all of its requests.
        if state.bytes.len() + line.len() > MAX_QUEUED {
            state.lost += 1;
            return;
        }
        let before = state.bytes.len();
        state.bytes.extend_from_slice(line);
        let is_enough = before < ENOUGH && state.bytes.len() >= ENOUGH;
        // Unlocked first, or the writer thread would wake up only to wait for the lock.
        drop(state);
        // The writer thread waits for a first line and then for `ENOUGH` bytes. Between the two it would wake
        // up for nothing.
        if before == 0 || is_enough {
            self.0.filled.notify_one();
        }
    }

    /// Waits until everything is written, for at most [`FINISH_TIMEOUT`].
    pub(super) fn finish(&self) {
        let mut state = self.0.lock();
        state.finishing += 1;
        // Ends the gathering, which would add 10 ms to the end of the program.
        self.0.filled.notify_one();
        let is_busy = |state: &mut State| state.writing || !state.bytes.is_empty();
        let waited = self.0.emptied.wait_timeout_while(state, FINISH_TIMEOUT, is_busy);
        waited.unwrap_or_else(PoisonError::into_inner).0.finishing -= 1;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock does no harm: a line is appended as a whole or not at all.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for lines, and replaces the contents of `batch` with them.
    fn take(&self, batch: &mut Vec<u8>) {
        batch.clear();
        let nothing = |state: &mut State| state.bytes.is_empty();
        let state = self.filled.wait_while(self.lock(), nothing).unwrap_or_else(PoisonError::into_inner);
        let little = |state: &mut State| state.bytes.len() < ENOUGH && state.finishing == 0;
        let gathered = self.filled.wait_timeout_while(state, GATHERING, little);
        let mut state = gathered.unwrap_or_else(PoisonError::into_inner).0;
        // Swapped, so that both buffers keep their capacity, and no thread that logs waits for a write.
        mem::swap(batch, &mut state.bytes);
        state.writing = true;
    }

    fn wrote(&self, batch: &[u8], written: bool, lines: Lines) {
        let mut state = self.lock();
        state.writing = false;
        if !written {
            // A part may have been written; which one is unknown.
            state.lost += batch.iter().filter(|byte| **byte == b'\n').count() as u64;
        } else if state.lost > 0 {
            let lost = mem::take(&mut state.lost);
            match lines {
                // The queue was just emptied, so this line fits.
                Lines::Log(format) => state.bytes.extend_from_slice(&format::lost(lost, format)),
                Lines::Trace => warn!(lost, "trace lines were lost"),
            }
        }
        // Lines may have been queued during the write; then the next turn notifies.
        if state.bytes.is_empty() {
            self.emptied.notify_all();
        }
    }
}

fn write(sink: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A pipe that another process has made non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Err(error) => {
                // A full disk stays full for a while. Without the pause this thread would use a whole core.
                thread::sleep(PAUSE);
                return Err(error);
            }
        }
    }
    sink.flush()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// A place that takes nothing until it is told to, and fails as often as it is told to.
    #[derive(Clone, Default)]
    struct Slow(Arc<Place>);

    #[derive(Default)]
    struct Place {
        taken: Mutex<Taken>,
        opened: Condvar,
    }

    #[derive(Default)]
    struct Taken {
        open: bool,
        failures: u32,
        writes: usize,
        bytes: Vec<u8>,
    }

    impl Slow {
        fn open(&self, failures: u32) {
            let mut taken = self.0.taken.lock().unwrap();
            (taken.open, taken.failures) = (true, failures);
            self.0.opened.notify_all();
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.taken.lock().unwrap().bytes.clone()).unwrap()
        }
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = self.0.taken.lock().unwrap();
            let mut taken = self.0.opened.wait_while(taken, |taken| !taken.open).unwrap();
            if taken.failures > 0 {
                taken.failures -= 1;
                return Err(io::Error::other("full"));
            }
            taken.writes += 1;
            taken.bytes.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_place_that_takes_nothing_stops_nobody_and_what_is_lost_is_said() {
        let slow = Slow::default();
        let queue = LogQueue::start("test", Lines::Log(Format::Text), Box::new(slow.clone())).unwrap();
        let line = format!("{}\n", "x".repeat(1023));
        let count = 3 * MAX_QUEUED / line.len();
        (0..count).for_each(|_| queue.push(line.as_bytes()));
        slow.open(0);
        queue.finish();
        let text = slow.text();
        let written = text.matches(&line).count();
        assert!(written < count && written >= MAX_QUEUED / line.len(), "{written} of {count}");
        let said = format!("log lines were lost lost={}", count - written);
        assert!(text.contains(&said), "{said} in {}", &text[text.len() - 200..]);
    }

    #[test]
    fn lines_that_come_together_are_written_together_and_none_waits_long() {
        let slow = Slow::default();
        slow.open(0);
        let queue = LogQueue::start("test", Lines::Log(Format::Text), Box::new(slow.clone())).unwrap();
        for round in 1..=20 {
            (0..10).for_each(|_| queue.push(b"a line\n"));
            let deadline = Instant::now() + 100 * GATHERING;
            while slow.text().lines().count() < 10 * round {
                assert!(Instant::now() < deadline, "{}", slow.text());
                thread::sleep(GATHERING / 10);
            }
        }
        let writes = slow.0.taken.lock().unwrap().writes;
        // A thread that is late may find some of them only.
        assert!(writes < 40, "{writes} writes of 200 lines");
        let ends = (0..20).map(|_| {
            let before = Instant::now();
            queue.push(b"another\n");
            queue.finish();
            before.elapsed()
        });
        // The quickest, as this machine may have other work.
        let end = ends.min().unwrap_or_default();
        assert!(end < GATHERING, "{end:?}: no gathering at the end");
        assert!(slow.text().ends_with(&"another\n".repeat(20)));
    }

    #[test]
    fn what_could_not_be_written_is_counted() {
        let slow = Slow::default();
        slow.open(1);
        let queue = LogQueue::start("test", Lines::Log(Format::Text), Box::new(slow.clone())).unwrap();
        queue.push(b"one\n");
        queue.finish();
        queue.push(b"two\n");
        queue.finish();
        let text = slow.text();
        assert!(text.starts_with("two\n") && text.contains("lost=1\n"), "{text}");
    }
}
