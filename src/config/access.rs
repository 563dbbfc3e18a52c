//! Who may ask.

use super::{ConfigError, MiniLbConfig};
use crate::admission::{AccessOptions, Origins, Secret};

/// Keys and origins as they were given. `Debug` shows no key.
#[derive(Clone, Default)]
pub(crate) struct Keys {
    client: Vec<String>,
    admin: Option<String>,
    worker: Option<String>,
    worker_replaces: bool,
    origins: Vec<String>,
}

impl Keys {
    /// The rules, if the keys can be keys and the origins are some.
    pub(crate) fn settle(&self) -> Result<AccessOptions, ConfigError> {
        let secret = |flag: &str, key: &String| {
            Secret::new(key).map_err(|why| ConfigError::new(format!("{flag} ***: {why}")))
        };
        let one = |flag, key: &Option<String>| key.as_ref().map(|key| secret(flag, key)).transpose();
        let worker_key = one("--worker-api-key", &self.worker)?;
        if self.worker_replaces && worker_key.is_none() {
            return Err(ConfigError::new(
                "--worker-api-key-replaces-authorization: there is no --worker-api-key".into(),
            ));
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

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

impl MiniLbConfig {
    /// Wants this key, as `Authorization: Bearer KEY`, of clients for everything but `/health` and `/ready`. May be
    /// called again: each key is good, so that keys can be changed one client at a time. At most 256 bytes of printable
    /// ASCII. Default: clients need no key.
    #[must_use]
    pub fn api_key(mut self, key: impl Into<String>) -> Self {
        self.options.keys.client.push(key.into());
        self
    }

    /// Wants this key of operators. Default: none, and they are answered on loopback only.
    #[must_use]
    pub fn admin_api_key(mut self, key: impl Into<String>) -> Self {
        self.options.keys.admin = Some(key.into());
        self
    }

    /// Shows this key to servers in what the router asks by itself. Default: none.
    #[must_use]
    pub fn worker_api_key(mut self, key: impl Into<String>) -> Self {
        self.options.keys.worker = Some(key.into());
        self
    }

    /// Whether servers get the [`worker_api_key`](Self::worker_api_key) with clients' requests too, instead of what
    /// clients sent as `Authorization`. Without an [`api_key`](Self::api_key) that lets everyone in who can reach the
    /// router. Default: no, clients' own is passed on.
    #[must_use]
    pub fn worker_api_key_replaces_authorization(mut self, replaces: bool) -> Self {
        self.options.keys.worker_replaces = replaces;
        self
    }

    /// Lets pages of these origins read answers (CORS), and answers their browsers' `OPTIONS` requests; `*` is every
    /// origin. Default: none, and what servers say about it is passed on.
    #[must_use]
    pub fn cors_allowed_origins(mut self, origins: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.options.keys.origins = origins.into_iter().map(Into::into).collect();
        self
    }
}
