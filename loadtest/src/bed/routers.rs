//! The routers that are compared: where to find them, how to start them, when they are ready.
//!
//! Each is set up as its own documentation says for speed: one thread, connections kept alive, nothing logged,
//! streams not held back.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Child, Upstreams, block_on, free_port, loopback};
use crate::load::{Kind, Load, Request};

/// The longest time that a router may take until it answers.
const START: Duration = Duration::from_secs(40);

const HAPROXY: &str = include_str!("../../assets/haproxy.cfg");
const NGINX: &str = include_str!("../../assets/nginx.conf");

/// What stands between generator and servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Router {
    /// Nothing: the generator talks to decode.
    Direct,
    /// A build of this project's router.
    MiniLb { name: String, program: PathBuf },
    /// A plain proxy of decode.
    Haproxy(PathBuf),
    /// A plain proxy of decode.
    Nginx(PathBuf),
    /// Of the PyPI package, written in Rust.
    Sglang(PathBuf),
    /// Of the same package, written in Python.
    PythonMiniLb(PathBuf),
    /// The successor of sglang-router.
    Smg(PathBuf),
}

/// Where to look for routers.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Places {
    /// This project's router [default: `mini-lb` beside this program].
    #[arg(long, value_name = "PATH")]
    mini_lb: Option<PathBuf>,
    /// Another build of it, to compare with; may be repeated.
    #[arg(long, value_name = "NAME=PATH")]
    also: Vec<String>,
    /// A Python environment with sglang-router and smg.
    #[arg(long, value_name = "FOLDER", default_value = "target/peers")]
    peers: PathBuf,
}

impl Places {
    /// This project's router.
    pub(crate) fn mini_lb(&self) -> io::Result<Router> {
        let beside = std::env::current_exe()?.with_file_name("mini-lb");
        let program = fs::canonicalize(self.mini_lb.as_ref().unwrap_or(&beside)).map_err(|error| {
            io::Error::other(format!("no mini-lb ({error}): build it with `cargo build --release`"))
        })?;
        Ok(Router::MiniLb { name: "mini-lb".to_owned(), program })
    }

    /// Every router that is there, and the names of those that are not.
    pub(crate) fn find(&self) -> io::Result<(Vec<Router>, Vec<&'static str>)> {
        let mut found = vec![Router::Direct, self.mini_lb()?];
        for also in &self.also {
            let (name, path) =
                also.split_once('=').ok_or_else(|| io::Error::other("--also wants NAME=PATH"))?;
            found.push(Router::MiniLb { name: name.to_owned(), program: fs::canonicalize(path)? });
        }
        let python = fs::canonicalize(&self.peers).ok().map(|folder| folder.join("bin/python"));
        let has = |module: &str| python.clone().filter(|python| has_module(python, module));
        let peers = [
            ("haproxy", installed("haproxy").map(Router::Haproxy)),
            ("nginx", installed("nginx").map(Router::Nginx)),
            ("sglang-router", has("sglang_router").map(Router::Sglang)),
            ("mini_lb.py", has("sglang_router").map(Router::PythonMiniLb)),
            ("smg", has("smg").map(Router::Smg)),
        ];
        let missing = peers.iter().filter(|(_, router)| router.is_none()).map(|(name, _)| *name).collect();
        found.extend(peers.into_iter().filter_map(|(_, router)| router));
        Ok((found, missing))
    }
}

/// A program on the path, or where Debian puts those for root.
fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn has_module(python: &Path, module: &str) -> bool {
    let output = Command::new(python).args(["-c", &format!("import {module}")]).output();
    output.is_ok_and(|output| output.status.success())
}

/// A router that answers.
pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    /// Nothing was started for [`Router::Direct`].
    pub(crate) pid: Option<u32>,
    _child: Option<Child>,
}

impl Router {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Direct => "direct",
            Self::MiniLb { name, .. } => name,
            Self::Haproxy(_) => "haproxy",
            Self::Nginx(_) => "nginx",
            Self::Sglang(_) => "sglang-router",
            Self::PythonMiniLb(_) => "mini_lb.py",
            Self::Smg(_) => "smg",
        }
    }

    /// Whether it sends a request to prefill and to decode; the others pass it on to decode.
    pub(crate) fn is_pd(&self) -> bool {
        !matches!(self, Self::Direct | Self::Haproxy(_) | Self::Nginx(_))
    }

    /// Whether it takes a fraction of a second to start; those that come with Python take several.
    pub(crate) fn starts_quickly(&self) -> bool {
        !matches!(self, Self::Sglang(_) | Self::PythonMiniLb(_) | Self::Smg(_))
    }

    /// Starts it with `workers` threads (peers have one) and waits until it answers a request.
    pub(crate) fn start(
        &self,
        servers: &Upstreams,
        workers: usize,
        cores: &[u32],
        folder: &Path,
    ) -> io::Result<Running> {
        if *self == Self::Direct {
            return Ok(Running { addr: servers.decode, pid: None, _child: None });
        }
        let port = free_port()?;
        let command = self.command(servers, port, workers, folder)?;
        let mut child = Child::start(&command, cores, folder, &format!("{}.log", self.name()))?;
        let addr = loopback(port);
        let give_up = Instant::now() + START;
        while !answers(addr)? {
            if child.has_ended() || Instant::now() > give_up {
                return Err(io::Error::other(format!("{} does not answer: see its log", self.name())));
            }
            sleep(Duration::from_millis(50));
        }
        Ok(Running { addr, pid: Some(child.pid()), _child: Some(child) })
    }

    /// Its program and arguments; its configuration is written to `folder`.
    fn command(
        &self,
        servers: &Upstreams,
        port: u16,
        workers: usize,
        folder: &Path,
    ) -> io::Result<Vec<OsString>> {
        let (prefill, decode) = (servers.prefill, servers.decode);
        let configured = |name: &str, template| fs::write(folder.join(name), filled(template, port, decode));
        let pair = format!(
            "--prefill http://{prefill} 8998 --decode http://{decode} --host 127.0.0.1 --port {port}"
        );
        let python = format!("--pd-disaggregation {pair} --policy random --log-level error");
        let (program, arguments) = match self {
            Self::Direct => return Err(io::Error::other("nothing to start")),
            Self::MiniLb { program, .. } => {
                (program, format!("{pair} --worker-threads {workers} --log-level warn"))
            }
            Self::Haproxy(program) => {
                configured("haproxy.cfg", HAPROXY)?;
                (program, "-db -f haproxy.cfg".to_owned())
            }
            Self::Nginx(program) => {
                configured("nginx.conf", NGINX)?;
                (program, "-e stderr -c nginx.conf -p .".to_owned())
            }
            Self::Sglang(program) => {
                (program, format!("-m sglang_router.launch_router {python} {}", gateway()?))
            }
            Self::PythonMiniLb(program) => {
                (program, format!("-m sglang_router.launch_router --mini-lb {python}"))
            }
            Self::Smg(program) => (program, format!("-m smg.launch_router {python} {}", gateway()?)),
        };
        let arguments = arguments.split_whitespace().map(OsString::from);
        Ok([OsString::from(program)].into_iter().chain(arguments).collect())
    }
}

/// What sglang-router and smg have in common beyond Python's router.
fn gateway() -> io::Result<String> {
    let port = free_port()?;
    Ok(format!("--prometheus-port {port} --max-concurrent-requests 20000 --worker-startup-check-interval 1"))
}

/// Whether a chat request is answered as it should be.
fn answers(addr: SocketAddr) -> io::Result<bool> {
    let request = Request::new(addr, Kind::Chat, 300, 1);
    if std::net::TcpStream::connect(addr).is_err() {
        return Ok(false);
    }
    let mut load = Load::new(addr, request, 1, Duration::ZERO);
    load.until = crate::load::Until::Count(1);
    Ok(block_on(load.run())??.requests == 1)
}

/// A configuration in which the ports are still missing.
fn filled(template: &str, port: u16, decode: SocketAddr) -> String {
    template.replace("@PORT@", &port.to_string()).replace("@DECODE@", &decode.to_string())
}
