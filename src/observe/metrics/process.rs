//! The usual metrics of a process, read from `/proc`.

use std::fs;

/// Clock ticks in a second: `USER_HZ`, which is 100 on every Linux architecture that Rust supports.
const TICKS: f64 = 100.0;

/// The values of Prometheus' `process_*` metrics. What cannot be read is left out.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct ProcessStats {
    pub(super) cpu_seconds: Option<f64>,
    /// In Unix time.
    pub(super) start_seconds: Option<f64>,
    pub(super) resident_bytes: Option<u64>,
    pub(super) virtual_bytes: Option<u64>,
    pub(super) open_fds: Option<u64>,
    pub(super) max_fds: Option<u64>,
    pub(super) threads: Option<u64>,
}

impl ProcessStats {
    /// Reads a few small files. It may run on a worker's thread: `/proc` is made by the kernel and waits for
    /// no disk.
    pub(super) fn read() -> Self {
        let mut process = Self::default();
        if let Ok(stat) = fs::read_to_string("/proc/self/stat") {
            process.read_stat(&stat);
        }
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            let kilobytes = |name| number_after(&status, name).map(|kilobytes| kilobytes * 1_024);
            process.resident_bytes = kilobytes("VmRSS:");
            process.virtual_bytes = kilobytes("VmSize:");
            process.threads = number_after(&status, "Threads:");
        }
        // The count includes the descriptor with which the folder is read.
        process.open_fds = fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64);
        if let Ok(limits) = fs::read_to_string("/proc/self/limits") {
            // The first number is the soft limit, at which `open` fails. `unlimited` is no number, and left
            // out.
            process.max_fds = number_after(&limits, "Max open files");
        }
        process
    }

    fn read_stat(&mut self, stat: &str) {
        // The name of the program, in parentheses, may contain spaces and parentheses itself.
        let Some((_, fields)) = stat.rsplit_once(')') else { return };
        // Numbered as in `proc(5)`; the first one behind the name is 3.
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

/// The number behind the beginning of a line.
fn number_after(text: &str, beginning: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(beginning))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn the_stats_of_this_process_are_plausible() {
        let process = ProcessStats::read();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - process.start_seconds.unwrap();
        assert!((-2.0..86_400.0).contains(&age), "{age} s old");
        assert!(process.resident_bytes.unwrap() > 1 << 20);
        assert!(process.virtual_bytes.unwrap() >= process.resident_bytes.unwrap());
        assert!(process.open_fds.unwrap() >= 3 && process.max_fds.unwrap() > process.open_fds.unwrap());
        assert!(process.threads.unwrap() >= 1 && process.cpu_seconds.unwrap() >= 0.0);
    }

    #[test]
    fn a_program_name_with_parentheses_is_skipped() {
        let mut process = ProcessStats::default();
        process.read_stat("7 (a) b) R 1 7 7 0 -1 0 0 0 0 0 150 50 0 0 20 0 4 0 900 1 2");
        assert_eq!(process.cpu_seconds, Some(2.0));
    }
}
