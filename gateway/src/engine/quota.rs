//! Quotas: what a tenant has, and whether it may have more.
//!
//! What it has is counted in the store, each time; nothing is kept that could drift away from the truth. Between the
//! counting and the making others may make something too, on any host. So who wants more first writes that into the
//! tenant's record (a *reservation*, where the record was seen: all are in one order), then counts, with the
//! reservations before its own, then makes it, then takes the reservation out. *Crash in between: the reservation
//! counts for [`RESERVED_FOR_MS`], and is taken out by whoever reserves next.*
//!
//! Of two at the limit the first gets in, and the second is refused: if for the first's sake, it is told to try again.

use std::sync::Arc;

use futures::StreamExt as _;
use quarry_config::Size;
use quarry_objfmt::TenantSettings;
use quarry_objfmt::head::Head;
use quarry_objfmt::record::{RESERVATIONS_MAX, Reservation};

use super::tenants::{Same, Tenant};
use super::{Daemon, now_ms, registry};
use crate::backend::HeadCell;
use crate::control::{ApiError, ApiResult, Kind, SnapRef, TenantUsage, VolumeRef};
use crate::store::Lane;
use crate::trash;

/// How long what was reserved counts, if whoever did so never comes back: longer than any of its steps takes.
const RESERVED_FOR_MS: u64 = 10 * 60 * 1000;

/// Heads read side by side.
const HEADS_AT_ONCE: usize = 32;

/// What somebody wants to make for a tenant.
#[derive(Clone, Default, Debug)]
pub(super) struct Wish {
    /// What it is, for people.
    pub(super) what: String,
    pub(super) volumes: u64,
    pub(super) snapshots: u64,
    /// By how much the tenant's volumes get larger.
    pub(super) provisioned_bytes: u64,
}

impl Wish {
    /// A volume of so many bytes.
    pub(super) fn sized(volume: &VolumeRef, provisioned_bytes: u64) -> Self {
        Self {
            what: volume.to_string(),
            volumes: 1,
            provisioned_bytes,
            ..Self::default()
        }
    }

    /// So many bytes more of a volume.
    pub(super) fn growth(volume: &VolumeRef, provisioned_bytes: u64) -> Self {
        Self {
            volumes: 0,
            ..Self::sized(volume, provisioned_bytes)
        }
    }

    /// A snapshot.
    pub(super) fn snapshot(snapshot: &SnapRef) -> Self {
        Self {
            what: snapshot.to_string(),
            snapshots: 1,
            ..Self::default()
        }
    }
}

/// What was reserved; to be settled when it is made, or is not.
#[must_use]
pub(super) struct Admission(Option<(Arc<Tenant>, u64)>);

impl Daemon {
    /// Reserves what is wished for, if the tenant may have it.
    ///
    /// # Errors
    /// [`Kind::Conflict`], with the figure and the limit, if it may not, or if it is suspended.
    pub(super) async fn admit(&self, tenant: &Arc<Tenant>, wish: &Wish) -> ApiResult<Admission> {
        let settings = tenant.record().settings;
        if settings.suspended.is_some() {
            let message = format!("tenant {} is suspended", tenant.name);
            let remedy = format!("let it go on with `quarry tenant resume {}`", tenant.name);
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        if !has_quota(&settings) {
            if tenant.is_fresh() {
                return Ok(Admission(None));
            }
            let message = format!("what tenant {} may have is not known now", tenant.name);
            let remedy = "try again when the daemon's own store answers";
            return Err(ApiError::new(Kind::Unavailable, message, remedy));
        }
        let (id, now_ms) = (uuid::Uuid::new_v4().as_u64_pair().0, now_ms());
        let reserved = self
            .change_tenant(&tenant.name, Same::Left, |record| {
                let held = &mut record.reservations;
                // Whichever host's clock is ahead.
                held.retain(|r| now_ms.abs_diff(r.since_ms) < RESERVED_FOR_MS);
                // Our own try before this one, whose answer was lost.
                if held.iter().any(|r| r.id == id) {
                    return Ok(());
                }
                if held.len() >= RESERVATIONS_MAX {
                    let message = format!(
                        "{RESERVATIONS_MAX} things are being made for tenant {} already",
                        record.name
                    );
                    return Err(ApiError::new(Kind::Conflict, message, "try again"));
                }
                held.push(Reservation {
                    id,
                    what: wish.what.clone(),
                    since_ms: now_ms,
                    volumes: wish.volumes,
                    snapshots: wish.snapshots,
                    provisioned_bytes: wish.provisioned_bytes,
                });
                Ok(())
            })
            .await?;
        let admission = Admission(Some((Arc::clone(tenant), id)));
        let counted = self.usage(tenant).await;
        let fits = counted.and_then(|usage| {
            let before = reserved.reservations.iter().take_while(|r| r.id != id);
            fits(&reserved.settings, &reserved.name, &usage, before, wish)
                .inspect_err(|_| tenant.note_refusal())
        });
        match fits {
            Ok(()) => Ok(admission),
            Err(error) => {
                self.settle(admission).await;
                Err(error)
            }
        }
    }

    /// Takes a reservation out: what it was for is there by now, or never will be.
    pub(super) async fn settle(&self, admission: Admission) {
        let Some((tenant, id)) = admission.0 else {
            return;
        };
        let taken_out = self.change_tenant(&tenant.name, Same::Left, |record| {
            record.reservations.retain(|r| r.id != id);
            Ok(())
        });
        if let Err(error) = taken_out.await {
            tracing::warn!(tenant = %tenant.name, %error, "what was reserved counts for some minutes more");
        }
    }

    /// Counts what a tenant has.
    pub(super) async fn usage(&self, tenant: &Tenant) -> ApiResult<TenantUsage> {
        let store = &tenant.control();
        let names = registry::volume_names(store, &tenant.name).await?;
        let mut usage = TenantUsage {
            volumes: names.len() as u64,
            ..TenantUsage::default()
        };
        let heads = names.into_iter().map(|volume| async move {
            let head = self.head_or_none(store, &volume).await?;
            // What is attached here knows better than the newest head.
            let stored = head.as_ref().map(|head| self.stored_bytes(&volume, head));
            ApiResult::Ok((head, stored.unwrap_or_default()))
        });
        let mut heads = futures::stream::iter(heads).buffer_unordered(HEADS_AT_ONCE);
        while let Some(found) = heads.next().await {
            let (Some(head), stored) = found? else {
                continue;
            };
            usage.snapshots += head.snapshots.len() as u64;
            usage.provisioned_bytes = usage.provisioned_bytes.saturating_add(head.size.bytes());
            usage.stored_bytes = usage.stored_bytes.saturating_add(stored);
        }
        let deleted = trash::records(store, &tenant.name).await;
        let deleted = deleted.map_err(|error| {
            ApiError::new(
                Kind::Unavailable,
                format!("its trash: {error}"),
                "try again",
            )
        })?;
        let heads = deleted.into_iter().map(|record| async move {
            let head = HeadCell::read(store, &tenant.name, record.volume)
                .await
                .ok();
            head.map_or(0, |(head, _)| head.stored_bytes)
        });
        let mut heads = futures::stream::iter(heads).buffer_unordered(HEADS_AT_ONCE);
        while let Some(stored) = heads.next().await {
            usage.stored_bytes = usage.stored_bytes.saturating_add(stored);
        }
        tenant.note_usage(usage);
        Ok(usage)
    }

    /// `None` if it was deleted meanwhile, or its head cannot be read: it counts as one volume all the same.
    async fn head_or_none(&self, store: &Lane, volume: &VolumeRef) -> ApiResult<Option<Head>> {
        match registry::head(store, volume).await {
            Ok(head) => Ok(Some(head)),
            Err(error) if matches!(error.kind, Kind::NotFound | Kind::Damaged) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn stored_bytes(&self, volume: &VolumeRef, head: &Head) -> u64 {
        match self.attached_here(&volume.clone().into()) {
            Ok(attached) if !attached.read_only => attached.backend.stored().0,
            _ => head.stored_bytes,
        }
    }
}

fn has_quota(settings: &TenantSettings) -> bool {
    settings.volumes_max.is_some()
        || settings.snapshots_max.is_some()
        || settings.provisioned_bytes_max.is_some()
        || settings.stored_bytes_max.is_some()
}

/// An error if `usage`, what is reserved before and the wish are more than a limit. What is stored already at its limit
/// lets nothing more be made, for everything that is made will be written to.
fn fits<'a>(
    settings: &TenantSettings,
    tenant: &str,
    usage: &TenantUsage,
    before: impl Iterator<Item = &'a Reservation>,
    wish: &Wish,
) -> ApiResult<()> {
    let mut reserved = Wish::default();
    for one in before {
        reserved.volumes += one.volumes;
        reserved.snapshots += one.snapshots;
        reserved.provisioned_bytes = reserved
            .provisioned_bytes
            .saturating_add(one.provisioned_bytes);
    }
    let number: fn(u64) -> String = |n| n.to_string();
    let size: fn(u64) -> String = |bytes| Size::new(bytes).to_string();
    let checks = [
        (
            "volumes",
            number,
            settings.volumes_max,
            usage.volumes,
            reserved.volumes,
            wish.volumes,
        ),
        (
            "snapshots",
            number,
            settings.snapshots_max,
            usage.snapshots,
            reserved.snapshots,
            wish.snapshots,
        ),
        (
            "of provisioned bytes",
            size,
            settings.provisioned_bytes_max,
            usage.provisioned_bytes,
            reserved.provisioned_bytes,
            wish.provisioned_bytes,
        ),
    ];
    for (what, shown, max, has, reserved, wanted) in checks {
        let Some(max) = max.filter(|_| wanted > 0) else {
            continue;
        };
        let alone = has.saturating_add(wanted);
        if alone > max {
            let message = format!(
                "tenant {tenant} has {} {what}, and with {} more there would be {} of {} that it may have",
                shown(has),
                shown(wanted),
                shown(alone),
                shown(max)
            );
            let remedy = "delete some, or raise the limit with `quarry tenant update`";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        if alone.saturating_add(reserved) > max {
            let message = format!(
                "tenant {tenant} has {} {what}, {} more are being made, and it may have {}",
                shown(has),
                shown(reserved),
                shown(max)
            );
            return Err(ApiError::new(
                Kind::Conflict,
                message,
                "try again in a moment",
            ));
        }
    }
    if let Some(max) = settings.stored_bytes_max
        && usage.stored_bytes >= max
    {
        let message = format!(
            "tenant {tenant} has {} in the store, and may have {}",
            Size::new(usage.stored_bytes).human(),
            Size::new(max).human()
        );
        let remedy = "delete volumes or snapshots and purge them from the trash, or raise the limit with `quarry tenant update`";
        return Err(ApiError::new(Kind::Conflict, message, remedy));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HAS: TenantUsage = TenantUsage {
        volumes: 2,
        snapshots: 1,
        provisioned_bytes: 70,
        stored_bytes: 10,
    };

    fn try_it(settings: &TenantSettings, before: &[Reservation], wish: &Wish) -> ApiResult<()> {
        fits(settings, "acme", &HAS, before.iter(), wish)
    }

    fn volume(bytes: u64) -> Wish {
        Wish {
            volumes: 1,
            provisioned_bytes: bytes,
            ..Wish::default()
        }
    }

    fn reservation(bytes: u64) -> Reservation {
        Reservation {
            id: 1,
            what: "acme/other".to_owned(),
            since_ms: 0,
            volumes: 1,
            snapshots: 0,
            provisioned_bytes: bytes,
        }
    }

    #[test]
    fn what_fits_exactly_is_admitted_and_a_byte_more_is_refused_with_figure_and_limit() {
        let settings = TenantSettings {
            provisioned_bytes_max: Some(100),
            volumes_max: Some(3),
            ..TenantSettings::default()
        };
        try_it(&settings, &[], &volume(30)).unwrap();
        let error = try_it(&settings, &[], &volume(31)).unwrap_err();
        for figure in ["acme", "70", "31", "101", "100"] {
            assert!(error.message.contains(figure), "{error}");
        }
        let growth = Wish {
            provisioned_bytes: 30,
            ..Wish::default()
        };
        try_it(&settings, &[], &growth).unwrap();
        let settings = TenantSettings {
            volumes_max: Some(2),
            ..settings
        };
        assert!(try_it(&settings, &[], &volume(1)).is_err());
        try_it(&settings, &[], &growth).unwrap();
    }

    #[test]
    fn sizes_of_a_quota_are_told_in_units() {
        let settings = TenantSettings {
            provisioned_bytes_max: Some(1 << 30),
            ..TenantSettings::default()
        };
        let usage = TenantUsage {
            provisioned_bytes: 1 << 30,
            ..HAS
        };
        let refused = fits(
            &settings,
            "acme",
            &usage,
            std::iter::empty(),
            &volume(1 << 30),
        );
        let words =
            "has 1GiB of provisioned bytes, and with 1GiB more there would be 2GiB of 1GiB that";
        let error = refused.unwrap_err();
        assert!(error.message.contains(words), "{error}");
    }

    #[test]
    fn what_is_being_made_counts_and_asks_for_patience() {
        let settings = TenantSettings {
            provisioned_bytes_max: Some(100),
            ..TenantSettings::default()
        };
        try_it(&settings, &[reservation(20)], &volume(10)).unwrap();
        let error = try_it(&settings, &[reservation(21)], &volume(10)).unwrap_err();
        assert!(error.remedy.contains("try again"), "{error}");
    }

    #[test]
    fn limit_lowered_below_what_is_there_lets_nothing_in_but_what_it_does_not_count() {
        let settings = TenantSettings {
            volumes_max: Some(1),
            stored_bytes_max: Some(11),
            ..TenantSettings::default()
        };
        assert!(try_it(&settings, &[], &volume(1)).is_err());
        let snapshot = Wish {
            snapshots: 1,
            ..Wish::default()
        };
        try_it(&settings, &[], &snapshot).unwrap();
        let settings = TenantSettings {
            stored_bytes_max: Some(10),
            ..TenantSettings::default()
        };
        let error = try_it(&settings, &[], &snapshot).unwrap_err();
        assert!(error.message.contains("10B in the store"), "{error}");
    }
}
