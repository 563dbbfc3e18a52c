//! The built program between scripted servers, for tests of what it logs and exports.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Client, ScriptedServer, engine, free_port, with_timeout};

/// Killed when it is dropped.
pub struct RouterProcess {
    child: Child,
    address: SocketAddr,
    lines: Arc<Mutex<Vec<String>>>,
}

impl RouterProcess {
    /// Starts the program without health checks and waits until it listens. `args` follow the arguments of
    /// every test.
    pub async fn start(prefill: &str, decode: &str, args: &[&str]) -> Self {
        let quiet = ["--disable-health-check"];
        Self::start_probing(prefill, decode, &[&quiet, args].concat()).await
    }

    /// The same with health checks.
    pub async fn start_probing(prefill: &str, decode: &str, args: &[&str]) -> Self {
        Self::spawn(prefill, decode, args).listening(args).await
    }

    /// The program in front of plain servers, without health checks.
    pub async fn start_plain(urls: &[String], args: &[&str]) -> Self {
        let servers = ["--worker-urls"].into_iter().chain(urls.iter().map(String::as_str));
        let args = [&["--disable-health-check"], args].concat();
        Self::spawn_with(&servers.collect::<Vec<_>>(), &args).listening(&args).await
    }

    async fn listening(self, args: &[&str]) -> Self {
        let mut program = self;
        // A successful connect is not enough: another process may have taken the port in between.
        let says_so = !args.contains(&"warn");
        with_timeout("the program to listen", async {
            while !match says_so {
                true => program.lines().iter().any(|line| line.contains("listening on ")),
                false => tokio::net::TcpStream::connect(program.address).await.is_ok(),
            } {
                let ended = program.child.try_wait().expect("a child");
                assert!(ended.is_none(), "{ended:?} {:?}", program.lines());
                pause().await;
            }
        })
        .await;
        program
    }

    pub fn spawn(prefill: &str, decode: &str, args: &[&str]) -> Self {
        Self::spawn_with(&["--prefill", prefill, "8998", "--decode", decode], args)
    }

    pub fn spawn_with(servers: &[&str], args: &[&str]) -> Self {
        Self::spawn_in(&[], servers, args)
    }

    /// The same with these variables besides those of the test.
    pub fn spawn_in(variables: &[(&str, &str)], servers: &[&str], args: &[&str]) -> Self {
        let port = free_port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let port = port.to_string();
        let plain = ["--host", "127.0.0.1", "--port", &port];
        let quiet = ["--shutdown-lame-duck-secs", "0", "--worker-threads", "1"];
        let mut child = Command::new(env!("CARGO_BIN_EXE_mini-lb"))
            .args(servers)
            .args(plain)
            .args(quiet)
            .args(["--prometheus-port", "0"])
            .args(engine::args())
            .args(args)
            .envs(variables.iter().copied())
            // An API server's client would use it.
            .env_remove("HTTPS_PROXY")
            .env_remove("https_proxy")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the built program");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (read, stderr) = (Arc::clone(&lines), BufReader::new(child.stderr.take().expect("a pipe")));
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                read.lock().expect("no panic").push(line);
            }
        });
        Self { child, address, lines }
    }

    pub async fn between(prefill: &ScriptedServer, decode: &ScriptedServer, args: &[&str]) -> Self {
        Self::start(&prefill.url(), &decode.url(), args).await
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Of its listener for clients.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The lines logged so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("no panic").clone()
    }

    /// Waits for a line that contains `part`.
    pub async fn line(&self, part: &str) -> String {
        with_timeout(part, async {
            loop {
                if let Some(line) = self.lines().into_iter().find(|line| line.contains(part)) {
                    return line;
                }
                pause().await;
            }
        })
        .await
    }

    pub fn send(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(pid).status();
        assert!(sent.expect("kill").success());
    }

    /// Ends the program and returns all lines that it logged.
    pub async fn stop(mut self) -> Vec<String> {
        self.send("TERM");
        self.exit_code().await;
        self.lines()
    }

    pub async fn exit_code(&mut self) -> Option<i32> {
        let status = with_timeout("the program's end", async {
            loop {
                if let Some(status) = self.child.try_wait().expect("a child") {
                    return status;
                }
                pause().await;
            }
        })
        .await;
        // Its last lines may still be in the pipe.
        with_timeout("the pipe's end", async {
            while Arc::strong_count(&self.lines) > 1 {
                pause().await;
            }
        })
        .await;
        status.code()
    }
}

impl Drop for RouterProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn pause() {
    tokio::time::sleep(Duration::from_millis(2)).await;
}
