//! When the program reads its configuration again, and what it says of it.
//!
//! What can change is for the library to know.

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

/// How often files are looked at. One that has changed is read when it has not changed since the last look, so that
/// nobody's half-written file is.
const POLL: Duration = Duration::from_secs(1);

/// What makes the program read its configuration again.
pub(crate) struct Reloads {
    hangup: Signal,
    files: Files,
    /// What only this program knows, as of its start.
    started_with: Vec<(&'static str, String)>,
}

impl Reloads {
    /// From now on SIGHUP does not end the program.
    pub(crate) fn new(plan: &Plan) -> io::Result<Self> {
        let files = Files::watch(plan.files.clone(), &[]);
        let started_with = plan.of_the_program.clone();
        Ok(Self { hangup: signal(SignalKind::hangup())?, files, started_with })
    }

    /// Reloads whenever there is a reason to.
    pub(crate) async fn follow(mut self, balancer: &MiniLoadBalancer) {
        loop {
            let why = tokio::select! {
                _ = self.hangup.recv() => "SIGHUP".to_owned(),
                file = self.files.changed() => format!("{} has changed", file.display()),
            };
            match self.reload(balancer).await {
                Ok(reloaded) => info!("reloaded ({why}): {reloaded}"),
                Err(sentence) => error!("not reloaded ({why}), all goes on as before: {sentence}"),
            }
        }
    }

    async fn reload(&mut self, balancer: &MiniLoadBalancer) -> Result<Reloaded, String> {
        // Files may be on a disk that makes one wait, which connections should not.
        let before = self.files.paths.clone();
        let read = spawn_blocking(|| {
            let before = stamps(before);
            (cli::parse(std::env::args_os(), std::env::vars_os()), before)
        });
        let (parsed, before) = read.await.map_err(|error| error.to_string())?;
        self.files.loaded.clone_from(&before);
        let plan = parsed.map_err(|error| cli::sentence(&error))?;
        self.files = Files::watch(plan.files, &before);
        let outcome = balancer.reload(plan.config);
        let mut reloaded = outcome.map_err(|error| plan.layers.placed(&error.to_string()))?;
        let pairs = self.started_with.iter().zip(&plan.of_the_program);
        let own = pairs.filter(|(old, new)| old.1 != new.1).map(|(old, _)| old.0);
        reloaded.needs_restart.extend(own);
        Ok(reloaded)
    }
}

/// What tells one content of a file from the next: device, inode, size and time of change. `None`: there is no file.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// Files, and which state of them was read.
struct Files {
    paths: Vec<PathBuf>,
    loaded: Vec<(PathBuf, Stamp)>,
    seen: Vec<(PathBuf, Stamp)>,
}

impl Files {
    /// Watches files. The state that was read is the one in `known`, and the present one of all others.
    fn watch(paths: Vec<PathBuf>, known: &[(PathBuf, Stamp)]) -> Self {
        let loaded = |path: PathBuf| {
            let before = known.iter().find(|(known, _)| *known == path).map(|(_, stamp)| *stamp);
            let stamp = before.unwrap_or_else(|| stamp(&path));
            (path, stamp)
        };
        let loaded: Vec<_> = paths.iter().cloned().map(loaded).collect();
        Self { paths, seen: loaded.clone(), loaded }
    }

    /// Waits until a file is another one than was read, and has been so for a while.
    async fn changed(&mut self) -> PathBuf {
        if self.paths.is_empty() {
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
