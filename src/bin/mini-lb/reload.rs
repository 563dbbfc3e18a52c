//! Reads the configuration again on SIGHUP and when a file of it changes, and logs the outcome.
//!
//! Which options can change while the router runs is for the library to know.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mini_lb::{MiniLoadBalancer, Reloaded};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{error, info};

use crate::cli::{self, Plan};

/// How often files are checked. A changed file is read once it is the same in two checks, so that a
/// half-written one is not.
const POLL: Duration = Duration::from_secs(1);

/// Waits for reasons to reload, and reloads.
pub(crate) struct Reloads {
    hangup: Signal,
    files: Files,
    /// The options that only the program knows, as of its start.
    started_with: Vec<(&'static str, String)>,
}

impl Reloads {
    /// From now on SIGHUP does not end the program.
    pub(crate) fn new(plan: &Plan) -> io::Result<Self> {
        let files = Files::watch(plan.files.clone(), &[]);
        let started_with = plan.program_options.clone();
        Ok(Self { hangup: signal(SignalKind::hangup())?, files, started_with })
    }

    /// Reloads on each SIGHUP and each change of a file. Never returns.
    pub(crate) async fn follow(mut self, balancer: &MiniLoadBalancer) {
        loop {
            let why = tokio::select! {
                _ = self.hangup.recv() => "SIGHUP".to_owned(),
                file = self.files.changed() => format!("{} has changed", file.display()),
            };
            match self.reload(balancer).await {
                Ok(reloaded) => info!("reloaded ({why}): {reloaded}"),
                Err(sentence) => {
                    error!("reload failed ({why}), keeping the running configuration: {sentence}");
                }
            }
        }
    }

    async fn reload(&mut self, balancer: &MiniLoadBalancer) -> Result<Reloaded, String> {
        // Reading files may block (NFS), and this thread accepts connections.
        let before = self.files.paths.clone();
        let read = spawn_blocking(|| {
            // Taken before the files are read: a change meanwhile is then another version, and is read too.
            let before = stamps(before);
            (cli::parse(std::env::args_os(), std::env::vars_os()), before)
        });
        let (parsed, before) = read.await.map_err(|error| error.to_string())?;
        // After a failure too: a bad file is reported once, not once a second.
        self.files.loaded.clone_from(&before);
        let plan = parsed.map_err(|error| cli::sentence(&error))?;
        // Even if the router rejects this configuration: the files that it names are where it will be
        // corrected.
        self.files = Files::watch(plan.files, &before);
        let outcome = balancer.reload(plan.config);
        let mut reloaded = outcome.map_err(|error| plan.layers.placed(&error.to_string()))?;
        // Both lists have the order of one table.
        let pairs = self.started_with.iter().zip(&plan.program_options);
        let own = pairs.filter(|(old, new)| old.1 != new.1).map(|(old, _)| old.0);
        reloaded.needs_restart.extend(own);
        Ok(reloaded)
    }
}

/// Tells one version of a file from the next: device, inode, size and time of modification. `None`: there is
/// no file.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// The files of a configuration, and which versions of them were read.
struct Files {
    paths: Vec<PathBuf>,
    loaded: Vec<(PathBuf, Stamp)>,
    seen: Vec<(PathBuf, Stamp)>,
}

impl Files {
    /// Watches files. The version that was read is the one in `known`; for files not in it, the present one.
    fn watch(paths: Vec<PathBuf>, known: &[(PathBuf, Stamp)]) -> Self {
        let loaded = |path: PathBuf| {
            let before = known.iter().find(|(known, _)| *known == path).map(|(_, stamp)| *stamp);
            let stamp = before.unwrap_or_else(|| stamp(&path));
            (path, stamp)
        };
        let loaded: Vec<_> = paths.iter().cloned().map(loaded).collect();
        Self { paths, seen: loaded.clone(), loaded }
    }

    /// Waits until a file is not the version that was read, and has not changed since the last check.
    async fn changed(&mut self) -> PathBuf {
        if self.paths.is_empty() {
            // Nothing to watch: SIGHUP alone reloads then.
            return std::future::pending().await;
        }
        loop {
            sleep(POLL).await;
            let paths = self.paths.clone();
            let Ok(now) = spawn_blocking(|| stamps(paths)).await else { continue };
            let is_stable = now == self.seen;
            self.seen = now;
            let other = self.seen.iter().zip(&self.loaded).find(|(seen, loaded)| seen != loaded);
            if let Some(((path, _), _)) = other.filter(|_| is_stable) {
                return path.clone();
            }
        }
    }
}

fn stamps(paths: Vec<PathBuf>) -> Vec<(PathBuf, Stamp)> {
    paths.into_iter().map(|path| (path.clone(), stamp(&path))).collect()
}

/// Links are followed: a Kubernetes ConfigMap changes by another target of a link.
fn stamp(path: &Path) -> Stamp {
    let of = |file: Metadata| (file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec());
    std::fs::metadata(path).ok().map(of)
}
