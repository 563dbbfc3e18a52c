//! Formats dates and times for lines and file names.

use std::time::SystemTime;

use super::escape::digits;

/// Formats times. Caches the text of a second, since most lines share theirs with the line before.
#[derive(Default)]
pub(super) struct Clock {
    second: u64,
    /// Date and time up to the decimal point; empty before the first time.
    begin: String,
}

impl Clock {
    /// Puts the present time.
    pub(super) fn put_now(&mut self, into: &mut Vec<u8>) {
        self.put(SystemTime::now(), into);
    }

    /// Puts a time in UTC, to the microsecond.
    fn put(&mut self, time: SystemTime, into: &mut Vec<u8>) {
        // A clock before 1970 is written as 1970: a wrong time is better than a lost line.
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if self.second != since.as_secs() || self.begin.is_empty() {
            self.second = since.as_secs();
            let (day, second) = (self.second / 86_400, self.second % 86_400);
            let (hours, minutes, seconds) = (second / 3_600, second / 60 % 60, second % 60);
            self.begin = format!("{}T{hours:02}:{minutes:02}:{seconds:02}.", date(day));
        }
        into.extend_from_slice(self.begin.as_bytes());
        into.extend_from_slice(&digits(since.subsec_micros()));
        into.push(b'Z');
    }
}

/// The date of a day, counted from 1970. The calendar repeats every 400 years, and if years begin in March,
/// the leap day is a year's last.
pub(super) fn date(day: u64) -> String {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    // From 0000-03-01 to 1970-01-01.
    let day = day + 719_468;
    let (era, day) = (day / DAYS_OF_400_YEARS, day % DAYS_OF_400_YEARS);
    // Leap days are subtracted first, so that each year has 365 days: one in 4 years, none in the last of
    // 100, one in the last of 400.
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March and from August on, months have 31, 30, 31, 30 and 31 days: 153 in five months.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (day, expected) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_453, "2025-12-31"),
            (20_454, "2026-01-01"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(day), expected);
        }
        let mut clock = Clock::default();
        for (micros, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (1_767_225_599_000_007, "2025-12-31T23:59:59.000007Z"),
            (1_767_225_599_999_999, "2025-12-31T23:59:59.999999Z"),
            (1_767_225_600_120_304, "2026-01-01T00:00:00.120304Z"),
        ] {
            let mut written = Vec::new();
            clock.put(SystemTime::UNIX_EPOCH + Duration::from_micros(micros), &mut written);
            assert_eq!(written, expected.as_bytes());
        }
    }
}
