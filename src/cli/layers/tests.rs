use std::path::PathBuf;

use clap::{Arg, ArgAction, Command};

use super::{Layers, files, show};

fn command() -> Command {
    let arg = |name: &'static str| Arg::new(name).long(name).action(ArgAction::Set);
    Command::new("mini-lb").args([
        arg("admin-api-key"),
        arg("tls-key-path"),
        arg("ca-cert-paths"),
        arg("port"),
    ])
}

/// With these variables, and nothing typed.
fn layers(variables: &[(&str, &str)]) -> Layers {
    let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
    Layers::read(command(), vec!["mini-lb".into()], variables).expect("good variables")
}

#[test]
fn a_secret_is_not_printed_and_cannot_be_taken_for_another() {
    let layers = layers(&[("MINI_LB_ADMIN_API_KEY", "swordfish"), ("MINI_LB_PORT", "7")]);
    let matches = command().get_matches_from(&layers.words);
    assert_eq!(matches.get_one::<String>("admin-api-key").map(String::as_str), Some("swordfish"));
    let text = show(command(), &matches, &layers);
    assert!(!text.contains("swordfish"), "{text}");
    assert!(text.contains("# admin_api_key = \"***\"  # MINI_LB_ADMIN_API_KEY\n"), "{text}");
    assert!(text.contains("\nport = 7  # MINI_LB_PORT\n"), "{text}");
}

#[test]
fn files_that_flags_name_belong_to_the_configuration() {
    let layers = layers(&[("MINI_LB_TLS_KEY_PATH", "/a/key"), ("MINI_LB_CA_CERT_PATHS", "/a/ca")]);
    let mut command = command();
    let matches = command.clone().get_matches_from(&layers.words);
    command.build();
    assert_eq!(files(&command, &matches, &layers), ["/a/key", "/a/ca"].map(PathBuf::from));
}

/// Which flags were typed is read off the words: see `Known::typed`.
#[test]
fn no_flag_has_a_short_name_but_help_and_version() {
    let short: Vec<_> = super::super::command().get_arguments().filter_map(Arg::get_short).collect();
    assert_eq!(short, ['h', 'V']);
}

#[test]
fn the_last_file_that_is_typed_counts() {
    let value = |words: &[&str]| {
        let words: Vec<_> = words.iter().map(Into::into).collect();
        super::typed_value(&words, "--config").map(|value| value.into_string().expect("UTF-8"))
    };
    assert_eq!(value(&["m", "--config", "a", "--config=b"]).as_deref(), Some("b"));
    assert_eq!(value(&["m", "--config=b", "--port", "1", "--config", "a"]).as_deref(), Some("a"));
    assert_eq!(value(&["m", "--check-config", "--", "--config=b"]), None);
}
