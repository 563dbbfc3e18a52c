//! The program's log: formats events as lines, and writes them to stderr and to files.
//!
//! A line is queued and written by another thread ([`queue`]), so that neither a slow
//! disk nor a full pipe blocks a worker. Spans of `tracing` are ignored: a request is
//! logged in one event.
//!
//! The load trace, which goes to a file of its own, is written in the same way.

mod clock;
mod escape;
mod files;
mod format;
mod queue;
mod request;
mod trace_file;

use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use mini_lb::{RequestLine, TraceLine};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber, dispatcher, error};

use clock::Clock;
use files::DailyFiles;
pub(crate) use format::Format;
use queue::{Lines, LogQueue};
use trace_file::TraceFile;

/// What is logged, and where.
pub(crate) struct LogOptions {
    pub(crate) level: LevelFilter,
    pub(crate) format: Format,
    /// The folder of daily files, besides stderr.
    pub(crate) folder: Option<PathBuf>,
    /// The file of the trace.
    pub(crate) trace: Option<PathBuf>,
    /// The size at which the next file of the trace begins.
    pub(crate) trace_max_bytes: u64,
}

/// Drop guard: writes what is queued before the program ends, unless that takes too long.
pub(crate) struct Log(Vec<LogQueue>);

impl Drop for Log {
    fn drop(&mut self) {
        for queue in &self.0 {
            queue.finish();
        }
    }
}

/// Starts the log of this process, panics included. The error says why files cannot be written.
pub(crate) fn start(options: &LogOptions) -> Result<Log, String> {
    let &LogOptions { level, format, ref folder, ref trace, trace_max_bytes } = options;
    let start = |name, lines, sink| {
        LogQueue::start(name, lines, sink).map_err(|error| format!("cannot log: {error}"))
    };
    // For people only: a container's log collector would store the escape sequences.
    let colors = io::stderr().is_terminal();
    let stderr = start("log-stderr", Lines::Log(format), Box::new(io::stderr()))?;
    let files = match folder {
        Some(folder) => {
            Some(start("log-files", Lines::Log(format), Box::new(DailyFiles::open(folder.clone())?))?)
        }
        None => None,
    };
    let trace = match trace {
        Some(path) => {
            let file = TraceFile::open(path.clone(), trace_max_bytes)?;
            Some(start("trace-log", Lines::Trace, Box::new(file))?)
        }
        None => None,
    };
    // The trace first, as its last lines may have to be logged as lost.
    let log = Log([trace.clone(), Some(stderr.clone()), files.clone()].into_iter().flatten().collect());
    tracing::subscriber::set_global_default(LogSubscriber { level, format, colors, stderr, files, trace })
        .map_err(|error| format!("cannot log: {error}"))?;
    log_panics();
    Ok(log)
}

/// Logs panics of all threads.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        // The message may contain a client's bytes, so only the location is logged.
        let place = panic.location().map_or_else(String::new, ToString::to_string);
        error!(place, "panic");
    }));
}

/// Writes the line of a request to the log that was started.
pub(crate) fn log_request(request: &RequestLine<'_>) {
    // Found by its type, because the configuration that has this function is made before the log is started.
    dispatcher::get_default(|log| {
        if let Some(lines) = log.downcast_ref::<LogSubscriber>() {
            lines.write(request.level(), |clock, line| request::put(request, lines.format, clock, line));
        }
    });
}

/// Writes the line of a request to the trace that was started.
pub(crate) fn trace_request(request: &TraceLine<'_>) {
    // Found as above.
    dispatcher::get_default(|log| {
        if let Some(LogSubscriber { trace: Some(trace), .. }) = log.downcast_ref() {
            let mut scratch = SCRATCH.try_with(Cell::take).unwrap_or_default();
            scratch.line.clear();
            trace_file::put(request, &mut scratch.line);
            trace.push(&scratch.line);
            let _ = SCRATCH.try_with(|kept| kept.set(scratch));
        }
    });
}

/// Buffers that each thread reuses for every line.
#[derive(Default)]
struct Scratch {
    clock: Clock,
    line: Vec<u8>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Formats events as lines.
struct LogSubscriber {
    level: LevelFilter,
    format: Format,
    /// Whether stderr is a terminal.
    colors: bool,
    stderr: LogQueue,
    files: Option<LogQueue>,
    trace: Option<LogQueue>,
}

impl LogSubscriber {
    /// Queues the line that `put` writes.
    fn write(&self, level: Level, put: impl FnOnce(&mut Clock, &mut Vec<u8>)) {
        // Taken out of its cell, since formatting a value may log something itself; and a thread that ends,
        // whose buffers are gone, may log too.
        let mut scratch = SCRATCH.try_with(Cell::take).unwrap_or_default();
        let Scratch { clock, line } = &mut scratch;
        line.clear();
        put(clock, line);
        if let Some(files) = &self.files {
            files.push(line);
        }
        match self.format {
            Format::Text if self.colors => self.stderr.push(format::colored(line, level).as_bytes()),
            _ => self.stderr.push(line),
        }
        let _ = SCRATCH.try_with(|kept| kept.set(scratch));
    }
}

impl Subscriber for LogSubscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !metadata.is_span() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // With this hint, less severe events cost one comparison at their call site.
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let put = |clock: &mut Clock, line: &mut Vec<u8>| format::put_event(event, self.format, clock, line);
        self.write(*event.metadata().level(), put);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // Not called, as `enabled` is false for spans. 0 would panic.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[cfg(test)]
mod tests {
    use std::panic;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Taken(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Taken {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_panic_is_logged_with_its_place_and_not_with_its_message() {
        let taken = Taken::default();
        let stderr = LogQueue::start("test", Lines::Log(Format::Text), Box::new(taken.clone())).unwrap();
        let (level, format) = (LevelFilter::ERROR, Format::Text);
        let stderr_too = stderr.clone();
        let lines =
            LogSubscriber { level, format, colors: false, stderr: stderr_too, files: None, trace: None };
        let before = panic::take_hook();
        log_panics();
        let caught = tracing::subscriber::with_default(lines, || panic::catch_unwind(|| panic!("secret")));
        panic::set_hook(before);
        assert!(caught.is_err());
        stderr.finish();
        let text = String::from_utf8(taken.0.lock().unwrap().clone()).unwrap();
        assert!(text.contains("ERROR mini_lb::log: panic place=src/bin/mini-lb/log/mod.rs:"), "{text}");
        assert!(!text.contains("secret") && text.lines().count() == 1, "{text}");
    }
}
