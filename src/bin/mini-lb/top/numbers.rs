//! Shares of histograms, and numbers as short texts.

use std::collections::BTreeMap;

use super::series::label;

/// Counts by upper bound, cumulative; the bounds are the bits of numbers that are not negative, which sort as
/// they do.
#[derive(Default)]
pub(super) struct Buckets(BTreeMap<u64, f64>);

impl Buckets {
    /// From the series of a `_bucket` family, by labels, and what they have counted.
    pub(super) fn of<'a>(series: impl Iterator<Item = (&'a str, f64)>) -> Self {
        let mut buckets = Self::default();
        for (labels, count) in series {
            let bound: f64 = label(labels, "le").parse().unwrap_or(f64::INFINITY);
            *buckets.0.entry(bound.max(0.0).to_bits()).or_default() += count;
        }
        buckets
    }

    /// Like Prometheus' `histogram_quantile`: linear within a bucket, and the last finite bound above it.
    /// `None`: there are no samples.
    pub(super) fn quantile(&self, share: f64) -> Option<f64> {
        let rank = share * self.0.last_key_value().map_or(0.0, |(_, count)| *count);
        if rank <= 0.0 {
            return None;
        }
        let (mut low, mut below) = (0.0, 0.0);
        for (bound, up_to) in &self.0 {
            let bound = f64::from_bits(*bound);
            if *up_to >= rank {
                let within = low + (bound - low) * (rank - below) / (up_to - below);
                return Some(if bound.is_infinite() { low } else { within });
            }
            (low, below) = (bound, *up_to);
        }
        Some(low)
    }
}

/// Two digits, or a whole number with the thousands apart.
pub(super) fn short(number: f64) -> String {
    if number == 0.0 || !number.is_finite() {
        return "0".to_owned();
    }
    if number.fract() == 0.0 || number >= 10.0 {
        let digits = format!("{number:.0}");
        let places = digits.len();
        let comma = |(place, digit)| {
            let is_first = place == 0 || (places - place) % 3 != 0;
            [(!is_first).then_some(','), Some(digit)]
        };
        return digits.chars().enumerate().flat_map(comma).flatten().collect();
    }
    if number >= 1.0 { format!("{number:.1}") } else { format!("{number:.2}") }
}

pub(super) fn per_second(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), |rate| format!("{}/s", short(rate)))
}

pub(super) fn seconds(time: Option<f64>) -> String {
    match time {
        None => "-".to_owned(),
        Some(time) if time < 1e-3 => format!("{} us", short(time * 1e6)),
        Some(time) if time < 1.0 => format!("{} ms", short(time * 1e3)),
        Some(time) => format!("{} s", short(time)),
    }
}

pub(super) fn bytes(number: f64) -> String {
    let mut number = number;
    for unit in ["B", "KiB", "MiB"] {
        if number < 1024.0 {
            return format!("{} {unit}", short(number));
        }
        number /= 1024.0;
    }
    format!("{} GiB", short(number))
}

/// A part in percent.
pub(super) fn share(part: f64, whole: f64) -> String {
    if whole > 0.0 { format!("{:.0} %", 100.0 * part / whole) } else { "-".to_owned() }
}

pub(super) fn uptime(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated_as_by_prometheus() {
        let buckets = |counts: &[(&'static str, f64)]| Buckets::of(counts.iter().copied());
        let some = buckets(&[("le=\"1\"", 2.0), ("le=\"2\"", 4.0), ("le=\"+Inf\"", 4.0)]);
        assert_eq!(some.quantile(0.5), Some(1.0));
        assert_eq!(some.quantile(0.75), Some(1.5));
        let above = buckets(&[("le=\"1\"", 1.0), ("le=\"+Inf\"", 4.0)]);
        assert_eq!(above.quantile(0.99), Some(1.0));
        assert_eq!(buckets(&[("le=\"1\"", 0.0), ("le=\"+Inf\"", 0.0)]).quantile(0.5), None);
        assert_eq!(buckets(&[]).quantile(0.5), None);
    }

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (0.123, "0.12"),
            (1.26, "1.3"),
            (12.7, "13"),
            (1_234.0, "1,234"),
            (1e6, "1,000,000"),
            (f64::NAN, "0"),
        ] {
            assert_eq!(short(number), text);
        }
        assert_eq!([2e-5, 0.0123, 3.0].map(|time| seconds(Some(time))), ["20 us", "12 ms", "3 s"]);
        assert_eq!([7.0, 2048.0, 3.5 * 1_048_576.0, 5e9].map(bytes), ["7 B", "2 KiB", "3.5 MiB", "4.7 GiB"]);
        assert_eq!([9.0, 61.0, 3_700.0, 90_000.0].map(uptime), ["9 s", "1 min", "1 h 1 min", "1 d 1 h"]);
    }
}
