//! What tests of whole programs share: simulated servers, the built router in front of them, child processes that
//! cannot outlive their test, and the client packages that setup.sh installs.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use loadtest::sim::{Sim, SimConfig, SimPair};
use tokio::runtime::Runtime;

/// No step takes anywhere near this long; it only bounds a test that fails.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// Downloads are the exception.
const INSTALL_DEADLINE: Duration = Duration::from_secs(600);
/// Builds as well.
pub const BUILD_DEADLINE: Duration = Duration::from_secs(1_800);
/// How often a condition is looked at that nothing announces.
const LOOK: Duration = Duration::from_millis(2);

/// Waits until something is so.
pub fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(LOOK);
    }
}

/// A prefill and a decode server, and one that does both.
pub struct Servers {
    pub pair: SimPair,
    pub alone: Sim,
    /// Last, so that it ends after the servers.
    _runtime: Runtime,
}

impl Servers {
    /// With a change to each server's configuration. Timeouts and polls take a tenth of their time.
    pub fn start(change: impl Fn(SimConfig) -> SimConfig) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let quick = |config: SimConfig| change(SimConfig { time_scale: 0.1, ..config });
        let servers = runtime.block_on(async {
            let pair = SimPair::start(quick(SimConfig::prefill()), quick(SimConfig::decode())).await?;
            io::Result::Ok((pair, Sim::start(quick(SimConfig::default())).await?))
        });
        let (pair, alone) = servers.expect("free ports");
        Self { pair, alone, _runtime: runtime }
    }
}

/// The built router in front of [`Servers`].
pub struct Router {
    pub url: String,
    _program: Program,
}

impl Router {
    pub fn start(servers: &Servers) -> Self {
        let bootstrap = servers.pair.prefill.bootstrap_port().expect("a bootstrap port").to_string();
        // Another process may take a free port before the router does.
        for _ in 0..5 {
            let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
            let port = free.expect("a free port").port().to_string();
            let mut command = Command::new(env!("CARGO_BIN_EXE_mini-lb"));
            command.args(["--host", "127.0.0.1", "--port", &port]);
            command.args(["--prefill", &servers.pair.prefill.url(), &bootstrap]);
            command.args(["--decode", &servers.pair.decode.url()]);
            let mut program = Program::start(command);
            if program.stderr.wait_for("listening on ") {
                return Self { url: format!("http://127.0.0.1:{port}"), _program: program };
            }
            assert!(program.stderr.text().contains("in use"), "{}", program.stderr.text());
        }
        panic!("every free port was taken by others");
    }
}

/// A child process, killed with its test.
pub struct Program {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    pub stdout: Pipe,
    pub stderr: Pipe,
}

impl Program {
    pub fn start(command: Command) -> Self {
        Self::try_start(command).expect("the program is there")
    }

    fn try_start(mut command: Command) -> io::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let name = command.get_program().to_string_lossy().into_owned();
        let stdout = Pipe::new(child.stdout.take().expect("a pipe"));
        let stderr = Pipe::new(child.stderr.take().expect("a pipe"));
        Ok(Self { name, stdin: child.stdin.take(), child, stdout, stderr })
    }

    /// Waits for a text on stdout.
    pub fn wait_for(&mut self, text: &str) {
        let found = self.stdout.wait_for(text);
        assert!(found, "{} never said {text:?}: {}", self.name, self.said());
    }

    /// Writes an empty line to stdin.
    pub fn go_on(&mut self) {
        self.stdin.as_mut().expect("stdin is open").write_all(b"\n").expect("the program reads");
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(status.expect("kill is there").success());
    }

    /// Waits for the program's end.
    pub fn end(&mut self) -> ExitStatus {
        self.end_within(DEADLINE)
    }

    pub fn end_within(&mut self, limit: Duration) -> ExitStatus {
        drop(self.stdin.take());
        let deadline = Instant::now() + limit;
        while self.is_running() {
            assert!(Instant::now() < deadline, "{} still runs: {}", self.name, self.said());
            thread::sleep(LOOK);
        }
        self.stdout.read_to_end();
        self.stderr.read_to_end();
        self.child.wait().expect("a child")
    }

    /// Waits for the program's end, which must be a success, and returns what it wrote to stdout.
    pub fn succeed(&mut self) -> String {
        let status = self.end();
        assert!(status.success(), "{}: {status}\n{}", self.name, self.said());
        self.stdout.text()
    }

    /// Everything so far, for a message.
    pub fn said(&self) -> String {
        format!("stdout:\n{}\nstderr:\n{}", self.stdout.text(), self.stderr.text())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program writes.
pub struct Pipe {
    pieces: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// Where in `seen` each piece ended.
    ends: Vec<usize>,
}

impl Pipe {
    fn new(mut pipe: impl Read + Send + 'static) -> Self {
        let (sender, pieces) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 8 << 10];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { pieces, seen: Vec::new(), ends: Vec::new() }
    }

    /// Returns whether there was one more piece before the end, or before the deadline.
    fn read(&mut self, deadline: Instant) -> bool {
        let piece = self.pieces.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        self.seen.extend_from_slice(piece.as_deref().unwrap_or_default());
        self.ends.push(self.seen.len());
        piece.is_ok()
    }

    fn read_to_end(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while self.read(deadline) {}
    }

    /// Reads until a text is there; returns whether it ever was.
    pub fn wait_for(&mut self, text: &str) -> bool {
        let deadline = Instant::now() + DEADLINE;
        while !self.text().contains(text) {
            if !self.read(deadline) {
                return false;
            }
        }
        true
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// In how many pieces a part of the output came.
    pub fn pieces_of(&self, part: &str) -> usize {
        let start = self.text().find(part).expect("the part is there");
        1 + self.ends.iter().filter(|end| (start + 1..start + part.len()).contains(*end)).count()
    }
}

/// A program that talks to servers on this machine, its arguments and its environment.
pub fn command<'a>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = &'a str>,
    environment: &[(&str, &str)],
) -> Command {
    let mut command = Command::new(program);
    command.args(args).envs(environment.iter().copied());
    // Whatever proxy there is, it is not for these servers.
    command.env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
    command
}

/// Where the built program is.
pub fn target() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_mini-lb")).parent().expect("a folder")
}

/// A Python with the client packages; `None`, after a note, where there cannot be one.
pub fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    PYTHON.get_or_init(|| install("python")).as_deref()
}

/// A folder with Node's client packages and the scripts; `None`, after a note, where there cannot be one.
pub fn node() -> Option<&'static Path> {
    static NODE: OnceLock<Option<PathBuf>> = OnceLock::new();
    NODE.get_or_init(|| install("node")).as_deref()
}

fn install(what: &str) -> Option<PathBuf> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/setup.sh");
    let folder = target().parent().expect("a target folder").join("clients");
    let mut command = Command::new("bash");
    command.args([OsStr::new(script), OsStr::new(what), folder.as_os_str()]);
    let Ok(mut program) = Program::try_start(command) else { return missing("bash is not installed") };
    if program.end_within(INSTALL_DEADLINE).success() {
        return Some(PathBuf::from(program.stdout.text().trim_end()));
    }
    missing(&program.stderr.text())
}

/// Whoever has only Rust must be able to run all tests; where nothing may be left out, `CI` is set.
pub fn missing<T>(why: &str) -> Option<T> {
    assert!(std::env::var_os("CI").is_none_or(|ci| ci.is_empty()), "CI is set, and {why}");
    let last = why.trim_end().lines().last().unwrap_or_default();
    // Not `eprintln!`, which is not shown for a test that passes.
    let _ = writeln!(io::stderr(), "NOT TESTED with real clients: {last} (a failure if CI is set)");
    None
}
