//! The file of headers that go to the collector with each call: `Name: value` a line.
//!
//! **Invariant:** no value is in an error or a log.

use std::path::{Path, PathBuf};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

/// The most bytes of the file.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Why it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeadersError {
    /// It cannot be read.
    #[error("the collector's headers {}: {source}; make it readable by the daemon", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It has more than [`FILE_BYTES_MAX`].
    #[error("the collector's headers {}: more than 64 KiB; write one `Name: value` a line", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A line is no header.
    #[error("the collector's headers {}: line {line} is no header; write `Name: value`", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which, from 1.
        line: usize,
    },
}

/// Reads the file.
///
/// # Errors
/// If it cannot be read, or holds anything but headers, empty lines and comments (`#`).
pub(super) fn read(path: &Path) -> Result<HeaderMap, HeadersError> {
    let unreadable = |source| HeadersError::Unreadable {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(unreadable)?.len() > FILE_BYTES_MAX {
        let path = path.to_owned();
        return Err(HeadersError::TooLarge { path });
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let mut headers = HeaderMap::new();
    for (n, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = header(line) else {
            return Err(HeadersError::Malformed {
                path: path.to_owned(),
                line: n + 1,
            });
        };
        headers.append(name, value);
    }
    Ok(headers)
}

fn header(line: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = line.split_once(':')?;
    let mut value = HeaderValue::from_str(value.trim()).ok()?;
    value.set_sensitive(true);
    Some((name.trim().parse().ok()?, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<HeaderMap, HeadersError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path())
    }

    #[test]
    fn headers_are_read_a_line_and_their_values_are_not_shown() {
        let headers =
            of("# of the collector\nAuthorization: Basic aHVudGVyMg==\n\nX-Scope-OrgID: acme:1\n")
                .unwrap();
        assert_eq!(headers["authorization"], "Basic aHVudGVyMg==");
        assert_eq!(headers["x-scope-orgid"], "acme:1");
        assert!(!format!("{headers:?}").contains("aHVudGVyMg"));
    }

    #[test]
    fn file_that_holds_something_else_is_refused_and_not_shown() {
        for text in ["hunter2", "a: b\nbad name: hunter2", "a: hunter2\u{1}"] {
            let error = of(text).unwrap_err().to_string();
            assert!(
                error.contains("is no header") && !error.contains("hunter2"),
                "{error}"
            );
        }
        let long = of(&"# hunter2\n".repeat(10_000)).unwrap_err().to_string();
        assert!(long.contains("64 KiB"), "{long}");
        let gone = read(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(gone.to_string().contains("/nowhere/at/all"), "{gone}");
    }
}
