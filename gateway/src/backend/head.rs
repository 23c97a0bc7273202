//! The head of a volume, and the right to change it: its tag of when we last wrote it.

use bytes::Bytes;
use quarry_cache::{Branch, Mutation};
use quarry_objfmt::codec::Compression;
use quarry_objfmt::head::Head;
use quarry_objfmt::{ChunkId, Epoch, TenantName, VolumeId, VolumeName, keys};
use tokio::sync::Mutex;

use super::sound::{self, Unsound};
use crate::store::{Store, StoreError, Tag};

/// How often a change is refused though the head is the one that it was made to, before that is taken for the truth.
const REFUSALS_MAX: u32 = 4;

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
    volume: VolumeId,
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
        Self {
            tenant,
            volume: head.volume,
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
    /// [`HeadError::Damaged`] if it is missing, does not decode, or is another volume's: never an empty volume.
    pub async fn read(
        store: &dyn Store,
        tenant: &TenantName,
        volume: VolumeId,
    ) -> Result<(Head, Tag), HeadError> {
        let there = read_if_there(store, tenant, volume).await?;
        there.ok_or_else(|| missing(tenant, volume))
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
    /// head; so what stands there is read, and if it is what we were writing, it is ours. So is
    /// another head of the same epoch and owner: a change before this one, given up for want of an
    /// answer, that arrived after all. Then `change` is made to that. Each turn means that another
    /// change got through, and of those there is one a call at most; a store that refuses a tag of
    /// its own is asked a few times.
    ///
    /// # Errors
    /// [`HeadError::Fenced`] if somebody else changed it, [`HeadError::Damaged`] if it is gone. After
    /// [`HeadError::Store`] it may be changed or not, unless the store refuses its own tag; the next change tells.
    pub async fn update(
        &self,
        store: &dyn Store,
        change: impl Fn(&mut Head) + Send,
    ) -> Result<Head, HeadError> {
        let change = move |head: &mut Head| {
            change(head);
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(head) = self.try_update(store, change).await?;
        Ok(head)
    }

    /// That nobody has taken the volume over, by the head as it is in the store now.
    ///
    /// # Errors
    /// [`HeadError::Fenced`] if somebody has.
    pub async fn still_ours(&self, store: &dyn Store) -> Result<(), HeadError> {
        let (now, _) = Self::read(store, &self.tenant, self.volume).await?;
        match now.epoch == self.epoch() {
            true => Ok(()),
            false => Err(fenced(&now)),
        }
    }

    /// What it means that there is no head: if the map that it named is gone too, or without a map the first chunk of its log and
    /// its name, the volume was deleted for good, and who still writes to it is to know; a head alone comes back with a rescue.
    async fn lost(&self, store: &dyn Store, head: &Head) -> HeadError {
        let (tenant, volume) = (&self.tenant, self.volume);
        let mut named = Vec::new();
        match (head.root, head.log.first()) {
            (Some(root), _) => named.push(keys::map_key(tenant, volume, root.epoch, root.seq)),
            (None, Some(range)) => {
                let (epoch, seq) = (range.epoch, range.first);
                named.push(keys::chunk_key(tenant, ChunkId { volume, epoch, seq }));
                // There may have been no chunk yet. A deletion takes the name first.
                named.extend(VolumeName::new(&head.name).map(|name| keys::name_key(tenant, &name)));
            }
            (None, None) => return missing(tenant, volume),
        }
        for object in &named {
            match store.get_prefix(object, 1).await {
                Err(StoreError::NotFound { .. }) => {}
                _ => return missing(tenant, volume),
            }
        }
        HeadError::Fenced {
            by: "who deleted it for good".to_owned(),
        }
    }

    /// As [`HeadCell::update`], for a change that may find that it cannot be: then nothing is written by
    /// this turn of it.
    ///
    /// # Errors
    /// As [`HeadCell::update`]; the inner error is `change`'s.
    pub async fn try_update<E>(
        &self,
        store: &dyn Store,
        change: impl Fn(&mut Head) -> Result<(), E> + Send,
    ) -> Result<Result<Head, E>, HeadError> {
        let mut state = self.state.lock().await;
        let mut refusals = 0;
        loop {
            let mut head = state.0.clone();
            if let Err(error) = change(&mut head) {
                return Ok(Err(error));
            }
            let (done, now) = match replace(store, &self.tenant, &head, &state.1).await? {
                Replaced::Done(tag) => (true, (head, tag)),
                Replaced::Missing => return Err(self.lost(store, &state.0).await),
                Replaced::Changed(now, tag) => {
                    if (now.epoch, &now.owner) != (state.0.epoch, &state.0.owner)
                        && !Mutation::IgnoreEpoch.is_on()
                    {
                        Branch::HeadFenced.taken();
                        return Err(fenced(&now));
                    }
                    refusals += u32::from(*now == state.0);
                    if refusals >= REFUSALS_MAX {
                        return Err(HeadError::Store(StoreError::Invalid {
                            key: keys::head_key(&self.tenant, self.volume),
                            reason: "the store refuses a tag that it gave itself".to_owned(),
                        }));
                    }
                    Branch::HeadOfBefore.taken();
                    (false, (*now, tag))
                }
            };
            *self.latest.lock() = now.0.clone();
            *state = now;
            if done {
                return Ok(Ok(state.0.clone()));
            }
        }
    }
}

/// A volume's head, if there is one. What lies in its place and is another volume's says nothing of this one.
async fn read_if_there(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
) -> Result<Option<(Head, Tag)>, HeadError> {
    let key = keys::head_key(tenant, volume);
    let decode = |(bytes, tag): (Bytes, Tag)| match Head::decode(&bytes) {
        Ok(head) if head.volume == volume => Ok((head, tag)),
        Ok(head) => Err(format!("it is the head of volume {}", head.volume)),
        Err(error) => Err(error.to_string()),
    };
    match sound::read(|| store.get(&key), decode).await {
        Ok(read) => Ok(Some(read)),
        Err(Unsound::Store(StoreError::NotFound { .. })) => Ok(None),
        Err(Unsound::Store(error)) => Err(error.into()),
        Err(Unsound::Damaged(reason)) => Err(HeadError::Damaged {
            object: key,
            reason: format!("the volume's head cannot be read: {reason}"),
        }),
    }
}

pub(super) fn missing(tenant: &TenantName, volume: VolumeId) -> HeadError {
    HeadError::Damaged {
        object: keys::head_key(tenant, volume),
        reason: "the volume's head is missing".to_owned(),
    }
}

/// What came of a conditional PUT.
pub(super) enum Replaced {
    /// There is no head any more.
    Missing,
    /// It is written.
    Done(Tag),
    /// Another head stands there.
    Changed(Box<Head>, Tag),
}

/// Writes `head` where `tag` is current.
///
/// # Errors
/// As [`HeadCell::update`].
pub(super) async fn put(
    store: &dyn Store,
    tenant: &TenantName,
    head: &Head,
    tag: &Tag,
) -> Result<Tag, HeadError> {
    match replace(store, tenant, head, tag).await? {
        Replaced::Done(tag) => Ok(tag),
        Replaced::Changed(now, _) => Err(fenced(&now)),
        Replaced::Missing => Err(missing(tenant, head.volume)),
    }
}

/// As [`put`], but tells what stands there instead.
///
/// # Errors
/// [`HeadError::Damaged`] and [`HeadError::Store`].
pub(super) async fn replace(
    store: &dyn Store,
    tenant: &TenantName,
    head: &Head,
    tag: &Tag,
) -> Result<Replaced, HeadError> {
    let key = keys::head_key(tenant, head.volume);
    let bytes = Bytes::from(head.encode());
    match store.replace(&key, bytes.clone(), tag).await {
        Ok(tag) => Ok(Replaced::Done(tag)),
        Err(StoreError::Changed { .. } | StoreError::NotFound { .. }) => {
            let Some((now, now_tag)) = read_if_there(store, tenant, head.volume).await? else {
                return Ok(Replaced::Missing);
            };
            Ok(if now.encode() == bytes[..] {
                Branch::HeadThere.taken();
                Replaced::Done(now_tag)
            } else {
                Replaced::Changed(Box::new(now), now_tag)
            })
        }
        Err(error) => Err(error.into()),
    }
}

pub(super) fn fenced(now: &Head) -> HeadError {
    let owner = now.owner.as_ref();
    HeadError::Fenced {
        by: owner.map_or_else(
            || "another daemon".to_owned(),
            |o| format!("host {}", o.shown_host()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use async_trait::async_trait;
    use quarry_objfmt::{CacheId, Owner, Sectors};

    use super::*;
    use crate::backend::open::{Claim, take};
    use crate::backend::release::release;
    use crate::control::VolumeRef;
    use crate::store::FolderStore;
    use crate::trash::{self, Purged};

    fn attached(epoch: u32, host: &str) -> Head {
        let (tenant, name) = (
            TenantName::new("acme").unwrap(),
            VolumeName::new("db").unwrap(),
        );
        let volume = VolumeId::from_bytes([1; 16]);
        Head {
            epoch: Epoch::new(epoch),
            owner: Some(Owner {
                cache: CacheId::from_bytes([2; 16]),
                host: host.to_owned(),
                since_ms: u64::from(epoch),
            }),
            ..Head::fresh(volume, &tenant, &name, Sectors::new(1000), 1)
        }
    }

    /// A store, and two cells that saw the same head in it.
    async fn two_cells(dir: &std::path::Path) -> (FolderStore, HeadCell, HeadCell) {
        let store = FolderStore::open(dir, true).unwrap();
        let tenant = TenantName::new("acme").unwrap();
        let head = attached(3, "a");
        let key = keys::head_key(&tenant, head.volume);
        let tag = store
            .create(&key, Bytes::from(head.encode()))
            .await
            .unwrap();
        let cell = || HeadCell::new(tenant.clone(), head.clone(), tag.clone());
        let cells = (cell(), cell());
        (store, cells.0, cells.1)
    }

    #[tokio::test]
    async fn change_given_up_that_got_through_after_all_is_kept_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (store, cell, late) = two_cells(dir.path()).await;
        // As a PUT whose answer nobody waited for.
        late.update(&store, |head| head.size = Sectors::new(2000))
            .await
            .unwrap();
        assert_eq!(cell.get().size, Sectors::new(1000));
        let head = cell.update(&store, |head| head.stored_bytes += 7);
        let head = head.await.unwrap();
        assert_eq!((head.size, head.stored_bytes), (Sectors::new(2000), 7));
        assert_eq!(cell.get(), head);
        let there = HeadCell::read(&store, cell.tenant(), head.volume).await;
        assert_eq!(there.unwrap().0, head);
        // And the one that is behind now goes on in the same way.
        let head = late.update(&store, |head| head.stored_bytes += 3);
        assert_eq!(head.await.unwrap().stored_bytes, 10);
    }

    /// A store that takes no replacement, whichever tag it is for.
    #[derive(Debug)]
    struct Refusing(FolderStore);

    #[async_trait]
    impl Store for Refusing {
        async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
            self.0.get(key).await
        }
        async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
            self.0.get_range(key, range).await
        }
        async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
            self.0.get_prefix(key, len).await
        }
        async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
            self.0.create(key, body).await
        }
        async fn replace(&self, key: &str, _: Bytes, _: &Tag) -> Result<Tag, StoreError> {
            Err(StoreError::Changed {
                key: key.to_owned(),
                after_retry: false,
            })
        }
        async fn delete(&self, key: &str) -> Result<(), StoreError> {
            self.0.delete(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
            self.0.list(prefix).await
        }
        fn describe(&self) -> String {
            self.0.describe()
        }
    }

    /// It was asked for ever, as fast as it answered.
    #[tokio::test]
    async fn store_that_refuses_its_own_tag_is_asked_a_few_times() {
        let dir = tempfile::tempdir().unwrap();
        let (store, cell, _) = two_cells(dir.path()).await;
        let store = Refusing(store);
        let update = cell.update(&store, |head| head.stored_bytes += 7);
        let update = tokio::time::timeout(Duration::from_secs(10), update).await;
        match update.expect("it is asked for ever") {
            Err(HeadError::Store(StoreError::Invalid {
                key: object,
                reason,
            })) => {
                let head = cell.get();
                assert_eq!(object, keys::head_key(cell.tenant(), head.volume));
                assert!(reason.contains("refuses a tag"), "{reason}");
            }
            updated => panic!("{updated:?}"),
        }
        let head = cell.update(&store.0, |head| head.stored_bytes += 7);
        assert_eq!(head.await.unwrap().stored_bytes, 7);
    }

    #[tokio::test]
    async fn head_that_is_gone_with_its_map_fences_and_one_gone_alone_is_damage() {
        let root = quarry_objfmt::head::RootRef {
            epoch: Epoch::new(3),
            seq: quarry_objfmt::MapSeq::new(1),
            offset: 2,
            len: 3,
            usage: None,
        };
        for (is_purged, has_root) in [(false, true), (true, true), (true, false)] {
            let dir = tempfile::tempdir().unwrap();
            let (store, cell, _) = two_cells(dir.path()).await;
            let named = |head: &mut Head| head.root = has_root.then_some(root);
            let head = cell.update(&store, named).await.unwrap();
            let map = keys::map_key(cell.tenant(), head.volume, root.epoch, root.seq);
            if !is_purged {
                store.create(&map, Bytes::from("a map")).await.unwrap();
            }
            store
                .delete(&keys::head_key(cell.tenant(), head.volume))
                .await
                .unwrap();
            let error = cell.update(&store, |head| head.stored_bytes += 1).await;
            let error = error.unwrap_err();
            match is_purged && has_root {
                true => assert!(matches!(error, HeadError::Fenced { .. }), "{error}"),
                false => assert!(matches!(error, HeadError::Damaged { .. }), "{error}"),
            }
        }
    }

    /// It went on uploading to where nothing is any more, until its log was full.
    #[tokio::test]
    async fn writer_without_a_map_is_fenced_when_its_volume_was_released_and_purged() {
        for (is_purged, has_chunk) in [(false, true), (false, false), (true, true)] {
            let dir = tempfile::tempdir().unwrap();
            let store = FolderStore::open(dir.path(), true).unwrap();
            let name = VolumeRef::new("acme", "db").unwrap();
            let (tenant, volume) = (&name.tenant, VolumeId::from_bytes([1; 16]));
            let fresh = Head::fresh(volume, tenant, &name.name, Sectors::new(1000), 1);
            let head_key = keys::head_key(tenant, volume);
            let made = store.create(&head_key, fresh.encode().into());
            made.await.unwrap();
            let [ours, others] = [2, 3].map(|n| CacheId::from_bytes([n; 16]));
            let by = Claim {
                cache: ours,
                host: "a".to_owned(),
                now_ms: 1,
                force: false,
                discard_unsent: false,
                must_be_ours: false,
            };
            let taken = take(&store, tenant, volume, None, &by).await.unwrap();
            let range = &taken.info.log[0];
            let (epoch, seq) = (range.epoch, range.first);
            let chunk = keys::chunk_key(tenant, ChunkId { volume, epoch, seq });
            if has_chunk {
                store.create(&chunk, Bytes::from("a chunk")).await.unwrap();
            }
            let named = keys::name_key(tenant, &name.name);
            store.create(&named, Bytes::from("a name")).await.unwrap();
            if is_purged {
                store.delete(&named).await.unwrap();
                assert!(release(&store, tenant, volume, ours).await.unwrap());
                let put = trash::put(&store, &name, volume, others, 5);
                put.await.unwrap();
                let objects = AtomicU64::new(0);
                let purged = trash::purge(&store, tenant, volume, 5, 0, &objects).await;
                assert_eq!(purged.unwrap(), Purged::Gone);
            } else {
                store.delete(&head_key).await.unwrap();
            }
            let late = taken.head.update(&store, |head| head.stored_bytes += 1);
            let error = late.await.unwrap_err();
            match is_purged {
                true => assert!(matches!(error, HeadError::Fenced { .. }), "{error}"),
                false => assert!(matches!(error, HeadError::Damaged { .. }), "{error}"),
            }
        }
    }

    #[tokio::test]
    async fn host_of_another_owner_is_told_without_what_does_something_to_log_or_terminal() {
        let dir = tempfile::tempdir().unwrap();
        let (store, cell, late) = two_cells(dir.path()).await;
        let theirs = attached(4, "b\nERROR forged \x1b[2J");
        late.update(&store, |head| *head = theirs.clone())
            .await
            .unwrap();
        let there = HeadCell::read(&store, cell.tenant(), theirs.volume).await;
        let there = there.unwrap().0;
        assert_eq!(there, theirs, "such a head is read as it is");
        let fenced = cell.update(&store, |head| head.stored_bytes += 7);
        let told = fenced.await.unwrap_err().to_string();
        assert_eq!(
            told,
            "the volume was taken over by host b ERROR forged  [2J"
        );
    }

    #[tokio::test]
    async fn change_of_another_term_or_owner_fences() {
        let changes: [fn(&mut Head); 2] =
            [|head| *head = attached(4, "b"), |head| head.owner = None];
        for (change, by) in changes.into_iter().zip(["host b", "another daemon"]) {
            let dir = tempfile::tempdir().unwrap();
            let (store, cell, other) = two_cells(dir.path()).await;
            let now = other.update(&store, change).await.unwrap();
            let error = cell
                .update(&store, |head| head.size = Sectors::new(2000))
                .await
                .unwrap_err();
            assert!(
                matches!(&error, HeadError::Fenced { by: who } if who == by),
                "{error}"
            );
            let there = HeadCell::read(&store, cell.tenant(), now.volume).await;
            assert_eq!(there.unwrap().0, now);
        }
    }
}
