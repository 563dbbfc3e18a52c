//! The README is true: its commands are run, its flags and codes exist.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

fn file(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect(path)
}

/// The commands in the README, one a `sh` block.
fn commands() -> Vec<String> {
    let readme = file("README.md");
    let blocks = readme.split("```sh\n").skip(1).map(|rest| rest.split("```").next().expect("a block's end"));
    blocks.map(|block| block.trim().to_owned()).collect()
}

/// Each command, and who runs it.
const RUN_BY: [(&str, &str); 5] = [
    ("cargo run --release --example quickstart", ".ci/release, with `-- --once`"),
    ("cargo test --workspace", ".ci/run"),
    ("cargo build --release", ".ci/release"),
    (SERVE, "the test below"),
    ("python examples/python_client.py http://127.0.0.1:8000", "tests/examples.rs, on a free port"),
];

const SERVE: &str =
    "target/release/mini-lb --prefill http://prefill-1:30000 8998 --decode http://decode-1:30000 --port 8000";

#[test]
fn every_command_is_run_by_a_test_or_by_ci() {
    let known: Vec<&str> = RUN_BY.iter().map(|(command, _)| *command).collect();
    assert_eq!(commands(), known);
    let ci = file(".ci/run") + &file(".ci/release");
    for part in
        ["cargo test --workspace", "cargo build --release", "--example quickstart -- --once", ".ci/release"]
    {
        assert!(ci.contains(part), "{part}");
    }
    assert!(file("tests/examples.rs").contains("python_client.py"));
}

/// Ends the process when a test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn the_line_for_a_real_pair_starts_a_router() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut words = SERVE.split(' ').skip(1).collect::<Vec<_>>();
    let free = port.to_string();
    *words.last_mut().unwrap() = &free;
    let router =
        Command::new(env!("CARGO_BIN_EXE_mini-lb")).args(words).args(["--host", "127.0.0.1"]).spawn();
    let _router = Running(router.unwrap());
    let give_up = Instant::now() + Duration::from_secs(20);
    let mut stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < give_up, "{error}"),
        }
        std::thread::yield_now();
    };
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[test]
fn the_configuration_file_is_a_good_one() {
    let readme = file("README.md");
    let text = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("readme-{}.toml", std::process::id()));
    fs::write(&path, text).unwrap();
    let checked =
        Command::new(env!("CARGO_BIN_EXE_mini-lb")).arg("--check-config").arg("--config").arg(&path).output();
    fs::remove_file(&path).unwrap();
    let checked = checked.unwrap();
    assert_eq!(String::from_utf8(checked.stderr).unwrap(), "");
    let printed = String::from_utf8(checked.stdout).unwrap();
    assert!(printed.contains("\nport = 8000  # ") && printed.contains("\nretry_on_status = [429, 503]  # "));
    assert!(printed.contains("[\"http://prefill-3:30000\", 8998]]  # "), "{printed}");
}

/// The list in the README is the library's.
#[test]
fn what_needs_a_restart_is_what_the_source_says() {
    let readme = file("README.md");
    let list = readme.split("After a restart only: ").nth(1).unwrap().split(".\n").next().unwrap();
    let documented: BTreeSet<&str> = list.split('`').skip(1).step_by(2).collect();
    let source = file("src/config/reload.rs");
    let calls = source.split("after_restart(\"").skip(1).map(|rest| rest.split('"').next().unwrap());
    assert_eq!(documented, calls.chain(["log-level", "log-format", "log-dir"]).collect());
}

/// The words of `text` that begin with `--`.
fn flags(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '-';
    let words = text.split(|c: char| !is_part(c)).filter(|word| word.starts_with("--") && word.len() > 3);
    words.map(str::to_owned).collect()
}

#[test]
fn the_flags_are_those_of_the_help_text() {
    let help = Command::new(env!("CARGO_BIN_EXE_mini-lb")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let readme = file("README.md");
    let table = readme.split("### Flags").nth(1).unwrap().split("## Configuration").next().unwrap();
    let of_servers = "--disaggregation-bootstrap-port".to_owned();
    let mut in_help = flags(&help);
    in_help.remove(&of_servers);
    assert_eq!(flags(table), in_help);
}

#[test]
fn the_error_codes_are_those_of_the_source() {
    let readme = file("README.md");
    let table =
        readme.split("| `code` |").nth(1).unwrap().split("## What it does to a request").next().unwrap();
    let documented: BTreeSet<&str> = table
        .lines()
        .filter_map(|row| row.split('|').nth(1))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    let error = file("src/error.rs");
    let codes = error.split("fn code(").skip(1).map(|rest| rest.split("\n    }").next().unwrap());
    let mut in_source: BTreeSet<String> =
        codes.flat_map(|body| body.split('"').skip(1).step_by(2)).map(str::to_owned).collect();
    // The codes of answers that are made of several servers' answers.
    let endpoints = file("src/admin/endpoints.rs");
    for code in ["unhealthy", "flush_cache_failed"] {
        assert!(endpoints.contains(&format!("\"{code}\"")));
        in_source.insert(code.to_owned());
    }
    assert_eq!(documented, in_source.iter().map(String::as_str).collect());
}
