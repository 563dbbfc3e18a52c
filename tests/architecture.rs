//! The structure of `src`, read off its text: dependencies go one way, the core has no I/O, and each name
//! has one meaning.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What each top-level module may use of the crate. Each is listed after what it uses.
const MAY_USE: [(&str, &[&str]); 18] = [
    ("timer", &[]),
    ("tls", &[]),
    ("http1", &["timer", "tls"]),
    ("wire", &["http1"]),
    ("transport", &["http1", "timer", "wire"]),
    ("admission", &["http1", "wire"]),
    ("upstream", &["admission", "http1", "tls", "transport", "wire"]),
    ("error", &["admission", "http1", "transport", "upstream", "wire"]),
    ("observe", &["admission", "error", "http1", "upstream", "wire"]),
    ("options", &["admission", "observe", "tls", "transport", "upstream", "wire"]),
    ("config", &["admission", "observe", "options", "tls", "transport", "upstream"]),
    ("proxy", &["admission", "error", "http1", "observe", "timer", "transport", "upstream", "wire"]),
    ("admin", &["admission", "error", "http1", "observe", "tls", "upstream", "wire"]),
    (
        "server",
        &[
            "admin",
            "admission",
            "config",
            "error",
            "http1",
            "observe",
            "proxy",
            "timer",
            "tls",
            "transport",
            "upstream",
            "wire",
        ],
    ),
    ("balancer", &["admin", "config", "server", "upstream"]),
    (
        "fuzzing",
        &[
            "admission",
            "error",
            "http1",
            "observe",
            "proxy",
            "server",
            "timer",
            "transport",
            "upstream",
            "wire",
        ],
    ),
    ("internals", &["balancer", "http1", "upstream", "wire"]),
    ("lib", &[]),
];

/// What has no place in `wire`: it is bytes in, bytes out.
const NOT_IN_WIRE: [&str; 6] = ["tokio", "std::time", "std::net", "fastrand", "async fn", "hyper_util"];

/// The HTTP/1.1 engines, which only `transport` may name.
const ENGINE_NAMES: [&str; 2] = ["Http1Engine::Hyper", "Http1Engine::Native"];

/// A file of `src`.
struct Source {
    /// The top-level module, or `bin` for the program.
    module: String,
    /// The path below `src`, with slashes.
    path: String,
    text: String,
}

impl Source {
    /// The code without what is for tests only.
    fn code(&self) -> &str {
        let is_test = self.path.contains("/tests") || self.path.starts_with("fuzzing");
        if is_test {
            ""
        } else {
            self.text.split("#[cfg(test)]\nmod tests").next().expect("what comes first")
        }
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(folder).expect("a folder of the project").map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let source = |file: PathBuf| {
        let path = file.strip_prefix(&src).expect("a file below src").to_string_lossy().into_owned();
        let module = path.split('/').next().expect("a name").trim_end_matches(".rs").to_owned();
        Source { module, path, text: fs::read_to_string(&file).expect("UTF-8") }
    };
    rust_files(&src).into_iter().map(source).collect()
}

/// The identifiers that follow `prefix` in a text.
fn names_after<'a>(text: &'a str, prefix: &str) -> Vec<&'a str> {
    let end = |rest: &str| rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    text.split(prefix).skip(1).map(|rest| &rest[..end(rest)]).collect()
}

/// The code without comments.
fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn dependencies_between_modules_go_one_way() {
    let mut checked = 0;
    for Source { module, path, text } in sources() {
        if module == "bin" {
            assert!(!text.contains("crate::proxy"), "the program uses the library's public names");
            continue;
        }
        let (_, may_use) = MAY_USE
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("{module} is a new module: say what it may use"));
        for used in names_after(&text, "crate::") {
            // Others are `$crate::`, or a public name at the root in a documentation link.
            let is_module = MAY_USE.iter().any(|(name, _)| *name == used);
            assert!(!is_module || used == module || may_use.contains(&used), "{path} uses {used}");
            checked += usize::from(is_module);
        }
    }
    assert!(checked > 30, "the use lines were found: {checked}");
}

#[test]
fn modules_use_each_other_in_no_circle() {
    for (place, (module, may_use)) in MAY_USE.iter().enumerate() {
        let before: Vec<&str> = MAY_USE[..place].iter().map(|(name, _)| *name).collect();
        let late: Vec<_> = may_use.iter().filter(|used| !before.contains(*used)).collect();
        assert!(late.is_empty(), "{module} is listed before what it uses: {late:?}");
    }
}

#[test]
fn no_two_files_of_a_module_use_each_other_in_a_circle() {
    for module in ["server", "transport", "admission", "http1", "proxy"] {
        let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for source in sources().iter().filter(|source| source.module == module && source.path.contains('/')) {
            let name = source.path.split('/').nth(1).expect("a file").trim_end_matches(".rs").to_owned();
            let code = without_comments(source.code());
            let used = uses.entry(name.clone()).or_default();
            // `use super::{a, b}` and `super::a::…`; of `mod.rs`, `use a::…` of its own files.
            let names = code.split("super::").skip(1).flat_map(|rest| {
                let list =
                    rest.strip_prefix('{').map_or(rest, |list| list.split('}').next().unwrap_or_default());
                let most = if rest.starts_with('{') { usize::MAX } else { 1 };
                list.split([',', ':', ';', '{', '(', ' ', '\n']).filter(|name| !name.is_empty()).take(most)
            });
            used.extend(names.map(str::to_owned).filter(|used| *used != name));
            used.extend(names_after(&code, &format!("crate::{module}::")).into_iter().map(str::to_owned));
        }
        let files: BTreeSet<String> = uses.keys().cloned().collect();
        uses.values_mut().for_each(|used| used.retain(|name| files.contains(name)));
        // Files that use nothing that is left are taken away until none is: what stays is in a circle.
        while let Some(free) = uses.iter().find(|(_, used)| used.is_empty()).map(|(name, _)| name.clone()) {
            uses.remove(&free);
            uses.values_mut().for_each(|used| {
                used.remove(&free);
            });
        }
        assert!(uses.is_empty(), "files of {module} use each other in a circle: {uses:?}");
        assert!(files.len() > 3, "{module}: {files:?}");
    }
}

#[test]
fn wire_has_no_io_no_clock_and_no_randomness() {
    for source in sources().iter().filter(|source| source.module == "wire") {
        for word in NOT_IN_WIRE {
            assert!(!source.code().contains(word), "{} has {word}", source.path);
        }
    }
}

/// Most lines of code of hyper's engine: it adapts a library, and must not become a codec of its own.
const MAX_HYPER_LINES: usize = 450;

#[test]
fn the_hyper_engine_is_small() {
    let sources = sources();
    let files = sources.iter().filter(|source| source.path.starts_with("transport/hyper_"));
    let lines: Vec<usize> = files
        .map(|source| without_comments(source.code()).lines().filter(|line| !line.trim().is_empty()).count())
        .collect();
    assert_eq!(lines.len(), 2, "hyper_server and hyper_client");
    assert!(lines.iter().sum::<usize>() <= MAX_HYPER_LINES, "{lines:?}");
}

#[test]
fn the_http1_engines_are_named_in_the_transport_only() {
    let named: Vec<String> = sources()
        .iter()
        .filter(|source| !["transport", "fuzzing"].contains(&source.module.as_str()))
        .filter(|source| ENGINE_NAMES.iter().any(|name| without_comments(source.code()).contains(name)))
        .map(|source| source.path.clone())
        .collect();
    assert!(named.is_empty(), "{named:?}");
}

/// Types that can be seen outside their own file, and where they are.
fn visible_types() -> BTreeMap<String, Vec<String>> {
    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for line in source.code().lines() {
            let mut words = line.split_whitespace();
            let is_visible = words.next().is_some_and(|word| word.starts_with("pub"));
            let kind = words.next().unwrap_or_default();
            if is_visible && ["struct", "enum", "trait", "type", "union"].contains(&kind) {
                let name = words.next().unwrap_or_default();
                let end = name.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(name.len());
                types.entry(name[..end].to_owned()).or_default().push(source.path.clone());
            }
        }
    }
    types
}

#[test]
fn no_two_visible_types_share_a_name() {
    let types = visible_types();
    let shared: Vec<_> = types.iter().filter(|(_, files)| files.len() > 1).collect();
    assert!(shared.is_empty(), "{shared:#?}");
    assert!(types.len() > 100, "the types were found: {}", types.len());
}

#[test]
fn a_room_is_only_the_bootstrap_room() {
    for source in sources() {
        for line in without_comments(source.code()).lines() {
            for word in line.split(|c: char| !c.is_ascii_alphanumeric()) {
                let is_room = word.eq_ignore_ascii_case("room") || word.contains("Room");
                let lower = line.to_ascii_lowercase();
                assert!(
                    !is_room || lower.contains("bootstrap") || source.path.starts_with("wire"),
                    "{}: {line}",
                    source.path
                );
            }
        }
    }
}

#[test]
fn every_module_is_called_by_a_term_of_the_glossary() {
    let glossary = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/GLOSSARY.md"));
    let glossary = glossary.expect("docs/GLOSSARY.md");
    let terms: BTreeSet<String> = glossary
        .lines()
        .filter_map(|line| line.trim_start_matches("- ").strip_prefix("**")?.split("**").next())
        .flat_map(|terms| terms.split(", ").map(str::to_lowercase).collect::<Vec<_>>())
        .collect();
    let mut missing = BTreeSet::new();
    for source in sources() {
        for module in source.path.trim_end_matches(".rs").split('/') {
            let term = module.replace(['_', '-'], " ");
            if !["mod", "lib", "main", "bin", "mini lb"].contains(&term.as_str()) && !terms.contains(&term) {
                missing.insert(term);
            }
        }
    }
    assert!(missing.is_empty(), "docs/GLOSSARY.md does not have: {missing:?}");
}

#[test]
fn comments_are_at_most_110_columns_wide() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders =
        ["src", "tests", "benches", "examples", "loadtest/src", "loadtest/tests", "fuzz/fuzz_targets"];
    for file in folders.iter().flat_map(|folder| rust_files(&root.join(folder))) {
        let text = fs::read_to_string(&file).expect("UTF-8");
        for (number, line) in text.lines().enumerate() {
            let is_comment = line.trim_start().starts_with("//");
            assert!(!is_comment || line.chars().count() <= 110, "{file:?}:{}: {line}", number + 1);
        }
    }
}
