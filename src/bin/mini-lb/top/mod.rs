//! `mini-lb top`: the numbers of a running router in a terminal, or once into a pipe.
//!
//! They are those of the status page, and are computed here, from `/metrics` of the admin listener. The
//! router is not changed and knows nothing of it.

mod fetch;
mod numbers;
mod series;
mod terminal;
mod view;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Arg, ArgAction, ArgMatches, Command};
use mini_lb::DEFAULT_PROMETHEUS_PORT;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use crate::cli::refusal;
use fetch::Source;
use series::{History, Poll};
use terminal::Screen;

/// From the begin of one request for the numbers to the next.
const PERIOD: Duration = Duration::from_secs(1);

/// Whether a command line, program name first, is one for here. The router itself takes no word that is not a
/// flag or its value.
pub(crate) fn is_wanted(args: &[OsString]) -> bool {
    args.get(1).is_some_and(|word| word == "top")
}

/// What was asked for on the command line.
pub(crate) struct Request {
    source: Source,
    is_once: bool,
}

fn command() -> Command {
    Command::new("mini-lb top")
        .bin_name("mini-lb top")
        .about(
            "Shows the numbers of a running router, once a second: requests, times, servers, errors.\nq or Ctrl-C ends \
             it. In a pipe, it prints plain text.",
        )
        .arg(Arg::new("url").value_name("URL").help(format!(
            "The router's admin listener (its --prometheus-host and --prometheus-port), or its status page. user:password@ \
             before the host is sent as HTTP Basic [default: http://127.0.0.1:{DEFAULT_PROMETHEUS_PORT}]"
        )))
        .arg(Arg::new("once").long("once").action(ArgAction::SetTrue).help(
            "Print one table, of one second, and exit: with 1 if the router does not answer",
        ))
        .arg(Arg::new("admin-api-key-file").long("admin-api-key-file").value_name("FILE").help(
            "File with a key to send as a Bearer token, for a gateway in front: the router's own /metrics needs none",
        ))
}

/// Reads a command line for which [`is_wanted`] is true.
pub(crate) fn parse(args: Vec<OsString>) -> Result<Request, clap::Error> {
    let matches = command().try_get_matches_from(args.into_iter().skip(1))?;
    let default = format!("http://127.0.0.1:{DEFAULT_PROMETHEUS_PORT}");
    let url = matches.get_one::<String>("url").unwrap_or(&default);
    let source = Source::new(url, key(&matches)?.as_deref()).map_err(refusal)?;
    Ok(Request { source, is_once: matches.get_flag("once") })
}

fn key(matches: &ArgMatches) -> Result<Option<String>, clap::Error> {
    let Some(path) = matches.get_one::<String>("admin-api-key-file").map(PathBuf::from) else {
        return Ok(None);
    };
    let refused = |why: String| refusal(format_args!("--admin-api-key-file {}: {why}", path.display()));
    let text = std::fs::read_to_string(&path).map_err(|error| refused(error.to_string()))?;
    match text.trim() {
        "" => Err(refused("there is no key in the file".to_owned())),
        key => Ok(Some(key.to_owned())),
    }
}

/// Shows the numbers until somebody has seen enough.
pub(crate) async fn run(request: Request) -> Result<(), String> {
    let Request { source, is_once } = request;
    let mut top = Top { source, history: History::default(), failure: None };
    if is_once {
        return top.once().await;
    }
    let no_signals = |error| format!("cannot wait for signals: {error}");
    let mut signals = Signals::new().map_err(no_signals)?;
    let mut resized = signal(SignalKind::window_change()).map_err(no_signals)?;
    let mut screen = Screen::open().map_err(|error| format!("cannot use the terminal: {error}"))?;
    loop {
        let begun = Instant::now();
        tokio::select! {
            () = top.poll() => {}
            () = signals.end(&mut screen) => return Ok(()),
        }
        loop {
            // The reader of a pipe has gone, or the terminal.
            if screen.draw(|width| top.lines(width)).is_err() {
                return Ok(());
            }
            tokio::select! {
                () = sleep_until(begun + PERIOD) => break,
                _ = resized.recv() => {}
                () = signals.end(&mut screen) => return Ok(()),
            }
        }
    }
}

/// The numbers so far.
struct Top {
    source: Source,
    history: History,
    /// Why the last request for them has failed, and since when.
    failure: Option<(String, SystemTime)>,
}

impl Top {
    /// Two requests, since rates need two.
    async fn once(&mut self) -> Result<(), String> {
        self.poll().await;
        if self.failure.is_none() {
            sleep_until(Instant::now() + PERIOD).await;
            self.poll().await;
        }
        if let Some((why, _)) = &self.failure {
            return Err(why.clone());
        }
        let text: String = self.lines(terminal::width()).into_iter().map(|line| line.text + "\n").collect();
        io::stdout().write_all(text.as_bytes()).map_err(|error| format!("cannot write to stdout: {error}"))
    }

    async fn poll(&mut self) {
        let answer = self.source.fetch().await.and_then(|text| {
            let poll = Poll::read(&text, std::time::Instant::now(), self.history.last());
            poll.ok_or_else(|| format!("{}: its /metrics are not those of mini-lb", self.source.shown()))
        });
        match answer {
            Ok(poll) => {
                self.history.push(poll);
                self.failure = None;
            }
            Err(why) => {
                let since = self.failure.take().map_or_else(SystemTime::now, |(_, since)| since);
                self.failure = Some((why, since));
            }
        }
    }

    fn lines(&self, width: usize) -> Vec<view::Line> {
        let failure =
            self.failure.as_ref().map(|(why, since)| (why.as_str(), since.elapsed().unwrap_or_default()));
        view::lines(&self.history, self.source.shown(), failure, width)
    }
}

/// What ends the program.
struct Signals {
    ends: [Signal; 3],
}

impl Signals {
    fn new() -> io::Result<Self> {
        let end = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [first, second, third] = end.map(signal);
        Ok(Self { ends: [first?, second?, third?] })
    }

    /// A signal, or a key.
    async fn end(&mut self, screen: &mut Screen) {
        let [first, second, third] = &mut self.ends;
        tokio::select! {
            _ = first.recv() => {}
            _ = second.recv() => {}
            _ = third.recv() => {}
            () = screen.quit_key() => {}
        }
    }
}
