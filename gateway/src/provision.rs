//! Makes and checks the place where a store lives, before anything is kept in it.
//!
//! Owns: the bucket (made if allowed), the refusal of lifecycle rules that would expire our objects and of versions that are
//! kept for ever, the rule that ends uploads broken off,
//! the probe of conditional writes, and the marker object that says a prefix was probed. Does not
//! own: anything under the prefix but the marker and the probe's own keys.
//!
//! **Invariant.** A prefix without a marker, or with one that another address left, is used only
//! after [`probe_conditional_writes`] has passed: the marker is created after that, never before. A
//! crash between the two leaves no marker, so the next start probes again.

mod bucket;
mod probe;

use std::borrow::Cow;
use std::ops::ControlFlow;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::store::upload::{self, AskError, Crc64};
use crate::store::{OpenError, Place, Store, StoreError, StoreSettings, Tag};

pub use probe::probe_conditional_writes;

/// The key of the marker.
pub const MARKER_KEY: &str = "quarry-store";
/// The version of the store's layout that this code reads and writes.
const LAYOUT: u32 = 1;

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// The settings name no store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What it checks uploads by could not be found out.
    #[error("what the store checks uploads by is not known: {0}")]
    Uploads(#[from] AskError),
    /// The bucket is not there.
    #[error("the bucket {bucket} does not exist: make it, or check its name")]
    BucketMissing {
        /// The bucket.
        bucket: String,
    },
    /// The server refuses, or cannot be reached.
    #[error("the bucket {bucket} cannot be {action}: {reason}: {remedy}")]
    Bucket {
        /// The bucket.
        bucket: String,
        /// What was tried: `reached`, `made`, ….
        action: &'static str,
        /// What the server said.
        reason: String,
        /// What to do.
        remedy: Cow<'static, str>,
        /// Whether it may pass by itself.
        transient: bool,
    },
    /// A lifecycle rule would take live objects away.
    #[error(
        "the lifecycle rule {rule:?} of the bucket {bucket} {effect} objects under {prefix:?}, which volumes need for ever: remove it, or limit it to another prefix"
    )]
    Lifecycle {
        /// The bucket.
        bucket: String,
        /// The rule's id.
        rule: String,
        /// What it does: `deletes` or `archives`.
        effect: &'static str,
        /// Our prefix.
        prefix: String,
    },
    /// What is deleted stays for ever.
    #[error(
        "the bucket {bucket} keeps the versions of deleted objects for ever, and space that volumes give back would be paid for all the same: suspend its versioning, or add a lifecycle rule that expires noncurrent versions under {prefix:?}"
    )]
    Versioning {
        /// The bucket.
        bucket: String,
        /// Our prefix.
        prefix: String,
    },
    /// The store does not keep two writers apart.
    #[error(
        "the store {place} cannot be used: {finding}. Two hosts could write to one volume at once and destroy it; use a store that supports conditional writes (If-None-Match and If-Match)"
    )]
    Preconditions {
        /// Where the store is.
        place: String,
        /// What it did.
        finding: String,
    },
    /// The store answers something else than it should.
    #[error("the store {place} cannot be used: {finding}: {remedy}")]
    Unfit {
        /// Where the store is.
        place: String,
        /// What it did.
        finding: String,
        /// What to do.
        remedy: &'static str,
    },
}

impl ProvisionError {
    /// Whether it says nothing of the place, only that it does not answer just now.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => matches!(error, StoreError::Unavailable { .. }),
            Self::Bucket { transient, .. } => *transient,
            Self::Uploads(error) => matches!(error, AskError::Store(_)),
            _ => false,
        }
    }
}

/// What [`prepare`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// The bucket was made.
    pub made_bucket: bool,
    /// Conditional writes were probed.
    pub probed: bool,
    /// What the marker calls the store, if it does: see [`id_of`].
    pub id: Option<String>,
    /// What could not be checked, for the log.
    pub warnings: Vec<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Marker {
    /// See [`LAYOUT`].
    quarry_store: u32,
    /// Where the store was when it was probed.
    probed: String,
    /// What tells this store from others, wherever it is moved to; stores of before have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

/// What the marker calls the store that `store` is; none if there is no marker that can be read, or if it has no id. Makes
/// nothing.
///
/// # Errors
/// If the store does not say.
pub async fn id_of(store: &dyn Store) -> Result<Option<String>, StoreError> {
    match store.get(MARKER_KEY).await {
        Ok((bytes, _)) => {
            let marker = read_marker(&bytes, &store.describe());
            Ok(marker.ok().and_then(|marker| marker.id))
        }
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives a store of before an id. It does without, if that cannot be written; and of two who do so the first is right.
async fn named(store: &dyn Store, mut marker: Marker, seen: &Tag) -> Option<String> {
    if marker.id.is_some() {
        return marker.id;
    }
    marker.id = Some(Uuid::new_v4().to_string());
    let body = serde_json::to_vec(&marker).expect("a number and texts are always JSON");
    match store.replace(MARKER_KEY, Bytes::from(body), seen).await {
        Ok(_) => marker.id,
        Err(_) => id_of(store).await.ok().flatten(),
    }
}

/// Makes the place that `settings` name ready for use through `store`, which must be the store
/// they name, with a deadline. Cheap when done before: a request to the bucket, one for its rules
/// and one for the marker.
///
/// # Errors
/// [`ProvisionError`], which names the remedy; the place must not be used then.
pub async fn prepare(
    settings: &StoreSettings,
    store: &dyn Store,
) -> Result<Prepared, ProvisionError> {
    let mut prepared = Prepared::default();
    if let Place::S3(s3) = settings.place()? {
        let bucket = bucket::Bucket::open(&s3).await?;
        prepared.made_bucket = bucket.ensure(settings.make_missing).await?;
        prepared.warnings.extend(bucket.check_lifecycle().await?);
        let is_new = matches!(
            store.get(MARKER_KEY).await,
            Err(StoreError::NotFound { .. })
        );
        match bucket.check_versioning().await {
            // What is there already is not shut out for what it costs.
            Err(error @ ProvisionError::Versioning { .. }) if !is_new => {
                prepared.warnings.push(error.to_string());
            }
            checked => prepared.warnings.extend(checked?),
        }
        if is_new {
            prepared.warnings.extend(bucket.ensure_uploads_end().await);
        }
    }
    (prepared.probed, prepared.id) = ensure_probed(store).await?;
    Ok(prepared)
}

/// What was looked at, and what was found.
pub type Look = (&'static str, Result<String, ProvisionError>);

/// Looks at a place anew, whatever was found before; changes nothing but the probe's own keys. What was found is put into
/// `looks` one by one, so that who gives up waiting has those that came. It breaks off at the first that has no answer, as the
/// others would wait as long for none.
pub async fn examine(
    settings: &StoreSettings,
    store: &dyn Store,
    looks: &mut Vec<Look>,
) -> ControlFlow<()> {
    match settings.place() {
        Ok(Place::S3(s3)) => match bucket::Bucket::open(&s3).await {
            Ok(bucket) => {
                let there = bucket.ensure(false).await;
                note(looks, "bucket", there.map(|_| "it is there".to_owned()))?;
                let fits = |warning: Option<String>, words: &str| {
                    warning.unwrap_or_else(|| words.to_owned())
                };
                let rules = bucket.check_lifecycle().await;
                let rules = rules.map(|w| fits(w, "none takes our objects away"));
                note(looks, "lifecycle rules", rules)?;
                let versions = bucket.check_versioning().await;
                let versions = versions.map(|w| fits(w, "what is deleted is gone"));
                note(looks, "versioning", versions)?;
                let uploads = upload::ask(&s3).await.map(|crc64| match crc64 {
                    Crc64::Checked => "the store checks their CRC-64",
                    Crc64::NotChecked => "the store checks their signature, not their CRC-64",
                });
                let uploads = uploads.map(str::to_owned).map_err(Into::into);
                note(looks, "uploads", uploads)?;
            }
            Err(error) => note(looks, "keys", Err(error))?,
        },
        Ok(Place::Folder(_)) => {}
        Err(error) => note(looks, "settings", Err(error.into()))?,
    }
    note(looks, "layout", layout_of(store).await)?;
    let probed = probe_conditional_writes(store).await;
    let probed = probed.map(|()| "two writers are kept apart".to_owned());
    note(looks, "conditional writes", probed)
}

fn note(
    looks: &mut Vec<Look>,
    what: &'static str,
    found: Result<String, ProvisionError>,
) -> ControlFlow<()> {
    let has_no_answer = found.as_ref().is_err_and(ProvisionError::is_transient);
    looks.push((what, found));
    match has_no_answer {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// What the marker says.
async fn layout_of(store: &dyn Store) -> Result<String, ProvisionError> {
    let place = store.describe();
    match store.get(MARKER_KEY).await {
        Ok((bytes, _)) => {
            read_marker(&bytes, &place).map(|marker| format!("version {}", marker.quarry_store))
        }
        Err(StoreError::NotFound { .. }) => Ok("nothing was kept in it yet".to_owned()),
        Err(error @ StoreError::Denied { .. }) => Err(probe::hidden(&place, &error)),
        Err(error) => Err(error.into()),
    }
}

/// Probes the store if that was not done at this address before; says whether it was done now, and
/// what the marker calls the store.
async fn ensure_probed(store: &dyn Store) -> Result<(bool, Option<String>), ProvisionError> {
    let place = store.describe();
    let marked = match store.get(MARKER_KEY).await {
        Ok((bytes, tag)) => {
            let marker = read_marker(&bytes, &place)?;
            if marker.probed == place {
                return Ok((false, named(store, marker, &tag).await));
            }
            Some((marker, tag))
        }
        Err(StoreError::NotFound { .. }) => None,
        Err(error @ StoreError::Denied { .. }) => return Err(probe::hidden(&place, &error)),
        Err(error) => return Err(error.into()),
    };
    probe_conditional_writes(store).await?;
    if let Some((marker, tag)) = marked {
        return Ok((true, named(store, marker, &tag).await));
    }
    let marker = Marker {
        quarry_store: LAYOUT,
        probed: place,
        id: Some(Uuid::new_v4().to_string()),
    };
    let body = serde_json::to_vec(&marker).expect("a number and texts are always JSON");
    match store.create(MARKER_KEY, Bytes::from(body)).await {
        Ok(_) => Ok((true, marker.id)),
        // Another daemon was first, or our own first attempt.
        Err(StoreError::Exists { .. }) => Ok((true, id_of(store).await?)),
        Err(error) => Err(error.into()),
    }
}

fn read_marker(bytes: &[u8], place: &str) -> Result<Marker, ProvisionError> {
    let unfit = |finding: String, remedy| ProvisionError::Unfit {
        place: place.to_owned(),
        finding,
        remedy,
    };
    let marker: Marker = serde_json::from_slice(bytes).map_err(|error| {
        let finding = format!("its object {MARKER_KEY} is not one of ours ({error})");
        unfit(finding, "use an empty prefix, or restore that object")
    })?;
    if marker.quarry_store == LAYOUT {
        return Ok(marker);
    }
    let finding = format!(
        "its layout is version {}, and this program knows {LAYOUT}",
        marker.quarry_store
    );
    Err(unfit(finding, "use a newer program"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FolderStore;

    fn folder() -> (tempfile::TempDir, StoreSettings, FolderStore) {
        let dir = tempfile::tempdir().unwrap();
        let settings = StoreSettings {
            url: format!("file://{}", dir.path().display()),
            ..StoreSettings::default()
        };
        let store = FolderStore::open(dir.path(), true).unwrap();
        (dir, settings, store)
    }

    #[tokio::test]
    async fn prefix_is_probed_once_and_again_elsewhere() {
        let (_dir, settings, store) = folder();
        assert_eq!(id_of(&store).await.unwrap(), None);
        let first = prepare(&settings, &store).await.unwrap();
        assert!(first.probed && first.id.is_some());
        assert_eq!(store.list("").await.unwrap(), [MARKER_KEY]);
        let again = prepare(&settings, &store).await.unwrap();
        assert!(!again.probed);
        assert_eq!(
            (&again.id, id_of(&store).await.unwrap()),
            (&first.id, first.id.clone())
        );

        let (bytes, tag) = store.get(MARKER_KEY).await.unwrap();
        let mut marker = read_marker(&bytes, "").unwrap();
        marker.probed = "file:///elsewhere".to_owned();
        let moved = Bytes::from(serde_json::to_vec(&marker).unwrap());
        store
            .replace(MARKER_KEY, moved.clone(), &tag)
            .await
            .unwrap();
        let there = prepare(&settings, &store).await.unwrap();
        assert!(there.probed);
        assert_eq!(there.id, first.id);
        assert_eq!(store.get(MARKER_KEY).await.unwrap().0, moved);
    }

    #[tokio::test]
    async fn store_of_before_is_given_an_id_once() {
        let (_dir, settings, store) = folder();
        let before = format!(
            r#"{{"quarry_store":{LAYOUT},"probed":"{}"}}"#,
            store.describe()
        );
        store.create(MARKER_KEY, before.into()).await.unwrap();
        let first = prepare(&settings, &store).await.unwrap();
        assert!(!first.probed && first.id.is_some());
        assert_eq!(id_of(&store).await.unwrap(), first.id);
        let again = prepare(&settings, &store).await.unwrap();
        assert_eq!(again.id, first.id);
    }

    #[tokio::test]
    async fn marker_foreign_or_newer_is_refused() {
        for (body, word) in [
            ("hello", "not one of ours"),
            (r#"{"quarry_store":2,"probed":""}"#, "newer program"),
        ] {
            let (_dir, settings, store) = folder();
            store.create(MARKER_KEY, Bytes::from(body)).await.unwrap();
            let error = prepare(&settings, &store).await.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
