//! Whether the store is the one whose volumes are to be attached again here: a wrong letter in its name would
//! else make another, and end a daemon that serves for one that cannot.
//!
//! Invariant: nothing is made, in the store or here.

use std::path::Path;

use anyhow::Context as _;
use quarry_config::ConfigError;
use tokio::time::timeout;

use super::PREPARE_DEADLINE;
use crate::engine::Wanted;
use crate::provision;
use crate::store::{StoreSettings, open_store};

/// Refuses a store that is another than the one whose volumes are to be attached again. Says whether it is where the
/// list in `data_dir` has it: then it is known without an answer of it.
///
/// # Errors
/// If it is another; if the list or the settings cannot be read.
pub(super) async fn check(data_dir: &Path, settings: &StoreSettings) -> anyhow::Result<bool> {
    let place = settings.place()?.describe();
    let wanted = Wanted::load(data_dir)?;
    let Some(noted) = wanted.store() else {
        return Ok(false);
    };
    if noted.place == place {
        return Ok(true);
    }
    let volumes = wanted.all();
    let Some((first, _)) = volumes.first() else {
        return Ok(false);
    };
    let which = match volumes.len() {
        1 => first.to_string(),
        count => format!("{first} and {} more", count - 1),
    };
    if noted.id.is_some() {
        // Without an answer nothing is known, and it is to be tried again: it may be a store that was moved.
        let id = id_there(settings).await.with_context(|| {
            format!(
                "{which} is to be attached again from the store {}, and {place} cannot say whether it is that one",
                noted.place
            )
        })?;
        if id == noted.id {
            tracing::info!(from = %noted.place, to = %place, "the store was moved");
            return Ok(false);
        }
    }
    Err(ConfigError::Value {
        place: None,
        key: "store.url",
        value: place,
        why: format!(
            "it is not the store of which {which} is to be attached again, {}",
            noted.place
        ),
        remedy: format!(
            "correct store.url or its endpoint, or detach these volumes first; if it is the same store at another place, stop the daemon that serves and take \"store\" out of {}",
            Wanted::path_in(data_dir).display()
        ),
    }
    .into())
}

/// What the store that `settings` name is called, if it says so.
async fn id_there(settings: &StoreSettings) -> anyhow::Result<Option<String>> {
    let settings = StoreSettings {
        make_missing: false,
        ..settings.clone()
    };
    let store = open_store(&settings)?;
    let id = timeout(PREPARE_DEADLINE, provision::id_of(&*store)).await;
    Ok(id.context("it does not answer")??)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{How, StoreNote};

    fn at(dir: &Path, name: &str) -> StoreSettings {
        StoreSettings {
            url: format!("file://{}", dir.join(name).display()),
            make_missing: true,
            ..StoreSettings::default()
        }
    }

    #[tokio::test]
    async fn store_is_another_unless_its_place_or_its_id_is_the_noted_one() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let (here, there) = (at(dir.path(), "here"), at(dir.path(), "there"));
        // A list of before says nothing.
        let how = r#"{"via":"nbd","read_only":false}"#;
        let how: How = serde_json::from_str(how).unwrap();
        let list = Wanted::load(&data).unwrap();
        let volume = "acme/db".parse().unwrap();
        list.add(&volume, how).await.unwrap();
        assert!(!check(&data, &here).await.unwrap());

        let store = open_store(&here).unwrap();
        let id = provision::prepare(&here, &*store).await.unwrap().id;
        let place = here.url.clone();
        list.note_store(StoreNote { place, id }).await.unwrap();
        assert!(check(&data, &here).await.unwrap());
        let refused = async || {
            let refused = check(&data, &there).await.unwrap_err();
            let words = refused.to_string();
            assert!(
                words.contains("acme/db") && words.contains(&here.url),
                "{words}"
            );
            refused
        };
        // Not mounted yet, perhaps: that is to be tried again.
        assert!(!refused().await.is::<ConfigError>());
        assert!(!dir.path().join("there").exists());

        // Another store, then the same, moved.
        let other = open_store(&there).unwrap();
        provision::prepare(&there, &*other).await.unwrap();
        assert!(refused().await.is::<ConfigError>());
        std::fs::remove_dir_all(dir.path().join("there")).unwrap();
        std::fs::rename(dir.path().join("here"), dir.path().join("there")).unwrap();
        assert!(!check(&data, &there).await.unwrap());

        list.remove(&volume).await.unwrap();
        assert!(!check(&data, &at(dir.path(), "new")).await.unwrap());
    }
}
