//! The object store: what a gateway needs of one, and the stores that give it.
//!
//! Owns: the [`Store`] trait with its small set of errors, the two kinds of store
//! ([`FolderStore`] and [`S3Store`]), and the [`Lane`] through which everything else uses them.
//! Does not own: what is in an object or how its key is made (`quarry-objfmt`), or making buckets
//! ([`crate::provision`]).
//!
//! **Invariants.**
//! - `create` never overwrites and `replace` never overwrites what its caller has not seen. That,
//!   and nothing else, keeps two writers apart; [`crate::provision::probe_conditional_writes`]
//!   checks that a store really does it.
//! - [`StoreError::NotFound`] is only answered when the store itself said that this very key does
//!   not exist. A missing bucket, a missing folder or a proxy's error page is
//!   [`StoreError::Unavailable`]: the end of a volume's log is found by asking for keys until one is
//!   missing, so a wrong "not found" would cut the log off.
//! - What a range read returns has exactly the length asked for.

mod backoff;
#[cfg(test)]
pub mod contract;
mod credentials;
pub mod direct;
mod folder;
mod health;
mod lane;
mod parts;
mod plain;
mod s3;
mod s3_error;
mod s3_http;
mod settings;
mod stats;
#[cfg(test)]
pub(crate) mod stub;
pub mod upload;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use quarry_objfmt::PageVec;

pub use credentials::{CredentialSource, UnknownSource};
pub(crate) use credentials::{aws_http, last_cause};
pub use folder::FolderStore;
#[cfg(test)]
pub(crate) use folder::HANGS;
pub use health::{StoreHealth, StoreState};
pub use lane::{Lane, LaneSettings, Priority};
pub(crate) use s3::credentials;
pub use s3::{S3Store, install_crypto};
pub use settings::{OpenError, Place, S3Settings, StoreSettings, open_store, open_store_within};
pub use stats::{Outcome, STORE_BOUNDS_MS, StoreSnapshot, StoreStats, StoreTimes};

/// The largest object that [`Store::get`] reads as a whole. A chunk has at most 8 MiB of data; the
/// bound keeps a foreign object at one of our keys from filling the memory.
pub const GET_BYTES_MAX: u64 = 64 << 20;

/// The most keys that one [`Store::list`] answers.
pub const LIST_KEYS_MAX: usize = 1_000_000;

/// The longest key. S3 allows 1024 bytes, of which the store's own prefix takes a part.
pub const KEY_BYTES_MAX: usize = 768;

/// An object store, or a part of one under a prefix that no key shows.
///
/// A key is made of parts joined by `/`; a part is made of `A-Z a-z 0-9 . _ -` and is neither `.` nor
/// `..`. Any other key is [`StoreError::Invalid`].
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync {
    /// Reads an object of at most [`GET_BYTES_MAX`] bytes, and the tag of the state read.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none.
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError>;

    /// Reads the bytes `range` of an object; what is returned has exactly that length.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such object, [`StoreError::WrongLength`] if it ends
    /// before the range does.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Whether [`Store::get_parts`] asks on a connection of our own: little work, and no wait for another thread.
    fn has_plain_reads(&self) -> bool {
        false
    }

    /// Reads neighbouring parts of an object, of these lengths from `offset` on, with one request: each in memory of its
    /// own, in which the byte `lead` begins a page.
    ///
    /// # Errors
    /// Those of [`Store::get_range`].
    async fn get_parts(
        &self,
        key: &str,
        offset: u64,
        lens: &[usize],
        lead: usize,
    ) -> Result<Vec<Bytes>, StoreError> {
        let len: usize = lens.iter().sum();
        let mut whole = self.get_range(key, offset..offset + len as u64).await?;
        let mut part = |len: &usize| {
            // Not a slice: whoever keeps a part would keep all of them.
            let mut part = PageVec::new(*len, lead);
            part.append(&whole.split_to(whole.len().min(*len)));
            part.into()
        };
        Ok(lens.iter().map(&mut part).collect())
    }

    /// Reads the first `len` bytes of an object, or all of it if it is shorter.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none.
    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError>;

    /// Writes an object that must not exist yet. Of several at once, exactly one succeeds. When it
    /// has returned, the object survives a crash.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if there is one already.
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError>;

    /// Writes an object over the state that `seen` names. Of several at once with the same tag,
    /// exactly one succeeds. When it has returned, the object survives a crash.
    ///
    /// A state is told by its content: writing back what was there before restores its tag. So
    /// the content must hold something that never comes back, as a head's epoch and log do.
    ///
    /// # Errors
    /// [`StoreError::Changed`] if the object has another state by now, or is gone.
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError>;

    /// Deletes an object; that there is none is no error.
    ///
    /// # Errors
    /// Only those of the store itself.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;

    /// All keys that start with `prefix`, which is empty or ends with `/`, in order. For the control
    /// plane only: nothing that runs all the time may list, but for the trash's hourly look, and the daily one for
    /// what nothing names.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if there are more than [`LIST_KEYS_MAX`].
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError>;

    /// Up to `max` of these keys, whichever the store names first: for who deletes them and asks again,
    /// however many there are.
    ///
    /// # Errors
    /// Only those of the store itself.
    async fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, StoreError> {
        let mut keys = self.list(prefix).await?;
        keys.truncate(max);
        Ok(keys)
    }

    /// Up to `max` of these keys that come after `after`, in order: for who goes through them page by page.
    ///
    /// # Errors
    /// Those of the store itself; those of [`Store::list`] where it is no better.
    async fn list_after(
        &self,
        prefix: &str,
        after: &str,
        max: usize,
    ) -> Result<Vec<String>, StoreError> {
        let mut keys = self.list(prefix).await?;
        keys.retain(|key| key.as_str() > after);
        keys.truncate(max);
        Ok(keys)
    }

    /// Where the store is, for people; without secrets.
    fn describe(&self) -> String;
}

/// Creates an object at a key that nobody else uses: what exists there is what was sent, its answer lost.
///
/// # Errors
/// Those of [`Store::create`], but for [`StoreError::Exists`].
pub(crate) async fn create_own(
    store: &dyn Store,
    key: &str,
    body: Bytes,
) -> Result<(), StoreError> {
    match store.create(key, body).await {
        Ok(_) | Err(StoreError::Exists { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Keys of a page, for who goes through all of them; so few in tests that they turn pages.
const PAGE_KEYS: usize = if cfg!(test) { 3 } else { 10_000 };

/// Calls `each` with all keys that begin with `prefix`, in order, however many they are.
///
/// # Errors
/// Those of [`Store::list_after`].
pub(crate) async fn each_key(
    store: &dyn Store,
    prefix: &str,
    mut each: impl FnMut(&str) + Send,
) -> Result<(), StoreError> {
    let mut after = prefix.to_owned();
    loop {
        let page = store.list_after(prefix, &after, PAGE_KEYS).await?;
        page.iter().for_each(|key| each(key));
        match page.into_iter().nth(PAGE_KEYS - 1) {
            Some(last) => after = last,
            None => return Ok(()),
        }
    }
}

/// As [`Store::get_range`], however long the range is: in several reads, if it is too long for one.
///
/// # Errors
/// Those of [`Store::get_range`].
pub(crate) async fn get_long(
    store: &dyn Store,
    key: &str,
    range: Range<u64>,
) -> Result<Bytes, StoreError> {
    if range.end.saturating_sub(range.start) <= GET_BYTES_MAX {
        return store.get_range(key, range).await;
    }
    let mut whole = BytesMut::new();
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + GET_BYTES_MAX);
        whole.extend_from_slice(&store.get_range(key, at..end).await?);
        at = end;
    }
    Ok(whole.freeze())
}

/// Longest object that is read whole, in bytes: no place in one is further from its start (`u32`).
const WHOLE_BYTES_MAX: u64 = u32::MAX as u64;

/// All of an object that is never changed, however long one of ours can be.
///
/// # Errors
/// Those of [`Store::get_prefix`] and [`Store::get_range`].
pub(crate) async fn get_whole(store: &dyn Store, key: &str) -> Result<Bytes, StoreError> {
    let mut whole = BytesMut::from(store.get_prefix(key, GET_BYTES_MAX).await?);
    // As long as there was as much as was asked for, there may be more.
    while !whole.is_empty() && (whole.len() as u64).is_multiple_of(GET_BYTES_MAX) {
        let at = whole.len() as u64;
        if at > WHOLE_BYTES_MAX {
            let reason = format!("it is longer than {WHOLE_BYTES_MAX} bytes");
            return Err(StoreError::invalid(key, reason));
        }
        let more = match store.get_range(key, at..at + GET_BYTES_MAX).await {
            Err(StoreError::WrongLength { got: 0, .. }) => break,
            Err(StoreError::WrongLength { got, .. }) => store.get_range(key, at..at + got).await?,
            more => more?,
        };
        whole.extend_from_slice(&more);
    }
    Ok(whole.freeze())
}

#[async_trait]
impl<S: Store + ?Sized> Store for Arc<S> {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        (**self).get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        (**self).get_range(key, range).await
    }
    fn has_plain_reads(&self) -> bool {
        (**self).has_plain_reads()
    }
    async fn get_parts(
        &self,
        key: &str,
        offset: u64,
        lens: &[usize],
        lead: usize,
    ) -> Result<Vec<Bytes>, StoreError> {
        (**self).get_parts(key, offset, lens, lead).await
    }
    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        (**self).get_prefix(key, len).await
    }
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        (**self).create(key, body).await
    }
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        (**self).replace(key, body, seen).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        (**self).delete(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        (**self).list(prefix).await
    }
    async fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, StoreError> {
        (**self).list_some(prefix, max).await
    }
    async fn list_after(
        &self,
        prefix: &str,
        after: &str,
        max: usize,
    ) -> Result<Vec<String>, StoreError> {
        (**self).list_after(prefix, after, max).await
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
}

/// Names the state of an object: what an HTTP ETag does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tag(Arc<str>);

impl Tag {
    /// A tag as the store wrote it.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// The tag as the store wrote it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What is done with a store; for errors and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`Store::get`]
    Get,
    /// [`Store::get_range`] and [`Store::get_prefix`]
    GetRange,
    /// [`Store::create`]
    Create,
    /// [`Store::replace`]
    Replace,
    /// [`Store::delete`]
    Delete,
    /// [`Store::list`]
    List,
}

impl Operation {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 6] = [
        Self::Get,
        Self::GetRange,
        Self::Create,
        Self::Replace,
        Self::Delete,
        Self::List,
    ];

    /// Its name, as in a metric's label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::GetRange => "get_range",
            Self::Create => "create",
            Self::Replace => "replace",
            Self::Delete => "delete",
            Self::List => "list",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get | Self::GetRange => "read",
            Self::Create => "create",
            Self::Replace => "replace",
            Self::Delete => "delete",
            Self::List => "list",
        })
    }
}

/// Why a store did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("{key} is not in the store")]
    NotFound {
        /// The object.
        key: String,
    },
    /// A create-only write found an object.
    #[error("{key} is in the store already")]
    Exists {
        /// The object.
        key: String,
        /// An attempt of the same call went before whose outcome is unknown: what exists may be
        /// its work. The caller finds out by reading it. Only a [`Lane`] sets this.
        after_retry: bool,
    },
    /// The object is not in the state that the caller had seen.
    #[error("{key} was changed by another writer")]
    Changed {
        /// The object.
        key: String,
        /// As in [`StoreError::Exists`].
        after_retry: bool,
    },
    /// The store refuses us. Only the operator can mend that.
    #[error("the store refuses access to {key}: {reason}")]
    Denied {
        /// The object, or the prefix.
        key: String,
        /// What the store said.
        reason: String,
    },
    /// The store is away, slow or full. It may be better later; whether the operation had an
    /// effect is unknown.
    #[error("the store cannot {operation} {key} now: {reason}")]
    Unavailable {
        /// What was tried.
        operation: Operation,
        /// The object, or the prefix.
        key: String,
        /// What went wrong.
        reason: String,
    },
    /// A range read got another number of bytes than asked for.
    #[error("{key}: asked for {expected} bytes at offset {offset} and got {got}")]
    WrongLength {
        /// The object.
        key: String,
        /// Where the range begins.
        offset: u64,
        /// Bytes asked for.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The request itself cannot be: a bad key, an object too large, a server without the function.
    #[error("{key}: {reason}")]
    Invalid {
        /// The object, or the prefix.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

impl StoreError {
    /// Whether the same request may succeed later, without anybody changing anything.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// The object, or the prefix, that the request was about.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::NotFound { key }
            | Self::Exists { key, .. }
            | Self::Changed { key, .. }
            | Self::Denied { key, .. }
            | Self::Unavailable { key, .. }
            | Self::WrongLength { key, .. }
            | Self::Invalid { key, .. } => key,
        }
    }

    fn not_found(key: &str) -> Self {
        let key = key.to_owned();
        Self::NotFound { key }
    }

    fn exists(key: &str) -> Self {
        Self::Exists {
            key: key.to_owned(),
            after_retry: false,
        }
    }

    fn changed(key: &str) -> Self {
        Self::Changed {
            key: key.to_owned(),
            after_retry: false,
        }
    }

    fn denied(key: &str, reason: impl Into<String>) -> Self {
        Self::Denied {
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    fn unavailable(operation: Operation, key: &str, reason: impl Into<String>) -> Self {
        Self::Unavailable {
            operation,
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    fn wrong_length(key: &str, range: &Range<u64>, got: u64) -> Self {
        Self::WrongLength {
            key: key.to_owned(),
            offset: range.start,
            expected: range.end - range.start,
            got,
        }
    }

    fn invalid(key: &str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    fn too_large(key: &str) -> Self {
        let max = GET_BYTES_MAX >> 20;
        Self::invalid(key, format!("the object has more than {max} MiB"))
    }
}

/// Refuses a key that is not one: see [`Store`].
fn check_key(key: &str) -> Result<(), StoreError> {
    if key.len() > KEY_BYTES_MAX {
        let why = format!("a key has at most {KEY_BYTES_MAX} bytes");
        return Err(StoreError::invalid(key, why));
    }
    if key.split('/').all(is_key_part) {
        return Ok(());
    }
    let why = "a key's parts are made of letters, digits, '.', '_' and '-', and joined by '/'";
    Err(StoreError::invalid(key, why))
}

/// Refuses a prefix to list that is not empty and not a key's beginning up to a `/`.
fn check_list_prefix(prefix: &str) -> Result<(), StoreError> {
    match prefix.strip_suffix('/') {
        Some(parts) => check_key(parts),
        None if prefix.is_empty() => Ok(()),
        None => Err(StoreError::invalid(
            prefix,
            "a prefix to list ends with '/'",
        )),
    }
}

/// Refuses a range that is empty, ends before it begins or is larger than a whole read may be.
fn check_range(key: &str, range: &Range<u64>) -> Result<(), StoreError> {
    match range.end.checked_sub(range.start) {
        None | Some(0) => Err(StoreError::invalid(key, "the range to read is empty")),
        Some(len) if len > GET_BYTES_MAX => Err(StoreError::too_large(key)),
        Some(_) => Ok(()),
    }
}

fn is_key_part(part: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !part.is_empty() && part != "." && part != ".." && part.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_key_is_told_once_and_in_order_however_many_pages_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        for count in 0..3 * PAGE_KEYS {
            let mut told = Vec::new();
            each_key(&store, "a/", |key| told.push(key.to_owned()))
                .await
                .unwrap();
            let there: Vec<_> = (0..count).map(|n| format!("a/{n:02}/x")).collect();
            assert_eq!(told, there);
            let next = format!("a/{count:02}/x");
            store.create(&next, Bytes::from("x")).await.unwrap();
            store
                .create(&format!("b/{count}"), Bytes::from("y"))
                .await
                .unwrap();
        }
    }

    #[test]
    fn key_of_other_than_plain_parts_is_refused() {
        for good in [
            "head",
            "t/acme/v/0-1/chunk/00000001/0000000000000abc",
            "a/.b/c..d",
        ] {
            assert_eq!(check_key(good), Ok(()), "{good}");
        }
        let long = "x".repeat(KEY_BYTES_MAX + 1);
        let bad = [
            "", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\0b", "a b", "ä", "a\\b",
            "a?b", "a%2fb", "a\n", &long,
        ];
        for bad in bad {
            let refused = check_key(bad);
            assert!(
                matches!(refused, Err(StoreError::Invalid { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn prefix_to_list_ends_at_a_part() {
        assert!(check_list_prefix("").is_ok());
        assert!(check_list_prefix("a/b/").is_ok());
        for bad in ["a", "/", "a//", "../"] {
            assert!(check_list_prefix(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn object_longer_than_one_read_may_be_is_read_whole_and_in_part() {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        let max = usize::try_from(GET_BYTES_MAX).unwrap();
        let body = |len: usize| {
            let page = |n: usize| vec![n.to_le_bytes()[0]; 4096];
            let mut body: Vec<u8> = (0..len.div_ceil(4096)).flat_map(page).collect();
            body.truncate(len);
            Bytes::from(body)
        };
        for len in [0, 5, max - 1, max, max + 9, 2 * max] {
            let (key, body) = (format!("long/{len}"), body(len));
            store.create(&key, body.clone()).await.unwrap();
            assert!(get_whole(&store, &key).await.unwrap() == body, "{len}");
        }
        let key = format!("long/{}", 2 * max);
        let got = get_long(&store, &key, 7..2 * max as u64 - 1).await;
        assert!(got.unwrap() == body(2 * max).slice(7..2 * max - 1));
        let past = get_long(&store, &key, 9..2 * GET_BYTES_MAX + 1).await;
        assert!(matches!(past, Err(StoreError::WrongLength { .. })));
    }

    #[test]
    fn range_backwards_or_empty_or_huge_is_refused() {
        assert!(check_range("k", &(1..2)).is_ok());
        for (start, end) in [(1, 1), (2, 1), (0, u64::MAX)] {
            assert!(check_range("k", &(start..end)).is_err(), "{start}..{end}");
        }
    }
}
