//! Who may ask, as typed or as read from files, so that a key need not be seen in a list of processes.

use std::convert::Infallible;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use mini_lb::MiniLbConfig;

use super::refusal;

#[derive(Debug, Args)]
pub(super) struct Access {
    /// Key that clients must show (Authorization: Bearer KEY) for all but /health and /ready. May be repeated: each
    /// is good
    #[arg(long, value_name = "KEY")]
    api_key: Vec<Key>,
    /// File with such keys, one a line
    #[arg(long, value_name = "PATH")]
    api_key_file: Option<PathBuf>,
    /// Key that operators must show; without one they are answered on loopback only
    #[arg(long, value_name = "KEY")]
    admin_api_key: Option<Key>,
    /// File with that key
    #[arg(long, value_name = "PATH", conflicts_with = "admin_api_key")]
    admin_api_key_file: Option<PathBuf>,
    /// Key that the router shows to servers in what it asks by itself
    #[arg(long, value_name = "KEY")]
    worker_api_key: Option<Key>,
    /// File with that key
    #[arg(long, value_name = "PATH", conflicts_with = "worker_api_key")]
    worker_api_key_file: Option<PathBuf>,
    /// Show that key to servers with clients' requests too, instead of what clients sent as Authorization
    #[arg(long)]
    worker_api_key_replaces_authorization: bool,
    /// Origins whose pages may read answers (CORS), such as https://chat.example.com; * is every origin
    #[arg(long, value_name = "ORIGIN", num_args = 1.., value_delimiter = ',')]
    cors_allowed_origins: Vec<String>,
}

impl Access {
    pub(super) fn add(&self, config: MiniLbConfig) -> Result<MiniLbConfig, clap::Error> {
        let mut config = config
            .cors_allowed_origins(&self.cors_allowed_origins)
            .worker_api_key_replaces_authorization(self.worker_api_key_replaces_authorization);
        let in_file = match &self.api_key_file {
            Some(path) => keys_in("--api-key-file", path)?,
            None => Vec::new(),
        };
        for Key(key) in self.api_key.iter().cloned().chain(in_file) {
            config = config.api_key(key);
        }
        if let Some(Key(key)) = one("--admin-api-key-file", &self.admin_api_key, &self.admin_api_key_file)? {
            config = config.admin_api_key(key);
        }
        if let Some(Key(key)) = one("--worker-api-key-file", &self.worker_api_key, &self.worker_api_key_file)?
        {
            config = config.worker_api_key(key);
        }
        Ok(config)
    }
}

/// The key that was typed, or that is in a file.
fn one(flag: &str, typed: &Option<Key>, path: &Option<PathBuf>) -> Result<Option<Key>, clap::Error> {
    let Some(path) = path else { return Ok(typed.clone()) };
    match <[Key; 1]>::try_from(keys_in(flag, path)?) {
        Ok([key]) => Ok(Some(key)),
        Err(keys) => {
            Err(refusal(format_args!("{flag} {}: one key is wanted, not {}", path.display(), keys.len())))
        }
    }
}

/// The lines of a file that are not empty. A file without any would switch a check off, and is refused.
fn keys_in(flag: &str, path: &Path) -> Result<Vec<Key>, clap::Error> {
    let refused = |why: &dyn fmt::Display| refusal(format_args!("{flag} {}: {why}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| refused(&error))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let keys: Vec<Key> = lines.map(|line| Key(line.to_owned())).collect();
    if keys.is_empty() { Err(refused(&"there is no key in it")) } else { Ok(keys) }
}

/// A key that is not shown.
#[derive(Clone)]
struct Key(String);

impl FromStr for Key {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
