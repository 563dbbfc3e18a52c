//! docs/CONFIGURATION.md is true: its tables are those of the options, and its examples are good ones.

mod kit;
#[path = "../src/bin/mini-lb/cli/program_options.rs"]
mod program_options;
#[path = "../src/bin/mini-lb/cli/unsupported.rs"]
#[allow(dead_code, reason = "the refused flags are documented elsewhere")]
mod unsupported;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use kit::program::{Folder, output};
use mini_lb::{OptionSpec, Reload, option_sections};
use program_options::{COMMAND_LINE_ONLY, COMPATIBILITY_HELP, PROGRAM};
use unsupported::{ACCEPTED, WITHOUT_EFFECT};

const BEGIN: &str =
    "<!-- The tables below are written by `UPDATE_DOCS=1 cargo test --test configuration_docs`. -->\n";
const END: &str = "<!-- End of the tables. -->\n";

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CONFIGURATION.md")
}

fn document() -> String {
    std::fs::read_to_string(path()).expect("docs/CONFIGURATION.md")
}

/// All sections, where the program has options of its own in some of the library's.
fn tables() -> String {
    let mut sections: Vec<(&str, Vec<&OptionSpec>)> =
        option_sections().iter().map(|section| (section.title, section.options().collect())).collect();
    for (title, specs) in &PROGRAM {
        match sections.iter_mut().find(|(known, _)| known == title) {
            Some((_, known)) => known.extend(specs.iter()),
            None => sections.push((title, specs.iter().collect())),
        }
    }
    let mut text = String::new();
    for (title, specs) in sections {
        let head = "| flag | default | range | reload | what it does |\n|---|---|---|---|---|";
        writeln!(text, "\n### {title}\n\n{head}").expect("a string");
        specs.iter().for_each(|spec| writeln!(text, "{}", row(spec)).expect("a string"));
    }
    let accepted: Vec<String> = ACCEPTED.iter().map(|flag| format!("`{flag}`")).collect();
    writeln!(text, "\n### Compatibility\n\n{}: {COMPATIBILITY_HELP}.\n", accepted.join(", "))
        .expect("a string");
    for (flag, why) in WITHOUT_EFFECT {
        writeln!(text, "`{flag}`: accepted, without effect: {why}.\n").expect("a string");
    }
    text
}

fn row(spec: &OptionSpec) -> String {
    let flag = format!("--{} {}", spec.name, spec.kind);
    let default = spec.default.to_string();
    let default = match default.as_str() {
        "" => "–".to_owned(),
        words if spec.default.values().is_empty() => words.to_owned(),
        value => format!("`{value}`"),
    };
    let range = match spec.bounds.to_string() {
        range if range.is_empty() => "–".to_owned(),
        range if spec.minus_one_is_no_limit => format!("{range}, or -1"),
        range => range,
    };
    let reload = match spec.reload {
        _ if COMMAND_LINE_ONLY.contains(&spec.name) => "–",
        Reload::Now => "yes",
        Reload::AfterRestart => "restart",
    };
    let cells =
        [format!("`{}`", flag.trim_end()), default, range, reload.to_owned(), format!("{}.", spec.help)];
    format!("| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
}

#[test]
fn the_tables_are_those_of_the_options() {
    let document = document();
    let (before, rest) = document.split_once(BEGIN).expect("the mark before the tables");
    let (present, after) = rest.split_once(END).expect("the mark after the tables");
    let tables = tables();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path(), format!("{before}{BEGIN}{tables}{END}{after}"))
            .expect("docs/CONFIGURATION.md");
        return;
    }
    let hint = "docs/CONFIGURATION.md is not up to date: UPDATE_DOCS=1 cargo test --test configuration_docs";
    for (present, wanted) in present.lines().zip(tables.lines()) {
        assert_eq!(present, wanted, "{hint}");
    }
    assert_eq!(present.lines().count(), tables.lines().count(), "{hint}");
}

/// The blocks of code in the document that are of this language.
fn blocks(language: &str) -> Vec<String> {
    let (document, begin) = (document(), format!("```{language}\n"));
    let blocks = document.split(&begin).skip(1);
    blocks.map(|rest| rest.split("```").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn the_configuration_file_is_a_good_one() {
    let folder = Folder::new("documented");
    let [file] = blocks("toml").try_into().expect("one file");
    let file = folder.put("mini-lb.toml", &file);
    let checked = output(["--check-config", "--config", file.to_str().expect("a path of text")], &[]);
    assert_eq!(String::from_utf8_lossy(&checked.stderr), "");
    let text = String::from_utf8(checked.stdout).expect("UTF-8");
    for line in
        ["\nport = 8000  # ", "\nretry_on_status = [429, 503]  # ", "[\"http://prefill-3:30000\", 8998]]  # "]
    {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[test]
fn the_variables_are_good_ones() {
    let [lines] = blocks("sh").try_into().expect("one block");
    let variables: Vec<(&str, &str)> = lines
        .lines()
        .map(|line| line.strip_prefix("export ").and_then(|line| line.split_once('=')).expect("a variable"))
        .map(|(name, value)| (name, value.trim_matches('"')))
        .collect();
    assert!(variables.len() > 2);
    let checked = output(["--check-config"], &variables);
    assert_eq!(String::from_utf8_lossy(&checked.stderr), "");
    let text = String::from_utf8(checked.stdout).expect("UTF-8");
    assert!(
        text.contains("[[\"http://prefill-1:30000\", 8998], [\"http://prefill-2:30000\", \"none\"]]"),
        "{text}"
    );
    for (name, _) in variables {
        assert!(text.contains(&format!("  # {name}\n")), "{name} in {text}");
    }
}

#[test]
fn the_error_is_the_one_that_is_printed() {
    let folder = Folder::new("documented-error");
    let file = folder.put("mini-lb.toml", "\n\nrequst_timeout_secs = 1\n");
    let refused = output(["--check-config", "--config", file.to_str().expect("a path of text")], &[]);
    let said = String::from_utf8(refused.stderr).expect("UTF-8");
    let said = said.replace(file.to_str().expect("a path of text"), "mini-lb.toml");
    assert!(blocks("text").contains(&said), "{said}");
}
