//! Whose a volume's device is, found out once and kept with the attachment.
//!
//! **Invariant:** names are looked up when they are asked for, and never again: a start that takes
//! devices over must not wait for, or stumble over, a user who is no longer there.

use std::ffi::{CString, c_char, c_int};
use std::io;
use std::mem::MaybeUninit;

use serde::{Deserialize, Serialize};

use crate::control::{ApiError, ApiResult, AttachOptions, DeviceMode, DeviceOwner, Kind};
use crate::ublk::Permissions;

/// Room for an entry of the user or group database, at first and at most, in bytes.
const ENTRY_BYTES: (usize, usize) = (1 << 10, 1 << 20);

/// Numbers that stand for "none" in the kernel's calls, and in old ones.
const NOBODYS: [u32; 2] = [u32::MAX, 0xFFFF];

/// Whose a device is to be and who may use it; the default leaves it as it comes.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Access {
    /// Whose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Who may use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<DeviceMode>,
}

/// Whose a device is to be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owner {
    /// As it was said, for people.
    pub name: DeviceOwner,
    /// The user.
    pub uid: u32,
    /// The group, if one was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
}

impl Access {
    /// Looks up whom a request names.
    ///
    /// # Errors
    /// If there is no such user or group.
    pub(super) async fn resolve(options: &AttachOptions) -> ApiResult<Self> {
        let owner = match options.device_owner.clone() {
            // May ask a directory on the network.
            Some(name) => Some(
                tokio::task::spawn_blocking(move || Owner::find(name))
                    .await
                    .map_err(|e| ApiError::internal(e.to_string()))??,
            ),
            None => None,
        };
        Ok(Self {
            owner,
            mode: options.device_mode,
        })
    }

    /// Whether the device is left as it comes.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// For the device.
    pub(super) fn permissions(&self) -> Permissions {
        Permissions {
            uid: self.owner.as_ref().map(|owner| owner.uid),
            gid: self.owner.as_ref().and_then(|owner| owner.gid),
            mode: self.mode.map(DeviceMode::bits),
        }
    }
}

impl Owner {
    fn find(name: DeviceOwner) -> ApiResult<Self> {
        let uid = find_user(name.user())?;
        let gid = name.group().map(find_group).transpose()?;
        Ok(Self { name, uid, gid })
    }
}

/// The number of a user of this host.
///
/// # Errors
/// If there is none of this name, or it cannot be looked up.
pub(crate) fn find_user(name: &str) -> ApiResult<u32> {
    number("user", name, user)
}

/// The number of a group of this host.
///
/// # Errors
/// If there is none of this name, or it cannot be looked up.
pub(crate) fn find_group(name: &str) -> ApiResult<u32> {
    number("group", name, group)
}

/// The number that `name` is or has.
fn number(
    kind: &str,
    name: &str,
    look_up: impl FnOnce(&str) -> io::Result<Option<u32>>,
) -> ApiResult<u32> {
    let found = if name.bytes().all(|b| b.is_ascii_digit()) {
        name.parse().ok()
    } else {
        look_up(name).map_err(|error| {
            ApiError::new(
                Kind::Unavailable,
                format!("the {kind} {name:?} cannot be looked up: {error}"),
                "give its number instead",
            )
        })?
    };
    match found {
        Some(id) if NOBODYS.contains(&id) => Err(ApiError::invalid(
            format!("{id} cannot be the number of a {kind}"),
            "give another",
        )),
        Some(id) => Ok(id),
        None => Err(ApiError::invalid(
            format!("there is no {kind} {name:?} on the daemon's host"),
            format!("make it with `{kind}add`, or give a number that it is to have"),
        )),
    }
}

fn user(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    with_room(|room| {
        let mut entry = MaybeUninit::<libc::passwd>::uninit();
        let mut found = std::ptr::null_mut();
        let (at, size) = (room.as_mut_ptr(), room.len());
        // SAFETY: all that is pointed to outlives the call, and `room` has `size` bytes.
        let code = unsafe {
            libc::getpwnam_r(name.as_ptr(), entry.as_mut_ptr(), at, size, &raw mut found)
        };
        // SAFETY: not null, it points to `entry`, which was filled.
        (code, unsafe { found.as_ref() }.map(|entry| entry.pw_uid))
    })
}

fn group(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    with_room(|room| {
        let mut entry = MaybeUninit::<libc::group>::uninit();
        let mut found = std::ptr::null_mut();
        let (at, size) = (room.as_mut_ptr(), room.len());
        // SAFETY: all that is pointed to outlives the call, and `room` has `size` bytes.
        let code = unsafe {
            libc::getgrnam_r(name.as_ptr(), entry.as_mut_ptr(), at, size, &raw mut found)
        };
        // SAFETY: not null, it points to `entry`, which was filled.
        (code, unsafe { found.as_ref() }.map(|entry| entry.gr_gid))
    })
}

/// Asks with more room until it is enough.
fn with_room(ask: impl Fn(&mut [c_char]) -> (c_int, Option<u32>)) -> io::Result<Option<u32>> {
    let mut size = ENTRY_BYTES.0;
    loop {
        match ask(&mut vec![0; size]) {
            (0, found) => return Ok(found),
            (libc::ERANGE, _) if size < ENTRY_BYTES.1 => size *= 2,
            // What some of its sources say of a name that they do not know.
            (libc::ENOENT | libc::ESRCH, _) => return Ok(None),
            (code, _) => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str) -> ApiResult<Owner> {
        Owner::find(text.parse().unwrap())
    }

    #[test]
    fn owner_by_name_gets_the_numbers_of_the_host() {
        let root = find("root:root").unwrap();
        assert_eq!((root.uid, root.gid), (0, Some(0)));
        assert_eq!(find("daemon").unwrap().gid, None);
        assert_ne!(find("daemon").unwrap().uid, 0);
    }

    #[test]
    fn owner_by_number_need_not_exist() {
        let owner = find("54321:54322").unwrap();
        assert_eq!((owner.uid, owner.gid), (54321, Some(54322)));
    }

    #[test]
    fn owner_who_is_not_there_is_named_with_a_remedy() {
        let user = find("nobody-has-this-name").unwrap_err();
        assert!(user.message.contains(r#"no user "nobody-has-this-name""#));
        assert!(user.remedy.contains("`useradd`"), "{user}");
        let group = find("root:nobody-has-this-name").unwrap_err();
        assert!(group.message.contains(r#"no group "nobody-has-this-name""#));
        assert_eq!(group.kind, Kind::Invalid);
    }

    #[test]
    fn number_that_means_nobody_is_refused() {
        for text in [
            "4294967295",
            "65535",
            "0:65535",
            "4294967296",
            "99999999999",
        ] {
            assert_eq!(find(text).unwrap_err().kind, Kind::Invalid, "{text}");
        }
    }

    #[test]
    fn entry_larger_than_its_room_is_asked_for_again_up_to_the_maximum() {
        let ask = |needed: usize| {
            with_room(move |room| {
                if room.len() < needed {
                    (libc::ERANGE, None)
                } else {
                    (0, Some(7))
                }
            })
        };
        assert_eq!(ask(100_000).unwrap(), Some(7));
        let error = ask(ENTRY_BYTES.1 + 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ERANGE));
    }
}
