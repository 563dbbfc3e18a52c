//! Prometheus' text exposition format, version 0.0.4.

use std::fmt::{Display, Write as _};

use super::histogram::{BucketBounds, Histogram};

/// A metric family: what is written of a metric besides its samples.
pub(super) struct Family {
    pub(super) name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub(super) kind: &'static str,
    pub(super) help: &'static str,
}

/// A label's name and its value, which is escaped when it is written.
pub(super) type Label<'a> = (&'static str, &'a str);

/// The text of a scrape, written from the top down.
#[derive(Default)]
pub(super) struct Exposition(String);

impl Exposition {
    pub(super) fn finish(self) -> String {
        self.0
    }

    /// Begins a family. The format wants all of its samples behind it, and those of no other.
    pub(super) fn family(&mut self, family: &Family) {
        let Family { name, kind, help } = family;
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub(super) fn value(&mut self, family: &Family, labels: &[Label<'_>], value: impl Display) {
        self.sample(family.name, "", labels, None, value);
    }

    pub(super) fn histogram<const N: usize>(
        &mut self,
        family: &Family,
        labels: &[Label<'_>],
        bounds: &BucketBounds<N>,
        histogram: &Histogram<N>,
    ) {
        let mut count = 0;
        // Each bucket of the format contains those below it.
        for (bound, bucket) in bounds.nanos.iter().zip(histogram.buckets) {
            count += bucket;
            self.sample(family.name, "_bucket", labels, Some(&seconds(*bound).to_string()), count);
        }
        count += histogram.overflow;
        self.sample(family.name, "_bucket", labels, Some("+Inf"), count);
        self.sample(family.name, "_sum", labels, None, seconds(histogram.sum));
        self.sample(family.name, "_count", labels, None, count);
    }

    fn sample(
        &mut self,
        name: &str,
        suffix: &str,
        labels: &[Label<'_>],
        bound: Option<&str>,
        value: impl Display,
    ) {
        let _ = write!(self.0, "{name}{suffix}");
        // A sample without labels has no braces, so the first label writes the opening one.
        let mut separator = '{';
        for (label, value) in labels.iter().copied().chain(bound.map(|bound| ("le", bound))) {
            let _ = write!(self.0, "{separator}{label}=\"");
            self.push_escaped(value);
            self.0.push('"');
            separator = ',';
        }
        let _ = writeln!(self.0, "{} {value}", if separator == ',' { "}" } else { "" });
    }

    /// Escapes the three characters that the format does not allow in a label's value.
    fn push_escaped(&mut self, value: &str) {
        for character in value.chars() {
            match character {
                '\\' => self.0.push_str("\\\\"),
                '"' => self.0.push_str("\\\""),
                '\n' => self.0.push_str("\\n"),
                other => self.0.push(other),
            }
        }
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const TIMES: Family = Family { name: "t_seconds", kind: "histogram", help: "Some times." };

    #[test]
    fn buckets_are_cumulative_and_end_with_all() {
        static BOUNDS: BucketBounds<2> = BucketBounds::micros([5, 1_000]);
        let mut histogram = Histogram::default();
        for micros in [1, 7, 2_000] {
            histogram.observe(&BOUNDS, Duration::from_micros(micros));
        }
        let mut text = Exposition::default();
        text.family(&TIMES);
        text.histogram(&TIMES, &[("a", "b")], &BOUNDS, &histogram);
        let expected = "# HELP t_seconds Some times.\n# TYPE t_seconds histogram\n\
            t_seconds_bucket{a=\"b\",le=\"0.000005\"} 1\nt_seconds_bucket{a=\"b\",le=\"0.001\"} 2\n\
            t_seconds_bucket{a=\"b\",le=\"+Inf\"} 3\nt_seconds_sum{a=\"b\"} 0.002008\n\
            t_seconds_count{a=\"b\"} 3\n";
        assert_eq!(text.finish(), expected);
    }

    #[test]
    fn a_label_value_cannot_end_its_quotes() {
        let mut text = Exposition::default();
        text.value(&TIMES, &[("a", "x\"} 1\ny\\")], 0);
        text.value(&TIMES, &[], 1.5);
        assert_eq!(text.finish(), "t_seconds{a=\"x\\\"} 1\\ny\\\\\"} 0\nt_seconds 1.5\n");
    }
}
