//! Whether the store is the one whose volumes are to be attached again here: a wrong letter in its name would
//! else make another, and end a daemon that serves for one that cannot.
//!
//! Invariant: nothing is made, in the store or here.

use std::path::Path;

use anyhow::Context as _;
use quarry_config::ConfigError;
use tokio::time::timeout;

use super::PREPARE_DEADLINE;
use crate::engine::{StoreNote, Wanted};
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
    let Some(which) = which(&wanted) else {
        return Ok(false);
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
    Err(refused(data_dir, &place, &noted, &which))
}

/// Refuses as [`check`] does, with what `store` was found to be: the list in `data_dir` may be another since.
///
/// # Errors
/// As [`check`].
pub(super) fn check_again(data_dir: &Path, store: &StoreNote) -> anyhow::Result<()> {
    let wanted = Wanted::load(data_dir)?;
    match (wanted.store(), which(&wanted)) {
        (Some(noted), Some(which)) if !noted.is_same(store) => {
            Err(refused(data_dir, &store.place, &noted, &which))
        }
        _ => Ok(()),
    }
}

/// What is to be attached again, if anything is.
fn which(wanted: &Wanted) -> Option<String> {
    let volumes = wanted.all();
    let (first, _) = volumes.first()?;
    Some(match volumes.len() {
        1 => first.to_string(),
        count => format!("{first} and {} more", count - 1),
    })
}

fn refused(data_dir: &Path, place: &str, noted: &StoreNote, which: &str) -> anyhow::Error {
    ConfigError::Value {
        place: None,
        key: "store.url",
        value: place.to_owned(),
        why: format!(
            "it is not the store of which {which} is to be attached again, {}",
            noted.place
        ),
        remedy: format!(
            "correct store.url or its endpoint; if the volumes are in this store, which was moved or of which the list is wrong, stop the daemon that serves and take \"store\" out of {}; to go over to another store, detach them first where they are attached, and not while they wait for that",
            Wanted::path_in(data_dir).display()
        ),
    }
    .into()
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
    use crate::engine::How;

    fn at(dir: &Path, name: &str) -> StoreSettings {
        StoreSettings {
            url: format!("file://{}", dir.join(name).display()),
            make_missing: true,
            ..StoreSettings::default()
        }
    }

    fn how() -> How {
        serde_json::from_str(r#"{"via":"nbd","read_only":false}"#).unwrap()
    }

    /// Makes the store, and says what it is.
    async fn made(settings: &StoreSettings) -> StoreNote {
        let store = open_store(settings).unwrap();
        let id = provision::prepare(settings, &*store).await.unwrap().id;
        let place = settings.place().unwrap().describe();
        StoreNote { place, id }
    }

    #[tokio::test]
    async fn store_is_another_unless_its_place_or_its_id_is_the_noted_one() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let (here, there) = (at(dir.path(), "here"), at(dir.path(), "there"));
        // A list of before says nothing.
        let list = Wanted::load(&data).unwrap();
        let volume = "acme/db".parse().unwrap();
        list.add(&volume, how()).await.unwrap();
        assert!(!check(&data, &here).await.unwrap());

        let store = open_store(&here).unwrap();
        let id = provision::prepare(&here, &*store).await.unwrap().id;
        let place = here.url.clone();
        list.note_store(StoreNote { place, id }).await.unwrap();
        list.found_here().await.unwrap();
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

    /// A list of an older daemon, and a wrong letter at the first start of this one.
    #[tokio::test]
    async fn list_that_names_no_store_names_the_one_in_which_a_volume_was_found() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let (right, wrong) = (at(data, "right"), at(data, "wrong"));
        let volume = "acme/db".parse().unwrap();
        let list = Wanted::load(data).unwrap();
        list.add(&volume, how()).await.unwrap();

        assert!(!check(data, &wrong).await.unwrap());
        let list = Wanted::load(data).unwrap();
        list.note_store(made(&wrong).await).await.unwrap();
        let more = "acme/more".parse().unwrap();
        list.add(&more, how()).await.unwrap();
        list.remove(&more).await.unwrap();
        assert!(!check(data, &right).await.unwrap());

        let list = Wanted::load(data).unwrap();
        list.note_store(made(&right).await).await.unwrap();
        list.found_here().await.unwrap();
        assert!(check(data, &right).await.unwrap());
        let refused = check(data, &wrong).await.unwrap_err();
        assert!(refused.is::<ConfigError>(), "{refused}");
    }

    #[tokio::test]
    async fn store_that_could_not_be_noted_is_with_the_next_volume() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let (before, now) = (at(data, "before"), at(data, "now"));
        let list = Wanted::load(data).unwrap();
        list.note_store(made(&before).await).await.unwrap();

        let list = Wanted::load(data).unwrap();
        let in_the_way = data.join("attached.new");
        std::fs::create_dir(&in_the_way).unwrap();
        assert!(list.note_store(made(&now).await).await.is_err());
        std::fs::remove_dir(&in_the_way).unwrap();
        let volume = "acme/db".parse().unwrap();
        list.add(&volume, how()).await.unwrap();
        assert!(check(data, &now).await.unwrap());
        let refused = check(data, &before).await.unwrap_err();
        assert!(refused.is::<ConfigError>(), "{refused}");
    }

    /// A daemon that is replaced attaches until it ends.
    #[tokio::test]
    async fn volumes_of_another_store_that_come_in_after_the_check_are_seen_and_their_note_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let (old, new) = (at(data, "old"), at(data, "new"));
        let (old, found) = (made(&old).await, made(&new).await);
        let serving = Wanted::load(data).unwrap();
        serving.note_store(old.clone()).await.unwrap();
        assert!(!check(data, &new).await.unwrap());
        check_again(data, &found).unwrap();

        let volume = "acme/db".parse().unwrap();
        serving.add(&volume, how()).await.unwrap();
        let refused = check_again(data, &found).unwrap_err();
        assert!(refused.is::<ConfigError>(), "{refused}");
        assert!(refused.to_string().contains("acme/db"), "{refused}");
        let next = Wanted::load(data).unwrap();
        next.note_store(found.clone()).await.unwrap();
        assert_eq!(Wanted::load(data).unwrap().store(), Some(old.clone()));
        // Moved.
        let moved = StoreNote {
            id: old.id,
            ..found
        };
        check_again(data, &moved).unwrap();
    }
}
