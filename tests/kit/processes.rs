//! Whole programs: child processes that cannot outlive their test, the built router in front of simulated
//! servers, and the client packages that `real_clients/setup.sh` installs.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use loadtest::sim::{Sim, SimConfig, SimPair};
use tokio::runtime::Runtime;

use super::{engine, free_port};

/// Far longer than any step takes; bounds a test that fails.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// For steps that download packages.
const INSTALL_DEADLINE: Duration = Duration::from_secs(600);
/// For steps that build with cargo.
pub const BUILD_DEADLINE: Duration = Duration::from_secs(1_800);
/// How often a condition is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Waits until a condition holds.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// A prefill and a decode server, and a single one that does both.
pub struct Servers {
    pub pair: SimPair,
    pub single: Sim,
    /// The last field, so that it is dropped after the servers.
    _runtime: Runtime,
}

impl Servers {
    /// Starts the servers, each with its configuration changed by `change`. Simulated times are a tenth of
    /// SGLang's.
    pub fn start(change: impl Fn(SimConfig) -> SimConfig) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let quick = |config: SimConfig| change(SimConfig { time_scale: 0.1, ..config });
        let servers = runtime.block_on(async {
            let pair = SimPair::start(quick(SimConfig::prefill()), quick(SimConfig::decode())).await?;
            io::Result::Ok((pair, Sim::start(quick(SimConfig::default())).await?))
        });
        let (pair, single) = servers.expect("free ports");
        Self { pair, single, _runtime: runtime }
    }
}

/// The built router in front of [`Servers`].
pub struct BuiltRouter {
    pub url: String,
    _program: ChildProcess,
}

impl BuiltRouter {
    pub fn start(servers: &Servers) -> Self {
        let bootstrap = servers.pair.prefill.bootstrap_port().expect("a bootstrap port").to_string();
        // Another process may take a free port before the router does.
        for _ in 0..5 {
            let port = free_port().to_string();
            let mut command = Command::new(env!("CARGO_BIN_EXE_mini-lb"));
            command.args(["--host", "127.0.0.1", "--port", &port]);
            command.args(["--prefill", &servers.pair.prefill.url(), &bootstrap]);
            command.args(["--decode", &servers.pair.decode.url()]).args(engine::args());
            let mut program = ChildProcess::start(command);
            if program.stderr.wait_for("listening on ") {
                return Self { url: format!("http://127.0.0.1:{port}"), _program: program };
            }
            assert!(program.stderr.text().contains("in use"), "{}", program.stderr.text());
        }
        panic!("every free port was taken by others");
    }
}

/// A child process, killed when it is dropped.
pub struct ChildProcess {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    pub stdout: Pipe,
    pub stderr: Pipe,
}

impl ChildProcess {
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
        assert!(found, "{} never said {text:?}: {}", self.name, self.output());
    }

    /// Writes an empty line to its stdin.
    pub fn send_newline(&mut self) {
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

    /// Waits for it to exit.
    pub fn wait(&mut self) -> ExitStatus {
        self.wait_within(DEADLINE)
    }

    pub fn wait_within(&mut self, limit: Duration) -> ExitStatus {
        drop(self.stdin.take());
        let deadline = Instant::now() + limit;
        while self.is_running() {
            assert!(Instant::now() < deadline, "{} still runs: {}", self.name, self.output());
            thread::sleep(POLL_INTERVAL);
        }
        self.stdout.read_to_end();
        self.stderr.read_to_end();
        self.child.wait().expect("a child")
    }

    /// Waits for it to exit with success, and returns its stdout.
    pub fn expect_success(&mut self) -> String {
        let status = self.wait();
        assert!(status.success(), "{}: {status}\n{}", self.name, self.output());
        self.stdout.text()
    }

    /// Its output so far, for a panic message.
    pub fn output(&self) -> String {
        format!("stdout:\n{}\nstderr:\n{}", self.stdout.text(), self.stderr.text())
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The output of a program.
pub struct Pipe {
    pieces: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// Offsets in `seen` at which each read ended.
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

    /// Reads once more. Returns false at the end of the output or at the deadline.
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

    /// Reads until the output contains a text; returns whether it does.
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

    /// In how many reads a part of the output arrived.
    pub fn chunks_in(&self, part: &str) -> usize {
        let start = self.text().find(part).expect("the part is there");
        1 + self.ends.iter().filter(|end| (start + 1..start + part.len()).contains(*end)).count()
    }
}

/// A command that connects to servers on this machine.
pub fn command<'a>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = &'a str>,
    environment: &[(&str, &str)],
) -> Command {
    let mut command = Command::new(program);
    command.args(args).envs(environment.iter().copied());
    // A proxy of the environment must not be used for these servers.
    command.env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
    command
}

/// The folder of the built program.
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
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real_clients/setup.sh");
    let folder = target().parent().expect("a target folder").join("clients");
    let mut command = Command::new("bash");
    command.args([OsStr::new(script), OsStr::new(what), folder.as_os_str()]);
    let Ok(mut program) = ChildProcess::try_start(command) else { return missing("bash is not installed") };
    if program.wait_within(INSTALL_DEADLINE).success() {
        return Some(PathBuf::from(program.stdout.text().trim_end()));
    }
    missing(&program.stderr.text())
}

/// Skips a test whose tool is missing, so that Rust alone is enough to run the tests. Fails instead if `CI`
/// is set.
pub fn missing<T>(why: &str) -> Option<T> {
    assert!(std::env::var_os("CI").is_none_or(|ci| ci.is_empty()), "CI is set, and {why}");
    let last = why.trim_end().lines().last().unwrap_or_default();
    // Not `eprintln!`, which is not shown for a test that passes.
    let _ = writeln!(io::stderr(), "NOT TESTED with real clients: {last} (a failure if CI is set)");
    None
}
