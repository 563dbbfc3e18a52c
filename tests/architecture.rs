//! Dependencies go one way, and the core has no I/O: read off the `use` lines.

use std::fs;
use std::path::{Path, PathBuf};

/// What each module may use of the crate.
const MAY_USE: [(&str, &[&str]); 17] = [
    ("timer", &[]),
    ("tls", &[]),
    ("http1", &["timer", "tls"]),
    ("wire", &["http1"]),
    ("transport", &["http1", "timer", "wire"]),
    ("admission", &["http1", "wire"]),
    ("upstream", &["admission", "http1", "tls", "transport", "wire"]),
    ("error", &["admission", "http1", "transport", "upstream", "wire"]),
    ("observe", &["admission", "error", "http1", "upstream", "wire"]),
    ("config", &["admission", "observe", "tls", "transport", "upstream"]),
    ("proxy", &["admission", "error", "http1", "observe", "timer", "transport", "upstream", "wire"]),
    ("admin", &["admission", "error", "http1", "observe", "upstream", "wire"]),
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
    ("balancer", &["config", "server", "upstream"]),
    ("fuzzing", &["error", "http1", "observe", "proxy", "server", "timer", "transport", "upstream", "wire"]),
    ("internals", &["http1", "wire"]),
    ("lib", &[]),
];

/// What has no place in `wire`.
const NOT_IN_WIRE: [&str; 6] = ["tokio", "std::time", "std::net", "fastrand", "async fn", "hyper_util"];

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(folder).expect("a folder of the project").map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

fn sources() -> Vec<(String, PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let source = |path: PathBuf| {
        let inside = path.strip_prefix(&src).expect("a file below src");
        let module = inside.components().next().expect("a name").as_os_str().to_string_lossy();
        let module = module.trim_end_matches(".rs").to_owned();
        let text = fs::read_to_string(&path).expect("UTF-8");
        (module, path, text)
    };
    rust_files(&src).into_iter().map(source).collect()
}

#[test]
fn dependencies_between_modules_go_one_way() {
    let mut checked = 0;
    for (module, path, text) in sources() {
        if ["main", "cli", "log", "reload"].contains(&module.as_str()) {
            assert!(!text.contains("crate::proxy"), "the binary uses the library's public names");
            continue;
        }
        let (_, may_use) = MAY_USE
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("{module} is a new module: say what it may use"));
        for rest in text.split("crate::").skip(1) {
            let used: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            // `$crate::`, or a public name at the root in a documentation link.
            let is_module = MAY_USE.iter().any(|(name, _)| *name == used);
            assert!(!is_module || used == module || may_use.contains(&used.as_str()), "{path:?} uses {used}");
            checked += usize::from(is_module);
        }
    }
    assert!(checked > 30, "the use lines were found: {checked}");
}

#[test]
fn wire_has_no_io_no_clock_and_no_randomness() {
    for (module, path, text) in sources() {
        // Tests may generate inputs and watch the clock.
        if module == "wire" && !path.ends_with("tests.rs") {
            let code = text.split("#[cfg(test)]").next().expect("what comes before the tests");
            for word in NOT_IN_WIRE {
                assert!(!code.contains(word), "{path:?} has {word}");
            }
        }
    }
}
