//! Assigns cores: the router never shares one with what loads it, so that its CPU time and its caches are its
//! own.

use std::ffi::{OsStr, OsString};
use std::process::Command;

use crate::process;

/// The cores of each process; all empty if processes cannot be pinned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cores {
    pub(crate) router: Vec<u32>,
    pub(crate) backends: Vec<u32>,
    pub(crate) generator: Vec<u32>,
}

impl Cores {
    /// Cores for a router with `workers` threads. Empty without `taskset`, or with too few cores.
    pub(crate) fn assign(workers: usize) -> Self {
        let cores = if is_installed("taskset") { process::cores() } else { Vec::new() };
        Self::split(&cores, workers)
    }

    fn split(cores: &[u32], workers: usize) -> Self {
        if cores.len() < workers + 1 {
            return Self::default();
        }
        // The first core serves most interrupts, so the router gets the last ones.
        let (load, router) = cores.split_at(cores.len() - workers);
        let backends = if load.len() > 1 { load[1..2].to_vec() } else { load.to_vec() };
        Self { router: router.to_vec(), backends, generator: load[..1].to_vec() }
    }

    /// For a router that alternates with its load: the router gets the last `workers` cores, generator and
    /// backends one each. The backends run already and stay where they are. `None` with fewer than two cores.
    pub(crate) fn alternating(&self, workers: usize) -> Option<Self> {
        let cores = if is_installed("taskset") { process::cores() } else { Vec::new() };
        self.alternating_on(&cores, workers)
    }

    fn alternating_on(&self, cores: &[u32], workers: usize) -> Option<Self> {
        let generator = *cores.iter().find(|core| !self.backends.contains(core))?;
        let router = cores.get(cores.len().checked_sub(workers)?..)?.to_vec();
        Some(Self { router, backends: self.backends.clone(), generator: vec![generator] })
    }

    /// Whether generator and backends have a core each, so that throughput is limited by the router alone.
    pub(crate) fn are_separate(&self) -> bool {
        !self.router.is_empty() && self.backends != self.generator
    }
}

/// A command that runs on `cores` (on any, if there are none) and is killed with this process.
pub(super) fn pinned(program: impl AsRef<OsStr>, cores: &[u32]) -> Command {
    let list: Vec<_> = cores.iter().map(u32::to_string).collect();
    // Both call exec, so the child's process id is that of the program.
    let mut words = Vec::new();
    if is_installed("setpriv") {
        words.extend(["setpriv", "--pdeathsig", "KILL"].map(OsString::from));
    }
    if !list.is_empty() {
        words.extend(["taskset".into(), "-c".into(), list.join(",").into()]);
    }
    words.push(program.as_ref().into());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

/// Whether one of util-linux's programs is installed.
fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_router_shares_no_core_with_its_load() {
        let two = Cores::split(&[0, 1], 1);
        assert_eq!((two.router.clone(), two.backends.clone()), (vec![1], vec![0]));
        assert!(!two.are_separate(), "generator and servers share one");
        let four = Cores::split(&[0, 1, 2, 3], 2);
        assert_eq!(four, Cores { router: vec![2, 3], backends: vec![1], generator: vec![0] });
        assert!(four.are_separate());
        assert_eq!(Cores::split(&[0, 1], 2), Cores::default());
    }

    #[test]
    fn an_alternating_router_uses_the_cores_of_its_load() {
        let two = Cores::split(&[0, 1], 1);
        let alternating = Cores { router: vec![0, 1], backends: vec![0], generator: vec![1] };
        assert_eq!(two.alternating_on(&[0, 1], 2), Some(alternating));
        assert_eq!(Cores::split(&[0], 1).alternating_on(&[0], 2), None);
    }
}
