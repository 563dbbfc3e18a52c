//! Child processes that are killed with their owner, and the generator as one of them.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{self, Stdio};

use super::cores::pinned;
use crate::load::Report;

/// A process that is killed on drop.
pub(crate) struct Child(process::Child);

impl Child {
    /// Starts `command` (program and arguments) on `cores`; its output goes to the file `log` in `folder`.
    pub(crate) fn start(command: &[OsString], cores: &[u32], folder: &Path, log: &str) -> io::Result<Self> {
        let log = File::create(folder.join(log))?;
        let child = pinned(&command[0], cores)
            .args(&command[1..])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        child
            .map(Self)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", command[0].display())))
    }

    /// Starts this program with other arguments and reads the first `lines` lines that it prints.
    pub(super) fn spawn_self(
        arguments: &[&str],
        cores: &[u32],
        lines: usize,
    ) -> io::Result<(Self, Vec<String>)> {
        let mut child =
            pinned(std::env::current_exe()?, cores).args(arguments).stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?;
        let child = Self(child);
        let printed = BufReader::new(out).lines().take(lines).collect::<io::Result<_>>()?;
        Ok((child, printed))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has exited by itself.
    pub(crate) fn has_exited(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // An error means that it has exited already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the generator with `flags` in a process on `cores`. `meanwhile` runs in this process during the load
/// and gets the generator's process id.
pub(crate) fn generate(flags: &[String], cores: &[u32], meanwhile: impl FnOnce(u32)) -> io::Result<Report> {
    let mut command = pinned(std::env::current_exe()?, cores);
    let child = command.args(["run", "--json"]).args(flags).stdout(Stdio::piped()).spawn()?;
    meanwhile(child.id());
    let output = child.wait_with_output()?;
    serde_json::from_slice(&output.stdout)
        .map_err(|error| io::Error::other(format!("the generator failed ({}): {error}", output.status)))
}
