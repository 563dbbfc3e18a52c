//! Checks by Prometheus' own tool, where it is installed (Debian: `prometheus`).

use std::io::{self, Write};
use std::process::{Command, Stdio};

/// The output of promtool if it succeeds. `None` if it is not installed, which fails if `CI` is set.
pub fn run(args: &[&str], input: &str) -> Option<String> {
    let mut command = Command::new("promtool");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            assert!(
                std::env::var_os("CI").is_none_or(|ci| ci.is_empty()),
                "CI is set, and there is no promtool"
            );
            // Not `eprintln!`, which is not shown for a test that passes.
            let _ = writeln!(
                io::stderr(),
                "NOT TESTED with promtool, which is not installed (a failure if CI is set)"
            );
            return None;
        }
        Err(error) => panic!("promtool: {error}"),
    };
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("promtool ends");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "promtool {args:?}: {said}");
    Some(said)
}
