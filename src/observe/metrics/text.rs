//! Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write as _};

use super::histogram::{Histogram, Scale};

/// What is said of a metric besides its values.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    pub(super) help: &'static str,
}

/// A label's name and value. Values are escaped when they are written.
pub(super) type Label<'a> = (&'static str, &'a str);

/// Text that grows.
#[derive(Default)]
pub(super) struct Text(String);

impl Text {
    pub(super) fn finish(self) -> String {
        self.0
    }

    /// Begins a metric; all of its values follow.
    pub(super) fn family(&mut self, family: &Family) {
        let Family { name, kind, help } = family;
        // To write to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub(super) fn value(&mut self, family: &Family, labels: &[Label<'_>], value: impl Display) {
        self.sample(family.name, "", labels, None, value);
    }

    pub(super) fn histogram<const N: usize>(
        &mut self,
        family: &Family,
        labels: &[Label<'_>],
        scale: &Scale<N>,
        histogram: &Histogram<N>,
    ) {
        let mut count = 0;
        for (bound, within) in scale.bounds.iter().zip(histogram.within) {
            count += within;
            self.sample(family.name, "_bucket", labels, Some(&seconds(*bound).to_string()), count);
        }
        count += histogram.beyond;
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
        let mut separator = '{';
        for (label, value) in labels.iter().copied().chain(bound.map(|bound| ("le", bound))) {
            let _ = write!(self.0, "{separator}{label}=\"");
            self.escaped(value);
            self.0.push('"');
            separator = ',';
        }
        let _ = writeln!(self.0, "{} {value}", if separator == ',' { "}" } else { "" });
    }

    fn escaped(&mut self, value: &str) {
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
    fn buckets_add_up_and_end_with_all() {
        static SCALE: Scale<2> = Scale::micros([5, 1_000]);
        let mut histogram = Histogram::default();
        for micros in [1, 7, 2_000] {
            histogram.observe(&SCALE, Duration::from_micros(micros));
        }
        let mut text = Text::default();
        text.family(&TIMES);
        text.histogram(&TIMES, &[("a", "b")], &SCALE, &histogram);
        let expected = "# HELP t_seconds Some times.\n# TYPE t_seconds histogram\n\
            t_seconds_bucket{a=\"b\",le=\"0.000005\"} 1\nt_seconds_bucket{a=\"b\",le=\"0.001\"} 2\n\
            t_seconds_bucket{a=\"b\",le=\"+Inf\"} 3\nt_seconds_sum{a=\"b\"} 0.002008\n\
            t_seconds_count{a=\"b\"} 3\n";
        assert_eq!(text.finish(), expected);
    }

    #[test]
    fn a_value_cannot_end_its_quotes() {
        let mut text = Text::default();
        text.value(&TIMES, &[("a", "x\"} 1\ny\\")], 0);
        text.value(&TIMES, &[], 1.5);
        assert_eq!(text.finish(), "t_seconds{a=\"x\\\"} 1\\ny\\\\\"} 0\nt_seconds 1.5\n");
    }
}
