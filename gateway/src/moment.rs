//! A point in time, as people and programs name it.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The last second of the year 9999: what is later cannot be written in RFC 3339.
const MOMENT_MS_MAX: u64 = 253_402_300_799_000;

/// Milliseconds since 1970, written as in RFC 3339, in UTC: `2026-11-25T03:00:00Z`. No name is written so.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub struct Moment(u64);

/// What is no point in time.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no time: write 2026-11-25T03:00:00Z (in UTC), milliseconds since 1970, or -2h")]
pub struct NoMoment(String);

impl Moment {
    /// So many milliseconds after 1970; a moment after the year 9999 is the end of that.
    #[must_use]
    pub fn from_ms(ms: u64) -> Self {
        Self(ms.min(MOMENT_MS_MAX))
    }

    /// In milliseconds since 1970.
    #[must_use]
    pub const fn ms(self) -> u64 {
        self.0
    }

    /// As it is written on a command line: as in RFC 3339, in milliseconds since 1970, or so long before
    /// `now_ms`, as `-2h`.
    ///
    /// # Errors
    /// [`NoMoment`].
    pub fn parse(text: &str, now_ms: u64) -> Result<Self, NoMoment> {
        let wrong = || NoMoment(text.to_owned());
        if let Some(before) = text.strip_prefix('-') {
            let before = humantime::parse_duration(before).map_err(|_| wrong())?;
            let before = u64::try_from(before.as_millis()).map_err(|_| wrong())?;
            let ms = now_ms.checked_sub(before).ok_or_else(wrong)?;
            return Ok(Self::from_ms(ms));
        }
        match text.parse() {
            Ok(ms) if ms <= MOMENT_MS_MAX => Ok(Self(ms)),
            Ok(_) => Err(wrong()),
            Err(_) => text.parse(),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = UNIX_EPOCH + Duration::from_millis(self.0);
        match self.0 % 1000 {
            0 => humantime::format_rfc3339_seconds(at).fmt(f),
            _ => humantime::format_rfc3339_millis(at).fmt(f),
        }
    }
}

impl FromStr for Moment {
    type Err = NoMoment;

    fn from_str(text: &str) -> Result<Self, NoMoment> {
        let wrong = || NoMoment(text.to_owned());
        let at = humantime::parse_rfc3339(text).map_err(|_| wrong())?;
        let since = at.duration_since(UNIX_EPOCH).map_err(|_| wrong())?;
        let ms = u64::try_from(since.as_millis()).map_err(|_| wrong())?;
        Ok(Self::from_ms(ms))
    }
}

impl From<Moment> for String {
    fn from(moment: Moment) -> Self {
        moment.to_string()
    }
}

impl TryFrom<String> for Moment {
    type Error = NoMoment;

    fn try_from(text: String) -> Result<Self, NoMoment> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moment_is_written_and_read_back() {
        for text in [
            "1970-01-01T00:00:00Z",
            "2026-11-25T03:00:00Z",
            "2026-11-25T03:00:00.040Z",
            "9999-12-31T23:59:59Z",
        ] {
            let moment: Moment = text.parse().unwrap();
            assert_eq!(moment.to_string(), text);
            assert_eq!(Moment::from_ms(moment.ms()), moment);
        }
        assert_eq!(
            Moment::from_ms(u64::MAX).to_string(),
            "9999-12-31T23:59:59Z"
        );
    }

    #[test]
    fn moment_on_a_command_line_is_absolute_or_before_now() {
        let at = |text| Moment::parse(text, 10_000_000).map(Moment::ms);
        assert_eq!(at("1970-01-01T00:00:01Z"), Ok(1000));
        assert_eq!(at("1234"), Ok(1234));
        assert_eq!(at("-2h"), Ok(2_800_000));
        assert_eq!(at("-1m 30s"), Ok(9_910_000));
        for text in [
            "",
            "-",
            "-3h",
            "2h",
            "now",
            "2026-11-25",
            "99999999999999999",
            "-2x",
            "1e3",
        ] {
            assert!(at(text).is_err(), "{text}");
        }
    }
}
