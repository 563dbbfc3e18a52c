//! Soak test: a day's requests as fast as possible. The router's memory and descriptors must not grow.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::canned::Plan;
use crate::process;
use crate::testbed::{Backends, Cores, RouterPaths, generate};

/// Flags of `loadtest soak`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    router_paths: RouterPaths,
    /// Number of requests; the default is a day at 10 per second.
    #[arg(long, default_value_t = 864_000)]
    requests: u64,
    /// Connections.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Where samples and logs are written.
    #[arg(long, value_name = "FOLDER", default_value = "target/loadtest")]
    out: PathBuf,
}

/// The router's memory and descriptors at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Resident memory in KiB.
    pub rss_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

/// Means over the second and the last fifth of all samples. The first fifth is warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Resident memory in KiB, second and last fifth.
    pub rss_kib: [f64; 2],
    /// Descriptors, second and last fifth.
    pub descriptors: [f64; 2],
}

impl Verdict {
    /// From samples in chronological order; `None` if there are too few.
    pub fn of(samples: &[Held]) -> Option<Self> {
        let fifth = samples.len() / 5;
        if fifth < 2 {
            return None;
        }
        let (second, last) = (&samples[fifth..2 * fifth], &samples[samples.len() - fifth..]);
        let mean = |part: &[Held], value: fn(&Held) -> u64| {
            part.iter().map(|held| value(held) as f64).sum::<f64>() / part.len() as f64
        };
        let both = |value| [mean(second, value), mean(last, value)];
        Some(Self { rss_kib: both(|held| held.rss_kib), descriptors: both(|held| held.descriptors) })
    }

    /// Whether memory grew by at most 2 %.
    pub fn memory_is_flat(&self) -> bool {
        self.rss_kib[1] <= self.rss_kib[0] * 1.02
    }

    /// Whether descriptors did not grow: 2 %, or 4, is the normal variation of open connections.
    pub fn descriptors_are_flat(&self) -> bool {
        self.descriptors[1] <= self.descriptors[0] + (self.descriptors[0] * 0.02).max(4.0)
    }
}

/// Runs the test. Returns whether memory and descriptors stayed flat and all responses were correct.
///
/// # Errors
/// If the router is not found, or does not start.
pub fn run(options: &Options) -> io::Result<bool> {
    fs::create_dir_all(&options.out)?;
    let folder = fs::canonicalize(&options.out)?;
    let cores = Cores::assign(1);
    let servers = Backends::start(&cores.backends)?;
    let plan = Plan { tokens: 16, interval: Duration::from_millis(1), ..Plan::default() };
    servers.set(&plan)?;
    let router = options.router_paths.mini_lb()?.start(&servers, 1, &cores.router, &folder)?;
    let pid = router.pid.ok_or_else(|| io::Error::other("no process"))?;
    let flags = [
        ("--url", format!("http://{}", router.addr)),
        ("--kind", "mixed".to_owned()),
        ("--tokens", plan.tokens.to_string()),
        ("--connections", options.connections.to_string()),
        ("--requests", options.requests.to_string()),
        ("--watch", format!("router={pid}")),
        ("--label", "soak".to_owned()),
    ];
    let flags: Vec<_> = flags.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect();
    let sampler = Sampler::start(pid)?;
    let report = generate(&flags, &cores.generator, |_| {})?;
    let samples = sampler.stop();
    fs::write(folder.join("soak.json"), serde_json::to_vec(&samples)?)?;
    print!("{report}");
    let verdict = Verdict::of(&samples).ok_or_else(|| io::Error::other("too short for a verdict"))?;
    Ok(judge(&verdict) && report.errors == 0)
}

fn judge(verdict: &Verdict) -> bool {
    let word = |is_flat| if is_flat { "flat" } else { "GROWS" };
    let [(rss, then_rss), (open, then_open)] =
        [verdict.rss_kib, verdict.descriptors].map(|[second, last]| (second, last));
    let growth = 100.0 * (then_rss / rss - 1.0);
    println!(
        "memory          {rss:.0} KiB in the second fifth, {then_rss:.0} in the last ({growth:+.2} %): {}",
        word(verdict.memory_is_flat())
    );
    println!(
        "descriptors     {open:.1} in the second fifth, {then_open:.1} in the last: {}",
        word(verdict.descriptors_are_flat())
    );
    verdict.memory_is_flat() && verdict.descriptors_are_flat()
}

/// Samples a process twenty times a second.
struct Sampler {
    samples: Arc<Mutex<Vec<Held>>>,
    is_over: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Sampler {
    fn start(pid: u32) -> io::Result<Self> {
        let (samples, is_over) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let (found, ends): (Arc<Mutex<Vec<Held>>>, _) = (Arc::clone(&samples), is_over.clone());
        let thread = thread::Builder::new().spawn(move || {
            while !ends.load(Relaxed) {
                if let (Ok(rss_kib), Ok(descriptors)) = (process::rss_kib(pid), process::descriptors(pid)) {
                    found.lock().unwrap_or_else(PoisonError::into_inner).push(Held { rss_kib, descriptors });
                }
                thread::sleep(Duration::from_millis(50));
            }
        })?;
        Ok(Self { samples, is_over, thread })
    }

    fn stop(self) -> Vec<Held> {
        self.is_over.store(true, Relaxed);
        // An error would be a panic in the thread, which only reads two files and sleeps.
        let _ = self.thread.join();
        std::mem::take(&mut self.samples.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(rss: impl Fn(u64) -> u64, descriptors: impl Fn(u64) -> u64) -> Verdict {
        let samples: Vec<_> =
            (0..100).map(|at| Held { rss_kib: rss(at), descriptors: descriptors(at) }).collect();
        Verdict::of(&samples).expect("a hundred are enough")
    }

    #[test]
    fn growth_in_the_first_fifth_counts_as_warm_up() {
        let verdict = samples(|at| 5_000 + at.min(19) * 100, |_| 200);
        assert!(verdict.memory_is_flat() && verdict.descriptors_are_flat());
    }

    #[test]
    fn a_leak_of_memory_or_descriptors_is_detected() {
        assert!(!samples(|at| 5_000 + at * 5, |_| 200).memory_is_flat());
        assert!(!samples(|_| 5_000, |at| 200 + at).descriptors_are_flat());
    }

    #[test]
    fn two_percent_is_the_limit() {
        let after = |rss| samples(move |at| if at < 60 { 10_000 } else { rss }, |_| 200);
        assert!(after(10_200).memory_is_flat());
        assert!(!after(10_201).memory_is_flat());
    }

    #[test]
    fn nine_samples_are_too_few() {
        assert_eq!(Verdict::of(&[Held { rss_kib: 1, descriptors: 1 }; 9]), None);
    }
}
