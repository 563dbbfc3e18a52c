//! The `mini-lb` program: a command line in, a running router out.
//!
//! It has what a library must leave to its user: the allocator, the log output,
//! the signals and the exit code. It routes nothing itself.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod cli;
mod columns;
mod log;
mod probe_report;
mod reload;
mod top;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use mini_lb::MiniLoadBalancer;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing::info;

use cli::{Check, Plan};
use reload::Reloads;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The exit code of `--probe` if a server does not answer or does not fit.
const DOES_NOT_FIT: u8 = 3;

/// Exit codes: 0 after a shutdown, 1 for an error while running, 2 for a bad command line or configuration, 3
/// for servers that do not fit.
fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if top::is_wanted(&args) {
        let request = top::parse(args).unwrap_or_else(|error| error.exit());
        let ended = run(top::run(request)).and_then(|ended| ended);
        return ended.map_or_else(|sentence| fail(&sentence), |()| ExitCode::SUCCESS);
    }
    let plan = cli::parse(args, std::env::vars_os()).unwrap_or_else(|error| error.exit());
    let balancer = MiniLoadBalancer::new(plan.config.clone())
        .unwrap_or_else(|error| cli::refusal(plan.layers.placed(&error.to_string())).exit());
    match &plan.check {
        Some(Check::Configuration(text)) => return print(text, ExitCode::SUCCESS),
        Some(Check::Servers) => return probe(&balancer),
        None => {}
    }
    let log = log::start(&plan.log).unwrap_or_else(|error| cli::refusal(plan.layers.placed(&error)).exit());
    let ended = run(serve(&balancer, &plan)).and_then(|served| served);
    // Writes the rest of the log, so that an error comes after it.
    drop(log);
    ended.map_or_else(|sentence| fail(&sentence), |()| ExitCode::SUCCESS)
}

fn fail(sentence: &str) -> ExitCode {
    // Not `eprintln!`, which panics when stderr is closed.
    let _ = writeln!(io::stderr(), "error: {sentence}");
    ExitCode::FAILURE
}

/// Prints a text that is all of the output.
fn print(text: &str, code: ExitCode) -> ExitCode {
    io::stdout().write_all(text.as_bytes()).map_or(ExitCode::FAILURE, |()| code)
}

/// Asks all servers whether they fit, and prints what they say.
fn probe(balancer: &MiniLoadBalancer) -> ExitCode {
    match run(balancer.check_servers()) {
        Ok(check) => {
            let code = if check.fits() { ExitCode::SUCCESS } else { ExitCode::from(DOES_NOT_FIT) };
            print(&probe_report::text(&check), code)
        }
        Err(sentence) => fail(&sentence),
    }
}

/// This thread accepts connections and waits for signals; the library starts the worker threads.
fn run<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let ended = runtime.block_on(work);
    // Dropping the runtime would wait for blocking tasks, and a second signal must end the program at once.
    runtime.shutdown_background();
    Ok(ended)
}

async fn serve(balancer: &MiniLoadBalancer, plan: &Plan) -> Result<(), String> {
    // Before the socket: a program that accepts connections must react to signals.
    let signals = Signals::new().map_err(|error| format!("cannot wait for signals: {error}"))?;
    let reloads = Reloads::new(plan).map_err(|error| format!("cannot wait for SIGHUP: {error}"))?;
    let listener = balancer.bind().await.map_err(|error| error.to_string())?;
    let address =
        listener.local_addr().map_err(|error| format!("cannot read the address of the listener: {error}"))?;
    plan.start_line.log(address);
    let (begin, begun) = oneshot::channel();
    let shutdown = async move {
        // An error means that the sender is gone, and with it this future.
        let _ = begun.await;
    };
    tokio::select! {
        served = balancer.serve(listener, shutdown) => served.map_err(|error| error.to_string()),
        () = second_signal(signals, begin) => Ok(()),
        () = reloads.follow(balancer) => Ok(()),
    }
}

/// Begins the shutdown at the first signal and returns at the second.
async fn second_signal(mut signals: Signals, begin: oneshot::Sender<()>) {
    let name = signals.next().await;
    info!("{name} received; a second signal ends the program at once");
    let _ = begin.send(());
    let name = signals.next().await;
    info!("{name} received again: exiting now");
}

/// The signals that ask a program to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
