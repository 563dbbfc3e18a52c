//! A complete distribution of times, small enough for a report, so that quantiles of several runs together
//! can be computed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// How often each number of microseconds occurred. Serialised as one string, `213:4 214:8`, which stays on
/// one line of a pretty-printed `results.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Distribution(BTreeMap<u64, u64>);

impl Distribution {
    /// From a histogram of nanoseconds.
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        let mut times = Self::default();
        for step in histogram.iter_recorded() {
            *times.0.entry(step.value_iterated_to() / 1000).or_default() += step.count_at_value();
        }
        times
    }

    /// Adds the times of another run.
    pub fn add(&mut self, other: &Self) {
        for (time, count) in &other.0 {
            *self.0.entry(*time).or_default() += count;
        }
    }

    /// Number of times.
    pub fn count(&self) -> u64 {
        self.0.values().sum()
    }

    /// The quantile `share`, in microseconds.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let wanted = (share * self.count() as f64).ceil() as u64;
        let mut seen = 0;
        let found = self.0.iter().find(|(_, count)| {
            seen += **count;
            seen >= wanted
        });
        found.map(|(time, _)| *time as f64)
    }
}

impl From<Distribution> for String {
    fn from(times: Distribution) -> Self {
        let mut text = Self::new();
        for (time, count) in times.0 {
            let _ = write!(text, "{time}:{count} ");
        }
        text
    }
}

impl TryFrom<String> for Distribution {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let pair = |word: &str| {
            let (time, count) = word.split_once(':')?;
            Some((time.parse().ok()?, count.parse().ok()?))
        };
        let pairs: Option<_> = text.split_whitespace().map(pair).collect();
        pairs.map(Self).ok_or_else(|| "not TIME:COUNT".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(text: &str) -> Distribution {
        text.to_owned().try_into().expect("times")
    }

    #[test]
    fn quantiles_cover_all_added_runs() {
        let mut all = times("100:98 200:1 300:1");
        assert_eq!(
            (all.quantile(0.5), all.quantile(0.99), all.quantile(1.0)),
            (Some(100.0), Some(200.0), Some(300.0))
        );
        all.add(&times("300:100"));
        assert_eq!((all.count(), all.quantile(0.5)), (200, Some(300.0)));
        assert_eq!(Distribution::default().quantile(0.5), None);
    }

    #[test]
    fn a_distribution_parses_back_from_its_text() {
        let all = times("100:98 200:1");
        assert_eq!(times(&String::from(all.clone())), all);
        assert!(Distribution::try_from("100".to_owned()).is_err());
    }
}
