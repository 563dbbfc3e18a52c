//! `loadtest compare` as a process: the files that it writes, and its report on a router that does not work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder for one test, in the target folder.
fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn compare(out: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loadtest"))
        .args(["compare", "--rounds", "2", "--seconds", "0.1", "--peers", "nowhere", "--out"])
        .arg(out)
        .args(arguments)
        .output()
        .expect("a program that can be started")
}

#[test]
fn results_are_written_as_a_table_json_and_plots() {
    let out = folder("compare-direct");
    let scenarios = ["--scenario", "chat_300b", "--scenario", "open_500", "--scenario", "stream_64"];
    // No router is started: `direct` is the only row.
    let none = ["--mini-lb", "/bin/false", "--router", "direct"];
    let output = compare(&out, &[&scenarios[..], &none].concat());
    assert!(output.status.success(), "{output:?}");
    let read = |name: &str| fs::read_to_string(out.join(name)).expect(name);
    let table = read("table.md");
    assert!(table.contains("## chat_300b") && table.contains("| direct |"), "{table}");
    assert!(table.contains("Not installed, and left out:") && table.contains("smg"), "{table}");
    assert!(!table.contains('✗'), "{table}");
    let results: serde_json::Value = serde_json::from_str(&read("results.json")).expect("JSON");
    let rows = results["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 3);
    for row in rows {
        let rounds = row["rounds"].as_array().expect("rounds");
        // The open loop is measured six times per round.
        assert_eq!(rounds.len(), if row["scenario"] == "open_500" { 12 } else { 2 });
        let report = &rounds[0]["measured"]["report"];
        assert!(report["requests"].as_u64() > Some(0) && report["errors"] == 0, "{report}");
    }
    for plot in ["cpu_per_request", "cpu_per_token", "memory", "latency", "connections"] {
        assert!(read(&format!("{plot}.svg")).starts_with("<svg"), "{plot}");
    }
}

#[test]
fn a_router_that_does_not_start_is_reported_and_tried_once() {
    let out = folder("compare-broken");
    let flags = ["--scenario", "chat_300b", "--mini-lb", "/bin/false", "--router", "mini-lb"];
    let output = compare(&out, &flags);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let table = fs::read_to_string(out.join("table.md")).expect("table.md");
    assert!(table.contains("✗ mini-lb: mini-lb does not respond"), "{table}");
    let results = fs::read_to_string(out.join("results.json")).expect("results.json");
    assert_eq!(results.matches("not_started").count(), 1);
}

#[test]
fn an_unknown_scenario_is_an_error_that_lists_the_known_ones() {
    let output = compare(&folder("compare-unknown"), &["--mini-lb", "/bin/false", "--scenario", "chat"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("unknown scenario chat; known are chat_300b, stream_64"), "{said}");
}
