//! `quarry volume`.

use serde_json::json;

use super::args::{AttachFlags, CreateFlags, ShapeFlags, VolumeCommand};
use super::output::Console;
use super::progress::{shown, uploading};
use super::table::{bytes, fields, percent, span_ms, table, time_ms};
use super::{
    Failure, chores, data_keys, ensure, export, import, limit, release, rescue, trash, verify, warm,
};
use crate::control::{
    AttachInfo, AttachOptions, Client, ImageRef, RekeySpec, ResizeInfo, ResizeSpec, RestoreSpec,
    RetainInfo, SnapRef, State, VerifySpec, VolumeInfo, VolumeList, VolumeRef, VolumeSpec,
};
use crate::moment::Moment;

pub(super) async fn run(
    client: &Client,
    command: VolumeCommand,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    match command {
        VolumeCommand::Create(flags) => create(client, flags, console).await,
        VolumeCommand::Attach(flags) => attach(client, flags, console).await,
        VolumeCommand::List { tenant } => {
            let list = client.list_volumes(tenant.as_ref()).await?;
            let text = |list: &VolumeList| list_text(&list.volumes);
            let Some(why) = &list.incomplete else {
                return console.show(&list, text);
            };
            // Who takes what is not listed for gone must not take this for success.
            let message = format!("the list is not complete: {why}");
            let remedy = "try again when the store answers";
            console.show_failed(&list, text, Failure::new("unavailable", message, remedy))
        }
        VolumeCommand::Show { volume } => {
            console.show(&client.show_volume(&volume).await?, show_text)
        }
        VolumeCommand::Resize {
            volume,
            size,
            force,
        } => {
            let size_bytes = size.bytes();
            let call = client.resize(&volume, ResizeSpec { size_bytes, force });
            let resized = shown("resizing", &volume, call).await?;
            console.show(&resized, resize_text)
        }
        VolumeCommand::Retain { volume, retain } => {
            let call = client.retain(&volume, retain);
            let retained = shown("retaining", &volume, call).await?;
            console.show(&retained, retain_text)
        }
        VolumeCommand::Limit(flags) => limit::run(client, flags, console).await,
        VolumeCommand::Rekey { volume, key, data } => {
            let spec = RekeySpec { key, data };
            let rekeyed = shown("rekeying", &volume, client.rekey(&volume, &spec)).await?;
            console.show(&rekeyed, |rekeyed| data_keys::rekey_text(rekeyed, data))
        }
        VolumeCommand::Clone { snapshot, volume } => {
            clone(client, &snapshot, &volume, console).await
        }
        VolumeCommand::Rollback { snapshot } => {
            let rolled = shown("rolling back", &snapshot, client.rollback(&snapshot)).await?;
            console.show(&rolled, |_| {
                format!("{}: it is what {snapshot} is", snapshot.volume)
            })
        }
        VolumeCommand::Sync { volume } => {
            let image = volume.clone().into();
            uploading("syncing", client, &image, client.sync(&volume)).await?;
            done(
                console,
                &volume,
                "synced",
                "all that was written before is in the object store",
            )
        }
        VolumeCommand::Warm(flags) => warm::warm(client, flags, console).await,
        VolumeCommand::Evict { volume } => {
            console.show(&client.evict(&volume).await?, warm::evict_text)
        }
        VolumeCommand::Compact { volume, held } => {
            chores::compact(client, &volume, held, console).await
        }
        VolumeCommand::Flatten { volume } => chores::flatten(client, &volume, console).await,
        VolumeCommand::Detach { volume } => {
            let call = client.detach(&volume);
            let detached = uploading("detaching", client, &volume, call).await?;
            let Some(unsent) = detached.unsent_bytes else {
                return done(console, &volume, "detached", "it is detached");
            };
            let told =
                json!({ "volume": detached.volume, "done": "detached", "unsent_bytes": unsent });
            console.show(&told, |_| {
                format!(
                    "{volume}: it is detached; {} written here were not sent and stay in this cache: the next attach here wants --discard-unsent",
                    bytes(unsent)
                )
            })
        }
        VolumeCommand::Import(flags) => import::run(client, flags, console).await,
        VolumeCommand::Export(flags) => export::run(client, flags, console).await,
        VolumeCommand::Verify {
            volume,
            deep,
            snapshots,
        } => {
            let spec = VerifySpec { deep, snapshots };
            verify::run(client, &volume, spec, console).await
        }
        VolumeCommand::Release { volume, from } => {
            release::run(client, &volume, &from, console).await
        }
        VolumeCommand::Rescue(flags) => rescue::run(client, flags, console).await,
        VolumeCommand::Delete {
            volume,
            discard_unsent,
        } => {
            let call = client.delete_volume(&volume, discard_unsent);
            let deleted = shown("deleting", &volume, call).await?;
            console.show(&deleted, trash::deleted_text)
        }
        VolumeCommand::Restore { volume, name } => {
            let restored = client.restore(&RestoreSpec::new(&volume, name)).await?;
            console.show(&restored, |v| {
                format!("{}/{} is there again", v.tenant, v.name)
            })
        }
    }
}

fn done(
    console: &mut Console<'_>,
    volume: &impl std::fmt::Display,
    word: &str,
    sentence: &str,
) -> Result<(), Failure> {
    console.show(
        &json!({ "volume": volume.to_string(), "done": word }),
        |_| format!("{volume}: {sentence}"),
    )
}

async fn create(
    client: &Client,
    flags: CreateFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let CreateFlags {
        volume,
        size,
        retain,
        rates,
        shape:
            ShapeFlags {
                sector_size,
                durability,
                compression,
                key,
                no_encryption,
            },
    } = flags;
    let VolumeRef { tenant, name } = volume.clone();
    let spec = VolumeSpec {
        tenant,
        name,
        size_bytes: size.bytes(),
        sector_size,
        durability,
        compression,
        retain_ms: retain,
        rates: rates.into(),
        key,
        no_encryption,
    };
    let made = client.create_volume(&spec).await?;
    console.show(&made, |made| {
        format!(
            "{volume}: {} are there; attach it with `quarry volume attach {volume}`",
            bytes(made.size_bytes)
        )
    })
}

async fn clone(
    client: &Client,
    snapshot: &SnapRef,
    volume: &VolumeRef,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    if volume.tenant != snapshot.volume.tenant {
        let message = format!("a clone of {snapshot} cannot be tenant {}'s", volume.tenant);
        let remedy = format!("name it {}/{}", snapshot.volume.tenant, volume.name);
        return Err(Failure::new("invalid", message, remedy));
    }
    let call = client.clone_snapshot(snapshot, &volume.name);
    let made = shown("cloning", volume, call).await?;
    console.show(&made, |made| {
        format!(
            "{volume}: {} as in {snapshot} are there; attach it with `quarry volume attach {volume}`",
            bytes(made.size_bytes)
        )
    })
}

async fn attach(
    client: &Client,
    flags: AttachFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let AttachFlags {
        volume,
        at,
        via,
        force,
        discard_unsent,
        discard_lost,
        read_only,
        queues,
        owner,
        mode,
        direct_reads,
        ensure: is_ensured,
    } = flags;
    let volume = image_at(volume, at)?;
    let options = AttachOptions {
        via,
        force,
        discard_unsent,
        discard_lost,
        read_only,
        queues,
        device_owner: owner,
        device_mode: mode,
        direct_reads,
        ..AttachOptions::default()
    };
    let attached = match is_ensured {
        true => ensure::attach(client, &volume, &options).await?,
        false => shown("attaching", &volume, client.attach(&volume, &options)).await?,
    };
    if let Some(warning) = &attached.warning {
        eprintln!("quarry: {volume} is attached, with {warning}");
    }
    console.show(&attached, attach_text)
}

/// What `--at` makes of what was named.
pub(super) fn image_at(image: ImageRef, at: Option<Moment>) -> Result<ImageRef, Failure> {
    match at {
        Some(_) if image.is_past() => {
            let message = format!("{image} is of one moment already");
            let remedy = "name the volume alone, or leave --at out";
            Err(Failure::new(Failure::USAGE, message, remedy))
        }
        Some(at) => Ok(ImageRef::past(image.volume, at)),
        None => Ok(image),
    }
}

/// Where it is, and nothing else: for `$(…)`.
fn attach_text(attached: &AttachInfo) -> String {
    let AttachInfo {
        device, link, uri, ..
    } = attached;
    link.as_ref()
        .or(device.as_ref())
        .or(uri.as_ref())
        .cloned()
        .unwrap_or_default()
}

fn resize_text(resized: &ResizeInfo) -> String {
    let ResizeInfo {
        volume,
        size_bytes,
        note,
    } = resized;
    let note = note.as_ref().map(|note| format!("; {note}"));
    format!(
        "{volume}: it has {}{}",
        bytes(*size_bytes),
        note.unwrap_or_default()
    )
}

fn retain_text(retained: &RetainInfo) -> String {
    let RetainInfo { volume, retain_ms } = retained;
    match retain_ms {
        0 => format!("{volume}: nothing is kept of what it was"),
        ms => format!("{volume}: what it was is kept for {}", span_text(*ms)),
    }
}

/// Exactly, and as it is said.
fn span_text(ms: u64) -> String {
    humantime::format_duration(std::time::Duration::from_millis(ms)).to_string()
}

fn list_text(volumes: &[VolumeInfo]) -> String {
    if volumes.is_empty() {
        return "there are no volumes; make one with `quarry volume create TENANT/NAME --size SIZE`".to_owned();
    }
    let row = |v: &VolumeInfo| {
        vec![
            v.image(),
            bytes(v.size_bytes),
            state_text(v),
            v.attached.as_ref().map(place).unwrap_or_default(),
            bytes(v.dirty_bytes),
            bytes(v.stored_bytes),
            v.problem.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = volumes.iter().map(row).collect();
    table(
        &[
            "VOLUME", "SIZE", "STATE", "AT", "DIRTY", "STORED", "PROBLEM",
        ],
        &rows,
    )
}

fn state_text(volume: &VolumeInfo) -> String {
    match (volume.state, volume.stalled, &volume.owner) {
        (State::Attached, true, _) => "stalled".to_owned(),
        (State::AttachedElsewhere, _, Some(owner)) => format!("attached on {}", owner.host),
        (state, _, _) => state.as_str().to_owned(),
    }
}

fn direct_text(attached: &crate::control::AttachedInfo, volume: &VolumeInfo) -> Option<String> {
    match &attached.direct_reads_refused {
        Some(why) => Some(format!("no ({why})")),
        None => attached.direct_reads.then(|| {
            let (sum, fallbacks) = (bytes(volume.direct_bytes), volume.direct_fallbacks);
            format!("yes ({sum}; {fallbacks} fell back)")
        }),
    }
}

fn place(attached: &crate::control::AttachedInfo) -> String {
    attached
        .device
        .as_ref()
        .or(attached.uri.as_ref())
        .cloned()
        .unwrap_or_else(|| attached.via.to_string())
}

fn kept_text(kept: u64, state: State) -> String {
    let what = match state {
        State::AttachedElsewhere => {
            "an attach here, which would take the volume from that host, gives them up with --discard-unsent"
        }
        _ => "`attach` sends them, or `attach --discard-unsent` gives them up",
    };
    let kept = bytes(kept);
    format!("up to {kept} written here that may never have been sent; {what}")
}

fn show_text(v: &VolumeInfo) -> String {
    let here = v.attached.as_ref();
    let mode = here.map(|a| {
        let read_only = if a.read_only { ", read-only" } else { "" };
        let mode = if a.mode.is_empty() {
            String::new()
        } else {
            format!(", {}", a.mode)
        };
        let queues = if a.queues > 1 {
            format!(", {} queues", a.queues)
        } else {
            String::new()
        };
        format!("{}{mode}{queues}{read_only}, epoch {}", a.via, a.epoch)
    });
    let owner = v.owner.as_ref().map(|o| {
        let since = time_ms(o.since_ms)
            .map(|t| format!(" since {t}"))
            .unwrap_or_default();
        format!("{} (cache {}){since}", o.host, o.cache)
    });
    let encryption = v.key.as_ref();
    let encryption = encryption.map(|key| format!("{}, key {key}", v.encryption));
    let counted = |count: u64, sum: u64| here.map(|_| format!("{count} ({})", bytes(sum)));
    fields(&[
        ("volume", Some(v.image())),
        ("id", Some(v.id.clone())),
        ("created", time_ms(v.created_ms)),
        (
            "size",
            Some(format!(
                "{}, sectors of {} bytes",
                bytes(v.size_bytes),
                v.sector_size
            )),
        ),
        (
            "size shown",
            here.filter(|a| a.size_bytes != v.size_bytes).map(|a| {
                format!(
                    "{}, until it is resized once more or attached anew",
                    bytes(a.size_bytes)
                )
            }),
        ),
        ("durability", Some(v.durability.to_string())),
        ("compression", Some(v.compression.to_string())),
        ("encryption", encryption),
        ("data keys", data_keys::data_keys_text(&v.data_keys)),
        (
            "cloned from",
            v.parent
                .as_ref()
                .map(|p| format!("{}@{}", p.volume, p.snapshot)),
        ),
        (
            "snapshots",
            (v.snapshots > 0 && v.snapshot.is_none()).then(|| v.snapshots.to_string()),
        ),
        (
            "retained",
            (v.retain_ms > 0).then(|| span_text(v.retain_ms)),
        ),
        ("limited", limit::rates_text(&v.rates)),
        (
            "tenant limited",
            v.limits.and_then(|l| limit::rates_text(&l.tenant_rates)),
        ),
        ("held", v.limits.as_ref().and_then(limit::held_text)),
        ("state", Some(state_text(v))),
        ("problem", v.problem.clone()),
        ("device", here.map(place)),
        ("link", here.and_then(|a| a.link.clone())),
        ("device owner", here.and_then(|a| a.device_owner.clone())),
        ("device mode", here.and_then(|a| a.device_mode.clone())),
        ("attached by", mode),
        ("direct reads", here.and_then(|a| direct_text(a, v))),
        ("attached since", here.and_then(|a| time_ms(a.since_ms))),
        ("owner", owner),
        ("stored", Some(bytes(v.stored_bytes))),
        ("live", here.map(|_| bytes(v.live_bytes))),
        ("debt", here.map(|_| bytes(v.debt_bytes))),
        ("dead", here.map(|_| bytes(v.dead_bytes))),
        ("pinned", here.map(|_| bytes(v.pinned_bytes))),
        ("compacted", here.map(|_| bytes(v.compacted_bytes))),
        ("deleted", here.map(|_| bytes(v.deleted_bytes))),
        ("cached", Some(bytes(v.cached_bytes))),
        ("dirty", Some(bytes(v.dirty_bytes))),
        (
            "oldest dirty",
            (v.dirty_bytes > 0).then(|| span_ms(v.rpo_ms)),
        ),
        (
            "kept here",
            v.kept_bytes.map(|kept| kept_text(kept, v.state)),
        ),
        ("reads", counted(v.reads, v.read_bytes)),
        ("writes", counted(v.writes, v.write_bytes)),
        ("hits", v.hit_ratio.map(percent)),
        ("uploaded", here.map(|_| bytes(v.uploaded_bytes))),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::OwnerInfo;

    #[test]
    fn image_at_a_time_is_of_a_volume_and_not_of_what_is_past_already() {
        let at = Some(Moment::from_ms(1000));
        let image = |text: &str| text.parse::<ImageRef>().unwrap();
        let past = image_at(image("acme/db"), at).unwrap();
        assert_eq!(past.to_string(), "acme/db@1970-01-01T00:00:01Z");
        assert_eq!(image_at(past.clone(), None).unwrap(), past);
        for named in [past, image("acme/db@nightly")] {
            assert_eq!(image_at(named, at).unwrap_err().kind, "usage");
        }
    }

    #[test]
    fn list_of_a_volume_elsewhere_names_the_host() {
        let owner = OwnerInfo {
            host: "node7".to_owned(),
            ..OwnerInfo::default()
        };
        let volume = VolumeInfo {
            tenant: "acme".to_owned(),
            name: "db".to_owned(),
            size_bytes: 100 << 30,
            state: State::AttachedElsewhere,
            owner: Some(owner),
            ..VolumeInfo::default()
        };
        let text = list_text(&[volume]);
        assert!(
            text.contains("acme/db  100GiB  attached on node7"),
            "{text}"
        );
    }

    #[test]
    fn volume_that_is_gone_from_here_says_what_the_cache_keeps_of_it() {
        let mut volume = VolumeInfo::default();
        assert!(!show_text(&volume).contains("kept here"));
        volume.kept_bytes = Some(1 << 20);
        let text = show_text(&volume);
        assert!(text.contains("up to 1MiB written here"), "{text}");
        assert!(text.contains("--discard-unsent"), "{text}");
    }

    #[test]
    fn attach_text_is_the_place_alone() {
        let link = Some("/dev/quarry/a/b".to_owned());
        assert_eq!(
            attach_text(&AttachInfo::ublk(
                &"a/b".parse().unwrap(),
                "/dev/ublkb0",
                link
            )),
            "/dev/quarry/a/b"
        );
        assert_eq!(
            attach_text(&AttachInfo::ublk(
                &"a/b".parse().unwrap(),
                "/dev/ublkb0",
                None
            )),
            "/dev/ublkb0"
        );
    }
}
