//! A keyring: a file of wrapping keys, `name base64-of-32-bytes` a line, that nobody but its owner can read.
//!
//! It is read anew for each use, so that a change needs no restart. Several keys may have one name: the last
//! wraps, and each is tried to unwrap, so that a key can be replaced before all it wrapped is wrapped anew.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use quarry_objfmt::KeyName;
use quarry_objfmt::wrapped::WrappingKey;
use zeroize::Zeroizing;

use super::KeyError;

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A keyring's file.
#[derive(Clone, Debug)]
pub(super) struct Keyring(PathBuf);

/// Its keys, in order.
type Keys = Vec<(KeyName, WrappingKey)>;

impl Keyring {
    /// The one at `path`, which is not looked at yet.
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub(super) async fn wrap(
        &self,
        name: &KeyName,
        context: &[u8],
        secret: &[u8],
    ) -> Result<Vec<u8>, KeyError> {
        let keys = self.named(name).await?;
        let newest = keys.last().ok_or_else(|| self.missing(name))?;
        Ok(newest.1.wrap(context, secret))
    }

    /// None if no key of this name opens it.
    pub(super) async fn unwrap(
        &self,
        name: &KeyName,
        context: &[u8],
        wrapped: &[u8],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, KeyError> {
        let keys = self.named(name).await?;
        if keys.is_empty() {
            return Err(self.missing(name));
        }
        let newest_first = keys.iter().rev();
        Ok(newest_first
            .map(|(_, key)| key.unwrap(context, wrapped))
            .find_map(|opened| opened))
    }

    fn missing(&self, name: &KeyName) -> KeyError {
        KeyError::Missing {
            key: name.clone(),
            keyring: self.0.display().to_string(),
        }
    }

    async fn named(&self, name: &KeyName) -> Result<Keys, KeyError> {
        let mut keys = self.all().await?;
        keys.retain(|(other, _)| other == name);
        Ok(keys)
    }

    /// Whether it can be used.
    pub(super) async fn check(&self) -> Result<(), KeyError> {
        self.all().await.map(drop)
    }

    async fn all(&self) -> Result<Keys, KeyError> {
        let path = self.0.clone();
        let read = tokio::task::spawn_blocking(move || read(&path)).await;
        let read = read.unwrap_or_else(|error| Err(error.to_string()));
        read.map_err(|why| KeyError::Keyring {
            keyring: self.0.display().to_string(),
            why,
        })
    }
}

/// The error is the end of a sentence that begins with the file's name.
fn read(path: &Path) -> Result<Keys, String> {
    let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
    let file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err("is not a file".to_owned());
    }
    if meta.mode() & 0o077 != 0 {
        return Err(format!(
            "can be used by others than its owner (mode {:04o}); `chmod 600` it",
            meta.mode() & 0o7777
        ));
    }
    let (owner, own) = (meta.uid(), rustix::process::geteuid().as_raw());
    if owner != 0 && owner != own {
        return Err(format!(
            "is owned by user {owner}; `chown` it to root or to the daemon's user, {own}"
        ));
    }
    if meta.len() > FILE_BYTES_MAX {
        return Err(format!("is larger than {FILE_BYTES_MAX} bytes"));
    }
    let mut text = Zeroizing::new(String::new());
    let mut limited = file.take(FILE_BYTES_MAX);
    limited.read_to_string(&mut text).map_err(unreadable)?;
    parse(&text)
}

fn parse(text: &str) -> Result<Keys, String> {
    let mut keys = Keys::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // What stands there is shown to nobody.
        let wrong = |why: &str| format!("is wrong in line {number}: {why}");
        let mut words = line.split_ascii_whitespace();
        let (Some(name), Some(key), None) = (words.next(), words.next(), words.next()) else {
            return Err(wrong(
                "write a name and a key, as `quarry key generate` does",
            ));
        };
        let name = KeyName::new(name).map_err(|error| wrong(error.why))?;
        let mut bytes = Zeroizing::new([0; 32]);
        match STANDARD.decode_slice(key, &mut bytes[..]) {
            Ok(32) => keys.push((name, WrappingKey::new(*bytes))),
            _ => return Err(wrong("the key is not the base64 of 32 bytes")),
        }
    }
    Ok(keys)
}

/// A line for a keyring, with a key made now.
///
/// # Panics
/// If the system has no randomness to give.
#[must_use]
pub fn line(name: &KeyName) -> Zeroizing<String> {
    let key = quarry_objfmt::wrapped::random_key::<32>();
    let text = Zeroizing::new(STANDARD.encode(key.as_slice()));
    Zeroizing::new(format!("{name} {}", *text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keyring_lines_that_are_wrong_are_named_and_not_shown() {
        let name = KeyName::new("acme").unwrap();
        let good = line(&name);
        let keys = parse(&format!("# mine\n\n  {}\t\n{}\n", *good, *line(&name))).unwrap();
        assert_eq!(keys.len(), 2);
        for (bad, word) in [
            ("acme", "a name and a key"),
            ("acme c2VjcmV0", "32 bytes"),
            ("acme c2VjcmV0 more", "a name and a key"),
            ("Acme c2VjcmV0", "capital"),
            ("acme !!!", "base64"),
        ] {
            let error = parse(&format!("{}\n{bad}\n", *good)).unwrap_err();
            assert!(error.contains("line 2") && error.contains(word), "{error}");
            assert!(!error.contains("c2Vj"), "{error}");
        }
        // One byte more than a key has.
        let long = format!("acme {}", STANDARD.encode([7; 33]));
        assert!(parse(&long).unwrap_err().contains("32 bytes"));
    }

    #[test]
    fn keyring_that_others_may_read_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keyring");
        std::fs::write(&path, "").unwrap();
        for (mode, fits) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            match read(&path) {
                Ok(keys) => assert!(fits && keys.is_empty(), "{mode:o}"),
                Err(error) => assert!(!fits && error.contains("chmod 600"), "{error}"),
            }
        }
        assert!(read(dir.path()).unwrap_err().contains("not a file"));
        let gone = read(&dir.path().join("gone")).unwrap_err();
        assert!(gone.contains("cannot be read"), "{gone}");
    }
}
