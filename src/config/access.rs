//! Keys and origins: who may send requests to the router, and what servers are shown.

use std::fs;
use std::path::Path;

use super::{ConfigError, MiniLbConfig};
use crate::admission::{AccessOptions, Origins, Secret};
use crate::options::Keys;

impl Keys {
    /// Adds the keys in files to those that were given.
    pub(super) fn read_files(&mut self) -> Result<(), ConfigError> {
        if let Some(path) = self.client_file.take() {
            // Added: each key is valid, so that a new one can be introduced before the old one is removed.
            self.client.extend(keys_in("--api-key-file", &path)?);
        }
        let Self { admin, admin_file, worker, worker_file, .. } = self;
        for (flag, key, file) in
            [("--admin-api-key", admin, admin_file), ("--worker-api-key", worker, worker_file)]
        {
            let Some(path) = file.take() else { continue };
            let file_flag = format!("{flag}-file");
            let refused = |why: &str| Err(ConfigError::new(format!("{file_flag} {}: {why}", path.display())));
            // There is one key of this kind, and no order between the two ways to give it.
            if key.is_some() {
                return refused(&format!("cannot be used together with {flag}"));
            }
            match <[String; 1]>::try_from(keys_in(&file_flag, &path)?) {
                Ok([only]) => *key = Some(only),
                Err(keys) => {
                    return refused(&format!("the file must have one key, and it has {}", keys.len()));
                }
            }
        }
        Ok(())
    }

    /// The rules, if every key can be sent as a header and every origin is one.
    pub(super) fn validate(&self) -> Result<AccessOptions, ConfigError> {
        let secret = |flag: &str, key: &String| {
            // The error is printed and logged, so the key itself is not in it.
            Secret::new(key).map_err(|why| ConfigError::new(format!("{flag} ***: {why}")))
        };
        let one = |flag, key: &Option<String>| key.as_ref().map(|key| secret(flag, key)).transpose();
        let worker_key = one("--worker-api-key", &self.worker)?;
        // Otherwise clients' requests would reach servers without any key, which cannot be meant.
        if self.worker_replaces && worker_key.is_none() {
            let sentence = "--worker-api-key-replaces-authorization: there is no --worker-api-key";
            return Err(ConfigError::new(sentence.into()));
        }
        let origins = Origins::new(self.origins.clone()).map_err(|bad| {
            ConfigError::new(format!(
                "--cors-allowed-origins {}: not an origin such as https://chat.example.com, or *",
                bad.escape_debug()
            ))
        })?;
        Ok(AccessOptions {
            client_keys: self.client.iter().map(|key| secret("--api-key", key)).collect::<Result<_, _>>()?,
            admin_key: one("--admin-api-key", &self.admin)?,
            worker_key,
            worker_key_replaces: self.worker_replaces,
            origins,
        })
    }
}

/// The lines of a file that are not empty. A file without any would turn the check off, and is refused.
fn keys_in(flag: &str, path: &Path) -> Result<Vec<String>, ConfigError> {
    let refused = |why: String| ConfigError::new(format!("{flag} {}: {why}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
    // Trimmed: editors end a file with a line end, a Kubernetes secret often has none.
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() { Err(refused("there is no key in the file".into())) } else { Ok(keys) }
}

impl MiniLbConfig {
    /// Requires clients to send this key (`Authorization: Bearer KEY`) for everything but `/health` and
    /// `/ready`. May be called again: each key is valid, so that keys can be changed one client at a time. At
    /// most 256 bytes of printable ASCII. Default: clients need no key.
    #[must_use]
    pub fn api_key(mut self, key: impl Into<String>) -> Self {
        self.options.keys.client.push(key.into());
        self
    }

    /// Requires operators to send this key. Default: none, and only operators on loopback are allowed.
    #[must_use]
    pub fn admin_api_key(mut self, key: impl Into<String>) -> Self {
        self.options.keys.admin = Some(key.into());
        self
    }

    /// Sends this key to servers with the router's own requests, such as health checks. Default: none.
    #[must_use]
    pub fn worker_api_key(mut self, key: impl Into<String>) -> Self {
        self.options.keys.worker = Some(key.into());
        self
    }

    /// Whether servers get the [`worker_api_key`](Self::worker_api_key) with clients' requests too, instead
    /// of the `Authorization` that the client sent. Without an [`api_key`](Self::api_key) that gives everyone
    /// who can reach the router access to the servers. Default: no, the client's own is passed on.
    #[must_use]
    pub fn worker_api_key_replaces_authorization(mut self, replaces: bool) -> Self {
        self.options.keys.worker_replaces = replaces;
        self
    }

    /// Lets pages of these origins read responses (CORS), and responds to their browsers' preflight requests;
    /// `*` is every origin. Default: none, and the servers' own CORS headers are passed on.
    #[must_use]
    pub fn cors_allowed_origins(mut self, origins: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.options.keys.origins = origins.into_iter().map(Into::into).collect();
        self
    }
}
