//! Which core does what: the router never shares one with what loads it.

use std::ffi::{OsStr, OsString};
use std::process::Command;

use crate::process;

/// The cores of each part, or none if there is nothing to choose from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cores {
    pub(crate) router: Vec<u32>,
    pub(crate) upstreams: Vec<u32>,
    pub(crate) generator: Vec<u32>,
}

impl Cores {
    /// For a router with `workers` threads. Empty without `taskset`, or with a single core.
    pub(crate) fn share(workers: usize) -> Self {
        let cores = if has("taskset") { process::cores() } else { Vec::new() };
        Self::of(&cores, workers)
    }

    fn of(cores: &[u32], workers: usize) -> Self {
        if cores.len() < workers + 1 {
            return Self::default();
        }
        // The first core has the machine's interrupts: the router gets the last ones.
        let (load, router) = cores.split_at(cores.len() - workers);
        let upstreams = if load.len() > 1 { load[1..2].to_vec() } else { load.to_vec() };
        Self { router: router.to_vec(), upstreams, generator: load[..1].to_vec() }
    }

    /// For a router that takes turns with its load: both have all cores, generator and servers one each. The servers
    /// stay where they are. `None` if that is not two.
    pub(crate) fn by_turns(&self, workers: usize) -> Option<Self> {
        let cores = if has("taskset") { process::cores() } else { Vec::new() };
        self.taking_turns(&cores, workers)
    }

    fn taking_turns(&self, cores: &[u32], workers: usize) -> Option<Self> {
        let generator = *cores.iter().find(|core| !self.upstreams.contains(core))?;
        let router = cores.get(cores.len().checked_sub(workers)?..)?.to_vec();
        Some(Self { router, upstreams: self.upstreams.clone(), generator: vec![generator] })
    }

    /// Whether each part has cores of its own, so that a router's throughput is its own too.
    pub(crate) fn are_apart(&self) -> bool {
        !self.router.is_empty() && self.upstreams != self.generator
    }
}

/// A command that runs on `cores` only, on any if there are none, and that ends with this process.
pub(super) fn pinned(program: impl AsRef<OsStr>, cores: &[u32]) -> Command {
    let list: Vec<_> = cores.iter().map(u32::to_string).collect();
    // Both replace themselves with what they start, so the process id is the program's.
    let mut words = Vec::new();
    if has("setpriv") {
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

/// Whether a program of util-linux is there.
fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn router_has_cores_of_its_own() {
        let two = Cores::of(&[0, 1], 1);
        assert_eq!((two.router.clone(), two.upstreams.clone()), (vec![1], vec![0]));
        assert!(!two.are_apart(), "generator and servers share one");
        let four = Cores::of(&[0, 1, 2, 3], 2);
        assert_eq!(four, Cores { router: vec![2, 3], upstreams: vec![1], generator: vec![0] });
        assert!(four.are_apart());
        assert_eq!(Cores::of(&[0, 1], 2), Cores::default());
    }

    #[test]
    fn router_that_takes_turns_has_the_cores_of_its_load() {
        let two = Cores::of(&[0, 1], 1);
        let turns = Cores { router: vec![0, 1], upstreams: vec![0], generator: vec![1] };
        assert_eq!(two.taking_turns(&[0, 1], 2), Some(turns));
        assert_eq!(Cores::of(&[0], 1).taking_turns(&[0], 2), None);
    }
}
