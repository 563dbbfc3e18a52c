//! The built program with its arguments, configuration file, log and exit status.

use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use super::{Client, TIMEOUT, engine};

/// A folder of a test's own, removed with it.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        // Tests of several files may be in one process and choose the same name.
        for number in 0.. {
            let folder = format!("{name}-{}-{number}", std::process::id());
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
            match std::fs::create_dir(&path) {
                Ok(()) => return Self(path),
                Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{}", path.display()),
            }
        }
        unreachable!("a folder for each number")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file whole, or not at all, as careful editors do.
    pub fn put(&self, name: &str, text: &str) -> PathBuf {
        let (new, path) = (self.path(&format!("{name}.new")), self.path(name));
        std::fs::write(&new, text).expect("a file");
        std::fs::rename(new, &path).expect("a file in its place");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// The program with these arguments, and without `MINI_LB_` variables that the test did not set.
pub fn command<'a>(args: impl IntoIterator<Item = &'a str>, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mini-lb"));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("MINI_LB_")) {
            command.env_remove(name);
        }
    }
    command.args(args).args(engine::args()).envs(variables.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for the program to exit.
fn ended(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().ok();
            panic!("the program still runs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The output of a program that exits by itself and prints less than a pipe holds.
pub fn output<'a>(args: impl IntoIterator<Item = &'a str>, variables: &[(&str, &str)]) -> Output {
    let mut child = command(args, variables).spawn().expect("the program starts");
    ended(&mut child);
    child.wait_with_output().expect("a child")
}

/// A program that keeps running; killed when it is dropped.
pub struct Program {
    child: Child,
    /// Lines of the log that were not read yet.
    pub lines: Receiver<String>,
}

impl Program {
    pub fn start<'a>(args: impl IntoIterator<Item = &'a str>) -> Self {
        Self::run(command(args, &[]))
    }

    /// Starts a command that was made by [`command`].
    pub fn run(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { child, lines }
    }

    /// Waits for a line of the log and drops those before it.
    pub fn wait_for(&self, part: &str) -> String {
        let deadline = Instant::now() + TIMEOUT;
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(part) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("no line with {part:?} ({error}) after {seen:?}"),
            }
        }
    }

    pub fn send(&self, signal: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(id).status();
        assert!(sent.expect("kill").success());
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Waits for it to exit.
    pub fn exit_code(&mut self) -> Option<i32> {
        ended(&mut self.child).code()
    }

    /// Makes it reload its configuration. Returns the line that it logs about it.
    pub fn reload(&self) -> String {
        self.send("HUP");
        self.wait_for(" (SIGHUP)")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub use super::free_port;

/// A configuration file with both servers and `line`, which replaces the line of the same key.
pub fn file_with(line: &str) -> String {
    let servers = ["prefill = [[\"http://127.0.0.1:1\", 8998]]", "decode = [\"http://127.0.0.1:2\"]"];
    let key = line.split(' ').next().unwrap_or_default();
    let kept = servers.iter().filter(|server| server.split(' ').next() != Some(key));
    kept.copied().chain([line]).collect::<Vec<_>>().join("\n") + "\n"
}

/// Connects to the program as soon as it listens.
pub async fn client(port: u16) -> Client {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    super::with_timeout("the program's listener", async {
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    Client::connect(address).await
}
