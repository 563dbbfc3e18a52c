//! CPU time, memory, descriptors and connections of a process, read from `/proc`.
//!
//! CPU time and run-queue wait are the first fields of `schedstat`, in nanoseconds, summed over all threads
//! of a process and its descendants. The time of a thread that exits meanwhile is lost; none of the routers'
//! threads exit.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::load::ProcessCost;

/// A process that is measured during a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedProcess {
    /// Its label in the report.
    pub name: String,
    /// Its process id.
    pub pid: u32,
}

/// CPU time and run-queue wait, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// On a core.
    pub busy_ns: u64,
    /// Runnable while something else had the core.
    pub waited_ns: u64,
}

impl Cpu {
    /// Sums a process and its descendants.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut sum = Self::default();
        for pid in process_tree(pid)? {
            for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
                // A thread may have exited since the directory was read.
                let text = fs::read_to_string(entry?.path().join("schedstat")).unwrap_or_default();
                let mut numbers = text.split_whitespace().map(|number| number.parse::<u64>().unwrap_or(0));
                sum.busy_ns += numbers.next().unwrap_or(0);
                sum.waited_ns += numbers.next().unwrap_or(0);
            }
        }
        Ok(sum)
    }
}

/// A process and its descendants.
fn process_tree(pid: u32) -> io::Result<Vec<u32>> {
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        for entry in fs::read_dir(format!("/proc/{}/task", found[next]))? {
            let children = fs::read_to_string(entry?.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        next += 1;
    }
    Ok(found)
}

/// A line of `/proc/PID/status` in KiB, summed over descendants.
fn status_kib(pid: u32, field: &str) -> io::Result<u64> {
    let mut sum = 0;
    for pid in process_tree(pid)? {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        sum += number.unwrap_or(0);
    }
    Ok(sum)
}

/// Peak resident memory in KiB.
///
/// # Errors
/// If there is no such process.
pub(crate) fn peak_kib(pid: u32) -> io::Result<u64> {
    status_kib(pid, "VmHWM")
}

/// Resident memory in KiB, from `smaps_rollup`, which is exact: `VmRSS` may be off by some pages per thread.
///
/// # Errors
/// If there is no such process.
pub fn rss_kib(pid: u32) -> io::Result<u64> {
    let mut sum = 0;
    for pid in process_tree(pid)? {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
        sum += line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

/// Open descriptors of a process and its descendants.
///
/// # Errors
/// If there is no such process.
pub fn descriptors(pid: u32) -> io::Result<u64> {
    let mut sum = 0;
    for pid in process_tree(pid)? {
        sum += fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
    }
    Ok(sum)
}

/// CPU times of the watched processes and, last, of this one.
pub(crate) fn cpu_times(watch: &[WatchedProcess]) -> io::Result<Vec<Cpu>> {
    watch.iter().map(|watch| watch.pid).chain([std::process::id()]).map(Cpu::of).collect()
}

/// CPU time of the watched processes since `before`, and their memory and descriptors now.
pub(crate) fn costs_since(watch: &[WatchedProcess], before: &[Cpu]) -> io::Result<Vec<ProcessCost>> {
    let own = WatchedProcess { name: "generator".to_owned(), pid: std::process::id() };
    let now = cpu_times(watch)?;
    let all = watch.iter().chain([&own]).zip(now.iter().zip(before));
    all.map(|(watch, (now, before))| {
        Ok(ProcessCost {
            name: watch.name.clone(),
            cpu_ns: now.busy_ns.saturating_sub(before.busy_ns),
            waited_ns: now.waited_ns.saturating_sub(before.waited_ns),
            rss_kib: rss_kib(watch.pid)?,
            peak_kib: status_kib(watch.pid, "VmHWM")?,
            descriptors: descriptors(watch.pid)?,
        })
    })
    .collect()
}

/// CPU time of the whole machine since boot, to about 10 ms; zero if it cannot be read.
pub(crate) fn machine_cpu_time() -> Duration {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    parse_busy(&stat)
}

/// Sums the first line, `user nice system idle iowait irq softirq steal` in hundredths of a second, without
/// idle and iowait. Steal counts: the hypervisor's other guests disturb a measurement as other processes do.
fn parse_busy(stat: &str) -> Duration {
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8);
    let ticks = fields.enumerate().filter(|(index, _)| !matches!(index, 3 | 4));
    Duration::from_millis(10 * ticks.filter_map(|(_, ticks)| ticks.parse::<u64>().ok()).sum::<u64>())
}

/// The limit of open files, which child processes inherit.
pub fn descriptor_limit() -> u64 {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(u64::MAX)
}

/// The cores that this process may run on.
pub fn cores() -> Vec<u32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.map(|list| parse_cores(list.trim())).unwrap_or_default()
}

/// Parses a list such as `0-2,5`.
fn parse_cores(list: &str) -> Vec<u32> {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
    });
    ranges.flatten().collect()
}

/// How many client connections each event loop of `pid` serves, for a server on `port`, largest first.
///
/// Each event loop has an epoll descriptor, and `fdinfo` lists the sockets that are registered with it.
///
/// # Errors
/// If there is no such process.
pub fn clients_per_loop(pid: u32, port: u16) -> io::Result<Vec<usize>> {
    let clients = client_sockets(port)?;
    let folder = format!("/proc/{pid}/fd");
    let mut loops = HashSet::new();
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        if target != Path::new("anon_inode:[eventpoll]") {
            continue;
        }
        let number = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
        let registered = info.lines().filter_map(|line| line.strip_prefix("tfd:")?.split_whitespace().next());
        let sockets = registered.filter_map(|number| fs::read_link(format!("{folder}/{number}")).ok());
        let names = sockets.map(|socket| socket.to_string_lossy().into_owned());
        // A set, because tokio has two descriptors of each epoll instance.
        loops.insert(names.filter(|name| clients.contains(name)).collect::<BTreeSet<_>>());
    }
    let mut counts: Vec<_> = loops.iter().map(BTreeSet::len).collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    Ok(counts)
}

/// The established sockets with local port `port`, named as the links in `/proc/PID/fd`.
fn client_sockets(port: u16) -> io::Result<HashSet<String>> {
    let local = format!(":{port:04X}");
    let table = fs::read_to_string("/proc/net/tcp")?;
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = rows.filter(|row| row.len() > 9 && row[1].ends_with(&local) && row[3] == "01");
    Ok(ours.map(|row| format!("socket:[{}]", row[9])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_cores_is_parsed() {
        assert_eq!(parse_cores("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(parse_cores(""), [0; 0]);
    }

    #[test]
    fn idle_and_iowait_are_not_counted_as_busy() {
        assert_eq!(parse_busy("cpu  1 2 4 800 900 8 16 32 64 0\ncpu0 …"), Duration::from_millis(630));
        assert_eq!(parse_busy(""), Duration::ZERO);
    }

    #[test]
    fn this_process_has_used_a_core_memory_and_descriptors() {
        let pid = std::process::id();
        let busy_ns = || Cpu::of(pid).expect("schedstat").busy_ns;
        let (before, mut sum) = (busy_ns(), 0u64);
        while busy_ns() < before + 1_000_000 {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(rss_kib(pid).expect("smaps_rollup") > 100);
        assert!(descriptors(pid).expect("fd") >= 3);
    }
}
