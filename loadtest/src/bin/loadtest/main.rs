//! `loadtest`: the load generator, canned servers, and the measurements that use both.

mod flags;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use flags::{CannedFlags, Command, Flags, RunFlags};
use loadtest::canned::{Canned, Plan};
use loadtest::load::Report;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let done = match Flags::parse().command {
        Command::Run(flags) => run(&flags),
        Command::Canned(flags) => canned(&flags),
        Command::Compare(options) => loadtest::compare::run(&options),
        Command::Floor(options) => loadtest::floor::run(&options),
        Command::Soak(options) => loadtest::soak::run(&options),
        Command::Memory(options) => loadtest::memory::run(&options),
        Command::Fleet(options) => loadtest::fleet::live::run(&options),
        Command::Simulate(experiment) => experiment.run(Vec::new()).map(|_| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("loadtest: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One thread: the generator shares a core with the servers on small machines, and a work-stealing scheduler
/// costs CPU.
fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Returns whether all responses were correct.
fn run(flags: &RunFlags) -> io::Result<bool> {
    let load = flags.load()?;
    let report: Report = runtime()?.block_on(load.run())?;
    let mut out = io::stdout().lock();
    if flags.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(report.errors == 0 && report.unmerged == 0)
}

fn canned(flags: &CannedFlags) -> io::Result<bool> {
    runtime()?.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let plan = Plan::default();
        let [prefill, decode] =
            [flags.prefill_port, flags.decode_port].map(|port| ([127, 0, 0, 1], port).into());
        let [prefill, decode] = Canned::pair(prefill, decode, plan)?;
        println!("prefill listening on {}\ndecode listening on {}", prefill.url(), decode.url());
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(true)
    })
}
