//! Load and router take turns on the same cores, for a router that is to have all of them.
//!
//! While generator and servers run, the router is stopped (`SIGSTOP`) and work for it queues up in its sockets; then they
//! are stopped and it runs. So a router with two workers has two cores for itself on a machine that has no more.
//! What is counted is the router's own time. Only processes that were started here are stopped.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::canned::unix_nanos;
use crate::load::Report;

/// A router's turn: short enough that the work of a thousand connections outlasts it, long beside what stopping takes.
const ROUTER: Duration = Duration::from_millis(5);
/// How often is looked whether a process has come to a stop. One with several threads takes a moment: a thread must
/// have a core to be told.
const LOOK: Duration = Duration::from_micros(50);
/// Longest time for that.
const STOP: Duration = Duration::from_secs(5);
/// Generator's and servers': they have two threads, and must answer all that the router has passed on.
const LOAD: Duration = Duration::from_millis(15);

/// The router's turns within the time that was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Turns {
    /// How many.
    pub count: usize,
    /// How long they took together.
    pub seconds: f64,
    /// CPU time of each thread of the router in them, in nanoseconds: most first.
    pub threads_ns: Vec<u64>,
}

/// One turn of the router.
pub(super) struct Turn {
    began_ns: u64,
    time: Duration,
    /// CPU time of each thread before it, by id.
    before: BTreeMap<u32, u64>,
}

/// Who takes turns.
pub(super) struct Sides {
    pub(super) router: u32,
    pub(super) generator: u32,
    pub(super) servers: u32,
}

impl Sides {
    /// Until the generator has ended. All run again afterwards, whatever happens.
    pub(super) fn alternate(&self) -> io::Result<Vec<Turn>> {
        let _all_run_again = Freed([self.router, self.generator, self.servers]);
        let mut turns = Vec::new();
        while is_running(self.generator) {
            stop(&[self.router])?;
            for load in [self.generator, self.servers] {
                signal(load, Signal::CONT)?;
            }
            sleep(LOAD);
            stop(&[self.generator, self.servers])?;
            // Stopped for a whole turn: the kernel's numbers are up to date.
            let before = thread_times(self.router)?;
            let (began_ns, began) = (unix_nanos(), Instant::now());
            signal(self.router, Signal::CONT)?;
            sleep(ROUTER);
            stop(&[self.router])?;
            turns.push(Turn { began_ns, time: began.elapsed(), before });
        }
        Ok(turns)
    }
}

/// Stops processes and waits until none of their threads runs.
fn stop(pids: &[u32]) -> io::Result<()> {
    pids.iter().try_for_each(|pid| signal(*pid, Signal::STOP))?;
    let give_up = Instant::now() + STOP;
    for pid in pids {
        while !thread_states(*pid)?.iter().all(|state| matches!(state, 'T' | 'Z' | 'X')) {
            if Instant::now() > give_up {
                return Err(io::Error::other(format!("process {pid} cannot be stopped")));
            }
            sleep(LOOK);
        }
    }
    Ok(())
}

/// `R`, `S`, `T` … of each thread.
fn thread_states(pid: u32) -> io::Result<Vec<char>> {
    let mut states = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have ended since the folder was read.
        let stat = fs::read_to_string(entry?.path().join("stat")).unwrap_or_default();
        states.extend(stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()));
    }
    Ok(states)
}

impl Turns {
    /// Those of `turns` in which `report` was measured, but for the last one, whose cost is not known.
    pub(super) fn within(report: &Report, turns: &[Turn]) -> Self {
        let end = report.began_ns + Duration::from_secs_f64(report.seconds).as_nanos() as u64;
        let is_within = |turn: &Turn| report.began_ns <= turn.began_ns && turn.began_ns < end;
        let pairs = turns.iter().zip(turns.iter().skip(1)).filter(|(turn, _)| is_within(turn));
        let (mut sum, mut threads) = (Self::default(), BTreeMap::<u32, u64>::new());
        for (turn, next) in pairs {
            sum.count += 1;
            sum.seconds += turn.time.as_secs_f64();
            for (id, after) in &next.before {
                let before = turn.before.get(id).copied().unwrap_or(0);
                *threads.entry(*id).or_default() += after.saturating_sub(before);
            }
        }
        sum.threads_ns = threads.into_values().collect();
        sum.threads_ns.sort_unstable_by(|a, b| b.cmp(a));
        sum
    }

    /// The share of the turns in which the least busy of `workers` threads was busy.
    pub(super) fn idlest(&self, workers: usize) -> Option<f64> {
        let least = *self.threads_ns.get(workers.checked_sub(1)?)?;
        (self.seconds > 0.0).then_some(least as f64 / 1e9 / self.seconds)
    }
}

/// Processes that are continued when this is dropped.
struct Freed([u32; 3]);

impl Drop for Freed {
    fn drop(&mut self) {
        // Who has ended needs nothing.
        self.0.iter().for_each(|pid| drop(signal(*pid, Signal::CONT)));
    }
}

fn signal(pid: u32, what: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("not a process id"))?;
    Ok(kill_process(pid, what)?)
}

/// Whether a child has not ended yet. One that has is a zombie until it is waited for.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

/// CPU time of each thread, in nanoseconds.
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

    fn turn(began_ns: u64, millis: u64, before: &[(u32, u64)]) -> Turn {
        Turn { began_ns, time: Duration::from_millis(millis), before: before.iter().copied().collect() }
    }

    #[test]
    fn turns_outside_of_the_measured_time_do_not_count() {
        let turns = [
            turn(50, 5, &[(1, 0), (2, 0)]),
            turn(100, 5, &[(1, 1_000_000), (2, 0)]),
            turn(200, 6, &[(1, 6_000_000), (2, 4_000_000)]),
            turn(300, 7, &[(1, 9_000_000), (2, 10_000_000)]),
        ];
        let report = Report { began_ns: 100, seconds: 200e-9, ..Report::default() };
        let within = Turns::within(&report, &turns);
        let expected = Turns { count: 2, seconds: 0.011, threads_ns: vec![10_000_000, 8_000_000] };
        assert_eq!(within, expected);
        let idlest = within.idlest(2).expect("two threads");
        assert!((idlest - 8.0 / 11.0).abs() < 1e-9, "{idlest}");
        assert_eq!(within.idlest(3), None);
    }

    /// A process that is always busy, for `seconds`.
    fn busy(seconds: &str) -> Child {
        let mut command = Command::new("timeout");
        command.args(["--foreground", seconds, "sh", "-c", "while :; do :; done"]);
        command.stdout(Stdio::null()).spawn().expect("timeout of coreutils")
    }

    #[test]
    fn router_runs_in_its_turns_only_and_in_the_end() {
        let spinning = || Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell");
        let (mut router, mut servers, mut generator) = (spinning(), spinning(), busy("0.5"));
        let sides = Sides { router: router.id(), generator: generator.id(), servers: servers.id() };
        let turns = sides.alternate();
        let state = |pid: u32| fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
        let states = [state(router.id()), state(servers.id())];
        for child in [&mut router, &mut servers, &mut generator] {
            let _ = child.kill();
            child.wait().expect("a child");
        }
        let turns = turns.expect("turns");
        let all = Report { began_ns: 0, seconds: 1e10, ..Report::default() };
        let within = Turns::within(&all, &turns);
        assert!(within.count >= 3, "{within:?}");
        // What it used up it used up in its turns, and not in those of the others.
        let used = within.threads_ns[0] as f64 / 1e9;
        assert!(used > 0.0 && used < 1.05 * within.seconds, "{within:?}");
        assert!(states.iter().all(|stat| !stat.contains(") T ")), "{states:?}");
    }
}
