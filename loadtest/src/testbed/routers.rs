//! The routers under comparison: where they are, how each is started, and when it is ready.
//!
//! Each is configured for speed as its own documentation says: one thread, keep-alive, no logs, no buffering
//! of streams.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Backends, Child, block_on, free_port, loopback};
use crate::load::{Load, Request, RequestKind};

/// A router that is not ready after this time has failed: Python routers need several seconds.
const START_TIMEOUT: Duration = Duration::from_secs(40);

/// The row of this router with its other HTTP/1.1 engine.
pub(crate) const HYPER: &str = "mini-lb (hyper)";
/// The row of the bare relay.
pub(crate) const FLOOR: &str = "floor";
/// Its row in front of a plain server: what a reverse proxy does.
pub(crate) const ONE_LEG: &str = "mini-lb (one leg)";

const HAPROXY: &str = include_str!("../../assets/haproxy.cfg");
const NGINX: &str = include_str!("../../assets/nginx.conf");

/// A router, or none, between generator and backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Router {
    /// No router: the generator sends to decode. The lower bound of every latency.
    Direct,
    /// A build of this project, with its flags besides those that all have.
    MiniLb { name: String, program: PathBuf, flags: &'static str },
    /// This project's router in front of decode alone, as if that were a plain server.
    OneLeg(PathBuf),
    /// [`crate::floor`], by this program.
    Floor(PathBuf),
    /// A plain reverse proxy of decode.
    Haproxy(PathBuf),
    /// A plain reverse proxy of decode.
    Nginx(PathBuf),
    /// The Rust router of the PyPI package `sglang-router`.
    Sglang(PathBuf),
    /// The Python router of the same package.
    PythonMiniLb(PathBuf),
    /// The successor of sglang-router.
    Smg(PathBuf),
}

/// Where to find the routers.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RouterPaths {
    /// The mini-lb program to measure [default: `mini-lb` in this program's folder].
    #[arg(long, value_name = "PATH")]
    mini_lb: Option<PathBuf>,
    /// Another build of mini-lb, as a row of its own; may be repeated.
    #[arg(long, value_name = "NAME=PATH")]
    also: Vec<String>,
    /// A Python environment that has sglang-router and smg.
    #[arg(long, value_name = "FOLDER", default_value = "target/peers")]
    peers: PathBuf,
}

impl RouterPaths {
    /// This project's router.
    pub(crate) fn mini_lb(&self) -> io::Result<Router> {
        Ok(Router::MiniLb { name: "mini-lb".to_owned(), program: self.program()?, flags: "" })
    }

    /// The same program with hyper's HTTP/1.1 instead of its own.
    fn mini_lb_on_hyper(&self) -> io::Result<Router> {
        let program = self.program()?;
        Ok(Router::MiniLb { name: HYPER.to_owned(), program, flags: "--http1-engine hyper" })
    }

    fn program(&self) -> io::Result<PathBuf> {
        let beside = std::env::current_exe()?.with_file_name("mini-lb");
        fs::canonicalize(self.mini_lb.as_ref().unwrap_or(&beside)).map_err(|error| {
            io::Error::other(format!("no mini-lb ({error}): build it with `cargo build --release`"))
        })
    }

    /// All routers that are installed, and the names of the peers that are not.
    pub(crate) fn find(&self) -> io::Result<(Vec<Router>, Vec<&'static str>)> {
        let one_leg = Router::OneLeg(self.program()?);
        let floor = Router::Floor(std::env::current_exe()?);
        let mut found = vec![Router::Direct, floor, self.mini_lb()?, self.mini_lb_on_hyper()?, one_leg];
        for also in &self.also {
            let (name, path) =
                also.split_once('=').ok_or_else(|| io::Error::other("--also expects NAME=PATH"))?;
            let program = fs::canonicalize(path)?;
            found.push(Router::MiniLb { name: name.to_owned(), program, flags: "" });
        }
        let python = fs::canonicalize(&self.peers).ok().map(|folder| folder.join("bin/python"));
        let has = |module: &str| python.clone().filter(|python| has_module(python, module));
        let peers = [
            ("haproxy", find_program("haproxy").map(Router::Haproxy)),
            ("nginx", find_program("nginx").map(Router::Nginx)),
            ("sglang-router", has("sglang_router").map(Router::Sglang)),
            ("mini_lb.py", has("sglang_router").map(Router::PythonMiniLb)),
            ("smg", has("smg").map(Router::Smg)),
        ];
        let missing = peers.iter().filter(|(_, router)| router.is_none()).map(|(name, _)| *name).collect();
        found.extend(peers.into_iter().filter_map(|(_, router)| router));
        Ok((found, missing))
    }
}

/// Finds a program on the PATH or in the folders that Debian adds for root only.
fn find_program(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn has_module(python: &Path, module: &str) -> bool {
    let output = Command::new(python).args(["-c", &format!("import {module}")]).output();
    output.is_ok_and(|output| output.status.success())
}

/// A router that is ready.
pub(crate) struct RunningRouter {
    pub(crate) addr: SocketAddr,
    /// None for [`Router::Direct`], which starts nothing.
    pub(crate) pid: Option<u32>,
    _process: Option<Child>,
}

impl Router {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Direct => "direct",
            Self::MiniLb { name, .. } => name,
            Self::OneLeg(_) => ONE_LEG,
            Self::Floor(_) => FLOOR,
            Self::Haproxy(_) => "haproxy",
            Self::Nginx(_) => "nginx",
            Self::Sglang(_) => "sglang-router",
            Self::PythonMiniLb(_) => "mini_lb.py",
            Self::Smg(_) => "smg",
        }
    }

    /// Whether it sends a request to prefill and to decode. The others forward it to decode only.
    pub(crate) fn is_pd(&self) -> bool {
        !matches!(self, Self::Direct | Self::OneLeg(_) | Self::Haproxy(_) | Self::Nginx(_))
    }

    /// Whether it starts in a fraction of a second. Python routers take several seconds, which limits how
    /// often each can be measured.
    pub(crate) fn starts_quickly(&self) -> bool {
        !matches!(self, Self::Sglang(_) | Self::PythonMiniLb(_) | Self::Smg(_))
    }

    /// Starts it with `workers` threads (peers have one) and waits until a request succeeds.
    pub(crate) fn start(
        &self,
        servers: &Backends,
        workers: usize,
        cores: &[u32],
        folder: &Path,
    ) -> io::Result<RunningRouter> {
        if *self == Self::Direct {
            return Ok(RunningRouter { addr: servers.decode, pid: None, _process: None });
        }
        let port = free_port()?;
        let command = self.command(servers, port, workers, folder)?;
        let mut child = Child::start(&command, cores, folder, &format!("{}.log", self.name()))?;
        let addr = loopback(port);
        let deadline = Instant::now() + START_TIMEOUT;
        while !responds(addr)? {
            if child.has_exited() || Instant::now() > deadline {
                return Err(io::Error::other(format!("{} does not respond: see its log", self.name())));
            }
            sleep(Duration::from_millis(50));
        }
        Ok(RunningRouter { addr, pid: Some(child.pid()), _process: Some(child) })
    }

    /// Its program and arguments. Writes its configuration file, if it needs one, to `folder`.
    fn command(
        &self,
        servers: &Backends,
        port: u16,
        workers: usize,
        folder: &Path,
    ) -> io::Result<Vec<OsString>> {
        let (prefill, decode) = (servers.prefill, servers.decode);
        let configured = |name: &str, template| fs::write(folder.join(name), fill_in(template, port, decode));
        let pair = format!(
            "--prefill http://{prefill} 8998 --decode http://{decode} --host 127.0.0.1 --port {port}"
        );
        let python = format!("--pd-disaggregation {pair} --policy random --log-level error");
        let (program, arguments) = match self {
            Self::Direct => return Err(io::Error::other("nothing to start")),
            Self::MiniLb { program, flags, .. } => {
                (program, format!("{pair} --worker-threads {workers} --log-level warn {flags}"))
            }
            Self::OneLeg(program) => {
                let server = format!("--worker-urls http://{decode} --host 127.0.0.1 --port {port}");
                (program, format!("{server} --worker-threads {workers} --log-level warn"))
            }
            Self::Floor(program) => {
                (program, format!("floor --port {port} --prefill {prefill} --decode {decode}"))
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
                (program, format!("-m sglang_router.launch_router {python} {}", gateway_flags()?))
            }
            Self::PythonMiniLb(program) => {
                (program, format!("-m sglang_router.launch_router --mini-lb {python}"))
            }
            Self::Smg(program) => (program, format!("-m smg.launch_router {python} {}", gateway_flags()?)),
        };
        let arguments = arguments.split_whitespace().map(OsString::from);
        Ok([OsString::from(program)].into_iter().chain(arguments).collect())
    }
}

/// Flags that only sglang-router and smg have, not the Python router.
fn gateway_flags() -> io::Result<String> {
    let port = free_port()?;
    Ok(format!("--prometheus-port {port} --max-concurrent-requests 20000 --worker-startup-check-interval 1"))
}

/// Whether a chat request gets a complete and correct response.
fn responds(addr: SocketAddr) -> io::Result<bool> {
    let request = Request::new(addr, RequestKind::Chat, 300, 1);
    if std::net::TcpStream::connect(addr).is_err() {
        return Ok(false);
    }
    let mut load = Load::new(addr, request, 1, Duration::ZERO);
    load.until = crate::load::Until::Count(1);
    Ok(block_on(load.run())??.requests == 1)
}

/// Fills the ports into a configuration template.
fn fill_in(template: &str, port: u16, decode: SocketAddr) -> String {
    template.replace("@PORT@", &port.to_string()).replace("@DECODE@", &decode.to_string())
}
