//! The end of a map object that no head names: its manifest, and the usage before it.
//!
//! A head says where they lie in its map's object. Of another object that is found from the front, for it is
//! nodes end to end; so all of it is read.

use std::collections::BTreeSet;

use quarry_objfmt::map::{
    Basis, Manifest, MapObjectId, NODE_HEADER_LEN, NODE_MAGIC, NodeKind, Usage, open_node,
};
use quarry_objfmt::{Epoch, MapSeq, RootRef, TenantName, keys};

use super::sound::{Unsound, insist};
use crate::store::{Store, get_whole};

/// Of a volume's map objects those that a head may have named. An attachment takes up the numbers where the head says, so one
/// whose number a later epoch gave again was stored by a writer that did not come to move the head to it.
pub(crate) fn named(maps: &BTreeSet<(Epoch, MapSeq)>) -> BTreeSet<(Epoch, MapSeq)> {
    let (mut last, mut below) = (None, None);
    let mut named = BTreeSet::new();
    for &(epoch, seq) in maps.iter().rev() {
        // The last of an epoch was its lowest.
        if let Some((_, lowest)) = last.filter(|(of, _)| *of != epoch) {
            below = Some(below.map_or(lowest, |below: MapSeq| below.min(lowest)));
        }
        if below.is_none_or(|below| seq < below) {
            named.insert((epoch, seq));
        }
        last = Some((epoch, seq));
    }
    named
}

/// The end of a map object.
#[derive(Clone, Debug)]
pub(crate) struct MapEnd {
    /// As a head would name it.
    pub root: RootRef,
    pub manifest: Manifest,
    /// `None` if it has none. A map whose usage is damaged has no end: what it lacks is where its log goes on.
    pub usage: Option<Usage>,
}

impl MapEnd {
    /// What the map is of; all 0 if that is not known.
    pub fn basis(&self) -> Basis {
        let basis = self.usage.as_ref().map(|usage| usage.basis);
        basis.unwrap_or_default()
    }

    /// Reads it; `None` if the object ends with a table.
    ///
    /// # Errors
    /// [`Unsound`]; that the object is gone is the store's.
    pub async fn read(
        store: &dyn Store,
        tenant: &TenantName,
        id: MapObjectId,
    ) -> Result<Option<Self>, Unsound> {
        let key = keys::map_key(tenant, id.volume, id.epoch, id.seq);
        insist(|| async {
            let object = get_whole(store, &key).await.map_err(Unsound::Store)?;
            Self::of(id, &object).map_err(Unsound::Damaged)
        })
        .await
    }

    fn of(id: MapObjectId, object: &[u8]) -> Result<Option<Self>, String> {
        let (before, at) = last_nodes(object).ok_or("it is no row of nodes")?;
        // Its kind: a table ends with an index node.
        if object[at + 6] != NodeKind::Manifest as u8 {
            return Ok(None);
        }
        let (Ok(offset), Ok(len)) = (u32::try_from(at), u32::try_from(object.len() - at)) else {
            return Err("it is too long".to_owned());
        };
        let manifest = Manifest::decode(id, offset, &object[at..]).map_err(|e| e.to_string())?;
        let usage = before.map(|from| usage(id, from, &object[from..at]));
        let (place, usage) = usage.transpose()?.flatten().unzip();
        Ok(Some(Self {
            root: RootRef {
                epoch: id.epoch,
                seq: id.seq,
                offset,
                len,
                usage: place,
            },
            manifest,
            usage,
        }))
    }
}

/// A usage, and its place in its object: offset and length, in bytes.
type PlacedUsage = ((u32, u32), Usage);

/// The usage that the node before a manifest is, and its place; none if that is the end of a table.
fn usage(id: MapObjectId, from: usize, node: &[u8]) -> Result<Option<PlacedUsage>, String> {
    let (Ok(offset), Ok(len)) = (u32::try_from(from), u32::try_from(node.len())) else {
        return Err("it is too long".to_owned());
    };
    if let Ok((NodeKind::Index, _)) = open_node(id, offset, node) {
        return Ok(None);
    }
    let usage = Usage::decode(id, offset, node)
        .map_err(|error| format!("where its log goes on cannot be told: {error}"))?;
    Ok(Some(((offset, len), usage)))
}

/// Where the last node of a map object begins, and the one before it, if there is one: if it is nodes end to
/// end.
fn last_nodes(object: &[u8]) -> Option<(Option<usize>, usize)> {
    let (mut before, mut at) = (None, 0);
    loop {
        let header = object.get(at..at + NODE_HEADER_LEN)?;
        if header[..4] != NODE_MAGIC {
            return None;
        }
        let stored = u32::from_le_bytes(header[16..20].try_into().ok()?);
        let end = at + NODE_HEADER_LEN + usize::try_from(stored).ok()?;
        match end.cmp(&object.len()) {
            std::cmp::Ordering::Less => (before, at) = (Some(at), end),
            std::cmp::Ordering::Equal => return Some((before, at)),
            std::cmp::Ordering::Greater => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_whose_number_a_later_epoch_gave_again_was_never_named() {
        let maps = |all: &[(u32, u64)]| -> BTreeSet<_> {
            let map = |(epoch, seq): &(u32, u64)| (Epoch::new(*epoch), MapSeq::new(*seq));
            all.iter().map(map).collect()
        };
        for (all, expected) in [
            (&[][..], &[][..]),
            (&[(1, 1), (1, 2), (3, 3)], &[(1, 1), (1, 2), (3, 3)]),
            (
                &[(1, 1), (1, 2), (2, 3), (3, 3), (3, 4)],
                &[(1, 1), (1, 2), (3, 3), (3, 4)],
            ),
            (&[(1, 7), (1, 8), (2, 8), (2, 9), (4, 7)], &[(4, 7)]),
            (&[(1, 6), (1, 8), (2, 8), (4, 9)], &[(1, 6), (2, 8), (4, 9)]),
        ] {
            assert_eq!(named(&maps(all)), maps(expected), "{all:?}");
        }
    }

    #[test]
    fn last_nodes_of_what_is_no_row_of_nodes_is_none() {
        for object in [&b""[..], b"QMAP", &[0; 100], &[b'Q'; 24]] {
            assert_eq!(last_nodes(object), None);
        }
        let mut node = [0; 30];
        node[..4].copy_from_slice(&NODE_MAGIC);
        node[16] = 6;
        assert_eq!(last_nodes(&node), Some((None, 0)));
        node[16] = 7;
        assert_eq!(last_nodes(&node), None);
    }
}
