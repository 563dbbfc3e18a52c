//! Measures a router with two workers on two cores: load and router alternate on the same cores.
//!
//! While generator and backends run, the router is stopped (`SIGSTOP`) and its work queues up in its sockets.
//! Then they are stopped and the router has all cores. Only the router's time slots count. Only processes
//! that this program started are stopped.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::canned::unix_nanos;
use crate::load::Report;

/// Time slot of the router: shorter than the queued work of a thousand connections lasts, and much longer
/// than it takes to stop a process.
const ROUTER_SLOT: Duration = Duration::from_millis(5);
/// How often a process's state is read until it is stopped. One with several threads needs a moment: each
/// thread must be scheduled to receive the signal.
const POLL_INTERVAL: Duration = Duration::from_micros(50);
/// A process that is not stopped after this time is an error.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Time slot of the load: generator and backends have one thread each, and must handle everything that the
/// router forwarded.
const LOAD_SLOT: Duration = Duration::from_millis(15);

/// The router's time slots within the measured time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterTime {
    /// Number of slots.
    pub count: usize,
    /// Their total length.
    pub seconds: f64,
    /// CPU time of each of the router's threads in them, in nanoseconds, largest first.
    pub threads_ns: Vec<u64>,
}

/// One time slot of the router.
pub(super) struct RouterSlot {
    started_at_ns: u64,
    time: Duration,
    /// CPU time of each thread before the slot, by thread id.
    before: BTreeMap<u32, u64>,
}

/// Process ids of what alternates.
pub(super) struct Processes {
    pub(super) router: u32,
    pub(super) generator: u32,
    pub(super) servers: u32,
}

impl Processes {
    /// Alternates until the generator exits. All processes are continued afterwards, whatever happens.
    pub(super) fn alternate(&self) -> io::Result<Vec<RouterSlot>> {
        let _all_run_again = ContinueOnDrop([self.router, self.generator, self.servers]);
        let mut slots = Vec::new();
        while is_running(self.generator) {
            stop(&[self.router])?;
            for load in [self.generator, self.servers] {
                signal(load, Signal::CONT)?;
            }
            sleep(LOAD_SLOT);
            stop(&[self.generator, self.servers])?;
            // Stopped for a whole slot, so the kernel's counters are up to date.
            let before = thread_times(self.router)?;
            let (started_at_ns, started) = (unix_nanos(), Instant::now());
            signal(self.router, Signal::CONT)?;
            sleep(ROUTER_SLOT);
            stop(&[self.router])?;
            slots.push(RouterSlot { started_at_ns, time: started.elapsed(), before });
        }
        Ok(slots)
    }
}

/// Stops processes and waits until none of their threads runs.
fn stop(pids: &[u32]) -> io::Result<()> {
    pids.iter().try_for_each(|pid| signal(*pid, Signal::STOP))?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    for pid in pids {
        while !thread_states(*pid)?.iter().all(|state| matches!(state, 'T' | 'Z' | 'X')) {
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("process {pid} cannot be stopped")));
            }
            sleep(POLL_INTERVAL);
        }
    }
    Ok(())
}

/// The state of each thread: `R`, `S`, `T` …
fn thread_states(pid: u32) -> io::Result<Vec<char>> {
    let mut states = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have exited since the directory was read.
        let stat = fs::read_to_string(entry?.path().join("stat")).unwrap_or_default();
        states.extend(stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()));
    }
    Ok(states)
}

impl RouterTime {
    /// Sums the slots in which `report` was measured. The CPU time of a slot is known from the counters at
    /// the start of the next one, so the last slot is left out.
    pub(super) fn within(report: &Report, slots: &[RouterSlot]) -> Self {
        let end = report.started_at_ns + Duration::from_secs_f64(report.seconds).as_nanos() as u64;
        let is_within =
            |slot: &RouterSlot| report.started_at_ns <= slot.started_at_ns && slot.started_at_ns < end;
        let pairs = slots.iter().zip(slots.iter().skip(1)).filter(|(slot, _)| is_within(slot));
        let (mut sum, mut threads) = (Self::default(), BTreeMap::<u32, u64>::new());
        for (slot, next) in pairs {
            sum.count += 1;
            sum.seconds += slot.time.as_secs_f64();
            for (id, after) in &next.before {
                let before = slot.before.get(id).copied().unwrap_or(0);
                *threads.entry(*id).or_default() += after.saturating_sub(before);
            }
        }
        sum.threads_ns = threads.into_values().collect();
        sum.threads_ns.sort_unstable_by(|a, b| b.cmp(a));
        sum
    }

    /// The share of the slots that the least busy of `workers` threads was busy.
    pub(super) fn least_busy_share(&self, workers: usize) -> Option<f64> {
        let least = *self.threads_ns.get(workers.checked_sub(1)?)?;
        (self.seconds > 0.0).then_some(least as f64 / 1e9 / self.seconds)
    }
}

/// Continues its processes on drop.
struct ContinueOnDrop([u32; 3]);

impl Drop for ContinueOnDrop {
    fn drop(&mut self) {
        // An error means that the process has exited.
        self.0.iter().for_each(|pid| drop(signal(*pid, Signal::CONT)));
    }
}

fn signal(pid: u32, what: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("not a process id"))?;
    Ok(kill_process(pid, what)?)
}

/// Whether a child is running. One that has exited is a zombie until its parent waits for it.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

/// CPU time of each thread, in nanoseconds, by thread id.
fn thread_times(pid: u32) -> io::Result<BTreeMap<u32, u64>> {
    let mut times = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
        let busy = text.split_whitespace().next().and_then(|number| number.parse().ok());
        let id = entry.file_name().to_string_lossy().parse().unwrap_or(0);
        times.insert(id, busy.unwrap_or(0));
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn slot(started_at_ns: u64, millis: u64, before: &[(u32, u64)]) -> RouterSlot {
        RouterSlot {
            started_at_ns,
            time: Duration::from_millis(millis),
            before: before.iter().copied().collect(),
        }
    }

    #[test]
    fn slots_outside_of_the_measured_time_do_not_count() {
        let slots = [
            slot(50, 5, &[(1, 0), (2, 0)]),
            slot(100, 5, &[(1, 1_000_000), (2, 0)]),
            slot(200, 6, &[(1, 6_000_000), (2, 4_000_000)]),
            slot(300, 7, &[(1, 9_000_000), (2, 10_000_000)]),
        ];
        let report = Report { started_at_ns: 100, seconds: 200e-9, ..Report::default() };
        let within = RouterTime::within(&report, &slots);
        let expected = RouterTime { count: 2, seconds: 0.011, threads_ns: vec![10_000_000, 8_000_000] };
        assert_eq!(within, expected);
        let least_busy_share = within.least_busy_share(2).expect("two threads");
        assert!((least_busy_share - 8.0 / 11.0).abs() < 1e-9, "{least_busy_share}");
        assert_eq!(within.least_busy_share(3), None);
    }

    /// A process that spins for `seconds`.
    fn busy(seconds: &str) -> Child {
        let mut command = Command::new("timeout");
        command.args(["--foreground", seconds, "sh", "-c", "while :; do :; done"]);
        command.stdout(Stdio::null()).spawn().expect("timeout of coreutils")
    }

    #[test]
    fn router_runs_in_its_own_slots_only_and_is_continued_afterwards() {
        let spinning = || Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell");
        let (mut router, mut servers, mut generator) = (spinning(), spinning(), busy("0.5"));
        let processes = Processes { router: router.id(), generator: generator.id(), servers: servers.id() };
        let slots = processes.alternate();
        let state = |pid: u32| fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
        let states = [state(router.id()), state(servers.id())];
        for child in [&mut router, &mut servers, &mut generator] {
            let _ = child.kill();
            child.wait().expect("a child");
        }
        let slots = slots.expect("slots");
        let all = Report { started_at_ns: 0, seconds: 1e10, ..Report::default() };
        let within = RouterTime::within(&all, &slots);
        assert!(within.count >= 3, "{within:?}");
        // It used CPU time in its own slots only.
        let used = within.threads_ns[0] as f64 / 1e9;
        assert!(used > 0.0 && used < 1.05 * within.seconds, "{within:?}");
        assert!(states.iter().all(|stat| !stat.contains(") T ")), "{states:?}");
    }
}
