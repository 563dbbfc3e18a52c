//! What `--check-config --probe` prints: a table of servers, what is wrong with them, and a
//! sentence for a script's log.

use std::fmt::Write;

use mini_lb::{Finding, FleetCheck, ServerCheck};

use crate::columns::{Cells, Column, lines, wrapped};

/// Of all lines.
const WIDTH: usize = 120;

const COLUMNS: [Column; 10] = [
    Column::new("SERVER", Cells::Urls(24)),
    Column::new("ROLE", Cells::Words),
    Column::new("FITS", Cells::Words),
    Column::new("VERSION", Cells::Texts(8)),
    Column::new("BOOTSTRAP", Cells::Numbers),
    Column::new("TP", Cells::Numbers),
    Column::new("DP", Cells::Numbers),
    Column::new("PAGE", Cells::Numbers),
    Column::new("TRANSFER", Cells::Texts(8)),
    Column::new("MODEL", Cells::Texts(12)),
];

pub(crate) fn text(check: &FleetCheck) -> String {
    let rows: Vec<Vec<String>> = check.servers.iter().map(row).collect();
    let mut text = lines(&COLUMNS, &rows, WIDTH).join("\n") + "\n";
    for server in check.servers.iter().filter(|server| !server.findings.is_empty()) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{} ({})", server.url, server.role);
        server.findings.iter().for_each(|finding| put(finding, &mut text));
    }
    if !check.findings.is_empty() {
        text.push_str("\nAll servers\n");
        check.findings.iter().for_each(|finding| put(finding, &mut text));
    }
    text + "\n" + &summary(check) + "\n"
}

fn row(server: &ServerCheck) -> Vec<String> {
    let told = server.facts.as_ref();
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let word = |word: Option<&String>| word.map_or("-", String::as_str).to_owned();
    // Decode servers have the option too, and use it where a request has no port.
    let port = told.and_then(|told| told.bootstrap_port).or(server.bootstrap_port);
    vec![
        server.url.clone(),
        server.role.to_owned(),
        match (server.fits(), server.findings.is_empty()) {
            (true, true) => "yes",
            (true, false) => "warning",
            (false, _) => "NO",
        }
        .to_owned(),
        word(told.and_then(|told| told.version.as_ref())),
        number(port.filter(|_| server.role == "prefill").map(u64::from)),
        number(told.and_then(|told| told.tp_size)),
        number(told.and_then(|told| told.dp_size)),
        number(told.and_then(|told| told.page_size)),
        word(told.and_then(|told| told.transfer_backend.as_ref()).filter(|_| server.role != "regular")),
        word(told.and_then(|told| told.model.as_ref())),
    ]
}

fn put(finding: &Finding, into: &mut String) {
    let kind = if finding.is_warning { "warning" } else { "error" };
    for line in wrapped(&format!("{kind}: {}", finding.text), WIDTH - 2, 2) {
        // Writing to a string cannot fail.
        let _ = writeln!(into, "  {line}");
    }
}

fn summary(check: &FleetCheck) -> String {
    let counted = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let all = || check.servers.iter().flat_map(|server| &server.findings).chain(&check.findings);
    let (asked, fit) = (check.servers.len(), check.servers.iter().filter(|server| server.fits()).count());
    let warnings = all().filter(|finding| finding.is_warning).count();
    let verdict = if check.fits() { "all fit" } else { "NOT READY for traffic" };
    format!(
        "{verdict}: {} asked, {fit} fit; {}, {}",
        counted(asked, "server"),
        counted(all().count() - warnings, "error"),
        counted(warnings, "warning"),
    )
}
