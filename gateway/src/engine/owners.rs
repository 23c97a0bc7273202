//! Which tenant's each volume is that this host has to do with just now.
//!
//! A volume's id is random, and what a tenant's own store says it is: two stores may say that they have it. Journals and
//! devices are found by it, so that only one of them is let in at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use quarry_objfmt::{TenantName, VolumeId};

type Table = Arc<Mutex<BTreeMap<VolumeId, (TenantName, usize)>>>;

/// Who has which volume here; of those that somebody has.
#[derive(Default)]
pub(super) struct Owners(Table);

/// A volume is the tenant's here until this is dropped.
pub(super) struct Owned {
    volume: VolumeId,
    all: Table,
}

impl Owners {
    /// The volume is this tenant's from now on, once more; `None` if it is another's.
    pub(super) fn take(&self, volume: VolumeId, tenant: &TenantName) -> Option<Owned> {
        let mut all = self.0.lock();
        let (owner, count) = all.entry(volume).or_insert_with(|| (tenant.clone(), 0));
        if owner != tenant {
            return None;
        }
        *count += 1;
        Some(Owned {
            volume,
            all: Arc::clone(&self.0),
        })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if let Some((_, count)) = all.get_mut(&self.volume) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.volume);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_is_one_tenants_until_that_has_let_go_of_all_of_it() {
        let [acme, globex] = ["acme", "globex"].map(|name| TenantName::new(name).unwrap());
        let (owners, id) = (Owners::default(), VolumeId::from_bytes([1; 16]));
        let (volume, snapshot) = (owners.take(id, &acme), owners.take(id, &acme));
        assert!(volume.is_some() && owners.take(id, &globex).is_none());
        drop(volume);
        assert!(snapshot.is_some() && owners.take(id, &globex).is_none());
        drop(snapshot);
        assert!(owners.take(id, &globex).is_some());
        assert!(owners.0.lock().is_empty());
    }
}
