//! The table of options, walked: each option can be given in each way, its bounds hold, and a reload reports
//! it.
//!
//! What each option does is tested where that is at home.

mod kit;
#[path = "../src/bin/mini-lb/cli/program_options.rs"]
mod program_options;

use std::path::Path;

use kit::TestCa;
use kit::program::{Folder, output};
use mini_lb::{
    MiniLbConfig, MiniLoadBalancer, OptionSection, OptionSpec, Reload, ValueKind, option_sections,
};
use program_options::{COMMAND_LINE_ONLY, COMPATIBILITY_HELP, PROGRAM};

/// An option with a value that is not its default.
struct Case {
    spec: OptionSpec,
    occurrences: Vec<Vec<String>>,
    /// What must be in the file besides, as option and value.
    companions: Vec<(&'static str, String)>,
}

/// Certificates and keys for the options that take files.
struct Files {
    authority: TestCa,
    folder: Folder,
}

impl Files {
    fn new(name: &str) -> Self {
        Self { authority: TestCa::new(), folder: Folder::new(name) }
    }

    /// Every option that can be in a file.
    fn cases(&self) -> Vec<Case> {
        let library = option_sections().iter().flat_map(OptionSection::options);
        let program = PROGRAM.iter().flat_map(|(_, specs)| specs.iter());
        let specs = library.chain(program).filter(|spec| !COMMAND_LINE_ONLY.contains(&spec.name));
        // Without the feature they are refused; `tests/tracing_spans.rs` and `tests/kubernetes.rs` test that.
        let traces = ["enable-trace", "otlp-traces-endpoint"];
        let specs = specs.filter(|spec| cfg!(feature = "otel") || !traces.contains(&spec.name));
        let is_of_pods =
            |spec: &OptionSpec| spec.name.ends_with("selector") || spec.name.starts_with("service-discovery");
        let specs = specs.filter(|spec| cfg!(feature = "kubernetes") || !is_of_pods(spec));
        specs.map(|spec| self.case(spec)).collect()
    }

    fn case(&self, spec: &OptionSpec) -> Case {
        let identity = self.authority.issue("a", &["localhost"]);
        let path = |path: &Path| path.to_str().expect("a path of text").to_owned();
        let (cert, key) = (path(&identity.cert), path(&identity.key));
        let value = |value: &String| vec![vec![value.clone()]];
        let switch = || ("service-discovery", "true".to_owned());
        let (occurrences, companions) = match spec.name {
            "tls-cert-path" => (value(&cert), vec![("tls-key-path", key)]),
            "tls-key-path" => (value(&key), vec![("tls-cert-path", cert)]),
            "client-cert-path" => (value(&cert), vec![("client-key-path", key)]),
            "client-key-path" => (value(&key), vec![("client-cert-path", cert)]),
            "ca-cert-paths" => (value(&path(&self.authority.file())), vec![]),
            "prefill-bootstrap-host" => (vec![vec!["http://127.0.0.1:1".into(), "b".into()]], vec![]),
            "worker-api-key-replaces-authorization" => {
                (vec![vec![]], vec![("worker-api-key", "w".to_owned())])
            }
            "service-discovery" => (vec![vec![]], vec![("decode-selector", "app=sglang".to_owned())]),
            "selector" | "prefill-selector" | "decode-selector" => {
                (value(&"app=sglang".to_owned()), vec![switch()])
            }
            "service-discovery-port" | "service-discovery-namespace" => {
                let names = vec![self.value(spec.kind.names()[0])];
                (vec![names], vec![switch(), ("decode-selector", "app=sglang".to_owned())])
            }
            "prefix-index-bytes" | "trace-log-max-bytes" => (value(&"131072".to_owned()), vec![]),
            _ => (vec![spec.kind.names().iter().map(|name| self.value(name)).collect()], vec![]),
        };
        Case { spec: *spec, occurrences, companions }
    }

    /// A value by its name in the help text. An option with a value of a new kind needs a line here.
    fn value(&self, name: &str) -> String {
        let words: Vec<&str> = name.split('|').collect();
        let is_choice = words.iter().all(|word| word.chars().any(|c| c.is_ascii_lowercase()));
        let value = match words[0] {
            // The default is the first in all choices but that of the log's level, and never the last.
            _ if is_choice => words[words.len() - 1],
            "COUNT" | "SECONDS" | "BYTES" | "PORT" | "BOOTSTRAP" => "7",
            "STATUS" => "503",
            "URL" => "http://127.0.0.1:9",
            "HOST" => "b",
            "HOST:PORT" => "localhost:9",
            "KEY" => "a-key",
            "ORIGIN" => "http://a.example",
            "HEADER" => "x-mine",
            "NAME" => "b",
            "FOLDER" | "PATH" => "/nowhere",
            "FILE" => return self.folder.put("key", "a-key\n").to_str().expect("a path of text").to_owned(),
            other => panic!("a value of a new kind: {other}"),
        };
        value.to_owned()
    }

    /// Options of a file, and a server of each role if they name none.
    fn file(&self, lines: &[(&str, String)]) -> String {
        let names_none = |name: &str| lines.iter().all(|(line, _)| *line != name);
        self.file_with(lines, &["prefill", "decode"].map(|name| names_none(name).then_some(name)))
    }

    /// The same for the option of this case. Plain servers exclude those of pairs.
    fn file_for(&self, case: &Case, lines: &[(&str, String)]) -> String {
        if case.is_of_plain_servers() { self.file_with(lines, &[]) } else { self.file(lines) }
    }

    fn file_with(&self, lines: &[(&str, String)], missing: &[Option<&str>]) -> String {
        let servers = [("prefill", "[\"http://127.0.0.1:1\"]"), ("decode", "[\"http://127.0.0.1:2\"]")];
        let servers = servers.iter().filter(|(name, _)| missing.contains(&Some(name))).copied();
        let lines = lines.iter().map(|(name, value)| (*name, value.as_str())).chain(servers);
        let text: String = lines.map(|(name, value)| format!("{name} = {value}\n")).collect();
        self.folder.put("mini-lb.toml", &text).to_str().expect("a path of text").to_owned()
    }
}

impl Case {
    fn is_of_plain_servers(&self) -> bool {
        ["worker-urls", "worker-dns", "selector"].contains(&self.spec.name)
    }

    /// As in a file.
    fn toml(&self) -> String {
        let literal = |value: &String| match value.parse::<u32>() {
            Ok(_) => value.clone(),
            Err(_) => toml(value),
        };
        let group = |values: &Vec<String>| values.iter().map(literal).collect::<Vec<_>>().join(", ");
        let occurrences: Vec<String> = self.occurrences.iter().map(group).collect();
        match self.spec.kind {
            ValueKind::Switch => "true".to_owned(),
            ValueKind::Single(_) => occurrences[0].clone(),
            ValueKind::Groups { .. } => format!("[[{}]]", occurrences.join("], [")),
            _ => format!("[{}]", occurrences.join(", ")),
        }
    }

    /// As in a variable.
    fn variable(&self) -> String {
        match self.spec.kind {
            ValueKind::Switch => "1".to_owned(),
            _ => self.occurrences.iter().map(|values| values.join(" ")).collect::<Vec<_>>().join(","),
        }
    }

    /// As on the command line.
    fn words(&self) -> Vec<String> {
        let flag = || vec![format!("--{}", self.spec.name)];
        self.occurrences.iter().flat_map(|values| [flag(), values.clone()].concat()).collect()
    }

    /// The other lines of a file with this option.
    fn lines(&self) -> Vec<(&'static str, String)> {
        let literal = |name: &str, value: &str| match name {
            "service-discovery" => value.to_owned(),
            "decode-selector" => format!("[{}]", toml(value)),
            _ => toml(value),
        };
        self.companions.iter().map(|(name, value)| (*name, literal(name, value))).collect()
    }

    /// The option's line of `--check-config`.
    fn shown(&self, origin: &str) -> String {
        match self.spec.secret {
            true => format!("# {} = \"***\"  # {origin}\n", self.spec.key()),
            false => format!("\n{} = {}  # {origin}\n", self.spec.key(), self.toml()),
        }
    }
}

fn toml(text: &str) -> String {
    format!("\"{text}\"")
}

/// What `--check-config` prints, or the error.
fn checked(file: &str, words: &[String], variables: &[(&str, &str)]) -> Result<String, String> {
    let args = ["--check-config", "--config", file].into_iter().chain(words.iter().map(String::as_str));
    let output = output(args, variables);
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    match output.status.code() {
        Some(0) => Ok(text(output.stdout)),
        code => {
            assert_eq!(code, Some(2));
            Err(text(output.stderr))
        }
    }
}

#[test]
fn each_option_can_be_given_on_the_command_line_in_a_file_and_in_a_variable() {
    let files = Files::new("each-option");
    let cases = files.cases();
    assert!(cases.len() > 50, "{}", cases.len());
    for case in cases {
        let (name, key, variable) = (case.spec.name, case.spec.key(), case.spec.variable());
        let plain = files.file_for(&case, &case.lines());
        let text = checked(&plain, &case.words(), &[]).expect(name);
        assert!(text.contains(&case.shown("command line")), "{name}: {text}");
        let text = checked(&plain, &[], &[(&variable, &case.variable())]).expect(name);
        assert!(text.contains(&case.shown(&variable)), "{name}: {text}");
        for spelled in [name, &key] {
            let file = files.file_for(&case, &[vec![(spelled, case.toml())], case.lines()].concat());
            let text = checked(&file, &[], &[]).expect(name);
            assert!(text.contains(&case.shown(&format!("{file}:1"))), "{name}: {text}");
        }
    }
}

#[test]
fn a_number_out_of_bounds_is_refused_by_name_wherever_it_is_given() {
    let files = Files::new("bounds");
    let mut checks = 0;
    for mut case in files.cases() {
        let bounds = case.spec.bounds;
        let mut wrong: Vec<(String, &str)> = Vec::new();
        wrong.extend(bounds.min.checked_sub(1).map(|number| (number.to_string(), "the value must be ")));
        wrong.extend(bounds.max.checked_add(1).map(|number| (number.to_string(), "the value must be ")));
        let number = ["COUNT", "SECONDS", "BYTES", "PORT", "STATUS"];
        if case.spec.kind.names().iter().all(|name| number.contains(name)) && !case.occurrences[0].is_empty()
        {
            wrong.push(("many".to_owned(), "not a whole number"));
        }
        for (value, why) in wrong {
            let (name, variable) = (case.spec.name, case.spec.variable());
            case.occurrences = vec![vec![value.clone()]];
            let refused = format!("--{name} {value}: {why}");
            let plain = files.file(&[]);
            let said = checked(&plain, &case.words(), &[]).expect_err(name);
            assert!(said.starts_with(&format!("error: {refused}")), "{said}");
            let said = checked(&plain, &[], &[(&variable, &value)]).expect_err(name);
            assert!(said.starts_with(&format!("error: {variable}: {refused}")), "{said}");
            let file = files.file(&[(name, case.toml())]);
            let said = checked(&file, &[], &[]).expect_err(name);
            assert!(said.starts_with(&format!("error: {file}:1: {refused}")), "{said}");
            checks += 1;
        }
    }
    assert!(checks > 40, "{checks}");
}

/// A change must not be silent: it is in effect, or it is reported that it needs a restart.
#[test]
fn a_changed_value_is_reported_as_in_effect_or_as_waiting_for_a_restart() {
    let files = Files::new("reported");
    let prefill = vec![("http://127.0.0.1:1".to_owned(), Some(8998))];
    let decode = vec!["http://127.0.0.1:2".to_owned()];
    let pair = || MiniLbConfig::new("127.0.0.1", 30_000, prefill.clone(), decode.clone(), 1_800);
    let regular =
        || MiniLbConfig::new("127.0.0.1", 30_000, vec![], vec![], 1_800).worker_urls(decode.clone());
    let balancers =
        [pair(), regular()].map(|config| MiniLoadBalancer::new(config).expect("a good configuration"));
    let is_library = |case: &Case| {
        let mut known = option_sections().iter().flat_map(OptionSection::options);
        known.any(|spec| spec.name == case.spec.name)
    };
    for case in files.cases().into_iter().filter(is_library) {
        let plain = || if case.is_of_plain_servers() { regular() } else { pair() };
        let balancer = &balancers[usize::from(case.is_of_plain_servers())];
        let Case { spec, occurrences, companions } = &case;
        let changed = plain().set_option(spec.name, occurrences.clone()).expect(spec.name);
        let changed = companions
            .iter()
            .fold(changed, |config, (name, value)| config.set_option(name, [[value.as_str()]]).expect(name));
        let reloaded = balancer.reload(changed).expect(spec.name);
        let (reported, others) = match spec.reload {
            Reload::Now => (&reloaded.changed, &reloaded.needs_restart),
            Reload::AfterRestart => (&reloaded.needs_restart, &reloaded.changed),
        };
        let servers = (reloaded.servers_added, reloaded.servers_removed);
        match spec.reported_as.unwrap_or(spec.name) {
            "servers" => assert_eq!((servers, reported.len() + others.len()), ((1, 1), 0), "{reloaded:?}"),
            // The value of one may need another, which is reported too.
            name if !companions.is_empty() => assert!(reported.contains(&name), "{name}: {reloaded:?}"),
            names => {
                assert_eq!((reported.join(", ").as_str(), others.len()), (names, 0), "{reloaded:?}");
                assert_eq!(servers, (0, 0), "{names}: {reloaded:?}");
            }
        }
        balancer.reload(plain()).expect("a good configuration");
    }
}

#[test]
fn the_table_is_one_to_read() {
    let library: Vec<&OptionSpec> = option_sections().iter().flat_map(OptionSection::options).collect();
    let program = PROGRAM.iter().flat_map(|(_, specs)| specs.iter());
    let all: Vec<&OptionSpec> = library.into_iter().chain(program).collect();
    for (place, spec) in all.iter().enumerate() {
        assert!(all[place + 1..].iter().all(|other| other.name != spec.name), "{} twice", spec.name);
        assert!(!spec.help.is_empty() && !spec.help.ends_with('.'), "{}: {}", spec.name, spec.help);
    }
    assert!(!COMPATIBILITY_HELP.is_empty());
}
