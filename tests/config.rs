//! The layers of a configuration (flags over environment over file), and `--check-config`.

mod kit;

use kit::program::{Folder, file_with, output};

const SERVERS: [&str; 4] = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"];

/// What `--check-config` prints.
fn checked(args: &[&str], variables: &[(&str, &str)]) -> String {
    let output = output(args.iter().copied().chain(["--check-config"]), variables);
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""), "{args:?} {variables:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The one sentence with which a configuration is refused, the same with and without `--check-config`.
fn refused(args: &[&str], variables: &[(&str, &str)]) -> String {
    let sentences = [&["--check-config"][..], &[]].map(|more| {
        let output = output(args.iter().chain(more).copied(), variables);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{args:?} {variables:?}");
        String::from_utf8(output.stderr).expect("UTF-8")
    });
    assert_eq!(sentences[0], sentences[1]);
    let sentence = sentences[0].strip_prefix("error: ").and_then(|rest| rest.strip_suffix('\n'));
    let sentence = sentence.unwrap_or_else(|| panic!("{sentences:?}"));
    assert!(!sentence.contains('\n'), "{sentence}");
    sentence.to_owned()
}

/// The line of a key.
fn line<'a>(text: &'a str, key: &str) -> &'a str {
    let is_it = |line: &&str| line.split(' ').next() == Some(key);
    text.lines().find(is_it).unwrap_or_else(|| panic!("{key} in {text}"))
}

/// The lines that set a value, without comments.
fn values(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split("  # ").next().unwrap())
        .collect()
}

#[test]
fn flags_override_the_environment_which_overrides_the_file() {
    let folder = Folder::new("over");
    let file = folder.put("a.toml", &file_with("port = 1001\nhost = \"a\"\nmax_merge_size = 11"));
    let file = file.to_str().unwrap();
    let variables = [("MINI_LB_PORT", "1002"), ("MINI_LB_HOST", "b")];
    let text = checked(&["--config", file, "--port", "1003"], &variables);
    assert_eq!(line(&text, "port"), "port = 1003  # command line");
    assert_eq!(line(&text, "host"), "host = \"b\"  # MINI_LB_HOST");
    assert_eq!(line(&text, "max_merge_size"), format!("max_merge_size = 11  # {file}:5"));
    assert_eq!(line(&text, "max_payload_size"), "max_payload_size = 536870912  # default");
    assert!(text.contains("\n# worker_threads is not set: one per core\n"), "{text}");
    // The file can be named by a variable too, and the flag overrides it.
    let other = folder.put("b.toml", &file_with("port = 1004"));
    let variables = [("MINI_LB_CONFIG", file)];
    assert!(line(&checked(&[], &variables), "port").starts_with("port = 1001 "));
    let text = checked(&[&format!("--config={}", other.display())], &variables);
    assert!(line(&text, "port").starts_with("port = 1004 "));
}

#[test]
fn a_repeated_flag_of_a_higher_layer_replaces_the_whole_list() {
    let folder = Folder::new("lists");
    let file =
        folder.put("a.toml", "decode = [\"http://a:1\", \"http://a:2\"]\nretry_on_status = [429, 503]\n");
    let file = file.to_str().unwrap();
    let variables = [
        ("MINI_LB_PREFILL", "http://b:1 8998, http://b:2 none,http://b:3"),
        ("MINI_LB_DECODE", "http://b:4"),
    ];
    let text = checked(&["--config", file, "--decode", "http://c:1", "--decode", "http://c:2"], &variables);
    assert!(
        line(&text, "decode").starts_with("decode = [\"http://c:1\", \"http://c:2\"]  # command"),
        "{text}"
    );
    let prefill =
        "prefill = [[\"http://b:1\", 8998], [\"http://b:2\", \"none\"], [\"http://b:3\"]]  # MINI_LB_PREFILL";
    assert_eq!(line(&text, "prefill"), prefill);
    assert!(line(&text, "retry_on_status").starts_with("retry_on_status = [429, 503]  # "));
    let text = checked(&["--config", file], &[variables[0], ("MINI_LB_RETRY_ON_STATUS", "500,501")]);
    assert!(line(&text, "decode").starts_with("decode = [\"http://a:1\", \"http://a:2\"]  # "));
    assert!(line(&text, "retry_on_status").starts_with("retry_on_status = [500, 501]  # MINI"));
}

#[test]
fn a_switch_can_be_switched_off_by_a_higher_layer() {
    let folder = Folder::new("off");
    let file = folder.put("a.toml", &file_with("disable_retries = true"));
    let file = ["--config", file.to_str().unwrap()];
    for (off, shown) in [("0", "false"), ("false", "false"), ("1", "true"), ("true", "true"), ("", "true")] {
        let text = checked(&file, &[("MINI_LB_DISABLE_RETRIES", off)]);
        let begin = format!("disable_retries = {shown} ");
        assert!(line(&text, "disable_retries").starts_with(&begin), "{off:?}: {text}");
    }
}

#[test]
fn a_prefill_server_can_be_written_in_four_ways() {
    let folder = Folder::new("shapes");
    for (written, shown) in [
        ("\"http://a:1\"", "[[\"http://a:1\"]]"),
        ("[\"http://a:1\", [\"http://a:2\", \"none\"]]", "[[\"http://a:1\"], [\"http://a:2\", \"none\"]]"),
        ("[[\"http://a:1\", 0x2326]]", "[[\"http://a:1\", 8998]]"),
        ("[{ bootstrap_port = 8998, url = \"http://a:1\" }]", "[[\"http://a:1\", 8998]]"),
        ("[\n  { url = \"http://a:1\", port = \"8998\" },\n]", "[[\"http://a:1\", 8998]]"),
    ] {
        let file = folder.put("a.toml", &file_with(&format!("prefill = {written}")));
        let text = checked(&["--config", file.to_str().unwrap()], &[]);
        assert!(line(&text, "prefill").starts_with(&format!("prefill = {shown}  # ")), "{text}");
    }
}

#[test]
fn the_printed_configuration_is_a_file_with_the_same_effect() {
    let folder = Folder::new("round");
    let first = checked(
        &[
            "--prefill=http://127.0.0.1:1",
            "--prefill",
            "http://[::1]:5",
            "8998",
            "--prefill-bootstrap-host",
            "http://127.0.0.1:1",
            "h",
            "--decode=http://127.0.0.1:2",
            "--retry-on-status=429,503",
            "--host=a\"\\\t\u{e9}",
            "--disable-retries",
            "--mini-lb",
        ],
        &[("MINI_LB_WORKER_THREADS", "2")],
    );
    let file = folder.put("a.toml", &first);
    let again = checked(&["--config", file.to_str().unwrap()], &[]);
    assert_eq!(values(&first), values(&again));
    assert!(again.contains("mini_lb = true") && again.contains("worker_threads = 2"), "{again}");
}

#[test]
fn an_error_in_a_file_names_its_line_and_key() {
    let folder = Folder::new("wrong");
    for (text, sentence) in [
        ("prot = 1", "1: prot: unknown key; did you mean port?"),
        (
            "\n# x\nrequst_timeout_secs = 1",
            "3: requst_timeout_secs: unknown key; did you mean request_timeout_secs?",
        ),
        ("Port = 1", "1: Port: unknown key; did you mean port?"),
        ("xyz = 1", "1: xyz: unknown key; each flag of --help has one, such as port for --port"),
        ("[zz]\nport = 1", "1: zz: unknown key; each flag of --help has one, such as port for --port"),
        ("config = \"x\"", "1: config: --config can be given on the command line only"),
        ("check_config = true", "1: check_config: --check-config can be given on the command line only"),
        ("port = \"x\"", "1: --port x: not a whole number"),
        ("host = \"a\"\nport = 70000", "2: --port 70000: the value must be at most 65535"),
        ("port = true", "1: --port true: not a whole number"),
        ("port = [1]", "1: port: must be a string or a number, not a list"),
        ("host = 1979-05-27", "1: host: must be a string or a number, not a date"),
        ("port = 99999999999999999999999999999999999999999", "1: port: the number is too large"),
        ("disable_retries = 1", "1: disable_retries: must be true or false"),
        (
            "retry_on_status = [\n  429,\n  7,\n]",
            "3: --retry-on-status 7: the value must be between 400 and 599",
        ),
        ("log_level = \"trace\"", "1: --log-level trace: must be debug, info, warn or error"),
        ("prefill = [{ port = 1 }]", "1: prefill: a field is missing or given twice"),
        ("prefill = [{ url = \"http://a:1\", prot = 1 }]", "1: prefill: unknown field prot"),
        (
            "prefill = [[\"http://a:1\", 1, 2]]",
            "1: --prefill http://a:1 1 2: the values must be <URL> [PORT|none]",
        ),
        ("prefill = [[]]", "1: prefill: must not be empty"),
        (
            "prefill = [[\"http://a:1\", \"-1\"]]",
            "1: --prefill http://a:1 -1: the bootstrap port must be between 1 and 65535, or none",
        ),
        (
            "prefill = [\n  \"http://a:1\",\n  [\"http://b:1\", 0],\n]",
            "3: --prefill http://b:1 0: the bootstrap port must be between 1 and 65535, or none",
        ),
        (
            "prefill = [\n  \"http://a:1\",\n  \"http://b:b\",\n]",
            "3: --prefill http://b:b: the port is not a number between 1 and 65535",
        ),
        (
            "policy = \"x\"",
            "1: --policy x: must be cache_aware or least_load or power_of_two or consistent_hash or round_robin or random",
        ),
        (
            "policy = \"manual\"",
            "1: --policy manual is not supported: use consistent_hash, which keeps a key on its server and remembers nothing",
        ),
        ("request_timeout_secs = 0", "1: --request-timeout-secs 0: the value must be at least 1"),
        (
            "max_idle_secs = 1",
            "1: max_idle_secs: --max-idle-secs is not supported: it tunes the policy manual; use --policy consistent_hash, which remembers nothing",
        ),
        ("a = = 1", "1: not TOML: extra `=`, expected nothing"),
        ("port = 1\nport = 2", "2: not TOML: duplicate key"),
        ("max_merge_size = 1\nmax-merge-size = 2", "2: max-merge-size: duplicate key"),
    ] {
        let file = folder.put("a.toml", text);
        let file = file.to_str().unwrap();
        // Servers come from the command line, unless the error is in those of the file.
        let servers = if text.starts_with("prefill") { &SERVERS[2..] } else { &SERVERS[..] };
        assert_eq!(refused(&[&["--config", file], servers].concat(), &[]), format!("{file}:{sentence}"));
    }
}

#[test]
fn an_error_in_a_variable_names_it() {
    for (name, value, sentence) in [
        ("MINI_LB_PRT", "1", "unknown variable; did you mean MINI_LB_PORT?"),
        (
            "MINI_LB_XYZ",
            "1",
            "unknown variable; each flag of --help has one, such as MINI_LB_PORT for --port",
        ),
        ("MINI_LB_port", "1", "unknown variable; did you mean MINI_LB_PORT?"),
        ("MINI_LB_CHECK_CONFIG", "1", "--check-config can be given on the command line only"),
        ("MINI_LB_PORT", "x", "--port x: not a whole number"),
        ("MINI_LB_DISABLE_RETRIES", "yes", "must be 1, 0, true or false"),
        (
            "MINI_LB_POLICY",
            "x",
            "--policy x: must be cache_aware or least_load or power_of_two or consistent_hash or round_robin or random",
        ),
        ("MINI_LB_MAX_MERGE_SIZE", "0", "--max-merge-size 0: the value must be at least 1"),
        (
            "MINI_LB_MAX_IDLE_SECS",
            "1",
            "--max-idle-secs is not supported: it tunes the policy manual; use --policy consistent_hash, which remembers nothing",
        ),
    ] {
        assert_eq!(refused(&SERVERS, &[(name, value)]), format!("{name}: {sentence}"));
    }
}

#[test]
fn variables_that_kubernetes_sets_for_a_service_are_ignored() {
    let variables = [
        ("MINI_LB_SERVICE_HOST", "10.0.0.1"),
        ("MINI_LB_SERVICE_PORT", "8000"),
        ("MINI_LB_SERVICE_PORT_HTTP", "8000"),
        ("MINI_LB_PORT", "tcp://10.0.0.1:8000"),
        ("MINI_LB_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("MINI_LB_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("MINI_LB_ADMIN_SERVICE_HOST", "10.0.0.2"),
        ("MINI_LB_ADMIN_PORT", "tcp://10.0.0.2:80"),
        ("MINI_LB_ADMIN_PORT_80_TCP_PROTO", "tcp"),
    ];
    assert_eq!(line(&checked(&SERVERS, &variables), "port"), "port = 30000  # default");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = Folder::new("unread");
    let (missing, large) =
        (folder.path("missing.toml"), folder.put("large.toml", &"#".repeat((1 << 20) + 1)));
    let sentence = refused(&["--config", missing.to_str().unwrap()], &[]);
    assert!(sentence.starts_with(&format!("{}: cannot be read: ", missing.display())), "{sentence}");
    let sentence = refused(&["--config", large.to_str().unwrap()], &[]);
    assert_eq!(sentence, format!("{}: larger than 1048576 bytes", large.display()));
    std::fs::write(&missing, b"host = \"\xff\"").unwrap();
    let sentence = refused(&["--config", missing.to_str().unwrap()], &[]);
    assert_eq!(sentence, format!("{}: not UTF-8", missing.display()));
}

#[test]
fn help_is_printed_even_if_the_layers_have_errors() {
    let output = output(["--config", "/nobody/has/this", "--help"], &[("MINI_LB_XYZ", "1")]);
    assert_eq!(output.status.code(), Some(0));
}
