//! `mini-lb top`: the numbers of a running router, in a pipe and on a terminal that the test plays.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kit::program::Folder;
use kit::{RouterProcess, ScriptedServer, Step, TIMEOUT, free_port, json, ok_server};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

fn top(args: &[&str], width: usize) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mini-lb"));
    command.arg("top").args(args).env("COLUMNS", width.to_string()).env_remove("NO_COLOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// One table: exit code, stdout and stderr.
async fn once(args: &[&str], width: usize) -> (Option<i32>, String, String) {
    let mut command = top(&[args, &["--once"]].concat(), width);
    let output = tokio::task::spawn_blocking(move || command.output());
    let Output { status, stdout, stderr } = kit::with_timeout("one table", output).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// A router with metrics on a port of its own.
async fn router(prefill: &ScriptedServer, decode: &ScriptedServer, port: u16) -> RouterProcess {
    let port = port.to_string();
    RouterProcess::between(prefill, decode, &["--prometheus-host", "127.0.0.1", "--prometheus-port", &port])
        .await
}

fn is_printable(text: &str) -> bool {
    text.chars().all(|c| c == '\n' || c == ' ' || c.is_ascii_graphic())
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status();
    assert!(sent.unwrap().success());
}

/// Waits for the program to exit by itself.
fn exit_code(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status.code(),
            None if Instant::now() > deadline => {
                child.kill().ok();
                panic!("it still runs");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The program on a terminal of its own; killed when it is dropped.
struct Terminal {
    master: File,
    /// Kept open: a terminal that nobody has open forgets its modes, and reads from the other side fail.
    slave: File,
    child: Child,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    fn start(args: &[&str], columns: u16, rows: u16) -> Self {
        let master: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = File::options().read(true).write(true).open(path).unwrap();
        let mut command = top(args, 500);
        let end = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end());
        let master = File::from(master);
        resize(&master, columns, rows);
        let child = command.spawn().unwrap();
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut reader, to) = (master.try_clone().unwrap(), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut bytes = [0; 4_096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                to.lock().unwrap().push_str(std::str::from_utf8(&bytes[..count]).expect("ASCII"));
            }
        });
        Self { master, slave, child, shown }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    /// Waits until what was shown so far is as wanted, and returns it.
    fn wait_for(&self, what: &str, is_there: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let shown = self.shown.lock().unwrap().clone();
            if is_there(&shown) {
                return shown;
            }
            assert!(Instant::now() < deadline, "{what}: {shown:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The lines of the last whole screen, without escapes.
    fn screen(shown: &str) -> Vec<String> {
        let whole = &shown[..shown.rfind("\x1b[J").expect("a whole screen")];
        let screen = whole.rsplit("\x1b[H").next().unwrap();
        let plain = |line: &str| {
            ["\x1b[0m", "\x1b[1m", "\x1b[31m", "\x1b[K"]
                .iter()
                .fold(line.to_owned(), |text, one| text.replace(one, ""))
        };
        screen.split('\n').map(|line| plain(line.trim_end_matches('\r'))).collect()
    }

    /// It has ended as the user wished, and the terminal is as it was.
    fn has_left(mut self) {
        assert_eq!(exit_code(&mut self.child), Some(0));
        assert!(!self.is_raw(), "echo and lines are back");
        self.wait_for("the screen of before", |shown| shown.ends_with("\x1b[?7h\x1b[?25h\x1b[?1049l"));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn resize(master: &File, columns: u16, rows: u16) {
    tcsetwinsize(master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_table_has_servers_rates_times_and_errors() {
    let prefill = ok_server().await;
    let decode = ScriptedServer::start(|seen| {
        vec![Step::Send(match seen.body.windows(3).any(|part| part == b"bad") {
            true => json("400 Bad Request", "{}"),
            false => json("200 OK", kit::OK),
        })]
    })
    .await;
    let port = free_port();
    let router = router(&prefill, &decode, port).await;
    let url = format!("http://127.0.0.1:{port}/ui");
    // Requests all the while: what is shown is the time between two polls.
    let mut client = router.client().await;
    let load = async {
        loop {
            for body in [r#"{"text":"a"}"#, r#"{"text":"bad"}"#] {
                client.post("/generate", body).await;
            }
        }
    };
    let args = [url.as_str()];
    let (code, text, said) = tokio::select! {
        table = once(&args, 120) => table,
        () = load => unreachable!("it ends with the table"),
    };
    assert_eq!((code, said.as_str()), (Some(0), ""), "{text}");
    assert!(is_printable(&text), "{text:?}");
    let begin = format!("mini-lb {} at http://127.0.0.1:{port}: ", env!("CARGO_PKG_VERSION"));
    assert!(text.starts_with(&begin), "{text}");
    for part in
        ["requests ", "open prefill ", "duration p50 ", "first byte p50 ", "answered 400 (", "memory "]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("requests -") && !text.contains("requests 0/s"), "{text}");
    let row = |server: &ScriptedServer| {
        let row = text.lines().find(|line| line.starts_with(&format!("{} ", server.address())));
        row.unwrap_or_else(|| panic!("{} in {text}", server.address())).split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(row(&prefill)[1], "prefill");
    assert_eq!(row(&decode)[1], "decode");
    assert!(text.contains("refused "), "a failure of a server: {text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_line_is_wider_than_the_window() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let port = free_port();
    let _router = router(&prefill, &decode, port).await;
    let url = format!("http://127.0.0.1:{port}");
    for width in [20, 40, 77] {
        let (code, text, _) = once(&[&url], width).await;
        assert_eq!(code, Some(0));
        assert!(text.lines().all(|line| line.len() <= width), "{width}: {text}");
        // Of the address, the end is kept.
        let end = decode.address().port().to_string();
        assert!(text.lines().any(|line| line.contains(&end)), "{width}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_is_drawn_on_and_given_back() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let port = free_port();
    let _router = router(&prefill, &decode, port).await;
    let url = format!("http://127.0.0.1:{port}");
    let is_drawn = |shown: &str| shown.contains("SERVER") && shown.ends_with("\x1b[J");
    for end in [&b"xyz q"[..], b"\x03", b"TERM"] {
        let mut terminal = Terminal::start(&[&url], 100, 30);

        let shown = terminal.wait_for("a screen", is_drawn);
        assert!(shown.starts_with("\x1b[?1049h\x1b[?25l"), "{shown:?}");
        assert!(terminal.is_raw());
        let screen = Terminal::screen(&shown);
        assert!(
            screen[0].starts_with("mini-lb ") && screen.iter().all(|line| is_printable(line)),
            "{screen:?}"
        );
        match end {
            b"TERM" => send("TERM", &terminal.child),
            keys => terminal.type_keys(keys),
        }
        terminal.has_left();
    }
    // A narrow and low window, also when it becomes so.
    let mut terminal = Terminal::start(&[&url], 100, 30);
    terminal.wait_for("a screen", is_drawn);
    resize(&terminal.master, 40, 5);
    send("WINCH", &terminal.child);
    let fits = |shown: &str| {
        let is_whole = shown.ends_with("\x1b[J");
        is_whole
            && Terminal::screen(shown).iter().all(|line| line.len() <= 40)
            && Terminal::screen(shown).len() <= 5
    };
    terminal.wait_for("a smaller screen", fits);
    terminal.type_keys(b"q");
    terminal.has_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_is_gone_is_told_and_one_that_comes_back_is_shown() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let port = free_port();
    let first = router(&prefill, &decode, port).await;
    let url = format!("http://127.0.0.1:{port}");
    let mut child = top(&[&url], 100).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let lines = Arc::new(Mutex::new(lines));
    let wait_for = |part: &'static str| {
        let lines = Arc::clone(&lines);
        let wait = tokio::task::spawn_blocking(move || {
            let mut lines = lines.lock().unwrap();
            lines.by_ref().map_while(Result::ok).find(|line| line.contains(part)).expect("more lines")
        });
        kit::with_timeout(part, wait)
    };
    assert!(wait_for("mini-lb ").await.unwrap().contains(": ready, up "));
    first.stop().await;
    let line = wait_for("error: ").await.unwrap();
    assert!(line.starts_with(&format!("error: {url} cannot be reached (")), "{line}");
    // The last numbers stay below.
    wait_for("SERVER").await.unwrap();
    let second = router(&prefill, &decode, port).await;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        assert!(Instant::now() < deadline, "the error line stays");
        // With an error, it is the second line.
        let (before, line) = (wait_for("").await.unwrap(), wait_for("").await.unwrap());
        if before.is_empty() && line.contains(": ready, up ") {
            break;
        }
    }
    drop(second);
    send("INT", &child);
    assert_eq!(exit_code(&mut child), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_is_in_metrics_reaches_the_terminal_as_it_is() {
    let metrics = "mini_lb_build_info{version=\"1\u{1b}[2J\"} 1\n\
                   mini_lb_backends{role=\"prefill\"} 1\n\
                   mini_lb_backend_healthy{role=\"prefill\",backend=\"http://a\u{1b}]0;x\u{7}\u{9b}\u{202e}é\\n\"} 1\n\
                   mini_lb_backend_healthy{role=\"\u{1b}c\",backend=\"b\\\\\\\"\"} 0\n\
                   mini_lb_encoder_up{encoder=\"http://\u{1b}[31m\"} 0\n\
                   mini_lb_encoder_registrations{encoder=\"http://\u{1b}[31m\",state=\"\u{1b}[1m\"} 1\n\
                   mini_lb_backend_rank_work_bytes{role=\"prefill\",backend=\"b\",dp_rank=\"\u{1b}\"} nan\n\
                   mini_lb_errors_total{code=\"\u{1b}[5m\"} 1e400\n";
    let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let server = ScriptedServer::start(move |_| {
        let count = count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let text = format!("{metrics}mini_lb_retries_total{{role=\"\u{1b}[7m\",cause=\"\u{8}\"}} {count}\n");
        let length = text.len();
        vec![Step::Send(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{text}").into())]
    })
    .await;
    let (code, text, said) = once(&[&server.url()], 200).await;
    assert_eq!((code, said.as_str()), (Some(0), ""));
    assert!(is_printable(&text), "{text:?}");
    for part in [
        r"mini-lb 1\u{1b}[2J at",
        r"a\u{1b}]0;x\u{7}\u{9b}\u{202e}\u{e9}\n",
        r#"b\""#,
        r"retried, \u{1b}[7m: \u{8} (1)",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_in_front_gets_a_key_or_a_password() {
    let server = ScriptedServer::start(|seen| {
        let known = ["Bearer secret", "Basic b3BzOnNlY3JldA=="];
        let is_known = seen.head.header("authorization").is_some_and(|value| known.contains(&value));
        let body = "mini_lb_build_info{version=\"7\"} 1\n";
        vec![Step::Send(if is_known { json("200 OK", body) } else { json("401 Unauthorized", "{}") })]
    })
    .await;
    let folder = Folder::new("top");
    let key = folder.put("key", "secret\n");
    let (url, key) = (server.url(), key.to_str().unwrap());
    let (code, text, said) = once(&[&url], 100).await;
    assert_eq!((code, text.as_str()), (Some(1), ""));
    assert_eq!(said, format!("error: {url} wants a key (401): see --admin-api-key-file\n"));
    let with_password = url.replace("http://", "http://ops:secret@");
    for args in [&[url.as_str(), "--admin-api-key-file", key][..], &[&with_password]] {
        let (code, text, said) = once(args, 100).await;
        assert_eq!((code, said.as_str()), (Some(0), ""), "{args:?}");
        assert!(text.starts_with(&format!("mini-lb 7 at {url}: ")) && !text.contains("secret"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_one_sentence() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let down = format!("http://127.0.0.1:{}", free_port());
    let other = ScriptedServer::always(json("200 OK", "python_info 1\n")).await;
    let clients = free_port();
    let clients = clients.to_string();
    let _router = RouterProcess::between(&prefill, &decode, &["--port", &clients]).await;
    let clients = format!("http://127.0.0.1:{clients}");
    let listener = "the admin listener is at the router's --prometheus-host and --prometheus-port";
    for (args, code, sentence) in [
        (
            vec![down.clone()],
            1,
            format!("{down} cannot be reached ({listener}): Connection refused (os error 111)"),
        ),
        (vec![clients.clone()], 1, format!("{clients} has no /metrics ({listener}): 404")),
        (vec![other.url()], 1, format!("{}: its /metrics are not those of mini-lb", other.url())),
        (
            vec!["127.0.0.1:29000".into()],
            2,
            "127.0.0.1:29000: the router's URL must begin with http://".into(),
        ),
        (
            vec!["https://a:1".into()],
            2,
            "https://a:1: the admin listener speaks http only; use http://, through a tunnel if need be"
                .into(),
        ),
        (
            vec!["--admin-api-key-file".into(), "/nowhere".into()],
            2,
            "--admin-api-key-file /nowhere: No such file or directory (os error 2)".into(),
        ),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (ended, text, said) = once(&args, 100).await;
        assert_eq!((ended, text.as_str(), said), (Some(code), "", format!("error: {sentence}\n")));
    }
    let (code, text, _) = once(&["--help"], 100).await;
    assert_eq!(code, Some(0));
    assert!(text.contains("Usage: mini-lb top [OPTIONS] [URL]"), "{text}");
}
