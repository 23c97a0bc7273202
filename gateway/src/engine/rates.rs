//! How fast volumes and tenants may be: from the records in the store to the gates that reactors look at.
//!
//! A volume's rates stand in the record of its name, which anybody may set: it is no right to write. *First the record,
//! where it was seen, then the gate. Crash in between: the next attach, or the next look, finds the record.* Set on another
//! host they are seen within [`LOOK_PAUSE`].

use std::time::Duration;

use futures::StreamExt as _;
use quarry_cache::GroupLimits;
use quarry_objfmt::record::Rates;

use super::slot::Attached;
use super::tenants::Tenant;
use super::{Daemon, registry};
use crate::control::{ApiResult, ImageRef, LimitsInfo, RatesInfo, RatesSpec, VolumeRef};
use crate::qos::VolumeGate;

/// Between two looks at the rates of all that is attached: a GET each.
const LOOK_PAUSE: Duration = Duration::from_secs(300);

/// Records looked at side by side.
const LOOKS_AT_ONCE: usize = 16;

impl Daemon {
    /// Makes a tenant's record count here, as far as it is about the cache: from the next segment on.
    pub(super) fn set_cache_share(&self, tenant: &Tenant) {
        let (gate, settings) = (tenant.gate(), tenant.record().settings);
        let cache = &mut self.shared.lock().cache;
        let segment_size = u64::from(cache.geometry().segment_size);
        let segments = |bytes: u64| u32::try_from(bytes / segment_size).unwrap_or(u32::MAX);
        let limits = GroupLimits {
            weight: gate.share().weight(),
            dirty_max: settings.dirty_bytes_max.map(segments),
            reserve: settings.cache_reserve_bytes.map_or(0, segments),
            space_max: settings.cache_bytes_max.map(segments),
        };
        cache.set_group(gate.group(), limits);
    }

    /// What is reserved for a tenant that is no more is anybody's.
    pub(super) fn give_up_cache_share(&self, tenant: &Tenant) {
        let cache = &mut self.shared.lock().cache;
        cache.set_group(tenant.gate().group(), GroupLimits::default());
    }

    pub(super) async fn set_volume_rates(
        &self,
        volume: &VolumeRef,
        spec: RatesSpec,
    ) -> ApiResult<RatesInfo> {
        let image = ImageRef::from(volume.clone());
        let slot = self.slot(&image);
        let _change = slot.change.lock().await;
        let rates = Rates::from(spec);
        let written = match self.control(&volume.tenant).await {
            Ok(store) => registry::set_rates(&store, volume, rates).await,
            Err(error) => Err(error),
        };
        if let (Ok(()), Some(attached)) = (&written, slot.stage().attached()) {
            attached.gate.set_rates(&rates);
        }
        self.forget_idle(&image, &slot);
        let volume = volume.to_string();
        written.map(|()| RatesInfo {
            volume,
            rates: spec,
        })
    }

    /// Looks for rates that were set on other hosts, for ever.
    pub async fn look_at_rates(&self) {
        loop {
            tokio::time::sleep(LOOK_PAUSE).await;
            // Side by side: a store that hangs holds up its own only.
            let looks = self
                .attached()
                .into_iter()
                .map(|(image, attached)| async move {
                    if !image.is_past() {
                        look_at_rates_of(&image, &attached).await;
                    }
                });
            let looks = futures::stream::iter(looks).buffer_unordered(LOOKS_AT_ONCE);
            looks.collect::<()>().await;
        }
    }
}

async fn look_at_rates_of(image: &ImageRef, attached: &Attached) {
    let seen = attached.gate.changes();
    let store = attached.tenant.control();
    match registry::find_record(&store, &image.volume).await {
        // Set here meanwhile, which may be newer than what was read.
        Ok(_) if attached.gate.changes() != seen => {}
        // By its id, for the name may have gone to another volume meanwhile.
        Ok(record) if record.volume == attached.backend.volume() => {
            attached.gate.set_rates(&record.rates);
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(volume = %image, %error, "its rates stay"),
    }
}

/// What limits do to a volume, as the API tells it.
pub(super) fn limits_info(gate: &VolumeGate) -> LimitsInfo {
    let stats = gate.stats();
    LimitsInfo {
        tenant_rates: gate.tenant().rates().into(),
        iops_now: stats.requests_a_second,
        bandwidth_bytes_now: stats.bytes_a_second,
        held: stats.held,
        oldest_held_ms: stats.oldest_held_ms,
        held_total: stats.held_total,
        held_ms: stats.held_ms,
    }
}
