//! Memory per open stream, and peak memory per body in flight.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::canned::Plan;
use crate::compare::Spread;
use crate::load::Report;
use crate::process;
use crate::testbed::{Backends, Cores, Router, RouterPaths, generate};

/// Flags of `loadtest memory`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    router_paths: RouterPaths,
    /// Number of streams that are open at the same time.
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// Number of request bodies in flight.
    #[arg(long, default_value_t = 8)]
    bodies: usize,
    /// Size of each body, in MiB.
    #[arg(long, default_value_t = 8)]
    body_mib: usize,
    /// Where logs are written.
    #[arg(long, value_name = "FOLDER", default_value = "target/loadtest")]
    out: PathBuf,
}

/// Bound on the memory of an open stream.
pub const STREAM_KIB: f64 = 8.0;
/// Streams beside which a larger number of them is judged.
const FEW_STREAMS: usize = 1000;
/// Bound on how late tokens are, p99, as a multiple of that of few streams.
pub const OF_FEW: f64 = 2.0;
/// Runs of each number of streams where two are compared: one pause of a machine is longer than such a p99.
const ROUNDS: usize = 3;
/// Bound on peak memory, as a multiple of the bodies in flight.
pub const OF_BODIES: f64 = 1.2;

/// Measures both. Returns whether they are within bounds.
///
/// # Errors
/// If the router is not found, or does not start.
pub fn run(options: &Options) -> io::Result<bool> {
    fs::create_dir_all(&options.out)?;
    let folder = fs::canonicalize(&options.out)?;
    let cores = Cores::assign(1);
    let servers = Backends::start(&cores.backends)?;
    let test = MemoryTest { router: options.router_paths.mini_lb()?, cores, servers, folder };
    let stream = streams(&test, options.streams)?;
    let bodies = bodies(&test, options.bodies, options.body_mib << 20)?;
    Ok(stream && bodies)
}

struct MemoryTest {
    router: Router,
    cores: Cores,
    servers: Backends,
    folder: PathBuf,
}

impl MemoryTest {
    /// Runs a load on a fresh router. Returns the router's memory before it in KiB, and the report.
    fn load(&self, plan: &Plan, flags: &[(&str, String)]) -> io::Result<(u64, Report)> {
        self.servers.set(plan)?;
        let folder: &Path = &self.folder;
        let running = self.router.start(&self.servers, 1, &self.cores.router, folder)?;
        let pid = running.pid.ok_or_else(|| io::Error::other("no process"))?;
        let idle = process::rss_kib(pid)?;
        let own = [("--url", format!("http://{}", running.addr)), ("--watch", format!("router={pid}"))];
        let flags = own.iter().chain(flags).flat_map(|(name, value)| [(*name).to_owned(), value.clone()]);
        let report = generate(&flags.collect::<Vec<_>>(), &self.cores.generator, |_| {})?;
        if report.errors > 0 {
            let first = report.first_error.unwrap_or_default();
            return Err(io::Error::other(format!("{} requests failed: {first}", report.errors)));
        }
        Ok((idle, report))
    }
}

/// Holds streams open. Of more than a thousand, tokens may not be much later than of a thousand.
fn streams(test: &MemoryTest, count: usize) -> io::Result<bool> {
    let mut most_kib = 0.0_f64;
    let mut hold = |count| {
        let open = open_streams(test, count)?;
        most_kib = most_kib.max(open.kib_each);
        Ok::<_, io::Error>(open.token_p99)
    };
    if count <= FEW_STREAMS {
        hold(count)?;
        return Ok(most_kib <= STREAM_KIB);
    }
    let rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let few = hold(FEW_STREAMS)?;
            Ok(hold(count)? / few)
        })
        .collect::<io::Result<_>>()?;
    let Spread { median, min, max } = Spread::of(rounds.into_iter()).expect("there are rounds");
    println!(
        "p99 of the tokens' delay: {median:.2} ({min:.2} to {max:.2}) of that of {FEW_STREAMS} streams \
         (at most {OF_FEW})"
    );
    Ok(most_kib <= STREAM_KIB && median <= OF_FEW)
}

struct OpenStreams {
    kib_each: f64,
    /// Of the tokens' delay, in µs.
    token_p99: f64,
}

/// Streams that start one after another, at 50,000 tokens a second in all, however many they are: what a
/// number of streams costs, and not what an overloaded router does.
fn open_streams(test: &MemoryTest, count: usize) -> io::Result<OpenStreams> {
    let interval = Duration::from_micros(20) * count as u32;
    let ramp = Duration::from_millis(2) * count as u32;
    let length = ramp + Duration::from_secs(10);
    let tokens = length.as_micros().div_ceil(interval.as_micros()) as u32;
    let plan = Plan { tokens, interval, ..Plan::default() };
    let flags = [
        ("--kind", "chat-stream".to_owned()),
        ("--tokens", tokens.to_string()),
        ("--connections", count.to_string()),
        ("--ramp", ramp.as_secs_f64().to_string()),
        ("--warmup", (ramp.as_secs_f64() + 1.0).to_string()),
        ("--seconds", "5".to_owned()),
        ("--label", format!("{count} streams")),
    ];
    let (idle, report) = test.load(&plan, &flags)?;
    let rss = report.process("router").map_or(0, |router| router.rss_kib);
    let kib_each = (rss as f64 - idle as f64) / count as f64;
    let token_p99 = report.token_delay.p99;
    println!(
        "{count} open streams: {rss} KiB, {idle} before: {kib_each:.1} KiB a stream (at most {STREAM_KIB}); \
         p99 of the tokens' delay {token_p99:.0} µs"
    );
    if report.tokens == 0 {
        return Err(io::Error::other("no token came"));
    }
    Ok(OpenStreams { kib_each, token_p99 })
}

fn bodies(test: &MemoryTest, count: usize, size: usize) -> io::Result<bool> {
    let flags = [
        ("--kind", "chat".to_owned()),
        ("--body", size.to_string()),
        ("--connections", count.to_string()),
        ("--seconds", "3".to_owned()),
        ("--label", "memory of bodies".to_owned()),
    ];
    // Decode waits for prefill, as real servers do. Otherwise clients send their next body while the router
    // still holds the last one for prefill, and more bodies are in flight than there are connections.
    let plan = Plan { paired: true, ..Plan::default() };
    let (_, report) = test.load(&plan, &flags)?;
    let peak = report.process("router").map_or(0, |router| router.peak_kib);
    let bodies = (count * size) as f64 / 1024.0;
    let times = peak as f64 / bodies;
    println!(
        "{count} bodies of {size} bytes in flight: {peak} KiB at most, {times:.2} of them (at most {OF_BODIES})"
    );
    Ok(report.requests > 0 && times <= OF_BODIES)
}
