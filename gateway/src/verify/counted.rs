//! A store that counts what is read through it, and is read only.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Progress, add};
use crate::store::{Store, StoreError, Tag};

/// The store below, its reads counted.
#[derive(Clone, Debug)]
pub(super) struct Counted {
    store: Arc<dyn Store>,
    progress: Arc<Progress>,
}

impl Counted {
    pub fn new(store: Arc<dyn Store>, progress: Arc<Progress>) -> Self {
        Self { store, progress }
    }

    fn count(&self, bytes: &Bytes) {
        add(&self.progress.read_bytes, bytes.len() as u64);
    }
}

fn refused(key: &str) -> StoreError {
    StoreError::Invalid {
        key: key.to_owned(),
        reason: "a check changes nothing".to_owned(),
    }
}

#[async_trait]
impl Store for Counted {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        let got = self.store.get(key).await?;
        self.count(&got.0);
        Ok(got)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let got = self.store.get_range(key, range).await?;
        self.count(&got);
        Ok(got)
    }

    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        let got = self.store.get_prefix(key, len).await?;
        self.count(&got);
        Ok(got)
    }

    async fn create(&self, key: &str, _: Bytes) -> Result<Tag, StoreError> {
        Err(refused(key))
    }

    async fn replace(&self, key: &str, _: Bytes, _: &Tag) -> Result<Tag, StoreError> {
        Err(refused(key))
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        Err(refused(key))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.store.list(prefix).await
    }

    fn describe(&self) -> String {
        self.store.describe()
    }
}
