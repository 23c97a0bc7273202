//! Whether the cache is the one that the daemon to be replaced serves its volumes with: with another in its place none
//! of them would be attached again, and their users would wait.
//!
//! A daemon that replaces none starts with any cache: the one before may be lost. Here it is not, for it is in use.

use std::path::Path;

use quarry_cache::device;
use quarry_config::ConfigError;

use super::held::Held;
use crate::engine::Wanted;

/// Refuses a cache with which no volume of the list in `data_dir` was attached, if some were with another, unless `held`,
/// the daemon to be replaced, is seen to have it open.
///
/// # Errors
/// If it is another; if the list cannot be read.
pub(super) fn check(data_dir: &Path, cache: &Path, held: &Held) -> anyhow::Result<()> {
    if std::fs::metadata(cache).is_ok_and(|file| held.is_seen_with(&file)) {
        return Ok(());
    }
    let here = device::peek(cache).map(|there| there.cache.to_string());
    let mut others = Vec::new();
    for (volume, how) in Wanted::load(data_dir)?.all() {
        match how.cache {
            Some(id) if Some(&id) == here.as_ref() => return Ok(()),
            Some(id) => others.push((volume, id)),
            // It takes no writes, or is in a list of before.
            None => {}
        }
    }
    let Some((first, id)) = others.first() else {
        return Ok(());
    };
    let which = match others.len() {
        1 => first.to_string(),
        count => format!("{first} and {} more", count - 1),
    };
    let found = here.map_or_else(|| "a new one".to_owned(), |here| format!("cache {here}"));
    Err(ConfigError::Value {
        place: None,
        key: "cache.path",
        value: cache.display().to_string(),
        why: format!(
            "it is {found}, and {which} is to be attached again with cache {id}, another than this"
        ),
        remedy: "correct cache.path; to go over to another cache, detach the volumes first; if theirs is lost, stop the daemon that serves, and start one with the new cache".to_owned(),
    }
    .into())
}

#[cfg(test)]
mod tests {
    use quarry_cache::CacheDevice;
    use quarry_objfmt::CacheId;

    use super::*;
    use crate::engine::How;

    fn with(cache: Option<String>) -> How {
        let how: How = serde_json::from_str(r#"{"via":"nbd","read_only":false}"#).unwrap();
        How { cache, ..how }
    }

    #[tokio::test]
    async fn cache_is_another_unless_a_volume_was_attached_with_it_or_the_daemon_before_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, none) = (dir.path().join("cache"), dir.path().join("none"));
        let id = CacheId::from_bytes([3; 16]);
        let device = CacheDevice::open(&cache, Some(16 << 20), id, "a", 1).unwrap();
        let nobody = Held::of(None);
        let checked = |path: &Path| check(dir.path(), path, &nobody);
        let refused = |path: &Path| {
            let refused = checked(path).unwrap_err();
            assert!(refused.is::<ConfigError>(), "{refused}");
            let words = refused.to_string();
            assert!(
                words.contains("acme/db") && words.contains("5f0e") && words.contains("cache.path"),
                "{words}"
            );
        };
        let list = Wanted::load(dir.path()).unwrap();
        let (one, two, db) = (
            "acme/one".parse().unwrap(),
            "acme/two".parse().unwrap(),
            "acme/db".parse().unwrap(),
        );
        list.add(&one, with(None)).await.unwrap();
        checked(&none).unwrap();
        list.add(&db, with(Some("5f0e".to_owned()))).await.unwrap();
        refused(&none);
        refused(&cache);

        // As of one that serves with a cache in the place of one that was lost.
        let socket = dir.path().join("q.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let before = super::super::predecessor(&socket).unwrap();
        check(dir.path(), &cache, &Held::of(before.as_ref())).unwrap();

        list.add(&two, with(Some(device.id().to_string())))
            .await
            .unwrap();
        checked(&cache).unwrap();
        refused(&none);
    }
}
