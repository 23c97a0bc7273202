//! `quarry volume release`.

use quarry_objfmt::CacheId;

use super::Failure;
use super::output::Console;
use super::progress::shown;
use crate::control::{Client, OwnerInfo, ReleaseInfo, ReleaseSpec, VolumeInfo, VolumeRef};

pub(super) async fn run(
    client: &Client,
    volume: &VolumeRef,
    from: &str,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let info = client.show_volume(&volume.clone().into()).await?;
    let released = match &info.owner {
        Some(owner) => {
            if info.attached.is_some() && is_here(&info, &client.status().await?.cache.id) {
                let message = format!("{volume} is attached here");
                let remedy =
                    format!("`quarry volume detach {volume}` gives it back, and loses nothing");
                return Err(Failure::new("conflict", message, remedy));
            }
            let spec = of(volume, owner, from)?;
            shown("releasing", volume, client.release(volume, spec)).await?
        }
        None => ReleaseInfo {
            volume: volume.to_string(),
            released: false,
        },
    };
    console.show(&released, |released| match released.released {
        true => format!(
            "{volume}: nobody has it. Whoever attaches it next needs no --force, and fences what {from} still adds to it; \
             until then {from} may add to it"
        ),
        false => format!("{volume}: {from} does not have it"),
    })
}

/// Whether it is the daemon with the cache `cache` that writes to it.
fn is_here(info: &VolumeInfo, cache: &str) -> bool {
    let writes = info.attached.as_ref().is_some_and(|a| !a.read_only);
    writes && info.owner.as_ref().is_some_and(|o| o.cache == cache)
}

/// Whom to take it from, if that is who was named.
fn of(volume: &VolumeRef, owner: &OwnerInfo, from: &str) -> Result<ReleaseSpec, Failure> {
    if owner.host != from && owner.cache != from {
        let message = format!("{volume} is attached by host {}, not {from}", owner.host);
        return Err(Failure::new(
            "conflict",
            message,
            "name the host that has it",
        ));
    }
    let from = CacheId::parse(&owner.cache).map_err(|_| {
        let message = format!("{volume}: its owner's cache has an id that is none");
        Failure::new("internal", message, "use a client of the daemon's version")
    })?;
    Ok(ReleaseSpec { from })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::AttachedInfo;

    #[test]
    fn volume_is_here_if_the_daemon_that_is_asked_is_its_owner_and_writes_to_it() {
        let attached = |read_only| AttachedInfo {
            read_only,
            ..AttachedInfo::default()
        };
        let info = |attached: Option<AttachedInfo>| VolumeInfo {
            attached,
            owner: Some(OwnerInfo {
                host: "node-3".to_owned(),
                cache: "ours".to_owned(),
                since_ms: 1,
            }),
            ..VolumeInfo::default()
        };
        assert!(is_here(&info(Some(attached(false))), "ours"));
        // Fenced, or it only looks on.
        assert!(!is_here(&info(Some(attached(false))), "another's"));
        assert!(!is_here(&info(Some(attached(true))), "ours"));
        assert!(!is_here(&info(None), "ours"));
    }

    #[test]
    fn release_is_from_the_host_that_was_named_and_no_other() {
        let cache = "f7a4f3a0-0000-4000-8000-000000000001";
        let owner = OwnerInfo {
            host: "node-3".to_owned(),
            cache: cache.to_owned(),
            since_ms: 1,
        };
        let volume: VolumeRef = "acme/db".parse().unwrap();
        let from = CacheId::parse(cache).unwrap();
        for name in ["node-3", cache] {
            assert_eq!(of(&volume, &owner, name).unwrap(), ReleaseSpec { from });
        }
        let failure = of(&volume, &owner, "node-4").unwrap_err();
        assert!(failure.message.contains("node-3"), "{failure}");
    }
}
