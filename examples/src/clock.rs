//! The only place that reads the wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, for the `created` fields of the OpenAI shapes; 0 on a machine whose clock is before that.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the clock")]
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// The time `unix_seconds` as `2026-02-03T04:05:06+00:00`, the form of SGLang's load reports.
#[must_use]
pub fn iso_time(unix_seconds: u64) -> String {
    let (days, in_day) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // Days since 0000-03-01, so that a leap day is the last of its year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (in_day / 3600, in_day / 60 % 60, in_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}+00:00")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(iso_time(0), "1970-01-01T00:00:00+00:00");
        assert_eq!(iso_time(951_782_400), "2000-02-29T00:00:00+00:00");
        assert_eq!(iso_time(1_755_589_644), "2025-08-19T07:47:24+00:00");
        assert_eq!(iso_time(4_107_542_399), "2100-02-28T23:59:59+00:00");
        assert_eq!(iso_time(4_107_542_400), "2100-03-01T00:00:00+00:00");
    }
}
