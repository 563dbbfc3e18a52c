//! The options of the program alone: a table as the library's, and what the accepted flags of `sglang_router`
//! say.
//!
//! A table only: `tests/configuration_docs.rs` reads this same file.

use mini_lb::ValueKind::{Single, Switch};
use mini_lb::{OptionDefault, OptionSpec};

/// The options of the program alone, by section.
pub(crate) const PROGRAM: [(&str, &[OptionSpec]); 2] = [
    (
        "Logging",
        &[
            // The log is started once, before the router, so all of these need a restart.
            OptionSpec::new("log-level", Single("debug|info|warn|error"))
                .default(OptionDefault::Text("info"))
                .after_restart()
                .help("Least severe events to log. The log goes to stderr"),
            OptionSpec::new("log-format", Single("text|json"))
                .default(OptionDefault::Text("text"))
                .after_restart()
                .help("Format of log lines; json is one object per line"),
            OptionSpec::new("log-dir", Single("FOLDER")).after_restart().help(
                "Folder to log to as well, with a file per day: mini-lb.2026-01-31.log (UTC). The newest 30 are kept",
            ),
            // No FILE, which a reload would read.
            OptionSpec::new("trace-log", Single("PATH")).after_restart().help(
                "File for a load trace, to replay it: a line for each generation request in Mooncake's format, \
                 without any text. A file that is there is renamed to PATH.1 at the start",
            ),
            OptionSpec::new("trace-log-max-bytes", Single("BYTES"))
                .default(OptionDefault::Number(256 << 20))
                .at_least(64 << 10)
                .after_restart()
                .help("Size at which the trace's file is renamed to PATH.1, in place of an older one, and the next begins"),
        ],
    ),
    (
        "Configuration",
        &[
            // A file cannot name itself, so there is no key. `MINI_LB_CONFIG` is read where the variables
            // are.
            OptionSpec::new("config", Single("FILE")).help(
                "TOML file with a key for each flag. Environment variables MINI_LB_... override it, and flags override \
                 both. It is read again on SIGHUP and when it changes. MINI_LB_CONFIG names it too",
            ),
            OptionSpec::new("check-config", Switch)
                .help("Check the configuration, print the effective one as TOML with the origin of each value, and exit"),
            OptionSpec::new("probe", Switch).help(
                "With --check-config: ask each server once what it is, and print a table of what fits instead of the \
                 configuration. The exit code is 3 if a server does not fit or does not answer",
            ),
        ],
    ),
];

/// Flags that are about this run of the program. They have no key and no variable.
pub(crate) const COMMAND_LINE_ONLY: [&str; 5] = ["config", "check-config", "probe", "help", "version"];

/// What the flags do that are accepted and have no effect.
pub(crate) const COMPATIBILITY_HELP: &str =
    "Accepted for compatibility, without effect: mini-lb always does this";
