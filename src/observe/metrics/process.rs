//! What the kernel says of this process.

use std::fs;

/// Clock ticks of `/proc` in a second, on every Linux.
const TICKS: f64 = 100.0;

/// Under Prometheus' usual names. What cannot be read is left out.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Process {
    pub(super) cpu_seconds: Option<f64>,
    /// Since the epoch.
    pub(super) start_seconds: Option<f64>,
    pub(super) resident_bytes: Option<u64>,
    pub(super) virtual_bytes: Option<u64>,
    pub(super) open_fds: Option<u64>,
    pub(super) max_fds: Option<u64>,
    pub(super) threads: Option<u64>,
}

impl Process {
    /// Reads a few small files that the kernel makes up: it waits for no disk.
    pub(super) fn read() -> Self {
        let mut process = Self::default();
        if let Ok(stat) = fs::read_to_string("/proc/self/stat") {
            process.take_stat(&stat);
        }
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            let kilobytes = |name| number_after(&status, name).map(|kilobytes| kilobytes * 1_024);
            process.resident_bytes = kilobytes("VmRSS:");
            process.virtual_bytes = kilobytes("VmSize:");
            process.threads = number_after(&status, "Threads:");
        }
        process.open_fds = fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64);
        if let Ok(limits) = fs::read_to_string("/proc/self/limits") {
            process.max_fds = number_after(&limits, "Max open files");
        }
        process
    }

    fn take_stat(&mut self, stat: &str) {
        // The name in brackets may hold anything.
        let Some((_, fields)) = stat.rsplit_once(')') else { return };
        // The first of these is the third of `proc(5)`.
        let ticks = |number: usize| fields.split_whitespace().nth(number - 3)?.parse::<f64>().ok();
        if let (Some(user), Some(system)) = (ticks(14), ticks(15)) {
            self.cpu_seconds = Some((user + system) / TICKS);
        }
        let booted = fs::read_to_string("/proc/stat").ok().and_then(|stat| number_after(&stat, "btime "));
        if let (Some(booted), Some(started)) = (booted, ticks(22)) {
            self.start_seconds = Some(booted as f64 + started / TICKS);
        }
    }
}

/// The number behind the line's beginning.
fn number_after(text: &str, beginning: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(beginning))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn this_process_is_described() {
        let process = Process::read();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - process.start_seconds.unwrap();
        assert!((-2.0..86_400.0).contains(&age), "{age} s old");
        assert!(process.resident_bytes.unwrap() > 1 << 20);
        assert!(process.virtual_bytes.unwrap() >= process.resident_bytes.unwrap());
        assert!(process.open_fds.unwrap() >= 3 && process.max_fds.unwrap() > process.open_fds.unwrap());
        assert!(process.threads.unwrap() >= 1 && process.cpu_seconds.unwrap() >= 0.0);
    }

    #[test]
    fn a_name_with_brackets_shifts_nothing() {
        let mut process = Process::default();
        process.take_stat("7 (a) b) R 1 7 7 0 -1 0 0 0 0 0 150 50 0 0 20 0 4 0 900 1 2");
        assert_eq!(process.cpu_seconds, Some(2.0));
    }
}
