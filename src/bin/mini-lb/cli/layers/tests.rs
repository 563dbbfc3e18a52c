use std::path::PathBuf;

use clap::Arg;

use super::super::arguments;
use super::Layers;

/// With these variables, and these words on the command line.
fn layers(words: &[&str], variables: &[(&str, &str)]) -> Layers {
    let words = ["mini-lb"].iter().chain(words);
    let matches = arguments::command().try_get_matches_from(words).expect("a good command line");
    let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
    Layers::read(&matches, variables).expect("good variables")
}

#[test]
fn a_secret_is_not_printed_and_cannot_be_taken_for_another() {
    let layers = layers(&[], &[("MINI_LB_ADMIN_API_KEY", "swordfish"), ("MINI_LB_PORT", "7")]);
    assert_eq!(layers.value("admin-api-key"), Some("swordfish"));
    let text = layers.effective_configuration();
    assert!(!text.contains("swordfish"), "{text}");
    assert!(text.contains("# admin_api_key = \"***\"  # MINI_LB_ADMIN_API_KEY\n"), "{text}");
    assert!(text.contains("\nport = 7  # MINI_LB_PORT\n"), "{text}");
}

#[test]
fn files_that_options_name_belong_to_the_configuration() {
    let variables = [
        ("MINI_LB_TLS_KEY_PATH", "/a/key"),
        ("MINI_LB_CA_CERT_PATHS", "/a/ca,/b/ca"),
        ("MINI_LB_API_KEY_FILE", "/a/keys"),
        ("MINI_LB_LOG_DIR", "/a/log"),
    ];
    let files = layers(&[], &variables).files();
    assert_eq!(files, ["/a/key", "/a/ca", "/b/ca", "/a/keys"].map(PathBuf::from));
}

#[test]
fn a_place_is_named_for_values_of_files_and_variables_only() {
    let layers = layers(&["--port", "7"], &[("MINI_LB_HOST", "a"), ("MINI_LB_PORT", "8")]);
    assert_eq!(layers.placed("--port 7: no"), "--port 7: no");
    assert_eq!(layers.placed("--host a: no"), "MINI_LB_HOST: --host a: no");
    assert_eq!(layers.placed("--policy a: no"), "--policy a: no");
}

/// A short name would be one more thing to document for each flag, and `sglang_router` has none.
#[test]
fn no_flag_has_a_short_name_but_help_and_version() {
    let command = arguments::command();
    let short: Vec<_> = command.get_arguments().filter_map(Arg::get_short).collect();
    assert_eq!(short, ['h', 'V']);
}

#[test]
fn the_last_file_that_is_typed_counts() {
    let file = |words: &[&str]| {
        let words = ["mini-lb"].iter().chain(words);
        let matches = arguments::command().try_get_matches_from(words).expect("a good command line");
        matches.get_one::<String>("config").cloned()
    };
    assert_eq!(file(&["--config", "a", "--config=b"]).as_deref(), Some("b"));
    assert_eq!(file(&["--config=b", "--port", "1", "--config", "a"]).as_deref(), Some("a"));
}
