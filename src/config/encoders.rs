//! Encoders, and where prefill servers take their registrations.

use super::discovery::host_and_port;
use super::settings::address;
use super::{ConfigError, MiniLbConfig};
use crate::options::EncoderOptions;
use crate::upstream::{EncoderName, EncoderSpec, MAX_ENCODERS};

impl EncoderOptions {
    /// The encoders, if each is a URL, and each name a host and a port.
    pub(super) fn spec(&self) -> Result<EncoderSpec, ConfigError> {
        if self.urls.len() > MAX_ENCODERS {
            return Err(ConfigError::new(format!("at most {MAX_ENCODERS} encoders are supported")));
        }
        Ok(EncoderSpec {
            configured: self.urls.iter().map(|url| address("--encode", url)).collect::<Result<_, _>>()?,
            names: self.names.iter().map(|name| encoder_name(name)).collect::<Result<_, _>>()?,
            bootstrap_port: self.bootstrap_port,
        })
    }
}

fn encoder_name(name: &str) -> Result<EncoderName, ConfigError> {
    let (host, port) = host_and_port("--encode-dns", name)?;
    Ok(EncoderName { host, port })
}

impl MiniLbConfig {
    /// Registers the encoder at this URL (SGLang's `--encoder-only`) with each language-only prefill server,
    /// again after it has restarted, and checks its health. While all encoders are down, requests with
    /// images, audio or video are rejected with 503. `url` is the one under which prefill servers reach the
    /// encoder. May be called for several encoders.
    #[must_use]
    pub fn encoder(mut self, url: impl Into<String>) -> Self {
        self.options.encoders.urls.push(url.into());
        self
    }

    /// Treats every address of a DNS name (`host:port`) as an encoder, as [`encoder`](Self::encoder), and
    /// follows changes.
    #[must_use]
    pub fn encode_dns(mut self, name: impl Into<String>) -> Self {
        self.options.encoders.names.push(name.into());
        self
    }

    /// The port on which all language-only prefill servers take registrations. Default: the one that each
    /// server says in `/server_info` (its `--encoder-bootstrap-port`), or SGLang's default, 8997.
    #[must_use]
    pub fn encoder_bootstrap_port(mut self, port: u16) -> Self {
        self.options.encoders.bootstrap_port = Some(port);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(config: MiniLbConfig) -> Result<EncoderSpec, String> {
        config.options.encoders.spec().map_err(|error| error.to_string())
    }

    #[test]
    fn encoders_are_urls_and_names_with_a_port() {
        let config = || MiniLbConfig::new("h", 1, vec![], vec![], 1);
        let read = spec(config().encoder("http://E:30010/").encode_dns("e.svc:7")).unwrap();
        assert_eq!(read.configured[0].url, "http://e:30010");
        assert_eq!(read.names, [EncoderName { host: "e.svc".into(), port: 7 }]);
        assert_eq!(read.bootstrap_port, None);
        assert!(spec(config().encoder("e:1")).unwrap_err().starts_with("--encode e:1: "));
        for wrong in ["e", "e:", "http://e:1", "e:1/", "::1:1", "a b:1"] {
            let error = spec(config().encode_dns(wrong)).unwrap_err();
            assert!(error.starts_with(&format!("--encode-dns {wrong}: ")), "{error}");
        }
        let many = (0..=MAX_ENCODERS)
            .fold(config(), |config, port| config.encoder(format!("http://e:{}", port + 1)));
        assert!(spec(many).is_err());
    }
}
