//! How the text of a value becomes the value that is kept, for each type of value.

use std::fmt::Debug;
use std::fs;
use std::num::IntErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use super::values::{AdminPort, NamedPolicy, PemFile, PemFiles, Policies, WorkerUrls};
use crate::transport::Http1Engine;
use crate::upstream::{CacheAware, ConsistentHash, LeastLoad, PowerOfTwo, Random, RoundRobin};
use crate::wire::shape::FieldTreatment;

/// Where the value of an option is kept.
pub(super) trait OptionField: Debug {
    /// Unsets the value. One that must always be there stays.
    fn clear(&mut self);

    /// Takes over the values of one occurrence of the option; a list gets one more item. The error says what
    /// is wrong with them, without naming the option.
    fn add(&mut self, values: &[String]) -> Result<(), String>;

    /// The numbers that have bounds.
    fn numbers(&self) -> Vec<u64> {
        Vec::new()
    }

    /// What tells this value from another one. It may be secret.
    fn snapshot(&self) -> String {
        format!("{self:?}")
    }
}

/// The value of an option that has exactly one.
fn one(values: &[String]) -> &str {
    values.first().map_or("", String::as_str)
}

/// Finds a value by its name among those that there are.
pub(super) fn one_of<T: Copy>(values: &[String], choices: &[(&str, T)]) -> Result<T, String> {
    let found = choices.iter().find(|(name, _)| *name == one(values)).map(|(_, value)| *value);
    let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    found.ok_or_else(|| format!("must be {}", names().join(" or ")))
}

pub(super) const NOT_A_NUMBER: &str = "not a whole number";

/// A whole number up to `max`.
fn number(values: &[String], max: u64) -> Result<u64, String> {
    let too_large = || format!("the value must be at most {max}");
    match one(values).parse::<u64>() {
        Ok(number) if number <= max => Ok(number),
        // A number beyond 64 bits is a whole number, so the error is about its size.
        Err(error) if *error.kind() != IntErrorKind::PosOverflow => Err(NOT_A_NUMBER.to_owned()),
        _ => Err(too_large()),
    }
}

macro_rules! numbers {
    ($($type:ty),*) => {$(
        impl OptionField for $type {
            fn clear(&mut self) {}

            fn add(&mut self, values: &[String]) -> Result<(), String> {
                *self = number(values, <$type>::MAX as u64)? as $type;
                Ok(())
            }

            fn numbers(&self) -> Vec<u64> {
                vec![*self as u64]
            }
        }

        impl OptionField for Option<$type> {
            fn clear(&mut self) {
                *self = None;
            }

            fn add(&mut self, values: &[String]) -> Result<(), String> {
                // A bad value leaves 0 here; no caller uses the options after an error.
                self.insert(0).add(values)
            }

            fn numbers(&self) -> Vec<u64> {
                self.iter().map(|number| *number as u64).collect()
            }
        }

        impl OptionField for Vec<$type> {
            fn clear(&mut self) {
                Self::clear(self);
            }

            fn add(&mut self, values: &[String]) -> Result<(), String> {
                let mut number: $type = 0;
                number.add(values)?;
                self.push(number);
                Ok(())
            }

            fn numbers(&self) -> Vec<u64> {
                self.iter().map(|number| *number as u64).collect()
            }
        }
    )*};
}

numbers!(u16, u32, usize);

/// In whole seconds: 136 years at most, so that no deadline overflows the clock.
impl OptionField for Duration {
    fn clear(&mut self) {}

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        *self = Self::from_secs(number(values, u32::MAX.into())?);
        Ok(())
    }

    fn numbers(&self) -> Vec<u64> {
        // A part of a second, which only a library's user can ask for, is more than none.
        vec![self.as_secs() + u64::from(self.subsec_nanos() > 0)]
    }
}

/// A flag without a value, or `true` or `false`.
impl OptionField for bool {
    fn clear(&mut self) {
        *self = false;
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        // A typed flag has no value. `set_option` allows one, as it does for all other options.
        *self = values.is_empty() || one_of(values, &[("true", true), ("false", false)])?;
        Ok(())
    }
}

impl OptionField for String {
    fn clear(&mut self) {}

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        one(values).clone_into(self);
        Ok(())
    }
}

impl OptionField for Option<String> {
    fn clear(&mut self) {
        *self = None;
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        *self = Some(one(values).to_owned());
        Ok(())
    }
}

impl OptionField for Option<PathBuf> {
    fn clear(&mut self) {
        *self = None;
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        *self = Some(one(values).into());
        Ok(())
    }
}

impl OptionField for Vec<String> {
    fn clear(&mut self) {
        Self::clear(self);
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        self.push(one(values).to_owned());
        Ok(())
    }
}

/// An empty list is one that was given, too.
impl OptionField for WorkerUrls {
    fn clear(&mut self) {
        *self = Self { is_given: true, urls: Vec::new() };
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        self.urls.add(values)
    }
}

/// A URL or a name, and a bootstrap port.
impl OptionField for Vec<(String, Option<u16>)> {
    fn clear(&mut self) {
        Self::clear(self);
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        let port = match values.get(1) {
            // In any case, as sglang_router compares it.
            Some(port) if !port.eq_ignore_ascii_case("none") => Some(bootstrap_port(port)?),
            _ => None,
        };
        self.push((one(values).to_owned(), port));
        Ok(())
    }
}

pub(crate) const BAD_BOOTSTRAP_PORT: &str = "the bootstrap port must be between 1 and 65535, or none";

fn bootstrap_port(text: &str) -> Result<u16, String> {
    // Several servers behind one flag, as `--worker-urls` takes them.
    let hint = if text.contains("://") { "; write the flag before each URL" } else { "" };
    // A port that cannot work would show in requests only: decode fails after about 14 s (measured).
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("{BAD_BOOTSTRAP_PORT}{hint}"))
}

impl OptionField for Vec<(String, String)> {
    fn clear(&mut self) {
        Self::clear(self);
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        // The second value is there: `OptionSpec::check` has counted them.
        self.push((one(values).to_owned(), values.get(1).cloned().unwrap_or_default()));
        Ok(())
    }
}

/// All roles, each with a policy of its own.
impl OptionField for Policies {
    fn clear(&mut self) {}

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        // Made for each, as each role has a counter of its own.
        self.prefill.add(values)?;
        self.regular.add(values)?;
        self.decode.add(values)
    }
}

impl OptionField for NamedPolicy {
    fn clear(&mut self) {}

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        // Functions, because a choice is copied and a policy with its state cannot be.
        let cache_aware: fn() -> Self = || Self::new(CacheAware::new());
        let policies = [
            ("cache_aware", cache_aware),
            ("least_load", || Self::new(LeastLoad)),
            ("power_of_two", || Self::new(PowerOfTwo)),
            ("consistent_hash", || Self::new(ConsistentHash)),
            ("round_robin", || Self::new(RoundRobin::default())),
            ("random", || Self::new(Random)),
        ];
        // Other names of sglang_router and smg.
        let name = match one(values) {
            "least_request" => "least_load",
            "po2" => "power_of_two",
            "consistent_hashing" | "prefix_hash" => "consistent_hash",
            name => name,
        };
        *self = one_of(&[name.to_owned()], &policies)?();
        Ok(())
    }
}

impl OptionField for Http1Engine {
    fn clear(&mut self) {}

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        let engines = [Self::Native, Self::Hyper].map(|engine| (engine.as_str(), engine));
        *self = one_of(values, &engines)?;
        Ok(())
    }
}

impl OptionField for FieldTreatment {
    fn clear(&mut self) {}

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        *self = one_of(values, &[("strip", Self::Strip), ("reject", Self::Reject), ("pass", Self::Pass)])?;
        Ok(())
    }
}

/// Unset, it depends on the servers.
impl OptionField for Option<FieldTreatment> {
    fn clear(&mut self) {
        *self = None;
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        self.insert(FieldTreatment::Strip).add(values)
    }
}

impl OptionField for AdminPort {
    fn clear(&mut self) {}

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        *self = match number(values, u16::MAX.into())? {
            // A port that the kernel chooses would be of no use to a scraper, so 0 can mean none.
            0 => Self::Off,
            port => Self::Required(port as u16),
        };
        Ok(())
    }
}

/// What tells certificates and keys from others is what is in their files.
impl OptionField for PemFile {
    fn clear(&mut self) {
        self.0 = None;
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        self.0.add(values)
    }

    fn snapshot(&self) -> String {
        // A file that cannot be read was an error before: certificates are loaded first.
        format!("{:?}", self.0.as_ref().map(|path| fs::read(path).ok()))
    }
}

impl OptionField for PemFiles {
    fn clear(&mut self) {
        self.0.clear();
    }

    fn add(&mut self, values: &[String]) -> Result<(), String> {
        self.0.push(one(values).into());
        Ok(())
    }

    fn snapshot(&self) -> String {
        format!("{:?}", self.0.iter().map(|path| fs::read(path).ok()).collect::<Vec<_>>())
    }
}

/// The place of an option that this build does not have.
#[cfg(not(all(feature = "otel", feature = "kubernetes")))]
impl OptionField for super::values::NotBuilt {
    fn clear(&mut self) {}

    fn add(&mut self, _: &[String]) -> Result<(), String> {
        Err(format!("this program was built without the feature {}", self.feature))
    }
}
