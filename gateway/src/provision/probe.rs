//! Finds out whether a store really does conditional writes, under a race.
//!
//! Many servers accept the headers and ignore them; some check first and write then, and let two
//! writers through when both come at once. So each kind of write is raced.

use bytes::Bytes;
use futures::future::join_all;
use uuid::Uuid;

use super::ProvisionError;
use crate::store::{Store, StoreError, Tag};

/// Writers in a race.
const RACERS: usize = 8;
/// Races of each kind; of a server that checks and then writes, nearly every one has two winners.
const ROUNDS: usize = 4;

/// Checks that `store` keeps writers apart: `create` never overwrites, `replace` only what was seen,
/// and of several at once exactly one wins. It leaves nothing behind but what a failure keeps it
/// from deleting, under `probe/`.
///
/// # Errors
/// [`ProvisionError::Preconditions`] if it does not, [`ProvisionError::Unfit`] if it does other
/// things wrong, [`ProvisionError::Store`] if it fails; nothing is known then.
pub async fn probe_conditional_writes(store: &dyn Store) -> Result<(), ProvisionError> {
    let probe = Probe {
        store,
        base: format!("probe/{}", Uuid::new_v4()),
    };
    let result = probe.run().await;
    for key in probe.keys() {
        // A leftover does no harm.
        if let Err(error) = store.delete(&key).await {
            tracing::debug!(%error, "a key of the probe is left");
            break;
        }
    }
    result
}

/// Without the right to list, S3 answers "denied" for keys that do not exist.
pub(super) fn hidden(place: &str, error: &StoreError) -> ProvisionError {
    ProvisionError::Unfit {
        place: place.to_owned(),
        finding: format!("asked for a key that does not exist, it refuses ({error})"),
        remedy: "check the access key, and grant it s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket",
    }
}

struct Probe<'a> {
    store: &'a dyn Store,
    base: String,
}

impl Probe<'_> {
    fn keys(&self) -> impl Iterator<Item = String> + '_ {
        let races = (0..ROUNDS).map(|round| self.race_key(round));
        races.chain(["plain", "gone"].map(|name| self.key(name)))
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.base)
    }

    fn race_key(&self, round: usize) -> String {
        self.key(&format!("race-{round}"))
    }

    async fn run(&self) -> Result<(), ProvisionError> {
        self.missing().await?;
        self.one_writer().await?;
        self.deleted().await?;
        for round in 0..ROUNDS {
            let (body, tag) = self.racing_creates(&self.race_key(round)).await?;
            self.racing_replaces(&self.race_key(round), body, tag)
                .await?;
        }
        Ok(())
    }

    /// A key that does not exist is said to be missing.
    async fn missing(&self) -> Result<(), ProvisionError> {
        match self.store.get(&self.key("plain")).await {
            Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error @ StoreError::Denied { .. }) => Err(hidden(&self.store.describe(), &error)),
            Err(error) => Err(error.into()),
            Ok(_) => Err(self.unfit("a key that nobody wrote is there")),
        }
    }

    /// Each precondition alone.
    async fn one_writer(&self) -> Result<(), ProvisionError> {
        let key = &self.key("plain");
        let [one, two, three] = ["one", "two", "three"].map(|word| self.body(word));
        let first = self
            .made(self.store.create(key, one.clone()).await, key, &one)
            .await?;
        match self.store.create(key, two.clone()).await {
            Err(StoreError::Exists { .. }) => {}
            Ok(_) => return Err(self.broken("a create-only write overwrote an object")),
            Err(error) => return Err(error.into()),
        }
        self.expect(
            key,
            &one,
            "a create-only write was refused, and overwrote an object all the same",
        )
        .await?;
        let second = self
            .made(
                self.store.replace(key, two.clone(), &first).await,
                key,
                &two,
            )
            .await?;
        match self.store.replace(key, three.clone(), &first).await {
            Err(StoreError::Changed { .. }) => {}
            Ok(_) => return Err(self.broken("a write with an old tag overwrote a newer state")),
            Err(error) => return Err(error.into()),
        }
        self.expect(
            key,
            &two,
            "a write with an old tag was refused, and overwrote all the same",
        )
        .await?;
        if first == second {
            return Err(self.broken("two states of an object have the same tag"));
        }
        let part = self.store.get_range(key, 1..3).await?;
        if part != two[1..3] {
            return Err(self.unfit("reading a part of an object gave other bytes"));
        }
        Ok(())
    }

    /// What is deleted is gone at once, and a late writer does not bring it back.
    async fn deleted(&self) -> Result<(), ProvisionError> {
        let key = &self.key("gone");
        let body = self.body("gone");
        let tag = self
            .made(self.store.create(key, body.clone()).await, key, &body)
            .await?;
        self.store.delete(key).await?;
        match self.store.replace(key, self.body("back"), &tag).await {
            Err(StoreError::Changed { .. }) => {}
            Ok(_) => {
                return Err(self.broken("a write with an old tag brought a deleted object back"));
            }
            Err(error) => return Err(error.into()),
        }
        match self.store.get(key).await {
            Err(StoreError::NotFound { .. }) => Ok(()),
            Ok(_) => Err(self.unfit("a deleted object can still be read")),
            Err(error) => Err(error.into()),
        }
    }

    async fn racing_creates(&self, key: &str) -> Result<(Bytes, Tag), ProvisionError> {
        let bodies: Vec<_> = (0..RACERS)
            .map(|i| self.body(&format!("create {i}")))
            .collect();
        let results = join_all(bodies.iter().map(|b| self.store.create(key, b.clone()))).await;
        self.winner(key, &bodies, results, "create-only writes of one key")
            .await
    }

    async fn racing_replaces(
        &self,
        key: &str,
        seen: Bytes,
        tag: Tag,
    ) -> Result<(), ProvisionError> {
        let bodies: Vec<_> = (0..RACERS)
            .map(|i| self.body(&format!("replace {i}")))
            .collect();
        let results = join_all(
            bodies
                .iter()
                .map(|b| self.store.replace(key, b.clone(), &tag)),
        )
        .await;
        let (body, _) = self
            .winner(key, &bodies, results, "writes with the same tag")
            .await?;
        if body == seen {
            return Err(self.broken("a write that succeeded changed nothing"));
        }
        Ok(())
    }

    /// The one that won a race, which is what is there now.
    async fn winner(
        &self,
        key: &str,
        bodies: &[Bytes],
        results: Vec<Result<Tag, StoreError>>,
        what: &str,
    ) -> Result<(Bytes, Tag), ProvisionError> {
        let mut winners = Vec::new();
        // Those whose first answer was lost may have won.
        let mut perhaps = Vec::new();
        for (body, result) in bodies.iter().zip(results) {
            match result {
                Ok(_) => winners.push(body),
                Err(
                    StoreError::Exists { after_retry, .. }
                    | StoreError::Changed { after_retry, .. },
                ) => perhaps.extend(after_retry.then_some(body)),
                Err(error) => return Err(error.into()),
            }
        }
        let (now, tag) = self.store.get(key).await?;
        match winners[..] {
            [winner] if *winner == now => Ok((now, tag)),
            [] if perhaps.contains(&&now) => Ok((now, tag)),
            [_] => Err(self.broken(&format!(
                "of {RACERS} {what} at once, another is there than the one that succeeded"
            ))),
            [] => Err(self.broken(&format!("of {RACERS} {what} at once, none succeeded"))),
            _ => {
                let n = winners.len();
                Err(self.broken(&format!(
                    "of {RACERS} {what} at once, {n} succeeded instead of one"
                )))
            }
        }
    }

    /// The tag of a write that must succeed; after a lost answer, of what it wrote.
    async fn made(
        &self,
        result: Result<Tag, StoreError>,
        key: &str,
        body: &Bytes,
    ) -> Result<Tag, ProvisionError> {
        match result {
            Ok(tag) => Ok(tag),
            Err(
                StoreError::Exists {
                    after_retry: true, ..
                }
                | StoreError::Changed {
                    after_retry: true, ..
                },
            ) => {
                self.expect(key, body, "a write that was tried twice is not there")
                    .await
            }
            Err(StoreError::Exists { .. }) => Err(self.unfit("a key that nobody wrote is there")),
            Err(StoreError::Changed { .. }) => {
                Err(self.broken("a write with the right tag was refused"))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn expect(
        &self,
        key: &str,
        body: &Bytes,
        otherwise: &str,
    ) -> Result<Tag, ProvisionError> {
        let (now, tag) = self.store.get(key).await?;
        if now == *body {
            return Ok(tag);
        }
        Err(self.broken(otherwise))
    }

    /// A content that no other writer has.
    fn body(&self, word: &str) -> Bytes {
        format!("{word} of {}", self.base).into()
    }

    fn broken(&self, finding: &str) -> ProvisionError {
        ProvisionError::Preconditions {
            place: self.store.describe(),
            finding: finding.to_owned(),
        }
    }

    fn unfit(&self, finding: &str) -> ProvisionError {
        ProvisionError::Unfit {
            place: self.store.describe(),
            finding: finding.to_owned(),
            remedy: "it is no store that shows each write at once; use another",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use async_trait::async_trait;

    use super::*;
    use crate::store::FolderStore;

    /// What a bad store does wrong.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Flaw {
        /// Overwrites on `create`, as a server that ignores If-None-Match.
        Creates,
        /// Overwrites on `replace`, as a server that ignores If-Match.
        Replaces,
        /// Checks, and then writes.
        NotAtomic,
        /// Brings deleted objects back.
        Resurrects,
        /// Refuses and overwrites.
        RefusesAndWrites,
        /// Denies knowing keys that do not exist.
        Hides,
    }

    #[derive(Debug)]
    struct Flawed {
        inner: FolderStore,
        flaw: Flaw,
    }

    impl Flawed {
        async fn overwrite(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
            loop {
                let done = match self.inner.get(key).await {
                    Ok((_, tag)) => self.inner.replace(key, body.clone(), &tag).await,
                    Err(_) => self.inner.create(key, body.clone()).await,
                };
                match done {
                    Err(StoreError::Exists { .. } | StoreError::Changed { .. }) => {}
                    done => return done,
                }
            }
        }
    }

    #[async_trait]
    impl Store for Flawed {
        async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
            match self.inner.get(key).await {
                Err(StoreError::NotFound { key }) if self.flaw == Flaw::Hides => {
                    let reason = "AccessDenied".to_owned();
                    Err(StoreError::Denied { key, reason })
                }
                got => got,
            }
        }
        async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
            self.inner.get_range(key, range).await
        }
        async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
            self.inner.get_prefix(key, len).await
        }
        async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
            match self.flaw {
                Flaw::Creates => self.overwrite(key, body).await,
                Flaw::NotAtomic if self.inner.get(key).await.is_err() => {
                    tokio::task::yield_now().await;
                    self.overwrite(key, body).await
                }
                Flaw::RefusesAndWrites => {
                    let done = self.inner.create(key, body.clone()).await;
                    if done.is_err() {
                        self.overwrite(key, body).await?;
                    }
                    done
                }
                _ => self.inner.create(key, body).await,
            }
        }
        async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
            match self.flaw {
                Flaw::Replaces => self.overwrite(key, body).await,
                Flaw::Resurrects if self.inner.get(key).await.is_err() => {
                    self.inner.create(key, body).await
                }
                _ => self.inner.replace(key, body, seen).await,
            }
        }
        async fn delete(&self, key: &str) -> Result<(), StoreError> {
            self.inner.delete(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
            self.inner.list(prefix).await
        }
        fn describe(&self) -> String {
            format!("a store with the flaw {:?}", self.flaw)
        }
    }

    #[tokio::test]
    async fn good_store_passes_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        probe_conditional_writes(&store).await.unwrap();
        assert!(store.list("").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn store_with_a_flaw_is_refused_in_clear_words() {
        for (flaw, word) in [
            (Flaw::Creates, "create-only write overwrote"),
            (Flaw::Replaces, "old tag overwrote"),
            (Flaw::NotAtomic, "succeeded instead of one"),
            (Flaw::Resurrects, "brought a deleted object back"),
            (Flaw::RefusesAndWrites, "overwrote an object all the same"),
            (Flaw::Hides, "s3:ListBucket"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let inner = FolderStore::open(dir.path(), true).unwrap();
            let store = Flawed { inner, flaw };
            let error = probe_conditional_writes(&store)
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains(word), "{flaw:?}: {error}");
            assert!(error.contains("cannot be used"), "{error}");
            assert!(store.list("").await.unwrap().is_empty(), "{flaw:?}");
        }
    }
}
