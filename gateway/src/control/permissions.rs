//! Whose a block device is to be and who may use it, as people say it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ApiError, ApiResult};

/// Longest name of a user or group, in bytes.
const NAME_BYTES_MAX: usize = 255;

/// The mode that gives everything to everybody.
const MODE_MAX: u16 = 0o777;

/// `USER` or `USER:GROUP`, names or numbers; nobody has looked yet whether they are there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct DeviceOwner {
    user: String,
    group: Option<String>,
}

impl DeviceOwner {
    /// The user.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The group; none: whichever the device has.
    #[must_use]
    pub fn group(&self) -> Option<&str> {
        self.group.as_deref()
    }
}

impl fmt::Display for DeviceOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.user)?;
        self.group
            .as_ref()
            .map_or(Ok(()), |group| write!(f, ":{group}"))
    }
}

impl FromStr for DeviceOwner {
    type Err = ApiError;

    fn from_str(text: &str) -> ApiResult<Self> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let odd = |c: char| c == ':' || c.is_whitespace() || c.is_control();
        let is_name = |n: &str| !n.is_empty() && n.len() <= NAME_BYTES_MAX && !n.contains(odd);
        if !is_name(user) || !group.is_none_or(is_name) {
            return Err(ApiError::invalid(
                format!("{text:?} cannot be the owner of a device"),
                "write USER or USER:GROUP, names or numbers, such as root:kvm",
            ));
        }
        Ok(Self {
            user: user.to_owned(),
            group: group.map(str::to_owned),
        })
    }
}

impl TryFrom<String> for DeviceOwner {
    type Error = ApiError;

    fn try_from(text: String) -> ApiResult<Self> {
        text.parse()
    }
}

impl From<DeviceOwner> for String {
    fn from(owner: DeviceOwner) -> Self {
        owner.to_string()
    }
}

/// A device's permission bits, at most 0777; written in octal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct DeviceMode(u16);

impl DeviceMode {
    /// The bits.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }
}

impl fmt::Display for DeviceMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for DeviceMode {
    type Err = ApiError;

    fn from_str(text: &str) -> ApiResult<Self> {
        // A sign is a number's, not a mode's.
        let is_octal = text.bytes().all(|b| matches!(b, b'0'..=b'7'));
        let bits = u16::from_str_radix(text, 8).ok();
        match bits.filter(|bits| is_octal && *bits <= MODE_MAX) {
            Some(bits) => Ok(Self(bits)),
            None => Err(ApiError::invalid(
                format!("{text:?} cannot be the mode of a device"),
                "write it in octal, 0777 at most, such as 0640",
            )),
        }
    }
}

impl TryFrom<String> for DeviceMode {
    type Error = ApiError;

    fn try_from(text: String) -> ApiResult<Self> {
        text.parse()
    }
}

impl From<DeviceMode> for String {
    fn from(mode: DeviceMode) -> Self {
        mode.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_of_one_or_two_names_reads_back() {
        for (text, user, group) in [
            ("alice", "alice", None),
            ("alice:disk", "alice", Some("disk")),
            ("1000:6", "1000", Some("6")),
            ("DOM\\al.ice-2:_x", "DOM\\al.ice-2", Some("_x")),
        ] {
            let owner: DeviceOwner = text.parse().unwrap();
            assert_eq!((owner.user(), owner.group()), (user, group));
            assert_eq!(owner.to_string(), text);
        }
    }

    #[test]
    fn owner_that_is_none_is_refused_with_a_remedy() {
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for text in [
            "", ":", "alice:", ":disk", "a:b:c", "a b", "a\n", "a\0", &long,
        ] {
            let error = text.parse::<DeviceOwner>().expect_err(text);
            assert!(error.remedy.contains("USER:GROUP"), "{error}");
        }
    }

    #[test]
    fn mode_is_octal_and_at_most_777() {
        for (text, bits) in [("0640", 0o640), ("640", 0o640), ("0", 0), ("00777", 0o777)] {
            assert_eq!(text.parse::<DeviceMode>().unwrap().bits(), bits);
        }
        for text in [
            "",
            "1777",
            "0800",
            "-1",
            "+640",
            "0x1",
            "rw",
            " 640",
            "7777777777",
        ] {
            let error = text.parse::<DeviceMode>().expect_err(text);
            assert!(error.remedy.contains("octal"), "{error}");
        }
    }

    #[test]
    fn mode_in_json_is_its_octal_text() {
        let mode: DeviceMode = serde_json::from_str("\"640\"").unwrap();
        assert_eq!(serde_json::to_value(mode).unwrap(), "0640");
        assert!(serde_json::from_str::<DeviceMode>("640").is_err());
    }
}
