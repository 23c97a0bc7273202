//! `quarry volume release`.

use quarry_objfmt::CacheId;

use super::Failure;
use super::output::Console;
use super::progress::shown;
use crate::control::{Client, OwnerInfo, ReleaseInfo, ReleaseSpec, VolumeRef};

pub(super) async fn run(
    client: &Client,
    volume: &VolumeRef,
    from: &str,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let owner = client.show_volume(&volume.clone().into()).await?.owner;
    let released = match owner {
        Some(owner) => {
            let spec = of(volume, &owner, from)?;
            shown("releasing", volume, client.release(volume, spec)).await?
        }
        None => ReleaseInfo {
            volume: volume.to_string(),
            released: false,
        },
    };
    console.show(&released, |released| match released.released {
        true => format!("{volume}: {from} can write to it no more, and nobody has it"),
        false => format!("{volume}: {from} does not have it"),
    })
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
