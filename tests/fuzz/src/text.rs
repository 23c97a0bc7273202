//! What people write: the configuration, names, sizes.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use quarry_config::{Bound, Config, ConfigError, Size};
use quarry_gateway::control::{DeviceMode, DeviceOwner, VolumeRef};
use quarry_objfmt::keys::{NAME_LEN_MAX, name_key};
use quarry_objfmt::{SnapName, TenantName, VolumeName};

const SECRET: &str = "canary-of-a-secret";

/// A configuration is taken or refused with the key and a remedy, in one sentence, and shows no
/// secret.
pub(crate) fn config(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    judge(Config::parse(text), text);
    // The rest of the section is the input's, and so are all others.
    let secret = format!("[store]\nsecret_key = \"{SECRET}\"\naccess_key = \"a\"\n{text}");
    judge(Config::parse(&secret), text);
}

fn judge(read: Result<Config, ConfigError>, text: &str) {
    let shown = match read {
        Ok(config) => {
            let notes = config.notes().concat();
            format!("{config:?}{notes}")
        }
        Err(error) => {
            assert!(!error.message().is_empty() && !error.remedy().is_empty());
            match &error {
                ConfigError::Value { key, .. } => assert!(error.message().contains(key)),
                ConfigError::Unknown { name, .. } => assert!(error.message().contains(name)),
                ConfigError::Syntax { place, .. } => assert!(place.line > 0),
                other => panic!("{other}"),
            }
            format!("{error}{error:?}")
        }
    };
    assert!(text.contains(SECRET) || !shown.contains(SECRET), "{shown}");
}

/// What is read from a text is read again from what it shows.
fn reads_back<T: FromStr + Display + PartialEq + Debug>(text: &str) -> Option<T> {
    let value: T = text.parse().ok()?;
    let shown = value.to_string();
    assert_eq!(
        shown.parse().ok().as_ref(),
        Some(&value),
        "{text:?} as {shown:?}"
    );
    Some(value)
}

/// A name that is one is of plain characters, and its keys stay below its tenant's; all that is
/// written as one word reads back.
pub(crate) fn words(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let plain = |name: &str| {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        (1..=NAME_LEN_MAX).contains(&name.len())
            && name.bytes().all(allowed)
            && name.as_bytes()[0].is_ascii_alphanumeric()
    };
    assert_eq!(TenantName::new(text).is_ok(), plain(text));
    assert_eq!(VolumeName::new(text).is_ok(), plain(text));
    assert_eq!(SnapName::new(text).is_ok(), plain(text));
    if let Some(VolumeRef { tenant, name }) = reads_back(text) {
        assert_eq!(text.split_once('/'), Some((tenant.as_str(), name.as_str())));
        assert_eq!(name_key(&tenant, &name), format!("t/{tenant}/names/{name}"));
    }
    reads_back::<DeviceOwner>(text);
    reads_back::<DeviceMode>(text);
    if let Some(size) = reads_back::<Size>(text) {
        assert!(!size.human().is_empty());
    }
    if let Some(bound) = reads_back::<Bound>(text) {
        for total in [0, 1, 99, 1 << 51, u64::MAX] {
            assert!(bound.of(total) <= total);
        }
    }
}
