//! What every store must do, as tests to run on one.
//!
//! Keys are fresh ones, so that the suite can run on a store in use; it deletes what it made.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use uuid::Uuid;

use super::{GET_BYTES_MAX, KEY_BYTES_MAX, Store, StoreError, Tag};

/// Writers in a race.
const RACERS: usize = 8;
/// Races of each kind.
const ROUNDS: usize = 10;

/// Runs all of it.
pub async fn run(store: Arc<dyn Store>) {
    let base = format!("contract/{}", Uuid::new_v4());
    reads(&*store, &base).await;
    creates(&*store, &base).await;
    replaces(&*store, &base).await;
    deletes(&*store, &base).await;
    lists(&*store, &base).await;
    bad_keys(&*store).await;
    racing_creates(std::slice::from_ref(&store)).await;
    racing_replaces(std::slice::from_ref(&store)).await;
    counting_replaces(std::slice::from_ref(&store)).await;
    for key in store.list(&format!("{base}/")).await.unwrap() {
        store.delete(&key).await.unwrap();
    }
    assert!(store.list(&format!("{base}/")).await.unwrap().is_empty());
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn reads(store: &dyn Store, base: &str) {
    let key = &format!("{base}/read");
    let body = Bytes::from(
        (0..1_000_000_u32)
            .map(|i| (i % 251) as u8)
            .collect::<Vec<_>>(),
    );
    let size = body.len() as u64;
    let tag = store.create(key, body.clone()).await.unwrap();
    assert_eq!(store.get(key).await.unwrap(), (body.clone(), tag));
    for part in [
        0..1,
        0..body.len(),
        1..65_537,
        body.len() - 1..body.len(),
        499_999..700_001,
    ] {
        let got = store.get_range(key, part.start as u64..part.end as u64);
        assert!(got.await.unwrap() == body[part.clone()], "{part:?}");
    }
    for (start, end, there) in [
        (size - 1, size + 1, 1),
        (0, size + 1, size),
        (size, size + 1, 0),
        (size + 9, size + 10, 0),
    ] {
        match store.get_range(key, start..end).await {
            Err(StoreError::WrongLength {
                offset,
                expected,
                got,
                ..
            }) => {
                assert_eq!((offset, expected, got), (start, end - start, there));
            }
            other => panic!("{start}..{end}: {other:?}"),
        }
    }
    for (start, end) in [
        (5, 5),
        (6, 5),
        (0, GET_BYTES_MAX + 1),
        (u64::MAX - 1, u64::MAX),
    ] {
        let got = store.get_range(key, start..end).await;
        assert!(got.is_err(), "{start}..{end}");
    }
    assert!(store.get_prefix(key, 10).await.unwrap() == body[..10]);
    assert!(store.get_prefix(key, size).await.unwrap() == body);
    assert!(store.get_prefix(key, size + 10).await.unwrap() == body);
    assert!(store.get_prefix(key, 0).await.is_err());

    let missing = &format!("{base}/missing");
    let expected = StoreError::NotFound {
        key: missing.clone(),
    };
    assert_eq!(store.get(missing).await.unwrap_err(), expected);
    assert_eq!(store.get_range(missing, 0..1).await.unwrap_err(), expected);
    assert_eq!(store.get_prefix(missing, 1).await.unwrap_err(), expected);
    // A key's beginning is not an object.
    assert!(matches!(
        store.get(base).await,
        Err(StoreError::NotFound { .. })
    ));

    let empty = &format!("{base}/empty");
    store.create(empty, Bytes::new()).await.unwrap();
    assert!(store.get(empty).await.unwrap().0.is_empty());
    assert!(store.get_prefix(empty, 5).await.unwrap().is_empty());
    assert!(matches!(
        store.get_range(empty, 0..1).await,
        Err(StoreError::WrongLength { got: 0, .. })
    ));
}

async fn creates(store: &dyn Store, base: &str) {
    let key = &format!("{base}/create");
    let tag = store.create(key, text("one")).await.unwrap();
    // The same content is no excuse.
    for body in ["two", "one"] {
        let error = store.create(key, text(body)).await.unwrap_err();
        assert_eq!(
            error,
            StoreError::Exists {
                key: key.clone(),
                after_retry: false
            }
        );
    }
    assert_eq!(store.get(key).await.unwrap(), (text("one"), tag));
}

async fn replaces(store: &dyn Store, base: &str) {
    let key = &format!("{base}/replace");
    let changed = StoreError::Changed {
        key: key.clone(),
        after_retry: false,
    };
    let first = store.create(key, text("one")).await.unwrap();
    let second = store.replace(key, text("two"), &first).await.unwrap();
    assert_ne!(first, second);
    assert_eq!(store.get(key).await.unwrap(), (text("two"), second.clone()));
    for stale in [
        first.clone(),
        Tag::new("\"00000000000000000000000000000000\""),
    ] {
        assert_eq!(
            store.replace(key, text("three"), &stale).await.unwrap_err(),
            changed
        );
    }
    assert_eq!(store.get(key).await.unwrap(), (text("two"), second.clone()));
    // A tag that was read is as good as one that was written.
    let (_, read) = store.get(key).await.unwrap();
    let third = store.replace(key, text("three"), &read).await.unwrap();
    // What was deleted stays so.
    store.delete(key).await.unwrap();
    assert_eq!(
        store.replace(key, text("four"), &third).await.unwrap_err(),
        changed
    );
    assert!(matches!(
        store.get(key).await,
        Err(StoreError::NotFound { .. })
    ));
    let never = &format!("{base}/never");
    assert!(matches!(
        store.replace(never, text("x"), &third).await,
        Err(StoreError::Changed { .. })
    ));
    assert!(matches!(
        store.get(never).await,
        Err(StoreError::NotFound { .. })
    ));
}

async fn deletes(store: &dyn Store, base: &str) {
    let key = &format!("{base}/delete/deep/er");
    store.create(key, text("x")).await.unwrap();
    store.delete(key).await.unwrap();
    assert!(matches!(
        store.get(key).await,
        Err(StoreError::NotFound { .. })
    ));
    store.delete(key).await.unwrap();
    store.delete(&format!("{base}/no/such")).await.unwrap();
    store.create(key, text("again")).await.unwrap();
}

async fn lists(store: &dyn Store, base: &str) {
    let base = &format!("{base}/list");
    // More than a page of S3.
    let mut keys: Vec<String> = (0..1100).map(|i| format!("{base}/many/{i:04}")).collect();
    keys.extend(["a", "a-b", "b/c/d", "b.c"].map(|name| format!("{base}/{name}")));
    for some in keys.chunks(50) {
        join_all(some.iter().map(|key| store.create(key, Bytes::new())))
            .await
            .into_iter()
            .for_each(|made| drop(made.unwrap()));
    }
    keys.sort();
    assert_eq!(store.list(&format!("{base}/")).await.unwrap(), keys);
    assert_eq!(
        store.list(&format!("{base}/many/")).await.unwrap().len(),
        1100
    );
    for max in [0, 1, 1050, 5000] {
        let some = store
            .list_some(&format!("{base}/many/"), max)
            .await
            .unwrap();
        assert_eq!(some.len(), max.min(1100));
        assert!(some.iter().all(|key| keys.contains(key)), "{some:?}");
    }
    let many = format!("{base}/many/");
    let all = store.list(&many).await.unwrap();
    for (after, max, expected) in [
        (many.as_str(), 5000, &all[..]),
        (&many, 1050, &all[..1050]),
        (&all[99], 1000, &all[100..]),
        (&all[1050], 10, &all[1051..1061]),
        (&all[1099], 10, &[]),
    ] {
        let some = store.list_after(&many, after, max).await.unwrap();
        assert_eq!(some, expected, "{max} after {after}");
    }
    assert_eq!(
        store.list(&format!("{base}/b/")).await.unwrap(),
        [format!("{base}/b/c/d")]
    );
    // A part's beginning is no part, and an object is no folder.
    assert!(
        store
            .list(&format!("{base}/man/"))
            .await
            .unwrap()
            .is_empty()
    );
    assert!(store.list(&format!("{base}/a/")).await.unwrap().is_empty());
    assert!(matches!(
        store.list(&format!("{base}/man")).await,
        Err(StoreError::Invalid { .. })
    ));
    for some in keys.chunks(50) {
        join_all(some.iter().map(|key| store.delete(key)))
            .await
            .into_iter()
            .for_each(Result::unwrap);
    }
}

async fn bad_keys(store: &dyn Store) {
    let long = "x".repeat(KEY_BYTES_MAX + 1);
    for key in [
        "",
        "/",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "a/",
        "a\0",
        "a b",
        &long,
    ] {
        let tag = Tag::new("t");
        for error in [
            store.get(key).await.unwrap_err(),
            store.get_range(key, 0..1).await.unwrap_err(),
            store.get_prefix(key, 1).await.unwrap_err(),
            store.create(key, text("x")).await.unwrap_err(),
            store.replace(key, text("x"), &tag).await.unwrap_err(),
            store.delete(key).await.unwrap_err(),
        ] {
            assert!(
                matches!(error, StoreError::Invalid { .. }),
                "{key:?}: {error:?}"
            );
        }
    }
}

/// Of writers that create one key at once, one succeeds; `stores` are handles to the same one.
pub async fn racing_creates(stores: &[Arc<dyn Store>]) {
    for round in 0..ROUNDS {
        let key = format!("contract/{}/race", Uuid::new_v4());
        let racers = (0..RACERS).map(|i| {
            let (store, key) = (Arc::clone(&stores[i % stores.len()]), key.clone());
            tokio::spawn(async move { store.create(&key, text(&format!("racer {i}"))).await })
        });
        let mut winner = None;
        for (i, result) in join_all(racers).await.into_iter().enumerate() {
            match result.unwrap() {
                Ok(tag) => assert!(
                    winner.replace((text(&format!("racer {i}")), tag)).is_none(),
                    "{round}"
                ),
                Err(StoreError::Exists { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        let got = stores[0].get(&key).await.unwrap();
        assert_eq!(Some(got), winner);
        stores[0].delete(&key).await.unwrap();
    }
}

/// Of writers that replace one state at once, one succeeds.
pub async fn racing_replaces(stores: &[Arc<dyn Store>]) {
    let key = format!("contract/{}/race", Uuid::new_v4());
    let mut tag = stores[0].create(&key, text("first")).await.unwrap();
    for round in 0..ROUNDS {
        let racers = (0..RACERS).map(|i| {
            let (store, key, tag) = (
                Arc::clone(&stores[i % stores.len()]),
                key.clone(),
                tag.clone(),
            );
            tokio::spawn(async move {
                let body = text(&format!("round {round} racer {i}"));
                store
                    .replace(&key, body.clone(), &tag)
                    .await
                    .map(|tag| (body, tag))
            })
        });
        let mut winner = None;
        for result in join_all(racers).await {
            match result.unwrap() {
                Ok(won) => assert!(winner.replace(won).is_none(), "{round}"),
                Err(StoreError::Changed { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        let got = stores[0].get(&key).await.unwrap();
        assert_eq!(Some(&got), winner.as_ref());
        tag = got.1;
    }
    stores[0].delete(&key).await.unwrap();
}

/// Many that read, add one and write back lose no count.
pub async fn counting_replaces(stores: &[Arc<dyn Store>]) {
    const EACH: usize = 5;
    let key = format!("contract/{}/count", Uuid::new_v4());
    stores[0].create(&key, text("0")).await.unwrap();
    let counters = (0..RACERS).map(|i| {
        let (store, key) = (Arc::clone(&stores[i % stores.len()]), key.clone());
        tokio::spawn(async move {
            let mut done = 0;
            while done < EACH {
                let (body, tag) = store.get(&key).await.unwrap();
                let count: usize = std::str::from_utf8(&body).unwrap().parse().unwrap();
                match store
                    .replace(&key, text(&(count + 1).to_string()), &tag)
                    .await
                {
                    Ok(_) => done += 1,
                    Err(StoreError::Changed { .. }) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
        })
    });
    for counter in join_all(counters).await {
        counter.unwrap();
    }
    let (body, _) = stores[0].get(&key).await.unwrap();
    assert_eq!(body, text(&(RACERS * EACH).to_string()));
    stores[0].delete(&key).await.unwrap();
}

mod tests {
    use quarry_config::Secret;
    use quarry_tests::SeaweedFs;

    use super::*;
    use crate::provision::{self, ProvisionError};
    use crate::store::{Lane, LaneSettings, StoreSettings, open_store};

    /// A SeaweedFS of the test's own, and settings for a prefix of a bucket in it. `None`, and counted
    /// as skipped, where the program is missing.
    fn server() -> Option<(SeaweedFs, tempfile::TempDir, StoreSettings)> {
        let dir = tempfile::tempdir().unwrap();
        let server = SeaweedFs::start(dir.path()).unwrap()?;
        let environment = server.client_environment(server.address());
        let var = |name| {
            let found = environment.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.clone())
        };
        let settings = StoreSettings {
            url: format!("s3://quarry-contract/{}", Uuid::new_v4()),
            endpoint: var("AWS_ENDPOINT_URL"),
            region: var("AWS_REGION"),
            access_key: var("AWS_ACCESS_KEY_ID"),
            secret_key: var("AWS_SECRET_ACCESS_KEY").map(Secret::new),
            make_missing: true,
            ..StoreSettings::default()
        };
        Some((server, dir, settings))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn s3_server_keeps_the_contract_and_passes_the_probe() {
        let Some((_server, _dir, settings)) = server() else {
            return;
        };
        let store = open_store(&settings).unwrap();
        let lane = Lane::new(Arc::clone(&store), &LaneSettings::default());
        let limited = lane.with_deadline(std::time::Duration::from_secs(30));
        let prepared = provision::prepare(&settings, &limited).await.unwrap();
        assert!(prepared.probed, "{prepared:?}");
        println!("{}: {prepared:?}", store.describe());
        assert!(
            !provision::prepare(&settings, &limited)
                .await
                .unwrap()
                .probed
        );
        run(store).await;
        run(Arc::new(lane.clone())).await;
        println!("{:?}", lane.stats().snapshot());
        limited.delete(provision::MARKER_KEY).await.unwrap();
        assert_eq!(limited.list("").await.unwrap(), [""; 0]);
    }

    #[tokio::test]
    async fn s3_server_without_the_bucket_is_refused() {
        let Some((_server, _dir, mut settings)) = server() else {
            return;
        };
        settings.url = format!("s3://quarry-{}/x", Uuid::new_v4());
        settings.make_missing = false;
        let store = open_store(&settings).unwrap();
        let error = provision::prepare(&settings, &store).await.unwrap_err();
        assert!(
            matches!(error, ProvisionError::BucketMissing { .. }),
            "{error}"
        );
        // Nothing in it is "not found": that would be taken for an empty store.
        let error = store.get("head").await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }

    #[tokio::test]
    async fn s3_server_with_a_wrong_key_is_refused() {
        let Some((_server, _dir, mut settings)) = server() else {
            return;
        };
        settings.secret_key = Some(Secret::new("wrong"));
        let store = open_store(&settings).unwrap();
        let error = store.get("head").await.unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{error}");
        let error = provision::prepare(&settings, &store).await.unwrap_err();
        assert!(!error.to_string().contains("wrong\""), "{error}");
    }
}
