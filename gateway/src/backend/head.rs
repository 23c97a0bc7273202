//! The head of a volume, and the right to change it: its tag of when we last wrote it.

use bytes::Bytes;
use quarry_objfmt::codec::Compression;
use quarry_objfmt::head::Head;
use quarry_objfmt::{Epoch, TenantName, keys};
use tokio::sync::Mutex;

use crate::store::{Store, StoreError, Tag};

/// Why the head could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// Somebody else changed it: the volume is theirs.
    #[error("the volume was taken over by {by}")]
    Fenced {
        /// The owner that the head names now.
        by: String,
    },
    /// It cannot be read, or the store refuses.
    #[error("{object}: {reason}")]
    Damaged {
        /// Its key.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// The store did not answer in time (calls with a deadline only).
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The head as we last saw it. Changed by conditional PUT only, one change at a time.
#[derive(Debug)]
pub struct HeadCell {
    tenant: TenantName,
    key: String,
    frame_sectors: u32,
    compression: Compression,
    epoch: Epoch,
    state: Mutex<(Head, Tag)>,
    /// A copy to look at while a change is under way.
    latest: parking_lot::Mutex<Head>,
}

impl HeadCell {
    /// The head that was read with this tag, or written and given it.
    #[must_use]
    pub fn new(tenant: TenantName, head: Head, tag: Tag) -> Self {
        let key = keys::head_key(&tenant, head.volume);
        Self {
            tenant,
            key,
            frame_sectors: head.frame_sectors,
            compression: head.compression,
            epoch: head.epoch,
            latest: parking_lot::Mutex::new(head.clone()),
            state: Mutex::new((head, tag)),
        }
    }

    /// Reads a volume's head.
    ///
    /// # Errors
    /// [`HeadError::Damaged`] if it is missing or does not decode: never an empty volume.
    pub async fn read(store: &dyn Store, key: &str) -> Result<(Head, Tag), HeadError> {
        let damaged = |reason: String| HeadError::Damaged {
            object: key.to_owned(),
            reason,
        };
        let (bytes, tag) = match store.get(key).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => {
                return Err(damaged("the volume's head is missing".to_owned()));
            }
            Err(error) => return Err(error.into()),
        };
        let head = Head::decode(&bytes)
            .map_err(|e| damaged(format!("the volume's head cannot be read: {e}")))?;
        Ok((head, tag))
    }

    /// The tenant.
    pub fn tenant(&self) -> &TenantName {
        &self.tenant
    }

    /// Sectors of a frame.
    pub const fn frame_sectors(&self) -> u32 {
        self.frame_sectors
    }

    /// How chunks are compressed.
    pub const fn compression(&self) -> Compression {
        self.compression
    }

    /// The epoch that is ours.
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// A copy, as it was before the change that is under way, if one is.
    pub fn get(&self) -> Head {
        self.latest.lock().clone()
    }

    /// Changes the head by conditional PUT. `change` is applied to our copy, which is the store's
    /// as long as the condition holds.
    ///
    /// A PUT whose answer was lost looks, when tried again, as if somebody else had changed the
    /// head; so what stands there is read, and if it is what we were writing, it is ours.
    ///
    /// # Errors
    /// [`HeadError::Fenced`] if somebody else changed it.
    pub async fn update(
        &self,
        store: &dyn Store,
        change: impl FnOnce(&mut Head) + Send,
    ) -> Result<Head, HeadError> {
        let mut state = self.state.lock().await;
        let mut head = state.0.clone();
        change(&mut head);
        let tag = put(store, &self.key, &head, &state.1).await?;
        *state = (head.clone(), tag);
        *self.latest.lock() = head.clone();
        Ok(head)
    }
}

/// Writes `head` where `tag` is current.
///
/// # Errors
/// As [`HeadCell::update`].
pub(super) async fn put(
    store: &dyn Store,
    key: &str,
    head: &Head,
    tag: &Tag,
) -> Result<Tag, HeadError> {
    let bytes = Bytes::from(head.encode());
    match store.replace(key, bytes.clone(), tag).await {
        Ok(tag) => Ok(tag),
        Err(StoreError::Changed { .. } | StoreError::NotFound { .. }) => {
            let (now, now_tag) = HeadCell::read(store, key).await?;
            if now.encode() == bytes[..] {
                return Ok(now_tag);
            }
            let by = now.owner.map_or_else(
                || "another daemon".to_owned(),
                |o| format!("host {}", o.host),
            );
            Err(HeadError::Fenced { by })
        }
        Err(error) => Err(error.into()),
    }
}
